"""The order in which examples are trained on: a pure function of seed and epoch, so that a resumed run follows it."""

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
    """Deals the examples of one epoch into batches.

    Up to `max_siblings` examples of the same prompt go into one batch, so that a step computes the prompt once.  Every
    epoch groups them anew.

    Args:
        examples: all examples.
        batch_size: examples per batch; the last batch may be smaller.
        seed: random seed of the run.
        epoch: number of the epoch, from 0.
        max_siblings: examples of one prompt that are kept together; 1 shuffles uniformly.
        shuffle: False keeps the order of the examples.

    Returns:
        The batches, as lists of indices into `examples`; every example is in exactly one.

    >>> alike = [TokenExample((7, prompt, end), (False, False, True)) for prompt in (1, 2, 3) for end in (8, 9)]
    >>> (batch,) = epoch_order(alike, 6, seed=0, epoch=0, max_siblings=2)
    >>> sorted(sorted(batch[start : start + 2]) for start in (0, 2, 4))
    [[0, 1], [2, 3], [4, 5]]
    """
    order = list(range(len(examples)))
    if shuffle:
        rng = random.Random(f"{seed} {epoch}")
        rng.shuffle(order)
        # More than half a batch from one prompt would make the steps' gradients too noisy.
        siblings = max(1, min(max_siblings, batch_size // 2))
        if siblings > 1:
            groups: dict[tuple[int, ...], list[int]] = {}
            for index in order:
                groups.setdefault(_prompt(examples[index]), []).append(index)
            runs = [run for group in groups.values() for run in _split(group, siblings)]
            rng.shuffle(runs)
            order = [index for run in runs for index in run]
    return _split(order, batch_size)


def _split(indices: list[int], size: int) -> list[list[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def _prompt(example: TokenExample) -> tuple[int, ...]:
    return example.ids[: example.trained.index(True)] if True in example.trained else example.ids
