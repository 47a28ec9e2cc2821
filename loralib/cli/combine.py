"""Combine several adapters of the same base model into one, or change the rank of one.

loralib combine french polite -o both --weights 0.7,0.3 --method svd --rank 16
loralib combine tuned unwanted -o without --subtract
loralib combine start end -o between --interpolate 0.25
loralib combine big -o small --rank 4

The command prints how far the result is from the exact result.
"""

from __future__ import annotations

import argparse

from ..adapter import Adapter
from ..combine import METHODS, combine, resize, updates_of
from ..console import counted, say
from ..errors import ConfigError
from ..formats import write_peft
from ._adapters import (
    ADAPTER_HELP,
    Output,
    add_checkpoint_arguments,
    check_checkpoint_flags,
    output_held,
    read_with_base,
)
from ._flags import add_list


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the adapters, the output and the ways of combining."""
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER", help=ADAPTER_HELP)
    text = "directory of the result, in PEFT's format"
    parser.add_argument("-o", "--output", action=Output, required=True, metavar="OUTPUT", help=text)
    add_checkpoint_arguments(parser, makes_rank=True)
    add_list(parser, "--weights", items=_numbers, metavar="X,X", help="one weight for each adapter (default 1)")
    parser.add_argument(
        "--method",
        choices=tuple(METHODS),
        help="default: svd with --rank, otherwise cat. "
        + "; ".join(f"{name}: {about}" for name, about in METHODS.items()),
    )
    parser.add_argument("--rank", type=int, metavar="N", help="rank of the result, for the methods that reduce it")
    parser.add_argument("--density", type=float, metavar="X", help="fraction of values to keep (TIES, DARE, pruning)")
    parser.add_argument(
        "--majority_sign", default="total", choices=("total", "frequency"), help="how TIES elects signs"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed for what DARE drops")
    special = parser.add_mutually_exclusive_group()
    special.add_argument("--subtract", action="store_true", help="the first adapter minus the second")
    special.add_argument("--interpolate", type=float, metavar="T", help="(1 - T) * first + T * second")
    special.add_argument(
        "--energy", type=float, metavar="X", help="for a single adapter: keep this fraction of its squared norm"
    )


def _numbers(word: str) -> list[float]:
    return [float(part) for part in word.split(",")]


def _largest(adapter: Adapter) -> float:
    """Returns the largest norm of an update."""
    return max((update.norm() for update in updates_of(adapter).values()), default=0.0)


def run(args: argparse.Namespace) -> None:
    """Combines the adapters and writes the result."""
    check_checkpoint_flags(args, *args.adapters)
    with output_held(args.output, *args.adapters):
        _combine(args)


def _combine(args: argparse.Namespace) -> None:
    adapters = [read_with_base(path, args, lambda _: False)[0] for path in args.adapters]
    two = args.subtract or args.interpolate is not None
    if two and (len(adapters) != 2 or args.weights or args.method):
        raise ConfigError(
            "--subtract and --interpolate need exactly two adapters, and allow neither --weights nor --method"
        )
    if args.subtract:  # negation in task arithmetic, arXiv:2212.04089
        args.weights = [1.0, -1.0]
    elif args.interpolate is not None:  # values outside 0 to 1 extrapolate
        args.weights = [1 - args.interpolate, args.interpolate]
    if len(adapters) == 1 and not args.weights and (args.rank is not None or args.energy is not None):
        result = resize(adapters[0], args.rank, energy=args.energy)
    elif args.energy is not None:
        raise ConfigError("--energy resizes a single adapter; for several, give --rank")
    else:
        method = args.method or ("svd" if args.rank is not None else "cat")
        result = combine(
            adapters,
            args.weights or [1.0] * len(adapters),
            method,
            r=args.rank,
            density=args.density,
            majority_sign=args.majority_sign,
            seed=args.seed,
        )
    write_peft(result.adapter, args.output)
    if _largest(result.adapter) <= 1e-6 * max(map(_largest, adapters)):  # what rounding leaves of a sum of zero
        say("note: the result changes nothing: with these weights, the updates cancel out")
    config = result.adapter.config
    ranks = {config.rank_of(name) for name in result.adapter.modules}
    said = f"rank {min(ranks)}" if len(ranks) == 1 else f"ranks {min(ranks)} to {max(ranks)}"
    exact = "exact" if result.error == 0 else f"off by {result.error:.2%} of the exact result"
    if 0 < result.error < 1:
        exact += f" ({result.energy:.2%} of the squared norm kept)" if len(adapters) == 1 else ""
    say(f"{counted(len(result.adapter.modules), 'module')} of {said} written to {args.output}: {exact}")
