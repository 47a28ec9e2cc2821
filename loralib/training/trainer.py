"""The one training loop.

`loralib.train` is its public face; the whole job around it (load, inject, train, tell) is in job.py.
"""

from __future__ import annotations

import hashlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import adapter_of
from ..console import duration, progress, size
from ..data import Encoded, Example, TokenExample, encode, load_examples
from ..data.order import epoch_order
from ..errors import (
    AdapterError,
    ConfigError,
    DataError,
    InterruptedRunError,
    NothingLearnedError,
    TrainingError,
    list_faults,
)
from ..files import hold_directory, remove_file
from ..formats import save_adapter, write_microsoft
from ..injection import adapted_layers, inject, unmerge
from .checkpoint import (
    Checkpoint,
    Progress,
    last_checkpoint,
    remove_checkpoints,
    remove_leftovers,
    save_checkpoint,
)
from .config import TrainConfig
from .memory import freed_memory_kept, objects_set_aside
from .optim import lr_factor, make_optimizer, parameter_groups
from .report import Metrics, memory_estimate, plot_losses, write_card
from .report import tell as tell_user
from .step import Step, StepStats, evaluate_loss, make_step

__all__ = ["Data", "TrainResult", "load_examples_of", "run"]

Data = str | Path | Sequence[str] | Sequence[Example] | Sequence[TokenExample]

# Settings that may differ when a run goes on: they change what is kept and shown, not what is computed.
_FREE = frozenset(
    "target output_dir resume overwrite keep_checkpoints report_to save_steps device train_data valid_data "
    "data_format".split()
)
_SILENCE = 30.0  # seconds without a word where no progress bar is drawn


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
        output_dir: holds the adapter.
        steps: updates done.
        losses: the training loss of each update done in this call (not before a resume).
        train_losses: average training loss of each epoch.
        valid_losses: (update, loss) of each validation; the first is the base's, at update 0.
        tokens_per_second: tokens of the examples, trained or not, over the time of the updates.
        seconds: wall time of the updates.
        adapter_bytes: size of the tensors.
        note: why batches were padded although packing was asked for; else "".
    """

    output_dir: Path
    steps: int
    losses: list[float] = field(repr=False)
    train_losses: list[float]
    valid_losses: list[tuple[int, float]]
    tokens_per_second: float
    seconds: float
    adapter_bytes: int
    note: str = ""

    @property
    def best(self) -> tuple[int, float] | None:
        """(update, loss) of the best adapter, which is in ``output_dir/best``; None without validation data."""
        return _best(self.valid_losses)


def run(
    model: nn.Module, data: Data, config: TrainConfig, tokenizer: Any, valid_data: Data | None, verbose: bool
) -> TrainResult:
    """Does what `loralib.train` says."""
    tell: Callable[..., None] = tell_user if verbose else lambda *_, **__: None
    examples = _token_examples(data, tokenizer, config, config.max_train_samples, "training data", tell)
    valid = _token_examples(valid_data, tokenizer, config, config.max_valid_samples, "validation data", tell)
    if not valid and (config.early_stopping or config.eval_steps):
        asked = "early_stopping" if config.early_stopping else "eval_steps"
        raise ConfigError(
            f"{asked} is {getattr(config, asked)}, but there is no validation data: give it, or leave it out"
        )
    if not adapted_layers(model):
        torch.manual_seed(config.seed)
        inject(model, config.lora_config())
    unmerge(model)
    with (
        hold_directory(config.output_dir) as directory,
        _signals() as stop,
        freed_memory_kept(),
        objects_set_aside(),
        ExitStack() as last,
    ):
        try:
            this = _Run(model, examples, valid, config, directory, stop, verbose, last)
            return this.go()
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise _out_of_memory(config, directory) from error
        except RuntimeError as error:
            if any(words in str(error) for words in _NO_MEMORY):
                raise _out_of_memory(config, directory) from error
            raise


# How allocators say it that raise nothing more special: PyTorch's on Linux and macOS, on Windows, MPS, cuBLAS.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "STATUS_ALLOC_FAILED")


class _Run:
    """One run in one directory: the state of the loop, and what is done with it."""

    def __init__(
        self,
        model: nn.Module,
        examples: Sequence[TokenExample],
        valid: Sequence[TokenExample],
        config: TrainConfig,
        directory: Path,
        stop: _Stop,
        verbose: bool,
        last: ExitStack,
    ) -> None:
        self.model, self.examples, self.valid = model, examples, valid
        self.config, self.directory, self.stop = config, directory, stop
        self.say: Callable[..., None] = tell_user if verbose else lambda *_, **__: None
        self.verbose = verbose
        self.checkpoints = directory / "checkpoints"
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.settings = _settings(model, config, examples, valid)
        self.per_epoch = math.ceil(math.ceil(len(examples) / config.batch_size) / config.grad_accum)
        self.total = config.max_steps or config.num_epochs * self.per_epoch
        self.losses: list[float] = []
        self.seconds, self.tokens_timed = 0.0, 0
        self.told = time.monotonic()

        remove_leftovers(directory)
        if config.gradient_checkpointing:
            last.callback(_checkpoint_gradients(model))
        self.step: Step = make_step(
            model,
            packing=config.packing,
            share_prompts=config.share_prompts,
            label_smoothing=config.label_smoothing,
        )
        self.measure = self.step.unsmoothed()
        # Common beginnings cost once only where they are shared; elsewhere a uniform shuffle is the better order.
        self.siblings = config.max_siblings if self.step.share_prompts else 1

        self.progress = Progress()
        found = self._found()
        self.optimizer = make_optimizer(parameter_groups(model, config), config)
        self.initial = {name: p.detach().clone() for name, p in self.parameters.items()}
        if found is not None:
            self._restore(found)
        else:
            torch.manual_seed(config.seed)
        self.from_base = _is_base(self.initial)
        self.metrics = Metrics(
            directory,
            self.progress.metrics_bytes,
            config.report_to == "tensorboard",
            first_step=self.progress.step + bool(self.progress.valid_losses or self.progress.step),
        )
        last.callback(self.metrics.close)

    # The loop.

    def go(self) -> TrainResult:
        """Trains from where the run stands to its end."""
        if self.step.note:
            self.say(f"Batches are padded: {self.step.note}.")
        if self.metrics.note:
            self.say(f"WARNING: {self.metrics.note}.")
        if self._peak_is_out_of_reach():
            self.say(f"WARNING: --warmup_steps {self.config.warmup_steps} outlasts the run: --lr is never reached.")
        self._say_memory()
        state = self.progress
        if self._owes_validation():
            self._validate()
            if self.stop.signal_number:
                raise self._interrupted()
        was_training = self.model.training
        self.model.train()
        bar = progress(total=self.total, description="training", unit="step") if self.verbose else None
        if bar is not None:
            bar.update(state.step)
        try:
            while state.step < self.total and not self._stopped_early():
                updates = self._updates(state.epoch)
                for batches in islice(updates, state.update, None):
                    self._update(batches, bar)
                    if state.update == self.per_epoch:
                        self._end_epoch()
                    if self._due(self.config.eval_steps):
                        self._validate()
                    if self.stop.signal_number:
                        raise self._interrupted()
                    if self._due(self.config.save_steps) and state.step < self.total:
                        self._save()
                    if state.step == self.total or self._stopped_early():
                        break
        finally:
            if bar is not None:
                bar.close()
            self.model.train(was_training)
        if state.epoch_weight:  # stopped within an epoch
            self._end_epoch(whole=False)
        if state.step < self.total:
            self.say(
                f"Stopped early, after update {state.step:,} of {self.total:,}: the last {state.bad:,} validations "
                "were no better than the best before."
            )
        return self._finish()

    def _updates(self, epoch: int) -> Iterator[list[list[TokenExample]]]:
        """Yields the batches of each update of an epoch."""
        config = self.config
        order = epoch_order(
            self.examples,
            config.batch_size,
            seed=config.seed,
            epoch=epoch,
            max_siblings=self.siblings,
            shuffle=config.shuffle,
        )
        batches = [[self.examples[index] for index in batch] for batch in order]
        for at in range(0, len(batches), config.grad_accum):
            yield batches[at : at + config.grad_accum]

    def _update(self, batches: list[list[TokenExample]], bar: Any) -> None:
        """Computes the gradient of one update's batches and applies it."""
        config, state = self.config, self.progress
        started = time.perf_counter()
        paper = config.arithmetic == "paper"
        trained = [sum(map(sum, (example.trained for example in batch))) for batch in batches]
        self.optimizer.zero_grad(set_to_none=True)
        done: list[StepStats] = []
        loss = 0.0
        for batch, weight in zip(batches, trained, strict=True):
            # Weighted by tokens, the loss does not depend on how an update is split into batches.  The paper's code
            # averages over batches, and divides each by its tokens + 0.0001.
            scale = 1 / ((weight + 1e-4) * config.grad_accum) if paper else 1 / max(1, sum(trained))
            done.append(self.step.forward_backward(batch, loss_scale=scale))
            loss += float(done[-1].loss_sum) * scale
        if paper:
            loss *= config.grad_accum / len(batches)
        self._check_loss(loss)
        factor = self._lr_factor(state.step + 1)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        if factor > 0 and not self._checked_gradients:
            self._check_gradients()
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), config.max_grad_norm or math.inf))
        if not math.isfinite(norm):  # a finite loss can have such a gradient; the update would spoil every weight
            raise self._went_wrong(f"the gradient became {norm} at update {state.step + 1}")
        self.optimizer.step()
        elapsed = time.perf_counter() - started

        tokens, examples = sum(s.tokens for s in done), sum(map(len, batches))
        state.step, state.update = state.step + 1, state.update + 1
        state.examples, state.tokens = state.examples + examples, state.tokens + tokens
        state.trained_tokens += sum(trained)
        weight = len(batches) if paper else sum(trained)
        state.epoch_loss, state.epoch_weight = state.epoch_loss + loss * weight, state.epoch_weight + weight
        self.losses.append(loss)
        self.seconds, self.tokens_timed = self.seconds + elapsed, self.tokens_timed + tokens
        self._log("train", loss, config.lr * factor, elapsed)
        if bar is not None:
            bar.set_postfix_str(f"loss {loss:.3f}, {tokens / elapsed:,.0f} tokens/s", refresh=False)
            bar.update()
            if bar.disable and time.monotonic() - self.told > _SILENCE:
                self._say_progress(loss)

    _checked_gradients = False

    @property
    def _ticks(self) -> int:
        """How often the schedule ticks in an update: the paper's does so with every batch."""
        return self.config.grad_accum if self.config.arithmetic == "paper" else 1

    def _lr_factor(self, step: int) -> float:
        """The share of its peak that the learning rate has in an update, counted from 1."""
        return lr_factor(self.config, step * self._ticks - 1, self.total * self._ticks)

    def _log(self, event: str, loss: float, lr: float, seconds: float) -> None:
        state = self.progress
        self.metrics.add(
            event,
            state.step,
            epoch=round(state.epoch + state.update / self.per_epoch, 4),
            loss=loss,
            lr=lr,
            examples=state.examples,
            tokens=state.tokens,
            trained_tokens=state.trained_tokens,
            step_s=round(seconds, 4),
        )

    def _say_progress(self, loss: float) -> None:
        """A line for logs, in which no progress bar is drawn."""
        self.told = time.monotonic()
        left = (self.total - self.progress.step) * self.seconds / len(self.losses)
        speed = self.tokens_timed / self.seconds
        self.say(
            f"Update {self.progress.step:,} of {self.total:,}: loss {loss:.3f}, {speed:,.0f} tokens/s, "
            f"{duration(left)} left"
        )

    def _end_epoch(self, whole: bool = True) -> None:
        state = self.progress
        average = state.epoch_loss / max(state.epoch_weight, 1e-9)
        state.train_losses.append(average)
        state.epoch_loss = state.epoch_weight = 0.0
        if whole:
            state.epoch, state.update = state.epoch + 1, 0
        told = f"Epoch {len(state.train_losses)}: average training loss {average:.4f}"
        if whole and self.valid and self._due(self.config.eval_steps):
            self._say_epoch = told  # in one line with the validation that follows
        else:
            self.say(told)

    _say_epoch = ""

    def _due(self, every: int) -> bool:
        state = self.progress
        return state.step == self.total or (state.step % every == 0 if every else state.update == 0)

    def _owes_validation(self) -> bool:
        """At the start; and where a signal came before the validation of the last update was done."""
        state = self.progress
        if not state.valid_losses:
            return state.step == 0
        return state.valid_losses[-1][0] < state.step and self._due(self.config.eval_steps)

    def _validate(self) -> None:
        """Measures the loss on the validation data, unless a signal comes; keeps the best adapter."""
        if not self.valid:
            return
        state = self.progress
        started = time.perf_counter()
        most = max(2048, self.config.batch_size * max(map(len, self.examples)))  # no more memory than training takes
        loss = evaluate_loss(
            self.measure, self.model, self.valid, max_tokens=most, stop=lambda: bool(self.stop.signal_number)
        )
        if loss is None:
            return
        if not math.isfinite(loss):
            when = f"after update {state.step}" if state.step else "before training"
            raise self._went_wrong(f"the validation loss is {loss} {when}")
        state.valid_losses.append([state.step, loss])
        # Of the update before; the optimiser of a run that goes on has not been told it yet.
        lr = self.config.lr * self._lr_factor(state.step) if state.step else 0.0
        self._log("valid", loss, lr, time.perf_counter() - started)
        if state.step == 0:
            self.say(f"Before training: validation loss {loss:.4f}{' (the base model)' if self.from_base else ''}")
            return
        first = state.valid_losses[0][1]
        told = f"{self._say_epoch}, " if self._say_epoch else f"Update {state.step}: "
        of = "the base's" if self.from_base else "the one before"
        self.say(f"{told}validation loss {loss:.4f} ({loss / first:.0%} of {of})")
        self._say_epoch = ""
        if state.best is None or loss < state.best:
            state.best, state.bad = loss, 0
            save_adapter(self.model, self.directory / "best")
        else:
            state.bad += 1

    def _stopped_early(self) -> bool:
        return 0 < self.config.early_stopping <= self.progress.bad

    # Checks: nothing fails silently.

    def _check_gradients(self) -> None:
        """Before the first real update: the gradient must reach every adapted layer that took part."""
        self._checked_gradients = True
        idle, dead = [], []
        for name, layer in adapted_layers(self.model):
            gradients = [p.grad for p in (layer.lora_A, layer.lora_B) if p.grad is not None]
            if not gradients:
                idle.append(name)
            elif not any(bool(gradient.any()) for gradient in gradients):
                dead.append(name)
        layers = len(adapted_layers(self.model))
        if dead or len(idle) == layers:
            faults = [f"{name}: its gradient is zero" for name in dead]
            faults += [f"{name}: never ran" for name in idle] if len(idle) == layers else []
            raise NothingLearnedError(
                list_faults(
                    f"{len(faults)} of {layers} adapted layers would learn nothing",
                    faults,
                    "Leave them out of target_modules, or find what keeps the gradient from them (a detach(), "
                    "no_grad(), a frozen path).",
                )
            )
        if idle:
            self.say(list_faults(f"{len(idle)} of {layers} adapted layers never ran and will not learn", idle))

    def _check_loss(self, loss: float) -> None:
        if math.isfinite(loss):
            recent = self.losses[-20:]
            if len(recent) < 20 or sum(recent) / 20 < 2 * self.losses[0] + 1:
                return
            what = f"the training loss exploded: {sum(recent) / 20:.3g} over the last 20 updates"
        else:
            what = f"the training loss became {loss} at update {self.progress.step + 1}"
        raise self._went_wrong(what)

    def _went_wrong(self, what: str) -> TrainingError:
        config = self.config
        if self.progress.step == 0:
            return TrainingError(
                f"{what}: the model itself gives it, nothing has been trained yet. Try --dtype fp32, and look at its "
                "weights."
            )
        best = _best(self.progress.valid_losses)
        kept = f" {self.directory / 'best'} holds the adapter of update {best[0]}." if best else ""
        return TrainingError(
            f"{what}. {_kept(self.checkpoints)}{kept} Lower --lr (now {config.lr:g}) or --loraplus_lr_ratio (now "
            f"{config.loraplus_lr_ratio:g}), raise --warmup_steps, or try --dtype fp32; then start anew with "
            "--overwrite."
        )

    def _check_learned(self) -> None:
        """An adapter whose update lies below fp32's resolution of every base weight changes no output."""
        if not _has_moved(self.model, self.parameters, self.initial):
            raise NothingLearnedError(
                f"the adapter ended as it began: its {len(self.parameters)} tensors changed nothing in "
                f"{self.progress.step} updates. Raise --lr (now {self.config.lr:g}) and look at metrics.jsonl."
            )

    # Keeping.

    def _found(self) -> Checkpoint | None:
        """Returns the checkpoint to go on from; refuses to bury an unfinished run by mistake."""
        if self.config.overwrite and not self.config.resume:
            remove_checkpoints(self.checkpoints)
            return None
        found = last_checkpoint(self.checkpoints, lambda fault: self.say(f"WARNING: {fault}"))
        if self.config.resume:
            if found is None:
                raise TrainingError(f"{self.directory} holds no checkpoint to resume from; leave out --resume to start")
            found[0].require_same(self.settings, found[1])
            found[0].require_fitting(self.parameters, found[1])
            self.say(f"Resuming from {found[1].name}: {found[0].progress.step} of {self.total} updates done")
            return found[0]
        if found is not None:
            if not found[0].progress.finished:
                raise TrainingError(
                    f"{self.directory} holds a run that stopped after {found[0].progress.step} updates. Add --resume "
                    "to go on with it, --overwrite to throw it away, or choose another --output_dir."
                )
            remove_checkpoints(self.checkpoints)
        return None

    def _restore(self, saved: Checkpoint) -> None:
        self.progress, self.initial = saved.progress, dict(saved.initial)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(saved.parameters[name])
        whole = self.optimizer.state_dict()
        whole["state"] = {number: dict(values) for number, values in saved.optimizer.items()}
        self.optimizer.load_state_dict(whole)
        self._checked_gradients = saved.progress.step > 0
        _set_random_states(saved.rng, self._device)

    @property
    def _device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    def _save(self, finished: bool = False) -> Path:
        self.progress.metrics_bytes = self.metrics.sync()
        self.progress.finished = finished
        state = Checkpoint(
            self.progress,
            self.settings,
            self.parameters,
            self.initial,
            {n: {k: torch.as_tensor(v) for k, v in s.items()} for n, s in self.optimizer.state_dict()["state"].items()},
            _random_states(self._device),
        )
        return save_checkpoint(self.checkpoints, state, self.config.keep_checkpoints)

    def _interrupted(self) -> InterruptedRunError:
        self._save()
        number = self.stop.signal_number
        name = signal.Signals(number).name
        return InterruptedRunError(
            f"{name}: stopped after update {self.progress.step} of {self.total} and saved. "
            "Run the same command with --resume to go on.",
            signal.SIGTERM if number == getattr(signal, "SIGBREAK", None) else number,  # Ctrl-Break is how Windows asks
        )

    def _finish(self) -> TrainResult:
        """Saves everything, the adapter's config last."""
        state = self.progress
        self._check_learned()
        self._save()  # whatever fails below, --resume has nothing to compute again
        adapter = adapter_of(self.model)
        write_microsoft(adapter, self.directory / "pytorch_model.bin")
        base = getattr(self.model, "name_or_path", "") or self.config.model
        plot_losses(self.metrics.path, self.directory / "loss.png", f"LoRA on {base}, r={adapter.config.r}")
        if not self.valid:
            _remove_adapter(self.directory / "best")  # of an earlier run in this place
        write_card(self.directory, self.model, self.config, self._facts())
        save_adapter(self.model, self.directory)
        self._save(finished=True)
        return TrainResult(
            output_dir=self.directory,
            steps=state.step,
            losses=self.losses,
            train_losses=state.train_losses,
            valid_losses=[(int(step), loss) for step, loss in state.valid_losses],
            tokens_per_second=self.tokens_timed / self.seconds if self.seconds else 0.0,
            seconds=self.seconds,
            adapter_bytes=adapter.nbytes,
            note=self.step.note,
        )

    def _facts(self) -> dict[str, str]:
        config, state = self.config, self.progress
        facts = {
            "training examples": f"{len(self.examples):,}",
            "updates": f"{state.step:,} of {config.batch_size * config.grad_accum} examples",
            "learning rate": f"{config.lr:g}, B {config.loraplus_lr_ratio:g} times that (LoRA+), {config.schedule}",
            "training loss, by epoch": ", ".join(f"{loss:.4f}" for loss in state.train_losses),
            "seed": str(config.seed),
        }
        if state.valid_losses:
            base, last = state.valid_losses[0][1], state.valid_losses[-1][1]
            facts["validation loss"] = f"{base:.4f} before, {last:.4f} after ({last / base:.0%})"
        best = _best(state.valid_losses)
        if best is not None and best[0] != state.step:
            facts["best validation loss"] = f"{best[1]:.4f} after update {best[0]:,}: the adapter in `best`"
        return facts

    def _say_memory(self) -> None:
        longest = max(map(len, self.examples)) * self.config.batch_size
        needed, free = memory_estimate(self.model, longest, self.config.gradient_checkpointing)
        self.say(f"Memory: about {size(needed)} needed" + (f", {size(free)} free" if free else ""))
        if free and needed > free:
            self.say("  That may not fit: lower --batch_size or --seq_len, or add --gradient_checkpointing.")

    def _peak_is_out_of_reach(self) -> bool:
        return self.config.warmup_steps > self.total * self._ticks


_HANGUP = getattr(signal, "SIGHUP", None)  # the terminal was closed; Windows has no such signal


class _Stop:
    """Remembers the signal that asked the run to end; a second one ends it at once."""

    signal_number = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number and number != _HANGUP:  # that one comes twice: from the system and from the shell
            raise KeyboardInterrupt
        self.signal_number = self.signal_number or number


@contextmanager
def _signals() -> Iterator[_Stop]:
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    names = ("SIGINT", "SIGTERM", "SIGBREAK", "SIGHUP")  # SIGBREAK: Ctrl-Break on Windows
    before = {getattr(signal, name): signal.getsignal(getattr(signal, name)) for name in names if hasattr(signal, name)}
    if _HANGUP is not None and before[_HANGUP] is signal.SIG_IGN:  # nohup: the run is to outlive its terminal
        del before[_HANGUP]
    for number in before:
        signal.signal(number, stop)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def load_examples_of(config: TrainConfig, sources: Any, tokenizer: Any, most: int) -> Encoded:
    """Loads examples as the run's settings say, at most so many, or all for 0 (see `load_examples`)."""
    return load_examples(
        sources,
        tokenizer,
        format=config.data_format,
        seq_len=config.seq_len,
        objective=config.objective,
        max_samples=most or None,
        seed=config.seed,
    )


def _token_examples(
    data: Data | None, tokenizer: Any, config: TrainConfig, most: int, what: str, tell: Callable[..., None]
) -> list[TokenExample]:
    if data is None:
        return []
    if isinstance(data, (str, Path)) or (len(data) and isinstance(data[0], (str, Path))):
        if tokenizer is None:
            raise ConfigError(f"{what} is a file, which needs a tokenizer: pass tokenizer=")
        paths: Any = data
        encoded = load_examples_of(config, paths, tokenizer, most)
    else:
        if not data:
            raise DataError(f"{what} is empty, expected at least one example")
        kinds = {type(example) for example in data}
        if kinds == {TokenExample}:
            return [example for example in data if isinstance(example, TokenExample)]
        if kinds != {Example}:
            raise DataError(
                f"{what} holds {' and '.join(sorted(kind.__name__ for kind in kinds))}, expected Example (text: "
                "Example.of(prompt, completion)) or TokenExample, or the paths of files"
            )
        if tokenizer is None:
            raise ConfigError(f"{what} is text, which needs a tokenizer: pass tokenizer=")
        texts = [example for example in data if isinstance(example, Example)]
        encoded = encode(texts, tokenizer, config.seq_len, config.objective)
    if encoded.drop_note:
        tell(f"{what.capitalize()}: {encoded.drop_note}")
    return encoded.examples


def _settings(
    model: nn.Module, config: TrainConfig, examples: Sequence[TokenExample], valid: Sequence[TokenExample]
) -> dict[str, Any]:
    """Returns what must be the same for a run to go on: the settings that count, the data, and what is frozen."""
    chosen = {name: value for name, value in config.to_dict().items() if name not in _FREE}
    data = {"training data": _hash(examples), "validation data": _hash(valid)}
    return {**_plain(chosen), **data, "base model": _frozen(model)}


def _hash(examples: Iterable[TokenExample]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr((example.ids, example.trained)).encode())
    return digest.hexdigest()[:16]


def _frozen(model: nn.Module) -> str:
    """Dtypes of the frozen weights (--dtype auto may choose another one elsewhere), and a hash of samples of them."""
    digest, dtypes = hashlib.sha256(), set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            dtypes.add(str(parameter.dtype).removeprefix("torch."))
            flat = parameter.detach().reshape(-1)
            samples = flat[:: max(1, flat.numel() // 64)][:64].to("cpu", torch.float32)
            digest.update(f"{name} {tuple(parameter.shape)} {samples.tolist()}\n".encode())
    return f"{' and '.join(sorted(dtypes))} {digest.hexdigest()[:16]}"


def _random_states(device: torch.device) -> dict[str, Tensor]:
    """The states of the random generators that a run on this device draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    elif device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state(device)
    return states


def _set_random_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type in states and device.type == "mps":
        torch.mps.set_rng_state(states["mps"])
    elif device.type in states and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[device.type], device)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON gives tuples back as lists."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _is_base(initial: Mapping[str, Tensor]) -> bool:
    """Whether the model computed what its base does before the first update: one factor of each pair is zero."""
    return all(
        not tensor.any() or not initial.get(f"{name.removesuffix('lora_A')}lora_B", tensor).any()
        for name, tensor in initial.items()
        if name.endswith("lora_A")
    )


def _best(valid_losses: Sequence[Sequence[float]]) -> tuple[int, float] | None:
    """The first of the lowest losses of an adapter; update 0 is the base."""
    found = min(((loss, int(step)) for step, loss in valid_losses if step), default=None)
    return None if found is None else (found[1], found[0])


def _remove_adapter(directory: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        remove_file(directory / name)
    with suppress(OSError):  # not there, or something of the user's is in it
        directory.rmdir()


def _has_moved(model: nn.Module, parameters: Mapping[str, nn.Parameter], initial: Mapping[str, Tensor]) -> bool:
    """Whether any weight of the model is now another one, as far as fp32 can tell, than with the initial adapter."""
    with torch.no_grad():
        for name, layer in adapted_layers(model):
            after = layer.delta_weight()
            now = [parameter.data for parameter in (layer.lora_A, layer.lora_B)]
            layer.lora_A.data, layer.lora_B.data = initial[f"{name}.lora_A"], initial[f"{name}.lora_B"]
            before = layer.delta_weight()
            layer.lora_A.data, layer.lora_B.data = now
            if (after - before).norm() > torch.finfo(torch.float32).eps * layer.base_weight.float().norm():
                return True
    others = [name for name in parameters if not name.endswith(("lora_A", "lora_B"))]
    return any(not torch.equal(parameters[name].detach(), initial[name]) for name in others)


def _checkpoint_gradients(model: nn.Module) -> Callable[[], object]:
    """Switches it on; returns what gives the model back as it was."""
    word = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # before transformers 5
    enable = getattr(model, f"{word}_checkpointing_enable", None)
    disable = getattr(model, f"{word}_checkpointing_disable", None)
    if not callable(enable) or not callable(disable):
        raise ConfigError(f"gradient_checkpointing: {type(model).__name__} does not offer it; leave it out")
    was_on = bool(getattr(model, f"is_{word}_checkpointing", False))
    enable({"use_reentrant": False})  # the reentrant kind trains nothing below a frozen embedding
    return (lambda: None) if was_on else disable


def _out_of_memory(config: TrainConfig, directory: Path) -> TrainingError:
    return TrainingError(
        f"memory ran out. {_kept(directory / 'checkpoints')} Lower --batch_size (now {config.batch_size}) and raise "
        f"--grad_accum to make up for it, lower --seq_len (now {config.seq_len}), or add --gradient_checkpointing."
    )


def _kept(checkpoints: Path) -> str:
    try:
        found = last_checkpoint(checkpoints)
    except (OSError, AdapterError):
        found = None
    if found is None:
        return "There is no checkpoint yet."
    return f"The checkpoint of update {found[0].progress.step} is intact ({found[1]})."
