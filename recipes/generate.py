"""Text from an exported or original checkpoint: python recipes/generate.py checkpoint=DIR prompt="..." """

import json

from gptj_train.config import GenerateConfig
from gptj_train.launch import recipe
from gptj_train.tasks.generation import TextGenerator, prompts_in, typed_prompts


@recipe(GenerateConfig)
def main(cfg: GenerateConfig) -> None:
    batches = prompts_in(cfg.prompts, cfg.batch_size) if cfg.prompts is not None else []
    writer = TextGenerator(cfg.checkpoint)
    options = {
        "max_new_tokens": cfg.max_new_tokens,
        "max_length": cfg.max_length,
        "do_sample": cfg.do_sample,
        "temperature": cfg.temperature,
        "top_k": cfg.top_k,
        "top_p": cfg.top_p,
        "repetition_penalty": cfg.repetition_penalty,
        "seed": cfg.seed,
    }
    if cfg.prompts is not None:
        for batch in batches:
            for prompt, text in zip(batch, writer.complete(batch, cfg.stop, **options), strict=True):
                print(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False), flush=True)
        return
    for prompt in typed_prompts() if cfg.prompt is None else [cfg.prompt]:
        print(prompt, end="", flush=True)
        for piece in writer.stream(prompt, cfg.stop, **options):
            print(piece, end="", flush=True)
        print()


if __name__ == "__main__":
    main()
