"""From `Example` values to token ids with a loss mask, over-long ones dropped and counted, never cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

from ..errors import ConfigError, DataError, did_you_mean, list_faults
from .chat import render_chat
from .readers import Example, Source, draw, read_sources

__all__ = [
    "OBJECTIVES",
    "Encoded",
    "TokenExample",
    "encode",
    "load_examples",
    "prompt_ids",
    "tokenize",
]

OBJECTIVES: Final = ("clm", "jlm")

# Transformers is imported by base.py alone; here a tokenizer is anything that behaves like its fast tokenizers.
Tokenizer = Any

_TOO_LONG: Final = "longer than seq_len"
_EMPTY: Final = "empty completion"


@dataclass(frozen=True)
class TokenExample:
    """One training example as token ids.

    Attributes:
        ids: T token ids.
        trained: T truth values; where ``trained[i]`` holds, the loss of predicting ``ids[i]`` from ``ids[:i]``
            counts. ``trained[0]`` is always False: nothing comes before it.
    """

    ids: tuple[int, ...]
    trained: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Encoded:
    """Token examples that fit, and how many did not.

    Attributes:
        examples: the token examples.
        texts: the `Example` of each, at the same index.
        dropped: how many examples were dropped, by reason; only reasons that occurred.
    """

    examples: list[TokenExample]
    texts: list[Example] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def drop_note(self) -> str:
        """One line for the reader, or "" if nothing was dropped.

        >>> Encoded([], [], {"longer than seq_len": 2, "empty completion": 1}).drop_note
        'dropped 3 examples: 2 longer than seq_len, 1 empty completion'
        """
        total = sum(self.dropped.values())
        parts = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())
        return f"dropped {total} example{'s' * (total != 1)}: {parts}" if total else ""


def load_examples(
    sources: str | Path | Sequence[str | Path] | Sequence[Source],
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    objective: str = "clm",
    max_samples: int | None = None,
    seed: int = 0,
    format: str = "auto",
) -> Encoded:
    """Reads, tokenizes and draws the examples of one or several weighted files.

    Args:
        sources: one path, or several, or what `read_sources` read of them (which is quick, and shows faults before a
            model is loaded); ``path:weight`` shows each example of a file ``weight`` times an epoch (2: twice; 0.5:
            half of them, drawn by seed).
        tokenizer: the model's tokenizer.
        seq_len: the most tokens an example may have; longer ones are dropped and counted (plain text is cut into
            windows instead).
        objective: "clm" trains completions, "jlm" all tokens.
        max_samples: the most examples in all; drawn by seed after dropping, as many different prompts as possible,
            from several files by weight times size.
        seed: of the draw.
        format: of files that are still to be read; see `read_examples`.

    Raises:
        DataError: a file cannot be read, or nothing is left of it.
    """
    if max_samples is not None and max_samples < 1:
        raise ConfigError(f"max_samples is {max_samples}, expected at least 1.")
    if isinstance(sources, (str, Path)):
        sources = [sources]
    paths = [source for source in sources if not isinstance(source, Source)]
    read = [source for source in sources if isinstance(source, Source)]
    if paths or not read:
        read += read_sources(paths, format)
    parts = [encode(source.examples, tokenizer, seq_len, objective) for source in read]
    wanted = [max(1, round(source.weight * len(part))) for source, part in zip(read, parts, strict=True)]
    if max_samples is not None and sum(wanted) > max_samples:
        wanted = _shares(wanted, max_samples)
    drawn: list[tuple[Example, TokenExample]] = []
    dropped: Counter[str] = Counter()
    for part, count in zip(parts, wanted, strict=True):
        pairs = list(zip(part.texts, part.examples, strict=True))
        copies, rest = divmod(count, len(pairs))
        drawn += pairs * copies + (draw(pairs, rest, seed, lambda pair: pair[0].prompt) if rest else [])
        dropped.update(part.dropped)
    return Encoded([tokens for _, tokens in drawn], [text for text, _ in drawn], dict(dropped))


def encode(examples: Iterable[Example], tokenizer: Tokenizer, seq_len: int, objective: str = "clm") -> Encoded:
    """Tokenizes examples and drops, with a count by reason, those that are too long or have nothing to train.

    Args:
        examples: what to tokenize.
        tokenizer: the model's tokenizer.
        seq_len: the most tokens an example may have, its end token included. Plain text that is longer is cut
            into windows that overlap by one token, so that each token is trained once.
        objective: "clm" (causal, completions only) or "jlm" (joint, every token).

    Raises:
        DataError: no example is left, or the tokenizer has no end token.
        ConfigError: unknown objective, or seq_len below 2.
    """
    if objective not in OBJECTIVES:
        known = " or ".join(map(repr, OBJECTIVES))
        raise ConfigError(f"objective is {objective!r}, expected {known}.{did_you_mean(objective, OBJECTIVES)}")
    if seq_len < 2:
        raise ConfigError(f"seq_len is {seq_len}, expected at least 2: one token to see and one to predict.")
    examples = list(examples)
    segments = _all_segments(examples, tokenizer)
    ids_of = _ids_of(segments, tokenizer)
    start, end = _start_ids(tokenizer), _end_id(tokenizer)
    tokens: list[TokenExample] = []
    texts: list[Example] = []
    dropped: Counter[str] = Counter()
    shortest = 0
    for example, pieces in zip(examples, segments, strict=True):
        if not _says_something(example, pieces):
            dropped[_EMPTY] += 1
            continue
        whole = _join(example, pieces, _placed(pieces, ids_of, tokenizer), start, end, objective)
        windows = _windows(whole, seq_len) if _is_plain(example) else [whole] if len(whole) <= seq_len else []
        if not windows:
            dropped[_TOO_LONG] += 1
            shortest = min(shortest or len(whole), len(whole))
        tokens += windows
        texts += [example] * len(windows)
    encoded = Encoded(tokens, texts, dict(dropped))
    if not tokens:
        where = examples[0].source.rpartition(":")[0] if examples else "the data"
        why = encoded.drop_note or "there were none"
        longer = f" The shortest has {shortest} tokens: raise seq_len to at least that." if shortest else ""
        raise DataError(f"no example of {where or 'the data'} is left ({why}).{longer}")
    return encoded


def tokenize(example: Example, tokenizer: Tokenizer, objective: str = "clm") -> TokenExample:
    """Tokenizes one example, whole: a completion ends with the end token and is never cut.

    What comes before a completion has the ids that it has by itself, as in generation.
    """
    pieces = _segments(example, tokenizer)
    ids = _placed(pieces, _ids_of([pieces], tokenizer), tokenizer)
    return _join(example, pieces, ids, _start_ids(tokenizer), _end_id(tokenizer), objective)


def prompt_ids(prompt: str, tokenizer: Tokenizer) -> list[int]:
    """The ids a prompt has in training and in generation: the tokenizer's start token, if it adds one, and its text.

    An empty prompt without a start token is the end token alone (GPT-2's convention), since a model needs
    something to go on from.
    """
    ids = _start_ids(tokenizer) + _token_ids({prompt}, tokenizer)[prompt]
    return ids or [_end_id(tokenizer)]


def _all_segments(examples: Sequence[Example], tokenizer: Tokenizer) -> list[tuple[tuple[str, bool], ...]]:
    """The segments of each example.

    Raises:
        DataError: names all chats that the model's template cannot write.
    """
    segments, faults = [], []
    for example in examples:
        try:
            segments.append(_segments(example, tokenizer))
        except DataError as error:
            faults.append(str(error))
            if not tokenizer.chat_template:  # the rest of them cannot be written either
                break
    if len(faults) > 1:
        raise DataError(list_faults(f"{len(faults)} chats cannot be trained on", faults))
    if faults:
        raise DataError(faults[0])
    return segments


def _segments(example: Example, tokenizer: Tokenizer) -> tuple[tuple[str, bool], ...]:
    return render_chat(example, tokenizer) if example.messages else example.segments


def _says_something(example: Example, pieces: Sequence[tuple[str, bool]]) -> bool:
    if example.messages:  # whose trained text holds what the template writes around an answer, too
        return any(content.strip() for role, content in example.messages if role == "assistant")
    return any(text.strip() for text, trained in pieces if trained)


def _ids_of(segments: Iterable[Sequence[tuple[str, bool]]], tokenizer: Tokenizer) -> dict[str, list[int]]:
    """Token ids of all that `_placed` compares: each piece of each example, and the pieces of each together."""
    texts = set()
    for pieces in segments:
        texts |= {"".join(text for text, _ in pieces), *(text for text, _ in pieces)}
    return _token_ids(texts, tokenizer)


def _placed(
    pieces: Sequence[tuple[str, bool]], ids_of: Mapping[str, list[int]], tokenizer: Tokenizer
) -> list[list[int]]:
    """Token ids of each piece in its place: those that it adds to the ids of all before it.

    Mostly these are the ids that it has alone.  But some tokenizers (Llama 2's kind) begin whatever they are given with
    a blank, which a piece in its place does not have.  Where no token ends between two pieces, the second has the ids
    that it has alone: what comes before must be what generation is given.
    """
    alone = [ids_of[text] for text, _ in pieces]
    untils = list(accumulate(text for text, _ in pieces))
    if [token for ids in alone for token in ids] == ids_of[untils[-1]]:
        return alone
    together = _token_ids(set(untils), tokenizer)
    placed: list[list[int]] = []
    done: list[int] = []
    for until, by_itself in zip(untils, alone, strict=True):
        ids = together[until]
        placed.append(ids[len(done) :] if ids[: len(done)] == done else by_itself)
        done = done + placed[-1]
    return placed


def _join(
    example: Example,
    pieces: Sequence[tuple[str, bool]],
    ids_of_pieces: Sequence[list[int]],
    start: list[int],
    end: int,
    objective: str,
) -> TokenExample:
    ids: list[int] = []
    trained: list[bool] = []
    if not example.messages:  # a chat's template writes its own start and end tokens; all else gets them here
        is_prompt_empty = not _is_plain(example) and not ids_of_pieces[0]
        ids += start or ([end] if is_prompt_empty else [])  # as in prompt_ids
        trained += [False] * len(ids)
    for (_, is_trained), piece in zip(pieces, ids_of_pieces, strict=True):
        ids += piece
        trained += [is_trained] * len(piece)
    if not example.messages:
        ids.append(end)
        trained.append(True)
    if objective == "jlm":
        trained = [True] * len(ids)
    return TokenExample(tuple(ids), (False, *trained[1:]))


def _token_ids(texts: set[str], tokenizer: Tokenizer) -> dict[str, list[int]]:
    """Token ids of each text, without start or end tokens; one call, since tokenizers are fast in batches."""
    ordered = [text for text in texts if text]
    ids = tokenizer(ordered, add_special_tokens=False)["input_ids"] if ordered else []
    return {"": [], **{text: list(row) for text, row in zip(ordered, ids, strict=True)}}


def _start_ids(tokenizer: Tokenizer) -> list[int]:
    """The start token, if the tokenizer puts one before a text (Llama and Gemma do, GPT-2 does not)."""
    first = list(tokenizer("a")["input_ids"])[:1]
    return first if first and first[0] == tokenizer.bos_token_id else []


def _end_id(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end token, so a completion cannot be ended. Set tokenizer.eos_token.")
    return int(tokenizer.eos_token_id)


def _is_plain(example: Example) -> bool:
    return not example.messages and len(example.segments) == 1


def _windows(whole: TokenExample, seq_len: int) -> list[TokenExample]:
    """Pieces of at most seq_len tokens; each begins with the last token of the one before, which is not trained."""
    starts = range(0, max(1, len(whole) - 1), seq_len - 1)
    pieces = ((whole.ids[at : at + seq_len], whole.trained[at + 1 : at + seq_len]) for at in starts)
    return [TokenExample(ids, (False, *trained)) for ids, trained in pieces]


def _shares(sizes: Sequence[int], total: int) -> list[int]:
    """Splits ``total`` in proportion to ``sizes``, by largest remainder, at least one each where it goes round."""
    exact = [total * size / sum(sizes) for size in sizes]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (shares[i] - exact[i], i))
    for index in by_remainder[: total - sum(shares)]:
        shares[index] += 1
    return shares
