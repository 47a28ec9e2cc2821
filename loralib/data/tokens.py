"""Turns `Example` values into token ids with a loss mask; long examples are dropped, long plain text is split."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain, groupby, takewhile
from typing import Any, Final, NamedTuple

from ..errors import ConfigError, DataError, did_you_mean, list_faults
from .chats import ChatTemplate, Segments
from .examples import Example
from .lines import shown
from .readers import PREFERENCES, Columns, draw, read_sources

__all__ = [
    "OBJECTIVES",
    "Dropped",
    "Encoded",
    "PreferencePair",
    "TokenExample",
    "draw_sources",
    "encode",
    "length_at",
    "length_report",
    "load_examples",
    "prompt_ids",
    "token_texts",
    "tokenize",
]

OBJECTIVES: Final = ("clm", "jlm", *PREFERENCES)

# Only bases/ imports transformers; here, a tokenizer is anything that behaves like its fast tokenizers.
Tokenizer = Any
SeqLen = int | None | Callable[[Sequence[int]], int | None]

_TOO_LONG: Final = "longer than seq_len"
_ANSWER_TOO_LONG: Final = "answer of a chat longer than seq_len"
_EMPTY: Final = "empty completion"
_BROKEN: Final = "\ufffd"  # incomplete characters decode to this


@dataclass(frozen=True)
class TokenExample:
    """One training example as token ids.

    Attributes:
        ids: T token ids.
        trained: the loss mask, T booleans: ``trained[i]`` tells whether the loss includes predicting ``ids[i]`` from
            ``ids[:i]``. ``trained[0]`` is always False, since nothing precedes it.
    """

    ids: tuple[int, ...]
    trained: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.ids)

    # The interface of all kinds of examples, some of which have several token rows.

    @property
    def rows(self) -> tuple[TokenExample, ...]:
        """Its token rows: only this one."""
        return (self,)

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens before the first trained one; all tokens if none is trained."""
        return self.ids[: self.trained.index(True)] if True in self.trained else self.ids

    @property
    def trained_tokens(self) -> int:
        """The number of trained tokens."""
        return sum(self.trained)

    @property
    def longest(self) -> int:
        """The length of its longest row, in tokens."""
        return len(self.ids)

    @property
    def content(self) -> tuple[object, ...]:
        """Its contents as plain values, for hashing."""
        return self.ids, self.trained


@dataclass(frozen=True)
class PreferencePair(TokenExample):
    """A prompt with a chosen and a rejected answer; `ids` and `trained` are for the chosen one.

    Attributes:
        rejected: the same prompt with the rejected answer.
        reference: log-probabilities of both answers under the reference model, once they are known.
    """

    rejected: TokenExample
    reference: tuple[float, float] | None = field(default=None, compare=False)

    def __len__(self) -> int:
        return len(self.ids) + len(self.rejected) - self.shared  # the prompt counts once, since it is computed once

    @property
    def shared(self) -> int:
        """The length of the two rows' common prefix in tokens, limited to the prompt."""
        pairs = zip(self.prompt, self.rejected.prompt, strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    @property
    def rows(self) -> tuple[TokenExample, ...]:
        """The rows with the chosen and the rejected answer."""
        return TokenExample(self.ids, self.trained), self.rejected

    @property
    def trained_tokens(self) -> int:
        """The number of tokens in both answers."""
        return sum(self.trained) + self.rejected.trained_tokens

    @property
    def longest(self) -> int:
        """The length of the longer row, in tokens."""
        return max(len(self.ids), len(self.rejected))

    @property
    def content(self) -> tuple[object, ...]:
        """Its contents in the data as plain values."""
        return self.ids, self.trained, self.rejected.content


class Dropped(NamedTuple):
    """An example that is left out of training, the reason, and its number of tokens (0: not tokenized)."""

    example: Example
    reason: str
    tokens: int = 0


@dataclass(frozen=True)
class Encoded:
    """Token examples, and a record of what was left out.

    Attributes:
        examples: the token examples.
        texts: the `Example` that each was made from, at the same index; repeated if it was split into windows.
        out: the examples that were dropped.
        lengths: number of tokens of each trainable example as a whole: before dropping long ones, splitting into
            windows, or sampling.
        given: number of examples before any were left out.
        seq_len: the limit that was applied; None: no limit.
        notes: notes for the user: how each file was read, and which of its fields are unused.
    """

    examples: list[TokenExample]
    texts: list[Example] = field(default_factory=list)
    out: list[Dropped] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    given: int = 0
    seq_len: int | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def dropped(self) -> dict[str, int]:
        """Number of dropped examples by reason."""
        return dict(Counter(item.reason for item in self.out))

    @property
    def used(self) -> int:
        """Number of different examples that are trained on."""
        return len({id(text) for text in self.texts})

    @property
    def drop_note(self) -> str:
        """A note for the user; "" if nothing was dropped.

        >>> one = Example.of("a", "b")
        >>> Encoded([], [], [Dropped(one, "longer than seq_len", 9), Dropped(one, "empty completion")]).drop_note
        'dropped 2 examples: 1 longer than seq_len, 1 empty completion'
        """
        parts = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items())
        total = len(self.out)
        return f"dropped {total:,} example{'s' * (total != 1)}: {parts}" if total else ""

    def summary(self, kind: str = "") -> str:
        """Returns how many of the given examples are trained on, and why the others are not.

        >>> one, two = Example.of("a", "b"), Example.of("a", "")
        >>> Encoded([], [one], [Dropped(two, "empty completion")], given=2).summary("training")
        '1 of 2 training examples in 0 rows (dropped 1 example: 1 empty completion)'
        """
        seen = {id(text) for text in self.texts} | {id(item.example) for item in self.out}
        sampled_out = self.given - len(seen)
        reasons = [self.drop_note] * bool(self.out) + [f"{sampled_out:,} not drawn"] * (sampled_out > 0)
        several = f" in {len(self):,} rows" if len(self) != self.used else ""
        return f"{self.used:,} of {self.given:,} {kind} examples{several}".replace("  ", " ") + (
            f" ({'; '.join(reasons)})" if reasons else ""
        )

    @property
    def length_warning(self) -> str:
        """A warning if over 1 % of the examples were dropped because of their length, else ""."""
        longer = sum(item.tokens > 0 for item in self.out)
        if self.seq_len is None or longer <= 0.01 * len(self.lengths):
            return ""
        return length_report(self.lengths, self.seq_len)

    def limited(self, seq_len: int | None) -> Encoded:
        """Drops examples longer than `seq_len` tokens; plain text is split into windows instead.

        Consecutive windows of a text overlap by one token, so that each token is trained once.
        """
        if seq_len is None:
            return self
        tokens: list[TokenExample] = []
        texts: list[Example] = []
        out = list(self.out)
        for whole, text in zip(self.examples, self.texts, strict=True):
            fits = whole.longest <= seq_len
            windows = [whole] if fits else _windows(whole, seq_len) if text.is_plain else []
            tokens += windows
            texts += [text] * len(windows)
            if not windows:
                out.append(Dropped(text, _TOO_LONG, whole.longest))
        used = {id(text) for text in texts}  # for a chat with several rows, some of them may fit
        out = [item._replace(reason=_ANSWER_TOO_LONG) if id(item.example) in used else item for item in out]
        return replace(self, examples=tokens, texts=texts, out=out, seq_len=seq_len)


def length_report(lengths: Sequence[int], seq_len: int) -> str:
    r"""Describes the lengths of examples, for users whose `seq_len` drops some of them.

    Args:
        lengths: number of tokens in each example, as in `Encoded.lengths`.
        seq_len: the limit.

    >>> print(*length_report([40] * 90 + [70] * 8 + [300] * 2, seq_len=64).split(": "), sep="\n")
    10 of 100 examples (10 %) are longer than 64 tokens
    50 % have at most 40, 90 % 40, 99 % 300, the longest 300. seq_len 300 keeps 99 % of them.
    """
    longer = sum(length > seq_len for length in lengths)
    parts = ", ".join(
        f"{share} %{' have at most' * (share == 50)} {length_at(lengths, share):,}" for share in (50, 90, 99)
    )
    return (
        f"{longer:,} of {len(lengths):,} examples ({100 * longer / len(lengths):.0f} %) are longer than {seq_len:,} "
        f"tokens: {parts}, the longest {max(lengths):,}. seq_len {length_at(lengths, 99)} keeps 99 % of them."
    )


def length_at(lengths: Sequence[int], percent: float) -> int:
    """Returns the shortest length that covers `percent` of the examples.

    >>> length_at(range(1, 101), 99)
    99
    """
    ordered = sorted(lengths)
    return ordered[min(len(ordered), max(1, math.ceil(len(ordered) * percent / 100))) - 1]


def load_examples(
    sources: Any,
    tokenizer: Tokenizer,
    *,
    seq_len: SeqLen,
    objective: str = "clm",
    max_samples: int | None = None,
    seed: int = 0,
    format: str = "auto",
    columns: Columns = None,
    as_chat: bool = False,
) -> Encoded:
    """Reads, tokenizes and samples the examples of one or several weighted files.

    Args:
        sources: anything that `read_sources` accepts, or its result (it is fast, and so can report faults before a
            model is loaded). ``path:weight`` shows each example of a file ``weight`` times per epoch (2: twice; 0.5: a
            random half of them).
        tokenizer: the model's tokenizer.
        seq_len: maximum number of tokens in an example; longer ones are dropped and counted (plain text is split into
            windows instead).  None: no limit.  A function receives the lengths of all examples and returns the limit.
        objective: "clm" trains completions, "jlm" all tokens, "dpo" and "orpo" pairs of completions.
        max_samples: maximum total number of examples, sampled after dropping, with as many different prompts as
            possible; several files share it in proportion to weight times size.
        seed: random seed for sampling.
        format: format of files that have not been read yet; see `read_examples`.
        columns: mapping of their fields; see `read_examples`.
        as_chat: whether to turn prompts and completions into chats; see `read_examples`.

    Raises:
        DataError: a file cannot be read, or none of its examples fits.
        ConfigError: max_samples, objective or seq_len is invalid.
    """
    if max_samples is not None and max_samples < 1:
        raise ConfigError(f"max_samples is {max_samples}, expected at least 1.")
    loaded = read_sources(sources, format, columns=columns, as_chat=as_chat, objective=objective)
    wholes = [encode(source.examples, tokenizer, None, objective) for source in loaded]
    if callable(seq_len):
        seq_len = seq_len([length for whole in wholes for length in whole.lengths])
    parts = [_limited(whole, _checked(seq_len), tokenizer) for whole in wholes]
    drawn = draw_sources(loaded, parts, max_samples, seed)
    return replace(drawn, seq_len=seq_len, notes=tuple(note for source in loaded for note in source.notes))


def draw_sources(sources: Sequence[Any], parts: Sequence[Encoded], max_samples: int | None, seed: int) -> Encoded:
    """Combines the encoded examples of several sources, drawing each as often as its weight says.

    Args:
        sources: result of `read_sources`.
        parts: their examples, encoded.
        max_samples: see `load_examples`.
        seed: random seed for sampling.
    """
    drawn = _drawn(parts, [source.weight for source in sources], max_samples, seed)
    return Encoded(
        examples=[tokens for _, tokens in drawn],
        texts=[text for text, _ in drawn],
        out=[item for part in parts for item in part.out],
        lengths=[length for part in parts for length in part.lengths],
        given=sum(part.given for part in parts),
    )


def _drawn(
    parts: Sequence[Encoded], weights: Sequence[float], most: int | None, seed: int
) -> list[tuple[Example, TokenExample]]:
    """Draws as many examples from each part as its weight says, but at most `most` in total."""
    counts = [max(1, round(weight * len(part))) for weight, part in zip(weights, parts, strict=True)]
    if most is not None and sum(counts) > most:
        counts = _shares(counts, most)
    drawn: list[tuple[Example, TokenExample]] = []
    for part, count in zip(parts, counts, strict=True):
        pairs = list(zip(part.texts, part.examples, strict=True))
        copies, rest = divmod(count, len(pairs))
        drawn += pairs * copies + (draw(pairs, rest, seed, lambda pair: pair[0].prompt) if rest else [])
    return drawn


def encode(examples: Iterable[Example], tokenizer: Tokenizer, seq_len: int | None, objective: str = "clm") -> Encoded:
    """Tokenizes examples in order; drops and counts those that are too long or have an empty completion.

    Args:
        examples: the examples to tokenize.
        tokenizer: the model's tokenizer.
        seq_len: maximum number of tokens in an example, including its end token; None: no limit. See `Encoded.limited`.
        objective: "clm" (causal, completions only), "jlm" (joint, every token), or "dpo" or "orpo" (each example and
            its `rejected` become a `PreferencePair`).

    Raises:
        DataError: no example is left, or the tokenizer has no end token.
        ConfigError: the objective is unknown, or seq_len is below 2.
    """
    if objective not in OBJECTIVES:
        expected = f"one of {', '.join(map(repr, OBJECTIVES))}"
        raise ConfigError(f"objective is {objective!r}, expected {expected}.{did_you_mean(objective, OBJECTIVES)}")
    seq_len = _checked(seq_len)
    examples = list(examples)
    if objective in PREFERENCES:
        return _limited(_pairs(examples, tokenizer), seq_len, tokenizer)
    rows = _all_rows([example for example in examples if _has_completion(example)], tokenizer)
    ids_of = _ids_of([pieces for row in rows for pieces in row], tokenizer)
    start, end = _start_ids(tokenizer), _end_id(tokenizer)
    tokens: list[TokenExample] = []
    texts: list[Example] = []
    out: list[Dropped] = []
    rest = iter(rows)
    for example in examples:
        if not _has_completion(example):
            out.append(Dropped(example, _EMPTY))
            continue
        pieces_of_rows = next(rest)
        # The last row of a chat with several rows has all turns, which suffices if every token is trained.
        for pieces in pieces_of_rows if objective == "clm" else pieces_of_rows[-1:]:
            ids = _ids_in_place(pieces, ids_of, tokenizer)
            tokens.append(_join(example, pieces, ids, start, end, objective))
            texts.append(example)
    whole = Encoded(tokens, texts, out, [len(row) for row in tokens], len(examples))
    return _limited(whole, seq_len, tokenizer)


def _pairs(examples: Sequence[Example], tokenizer: Tokenizer) -> Encoded:
    """Tokenizes preference examples; raises DataError, listing all that cannot be learned from."""
    sides = [(example, example.rejected) for example in examples if example.rejected is not None]
    if len(sides) < len(examples) or not sides:
        raise DataError("expected examples with a chosen and a rejected answer (Example.rejected).")
    whole = encode([side for pair in sides for side in pair], tokenizer, None)
    rows: dict[int, list[TokenExample]] = {}
    for text, row in zip(whole.texts, whole.examples, strict=True):
        rows.setdefault(id(text), []).append(row)
    pairs, faults = list[TokenExample](), list[str]()
    for chosen, rejected in sides:
        both = [rows.get(id(side), []) for side in (chosen, rejected)]
        if not all(both):
            faults.append(f"{chosen.source}: {'rejected' if both[0] else 'chosen'} is empty")
        elif max(map(len, both)) > 1:
            faults.append(f"{chosen.source}: the chat template needs a row for each answer; keep only the last answer")
        elif both[0] == both[1]:
            faults.append(f"{chosen.source}: chosen and rejected have the same tokens, so there is nothing to prefer")
        else:
            ((row,), (other,)) = both
            pairs.append(PreferencePair(row.ids, row.trained, other))
    if faults:
        raise DataError(list_faults("these examples cannot be learned from", faults, "Fix or remove them."))
    return Encoded(pairs, list(examples), [], [pair.longest for pair in pairs], len(examples))


def _checked(seq_len: int | None) -> int | None:
    if seq_len is not None and seq_len < 2:
        raise ConfigError(f"seq_len is {seq_len}, expected at least 2: one token to read and one to predict.")
    return seq_len


def _limited(whole: Encoded, seq_len: int | None, tokenizer: Tokenizer) -> Encoded:
    """Applies a limit; if nothing is left to train on, raises DataError, which shows the first example."""
    encoded = whole.limited(seq_len)
    if encoded.examples:
        return encoded
    if not encoded.out:
        raise DataError("no example of the data is left (there were none). Give at least one.")
    example, reason, tokens = encoded.out[0]
    fix = f" The shortest has {min(whole.lengths):,} tokens: raise seq_len to at least that." if whole.lengths else ""
    pieces = [(example.prompt, False), (example.completion, True)]
    if whole.examples:
        row = zip(whole.examples[0].ids, whole.examples[0].trained, strict=True)
        runs = groupby(row, key=lambda pair: pair[1])
        pieces = [(tokenizer.decode([token for token, _ in run]), trained) for trained, run in runs]
        example, reason, tokens = next(item for item in encoded.out if item.tokens)
    listed = [f"{'trained' if trained else 'not trained'}: {shown(text, 300)}" for text, trained in pieces[:6]]
    where = _SOURCE_END.sub("", example.source) or "the data"
    size = f", {tokens:,} tokens" if tokens else ""
    heading = (
        f"no example of {where} is left ({encoded.drop_note}).{fix} The first is {example.source} ({reason}{size})"
    )
    raise DataError(list_faults(heading, listed))


_SOURCE_END: Final = re.compile(r"(:\d+|\[\d+\])$")


def tokenize(example: Example, tokenizer: Tokenizer, objective: str = "clm") -> TokenExample:
    """Tokenizes one whole example: a completion ends with the end token and is never truncated.

    The text before a completion gets the same ids as on its own, as in generation.
    """
    rows = _rows(example, ChatTemplate(tokenizer))
    if len(rows) > 1:
        raise DataError(f"{example.source}: this chat needs {len(rows)} rows, one for each answer. Use encode instead.")
    ids = _ids_in_place(rows[0], _ids_of(rows, tokenizer), tokenizer)
    return _join(example, rows[0], ids, _start_ids(tokenizer), _end_id(tokenizer), objective)


def prompt_ids(prompt: str | Example, tokenizer: Tokenizer) -> list[int]:
    """Returns a prompt's ids for training and generation: the start token, if the tokenizer adds one, and the text.

    An empty prompt without a start token becomes just the end token (GPT-2's convention), since a model needs at least
    one token to continue.  For a chat, the prompt is the turns before its last answer and the beginning that the
    model's chat template gives that answer; the template writes its own start token.

    Raises:
        DataError: the model's template cannot render the chat.
    """
    if isinstance(prompt, Example) and prompt.messages:
        text = ChatTemplate(tokenizer).prompt(prompt)
        return _token_ids({text}, tokenizer)[text]
    text = prompt.prompt if isinstance(prompt, Example) else prompt
    return _started(_token_ids({text}, tokenizer)[text], _start_ids(tokenizer)) or [_end_id(tokenizer)]


def token_texts(ids: Sequence[int], tokenizer: Tokenizer, keep: str = "") -> Iterator[str]:
    """Yields the text of each token for display; tokens that form a single character together are joined.

    Args:
        ids: the token ids.
        tokenizer: the tokenizer they belong to.
        keep: unprintable characters to leave unchanged.
    """
    at = 0
    while at < len(ids):
        for end in range(at + 1, min(at + 4, len(ids)) + 1):  # a character has at most four bytes in UTF-8
            text = tokenizer.decode(list(ids[at:end]))
            if _BROKEN not in text:
                break
        else:
            end, text = at + 1, tokenizer.decode([ids[at]])
        at = end
        # Line breaks and escape codes in the data must not reach the terminal.
        yield "".join(char if char.isprintable() or char in keep else ascii(char)[1:-1] for char in text)


def _all_rows(examples: Sequence[Example], tokenizer: Tokenizer) -> list[list[Segments]]:
    """Returns the segments of each example; a chat may need several rows.

    Raises:
        DataError: the model's template cannot render some chats; all are listed.
    """
    template = ChatTemplate(tokenizer)
    rows, faults = [], dict[str, None]()  # both answers of a preference may have the same fault
    for example in examples:
        try:
            rows.append(_rows(example, template))
        except DataError as error:
            faults[str(error)] = None
            if not template.is_there:  # no other chat can be rendered either
                break
    if len(faults) > 1:
        raise DataError(list_faults(f"{len(faults)} chats cannot be trained on", list(faults)))
    if faults:
        raise DataError(next(iter(faults)))
    return rows


def _rows(example: Example, template: ChatTemplate) -> list[Segments]:
    return template.rows(example) if example.messages else [example.segments]


def _has_completion(example: Example) -> bool:
    calls = any(turn.fields.get("tool_calls") for turn in example.messages if turn.role == "assistant" and turn.trained)
    return calls or any(text.strip() for text in example.trained_texts)


def _ids_of(segments: Iterable[Segments], tokenizer: Tokenizer) -> dict[str, list[int]]:
    """Returns the ids of all texts that `_ids_in_place` compares: each piece of an example, and its whole text."""
    texts = set()
    for pieces in segments:
        texts |= {"".join(text for text, _ in pieces), *(text for text, _ in pieces)}
    return _token_ids(texts, tokenizer)


def _ids_in_place(pieces: Segments, ids_of: Mapping[str, list[int]], tokenizer: Tokenizer) -> list[list[int]]:
    """Returns the ids of each piece in context: those that it adds to the ids of the text before it.

    Usually these are the ids of the piece on its own.  But some tokenizers (like Llama 2's) prepend a space to their
    input, which a piece in the middle of a text does not have.  If a token would span two pieces, the second piece gets
    the ids that it has on its own, since the text before it must have the same ids as in generation.
    """
    alone = [ids_of[text] for text, _ in pieces]
    prefixes = list(accumulate(text for text, _ in pieces))
    if [token for ids in alone for token in ids] == ids_of[prefixes[-1]]:
        return alone
    ids_of_prefixes = _token_ids(set(prefixes), tokenizer)
    result: list[list[int]] = []
    before: list[int] = []
    for prefix, piece_ids in zip(prefixes, alone, strict=True):
        ids = ids_of_prefixes[prefix]
        result.append(ids[len(before) :] if ids[: len(before)] == before else piece_ids)
        before = before + result[-1]
    return result


def _join(
    example: Example,
    pieces: Segments,
    ids_of_pieces: Sequence[list[int]],
    start: list[int],
    end: int,
    objective: str,
) -> TokenExample:
    ids: list[int] = list(chain(*ids_of_pieces))
    trained = [is_trained for (_, is_trained), piece in zip(pieces, ids_of_pieces, strict=True) for _ in piece]
    if not example.messages:  # a chat template writes its own start and end tokens
        is_ended = ids[-1:] == [end]  # some data already contain these tokens
        is_prompt_empty = not example.is_plain and not ids_of_pieces[0]
        ids = _started(ids, start or ([end] if is_prompt_empty else []))  # as in prompt_ids
        trained = [False] * (len(ids) - len(trained)) + trained
        if not is_ended:
            ids.append(end)
            trained.append(True)
    if objective == "jlm":
        trained = [True] * len(ids)
    return TokenExample(tuple(ids), (False, *trained[1:]))


def _token_ids(texts: set[str], tokenizer: Tokenizer) -> dict[str, list[int]]:
    """Returns each text's ids without start or end tokens, in one call, because tokenizers are fast on batches."""
    ordered = [text for text in texts if text]
    ids = tokenizer(ordered, add_special_tokens=False)["input_ids"] if ordered else []
    return {"": [], **{text: list(row) for text, row in zip(ordered, ids, strict=True)}}


def _start_ids(tokenizer: Tokenizer) -> list[int]:
    """Returns the start token if the tokenizer prepends one (Llama's and Gemma's do, GPT-2's does not)."""
    first = list(tokenizer("a")["input_ids"])[:1]
    return first if first and first[0] == tokenizer.bos_token_id else []


def _started(ids: list[int], start: list[int]) -> list[int]:
    """Prepends the start token, unless the text already begins with it."""
    return ids if start and ids[: len(start)] == start else start + ids


def _end_id(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end token, so completions cannot be ended. Set tokenizer.eos_token.")
    return int(tokenizer.eos_token_id)


def _windows(whole: TokenExample, seq_len: int) -> list[TokenExample]:
    """Splits into windows of at most seq_len tokens; each begins with the previous one's last token, untrained."""
    starts = range(0, max(1, len(whole) - 1), seq_len - 1)
    windows = (slice(start, start + seq_len) for start in starts)
    return [TokenExample(whole.ids[window], (False, *whole.trained[window][1:])) for window in windows]


def _shares(sizes: Sequence[int], total: int) -> list[int]:
    """Splits ``total`` in proportion to ``sizes`` by the largest-remainder method."""
    exact = [total * size / sum(sizes) for size in sizes]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (shares[i] - exact[i], i))
    for index in by_remainder[: total - sum(shares)]:
        shares[index] += 1
    return shares
