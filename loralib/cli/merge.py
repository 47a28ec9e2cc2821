"""Merge an adapter into its base model, and write a model that transformers' from_pretrained loads on its own.

loralib merge lora_model merged
loralib merge lora_model merged --model ./my-model --dtype fp32

The arithmetic is fp32 and rounds once, to --dtype.  Each merged weight is checked against the files of the base and the
adapter; the effect on the logits of a few prompts is shown next to what rounding alone would cause; and the written
model is reloaded and compared before the command reports success.  A tokenizer saved with the adapter is copied too.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

import torch

from ..adapter import QUANTIZE
from ..bases import is_classifier, load_adapters_tokenizer, load_base, pick_dtype
from ..bases.classifiers import load_classifier
from ..bases.quant import make_dense, round_model
from ..console import counted, say
from ..data import prompt_ids
from ..engine.limits import input_limit
from ..errors import ConfigError, MergeError, OutputError
from ..formats import merge_and_compare, save_merged
from ..injection import quantization_of
from ._adapters import (
    FILE_DTYPES,
    PROMPTS,
    add_adapter_arguments,
    add_quantize,
    check_checkpoint_flags,
    output_held,
    read,
    read_with_base,
)

# Both formats are off by a third at most, unless a weight has hardly anything but outliers.
_MAX_ROUNDING: Final = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the adapter, the output and how to write it."""
    add_adapter_arguments(parser, "directory of the merged model")
    text = "dtype of the merged weights in the files; not auto, which depends on the machine (default bf16)"
    parser.add_argument("--dtype", default="bf16", choices=FILE_DTYPES, help=text)
    parser.add_argument(
        "--max_shard_size", default="5GB", metavar="SIZE", help="maximum size of each weight file (default 5GB)"
    )
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="compare logits on this text; may be repeated"
    )
    add_quantize(parser, "merge into the base's weights as quantised during a run with --quantize")
    parser.add_argument("--requantize", action="store_true", help=argparse.SUPPRESS)  # refused, with the reason
    parser.add_argument(
        "--allow_base_mismatch",
        action="store_true",
        help="merge even if the base's weights differ from those in training",
    )


def run(args: argparse.Namespace) -> None:
    """Merges, writes the model, loads it again and compares the two."""
    if args.requantize:
        raise ConfigError(
            "--requantize: merged weights cannot be quantised again to 4 or 8 bits. The steps between two levels are "
            "larger than most of what an adapter adds, so rounding would undo it. Serve the merged model as written; "
            "or keep base and adapter separate, as `loralib generate --adapter DIR --quantize nf4` does."
        )
    check_checkpoint_flags(args, args.adapter, args.initial_adapter)
    with output_held(args.output, args.adapter, args.initial_adapter, what="model"):
        _merge(args)


def _merge(args: argparse.Namespace) -> None:
    def check_base(name: str) -> None:
        base, output = Path(name), Path(args.output)
        if base.is_dir() and base.resolve() == output.resolve():
            raise OutputError(
                f"{output} is the base model itself, which would be overwritten; choose another directory"
            )

    adapter, model, tokenizer = read_with_base(args.adapter, args, lambda _: True, check_base)
    assert model is not None
    own = load_adapters_tokenizer(args.adapter, model)
    if own is not None:
        tokenizer = own
        say(f"The merged model gets the tokenizer{' and chat template' * bool(own.chat_template)} of the adapter")
    own = quantization_of(model)  # the base may have been quantised by another tool
    make_dense(model)
    if args.quantize != "none":
        rounding = round_model(model, args.quantize)
        say(
            f"The base's linear layers have their {args.quantize} values, off by {rounding.total:.2%} of the weights' "
            f"norm; at most by {rounding.most:.2%}, in {rounding.where}"
        )
        if not rounding.most <= _MAX_ROUNDING:
            raise MergeError(
                f"{rounding.where} is off by {rounding.most:.2%} of its norm in {args.quantize}, expected at most "
                f"{_MAX_ROUNDING:.0%}: its values are not finite, or these bits cannot hold them. Nothing was merged. "
                "Leave out --quantize, and train without it."
            )
    elif (held := adapter.metadata.get(QUANTIZE, own)) != own:
        say(f"note: the adapter was trained on the base in {held}; --quantize {held} merges into exactly those weights")
    limit = input_limit(model, tokenizer)
    inputs = [torch.tensor(prompt_ids(prompt, tokenizer)[:limit]) for prompt in args.prompt or PROMPTS]
    dtype = pick_dtype(args.dtype, torch.device("cpu"))
    report = merge_and_compare(
        model,
        adapter,
        inputs,
        dtype,
        initial=read(args.initial_adapter, args) if args.initial_adapter else None,
        allow_base_mismatch=args.allow_base_mismatch,
    )
    say(report)
    files = save_merged(model, args.output, tokenizer, max_shard_size=args.max_shard_size)
    load = load_classifier if is_classifier(adapter) else load_base
    back, _ = load(args.output, dtype=args.dtype, device="cpu")
    ours, theirs = model.state_dict(), back.state_dict()
    differ = [name for name, tensor in ours.items() if name not in theirs or not torch.equal(tensor, theirs[name])]
    if differ:
        raise MergeError(
            f"{args.output} was written, but from_pretrained loads different weights for {', '.join(differ[:4])}; do "
            "not use it, and please report this"
        )
    say(f"{counted(len(files), 'file')} written to {args.output}, reloaded and compared: identical, bit for bit")
