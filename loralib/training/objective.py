"""The interface between the training loop and what it trains; each objective defines here what its loss averages over.

`Step` (language modelling) and its relatives are `TrainingStep`s.  The loop splits an update into batches, over passes
and ranks; a step turns each batch into sums that can be added up, and the totals into metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..modes import evaluating
from ..wrapping import is_spread
from .ranks import ALONE, Ranks
from .shares import deal

__all__ = ["StepStats", "TrainingStep", "differentiate", "evaluate", "evaluate_loss", "in_batches"]

Example = Any  # a `TokenExample`, or another type with the same attributes


@dataclass(frozen=True)
class StepStats:
    """The result of one step.

    Attributes:
        sums: (n,) sums over the batch, on the model's device, from which `TrainingStep.figures` computes metrics; the
            first is the sum of the losses, in nats.
        objective: () the loss that was differentiated: the summed losses times their scale; without a scale, the sum.
        trained_tokens: number of trained tokens in the batch (examples, for a classifier).
        tokens: number of tokens in the batch, without padding.
        processed_tokens: number of tokens that the model computed (fewer with shared prefixes, more with padding).
    """

    sums: Tensor
    objective: Tensor
    trained_tokens: int
    tokens: int
    processed_tokens: int

    @property
    def loss_sum(self) -> Tensor:
        """() the sum of the losses."""
        return self.sums[0]


def differentiate(objective: Tensor) -> None:
    """Adds an objective's gradients to those of the trained parameters: none, if no adapted layer took part.

    `loralib.training.trainer.check_gradients` then names the layers.
    """
    if objective.requires_grad:
        objective.backward()


class TrainingStep(Protocol):
    """Computes losses and gradients of batches for one model.

    Attributes:
        unit: what the loss averages over, for display: "token", "pair", ...
        shown: metrics besides the loss to print and plot; if empty, updates report none.
        width: n, the length of `StepStats.sums`.
        packing: whether batches are packed.
        share_prompts: whether common prefixes are computed once.
        note: why batches are padded although packing was requested, for the user; else "".
    """

    unit: str
    shown: tuple[str, ...]
    width: int
    packing: bool
    share_prompts: bool
    note: str

    def __enter__(self) -> Any:
        """Prepares the model for a whole run."""

    def __exit__(self, *error: object) -> None: ...

    def count(self, examples: Sequence[Any]) -> int:
        """Returns the number of terms that the loss of these examples averages over: its weight in larger averages."""
        ...

    def scales(self, batches: Sequence[Sequence[Any]], *, paper_accum: int | None = None) -> Sequence[Any]:
        """Returns the `loss_scale` (hashable) of each batch of an update, such that the split does not matter."""
        ...

    def forward_backward(self, batch: Sequence[Any], *, loss_scale: Any) -> StepStats:
        """Adds the gradient of a batch's scaled loss to the `grad` of the trained parameters."""
        ...

    def loss(self, batch: Sequence[Any]) -> StepStats:
        """Returns the loss of a batch without computing gradients."""
        ...

    def figures(self, sums: Sequence[float]) -> dict[str, float]:
        """Returns the loss, under that name, and other metrics from the totals of `StepStats.sums`."""
        ...

    def passes(self, batch: Sequence[Any]) -> list[list[Any]]:
        """Splits a batch into the parts that go through the model one after another; usually just one."""
        ...

    def idle(self, *, backward: bool) -> None:
        """Runs a dummy pass with no effect on the loss: with sharded weights, all ranks must run equally many."""

    def unsmoothed(self) -> TrainingStep:
        """Returns the same step without label smoothing, for comparable losses."""
        ...


def evaluate(
    step: TrainingStep,
    model: nn.Module,
    examples: Sequence[Example],
    *,
    max_tokens: int = 8192,
    stop: Callable[[], bool] | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, float] | None:
    """Returns metrics on examples: the average loss in nats, and others that the step defines (see `figures`).

    Args:
        step: made for the model.
        model: put in eval mode for the duration.
        examples: what to measure on.
        max_tokens: maximum number of tokens to compute at once, though at least one example is.
        stop: called between batches; once it returns True on any rank, the result is None.
        ranks: the ranks that share the work.
    """
    batches = [part for batch in in_batches(examples, max_tokens) for part in step.passes(batch)]
    dealt = deal([sum(map(len, batch)) for batch in batches], ranks.size)
    mine, stats = dealt[ranks.rank], list[StepStats]()
    with evaluating(model.modules()):
        for number in range(max(map(len, dealt))):
            if stop is not None and ranks.max(stop()):
                return None
            if number < len(mine):
                stats.append(step.loss(batches[mine[number]]))
            elif is_spread(model):
                step.idle(backward=False)
    rows: list[list[float]] = torch.stack([each.sums for each in stats]).tolist() if stats else []
    own = [sum(column) for column in zip(*rows, strict=True)] or [0.0] * step.width
    return step.figures(ranks.sum(torch.tensor(own, dtype=torch.float64)).tolist())


def evaluate_loss(
    step: TrainingStep,
    model: nn.Module,
    examples: Sequence[Example],
    *,
    max_tokens: int = 8192,
    ranks: Ranks = ALONE,
) -> float:
    """Returns the average loss in nats (see `evaluate`); if it is per token, its ``exp`` is the perplexity."""
    figures = evaluate(step, model, examples, max_tokens=max_tokens, ranks=ranks)
    assert figures is not None
    return figures["loss"]


def in_batches(examples: Sequence[Example], max_tokens: int, limit: int = 16) -> Iterator[list[Example]]:
    """Yields batches of at most `max_tokens` tokens (or one example), with common prefixes next to each other."""
    batch: list[Example] = []
    for example in sorted(examples, key=lambda example: example.ids):  # neighbours share their prompts
        if batch and (len(batch) == limit or sum(map(len, batch)) + len(example) > max_tokens):
            yield batch
            batch = []
        batch.append(example)
    yield batch
