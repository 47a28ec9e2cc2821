"""Write a base model for tools that load a directory: config, safetensors and tokenizer, as transformers saves them.

loralib export-base base
loralib export-base base --model scratch --dtype fp32

The default base comes in a package, as a copy of SmolLM2-135M-Instruct with 4-bit precision.  PEFT, vLLM and other
tools cannot load it from there or from the hub; they can load it from such a directory.
"""

from __future__ import annotations

import argparse

from ..bases import DEFAULT_BASE, load_base
from ..bases.quant import make_dense
from ..config import HUB_NAMES
from ..console import say
from ..errors import BaseModelError
from ..files import write_text
from ..formats import save_merged
from ._adapters import FILE_DTYPES, Output, output_held
from ._flags import add_flag


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the output directory and the base."""
    parser.add_argument("output", action=Output, metavar="DIR", help="directory to write")
    add_flag(parser, "--model", "--base", default=DEFAULT_BASE, help=f"base model (default {DEFAULT_BASE})")
    parser.add_argument("--dtype", default="bf16", choices=FILE_DTYPES, help="dtype of the weights (default bf16)")


def run(args: argparse.Namespace) -> None:
    """Writes the base, loads it again and compares the two."""
    with output_held(args.output, args.model, what="model"):
        say(f"Loading {args.model} ...")
        model, tokenizer = load_base(args.model, dtype=args.dtype, device="cpu")
        make_dense(model)  # the base may hold quantised weights, for one from a GGUF file
        files = save_merged(model, args.output, tokenizer)
        if args.model in HUB_NAMES:
            write_text(f"{args.output}/README.md", _CARD.format(ours=args.model, original=HUB_NAMES[args.model]))
        back, _ = load_base(args.output, dtype=args.dtype, device="cpu")
        ours, theirs = model.state_dict(), back.state_dict()
        differ = [name for name, tensor in ours.items() if name not in theirs or not tensor.equal(theirs[name])]
        if differ:
            raise BaseModelError(
                f"{args.output} was written, but from_pretrained loads different weights for {', '.join(differ[:4])}; "
                "do not use it, and please report this"
            )
        say(f"{len(files)} files written to {args.output}, reloaded and compared: identical, bit for bit")
        say(f"To use it as an adapter's base: --model {args.output}, or this path in another tool")


_CARD = """---
base_model: {original}
license: apache-2.0
---

# {ours}

A copy of {original} that was made from a 4-bit file: its weights have only 4-bit precision, so it is slightly worse
than the original. Adapters that loralib trains on {ours} are trained on these weights.
"""
