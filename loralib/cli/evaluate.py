"""Score texts against references: BLEU, NIST, METEOR, ROUGE-L, CIDEr, TER, chrF and slot errors.

loralib evaluate references.txt texts.txt
loralib evaluate data/e2e/test.txt texts.jsonl --json
loralib evaluate webnlg/references texts.txt --source webnlg/test.json
loralib evaluate data/e2e/test.txt --perplexity --adapter lora_model

--perplexity scores a model by how well it predicts the texts of REF, a data file, each after its prompt.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from ..console import say, table
from ..data import read_examples
from ..errors import ConfigError, list_faults
from ..nlg.evaluation import LAYOUTS, SUBSETS, Evaluation, evaluate, metric_names, read_texts
from ..nlg.perplexity import Perplexity, perplexity
from ..training.ranks import joined
from ._adapters import add_as_chat, add_model_arguments, add_reading, load_on
from ._flags import add_list

JOINS_RANKS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the two files, the scores to compute, and the model for perplexity."""
    parser.add_argument(
        "reference",
        metavar="REF",
        help="references: a file with one per line and a blank line between those of different inputs (E2E); a "
        "directory of parallel files reference0, reference1, ... (DART, WebNLG); or a data file as published (lines "
        "`meaning representation||text`, E2E's CSV, DART's JSON, WebNLG's JSON or XML) or converted (JSONL)",
    )
    parser.add_argument(
        "hypothesis",
        metavar="HYP",
        nargs="?",
        help="texts to score, in the order of the inputs: one per line, or the file of loralib generate --output (not "
        "needed with --perplexity)",
    )
    parser.add_argument(
        "--layout", default="auto", choices=LAYOUTS, help="layout of REF (default: auto, which detects it)"
    )
    parser.add_argument(
        "--source",
        metavar="FILE",
        help="the data file that the texts were generated from, unless REF is that file: it has the meaning "
        "representations (for slot errors) and WebNLG's categories (for seen and unseen)",
    )
    parser.add_argument(
        "--subset",
        default="all",
        choices=SUBSETS,
        help="score only these WebNLG categories (default: all, plus seen and unseen if the categories are known)",
    )
    add_list(
        parser,
        "--metrics",
        metavar="NAMES",
        help="scores to compute: BLEU,NIST,METEOR,ROUGE_L,CIDEr,TER,chrF,SER (default: all available ones; TER is the "
        "slowest, METEOR needs Java)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    model = parser.add_argument_group("perplexity")
    model.add_argument(
        "--perplexity", action="store_true", help="compute a model's perplexity on REF's texts, per token and per word"
    )
    add_model_arguments(model)
    add_reading(model, "format of REF", default=None)
    add_as_chat(model)


def run(args: argparse.Namespace) -> None:
    """Computes the scores and prints them."""
    _check(args)
    metrics = metric_names(args.metrics) if args.metrics else None
    if args.hypothesis is not None:
        texts = read_texts(args.reference, args.hypothesis, args.layout, args.source).subset(args.subset)
        done = evaluate(texts, metrics)
    else:
        done = Evaluation({}, 0)
    measured = _perplexity(args) if args.perplexity else None
    if done.empty:
        say(_about_empty(done), file=sys.stderr)
    if args.json:
        value = done.as_json() if args.hypothesis is not None else {"signatures": {}}
        if measured is not None:
            scores = measured.scores
            value |= {name: score.value for name, score in scores.items()}
            value |= {name: getattr(measured, name) for name in ("loss", "tokens", "words", "texts", "dropped")}
            value["signatures"] |= {name: score.signature for name, score in scores.items()}
        say(json.dumps(value, indent=2, ensure_ascii=True))
        return
    if args.hypothesis is not None:
        say(_table(done))
    if measured is not None:
        say(("\n" if args.hypothesis is not None else "") + _perplexity_table(measured))


def _check(args: argparse.Namespace) -> None:
    """Refuses combinations of flags in which one would have no effect."""
    if args.hypothesis is None and not args.perplexity:
        raise ConfigError(
            "there is nothing to score: give HYP, a file with one text per line, or use --perplexity to score a model."
        )
    needed, unused = "", dict[str, Any]()
    if args.hypothesis is None:
        needed, unused = "HYP", {"layout": "auto", "source": None, "subset": "all", "metrics": None}
    elif not args.perplexity:
        needed, unused = "--perplexity", {"model": None, "adapter": None, "data_format": None, "columns": None}
        unused |= {"as_chat": False, "dtype": "auto", "device": None, "quantize": "none"}
    faults = [f"--{name} needs {needed}" for name, default in unused.items() if getattr(args, name) != default]
    if faults:
        raise ConfigError(
            list_faults("these flags would have no effect", faults, "Leave them out, or add what they need.")
        )


def _perplexity(args: argparse.Namespace) -> Perplexity:
    # Read the data first, so that faults in it show before the model is loaded.
    examples = read_examples(args.reference, args.data_format or "auto", columns=args.columns, as_chat=args.as_chat)
    with joined() as ranks:
        model, tokenizer = load_on(ranks, args)
        return perplexity(model, tokenizer, examples, ranks)


def _perplexity_table(done: Perplexity) -> str:
    rows = [[name, f"{score.value:.4f}", "lower", score.signature] for name, score in done.scores.items()]
    numbers = f"{done.texts:,} texts, {done.tokens:,} tokens, {done.words:,} words, loss {done.loss:.4f} nats per token"
    left = f"; left out: {done.dropped:,} longer than the model's context, or empty" if done.dropped else ""
    return f"{numbers}{left}\n\n" + table(rows, ["metric", "score", "better", "signature"])


def _about_empty(done: Evaluation) -> str:
    lines = ", ".join(map(str, done.empty[:10])) + (", ..." if len(done.empty) > 10 else "")
    return f"note: {len(done.empty)} of {done.hypotheses} texts are empty (line {lines}); they are scored as such"


def _table(done: Evaluation) -> str:
    parts = {"all": done, **done.subsets} if done.subsets else {"score": done}
    header = ["metric", *parts, "better", "signature"]
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
