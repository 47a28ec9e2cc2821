"""Records with a text, or a pair of texts, and a label: reading them, and determining the set of labels.

Labels are either classes or numbers to predict (regression); `Labels.of` decides by their values.
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
# The names of a text, or of two, in GLUE, SNLI and similar data.
_TEXTS: Final = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("sentence",),
)
_NUMBER: Final = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_FIX: Final = "Correct these labels, or remove these rows."


def class_example(
    record: Mapping[str, Any], where: str, *, needs_label: bool, columns: Mapping[str, str]
) -> tuple[Example, str, set[str]]:
    """Returns the example made from a record, the name of the record's form, and the fields that were used.

    Args:
        record: a JSON object, or a row of a table.
        where: its location, for messages.
        needs_label: whether it must have a label.
        columns: the mapping of fields, as given.

    Raises:
        DataError: it has no text or no label, or one of them is unusable.
    """
    wanted, given = ("text", "label") if needs_label else ("text",), record
    names: tuple[str, ...] = ()
    if not {"text", "text_pair"} & record.keys():
        names = next((pair for pair in _TEXTS if record.keys() >= set(pair)), ())
        record = {
            **record,
            **{meaning: record[name] for meaning, name in zip(("text", "text_pair"), names, strict=False)},
        }
    if missing := [name for name in wanted if name not in record]:
        there = ", ".join(map(repr, given)) or "nothing"
        near = "".join(did_you_mean(name, list(given)) for name in missing)
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
    texts = names or (("text",) if pair is None else ("text", "text_pair"))
    shape = f"{', '.join(texts)}{' and label' if label is not None else ''}"
    return Example(segments, (), where, label=label, text_pair=pair), shape, {"text", "text_pair", "label", *names}


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
    """Returns a label as a number, or None; tables may hold numbers as text."""
    if isinstance(label, str):
        return float(label) if _NUMBER.fullmatch(label) else None
    return float(label)


def _name(label: str | float) -> str:
    """Returns a label as the name of a class.

    >>> _name(3), _name(3.0), _name("good")
    ('3', '3', 'good')
    """
    return label if isinstance(label, str) else str(int(label)) if label == int(label) else str(label)


def _whole_name(label: str | float) -> str:
    """Returns a whole number as the name of a class; pandas writes them as 1.0 in a column with gaps.

    >>> _whole_name("1.0"), _whole_name("01")
    ('1', '01')
    """
    name = _name(label)
    return name if name.lstrip("+-").isdecimal() else str(int(float(name)))


@dataclass(frozen=True)
class Labels:
    """The labels that a classifier distinguishes.

    Attributes:
        names: class names, in the order of the model's logits; if empty, the model predicts a number (regression).

    >>> Labels(("bad", "good")).number("good")
    1
    """

    names: tuple[str, ...] = ()

    @property
    def are_numbers(self) -> bool:
        """Whether the labels are numbers to predict instead of classes."""
        return not self.names

    def number(self, label: str | float) -> int | float:
        """Returns the class index of a label, or its value in regression; classes may also be given by index, from 0.

        Raises:
            DataError: there is no such class, or the label is not a number.
        """
        if self.are_numbers:
            value = _number(label)
            if value is None:
                raise DataError(f"{label!r} is not a number")
            return value
        name = _name(label)
        if name in self.names:
            return self.names.index(name)
        if (value := _number(label)) is not None:
            equal = [number for number, each in enumerate(self.names) if _number(each) == value]
            if len(equal) == 1:
                return equal[0]
        if name.isdecimal() and int(name) < len(self.names) and not any(each.isdecimal() for each in self.names):
            return int(name)
        raise DataError(f"there is no label {name!r}.{did_you_mean(name, self.names)}")

    def means_none(self, label: str | float | None) -> bool:
        """Whether this is -1, with which GLUE's test data say that there is no label, and is not one of the classes."""
        return bool(self.names) and label is not None and _number(label) == -1 and "-1" not in self.names

    @classmethod
    def of(cls, train: Sequence[Example], valid: Sequence[Example] = ()) -> Labels:
        """Returns the labels of data; raises DataError, listing everything that is wrong with them.

        Whole numbers are classes, in numerical order; if some numbers are not whole, they are values to predict;
        strings are classes, in alphabetical order.
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
            whole = all(number is not None for number in numbers)
            names = {(_whole_name if whole else _name)(label) for label in labels}
            if {"-1", "0", "2"} <= names:
                unlabelled = [
                    example for example in train if example.label is not None and _name(example.label) == "-1"
                ]
                raise DataError(
                    f"{len(unlabelled):,} of {len(labels):,} training examples have the label -1 beside labels from 0 "
                    f"on, which means 'no label' in SNLI and GLUE (the first: {unlabelled[0].source}). Remove these "
                    "rows; if -1 is a class, give the labels as names."
                )
            found = cls(tuple(sorted(names, key=lambda name: (float(name) if whole else 0.0, name))))
            if len(names) == 1:
                raise DataError(
                    f"all {len(labels):,} training examples have the label {found.names[0]!r}, so there is nothing to "
                    "learn. Add examples with another label."
                )
        found.check(valid, "validation", " that do not occur in the training data")
        return found

    def check(self, examples: Sequence[Example], kind: str, why: str = "") -> None:
        """Raises DataError for examples whose labels are not among these; lists all of them."""
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

    def fit_into(self, head: Labels, checkpoint: str, way: str) -> Labels:
        """Returns the labels of a checkpoint's existing head, which must include these.

        Args:
            head: its labels.
            checkpoint: its name, for messages.
            way: how to get a new head for these labels, for messages.

        Raises:
            ConfigError: it does not; lists all that are missing.
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
                f"{way}, or give data with the head's labels.",
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
