"""The one training loop.

`loralib.train` is its public face; the whole job around it (load, inject, train, tell) is in job.py.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import adapter_of
from ..console import progress, say, size
from ..data import Example, TokenExample, encode, load_examples
from ..data.order import epoch_order
from ..errors import (
    ConfigError,
    DataError,
    InterruptedRunError,
    NothingLearnedError,
    TrainingError,
    list_faults,
)
from ..files import hold_directory
from ..formats import save_adapter, write_microsoft
from ..inject import adapted_layers, inject, unmerge
from .checkpoint import Checkpoint, Progress, last_checkpoint, remove_checkpoints, save_checkpoint
from .config import TrainConfig
from .optim import lr_factor, make_optimizer, parameter_groups
from .report import Metrics, memory_estimate, plot_losses, write_card
from .step import Step, StepStats, make_step

__all__ = ["Data", "TrainResult", "run"]

Data = str | Path | Sequence[str] | Sequence[Example] | Sequence[TokenExample]

# Settings that may differ when a run goes on: they change what is kept and shown, not what is computed.
_FREE = frozenset(
    "target output_dir resume overwrite keep_checkpoints report_to save_steps device train_data valid_data".split()
)


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


def run(
    model: nn.Module, data: Data, config: TrainConfig, tokenizer: Any, valid_data: Data | None, verbose: bool
) -> TrainResult:
    """Does what `loralib.train` says."""
    examples = _token_examples(data, tokenizer, config, config.max_train_samples, "training data")
    valid = _token_examples(valid_data, tokenizer, config, config.max_valid_samples, "validation data")
    if not adapted_layers(model):
        torch.manual_seed(config.seed)
        inject(model, config.lora_config())
    unmerge(model)
    with hold_directory(config.output_dir) as directory, _signals() as stop:
        this = _Run(model, examples, valid, config, directory, stop, verbose)
        try:
            return this.go()
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise _out_of_memory(config, directory) from error
        except RuntimeError as error:
            if "can't allocate memory" in str(error) or "not enough memory" in str(error):
                raise _out_of_memory(config, directory) from error
            raise
        finally:
            this.close()


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
    ) -> None:
        self.model, self.examples, self.valid = model, examples, valid
        self.config, self.directory, self.stop = config, directory, stop
        self.say: Callable[..., None] = say if verbose else lambda *_, **__: None
        self.verbose = verbose
        self.checkpoints = directory / "checkpoints"
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.settings = _settings(config, examples)
        self.per_epoch = math.ceil(math.ceil(len(examples) / config.batch_size) / config.grad_accum)
        self.total = config.max_steps or config.num_epochs * self.per_epoch
        self.metrics: Metrics | None = None
        self.losses: list[float] = []
        self.seconds, self.tokens_timed = 0.0, 0

        self.progress = Progress()
        found = self._found()
        self.optimizer = make_optimizer(parameter_groups(model, config), config)
        self.initial = {name: p.detach().clone() for name, p in self.parameters.items()}
        if found is not None:
            self._restore(found)
        else:
            torch.manual_seed(config.seed)
        self.metrics = Metrics(directory, self.progress.metrics_bytes, config.report_to == "tensorboard")
        if config.gradient_checkpointing:
            _checkpoint_gradients(model)
        self.step: Step = make_step(
            model,
            packing=config.packing,
            share_prompts=config.share_prompts,
            label_smoothing=config.label_smoothing,
        )
        # Common beginnings cost once only where they are shared; elsewhere a uniform shuffle is the better order.
        self.siblings = config.max_siblings if self.step.share_prompts else 1

    def close(self) -> None:
        if self.metrics is not None:
            self.metrics.close()

    # The loop.

    def go(self) -> TrainResult:
        """Trains from where the run stands to its end."""
        if self.step.note:
            self.say(f"Batches are padded: {self.step.note}.")
        self._say_memory()
        state = self.progress
        if not state.valid_losses:
            self._validate()
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
                    ends_epoch = state.update == 0
                    if self._due(self.config.eval_steps, ends_epoch):
                        self._validate()
                    if self._due(self.config.save_steps, ends_epoch) and state.step < self.total:
                        self._save()
                    if self.stop.signal_number:
                        raise self._interrupted()
                    if state.step == self.total or self._stopped_early():
                        break
        finally:
            if bar is not None:
                bar.close()
            self.model.train(was_training)
        if state.update:  # stopped within an epoch
            self._end_epoch(whole=False)
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
            loss += done[-1].loss_sum * scale
        if paper:
            loss *= config.grad_accum / len(batches)
        self._check_loss(loss)
        ticks, ticks_total = (config.grad_accum, self.total * config.grad_accum) if paper else (1, self.total)
        factor = lr_factor(config, (state.step + 1) * ticks - 1, ticks_total)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        if factor > 0 and not self._checked_gradients:
            self._check_gradients()
        if config.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), config.max_grad_norm)
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
        self._log("train", loss=loss, lr=config.lr * factor, step_s=round(elapsed, 4))
        if bar is not None:
            bar.set_postfix_str(f"loss {loss:.3f}, {tokens / elapsed:,.0f} tokens/s", refresh=False)
            bar.update()

    _checked_gradients = False

    def _log(self, event: str, **values: Any) -> None:
        state = self.progress
        assert self.metrics is not None
        self.metrics.add(
            event,
            state.step,
            epoch=round(state.epoch + state.update / self.per_epoch, 4),
            **values,
            examples=state.examples,
            tokens=state.tokens,
            trained_tokens=state.trained_tokens,
        )

    def _end_epoch(self, whole: bool = True) -> None:
        state = self.progress
        average = state.epoch_loss / max(state.epoch_weight, 1e-9)
        state.train_losses.append(average)
        state.epoch_loss = state.epoch_weight = 0.0
        if whole:
            state.epoch, state.update = state.epoch + 1, 0
        self._say_epoch = f"Epoch {len(state.train_losses)}: average training loss {average:.4f}"
        if not self.valid:
            self.say(self._say_epoch)
            self._say_epoch = ""

    _say_epoch = ""

    def _due(self, every: int, ends_epoch: bool) -> bool:
        return self.progress.step % every == 0 or self.progress.step == self.total if every else ends_epoch

    def _validate(self) -> None:
        """Measures the loss on the validation data; keeps the best adapter."""
        if not self.valid:
            return
        state = self.progress
        loss = evaluate_loss(self.step, self.model, self.valid)
        state.valid_losses.append([state.step, loss])
        self._log("valid", loss=loss)
        if state.step == 0:
            self.say(f"Before training: validation loss {loss:.4f} (the base model)")
            return
        base = state.valid_losses[0][1]
        told = f"{self._say_epoch}, " if self._say_epoch else f"Update {state.step}: "
        self.say(f"{told}validation loss {loss:.4f} ({loss / base:.0%} of the base's)")
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
        raise TrainingError(
            f"{what}. {_kept(self.checkpoints)} Lower --lr (now {self.config.lr:g}) or --loraplus_lr_ratio (now "
            f"{self.config.loraplus_lr_ratio:g}), raise --warmup_steps, or try --dtype fp32; then start anew with "
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
        found = last_checkpoint(self.checkpoints)
        if self.config.resume:
            if found is None:
                raise TrainingError(f"{self.directory} holds no checkpoint to resume from; leave out --resume to start")
            found[0].require_same(self.settings, found[1])
            self.say(f"Resuming from {found[1].name}: {found[0].progress.step} of {self.total} updates done")
            return found[0]
        if found is not None:
            if not found[0].progress.finished and not self.config.overwrite:
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
        torch.set_rng_state(saved.rng["cpu"])
        if "cuda" in saved.rng:
            torch.cuda.set_rng_state(saved.rng["cuda"])

    def _save(self, finished: bool = False) -> Path:
        assert self.metrics is not None
        self.progress.metrics_bytes = self.metrics.sync()
        self.progress.finished = finished
        rng = {"cpu": torch.get_rng_state()}
        if next(iter(self.parameters.values())).is_cuda:
            rng["cuda"] = torch.cuda.get_rng_state()
        state = Checkpoint(
            self.progress,
            self.settings,
            self.parameters,
            self.initial,
            {n: {k: torch.as_tensor(v) for k, v in s.items()} for n, s in self.optimizer.state_dict()["state"].items()},
            rng,
        )
        return save_checkpoint(self.checkpoints, state, self.config.keep_checkpoints)

    def _interrupted(self) -> InterruptedRunError:
        self._save()
        number = self.stop.signal_number
        name = signal.Signals(number).name
        return InterruptedRunError(
            f"{name}: stopped after update {self.progress.step} of {self.total} and saved. "
            "Run the same command with --resume to go on.",
            number,
        )

    def _finish(self) -> TrainResult:
        """Saves everything, the adapter's config last."""
        state = self.progress
        self._check_learned()
        assert self.metrics is not None
        self.metrics.sync()
        write_microsoft(adapter_of(self.model), self.directory / "pytorch_model.bin")
        plot_losses(
            self.metrics.path, self.directory / "loss.png", f"LoRA on {self.config.model}, r={self.config.lora_dim}"
        )
        write_card(self.directory, self.model, self.config, self._facts())
        adapter = save_adapter(self.model, self.directory)
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
        return facts

    def _say_memory(self) -> None:
        longest = max(map(len, self.examples)) * self.config.batch_size
        needed, free = memory_estimate(self.model, longest, self.config.gradient_checkpointing)
        self.say(f"Memory: about {size(needed)} needed" + (f", {size(free)} free" if free else ""))
        if free and needed > free:
            self.say("  That may not fit: lower --batch_size or --seq_len, or add --gradient_checkpointing.")


def evaluate_loss(step: Step, model: nn.Module, examples: Sequence[TokenExample], batch_size: int = 16) -> float:
    """Returns the average loss of the trained tokens, in nats; ``exp`` of it is the perplexity.

    Args:
        step: made by `make_step` for the model.
        model: switched to eval mode meanwhile.
        examples: what to measure on.
        batch_size: examples at once.
    """
    order = sorted(examples, key=lambda example: example.ids)  # neighbours share their prompts
    was_training = model.training
    model.eval()
    try:
        done = [step.loss(order[at : at + batch_size]) for at in range(0, len(order), batch_size)]
    finally:
        model.train(was_training)
    return sum(s.loss_sum for s in done) / max(1, sum(s.trained_tokens for s in done))


class _Stop:
    """Remembers the signal that asked the run to end; a second one ends it at once."""

    signal_number = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number:
            raise KeyboardInterrupt
        self.signal_number = number


@contextmanager
def _signals() -> Iterator[_Stop]:
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    names = ("SIGINT", "SIGTERM", "SIGBREAK")  # SIGBREAK: Ctrl-Break on Windows
    before = {getattr(signal, name): signal.getsignal(getattr(signal, name)) for name in names if hasattr(signal, name)}
    for number in before:
        signal.signal(number, stop)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _token_examples(data: Data | None, tokenizer: Any, config: TrainConfig, most: int, what: str) -> list[TokenExample]:
    if data is None:
        return []
    if isinstance(data, (str, Path)) or (len(data) and isinstance(data[0], str)):
        if tokenizer is None:
            raise ConfigError(f"{what} is a file, which needs a tokenizer: pass tokenizer=")
        paths: Any = data
        encoded = load_examples(
            paths,
            tokenizer,
            seq_len=config.seq_len,
            objective=config.objective,
            max_samples=most or None,
            seed=config.seed,
        )
        return encoded.examples
    if not data:
        raise DataError(f"{what} is empty, expected at least one example")
    if all(isinstance(example, TokenExample) for example in data):
        return [example for example in data if isinstance(example, TokenExample)]
    if tokenizer is None:
        raise ConfigError(f"{what} is text, which needs a tokenizer: pass tokenizer=")
    texts = [example for example in data if isinstance(example, Example)]
    return encode(texts, tokenizer, config.seq_len, config.objective).examples


def _settings(config: TrainConfig, examples: Iterable[TokenExample]) -> dict[str, Any]:
    """Returns what must be the same for a run to go on: the settings that count, and the data."""
    import hashlib

    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr((example.ids, example.trained)).encode())
    chosen = {name: value for name, value in config.to_dict().items() if name not in _FREE}
    return {**_plain(chosen), "data": digest.hexdigest()[:16]}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON gives tuples back as lists."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


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


def _checkpoint_gradients(model: nn.Module) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None)  # its name since transformers 5
    enable = enable or getattr(model, "gradient_checkpointing_enable", None)
    if not callable(enable):
        raise ConfigError(f"gradient_checkpointing: {type(model).__name__} does not offer it; leave it out")
    enable({"use_reentrant": False})  # the reentrant kind trains nothing below a frozen embedding


def _out_of_memory(config: TrainConfig, directory: Path) -> TrainingError:
    return TrainingError(
        f"memory ran out. {_kept(directory / 'checkpoints')} Lower --batch_size (now {config.batch_size}) and raise "
        f"--grad_accum to make up for it, lower --seq_len (now {config.seq_len}), or add --gradient_checkpointing."
    )


def _kept(checkpoints: Path) -> str:
    try:
        found = last_checkpoint(checkpoints)
    except (OSError, ValueError):
        found = None
    if found is None:
        return "There is no checkpoint yet."
    return f"The checkpoint of update {found[0].progress.step} is intact ({found[1]})."
