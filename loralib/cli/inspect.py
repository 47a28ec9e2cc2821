"""Inspect an adapter: its settings, what it learned, and which tools can use it; and verify it on its base model.

loralib inspect lora_model
loralib inspect lora_model --plot norms.png --layers
loralib inspect lora_model --verify smollm2-135m --prompt "name : Alimentum | area : riverside"

--verify loads the base model, compares the logits of the adapter, the merged model and the exports, and explains each
problem and its fix; the exit code is 1 if it finds any.
"""

from __future__ import annotations

import argparse

from ..console import counted, say
from ..inspection import inspect_adapter, plot, verify
from ._adapters import PROMPTS, add_adapter_arguments, check_checkpoint_flags, read, read_with_base


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the adapter and the choice of what to show."""
    add_adapter_arguments(parser)
    parser.add_argument("--layers", action="store_true", help="list every module")
    parser.add_argument("--plot", metavar="FILE.png", help="save a heat map of the norms of all updates")
    parser.add_argument("--verify", metavar="MODEL", help="load this base model and run all checks")
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="for --verify: a prompt like those in training; may be repeated",
    )


def run(args: argparse.Namespace) -> int:
    """Prints the report; returns 1 if something is wrong with the adapter."""
    check_checkpoint_flags(args, args.adapter, args.initial_adapter)
    if args.verify:
        args.model = args.verify
    adapter, model, tokenizer = read_with_base(args.adapter, args, lambda _: bool(args.verify))
    inspection = inspect_adapter(adapter)
    say(inspection)
    if args.layers:
        say(f"\n{inspection.by_layer()}")
    if args.plot:
        plot(inspection, args.plot)
        say(f"\nheat map: {args.plot}")
    results = list(inspection.checks)
    if args.verify:
        assert model is not None
        initial = read(args.initial_adapter, args) if args.initial_adapter else None
        prompts = [prompt.replace("\\n", "\n") for prompt in args.prompt or PROMPTS]
        results = verify(model, tokenizer, adapter, prompts, initial=initial)
        say(f"\nVerified on {args.verify}:")
        for result in results:
            say(result)
    wrong = sum(result.level == "fault" for result in results)
    if args.verify:
        say(f"\n{wrong} of {counted(len(results), 'check')} failed." if wrong else "\nAll checks passed.")
    return 1 if wrong else 0
