"""What a training loop needs of what it trains: the one place where an objective says what its loss is an average of.

`Step` (language modelling) and its relatives are `TrainingStep`s.  The loop splits an update into batches, over passes
and ranks; a step turns each into sums that may be added up, and the added sums into figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..engine.placement import evaluating
from ..wrapping import is_spread
from .ranks import ALONE, Ranks
from .shares import deal

__all__ = ["StepStats", "TrainingStep", "evaluate", "evaluate_loss", "in_batches"]

Example = Any  # `TokenExample`, or another with the same properties


@dataclass(frozen=True)
class StepStats:
    """What one step did.

    Attributes:
        sums: (n,) sums over the batch, on the model's device, of which `TrainingStep.figures` makes figures; the first
            is that of the losses, in nats.
        objective: () the loss that was differentiated: the summed losses times their scale; without a scale, the sum.
        trained_tokens: trained tokens of the batch.
        tokens: tokens of the batch, without padding.
        processed_tokens: tokens that the model computed (fewer where beginnings are shared, more with padding).
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


class TrainingStep(Protocol):
    """Computes losses and gradients of batches for one model.

    Attributes:
        unit: what the loss is an average over, for people: "token", "pair", ...
        shown: which of the figures besides the loss are printed and drawn; without any, updates have none.
        width: n, how many numbers `StepStats.sums` has.
        packing: whether batches are packed.
        share_prompts: whether common beginnings are computed once.
        note: why batches are padded although packing was asked for, for the user; else "".
    """

    unit: str
    shown: tuple[str, ...]
    width: int
    packing: bool
    share_prompts: bool
    note: str

    def __enter__(self) -> Any:
        """Keeps what it needs in the model's place for a whole run."""

    def __exit__(self, *error: object) -> None: ...

    def count(self, examples: Sequence[Any]) -> int:
        """Returns over how many terms the loss of examples is averaged: the weight of that average in another."""
        ...

    def scales(self, batches: Sequence[Sequence[Any]], *, paper_accum: int | None = None) -> Sequence[Any]:
        """Returns the `loss_scale` of each batch of an update (hashable), so that the split does not matter."""
        ...

    def forward_backward(self, batch: Sequence[Any], *, loss_scale: Any) -> StepStats:
        """Adds the gradient of the scaled loss of a batch to the `grad` of the trained parameters."""
        ...

    def loss(self, batch: Sequence[Any]) -> StepStats:
        """Returns the loss of a batch without computing gradients."""
        ...

    def figures(self, sums: Sequence[float]) -> dict[str, float]:
        """Returns the loss, under that name, and whatever else is told of it, from added `StepStats.sums`."""
        ...

    def passes(self, batch: Sequence[Any]) -> list[list[Any]]:
        """Splits a batch into those parts that go through the model one after the other; usually it is one."""
        ...

    def idle(self, *, backward: bool) -> None:
        """Runs a pass whose loss counts for nothing: where weights are spread over ranks, all must run as many."""

    def unsmoothed(self) -> TrainingStep:
        """Returns the same step without label smoothing: of losses to compare."""
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
    """Returns the figures of examples: the average loss in nats, and what else the step tells (see `figures`).

    Args:
        step: made for the model.
        model: switched to eval mode meanwhile.
        examples: what to measure on.
        max_tokens: tokens of the examples that are computed at once, at least one example's.
        stop: asked between batches; once it returns True, on any rank, the result is None.
        ranks: those that measure together, each a part of the examples.
    """
    batches = [part for batch in in_batches(examples, max_tokens) for part in step.passes(batch)]
    dealt = deal([sum(map(len, batch)) for batch in batches], ranks.size)
    mine, stats = dealt[ranks.rank], list[StepStats]()
    with evaluating(model.modules()):
        for number in range(max(map(len, dealt))):
            if stop is not None and ranks.most(stop()):
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
    """Returns the average loss of examples, in nats (see `evaluate`); of tokens, ``exp`` of it is the perplexity."""
    figures = evaluate(step, model, examples, max_tokens=max_tokens, ranks=ranks)
    assert figures is not None
    return figures["loss"]


def in_batches(examples: Sequence[Example], max_tokens: int, limit: int = 16) -> Iterator[list[Example]]:
    """Yields examples in batches of so many tokens at most, or of one example; those that begin alike are together."""
    batch: list[Example] = []
    for example in sorted(examples, key=lambda example: example.ids):  # neighbours share their prompts
        if batch and (len(batch) == limit or sum(map(len, batch)) + len(example) > max_tokens):
            yield batch
            batch = []
        batch.append(example)
    yield batch
