"""Tasks of the lm-eval harness on a local model: python recipes/harness.py checkpoint=DIR 'tasks=[NAME]'"""

from gptj_train.config import HarnessConfig
from gptj_train.inference.text_generator import TextGenerator
from gptj_train.launch.recipe import recipe
from gptj_train.launch.run_folder import check_run_folder


@recipe(HarnessConfig, primary="harness", one_process=True)
def main(cfg: HarnessConfig) -> None:
    from gptj_train.inference.lm_eval import run_tasks  # here, so that what is missing is told in a line

    if cfg.output_dir is not None:
        check_run_folder(cfg.output_dir)
    writer = TextGenerator(cfg.checkpoint, cfg.dtype)
    table = run_tasks(writer, cfg.tasks, cfg.include_path, cfg.num_fewshot, cfg.limit, cfg.batch_size, cfg.output_dir)
    print(table)


if __name__ == "__main__":
    main()
