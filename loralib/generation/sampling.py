"""Choosing the next token from logits: penalties, temperature, top-k, top-p, min-p.  Pure functions on values."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from ..settings import check, setting, settings_class

__all__ = [
    "NOTHING_LEFT",
    "NO_NUMBER",
    "Sampling",
    "TokenLogprob",
    "banned_tokens",
    "choose",
    "log_probabilities",
    "penalize",
]

NOTHING_LEFT: Final = -1
NO_NUMBER: Final = -2

# Number of candidates to try first for top-p and min-p: sorting a whole vocabulary costs more than the rest of a step.
_FIRST_CUT: Final = 256
# Block size for cumulative sums when drawing from the whole vocabulary.
_BLOCK: Final = 64
# Number of rows over the whole vocabulary to process at a time.
_ROWS: Final = 64


@dataclass(frozen=True)
class TokenLogprob:
    """How likely a token was under the model's own distribution, before penalties or temperature (natural logarithms).

    Attributes:
        token: its id.
        logprob: its log-probability.
        top: the most likely tokens at its position, best first: id and log-probability.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


@settings_class
@dataclass(frozen=True)
class Sampling:
    """The settings of one request: how long its text may get and how each token is chosen.

    Top-p is from Holtzman et al. 2020, the repetition penalty from Keskar et al. 2019, eq. 2; presence and frequency
    penalty are OpenAI's.  Penalties and bans consider only generated tokens, not the prompt: a completion may repeat
    its names.

    Except for rounding, a seed yields the same text whatever else is in the batch; rounding rarely shows in fp32, but
    in bf16 it does after some tokens.

    Raises:
        ConfigError: one or more settings are invalid; the message lists all of them.

    >>> Sampling(temperature=0.7, stop="END").stop
    ('END',)
    """

    max_new_tokens: int = setting(128, "maximum number of tokens to generate", "length", at_least=0)
    min_new_tokens: int = setting(0, "minimum number of tokens before the text may end", "length", at_least=0)
    stop: str | Sequence[str] = setting(
        (),
        "text at which generation stops, which is left out of the result; may be repeated",
        "length",
        several="repeat",
        expected="non-empty strings (an empty one would stop at once)",
    )
    temperature: float = setting(
        0.0, "0: the most likely token; 1: sample from the model's probabilities", "sampling", at_least=0
    )
    top_k: int = setting(0, "sample from this many most likely tokens; 0: all", "sampling", at_least=0)
    top_p: float = setting(
        1.0, "sample from the most likely tokens that together have this probability", "sampling", above=0, at_most=1
    )
    min_p: float = setting(
        0.0,
        "sample from tokens with at least this fraction of the top token's probability",
        "sampling",
        at_least=0,
        at_most=1,
    )
    repetition_penalty: float = setting(
        1.0, "above 1: makes tokens that have already been generated less likely", "sampling", above=0
    )
    no_repeat_ngram_size: int = setting(
        0, "never generate the same sequence of this many tokens twice; 0: off", "sampling", at_least=0
    )
    presence_penalty: float = setting(
        0.0, "subtracted from the logits of tokens that have already been generated", "sampling", at_least=-2, at_most=2
    )
    frequency_penalty: float = setting(
        0.0,
        "subtracted from a token's logit once for each time it has already been generated",
        "sampling",
        at_least=-2,
        at_most=2,
    )
    logit_bias: Mapping[int, float] = setting(
        {},
        "added to the logits of tokens, by id; 100 all but forces a token, -100 bans it",
        "sampling",
        several="pairs",
        at_least=-100,
        at_most=100,
    )
    json_schema: str | None = setting(
        None,
        "JSON schema that the text must follow; {} allows any JSON object",
        "sampling",
        rule=_is_json,
        expected="a JSON schema, as text",
    )
    logprobs: int | None = setting(
        None,
        "return the log-probability of each token, and of this many of the most likely alternatives",
        "sampling",
        at_least=0,
        flag=False,
    )
    prompt_logprobs: bool = setting(
        False, "return the log-probabilities of the prompt's tokens too", "sampling", flag=False
    )
    seed: int = setting(0, "random seed; prompt i uses seed + i", "sampling")
    num_beams: int = setting(1, "above 1: beam search with this many beams", "beam search", at_least=1)
    length_penalty: float = setting(
        1.0,
        "scores are log-probability / length ** length_penalty; below 1 favours shorter texts",
        "beam search",
        at_least=-100,
        at_most=100,
    )

    def __post_init__(self) -> None:
        if isinstance(self.stop, (str, list)):
            object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        check(self, "text generation", self._faults)

    def _faults(self) -> list[str]:
        faults = []
        if not self.max_new_tokens and not self.prompt_logprobs:
            faults.append("max_new_tokens is 0, expected at least 1 (0 only with prompt_logprobs)")
        if any(token < 0 for token in self.logit_bias):
            faults.append(f"logit_bias has the token id {min(self.logit_bias)}, expected ids of at least 0")
        if self.min_new_tokens > self.max_new_tokens:
            faults.append(
                f"min_new_tokens is {self.min_new_tokens}, expected at most max_new_tokens, which is "
                f"{self.max_new_tokens}"
            )
        if self.num_beams > 1:
            off = {
                "temperature": 0.0,
                "top_k": 0,
                "top_p": 1.0,
                "min_p": 0.0,
                "stop": (),
                "json_schema": None,
                "logprobs": None,
                "prompt_logprobs": False,
            }
            clashes = [name for name, value in off.items() if getattr(self, name) != value]
            faults += [f"{name} has no effect in beam search (num_beams is {self.num_beams})" for name in clashes]
        return faults

    @property
    def plain(self) -> bool:
        """Whether logits are used unchanged, apart from temperature, top-k, top-p and min-p."""
        return (
            self.repetition_penalty == 1
            and not self.presence_penalty
            and not self.frequency_penalty
            and not self.logit_bias
            and not self.no_repeat_ngram_size
            and not self.min_new_tokens
        )


def banned_tokens(tokens: Sequence[int], size: int) -> list[int]:
    """Returns the tokens that would complete a sequence of ``size`` tokens that has already occurred.

    >>> banned_tokens([1, 2, 3, 1, 2], size=3)
    [3]
    >>> banned_tokens([1, 2], size=1)
    [1, 2]
    """
    if size == 0 or len(tokens) < size:
        return []
    last = list(tokens[len(tokens) - size + 1 :])
    return [tokens[at + size - 1] for at in range(len(tokens) - size + 1) if list(tokens[at : at + size - 1]) == last]


def penalize(logits: Tensor, tokens: Sequence[int], ends: Sequence[int], own: Sampling) -> None:
    """Applies penalties, bias, n-gram ban and minimum length to one row of logits, in place and in this order.

    The repetition penalty comes first.

    Args:
        logits: (V,), before softmax.
        tokens: tokens generated so far, without the prompt.
        ends: the end tokens.
        own: the request's settings.

    >>> logits = torch.tensor([2.0, -2.0, 1.0])
    >>> penalize(logits, [0, 1], [2], Sampling(repetition_penalty=2.0, min_new_tokens=3))
    >>> logits.tolist()
    [1.0, -4.0, -inf]
    """
    penalty = own.repetition_penalty
    if penalty != 1 and tokens:
        seen = torch.tensor(sorted(set(tokens)), device=logits.device)
        values = logits[seen]
        logits[seen] = torch.where(values < 0, values * penalty, values / penalty)
    if (own.presence_penalty or own.frequency_penalty) and tokens:
        counts = Counter(tokens)
        less = [own.presence_penalty + own.frequency_penalty * count for count in counts.values()]
        logits[list(counts)] -= torch.tensor(less, dtype=logits.dtype, device=logits.device)
    if bias := {token: value for token, value in own.logit_bias.items() if token < len(logits)}:
        logits[list(bias)] += torch.tensor(list(bias.values()), dtype=logits.dtype, device=logits.device)
    banned = banned_tokens(tokens, own.no_repeat_ngram_size)
    if len(tokens) < own.min_new_tokens:
        banned += [end for end in ends if end < len(logits)]
    if banned:
        logits[banned] = float("-inf")


def log_probabilities(logits: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[TokenLogprob]:
    """Returns the log-probabilities of tokens.

    Args:
        logits: (R, V), as computed by the model.
        tokens: one token per row.
        counts: how many of the most likely tokens to include for each row.

    >>> [found] = log_probabilities(torch.tensor([[0.0, 1.0, -1.0]]), [0], [2])
    >>> round(found.logprob, 4), [(token, round(value, 4)) for token, value in found.top]
    (-1.4076, [(1, -0.4076), (0, -1.4076)])
    """
    found = []
    for at in range(0, len(tokens), _ROWS):  # limits memory: whole vocabularies in fp32 are large
        part = torch.log_softmax(logits[at : at + _ROWS], -1, dtype=torch.float32)
        places = torch.tensor(tokens[at : at + _ROWS], device=part.device)
        own = part.gather(1, places[:, None])[:, 0].tolist()
        most = min(max(counts[at : at + _ROWS]), part.shape[1])
        best = [rows.tolist() for rows in part.topk(most)] if most else [[()] * len(part)] * 2
        for token, value, count, values, ids in zip(
            tokens[at : at + _ROWS], own, counts[at : at + _ROWS], *best, strict=True
        ):
            found.append(TokenLogprob(token, value, tuple(zip(ids, values, strict=True))[:count]))
    return found


def choose(logits: Tensor, settings: Sequence[Sampling], uniforms: Sequence[float]) -> list[int]:
    """Chooses one token per row.

    A row depends only on its own settings and random number, so a request's result does not depend on its neighbours.

    Args:
        logits: (R, V), with penalties applied.
        settings: one per row.
        uniforms: a number in [0, 1) per row, mapped to a token by the inverse cumulative distribution.

    Returns:
        R tokens; `NOTHING_LEFT` if all are banned, `NO_NUMBER` if the largest logit is NaN or infinite.

    >>> logits = torch.tensor([[0.0, 3.0, 1.0]]).repeat(2, 1)
    >>> choose(logits, [Sampling(), Sampling(temperature=1.0, top_k=2)], [0.0, 0.95])
    [1, 2]
    """
    best = logits.max(-1)  # argmax is four times slower in bf16
    found = zip(best.values.tolist(), best.indices.tolist(), strict=True)
    tokens = [
        token if math.isfinite(value) else NOTHING_LEFT if value == -math.inf else NO_NUMBER for value, token in found
    ]
    alike: dict[tuple[int, float, float], list[int]] = {}
    for row, own in enumerate(settings):
        if own.temperature > 0 and tokens[row] >= 0:
            alike.setdefault((own.top_k, own.top_p, own.min_p), []).append(row)
    for rows in alike.values():
        heat = torch.tensor([settings[row].temperature for row in rows], device=logits.device)
        some = logits if len(rows) == len(logits) else logits[rows]
        probabilities = torch.softmax(some.float() / heat[:, None], -1)
        wanted = torch.tensor([uniforms[row] for row in rows], dtype=torch.float64, device=logits.device)
        for row, token in zip(rows, _draw(probabilities, settings[rows[0]], wanted).tolist(), strict=True):
            tokens[row] = token
    return tokens


def _draw(probabilities: Tensor, own: Sampling, uniforms: Tensor) -> Tensor:
    """Draws a token for each row (n, V); all rows have the same top-k, top-p and min-p."""
    if own.top_k == 0 and own.top_p == 1 and own.min_p == 0:
        return _inverse(probabilities, uniforms)
    size = probabilities.shape[1]
    count = size if own.top_k == 0 else min(own.top_k, size)
    width = count if own.top_k else min(_FIRST_CUT, count)
    drawn = torch.zeros_like(uniforms, dtype=torch.long)
    left = torch.arange(len(uniforms), device=uniforms.device)
    while len(left):
        # As in other libraries: top-p applies to what top-k leaves, min-p to what both leave.
        some = probabilities if len(left) == len(uniforms) else probabilities[left]
        best, order = some.topk(width)
        total = (best if own.top_k else some).sum(-1, keepdim=True)
        before = torch.cumsum(best, -1) - best
        kept = (before < own.top_p * total) & (best >= own.min_p * best[:, :1])
        done = torch.ones_like(left, dtype=torch.bool) if width == count else ~kept[:, -1]
        # Sorted by id: among hundreds of nearly equal tokens, rounding could change the order by likelihood, and with
        # it the token that a seed draws.
        tokens, places = order.sort(-1)
        chosen = _inverse(torch.where(kept, best, 0).gather(-1, places), uniforms[left])
        drawn[left[done]] = tokens.gather(-1, chosen[:, None])[done, 0]
        left, width = left[~done], min(width * 16, count)
    return drawn


def _inverse(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Returns, for each row (n, V), the first index whose cumulative weight exceeds the given share of the total.

    >>> _inverse(torch.tensor([[0.0, 1.0, 0.0, 3.0]]).repeat(2, 1), torch.tensor([0.0, 0.3]).double()).tolist()
    [1, 3]
    """
    # In fp64 and by blocks: in fp32 the last of 50,000 sums would be off by more than one token's weight.
    weights = F.pad(weights, (0, -weights.shape[1] % _BLOCK))
    blocks = weights.view(len(weights), -1, _BLOCK)
    before, block = _first_above(blocks.sum(-1).double(), uniforms)
    own = blocks.gather(1, block[:, None, None].expand(-1, 1, _BLOCK))[:, 0].double()
    return block * _BLOCK + _first_above(own, uniforms, before)[1]


def _first_above(weights: Tensor, uniforms: Tensor, wanted: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Finds, for each row, the first index whose cumulative weight exceeds a target.

    `wanted` is the target; None: the row's share of the total.  Returns the target minus all weights before, and the
    index.
    """
    cumulative = weights.cumsum(-1)
    wanted = cumulative[:, -1] * uniforms if wanted is None else wanted
    index = torch.searchsorted(cumulative, wanted[:, None].clamp(min=0), right=True)[:, 0]
    # Prevents rounding from leading past the last index with nonzero weight.
    index = torch.minimum(index, (cumulative < cumulative[:, -1:]).sum(-1))
    reached = (cumulative - weights).gather(-1, index[:, None])[:, 0]
    return wanted - reached, index
