"""The training loop, its arithmetic, and what ends it; `loralib.train` is its public interface.

SIGINT, SIGTERM, SIGHUP and Ctrl-Break ask a run to finish its update, save its state, and exit.  The loop also checks
that the loss stays finite, gradients reach every adapted layer, and the adapter learns.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..adapter import apply_adapter, check_savable
from ..allocator import keep_freed_memory
from ..bases import with_chat_template
from ..bases.classifiers import class_names, new_modules
from ..config import LoraConfig
from ..console import counted
from ..data import CLASSIFY, PREFERENCES, Labels, PreferencePair, TokenExample
from ..data.packing import epoch_order
from ..data.turn_ends import are_chats
from ..delta import dense
from ..engine.causal import require_causal
from ..engine.placement import require_free
from ..errors import ConfigError, InterruptedRunError, NothingLearnedError, TargetError, list_faults
from ..formats import check_portable, load_adapter
from ..injection import adapted_layers, adapted_model, disabled, find_targets, inject, unmerge
from ..layers import LoRALayer
from ..modes import keeping_modes
from ..wrapping import adapting_spread, is_spread, output_head, refuse_process_groups
from .classification import ClassificationStep, prepare_classifier
from .config import AUTOMATIC, TrainConfig
from .memory import explain_out_of_memory, freeze_objects, gradient_checkpointing, memory_estimate
from .objective import StepStats, TrainingStep, evaluate
from .optim import lr_factor, make_optimizer, parameter_groups, reaches_peak
from .plan import Data, Plan, examples_at_once, length_limit, make_plan, updates_per_epoch
from .preferences import PREFERENCE_STEPS, DPOStep, reference_of
from .ranks import Ranks, joined
from .record import run_record, settings_and_versions, write_record
from .report import MetricsWriter, NullMetricsWriter, Reporter
from .run_directory import Checkpoint, Progress, RunDirectory, hash_tensors, hold_run, run_settings
from .shares import shares
from .start import EvaStarts, adapter_to_train_on, data_start, full_precision, refuse_other_variant, spread
from .step import Step, make_step

__all__ = [
    "ONE_RUN_AT_A_TIME",
    "Gradient",
    "Pause",
    "Request",
    "Response",
    "StopRequest",
    "TrainResult",
    "Trainer",
    "Validation",
    "adapt",
    "check_fit",
    "finished",
    "plan_for",
    "run",
    "run_in",
    "stop_on_signal",
]

# Signal handlers, torch's global random generator, glibc's allocator and gc.freeze belong to the whole process, so runs
# in several threads take turns.
ONE_RUN_AT_A_TIME = threading.RLock()
_SIGHUP = getattr(signal, "SIGHUP", None)  # sent when the terminal is closed; does not exist on Windows
_PASSED_ON = (_SIGHUP, signal.SIGTERM)  # may arrive twice: from the system, and from the run's parent process


@dataclass(frozen=True)
class TrainResult:
    """The outcome of a run.

    Attributes:
        output_dir: directory of the adapter.
        steps: updates done.
        losses: the training loss of each update done in this call (not before a resume).
        train_losses: average training loss of each epoch.
        valid_losses: (update, loss) of each validation; the first is the loss before training, at update 0.
        tokens_per_second: tokens in the examples, trained or not, divided by the time for the updates.
        seconds: wall time of the updates.
        adapter_bytes: size of the adapter's tensors.
        best: (update, loss) of the best adapter, which is in ``output_dir/best``; None without validation data.
        note: why batches were padded although packing was requested; else "".
    """

    output_dir: Path
    steps: int
    losses: list[float] = field(repr=False)
    train_losses: list[float]
    valid_losses: list[tuple[int, float]]
    tokens_per_second: float
    seconds: float
    adapter_bytes: int
    best: tuple[int, float] | None
    note: str = ""


def run(
    model: nn.Module, data: Data, config: TrainConfig, tokenizer: Any, valid_data: Data | None, verbose: bool
) -> TrainResult:
    """Trains an adapter; see `loralib.train`."""
    with joined() as ranks:
        ranks.require_same(settings_and_versions(config))
        reporter = Reporter(verbose and ranks.is_first)
        with hold_run(config, ranks) as directory:
            if (ended := ranks.on_first_rank(directory.finished_run)) is not None:
                return finished(directory, ended, reporter, str(load_adapter(model, directory.path)))
            return run_in(directory, model, data, config, tokenizer, valid_data, reporter, ranks)


def finished(directory: RunDirectory, ended: Progress, reporter: Reporter, note: str = "") -> TrainResult:
    """Reports that the run to resume has already finished, and its outcome."""
    reporter.say(f"The run in {directory.path} is finished: {counted(ended.step, 'update')}. {note}".rstrip())
    adapter = directory.path / "adapter_model.safetensors"
    return TrainResult(
        output_dir=directory.path,
        steps=ended.step,
        losses=[],
        train_losses=ended.train_losses,
        valid_losses=[(int(step), loss) for step, loss, *_ in ended.valid_losses],
        tokens_per_second=0.0,
        seconds=0.0,
        adapter_bytes=adapter.stat().st_size if adapter.exists() else 0,
        best=ended.best_validation(),
    )


def run_in(
    directory: RunDirectory,
    model: nn.Module,
    data: Data,
    config: TrainConfig,
    tokenizer: Any,
    valid_data: Data | None,
    reporter: Reporter,
    ranks: Ranks,
    plan_by: Callable[..., Plan] = make_plan,
) -> TrainResult:
    """Trains an adapter in a directory that is locked for it (see `hold_run`); `plan_by` is called as `make_plan`."""
    refuse_process_groups(model, "which train() does not support: it trains in one process. Pass the model inside it")
    model = adapted_model(model)
    check_savable(model)
    if not all(layer.enabled for _, layer in adapted_layers(model)):
        raise TargetError("the adapter is disabled, so it would learn nothing; train after the `with disabled()` block")
    plan = plan_for(directory, model, data, config, tokenizer, valid_data, reporter, ranks, plan_by)
    given, config = config, plan.config
    with ONE_RUN_AT_A_TIME, stop_on_signal() as stop:
        require_free(model, "training")
        if config.task != CLASSIFY:
            require_causal(model)
        with adapting_spread() if config.shard else nullcontext():
            adapt(model, plan, reporter)
        if config.shard:
            spread(model, ranks)
        with (
            keep_freed_memory(lean=config.gradient_checkpointing),
            freeze_objects(),
            gradient_checkpointing(model) if config.gradient_checkpointing else nullcontext(),
            explain_out_of_memory(directory.less_memory),
        ):
            record, step = run_record(model, given, plan.data), step_for(model, config)
            trainer = Trainer(model, plan, record, directory, reporter, stop, ranks, step)
            with closing(trainer.metrics):
                result = trainer.train()
    reporter.result(result)
    return result


def plan_for(
    directory: RunDirectory,
    model: nn.Module,
    data: Data,
    config: TrainConfig,
    tokenizer: Any,
    valid_data: Data | None,
    reporter: Reporter,
    ranks: Ranks,
    plan_by: Callable[..., Plan] = make_plan,
) -> Plan:
    """Plans a run (see `make_plan`), and tells its directory what to save beside the adapter."""
    # What the program chose stays fixed for the whole run, whatever is free or known on resuming.
    then = ranks.on_first_rank(directory.look)
    chosen = {name: then[name] for name in AUTOMATIC if getattr(config, name) is None and then.get(name) is not None}
    if config.chat_template is not None:
        tokenizer = with_chat_template(tokenizer, config.chat_template)
    settings = config.replace(**chosen)
    classifies = config.task == CLASSIFY
    if classifies:
        data, valid_data = ranks.on_all_ranks(lambda: prepare_classifier(model, settings, tokenizer, data, valid_data))
    limit = length_limit(model, settings, ranks)
    plan = ranks.on_all_ranks(lambda: plan_by(model, data, valid_data, tokenizer, settings, reporter.say, limit))
    config = plan.config
    directory.config, directory.tokenizer = config, tokenizer
    directory.chats = tokenizer is not None and not classifies and are_chats(plan.train, tokenizer)
    if not plan.valid:
        _refuse_unvalidated(config)
    return plan


def _refuse_unvalidated(config: TrainConfig) -> None:
    """Refuses settings that concern validation if there is no validation data."""
    idle = {"early_stopping": 0, "eval_steps": 0, "best_metric": "loss"}
    for name in [name for name, usual in idle.items() if getattr(config, name) != usual][:1]:
        raise ConfigError(
            f"{name} is {getattr(config, name)}, but there is no validation data: give some, or leave out {name}"
        )


def check_fit(model: nn.Module, config: TrainConfig) -> None:
    """Checks that `adapt` can give a model the new adapter of a run, without changing the model.

    Raises:
        TargetError: a module cannot be adapted with these settings.
        AdapterError: the adapter would not be usable in the tool it is meant for.
    """
    if config.from_adapter is None:
        find_targets(model, _new_adapter(model, config))


def adapt(model: nn.Module, plan: Plan, reporter: Reporter, eva_starts: EvaStarts | None = None) -> None:
    """Injects an adapter unless the model has one, and makes sure that it is not merged; see `data_start`."""
    config, injected = plan.config, None
    if config.from_adapter is not None:
        if adapted_layers(model):
            raise ConfigError("the model already has an adapter: leave out from_adapter, or pass a model without one")
        report = apply_adapter(model, adapter_to_train_on(config, model))
        reporter.say(f"Continuing from {config.from_adapter}: {report}")
    elif not adapted_layers(model):
        lora = _new_adapter(model, config)
        torch.manual_seed(config.seed)
        injected = inject(model, lora, eva=data_start(model, lora, plan.train, eva_starts))
    else:
        refuse_other_variant(config, model)
    unmerge(model)
    for note in full_precision(model):
        reporter.say(note)
    reporter.adapter(model, injected, config)


def _new_adapter(model: nn.Module, config: TrainConfig) -> LoraConfig:
    """Returns the settings of a run's new adapter, once its tool can use it; modules the base lacks train in full."""
    lora = config.lora_config()
    if new := [name for name in new_modules(model) if not lora.saves(name)]:
        lora = lora.replace(modules_to_save=[*(lora.modules_to_save or ()), *new])
    if config.target != "none":
        check_portable(lora, model, config.target)
    return lora


def step_for(model: nn.Module, config: TrainConfig) -> TrainingStep:
    """Returns the step of a run's objective."""
    if config.task == CLASSIFY:
        return ClassificationStep(
            model,
            Labels(class_names(model)),
            packing=config.packing,
            share_prompts=config.share_prompts,
            label_smoothing=config.label_smoothing,
        )
    return make_step(
        model,
        kind=partial(PREFERENCE_STEPS[config.objective], beta=config.beta) if config.objective in PREFERENCES else Step,
        packing=config.packing,
        share_prompts=config.share_prompts,
        label_smoothing=config.label_smoothing,
        compiles={"auto": None, "on": True, "off": False}[config.compile],
    )


# What a run requests from whatever computes it.


@dataclass(frozen=True)
class Gradient:
    """A request for the gradients of batches, each with its `loss_scale`, in the `grad` of the trained parameters."""

    batches: list[tuple[list[Any], Any]]


@dataclass(frozen=True)
class Validation:
    """A request for metrics on examples, at most `max_tokens` tokens at once; the result is None after a signal."""

    examples: list[Any]
    max_tokens: int


@dataclass(frozen=True)
class Pause:
    """A request for nothing: between two updates, a run can be saved and stopped.

    Attributes:
        is_due: whether a checkpoint is due.
        is_over: whether this was the last update.
    """

    is_due: bool = False
    is_over: bool = False


Request = Gradient | Validation | Pause


@dataclass(frozen=True)
class Response:
    """The response to a request.

    Attributes:
        result: the `StepStats` of each batch, or metrics.
        seconds: the time spent, or the run's share of it.
        norm: that of the gradient, if already computed.
    """

    result: Any
    seconds: float
    norm: Tensor | None = None


class Trainer:
    """One run of an adapted model, from its directory's state to its end.  The caller closes `metrics`."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        record: Mapping[str, Any],
        directory: RunDirectory,
        reporter: Reporter,
        stop: StopRequest,
        ranks: Ranks,
        step: TrainingStep,
    ) -> None:
        config, self.ranks = plan.config, ranks
        self.model, self.examples, self.valid, self.config = model, list(plan.train), list(plan.valid), config
        self.record, self.directory, self.reporter, self.stop = record, directory, reporter, stop
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.settings = run_settings(model, config, plan.train, plan.valid)
        self.updates_per_epoch = updates_per_epoch(config, len(plan.train))
        self.total = config.max_steps or config.num_epochs * self.updates_per_epoch
        self.progress = Progress()
        self.initial = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.optimizer = make_optimizer(parameter_groups(model, config), config)
        self.losses: list[float] = []  # of the updates in this call, like the next two
        self.seconds, self.tokens = 0.0, 0
        self.step = step
        directory.unit, directory.shown = self.step.unit, self.step.shown
        ranks.require_same({**self.settings, "the adapter's first values": hash_tensors(self.initial)})
        checkpoint = ranks.on_first_rank(
            lambda: directory.checkpoint_to_resume(self.settings, self.parameters, reporter.say)
        )
        if checkpoint is None:
            torch.manual_seed(config.seed)
        else:
            self.progress, self.initial = checkpoint.progress, checkpoint.restore(self.parameters, self.optimizer)
            for name, layer in adapted_layers(model):
                layer.begin_from(_initial_of(name, layer, self.initial))
            done = self.progress.step
            reporter.say(
                f"Resuming from step-{done:08}{self.progress.of_ranks}: {done:,} of {self.total:,} updates done"
            )
        self._guessing = _loss_of_guessing(model) if step.unit == "token" else math.inf
        self.gradients_checked = self.progress.step > 0
        self._saved = -1  # the update after which a checkpoint was written
        self.from_base = reporter.from_base = starts_as_base(model, self.initial)
        self.metrics = self._open_metrics() if ranks.is_first else NullMetricsWriter()

    def _open_metrics(self) -> MetricsWriter:
        tensorboard = self.config.report_to == "tensorboard"
        return MetricsWriter(self.directory.path, self.progress, self.updates_per_epoch, tensorboard)

    def train(self) -> TrainResult:
        """Trains until the end, a signal or early stopping, and saves."""
        self.begin()
        self._announce()
        try:
            with keeping_modes(self.model):
                self.model.train()
                self.step.passes([*self.examples, *self.valid])  # uncomputable batches fail before the first update
                with self.ranks.computing():
                    self._compute_reference()
                    with self.step:  # the engine takes over the model's forward until the last validation
                        self._compute_all()
        finally:
            self.reporter.close_bar()
        return self.finish()

    def begin(self) -> None:
        """Records the run's settings and facts, before its first update."""
        self.ranks.on_first_rank(lambda: write_record(self.directory.path, self.config, self.record))

    def _compute_all(self) -> None:
        """Answers all of the run's requests with its own step, until it is over."""
        requests, answer = self.requests(), None
        with suppress(StopIteration):
            while True:
                answer = self._answer(requests.send(answer))

    def _answer(self, request: Request) -> Any:
        started = time.perf_counter()
        if isinstance(request, Gradient):
            done = [
                self.step.forward_backward(batch, loss_scale=scale) for batch, scale in self._passes(request.batches)
            ]
            return Response(done, time.perf_counter() - started)
        if isinstance(request, Validation):
            figures = evaluate(
                self.step.unsmoothed(),
                self.model,
                request.examples,
                max_tokens=request.max_tokens,
                stop=lambda: bool(self.stop),
                ranks=self.ranks,
            )
            return Response(figures, time.perf_counter() - started)
        self._stop_if_asked()
        if request.is_due:
            self.save()
        return None

    def _compute_reference(self) -> None:
        """Adds reference log-probabilities, from before training, to DPO's pairs; a resume reads them from disk."""
        if not isinstance(self.step, DPOStep):
            return
        pairs = list(dict.fromkeys(cast("list[PreferencePair]", [*self.examples, *self.valid])))
        key = {name: self.settings[name] for name in ("training data", "validation data", "base model")}
        key["adapter"] = "none" if self.reporter.from_base else hash_tensors(self.initial)
        known = self.ranks.on_first_rank(lambda: self.directory.read_reference(key))
        if known is None:
            self.reporter.say(f"Computing the reference for {counted(len(pairs), 'pair')} ...")
            with disabled(self.model) if self.reporter.from_base else holding(self.parameters, self.initial):
                known = reference_of(
                    self.step,
                    self.model,
                    pairs,
                    max_tokens=self._max_tokens,
                    check_stop=self._stop_before_start,
                    ranks=self.ranks,
                    show=self.reporter.verbose,
                )
            self.ranks.on_first_rank(lambda: self.directory.write_reference(key, known))
        of = dict(zip(pairs, [(chosen, rejected) for chosen, rejected in known.tolist()], strict=True))
        for rows in (self.examples, self.valid):
            rows[:] = [replace(pair, reference=of[pair]) for pair in cast("list[PreferencePair]", rows)]

    @property
    def _max_tokens(self) -> int:
        """Number of tokens to compute at once without gradients: uses no more memory than training does."""
        return max(2048, self.config.batch_size * max(map(len, self.examples)))

    def _stop_before_start(self) -> None:
        if number := self.ranks.max(self.stop.signal_number):
            self.stop.signal_number = number
            raise self.stop.error("stopped before the first update. Run the same command again.")

    def _announce(self) -> None:
        config, say = self.config, self.reporter.say
        if self.ranks.size > 1:
            held = "each holds its share of the base" if is_spread(self.model) else "each holds the base"
            say(f"{self.ranks.size} processes train together: {held} and computes its share of every update.")
        if self.step.note:
            say(f"Batches are padded: {self.step.note}.")
        if self.metrics.note:
            say(f"WARNING: {self.metrics.note}.")
        if not reaches_peak(config, self.total):
            say(f"WARNING: --warmup_steps {config.warmup_steps} is longer than the run: --lr is never reached.")
        tokens = max(map(len, self.examples)) * examples_at_once(config, self.ranks)
        self.reporter.memory(*memory_estimate(self.model, tokens, config.gradient_checkpointing))

    def requests(self) -> Generator[Request, Any, None]:
        """Goes through the epochs; yields requests, and is sent their responses.

        This way a run does not have to know what computes it: its own step, or a pass that it shares with other runs.
        """
        progress, config = self.progress, self.config
        if progress.owes_validation(config.eval_steps, self.total):
            yield from self._validate()
            yield Pause()
        self.reporter.start_bar(progress.step, self.total)
        # Sharing prompts only saves time if they are computed once; otherwise a uniform shuffle learns better.
        max_siblings = config.max_siblings if self.step.share_prompts else 1
        while not self._is_over():
            order = epoch_order(
                self.examples,
                config.batch_size,
                seed=config.seed,
                epoch=progress.epoch,
                max_siblings=max_siblings,
                shuffle=config.shuffle,
            )
            batches = [[self.examples[index] for index in batch] for batch in order]
            for start in range(progress.update * config.grad_accum, len(batches), config.grad_accum):
                yield from self._update(batches[start : start + config.grad_accum])
                if progress.update == self.updates_per_epoch:
                    self._end_epoch(complete=True)
                if progress.is_due(config.eval_steps, self.total):
                    yield from self._validate()
                is_over = self._is_over()
                yield Pause(is_due=not is_over and progress.is_due(config.save_steps, self.total), is_over=is_over)
                if is_over:
                    break
        if progress.epoch_weight:  # stopped in the middle of an epoch
            self._end_epoch(complete=False)
        if progress.step < self.total:
            self.reporter.say(
                f"Stopped early, after update {progress.step:,} of {self.total:,}: the last "
                + ("validation was" if progress.bad == 1 else f"{progress.bad:,} validations were")
                + " no better than the best one before."
            )

    def _update(self, batches: list[list[TokenExample]]) -> Generator[Request, Any, None]:
        """Requests the gradient of one update's batches, checks it, and applies it."""
        progress, config = self.progress, self.config
        paper = config.arithmetic == "paper"
        scales = self.step.scales(batches, paper_accum=config.grad_accum if paper else None)
        self.optimizer.zero_grad(set_to_none=True)
        self.ranks.seed(config.seed, progress.step)
        computed = yield Gradient(list(zip(batches, scales, strict=True)))
        started = time.perf_counter()
        loss, norm, more = self._clip(computed.result, computed.norm)
        loss = loss * config.grad_accum / len(batches) if paper else loss
        progress.add_loss(loss)
        if fault := loss_fault(loss, norm, progress.step + 1) or progress.why_diverged(self._guessing):
            raise self.directory.divergence(fault, progress)
        factor = lr_factor(config, progress.step, self.total)
        if factor > 0 and not self.gradients_checked:
            self.gradients_checked = True
            if note := check_gradients(self.model):
                self.reporter.say(note)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        self.optimizer.step()
        elapsed = computed.seconds + time.perf_counter() - started

        examples = [example for batch in batches for example in batch]
        tokens, trained = sum(map(len, examples)), sum(example.trained_tokens for example in examples)
        # Weight of this loss in the epoch's average.
        weight = len(batches) if paper else self.step.count(examples)
        progress.epoch_loss += loss * weight
        progress.epoch_weight += weight
        progress.step += 1
        progress.update += 1
        progress.examples += len(examples)
        progress.tokens += tokens
        progress.trained_tokens += trained
        self.losses.append(loss)
        self.seconds, self.tokens = self.seconds + elapsed, self.tokens + tokens
        self.metrics.add("train", progress, loss, config.peak_lr * factor, elapsed, more)
        seconds_left = (self.total - progress.step) * self.seconds / len(self.losses)
        self.reporter.update(progress.step, self.total, loss, self._shown(more), tokens / elapsed, seconds_left)

    def _shown(self, figures: Mapping[str, float]) -> dict[str, float]:
        return {name: figures[name] for name in self.step.shown}

    def _clip(self, done: Sequence[StepStats], norm: Tensor | None) -> tuple[float, float, dict[str, float]]:
        """Clips an update's gradient; returns its loss, the gradient's norm before clipping, and other metrics."""
        parameters = list(self.parameters.values())
        own = torch.stack([stats.objective for stats in done]).sum().reshape(1) if done else torch.zeros(1)
        if self.step.shown:
            sums = torch.stack([stats.sums for stats in done]).sum(0) if done else torch.zeros(self.step.width)
            own = torch.cat([own, sums])
        summed = self.ranks.sum_gradients(parameters, own)
        if norm is None:
            norm = gradient_norm(parameters)
        limit = self.config.max_grad_norm or math.inf
        factor = limit / (norm + 1e-6)  # as in `clip_grads_with_norm_`
        # The only point in an update that waits for the device.
        numbers = [summed.to(norm.device), norm.reshape(1), factor.reshape(1)]
        loss, *sums_values, norm_value, factor_value = torch.cat(numbers).tolist()
        if factor_value < 1:
            nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        more = self.step.figures(sums_values) if self.step.shown else {}
        more.pop("loss", None)
        return loss, norm_value, more

    def _passes(self, batches: list[tuple[list[TokenExample], Any]]) -> list[tuple[list[TokenExample], Any]]:
        """Returns the parts of an update's batches that this rank computes, at most a batch each, with loss weights.

        If weights are sharded, all ranks must run equally many passes, so some may be empty.
        """
        if self.ranks.size == 1:
            return batches
        rows = [(example, scale) for batch, scale in batches for example in batch]
        parts = shares([example for example, _ in rows], self.ranks.size, share_prompts=self.step.share_prompts)
        passes = [self._passes_of([rows[number] for number in part]) for part in parts]
        mine = passes[self.ranks.rank]
        if is_spread(self.model):
            mine += [(list[TokenExample](), 0.0)] * (max(map(len, passes)) - len(mine))
        return mine

    def _passes_of(self, rows: list[tuple[TokenExample, Any]]) -> list[tuple[list[TokenExample], Any]]:
        alike: dict[Any, list[TokenExample]] = {}
        for example, scale in rows:
            alike.setdefault(scale, []).append(example)
        size = self.config.batch_size
        chunks = [(each[at : at + size], scale) for scale, each in alike.items() for at in range(0, len(each), size)]
        return [(part, scale) for chunk, scale in chunks for part in self.step.passes(chunk)]

    def _end_epoch(self, complete: bool) -> None:
        loss = self.progress.end_epoch(complete)
        validation_follows = complete and bool(self.valid) and self.progress.is_due(self.config.eval_steps, self.total)
        self.reporter.epoch(len(self.progress.train_losses), loss, validation_follows)

    def _validate(self) -> Generator[Request, Any, None]:
        """Requests the validation loss, skipped if a signal comes; saves the adapter if it is the best so far."""
        if not self.valid:
            return
        progress, config = self.progress, self.config
        computed = yield Validation(self.valid, self._max_tokens)
        figures = computed.result
        if figures is None:
            return
        loss = figures.pop("loss")
        if not math.isfinite(loss):
            when = f"after update {progress.step}" if progress.step else "before training"
            raise self.directory.divergence(f"the validation loss is {loss} {when}", progress)
        name = config.best_metric
        is_best = progress.add_validation(loss, None if name == "loss" else -figures[name])
        # Learning rate of the last update; after a resume, the optimiser does not have it yet.
        lr = config.peak_lr * lr_factor(config, progress.step - 1, self.total) if progress.step else 0.0
        self.metrics.add("valid", progress, loss, lr, computed.seconds, figures)
        self.reporter.validation(progress.step, loss, progress.valid_losses[0][1], self._shown(figures))
        if fault := progress.why_diverged():
            raise self.directory.divergence(f"{fault} (update {progress.step})", progress)
        if is_best:
            self.directory.save_adapter(self.model, self.directory.best, self.ranks)

    def _is_over(self) -> bool:
        return self.progress.step >= self.total or 0 < self.config.early_stopping <= self.progress.bad

    def _stop_if_asked(self) -> None:
        """Ends the run on all ranks if any of them received a signal."""
        if number := self.ranks.max(self.stop.signal_number):
            self.stop.signal_number = number
            self.save()
            raise self.stop.error(
                f"stopped after update {self.progress.step} of {self.total} and saved. "
                "Run the same command with --resume to continue."
            )

    def save(self, finished: bool = False) -> None:
        """Writes a checkpoint of the run's current state."""
        self.progress.metrics_bytes = self.metrics.sync()
        self.progress.finished, self.progress.ranks = finished, self.ranks.size
        state = Checkpoint.capture(self.progress, self.settings, self.parameters, self.initial, self.optimizer)
        self.ranks.require_same({f"the adapter after update {self.progress.step}": hash_tensors(state.parameters)})
        self.ranks.on_first_rank(lambda: self.directory.save(state))
        self._saved = self.progress.step

    def finish(self) -> TrainResult:
        """Checks that the adapter learned, and saves all results."""
        progress = self.progress
        check_learned(self.model, self.initial, progress.step, self.config.peak_lr)
        if self._saved != progress.step:
            self.save()  # if anything below fails, --resume does not have to recompute anything
        adapter_bytes = self.directory.write_results(
            self.model, progress, self.record["data"], self.reporter.say, self.ranks
        )
        if self.config.keep_checkpoints:
            self.save(finished=True)
        self.ranks.on_first_rank(self._close_record)
        return TrainResult(
            output_dir=self.directory.path,
            steps=progress.step,
            losses=self.losses,
            train_losses=progress.train_losses,
            valid_losses=[(int(step), loss) for step, loss, *_ in progress.valid_losses],
            tokens_per_second=self.tokens / self.seconds if self.seconds else 0.0,
            seconds=self.seconds,
            adapter_bytes=adapter_bytes,
            best=progress.best_validation(),
            note=self.step.note,
        )

    def _close_record(self) -> None:
        record = {**self.record, "result": self.progress.result()}
        write_record(self.directory.path, self.config, record)
        self.directory.keep_checkpoints()


# --- What ends a run: a signal, or a fault, since nothing fails silently ----------------------------------------------


class StopRequest:
    """A signal handler that records the first signal (0: none yet); a second one raises KeyboardInterrupt."""

    signal_number = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number and number not in _PASSED_ON:
            raise KeyboardInterrupt
        self.signal_number = self.signal_number or number

    def __bool__(self) -> bool:
        return self.signal_number != 0

    def error(self, message: str) -> InterruptedRunError:
        """Returns the error that ends the run; its exit code treats Ctrl-Break as SIGTERM, as Windows does."""
        is_break = self.signal_number == getattr(signal, "SIGBREAK", None)
        name = signal.Signals(self.signal_number).name
        return InterruptedRunError(f"{name}: {message}", signal.SIGTERM if is_break else self.signal_number)


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Records stop signals instead of letting them kill the process; has no effect outside of the main thread."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    names = ("SIGINT", "SIGTERM", "SIGBREAK", "SIGHUP")  # SIGBREAK is Ctrl-Break on Windows
    handlers = {getattr(signal, n): signal.getsignal(getattr(signal, n)) for n in names if hasattr(signal, n)}
    if _SIGHUP is not None and handlers[_SIGHUP] is signal.SIG_IGN:  # with nohup, the run outlives its terminal
        del handlers[_SIGHUP]
    for number in handlers:
        signal.signal(number, stop)
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            if signal.getsignal(number) is stop:  # otherwise `Ranks.blame` has permanently replaced it
                signal.signal(number, handler)


def _loss_of_guessing(model: nn.Module) -> float:
    """Returns the loss per token of a model for which all tokens are equally likely, ln V; infinity if V is unknown."""
    weight = getattr(output_head(model), "weight", None)
    return math.inf if weight is None else math.log(weight.shape[0])


def loss_fault(loss: float, gradient_norm: float, step: int) -> str:
    """Returns what is not finite in an update, or ""."""
    if not math.isfinite(loss):
        return f"the training loss became {loss} at update {step}"
    if not math.isfinite(gradient_norm):  # possible with a finite loss; the update would ruin every weight
        return f"the gradient became {gradient_norm} at update {step}"
    return ""


def check_gradients(model: nn.Module) -> str:
    """Checks, before the first real update, that the gradient reaches every adapted layer that took part.

    An embedding's B initially has a gradient of exactly zero, so it suffices that one of a layer's tensors has one.

    Returns:
        A note about layers that never ran, or "".

    Raises:
        NothingLearnedError: a layer's gradient is zero, or no layer ran; names all of these layers.
    """
    layers = adapted_layers(model)
    idle, running = [], {}
    for name, layer in layers:
        gradients = [tensor.grad for tensor in layer.trained_tensors().values() if tensor.grad is not None]
        if layer.may_rest:
            continue
        if gradients:
            running[name] = torch.stack([gradient.any() for gradient in gradients]).any()
        else:
            idle.append(name)
    faults = [f"{name}: its gradient is zero" for name, any_gradient in running.items() if not any_gradient]
    if not running:
        faults = [f"{name}: never ran" for name in idle]
    if faults:
        raise NothingLearnedError(
            list_faults(
                f"{len(faults)} of {counted(len(layers), 'adapted layer')} would learn nothing",
                faults,
                "Leave them out of target_modules, or find out what keeps the gradient from reaching them (a "
                "detach(), no_grad(), a frozen path).",
            )
        )
    return (
        list_faults(f"{len(idle)} of {counted(len(layers), 'adapted layer')} never ran and will learn nothing", idle)
        if idle
        else ""
    )


@contextmanager
def holding(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Temporarily gives parameters other values."""
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        _assign(parameters, values)
        yield
    finally:
        _assign(parameters, before)


@torch.no_grad()
def _assign(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Returns the norm () of all gradients together."""
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def starts_as_base(model: nn.Module, initial: Mapping[str, Tensor]) -> bool:
    """Whether the model computed the same as its base before the first update."""
    return all(layer.is_as_base(_initial_of(name, layer, initial)) for name, layer in adapted_layers(model))


def check_learned(model: nn.Module, initial: Mapping[str, Tensor], steps: int, lr: float) -> None:
    """Checks that training changed some weight of the model, within the precision of fp32.

    Raises:
        NothingLearnedError: the trained parameters have the same effect as their `initial` values.
    """
    if not _has_learned(model, initial):
        raise NothingLearnedError(
            f"training changed none of the adapter's {counted(len(initial), 'tensor')} in {counted(steps, 'update')}. "
            f"Raise --lr (now {lr:g}) and look at metrics.jsonl."
        )


@torch.no_grad()
def _has_learned(model: nn.Module, initial: Mapping[str, Tensor]) -> bool:
    layers = adapted_layers(model)
    for name, layer in layers:
        tensors, after = layer.trained_tensors(), {at: layer.delta_weight_of(at) for at in layer.weight_names}
        values = {leaf: tensor.data for leaf, tensor in tensors.items()}
        for leaf, tensor in _initial_of(name, layer, initial).items():
            tensors[leaf].data = tensor
        before = {at: layer.delta_weight_of(at) for at in layer.weight_names}
        for leaf, tensor in values.items():
            tensors[leaf].data = tensor
        rounding = torch.finfo(torch.float32).eps
        if any(
            (after[at] - before[at]).norm() > rounding * dense(layer.base_weight_of(at)).float().norm() for at in after
        ):
            return True
    in_layers = {id(tensor) for _, layer in layers for tensor in layer.trained_tensors().values()}
    others = ((name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in in_layers)
    return any(not torch.equal(parameter, initial[name]) for name, parameter in others)


def _initial_of(name: str, layer: LoRALayer, initial: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a layer's tensors before the first update; frozen ones have not changed."""
    prefix = f"{name}." if name else ""
    return {leaf: initial.get(prefix + leaf, tensor.detach()) for leaf, tensor in layer.trained_tensors().items()}
