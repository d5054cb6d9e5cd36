"""Metrics of a checkpoint of any task: deepspeed -q recipes/evaluate.py checkpoint=DIR data.validation=FILES"""

from gptj_train.config import EvaluateConfig
from gptj_train.inference.evaluate_checkpoint import build_task, evaluate, write_results
from gptj_train.launch.host import share_cores
from gptj_train.launch.ranks import rank, world_size
from gptj_train.launch.recipe import recipe
from gptj_train.launch.run_folder import check_run_folder
from gptj_train.metrics_file import results_of


@recipe(EvaluateConfig, primary="evaluate")
def main(cfg: EvaluateConfig) -> None:
    share_cores()
    if cfg.output_dir is not None:
        check_run_folder(cfg.output_dir)
    task = build_task(cfg)
    metrics = evaluate(cfg.checkpoint, cfg.dtype, task, rank(), world_size(), cfg.quantize)
    if rank() == 0:
        print("\n".join(f"{name:<24} {value:.4f}" for name, value in results_of(metrics).items()))
        if cfg.output_dir is not None:
            write_results(cfg.output_dir, metrics, task)


if __name__ == "__main__":
    main()
