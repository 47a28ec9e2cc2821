"""Reads files of training text or of prompts: E2E lines, JSONL (prompt and completion, chats, text) and plain text.

A reader turns a file into `Example` values and knows nothing about tokenizers; ``tokens.py`` is the next step.
All faults of a file are reported together, each with its line, what was expected and how to fix it.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from ..errors import DataError, did_you_mean, list_faults
from .lines import are_not, is_text, read_lines, read_text, shown

__all__ = [
    "FORMATS",
    "SEPARATOR",
    "Example",
    "Source",
    "as_prompt",
    "draw",
    "group_by_prompt",
    "guess_format",
    "meaning_prompt",
    "parse_source",
    "read_examples",
    "read_prompts",
    "read_records",
    "read_sources",
    "register_reader",
]

FORMATS: Final = ("auto", "e2e", "jsonl", "text", "dart", "webnlg")
SEPARATOR: Final = "||"  # between the meaning representation and the text of an E2E line

_RECORDS: Final = "prompt and completion, messages, or text"
_JSON: Final = "one JSON object per line (or a JSON list of objects) with "
_EXPECTED: Final = {
    "e2e": "lines of the form `meaning representation||text`",
    "jsonl": _JSON + _RECORDS,
    "text": "text",
    "dart": "a JSON list of entries with 'tripleset' and 'annotations'",
    "webnlg": "entries with 'modifiedtripleset' and 'lexicalisations'",
}

Item = TypeVar("Item")


@dataclass(frozen=True)
class Example:
    """One training example as text.

    Attributes:
        segments: pieces of text in order, each with a flag that says whether the model is trained to write it. A
            prompt and its completion are ``((prompt, False), (completion, True))``; plain text is ``((text, True),)``.
        references: every completion the file gives for this prompt, in file order (empty for a chat).
        source: ``file:line``, for error messages.
        messages: (role, content) turns of a chat. The model's own chat template makes its segments when the example
            is tokenized, so a chat has none of its own.

    >>> Example.of("name : The Wharf", "It is The Wharf.").completion
    'It is The Wharf.'
    """

    segments: tuple[tuple[str, bool], ...] = ()
    references: tuple[str, ...] = ()
    source: str = ""
    messages: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, prompt: str, completion: str, source: str = "") -> Example:
        """Returns the example that trains ``completion`` after ``prompt``."""
        return cls(((prompt, False), (completion, True)), (completion,), source)

    @property
    def prompt(self) -> str:
        """The text before the first trained segment (of a chat: the turns before its last answer)."""
        if self.messages:
            return "\n".join(content for _, content in self.messages[: self._last_answer()])
        return "".join(text for text, _ in takewhile(lambda segment: not segment[1], self.segments))

    @property
    def completion(self) -> str:
        """The last trained segment (of a chat: its last answer)."""
        if self.messages:
            return self.messages[self._last_answer()][1]
        return next((text for text, trained in reversed(self.segments) if trained), "")

    def _last_answer(self) -> int:
        return max(index for index, (role, _) in enumerate(self.messages) if role == "assistant")


class Source(NamedTuple):
    """The examples of one file, and how many times each is shown per epoch."""

    examples: list[Example]
    weight: float = 1.0


def read_sources(paths: str | Path | Sequence[str | Path] | Sequence[Source], format: str = "auto") -> list[Source]:
    """Reads one file or several; the string ``path:weight`` sets a file's weight.  What is read already stays as it is.

    Raises:
        DataError: a file cannot be read (see `read_examples`), a weight is not a positive number, or no file is given.
    """
    if isinstance(paths, (str, Path)):
        paths = [paths]
    if not paths:
        raise DataError("no data file given. Give at least one path.")
    sources = []
    for path in paths:
        if not isinstance(path, Source):
            file, weight = parse_source(path) if isinstance(path, str) else (path, 1.0)
            path = Source(read_examples(file, format), weight)
        sources.append(path)
    return sources


def read_examples(path: str | Path, format: str = "auto") -> list[Example]:
    """Reads one file of examples.

    Args:
        path: the file. An E2E file has one ``meaning representation||text`` per line. JSONL has one object per line
            with ``prompt`` and ``completion`` (or ``context`` and ``completion``, as `loralib data convert` writes
            them), ``messages`` (a chat) or ``text``; a .json file may hold these objects in one list. The E2E
            challenge's CSV, DART's JSON and WebNLG's JSON or XML are read once `loralib.nlg` has been imported.
        format: one of `FORMATS`; "auto" goes by the file's name and content. Plain text must be asked for by name,
            since it looks just like an E2E file whose lines lack their ``||``.

    Returns:
        The examples in file order. ``references`` holds all completions of the same prompt. The prompt of a
        meaning representation is its text and a line break.

    Raises:
        DataError: the file is missing, empty or not UTF-8, or lines have another form (all of them are listed).
    """
    path = Path(path).expanduser()
    if format not in FORMATS:
        raise DataError(f"unknown data format {format!r}.{did_you_mean(format, FORMATS)} Known: {', '.join(FORMATS)}.")
    if format == "auto":
        format = guess_format(path)
    key = "e2e.csv" if format == "e2e" and path.suffix.lower() == ".csv" else format
    if key not in _READERS:
        raise DataError(
            f"{path}: the reader for {key} files is in loralib.nlg. Add `import loralib.nlg` to your program."
        )
    examples = _READERS[key](path)
    if not examples:
        raise DataError(f"{path} holds no examples, expected {_EXPECTED[format]}.")
    return _with_references(examples)


def read_prompts(path: str | Path, format: str = "auto") -> list[Example]:
    """Reads the distinct prompts of a file, in order of first appearance; an omitted completion is empty.

    Args:
        path: a file that `read_examples` takes.  Completions may be missing: a file of lines may have no ``||`` at all,
            and a JSON record may hold ``prompt`` alone, or a chat in ``messages`` that ends with a question.
        format: see `read_examples`.

    Raises:
        DataError: as `read_examples`, or a line has no prompt.
    """
    path = Path(path).expanduser()
    if format == "auto":
        format = guess_format(path)
    examples = []
    if format == "jsonl":
        examples = read_records(path, _with_answer, "prompt or messages")
    elif format == "e2e" and path.suffix.lower() not in (".csv", ".json"):
        examples = _bare_prompts(path)
    examples = group_by_prompt(examples or read_examples(path, format))
    faults = [f"{example.source} has no prompt" for example in examples if not example.prompt.strip()]
    if faults:
        raise DataError(list_faults("there is nothing to continue", faults, "Remove these lines or add prompts."))
    return examples


def register_reader(key: str, read: Callable[[Path], list[Example]]) -> None:
    """Adds a reader that `read_examples` calls, for formats whose readers live in another room.

    `key` is one of `FORMATS`, or "e2e.csv" for E2E files whose names end in .csv; `read` keeps file order.
    """
    _READERS[key] = read


def read_records(
    path: Path, complete: Callable[[Any], Any] = lambda record: record, expected: str = _RECORDS
) -> list[Example]:
    """Reads examples, in file order, from lines of JSON, or from a .json file that is one list of records.

    Their references are those of their own record.

    Args:
        path: the file.
        complete: turns each record into one that `read_examples` takes, for instance by filling in an omitted field.
        expected: the fields a record should have, for error messages.

    Raises:
        DataError: as `read_examples`.
    """
    examples, faults = [], []
    listed = _listed(path)
    records = [(f"{path}[{number}]", record) for number, record in enumerate(listed or ())]
    for where, row in _numbered(path, _JSON + expected) if listed is None else records:
        try:
            record = json.loads(row) if listed is None else row
            examples.append(_from_record(complete(record), where))
        except json.JSONDecodeError as error:
            faults.append(f"{where}: not JSON ({error.msg} at column {error.colno}): {shown(row)}")
        except DataError as error:
            faults.append(f"{where}: {error}")
        except (RecursionError, ValueError):
            faults.append(f"{where}: JSON nested too deeply, or with a number of thousands of digits")
    if faults:
        heading = f"expected one JSON object per line with {expected}, but {are_not(len(faults))} of that form"
        raise DataError(list_faults(heading, faults, "Fix or remove them."))
    return examples


def guess_format(path: str | Path) -> str:
    """Returns "e2e", "jsonl", "dart" or "webnlg", judging by a file's name and, for .json, by its content."""
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".json":
        try:
            value = json.loads(read_text(path))
        except (ValueError, RecursionError):  # DataError is a ValueError; the reader will report what is wrong
            return "jsonl"
        if isinstance(value, dict):
            return "webnlg" if "entries" in value else "jsonl"
        first = value[0] if isinstance(value, list) and value else None
        return "jsonl" if isinstance(first, dict) and not {"tripleset", "annotations"} & first.keys() else "dart"
    return {".jsonl": "jsonl", ".ndjson": "jsonl", ".xml": "webnlg"}.get(suffix, "e2e")


def group_by_prompt(examples: Iterable[Example]) -> list[Example]:
    """Keeps the first example of each prompt, in order of first appearance; its references are those of all.

    >>> rows = [Example.of("a", "1"), Example.of("b", "2"), Example.of("a", "3")]
    >>> [(example.prompt, example.references) for example in group_by_prompt(rows)]
    [('a', ('1', '3')), ('b', ('2',))]
    """
    first: dict[str, Example] = {}
    for example in _with_references(list(examples)):
        first.setdefault(example.prompt, example)
    return list(first.values())


def draw(items: Sequence[Item], count: int | None, seed: int, key: Callable[[Item], object]) -> list[Item]:
    """Draws a random sample with as many different keys (for instance an example's prompt) as possible.

    The keys and the items of each key are shuffled; then one item of every key is taken in turn, round after round.  A
    `count` of None, or of more than there are, returns all items in their own order.

    >>> sorted(draw(["a1", "a2", "a3", "b1"], 2, seed=0, key=lambda item: item[0]))[-1]
    'b1'
    """
    if count is None or count >= len(items):
        return list(items)
    generator = random.Random(seed)
    groups: dict[object, list[Item]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    queues = list(groups.values())
    generator.shuffle(queues)
    for queue in queues:
        generator.shuffle(queue)
    rounds = range(max(map(len, queues)))
    return list(islice((queue[number] for number in rounds for queue in queues if number < len(queue)), count))


def parse_source(text: str) -> tuple[Path, float]:
    r"""Splits ``path:weight``; a path alone has weight 1.

    >>> parse_source("data/train.txt:0.5")[1], parse_source(r"C:\data\train.txt")[1]
    (0.5, 1.0)

    Raises:
        DataError: the weight is not a positive finite number.
    """
    path, colon, tail = text.rpartition(":")
    try:
        weight = float(tail) if colon and path else None
    except ValueError:
        weight = None
    if weight is None or Path(text).exists():
        return Path(text), 1.0
    if not 0 < weight < float("inf"):
        raise DataError(f"weight {tail} of {path} is not a positive number. Give for instance {path}:0.5.")
    return Path(path), weight


# --- formats -----------------------------------------------------------------------------------------------------


def _read_e2e(path: Path) -> list[Example]:
    examples, faults = [], []
    for where, line in _numbered(path, _EXPECTED["e2e"]):
        fields = line.split(SEPARATOR)
        if len(fields) == 2:
            examples.append(Example.of(meaning_prompt(fields[0]), fields[1].strip(), where))
        elif len(fields) == 1:
            faults.append(f"{where}: no `||` in {shown(line)}")
        else:
            faults.append(f"{where}: {len(fields) - 1} `||` in {shown(line)}, expected one")
    if faults:
        fix = "Put `||` between the meaning representation and its text, or remove the lines."
        if not examples:
            fix += " For a file of plain text choose the format 'text' (--data_format text)."
        heading = f"expected `meaning representation||text`, but {are_not(len(faults))} of that form"
        raise DataError(list_faults(heading, faults, fix))
    return examples


def _listed(path: Path) -> list[Any] | None:
    """Returns the records of a .json file that is one list or one record; None where it has lines, or is not JSON."""
    if path.suffix.lower() != ".json":
        return None
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError):  # DataError is a ValueError; faults are reported line by line
        return None
    return value if isinstance(value, list) else [value]


def _from_record(record: Any, where: str) -> Example:
    if not isinstance(record, dict):
        raise DataError(f"found {_kind(record)} where an object was expected")
    if "messages" in record:
        return Example(messages=_messages(record["messages"]), source=where)
    if "completion" in record and ("prompt" in record or "context" in record):
        key = "prompt" if "prompt" in record else "context"
        prompt, completion = _text(record, key), _text(record, "completion")
        if key == "context":  # a meaning representation, as in the E2E form
            prompt, completion = meaning_prompt(prompt), completion.strip()
        return Example.of(prompt, completion, where)
    if "text" in record:
        return Example(((_text(record, "text"), True),), (), where)
    known = ("prompt", "completion", "messages", "text")
    keys = ", ".join(map(repr, record)) or "nothing"
    near = "".join(did_you_mean(key, known) for key in record if key not in known)
    raise DataError(f"found {keys}, expected {_RECORDS}.{near}")


def _messages(value: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise DataError("'messages' must be a list of turns, each with 'role' and 'content'")
    turns = []
    for index, turn in enumerate(value):
        if not isinstance(turn, dict):
            raise DataError(f"messages[{index}] is {_kind(turn)}, expected an object with 'role' and 'content'")
        for key, default in _UNUSED.items():
            if turn.get(key, default) not in (default, None, []):
                raise DataError(
                    f"messages[{index}].{key} would be lost: only role and content are used. Write it into the content "
                    "as the model should, or remove it"
                )
        role = _text(turn, "role", f"messages[{index}].")
        near = "" if role in _ROLES else did_you_mean(role.strip().lower(), _ROLES[:3])
        if near:  # the chat template judges other roles
            raise DataError(f"messages[{index}].role is {role!r}.{near}")
        turns.append((role, _text(turn, "content", f"messages[{index}].")))
    if not any(role == "assistant" for role, _ in turns):
        raise DataError("'messages' has no turn with role 'assistant', so there is nothing to train on")
    return tuple(turns)


# Other fields of a turn that a template would write or another trainer would follow, with their neutral values.
_UNUSED: Final = {"tool_calls": None, "function_call": None, "reasoning_content": "", "thinking": "", "weight": 1}
_ROLES: Final = ("system", "user", "assistant", "tool", "developer")


def _read_plain(path: Path) -> list[Example]:
    """Reads the whole file as one document; it is cut into windows later, once its length in tokens is known."""
    return [Example((("\n".join(read_lines(path)), True),), (), f"{path}:1")]


_READERS: Final[dict[str, Callable[[Path], list[Example]]]] = {
    "e2e": _read_e2e,
    "jsonl": read_records,
    "text": _read_plain,
}


# --- prompts alone -------------------------------------------------------------------------------------------------

# A placeholder for the answer to be generated: chat templates write whole turns only. Its tokens are cut off again.
_ANSWER = {"role": "assistant", "content": "-"}


def _bare_prompts(path: Path) -> list[Example]:
    """Returns the lines of a file as prompts, or nothing if any line has ``||`` and so a completion."""
    lines = _numbered(path, "prompts")
    if any(SEPARATOR in line for _, line in lines):
        return []
    return [Example.of(as_prompt(line), "", where) for where, line in lines]


def _with_answer(record: Any) -> Any:
    """Gives a record without a completion an empty one, and a chat without an answer a placeholder."""
    if not isinstance(record, dict):
        return record
    turns = record.get("messages")
    if isinstance(turns, list) and turns:
        last = turns[-1]
        answered = isinstance(last, dict) and last.get("role") == "assistant"
        return record if answered else {**record, "messages": [*turns, _ANSWER]}
    return {"completion": "", **record} if {"prompt", "context"} & record.keys() else record


# --- helpers -----------------------------------------------------------------------------------------------------


def meaning_prompt(meaning: str) -> str:
    r"""Returns the prompt of a meaning representation: its text and a line break.

    >>> meaning_prompt(" name : The Mill ")
    'name : The Mill\n'
    """
    return meaning.strip() + "\n"


def as_prompt(text: str) -> str:
    r"""Ends a meaning representation with a line break, as in training; other text is continued as it is.

    >>> as_prompt("name : The Wharf | area : harbour"), as_prompt("Once upon a time")
    ('name : The Wharf | area : harbour\n', 'Once upon a time')
    """
    return meaning_prompt(text) if " : " in text else text


def _with_references(examples: list[Example]) -> list[Example]:
    references: dict[str, list[str]] = defaultdict(list)
    for example in examples:
        if example.completion and example.prompt and not example.messages:
            references[example.prompt].append(example.completion)
    shared = {prompt: tuple(texts) for prompt, texts in references.items()}
    return [replace(example, references=shared.get(example.prompt, ())) for example in examples]


def _numbered(path: Path, expected: str) -> list[tuple[str, str]]:
    """Returns ``file:line`` and the text of each line that is not blank."""
    return [(f"{path}:{number}", line) for number, line in enumerate(read_lines(path, expected), 1) if line.strip()]


def _text(record: dict[str, Any], key: str, prefix: str = "") -> str:
    value = record.get(key)
    if not is_text(value):
        raise DataError(f"{prefix}{key} is {_kind(value) if key in record else 'missing'}, expected text")
    return str(value)


def _kind(value: object) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "text with half a character (a lone surrogate)",
        bool: "true or false",
        type(None): "null",
    }
    return names.get(type(value), "a number")
