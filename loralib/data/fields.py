"""The fields of records: their names and what these mean, the map that users give, and their values."""

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
    "How",
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
# What a chat template takes besides the turns.
PASSED: Final[tuple[str, ...]] = ("tools", "functions", "documents", "chat_template_kwargs")
_OTHERS: Final = "text text_pair label system history tools documents chosen rejected".split()
_MEANINGS: Final = (*QUESTIONS, *ANSWERS, *CHATS[:2], *_OTHERS)

# Fields that say what the model should see or learn: they are used or refused.
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


class How(NamedTuple):
    """How records become examples.

    Attributes:
        columns: which of their fields are which: ``{"prompt": "question"}``; see `parse_columns`.
        as_chat: whether prompts and completions become chats.
        prompts: whether only prompts are wanted, so that there may be no completion.
        preferences: whether each record holds a chosen and a rejected answer; None: some may.
        classes: whether each record holds a text to classify, and unless only `prompts` are wanted its label.
    """

    columns: Mapping[str, str] = {}
    as_chat: bool = False
    prompts: bool = False
    preferences: bool | None = False
    classes: bool = False


def parse_columns(columns: str | Mapping[str, str | None] | None) -> dict[str, str]:
    r"""Returns a map from what a field means to the name of the field, ``{name}`` in a text, or "" to leave it out.

    >>> parse_columns(r"prompt={title}\n{question},completion=answer,system=")
    {'prompt': '{title}\n{question}', 'completion': 'answer', 'system': ''}

    Raises:
        DataError: an entry is not of this form, or there is no such meaning.
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
    """Returns the flag that gives `more` besides what is given already."""
    text = ",".join(f"{name}={spec}" for name, spec in {**columns, **more}.items()).replace("\n", "\\n")
    return f"--columns '{text}'" if "{" in text or " " in text else f"--columns {text}"


def matters(name: str, value: Any) -> bool:
    """Whether a field says what the model should see or learn, so that it must not be left out without leave."""
    if name in FLAGS:  # of preference and weighted data; a class or a name under such a name is another thing
        return isinstance(value, bool) or (name != "label" and isinstance(value, (int, float)) and value != 1)
    return name in MATTERS


_NAME: Final = re.compile(r"\{([^{}]+)\}")


def named(spec: str) -> list[str]:
    """Returns the fields that a text with ``{name}`` puts together."""
    return _NAME.findall(spec)


def _part(record: Mapping[str, Any], match: re.Match[str]) -> str:
    return "" if record.get(match[1]) is None else text_of(record, match[1])


def mapped(record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Returns the record under the names that `columns` gives its fields."""
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
    """Returns the text of a field; raises DataError, with `prefix` before its name, if it is none."""
    value = record.get(key)
    if not is_text(value):
        raise DataError(f"{prefix}{key} is {kind_of(value) if key in record else 'missing'}, expected text")
    return str(value)


def kind_of(value: object) -> str:
    """Returns what a value from JSON or a table is called in messages."""
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
    """Returns the value of a JSON text, which tables hold in the place of a list."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise DataError(f"{name} is text that is not valid JSON, expected a list: {shown(value)}") from None
