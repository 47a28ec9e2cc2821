"""Finds the files of a data set in a directory, and turns their rows into prompts and completions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from ...data import Example, Source
from ...errors import DataError, list_faults
from ..convert import read_formatted
from ..published import Row, read_rows

__all__ = ["Input", "SplitFiles", "as_source", "find_files", "group_inputs", "prompt_of", "read_split"]

# Words by which file names are assigned to a split.
_WORDS: Final = {"train": ("train",), "valid": ("valid", "dev"), "test": ("test",)}
_SUFFIXES: Final = {
    "e2e": (".txt", ".csv", ".jsonl"),
    "dart": (".json", ".jsonl"),
    "webnlg": (".json", ".xml", ".jsonl"),
}
_SAMPLE: Final = Path("examples") / "NLG" / "data" / "e2e"

_HOW_TO_GET: Final = {
    "e2e": "`loralib data e2e data/e2e` fetches the E2E NLG Challenge's data.",
    "dart": "Fetch dart-v1.1.1-full-train.json, ...-dev.json and ...-test.json from "
    "https://github.com/Yale-LILY/dart into data/dart.",
    "webnlg": "Fetch train.json, dev.json and test.json of the WebNLG challenge 2017 (in the data folder of the LoRA "
    "paper's repository, https://github.com/microsoft/LoRA) into data/webnlg.",
}


class SplitFiles(NamedTuple):
    """The three files of a data set."""

    train: Path
    valid: Path
    test: Path


class Input(NamedTuple):
    """One input of the test file: its first row, and the texts of all its rows."""

    row: Row
    references: tuple[str, ...]


def find_files(dataset: str, directory: str | Path | None = None) -> SplitFiles:
    """Finds the training, validation and test file of a data set.

    Args:
        dataset: "e2e", "dart" or "webnlg".
        directory: holds files with train, valid or dev, and test in their names, as published; default:
            ``data/DATASET``, and for E2E the sample in a checkout (``examples/NLG/data/e2e``).

    Raises:
        DataError: no such directory, or a split has no file or several; the message says how to get the data.
    """
    get = _HOW_TO_GET[dataset]
    if directory is None:
        usual = [Path("data") / dataset, *([_SAMPLE] if dataset == "e2e" else [])]
        found = next((path for path in usual if path.is_dir()), None)
        if found is None:
            places = " or ".join(path.as_posix() for path in usual)
            raise DataError(f"there is no data: --data DIR was not given, and there is no {places} here. {get}")
        directory = found
    directory = Path(directory).expanduser()
    if not directory.is_dir():
        raise DataError(f"--data {directory} is not a directory. {get}")
    there = sorted(path for path in directory.iterdir() if path.is_file() and path.suffix.lower() in _SUFFIXES[dataset])
    files: dict[str, Path] = {}
    faults = []
    for split, words in _WORDS.items():
        fitting = [path for path in there if any(word in path.stem.lower() for word in words)]
        # E2E also publishes its test inputs without references.
        fitting = [path for path in fitting if "w_refs" in path.stem] or fitting
        if len(fitting) == 1:
            files[split] = fitting[0]
        elif fitting:
            faults.append(f"{split}: several, {', '.join(path.name for path in fitting)}")
        else:
            faults.append(
                f"{split}: none with {' or '.join(words)} in its name and {' or '.join(_SUFFIXES[dataset])} at its end"
            )
    if faults:
        listed = ", ".join(path.name for path in there[:8]) or "no such files"
        heading = f"{directory} (it has: {listed}) lacks one file for each part of {dataset}"
        raise DataError(list_faults(heading, faults, f"Put exactly one file per part there. {get}"))
    return SplitFiles(**files)


def read_split(path: Path, dataset: str) -> list[Row]:
    """Reads a file of a data set as published, or as `loralib data convert` wrote it.

    Raises:
        DataError: it cannot be read, does not have that data set's form, or has no rows.
    """
    rows = read_formatted(path) if path.suffix.lower() == ".jsonl" else read_rows(path, dataset)
    if not rows:
        raise DataError(f"{path} has no rows. Choose another file.")
    return rows


def group_inputs(rows: Iterable[Row]) -> list[Input]:
    """Groups rows by input, in order of first appearance.

    >>> [found.references for found in group_inputs([Row("a", "1"), Row("b", "2"), Row("a", "3")])]
    [('1', '3'), ('2',)]
    """
    groups: dict[str, tuple[Row, list[str]]] = {}
    for row in rows:
        groups.setdefault(row.context, (row, []))[1].append(row.completion)
    return [Input(row, tuple(texts)) for row, texts in groups.values()]


def prompt_of(context: str, form: str, end: str) -> str:
    r"""Formats an input as a prompt.

    Args:
        context: the linearised input.
        form: as in `Recipe`.
        end: the end-of-text token.

    >>> prompt_of("name : The Mill", "lines", "<end>"), prompt_of("name : The Mill", "paper", "<end>")
    ('name : The Mill\n', 'name : The Mill<end>')
    """
    return context + end if form == "paper" else context.strip() + "\n"


def as_source(rows: Sequence[Row], path: Path, form: str, tokenizer: Any) -> Source:
    """Turns rows into training examples.

    Args:
        rows: the rows of one file.
        path: that file, for messages.
        form: as in `Recipe`.
        tokenizer: its end-of-text token ends the prompt with form "paper".
    """
    blank = " " if form == "paper" else ""
    examples = [
        Example.of(
            prompt_of(row.context, form, tokenizer.eos_token),
            blank + (row.completion if form == "paper" else row.completion.strip()),
            f"{path}:{number}",
        )
        for number, row in enumerate(rows, 1)
    ]
    return Source(examples)
