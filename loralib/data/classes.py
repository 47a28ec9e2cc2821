"""Rows of a text, or of two, and a label: reading them, and what their labels are.

Labels are classes, or numbers to predict (regression), which `Labels.of` tells from their values.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ..errors import ConfigError, DataError, did_you_mean, list_faults
from .examples import Example
from .fields import kind_of, text_of

__all__ = ["CLASSES", "Labels", "class_example"]

CLASSES: Final = "text and label (and text_pair, where two texts are compared)"
_NUMBER: Final = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_FIX: Final = "Correct these labels, or remove these rows."


def class_example(
    record: Mapping[str, Any], where: str, *, needs_label: bool, columns: Mapping[str, str]
) -> tuple[Example, str, set[str]]:
    """Returns the example that a record makes, the name of its form, and the fields that were used.

    Args:
        record: an object of JSON, or a row of a table.
        where: where it is, for messages.
        needs_label: whether it must have one.
        columns: which fields are which, as given.

    Raises:
        DataError: it has no text or no label, or these are of no use.
    """
    wanted = ("text", "label") if needs_label else ("text",)
    if missing := [name for name in wanted if name not in record]:
        there = ", ".join(map(repr, record)) or "nothing"
        near = "".join(did_you_mean(name, list(record)) for name in missing)
        flag = ",".join([*(f"{name}={field}" for name, field in columns.items()), *(f"{n}=FIELD" for n in missing)])
        raise DataError(f"found {there}, expected {' and '.join(wanted)}.{near} To use other fields: --columns {flag}")
    text, pair = text_of(record, "text"), None
    if record.get("text_pair") is not None:
        pair = text_of(record, "text_pair")
    for name, value in (("text", text), ("text_pair", pair)):
        if value is not None and not value.strip():
            raise DataError(f"{name} is empty, so there is nothing to classify")
    label = _label(record["label"]) if "label" in record and (needs_label or record["label"] is not None) else None
    segments = ((text, False),) if pair is None else ((text, False), ("\n", False), (pair, False))
    shape = f"text{', text_pair' if pair is not None else ''}{' and label' if label is not None else ''}"
    return Example(segments, (), where, label=label, text_pair=pair), shape, {"text", "text_pair", "label"}


def _label(value: Any) -> str | float:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        if not math.isfinite(value):
            raise DataError(f"label is {value}, expected a class or a number")
        return value
    if not isinstance(value, str):
        more = "; each row can have only one label" if isinstance(value, (list, dict)) else ""
        raise DataError(f"label is {kind_of(value)}, expected a class (text or a whole number) or a number{more}")
    if not value.strip():
        raise DataError("label is empty, expected a class (text or a whole number) or a number")
    return value.strip()


def _number(label: str | float) -> float | None:
    """Returns a label's value as a number; tables hold numbers as text."""
    if isinstance(label, str):
        return float(label) if _NUMBER.fullmatch(label) else None
    return float(label)


def _name(label: str | float) -> str:
    """Returns a label as the name of a class.

    >>> _name(3), _name(3.0), _name("good")
    ('3', '3', 'good')
    """
    return label if isinstance(label, str) else str(int(label)) if label == int(label) else str(label)


@dataclass(frozen=True)
class Labels:
    """What a classifier tells apart.

    Attributes:
        names: of the classes, in the order of the model's logits; without any, it predicts a number (regression).

    >>> Labels(("bad", "good")).number("good")
    1
    """

    names: tuple[str, ...] = ()

    @property
    def are_numbers(self) -> bool:
        """Whether there are no classes, but numbers to predict."""
        return not self.names

    def number(self, label: str | float) -> int | float:
        """Returns the class of a label, or the number that it is; classes may be given by their places, from 0.

        Raises:
            DataError: there is no such class, or the label is no number.
        """
        if self.are_numbers:
            value = _number(label)
            if value is None:
                raise DataError(f"{label!r} is not a number")
            return value
        name = _name(label)
        if name in self.names:
            return self.names.index(name)
        if name.isdecimal() and int(name) < len(self.names) and not any(each.isdecimal() for each in self.names):
            return int(name)
        raise DataError(f"there is no label {name!r}.{did_you_mean(name, self.names)}")

    @classmethod
    def of(cls, train: Sequence[Example], valid: Sequence[Example] = ()) -> Labels:
        """Returns the labels of data; raises DataError, with everything that is wrong with them.

        Whole numbers are classes, in numerical order; numbers of which some are not whole are to be predicted; texts
        are classes, in alphabetical order.
        """
        labels = [example.label for example in train if example.label is not None]
        numbers = [_number(label) for label in labels]
        some_fractions = any(number is not None and number != int(number) for number in numbers)
        typed = {isinstance(label, str) for label in labels}
        if len(typed) == 2 or (some_fractions and None in numbers):
            raise DataError(_mixed(train))
        if some_fractions:
            found = cls()
        else:
            names = {_name(label) for label in labels}
            whole = all(number is not None for number in numbers)
            found = cls(tuple(sorted(names, key=lambda name: (float(name) if whole else 0.0, name))))
            if len(names) == 1:
                raise DataError(
                    f"all {len(labels):,} training examples have the label {found.names[0]!r}, so there is nothing to "
                    "learn. Add examples with another label."
                )
        found.check(valid, "validation", " that do not occur in the training data")
        return found

    def check(self, examples: Sequence[Example], kind: str, why: str = "") -> None:
        """Refuses examples with labels that are none of these; raises DataError, which lists all of them."""
        unknown: dict[str, tuple[str, int]] = {}
        for example in examples:
            try:
                self.number("" if example.label is None else example.label)
            except DataError as error:
                name = str(example.label)
                unknown[name] = unknown.get(name, (f"{error} The first: {example.source}", 0))
                unknown[name] = (unknown[name][0], unknown[name][1] + 1)
        if unknown:
            faults = [f"{text} ({count:,} example{'s' * (count != 1)})" for text, count in unknown.values()]
            known = "Numbers are predicted." if self.are_numbers else f"The labels are {', '.join(self.names[:20])}."
            raise DataError(list_faults(f"the {kind} data has labels{why}", faults, f"{known} {_FIX}"))

    def fit_into(self, head: Labels, checkpoint: str) -> Labels:
        """Returns the labels of a head that a checkpoint has already, which these must be among.

        Raises:
            ConfigError: they are not; all that are missing are listed.
        """
        plain = all(re.fullmatch(r"LABEL_\d+", name) for name in head.names)
        if not self.are_numbers and head.names and plain and len(self.names) <= len(head.names):
            return Labels((*self.names, *head.names[len(self.names) :]))
        missing = list[str]()
        for name in self.names:
            try:
                head.number(name)
            except DataError:
                missing.append(name)
        if not missing and self.are_numbers == head.are_numbers:
            return head
        has = f"{len(head.names)} labels ({', '.join(head.names[:20])})" if head.names else "one output, a number"
        wants = missing or (["numbers to predict"] if self.are_numbers else list(self.names))
        raise ConfigError(
            list_faults(
                f"the head of {checkpoint} has {has}, but the data has {len(self.names) or 'no'} classes; the head "
                "lacks",
                wants,
                "Give the model as it was before it became a classifier (without a head; one is then made for these "
                "labels), or data with the head's labels.",
            )
        )


def _mixed(examples: Sequence[Example]) -> str:
    kinds: Counter[str] = Counter()
    first: dict[str, str] = {}
    for example in examples:
        if example.label is not None:
            is_text = isinstance(example.label, str) and _number(example.label) is None
            typed = isinstance(example.label, str) and not is_text
            kind = "text" if is_text else "numbers as text" if typed else "numbers"
            kinds[kind] += 1
            first.setdefault(kind, f"the first {example.label!r}: {example.source}")
    faults = [f"{kind}: {count:,} ({first[kind]})" for kind, count in kinds.items()]
    return list_faults("the labels are of different kinds", faults, "Give them all as text, or all as numbers.")
