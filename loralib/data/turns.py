"""Converts the turns of a chat, in the names and formats of several tools, to `Turn` values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from ..errors import DataError, did_you_mean
from .examples import Turn
from .fields import FLAGS, json_of, kind_of, text_of
from .lines import is_text, shown

__all__ = ["OTHER_ROLES", "turns_of"]

_ROLES: Final = ("system", "user", "assistant", "tool", "developer")
OTHER_ROLES: Final = {  # names used by other tools and models
    **dict.fromkeys(("human", "customer"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "chatbot", "bard", "bing", "model", "ai"), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response", "tool_response", "ipython"), "tool"),
    "function_call": "assistant",
}


def turns_of(value: Any, name: str) -> list[Turn]:
    """Returns the turns in the field `name`, a list of objects with role and content, or from and value.

    Raises:
        DataError: a turn has another form, or contains something that cannot be trained on.
    """
    value = json_of(value, name)
    if not isinstance(value, list) or not value:
        raise DataError(f"{name!r} must be a list of turns, each with 'role' and 'content' (or 'from' and 'value')")
    return [_turn(turn, f"{name}[{index}]") for index, turn in enumerate(value)]


def _turn(turn: Any, where: str) -> Turn:
    if not isinstance(turn, Mapping):
        raise DataError(f"{where} is {kind_of(turn)}, expected an object with 'role' and 'content'")
    turn = {key: value for key, value in turn.items() if value is not None or key in ("content", "value")}
    keys = ("from", "value") if "from" in turn and "role" not in turn else ("role", "content")
    said = text_of(turn, keys[0], f"{where}.")
    role = OTHER_ROLES.get(said, said)
    near = "" if role in _ROLES else did_you_mean(role.strip().lower(), _ROLES[:3])
    if near:  # other roles are left to the chat template
        raise DataError(f"{where}.{keys[0]} is {role!r}.{near}")
    fields = {key: value for key, value in turn.items() if key not in keys and value not in (None, "", [], {})}
    trained = _flag(fields, role, where)
    calls = _calls(turn.get(keys[1]) if said == "function_call" else None, fields, f"{where}.{keys[1]}")
    if calls:
        fields["tool_calls"] = calls
    wordless = calls and (said == "function_call" or turn.get(keys[1]) is None)
    content = "" if wordless else _content(turn, keys[1], where)
    return Turn(role, content, trained, fields)


def _flag(fields: dict[str, Any], role: str, where: str) -> bool:
    """Removes the flags that say whether a turn is trained from its fields, and returns whether it is."""
    trained = True
    for name in [name for name in fields if name in FLAGS[:-2]]:
        value = fields.pop(name)
        if value not in (0, 1):
            raise DataError(f"{where}.{name} is {value!r}, expected true or false (or 1 or 0)")
        if role != "assistant" and value and name != "weight":
            raise DataError(f"{where}.{name} is true, but only the assistant's turns are trained on")
        trained = trained and bool(value)
    return trained


def _calls(value: Any, fields: dict[str, Any], where: str) -> list[Any]:
    """Returns a turn's tool calls in the form that chat templates expect, with arguments as objects."""
    old = fields.pop("function_call", None)
    calls = json_of(fields.pop("tool_calls", None), where) or []
    for one in (json_of(value, where), json_of(old, where)):
        calls = calls + (one if isinstance(one, list) else [one] if one else [])
    result = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not is_text(function.get("name")):
            raise DataError(
                f"{where}: a tool call is {shown(str(call))}, expected an object with 'name' and 'arguments'"
            )
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = json_of(arguments, f"{where}: arguments of {function['name']}") or {}
        rest = {key: item for key, item in call.items() if key not in ("name", "arguments", "function")}
        result.append({"type": "function", **rest, "function": {**function, "arguments": arguments}})
    return result


def _content(turn: dict[str, Any], key: str, where: str) -> str:
    """Returns a turn's text, joining the texts in a list of parts."""
    parts = turn.get(key)
    if not isinstance(parts, list):
        return text_of(turn, key, f"{where}.")
    for index, part in enumerate(parts):
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if kind != "text" or not is_text(part.get("text") if isinstance(part, Mapping) else part):
            raise DataError(f"{where}.{key}[{index}] is of type {kind!r}, expected text: only text is trained on")
    return "".join(str(part["text"] if isinstance(part, Mapping) else part) for part in parts)
