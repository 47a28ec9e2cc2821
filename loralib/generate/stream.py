"""One token stream behind everything: requests join and leave a batch, pieces of text come out."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..data.tokens import prompt_ids
from ..errors import DataError, list_faults
from .decoder import Decoder
from .sampling import Sampling, choose, penalize
from .text import TextStream

__all__ = ["Generation", "Piece", "generate", "stream"]

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Piece:
    """What came next in one request.

    Attributes:
        request: the number of the prompt.
        text: may be empty: half a character, or what may become a stop text.
        ids: the new tokens; the end token is not among them.
        finish_reason: None while it goes on; "stop": the end token or a stop text came; "length": the limit did.
    """

    request: int
    text: str
    ids: tuple[int, ...]
    finish_reason: str | None = None


@dataclass(frozen=True)
class Generation:
    """The result for one prompt.

    Attributes:
        text: what was generated, without the prompt, the end token and a stop text.
        ids: its tokens (with those of a stop text).
        finish_reason: "stop" or "length", see `Piece`.
        prompt_tokens: length of the prompt.
    """

    text: str
    ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int


@dataclass
class _Request:
    number: int
    ids: list[int]
    sampling: Sampling
    text: TextStream
    generated: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.sampling.seed)


def stream(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Prompt], sampling: Sampling | Sequence[Sampling] | None = None
) -> Iterator[Piece]:
    """Generates for many prompts at once and yields each piece as it comes.

    Args:
        model: a causal language model, adapted or not.
        tokenizer: its tokenizer.
        prompts: texts, or token ids.
        sampling: settings for all, or one a prompt.  Settings for all give prompt i the seed ``seed + i``.

    Yields:
        Pieces, of all prompts in turn; the last one of a prompt has a finish_reason.

    Raises:
        DataError: prompts are too long for the model; all of them at once.
    """
    settings = _settings(sampling, len(prompts))
    ids = _encode(model, tokenizer, prompts)
    running = [
        _Request(number, row, own, TextStream(tokenizer, own.stop))
        for number, (row, own) in enumerate(zip(ids, settings, strict=True))
    ]
    decoder, ends, limit = Decoder(model), end_tokens(model, tokenizer), context_length(model)
    while running:
        logits = decoder.logits([request.ids + request.generated for request in running])
        for row, request in zip(logits, running, strict=True):
            own = request.sampling
            if not own.plain:
                penalize(
                    row,
                    request.generated,
                    ends,
                    repetition_penalty=own.repetition_penalty,
                    no_repeat_ngram_size=own.no_repeat_ngram_size,
                    min_new_tokens=own.min_new_tokens,
                )
        tokens = choose(logits, [r.sampling for r in running], [r.random.random() for r in running])
        going = []
        for token, request in zip(tokens, running, strict=True):
            piece = _advance(request, token, ends, limit)
            if piece.finish_reason is None:
                going.append(request)
            yield piece
        running = going


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
    min_new_tokens: int = 0,
    stop: Sequence[str] = (),
    seed: int = 0,
) -> list[Generation]:
    """Generates for many prompts at once; see `Sampling` for the settings and `stream` for the rest.

    Returns:
        One result a prompt, in order.
    """
    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        no_repeat_ngram_size=no_repeat_ngram_size,
        min_new_tokens=min_new_tokens,
        stop=tuple(stop),
        seed=seed,
    )
    rows = _encode(model, tokenizer, prompts)
    pieces: list[list[Piece]] = [[] for _ in prompts]
    for piece in stream(model, tokenizer, rows, sampling):
        pieces[piece.request].append(piece)
    return [
        Generation(
            "".join(piece.text for piece in own),
            tuple(token for piece in own for token in piece.ids),
            own[-1].finish_reason or "length",
            len(row),
        )
        for own, row in zip(pieces, rows, strict=True)
    ]


def end_tokens(model: nn.Module, tokenizer: Any) -> list[int]:
    """Returns the tokens that end a text: the tokenizer's, and those that the model's own settings name."""
    found: list[int | None] = []
    for owner in (tokenizer, getattr(model, "generation_config", None), getattr(model, "config", None)):
        value = getattr(owner, "eos_token_id", None)
        found += value if isinstance(value, list) else [value]
    return sorted({int(token) for token in found if token is not None})


def context_length(model: nn.Module) -> int | None:
    """Returns how many positions the model has, or None where its config does not say."""
    value = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return value if isinstance(value, int) else None


def _advance(request: _Request, token: int, ends: Sequence[int], limit: int | None) -> Piece:
    if token in ends:
        return Piece(request.number, request.text.finish(), (), "stop")
    request.generated.append(token)
    text, reason = request.text.add(token), None
    if request.text.stopped:
        reason = "stop"
    elif len(request.generated) == request.sampling.max_new_tokens or (
        limit is not None and len(request.ids) + len(request.generated) >= limit
    ):
        text += request.text.finish()
        reason = "stop" if request.text.stopped else "length"
    return Piece(request.number, text, (token,), reason)


def _encode(model: nn.Module, tokenizer: Any, prompts: Sequence[Prompt]) -> list[list[int]]:
    if isinstance(prompts, str):
        raise DataError(f"prompts is one text, {prompts[:40]!r}; expected a list of them. Write [{prompts[:10]!r}...].")
    rows = [prompt_ids(prompt, tokenizer) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    limit = context_length(model)
    faults = [f"prompt {number} has no tokens" for number, row in enumerate(rows, 1) if not row]
    faults += [
        f"prompt {number} has {len(row):,} tokens"
        for number, row in enumerate(rows, 1)
        if limit is not None and len(row) >= limit
    ]
    if faults:
        fix = f"Shorten them: the model's context is {limit:,} tokens, for prompt and completion." if limit else ""
        raise DataError(list_faults("prompts that the model cannot continue", faults, fix))
    return rows


def _settings(sampling: Sampling | Sequence[Sampling] | None, count: int) -> list[Sampling]:
    from dataclasses import replace

    if sampling is None or isinstance(sampling, Sampling):
        every = sampling or Sampling()
        return [replace(every, seed=every.seed + number) for number in range(count)]
    return list(sampling)
