"""Classify texts with the labels that a classifier's adapter has learned, and show their probabilities.

loralib predict --adapter lora_model "What a lovely film."
loralib predict --adapter lora_model --input test.jsonl
loralib predict --adapter lora_model --input texts.txt --output labels.jsonl

A file holds rows of text (and text_pair), as for training, or, if it is a .txt, one text per line.  If it has labels,
metrics are shown too.  The output has one JSON line per text: its label and the probability of each label.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from ..bases.classifiers import class_names, load_adapted_classifier, load_classifier, own_classes
from ..console import counted, say, table
from ..data import Example, Labels
from ..data.lines import read_lines
from ..data.readers import read_unlabelled
from ..errors import BaseModelError, ConfigError, DataError
from ..files import write_text
from ..training.predicting import Prediction, metrics_of, predict
from ._adapters import add_model_arguments, add_reading
from ._flags import add_flag

_WIDTH: Final = 60  # characters of each text shown in the table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the adapter, the texts, and the output."""
    parser.add_argument("text", nargs="*", metavar="TEXT", help="texts to classify")
    add_model_arguments(parser)
    add_flag(parser, "--input", "--data", metavar="FILE", help="file of texts: .jsonl, .csv, .tsv, ..., or .txt")
    add_reading(parser, "format of the file")
    add_flag(
        parser, "--output", "-o", metavar="FILE", help="file for the results, one JSON line per text; - for the console"
    )
    parser.add_argument("--batch_size", type=int, default=16, metavar="N", help="texts to process at once (default 16)")
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of the table")


def run(args: argparse.Namespace) -> None:
    """Loads the classifier, classifies the texts and shows the results."""
    faults = [
        fault
        for fault, wrong in {
            "no classifier given: give --adapter DIR (or --model, for a merged one)": args.adapter is None
            and args.model is None,
            "no text given: give one or more TEXT, or --input FILE": not args.text and args.input is None,
            "texts and --input are both given, expected only one of them": bool(args.text) and args.input is not None,
            f"--batch_size is {args.batch_size}, expected at least 1": args.batch_size < 1,
        }.items()
        if wrong
    ]
    if faults:
        raise ConfigError("; ".join(faults))
    examples = _examples(args)
    options = {"dtype": args.dtype, "device": args.device, "quantize": args.quantize}
    if args.adapter is not None:
        model, tokenizer = load_adapted_classifier(args.adapter, args.model, **options)
    elif own_classes(args.model) is None:
        raise BaseModelError(
            f"{args.model} has no classification head: give --adapter, or a model that classifies texts"
        )
    else:
        model, tokenizer = load_classifier(args.model, **options)
    labels = Labels(class_names(model))
    examples = [replace(each, label=None) if labels.means_none(each.label) else each for each in examples]
    results = predict(model, tokenizer, examples, batch_size=args.batch_size)
    lines = [json.dumps(_record(example, result), ensure_ascii=False) for example, result in _pairs(examples, results)]
    if args.output not in (None, "-"):
        write_text(Path(args.output), "\n".join(lines) + "\n")
        say(f"{counted(len(lines), 'text')} classified: {args.output}", file=sys.stderr)
    elif args.json or args.output == "-":
        say("\n".join(lines))
    else:
        say(_table(examples, results))
    labelled = [pair for pair in _pairs(examples, results) if pair[0].label is not None]
    if labelled:
        _say_metrics(model, labelled, sys.stderr if args.json or args.output == "-" else sys.stdout)


def _examples(args: argparse.Namespace) -> list[Example]:
    if args.text:
        if empty := [number for number, text in enumerate(args.text, 1) if not text.strip()]:
            raise DataError(f"text {', '.join(map(str, empty))} is empty, so there is nothing to classify")
        return [Example(((text, False),), (), f"text {number}") for number, text in enumerate(args.text, 1)]
    path = Path(args.input).expanduser()
    if args.data_format == "auto" and path.suffix.lower() == ".txt":
        lines = [(f"{path}:{number}", line.strip()) for number, line in enumerate(read_lines(path, "texts"), 1)]
        return [Example(((line, False),), (), where) for where, line in lines if line]
    return read_unlabelled(args.input, args.data_format, columns=args.columns)


def _pairs(examples: Sequence[Example], results: Sequence[Prediction]) -> list[tuple[Example, Prediction]]:
    return list(zip(examples, results, strict=True))


def _record(example: Example, result: Prediction) -> dict[str, Any]:
    """Returns the record that is written to the output for a text."""
    asked = {"text": example.segments[0][0]} | ({"text_pair": example.text_pair} if example.text_pair else {})
    found: dict[str, Any] = {"label": result.label}
    if result.probabilities:
        found["probabilities"] = {name: round(value, 6) for name, value in result.probabilities.items()}
    return {**asked, **found, **({"expected": example.label} if example.label is not None else {})}


def _table(examples: Sequence[Example], results: Sequence[Prediction]) -> str:
    names = list(results[0].probabilities)
    heading = ("text", "label", *names) if names else ("text", "number")
    rows = list[tuple[str, ...]]()
    for example, result in _pairs(examples, results):
        text = " ".join(example.prompt.split())
        text = text if len(text) <= _WIDTH else text[: _WIDTH - 3] + "..."
        label = result.label if isinstance(result.label, str) else f"{result.label:.3f}"
        rows.append((text, label, *(f"{value:.3f}" for value in result.probabilities.values())))
    return table(rows, heading)


def _say_metrics(model: Any, labelled: Sequence[tuple[Example, Prediction]], file: Any) -> None:
    figures = metrics_of(model, [example for example, _ in labelled], [result for _, result in labelled])
    listed = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
    say(f"\nOf {counted(len(labelled), 'labelled text')}: {listed}", file=file)
