"""The cost of LoRA variants compared with plain LoRA: `python benchmarks/variants.py`; about ten minutes.

SmolLM2-135M in bf16, all linear layers, r = 8, batches of 8 E2E examples and of 8 sequences of 512 tokens.  Each
variant is a separate process; they take steps in turn, and a variant's best time for each batch counts.  Peak memory is
measured separately.  Writes benchmarks/variants.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import train as bench
import transformers
from machine import machine
from memory_use import peak_bytes

import loralib as lora
from loralib.allocator import keep_freed_memory
from loralib.console import say, size, table
from loralib.data import TokenExample
from loralib.data.packing import pack
from loralib.training.memory import freeze_objects

HERE = Path(__file__).resolve().parent
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "PiSSA": {"init_lora_weights": "pissa_niter_4"},
    "OLoRA": {"init_lora_weights": "olora"},
    "lora_bias": {"lora_bias": True},
    "token rows": {"trainable_token_indices": list(range(100, 116))},
}


def step_of(variant: str) -> Any:
    model = bench.base("smollm2", torch.bfloat16)
    lora.inject(model, lora.LoraConfig(**{**bench.TARGETS["smollm2"], **VARIANTS[variant]}))
    return bench.our_step(model.train(), bench.optimizer(model), share=True)


def work_of(kind: str, count: int) -> list[list[Any]]:
    if kind == "E2E":
        return bench.batches(bench.e2e("train"), 8, bench.SIBLINGS)[:count]
    return [long_examples() for _ in range(count)]


def long_examples() -> list[TokenExample]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(5, 40_000, (8, 512), generator=generator).tolist()
    return [TokenExample(tuple(row), (False,) + (True,) * 511) for row in rows]


def serve(pipe: Connection, variant: str, kind: str, count: int) -> None:
    """Waits for the number of a batch, takes the step, and reports its duration."""
    torch.set_num_threads(os.cpu_count() or 1)
    transformers.logging.set_verbosity_error()
    with ExitStack() as stack:
        stack.enter_context(keep_freed_memory())
        step, work = step_of(variant), work_of(kind, count)
        stack.enter_context(freeze_objects())
        pipe.send("ready")
        while (number := pipe.recv()) is not None:
            start = time.perf_counter()
            step(work[number])
            pipe.send(time.perf_counter() - start)


def speeds(variants: list[str], kind: str, rounds: int, count: int) -> Iterator[tuple[str, float]]:
    """Yields each variant's seconds for all batches, with the best round of each."""
    context, pipes, processes = multiprocessing.get_context("spawn"), {}, []
    for variant in variants:
        pipes[variant], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(theirs, variant, kind, count), daemon=True))
        processes[-1].start()
        pipes[variant].recv()
    best = {variant: [float("inf")] * count for variant in variants}
    for _ in range(rounds + 1):
        for number in range(count):
            for variant, pipe in pipes.items():
                pipe.send(number)
                best[variant][number] = min(best[variant][number], pipe.recv())
    for pipe in pipes.values():
        pipe.send(None)
    for process in processes:
        process.join()
    yield from ((variant, sum(seconds) / count) for variant, seconds in best.items())


def memory_of(variant: str, kind: str) -> int:
    """Returns the peak memory of a process that takes three steps."""
    step = step_of(variant)
    for batch in work_of(kind, 1) * 3:
        step(batch)
    return peak_bytes()


def measured(variants: list[str], kind: str, rounds: int, count: int) -> dict[str, Any]:
    seconds = dict(speeds(variants, kind, rounds, count))
    peak = {}
    for variant in variants:
        command = [sys.executable, __file__, "--of", variant, "--kind", kind]
        peak[variant] = int(
            subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout.split()[-1]
        )
    first = variants[0]
    rows = [
        (
            name,
            f"{seconds[name]:.3f}",
            f"{seconds[name] / seconds[first]:.2f}",
            size(peak[name]),
            f"{peak[name] / peak[first]:.2f}",
        )
        for name in variants
    ]
    tokens = sum(pack(batch).processed_tokens for batch in work_of(kind, count)) / count
    say(f"{kind}, {tokens:.0f} tokens a step")
    say(table(rows, ("variant", "s a step", "of plain", "peak memory", "of plain")))
    return {"tokens_a_step": tokens, "step_s": seconds, "peak_bytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--kinds", nargs="+", default=["E2E", "long"], choices=["E2E", "long"])
    parser.add_argument("--of", help=argparse.SUPPRESS)
    parser.add_argument("--kind", default="E2E", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=HERE / "variants.json")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if args.of:
        say(str(memory_of(args.of, args.kind)))
        return
    found = {kind: measured(args.variants, kind, args.rounds, args.steps) for kind in args.kinds}
    args.out.write_text(json.dumps({"machine": machine("transformers"), **found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
