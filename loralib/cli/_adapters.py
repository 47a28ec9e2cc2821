"""What the commands share: flags that name a model, adapter and output, and reading an adapter in any format."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from ..adapter import Adapter
from ..bases import is_classifier, load_adapted, load_base, resize_tables_for
from ..bases.classifiers import load_classifier_for
from ..bases.device import DTYPES, pick_device, pick_dtype
from ..bases.made_up import is_made_up
from ..bases.quant import KINDS
from ..config import LoraConfig, parse_enable_lora
from ..console import say
from ..data import FORMATS
from ..errors import BaseModelError, ConfigError, OutputError
from ..files import hold_output
from ..formats import is_read_with_base, locate_adapter, read_adapter, stores_settings, with_present_names
from ..formats.tensors import CONFIG_FILE, MLX_FILE, PEFT_FILE, PEFT_PICKLE
from ..training.ranks import Ranks
from ._flags import add_flag, add_list

ADAPTER_HELP = "a PEFT or MLX directory, a GGUF LoRA file, or a checkpoint of Microsoft's loralib"
FILE_DTYPES = DTYPES[1:]  # what auto means depends on the machine, and files may go to another
# Varied prompts, used when the user gives none.
PROMPTS = (
    "name : The Wooden Boat | Type : coffee shop | food : Italian | area : harbour\n",
    "The capital of France is",
    "Once upon a time there was a",
    "1, 2, 3, 4,",
)


class Output(argparse.Action):
    """Stores the output path, given as the last argument or with -o."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        if namespace.output is not None:
            raise argparse.ArgumentError(self, f"{values!r} is a second output, expected only one")
        if not values.strip():
            raise argparse.ArgumentError(
                self, f"the output is {values!r}, expected a name (. for the current directory)"
            )
        namespace.output = values
        for action in parser._actions:
            if action.dest == "output":
                action.required = False


def load_on(ranks: Ranks, args: argparse.Namespace, *, merged: bool = False) -> tuple[nn.Module, Any]:
    """Loads the base and adapter that the flags name on each rank, in the same dtype on all (see `load_adapted`)."""
    device, dtype = ranks.device(args.device), args.dtype
    if ranks.size > 1 and dtype == "auto" and not is_made_up(args.model or ""):
        dtype = ranks.on_first_rank(lambda: str(pick_dtype(None, pick_device(device))))
    return ranks.in_turn(
        lambda: load_adapted(
            args.adapter, model=args.model, dtype=dtype, device=device, quantize=args.quantize, merged=merged
        )
    )


def add_adapter_arguments(parser: argparse.ArgumentParser, output: str | None = None, makes_rank: bool = False) -> None:
    """Adds the adapter, its base model, the output, and the settings that a Microsoft checkpoint does not store.

    `output` is the help text of the output path, if the command writes one; for `makes_rank`, see
    `add_checkpoint_arguments`.
    """
    parser.add_argument("adapter", metavar="ADAPTER", help=ADAPTER_HELP)
    parser.add_argument(
        "--initial_adapter", metavar="DIR", help="the adapter as it was saved before training (CorDA, randomised PiSSA)"
    )
    if output is not None:
        parser.add_argument("output", action=Output, metavar="OUTPUT", help=f"{output}; can also be given as -o OUTPUT")
        parser.add_argument("-o", "--output", action=Output, metavar="OUTPUT", help=argparse.SUPPRESS)
    add_checkpoint_arguments(parser, makes_rank)


def add_checkpoint_arguments(parser: argparse.ArgumentParser, makes_rank: bool) -> None:
    """Adds the base model, and the settings that a Microsoft checkpoint does not store.

    `makes_rank` tells whether ``--rank`` of this command means the rank of its result.
    """
    add_flag(parser, "--model", "--base", help="base model: a name or path (default: the one named in the adapter)")
    group = parser.add_argument_group("for a checkpoint of Microsoft's loralib, which does not store its settings")
    others = ("--lora_dim",) if makes_rank else ("--lora_dim", "--rank")
    add_flag(group, "--trained_rank", *others, type=int, metavar="N", help="rank r that it was trained with")
    group.add_argument("--lora_alpha", type=float, metavar="X", help="lora_alpha that it was trained with")
    add_list(group, "--target_modules", metavar="NAMES", help="adapted modules, as in q_proj,v_proj")
    text = "adapted blocks of fused projections, as in c_attn=1,0,1 (q and v of GPT-2)"
    group.add_argument("--enable_lora", metavar="BLOCKS", help=text)
    add_list(group, "--modules_to_save", metavar="NAMES", help="modules in it that were fully trained")


def add_model_arguments(parser: argparse._ActionsContainer, *, several: bool = False) -> None:
    """Adds the arguments of `loralib.bases.load_adapted`; with `several`, adapters may be named and repeated."""
    text = "adapter: a PEFT or MLX directory, or a GGUF LoRA file"
    if several:
        text += "; or NAME=ADAPTER, which may be repeated"
        parser.add_argument("--adapter", action="append", metavar="ADAPTER", help=text)
    else:
        parser.add_argument("--adapter", metavar="ADAPTER", help=text)
    add_flag(parser, "--model", "--base", help="base model (default: the adapter's, else smollm2-135m)")
    add_dtype(parser, "dtype of the base model; auto uses bf16 where it is fast (default auto)")
    parser.add_argument("--device", help="cpu, cuda, mps, ... (default: the fastest available)")
    add_quantize(parser, "store the base's weights in fewer bits")


def add_dtype(parser: argparse._ActionsContainer, help: str, default: str | None = "auto") -> None:
    """Adds ``--dtype``, for computing."""
    parser.add_argument("--dtype", choices=DTYPES, default=default, help=help)


def add_quantize(parser: argparse._ActionsContainer, help: str) -> None:
    """Adds ``--quantize``, the form of the base's weights; `help` says what it applies to."""
    parser.add_argument("--quantize", choices=("none", *KINDS), default="none", help=f"{help} (default none)")


def add_format(parser: argparse._ActionsContainer, help: str, *formats: str, default: str | None = "auto") -> None:
    """Adds ``--data_format`` with the choices auto and `formats`; `help` says which file it describes."""
    text = f"{help} (default auto)"
    add_flag(parser, "--data_format", "--format", default=default, choices=("auto", *formats), help=text)


@contextlib.contextmanager
def output_held(output: str, *inputs: str | None, is_directory: bool = True, what: str = "adapter") -> Iterator[None]:
    """Checks a command's output path before anything is loaded, and locks it while the command runs.

    Args:
        output: the path to write.
        inputs: the sources of the result: paths, or names that are not paths.
        is_directory: whether the output is a directory rather than a file.
        what: what is written, "adapter" or "model".

    Raises:
        OutputError: the output is one of the inputs, would mix with files already there, or cannot be written.
    """
    target = Path(output)
    for source in map(Path, filter(None, inputs)):
        if _is_same(source, target):
            raise OutputError(f"{output} is an input of this command and would be overwritten; {_ELSEWHERE}")
        for file, folder in ((source, target), (target, source)):
            if file.name in _FILES and _is_same(file.parent, folder):
                raise OutputError(
                    f"{file} is part of the adapter in {folder}, which would be overwritten; {_ELSEWHERE}"
                )
    other, loader = (("config.json", "a model"), (CONFIG_FILE, "an adapter"))[what == "model"]
    if is_directory and (target / other).exists():
        raise OutputError(
            f"{output} contains {loader}; from_pretrained would load model and adapter together. Choose another "
            "directory."
        )
    with hold_output(target, is_directory=is_directory):
        yield


_FILES = (CONFIG_FILE, PEFT_FILE, PEFT_PICKLE, MLX_FILE)
_ELSEWHERE = "choose another output"


def _is_same(first: Path, second: Path) -> bool:
    """Tells whether two paths lead to the same place, following links."""
    try:
        return first.samefile(second)
    except OSError:  # one of them does not exist
        return False


def add_reading(parser: argparse._ActionsContainer, help: str, default: str | None = "auto") -> None:
    """Adds the flags that say how to read training data, the same as in `loralib train`."""
    add_format(parser, help, *FORMATS[1:], default=default)
    text = "which field has which meaning, as in prompt=question,completion=answer; `system=` leaves a field out"
    parser.add_argument("--columns", metavar="TEXT", help=text)


def add_as_chat(parser: argparse._ActionsContainer) -> None:
    """Adds ``--as_chat``, which turns prompts and completions into chats."""
    text = "format prompts and completions with the model's chat template"
    parser.add_argument("--as_chat", action="store_true", help=text)


def read(path: str, args: argparse.Namespace, model: nn.Module | None = None) -> Adapter:
    """Reads an adapter in any format; GGUF and MLX need `model`."""
    needs_settings = locate_adapter(path).is_file() and not stores_settings(path)
    return read_adapter(path, config=_settings_of_checkpoint(path, args) if needs_settings else None, model=model)


def check_checkpoint_flags(args: argparse.Namespace, *adapters: str | None) -> None:
    """Refuses the flags for Microsoft checkpoints if all of a command's adapters store their own settings."""
    given, paths = _checkpoint_flags(args), [path for path in adapters if path]
    if given and all(map(stores_settings, paths)):
        verb = "stores its" if len(paths) == 1 else "store their"
        raise ConfigError(f"{', '.join(paths)} {verb} own settings; leave out {', '.join(given)}")


def _checkpoint_flags(args: argparse.Namespace) -> list[str]:
    """Returns those flags for Microsoft checkpoints that were given."""
    names = ("trained_rank", "lora_alpha", "target_modules", "enable_lora", "modules_to_save")
    return [f"--{name}" for name in names if getattr(args, name) is not None]


def _settings_of_checkpoint(path: str, args: argparse.Namespace) -> LoraConfig | None:
    """Returns the settings of a Microsoft checkpoint if any of its flags was given, else None."""
    given = _checkpoint_flags(args)
    if not given:
        return None
    missing = [name for name in ("--trained_rank", "--lora_alpha", "--target_modules") if name not in given]
    if missing:
        raise ConfigError(f"{path} does not store its settings, so it also needs {', '.join(missing)}")
    blocks = {} if args.enable_lora is None else parse_enable_lora(args.enable_lora, args.target_modules)
    return LoraConfig(
        r=args.trained_rank,
        lora_alpha=args.lora_alpha,
        target_modules=args.target_modules,
        enable_lora=blocks,
        modules_to_save=args.modules_to_save,
    )


def read_with_base(
    path: str,
    args: argparse.Namespace,
    needs_base: Callable[[Adapter], bool],
    check_base: Callable[[str], object] = lambda name: None,
) -> tuple[Adapter, nn.Module | None, Any]:
    """Reads an adapter, and its base (in fp32) and tokenizer if ``--model``, the format or `needs_base` calls for them.

    `check_base` is called with the base's name before it is loaded.
    """
    adapter = None if is_read_with_base(path) else read(path, args)
    model, tokenizer = None, None
    if args.model or adapter is None or needs_base(adapter):
        name = args.model or (adapter.config.base_model_name_or_path if adapter is not None else None)
        if name is None:
            raise BaseModelError(f"{path} does not name its base model; give --model MODEL")
        check_base(name)
        say(f"Loading {name} ...")
        if adapter is not None and is_classifier(adapter):
            model, tokenizer = load_classifier_for(adapter, name, dtype="fp32", device="cpu")
        else:
            model, tokenizer = load_base(name, dtype="fp32", device="cpu")
    if adapter is None:
        adapter = read(path, args, model)
    elif model is not None:
        adapter = with_present_names(adapter, model)
    if model is not None:
        resize_tables_for(adapter, model)
    return adapter, model, tokenizer
