"""Causal-LM fine-tuning: deepspeed -q recipes/clm.py +config=NAME [key=value ...]"""

from gptj_train import GPTJForCausalLM
from gptj_train.config import ClmConfig
from gptj_train.data.corpus import prepare
from gptj_train.finetune import Finetune
from gptj_train.launch.recipe import recipe
from gptj_train.tasks.clm import CausalLM


@recipe(ClmConfig, primary="clm")
def main(cfg: ClmConfig) -> None:
    run = Finetune(cfg)
    data = prepare(cfg.data, run.tokenizer, cfg.sequence_length, cfg.held_out)
    run.tokenizer.chat_template = data.chat_template or run.tokenizer.chat_template
    components = data.train.windows
    task = CausalLM(
        train=components,
        sampler=run.sampler({name: len(windows) for name, windows in components.items()}, data.weights),
        held_out=data.held_out,
        tokenizer=run.tokenizer,
        isolate=data.isolate,
        batch_size=cfg.micro_batch_size,
    )
    tokens = cfg.global_batch_size * cfg.sequence_length
    facts = {
        **dict(data.train.facts()),
        "held out": data.held_out_fact,
        "batch": f"{run.batch_facts('window')}; {tokens:,} tokens a step",
    }
    run.train(GPTJForCausalLM, task, facts, sample_prompt=cfg.sample_prompt)


if __name__ == "__main__":
    main()
