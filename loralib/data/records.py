"""Turns records (JSON objects, rows of tables) into `Example` values: chats, prompts with completions, or plain text.

The names of its fields tell what a record contains.  No field is lost silently: one that affects what the model sees is
used or refused, and any other unused field is reported (see `RecordReader`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Final

from ..errors import DataError, did_you_mean, list_faults
from .classes import class_example
from .examples import Example, Turn, meaning_prompt
from .fields import (
    ANSWERS,
    CHATS,
    COLUMNS_FIX,
    MATTERS,
    PASSED,
    QUESTIONS,
    SYSTEM,
    RecordOptions,
    flag_of,
    json_of,
    kind_of,
    mapped,
    matters,
    named,
    text_of,
)
from .lines import do_not_match
from .preferences import PREFERENCE_FIELDS, PREFERENCE_FORMS, one_example, two_records
from .turns import turns_of

__all__ = ["RECORDS", "UnreadableRecord", "read_rows"]

RECORDS: Final = "prompt and completion, instruction and output, question and answer, messages, conversations, or text"


class UnreadableRecord(str):
    """Takes the place of a record that could not be read; its text says why."""


def read_rows(
    rows: Iterable[tuple[str, Any]], name: str, options: RecordOptions, form: str
) -> tuple[list[Example], tuple[str, ...]]:
    """Makes an example of every record.

    Args:
        rows: each record with its location, for messages; or an `UnreadableRecord` instead of the record.
        name: the source of the records, for messages.
        options: how to read them.
        form: what the file should contain, for messages.

    Returns:
        The examples, and notes for the user: what was detected, and which fields are unused.

    Raises:
        DataError: records have another form, or fields would be lost; all are listed.
    """
    reader = RecordReader(name, options)
    examples, faults = [], []
    for where, record in rows:
        try:
            if isinstance(record, UnreadableRecord):
                raise DataError(str(record))
            examples.append(reader.example(record, where))
        except DataError as error:
            faults.append(f"{where}: {error}")
    reader.check_columns()
    if faults:
        heading = f"expected {form}, but {do_not_match(len(faults), reader.unit)}"
        raise DataError(list_faults(heading, faults, "Fix or remove them."))
    reader.check_fields()
    return examples, reader.notes()


class RecordReader:
    """Reads the records of a file, and keeps track of their forms and unused fields."""

    def __init__(self, name: str, options: RecordOptions) -> None:
        self.name, self.options = name, options
        self.unit = "line" if name.endswith((".jsonl", ".ndjson", ".txt")) else "record"
        self.shapes: Counter[str] = Counter()
        self.records = 0
        self.columns: dict[str, None] = {}  # all fields that occur, in order
        self.unused: Counter[str] = Counter()
        self.turn_fields: Counter[str] = Counter()
        self.open_ended = 0  # number of chats with turns after their last trained answer
        self.refused: dict[tuple[str, str, str], list[str]] = defaultdict(list)  # (field, form, prompt's) -> locations

    def example(self, record: Any, where: str) -> Example:
        """Makes an example of a record; raises DataError if it has another form."""
        if not isinstance(record, Mapping):
            raise DataError(f"found {kind_of(record)}, expected an object")
        self.records += 1
        self.columns |= dict.fromkeys(map(str, record))
        record = mapped(record, self.options.columns)
        example, shape, used = _from_record(record, where, self.options)
        self.shapes[shape] += 1
        self.open_ended += example.messages[example.last_answer + 1 :] != () and not self.options.prompts
        self.turn_fields.update({name for turn in example.messages for name in turn.fields if name not in MATTERS})
        texts = [text for each in (example, example.rejected) if each is not None for text in _texts(each)]
        for name, value in record.items():
            if name in used or value in _NOTHING:
                continue
            if not matters(name, value) or _is_said(value, texts):
                self.unused[name] += 1
            else:
                question = next((key for key in QUESTIONS if key in used), "")
                self.refused[name, shape, question].append(where)
        return example

    def check_columns(self) -> None:
        """Refuses a column mapping that names fields which no record has."""
        wanted = {name: named(spec) or [spec or name] for name, spec in self.options.columns.items()}
        faults = [
            f"{key}={self.options.columns[key]}: no record has {name!r}.{did_you_mean(name, self.columns)}"
            for key, names in wanted.items()
            for name in names
            if name not in self.columns
        ]
        if faults and self.records:
            there = ", ".join(map(repr, self.columns))
            fix = f"The columns are {there}. {COLUMNS_FIX}"
            raise DataError(list_faults(f"columns does not match {self.name}", faults, fix))

    def check_fields(self) -> None:
        """Refuses fields that would be lost although they affect what the model sees."""
        faults = [
            f"{name!r} in {len(places):,} of {self.records:,} records (the first: {places[0]}) is not part of "
            f"{shape}.{_remedy(name, question, self.options)}"
            for (name, shape, question), places in self.refused.items()
        ]
        if faults:
            names = dict.fromkeys(name for name, _, _ in self.refused)
            fix = (
                "To train without them, leave them out explicitly: "
                f"{flag_of(self.options.columns, dict.fromkeys(names, ''))}"
            )
            raise DataError(list_faults(f"{self.name} has fields that would be left out of training", faults, fix))

    def notes(self) -> tuple[str, ...]:
        """Returns notes on what was detected and which fields are left out."""
        if not self.records:
            return ()
        kinds = " and ".join(
            f"{shape} ({count:,})" if len(self.shapes) > 1 else shape for shape, count in self.shapes.items()
        )
        notes = [f"{self.name}: {kinds}, {self.records:,} example{'s' * (self.records != 1)}"]
        if self.unused:
            listed = ", ".join(f"{name} (in {count:,} of {self.records:,})" for name, count in self.unused.items())
            notes.append(f"{self.name}: left out, since it is not part of the text: {listed}")
        if self.turn_fields:
            listed = ", ".join(f"{name} (in {count:,} of {self.records:,})" for name, count in self.turn_fields.items())
            notes.append(f"{self.name}: left out of turns unless the chat template includes it: {listed}")
        if self.open_ended:
            count = f"in {self.open_ended:,} of {self.records:,} chats"
            notes.append(f"{self.name}: left out, since no trained answer follows them: the last turns {count}")
        return tuple(notes)


def _texts(example: Example) -> list[str]:
    return [*(turn.content.strip() for turn in example.messages), *(part.strip() for part, _ in example.segments)]


_NOTHING: Final[tuple[Any, ...]] = (None, "", "[]", "{}", [], {})


def _is_said(value: Any, texts: list[str]) -> bool:
    """Whether a field repeats part of the text; for short values, only exact matches count, to avoid coincidences."""
    said = value.strip() if isinstance(value, str) else ""
    return said in texts or (len(said) > 20 and any(said in text for text in texts))


def _remedy(name: str, question: str, options: RecordOptions) -> str:
    if name in ("chosen", "rejected"):
        return " This is preference data, for --objective dpo or orpo."
    if name in (*SYSTEM, "history", *PASSED) and question and not options.as_chat:
        return " --as_chat turns it into a chat, which has a place for it."
    if question and name in (*QUESTIONS, "document", "passage"):
        parts = (question, name) if name == "input" else (name, question)
        joined = "\n".join(f"{{{part}}}" for part in parts)
        return f" To make it part of the {question}: {flag_of(options.columns, {question: joined})}"
    return ""


# --- the forms of a record -------------------------------------------------------------------------------------------

_ALPACA: Final = (
    "Below is an instruction that describes a task{0}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{1}\n\n{2}### Response:\n"
)
_ALPACA_INPUT: Final = ", paired with an input that provides further context"


def _from_record(record: dict[str, Any], where: str, options: RecordOptions) -> tuple[Example, str, set[str]]:
    """Returns the example, the name of the record's form, and the fields that were used."""
    if options.classes:
        return class_example(record, where, needs_label=not options.prompts, columns=options.columns)
    if options.preferences is not False:
        found = _preference(record, where, options)
        if found is not None:
            return found
    present = {name for name, value in record.items() if value is not None}
    for names in (present, set(record)):  # tables have null where a row lacks a field
        for read in (_chat, _pair, _plain):
            found = read(record, names, where, options)
            if found is not None:
                return found
    known = (*QUESTIONS, *ANSWERS, *CHATS, "text")
    keys = ", ".join(map(repr, record)) or "nothing"
    near = "".join(did_you_mean(key, known) for key in record if key not in known)
    question = next((name for name in QUESTIONS if name in names), None)
    more = f" {question!r} has no {', '.join(ANSWERS[:-1])} or {ANSWERS[-1]}." if question else ""
    if "chosen" in record:  # a whole chat, or the answer to a prompt
        is_chat = isinstance(record["chosen"], list) and not isinstance(record.get("prompt"), list)
        flag = {"messages" if is_chat else "completion": "chosen", **({"rejected": ""} if "rejected" in record else {})}
        learn = "--objective dpo (or orpo) learns from both answers"
        more = f" This is preference data: {learn}; to train on the chosen ones: {flag_of(options.columns, flag)}"
    elif wrapper := next((key for key, value in record.items() if _holds_records(value)), None):
        more = f" {wrapper!r} contains a list of records: give a file with only that list."
    elif record:
        more += " To use other fields, name them with --columns."
    expected = "prompt or messages" if options.prompts else RECORDS
    raise DataError(f"found {keys}, expected {expected}.{near}{more}")


def _preference(record: dict[str, Any], where: str, options: RecordOptions) -> tuple[Example, str, set[str]] | None:
    present = {name for name, value in record.items() if value is not None}
    two = two_records(record, present)
    if two is None and options.preferences is None:
        return None
    if two is None and (empty := [name for name in PREFERENCE_FIELDS if name in record and record[name] is None]):
        raise DataError(f"{' and '.join(empty)} {'is' if len(empty) == 1 else 'are'} null, expected text or turns")
    if two is None:
        keys = ", ".join(map(repr, record)) or "nothing"
        near = "".join(did_you_mean(key, ("chosen", "rejected")) for key in record)
        raise DataError(
            f"found {keys}, expected {PREFERENCE_FORMS}.{near} To use other fields, name them with --columns."
        )
    plain, sides, used = options._replace(preferences=False), list[Example](), set[str]()
    for name, side in (("chosen", two.chosen), ("rejected", two.rejected)):
        try:
            example, shape, of_side = _from_record(side, where, plain)
        except DataError as error:
            raise DataError(f"{name}: {error}") from None
        sides.append(example)
        used |= of_side
    shape = two.shape + (", as chats" if options.as_chat and shape.endswith("as a chat") else "")
    return one_example(*sides), shape, used - two.stands_in - {"completion", "messages"} | two.used


def _holds_records(value: Any) -> bool:
    """Whether a field, in a file with a single object, contains the actual records."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and any(name in first for name in (*QUESTIONS, *ANSWERS, *CHATS, "text"))


def _chat(
    record: dict[str, Any], names: set[str], where: str, options: RecordOptions
) -> tuple[Example, str, set[str]] | None:
    key = next((key for key in CHATS if key in names), None)
    if key is not None:
        turns = turns_of(record[key], key)
        shape = f"chat ({key})" if key == "messages" else f"ShareGPT chat ({key})"
        used, answered = {key}, turns
    elif isinstance(record.get("prompt"), list) and ({"completion", "response"} & names or options.prompts):
        answer = next((name for name in ANSWERS if name in names), None)
        given = [turn._replace(trained=False) for turn in turns_of(record["prompt"], "prompt")]
        shape, used, answered = "chat (prompt and completion as turns)", {"prompt"}, list[Turn]()
        if answer is not None:
            used.add(answer)
            is_list = isinstance(record[answer], list)
            answered = turns_of(record[answer], answer) if is_list else [Turn("assistant", text_of(record, answer))]
        turns = given + answered
    else:
        return None
    system = next((name for name in SYSTEM if name in names), None)
    if system is not None and text_of(record, system).strip():
        used.add(system)
        if turns[0].role != "system":
            turns = [Turn("system", record[system]), *turns]
        elif turns[0].content.strip() != record[system].strip():
            raise DataError(f"{system!r} and the first turn of {key!r} are both system prompts. Remove one")
    if options.prompts and turns[-1].role != "assistant":  # the answer to be generated follows the last turn
        turns = [turn._replace(trained=False) for turn in turns]
    if not options.prompts and not any(turn.role == "assistant" and turn.trained for turn in turns):
        flagged = any(turn.role == "assistant" for turn in answered)
        why = ": all have weight 0 (or another flag that leaves them out)" if flagged else ""
        raise DataError(f"{repr(key) if key else 'the answer'} has no turn with role 'assistant' to train on{why}")
    return Example((), (), where, tuple(turns), _passed(record, used)), shape, used


def _pair(
    record: dict[str, Any], names: set[str], where: str, options: RecordOptions
) -> tuple[Example, str, set[str]] | None:
    answers = [name for name in ANSWERS if name in names]
    question = next((name for name in QUESTIONS if name in names), None)
    if question is None or not (answers or options.prompts):
        return None
    if question == "context" and answers not in (
        ["completion"],
        [],
    ):  # either a meaning representation, or a question is missing
        return None
    if len(answers) > 1:
        listed = " and ".join(map(repr, answers))
        raise DataError(f"found {listed}, expected one answer. Choose: --columns completion={answers[0]}")
    answer = answers[0] if answers else None
    prompt = text_of(record, question)
    completion = text_of(record, answer) if answer else ""
    used = {question, *answers}
    if question == "instruction":
        extra = next((name for name in ("input", "context") if name in names), None)
        used |= {extra} if extra else set()
        more = text_of(record, extra).strip() if extra else ""
        shape = f"Alpaca ({', '.join(name for name in (question, extra, answer) if name)})"
        asked = prompt.strip() + (f"\n{more}" if more else "")
        given = (_ALPACA_INPUT, f"### Input:\n{more}\n\n") if more else ("", "")
        prompt = _ALPACA.format(given[0], prompt.strip(), given[1])
    else:
        shape = f"{question} and {answer}" if answer else question
        asked = prompt
        if question == "context":
            prompt, completion = meaning_prompt(prompt), completion.strip()
        elif (question, answer) not in (("prompt", "completion"), ("prompt", None)) and prompt == prompt.rstrip():
            prompt += "\n"
    if not options.as_chat:
        return Example.of(prompt, completion, where), shape, used
    history = _history(record.get("history"))
    turns = [*history, Turn("user", asked.strip()), *([Turn("assistant", completion.strip())] if answer else [])]
    for name in SYSTEM:
        if name in names and text_of(record, name).strip():
            turns.insert(0, Turn("system", record[name]))
            used.add(name)
    used.add("history")
    return Example((), (), where, tuple(turns), _passed(record, used)), f"{shape}, as a chat", used


def _plain(
    record: dict[str, Any], names: set[str], where: str, options: RecordOptions
) -> tuple[Example, str, set[str]] | None:
    if "text" not in names:
        return None
    if options.as_chat:
        raise DataError("'text' has no prompt and completion that as_chat could turn into a chat. Leave out as_chat")
    return Example(((text_of(record, "text"), True),), (), where), "text", {"text"}


def _history(value: Any) -> list[Turn]:
    if value in (None, "", []):
        return []
    if not isinstance(value, list) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in value):
        raise DataError(f"history is {kind_of(value)}, expected a list of pairs of question and answer")
    names = [{"question": question, "answer": answer} for question, answer in value]
    turns = [[Turn("user", text_of(pair, "question")), Turn("assistant", text_of(pair, "answer"))] for pair in names]
    return [turn for pair in turns for turn in pair]


def _passed(record: dict[str, Any], used: set[str]) -> dict[str, Any]:
    """Returns the chat template's other inputs, and adds them to the used fields."""
    passed: dict[str, Any] = {}
    for name in PASSED:
        value = json_of(record.get(name), name)
        used.add(name)
        if value in (None, "", [], {}):
            continue
        if name == "chat_template_kwargs":
            if not isinstance(value, dict):
                raise DataError(f"{name} is {kind_of(value)}, expected an object")
            passed |= value
        elif not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
            raise DataError(f"{name} is {kind_of(value)}, expected a list of objects")
        elif name == "documents":
            passed[name] = value
        else:
            passed["tools"] = [
                item if "function" in item or "type" in item else {"type": "function", "function": item}
                for item in value
            ]
    return passed
