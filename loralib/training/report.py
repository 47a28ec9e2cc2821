"""What a run shows: console output, metrics.jsonl, the loss curve, and the model card."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from torch import Tensor, nn

from ..adapter import Adapter, adapter_of
from ..config import HUB_NAMES
from ..console import counted, duration, parameter_table, progress, say, size
from ..delta import dense
from ..errors import MissingDependencyError, OutputError
from ..files import write_text, write_whole
from ..injection import InjectReport, adapted_layers, injection_of
from .config import TrainConfig
from .record import versions

if TYPE_CHECKING:
    from .run_directory import Progress
    from .trainer import TrainResult

__all__ = [
    "Learned",
    "MetricsWriter",
    "NullMetricsWriter",
    "Reporter",
    "is_our_card",
    "plot_losses",
    "plot_runs",
    "read_metrics",
    "write_card",
]

_SILENCE = 30.0  # maximum seconds between lines if no progress bar is drawn


class Reporter:
    """Prints what happens during a run; nothing if not verbose."""

    from_base = True  # whether the first validation loss is that of the base model, not of an earlier adapter

    def __init__(self, verbose: bool = True) -> None:
        self.verbose = verbose
        self._bar: Any = None
        self._last_line = time.monotonic()
        self._epoch = ""

    def say(self, *parts: object) -> None:
        """Prints if possible: a closed pipe or a full disk does not end training."""
        if self.verbose:
            with suppress(OSError):
                say(*parts)

    def adapter(self, model: nn.Module, report: InjectReport | None, config: TrainConfig) -> None:
        """Prints what is trained: the injected adapter (None: it was already there), and parameter counts."""
        if report is None:
            has = "is built with its own LoRA layers" if injection_of(model) is None else "already has an adapter"
            self.say(f"The network {has}; --rank and --target_modules do not apply.")
        else:
            matched = ", ".join(
                f"{pattern} ({counted(number, 'module')})" for pattern, number in report.patterns.items()
            )
            self.say(f"LoRA on {matched}: r={config.rank}, lora_alpha={config.alpha:g}")
            for note in report.notes:
                self.say(f"  note: {note}")
        self.say()
        self.say(parameter_table(model.parameters()))
        self.say()

    def memory(self, needed: float, free: float | None) -> None:
        """Prints the memory that training needs, and how much is free (see `memory_estimate`)."""
        self.say(f"Memory: about {size(needed)} needed" + (f", {size(free)} free" if free else ""))
        if free and needed > free:
            self.say("  That may not fit: lower --batch_size or --seq_len, or add --gradient_checkpointing.")

    def start_bar(self, done: int, total: int) -> None:
        """Shows a progress bar until `close_bar`, if the output is a terminal."""
        if self.verbose:
            self._bar = progress(total=total, description="training", unit="step")
            self._bar.update(done)

    def update(
        self,
        step: int,
        total: int,
        loss: float,
        figures: Mapping[str, float],
        tokens_per_second: float,
        seconds_left: float,
    ) -> None:
        """Advances the bar, or occasionally prints a line, for logs."""
        bar = self._bar
        if bar is None:
            return
        told = f"loss {loss:.3f}{_listed(figures)}, {tokens_per_second:,.0f} tokens/s"
        bar.set_postfix_str(told, refresh=False)
        bar.update()
        if bar.disable and time.monotonic() - self._last_line > _SILENCE:
            self._last_line = time.monotonic()
            self.say(f"Update {step:,} of {total:,}: {told}, {duration(seconds_left)} left")

    def epoch(self, number: int, loss: float, validation_follows: bool) -> None:
        """Reports the end of an epoch, on the same line as the validation that follows."""
        self._epoch = f"Epoch {number}: average training loss {loss:.4f}"
        if not validation_follows:
            self.say(self._epoch)
            self._epoch = ""

    def validation(self, step: int, loss: float, first: float, figures: Mapping[str, float]) -> None:
        """Reports a validation loss, compared with the one before training, and other metrics."""
        more = _listed(figures)
        if step == 0:
            base = " (the base model)" if self.from_base else ""
            self.say(f"Before training: validation loss {loss:.4f}{base}{more}")
        else:
            prefix = f"{self._epoch}, " if self._epoch else f"Update {step}: "
            self.say(f"{prefix}validation loss {loss:.4f} ({self._share(loss, first)}){more}")
        self._epoch = ""

    def close_bar(self) -> None:
        """Removes the progress bar, if `start_bar` has shown one; later messages are printed below it."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def result(self, result: TrainResult) -> None:
        """Prints the outcome, and where the results are."""
        directory = result.output_dir
        self.say()
        self.say(
            f"Done: {counted(result.steps, 'update')} in {duration(result.seconds)} "
            f"({result.tokens_per_second:,.0f} tokens/s)."
        )
        self._say_improvement(result.valid_losses)
        self._say_file("Adapter", directory / "adapter_model.safetensors")
        if result.best is not None and result.best[0] != result.valid_losses[-1][0]:
            step, loss = result.best
            self.say(
                f"The best adapter is the one from update {step} (validation loss {loss:.4f}): {directory / 'best'}"
            )
        if (directory / "pytorch_model.bin").exists():  # not written for every variant
            self._say_file("Checkpoint for Microsoft's loralib", directory / "pytorch_model.bin")
        if (directory / "loss.png").exists():
            self.say(f"Loss curve: {directory / 'loss.png'}")

    def _say_improvement(self, valid_losses: Sequence[tuple[int, float]]) -> None:
        if len(valid_losses) < 2:
            return
        first, last = valid_losses[0][1], valid_losses[-1][1]
        self.say(f"Validation loss {first:.4f} -> {last:.4f} ({self._share(last, first)})")
        if last > 0.98 * first:
            self.say(
                "WARNING: it hardly improved. A frozen base can only contribute what it knows, and a random one "
                "(scratch, run-demo) knows nothing. Use a pretrained --model, raise --lr, or train longer."
            )

    def _share(self, loss: float, first: float) -> str:
        return f"{loss / first:.0%} of " + ("the base's" if self.from_base else "the loss before training")

    def _say_file(self, name: str, path: Path) -> None:
        self.say(f"{name}: {path} ({size(path.stat().st_size)})")


def _listed(figures: Mapping[str, float]) -> str:
    return "".join(f", {name} {value:.3f}" for name, value in figures.items())


class MetricsWriter:
    """Appends events to metrics.jsonl, one JSON object per line, and optionally to TensorBoard.

    Args:
        directory: the directory for the file.
        progress: that of the resumed run, or a new one.  Anything that a crash left in the file beyond `metrics_bytes`
            is cut off, and TensorBoard events of later updates are discarded.
        updates_per_epoch: number of updates in an epoch.
        tensorboard: whether to also write event files to ``directory/tensorboard``.

    Attributes:
        path: the file.
        note: which lines of the resumed run are missing from the file, for the user; else "".
    """

    def __init__(self, directory: Path, progress: Progress, updates_per_epoch: int, tensorboard: bool = False) -> None:
        self.path = directory / "metrics.jsonl"
        self.note = ""
        self._updates_per_epoch = updates_per_epoch
        keep = progress.metrics_bytes
        try:
            # Unbuffered, so that closing the file does not retry a line that could not be written.
            self._file: IO[bytes] = self.path.open("r+b" if self.path.exists() else "w+b", buffering=0)
            there = self._file.seek(0, os.SEEK_END)
            if there < keep:  # the file was truncated: its last line may be incomplete
                self.note = f"{self.path} is missing lines of the resumed run: it has {there:,} of {keep:,} bytes"
                self._file.seek(0)
                keep = self._file.read().rfind(b"\n") + 1
            self._file.truncate(keep)
            self._file.seek(keep)
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror}") from error
        first_step = progress.step + bool(progress.valid_losses or progress.step)
        self._board: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise MissingDependencyError(
                    "--report_to tensorboard needs a package: pip install tensorboard"
                ) from error
            self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step)

    def add(
        self, event: str, progress: Progress, loss: float, lr: float, seconds: float, more: Mapping[str, float]
    ) -> None:
        """Appends a "train" or "valid" event: loss, learning rate, duration, progress of the run, and metrics."""
        values = {
            "event": event,
            "step": progress.step,
            "epoch": round(progress.epoch + progress.update / self._updates_per_epoch, 4),
            "loss": loss,
            "lr": lr,
            "examples": progress.examples,
            "tokens": progress.tokens,
            "trained_tokens": progress.trained_tokens,
            "step_s": round(seconds, 4),
            **more,
        }
        line = json.dumps(values, allow_nan=False).encode() + b"\n"
        with self._explain_errors():
            written = self._file.write(line)
            if written < len(line):  # the disk had room for only a part; writing the rest raises the reason
                self._file.write(line[written:])
            if self._board is not None:
                for name, value in {"loss": loss, **more}.items():
                    self._board.add_scalar(f"{event}/{name}", value, progress.step)
                if event == "train":
                    self._board.add_scalar("train/lr", lr, progress.step)

    def sync(self) -> int:
        """Makes sure that all lines survive a crash; returns the length of the file in bytes."""
        with self._explain_errors():
            os.fsync(self._file.fileno())
            if self._board is not None:
                self._board.flush()
        return self._file.tell()

    def close(self) -> None:
        """Closes metrics.jsonl and, with TensorBoard, writes its remaining events; nothing can be added afterwards."""
        self._file.close()
        if self._board is not None:
            with suppress(OSError):  # flushes the rest; `sync` has already reported failures
                self._board.close()

    @contextmanager
    def _explain_errors(self) -> Iterator[None]:
        """Explains write errors; TensorBoard's writer also reports a full disk, but only at a later call."""
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"cannot write {self.path}: {error.strerror}. Free some space, then run again with --resume."
            ) from error


class NullMetricsWriter:
    """Stands in for `MetricsWriter` in processes that do not write them."""

    note = ""

    def add(
        self, event: str, progress: Progress, loss: float, lr: float, seconds: float, more: Mapping[str, float]
    ) -> None:
        """Ignores an event; the arguments are those of `MetricsWriter.add`."""

    def sync(self) -> int:
        """Returns 0, the length of a file that is never written."""
        return 0

    def close(self) -> None:
        """Does nothing, since there is no file to close."""


def read_metrics(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Yields the events in a metrics.jsonl, without a last line that a crash cut short."""
    with Path(path).open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def plot_runs(runs: Sequence[tuple[str, Path]], picture: Path, unit: str = "token") -> bool:
    """Plots the losses of several runs as a PNG, those on validation data if there are any.

    Args:
        runs: for each run its name and its metrics.jsonl; runs without events are left out.
        picture: the PNG file to write.
        unit: what the losses average over.

    Returns:
        False if matplotlib is not installed; then no file is written.
    """
    figure = _figure(9, 5)
    if figure is None:
        return False
    axes = figure.subplots()
    events = {name: list(read_metrics(path)) for name, path in runs if path.exists()}
    kind = "valid" if any(each["event"] == "valid" for of in events.values() for each in of) else "train"
    for name, of in events.items():
        points = [(each["step"], each["loss"]) for each in of if each["event"] == kind]
        points = _smoothed(points) if points and kind == "train" else points
        if points:
            axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) <= _MAX_MARKERS else None)
    axes.set(xlabel="update", ylabel=f"{'validation' if kind == 'valid' else 'training'} loss (nats per {unit})")
    _open(axes)
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    _save(figure, picture)
    return True


_MAX_MARKERS = 60  # lines with more points are drawn without markers


def plot_losses(metrics: Path, picture: Path, title: str, unit: str = "token", shown: Sequence[str] = ()) -> bool:
    """Plots the losses in a metrics.jsonl as a PNG; returns False, without a file, if matplotlib is not installed.

    Args:
        metrics: the metrics.jsonl file.
        picture: the PNG file to write.
        title: title of the plot.
        unit: what the losses average over.
        shown: other metrics to plot, one panel each, below the losses.
    """
    figure = _figure(8, 4.5 + 2 * len(shown))
    if figure is None:
        return False
    from matplotlib.ticker import MaxNLocator

    events = list(read_metrics(metrics))
    heights = [4.5, *[2] * len(shown)]
    panels = figure.subplots(len(heights), sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    panels[0].set_title(title, parse_math=False)  # a path may contain dollar signs
    for axes, name in zip(panels, ("loss", *shown), strict=True):
        _draw(axes, events, name)
        axes.set(ylabel=f"loss (nats per {unit})" if name == "loss" else name)
        _open(axes)
    panels[0].legend(frameon=False)
    panels[-1].set(xlabel="update")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    _save(figure, picture)
    return True


def _figure(width: float, height: float) -> Any:
    """Returns an empty figure with a size in inches; None if matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _open(axes: Any) -> None:
    """Draws a grid instead of a frame."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, picture: Path) -> None:
    # No date or version in the file, so that the same run produces the same bytes.
    write_whole(picture, lambda temporary: figure.savefig(temporary, format="png", metadata={"Software": None}))


def _draw(axes: Any, events: Sequence[Mapping[str, Any]], name: str) -> None:
    """Plots one metric over the updates: for training, raw and smoothed, and for validation."""
    trained = [(e["step"], e[name]) for e in events if e["event"] == "train" and name in e]
    valid = [(e["step"], e[name]) for e in events if e["event"] == "valid" and name in e]
    if trained:
        dot = "." if len(trained) <= _MAX_MARKERS else None  # without a marker, a single update would be invisible
        axes.plot(*zip(*trained, strict=True), color="#9ecae1", linewidth=1, marker=dot, label="training, each update")
        axes.plot(*zip(*_smoothed(trained), strict=True), color="#2171b5", linewidth=2, label="training, smoothed")
    if valid:
        dot = "o" if len(valid) <= _MAX_MARKERS else None
        axes.plot(*zip(*valid, strict=True), color="#d94801", marker=dot, linewidth=2, label="validation")
        style: Any = {"textcoords": "offset points", "color": "#d94801"}
        # The steep curve of the first losses runs through this label.
        background = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
        axes.annotate(f"base {valid[0][1]:.2f}", valid[0], xytext=(8, 4), bbox=background, **style)
        if len(valid) > 1:
            axes.annotate(f"{valid[-1][1]:.2f}", valid[-1], xytext=(-4, 10), **style)


def _smoothed(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    weight = 2 / (1 + max(1, len(points) // 10))
    smooth, out = points[0][1], []
    for step, loss in points:
        smooth += weight * (loss - smooth)
        out.append((step, smooth))
    return out


_TAGS = b"tags: [lora, loralib]"  # identifies a card as ours


def is_our_card(card: Path) -> bool:
    """Tells whether a README.md was written by a run."""
    return _TAGS in card.read_bytes()


@dataclass(frozen=True)
class Learned:
    """What a run has learned, independent of the model.

    Attributes:
        base: the model's name.
        adapter: the adapter.
        norms: for each adapted layer, its name and the norms of its update and of its base weight.
    """

    base: str
    adapter: Adapter
    norms: list[tuple[str, float, float]]

    @classmethod
    def of(cls, model: nn.Module, name: str) -> Learned:
        """Inspects a model, whose own name takes precedence over `name`; if it is sharded, all ranks must take part."""
        norms = [
            (at if leaf == "weight" else f"{at}.{leaf}", _norm(layer.delta_weight_of(leaf)), _norm(dense(weight)))
            for at, layer in adapted_layers(model)
            for leaf in layer.weight_names
            for weight in [layer.base_weight_of(leaf)]
        ]
        return cls(getattr(model, "name_or_path", "") or name, adapter_of(model), norms)


def write_card(
    directory: Path,
    learned: Learned,
    config: TrainConfig,
    progress: Progress,
    data: Sequence[Mapping[str, Any]],
) -> None:
    """Writes the README.md of an adapter: what it is, how it was trained, how to use it, what it learned.

    A README.md that is not ours is kept: the directory may be a project.  If there is a loss.png, the card shows it.
    `data` is the description of the data in run.toml (see `data_record`).
    """
    card = directory / "README.md"
    if card.exists() and not is_our_card(card):
        return
    picture = "\n![Loss over the updates](loss.png)\n" if (directory / "loss.png").exists() else ""
    introduction = _introduction(learned, picture, _facts(config, progress, data))
    write_text(card, "\n".join((introduction, _usage(learned.base, config.quantize), _update_sizes(learned.norms))))


def _introduction(learned: Learned, picture: str, facts: Mapping[str, str]) -> str:
    name = learned.base
    adapter = learned.adapter.config  # settings that the model was injected with, which may differ from the run's
    targets = adapter.target_modules or ()
    rows = "\n".join(f"| {fact} | {value} |" for fact, value in facts.items())
    return f"""---
base_model: {json.dumps(HUB_NAMES.get(name, name), ensure_ascii=False)}
library_name: peft
{_TAGS.decode()}
---

# LoRA adapter for {name}

Rank {adapter.r}, lora_alpha {adapter.lora_alpha:g}, on `{targets if isinstance(targets, str) else ", ".join(targets)}`.
{picture}
| | |
|---|---|
{rows}
"""


def _usage(name: str, quantize: str) -> str:
    form = "" if quantize == "none" else f", quantize={json.dumps(quantize)}"
    original = ""
    if name in HUB_NAMES:
        original = (
            f" {name} is a copy of {HUB_NAMES[name]} with 4-bit precision: expect small differences on the original."
        )
    return f"""## Use it

```python
import loralib as lora

model, tokenizer = lora.load_base({json.dumps(name, ensure_ascii=False)}{form})
print(lora.load_adapter(model, "."))
```

PEFT can load the same directory: `PeftModel.from_pretrained(model, ".")`.{original}

All settings, the hashes of the data and the versions are in `run.toml`; `loralib train --config run.toml` repeats the
run.
"""


def _update_sizes(norms: Sequence[tuple[str, float, float]]) -> str:
    sizes = sorted(((delta / base if base else 0.0, delta, name) for name, delta, base in norms), reverse=True)
    rows = "\n".join(f"| `{name}` | {delta:.3f} | {share:.2%} |" for share, delta, name in sizes[:10])
    return f"""## What was learned

Size of the update (Frobenius norm), also as a share of the base weight's norm; the ten largest of {len(norms)} layers.

| layer | update | share |
|---|---:|---:|
{rows}
"""


def _norm(tensor: Tensor) -> float:
    return float(tensor.detach().float().norm())


def _facts(config: TrainConfig, progress: Progress, data: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    counts = {f"{each['kind']} examples": f"{each['examples']:,} of {each['of']:,}" for each in data if "of" in each}
    files = [f"`{each['path']}` (SHA-256 {each['sha256'][:12]})" for each in data if "sha256" in each]
    facts = (
        counts
        | ({"data files": ", ".join(files)} if files else {})
        | {
            "longest example": f"at most {config.seq_len:,} tokens",
            "updates": f"{progress.step:,} of {counted(config.batch_size * config.grad_accum, 'example')}",
            "learning rate": f"{config.peak_lr:g}, {config.loraplus_lr_ratio:g} times that for B (LoRA+); "
            f"{config.schedule}, after {counted(config.warmup_steps or 0, 'update')} of warm-up",
            "training loss, by epoch": ", ".join(f"{loss:.4f}" for loss in progress.train_losses),
            "seed": str(config.seed),
            "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        }
    )
    if config.from_adapter is not None:
        facts["continued from"] = f"`{config.from_adapter}`"
    if progress.valid_losses:
        first, last = progress.valid_losses[0][1], progress.valid_losses[-1][1]
        facts["validation loss"] = f"{first:.4f} before, {last:.4f} after ({last / first:.0%})"
    best = progress.best_validation()
    if best is not None and best[0] != progress.step:
        facts["best validation loss"] = f"{best[1]:.4f} after update {best[0]:,}: the adapter in `best`"
    return facts
