"""Training checkpoint -> HF folder: python recipes/export.py run=DIR"""

from gptj_train.config import ExportConfig
from gptj_train.launch import rank, recipe
from gptj_train.training.export import export_checkpoint
from gptj_train.training.retention import newest_whole


@recipe(ExportConfig)
def main(cfg: ExportConfig) -> None:
    if rank() == 0:
        checkpoint = newest_whole(cfg.run)
        export_checkpoint(checkpoint, cfg.output_dir, cfg.dtype)
        print(f"{checkpoint} as a model in {cfg.output_dir}")


if __name__ == "__main__":
    main()
