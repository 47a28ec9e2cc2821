"""Convert an adapter to a form that another tool applies correctly, and check what was written.

loralib convert lora_model portable --target vllm
loralib convert lora_model lora.gguf --target llamacpp --model smollm2-135m
loralib convert GPT2_M.bin adapter --trained_rank 4 --lora_alpha 32 --target_modules c_attn --enable_lora 1,0,1

Other tools silently ignore some settings of an adapter: rsLoRA, per-module alphas, PiSSA's initialisation.  The result
needs none of them: the scaling is part of the weights, and all modules have the same rank.  Whatever cannot be
expressed this way, or would not load in the tool, is refused with the reason.
"""

from __future__ import annotations

import argparse
from textwrap import indent
from typing import Any

import torch
from torch import nn

from ..adapter import Adapter
from ..bases import is_classifier, load_adapters_tokenizer, pick_dtype
from ..bases.classifiers import labels_in
from ..combine import depends_on_base
from ..config import HUB_NAMES
from ..console import counted, say
from ..errors import ConfigError
from ..formats import export, how_to_run, make_portable, modelfile, write_microsoft
from ._adapters import FILE_DTYPES, add_adapter_arguments, check_checkpoint_flags, output_held, read, read_with_base


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the adapter, the output and the target tool."""
    add_adapter_arguments(parser, "directory to write (for llamacpp and microsoft: file)", makes_rank=True)
    parser.add_argument(
        "--target",
        default="peft",
        choices=("peft", "vllm", "llamacpp", "mlx", "microsoft"),
        help="the tool that will use the result (default peft); microsoft: a flat file for Microsoft's loralib, "
        "unchanged",
    )
    parser.add_argument("--dtype", choices=FILE_DTYPES, help="dtype of the result (default: unchanged; GGUF: fp32)")
    parser.add_argument("--rank", type=int, metavar="N", help="rank of the result; its error is printed")
    parser.add_argument(
        "--max_error",
        type=float,
        default=0.01,
        metavar="X",
        help="largest relative error to accept for DoRA without --rank (default 0.01)",
    )


def run(args: argparse.Namespace) -> None:
    """Converts the adapter and checks the written result."""
    if args.rank is not None and args.rank < 1:
        raise ConfigError(f"--rank is {args.rank}, expected a whole number of at least 1")
    check_checkpoint_flags(args, args.adapter, args.initial_adapter)
    is_directory = args.target not in ("llamacpp", "microsoft")
    with output_held(args.output, args.adapter, args.initial_adapter, is_directory=is_directory):
        _convert(args)


def _convert(args: argparse.Namespace) -> None:
    if args.target == "microsoft":
        adapter, _, _ = read_with_base(args.adapter, args, lambda _: False)
        write_microsoft(adapter, args.output)
        say(f"{counted(len(adapter.tensors), 'tensor')} written to {args.output}")
        return

    def needs_base(adapter: Adapter) -> bool:
        return args.target in ("llamacpp", "mlx") or depends_on_base(adapter)

    adapter, model, tokenizer = read_with_base(args.adapter, args, needs_base)
    labels = max(1, len(labels_in(adapter))) if is_classifier(adapter) else None
    initial = read(args.initial_adapter, args) if args.initial_adapter else None
    portable = make_portable(adapter, args.target, model, r=args.rank, max_error=args.max_error, initial=initial)
    dtype = None if args.dtype is None else pick_dtype(args.dtype, torch.device("cpu"))
    moved = export(portable, args.target, args.output, model, dtype=dtype)
    for note in portable.notes:
        say(f"  {note}")
    if model is None and args.target != "peft":
        say("  the base model was not checked for layers that share weights (give --model MODEL to check it)")
    exact = "exact" if portable.error == 0 else f"off by {portable.error:.2%} of the update"
    rounded = f", rounding to {args.dtype} changes an update by up to {moved:.2%}" if moved else ""
    written = f"{counted(len(portable.adapter.modules), 'module')} written to {args.output}"
    say(f"{written}, read back and compared: {exact}{rounded}")
    _tell_how_to_run(args, portable.adapter, model, tokenizer, labels)


def _tell_how_to_run(
    args: argparse.Namespace, adapter: Adapter, model: nn.Module | None, tokenizer: Any, labels: int | None
) -> None:
    base = args.model or adapter.config.base_model_name_or_path
    r = max(adapter.config.rank_of(name) for name in adapter.modules)
    say("\nTo use it:")
    for line in how_to_run(args.target, args.output, base, r, adapter.config.task_type, labels):
        say(f"  {line}")
    if args.target == "llamacpp" and model is not None:
        own = load_adapters_tokenizer(args.adapter, model)
        say("\nor with Ollama, in a Modelfile:")
        say(indent(modelfile(args.output, tokenizer if own is None else own).rstrip(), "  "))
    if base is not None and base in HUB_NAMES:
        say(
            f"\nThe adapter was trained on {base}, a copy of {HUB_NAMES[base]} with 4-bit precision:\nexpect small "
            "differences on the original. `loralib export-base DIR` writes the copy itself."
        )
