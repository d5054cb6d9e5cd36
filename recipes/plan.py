"""Does a run fit on a machine, and what helps: python recipes/plan.py +config=NAME [cluster=NAME] [key=value ...]"""

from gptj_train.config import PlanConfig, model_config_of
from gptj_train.launch.machine import described_machine
from gptj_train.launch.recipe import recipe
from gptj_train.planning.answer import answer_lines
from gptj_train.planning.run_plan import RunPlan


@recipe(PlanConfig, primary="plan", one_process=True)
def main(cfg: PlanConfig) -> None:
    plan = RunPlan.of(cfg, model_config_of(cfg.model, cfg.init_from))
    machine = described_machine(cfg, output_dir=cfg.output_dir, nvme_path=cfg.engine.nvme_path)
    print("\n".join(answer_lines(plan, cfg, machine)))


if __name__ == "__main__":
    main()
