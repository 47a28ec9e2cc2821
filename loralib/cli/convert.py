"""Turn an adapter into a form that another tool computes rightly, and check what was written.

loralib convert lora_model portable --target vllm
loralib convert lora_model lora.gguf --target llamacpp --base smollm2-135m
loralib convert GPT2_M.bin adapter --lora_dim 4 --lora_alpha 32 --target_modules c_attn --enable_lora 1,0,1

Other tools ignore parts of an adapter's settings without a word: rsLoRA, alphas of single modules, PiSSA's start.  The
result has none of those: the scaling is in the weights, all modules have one rank.  What cannot be said so, or is not
loaded there, is refused with the reason.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ._adapters import DTYPES, add_adapter_arguments, read, read_with_base, require_output

if TYPE_CHECKING:
    from ..adapter import Adapter


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    add_adapter_arguments(parser)
    parser.add_argument("output", metavar="OUTPUT", help="directory to write; for llamacpp and microsoft a file")
    parser.add_argument(
        "--target",
        default="peft",
        choices=("peft", "vllm", "llamacpp", "mlx", "microsoft"),
        help="tool that the result is for (default peft); microsoft: the flat file of its loralib, unchanged",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the result (default: as it is; GGUF: fp32)")
    parser.add_argument("--rank", type=int, metavar="R", help="give the result this rank, and say how far off it is")
    parser.add_argument(
        "--max_error",
        type=float,
        default=0.01,
        metavar="X",
        help="largest relative error to accept for DoRA without --rank (default 0.01)",
    )
    parser.add_argument(
        "--initial_adapter", metavar="DIR", help="the adapter as saved before training (CorDA, randomised PiSSA)"
    )


def run(args: argparse.Namespace) -> None:
    """Converts."""
    import torch

    from ..bases import pick_dtype
    from ..combine import depends_on_base
    from ..console import say
    from ..errors import ConfigError
    from ..formats import export, make_portable, write_microsoft

    require_output(args.output)
    if args.rank is not None and args.rank < 1:
        raise ConfigError(f"--rank is {args.rank}, expected a whole number of at least 1")
    if args.target == "microsoft":
        adapter, _, _ = read_with_base(args.adapter, args, lambda _: False)
        write_microsoft(adapter, args.output)
        say(f"{len(adapter.tensors)} tensors written to {args.output}")
        return

    def needs_base(adapter: Adapter) -> bool:
        return args.target in ("llamacpp", "mlx") or depends_on_base(adapter)

    adapter, model, _ = read_with_base(args.adapter, args, needs_base)
    initial = read(args.initial_adapter, args) if args.initial_adapter else None
    portable = make_portable(adapter, args.target, model, r=args.rank, max_error=args.max_error, initial=initial)
    dtype = None if args.dtype is None else pick_dtype(args.dtype, torch.device("cpu"))
    moved = export(portable, args.target, args.output, model, dtype=dtype)
    for note in portable.notes:
        say(f"  {note}")
    if model is None and args.target != "peft":
        say("  the base was not looked at (--base MODEL): layers that share weights were not checked for")
    exact = "exact" if portable.error == 0 else f"off by {portable.error:.2%} of the update"
    rounded = f", rounding to {args.dtype} moves an update by up to {moved:.2%}" if moved else ""
    say(f"{len(portable.adapter.modules)} modules written to {args.output}, read back and compared: {exact}{rounded}")
