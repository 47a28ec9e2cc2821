"""What a run prints: what is trained, its progress, and its outcome."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..console import duration, parameter_table, progress, say, size
from ..injection import InjectReport, injection_of
from .config import TrainConfig

if TYPE_CHECKING:
    from .trainer import TrainResult

__all__ = ["Reporter"]

_SILENCE = 30.0  # seconds without a line where no progress bar is drawn


class Reporter:
    """Prints what happens in a run; nothing if not verbose."""

    from_base = True  # whether the first validation loss is the base model's, rather than an earlier adapter's

    def __init__(self, verbose: bool = True) -> None:
        self._verbose = verbose
        self._bar: Any = None
        self._last_line = time.monotonic()
        self._epoch = ""

    def say(self, *parts: object) -> None:
        """Prints where possible: a pipe that nobody reads any more, or a full disk, ends no training."""
        if not self._verbose:
            return
        if self._bar is not None:
            self._bar.clear()
        with suppress(OSError):
            say(*parts)
        if self._bar is not None:
            self._bar.refresh()

    def adapter(self, model: nn.Module, report: InjectReport | None, config: TrainConfig) -> None:
        """What is trained: the adapter that was injected (None: it was there already), and parameter counts."""
        if report is None:
            has = "is built from LoRA layers of its own" if injection_of(model) is None else "has an adapter already"
            self.say(f"The network {has}; --rank and --target_modules do not apply.")
        else:
            matched = ", ".join(f"{pattern} ({number} modules)" for pattern, number in report.patterns.items())
            self.say(f"LoRA on {matched}: r={config.rank}, lora_alpha={config.alpha:g}")
            for note in report.notes:
                self.say(f"  note: {note}")
        self.say()
        self.say(parameter_table(model.parameters()))
        self.say()

    def memory(self, needed: float, free: float | None) -> None:
        """The memory that training needs, and what is free (see `memory_estimate`)."""
        self.say(f"Memory: about {size(needed)} needed" + (f", {size(free)} free" if free else ""))
        if free and needed > free:
            self.say("  That may not fit: lower --batch_size or --seq_len, or add --gradient_checkpointing.")

    def start_bar(self, done: int, total: int) -> None:
        """Draws a progress bar until `close_bar`, if someone watches."""
        if self._verbose:
            self._bar = progress(total=total, description="training", unit="step")
            self._bar.update(done)

    def update(self, step: int, total: int, loss: float, tokens_per_second: float, seconds_left: float) -> None:
        """Moves the bar, or prints a line for logs now and then."""
        bar = self._bar
        if bar is None:
            return
        bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s", refresh=False)
        bar.update()
        if bar.disable and time.monotonic() - self._last_line > _SILENCE:
            self._last_line = time.monotonic()
            self.say(
                f"Update {step:,} of {total:,}: loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s, "
                f"{duration(seconds_left)} left"
            )

    def epoch(self, number: int, loss: float, validation_follows: bool) -> None:
        """The end of an epoch, in one line with the validation that follows."""
        self._epoch = f"Epoch {number}: average training loss {loss:.4f}"
        if not validation_follows:
            self.say(self._epoch)
            self._epoch = ""

    def validation(self, step: int, loss: float, first: float) -> None:
        """A validation loss, compared with the one before training."""
        if step == 0:
            self.say(f"Before training: validation loss {loss:.4f}{' (the base model)' if self.from_base else ''}")
        else:
            prefix = f"{self._epoch}, " if self._epoch else f"Update {step}: "
            self.say(f"{prefix}validation loss {loss:.4f} ({self._share(loss, first)})")
        self._epoch = ""

    def close_bar(self) -> None:
        """Removes the progress bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def result(self, result: TrainResult) -> None:
        """The outcome, and where everything is."""
        directory = result.output_dir
        self.say()
        self.say(
            f"Done: {result.steps:,} updates in {duration(result.seconds)} ({result.tokens_per_second:,.0f} tokens/s)."
        )
        self._say_improvement(result.valid_losses)
        self._say_file("Adapter", directory / "adapter_model.safetensors")
        if result.best is not None and result.best[0] != result.valid_losses[-1][0]:
            step, loss = result.best
            self.say(f"The best adapter is that of update {step} (validation loss {loss:.4f}): {directory / 'best'}")
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
                "WARNING: it hardly improved. A frozen base can only lend what it knows, and a random one (scratch, "
                "run-demo) knows nothing. Use a pretrained --model, raise --lr, or train longer."
            )

    def _share(self, loss: float, first: float) -> str:
        return f"{loss / first:.0%} of " + ("the base's" if self.from_base else "the loss before training")

    def _say_file(self, name: str, path: Path) -> None:
        self.say(f"{name}: {path} ({size(path.stat().st_size)})")
