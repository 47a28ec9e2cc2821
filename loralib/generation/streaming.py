"""One token stream behind everything: requests join and leave a batch, pieces of text come out."""

from __future__ import annotations

import dataclasses
import random
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ..data.tokens import prompt_ids
from ..engine.bank import Bank, bank_and_base
from ..errors import ConfigError, DataError, did_you_mean, list_faults
from .beam import search
from .decoder import SequenceGroup, make_decoder
from .sampling import Sampling, TokenLogprob, choose, penalize
from .text import TextStream, check_prompts, end_tokens, new_tokens

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
        score: of a beam search, see `Hypothesis`.
        logprobs: one for each of `ids`, where the settings ask for them.
        prompt_logprobs: in the first piece, where the settings ask for them; None for the first token.
        cached_tokens: in the first piece, how many tokens of the prompt were not computed again.
    """

    request: int
    text: str
    ids: tuple[int, ...]
    finish_reason: str | None = None
    score: float | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    cached_tokens: int | None = None


@dataclass(frozen=True)
class Generation:
    """The result for one prompt.

    Attributes:
        text: what was generated, without the prompt, the end token and a stop text.
        ids: its tokens (with those of a stop text).
        finish_reason: "stop" or "length", see `Piece`.
        prompt_tokens: length of the prompt.
        score: of a beam search, see `Hypothesis`.
    """

    text: str
    ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    score: float | None = None


@dataclass
class _Request:
    number: int
    ids: list[int]
    sampling: Sampling
    text: TextStream
    limit: int
    adapter: str | None = None
    generated: list[int] = field(default_factory=list)
    group: SequenceGroup | None = None

    def __post_init__(self) -> None:
        self.random = random.Random(self.sampling.seed)


class Generator:
    """Requests that are generated together: they join at any time, and leave when they are done.

    While requests are running, the model cannot be trained.

    Args:
        model: a causal language model, adapted or not; or a `Bank`, of which each request chooses an adapter.
        tokenizer: its tokenizer.
        max_requests: how many are computed together; the others wait.
        max_prompt_tokens: new requests join with at most this many tokens at once (or one alone), so that those which
            are generated already do not wait long.
    """

    def __init__(
        self, model: nn.Module | Bank, tokenizer: Any, *, max_requests: int = 128, max_prompt_tokens: int = 2048
    ) -> None:
        self._given, self._tokenizer = model, tokenizer
        self._bank, self._model = bank_and_base(model)
        self._max_requests, self._max_prompt_tokens = max_requests, max_prompt_tokens
        self._decoder = make_decoder(model)
        self._ends = end_tokens(self._model, tokenizer)
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []
        self._count = 0

    def __len__(self) -> int:
        return len(self._waiting) + len(self._running)

    def add(self, prompt: Prompt, sampling: Sampling | None = None, adapter: str | None = None) -> int:
        """Adds a request; returns the number that its pieces carry.

        Args:
            prompt: a text, or token ids.
            sampling: its settings.
            adapter: the name of an adapter in the bank; None: the base alone.

        Raises:
            AdapterError: there is no such adapter.
            ConfigError: the settings ask for a beam search, or there is no bank.
            DataError: the prompt has no tokens, or too many for the model.
        """
        own = sampling or Sampling()
        if own.num_beams > 1:
            raise ConfigError("a beam search has no stream of tokens. Call `generate` or `beam_search`.")
        [ids] = encode_prompts(self._model, self._tokenizer, [prompt])
        _check_adapters(self._bank, [adapter])
        limit = new_tokens(self._model, ids, own.max_new_tokens)
        self._waiting.append(_Request(self._count, ids, own, TextStream(self._tokenizer, own.stop), limit, adapter))
        self._count += 1
        return self._count - 1

    def cancel(self, number: int) -> None:
        """Forgets a request: no more pieces of it come."""
        self._waiting = deque(request for request in self._waiting if request.number != number)
        for request in self._running:
            if request.number == number:
                self._leave(request)
        self._running = [request for request in self._running if request.number != number]

    def close(self) -> None:
        """Forgets all requests, and takes back what generating needs in the model's place."""
        self._waiting.clear()
        self._running.clear()
        self._decoder.close_all()

    def step(self) -> list[Piece]:
        """Computes one token of every running request.

        Raises:
            BusyModelError: the model is being trained.
        """
        self._admit()
        if not self._running:
            return []
        try:
            logits = self._decoder.step()
        except BaseException:
            self.close()  # the sequences may have grown by half a step
            raise
        requests = sorted(self._running, key=_row)  # the decoder may have moved them
        changed = [request for request in requests if not request.sampling.plain]
        if changed:
            logits = logits.float()  # half precision would make ties of what a penalty sets apart
        for request in changed:
            penalize(logits[_row(request)], request.generated, self._ends, request.sampling)
        tokens = choose(logits, [request.sampling for request in requests], [r.random.random() for r in requests])
        pieces = [_advance(*pair, self._ends) for pair in zip(requests, tokens, strict=True)]
        self._running = []
        for request, piece, token in zip(requests, pieces, tokens, strict=True):
            if piece.finish_reason is None:
                assert request.group is not None
                request.group.grow([0], [token])
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
            request = self._waiting[0]
            longest, limit = len(request.ids) + request.limit, self._decoder.longest
            if limit is not None and longest > limit:
                if self._running:  # they end as they began
                    break
                self._decoder = make_decoder(self._given, longest)
            request.group = self._decoder.open(request.ids, request.adapter)
            self._running.append(self._waiting.popleft())

    def _leave(self, request: _Request) -> None:
        assert request.group is not None
        self._decoder.close(request.group)


def stream(
    model: nn.Module | Bank,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    sampling: Sampling | Sequence[Sampling] | None = None,
    adapters: Sequence[str | None] | None = None,
) -> Iterator[Piece]:
    """Generates for many prompts at once and yields each piece as it comes.

    Args:
        model: a causal language model, adapted or not; or a `Bank` of adapters over one.
        tokenizer: its tokenizer.
        prompts: texts, or token ids.
        adapters: of a bank, the name of each prompt's adapter, or None for the base alone.
        sampling: settings for all, or one per prompt.  Settings for all give prompt i the seed ``seed + i``.

    Yields:
        Pieces, of all prompts in turn; the last one of a prompt has a finish_reason.

    Raises:
        AdapterError: there is no such adapter; all of them at once.
        ConfigError: there are not as many settings or adapters as prompts, or beam searches differ in theirs.
        DataError: prompts are empty or too long for the model; all of them at once.
    """
    bank, base = bank_and_base(model)
    rows = encode_prompts(base, tokenizer, prompts)
    settings = _settings(sampling, len(rows))
    names = list(adapters) if adapters is not None else [None] * len(rows)
    if len(names) != len(rows):
        raise ConfigError(f"adapters has {len(names)} names for {len(rows)} prompts; give one per prompt (None: base)")
    _check_adapters(bank, names)
    if any(own.num_beams > 1 for own in settings):
        yield from _searched(model, tokenizer, rows, settings, names)
        return
    generator = Generator(model, tokenizer)
    for ids, own, adapter in zip(rows, settings, names, strict=True):
        generator.add(ids, own, adapter)
    try:
        while len(generator):
            yield from generator.step()
    finally:
        generator.close()


def _check_adapters(bank: Bank | None, names: Sequence[str | None]) -> None:
    if bank is not None:
        bank.check(names)
    elif any(name is not None for name in names):
        raise ConfigError(
            "adapters by name need a bank: bank = lora.Bank(model), bank.load(name, directory), and the bank in the "
            "model's place"
        )


def _searched(
    model: nn.Module | Bank,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    settings: Sequence[Sampling],
    adapters: Sequence[str | None],
) -> Iterator[Piece]:
    """Yields one piece per prompt: a beam search knows its result only at the end."""
    own = settings[0]
    if any(replace(other, seed=own.seed) != own for other in settings):
        raise ConfigError("in a beam search all prompts need the same settings. Call it once for each group of them.")
    ends = frozenset(end_tokens(bank_and_base(model)[1], tokenizer))
    for number, best in search(model, prompts, own, ends, adapters=adapters):
        ids = best.ids[: len(best.ids) - best.ended]
        text = TextStream(tokenizer)
        pieces = [text.add(token) for token in ids]
        yield Piece(number, "".join(pieces) + text.finish(), ids, "stop" if best.ended else "length", best.score)


def generate(
    model: nn.Module | Bank,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    sampling: Sampling | None = None,
    *,
    adapters: Sequence[str | None] | None = None,
    **settings: Any,
) -> list[Generation]:
    """Generates for many prompts at once.

    Args:
        model: a causal language model, adapted or not; or a `Bank` of adapters over one.
        tokenizer: its tokenizer.
        prompts: texts, or token ids.
        adapters: of a bank, the name of each prompt's adapter, or None for the base alone.
        sampling: the settings; or
        **settings: those of `Sampling` by name, as ``max_new_tokens=20, temperature=0.7, seed=1``.

    Returns:
        One result a prompt, in order.

    Raises:
        ConfigError: settings are unknown or out of range; all of them at once.
        DataError: prompts are empty or too long for the model; all of them at once.
    """
    if settings:
        known = [spec.name for spec in dataclasses.fields(Sampling)]
        faults = [f"{name}.{did_you_mean(name, known)}" for name in settings if name not in known]
        if faults:
            raise ConfigError(list_faults("generation has no such settings", faults, f"Known: {', '.join(known)}."))
        sampling = replace(sampling or Sampling(), **settings)
    rows = encode_prompts(bank_and_base(model)[1], tokenizer, prompts)
    pieces: list[list[Piece]] = [[] for _ in rows]
    for piece in stream(model, tokenizer, rows, sampling, adapters):
        pieces[piece.request].append(piece)
    return [join(own, row) for own, row in zip(pieces, rows, strict=True)]


def join(pieces: Sequence[Piece], prompt: Sequence[int]) -> Generation:
    """Joins all pieces of one request."""
    return Generation(
        "".join(piece.text for piece in pieces),
        tuple(token for piece in pieces for token in piece.ids),
        pieces[-1].finish_reason or "length",
        len(prompt),
        pieces[-1].score,
    )


def _row(request: _Request) -> int:
    assert request.group is not None
    return int(request.group.rows.start)


def _advance(request: _Request, token: int, ends: Sequence[int]) -> Piece:
    if token in ends:
        return Piece(request.number, request.text.finish(), (), "stop")
    request.generated.append(token)
    text, reason = request.text.add(token), None
    if request.text.stopped:
        reason = "stop"
    elif len(request.generated) == request.limit:
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
    if isinstance(prompts, Mapping):
        raise DataError(
            "prompts is what a tokenizer returns, a mapping; expected texts, or a list of token ids for each: give its "
            "['input_ids'], without padding"
        )
    chats = [f"prompt {number}" for number, prompt in enumerate(prompts, 1) if _holds_turns(prompt)]
    if chats:
        fix = "Give tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for each."
        raise DataError(list_faults("these prompts are chats, expected texts or token ids", chats, fix))
    rows = [prompt_ids(prompt, tokenizer) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    check_prompts(model, rows)
    return rows


def _holds_turns(prompt: Any) -> bool:
    """Whether a prompt is a turn of a chat, or a list of turns, as chat templates take them."""
    return isinstance(prompt, Mapping) or (isinstance(prompt, Sequence) and any(isinstance(p, Mapping) for p in prompt))


def _settings(sampling: Sampling | Sequence[Sampling] | None, count: int) -> list[Sampling]:
    if sampling is None or isinstance(sampling, Sampling):
        every = sampling or Sampling()
        return [replace(every, seed=every.seed + number) for number in range(count)]
    if len(sampling) != count:
        raise ConfigError(
            f"sampling has {len(sampling)} settings for {count} prompts; give one per prompt, or one for all"
        )
    return list(sampling)
