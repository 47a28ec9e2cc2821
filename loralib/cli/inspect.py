"""Look at an adapter: what it is, what it learned, where it can be used; and verify it on its base.

loralib inspect lora_model
loralib inspect lora_model --plot norms.png --layers
loralib inspect lora_model --verify smollm2-135m --prompt "name : Alimentum | area : riverside"

--verify loads the base, compares adapter, merged and exported logits, and says in plain words what is wrong and how to
fix it; the exit code is 1 if something is.
"""

from __future__ import annotations

import argparse

from ._adapters import PROMPTS, add_adapter_arguments, read, read_with_base


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    add_adapter_arguments(parser)
    parser.add_argument("--layers", action="store_true", help="list every module")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the norms of all updates as a heat map")
    parser.add_argument("--verify", metavar="BASE", help="load this base model and run every check there is")
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="for --verify: a prompt as in training; may be given again"
    )
    parser.add_argument(
        "--initial_adapter", metavar="DIR", help="the adapter as saved before training (CorDA, randomised PiSSA)"
    )


def run(args: argparse.Namespace) -> int:
    """Inspects; returns 1 if something is wrong with the adapter."""
    from ..console import say
    from ..inspection import inspect_adapter, plot, verify

    if args.verify:
        args.base = args.verify
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
        say(f"\n{wrong} of {len(results)} checks failed." if wrong else "\nNothing is wrong.")
    return 1 if wrong else 0
