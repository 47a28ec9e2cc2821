"""Splits preference records, in the formats of several tools, into two records each, one per answer.

The results have the forms that `records` can read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple

from ..errors import DataError
from .examples import Example, Turn
from .fields import ANSWERS, CHATS, QUESTIONS, json_of, kind_of
from .lines import shown
from .turns import OTHER_ROLES

__all__ = ["PREFERENCE_FIELDS", "PREFERENCE_FORMS", "TwoRecords", "one_example", "two_records"]

PREFERENCE_FORMS: Final = "prompt, chosen and rejected (or input, preferred_output and non_preferred_output)"
_OPENAI: Final = ("input", "preferred_output", "non_preferred_output")
PREFERENCE_FIELDS: Final = ("chosen", "rejected", *_OPENAI)


class TwoRecords(NamedTuple):
    """Result of `two_records`.

    Attributes:
        chosen, rejected: a record for each answer.
        shape: the form of the record, for display.
        used: fields of the original record that were replaced.
        stands_in: the fields that replace them.
    """

    chosen: dict[str, Any]
    rejected: dict[str, Any]
    shape: str
    used: set[str]
    stands_in: set[str]


def two_records(record: Mapping[str, Any], names: set[str]) -> TwoRecords | None:
    """Returns the two records that a preference record contains; None if it is not one.

    Args:
        record: a JSON object, or a row of a table.
        names: its fields that count.

    Raises:
        DataError: its fields contradict each other.
    """
    if names.issuperset(_OPENAI) and isinstance(asked := json_of(record["input"], "input"), Mapping):
        rest = {name: value for name, value in record.items() if name not in _OPENAI}
        base = {**rest, "prompt": asked.get("messages"), **({"tools": asked["tools"]} if asked.get("tools") else {})}
        chosen, rejected = ({**base, "completion": json_of(record[name], name)} for name in _OPENAI[1:])
        return TwoRecords(chosen, rejected, f"preferences ({', '.join(_OPENAI)})", set(_OPENAI), {"prompt", "tools"})
    if not names.issuperset(("chosen", "rejected")):
        return None
    answers = [_value(record, name) for name in ("chosen", "rejected")]
    chat = next((name for name in CHATS if name in names), None)
    turns = [[answer] if isinstance(answer, Mapping) else answer for answer in answers]
    if chat is not None and record[chat] != record["chosen"] and all(map(_is_an_answer, turns)):  # LLaMA-Factory's form
        fields = {"chosen", "rejected", chat}
        base = {name: value for name, value in record.items() if name not in fields}
        first, second = ({**base, "prompt": json_of(record[chat], chat), "completion": answer} for answer in turns)
        return TwoRecords(first, second, f"preferences ({chat}, and chosen and rejected as turns)", fields, {"prompt"})
    kinds = [kind_of(answer) for answer in answers]
    if kinds[0] != kinds[1] or not isinstance(answers[0], (str, list)):
        raise DataError(
            f"chosen is {kinds[0]}, and rejected is {kinds[1]}; expected both to be text, or both to be lists of turns"
        )
    left = {"chosen", "rejected", *ANSWERS, *CHATS}
    base = {name: value for name, value in record.items() if name not in left}
    used = {"chosen", "rejected", *(name for name in CHATS if name in names and record[name] == record["chosen"])}
    question = next((name for name in QUESTIONS if name in names), None)
    if isinstance(answers[0], list):
        return _of_chats(base, answers, question, used)
    if question is None:
        prompt, *answers = _without_prompt(*answers)
        base, shape = {**base, "prompt": prompt}, "preferences (chosen and rejected, with the same beginning)"
        first, second = ({**base, "completion": answer} for answer in answers)
        return TwoRecords(first, second, shape, used, {"prompt"})
    shape, asked = f"preferences ({question}, chosen and rejected)", record[question]
    if isinstance(asked, str) and asked.strip() and all(answer.startswith(asked) for answer in answers):
        answers = [answer[len(asked) :] for answer in answers]
        shape = f"preferences ({question}, which chosen and rejected repeat)"
    first, second = ({**base, "completion": answer} for answer in answers)
    return TwoRecords(first, second, shape, used, set())


def _value(record: Mapping[str, Any], name: str) -> Any:
    """Returns a field's value; lists of turns may be JSON text, as in tables."""
    value = record[name]
    return json_of(value, name) if isinstance(value, str) and value.lstrip().startswith("[{") else value


def _of_chats(base: dict[str, Any], answers: Sequence[Any], question: str | None, used: set[str]) -> TwoRecords:
    asked = None if question is None else _value(base, question)
    if question == "prompt" and isinstance(asked, list):
        base, shared = {**base, "prompt": asked}, _repeated(asked, *answers)
        answers = [answer[shared:] for answer in answers]
        first, second = ({**base, "completion": answer} for answer in answers)
        return TwoRecords(first, second, "preferences (prompt, chosen and rejected as turns)", used, set())
    rest = {name: value for name, value in base.items() if name != question}
    if question is not None and all(map(_is_an_answer, answers)):
        rest |= {"prompt": [{"role": "user", "content": asked}]}
        first, second = ({**rest, "completion": answer} for answer in answers)
        shape = f"preferences ({question}, and chosen and rejected as turns)"
        return TwoRecords(first, second, shape, {*used, question}, {"prompt"})
    if question is not None:
        said = [turn.get("content", turn.get("value")) for turn in answers[0] if isinstance(turn, Mapping)]
        if not isinstance(asked, str) or asked.strip() not in [str(text).strip() for text in said]:
            raise DataError(
                f"chosen is a whole conversation, but the {question} does not occur in it: {shown(str(asked), 60)}. "
                f"Leave it out: --columns {question}="
            )
        used = {*used, question}
    first, second = ({**rest, "messages": answer} for answer in answers)
    return TwoRecords(first, second, "preferences (chosen and rejected as whole conversations)", used, set())


def _is_an_answer(turns: Any) -> bool:
    """Whether these are turns, of which the first is the assistant's."""
    if not isinstance(turns, list) or not turns or not isinstance(turns[0], Mapping):
        return False
    role = turns[0].get("role", turns[0].get("from"))
    return OTHER_ROLES.get(role, role) == "assistant"


def _repeated(asked: Sequence[Any], *answers: Sequence[Any]) -> int:
    """Returns how many turns at the end of a prompt all answers begin with.

    >>> _repeated(["be brief", "why?"], ["why?", "so"], ["why?", "no"])
    1
    """
    counts = range(min(map(len, (asked, *answers))), 0, -1)
    return next((n for n in counts if all(list(answer[:n]) == list(asked[-n:]) for answer in answers)), 0)


def _without_prompt(chosen: str, rejected: str) -> tuple[str, str, str]:
    r"""Splits off the common beginning of two texts, up to the word in which they differ.

    >>> _without_prompt("Q: Is it?\nA: Yes, it is.", "Q: Is it?\nA: Yesterday.")
    ('Q: Is it?\nA:', ' Yes, it is.', ' Yesterday.')
    """
    shorter = min(len(chosen), len(rejected))
    at = next((n for n in range(shorter) if chosen[n] != rejected[n]), shorter)
    while at and not chosen[at - 1].isspace():
        at -= 1
    at -= at > 0 and chosen[at - 1] == " "  # tokenizers attach a space to the word that follows it
    if not chosen[:at].strip():
        raise DataError("there is no prompt, and chosen and rejected do not have the same beginning. Add a prompt")
    return chosen[:at], chosen[at:], rejected[at:]


def one_example(chosen: Example, rejected: Example) -> Example:
    """Combines a prompt's chosen and rejected examples into one.

    Raises:
        DataError: the answers are equal, or one is empty.
    """
    if chosen.messages:
        start = _turns_in_common(chosen.messages, rejected.messages)
        chosen, rejected = (_answered_from(example, start) for example in (chosen, rejected))
        equal = len(chosen.messages) == len(rejected.messages) == start
    else:
        equal = chosen.completion.strip() == rejected.completion.strip()
    if equal:
        raise DataError("chosen and rejected are identical, so there is nothing to prefer")
    for name, example in (("chosen", chosen), ("rejected", rejected)):
        calls = any(turn.fields.get("tool_calls") for turn in example.messages if turn.trained)
        if not calls and not any(text.strip() for text in example.trained_texts):
            raise DataError(f"{name} has no answer, or an empty one")
    return replace(chosen, rejected=rejected)


def _turns_in_common(a: Sequence[Turn], b: Sequence[Turn]) -> int:
    same = [x[:2] == y[:2] and x.fields == y.fields for x, y in zip(a, b, strict=False)]
    return next((number for number, is_same in enumerate(same) if not is_same), len(same))


def _answered_from(example: Example, start: int) -> Example:
    """Marks turns that both conversations have in common as untrained."""
    turns = [turn._replace(trained=False) if number < start else turn for number, turn in enumerate(example.messages)]
    return replace(example, messages=tuple(turns))
