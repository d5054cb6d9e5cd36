"""Tokenize and pack ahead of time: python recipes/prepare_data.py +config=NAME data.train=FILES [inspect=N]"""

from gptj_train.config import PrepareDataConfig
from gptj_train.data.corpus import prepare
from gptj_train.data.inspection import render_windows
from gptj_train.launch.ranks import rank
from gptj_train.launch.recipe import recipe
from gptj_train.vocabulary import build_vocabulary


@recipe(PrepareDataConfig, primary="prepare_data")
def main(cfg: PrepareDataConfig) -> None:
    tokenizer, _, _ = build_vocabulary(cfg)
    data = prepare(cfg.data, tokenizer, cfg.sequence_length, cfg.held_out)
    if rank() != 0:
        # On other hosts: they have prepared their share of the files.
        return
    for name, split in data.splits.items():
        print(name)
        for fact, value in split.facts():
            print(f"  {fact:<17} {value}")
    if cfg.inspect > 0:
        for window in render_windows(data.train, tokenizer, count=cfg.inspect, seed=cfg.seed):
            print(window)


if __name__ == "__main__":
    main()
