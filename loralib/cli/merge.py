"""Write base and adapter as one model that transformers' from_pretrained loads without anything else.

loralib merge lora_model merged
loralib merge lora_model merged --base ./my-model --dtype fp32

The arithmetic is fp32 and rounds once, to --dtype.  What that does to the logits of a few prompts is shown beside what
rounding must be expected to do, and the written model is loaded and compared before the command says done.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ._adapters import DTYPES, PROMPTS, add_adapter_arguments, read, read_with_base, require_output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    add_adapter_arguments(parser)
    parser.add_argument("output", metavar="OUTPUT", help="directory of the merged model")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES, help="of the merged weights (default bf16)")
    parser.add_argument(
        "--max_shard_size", default="5GB", metavar="SIZE", help="largest file; larger models take several (default 5GB)"
    )
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="compare logits here; may be given again")
    parser.add_argument(
        "--initial_adapter", metavar="DIR", help="the adapter as saved before training (CorDA, randomised PiSSA)"
    )
    parser.add_argument(
        "--allow_base_mismatch", action="store_true", help="merge although the base has other values than in training"
    )


def run(args: argparse.Namespace) -> None:
    """Merges."""
    import torch

    from ..bases import load_base, pick_dtype
    from ..console import say
    from ..data import prompt_ids
    from ..errors import MergeError, OutputError
    from ..formats import merge_and_compare, save_merged

    require_output(args.output)
    adapter, model, tokenizer = read_with_base(args.adapter, args, lambda _: True)
    assert model is not None
    base = Path(args.base or adapter.config.base_model_name_or_path or "")
    if base.is_dir() and base.resolve() == Path(args.output).resolve():
        raise OutputError(f"{args.output} is the base model itself, which would be lost; choose another directory")
    inputs = [torch.tensor(prompt_ids(prompt, tokenizer)) for prompt in args.prompt or PROMPTS]
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
    back, _ = load_base(args.output, dtype=args.dtype, device="cpu")
    ours, theirs = model.state_dict(), back.state_dict()
    differ = [name for name, tensor in ours.items() if name not in theirs or not torch.equal(tensor, theirs[name])]
    if differ:
        raise MergeError(
            f"{args.output} was written, but from_pretrained gives other weights for {', '.join(differ[:4])}; "
            "do not use it, and report this"
        )
    say(f"{len(files)} files written to {args.output}, loaded again and compared: equal, bit for bit")
