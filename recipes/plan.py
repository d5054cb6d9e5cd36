"""Memory, disk and time that a training run will need: python recipes/plan.py +config=NAME [key=value ...]"""

import torch

from gptj_train import GPTJForCausalLM
from gptj_train.config import PlanConfig, shape_of
from gptj_train.launch import recipe
from gptj_train.planning import Planned, lines
from gptj_train.training.adapters import adapted


@recipe(PlanConfig, one_process=True)
def main(cfg: PlanConfig) -> None:
    model = shape_of(cfg.model, cfg.init_from)
    with torch.device("meta"):
        planned = Planned.of(adapted(GPTJForCausalLM(model), cfg.lora), model, cfg)
    print("\n".join(lines(planned, cfg)))


if __name__ == "__main__":
    main()
