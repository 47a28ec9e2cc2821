"""Scores a file of texts against references in the layouts of E2E, DART and WebNLG."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from ..data.lines import do_not_match, read_lines, read_text, shown
from ..data.readers import SEPARATOR, guess_format, read_examples
from ..errors import ConfigError, DataError, MissingDependencyError, did_you_mean, list_faults
from .convert import read_formatted
from .metrics import SCORES, Score, slot_error_rate
from .metrics.slots import parse_meaning
from .published import Row, read_rows

__all__ = ["LAYOUTS", "SUBSETS", "Evaluation", "Texts", "evaluate", "metric_names", "read_texts"]

LAYOUTS: Final = ("auto", "groups", "directory", "data")
SUBSETS: Final = ("all", "seen", "unseen")

_SLOT_ERRORS: Final = "SER"


@dataclass(frozen=True)
class Texts:
    """Hypotheses and what they are scored against.

    Attributes:
        references: the references of each hypothesis.
        hypotheses: the texts to score.
        meanings: the meaning representation of each, if known.
        seen: whether the WebNLG category of each was in the training set, if known.
    """

    references: tuple[tuple[str, ...], ...]
    hypotheses: tuple[str, ...]
    meanings: tuple[str, ...] = ()
    seen: tuple[bool, ...] = ()

    def subset(self, name: str) -> Texts:
        """Returns the texts whose categories are seen or unseen, or all of them.

        Raises:
            ConfigError: unknown subset.
            DataError: the categories are unknown, or the subset is empty.
        """
        if name not in SUBSETS:
            known = ", ".join(SUBSETS)
            raise ConfigError(f"there is no subset {name!r}.{did_you_mean(name, SUBSETS)} Known: {known}.")
        if name == "all":
            return self
        if not self.seen:
            raise DataError(
                f"cannot tell which inputs are {name}. Give WebNLG's data file as REF, or additionally as --source."
            )
        chosen = [index for index, seen in enumerate(self.seen) if seen == (name == "seen")]
        if not chosen:
            raise DataError(f"none of the {len(self.seen)} inputs is {name}. Choose another --subset.")
        parts = {
            name: tuple(values[index] for index in chosen)
            for name in ("references", "hypotheses", "meanings", "seen")
            if (values := getattr(self, name))
        }
        return replace(self, **parts)


@dataclass(frozen=True)
class Evaluation:
    """The scores of a file.

    Attributes:
        scores: the scores by name, in the order of `SCORES`, with the slot error rate last.
        hypotheses: the number of texts scored.
        empty: the numbers, counted from 1, of texts without words; they are scored as empty texts.
        skipped: the reason for each score that could not be computed.
        subsets: separate scores for WebNLG's seen and unseen categories, if both occur.
    """

    scores: dict[str, Score]
    hypotheses: int
    empty: tuple[int, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)
    subsets: dict[str, Evaluation] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Returns an object for JSON: each score under its name (None if skipped), and the signatures."""
        value: dict[str, Any] = {name: score.value for name, score in self.scores.items()}
        value |= dict.fromkeys(self.skipped)
        value["hypotheses"] = self.hypotheses
        value["empty"] = len(self.empty)
        value["signatures"] = {name: score.signature for name, score in self.scores.items()}
        if self.skipped:
            value["skipped"] = self.skipped
        if self.subsets:
            value["subsets"] = {name: part.as_json() for name, part in self.subsets.items()}
        return value


def evaluate(texts: Texts, metrics: Sequence[str] | None = None) -> Evaluation:
    """Scores all texts together and, if WebNLG's categories are known, also the seen and unseen ones separately.

    Args:
        texts: the texts, from `read_texts`.
        metrics: names of scores; default: all that the installed packages can compute.

    Raises:
        DataError: there is nothing to score.
        MissingDependencyError: a score requested by name needs something that is not installed.

    >>> evaluation = evaluate(Texts((("a pub by the river",),), ("a pub by the river",)), ["BLEU", "ROUGE_L"])
    >>> str(evaluation.scores["BLEU"])
    'BLEU|nrefs:1|case:lc|eff:no|tok:13a|smooth:none|like:e2e-metrics|version:1 = 1.0000'
    """
    scores: dict[str, Score] = {}
    skipped: dict[str, str] = {}
    for name in metrics or SCORES:
        if name in SCORES:
            try:
                scores[name] = SCORES[name](texts.references, texts.hypotheses)
            except MissingDependencyError as error:
                if metrics:
                    raise
                skipped[name] = str(error)
    if _SLOT_ERRORS in (metrics or [_SLOT_ERRORS]):
        if texts.meanings:
            errors = slot_error_rate(texts.meanings, texts.hypotheses)
            scores[_SLOT_ERRORS] = Score(_SLOT_ERRORS, errors.value, errors.signature, higher_is_better=False)
        elif metrics:
            raise DataError(
                "slot errors need meaning representations (`name : X | food : Y | ...`). Give E2E's data file as REF, "
                "or additionally as --source."
            )
    empty = tuple(number for number, text in enumerate(texts.hypotheses, 1) if not text.strip())
    subsets = {}
    if len(set(texts.seen)) == 2:
        parts = {name: texts.subset(name) for name in SUBSETS[1:]}
        subsets = {name: evaluate(part, list(scores)) for name, part in parts.items()}
    return Evaluation(scores, len(texts.hypotheses), empty, skipped, subsets)


def metric_names(words: Iterable[str]) -> list[str]:
    """Returns the canonical names of scores.

    Args:
        words: names in any case, with hyphens or underscores.

    Raises:
        ConfigError: unknown scores; all of them are listed.

    >>> metric_names(["bleu", "rouge-l"])
    ['BLEU', 'ROUGE_L']
    """
    known = {name.lower(): name for name in (*SCORES, _SLOT_ERRORS)}
    keys = [word.lower().replace("-", "_") for word in words]
    faults = [f"{key!r}.{did_you_mean(key, known)}" for key in keys if key not in known]
    if faults:
        raise ConfigError(list_faults("there is no such metric", faults, f"Known: {', '.join(known.values())}."))
    return list(dict.fromkeys(known[key] for key in keys))


# --- reading -----------------------------------------------------------------------------------------------------


def read_texts(
    reference: str | Path, hypothesis: str | Path, layout: str = "auto", source: str | Path | None = None
) -> Texts:
    """Reads references and hypotheses.

    Args:
        reference: a path in one of three layouts.
            "groups" (E2E): one reference per line, and a blank line between the references of different inputs; a file
            without blank lines has one reference for each input.
            "directory" (DART, WebNLG): a directory of files reference0, reference1, ... with one line per input, which
            is blank where an input has fewer references.  A path up to the number works too ("refs/reference").
            "data": a data file as published (E2E's ``meaning representation||text`` or CSV, DART's JSON, WebNLG's JSON
            or XML) or converted (JSONL with context and completion); texts of the same input are its references, in
            the order in which inputs first appear.
        hypothesis: one text per line, in the order of the inputs; an empty line is an empty text. Or JSON lines with
            ``text``, as ``loralib generate`` writes them; if all have a number as ``id``, they are sorted by it.
        layout: one of `LAYOUTS`; "auto" chooses by looking at the files.
        source: the data file with the inputs, for slot errors and WebNLG's seen categories, if ``reference`` is not a
            data file itself.

    Raises:
        DataError: a file cannot be read or has another form, or the numbers of texts do not match.
        ConfigError: unknown layout.
    """
    reference = Path(reference)
    if layout not in LAYOUTS:
        raise ConfigError(f"there is no layout {layout!r}.{did_you_mean(layout, LAYOUTS)} Known: {', '.join(LAYOUTS)}.")
    if layout == "auto":
        layout = _guess_layout(reference)
    groups = _read_data(reference) if layout == "data" else None
    if layout == "groups":
        # Split where the E2E scorer does: also at \v, \f, \x1c to \x1e, \x85, \u2028 and \u2029.
        hypotheses = _read_hypotheses(Path(hypothesis), str.splitlines)
        references = _read_groups(reference)
        if len(references) == 1 < len(hypotheses):
            references = [[text] for text in references[0]]
    else:
        hypotheses = _read_hypotheses(Path(hypothesis))
        references = [group.texts for group in groups] if groups else _read_directory(reference)
    if len(references) != len(hypotheses):
        raise DataError(_why_not_as_many(reference, references, Path(hypothesis), hypotheses))
    if source is not None:
        groups = _read_data(Path(source))
        if len(groups) != len(hypotheses):
            raise DataError(
                f"{source} has {len(groups)} inputs, but {hypothesis} has {len(hypotheses)} texts. "
                "Pass the data file that the texts were generated from."
            )
    rows = [group.first for group in groups or ()]
    return Texts(
        references=tuple(tuple(texts) for texts in references),
        hypotheses=tuple(hypotheses),
        meanings=tuple(row.context for row in rows)
        if all("name" in dict(parse_meaning(row.context)) for row in rows)
        else (),
        seen=tuple(bool(row.seen) for row in rows) if all(row.seen is not None for row in rows) else (),
    )


def _read_hypotheses(path: Path, split: Callable[[str], list[str]] | None = None) -> list[str]:
    """Reads the texts of a file, one per line; `split`, if given, splits a text file in place of `read_lines`."""
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        expected = "one text per line"
        lines = read_lines(path, expected) if split is None else split(read_text(path, expected))
        return [line.strip() for line in lines]
    records, faults = [], []
    for number, line in enumerate(read_lines(path, "JSON lines with 'text'"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            records.append((record.get("id", number), " ".join(record["text"].split())))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            faults.append(f"{path}:{number}: {shown(line)}")
    if faults:
        heading = f"expected one JSON object per line with 'text', but {do_not_match(len(faults))}"
        raise DataError(list_faults(heading, faults, "Give what loralib generate wrote, or a file of texts."))
    if all(isinstance(id, int) for id, _ in records):
        records.sort(key=lambda record: record[0])
    return [text for _, text in records]


@dataclass(frozen=True)
class _InputGroup:
    """The first row of an input, and the texts of all its rows."""

    first: Row
    texts: list[str]


def _guess_layout(path: Path) -> str:
    if path.is_dir() or (not path.exists() and _reference_files(path)):
        return "directory"
    if guess_format(path) not in ("e2e", "text") or path.suffix.lower() == ".csv":
        return "data"
    first = next((line for line in read_lines(path, "references") if line.strip()), "")
    return "data" if SEPARATOR in first else "groups"


def _read_groups(path: Path) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    faults = []
    lines = [line.strip() for line in read_text(path, "references, a blank line between groups").splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines, 1):
        if line:
            groups[-1].append(line)
        else:
            if not groups[-1]:
                faults.append(f"{path}:{number}: a blank line where a reference was expected")
            groups.append([])
    if faults:
        fix = "Leave exactly one blank line between the references of one input and the next."
        raise DataError(list_faults("an input has no reference", faults, fix))
    return groups


def _read_directory(path: Path) -> list[list[str]]:
    files = _reference_files(path)
    if not files:
        names = sorted(entry.name for entry in path.iterdir())[:8] if path.is_dir() else []
        raise DataError(
            f"{path} contains no files reference0, reference1, ... (it has: {', '.join(names) or 'nothing'}). Give "
            "the directory with these files, or choose another --layout."
        )
    columns = {file: read_lines(file, "one reference per line") for file in files}
    if len({len(lines) for lines in columns.values()}) > 1:
        faults = [f"{file}: {len(lines)} lines" for file, lines in columns.items()]
        raise DataError(list_faults("reference files differ in length", faults, "Each needs one line for every input."))
    groups = [[text.strip() for text in texts if text.strip()] for texts in zip(*columns.values(), strict=True)]
    faults = [f"line {number}: blank in every file" for number, texts in enumerate(groups, 1) if not texts]
    if faults:
        raise DataError(list_faults(f"an input has no reference in {path}", faults, "Fill in at least one."))
    return groups


def _reference_files(path: Path) -> list[Path]:
    """Returns the files "...reference<number>" in a directory, or those whose names begin with the path, by number."""
    directory, start = (path, ".*references?") if path.is_dir() else (path.parent, re.escape(path.name))
    files: dict[int, Path] = {}
    for entry in sorted(directory.iterdir()) if directory.is_dir() else ():
        if match := re.fullmatch(rf"{start}(\d+)(?:\.\w+)?", entry.name):
            number = int(match[1])
            if number in files:
                raise DataError(
                    f"{directory} has two files number {number}: {files[number].name} and {entry.name}. "
                    f"Give the part before the number too, for instance {directory / entry.name[: match.start(1)]}."
                )
            files[number] = entry
    return [files[number] for number in sorted(files)]


def _read_data(path: Path) -> list[_InputGroup]:
    format = guess_format(path)
    rows = read_rows(path, format) if format in ("e2e", "dart", "webnlg") else _read_records(path, format)
    groups: dict[str, _InputGroup] = {}
    for row in rows:
        groups.setdefault(row.context, _InputGroup(row, [])).texts.append(row.completion.strip())
    return list(groups.values())


def _read_records(path: Path, format: str) -> list[Row]:
    """Reads rows in any form that training accepts, or as `loralib data convert` wrote them, with categories."""
    if format == "jsonl":
        with contextlib.suppress(DataError):
            return read_formatted(path)
    examples = read_examples(path, format)
    if not all(example.prompt for example in examples):
        raise DataError(f"{path} has texts without prompts, expected prompts with the texts that are their references.")
    return [Row(example.prompt.strip(), example.completion) for example in examples]


def _why_not_as_many(
    reference: Path, references: Sequence[Sequence[str]], hypothesis: Path, hypotheses: Sequence[str]
) -> str:
    message = f"{reference} has references for {len(references)} inputs, but {hypothesis} has {len(hypotheses)} texts."
    blank = next((index for index, text in enumerate(reversed(hypotheses)) if text), len(hypotheses))
    if len(hypotheses) == sum(map(len, references)):
        return f"{message} That is one per reference: write one text per input."
    if len(hypotheses) - blank <= len(references) < len(hypotheses):
        return f"{message} Blank lines at the end: {blank}; each one counts as a text, so remove the extra ones."
    return f"{message} Write one text per input, one per line, in the same order."
