"""Score texts against references: BLEU, NIST, METEOR, ROUGE-L, CIDEr, TER, chrF and slot errors.

loralib evaluate references.txt texts.txt
loralib evaluate data/e2e/test.txt texts.txt --json
loralib evaluate webnlg/references texts.txt --source webnlg/test.json
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..evaluate import Evaluation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the two files and what to do with them."""
    parser.add_argument(
        "reference",
        metavar="REF",
        help="references: a file with one a line and a blank line between those of different inputs (E2E); a directory "
        "of files reference0, reference1, ... in step (DART, WebNLG); or a data file as published (lines `meaning "
        "representation||text`, E2E's CSV, DART's JSON, WebNLG's JSON or XML) or converted (JSONL)",
    )
    parser.add_argument("hypothesis", metavar="HYP", help="the texts to score, one a line, in the order of the inputs")
    parser.add_argument(
        "--layout", default="auto", help="of REF: groups, directory or data (default: auto, which looks what is there)"
    )
    parser.add_argument(
        "--source",
        metavar="FILE",
        help="the data file that the texts were made for, where REF is none itself: it tells the meaning "
        "representations (for slot errors) and WebNLG's categories (for seen and unseen)",
    )
    parser.add_argument(
        "--subset",
        default="all",
        help="all, seen or unseen: score only such WebNLG categories (default: all, and "
        "each of the other two beside it where categories are known)",
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        metavar="NAME",
        help="which scores: BLEU NIST METEOR ROUGE_L CIDEr TER chrF SER (default: all that can be made; TER takes "
        "longest, METEOR needs Java)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> None:
    """Scores and prints."""
    from ..console import say
    from ..evaluate import evaluate, metric_names, read_texts

    metrics = metric_names(args.metrics) if args.metrics else None
    texts = read_texts(args.reference, args.hypothesis, args.layout, args.source).subset(args.subset)
    done = evaluate(texts, metrics)
    if done.empty:
        say(_about_empty(done), file=sys.stderr)
    if args.json:
        say(json.dumps(done.as_json(), indent=2, ensure_ascii=True))
    else:
        say(_table(done))


def _about_empty(done: Evaluation) -> str:
    lines = ", ".join(map(str, done.empty[:10])) + (", ..." if len(done.empty) > 10 else "")
    return f"note: {len(done.empty)} of {done.hypotheses} texts are empty (line {lines}); they are scored as such"


def _table(done: Evaluation) -> str:
    from ..console import table

    parts = {"all": done, **done.subsets} if done.subsets else {"score": done}
    header = ["metric", *parts, "better", "how it was made"]
    rows = [
        [
            name,
            *(f"{part.scores[name].value:.4f}" for part in parts.values()),
            "higher" if score.higher_is_better else "lower",
            score.signature,
        ]
        for name, score in done.scores.items()
    ]
    numbers = ", ".join(f"{part.hypotheses} {name}" for name, part in done.subsets.items())
    lines = [f"{done.hypotheses} texts" + (f" ({numbers})" if numbers else ""), "", table(rows, header)]
    lines += [f"\n{name} was left out: {reason}" for name, reason in done.skipped.items()]
    return "\n".join(lines)
