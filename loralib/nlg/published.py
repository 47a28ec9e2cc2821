"""E2E, DART and WebNLG as their authors publish them, read as rows of a linearised input and one text.

The linearisation is the one of the LoRA paper's experiments (Hu et al. 2021, section 5.4): triples as
``subject : relation : object``, joined by `` | ``; E2E's meaning representations stay as they are.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple
from xml.etree import ElementTree

from ..data.lines import are_not, is_text, read_lines, read_text, shown
from ..errors import DataError, list_faults

__all__ = ["SEEN_CATEGORIES", "SEPARATOR", "Row", "read_e2e_csv", "read_rows"]

SEPARATOR: Final = "||"

# WebNLG 2017's training categories; its test set has five more, called unseen.
SEEN_CATEGORIES: Final = frozenset(
    "Airport Astronaut Building City ComicsCharacter Food Monument SportsTeam University WrittenWork".split()
)

# The E2E challenge's CSV names some attributes otherwise than the `||` form does.
_CSV_NAMES: Final = {
    "eatType": "Type",
    "priceRange": "price",
    "customerRating": "customer rating",
    "familyFriendly": "family friendly",
}


class Row(NamedTuple):
    """One linearised input and one text for it; ``seen`` says whether a WebNLG category was in its training set."""

    context: str
    completion: str
    seen: bool | None = None


def read_rows(path: str | Path, format: str) -> list[Row]:
    """Reads a published file, blanks around texts kept as they are.

    Args:
        path: E2E: lines ``meaning representation||text`` (of further fields nothing is kept) or the challenge's
            CSV with columns mr and ref; DART: its JSON; WebNLG: its JSON or XML.
        format: "e2e", "dart" or "webnlg".

    Returns:
        One row a text, in file order; WebNLG's texts only where their comment is "good".

    Raises:
        DataError: the file cannot be read or does not have that form; all places at once.
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
        heading = f"expected `meaning representation||text`, but {are_not(len(faults))} of that form"
        raise DataError(list_faults(heading, faults, "Mend or remove the lines."))
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
        heading = f"expected mr as `name[value], ...` and ref as text, but {are_not(len(faults))} of that form"
        raise DataError(list_faults(heading, faults, "Mend or remove the lines."))
    return rows


def _read_dart(path: Path) -> list[Row]:
    entries = _read_json(path)
    if not isinstance(entries, list):
        raise DataError(f"{path} is not DART's JSON: expected a list of entries at the top.")

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
        raise DataError(f"{path} is not WebNLG's JSON: expected an object with a list 'entries' at the top.")

    def rows(numbered: Any) -> Iterator[Row]:
        (entry,) = numbered.values()
        triples = ((t["subject"], t["property"], t["object"]) for t in entry["modifiedtripleset"])
        context = " | ".join(" : ".join(triple) for triple in triples)
        for lexicalisation in entry["lexicalisations"]:
            if lexicalisation["comment"] == "good":
                yield Row(context, lexicalisation["lex"], entry["category"] in SEEN_CATEGORIES)

    return _all_rows(path, entries, rows, "'category', 'modifiedtripleset' and 'lexicalisations'")


def _read_webnlg_xml(path: Path, text: str) -> list[Row]:
    if "<!ENTITY" in text:  # a few of them can stand for gigabytes
        raise DataError(f"{path} defines XML entities, which WebNLG's files do not. Fetch the file again.")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise DataError(f"{path} is not XML: {error}. Fetch or save the file again.") from None

    def rows(entry: ElementTree.Element) -> Iterator[Row]:
        triples = [(triple.text or "").split(" | ") for triple in entry.iterfind("modifiedtripleset/mtriple")]
        context = " | ".join(" : ".join((subject, relation, object_)) for subject, relation, object_ in triples)
        for lexicalisation in entry.iterfind("lex"):
            if lexicalisation.get("comment") == "good":
                yield Row(context, lexicalisation.text or "", entry.attrib["category"] in SEEN_CATEGORIES)

    expected = "a category, <modifiedtripleset> of <mtriple> as `subject | property | object`, and <lex>"
    return _all_rows(path, list(root.iter("entry")), rows, expected)


def _all_rows(path: Path, entries: list[Any], rows: Callable[[Any], Iterator[Row]], expected: str) -> list[Row]:
    """Rows of all entries; an entry of another shape is a fault, and all of them are reported together."""
    found: list[Row] = []
    faults = []
    for number, entry in enumerate(entries, 1):
        try:
            made = list(rows(entry))
            if not all(is_text(row.context) and is_text(row.completion) for row in made):
                raise TypeError
            found += made
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            missing = f"{error} is missing" if isinstance(error, KeyError) else "other form"
            faults.append(f"{path}: entry {number}: {missing}")
    if faults:
        heading = f"expected entries with {expected}, but {len(faults)} of {len(entries)} differ"
        raise DataError(list_faults(heading, faults, "Fetch the file again, or remove the entries."))
    return found


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        where = f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}"
        raise DataError(f"{where}. Fetch or save the file again.") from None
    except DataError:
        raise
    except (RecursionError, ValueError):
        what = "JSON nested too deeply, or with a number of thousands of digits"
        raise DataError(f"{path}: {what}. Fetch or save the file again.") from None
