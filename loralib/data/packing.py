"""From examples to the rows of a step: the order of examples in an epoch, and packing.

The order is a pure function of seed and epoch, so a resumed run repeats it.  In a packed step, all examples are in one
row, without padding, and shared prefixes appear once.

Examples with common prefixes form a prefix tree.  In depth-first order, the entire attention mask is described by one
number per token, the end of the token's subtree: token k is visible exactly to the tokens k, k + 1, ..., ends[k] - 1.
This covers unrelated examples (their intervals are disjoint), siblings under one prompt (neither lies in the other's
interval) and causality.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, takewhile
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from .tokens import TokenExample

__all__ = ["Pack", "epoch_order", "extended", "pack", "pad", "side_by_side"]


@dataclass(frozen=True)
class Pack:
    """The tokens of a step and the predictions in its loss: T tokens per row, R predicting states, N predictions.

    Attributes:
        ids: (B, T) token ids; a packed step has B = 1.
        positions: (B, T) position of each token in its own example, from 0.
        ends: (T,) in a packed step: token k is visible to tokens k .. ends[k] - 1 of the row.  None in a padded step.
        mask: (B, T) in a padded step: 1 for tokens, 0 for padding.  None in a packed step.
        states: (R,) indices into the B * T tokens whose hidden states predict something, ascending.
        rows: (N,) indices into `states`, ascending: the state that makes each prediction.
        targets: (N,) token ids to predict.
        weights: (N,) number of examples that share each prediction, float32.
        tokens: number of tokens in the given examples, without padding or sharing.
        trained_tokens: number of predictions in the given examples: the sum of `weights`.
        paths: for each example, in the given order, the indices of its computed tokens among the B * T.
    """

    ids: Tensor
    positions: Tensor
    ends: Tensor | None
    mask: Tensor | None
    states: Tensor
    rows: Tensor
    targets: Tensor
    weights: Tensor
    tokens: int
    trained_tokens: int
    paths: tuple[tuple[int, ...], ...]

    @property
    def processed_tokens(self) -> int:
        """Number of tokens that the model computes, B * T."""
        return self.ids.numel()


def pack(examples: Sequence[TokenExample], *, share: bool = True) -> Pack:
    """Packs examples into one row, which is empty if nothing is trained.

    An example's last trained token is only a target, and the tokens after it do not affect the loss, so neither are in
    the row.

    With `share`, prefixes that several examples have in common are written once.  This is exact, since a token's hidden
    state does not depend on later tokens.  A prediction shared by k examples has weight k.

    >>> flags = (False, False, True, True)
    >>> row = pack([TokenExample((5, 6, 7, 1), flags), TokenExample((5, 6, 8, 1), flags)])
    >>> row.ids.tolist(), row.positions.tolist(), row.ends.tolist()
    ([[5, 6, 7, 8]], [[0, 1, 2, 2]], [4, 4, 3, 4])
    >>> row.states.tolist(), row.rows.tolist(), row.targets.tolist()
    ([1, 2, 3], [0, 0, 1, 2], [7, 8, 1, 1])
    """
    ids: list[int] = []
    positions: list[int] = []
    ends: list[int] = []
    path: list[int] = []  # index in the row of each token of the current example
    previous: tuple[int, ...] = ()
    predictions: Counter[tuple[int, int]] = Counter()  # (index in the row, id to predict) -> examples that share it
    paths: list[tuple[int, ...]] = [()] * len(examples)
    inputs = [(example.ids[: _last_trained(example)], number) for number, example in enumerate(examples)]
    if share:  # when sorted, the longest prefix shared with any earlier example is shared with the previous one
        inputs.sort(key=lambda pair: pair[0])
    for tokens, number in inputs:
        example = examples[number]
        common = _common_length(previous, tokens) if share else 0
        # Leave the previous example's branch: the subtrees below the common prefix end here.
        for index in path[common:]:
            ends[index] = len(ids)
        del path[common:]
        # Add the new branch.
        for position in range(common, len(tokens)):
            path.append(len(ids))
            ids.append(tokens[position])
            positions.append(position)
            ends.append(-1)
        previous = tokens
        for position, trained in enumerate(example.trained):
            if trained:
                predictions[path[position - 1], example.ids[position]] += 1
        paths[number] = tuple(path)
    for index in path:
        ends[index] = len(ids)
    return _pack(
        examples,
        predictions,
        ids=torch.tensor([ids], dtype=torch.long),
        positions=torch.tensor([positions], dtype=torch.long),
        ends=torch.tensor(ends, dtype=torch.long),
        mask=None,
        paths=tuple(paths),
    )


def side_by_side(packs: Sequence[Pack]) -> Pack:
    """Concatenates packed rows into one, without tokens of one being visible to another.

    >>> one = pack([TokenExample((5, 6, 7), (False, True, True))])
    >>> row = side_by_side([one, one])
    >>> row.ids.tolist(), row.ends.tolist(), row.states.tolist(), row.rows.tolist()
    ([[5, 6, 5, 6]], [2, 2, 4, 4], [0, 1, 2, 3], [0, 1, 2, 3])
    """
    tokens = list(accumulate((row.processed_tokens for row in packs), initial=0))
    states = list(accumulate((len(row.states) for row in packs), initial=0))
    paths = [tuple(at + place for place in path) for row, at in zip(packs, tokens, strict=False) for path in row.paths]
    ends = [cast(Tensor, row.ends) + at for row, at in zip(packs, tokens, strict=False)]
    return Pack(
        ids=torch.cat([row.ids for row in packs], 1),
        positions=torch.cat([row.positions for row in packs], 1),
        ends=torch.cat(ends),
        mask=None,
        states=torch.cat([row.states + at for row, at in zip(packs, tokens, strict=False)]),
        rows=torch.cat([row.rows + at for row, at in zip(packs, states, strict=False)]),
        targets=torch.cat([row.targets for row in packs]),
        weights=torch.cat([row.weights for row in packs]),
        tokens=sum(row.tokens for row in packs),
        trained_tokens=sum(row.trained_tokens for row in packs),
        paths=tuple(paths),
    )


def extended(row: Pack, tokens: int) -> Pack:
    """Pads a packed row at its end to `tokens` tokens; each padding token is visible only to itself.

    >>> row = extended(pack([TokenExample((5, 6, 7), (False, True, True))]), 4)
    >>> row.ids.tolist(), row.ends.tolist(), row.states.tolist()
    ([[5, 6, 0, 0]], [2, 2, 3, 4], [0, 1])
    """
    assert row.ends is not None
    more = tokens - len(row.ends)
    if not more:
        return row
    ends = torch.cat([row.ends, torch.arange(len(row.ends), tokens) + 1])
    return replace(row, ids=F.pad(row.ids, (0, more)), positions=F.pad(row.positions, (0, more)), ends=ends)


def pad(examples: Sequence[TokenExample]) -> Pack:
    """Puts each example in its own row, padded on the right with id 0 to the length of the longest.

    >>> padded = pad([TokenExample((5, 6, 7), (False, True, True)), TokenExample((5, 6), (False, True))])
    >>> padded.ids.tolist(), padded.mask.tolist(), padded.states.tolist()
    ([[5, 6], [5, 0]], [[1, 1], [1, 0]], [0, 1, 2])
    """
    rows = [example.ids[: _last_trained(example)] for example in examples]
    rows = [row or example.ids[:1] for row, example in zip(rows, examples, strict=True)]  # every row needs a token
    width = max(map(len, rows), default=0)
    predictions: Counter[tuple[int, int]] = Counter()
    for number, example in enumerate(examples):
        for position, trained in enumerate(example.trained):
            if trained:
                predictions[number * width + position - 1, example.ids[position]] += 1
    return _pack(
        examples,
        predictions,
        ids=torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.long),
        positions=torch.arange(width).expand(len(rows), -1),
        ends=None,
        mask=torch.tensor([[*[1] * len(row), *[0] * (width - len(row))] for row in rows], dtype=torch.long),
        paths=tuple(tuple(range(n * width, n * width + len(row))) for n, row in enumerate(rows)),
    )


def _last_trained(example: TokenExample) -> int:
    """Returns the position of the last trained token; 0 if there is none."""
    return max((position for position, trained in enumerate(example.trained) if trained), default=0)


def _common_length(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b)))  # noqa: B905 - the shorter one ends it


def _pack(examples: Sequence[TokenExample], predictions: Counter[tuple[int, int]], **layout: Any) -> Pack:
    items = sorted(predictions.items())
    states, rows = torch.unique(torch.tensor([index for (index, _), _ in items], dtype=torch.long), return_inverse=True)
    return Pack(
        **layout,
        states=states,
        rows=rows,
        targets=torch.tensor([target for (_, target), _ in items], dtype=torch.long),
        weights=torch.tensor([count for _, count in items], dtype=torch.float32),
        tokens=sum(map(len, examples)),
        trained_tokens=predictions.total(),
    )


def epoch_order(
    examples: Sequence[TokenExample],
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    max_siblings: int = 1,
    shuffle: bool = True,
) -> list[list[int]]:
    """Assigns the examples of an epoch (the first is 0) to batches of indices, the last of which may be smaller.

    Every example is in exactly one batch.  Up to `max_siblings` examples with the same prompt go into the same batch,
    so that a step computes the prompt once; 1 shuffles uniformly.  The grouping changes in every epoch.  Without
    `shuffle`, examples keep their order.

    >>> alike = [TokenExample((7, prompt, end), (False, False, True)) for prompt in (1, 2, 3) for end in (8, 9)]
    >>> (batch,) = epoch_order(alike, 6, seed=0, epoch=0, max_siblings=2)
    >>> sorted(sorted(batch[start : start + 2]) for start in (0, 2, 4))
    [[0, 1], [2, 3], [4, 5]]
    """
    order = list(range(len(examples)))
    if shuffle:
        rng = random.Random(f"{seed} {epoch}")
        rng.shuffle(order)
        # More than half a batch from one prompt would make gradients too noisy.
        siblings = max(1, min(max_siblings, batch_size // 2))
        if siblings > 1:
            groups: dict[tuple[int, ...], list[int]] = {}
            for index in order:
                groups.setdefault(examples[index].prompt, []).append(index)
            runs = [run for group in groups.values() for run in _split(group, siblings)]
            rng.shuffle(runs)
            order = [index for run in runs for index in run]
    return _split(order, batch_size)


def _split(indices: list[int], size: int) -> list[list[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]
