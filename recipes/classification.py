"""Sequence classification: deepspeed -q recipes/classification.py +config=NAME [key=value ...]"""

from dataclasses import replace

from gptj_train import GPTJForSequenceClassification
from gptj_train.config import ClassificationConfig
from gptj_train.data.labelled import prepare_labelled
from gptj_train.finetune import Finetune
from gptj_train.launch.recipe import recipe
from gptj_train.tasks.classification import Classification, known_labels
from gptj_train.tasks.label_facts import label_facts


@recipe(ClassificationConfig, primary="classification")
def main(cfg: ClassificationConfig) -> None:
    run = Finetune(cfg)
    problem = cfg.task.problem_type
    labels = known_labels(cfg.task, cfg.init_from)
    train, validation, names = prepare_labelled(
        cfg.data,
        problem_type=problem,
        labels=labels,
        tokenizer=run.tokenizer,
        length=cfg.sequence_length,
        held_out=cfg.held_out,
    )
    task = Classification(
        train=train,
        sampler=run.sampler({"": len(train)}),
        validation=validation,
        names=names,
        config=cfg.task,
        pad_id=run.tokenizer.eos_id,
        batch_size=cfg.micro_batch_size,
    )
    facts = {
        **label_facts(train, validation, names),
        "batch": run.batch_facts("text"),
    }
    model_config = replace(run.model_config, id2label=dict(enumerate(names)), problem_type=problem)
    run.train(GPTJForSequenceClassification, task, facts, model_config=model_config)


if __name__ == "__main__":
    main()
