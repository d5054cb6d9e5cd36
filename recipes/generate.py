"""Text from a checkpoint: python recipes/generate.py checkpoint=DIR prompt="..." """

import json

from gptj_train.config import GenerateConfig
from gptj_train.inference.text_generator import TextGenerator, prompts_in, typed_prompts
from gptj_train.launch.recipe import recipe


@recipe(GenerateConfig, primary="generate", one_process=True)
def main(cfg: GenerateConfig) -> None:
    batches = prompts_in(cfg.prompts, cfg.batch_size) if cfg.prompts is not None else []
    writer = TextGenerator(cfg.checkpoint, cfg.dtype)
    for batch in batches:
        for prompt, text in zip(batch, writer.complete(batch, cfg.stop_strings, **cfg.options), strict=True):
            print(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False), flush=True)
    if cfg.prompts is not None:
        return
    for prompt in typed_prompts() if cfg.prompt is None else [cfg.prompt]:
        pieces = writer.stream(prompt, cfg.stop_strings, **cfg.options)
        print(prompt + next(pieces), end="", flush=True)  # an option that is wrong is told before the prompt
        for piece in pieces:
            print(piece, end="", flush=True)
        print()


if __name__ == "__main__":
    main()
