"""Extractive question answering: deepspeed recipes/qa.py +config=NAME [key=value ...]"""

from dataclasses import asdict, replace

from gptj_train import GPTJForQuestionAnswering
from gptj_train.config import QAConfig, model_config
from gptj_train.data.squad import Features, read_questions
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.launch import rank, recipe, world_size
from gptj_train.report import summary, write_report
from gptj_train.tasks.question_answering import QuestionAnswering
from gptj_train.tracking import Tracker
from gptj_train.training.checkpoint import Checkpoints
from gptj_train.training.engine import Engine
from gptj_train.training.export import export
from gptj_train.training.trainer import Trainer, check_run_folder
from gptj_train.training.zero_config import accumulation_steps

ARCHITECTURE = "GPTJForQuestionAnswering"


@recipe(QAConfig)
def main(cfg: QAConfig) -> None:
    # What can be wrong with the request is found before the ranks meet and before anything is written.
    accumulation = accumulation_steps(cfg.global_batch_size, cfg.micro_batch_size, world_size())
    check_run_folder(cfg.output_dir)
    checkpoints = Checkpoints(cfg.output_dir, cfg.keep_checkpoints)
    resume_from = checkpoints.find(cfg.resume, world_size())
    tokenizer = Tokenizer.choose(cfg.tokenizer, cfg.init_from)
    model = model_config(cfg.model, cfg.init_from, tokenizer, cfg.sequence_length)
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
        lambda: GPTJForQuestionAnswering(model),
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
        task.write_predictions(cfg.output_dir)
        write_report(cfg.output_dir, facts)
        print(summary(cfg.output_dir, ARCHITECTURE))


if __name__ == "__main__":
    main()
