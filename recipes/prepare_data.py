"""Tokenize and pack ahead of training: python recipes/prepare_data.py +config=NAME [key=value ...]"""

from gptj_train.config import ClmConfig, vocabulary
from gptj_train.data.cache import prepare
from gptj_train.launch import recipe


@recipe(ClmConfig, primary="clm")
def main(cfg: ClmConfig) -> None:
    tokenizer, *_ = vocabulary(cfg)
    train, validation = prepare(cfg.data, tokenizer, cfg.sequence_length)
    print(f"training  {train.counts}")
    if validation is not None:
        print(f"held-out  {validation.counts}")
    print(f"packed in {cfg.data.cache_dir}; training with the same config finds it there")


if __name__ == "__main__":
    main()
