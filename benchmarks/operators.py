"""How much each of the engine's optimisations gains: python benchmarks/operators.py [--rounds 8]; five minutes.

One training step (SmolLM2-135M, and GPT-2's shape, 8 E2E examples) with everything, and with one optimisation left out
at a time, in turn in one process.  Also, attention over a packed row without kernels: in tiles of queries, compared
with PyTorch's scaled_dot_product_attention with a dense mask, on one thread.  Writes benchmarks/operators.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import train as bench
from machine import machine
from torch import Tensor
from torch.nn import functional as F

from loralib.allocator import keep_freed_memory
from loralib.data.packing import pack
from loralib.engine.attention import AttentionSettings, PackedLayout
from loralib.engine.kernels import Kernels
from loralib.training.memory import freeze_objects
from loralib.training.step import make_step

HERE = Path(__file__).resolve().parent


def in_turn(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Returns the minimum and the median of each, and the median of its ratios to the first."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name in list(ways) if number % 2 else list(ways)[::-1]:
            started = time.perf_counter()
            ways[name]()
            seconds[name].append(time.perf_counter() - started)
    seconds = {name: values[1:] for name, values in seconds.items()}  # the first round warms up
    first = seconds[next(iter(ways))]
    return {
        name: {
            "seconds": min(values),
            "median_ratio": statistics.median(x / y for x, y in zip(values, first, strict=True)),
            "ratio": min(values) / min(first),
        }
        for name, values in seconds.items()
    }


def left_out(model: Any, step: Any, kind: str) -> dict[Any, Any]:
    """Returns the overrides of small operators without one kind of module."""
    return {module: way for module, way in step._forward._overrides.items() if kind not in type(module).__name__}


def steps(name: str, rounds: int) -> dict[str, Any]:
    """Measures a step with everything, and without one optimisation at a time."""
    work = bench.batches(bench.e2e("train"), 8, 1)[:2]
    model = bench.ours(name)
    optimizer = bench.optimizer(model)
    step = make_step(model)
    every = step._forward._overrides

    def run(ways: Any = every) -> None:
        with mock.patch.object(step._forward, "_overrides", ways):
            for batch in work:
                step.forward_backward(batch, loss_scale=1 / sum(sum(example.trained) for example in batch))
                bench.apply(model, optimizer)

    def without_kernel(method: str) -> Callable[[], None]:
        def run_without() -> None:
            with mock.patch.object(Kernels, method, return_value=False):
                run()

        return run_without

    kinds = {"norms": "Norm", "gated MLPs": "MLP", "rotary positions": "Attention", "GELU": "GELU"}
    ways: dict[str, Callable[[], None]] = {"everything": run}
    for label, kind in kinds.items():
        rest = left_out(model, step, kind)
        if len(rest) < len(every):
            ways[f"without {label}"] = lambda rest=rest: run(rest)
    ways["without the attention kernel"] = without_kernel("accept_queries")
    ways["without the kernel that casts factors"] = without_kernel("accept_copies")
    with keep_freed_memory(), freeze_objects():
        return {"model": name, "ways": in_turn(ways, rounds)}


def attention(count: int, rounds: int) -> dict[str, Any]:
    """Measures forward and backward of one layer of SmolLM2's shape over a packed row, without kernels."""
    laid = pack(bench.batches(bench.e2e("train"), count, 4)[0])
    assert laid.ends is not None
    total = laid.ids.shape[1]
    layout, settings = PackedLayout(laid.ends, laid.positions[0]), AttentionSettings(64**-0.5)
    q, k, v = (torch.randn(total, heads, 64, dtype=torch.bfloat16, requires_grad=True) for heads in (9, 3, 3))
    gradient, place = torch.randn_like(q), torch.arange(total)
    mask = (place <= place[:, None]) & (place[:, None] < laid.ends)

    def tiles() -> None:
        layout._attend_in_tiles(q, k, v, settings).backward(gradient)

    def dense() -> None:
        heads_first: Iterator[Tensor] = (x.transpose(0, 1)[None] for x in (q, k, v))
        y = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=True)
        y[0].transpose(0, 1).backward(gradient)

    return {"tokens": total, "ways": in_turn({"tiles": tiles, "dense mask": dense}, rounds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    rounds = parser.parse_args().rounds
    results: dict[str, Any] = {"machine": machine("transformers"), "steps": []}
    for name in ("smollm2", "gpt2"):
        results["steps"].append(steps(name, rounds))
        print(json.dumps(results["steps"][-1], indent=1), flush=True)
    torch.set_num_threads(1)
    results["attention without kernels, one thread"] = [attention(count, 3 * rounds) for count in (8, 32)]
    print(json.dumps(results["attention without kernels, one thread"], indent=1), flush=True)
    (HERE / "operators.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
