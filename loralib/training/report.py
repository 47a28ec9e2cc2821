"""What a run shows and leaves to look at: metrics.jsonl, the loss curve, the model card, a memory estimate."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from ..adapter import adapter_of
from ..console import count, percent, say, size, table
from ..engine.adapted_linears import TrainingLinears
from ..errors import MissingDependencyError, OutputError
from ..files import free_memory, write_text, write_whole
from ..injection import adapted_layers
from ..layers import LoRAEmbedding, LoRALayer
from .config import TrainConfig

__all__ = [
    "Metrics",
    "learned_norms",
    "memory_estimate",
    "parameter_table",
    "plot_losses",
    "read_metrics",
    "tell",
    "write_card",
]


def tell(*parts: object) -> None:
    """Prints, where that is possible: a pipe that nobody reads any more, or a full disk, ends no training."""
    with suppress(OSError):
        say(*parts)


class Metrics:
    """Appends events to metrics.jsonl, one JSON object a line, and optionally to TensorBoard.

    Args:
        directory: holds the file.
        keep: how many bytes of an earlier run's file to go on from; what a crash left behind them is cut off.
        tensorboard: also write event files under ``directory/tensorboard``.
        first_step: the first update that will be logged; what TensorBoard has of it and later ones no longer counts.

    Attributes:
        note: what is missing of the file that should go on, for the user; else "".
    """

    def __init__(self, directory: Path, keep: int, tensorboard: bool = False, first_step: int = 0) -> None:
        self.path = directory / "metrics.jsonl"
        self.note = ""
        try:
            # Unbuffered: a line that could not be written is not tried again when the file is closed.
            self._file: IO[bytes] = self.path.open("r+b" if self.path.exists() else "w+b", buffering=0)
            there = self._file.seek(0, os.SEEK_END)
            if there < keep:  # someone cut it: its last line may be half a line
                self.note = (
                    f"{self.path} lacks lines of the run that goes on: {keep:,} bytes were written, {there:,} are"
                )
                self._file.seek(0)
                keep = self._file.read().rfind(b"\n") + 1
            self._file.truncate(keep)
            self._file.seek(keep)
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror}") from error
        self._board = _tensorboard(directory, first_step) if tensorboard else None

    def add(self, event: str, step: int, **values: Any) -> None:
        """Appends one event."""
        line = json.dumps({"event": event, "step": step, **values}, allow_nan=False).encode() + b"\n"
        with self._explained():
            written = self._file.write(line)
            if written < len(line):  # the disk had room for a part; the rest says why
                self._file.write(line[written:])
            if self._board is not None:
                self._board.add_scalar(f"{event}/loss", values["loss"], step)
                if event == "train":
                    self._board.add_scalar("train/lr", values["lr"], step)

    def sync(self) -> int:
        """Makes all lines last through a crash; returns the length of the file in bytes."""
        with self._explained():
            os.fsync(self._file.fileno())
            if self._board is not None:
                self._board.flush()
        return self._file.tell()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
        if self._board is not None:
            with suppress(OSError):  # it writes what is left; `sync` has said what fails
                self._board.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """TensorBoard's writer, too, says only later that a disk is full, as the error that it was."""
        try:
            yield
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror}. Free some space, then --resume.") from error


def _tensorboard(directory: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingDependencyError("--report_to tensorboard needs a package: pip install tensorboard") from error
    return SummaryWriter(str(directory / "tensorboard"), purge_step=first_step)


def read_metrics(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Yields the events of a metrics.jsonl; a last line that a crash cut short is left out."""
    with Path(path).open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


_FEW = 60  # points that are drawn as such


def plot_losses(metrics: Path, picture: Path, title: str) -> bool:
    """Draws the training and validation loss of a metrics.jsonl.

    Args:
        metrics: the events.
        picture: the PNG to write.
        title: what stands above the plot.

    Returns:
        False where matplotlib is not installed: no picture then.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        return False
    events = list(read_metrics(metrics))
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    trained = [(e["step"], e["loss"]) for e in events if e["event"] == "train"]
    valid = [(e["step"], e["loss"]) for e in events if e["event"] == "valid"]
    if trained:
        dot = "." if len(trained) <= _FEW else None  # of a single update there is no line
        axes.plot(*zip(*trained, strict=True), color="#9ecae1", linewidth=1, marker=dot, label="training, each update")
        axes.plot(*zip(*_smoothed(trained), strict=True), color="#2171b5", linewidth=2, label="training, smoothed")
    if valid:
        dot = "o" if len(valid) <= _FEW else None
        axes.plot(*zip(*valid, strict=True), color="#d94801", marker=dot, linewidth=2, label="validation")
        said: Any = {"textcoords": "offset points", "color": "#d94801"}
        # The first losses fall through where it stands.
        behind = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
        axes.annotate(f"base {valid[0][1]:.2f}", valid[0], xytext=(8, 4), bbox=behind, **said)
        if len(valid) > 1:
            axes.annotate(f"{valid[-1][1]:.2f}", valid[-1], xytext=(-4, 10), **said)
    axes.set_title(title, parse_math=False)  # a path may have dollar signs
    axes.set(xlabel="update", ylabel="loss (nats a token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    # Neither date nor version in the file: the same run draws the same picture.
    write_whole(picture, lambda temporary: figure.savefig(temporary, format="png", metadata={"Software": None}))
    return True


def _smoothed(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    weight = 2 / (1 + max(1, len(points) // 10))
    smooth, out = points[0][1], []
    for step, loss in points:
        smooth += weight * (loss - smooth)
        out.append((step, smooth))
    return out


def parameter_table(model: nn.Module) -> str:
    """Returns total, trainable and frozen parameters with percentages, as a table."""
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rows = [
        ("Total", count(total), "100.00%"),
        ("Trainable", count(trainable), percent(trainable, total)),
        ("Frozen", count(total - trainable), percent(total - trainable, total)),
    ]
    return table(rows, ("parameters", "number", "share"))


def memory_estimate(model: nn.Module, tokens: int, checkpointing: bool) -> tuple[float, float | None]:
    """Estimates the memory that training needs.

    Args:
        model: adapted.
        tokens: tokens of one step.
        checkpointing: whether activations are recomputed.

    Returns:
        Bytes needed, and bytes that the machine has free (None where it does not say).  Weights are exact, with their
        copies in the processor's order.  What a token keeps for the backward pass was measured on SmolLM2 and GPT-2:
        the inputs of the linears, 3.5 times where they are adapted (with what norms, activations and attention keep
        around them), twice where they are not.
    """
    weights = (
        sum(p.numel() * p.element_size() for p in model.parameters())
        + TrainingLinears(list(model.modules())).prepacked_bytes
    )
    # Gradient, two moments, and the values of before, all in fp32.
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) * 16
    vocabulary = max((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=0)
    adapted = {layer for _, layer in adapted_layers(model)}
    kept = 0.0
    for module in model.modules():
        if isinstance(module, LoRALayer) and module in adapted and not isinstance(module, LoRAEmbedding):
            kept += 3.5 * module.lora_A.shape[-1] * module.base_weight.element_size()
        elif (
            isinstance(weight := getattr(module, "weight", None), Tensor)
            and weight.dim() == 2
            and module not in adapted
        ):
            width = weight.shape[0 if type(module).__name__ == "Conv1D" else 1]
            if not isinstance(module, nn.Embedding) and weight.shape[0] != vocabulary:  # nor the head, done in chunks
                kept += 2 * width * weight.element_size()
    chunk = 256 * vocabulary * 8
    device = next(model.parameters()).device
    free = float(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else free_memory()
    return weights + trained + tokens * kept * (0.25 if checkpointing else 1.0) + chunk, free


def learned_norms(model: nn.Module) -> dict[str, tuple[float, float]]:
    """Returns, per adapted layer, the Frobenius norm of its update, absolute and as a share of the base weight's."""
    norms = {}
    for name, layer in adapted_layers(model):
        delta = float(layer.delta_weight().detach().norm())
        base = float(layer.base_weight.detach().float().norm())
        norms[name] = (delta, delta / base if base else 0.0)
    return norms


_TAGS = b"tags: [lora, loralib]"  # by which a card of ours is known


def write_card(directory: Path, model: nn.Module, config: TrainConfig, facts: Mapping[str, str]) -> None:
    """Writes the README.md of an adapter: what it is, how it was trained, how to use it, what it learned.

    Another's README.md stays: the directory may be somebody's project.
    """
    card = directory / "README.md"
    if card.exists() and _TAGS not in card.read_bytes():
        return
    base = getattr(model, "name_or_path", "") or config.model
    adapter = adapter_of(model).config  # what the model was injected with, which need not be what `config` says
    targets = (
        adapter.target_modules if isinstance(adapter.target_modules, str) else ", ".join(adapter.target_modules or ())
    )
    norms = sorted(learned_norms(model).items(), key=lambda item: -item[1][1])
    shown = "\n".join(f"| `{name}` | {delta:.3f} | {share:.2%} |" for name, (delta, share) in norms[:10])
    told = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    picture = "\n![Loss over the updates](loss.png)\n" if (directory / "loss.png").exists() else ""
    write_text(
        card,
        f"""---
base_model: {json.dumps(base, ensure_ascii=False)}
library_name: peft
{_TAGS.decode()}
---

# LoRA adapter for {base}

Rank {adapter.r}, lora_alpha {adapter.lora_alpha:g}, on `{targets}`.
{picture}
| | |
|---|---|
{told}

## Use it

```python
import loralib as lora

model, tokenizer = lora.load_base({json.dumps(base, ensure_ascii=False)})
print(lora.load_adapter(model, "."))
```

PEFT loads the same directory: `PeftModel.from_pretrained(model, ".")`.

## What was learned

Size of the update (Frobenius norm), and as a share of the base weight's; the ten largest of {len(norms)} layers.

| layer | update | share |
|---|---:|---:|
{shown}
""",
    )


def megabytes(path: Path) -> str:
    """Returns the measured size of a file, for people."""
    return size(path.stat().st_size)
