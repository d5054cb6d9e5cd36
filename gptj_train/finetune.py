"""Build a fine-tuning run around a recipe's data and task: early checks, training, export and report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

from gptj_train.agreement import check_agreement
from gptj_train.config import FinetuneConfig, model_config_of
from gptj_train.counted import counted
from gptj_train.data.sampler import Sampler
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.data.tokenizer_folder import has_tokenizer
from gptj_train.data.unused_rows import AddedToken
from gptj_train.environment import describe_environment, describe_host
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
from gptj_train.planning import RunPlan
from gptj_train.report import write_report
from gptj_train.run_summary import summary
from gptj_train.tasks.task import Task
from gptj_train.tracking import Tracker
from gptj_train.training.accumulation import accumulation_steps
from gptj_train.training.checkpoint import Checkpoints
from gptj_train.training.engine import Engine, join_process_group
from gptj_train.training.model_files import ModelFiles
from gptj_train.training.retention import resume_candidates
from gptj_train.training.trainer import Trainer
from gptj_train.weights.hf_writer import parse_size

_SHOWN_AT_START = (
    "data",
    "held out",
    "labels",
    "baseline",
    "truncated",
    "batch",
    "epochs",
)  # facts that fit on a screen


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
        self._accumulation = accumulation_steps(cfg.global_batch_size, cfg.micro_batch_size, world_size())
        self._folder = RunFolder(cfg.output_dir, rank())
        step = is_done(cfg.output_dir, asdict(cfg))
        if step is not None and cfg.resume == "auto":
            raise NothingToDo(
                f"nothing left to do: {cfg.output_dir} is done, at step {step}; for more, raise max_steps"
            )
        self._status = RunStatus(cfg.output_dir, rank(), asdict(cfg))
        self._resume_from = resume_candidates(cfg.output_dir, cfg.resume)
        self.tokenizer, self.model_config, self._mean_rows = build_vocabulary(cfg)
        self._steps_per_epoch: float | None = None

    def sampler(self, sizes: Sequence[int], weights: Sequence[float] | None = None) -> Sampler:
        """Return the sampler of the training data, of one or several components.

        Args:
            sizes: windows or rows of each component.
            weights: shares of the components; None joins them.
        """
        self._steps_per_epoch = sum(sizes) / self._cfg.global_batch_size
        return Sampler(
            sizes,
            weights=weights,
            seed=self._cfg.seed,
            global_batch_size=self._cfg.global_batch_size,
            micro_batch_size=self._cfg.micro_batch_size,
        )

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
        self._folder.create()
        with self._status:
            self._train(
                model_class,
                task,
                facts,
                model_config=model_config or self.model_config,
                sample_prompt=sample_prompt,
            )

    def _train(
        self,
        model_class: type[GPTJWithHead],
        task: Task,
        facts: Mapping[str, str],
        *,
        model_config: GPTJConfig,
        sample_prompt: str | None,
    ) -> None:
        cfg = self._cfg
        if world_size() > 1:
            # Before the model is loaded, which takes minutes.
            self._meet(task, facts)
        report = dict(facts)
        report["start"] = cfg.init_from or f"random weights, seed {cfg.seed}"
        tracker = Tracker(
            cfg.tracking,
            cfg.output_dir,
            asdict(cfg),
            rank(),
            steps_per_epoch=self._steps_per_epoch,
            write_report=lambda: write_report(cfg.output_dir, report),
        )
        for name in _SHOWN_AT_START:
            if name in facts:
                tracker.note(f"{name:<9} {facts[name]}")

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
        )
        environment = describe_environment(engine.gathered([describe_host()]))
        hosts = ", ".join(host["host"] for host in environment["hosts"])
        tracker.note(
            f"attempt   {self._status.attempt}, {environment['started']}, {engine.world_size} ranks on {hosts}"
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
            config=cfg, engine=engine, task=task, checkpoints=checkpoints, tracker=tracker, folder=self._folder
        )
        self._status.step = lambda: trainer.state.step
        self._status.progressed = lambda: checkpoints.has_saved
        trainer.train(self._resume_from)

        export_folder = export(
            engine,
            model_files,
            f"{cfg.output_dir}/export",
            dtype=cfg.export_dtype,
            facts=facts,
            lora=cfg.lora,
            base=cfg.init_from,
            shard_bytes=parse_size(cfg.export_shard_size),
        )
        tracker.finish()
        if engine.rank != 0:
            return

        plan = RunPlan(engine.shapes, engine.trained, model_config, cfg)
        report["memory"] = plan.memory_line(engine.world_size, with_gpu=engine.device.type != "cpu")
        write_report(cfg.output_dir, report)
        sample = None
        if sample_prompt is not None:
            # After a first report: generating with 6B takes minutes, in which a killed job would lose the report.
            sample = sample_from(export_folder, sample_prompt, cfg.seed)
            write_report(cfg.output_dir, report, sample)
        print(summary(cfg.output_dir, model_class.__name__, sample))

    def _meet(self, task: Task, facts: Mapping[str, str]) -> None:
        """Connect the ranks, and check that they are about to run the same job. Collective.

        Raises:
            UserError: ranks are missing, or they differ; on all ranks.
        """
        cfg = self._cfg
        store = wait_for_ranks(cfg.rendezvous_timeout)
        join_process_group()
        del store  # The process group holds a connection of its own by now.
        check_agreement(asdict(cfg), tokenizer=self.tokenizer.digest, task=task, facts=facts)


def build_vocabulary(cfg: FinetuneConfig) -> tuple[Tokenizer, GPTJConfig, dict[int, list[int]]]:
    """Return the tokenizer, model config and mean rows of a run.

    Returns:
        The tokenizer with ``add_tokens``; the model config with the tokenizer's BOS, EOS and PAD ids; the embedding
        row of each added token, with the rows whose mean initializes it.

    Raises:
        UserError: no tokenizer, fewer embedding rows than token ids, fewer positions than ``sequence_length``, or
            more added tokens than unused rows.
    """
    tokenizer = Tokenizer.choose(cfg.tokenizer, cfg.init_from)
    if cfg.tokenizer is not None and cfg.init_from is not None and cfg.tokenizer_mismatch == "error":
        _check_same_ids(tokenizer, cfg.tokenizer, cfg.init_from)
    model_config = model_config_of(cfg.model, cfg.init_from)
    tokenizer.check_fits(model_config.vocab_size)
    if cfg.sequence_length > model_config.n_positions:
        raise UserError(
            f"sequence_length {cfg.sequence_length} exceeds the model's n_positions ({model_config.n_positions}); "
            f"set sequence_length={model_config.n_positions} or less"
            + (" or raise model.n_positions" if cfg.init_from is None else "")
        )
    # GPT-J has one special token, which begins and ends documents; padding gets an unused row if there is one.
    model_config = replace(
        model_config,
        bos_token_id=tokenizer.eos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id(model_config.vocab_size),
    )
    added_tokens = [AddedToken.parse(text) for text in cfg.add_tokens]
    tokenizer, mean_rows = tokenizer.with_added_tokens(added_tokens, model_config.vocab_size)
    return tokenizer, model_config, mean_rows


def _check_same_ids(tokenizer: Tokenizer, path: str, init_from: str) -> None:
    """Raise UserError for a tokenizer whose ids have another meaning in the initial weights."""
    if has_tokenizer(init_from) and not tokenizer.gives_ids_of(Tokenizer.load(init_from)):
        raise UserError(
            f"tokenizer={path} gives other ids than the tokenizer of init_from={init_from}, whose weights know only "
            "their own; drop tokenizer=..., or set tokenizer_mismatch=allow to train the embedding anew"
        )
