"""Text from a checkpoint: python recipes/generate.py checkpoint=DIR prompt="..." """

import json

from gptj_train.config import GenerateConfig
from gptj_train.inference.prompt_loop import PromptLoop
from gptj_train.inference.text_generator import TextGenerator, read_prompts
from gptj_train.launch.recipe import recipe


@recipe(GenerateConfig, primary="generate", one_process=True)
def main(cfg: GenerateConfig) -> None:
    # Before the model, which takes minutes to load: a wrong file name should not.
    batches = read_prompts(cfg.prompts, cfg.batch_size) if cfg.prompts is not None else []
    generator = TextGenerator(cfg.checkpoint, cfg.dtype, cfg.quantize)
    for batch in batches:
        texts = generator.complete(batch, cfg.stop_strings, **cfg.options)
        for prompt, text in zip(batch, texts, strict=True):
            print(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False), flush=True)
    if cfg.prompts is None:
        PromptLoop(generator, cfg).run()


if __name__ == "__main__":
    main()
