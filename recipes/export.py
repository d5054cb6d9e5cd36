"""Training checkpoint -> HF folder, on any host: python recipes/export.py run=DIR"""

from gptj_train.config import ExportConfig
from gptj_train.launch import recipe
from gptj_train.training.export_checkpoint import export_checkpoint


@recipe(ExportConfig, one_process=True)
def main(cfg: ExportConfig) -> None:
    folder = export_checkpoint(cfg.run, cfg.output_dir, cfg.dtype)
    print(f"exported to {folder}; what was checked: {folder.parent}/export_report.json")


if __name__ == "__main__":
    main()
