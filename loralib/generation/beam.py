"""Beam search as in the LoRA paper's decoder, without computing beams that cannot win.

The search keeps K beams.  Each step takes the K best continuations of all beams by their sum of log-probabilities; one
that ends is scored with sum / length ** length_penalty, and frees its place for the next step.  Beams that reach the
limit are scored as well.  The best score wins, the older one in a tie.

What can be skipped: a sum of log-probabilities never rises.  With penalties p(l) = l ** length_penalty, a beam with sum
s <= 0 that continues from length t scores at most s / max(p(l) for t <= l <= limit), whatever the sign of
length_penalty (lengths below the minimum do not count, since no beam ends there).  If this bound does not beat the best
score so far, no continuation of the beam can win, as ties go to the older.  Nor does the beam affect the others: it
could only displace continuations with a smaller sum than its own, whose bound is no higher, so they cannot win either.
Dropping such beams, and stopping when none is left, therefore does not change the result.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from ..engine.bank import Bank, bank_and_base
from ..engine.kernels import loaded
from ..wrapping import unwrapped
from .decoder import Decoder, SequenceGroup, make_decoder
from .sampling import Sampling, penalize
from .text import check_prompts, end_tokens, new_tokens

__all__ = ["Hypothesis", "beam_search"]


# Beyond this many rows, a step takes longer without getting more efficient per row.
MAX_BRANCHES: Final = 640
# Rows of logits to process at a time, so that they fit in the CPU cache in fp32.
_ROWS: Final = 8
_GROUP: Final = 64


@dataclass(frozen=True)
class Hypothesis:
    """The best continuation found by a beam search.

    Attributes:
        ids: its tokens, including the end token if it ended.
        score: sum of log-probabilities / length ** length_penalty.
        ended: whether it ended on its own, instead of being cut at the limit.
    """

    ids: tuple[int, ...]
    score: float
    ended: bool


@dataclass(frozen=True)
class _Beam:
    ids: tuple[int, ...]
    sum: float


class _Search:
    """The search for a single prompt."""

    def __init__(self, number: int, prompt: Sequence[int], limit: int, sampling: Sampling) -> None:
        self.number, self.prompt, self.limit = number, prompt, limit
        self.beams = [_Beam((), 0.0)]
        self.best: Hypothesis | None = None
        self.group: SequenceGroup | None = None
        self.penalties = [float(length**sampling.length_penalty) for length in range(1, limit + 1)]
        # For each length, the largest penalty at that or any greater length at which a beam may end.
        self.largest = list(self.penalties)
        for length in range(limit - 1, 0, -1):
            if length <= sampling.min_new_tokens:
                self.largest[length - 1] = self.largest[length]
            else:
                self.largest[length - 1] = max(self.largest[length - 1], self.largest[length])

    @property
    def length(self) -> int:
        return len(self.beams[0].ids)

    def advance(
        self,
        sums: list[float],
        scores: list[float],
        bounds: list[float],
        parents: list[int],
        tokens: list[int],
        ends: frozenset[int],
    ) -> None:
        """Takes the best continuations, best first: keeps those that can still win, and scores those that end."""
        length = self.length + 1
        found = [
            (_Beam((*self.beams[parent].ids, token), total), token in ends, score, bound, parent)
            for total, score, bound, parent, token in zip(sums, scores, bounds, parents, tokens, strict=True)
            if total > float("-inf")
        ]
        for beam, ended, score, _, _ in sorted(found, key=lambda each: not each[1]):
            if (ended or length == self.limit) and (self.best is None or score > self.best.score):
                self.best = Hypothesis(beam.ids, score, ended)
        best = self.best.score if self.best is not None else float("-inf")
        going = [each for each in found if not each[1] and length < self.limit and each[3] > best]
        self.beams = [each[0] for each in going]
        if going:
            assert self.group is not None
            self.group.grow([each[4] for each in going], [each[0].ids[-1] for each in going])


def beam_search(
    model: nn.Module,
    prompts: Sequence[Sequence[int]] | Tensor,
    *,
    num_beams: int = 10,
    max_new_tokens: int = 64,
    length_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
    repetition_penalty: float = 1.0,
    min_length: int = 0,
    eos_token_id: int | Sequence[int] | None = None,
    max_branches: int = MAX_BRANCHES,
) -> list[Hypothesis]:
    """Finds the best continuation of each prompt by beam search, with the semantics of the LoRA paper's decoder.

    Except for rounding, results do not depend on which prompts are searched together.

    Args:
        model: a causal language model, adapted or not.
        prompts: token ids of each prompt; lengths may differ.
        num_beams: K; 1 is greedy search.
        max_new_tokens: maximum number of tokens, including the end token (fewer if the model's context is exhausted).
        length_penalty: scores are divided by length to this power: values above 0 favour long results (as sums are
            negative), values below 0 short ones.
        no_repeat_ngram_size: no sequence of this many generated tokens occurs twice; 0: off.
        repetition_penalty: for generated tokens, as in `Sampling`.
        min_length: the end token is banned until this many tokens have been generated.
        eos_token_id: the end token, or several; default: the model's own.
        max_branches: number of beams, over all prompts, that are computed together.

    Returns:
        The best hypothesis of each prompt, in order.

    Raises:
        ConfigError: settings are out of range; all are listed.
        DataError: prompts are empty or too long for the model; all are listed.
    """
    model = unwrapped(model)
    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_length,
        repetition_penalty=repetition_penalty,
        no_repeat_ngram_size=no_repeat_ngram_size,
        num_beams=num_beams,
        length_penalty=length_penalty,
    )
    rows = prompts.tolist() if isinstance(prompts, Tensor) else [list(prompt) for prompt in prompts]
    if eos_token_id is None:
        eos_token_id = end_tokens(model)
    ends = frozenset([eos_token_id] if isinstance(eos_token_id, int) else eos_token_id)
    found = dict(search(model, rows, sampling, ends, max_branches))
    return [found[number] for number in range(len(rows))]


def search(
    model: nn.Module | Bank,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    ends: frozenset[int],
    max_branches: int = MAX_BRANCHES,
    adapters: Sequence[str | None] | None = None,
) -> Iterator[tuple[int, Hypothesis]]:
    """Yields each prompt's number and best hypothesis as its search ends; see `beam_search`."""
    base = bank_and_base(model)[1]
    check_prompts(base, prompts)
    limits = [new_tokens(base, prompt, sampling.max_new_tokens) for prompt in prompts]
    waiting = deque(_Search(number, *each, sampling) for number, each in enumerate(zip(prompts, limits, strict=True)))
    running: list[_Search] = []
    decoder = make_decoder(model, max(map(sum, zip(map(len, prompts), limits, strict=True)), default=0))
    try:
        while waiting or running:
            branches = sum(len(one.beams) for one in running)
            while waiting and (not branches or branches + sampling.num_beams <= max_branches):
                one = waiting.popleft()
                one.group = decoder.open(one.prompt, adapters[one.number] if adapters is not None else None)
                running.append(one)
                branches += sampling.num_beams
            _step(decoder, running, sampling, ends)
            for one in running:
                if not one.beams:
                    assert one.group is not None
                    decoder.close(one.group)
                    yield one.number, one.best or Hypothesis((), float("-inf"), False)
            running = [one for one in running if one.beams]
    finally:
        decoder.close_all()


def _step(decoder: Decoder, searches: list[_Search], sampling: Sampling, ends: frozenset[int]) -> None:
    """Advances every search by one token."""
    logits = decoder.step()
    if not sampling.plain:
        logits = logits.float()
        for search in searches:
            for row, beam in zip(_rows(search), search.beams, strict=True):
                penalize(logits[row], beam.ids, sorted(ends), sampling)
    gains, tokens = best_tokens(logits, sampling.num_beams)  # (R, K)
    width = max(len(search.beams) for search in searches)
    order = [row for search in searches for row in _rows(search)]
    places = [number * width + beam for number, search in enumerate(searches) for beam in range(len(search.beams))]
    sums = torch.tensor([beam.sum for search in searches for beam in search.beams], device=gains.device)
    gains, tokens = gains[order], tokens[order]
    count = gains.shape[1]
    grid = gains.new_full((len(searches) * width, count), float("-inf"))
    grid[places] = sums[:, None] + gains
    of_places = tokens.new_zeros(len(searches) * width, count)
    of_places[places] = tokens
    totals, chosen = grid.view(len(searches), -1).topk(min(sampling.num_beams, width * count))  # (S, K)
    picked = of_places.view(len(searches), -1).gather(1, chosen)
    # In fp32, like the sums: otherwise ties would be broken by digits that the sums do not have.
    lengths = [search.length for search in searches]
    penalties = [search.penalties[length] for search, length in zip(searches, lengths, strict=True)]
    largest = [
        search.largest[min(length + 1, search.limit - 1)] for search, length in zip(searches, lengths, strict=True)
    ]
    scores = totals / torch.tensor(penalties, device=totals.device)[:, None]
    bounds = totals / torch.tensor(largest, device=totals.device)[:, None]
    results = (totals, scores, bounds, chosen // count, picked)
    for search, *values in zip(searches, *(result.tolist() for result in results), strict=True):
        search.advance(*values, ends)


def best_tokens(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Returns the log-probabilities in fp32 and the ids of the most likely tokens in each row, best first.

    Args:
        logits: (R, V).
        count: number of tokens per row.

    >>> gains, tokens = best_tokens(torch.tensor([[0.0, 1.0, -1.0]]), 2)
    >>> tokens.tolist(), [round(value, 4) for value in gains[0].tolist()]
    ([[1, 0]], [-0.4076, -1.4076])
    """
    count = min(count, logits.shape[1])
    kernels, groups = loaded(), logits.shape[1] // _GROUP
    few = groups < 4 * count or logits.shape[1] % _GROUP > 0  # too few groups for the faster methods
    if kernels is not None and not few and kernels.accept(logits):
        most, sums, maxima = kernels.log_sums(logits, _GROUP)
        best, tokens = _best_of_groups(logits.view(len(logits), groups, _GROUP), maxima, count)
        return best.float().sub_(most[:, None]).sub_(sums.log_()[:, None]), tokens
    parts = [_best_of(part, count, few) for part in logits.split(_ROWS)]
    return torch.cat([gains for gains, _ in parts]), torch.cat([tokens for _, tokens in parts])


def _best_of(logits: Tensor, count: int, few: bool) -> tuple[Tensor, Tensor]:
    gains = torch.log_softmax(logits, -1, dtype=torch.float32)
    if few:
        best, tokens = gains.topk(count)
        return best, tokens
    of_groups = gains.view(len(gains), -1, _GROUP)
    return _best_of_groups(of_groups, of_groups.amax(-1), count)


def _best_of_groups(of_groups: Tensor, maxima: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Returns the best of (R, groups, 64); they must be in the groups with the best maxima, which are cheap to find."""
    chosen = maxima.topk(count).indices  # (R, K)
    best, places = of_groups.gather(1, chosen[:, :, None].expand(*chosen.shape, _GROUP)).flatten(1).topk(count)
    return best, chosen.gather(1, places // _GROUP) * _GROUP + places % _GROUP


def _rows(search: _Search) -> range:
    assert search.group is not None
    return range(search.group.rows.start, search.group.rows.stop)
