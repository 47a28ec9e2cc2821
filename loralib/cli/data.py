"""Preview training data, convert it, and download it.

loralib data preview train.txt --seq_len 64
loralib data e2e data/e2e
loralib data convert dev.json dev.jsonl
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import bases
from ..console import say, table
from ..data import OBJECTIVES, Encoded, TokenExample, load_examples, read_sources, token_texts
from ..data.readers import guess_format
from ..errors import ConfigError, OutputError
from ..files import write_text
from ..nlg import convert
from ..nlg.fetch import SOURCE, fetch_e2e
from ..nlg.published import read_rows
from ._adapters import add_as_chat, add_format, add_reading

_TRAINED, _GIVEN, _RESET = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the actions preview, convert, decode and e2e."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _add_preview(actions)
    _add_convert(actions)
    _add_decode(actions)
    _add_e2e(actions)


def run(args: argparse.Namespace) -> None:
    """Runs `loralib data`: `args.action` is preview, convert, decode or e2e."""
    {"preview": _preview, "convert": _convert, "decode": _decode, "e2e": _e2e}[args.action](args)


# --- preview -------------------------------------------------------------------------------------------------------


def _add_preview(actions: Any) -> None:
    preview = actions.add_parser(
        "preview",
        help="show which tokens would be trained on, and which examples would be dropped and why",
        description="Shows examples as the model will see them, token by token, with trained tokens in green (or in "
        "brackets, without colour). Nothing is trained. Start here if a model learns the wrong thing.",
        epilog="example: loralib data preview train.txt chats.jsonl:0.5 --seq_len 128",
    )
    preview.add_argument(
        "paths",
        nargs="+",
        metavar="PATH[:WEIGHT]",
        help="files of examples in any format that training accepts, folders of texts, or hub ids; a weight of 2 uses "
        "a file's examples twice per epoch, 0.5 uses a random half of them",
    )
    preview.add_argument(
        "--model", default="smollm2-135m", help="model whose tokenizer is used (default: smollm2-135m)"
    )
    add_reading(preview, "format of the files; auto recognises every format except plain text in .txt files")
    add_as_chat(preview)
    preview.add_argument(
        "--seq_len",
        type=int,
        metavar="N",
        help="maximum tokens per example; longer examples are dropped, never truncated (default: no limit)",
    )
    preview.add_argument(
        "--objective",
        choices=OBJECTIVES,
        help="clm trains on completions only, jlm on every token, dpo and orpo on pairs of chosen and rejected "
        "completions (default: clm or dpo, depending on the data)",
    )
    preview.add_argument(
        "--max_samples", type=int, metavar="N", help="draw this many examples, from as many prompts as possible; 0: all"
    )
    preview.add_argument(
        "--seed", type=int, default=0, metavar="N", help="random seed for drawing examples (default: 0, as in training)"
    )
    preview.add_argument("--count", type=int, default=5, metavar="N", help="number of examples to show (default: 5)")
    preview.add_argument(
        "--color",
        choices=("auto", "always", "never"),
        default="auto",
        help="auto uses colour on a terminal, unless NO_COLOR is set",
    )


def _preview(args: argparse.Namespace) -> None:
    # Read the data first, so that faults in it show before the tokenizer is loaded.
    reading = {"columns": args.columns, "as_chat": args.as_chat, "objective": args.objective}
    sources = read_sources(args.paths, args.data_format, **reading)
    is_preferences = any(example.rejected is not None for source in sources for example in source.examples)
    for note in (note for source in sources for note in source.notes):
        say(note)
    say()
    tokenizer = bases.load_tokenizer(args.model)
    encoded = load_examples(
        sources,
        tokenizer,
        seq_len=args.seq_len,
        objective=args.objective or ("dpo" if is_preferences else "clm"),
        max_samples=args.max_samples or None,
        seed=args.seed,
    )
    colour = _is_coloured(args.color)
    for number, (example, text) in enumerate(zip(encoded.examples, encoded.texts, strict=True), 1):
        if number > args.count:
            break
        say(f"{number}. {text.source}: {len(example)} tokens, {example.trained_tokens} trained")
        for name, row in zip(("chosen: ", "rejected: "), example.rows, strict=False):
            say((name if len(example.rows) > 1 else "") + _painted(row, tokenizer, colour))
        say()
    for item in encoded.out[: args.count]:
        length = f" ({item.tokens:,} tokens)" if item.tokens else ""
        say(f"dropped {item.example.source}: {item.reason}{length}")
    if encoded.out:
        say()
    say(_summary(encoded))
    if encoded.length_warning:
        say(f"\nwarning: {encoded.length_warning}")


def _painted(example: TokenExample, tokenizer: Any, colour: bool) -> str:
    """Returns the tokens separated by dots, with runs of trained tokens in green or in brackets."""
    painted = []
    for is_trained, run in itertools.groupby(zip(example.ids, example.trained, strict=True), key=lambda pair: pair[1]):
        text = "·".join(token_texts([token for token, _ in run], tokenizer))
        if colour:
            painted.append(f"{_TRAINED if is_trained else _GIVEN}{text}{_RESET}")
        else:
            painted.append(f"[{text}]" if is_trained else text)
    return "".join(painted)


def _summary(encoded: Encoded) -> str:
    lengths = [len(example) for example in encoded.examples]
    rows: list[tuple[str, object]] = [
        ("examples", len(lengths)),
        ("of all in the data", encoded.given),
        ("different prompts", len({text.prompt for text in encoded.texts})),
        ("tokens", sum(lengths)),
        ("trained tokens", sum(example.trained_tokens for example in encoded.examples)),
        ("tokens of the longest", max(example.longest for example in encoded.examples)),
        *((f"dropped: {reason}", number) for reason, number in encoded.dropped.items()),
    ]
    return table(rows)


def _is_coloured(choice: str) -> bool:
    """Tells whether to use colour: on a terminal, unless the user opted out (https://no-color.org)."""
    if choice != "auto":
        return choice == "always"
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    if is_terminal and os.name == "nt":
        os.system("")  # enables colour codes in older Windows consoles
    return is_terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


# --- convert and decode --------------------------------------------------------------------------------------------


def _add_convert(actions: Any) -> None:
    parser = actions.add_parser(
        "convert",
        help="convert E2E, DART or WebNLG to the LoRA paper's JSONL, as text or as token ids",
        description="Reads E2E (`meaning representation||text` lines, or the challenge's CSV), DART (JSON) or WebNLG "
        "(JSON or XML) and writes JSONL with context and completion; with --vocab as GPT-2 token ids. The input "
        "may also be a JSONL file that this command wrote.",
        epilog="example: loralib data convert dev.json dev_encoded.jsonl --vocab gpt2 --add_bos --add_eos",
    )
    parser.add_argument("input", help="the published file")
    parser.add_argument("output", help="the JSONL file to write")
    add_format(parser, "format of the input", "e2e", "jsonl", "dart", "webnlg")
    parser.add_argument(
        "--vocab", metavar="DIR", help="a directory with GPT-2's vocab.json and merges.txt: write token ids"
    )
    parser.add_argument("--add_bos", action="store_true", help="end each context with the end-of-text token")
    parser.add_argument("--add_eos", action="store_true", help="end each completion with the end-of-text token")


def _convert(args: argparse.Namespace) -> None:
    if (args.add_bos or args.add_eos) and not args.vocab:
        raise ConfigError("--add_bos and --add_eos add token ids, so they need GPT-2's vocabulary: give --vocab.")
    _refuse_loss([args.input], [args.output])
    format = guess_format(args.input) if args.data_format == "auto" else args.data_format
    if format not in ("e2e", "jsonl", "dart", "webnlg"):
        raise ConfigError(
            f"{args.input} is {format}, expected E2E, DART, WebNLG or a JSONL file that this command wrote."
        )
    rows = convert.read_formatted(args.input) if format == "jsonl" else read_rows(args.input, format)
    if args.vocab:
        encoded = convert.encode_rows(rows, convert.load_bpe(args.vocab), add_bos=args.add_bos, add_eos=args.add_eos)
        write_text(args.output, convert.format_encoded(encoded))
    else:
        write_text(args.output, convert.format_rows(rows))
    say(f"{args.output}: {len(rows):,} rows from {args.input} ({format})")


def _refuse_loss(read: Sequence[str], written: Sequence[str]) -> None:
    """Refuses to overwrite an input or another output of the same command."""
    files = [Path(path).resolve() for path in [*read, *written]]
    for number, path in enumerate(written, len(read)):
        if files[number] in files[:number]:
            other = "an input" if files[number] in files[: len(read)] else "another output"
            raise OutputError(f"{path} is also {other} of this command and would be overwritten. Choose another file.")


def _add_decode(actions: Any) -> None:
    decode = actions.add_parser(
        "decode",
        help="convert predicted GPT-2 token ids to text, and the references to the official scorers' layout",
        description="Converts the token ids that a beam search wrote to one text per line, and the references for the "
        "same inputs to the scorers' layout: one file with blank lines for E2E, a directory with "
        "reference0, reference1, ... for DART and WebNLG.",
    )
    decode.add_argument(
        "--vocab", required=True, metavar="DIR", help="a directory with GPT-2's vocab.json and merges.txt"
    )
    decode.add_argument("--sample_file", required=True, metavar="FILE", help="JSONL with id and predict")
    decode.add_argument(
        "--input_file", required=True, metavar="FILE", help="the JSONL file from loralib data convert that was decoded"
    )
    decode.add_argument(
        "--output_pred_file", required=True, metavar="FILE", help="file for the predictions, one per line"
    )
    decode.add_argument(
        "--output_ref_file", required=True, metavar="PATH", help="file for the references; a directory, except for e2e"
    )
    decode.add_argument("--ref_type", default="e2e", choices=("e2e", "webnlg", "dart"), help="layout of references")
    decode.add_argument(
        "--ref_num", type=int, default=4, metavar="N", help="number of reference files, except for e2e (default: 4)"
    )
    decode.add_argument("--tokenize", action="store_true", help="put spaces around punctuation")
    decode.add_argument("--lower", action="store_true", help="convert to lower case")
    decode.add_argument(
        "--filter",
        default="all",
        choices=("all", "seen", "unseen"),
        help="WebNLG: keep only categories seen, or unseen, in training",
    )


def _decode(args: argparse.Namespace) -> None:
    if args.ref_num < 1:
        raise ConfigError(f"ref_num is {args.ref_num}, expected at least 1.")
    files = [args.output_pred_file, args.output_ref_file]
    if args.ref_type != "e2e":
        files += [str(Path(args.output_ref_file) / f"reference{number}") for number in range(args.ref_num)]
    _refuse_loss([args.sample_file, args.input_file], files)
    decoded = convert.decode_predictions(
        convert.read_formatted(args.input_file),
        convert.read_predictions(args.sample_file),
        convert.load_bpe(args.vocab),
        tokenize=args.tokenize,
        lower=args.lower,
        filter=args.filter,
    )
    if args.ref_type == "e2e":
        write_text(args.output_ref_file, decoded.reference_file)
    else:
        for number, text in enumerate(decoded.reference_columns(args.ref_num)):
            write_text(Path(args.output_ref_file) / f"reference{number}", text)
    write_text(args.output_pred_file, decoded.prediction_file)
    say(f"{args.output_pred_file}: {len(decoded.predictions):,} predictions; references in {args.output_ref_file}")


# --- e2e -----------------------------------------------------------------------------------------------------------


def _add_e2e(actions: Any) -> None:
    e2e = actions.add_parser(
        "e2e",
        help="download the full E2E NLG Challenge data (51,426 texts, 12 MB, CC BY-SA 4.0)",
        description="Downloads the E2E data from its authors' GitHub repository, checks SHA-256 checksums, and writes "
        "train.txt, valid.txt and test.txt for --train_data and --valid_data. The sample in examples/NLG is a "
        "different, smaller set, written for this project.",
    )
    e2e.add_argument("directory", help="directory for train.txt, valid.txt and test.txt")
    e2e.add_argument("--source", help="URL of a mirror, or a directory with the three CSV files")
    e2e.add_argument("--overwrite", action="store_true", help="replace existing files")


def _e2e(args: argparse.Namespace) -> None:
    for path in fetch_e2e(args.directory, source=args.source or SOURCE, overwrite=args.overwrite):
        say(path)
