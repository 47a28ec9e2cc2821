"""Files of prompts: those of examples, whose texts are left aside, and those that hold nothing but prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import DataError, list_faults
from ..nlg.published import SEPARATOR
from .lines import read_lines
from .readers import Example, group_by_prompt, guess_format, read_examples, read_records

__all__ = ["as_prompt", "read_prompts"]

# Stands where an answer is to be written: chat templates write whole turns only, and its tokens are cut off again.
_ANSWER = {"role": "assistant", "content": "-"}


def read_prompts(path: str | Path, format: str = "auto") -> list[Example]:
    """Reads what is to be continued; each different prompt once, in order of first appearance.

    Args:
        path: what `read_examples` takes.  Completions may be missing: from all of a file's lines, which then have no
            ``||``, or from a record in JSON (``prompt`` alone, or a chat in ``messages`` that ends with a question).
        format: see `read_examples`.

    Returns:
        Examples, with an empty completion where the file gives none.

    Raises:
        DataError: as `read_examples`; or there are lines without a prompt.
    """
    path = Path(path).expanduser()
    kind = guess_format(path) if format == "auto" else format
    if kind == "jsonl":
        found = read_records(path, _with_answer, "prompt or messages")
    else:
        found = _lines_alone(path) if kind == "e2e" and path.suffix.lower() not in (".csv", ".json") else []
    examples = group_by_prompt(found or read_examples(path, format))
    faults = [f"{example.source} has no prompt" for example in examples if not example.prompt.strip()]
    if faults:
        raise DataError(list_faults("there is nothing to continue", faults, "Remove these lines, or give prompts."))
    return examples


def as_prompt(text: str) -> str:
    r"""A meaning representation ends with a line break, as in training; other text is continued as it is.

    >>> as_prompt("name : The Wharf | area : harbour"), as_prompt("Once upon a time")
    ('name : The Wharf | area : harbour\n', 'Once upon a time')
    """
    return text.strip() + "\n" if " : " in text else text


def _lines_alone(path: Path) -> list[Example]:
    """The prompts of a file without a single ``||``; none of one that has texts."""
    lines = [(f"{path}:{at}", line) for at, line in enumerate(read_lines(path, "prompts"), 1) if line.strip()]
    alone = not any(SEPARATOR in line for _, line in lines)
    return [Example.of(as_prompt(line), "", where) for where, line in lines] if alone else []


def _with_answer(record: Any) -> Any:
    """A record with an empty completion, or a chat with an answer that stands for what comes, if it has none."""
    if not isinstance(record, dict):
        return record
    turns = record.get("messages")
    if isinstance(turns, list) and turns:
        last = turns[-1]
        answered = isinstance(last, dict) and last.get("role") == "assistant"
        return record if answered else {**record, "messages": [*turns, _ANSWER]}
    return {"completion": "", **record} if {"prompt", "context"} & record.keys() else record
