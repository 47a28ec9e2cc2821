"""The token stream behind all generation: requests join and leave a batch, and chunks of text come out."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from ..data.tokens import prompt_ids
from ..engine.bank import Bank, bank_and_base
from ..engine.limits import table_rows
from ..errors import ConfigError, DataError, UnsupportedModelError, did_you_mean, list_faults
from .beam import search
from .decoder import SequenceGroup, make_decoder
from .grammar import Constraint, Grammars
from .queueing import FairQueue
from .sampling import NO_NUMBER, NOTHING_LEFT, Sampling, TokenLogprob, choose, log_probabilities, penalize
from .text import TextStream, check_prompts, end_tokens, new_tokens

__all__ = ["Generation", "Generator", "TextChunk", "generate", "stream"]

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class TextChunk:
    """The next part of one request's result.

    Attributes:
        request: the number of the request.
        text: may be empty: after part of a character, or if the text may become a stop text.
        ids: the new tokens, without the end token.
        finish_reason: None while it continues; "stop": the end token or a stop text came; "length": the limit did.
        score: score of a beam search, see `Hypothesis`.
        logprobs: one for each of `ids`, if the settings request them.
        prompt_logprobs: in the first chunk, if the settings request them; None for the first token.
        cached_tokens: in the first chunk, the number of prompt tokens that did not have to be computed again.
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
        text: the generated text, without the prompt, the end token and the stop text.
        ids: its tokens (including those of the stop text).
        finish_reason: "stop" or "length", see `TextChunk`.
        prompt_tokens: length of the prompt.
        score: score of a beam search, see `Hypothesis`.
        logprobs: see `TextChunk`.
        prompt_logprobs: see `TextChunk`.
    """

    text: str
    ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    score: float | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None


@dataclass(eq=False)
class _Request:
    number: int
    ids: list[int]
    sampling: Sampling
    text: TextStream
    limit: int
    adapter: str | None = None
    constraint: Constraint | None = None
    generated: list[int] = field(default_factory=list)
    group: SequenceGroup | None = None
    begun: bool = False
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=lambda: [None])

    def __post_init__(self) -> None:
        self.random = random.Random(self.sampling.seed)

    @property
    def row(self) -> int:
        """Its row in the last step's logits."""
        assert self.group is not None
        return int(self.group.rows.start)


@dataclass
class Counts:
    """Token counts of a generator so far.

    Attributes:
        prompt_tokens: in all prompts that were begun.
        generated_tokens: generated for all requests.
        reused_tokens: prompt tokens that did not have to be computed.
    """

    prompt_tokens: int = 0
    generated_tokens: int = 0
    reused_tokens: int = 0


class Generator:
    """Requests that are generated together: they join at any time, and leave when they are done.

    While requests are running, the model cannot be trained.

    Args:
        model: a causal language model, adapted or not; or a `Bank`, from which each request chooses an adapter.
        tokenizer: its tokenizer.
        max_requests: number of requests computed together; others wait.
        max_prompt_tokens: maximum number of prompt tokens per step; longer prompts are computed in parts, so that
            running requests do not wait long.
        cache_tokens: number of tokens whose keys and values are cached.  A request joins when its prompt and everything
            that it may generate fit, so that none fails halfway.  None: unlimited.
        reuse: whether to keep what was computed for a text, in that room, for others with the same prefix.
        on_error: called with the number of a request that failed, and the error; the others continue.  None: the error
            is raised, and all requests are dropped.

    Attributes:
        counts: token counts so far.
    """

    def __init__(
        self,
        model: nn.Module | Bank,
        tokenizer: Any,
        *,
        max_requests: int = 128,
        max_prompt_tokens: int = 2048,
        cache_tokens: int | None = None,
        reuse: bool = False,
        on_error: Callable[[int, Exception], None] | None = None,
    ) -> None:
        self._given, self._tokenizer = model, tokenizer
        self._bank, self._model = bank_and_base(model)
        self._max_requests, self._max_prompt_tokens = max_requests, max_prompt_tokens
        self._cache_tokens, self._reuse, self._on_error = cache_tokens, reuse, on_error
        self._ends = end_tokens(self._model, tokenizer)
        self._grammars = Grammars(tokenizer, self._ends)
        self._waiting: FairQueue[_Request] = FairQueue()
        self._running: list[_Request] = []
        self._count = itertools.count()
        self._blocked = False  # no waiting request fits until another leaves
        self.counts = Counts()
        self._make_decoder()

    def _make_decoder(self, longest: int = 0) -> None:
        self._decoder = make_decoder(
            self._given,
            longest,
            max_tokens=self._cache_tokens,
            reuse=self._reuse,
            max_prompt_tokens=self._max_prompt_tokens,
        )
        self._longest = longest if self._decoder.longest is None else 0
        self._blocked = False

    def __len__(self) -> int:
        return len(self._waiting) + len(self._running)

    @property
    def running(self) -> int:
        """Number of requests being computed."""
        return len(self._running)

    @property
    def used_tokens(self) -> int:
        """Number of tokens whose keys and values are cached or reserved."""
        return self._decoder.used_tokens

    def add(
        self, prompt: Prompt, sampling: Sampling | None = None, adapter: str | None = None, *, client: str = ""
    ) -> int:
        """Adds a request; returns the number that its chunks will carry.

        Args:
            prompt: a text, or token ids.
            sampling: its settings.
            adapter: the name of an adapter in the bank; None: only the base.
            client: who makes the request; clients take turns.

        Raises:
            AdapterError: there is no such adapter.
            ConfigError: the settings request a beam search, or an unsupported schema; or there is no bank.
            DataError: the prompt has no tokens, too many for the model, or more than fit in the cache.
            MissingDependencyError: a schema needs llguidance.
        """
        request = self.prepared(prompt, sampling, adapter)
        self.queue(request, client)
        return request.number

    def prepared(self, prompt: Prompt, sampling: Sampling | None = None, adapter: str | None = None) -> _Request:
        """Returns a checked request for `queue`; may run concurrently with another thread's `step`."""
        own = sampling or Sampling()
        if own.num_beams > 1:
            raise ConfigError("beam search cannot stream tokens. Call `generate` or `beam_search`.")
        [ids] = encode_prompts(self._model, self._tokenizer, [prompt])
        _check_adapters(self._bank, [adapter])
        _check_bias(self._model, own)
        limit = new_tokens(self._model, ids, own.max_new_tokens)
        room = self._cache_tokens
        if room is not None and not self._decoder.has_room(len(ids), limit):
            raise DataError(
                f"the prompt has {len(ids):,} tokens and up to {limit:,} may follow, but there is room for {room:,} "
                "in all (cache_tokens). Shorten the prompt, or ask for fewer tokens with max_new_tokens."
            )
        constraint = None if own.json_schema is None else self._grammars.follow(own.json_schema)
        text = TextStream(self._tokenizer, own.stop)
        return _Request(next(self._count), ids, own, text, limit, adapter, constraint)

    def queue(self, request: _Request, client: str = "") -> None:
        """Adds a request that was `prepared`."""
        self._waiting.push(client, request)
        self._blocked = False

    def cancel(self, number: int) -> None:
        """Cancels a request, which yields no more chunks; has no effect if the request has ended."""
        for request in [request for request in self._waiting if request.number == number]:
            self._waiting.remove(request)
        for request in [request for request in self._running if request.number == number]:
            self._leave(request)

    def close(self) -> None:
        """Drops all requests, and releases the model."""
        self._waiting.clear()
        self._running.clear()
        self._decoder.close_all()

    def step(self) -> list[TextChunk]:
        """Computes one token for every running request, or a part of its prompt.

        Raises:
            BusyModelError: the model is being trained.
        """
        self._admit()
        if not self._running:
            return []
        try:
            logits = self._decoder.step()
        except BaseException as error:  # the failed step may have left the sequences inconsistent
            if self._on_error is None or not isinstance(error, Exception):
                self.close()
                raise
            failed, self._running = self._running, []
            self._decoder.close_all()
            self._make_decoder()
            for request in failed:
                self._on_error(request.number, error)
            return []
        going = [request for request in self._running if request.group is not None and request.group.length]
        going.sort(key=lambda request: request.row)  # the decoder may have moved groups to other rows
        return [*self._score_prompts(logits), *self._continue(going, logits)]

    def _score_prompts(self, logits: Tensor) -> Iterator[TextChunk]:
        """Records the log-probabilities of prompt tokens, and ends requests that want nothing else."""
        for request in [request for request in self._running if request.sampling.prompt_logprobs]:
            group, scores = request.group, request.prompt_logprobs
            assert group is not None
            rows = logits[group.prompt_rows]
            known = len(scores) - 1
            ids = request.ids[known + 1 : known + 1 + len(rows)]  # the tokens that follow; the last row has none
            scores += log_probabilities(rows[: len(ids)], ids, [request.sampling.logprobs or 0] * len(ids))
            if group.length and not request.limit:
                self._leave(request)
                yield self._chunk(request, "", (), "length")

    def _continue(self, requests: list[_Request], logits: Tensor) -> Iterator[TextChunk]:
        """Chooses the next token of each request and yields the resulting chunks."""
        requests = [request for request in requests if request.limit]
        if not requests:
            return
        rows = [request.row for request in requests]
        if rows != list(range(len(logits))):
            logits = logits[rows]
        wanted = [row for row, request in enumerate(requests) if request.sampling.logprobs is not None]
        plain = logits[wanted] if wanted else logits[:0]
        changed = [row for row, r in enumerate(requests) if r.constraint is not None or not r.sampling.plain]
        if changed:
            logits = logits.float()  # in half precision, values that a penalty sets apart could become ties
        errors: dict[int, Exception] = {}
        for row in changed:
            request = requests[row]
            try:
                penalize(logits[row], request.generated, self._ends, request.sampling)
                if request.constraint is not None:
                    request.constraint.mask(logits[row])
            except Exception as error:
                errors[row] = error
        tokens = choose(logits, [request.sampling for request in requests], [r.random.random() for r in requests])
        scores: dict[int, TokenLogprob] = {}
        if wanted:
            chosen = [max(tokens[row], 0) for row in wanted]
            counts = [requests[row].sampling.logprobs or 0 for row in wanted]
            scores = dict(zip(wanted, log_probabilities(plain, chosen, counts), strict=True))
        for row, (request, token) in enumerate(zip(requests, tokens, strict=True)):
            try:
                if row in errors:
                    raise errors[row]
                chunk = self._advance(request, token, scores.get(row))
            except Exception as error:
                self._fail(request, error)
                continue
            if chunk.finish_reason is None:
                assert request.group is not None
                request.group.grow([0], [token])
            else:
                self._leave(request)
            yield chunk

    def _advance(self, request: _Request, token: int, score: TokenLogprob | None) -> TextChunk:
        """Returns the chunk that results from the token chosen for a request."""
        if token == NOTHING_LEFT:
            raise ConfigError(
                f"no token is left to choose after {len(request.generated)} tokens: the settings ban all of them. "
                "Check json_schema, no_repeat_ngram_size and min_new_tokens."
            )
        if token == NO_NUMBER:
            raise UnsupportedModelError(
                f"the model computed logits that are not numbers after {len(request.ids) + len(request.generated)} "
                "tokens: its weights or the adapter's are damaged, or its dtype has too little range (try fp32)"
            )
        if token in self._ends:
            return self._chunk(request, request.text.finish(), (), "stop")
        request.generated.append(token)
        self.counts.generated_tokens += 1
        if request.constraint is not None:
            request.constraint.accept(token)
        text, reason = request.text.add(token), None
        done = request.constraint is not None and request.constraint.finished
        if request.text.stopped:
            reason = "stop"
        elif done or len(request.generated) == request.limit:
            text += request.text.finish()
            reason = "stop" if done or request.text.stopped else "length"
        return self._chunk(request, text, (token,), reason, () if score is None else (score,))

    def _chunk(
        self,
        request: _Request,
        text: str,
        ids: tuple[int, ...],
        reason: str | None,
        logprobs: tuple[TokenLogprob, ...] = (),
    ) -> TextChunk:
        if request.begun:
            return TextChunk(request.number, text, ids, reason, None, logprobs)
        request.begun = True
        assert request.group is not None
        scores = tuple(request.prompt_logprobs) if request.sampling.prompt_logprobs else None
        return TextChunk(request.number, text, ids, reason, None, logprobs, scores, request.group.known)

    def _admit(self) -> None:
        while not self._blocked and len(self._running) < self._max_requests:
            request = self._waiting.pop(self._begin)
            if request is None:
                # Otherwise a waiting request may share a prefix that is being computed now.
                self._blocked = not self._decoder.pending
                return
            if request.group is not None:
                self._running.append(request)

    def _begin(self, request: _Request) -> bool:
        """Tries to begin a request; returns whether it leaves the queue, because it has a group or has failed."""
        longest, tokens = len(request.ids) + request.limit, self._decoder.pending + len(request.ids)
        if tokens > self._max_prompt_tokens and self._decoder.pending:
            return False
        try:
            limit = self._decoder.longest
            if not self._running and (self._longest or (limit is not None and longest > limit)):
                self._make_decoder(longest if limit is None or longest > limit else 0)
            elif limit is not None and longest > limit:
                return False  # the running requests have to end first
            scored = request.sampling.prompt_logprobs
            request.group = self._decoder.admit(request.ids, request.adapter, limit=request.limit, scored=scored)
        except Exception as error:
            if self._on_error is None:
                raise
            self._on_error(request.number, error)
            return True
        if request.group is not None:
            self.counts.prompt_tokens += len(request.ids)
            self.counts.reused_tokens += request.group.known
        return request.group is not None

    def _fail(self, request: _Request, error: Exception) -> None:
        if self._on_error is None:
            self.close()
            raise error
        self._leave(request)
        self._on_error(request.number, error)

    def _leave(self, request: _Request) -> None:
        assert request.group is not None
        self._decoder.close(request.group)
        self._running.remove(request)
        self._blocked = False


def _check_bias(model: nn.Module, own: Sampling) -> None:
    """Refuses a bias for tokens that the model does not have."""
    size = table_rows(model)
    unknown = sorted(token for token in own.logit_bias if size is not None and token >= size)
    if size is not None and unknown:
        raise ConfigError(
            f"logit_bias has the token ids {', '.join(map(str, unknown[:8]))}, but this model's end at {size - 1:,}"
        )


def stream(
    model: nn.Module | Bank,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    sampling: Sampling | Sequence[Sampling] | None = None,
    adapters: Sequence[str | None] | None = None,
) -> Iterator[TextChunk]:
    """Generates for many prompts at once and yields each chunk as it is produced.

    Args:
        model: a causal language model, adapted or not; or a `Bank` of adapters for one.
        tokenizer: its tokenizer.
        prompts: texts, or token ids.
        adapters: for a bank, the name of each prompt's adapter, or None for the base alone.
        sampling: settings for all, or one per prompt.  With settings for all, prompt i gets the seed ``seed + i``.

    Yields:
        Pieces of all prompts, interleaved; the last one of a prompt has a finish_reason.

    Raises:
        AdapterError: adapters do not exist; all are listed.
        ConfigError: the number of settings or adapters differs from that of prompts, or settings differ in beam search.
        DataError: prompts are empty or too long for the model; all are listed.
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
            "named adapters need a bank: bank = lora.Bank(model), bank.load(name, directory), then pass the bank "
            "instead of the model"
        )


def _searched(
    model: nn.Module | Bank,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    settings: Sequence[Sampling],
    adapters: Sequence[str | None],
) -> Iterator[TextChunk]:
    """Yields one chunk per prompt, as a beam search knows its result only at the end."""
    own = settings[0]
    if any(replace(other, seed=own.seed) != own for other in settings):
        raise ConfigError(
            "in a beam search, all prompts need the same settings. Call it once for each group of prompts."
        )
    ends = frozenset(end_tokens(bank_and_base(model)[1], tokenizer))
    for number, best in search(model, prompts, own, ends, adapters=adapters):
        ids = best.ids[: len(best.ids) - best.ended]
        text = TextStream(tokenizer)
        texts = [text.add(token) for token in ids]
        yield TextChunk(number, "".join(texts) + text.finish(), ids, "stop" if best.ended else "length", best.score)


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
        model: a causal language model, adapted or not; or a `Bank` of adapters for one.
        tokenizer: its tokenizer.
        prompts: texts, or token ids.
        adapters: for a bank, the name of each prompt's adapter, or None for the base alone.
        sampling: the settings; or
        **settings: those of `Sampling` by name, such as ``max_new_tokens=20, temperature=0.7, seed=1``.

    Returns:
        One result per prompt, in order.

    Raises:
        AdapterError: adapters do not exist; all are listed.
        ConfigError: settings are unknown or out of range; all are listed.
        DataError: prompts are empty or too long for the model; all are listed.
    """
    if settings:
        known = [spec.name for spec in dataclasses.fields(Sampling)]
        faults = [f"{name}.{did_you_mean(name, known)}" for name in settings if name not in known]
        if faults:
            raise ConfigError(
                list_faults("generation does not have these settings", faults, f"Known: {', '.join(known)}.")
            )
        sampling = replace(sampling or Sampling(), **settings)
    rows = encode_prompts(bank_and_base(model)[1], tokenizer, prompts)
    chunks: list[list[TextChunk]] = [[] for _ in rows]
    for chunk in stream(model, tokenizer, rows, sampling, adapters):
        chunks[chunk.request].append(chunk)
    return [join(own, row) for own, row in zip(chunks, rows, strict=True)]


def join(chunks: Sequence[TextChunk], prompt: Sequence[int]) -> Generation:
    """Joins all chunks of one request into a result."""
    return Generation(
        "".join(chunk.text for chunk in chunks),
        tuple(token for chunk in chunks for token in chunk.ids),
        chunks[-1].finish_reason or "length",
        len(prompt),
        chunks[-1].score,
        tuple(each for chunk in chunks for each in chunk.logprobs),
        chunks[0].prompt_logprobs,
    )


def encode_prompts(model: nn.Module, tokenizer: Any, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Returns the token ids of prompts.

    Raises:
        DataError: some have no tokens, or too many for the model; all are listed.
    """
    if isinstance(prompts, str):
        raise DataError(
            f"prompts is a single text, {prompts[:40]!r}; expected a list of texts. Write [{prompts[:10]!r}...]."
        )
    if isinstance(prompts, Mapping):
        raise DataError(
            "prompts is a mapping, as a tokenizer returns it; expected texts, or a list of token ids for each: pass "
            "its ['input_ids'], without padding"
        )
    chats = [f"prompt {number}" for number, prompt in enumerate(prompts, 1) if _holds_turns(prompt)]
    if chats:
        fix = "Pass tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for each."
        raise DataError(list_faults("these prompts are chats, expected texts or token ids", chats, fix))
    rows = [prompt_ids(prompt, tokenizer) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    check_prompts(model, rows)
    return rows


def _holds_turns(prompt: Any) -> bool:
    """Whether a prompt is a chat turn, or a list of turns, as chat templates take them."""
    return isinstance(prompt, Mapping) or (isinstance(prompt, Sequence) and any(isinstance(p, Mapping) for p in prompt))


def _settings(sampling: Sampling | Sequence[Sampling] | None, count: int) -> list[Sampling]:
    if sampling is None or isinstance(sampling, Sampling):
        every = sampling or Sampling()
        return [replace(every, seed=every.seed + number) for number in range(count)]
    if len(sampling) != count:
        raise ConfigError(
            f"sampling has {len(sampling)} entries for {count} prompts; give one per prompt, or one for all"
        )
    return list(sampling)
