"""Sequence classification: deepspeed recipes/classification.py +config=NAME [key=value ...]"""

from dataclasses import asdict, replace
from textwrap import shorten

from gptj_train import GPTJForSequenceClassification
from gptj_train.config import ClassificationConfig, model_config
from gptj_train.data.labelled import prepare_labelled
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.launch import rank, recipe, world_size
from gptj_train.report import summary, write_report
from gptj_train.tasks.classification import Classification
from gptj_train.tracking import Tracker
from gptj_train.training.checkpoint import Checkpoints
from gptj_train.training.engine import Engine
from gptj_train.training.export import export
from gptj_train.training.trainer import Trainer, check_run_folder
from gptj_train.training.zero_config import accumulation_steps

ARCHITECTURE = "GPTJForSequenceClassification"


@recipe(ClassificationConfig)
def main(cfg: ClassificationConfig) -> None:
    # What can be wrong with the request is found before the ranks meet and before anything is written.
    accumulation = accumulation_steps(cfg.global_batch_size, cfg.micro_batch_size, world_size())
    check_run_folder(cfg.output_dir)
    checkpoints = Checkpoints(cfg.output_dir, cfg.keep_checkpoints)
    resume_from = checkpoints.find(cfg.resume, world_size())
    tokenizer = Tokenizer.choose(cfg.tokenizer, cfg.init_from)
    shape = model_config(cfg.model, cfg.init_from, tokenizer, cfg.sequence_length)
    problem = cfg.task.problem_type
    train, validation, names = prepare_labelled(cfg.data, problem, cfg.task.labels, tokenizer, cfg.sequence_length)
    model = replace(shape, id2label=dict(enumerate(names)), problem_type=problem, pad_token_id=tokenizer.end_id)
    task = Classification(
        train, validation, names, cfg.task, tokenizer.end_id, cfg.seed, cfg.global_batch_size, cfg.micro_batch_size
    )

    tracker = Tracker(cfg.tracking, cfg.output_dir, asdict(cfg), rank())
    facts = {
        "data": f"{len(train):,} texts to train on, {len(validation or ()):,} held out",
        "labels": f"{len(names)}: {shorten(', '.join(names), 200, placeholder=' ...')}",
        "batch": f"{cfg.global_batch_size} texts = {world_size()} ranks x {cfg.micro_batch_size} x "
        f"{accumulation} accumulated",
    }
    tracker.note("\n".join(f"{name:<6} {fact}" for name, fact in facts.items()))

    engine = Engine(
        lambda: GPTJForSequenceClassification(model),
        cfg.init_from,
        cfg.engine,
        cfg.optim,
        cfg.global_batch_size,
        cfg.micro_batch_size,
        cfg.seed,
    )
    Trainer(cfg, engine, task, checkpoints, tracker).train(resume_from)
    export(engine, model, ARCHITECTURE, tokenizer, f"{cfg.output_dir}/export", cfg.export_dtype)
    tracker.finish()
    if engine.rank == 0:
        write_report(cfg.output_dir, facts)
        print(summary(cfg.output_dir, ARCHITECTURE))


if __name__ == "__main__":
    main()
