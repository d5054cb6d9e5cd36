"""A tokenizer from your own text: python recipes/train_tokenizer.py data.train=FILES output_dir=DIR vocab_size=N"""

from gptj_train.config import TrainTokenizerConfig
from gptj_train.data.tokenizer_training import train_tokenizer
from gptj_train.launch.recipe import recipe
from gptj_train.launch.run_folder import check_run_folder


@recipe(TrainTokenizerConfig, primary="train_tokenizer", one_process=True)
def main(cfg: TrainTokenizerConfig) -> None:
    check_run_folder(cfg.output_dir)
    tokenizer, facts = train_tokenizer(
        cfg.data, vocab_size=cfg.vocab_size, special_tokens=cfg.special_tokens, max_megabytes=cfg.max_megabytes
    )
    tokenizer.save(cfg.output_dir)
    print(f"{facts}; in {cfg.output_dir}")
    print(f"Train with tokenizer={cfg.output_dir}; model.vocab_size must be at least {len(tokenizer)}")


if __name__ == "__main__":
    main()
