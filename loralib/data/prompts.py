"""Files of prompts: those of examples, whose texts are left aside, and those that hold nothing but prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import DataError, list_faults
from .lines import are_not, read_lines
from .published import SEPARATOR
from .readers import Example, _from_record, group_by_prompt, guess_format, read_examples

__all__ = ["as_prompt", "read_prompts"]

# Stands where an answer is to be written: chat templates write whole turns only, and its tokens are cut off again.
_ANSWER = {"role": "assistant", "content": "-"}


def read_prompts(path: str | Path, format: str = "auto") -> list[Example]:
    """Reads what is to be continued; each different prompt once, in order of first appearance.

    Args:
        path: what `read_examples` takes.  Completions may be missing from all of a file's lines: plain lines without
            ``||``, JSON lines with ``prompt`` alone, or chats (``messages``) that end with a question.
        format: see `read_examples`.

    Returns:
        Examples, with an empty completion where the file gives none.

    Raises:
        DataError: as `read_examples`; or there are lines without a prompt.
    """
    path = Path(path).expanduser()
    examples = group_by_prompt(_prompts_alone(path, format) or read_examples(path, format))
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


def _prompts_alone(path: Path, format: str) -> list[Example]:
    """The prompts of a file that may hold nothing else; none where it is of another kind, or broken."""
    kind = guess_format(path) if format == "auto" else format
    if kind not in ("e2e", "jsonl") or path.suffix.lower() in (".csv", ".json"):
        return []
    lines = [(f"{path}:{at}", line) for at, line in enumerate(read_lines(path, "prompts"), 1) if line.strip()]
    if kind == "e2e":
        alone = not any(SEPARATOR in line for _, line in lines)
        return [Example.of(as_prompt(line), "", where) for where, line in lines] if alone else []
    try:
        records = [(where, _with_answer(json.loads(line))) for where, line in lines]
    except (ValueError, RecursionError):
        return []  # read_examples says which lines are no JSON
    examples, faults = [], []
    for where, record in records:
        try:
            examples.append(_from_record(record, where))
        except DataError as error:
            faults.append(f"{where}: {error}")
    if faults:
        heading = f"expected a JSON object a line with prompt or messages, but {are_not(len(faults))} of that form"
        raise DataError(list_faults(heading, faults, "Mend or remove the lines."))
    return examples


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
