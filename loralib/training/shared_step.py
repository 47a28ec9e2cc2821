"""A training step shared by several runs: one pass through the base, in which each run's rows use its own adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from ..data.packing import Pack, extended, pack, pad, side_by_side
from ..data.tokens import TokenExample
from ..engine.loss import Predictions, head_loss
from ..modes import evaluating
from .objective import StepStats, differentiate, in_batches
from .step import Step

__all__ = ["RunBatch", "SharedStep"]

RunBatch = tuple[int, Sequence[TokenExample], float | None]  # a run's number, its batch, and the scale of its loss

_TOKENS_PER_PASS = 4096  # more would not be faster, but need more memory


class SharedStep(Step):
    """Computes losses and gradients of several runs at once; for a single run, it works like any other `Step`.

    Args:
        model: the base, without an adapter.
        twins: the adapted models, which share its weights, in the order of the runs' numbers.
        options: see `Step`.

    Attributes:
        random: the generator of each run, for dropout.
    """

    def __init__(self, model: nn.Module, twins: Sequence[nn.Module], **options: Any) -> None:
        super().__init__(model, twins=twins, **options)
        self.random = [torch.Generator() for _ in twins]

    def in_one_pass(self, parts: Sequence[RunBatch]) -> list[StepStats]:
        """Computes batches of different runs in one pass; gradients only reach each run's own factors.

        Args:
            parts: in ascending order of run numbers; all with a scale, as for `forward_backward`, or all without one.
        """
        if any(not any(any(each.trained) for each in batch) for _, batch, _ in parts):
            raise ValueError("a batch without a trained token")
        laid, counts = self._lay_out([batch for _, batch, _ in parts])
        rows = [0] * len(self.random)
        for (number, _, _), count in zip(parts, counts, strict=True):
            rows[number] = count
        gradient = parts[0][2] is not None
        with (
            self._forward.assigned_rows(rows, self.random),
            self._computing("training" if gradient else "inference", gradient=gradient),
        ):
            totals = self._losses(laid, counts, [scale for *_, scale in parts])
        return [
            StepStats(
                nn.functional.pad(total.reshape(1), (0, 1), value=float(self.count(batch))),
                total if scale is None else total * scale,
                self.count(batch),
                sum(map(len, batch)),
                count,
            )
            for total, count, (_, batch, scale) in zip(totals, counts, parts, strict=True)
        ]

    def _lay_out(self, batches: Sequence[Sequence[TokenExample]]) -> tuple[Pack, list[int]]:
        """Returns all batches as one, run by run, and the number of its B * T tokens that belong to each."""
        if not self.packing:
            laid = pad([example for batch in batches for example in batch])
            return laid, [len(batch) * laid.ids.shape[1] for batch in batches]
        packs = [pack(batch, share=self.share_prompts) for batch in batches]
        laid, counts = side_by_side(packs), [row.processed_tokens for row in packs]
        length = self._forward.row_length(laid.processed_tokens)
        counts[-1] += length - laid.processed_tokens
        return extended(laid, length), counts

    def _losses(self, laid: Pack, counts: Sequence[int], scales: Sequence[float | None]) -> list[Tensor]:
        """Returns the summed loss of each run, after one backward pass for all of them.

        One product with the head serves all runs, because a prediction's weight includes the run's scale.
        """
        places = torch.tensor(list(accumulate(counts, initial=0)))
        of_states = torch.searchsorted(laid.states, places)
        given = [1.0 if scale is None else scale for scale in scales]
        by = torch.tensor(given).repeat_interleave(torch.searchsorted(laid.rows, of_states).diff())
        device = self._forward.device
        predictions = Predictions.of(laid.rows, laid.targets, laid.weights * by, len(laid.states), device)
        states, head = self._states(laid, laid.states)
        options: dict[str, Any] = {"chunk": self._chunk, "label_smoothing": self._label_smoothing}
        found = head_loss(head, states, predictions, gradient_scale=None if scales[0] is None else 1.0, **options)
        assert found.state_losses is not None
        if scales[0] is not None:
            differentiate(found.objective)
        parts = found.state_losses.split(of_states.diff().tolist())
        return [part.sum() / scale for part, scale in zip(parts, given, strict=True)]

    def in_passes(self, parts: Sequence[RunBatch]) -> list[StepStats]:
        """Computes batches of different runs, in as many passes as memory requires."""
        done: list[StepStats] = []
        waiting: list[RunBatch] = []
        for part in parts:
            if waiting and sum(sum(map(len, batch)) for _, batch, _ in [*waiting, part]) > _TOKENS_PER_PASS:
                done += self.in_one_pass(waiting)
                waiting = []
            waiting.append(part)
        return done + (self.in_one_pass(waiting) if waiting else [])

    def evaluate_all(
        self, wanted: Sequence[tuple[int, Sequence[TokenExample], int]], stop: Callable[[], bool]
    ) -> list[dict[str, float]] | None:
        """Returns the metrics of each run's examples, like `evaluate`; None once `stop` returns True.

        Args:
            wanted: in ascending order of run numbers: the examples, and the maximum number of tokens per batch.
            stop: called between passes.
        """
        batches = [list(in_batches(examples, most)) for _, examples, most in wanted]
        sums = [torch.zeros(2, dtype=torch.float64) for _ in wanted]
        with evaluating(self._model.modules()):
            for turn in range(max(map(len, batches))):
                if stop():
                    return None
                here = [at for at, own in enumerate(batches) if turn < len(own)]
                parts: list[RunBatch] = [(wanted[at][0], batches[at][turn], None) for at in here]
                for at, stats in zip(here, self.in_passes(parts), strict=True):
                    sums[at] += stats.sums.double().cpu()
        return [self.figures(each.tolist()) for each in sums]
