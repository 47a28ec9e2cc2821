"""Packing: a step's examples laid out in one row, without padding and with shared beginnings written once.

Examples that begin alike form a prefix tree.  Laid out in depth-first order, the tree needs a single number a token,
the end of its subtree: token k may be seen by exactly the tokens k, k + 1, ..., ends[k] - 1.  That covers unrelated
examples (their intervals are disjoint), siblings under one prompt (neither lies in the other's interval) and causality.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .tokens import TokenExample

__all__ = ["Pack", "pack", "pad"]


@dataclass(frozen=True)
class Pack:
    """A step's tokens and what its loss asks of them.  T tokens a row, R states that predict, N predictions.

    Attributes:
        ids: (B, T) token ids; a packed step has B = 1.
        positions: (B, T) place of each token in its own example, from 0.
        ends: (T,) of a packed step: token k is seen by the tokens k .. ends[k] - 1 of the row.  None for a padded step.
        mask: (B, T) of a padded step: 1 where a token is, 0 where padding is.  None for a packed step.
        states: (R,) indices into the B * T tokens: those whose hidden state predicts something, ascending.
        rows: (N,) indices into `states`, ascending: which state makes the prediction.
        targets: (N,) the id to predict.
        weights: (N,) how many examples ask for this prediction, float32.
        tokens: tokens of the examples as they came, without padding and without sharing.
        trained_tokens: predictions of the examples as they came: the sum of `weights`.
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

    @property
    def processed_tokens(self) -> int:
        """How many tokens the model computes."""
        return self.ids.numel()

    def to(self, device: torch.device | str) -> Pack:
        """Returns the same pack with its tensors on a device."""
        moved: dict[str, Any] = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.__dict__.items()}
        return Pack(**moved)


def pack(examples: Sequence[TokenExample], *, share: bool = True) -> Pack:
    """Lays out examples in one row.

    Tokens after an example's last trained one change no loss and are left out; so is that last one itself, which is
    only ever predicted.

    Args:
        examples: token ids with the mask of trained ones.
        share: write beginnings that several examples have in common once.  Exact: what a token computes depends on the
            tokens before it alone.  A prediction that k examples share gets weight k.

    Returns:
        The row.  With nothing to train it is empty.

    >>> from loralib.data.tokens import TokenExample
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
    path: list[int] = []  # for each position of the example at hand, where in the row its token stands
    previous: tuple[int, ...] = ()
    predictions: Counter[tuple[int, int]] = Counter()  # (place in the row, id to predict) -> how many examples ask
    rows = [(example.ids[: _last_trained(example)], example) for example in examples]
    if share:  # in sorted order, what an example has in common with any before it, it has with its neighbour
        rows.sort(key=lambda row: row[0])
    for needed, example in rows:
        common = _common(previous, needed) if share else 0
        for place in path[common:]:
            ends[place] = len(ids)
        del path[common:]
        for position in range(common, len(needed)):
            path.append(len(ids))
            ids.append(needed[position])
            positions.append(position)
            ends.append(-1)
        previous = needed
        for position, trained in enumerate(example.trained):
            if trained:
                predictions[path[position - 1], example.ids[position]] += 1
    for place in path:
        ends[place] = len(ids)
    return _pack(
        ids=torch.tensor([ids], dtype=torch.long),
        positions=torch.tensor([positions], dtype=torch.long),
        ends=torch.tensor(ends, dtype=torch.long),
        mask=None,
        tokens=sum(len(example.ids) for example in examples),
        predictions=predictions,
    )


def pad(examples: Sequence[TokenExample]) -> Pack:
    """Lays out examples one below the other, filled up to the longest with id 0 at the right.

    Args:
        examples: token ids with the mask of trained ones.

    >>> from loralib.data.tokens import TokenExample
    >>> padded = pad([TokenExample((5, 6, 7), (False, True, True)), TokenExample((5, 6), (False, True))])
    >>> padded.ids.tolist(), padded.mask.tolist(), padded.states.tolist()
    ([[5, 6], [5, 0]], [[1, 1], [1, 0]], [0, 1, 2])
    """
    rows = [example.ids[: _last_trained(example)] for example in examples]
    rows = [row or example.ids[:1] for row, example in zip(rows, examples, strict=True)]  # no row without a token
    width = max(map(len, rows), default=0)
    predictions: Counter[tuple[int, int]] = Counter()
    for number, example in enumerate(examples):
        for position, trained in enumerate(example.trained):
            if trained:
                predictions[number * width + position - 1, example.ids[position]] += 1
    return _pack(
        ids=torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.long),
        positions=torch.arange(width).expand(len(rows), -1),
        ends=None,
        mask=torch.tensor([[*[1] * len(row), *[0] * (width - len(row))] for row in rows], dtype=torch.long),
        tokens=sum(len(example.ids) for example in examples),
        predictions=predictions,
    )


def _last_trained(example: TokenExample) -> int:
    """The place of the last trained token, or 0."""
    return max((place for place, trained in enumerate(example.trained) if trained), default=0)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b)))  # noqa: B905 - the shorter one ends it


def _pack(
    *,
    ids: Tensor,
    positions: Tensor,
    ends: Tensor | None,
    mask: Tensor | None,
    tokens: int,
    predictions: Counter[tuple[int, int]],
) -> Pack:
    wanted = sorted(predictions.items())
    places = torch.tensor([place for (place, _), _ in wanted], dtype=torch.long)
    states, rows = torch.unique(places, return_inverse=True)
    return Pack(
        ids=ids,
        positions=positions,
        ends=ends,
        mask=mask,
        states=states,
        rows=rows,
        targets=torch.tensor([target for (_, target), _ in wanted], dtype=torch.long),
        weights=torch.tensor([count for _, count in wanted], dtype=torch.float32),
        tokens=tokens,
        trained_tokens=predictions.total(),
    )
