"""Build a fine-tuning run around a recipe's data and task: early checks, training, export and report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace

from gptj_train.agreement import check_agreement
from gptj_train.config import FinetuneConfig
from gptj_train.counted import counted
from gptj_train.data.identity import data_identity
from gptj_train.data.sampler import Sampler
from gptj_train.environment import describe_environment, describe_host
from gptj_train.epochs import Epochs
from gptj_train.errors import UserError
from gptj_train.export.from_engine import export
from gptj_train.inference.text_generator import sample_from
from gptj_train.launch.ranks import rank, world_size
from gptj_train.launch.recipe import NothingToDo
from gptj_train.launch.rendezvous import wait_for_ranks
from gptj_train.launch.run_folder import RunFolder
from gptj_train.launch.run_status import RunStatus, is_done
from gptj_train.model.gptj_config import GPTJConfig
from gptj_train.model.heads import GPTJWithHead
from gptj_train.model.lora import with_lora
from gptj_train.planning.preflight import check_machine, memory_line
from gptj_train.planning.run_plan import ModelSizes, RunPlan
from gptj_train.report import write_report
from gptj_train.run_summary import summary
from gptj_train.tasks.task import Task
from gptj_train.tracking import Tracker
from gptj_train.training.accumulation import accumulation_steps
from gptj_train.training.best import best_text
from gptj_train.training.checkpoint import Checkpoints
from gptj_train.training.engine import Engine, join_process_group
from gptj_train.training.model_files import ModelFiles
from gptj_train.training.quantized_base import check_base, quantized_base_fact
from gptj_train.training.resuming import held_out_hash
from gptj_train.training.retention import resume_candidates
from gptj_train.training.trainer import Trainer
from gptj_train.training.trainer_config import with_steps
from gptj_train.vocabulary import build_vocabulary
from gptj_train.weights.hf_writer import parse_size

# Facts that fit on a screen.
_SHOWN_AT_START = ("base", "data", "held out", "labels", "baseline", "truncated", "batch", "epochs")


class Finetune:
    """A run of a fine-tuning recipe.

    The recipe builds its data and task from ``tokenizer``, ``model_config`` and ``sampler``, and calls ``train``.
    The constructor checks the request before the ranks connect and before anything is written.

    Attributes:
        tokenizer: from ``tokenizer`` or ``init_from``, with ``add_tokens``.
        model_config: config of the model to train, with the tokenizer's BOS, EOS and PAD ids.

    Raises:
        UserError: batch sizes that do not divide, an unusable ``output_dir``, no checkpoint where ``resume`` names
            one, no tokenizer, or a model that is too small for the tokenizer or ``sequence_length``.
    """

    def __init__(self, cfg: FinetuneConfig) -> None:
        self._cfg = cfg
        check_base(cfg.quantize, cfg.init_from)
        self._accumulation = accumulation_steps(cfg.global_batch_size, cfg.micro_batch_size, world_size())
        self._folder = RunFolder(cfg.output_dir, rank())
        step = is_done(cfg.output_dir, asdict(cfg))
        if step is not None and cfg.resume == "auto":
            raise NothingToDo(
                f"nothing left to do: {cfg.output_dir} is done, at step {step}; for more, raise max_steps or epochs, "
                "or patience if that ended it"
            )
        self._epochs: Epochs | None = None
        self._status = RunStatus(cfg.output_dir, rank(), asdict(cfg))
        self._resume_from = resume_candidates(cfg.output_dir, cfg.resume)
        self.tokenizer, self.model_config, self._mean_rows = build_vocabulary(cfg)
        if rank() == 0:
            check_machine(cfg, self.model_config)

    def sampler(self, sizes: Mapping[str, int], weights: list[float] | None = None) -> Sampler:
        """Return the sampler of the training data, of one or several components.

        Args:
            sizes: windows or rows of each component by name; data without components has one.
            weights: shares of the components; None joins them.
        """
        sampler = Sampler(
            list(sizes.values()),
            weights=weights,
            seed=self._cfg.seed,
            global_batch_size=self._cfg.global_batch_size,
            micro_batch_size=self._cfg.micro_batch_size,
        )
        self._epochs = Epochs(sizes, sampler, self._cfg.global_batch_size)
        return sampler

    def batch_facts(self, sample: str) -> str:
        """Describe the global batch for screen, report and model card.

        Args:
            sample: what one of its elements is called, such as "window".
        """
        cfg = self._cfg
        return (
            f"{counted(cfg.global_batch_size, sample)} = {counted(world_size(), 'rank')} x {cfg.micro_batch_size} x "
            f"{self._accumulation} accumulated"
        )

    def train(
        self,
        model_class: type[GPTJWithHead],
        task: Task,
        facts: Mapping[str, str],
        *,
        model_config: GPTJConfig | None = None,
        sample_prompt: str | None = None,
    ) -> None:
        """Train, export the model, and write the report. Collective.

        Args:
            facts: facts about data and batch by short name, for screen, report and model card.
            model_config: replaces ``self.model_config``, for a head with other labels.
            sample_prompt: text that the exported model continues at the end; None generates no sample.

        Raises:
            Preempted: the run was stopped early; the message says whether its state was saved.
            UserError: weights, checkpoints or data that cannot be used.
        """
        assert self._epochs is not None, "a recipe takes its sampler from this run"
        cfg = self._resolved(self._epochs, task)
        facts = {**facts, "epochs": self._epochs.describe(cfg.steps)}
        self._folder.create()
        with self._status:
            self._train(
                cfg,
                self._epochs,
                model_class,
                task,
                facts,
                model_config=model_config or self.model_config,
                sample_prompt=sample_prompt,
            )

    def _resolved(self, epochs: Epochs, task: Task) -> FinetuneConfig:
        """Return the config with what only the data can decide: the steps, and whether there can be a best model."""
        cfg = self._cfg
        if cfg.epochs is not None:
            cfg = with_steps(cfg, epochs.steps_of(cfg.epochs))
        if any(True for _ in task.evaluation_batches(rank(), world_size())):
            return cfg
        if cfg.patience is not None:
            raise UserError(
                f"patience={cfg.patience} needs held-out data; give data.validation=... or validation_share=0.02"
            )
        return replace(cfg, export_of="last")

    def _train(
        self,
        cfg: FinetuneConfig,
        epochs: Epochs,
        model_class: type[GPTJWithHead],
        task: Task,
        facts: dict[str, str],
        *,
        model_config: GPTJConfig,
        sample_prompt: str | None,
    ) -> None:
        if world_size() > 1:
            # Before the model is loaded, which takes minutes.
            self._meet(cfg, task, facts)
        if cfg.quantize != "none":
            facts = dict(facts) | {"base": quantized_base_fact(cfg.quantize)}
        report = dict(facts)
        report["start"] = cfg.init_from or f"random weights, seed {cfg.seed}"
        tracker = Tracker(
            cfg.tracking,
            cfg.output_dir,
            asdict(self._cfg),
            rank(),
            steps_per_epoch=epochs.steps_per_epoch,
            write_report=lambda: write_report(cfg.output_dir, report),
        )
        for name in _SHOWN_AT_START:
            if name in facts:
                tracker.note(f"{name:<9} {facts[name]}")
        for line in epochs.warnings(cfg.steps):
            tracker.note(line)

        # ``build`` is a function: the engine decides where the weights are allocated.
        engine = Engine(
            build=lambda: with_lora(model_class(model_config), cfg.lora),
            init_from=cfg.init_from,
            engine=cfg.engine,
            optim=cfg.optim,
            micro_batch_size=cfg.micro_batch_size,
            accumulation=self._accumulation,
            seed=cfg.seed,
            mean_rows=self._mean_rows,
            quantize=cfg.quantize,
            lora=cfg.lora,
        )
        environment = describe_environment(engine.gathered([describe_host()]))
        hosts = ", ".join(host["host"] for host in environment["hosts"])
        tracker.note(
            f"attempt   {self._status.attempt}, {environment['started']}, "
            f"{counted(engine.world_size, 'rank')} on {hosts}"
        )
        parameters = {
            "parameters": sum(shape.numel() for shape in engine.shapes.values()),
            "trained_parameters": sum(shape.numel() for shape in engine.trained.values()),
        }
        tracker.describe(environment | parameters)
        model_files = ModelFiles(model_config, model_class.__name__, self.tokenizer)
        checkpoints = Checkpoints(
            cfg.output_dir, keep=cfg.keep_checkpoints, keep_every=cfg.keep_every, model_files=model_files
        )
        trainer = Trainer(
            config=cfg,
            engine=engine,
            task=task,
            checkpoints=checkpoints,
            tracker=tracker,
            folder=self._folder,
            # On rank 0 only: a thousand ranks need not read every file.
            data=data_identity(asdict(self._cfg), self.tokenizer.digest) if rank() == 0 else {},
            held_out=held_out_hash(task),
        )
        self._status.step = lambda: trainer.state.step
        self._status.progressed = lambda: checkpoints.has_saved
        trainer.train(self._resume_from)
        self._status.reason = trainer.ended

        exported_step = trainer.take_best()
        best = best_text(trainer.state, exported_step)
        if best is not None:
            tracker.note(f"best      {best}")
            facts["best"] = report["best"] = best
        export_folder = export(
            engine,
            model_files,
            f"{cfg.output_dir}/export",
            dtype=cfg.export_dtype,
            facts=facts,
            lora=cfg.lora,
            base=cfg.init_from,
            shard_bytes=parse_size(cfg.export_shard_size),
            until=exported_step,
            quantize=cfg.quantize,
            mean_rows=self._mean_rows,
        )
        tracker.finish()
        if engine.rank != 0:
            return

        plan = RunPlan(ModelSizes(engine.shapes, engine.trained), model_config, cfg)
        report["memory"] = memory_line(plan, engine.world_size, on_gpu=engine.device.type != "cpu")
        write_report(cfg.output_dir, report)
        sample = None
        if sample_prompt is not None:
            # After a first report: generating with 6B takes minutes, in which a killed job would lose the report.
            sample = sample_from(export_folder, sample_prompt, cfg.seed)
            write_report(cfg.output_dir, report, sample)
        print(
            summary(
                cfg.output_dir,
                model_class.__name__,
                sample=sample,
                metric=cfg.best_metric,
                best=best,
                ended=trainer.ended,
            )
        )

    def _meet(self, cfg: FinetuneConfig, task: Task, facts: Mapping[str, str]) -> None:
        """Connect the ranks, and check that they are about to run the same job. Collective.

        Raises:
            UserError: ranks are missing, or they differ; on all ranks.
        """
        store = wait_for_ranks(cfg.rendezvous_timeout)
        join_process_group()
        del store  # The process group holds a connection of its own by now.
        check_agreement(asdict(cfg), tokenizer=self.tokenizer.digest, task=task, facts=facts)
