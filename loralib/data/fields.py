"""The fields of records: their names and meanings, the mapping that users give, and their values."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from ..errors import DataError, did_you_mean, list_faults
from .lines import is_text, shown

__all__ = [
    "ANSWERS",
    "CHATS",
    "COLUMNS_FIX",
    "FLAGS",
    "MATTERS",
    "PASSED",
    "QUESTIONS",
    "SYSTEM",
    "RecordOptions",
    "flag_of",
    "json_of",
    "kind_of",
    "mapped",
    "matters",
    "named",
    "parse_columns",
    "text_of",
]

ANSWERS: Final[tuple[str, ...]] = ("completion", "response", "output", "answer")
QUESTIONS: Final[tuple[str, ...]] = ("prompt", "question", "query", "instruction", "input", "context")
CHATS: Final[tuple[str, ...]] = ("messages", "conversations", "conversation")
SYSTEM: Final[tuple[str, ...]] = ("system", "system_prompt")
# Inputs of a chat template other than the turns.
PASSED: Final[tuple[str, ...]] = ("tools", "functions", "documents", "chat_template_kwargs")
_OTHERS: Final = "text text_pair label system history tools documents chosen rejected".split()
_MEANINGS: Final = (*QUESTIONS, *ANSWERS, *CHATS[:2], *_OTHERS)

# Fields that affect what the model sees or learns: they must be used, or the record is refused.
MATTERS: Final = {
    *(*QUESTIONS, *ANSWERS, *CHATS, *SYSTEM, *PASSED),
    *"history document passage passages contexts knowledge facts".split(),
    *"image images audio audios video videos objects".split(),
    *"chosen rejected prefix suffix refusal".split(),
    *"reasoning reasoning_content thinking thought thoughts cot rationale chain_of_thought".split(),
    *"tool_calls function_call function_calls tool_choice".split(),
}
FLAGS: Final = ("weight", "train", "training", "trained", "loss", "label", "mask")
COLUMNS_FIX: Final = (
    "Give the meaning of each field and its name: prompt=question,completion=answer; `system=` leaves a field out, "
    "and `prompt={context} {question}` joins several."
)


class RecordOptions(NamedTuple):
    """How to turn records into examples.

    Attributes:
        columns: maps meanings to fields: ``{"prompt": "question"}``; see `parse_columns`.
        as_chat: whether prompts and completions become chats.
        prompts: whether only prompts are wanted, so that completions may be missing.
        preferences: whether each record has a chosen and a rejected answer; None: some may.
        classes: whether each record has a text to classify and, unless only `prompts` are wanted, a label.
    """

    columns: Mapping[str, str] = {}
    as_chat: bool = False
    prompts: bool = False
    preferences: bool | None = False
    classes: bool = False


def parse_columns(columns: str | Mapping[str, str | None] | None) -> dict[str, str]:
    r"""Returns a map from meanings to field names, ``{name}`` in a template, or "" to leave a field out.

    >>> parse_columns(r"prompt={title}\n{question},completion=answer,system=")
    {'prompt': '{title}\n{question}', 'completion': 'answer', 'system': ''}

    Raises:
        DataError: an entry has another form, or there is no such meaning.
    """
    if columns is None:
        return {}
    if isinstance(columns, str):
        parts = [part.partition("=") for part in re.split(r",(?=[^,={}]*=)", columns)]
        faults = [f"{name.strip()!r} has no `=`" for name, equals, _ in parts if not equals]
        if faults:
            raise DataError(list_faults(f"columns {columns!r} cannot be read", faults, COLUMNS_FIX))
        columns = {name.strip(): spec.replace("\\n", "\n").strip(" ") for name, _, spec in parts}
    faults = [
        f"{name!r} is not one of {', '.join(_MEANINGS)}.{did_you_mean(name, _MEANINGS)}"
        for name, spec in columns.items()
        if spec and name not in _MEANINGS
    ]
    if faults:
        raise DataError(list_faults("columns has unknown meanings", faults, COLUMNS_FIX))
    return {name: spec or "" for name, spec in columns.items()}


def flag_of(columns: Mapping[str, str], more: Mapping[str, str]) -> str:
    """Returns the command-line flag that adds `more` to the columns given already."""
    text = ",".join(f"{name}={spec}" for name, spec in {**columns, **more}.items()).replace("\n", "\\n")
    return f"--columns '{text}'" if "{" in text or " " in text else f"--columns {text}"


def matters(name: str, value: Any) -> bool:
    """Whether a field affects what the model sees or learns, so that it must not be dropped without permission."""
    if name in FLAGS:  # in weighted or preference data; other values, like classes, are something else
        return isinstance(value, bool) or (name != "label" and isinstance(value, (int, float)) and value != 1)
    return name in MATTERS


_NAME: Final = re.compile(r"\{([^{}]+)\}")


def named(spec: str) -> list[str]:
    """Returns the names of the fields that a template with ``{name}`` combines."""
    return _NAME.findall(spec)


def _part(record: Mapping[str, Any], match: re.Match[str]) -> str:
    return "" if record.get(match[1]) is None else text_of(record, match[1])


def mapped(record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Returns the record with its fields renamed as in `columns`."""
    taken = {name for spec in columns.values() for name in named(spec) or [spec]}
    result = {str(name): value for name, value in record.items() if name not in taken and name not in columns}
    for meaning, spec in columns.items():
        names = named(spec)
        if names:
            result[meaning] = re.sub(_NAME, functools.partial(_part, record), spec)
        elif spec and spec in record:
            result[meaning] = record[spec]
        if spec and meaning in record and meaning not in taken:
            result[f"{meaning} (of the file)"] = record[meaning]
    return result


def text_of(record: Mapping[str, Any], key: str, prefix: str = "") -> str:
    """Returns the text of a field; raises DataError, with `prefix` before the name, if it is not text."""
    value = record.get(key)
    if not is_text(value):
        raise DataError(f"{prefix}{key} is {kind_of(value) if key in record else 'missing'}, expected text")
    return str(value)


def kind_of(value: object) -> str:
    """Returns the name that messages use for the type of a value from JSON or a table."""
    names = {
        dict: "an object",
        list: "a list",
        str: "text with half of a character (a lone surrogate)" if not is_text(value) else "text",
        bool: "true or false",
        type(None): "null",
        bytes: "bytes",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), f"a {type(value).__name__}")


def json_of(value: Any, name: str) -> Any:
    """Parses JSON text, which tables may hold instead of a list."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise DataError(f"{name} is text that is not valid JSON, expected a list: {shown(value)}") from None
