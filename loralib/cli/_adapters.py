"""What the commands on adapters share: reading them in any format, and their bases."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from ..adapter import Adapter

DTYPES = ("fp32", "bf16", "fp16")
# What a model is asked where the user gives no prompts: a few kinds of text.
PROMPTS = (
    "name : The Wooden Boat | Type : coffee shop | food : Italian | area : harbour\n",
    "The capital of France is",
    "Once upon a time there was a",
    "1, 2, 3, 4,",
)


def add_adapter_arguments(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Adds the adapter's path, its base, and what a checkpoint of Microsoft's loralib does not say."""
    parser.add_argument(
        "adapters" if several else "adapter",
        nargs="+" if several else None,
        metavar="ADAPTER",
        help="a PEFT or MLX directory, a GGUF LoRA file, or a checkpoint of Microsoft's loralib",
    )
    parser.add_argument(
        "--base", metavar="MODEL", help="base model: a name or path; default: the one that the adapter names"
    )
    group = parser.add_argument_group("for a checkpoint of Microsoft's loralib, which does not say its settings")
    group.add_argument("--lora_dim", type=int, metavar="N", help="rank r it was trained with")
    group.add_argument("--lora_alpha", type=float, metavar="X", help="lora_alpha it was trained with")
    group.add_argument("--target_modules", nargs="+", metavar="NAME", help="adapted modules, as c_attn")
    group.add_argument(
        "--enable_lora", metavar="BOOLS", help="adapted blocks of fused projections, as 1,0,1 for q and v of GPT-2"
    )
    group.add_argument("--modules_to_save", nargs="+", metavar="NAME", help="modules in it trained in full: classifier")


def add_model_arguments(parser: argparse._ActionsContainer) -> None:
    """Adds what `loralib.bases.load_adapted` wants to know: the adapter, its base, and how to load it."""
    parser.add_argument(
        "--adapter",
        metavar="ADAPTER",
        help="an adapter to put on the base model: a PEFT or MLX directory, or a GGUF LoRA file",
    )
    parser.add_argument("--model", help="base model (default: the adapter's, else smollm2-135m)")
    parser.add_argument("--dtype", help="fp32, bf16 or fp16 (default: bf16 where it is fast)")
    parser.add_argument("--device", help="cpu, cuda, mps ... (default: the fastest there is)")


def require_output(path: str) -> None:
    """Refuses an output without a name, which would be the current directory.

    Raises:
        ConfigError: the name is empty.
    """
    from ..errors import ConfigError

    if not path.strip():
        raise ConfigError(f"the output is {path!r}, expected the name of what to write (. is the current directory)")


def read(path: str, args: argparse.Namespace, model: nn.Module | None = None) -> Adapter:
    """Reads an adapter in any format; `model` is needed for GGUF and MLX."""
    from ..config import LoraConfig
    from ..errors import ConfigError
    from ..formats import read_adapter

    config = None
    if args.lora_dim is not None:
        if args.lora_alpha is None or args.target_modules is None:
            raise ConfigError("--lora_dim goes with --lora_alpha and --target_modules")
        blocks = {}
        if args.enable_lora is not None:
            known = {"1": True, "0": False, "true": True, "false": False}
            words = [word.strip().lower() for word in args.enable_lora.split(",")]
            if not all(word in known for word in words):
                raise ConfigError(
                    f"--enable_lora is {args.enable_lora!r}, expected as many of 1 and 0 as blocks: 1,0,1"
                )
            blocks = {name: [known[word] for word in words] for name in args.target_modules}
        config = LoraConfig(
            r=args.lora_dim,
            lora_alpha=args.lora_alpha,
            target_modules=args.target_modules,
            enable_lora=blocks,
            modules_to_save=args.modules_to_save,
        )
    return read_adapter(path, config=config, model=model)


def read_with_base(
    path: str, args: argparse.Namespace, needs_base: Callable[[Adapter], bool]
) -> tuple[Adapter, nn.Module | None, Any]:
    """Reads an adapter and, where ``--base``, its format or the command asks for it, its base in fp32 and tokenizer."""
    from ..bases import load_base
    from ..console import say
    from ..errors import BaseModelError
    from ..formats import is_read_with_base

    adapter = None if is_read_with_base(path) else read(path, args)
    model, tokenizer = None, None
    if args.base or adapter is None or needs_base(adapter):
        name = args.base or (adapter.config.base_model_name_or_path if adapter is not None else None)
        if name is None:
            raise BaseModelError(f"{path} does not name its base model; give --base MODEL")
        say(f"Loading {name} ...")
        model, tokenizer = load_base(name, dtype="fp32", device="cpu")
    return (adapter if adapter is not None else read(path, args, model)), model, tokenizer
