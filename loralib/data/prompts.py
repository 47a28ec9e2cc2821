"""Reads prompts from files of examples, whose completions are ignored, and from files that hold prompts alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import DataError, list_faults
from .lines import read_lines
from .readers import (
    SEPARATOR,
    Example,
    group_by_prompt,
    guess_format,
    meaning_prompt,
    read_examples,
    read_records,
)

__all__ = ["as_prompt", "read_prompts"]

# A placeholder for the answer to be generated: chat templates write whole turns only. Its tokens are cut off again.
_ANSWER = {"role": "assistant", "content": "-"}


def read_prompts(path: str | Path, format: str = "auto") -> list[Example]:
    """Reads the distinct prompts of a file, in order of first appearance.

    Args:
        path: a file that `read_examples` takes.  Completions may be missing: a file of lines may have no ``||`` at all,
            and a JSON record may hold ``prompt`` alone, or a chat in ``messages`` that ends with a question.
        format: see `read_examples`.

    Returns:
        Examples, with an empty completion where the file gives none.

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


def as_prompt(text: str) -> str:
    r"""Ends a meaning representation with a line break, as in training; other text is continued as it is.

    >>> as_prompt("name : The Wharf | area : harbour"), as_prompt("Once upon a time")
    ('name : The Wharf | area : harbour\n', 'Once upon a time')
    """
    return meaning_prompt(text) if " : " in text else text


def _bare_prompts(path: Path) -> list[Example]:
    """Returns the lines of a file as prompts, or nothing if any line has ``||`` and so a completion."""
    lines = [(f"{path}:{number}", line) for number, line in enumerate(read_lines(path, "prompts"), 1) if line.strip()]
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
