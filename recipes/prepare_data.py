"""Tokenize and pack ahead of time: python recipes/prepare_data.py +config=NAME data.train=FILES [inspect=N]"""

from gptj_train.config import PrepareDataConfig
from gptj_train.data.corpus import prepare
from gptj_train.data.inspection import shown
from gptj_train.finetune import build_vocabulary
from gptj_train.launch.recipe import recipe


@recipe(PrepareDataConfig, one_process=True)
def main(cfg: PrepareDataConfig) -> None:
    tokenizer, *_ = build_vocabulary(cfg)
    data = prepare(cfg.data, tokenizer, cfg.sequence_length)
    for name, part in data.parts.items():
        print(f"{name}\n" + "\n".join(f"  {fact:<17} {value}" for fact, value in part.facts()))
    if cfg.inspect:
        print("\n".join(shown(data.train, tokenizer, cfg.inspect, cfg.seed)))


if __name__ == "__main__":
    main()
