"""Beam search as the LoRA paper's decoder does it, without computing what cannot win.

K beams are kept.  Each step takes the K best continuations of all beams by their sum of log-probabilities; one that
ends is scored, sum / length ** length_penalty, and leaves its place to the others in the next step.  At the limit the
beams that are left are scored too.  The best score wins, the older one in a tie.

What can be left out: a sum of log-probabilities only falls.  With penalties p(l) = l ** length_penalty, a beam with sum
s <= 0 that goes on from length t can score s / max(p(l) for t <= l <= limit) at most, whatever the sign of
length_penalty (lengths below the minimum do not count, since no beam ends there).  If that does not beat the best score
so far, no continuation of the beam wins: ties go to the older.  Nor does the beam matter to the others.  It could only
take places from continuations with a smaller sum than its own, whose bound is no higher, so that they cannot win
either.  Dropping such beams, and stopping when none is left, therefore changes no result.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import ConfigError, list_faults
from .decoder import Decoder, Text, evaluating, make_decoder
from .limits import check_prompts, context_length, end_tokens
from .sampling import penalize

__all__ = ["Hypothesis", "beam_search"]


@dataclass(frozen=True)
class Hypothesis:
    """The best continuation that a beam search found.

    Attributes:
        ids: its tokens, the end token included if it ended.
        score: sum of log-probabilities / length ** length_penalty.
        ended: whether it ended, or was cut at the limit.
    """

    ids: tuple[int, ...]
    score: float
    ended: bool


@dataclass(frozen=True)
class Settings:
    """What `beam_search` is asked for."""

    num_beams: int
    max_new_tokens: int
    length_penalty: float
    no_repeat_ngram_size: int
    repetition_penalty: float
    min_length: int
    ends: frozenset[int]

    @property
    def plain(self) -> bool:
        """Whether the model's logits are used as they are."""
        return self.repetition_penalty == 1 and not self.no_repeat_ngram_size and not self.min_length


@dataclass(frozen=True)
class _Beam:
    ids: tuple[int, ...]
    sum: float


class _Search:
    """The search for one prompt."""

    def __init__(self, number: int, prompt: Sequence[int], limit: int, settings: Settings) -> None:
        self.number, self.prompt, self.limit = number, prompt, limit
        self.beams = [_Beam((), 0.0)]
        self.best: Hypothesis | None = None
        self.text: Text | None = None
        self.penalties = [float(length**settings.length_penalty) for length in range(1, limit + 1)]
        # The largest penalty from a length on, of those at which a beam may end.
        self.largest = list(self.penalties)
        for length in range(limit - 1, 0, -1):
            if length <= settings.min_length:
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
        """Takes the best continuations, best first: keeps those that may win yet, and scores those that end."""
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
            assert self.text is not None
            self.text.grow([each[4] for each in going], [each[0].ids[-1] for each in going])


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
    max_branches: int = 320,
) -> list[Hypothesis]:
    """Finds the best continuation of each prompt by beam search, with the semantics of the LoRA paper's decoder.

    Results do not depend on which prompts are searched together, but for rounding.

    Args:
        model: a causal language model, adapted or not.
        prompts: token ids of each, of any lengths.
        num_beams: K; 1 is greedy search.
        max_new_tokens: at most so many tokens, the end token included (fewer where the model's context ends).
        length_penalty: scores are divided by length to this power: above 0 favours long results (their sums are
            negative), below 0 short ones.
        no_repeat_ngram_size: no sequence of so many generated tokens comes twice; 0: off.
        repetition_penalty: of generated tokens, as in `Sampling`.
        min_length: the end token is banned until so many tokens are generated.
        eos_token_id: the end token, or several; default: the model's own.
        max_branches: so many beams of all prompts are computed together.

    Returns:
        The best hypothesis of each prompt, in order.

    Raises:
        ConfigError: settings are out of range; all of them at once.
        DataError: prompts are empty or too long for the model; all of them at once.
    """
    rows = prompts.tolist() if isinstance(prompts, Tensor) else [list(prompt) for prompt in prompts]
    settings = Settings(
        num_beams,
        max_new_tokens,
        length_penalty,
        no_repeat_ngram_size,
        repetition_penalty,
        min_length,
        _ends(model, eos_token_id),
    )
    _check(settings, max_branches)
    check_prompts(model, rows)
    context = context_length(model)
    limits = [max_new_tokens if context is None else min(max_new_tokens, context + 1 - len(row)) for row in rows]
    waiting = deque(
        _Search(number, row, limit, settings) for number, (row, limit) in enumerate(zip(rows, limits, strict=True))
    )
    running: list[_Search] = []
    found: dict[int, Hypothesis] = {}
    decoder = make_decoder(model)
    with evaluating(model):
        while waiting or running:
            branches = sum(len(search.beams) for search in running)
            while waiting and (not branches or branches + num_beams <= max_branches):
                search = waiting.popleft()
                search.text = decoder.open(search.prompt)
                running.append(search)
                branches += num_beams
            _step(decoder, running, settings)
            for search in running:
                if not search.beams:
                    assert search.text is not None
                    decoder.close(search.text)
                    found[search.number] = search.best or Hypothesis((), float("-inf"), False)
            running = [search for search in running if search.beams]
    return [found[number] for number in range(len(rows))]


def _step(decoder: Decoder, searches: list[_Search], settings: Settings) -> None:
    """Continues every search by one token."""
    logits = decoder.step()
    if not settings.plain:
        logits = logits.float()
        for search in searches:
            for row, beam in zip(_rows(search), search.beams, strict=True):
                penalize(
                    logits[row],
                    beam.ids,
                    list(settings.ends),
                    repetition_penalty=settings.repetition_penalty,
                    no_repeat_ngram_size=settings.no_repeat_ngram_size,
                    min_new_tokens=settings.min_length,
                )
    gains, tokens = best_tokens(logits, settings.num_beams)  # (R, K)
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
    totals, chosen = grid.view(len(searches), -1).topk(min(settings.num_beams, width * count))  # (S, K)
    picked = of_places.view(len(searches), -1).gather(1, chosen)
    # In fp32, as the sums are: ties must not depend on digits that the sums do not have.
    lengths = [search.length for search in searches]
    penalties = [search.penalties[length] for search, length in zip(searches, lengths, strict=True)]
    largest = [
        search.largest[min(length + 1, search.limit - 1)] for search, length in zip(searches, lengths, strict=True)
    ]
    scores = totals / torch.tensor(penalties, device=totals.device)[:, None]
    bounds = totals / torch.tensor(largest, device=totals.device)[:, None]
    results = (totals, scores, bounds, chosen // count, picked)
    for search, *values in zip(searches, *(result.tolist() for result in results), strict=True):
        search.advance(*values, settings.ends)


def best_tokens(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Returns the log-probabilities in fp32 and the ids of the likeliest tokens of each row, best first.

    Args:
        logits: (R, V).
        count: how many.

    >>> gains, tokens = best_tokens(torch.tensor([[0.0, 1.0, -1.0]]), 2)
    >>> tokens.tolist(), [round(value, 4) for value in gains[0].tolist()]
    ([[1, 0]], [-0.4076, -1.4076])
    """
    gains, tokens = torch.log_softmax(logits, -1, dtype=torch.float32).topk(min(count, logits.shape[1]))
    return gains, tokens


def _rows(search: _Search) -> range:
    assert search.text is not None
    return range(search.text.rows.start, search.text.rows.stop)


def _ends(model: nn.Module, given: int | Sequence[int] | None) -> frozenset[int]:
    if given is None:
        return frozenset(end_tokens(model, None))
    return frozenset([given] if isinstance(given, int) else given)


def _check(settings: Settings, max_branches: int) -> None:
    rules = {
        "num_beams": (settings.num_beams >= 1, settings.num_beams, "a whole number of at least 1"),
        "max_new_tokens": (settings.max_new_tokens >= 1, settings.max_new_tokens, "a whole number of at least 1"),
        "length_penalty": (abs(settings.length_penalty) < 100, settings.length_penalty, "a number such as 0.8 or 1"),
        "no_repeat_ngram_size": (
            settings.no_repeat_ngram_size >= 0,
            settings.no_repeat_ngram_size,
            "0 (off) or a number of tokens",
        ),
        "repetition_penalty": (
            0 < settings.repetition_penalty < float("inf"),
            settings.repetition_penalty,
            "a positive number (1: off)",
        ),
        "min_length": (settings.min_length >= 0, settings.min_length, "0 (off) or a number of tokens"),
        "max_branches": (max_branches >= 1, max_branches, "a whole number of at least 1"),
    }
    faults = [f"{name} is {value!r}, expected {wanted}" for name, (ok, value, wanted) in rules.items() if not ok]
    if faults:
        raise ConfigError(list_faults("beam search cannot work with these settings", faults))
