"""Text from an exported or original checkpoint: python recipes/generate.py checkpoint=DIR prompt="..." """

from gptj_train.config import GenerateConfig
from gptj_train.launch import recipe
from gptj_train.tasks.generation import complete


@recipe(GenerateConfig)
def main(cfg: GenerateConfig) -> None:
    (text,) = complete(
        cfg.checkpoint,
        [cfg.prompt],
        max_length=cfg.max_length,
        max_new_tokens=cfg.max_new_tokens,
        do_sample=cfg.do_sample,
        temperature=cfg.temperature,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        repetition_penalty=cfg.repetition_penalty,
        seed=cfg.seed,
    )
    print(text)


if __name__ == "__main__":
    main()
