"""Tasks of the lm-eval harness on a local model: python recipes/harness.py checkpoint=DIR 'tasks=[NAME]'"""

from gptj_train.config import HarnessConfig
from gptj_train.inference.text_generator import TextGenerator
from gptj_train.launch.recipe import recipe
from gptj_train.launch.run_folder import check_run_folder


@recipe(HarnessConfig, primary="harness", one_process=True)
def main(cfg: HarnessConfig) -> None:
    # Inside the function: a missing lm-eval package is then an error of one line.
    from gptj_train.inference.lm_eval import run_tasks

    if cfg.output_dir is not None:
        check_run_folder(cfg.output_dir)
    table = run_tasks(
        TextGenerator(cfg.checkpoint, cfg.dtype, cfg.quantize),
        tasks=cfg.tasks,
        include_path=cfg.include_path,
        num_fewshot=cfg.num_fewshot,
        limit=cfg.limit,
        batch_size=cfg.batch_size,
        output_dir=cfg.output_dir,
    )
    print(table)


if __name__ == "__main__":
    main()
