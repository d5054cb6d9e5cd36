"""Causal-LM fine-tuning: deepspeed recipes/clm.py +config=NAME [key=value ...]"""

from dataclasses import asdict

from gptj_train import GPTJForCausalLM
from gptj_train.config import ClmConfig, vocabulary
from gptj_train.data.corpus import prepare
from gptj_train.launch import rank, recipe, world_size
from gptj_train.planning import Planned
from gptj_train.report import summary, write_report
from gptj_train.tasks.clm import CausalLM
from gptj_train.tasks.generation import sample_from
from gptj_train.tracking import Tracker
from gptj_train.training.adapters import adapted
from gptj_train.training.checkpoint import Checkpoints
from gptj_train.training.engine import Engine
from gptj_train.training.export import export
from gptj_train.training.model_files import ModelFiles
from gptj_train.training.retention import resumable
from gptj_train.training.run_folder import check_run_folder
from gptj_train.training.trainer import Trainer
from gptj_train.training.zero_config import accumulation_steps

ARCHITECTURE = "GPTJForCausalLM"


@recipe(ClmConfig)
def main(cfg: ClmConfig) -> None:
    # What can be wrong with the request is found before the ranks meet and before anything is written.
    accumulation = accumulation_steps(cfg.global_batch_size, cfg.micro_batch_size, world_size())
    check_run_folder(cfg.output_dir)
    resume_from = resumable(cfg.output_dir, cfg.resume)
    tokenizer, model, new_rows = vocabulary(cfg)
    data = prepare(cfg.data, tokenizer, cfg.sequence_length)

    tracker = Tracker(cfg.tracking, cfg.output_dir, asdict(cfg), rank())
    facts = {
        **dict(data.train.facts()),
        "batch": f"{cfg.global_batch_size} windows = {world_size()} ranks x {cfg.micro_batch_size} x "
        f"{accumulation} accumulated; {cfg.global_batch_size * cfg.sequence_length:,} tokens a step",
    }
    task = CausalLM(
        data.train.windows,
        data.weights,
        data.held_out,
        tokenizer,
        cfg.data.isolate,
        cfg.seed,
        cfg.global_batch_size,
        cfg.micro_batch_size,
    )
    facts["epochs"] = task.epochs(cfg.max_steps)
    tracker.note("\n".join(f"{name:<6} {facts[name]}" for name in ("data", "batch", "epochs")))

    engine = Engine(
        lambda: adapted(GPTJForCausalLM(model), cfg.lora),
        cfg.init_from,
        cfg.engine,
        cfg.optim,
        cfg.global_batch_size,
        cfg.micro_batch_size,
        cfg.seed,
        new_rows,
    )
    model_files = ModelFiles(model, ARCHITECTURE, tokenizer)
    checkpoints = Checkpoints(cfg.output_dir, cfg.keep_checkpoints, cfg.keep_every, model_files)
    Trainer(cfg, engine, task, checkpoints, tracker).train(resume_from)
    folder = export(engine, model_files, f"{cfg.output_dir}/export", cfg.export_dtype, facts, cfg.lora, cfg.init_from)
    tracker.finish()
    planned = Planned(engine.shapes, engine.trained, model, cfg)
    facts["memory"] = planned.memory_line(engine.world_size, engine.device.type != "cpu")
    if engine.rank == 0:
        write_report(cfg.output_dir, facts)
        sample = sample_from(folder, cfg.sample_prompt, cfg.seed) if cfg.sample_prompt else None
        write_report(cfg.output_dir, facts, sample)
        print(summary(cfg.output_dir, ARCHITECTURE, sample))


if __name__ == "__main__":
    main()
