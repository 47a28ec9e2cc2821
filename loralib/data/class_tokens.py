"""Tokenizes labelled texts for a classifier; long texts are truncated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import DataError, list_faults
from .classes import Labels
from .examples import Example
from .tokens import Encoded, TokenExample, draw_sources

__all__ = ["ClassRow", "encode_classes", "load_classes"]


@dataclass(frozen=True)
class ClassRow(TokenExample):
    """A text, or a pair of texts, as tokens with a label; the loss is on the label, not on any token.

    Attributes:
        label: the index of its class, or the number to predict; None: unknown.
        kinds: `token_type_ids`, which tell the two texts apart, if the tokenizer provides them; else empty.
    """

    label: int | float | None = None
    kinds: tuple[int, ...] = ()

    @property
    def prompt(self) -> tuple[int, ...]:
        """All of its tokens."""
        return self.ids

    @property
    def trained_tokens(self) -> int:
        """One, because only the label is predicted."""
        return 1

    @property
    def content(self) -> tuple[object, ...]:
        """Its contents as plain values, for hashing."""
        return self.ids, self.kinds, self.label


def encode_classes(examples: Sequence[Example], tokenizer: Any, limit: int | None, labels: Labels) -> Encoded:
    """Tokenizes texts with their labels, in order; truncates those longer than `limit` tokens, and says how many.

    A pair of texts is joined by the tokenizer if it supports pairs, otherwise by a line break.

    Raises:
        DataError: a text has no tokens.
    """
    pairs = [(example.segments[0][0], example.text_pair) for example in examples]
    whole = _encoded(pairs, tokenizer)
    lengths = [len(ids) for ids, _ in whole]
    longer = [number for number, length in enumerate(lengths) if limit is not None and length > limit]
    for number, cut in zip(longer, _encoded([pairs[number] for number in longer], tokenizer, limit), strict=True):
        whole[number] = cut
    pad, rows, faults = getattr(tokenizer, "pad_token_id", None), list[TokenExample](), list[str]()
    for example, (ids, kinds) in zip(examples, whole, strict=True):
        # Decoders use the last token that is not padding: padding tokens at the end of the text itself would be
        # skipped.
        end = next((at for at in range(len(ids), 0, -1) if ids[at - 1] != pad), 0)
        if not end:
            faults.append(f"{example.source}: its text has no tokens")
        label = None if example.label is None else labels.number(example.label)
        rows.append(ClassRow(tuple(ids[:end]), (False,) * end, label, tuple(kinds[:end])))
    if faults:
        raise DataError(list_faults("there is nothing to classify", faults, "Remove these rows."))
    notes = (
        (f"{len(longer):,} of {len(rows):,} texts are longer than {limit:,} tokens and are truncated",)
        if longer
        else ()
    )
    return Encoded(rows, list(examples), [], lengths, len(rows), limit, notes)


def _encoded(
    pairs: Sequence[tuple[str, str | None]], tokenizer: Any, limit: int | None = None
) -> list[tuple[list[int], list[int]]]:
    """Returns token ids and token types of single texts and pairs."""
    if not pairs:
        return []
    cut: dict[str, Any] = {} if limit is None else {"truncation": True, "max_length": limit}
    result: list[tuple[list[int], list[int]]] = [([], [])] * len(pairs)
    knows_two = _knows_two(tokenizer)
    for has_two in (False, True):
        numbers = [number for number, (_, second) in enumerate(pairs) if (second is not None) == has_two]
        if not numbers:
            continue
        texts = [pairs[number][0] for number in numbers]
        seconds = [pairs[number][1] or "" for number in numbers]
        if has_two and not knows_two:
            texts, seconds = [f"{a}\n{b}" for a, b in zip(texts, seconds, strict=True)], []
        made = tokenizer(texts, seconds, **cut) if has_two and seconds else tokenizer(texts, **cut)
        kinds = made["token_type_ids"] if "token_type_ids" in made else [[]] * len(texts)
        for number, ids, kind in zip(numbers, made["input_ids"], kinds, strict=True):
            result[number] = (list(ids), list(kind))
    return result


def _knows_two(tokenizer: Any) -> bool:
    """Whether a tokenizer separates the two texts of a pair, as those of encoders do; others just concatenate them."""
    sep = getattr(tokenizer, "sep_token_id", None)
    return sep is not None and list(tokenizer("a", "b")["input_ids"]).count(sep) > 0


def load_classes(
    sources: Sequence[Any], tokenizer: Any, *, limit: int | None, labels: Labels, max_samples: int | None, seed: int
) -> Encoded:
    """Tokenizes and samples the texts of one or more weighted sources, like `load_examples`."""
    parts = [encode_classes(source.examples, tokenizer, limit, labels) for source in sources]
    notes = [note for source, part in zip(sources, parts, strict=True) for note in (*source.notes, *part.notes)]
    return replace(draw_sources(sources, parts, max_samples, seed), seq_len=limit, notes=tuple(notes))
