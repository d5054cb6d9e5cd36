"""Memory, disk and time that a training run will need: python recipes/plan.py +config=NAME [key=value ...]"""

import torch

from gptj_train import GPTJForCausalLM
from gptj_train.config import PlanConfig, model_config_of
from gptj_train.launch.recipe import recipe
from gptj_train.model.lora import with_lora
from gptj_train.planning import RunPlan, plan_lines


@recipe(PlanConfig, primary="plan", one_process=True)
def main(cfg: PlanConfig) -> None:
    model_config = model_config_of(cfg.model, cfg.init_from)
    with torch.device("meta"):
        model = with_lora(GPTJForCausalLM(model_config), cfg.lora)
    plan = RunPlan.of(model, model_config, cfg)
    print("\n".join(plan_lines(plan, cfg)))


if __name__ == "__main__":
    main()
