"""A record (a JSON object, a row of a table) becomes an `Example`: a chat, a prompt and its completion, or text.

What a record holds is told by the names of its fields.  No field is lost in silence: one that would change what the
model should see is used or refused, any other that is not used is named (see `Account`).
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Final, NamedTuple

from ..errors import DataError, did_you_mean, list_faults
from .lines import are_not, is_text, shown

__all__ = ["RECORDS", "Example", "Fault", "How", "Turn", "chat_of", "meaning_prompt", "parse_columns", "read_rows"]

RECORDS: Final = "prompt and completion, instruction and output, question and answer, messages, conversations, or text"


class Turn(NamedTuple):
    """One turn of a chat.

    Attributes:
        role: "system", "user", "assistant", "tool", or another that the chat template knows.
        content: its text.
        trained: whether an answer is trained; of no meaning for other roles.
        fields: what else the chat template gets: ``tool_calls``, ``reasoning_content``, ...
    """

    role: str
    content: str
    trained: bool = True
    fields: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Example:
    """One training example as text.

    Attributes:
        segments: pieces of text in order, each with a flag that says whether the model is trained to write it. A
            prompt and its completion are ``((prompt, False), (completion, True))``; plain text is ``((text, True),)``.
        references: every completion the file gives for this prompt, in file order (empty for a chat).
        source: ``file:line``, for error messages.
        messages: the turns of a chat; pairs of role and content become `Turn`. The model's own chat template makes its
            segments when the example is tokenized, so a chat has none of its own.
        fields: what else the chat template gets: ``tools``, ``documents``.

    >>> Example.of("name : The Wharf", "It is The Wharf.").completion
    'It is The Wharf.'
    """

    segments: tuple[tuple[str, bool], ...] = ()
    references: tuple[str, ...] = ()
    source: str = ""
    messages: tuple[Turn, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "messages", tuple(Turn(*turn) for turn in self.messages))

    @classmethod
    def of(cls, prompt: str, completion: str, source: str = "") -> Example:
        """Returns the example that trains ``completion`` after ``prompt``."""
        return cls(((prompt, False), (completion, True)), (completion,), source)

    @property
    def prompt(self) -> str:
        """The text before the first trained segment (of a chat: the turns before its last answer)."""
        if self.messages:
            return "\n".join(turn.content for turn in self.messages[: self.last_answer])
        return "".join(text for text, _ in takewhile(lambda segment: not segment[1], self.segments))

    @property
    def completion(self) -> str:
        """The last trained segment (of a chat: its last answer)."""
        if self.messages:
            return "".join(turn.content for turn in self.messages[self.last_answer :][:1])
        return next((text for text, trained in reversed(self.segments) if trained), "")

    @property
    def last_answer(self) -> int:
        """Which turn of a chat is its last answer; the number of turns if there is none, or a question follows it."""
        answers = [index for index, turn in enumerate(self.messages) if turn.role == "assistant" and turn.trained]
        return answers[-1] if answers else len(self.messages)


class How(NamedTuple):
    """How records become examples.

    Attributes:
        columns: which of their fields are which: ``{"prompt": "question"}``; see `parse_columns`.
        as_chat: whether prompts and completions become chats.
        prompts: whether only prompts are wanted, so that there may be no completion.
    """

    columns: Mapping[str, str] = {}
    as_chat: bool = False
    prompts: bool = False


class Fault(str):
    """Stands in the place of a record that could not be read, and says why."""


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
            raise DataError(list_faults(f"columns {columns!r} cannot be read", faults, _COLUMNS_FIX))
        columns = {name.strip(): spec.replace("\\n", "\n").strip(" ") for name, _, spec in parts}
    faults = [
        f"{name!r} is none of {', '.join(_MEANINGS)}.{did_you_mean(name, _MEANINGS)}"
        for name, spec in columns.items()
        if spec and name not in _MEANINGS
    ]
    if faults:
        raise DataError(list_faults("columns has unknown names", faults, _COLUMNS_FIX))
    return {name: spec or "" for name, spec in columns.items()}


def read_rows(rows: Iterable[tuple[str, Any]], name: str, how: How, form: str) -> tuple[list[Example], tuple[str, ...]]:
    """Makes an example of every record.

    Args:
        rows: where each record is, for messages, and the record; or a `Fault`.
        name: what the records are of, for messages.
        how: how to read them.
        form: what the file should hold, for messages.

    Returns:
        The examples, and lines for the user: what was recognised, and which fields are not used.

    Raises:
        DataError: records of another form, or fields that would be lost; all are listed.
    """
    account = Account(name, how)
    examples, faults = [], []
    for where, record in rows:
        try:
            if isinstance(record, Fault):
                raise DataError(str(record))
            examples.append(account.example(record, where))
        except DataError as error:
            faults.append(f"{where}: {error}")
    account.check_columns()
    if faults:
        heading = f"expected {form}, but {are_not(len(faults), account.unit)} of that form"
        raise DataError(list_faults(heading, faults, "Fix or remove them."))
    account.check_fields()
    return examples, account.notes()


class Account:
    """Reads the records of a file, and keeps account of what they hold and which fields are not used."""

    def __init__(self, name: str, how: How) -> None:
        self.name, self.how = name, how
        self.unit = "line" if name.endswith((".jsonl", ".ndjson", ".txt")) else "record"
        self.shapes: Counter[str] = Counter()
        self.records = 0
        self.columns: dict[str, None] = {}  # every field that occurs, in order
        self.unused: Counter[str] = Counter()
        self.refused: dict[tuple[str, str, str], list[str]] = defaultdict(list)  # (field, form, prompt's) -> where

    def example(self, record: Any, where: str) -> Example:
        """Makes an example of a record; raises DataError if it has another form."""
        if not isinstance(record, Mapping):
            raise DataError(f"found {_kind(record)} where an object was expected")
        self.records += 1
        self.columns |= dict.fromkeys(map(str, record))
        record = _mapped(record, self.how.columns)
        example, shape, used = _from_record(record, where, self.how)
        self.shapes[shape] += 1
        text = "\n".join([*(turn.content for turn in example.messages), *(part for part, _ in example.segments)])
        for name, value in record.items():
            if name in used or value is None or value in ("", [], {}) or self.how.columns.get(name) == "":
                continue
            if not _matters(name, value) or (isinstance(value, str) and value.strip() in text):
                self.unused[name] += 1
            else:
                question = next((key for key in _QUESTIONS if key in used), "")
                self.refused[name, shape, question].append(where)
        return example

    def check_columns(self) -> None:
        """Refuses a column map that names what no record has."""
        wanted = {name: _named(spec) or [spec or name] for name, spec in self.how.columns.items()}
        faults = [
            f"{key}={self.how.columns[key]}: no record has {name!r}.{did_you_mean(name, self.columns)}"
            for key, names in wanted.items()
            for name in names
            if name not in self.columns
        ]
        if faults and self.records:
            there = ", ".join(map(repr, self.columns))
            fix = f"The columns are {there}. {_COLUMNS_FIX}"
            raise DataError(list_faults(f"columns does not fit {self.name}", faults, fix))

    def check_fields(self) -> None:
        """Refuses fields that would change what the model should see and that would be lost."""
        faults = [
            f"{name!r} in {len(places):,} of {self.records:,} records (the first: {places[0]}) is no part of {shape}."
            f"{_remedy(name, question, self.how)}"
            for (name, shape, question), places in self.refused.items()
        ]
        if faults:
            names = dict.fromkeys(name for name, _, _ in self.refused)
            fix = f"To train without, leave out by name: {_flag_of(self.how.columns, dict.fromkeys(names, ''))}"
            raise DataError(list_faults(f"{self.name} has fields that would be left out of training", faults, fix))

    def notes(self) -> tuple[str, ...]:
        """Returns lines that say what was recognised and which fields are left out."""
        if not self.records:
            return ()
        kinds = " and ".join(
            f"{shape} ({count:,})" if len(self.shapes) > 1 else shape for shape, count in self.shapes.items()
        )
        notes = [f"{self.name}: {kinds}, {self.records:,} example{'s' * (self.records != 1)}"]
        if self.unused:
            listed = ", ".join(f"{name} (in {count:,} of {self.records:,})" for name, count in self.unused.items())
            notes.append(f"{self.name}: left out, since it is no part of the text: {listed}")
        return tuple(notes)


_COLUMNS_FIX: Final = (
    "Write what a field means, and its name: prompt=question,completion=answer; `system=` leaves a field out, and "
    "`prompt={context} {question}` joins several."
)
_ANSWERS: Final[tuple[str, ...]] = ("completion", "response", "output", "answer")
_QUESTIONS: Final[tuple[str, ...]] = ("prompt", "question", "query", "instruction", "input", "context")
_CHATS: Final[tuple[str, ...]] = ("messages", "conversations", "conversation")
_SYSTEM: Final[tuple[str, ...]] = ("system", "system_prompt")
_PASSED: Final[tuple[str, ...]] = (
    "tools",
    "functions",
    "documents",
    "chat_template_kwargs",
)  # what a chat template takes besides
_MEANINGS: Final[tuple[str, ...]] = (
    *_QUESTIONS,
    *_ANSWERS,
    *_CHATS[:2],
    "text",
    "system",
    "history",
    "tools",
    "documents",
)

# Fields that say what the model should see or learn: they are used or refused.
_MATTERS: Final = {
    *(*_QUESTIONS, *_ANSWERS, *_CHATS, *_SYSTEM, *_PASSED),
    *"history document passage passages contexts knowledge facts".split(),
    *"image images audio audios video videos objects".split(),
    *"chosen rejected prompt_completion prefix suffix".split(),
    *"reasoning reasoning_content thinking thought thoughts cot rationale chain_of_thought".split(),
    *"tool_calls function_call function_calls tool_choice".split(),
}
_FLAGS: Final = ("weight", "train", "training", "trained", "loss", "label", "mask")


def _matters(name: str, value: Any) -> bool:
    """Whether a field says what the model should see or learn, so that it must not be left out without leave."""
    if name in _FLAGS:  # of preference and weighted data; a class or a name under such a name is another thing
        return isinstance(value, bool) or (name != "label" and isinstance(value, (int, float)) and value != 1)
    return name in _MATTERS


def _remedy(name: str, question: str, how: How) -> str:
    if name in ("chosen", "rejected"):
        flag = _flag_of(how.columns, {"completion": "chosen", "rejected": ""})
        return f" This is preference data; to train on the chosen answers: {flag}"
    if name in (*_SYSTEM, "history", *_PASSED) and question and not how.as_chat:
        return " --as_chat makes a chat of it, which has a place for it."
    if question and name in (*_QUESTIONS, "document", "passage"):
        parts = (question, name) if name == "input" else (name, question)
        joined = "\n".join(f"{{{part}}}" for part in parts)
        return f" To make it a part of the {question}: {_flag_of(how.columns, {question: joined})}"
    return ""


def _flag_of(columns: Mapping[str, str], more: Mapping[str, str]) -> str:
    """Returns the flag that gives `more` besides what is given already."""
    text = ",".join(f"{name}={spec}" for name, spec in {**columns, **more}.items()).replace("\n", "\\n")
    return f"--columns '{text}'" if "{" in text or " " in text else f"--columns {text}"


_NAME: Final = re.compile(r"\{([^{}]+)\}")


def _named(spec: str) -> list[str]:
    return _NAME.findall(spec)


def _part(record: Mapping[str, Any], match: re.Match[str]) -> str:
    return "" if record.get(match[1]) is None else _text(record, match[1])


def _mapped(record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Returns the record under the names that `columns` gives its fields."""
    taken = {name for spec in columns.values() for name in _named(spec) or [spec]}
    result = {str(name): value for name, value in record.items() if name not in taken and name not in columns}
    for meaning, spec in columns.items():
        names = _named(spec)
        if names:
            result[meaning] = re.sub(_NAME, functools.partial(_part, record), spec)
        elif spec and spec in record:
            result[meaning] = record[spec]
        if spec and meaning in record and meaning not in taken:
            result[f"{meaning} (of the file)"] = record[meaning]
    return result


# --- the forms of a record -----------------------------------------------------------------------------------------

_ALPACA: Final = (
    "Below is an instruction that describes a task{0}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{1}\n\n{2}### Response:\n"
)
_ALPACA_INPUT: Final = ", paired with an input that provides further context"


def _from_record(record: dict[str, Any], where: str, how: How) -> tuple[Example, str, set[str]]:
    """Returns the example, the name of its form, and the fields that were used."""
    present = {name for name, value in record.items() if value is not None}
    for names in (present, set(record)):  # a table has null where a row lacks a field
        for read in (_chat, _pair, _plain):
            found = read(record, names, where, how)
            if found is not None:
                return found
    known = (*_QUESTIONS, *_ANSWERS, *_CHATS, "text")
    keys = ", ".join(map(repr, record)) or "nothing"
    near = "".join(did_you_mean(key, known) for key in record if key not in known)
    question = next((name for name in _QUESTIONS if name in names), None)
    more = f" {question!r} has no {', '.join(_ANSWERS[:-1])} or {_ANSWERS[-1]}." if question else ""
    more += _remedy("chosen", "", how) if "chosen" in record else " Name other fields with --columns." if record else ""
    expected = "prompt or messages" if how.prompts else RECORDS
    raise DataError(f"found {keys}, expected {expected}.{near}{more}")


def _chat(record: dict[str, Any], names: set[str], where: str, how: How) -> tuple[Example, str, set[str]] | None:
    key = next((key for key in _CHATS if key in names), None)
    if key is not None:
        turns = _turns(record[key], key)
        shape = f"chat ({key})" if key == "messages" else f"ShareGPT chat ({key})"
        used = {key}
    elif isinstance(record.get("prompt"), list) and ({"completion", "response"} & names or how.prompts):
        answer = next((name for name in _ANSWERS if name in names), None)
        given = [turn._replace(trained=False) for turn in _turns(record["prompt"], "prompt")]
        turns, shape, used = given, "chat (prompt and completion as turns)", {"prompt"}
        if answer is not None:
            used.add(answer)
            value = record[answer]
            turns = turns + (
                _turns(value, answer) if isinstance(value, list) else [Turn("assistant", _text(record, answer))]
            )
    else:
        return None
    system = next((name for name in _SYSTEM if name in names), None)
    if system is not None and _text(record, system).strip():
        used.add(system)
        if turns[0].role != "system":
            turns = [Turn("system", record[system]), *turns]
        elif turns[0].content.strip() != record[system].strip():
            raise DataError(f"{system!r} and the first turn of {key!r} are two system prompts. Remove one")
    if how.prompts and turns[-1].role != "assistant":  # the answer that is wanted comes after the last turn
        turns = [turn._replace(trained=False) for turn in turns]
    if not how.prompts and not any(turn.role == "assistant" and turn.trained for turn in turns):
        raise DataError(f"{key or 'completion'!r} has no turn with role 'assistant' to train on")
    return Example((), (), where, tuple(turns), _passed(record, used)), shape, used


def _pair(record: dict[str, Any], names: set[str], where: str, how: How) -> tuple[Example, str, set[str]] | None:
    answers = [name for name in _ANSWERS if name in names]
    question = next((name for name in _QUESTIONS if name in names), None)
    if (
        question is None
        or not (answers or how.prompts)
        or (question == "context" and answers not in (["completion"], []))
    ):
        return None
    if len(answers) > 1:
        listed = " and ".join(map(repr, answers))
        raise DataError(f"found {listed}, expected one answer. Choose: --columns completion={answers[0]}")
    answer = answers[0] if answers else None
    prompt = _text(record, question)
    completion = _text(record, answer) if answer else ""
    used = {question, *answers}
    if question == "instruction":
        extra = next((name for name in ("input", "context") if name in names), None)
        used |= {extra} if extra else set()
        more = _text(record, extra).strip() if extra else ""
        shape = f"Alpaca ({', '.join(name for name in (question, extra, answer) if name)})"
        asked = prompt.strip() + (f"\n{more}" if more else "")
        prompt = _ALPACA.format(
            _ALPACA_INPUT if more else "", prompt.strip(), f"### Input:\n{more}\n\n" if more else ""
        )
    else:
        shape = f"{question} and {answer}" if answer else question
        asked = prompt
        if question == "context":
            prompt, completion = meaning_prompt(prompt), completion.strip()
        elif (
            (question, answer) not in (("prompt", "completion"), ("prompt", None))
            and prompt.strip()
            and not prompt[-1].isspace()
        ):
            prompt += "\n"
    if not how.as_chat:
        return Example.of(prompt, completion, where), shape, used
    history = _history(record.get("history"))
    turns = [*history, Turn("user", asked.strip()), *([Turn("assistant", completion.strip())] if answer else [])]
    for name in _SYSTEM:
        if name in names and _text(record, name).strip():
            turns.insert(0, Turn("system", record[name]))
            used.add(name)
    used.add("history")
    return Example((), (), where, tuple(turns), _passed(record, used)), f"{shape}, as a chat", used


def _plain(record: dict[str, Any], names: set[str], where: str, how: How) -> tuple[Example, str, set[str]] | None:
    if "text" not in names:
        return None
    if how.as_chat:
        raise DataError("'text' has no prompt and completion that as_chat could make a chat of")
    return Example(((_text(record, "text"), True),), (), where), "text", {"text"}


def chat_of(example: Example) -> Example:
    """Makes a chat of a prompt and its completion.

    >>> [turn[:2] for turn in chat_of(Example.of("Hi\\n", "Hello")).messages]
    [('user', 'Hi'), ('assistant', 'Hello')]
    """
    turns = (Turn("user", example.prompt.strip()), Turn("assistant", example.completion.strip()))
    return Example((), (), example.source, turns if example.completion else turns[:1])


def _history(value: Any) -> list[Turn]:
    if value in (None, "", []):
        return []
    if not isinstance(value, list) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in value):
        raise DataError(f"history is {_kind(value)}, expected a list of pairs of a question and its answer")
    names = [{"question": question, "answer": answer} for question, answer in value]
    turns = [[Turn("user", _text(pair, "question")), Turn("assistant", _text(pair, "answer"))] for pair in names]
    return [turn for pair in turns for turn in pair]


def _passed(record: dict[str, Any], used: set[str]) -> dict[str, Any]:
    """Returns what the chat template gets besides the turns, and adds it to the fields that are used."""
    passed: dict[str, Any] = {}
    for name in _PASSED:
        value = _json(record.get(name), name)
        used.add(name)
        if value in (None, "", [], {}):
            continue
        if name == "chat_template_kwargs":
            if not isinstance(value, dict):
                raise DataError(f"{name} is {_kind(value)}, expected an object")
            passed |= value
        elif not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
            raise DataError(f"{name} is {_kind(value)}, expected a list of objects")
        elif name == "documents":
            passed[name] = value
        else:
            passed["tools"] = [
                item if "function" in item or "type" in item else {"type": "function", "function": item}
                for item in value
            ]
    return passed


def _json(value: Any, name: str) -> Any:
    """Returns the value of a JSON text, which tables hold in the place of a list."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise DataError(f"{name} is text that is not JSON, expected a list: {shown(value)}") from None


# --- turns -----------------------------------------------------------------------------------------------------------

_ROLES: Final = ("system", "user", "assistant", "tool", "developer")
_OTHER_ROLES: Final = {  # names of other tools and models
    **dict.fromkeys(("human", "customer"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "chatbot", "bard", "bing", "model", "ai"), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response", "tool_response", "ipython"), "tool"),
    "function_call": "assistant",
}


def _turns(value: Any, name: str) -> list[Turn]:
    value = _json(value, name)
    if not isinstance(value, list) or not value:
        raise DataError(f"{name!r} must be a list of turns, each with 'role' and 'content' (or 'from' and 'value')")
    return [_turn(turn, f"{name}[{index}]") for index, turn in enumerate(value)]


def _turn(turn: Any, where: str) -> Turn:
    if not isinstance(turn, Mapping):
        raise DataError(f"{where} is {_kind(turn)}, expected an object with 'role' and 'content'")
    turn = {key: value for key, value in turn.items() if value is not None or key in ("content", "value")}
    keys = ("from", "value") if "from" in turn and "role" not in turn else ("role", "content")
    said = _text(turn, keys[0], f"{where}.")
    role = _OTHER_ROLES.get(said, said)
    near = "" if role in _ROLES else did_you_mean(role.strip().lower(), _ROLES[:3])
    if near:  # the chat template judges other roles
        raise DataError(f"{where}.{keys[0]} is {role!r}.{near}")
    fields = {key: value for key, value in turn.items() if key not in keys and value not in (None, "", [], {})}
    trained = _flag(fields, role, where)
    calls = _calls(turn[keys[1]] if said == "function_call" else None, fields, f"{where}.{keys[1]}")
    if calls:
        fields["tool_calls"] = calls
    wordless = said == "function_call" or (calls and turn.get(keys[1]) is None)
    content = "" if wordless else _content(turn, keys[1], where)
    return Turn(role, content, trained, fields)


def _flag(fields: dict[str, Any], role: str, where: str) -> bool:
    """Takes the flags that say whether a turn is trained from its fields."""
    trained = True
    for name in [name for name in fields if name in _FLAGS[:-2]]:
        value = fields.pop(name)
        if value not in (0, 1):
            raise DataError(f"{where}.{name} is {value!r}, expected true or false (or 1 or 0)")
        if role != "assistant" and value and name != "weight":
            raise DataError(f"{where}.{name} is true, but only turns of the assistant are trained")
        trained = trained and bool(value)
    return trained


def _calls(value: Any, fields: dict[str, Any], where: str) -> list[Any]:
    """Returns the tool calls of a turn in the form that chat templates expect, with arguments as objects."""
    old = fields.pop("function_call", None)
    calls = _json(fields.pop("tool_calls", None), where) or []
    for one in (_json(value, where), _json(old, where)):
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
            arguments = _json(arguments, f"{where}: arguments of {function['name']}") or {}
        rest = {key: item for key, item in call.items() if key not in ("name", "arguments", "function")}
        result.append({"type": "function", **rest, "function": {**function, "arguments": arguments}})
    return result


def _content(turn: dict[str, Any], key: str, where: str) -> str:
    """Returns a turn's text; texts in a list of parts are joined."""
    parts = turn.get(key)
    if not isinstance(parts, list):
        return _text(turn, key, f"{where}.")
    for index, part in enumerate(parts):
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if kind != "text" or not is_text(part.get("text") if isinstance(part, Mapping) else part):
            raise DataError(f"{where}.{key}[{index}] is of type {kind!r}, expected text: only text is trained on")
    return "".join(str(part["text"] if isinstance(part, Mapping) else part) for part in parts)


# --- helpers -----------------------------------------------------------------------------------------------------


def meaning_prompt(meaning: str) -> str:
    r"""Returns the prompt of a meaning representation: its text and a line break.

    >>> meaning_prompt(" name : The Mill ")
    'name : The Mill\n'
    """
    return meaning.strip() + "\n"


def _text(record: Mapping[str, Any], key: str, prefix: str = "") -> str:
    value = record.get(key)
    if not is_text(value):
        raise DataError(f"{prefix}{key} is {_kind(value) if key in record else 'missing'}, expected text")
    return str(value)


def _kind(value: object) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "text with half a character (a lone surrogate)" if not is_text(value) else "text",
        bool: "true or false",
        type(None): "null",
        bytes: "bytes",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), f"a {type(value).__name__}")
