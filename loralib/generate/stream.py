"""One token stream behind everything: requests join and leave a batch, pieces of text come out."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from ..data.tokens import prompt_ids
from ..errors import DataError
from .decoder import Text, evaluating, make_decoder
from .limits import check_prompts, context_length, end_tokens
from .sampling import Sampling, choose, penalize
from .text import TextStream

__all__ = ["Generation", "Generator", "Piece", "generate", "stream"]

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
    decoded: Text | None = None

    def __post_init__(self) -> None:
        self.random = random.Random(self.sampling.seed)


class Generator:
    """Requests that are generated together: they join at any time, and leave when they are done.

    Args:
        model: a causal language model, adapted or not.
        tokenizer: its tokenizer.
        max_requests: so many are computed together; the others wait.
        max_prompt_tokens: new requests join with at most so many tokens at once (or one alone), so that those which
            are generated already do not wait long.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, *, max_requests: int = 128, max_prompt_tokens: int = 2048
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._max_requests, self._max_prompt_tokens = max_requests, max_prompt_tokens
        self._decoder = make_decoder(model)
        self._ends, self._limit = end_tokens(model, tokenizer), context_length(model)
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []
        self._count = 0

    def __len__(self) -> int:
        return len(self._waiting) + len(self._running)

    def add(self, prompt: Prompt, sampling: Sampling | None = None) -> int:
        """Adds a request; returns the number that its pieces carry.

        Raises:
            DataError: the prompt has no tokens, or too many for the model.
        """
        own = sampling or Sampling()
        [ids] = encode_prompts(self._model, self._tokenizer, [prompt])
        self._waiting.append(_Request(self._count, ids, own, TextStream(self._tokenizer, own.stop)))
        self._count += 1
        return self._count - 1

    def cancel(self, number: int) -> None:
        """Forgets a request: no more pieces of it come."""
        self._waiting = deque(request for request in self._waiting if request.number != number)
        for request in self._running:
            if request.number == number:
                self._leave(request)
        self._running = [request for request in self._running if request.number != number]

    def step(self) -> list[Piece]:
        """Computes one token of every running request."""
        self._admit()
        if not self._running:
            return []
        with evaluating(self._model):
            logits = self._decoder.step()
        requests = sorted(self._running, key=_row)  # the decoder may have moved them
        for request in requests:
            if not request.sampling.plain:
                self._penalize(logits[_row(request)], request)
        tokens = choose(logits, [request.sampling for request in requests], [r.random.random() for r in requests])
        pieces = [_advance(*pair, self._ends, self._limit) for pair in zip(requests, tokens, strict=True)]
        self._running = []
        for request, piece, token in zip(requests, pieces, tokens, strict=True):
            if piece.finish_reason is None:
                assert request.decoded is not None
                request.decoded.grow([0], [token])
                self._running.append(request)
            else:
                self._leave(request)
        return pieces

    def _admit(self) -> None:
        tokens = 0
        while self._waiting and len(self._running) < self._max_requests:
            tokens += len(self._waiting[0].ids)
            if tokens > self._max_prompt_tokens and tokens > len(self._waiting[0].ids):
                break
            request = self._waiting.popleft()
            request.decoded = self._decoder.open(request.ids)
            self._running.append(request)

    def _leave(self, request: _Request) -> None:
        assert request.decoded is not None
        self._decoder.close(request.decoded)

    def _penalize(self, logits: Tensor, request: _Request) -> None:
        own = request.sampling
        penalize(
            logits,
            request.generated,
            self._ends,
            repetition_penalty=own.repetition_penalty,
            no_repeat_ngram_size=own.no_repeat_ngram_size,
            min_new_tokens=own.min_new_tokens,
        )


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
    generator = Generator(model, tokenizer)
    rows = encode_prompts(model, tokenizer, prompts)
    for ids, own in zip(rows, _settings(sampling, len(rows)), strict=True):
        generator.add(ids, own)
    while len(generator):
        yield from generator.step()


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
    rows = encode_prompts(model, tokenizer, prompts)
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


def _row(request: _Request) -> int:
    assert request.decoded is not None
    return request.decoded.rows.start


def _advance(request: _Request, token: int, ends: Sequence[int], limit: int | None) -> Piece:
    if token in ends:
        return Piece(request.number, request.text.finish(), (), "stop")
    request.generated.append(token)
    text, reason = request.text.add(token), None
    if request.text.stopped:
        reason = "stop"
    elif len(request.generated) == request.sampling.max_new_tokens or (
        limit is not None and len(request.ids) + len(request.generated) > limit
    ):
        text += request.text.finish()
        reason = "stop" if request.text.stopped else "length"
    return Piece(request.number, text, (token,), reason)


def encode_prompts(model: nn.Module, tokenizer: Any, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Returns the token ids of prompts.

    Raises:
        DataError: some have no tokens, or too many for the model; all of them at once.
    """
    if isinstance(prompts, str):
        raise DataError(f"prompts is one text, {prompts[:40]!r}; expected a list of them. Write [{prompts[:10]!r}...].")
    rows = [prompt_ids(prompt, tokenizer) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    check_prompts(model, rows)
    return rows


def _settings(sampling: Sampling | Sequence[Sampling] | None, count: int) -> list[Sampling]:
    if sampling is None or isinstance(sampling, Sampling):
        every = sampling or Sampling()
        return [replace(every, seed=every.seed + number) for number in range(count)]
    return list(sampling)
