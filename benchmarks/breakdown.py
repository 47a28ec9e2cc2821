"""Where the time of our training step goes, by kind of operator: `python benchmarks/breakdown.py`; a minute.

SmolLM2-135M, batches of 8 E2E examples, as in benchmarks/train.py.  The self times of operators in PyTorch's profiler
are grouped into kinds; the rest of a step's wall time is Python, autograd and gaps between operators, including the
overhead of the profiler itself.  Writes benchmarks/breakdown.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import train as bench
import transformers
from machine import machine
from torch.profiler import ProfilerActivity, profile

from loralib.allocator import keep_freed_memory
from loralib.console import say, table
from loralib.data.packing import pack
from loralib.training.memory import freeze_objects

HERE = Path(__file__).resolve().parent
# The first kind with a substring of the operator's, or of our function's, name applies.
KINDS = {
    "linears with LoRA": ("_GroupProduct", "_CastFactors", "::mm", "::addmm"),
    "the head": ("_FrozenProduct", "_linear_pointwise"),
    "attention: products and softmax": ("::bmm", "::baddbmm", "::_softmax", "_KernelAttention"),
    "activations": ("silu", "gelu", "_GELU", "_SwiGLU"),
    "norms": ("norm", "addmv", "mv", "_RMSNorm"),
    "optimizer": ("adamw", "_foreach"),
    "sums, products and rotations of tensors": ("::mul", "::add", "::addcmul", "::sub", "::div", "::neg", "_Rotate"),
    "copies, gathers and scatters": ("copy", "::cat", "index", "scatter", "gather", "fill", "pad"),
}


def kind_of(name: str) -> str | None:
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), None)


def measure(steps: int, siblings: int) -> dict[str, Any]:
    work = bench.batches(bench.e2e("train"), 8, siblings)[:steps]
    model = bench.ours("smollm2")
    step = bench.our_step(model, bench.optimizer(model), share=True)
    for _ in range(2):
        for batch in work:
            step(batch)
    start = time.perf_counter()
    for batch in work:
        step(batch)
    plain = time.perf_counter() - start
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        start = time.perf_counter()
        for batch in work:
            step(batch)
        wall = time.perf_counter() - start
    seconds = dict.fromkeys(KINDS, 0.0)
    for event in profiled.key_averages():
        ours_or_theirs = event.key.startswith(("aten::", "mkldnn::", "_"))
        kind = kind_of(event.key) if ours_or_theirs else None
        if kind is not None:
            seconds[kind] += event.self_cpu_time_total / 1e6
    seconds["Python, autograd, and what the profiler costs"] = wall - sum(seconds.values())
    processed = [pack(batch) for batch in work]
    needed = sum(bench.flops(model, batch, True) for batch in work)
    rate = bench.gemm_rate(model, 512)
    return {
        "steps": steps,
        "siblings": siblings,
        "tokens_a_step": sum(row.processed_tokens for row in processed) / steps,
        "step_s": plain / steps,
        "profiled_step_s": wall / steps,
        "floor_s": needed / rate / steps,
        "gemm_flops": rate,
        "seconds": {kind: value / steps for kind, value in seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--siblings", type=int, default=bench.SIBLINGS)
    parser.add_argument("--out", type=Path, default=HERE / "breakdown.json")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    with keep_freed_memory(), freeze_objects():
        found = measure(args.steps, args.siblings)
    args.out.write_text(json.dumps({"machine": machine("transformers"), **found}, indent=1) + "\n", encoding="utf-8")
    rows = [
        (kind, f"{1000 * value:.0f} ms", f"{value / found['profiled_step_s']:.0%}")
        for kind, value in found["seconds"].items()
    ]
    say(table(rows, ("kind", "a step", "share")))
    steps = f"{found['step_s']:.3f} s ({found['profiled_step_s']:.3f} s under the profiler)"
    floor = f"at the best rate, products with frozen weights alone would take {found['floor_s']:.3f} s"
    say(f"{found['tokens_a_step']:.0f} tokens a step in {steps}; {floor}")


if __name__ == "__main__":
    main()
