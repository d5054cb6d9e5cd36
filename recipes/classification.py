"""Sequence classification: deepspeed recipes/classification.py +config=NAME [key=value ...]"""

from dataclasses import asdict, replace
from textwrap import shorten

from gptj_train import GPTJForSequenceClassification
from gptj_train.config import ClassificationConfig, vocabulary
from gptj_train.data.labelled import prepare_labelled
from gptj_train.launch import rank, recipe, world_size
from gptj_train.planning import Planned
from gptj_train.report import summary, write_report
from gptj_train.tasks.classification import Classification, known_labels
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

ARCHITECTURE = "GPTJForSequenceClassification"


@recipe(ClassificationConfig)
def main(cfg: ClassificationConfig) -> None:
    # What can be wrong with the request is found before the ranks meet and before anything is written.
    accumulation = accumulation_steps(cfg.global_batch_size, cfg.micro_batch_size, world_size())
    check_run_folder(cfg.output_dir)
    resume_from = resumable(cfg.output_dir, cfg.resume)
    tokenizer, shape, new_rows = vocabulary(cfg)
    problem = cfg.task.problem_type
    labels = known_labels(cfg.task, cfg.init_from)
    train, validation, names = prepare_labelled(cfg.data, problem, labels, tokenizer, cfg.sequence_length)
    model = replace(shape, id2label=dict(enumerate(names)), problem_type=problem)
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
        lambda: adapted(GPTJForSequenceClassification(model), cfg.lora),
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
    export(engine, model_files, f"{cfg.output_dir}/export", cfg.export_dtype, facts, cfg.lora, cfg.init_from)
    tracker.finish()
    planned = Planned(engine.shapes, engine.trained, model, cfg)
    facts["memory"] = planned.memory_line(engine.world_size, engine.device.type != "cpu")
    if engine.rank == 0:
        write_report(cfg.output_dir, facts)
        print(summary(cfg.output_dir, ARCHITECTURE))


if __name__ == "__main__":
    main()
