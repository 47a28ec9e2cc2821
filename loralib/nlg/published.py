"""Reads E2E, DART and WebNLG as published by their authors: rows of a linearised input and one text.

The linearisation follows the LoRA paper's experiments (Hu et al. 2021, section 5.4): triples become
``subject : relation : object``, joined by `` | ``; E2E's meaning representations stay as they are.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple
from xml.etree import ElementTree

from ..data.lines import do_not_match, is_text, read_lines, read_text, shown
from ..data.readers import SEPARATOR, Example, meaning_prompt, register_reader
from ..errors import DataError, list_faults

__all__ = ["SEEN_CATEGORIES", "Row", "read_e2e_csv", "read_rows"]

# The categories of WebNLG 2017's training set; its test set has five more, called unseen.
SEEN_CATEGORIES: Final = frozenset(
    "Airport Astronaut Building City ComicsCharacter Food Monument SportsTeam University WrittenWork".split()
)

# Attributes that have different names in the E2E challenge's CSV and in the `||` form.
_CSV_NAMES: Final = {
    "eatType": "Type",
    "priceRange": "price",
    "customerRating": "customer rating",
    "familyFriendly": "family friendly",
}


class Row(NamedTuple):
    """One linearised input and one text for it.

    Attributes:
        context: the input.
        completion: the text.
        seen: whether the row's WebNLG category is in the training set; None for other data sets.
    """

    context: str
    completion: str
    seen: bool | None = None


def read_rows(path: str | Path, format: str) -> list[Row]:
    """Reads a published file, keeping the whitespace around texts.

    Args:
        path: E2E: lines ``meaning representation||text`` (further fields are ignored) or the challenge's CSV with
            columns mr and ref; DART: JSON; WebNLG: JSON or XML.
        format: "e2e", "dart" or "webnlg".

    Returns:
        One row per text, in file order; of WebNLG's texts only those whose comment is "good".

    Raises:
        DataError: the file cannot be read or has another form; all such places are listed.
    """
    readers: dict[str, Callable[[Path], list[Row]]] = {"e2e": _read_e2e, "dart": _read_dart, "webnlg": _read_webnlg}
    return readers[format](Path(path))


def _read_e2e(path: Path) -> list[Row]:
    if path.suffix.lower() == ".csv":
        return read_e2e_csv(read_text(path), str(path))
    rows, faults = [], []
    for number, line in enumerate(read_lines(path), 1):
        fields = line.strip().split(SEPARATOR)
        if len(fields) > 1:
            rows.append(Row(fields[0], fields[1]))
        elif line.strip():
            faults.append(f"{path}:{number}: no `||` in {shown(line)}")
    if faults:
        heading = f"expected `meaning representation||text`, but {do_not_match(len(faults))}"
        raise DataError(list_faults(heading, faults, "Fix or remove the lines."))
    return rows


def read_e2e_csv(text: str, path: str) -> list[Row]:
    """Reads the E2E challenge's CSV (columns mr and ref); see `read_rows`.

    >>> read_e2e_csv('mr,ref\\n"name[The Mill], eatType[pub]",A pub.\\n', "x.csv")
    [Row(context='name : The Mill | Type : pub', completion='A pub.', seen=None)]
    """
    table = csv.DictReader(io.StringIO(text, newline=""))
    if not {"mr", "ref"} <= set(table.fieldnames or ()):
        raise DataError(f"{path} has the columns {', '.join(table.fieldnames or ())}; expected mr and ref.")
    rows, faults = [], []
    for record in table:
        pairs = re.findall(r"\s*([^\[\],]+)\[([^\]]*)\]", record["mr"] or "")
        if pairs and record["ref"] is not None:
            context = " | ".join(f"{_CSV_NAMES.get(name, name)} : {value}" for name, value in pairs)
            rows.append(Row(context, record["ref"]))
        else:
            faults.append(f"{path}:{table.line_num}: {shown(record['mr'] or '')}")
    if faults:
        heading = f"expected mr as `name[value], ...` and ref as text, but {do_not_match(len(faults))}"
        raise DataError(list_faults(heading, faults, "Fix or remove the lines."))
    return rows


def _read_dart(path: Path) -> list[Row]:
    entries = _read_json(path)
    if not isinstance(entries, list):
        raise DataError(f"{path} is not DART's JSON: expected a list of entries at the top level.")

    def rows(entry: Any) -> Iterator[Row]:
        context = " | ".join(
            " : ".join((subject, relation.lower(), object_)) for subject, relation, object_ in entry["tripleset"]
        )
        for annotation in entry["annotations"]:
            yield Row(context, annotation["text"])

    return _all_rows(path, entries, rows, "'tripleset' (lists of three texts) and 'annotations' with 'text'")


def _read_webnlg(path: Path) -> list[Row]:
    text = read_text(path)
    if text.lstrip().startswith("<"):
        return _read_webnlg_xml(path, text)
    value = _read_json(path)
    entries = value.get("entries") if isinstance(value, dict) else None
    if not isinstance(entries, list):
        raise DataError(f"{path} is not WebNLG's JSON: expected an object with a list 'entries' at the top level.")

    def rows(numbered: Any) -> Iterator[Row]:
        (entry,) = numbered.values()
        triples = ((t["subject"], t["property"], t["object"]) for t in entry["modifiedtripleset"])
        context = " | ".join(" : ".join(triple) for triple in triples)
        for lexicalisation in entry["lexicalisations"]:
            if lexicalisation["comment"] == "good":
                yield Row(context, lexicalisation["lex"], entry["category"] in SEEN_CATEGORIES)

    return _all_rows(path, entries, rows, "'category', 'modifiedtripleset' and 'lexicalisations'")


def _read_webnlg_xml(path: Path, text: str) -> list[Row]:
    if "<!ENTITY" in text:  # a few nested ones can expand to gigabytes
        raise DataError(f"{path} defines XML entities, which WebNLG's files do not. Download the file again.")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise DataError(f"{path} is not XML: {error}. Download or save the file again.") from None

    def rows(entry: ElementTree.Element) -> Iterator[Row]:
        triples = [(triple.text or "").split(" | ") for triple in entry.iterfind("modifiedtripleset/mtriple")]
        context = " | ".join(" : ".join((subject, relation, object_)) for subject, relation, object_ in triples)
        for lexicalisation in entry.iterfind("lex"):
            if lexicalisation.get("comment") == "good":
                yield Row(context, lexicalisation.text or "", entry.attrib["category"] in SEEN_CATEGORIES)

    expected = "a category, <modifiedtripleset> of <mtriple> as `subject | property | object`, and <lex>"
    return _all_rows(path, list(root.iter("entry")), rows, expected)


def _all_rows(path: Path, entries: list[Any], rows: Callable[[Any], Iterator[Row]], expected: str) -> list[Row]:
    """Returns the rows of all entries; reports all malformed entries together."""
    result: list[Row] = []
    faults = []
    for number, entry in enumerate(entries, 1):
        try:
            entry_rows = list(rows(entry))
            if not all(is_text(row.context) and is_text(row.completion) for row in entry_rows):
                raise TypeError
            result += entry_rows
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            missing = f"{error} is missing" if isinstance(error, KeyError) else "another form"
            faults.append(f"{path}: entry {number}: {missing}")
    if faults:
        heading = f"expected entries with {expected}, but {len(faults)} of {len(entries)} differ"
        raise DataError(list_faults(heading, faults, "Download the file again, or remove the entries."))
    return result


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        where = f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}"
        raise DataError(f"{where}. Download or save the file again.") from None
    except DataError:
        raise
    except (RecursionError, ValueError):
        what = "JSON nested too deeply, or a number with thousands of digits"
        raise DataError(f"{path}: {what}. Download or save the file again.") from None


def _read_examples(path: Path, format: str) -> list[Example]:
    rows = enumerate(read_rows(path, format), 1)
    return [Example.of(meaning_prompt(row.context), row.completion.strip(), f"{path}:{number}") for number, row in rows]


for _key, _format in (("e2e.csv", "e2e"), ("dart", "dart"), ("webnlg", "webnlg")):
    register_reader(_key, functools.partial(_read_examples, format=_format))
