"""Training checkpoint -> HF folder, on any host: python recipes/export.py run=DIR"""

from gptj_train.config import ExportConfig
from gptj_train.export.from_checkpoint import export_checkpoint
from gptj_train.export.from_engine import report_path
from gptj_train.launch.recipe import recipe
from gptj_train.weights.hf_writer import parse_size


@recipe(ExportConfig, primary="export", one_process=True)
def main(cfg: ExportConfig) -> None:
    folder = export_checkpoint(cfg.run, cfg.output_dir, cfg.dtype, parse_size(cfg.export_shard_size))
    print(f"exported to {folder}; what was checked: {report_path(folder)}")


if __name__ == "__main__":
    main()
