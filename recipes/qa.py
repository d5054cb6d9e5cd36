"""Extractive question answering: deepspeed recipes/qa.py +config=NAME [key=value ...]"""

from dataclasses import asdict, replace

from gptj_train import GPTJForQuestionAnswering
from gptj_train.config import QAConfig, vocabulary
from gptj_train.data.squad import Features, read_questions
from gptj_train.launch import rank, recipe, world_size
from gptj_train.planning import Planned
from gptj_train.report import summary, write_report
from gptj_train.tasks.question_answering import QuestionAnswering
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

ARCHITECTURE = "GPTJForQuestionAnswering"


@recipe(QAConfig)
def main(cfg: QAConfig) -> None:
    # What can be wrong with the request is found before the ranks meet and before anything is written.
    accumulation = accumulation_steps(cfg.global_batch_size, cfg.micro_batch_size, world_size())
    check_run_folder(cfg.output_dir)
    resume_from = resumable(cfg.output_dir, cfg.resume)
    tokenizer, model, new_rows = vocabulary(cfg)
    model = replace(model, num_labels=2, id2label=None)  # start and end, whatever init_from was labelled with
    train, validation = (
        Features(
            questions,
            tokenizer,
            cfg.sequence_length,
            cfg.task.doc_stride,
            cfg.task.max_question_tokens,
            cfg.task.repeat_context,
        )
        for questions in read_questions(cfg.data)
    )

    tracker = Tracker(cfg.tracking, cfg.output_dir, asdict(cfg), rank())
    facts = {
        "data": str(train),
        "batch": f"{cfg.global_batch_size} windows = {world_size()} ranks x {cfg.micro_batch_size} x "
        f"{accumulation} accumulated",
    }
    tracker.note("\n".join(f"{name:<6} {fact}" for name, fact in facts.items()))

    task = QuestionAnswering(train, validation, cfg.task, cfg.seed, cfg.global_batch_size, cfg.micro_batch_size)
    engine = Engine(
        lambda: adapted(GPTJForQuestionAnswering(model), cfg.lora),
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
