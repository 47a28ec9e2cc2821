"""In which order examples are trained on: a pure function of seed and epoch, so that a resumed run goes on in it."""

from __future__ import annotations

import random
from collections.abc import Sequence

from .tokens import TokenExample

__all__ = ["epoch_order"]


def epoch_order(
    examples: Sequence[TokenExample],
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    max_siblings: int = 1,
    shuffle: bool = True,
) -> list[list[int]]:
    """Deals the examples of one epoch out to batches.

    Examples that share their prompt are drawn together, up to `max_siblings`, so that a step computes the prompt once;
    which of them, and in which company, changes every epoch.

    Args:
        examples: all of them.
        batch_size: examples a batch; the last one may be smaller.
        seed: of the run.
        epoch: number of the epoch, from 0.
        max_siblings: 1 shuffles uniformly.
        shuffle: False keeps the order of the examples.

    Returns:
        The batches, as indices; every example is in one of them.

    >>> alike = [TokenExample((7, prompt, end), (False, False, True)) for prompt in (1, 2, 3) for end in (8, 9)]
    >>> (batch,) = epoch_order(alike, 6, seed=0, epoch=0, max_siblings=2)
    >>> sorted(sorted(batch[at : at + 2]) for at in (0, 2, 4))
    [[0, 1], [2, 3], [4, 5]]
    """
    order = list(range(len(examples)))
    if shuffle:
        rng = random.Random(f"{seed} {epoch}")
        rng.shuffle(order)
        # More than half a batch from one prompt would make the steps too unlike one another.
        siblings = max(1, min(max_siblings, batch_size // 2))
        if siblings > 1:
            groups: dict[tuple[int, ...], list[int]] = {}
            for index in order:
                groups.setdefault(_prompt(examples[index]), []).append(index)
            hands = [group[at : at + siblings] for group in groups.values() for at in range(0, len(group), siblings)]
            rng.shuffle(hands)
            order = [index for hand in hands for index in hand]
    return [order[at : at + batch_size] for at in range(0, len(order), batch_size)]


def _prompt(example: TokenExample) -> tuple[int, ...]:
    return example.ids[: example.trained.index(True)] if True in example.trained else example.ids
