"""Reads training data or prompts: detects what a file, folder, Hub id or Python value contains, and reads it.

A reader turns data into `Example` values and does not deal with tokenizers; that is the next step (``tokens.py``). All
faults in a file are reported together, each with its line, what was expected and how to fix it.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from ..errors import DataError, did_you_mean, list_faults
from .classes import CLASSES
from .examples import Example, chat_of, meaning_prompt
from .fields import RecordOptions, parse_columns
from .lines import decoded, do_not_match, read_bytes, read_lines, shown, split_lines
from .preferences import PREFERENCE_FORMS
from .records import RECORDS, UnreadableRecord, read_rows
from .tables import (
    columns_of_csv,
    hub_rows,
    is_arrow,
    is_hub_id,
    is_parquet,
    is_table,
    rows_of_arrow,
    rows_of_csv,
    rows_of_table,
)

__all__ = [
    "CLASSIFY",
    "FORMATS",
    "PREFERENCES",
    "SEPARATOR",
    "Columns",
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
    "read_prompts_with",
    "read_sources",
    "read_unlabelled",
    "register_reader",
]

FORMATS: Final = ("auto", "e2e", "jsonl", "csv", "parquet", "arrow", "text", "dart", "webnlg")
PREFERENCES: Final = ("dpo", "orpo")  # objectives that learn from pairs of answers
CLASSIFY: Final = "classify"  # used instead of an objective: labelled texts
SEPARATOR: Final = "||"  # separates the meaning representation from the text in an E2E line

Columns = str | Mapping[str, str | None] | None

_EXPECTED: Final = {
    "e2e": "lines of the form `meaning representation||text`",
    "jsonl": f"one JSON object per line (or a JSON list of objects) with {RECORDS}",
    "csv": f"rows below a header row, with columns {RECORDS}",
    "parquet": f"a Parquet file with columns {RECORDS}",
    "arrow": f"an Arrow file with columns {RECORDS}",
    "text": "text",
    "dart": "a JSON list of entries with 'tripleset' and 'annotations'",
    "webnlg": "entries with 'modifiedtripleset' and 'lexicalisations'",
}

Item = TypeVar("Item")


class Source(NamedTuple):
    """The examples of one file, how often each is shown per epoch, and notes for the user on what was detected."""

    examples: list[Example]
    weight: float = 1.0
    notes: tuple[str, ...] = ()


def read_sources(
    data: Any,
    format: str = "auto",
    *,
    columns: Columns = None,
    as_chat: bool = False,
    objective: str | None = "clm",
    name: str = "data",
) -> list[Source]:
    """Reads training data of any kind.

    Args:
        data: a file, a folder of texts, or the id of a data set on the Hub, optionally with a weight as
            ``path:weight``. Or a list of dicts, a `datasets.Dataset`, a pandas frame, or `Example` values.  Or a list
            of such items; any `Source` in it is kept as it is.
        format: see `read_examples`.
        columns: see `read_examples`.
        as_chat: see `read_examples`.
        objective: the purpose of the data: dpo and orpo need rows with a chosen and a rejected answer, other objectives
            rows without.  None: either.  "classify": labelled texts.
        name: how messages refer to data that are not a file.

    Raises:
        DataError: something cannot be read (see `read_examples`), a weight is not a positive number, or no data are
            given.
    """
    preferences = None if objective is None else objective in PREFERENCES
    options = RecordOptions(parse_columns(columns), as_chat, preferences=preferences, classes=objective == CLASSIFY)
    if isinstance(data, (str, Path, Source)) or is_table(data) or _are_examples(data):
        data = [data]
    if not isinstance(data, Sequence):
        raise DataError(f"{name} is of type {type(data).__name__}, expected {_DATA}")
    if not data:
        raise DataError(f"{name} is empty: no data given. Give at least one path, or {_DATA}.")
    wrong = [
        item for item in data if not (isinstance(item, (str, Path, Source)) or is_table(item) or _are_examples(item))
    ]
    if wrong:
        kinds = " and ".join(sorted({type(item).__name__ for item in data}))
        raise DataError(f"{name} contains {kinds}, expected {_DATA}")
    names = [name if len(data) == 1 else f"{name}[{index}]" for index in range(len(data))]
    sources = [_source(item, format, options, name) for item, name in zip(data, names, strict=True)]
    for source, item, name in zip(sources, data, names, strict=True):
        _require_objective(source, str(item) if isinstance(item, (str, Path)) else name, objective)
    return sources


def _require_objective(source: Source, name: str, objective: str | None) -> None:
    """Refuses preference examples for other objectives, and vice versa; and texts without labels for classification.

    Raises:
        DataError: some examples are of the wrong kind.
    """
    if objective == CLASSIFY:
        if bare := [example for example in source.examples if example.label is None]:
            of_all = f"{len(bare):,} of {len(source.examples):,} examples"
            raise DataError(f"{name}: {of_all} have no label. Set Example.label.")
        return
    wants = source.examples[0].rejected is not None if objective is None else objective in PREFERENCES
    wrong = [example for example in source.examples if (example.rejected is not None) != wants]
    if not wrong:
        return
    place = f" (the first: {wrong[0].source})" if wrong[0].source else ""
    where = f"{name}: {len(wrong):,} of {len(source.examples):,} examples{place} have"
    if objective is None:
        raise DataError(
            f"{where} {'no' if wants else 'a'} rejected answer, unlike the first. Give files of the same kind."
        )
    if wants:
        raise DataError(
            f"{where} no rejected answer, which objective {objective} needs. Give records with {PREFERENCE_FORMS}, or "
            "train with --objective clm."
        )
    raise DataError(
        f"{where} a chosen and a rejected answer, of which objective {objective} would learn only the chosen one. "
        "Train with --objective dpo or orpo, or make examples without `rejected`."
    )


_DATA: Final = (
    "Example values, the path of a file or of a folder of texts, a hub id, a list of dicts, a datasets.Dataset, or a "
    "pandas DataFrame"
)


def _source(item: Any, format: str, options: RecordOptions, name: str) -> Source:
    if isinstance(item, Source):
        return item
    if isinstance(item, (str, Path)):
        path, weight = parse_source(item) if isinstance(item, str) else (item, 1.0)
        return _read(path, format, options)._replace(weight=weight)
    if _are_examples(item):
        return Source([chat_of(example) if options.as_chat and not example.messages else example for example in item])
    form = f"records with {_records(options)}"
    examples, notes = read_rows(rows_of_table(item, name), name, options, form)
    return Source(_some(_with_references(examples), name, form), 1.0, notes)


def _records(options: RecordOptions) -> str:
    if options.classes:
        return "text" if options.prompts else CLASSES
    if options.preferences is None:
        return f"{RECORDS}, or {PREFERENCE_FORMS}"
    return PREFERENCE_FORMS if options.preferences else "prompt or messages" if options.prompts else RECORDS


def _are_examples(item: Any) -> bool:
    return isinstance(item, Sequence) and bool(item) and all(isinstance(one, Example) for one in item)


def read_examples(
    path: str | Path, format: str = "auto", *, columns: Columns = None, as_chat: bool = False
) -> list[Example]:
    """Reads one file of examples.

    Args:
        path: the file, which may be gzip-compressed, a folder of texts, or a Hub id. An E2E file has one ``meaning
            representation||text`` per line. JSONL has one object per line (a .json file may hold a list of them), and
            CSV, TSV, Parquet and Arrow one row per example, with ``prompt`` and ``completion`` (or instruction, input
            and output; question and answer; ``context`` and ``completion``, as written by `loralib data convert`),
            ``messages`` or ``conversations`` (a chat), or ``text``. The E2E challenge's CSV, DART's JSON and WebNLG's
            JSON or XML can be read once `loralib.nlg` has been imported.
        format: one of `FORMATS`; "auto" detects it from the file's content and name. Plain text must be requested by
            name, since it looks like an E2E file whose lines lack their ``||``.
        columns: the mapping of fields, ``{"prompt": "question", "completion": "answer"}`` or
            ``"prompt=question,completion=answer"``. An empty name leaves a field out; a template with ``{name}``
            combines several fields.
        as_chat: whether to turn prompts and completions into chats, to be rendered by the model's chat template.

    Returns:
        The examples in file order. ``references`` holds all completions for the same prompt. The prompt for a meaning
        representation is its text and a line break.

    Raises:
        DataError: the file is missing, empty or not UTF-8, lines have another form (all are listed), or fields would be
            left out that affect what the model sees.
    """
    return _read(path, format, RecordOptions(parse_columns(columns), as_chat)).examples


def read_unlabelled(path: str | Path, format: str = "auto", *, columns: Columns = None) -> list[Example]:
    """Reads texts to classify, in file order; labels are optional.

    Args:
        path: a file of records that `read_examples` can read, with text and optionally text_pair and label.
        format: see `read_examples`.
        columns: see `read_examples`.

    Raises:
        DataError: as for `read_examples`, or a record has no text.
    """
    return _read(path, format, RecordOptions(parse_columns(columns), prompts=True, classes=True)).examples


def read_prompts(
    path: str | Path, format: str = "auto", *, columns: Columns = None, as_chat: bool = False
) -> list[Example]:
    """Reads the distinct prompts of a file, in order of first appearance; an omitted completion is empty.

    Args:
        path: a file that `read_examples` can read.  Completions may be missing: a file of lines may contain no ``||``
            at all, and a record may have only ``prompt``, or a chat in ``messages`` that ends with a question.
        format: see `read_examples`.
        columns: see `read_examples`.
        as_chat: see `read_examples`.

    Raises:
        DataError: as for `read_examples`, or a line has no prompt.
    """
    options = RecordOptions(parse_columns(columns), as_chat, prompts=True)
    examples = group_by_prompt(_read(path, format, options).examples)
    _refuse_empty(examples)
    return examples


def _refuse_empty(examples: Iterable[Example]) -> None:
    """Refuses examples without a prompt to continue."""
    faults = [f"{example.source} has no prompt" for example in examples if not example.prompt.strip()]
    if faults:
        raise DataError(list_faults("there is nothing to continue", faults, "Remove these lines or add prompts."))


def read_prompts_with(
    path: str | Path, field: str, format: str = "auto", *, columns: Columns = None
) -> list[tuple[Example, str]]:
    """Reads the prompts in a file of records, each with the value of an additional field ("" if absent).

    A prompt that occurs with several values of the field is included once for each value.

    Args:
        path: a file of records, such as JSON lines or a table.
        field: the name of the field.
        format: see `read_examples`.
        columns: see `read_examples`.

    Raises:
        DataError: as for `read_prompts`; or the file has no records, no record has the field, or a value is not text.
    """
    path = Path(path).expanduser()
    raw = read_bytes(path, "records")
    format = _guess(path, raw) if format == "auto" else format
    if format not in _ROWS:
        raise DataError(
            f"{path} is read as {format}, which has no fields such as {field!r}. Give a JSON Lines file or a table."
        )
    rows = list(_ROWS[format](raw, path))
    found = [record.get(field) if isinstance(record, Mapping) else None for _, record in rows]
    faults = [
        f"{where}: {field} is {value!r}, expected text"
        for (where, _), value in zip(rows, found, strict=True)
        if value is not None and not isinstance(value, str)
    ]
    if faults:
        raise DataError(list_faults(f"{path} has values of {field!r} that are not text", faults, "Fix these records."))
    if all(value is None for value in found):
        known = dict.fromkeys(str(name) for _, record in rows if isinstance(record, Mapping) for name in record)
        raise DataError(f"no record of {path} has the field {field!r}.{did_you_mean(field, known)}")
    rest = [
        (where, {k: v for k, v in record.items() if k != field} if isinstance(record, Mapping) else record)
        for where, record in rows
    ]
    examples, _ = read_rows(rest, str(path), RecordOptions(parse_columns(columns), prompts=True), _EXPECTED[format])
    groups: dict[str, list[int]] = {}
    for number, value in enumerate(found):
        groups.setdefault(str(value or "").strip(), []).append(number)
    numbered = []
    for value, numbers in groups.items():
        places = {examples[number].source: number for number in numbers}
        kept = group_by_prompt(examples[number] for number in numbers)
        numbered += [(places[example.source], example, value) for example in kept]
    _refuse_empty(example for _, example, _ in numbered)
    return [(example, value) for _, example, value in sorted(numbered, key=lambda each: each[0])]


def register_reader(key: str, read: Callable[[Path], list[Example]]) -> None:
    """Registers a reader that `read_examples` calls, for formats whose readers are elsewhere in the package.

    `key` is one of `FORMATS`, or "e2e.csv" for E2E files whose names end in .csv; `read` keeps file order.
    """
    _READERS[key] = read


# --- detecting formats -----------------------------------------------------------------------------------------------


def guess_format(path: str | Path) -> str:
    """Returns the file's format, one of `FORMATS`, judging by its content and, if that is ambiguous, by its name."""
    path = Path(path)
    return _guess(path, read_bytes(path))


def _guess(path: Path, raw: bytes) -> str:
    suffix = _suffix(path)
    if is_parquet(raw) or is_arrow(raw):
        return "parquet" if is_parquet(raw) else "arrow"
    if suffix in (".parquet", ".arrow"):
        raise DataError(
            f"{path} is not {_KINDS[suffix]} file: it begins with {raw[:8]!r}. Download it or save it again."
        )
    if suffix in (".csv", ".tsv"):
        return "e2e" if {"mr", "ref"} <= set(columns_of_csv(decoded(path, raw), path)) else "csv"
    if suffix == ".json":
        return _kind_of_json(raw)
    return _BY_NAME.get(suffix) or ("jsonl" if _begins_json(raw) else "e2e")


def _suffix(path: Path) -> str:
    """Returns the extension of a file name, ignoring .gz.

    >>> _suffix(Path("a.b.JSONL.gz")), _suffix(Path("a"))
    ('.jsonl', '')
    """
    return Path(path.name.lower().removesuffix(".gz")).suffix


_BY_NAME: Final = {
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), "jsonl"),
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".xml": "webnlg",
    ".md": "text",
}
_KINDS: Final = {".parquet": "a Parquet", ".arrow": "an Arrow"}


def _begins_json(raw: bytes) -> bool:
    """Whether the first nonblank line is JSON, or the beginning of a list or an object."""
    line = next((line for line in raw.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()), b"").strip()
    try:
        return line in (b"[", b"[{", b"{") or isinstance(json.loads(line), (dict, list))
    except (ValueError, RecursionError):
        return False


def _kind_of_json(raw: bytes) -> str:
    try:
        value = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError):  # the reader will report the error
        return "jsonl"
    if isinstance(value, dict):
        return "webnlg" if "entries" in value else "jsonl"
    first = value[0] if isinstance(value, list) and value else None
    return "dart" if isinstance(first, dict) and {"tripleset", "annotations"} & first.keys() else "jsonl"


def _read(path: str | Path, format: str, options: RecordOptions) -> Source:
    """Reads whatever a path or a Hub id refers to."""
    if format not in FORMATS:
        raise DataError(f"unknown data format {format!r}.{did_you_mean(format, FORMATS)} Known: {', '.join(FORMATS)}.")
    path = Path(path).expanduser()
    if path.is_dir():
        return _read_folder(path, format)
    if not path.exists() and is_hub_id(name := path.as_posix()):
        rows: Iterable[tuple[str, Any]] = hub_rows(name)
        form = f"rows with {_records(options)}"
        examples, notes = read_rows(rows, name, options, form)
        return Source(_some(_with_references(examples), name, form), 1.0, notes)
    raw = read_bytes(path, _EXPECTED[_BY_NAME.get(_suffix(path), "e2e") if format == "auto" else format])
    if format == "auto":
        format = _guess(path, raw)
    if format in _ROWS:
        form = _EXPECTED[format].replace(RECORDS, _records(options))
        examples, notes = read_rows(_ROWS[format](raw, path), str(path), options, form)
    else:
        examples, notes = _read_lines_of(path, format, options)
    return Source(_some(_with_references(examples), path, _EXPECTED[format]), 1.0, notes)


def _read_lines_of(path: Path, format: str, options: RecordOptions) -> tuple[list[Example], tuple[str, ...]]:
    """Reads a file of a format without records."""
    if options.columns:
        raise DataError(f"{path} is read as {format}, which has no columns. Leave out columns, or set data_format.")
    if options.classes:
        raise DataError(
            f"{path} is read as {format}, which has no labels. Give .jsonl, .csv, .tsv, .parquet or .arrow with "
            f"{CLASSES}."
        )
    key = "e2e.csv" if format == "e2e" and path.suffix.lower() == ".csv" else format
    if key not in _READERS:
        raise DataError(
            f"{path}: the reader for {key} files is in loralib.nlg. Add `import loralib.nlg` to your program."
        )
    examples = (_bare_prompts(path) if options.prompts and key == "e2e" else []) or _READERS[key](path)
    if options.as_chat:
        if format == "text":
            raise DataError(
                f"{path} is plain text, without prompts and completions that as_chat could turn into chats. Leave "
                "out as_chat."
            )
        examples = [chat_of(example) for example in examples]
    name = _NAMES.get(format, format) + (", as chats" if options.as_chat else "")
    return examples, (f"{path}: {name}, {len(examples):,} example{'s' * (len(examples) != 1)}",)


_NAMES: Final = {
    "e2e": "E2E (meaning representation||text)",
    "text": "plain text",
    "dart": "DART",
    "webnlg": "WebNLG",
}


def _some(examples: list[Example], name: object, expected: str) -> list[Example]:
    if not examples:
        raise DataError(f"{name} contains no examples, expected {expected}.")
    return examples


def _read_folder(path: Path, format: str) -> Source:
    """Reads a folder of plain text files, each of which is one document."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    texts = [file for file in files if file.name.lower().removesuffix(".gz").endswith((".txt", ".md"))]
    if not texts:
        listed = ", ".join([file.name for file in files[:8]] + ["..."] * (len(files) > 8)) or "nothing"
        raise DataError(f"{path} is a directory without texts (.txt, .md): it has {listed}. Name a file in it.")
    others = [file for file in texts if format == "auto" and _has_examples(file)]
    if others:
        raise DataError(
            f"{path} is a directory, and {others[0].name} in it has a line with `||` or JSON, so it is not plain "
            "text. Name the files to train on; to read it as plain text anyway, choose the format 'text' "
            "(--data_format text)."
        )
    if format not in ("auto", "text"):
        raise DataError(f"{path} is a directory, which is read as plain text. Name a file in it.")
    examples = [example for file in texts for example in _read_plain(file)]
    rest = len(files) - len(texts)
    left = [f"{path}: left out, since they are not texts (.txt, .md): {rest:,} files"] if rest else []
    return Source(examples, 1.0, (f"{path}: a folder of plain texts, {len(texts):,} files", *left))


def _has_examples(file: Path) -> bool:
    raw = read_bytes(file, "text")
    line = next((line for line in raw.split(b"\n") if line.strip()), b"")
    return file.suffix.lower() != ".md" and (SEPARATOR.encode() in line or _guess(file, raw) == "jsonl")


def group_by_prompt(examples: Iterable[Example]) -> list[Example]:
    """Keeps the first example for each prompt, in order of first appearance, with the references of all.

    >>> rows = [Example.of("a", "1"), Example.of("b", "2"), Example.of("a", "3")]
    >>> [(example.prompt, example.references) for example in group_by_prompt(rows)]
    [('a', ('1', '3')), ('b', ('2',))]
    """
    first: dict[str, Example] = {}
    for example in _with_references(list(examples)):
        turns = example.messages[: example.last_answer]
        first.setdefault(repr((turns, example.fields)) if turns else example.prompt, example)
    return list(first.values())


def draw(items: Sequence[Item], count: int | None, seed: int, key: Callable[[Item], object]) -> list[Item]:
    """Draws a random sample with as many different keys (for instance, prompts) as possible.

    The keys are shuffled, and so are the items of each key; then one item per key is taken, round after round.  If
    `count` is None, or not below the number of items, all items are returned in their original order.

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
    r"""Splits ``path:weight``; a path without a weight has weight 1.

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
        raise DataError(f"weight {tail} of {path} is not a positive number. Give, for instance, {path}:0.5.")
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
            fix += " For a file of plain text, choose the format 'text' (--data_format text)."
        heading = f"expected `meaning representation||text`, but {do_not_match(len(faults))}"
        raise DataError(list_faults(heading, faults, fix))
    return examples


def _rows_of_json(raw: bytes, path: Path) -> Iterator[tuple[str, Any]]:
    """Yields the records in JSON lines or in a list; a single record may span the whole file."""
    text = decoded(path, raw, _EXPECTED["jsonl"])
    lines = [(number, line) for number, line in enumerate(split_lines(text), 1) if line.strip()]
    first = lines[0][1].strip()
    if first[0] == "[" or (first[0] == "{" and len(lines) > 1 and not _is_json_line(first)):
        try:
            value = json.loads(text, object_pairs_hook=_object)
        except json.JSONDecodeError as error:
            if not _is_json_line(first):
                raise DataError(_why_not_json(path, text, error)) from None
        except _TwiceError as error:
            raise DataError(f"{path}: {error}") from None
        except (RecursionError, ValueError):
            yield f"{path}:{lines[0][0]}", UnreadableRecord(_DEEP)
            return
        else:
            records = value if isinstance(value, list) else [value]
            yield from ((f"{path}[{number}]", record) for number, record in enumerate(records))
            return
    for number, line in lines:
        yield f"{path}:{number}", _record(line)


_DEEP: Final = "JSON nested too deeply, or a number with thousands of digits"


class _TwiceError(ValueError):
    """An object has a duplicate key: JSON parsers would silently keep only the last value."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _TwiceError(f"an object has the key {twice!r} {names.count(twice)} times, expected it once")
    return value


def _record(line: str) -> Any:
    try:
        return json.loads(line, object_pairs_hook=_object)
    except _TwiceError as error:
        return UnreadableRecord(str(error))
    except json.JSONDecodeError as error:
        return UnreadableRecord(f"not JSON ({error.msg} at column {error.colno}): {shown(line)}")
    except (RecursionError, ValueError):
        return UnreadableRecord(_DEEP)


def _is_json_line(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _why_not_json(path: Path, text: str, error: json.JSONDecodeError) -> str:
    at = f"{path}:{error.lineno}: not JSON ({error.msg} at column {error.colno})"
    rest = text.rstrip()[error.pos :]
    if (len(rest) < 2 and rest not in ("]", "}")) or "Unterminated" in error.msg:
        return f"{at}: the file is cut off. Copy or download it again; expected {_EXPECTED['jsonl']}."
    lines = text.split("\n")  # the way JSON counts lines
    line = lines[error.lineno - 1] if error.lineno <= len(lines) else ""
    comma = " The comma before it is one too many." if text[: error.pos].rstrip().endswith(",") else ""
    return f"{at}: {shown(line.strip())}.{comma} Fix it; expected {_EXPECTED['jsonl']}."


def _read_plain(path: Path) -> list[Example]:
    """Reads a whole file as one document; it is cut into windows later, when its length in tokens is known."""
    return [Example((("\n".join(read_lines(path)), True),), (), f"{path}:1")]


_ROWS: Final[dict[str, Callable[[bytes, Path], Iterator[tuple[str, Any]]]]] = {
    "jsonl": _rows_of_json,
    "csv": lambda raw, path: rows_of_csv(decoded(path, raw, _EXPECTED["csv"]), path),
    "parquet": rows_of_arrow,
    "arrow": rows_of_arrow,
}
_READERS: Final[dict[str, Callable[[Path], list[Example]]]] = {"e2e": _read_e2e, "text": _read_plain}


def _bare_prompts(path: Path) -> list[Example]:
    """Returns the lines of a file as prompts; nothing if any line contains ``||`` and so has a completion."""
    lines = _numbered(path, "prompts")
    if any(SEPARATOR in line for _, line in lines):
        return []
    return [Example.of(as_prompt(line), "", where) for where, line in lines]


# --- helpers -----------------------------------------------------------------------------------------------------


def as_prompt(text: str) -> str:
    r"""Ends a meaning representation with a line break, as in training; other text stays unchanged.

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
    """Returns ``file:line`` and the text of each nonblank line."""
    return [(f"{path}:{number}", line) for number, line in enumerate(read_lines(path, expected), 1) if line.strip()]
