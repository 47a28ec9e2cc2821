"""Check whether a running server applies an adapter correctly.

loralib verify http://localhost:8000 --adapter lora_model
loralib verify http://localhost:8080 --adapter lora_model --model 0
loralib verify http://localhost:11434 --adapter lora_model --model mine --base_model smollm2

The server is asked for the log-probabilities of texts with the adapter and with the base alone, which are then compared
with those computed locally.  It can be loralib's own server, vLLM, SGLang, llama.cpp, Ollama, or any other with
OpenAI's API.  --model is the adapter's name on the server; for llama.cpp, its number.

The exit code is 0 if the adapter works as it should, 1 if it does not, and 2 if that could not be determined.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any, Final

from ..bases import base_of, load_base, refuse_classifier, resize_tables_for, tokenizer_for
from ..console import counted, say, table
from ..engine.limits import context_length
from ..errors import BaseModelError, ConfigError, DataError
from ..formats import is_read_with_base, read_adapter, with_present_names
from ..verify import Reference, Verdict, Vocabulary, connect, judge
from ._adapters import ADAPTER_HELP, add_dtype
from ._flags import add_flag

_LONGEST: Final = 256  # maximum number of tokens of a text
_FEW: Final = 50
# Prose, facts, dialogue, code and lists, so that an adapter's effect shows on some of them.
_TEXTS: Final = (
    "The old harbour had been quiet for years before the ferries came back. Every morning a few people stood at the "
    "railing, held their coffee in both hands, and watched the boats turn slowly in the grey water before they left "
    "for the islands. Nobody asked where the others were going.",
    "Water boils at a lower temperature on a mountain, because the pressure of the air is lower there. For every "
    "three hundred metres of height the boiling point falls by about one degree Celsius, so that potatoes take longer "
    "to cook in a hut than in a kitchen at the coast.",
    "Question: How do I keep bread fresh for longer?\nAnswer: Keep it in a paper bag at room temperature for two days, "
    "and freeze what is left in slices. Do not put it into the fridge, where it becomes stale sooner.\nQuestion: Can I "
    "freeze cheese?\nAnswer: Hard cheese can be frozen, but it crumbles afterwards.",
    "def average(values):\n    total = 0\n    for value in values:\n        total += value\n    return total / "
    "len(values)\n\n\ndef largest(values):\n    best = values[0]\n    for value in values[1:]:\n        if value > "
    "best:\n            best = value\n    return best\n",
    "name : The Wooden Boat | Type : coffee shop | food : Italian | price : moderate | area : harbour\nThe Wooden Boat "
    "is a coffee shop in the harbour area that serves Italian food at moderate prices. Families are welcome, and "
    "guests rate it five out of five.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the server, the adapter, and the names of both there."""
    parser.add_argument("url", metavar="URL", help="address of the server, such as http://localhost:8000")
    parser.add_argument("--adapter", required=True, metavar="ADAPTER", help=ADAPTER_HELP)
    parser.add_argument("--model", metavar="NAME", help="the server's name for the adapter (default: the only one)")
    parser.add_argument(
        "--base_model", metavar="NAME", help="the server's name for the base (default: the one it reports)"
    )
    add_flag(parser, "--reference", metavar="MODEL", help="base model to compute with locally (default: the adapter's)")
    add_dtype(parser, "dtype of the local computation (default fp32)", default="fp32")
    parser.add_argument("--device", help="cpu, cuda, mps, ... (default: cpu)", default="cpu")
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="a text like those in training; may be repeated (default: a few texts of various kinds)",
    )
    parser.add_argument(
        "--api_key", metavar="KEY", help="the server's API key (default: the environment variable LORALIB_API_KEY)"
    )
    parser.add_argument(
        "--timeout", type=float, default=120.0, metavar="S", help="seconds to wait for an answer (default 120)"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the verdict and returns the exit code."""
    if not args.timeout > 0:
        raise ConfigError(f"--timeout is {args.timeout:g}, expected a positive number of seconds")
    model, tokenizer, adapter = _load(args)
    rows = _rows(model, tokenizer, [text.replace("\\n", "\n") for text in args.prompt or _TEXTS])
    key = args.api_key or os.environ.get("LORALIB_API_KEY")
    server = connect(
        args.url, Vocabulary(tokenizer), model=args.model, base_model=args.base_model, api_key=key, timeout=args.timeout
    )
    say(f"Asking {args.url} ({server.kind}) ...")
    adapted = server.ask(rows, adapted=True)
    base = server.ask(rows, adapted=False) if server.base is not None else None
    with Reference.of(model, adapter) as reference:
        verdict = judge(reference, adapted, base)
    asked = [
        ("adapter", server.adapter or "none is loaded on the server"),
        ("base", server.base or "not asked (--base_model)"),
    ]
    say(f"\n{table([*asked, *_figures(verdict)])}\n\n{verdict.text[0].upper()}{verdict.text[1:]}.")
    if verdict.positions < _FEW:
        say(
            f"note: {counted(verdict.positions, 'position')} in texts are too few to tell much; give more with --prompt"
        )
    return verdict.exit_code


def _load(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    value = None if is_read_with_base(args.adapter) else read_adapter(args.adapter)
    if value is None and args.reference is None:
        raise BaseModelError(f"{args.adapter} does not name its base model; give --reference MODEL")
    if value is not None:
        refuse_classifier(value, args.adapter)
    model, tokenizer = load_base(base_of(value, args.reference), dtype=args.dtype, device=args.device)
    value = read_adapter(args.adapter, model=model) if value is None else with_present_names(value, model)
    resize_tables_for(value, model)
    return model, tokenizer_for(args.adapter, model, tokenizer), value


def _rows(model: Any, tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Returns the token ids of the texts, cut to what the model can take."""
    longest = min(context_length(model) or _LONGEST, _LONGEST) - 1
    rows = [list(tokenizer(text)["input_ids"])[:longest] for text in texts]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise DataError("the texts given with --prompt have fewer than two tokens each; give longer ones")
    return rows


def _figures(verdict: Verdict) -> list[tuple[str, str]]:
    """Returns a verdict's figures as rows of a table."""

    def nats(value: float) -> str:
        return f"{value:.4g} nats per token"

    rows = [
        ("compared", f"{counted(verdict.values, 'value')} at {counted(verdict.positions, 'position')} in texts"),
        ("from the adapter", nats(verdict.from_adapter)),
        ("from the base", nats(verdict.from_base)),
        ("local effect", nats(verdict.effect)),
    ]
    if verdict.base_error is not None:
        rows.append(("base from base", nats(verdict.base_error)))
    if verdict.scale is not None and verdict.scale_error is not None:
        rows.append(("best scale", f"{verdict.scale:.3g}, with {nats(verdict.scale_error)} remaining"))
    return rows
