"""How far a run has come: the counters and losses that a checkpoint stores and a resumed run continues from."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Progress"]


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: updates done.
        epoch: epochs done.
        update: updates done in the current epoch, which is the position in the data.
        examples, tokens, trained_tokens: seen so far.
        epoch_loss, epoch_weight: weighted sum of the losses in the current epoch, and sum of the weights.
        train_losses: average training loss of each finished epoch.
        valid_losses: ``[step, loss]`` of each validation; at step 0 it is the loss before training.
        best: lowest validation loss after any update.
        bad: validations since then.
        metrics_bytes: length of metrics.jsonl; on resuming, whatever a crash left after it is cut off.
        finished: whether the run reached its end.
    """

    step: int = 0
    epoch: int = 0
    update: int = 0
    examples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    epoch_loss: float = 0.0
    epoch_weight: float = 0.0
    train_losses: list[float] = field(default_factory=list)
    valid_losses: list[list[float]] = field(default_factory=list)
    best: float | None = None
    bad: int = 0
    metrics_bytes: int = 0
    finished: bool = False

    def add_update(self, loss: float, weight: float) -> None:
        """Counts one update, whose loss enters the epoch's average with a weight."""
        self.step, self.update = self.step + 1, self.update + 1
        self.epoch_loss, self.epoch_weight = self.epoch_loss + loss * weight, self.epoch_weight + weight

    def end_epoch(self, complete: bool) -> float:
        """Closes an epoch, which may have stopped early, and returns its average training loss."""
        average = self.epoch_loss / max(self.epoch_weight, 1e-9)
        self.train_losses.append(average)
        self.epoch_loss = self.epoch_weight = 0.0
        if complete:
            self.epoch, self.update = self.epoch + 1, 0
        return average

    def add_validation(self, loss: float) -> bool:
        """Records a validation loss; returns whether it is the lowest one after any update."""
        self.valid_losses.append([self.step, loss])
        if self.step == 0:
            return False
        is_best = self.best is None or loss < self.best
        self.best, self.bad = (loss, 0) if is_best else (self.best, self.bad + 1)
        return is_best

    def is_stale(self, patience: int) -> bool:
        """Whether the last `patience` validations were no better than the best before (0: never)."""
        return 0 < patience <= self.bad

    def is_due(self, every: int, last_step: int) -> bool:
        """Whether something happens now that happens every so many updates (0: at the end of each epoch)."""
        return self.step == last_step or (self.step % every == 0 if every else self.update == 0)

    def owes_validation(self, every: int, last_step: int) -> bool:
        """Whether no validation was done yet, or a signal came before that of the last update."""
        if not self.valid_losses:
            return self.step == 0
        return self.valid_losses[-1][0] < self.step and self.is_due(every, last_step)

    def best_validation(self) -> tuple[int, float] | None:
        """(step, loss) of the earliest lowest validation loss after any update, or None.

        >>> Progress(valid_losses=[[0, 1.0], [4, 2.0], [8, 1.5], [12, 1.5]]).best_validation()
        (8, 1.5)
        """
        return min(((int(s), loss) for s, loss in self.valid_losses if s), key=lambda pair: pair[1], default=None)
