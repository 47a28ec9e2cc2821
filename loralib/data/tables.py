"""Reads tables as records: CSV, Parquet and Arrow files, `datasets` from the Hub or in memory, pandas frames."""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ..errors import DataError, MissingDependencyError, did_you_mean, first_line
from .records import UnreadableRecord

__all__ = [
    "hub_rows",
    "is_arrow",
    "is_hub_id",
    "is_parquet",
    "is_table",
    "rows_of_arrow",
    "rows_of_csv",
    "rows_of_table",
]

Rows = Iterator[tuple[str, Any]]

_HUB_ID: Final = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)?(@[\w.\[\]:%+-]+)?")


# --- CSV and TSV -----------------------------------------------------------------------------------------------------


def columns_of_csv(text: str, path: Path) -> list[str]:
    """Returns the column names from the first row of a CSV or TSV file; see `rows_of_csv`."""
    return _checked_names(path, *next(_csv(text, path)))


def rows_of_csv(text: str, path: Path) -> Rows:
    """Yields the rows of a CSV or TSV file as records of text; the first row names the columns.

    The separator is whichever of comma, semicolon, tab and bar splits the first row into the most columns.

    Raises:
        DataError: column names are missing or duplicated.
    """
    rows = _csv(text, path)
    names = _checked_names(path, *next(rows))
    if names[0] == "":
        rows = list(rows)  # type: ignore[assignment]
        if not all(row[0] == str(number) for number, (_, row) in enumerate(rows) if row):
            raise DataError(f"{path}:1: column 1 has no name. Name all columns in the first row.")
        names[0] = "row number"  # the index column written by pandas
    for line, row in rows:
        if isinstance(row, UnreadableRecord):
            yield f"{path}:{line}", row
        elif len(row) != len(names):
            hint = " Is a text that contains a separator missing its quotes?" if len(row) > len(names) else ""
            count = f"{len(row)} field{'s' * (len(row) != 1)}"
            yield f"{path}:{line}", UnreadableRecord(f"{count}, expected {len(names)} ({', '.join(names)}).{hint}")
        else:
            yield f"{path}:{line}", dict(zip(names, row, strict=True))


def _csv(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """Yields each row's first line number, and its fields."""
    first = text[: text.find("\n") + 1] or text
    separators = ("\t", ",", ";", "|") if ".tsv" in path.name.lower() else (",", ";", "\t", "|")
    separator = max(separators, key=lambda mark: len(next(csv.reader([first], delimiter=mark), [])))
    csv.field_size_limit(max(csv.field_size_limit(), min(sys.maxsize, 2**31 - 1)))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    line = 1
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            reason = "a quote is not closed" if "end of data" in str(error) else str(error)
            yield line, UnreadableRecord(f"not a row of CSV: {reason}")
            return
        if row is None:
            return
        if row:
            yield line, row
        line = reader.line_num + 1


def _checked_names(path: Path, line: int, row: Any) -> list[str]:
    if isinstance(row, UnreadableRecord):
        raise DataError(f"{path}:{line}: {row}")
    names = [name.strip() for name in row]
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise DataError(
            f"{path}:{line}: {', '.join(map(repr, twice))} is the name of two columns. Rename one in the first row."
        )
    nameless = [number for number, name in enumerate(names, 1) if not name and number > 1]
    if nameless:
        listed = ", ".join(map(str, nameless))
        raise DataError(f"{path}:{line}: column {listed} has no name. Name all columns in the first row.")
    return names


# --- Parquet and Arrow -----------------------------------------------------------------------------------------------


def is_parquet(raw: bytes) -> bool:
    """Recognises a Parquet file by its first bytes."""
    return raw.startswith(b"PAR1")


def is_arrow(raw: bytes) -> bool:
    """Recognises an Arrow file or stream by its first bytes."""
    return raw.startswith((b"ARROW1", b"\xff\xff\xff\xff"))


def rows_of_arrow(raw: bytes, path: Path) -> Rows:
    """Yields the rows of a Parquet or Arrow file as records.

    Raises:
        DataError: the file is corrupt.
        MissingDependencyError: pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError(f"reading {path} needs pyarrow: pip install 'loralib[data]'") from error
    most = max(2**28, 200 * len(raw))
    number = size = 0
    try:
        buffer = pyarrow.BufferReader(raw)
        if is_parquet(raw):
            batches = pyarrow.parquet.ParquetFile(buffer).iter_batches(batch_size=1024)
        elif raw.startswith(b"ARROW1"):
            file = pyarrow.ipc.open_file(buffer)
            batches = (file.get_batch(index) for index in range(file.num_record_batches))
        else:
            batches = iter(pyarrow.ipc.open_stream(buffer))
        for batch in batches:
            size += batch.nbytes
            if size > most:
                raise DataError(
                    f"{path} unpacks to more than 200 times its size, which text does not. Check its contents."
                )
            for row in batch.to_pylist():
                yield f"{path}[{number}]", {key: without_nulls(cell) for key, cell in row.items()}
                number += 1
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        kind = "Parquet" if is_parquet(raw) else "Arrow"
        raise DataError(f"{path} is a broken {kind} file: {first_line(error)}. Copy or download it again.") from None


def without_nulls(value: Any) -> Any:
    """Returns a value without the nulls that tables fill in for struct fields which a row does not have."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, (list, tuple)) else value


# --- values in Python ------------------------------------------------------------------------------------------------


def is_table(value: Any) -> bool:
    """Recognises a list of dicts, a `datasets.Dataset` or DatasetDict, and tables of pandas, polars or pyarrow."""
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) and len(value) > 0:
        return all(isinstance(item, Mapping) for item in value)
    return _library(value) in ("datasets", "pandas", "polars", "pyarrow")


def rows_of_table(value: Any, name: str = "data") -> Rows:
    """Yields the rows of a table as records.

    Raises:
        DataError: there are several splits, none of which is "train", or it is an endless stream.
    """
    if _library(value) == "datasets":
        if isinstance(value, Mapping):
            if "train" not in value:
                listed = ", ".join(map(repr, value))
                raise DataError(
                    f"{name} has the splits {listed}, but no 'train'. Give one of them: "
                    f"data[{next(iter(value), '')!r}]."
                )
            value = value["train"]
        if not hasattr(value, "__len__"):
            raise DataError(f"{name} is a stream of examples. Give part of it: list(data.take(1000)).")
        rows = _rows_of_dataset(value)
    elif _library(value) == "pandas":
        rows = ({key: _plain(item) for key, item in row.items()} for row in value.to_dict("records"))
    elif _library(value) == "polars":
        rows = iter(value.to_dicts())
    elif _library(value) == "pyarrow":
        rows = iter(value.to_pylist())
    else:
        rows = iter(value)
    for number, row in enumerate(rows):
        cells = row if isinstance(value, (list, tuple)) else {key: without_nulls(cell) for key, cell in row.items()}
        yield f"{name}[{number}]", cells


def _library(value: Any) -> str:
    return type(value).__module__.partition(".")[0]


def _rows_of_dataset(dataset: Any) -> Iterator[Any]:
    """Yields the rows in Arrow's representation, without decoding images and audio."""
    for table in dataset.with_format("arrow").iter(batch_size=1000):
        yield from table.to_pylist()


def _plain(value: Any) -> Any:
    """Converts a cell of a frame to a plain value: NaN becomes None, and arrays become lists."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return None if value != value or _library(value) == "pandas" else value


# --- the Hub ---------------------------------------------------------------------------------------------------------


def is_hub_id(name: str) -> bool:
    """Distinguishes data set ids (``owner/name``, ``owner/name/subset``, either with ``@split``) from paths.

    >>> is_hub_id("openai/gsm8k/main@test"), is_hub_id("data/train.jsonl"), is_hub_id("train.txt")
    (True, False, False)
    """
    path = Path(name)
    known = {".txt", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".xml", ".md"}
    is_path = path.exists() or path.parts[0] in (".", "..", "~") or Path(path.parts[0]).is_dir()
    return bool(_HUB_ID.fullmatch(name)) and path.suffix.lower() not in known and not is_path


def hub_rows(name: str) -> Rows:
    """Yields the rows of a data set on the Hub.

    Raises:
        DataError: there is no such data set, subset or split, or it cannot be read.
        MissingDependencyError: `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(
            f"{name} is not a local file; reading it from the hub needs datasets: pip install 'loralib[data]'"
        ) from error
    id_and_subset, _, split = name.partition("@")
    owner, rest, *subset = id_and_subset.split("/")
    try:
        loaded = datasets.load_dataset(f"{owner}/{rest}", *subset)
    except Exception as error:  # may come from the Hub's client, the network, or any file reader
        raise DataError(
            f"{name} is neither a local file nor a data set that the hub provides: {first_line(error)}. Give "
            "owner/name, owner/name/subset, or either with @split, for instance @train."
        ) from None
    split = split or "train"
    if split not in loaded:
        near = did_you_mean(split, loaded)
        raise DataError(f"{name} has the splits {', '.join(loaded)}, not {split!r}.{near} Give {id_and_subset}@split.")
    yield from rows_of_table(loaded[split], name)
