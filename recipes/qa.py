"""Extractive question answering: deepspeed -q recipes/qa.py +config=NAME [key=value ...]"""

from dataclasses import replace

from gptj_train import GPTJForQuestionAnswering
from gptj_train.config import QAConfig
from gptj_train.data.squad import read_questions
from gptj_train.finetune import Finetune
from gptj_train.launch.recipe import recipe
from gptj_train.tasks.question_answering import QuestionAnswering, build_features, qa_layout


@recipe(QAConfig, primary="qa")
def main(cfg: QAConfig) -> None:
    run = Finetune(cfg)
    train_questions, held_out_questions = read_questions(cfg.data, cfg.held_out)
    train = build_features(train_questions, run.tokenizer, cfg.sequence_length, cfg.task)
    validation = build_features(held_out_questions, run.tokenizer, cfg.sequence_length, cfg.task)
    task = QuestionAnswering(
        train=train,
        sampler=run.sampler({"": len(train)}),
        validation=validation,
        config=cfg.task,
        batch_size=cfg.micro_batch_size,
    )
    facts = {
        "data": str(train),
        "held out": str(validation) if len(validation) else "none",
        "batch": run.batch_facts("window"),
    }
    # Start and end logits, whatever labels the head of init_from has.
    extra = {**run.model_config.extra, "qa_layout": qa_layout(cfg.task, cfg.sequence_length)}
    model_config = replace(run.model_config, num_labels=2, id2label=None, extra=extra)
    run.train(GPTJForQuestionAnswering, task, facts, model_config=model_config)


if __name__ == "__main__":
    main()
