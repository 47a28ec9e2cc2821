"""Decodes the inputs of a test file to JSON lines; a killed run continues without losing or repeating a line."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ...console import progress
from ...data import prompt_ids
from ...files import append_lines, resume_lines
from ...generation import Generation, Sampling, stream
from ...generation.beam import search
from ...generation.streaming import encode_prompts, join
from ...generation.text import TextStream, end_tokens

__all__ = ["decode", "end_ids", "one_line", "read_decoded", "write_decoded"]

_BLANK_LINE = "\n\n"


def write_decoded(
    path: Path, model: nn.Module, tokenizer: Any, prompts: Sequence[str], sampling: Sampling, form: str
) -> None:
    """Decodes the prompts that are missing from a file, appending each text when it is complete.

    Args:
        path: the JSONL file; a last line left incomplete by a crash is removed.
        model: adapted or not.
        tokenizer: its tokenizer.
        prompts: all prompts; the ``id`` of a line is a prompt's index.
        sampling: the settings; prompt i uses the seed ``seed + i``.
        form: as in `Recipe`.

    Raises:
        OutputError: the file cannot be written, or was written by something else.
    """
    done = read_decoded(path, prompts)
    todo = [number for number in range(len(prompts)) if number not in done]
    if not todo:
        return
    lines = (
        {
            "id": todo[place],
            "prompt": prompts[todo[place]],
            "text": one_line(found.text, form),
            "tokens": len(found.ids),
            "finish_reason": found.finish_reason,
            "score": found.score,
        }
        for place, found in decode(model, tokenizer, [prompts[number] for number in todo], sampling, form, todo)
    )
    with progress(total=len(prompts), description="decoding", unit="text") as bar:
        bar.update(len(done))
        append_lines(path, lines, bar.update)


def decode(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    sampling: Sampling,
    form: str,
    seeds: Sequence[int] | None = None,
) -> Iterator[tuple[int, Generation]]:
    """Yields each prompt's index and generated text, as texts finish.

    Args:
        model: adapted or not.
        tokenizer: its tokenizer.
        prompts: as `prompt_of` writes them.
        sampling: settings for beam search or sampling.
        form: as in `Recipe`; with "paper", a blank line ends a text too.
        seeds: the number added to the seed for each prompt; default: its index.
    """
    rows = encode_prompts(model, tokenizer, [prompt_ids(prompt, tokenizer) for prompt in prompts])
    if sampling.num_beams > 1:
        for number, best in search(model, rows, sampling, end_ids(model, tokenizer, form)):
            ids = best.ids[: len(best.ids) - best.ended]
            text = TextStream(tokenizer)
            whole = "".join([text.add(token) for token in ids]) + text.finish()
            reason = "stop" if best.ended else "length"
            yield number, Generation(whole, ids, reason, len(rows[number]), best.score)
        return
    stops = (_BLANK_LINE,) if form == "paper" else ()
    own = [
        dataclasses.replace(sampling, seed=sampling.seed + seed, stop=(*sampling.stop, *stops))
        for seed in (seeds if seeds is not None else range(len(rows)))
    ]
    pieces: list[list[Any]] = [[] for _ in rows]
    for piece in stream(model, tokenizer, rows, own):
        pieces[piece.request].append(piece)
        if piece.finish_reason is not None:
            yield piece.request, join(pieces[piece.request], rows[piece.request])


def end_ids(model: nn.Module, tokenizer: Any, form: str) -> frozenset[int]:
    """Returns the tokens that end a text; with form "paper" also a blank line, if it is a single token."""
    ends = set(end_tokens(model, tokenizer))
    if form == "paper":
        blank = tokenizer(_BLANK_LINE, add_special_tokens=False)["input_ids"]
        ends |= set(blank) if len(blank) == 1 else set()
    return frozenset(ends)


def one_line(text: str, form: str) -> str:
    """Returns a text on one line, as scorers read it; with form "paper", without anything after a blank line.

    >>> one_line(" A pub.\\n\\nAnd more", "paper"), one_line("A\\npub. ", "lines")
    ('A pub.', 'A pub.')
    """
    if form == "paper":
        text = text.split(_BLANK_LINE)[0]
    return " ".join(text.split())


def read_decoded(path: Path, prompts: Sequence[str]) -> dict[int, dict[str, Any]]:
    """Reads earlier texts, by the index of their prompt; removes an incomplete last line.

    Raises:
        OutputError: the file holds something else, or texts for other prompts.
    """

    def check(records: list[dict[str, Any]]) -> None:
        if len({record["id"] for record in records}) < len(records):
            raise ValueError("a text occurs twice")
        for record in records:
            number, text = record["id"], record["text"]
            if number not in range(len(prompts)) or prompts[number] != record["prompt"] or not isinstance(text, str):
                raise ValueError(f"{number} is not a text for one of the prompts")

    return {record["id"]: record for record in resume_lines(path, "id", check, "--output_dir")}
