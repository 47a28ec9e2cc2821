"""Eight runs trained together or one after the other: `python benchmarks/sweep.py`; about five minutes.

SmolLM2-135M in bf16, all linear layers, r = 16, batches of 4 E2E examples, eight runs with different seeds.  A round is
one update of each run: once in a shared pass (`SharedStep`), once with separate steps as in `loralib train`.  Rounds
are interleaved in one process; the best time of each batch counts.  Peak memory is measured separately.  A shared pass
still needs the base's products, for all rows at once; they are measured in the same run, as a bound on the speedup.

With --commands 60 250, compares instead: `loralib sweep` over eight learning rates, and eight `loralib train` commands,
with that many updates per run, from start to end of each process, including validation and other default settings.
Writes benchmarks/sweep.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import train as bench
import transformers
from machine import machine
from memory_use import peak_bytes
from products import seconds_of_products
from torch import nn

import loralib as lora
from loralib.allocator import keep_freed_memory
from loralib.console import say, size, table
from loralib.data.packing import pack
from loralib.engine.kernels import Kernels
from loralib.training.many import twin_of
from loralib.training.memory import freeze_objects
from loralib.training.shared_step import SharedStep
from loralib.training.step import make_step

HERE = Path(__file__).resolve().parent
BATCH, RANK = 4, 16


def setting(runs: int, count: int) -> tuple[nn.Module, list[nn.Module], list[Any], list[list[list[Any]]]]:
    """Returns the base, its twins, their optimisers, and `count` batches for each run."""
    base = bench.base("smollm2", torch.bfloat16).train()
    twins, optimizers, work = [], [], []
    examples = bench.e2e("train")
    for seed in range(runs):
        twin = twin_of(base)
        torch.manual_seed(seed)
        lora.inject(twin, lora.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
        twins.append(twin)
        optimizers.append(bench.optimizer(twin))
        rows = random.Random(seed).sample(examples, BATCH * count)
        work.append([rows[at : at + BATCH] for at in range(0, len(rows), BATCH)])
    return base, twins, optimizers, work


def apply(optimizer: Any) -> None:
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def scale(batch: list[Any]) -> float:
    return 1 / sum(example.trained_tokens for example in batch)


def shared(base: nn.Module, twins: list[nn.Module]) -> SharedStep:
    return make_step(base, kind=lambda model, **options: SharedStep(model, twins, **options), compiles=False)  # type: ignore[return-value]


def speed(runs: int, rounds: int, count: int) -> dict[str, float]:
    base, twins, optimizers, work = setting(runs, count)
    together, steps = shared(base, twins), [make_step(twin) for twin in twins]

    def in_one(number: int) -> None:
        with together:
            together.in_passes([(n, own[number], scale(own[number])) for n, own in enumerate(work)])
        for optimizer in optimizers:
            apply(optimizer)

    def one_by_one(number: int) -> None:
        for step, optimizer, own in zip(steps, optimizers, work, strict=True):
            with step:
                step.forward_backward(own[number], loss_scale=scale(own[number]))
            apply(optimizer)

    def with_casts_by_pytorch(number: int) -> None:
        with mock.patch.object(Kernels, "accept_copies", return_value=False):
            in_one(number)

    ways = {
        "together": in_one,
        "one after the other": one_by_one,
        "together, factors cast by PyTorch": with_casts_by_pytorch,
    }
    best = {way: [float("inf")] * count for way in ways}
    with keep_freed_memory(), freeze_objects():
        for turn in range(rounds + 1):
            for number in range(count):
                for way, update in ways.items():
                    started = time.perf_counter()
                    update(number)
                    if turn:
                        best[way][number] = min(best[way][number], time.perf_counter() - started)
    return {way: sum(seconds) / count for way, seconds in best.items()}


def products_of_the_base(runs: int, count: int) -> float:
    """Returns the seconds taken by products with the base's weights, for the rows of one update of all runs."""
    base, _, _, work = setting(runs, count)
    packs = [pack(own[number]) for own in work for number in range(count)]
    tokens = sum(each.processed_tokens for each in packs) // count
    predicting = sum(len(each.states) for each in packs) // count
    return seconds_of_products(base, tokens, predicting)


def memory_of(runs: int) -> int:
    """Returns the peak memory of a process in which this many runs take three updates together."""
    base, twins, optimizers, work = setting(runs, 3)
    step = shared(base, twins)
    for number in range(3):
        with step:
            step.in_passes([(n, own[number], scale(own[number])) for n, own in enumerate(work)])
        for optimizer in optimizers:
            apply(optimizer)
    return peak_bytes()


def adapter_bytes(runs: int) -> int:
    """Returns the bytes of this many runs' factors, with gradients and AdamW's moments, all in fp32."""
    _, twins, _, _ = setting(1, 1)
    return 16 * runs * sum(p.numel() for p in twins[0].parameters() if p.requires_grad)


def commands(updates: int) -> dict[str, float]:
    """Returns the seconds of a sweep of eight runs, and of the same runs one after the other, as commands."""
    data = HERE.parent / "examples" / "NLG" / "data" / "e2e" / "train.txt"
    rates = [f"{number}e-4" for number in range(1, 9)]
    seconds = {"sweep": 0.0, "train": 0.0}
    for command, rate in [("sweep", ",".join(rates)), *(("train", rate) for rate in rates)]:
        with tempfile.TemporaryDirectory() as directory:
            words = [sys.executable, "-m", "loralib", command, "--lr", rate, "--train_data", str(data)]
            words += ["--batch_size", str(BATCH), "--rank", str(RANK), "--max_steps", str(updates)]
            started = time.perf_counter()
            subprocess.run([*words, "--output_dir", f"{directory}/run"], check=True, stdout=subprocess.DEVNULL)
            seconds[command] += time.perf_counter() - started
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--count", type=int, default=4, help="batches of each run")
    parser.add_argument("--commands", type=int, nargs="+", default=[], help="updates of each run")
    parser.add_argument("--memory_of", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=HERE / "sweep.json")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    if args.memory_of:
        print(memory_of(args.memory_of))
        return
    known = json.loads(args.output.read_text(encoding="utf-8")) if args.output.exists() else {}
    whole = known.get("seconds_of_commands", {})
    for updates in args.commands:
        whole[str(updates)] = commands(updates)
        say(
            f"{updates} updates: {whole[str(updates)]['train'] / whole[str(updates)]['sweep']:.2f} times the throughput"
        )
    if args.commands:
        args.output.write_text(json.dumps({**known, "seconds_of_commands": whole}, indent=2) + "\n", encoding="utf-8")
        return
    seconds = speed(args.runs, args.rounds, args.count)
    peak = {}
    for runs in (1, args.runs):
        command = [sys.executable, __file__, "--memory_of", str(runs)]
        peak[str(runs)] = int(
            subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout.split()[-1]
        )
    ratio = seconds["one after the other"] / seconds["together"]
    products = products_of_the_base(args.runs, args.count)
    rows = [(way, f"{value:.3f} s") for way, value in seconds.items()]
    say(table(rows, (f"an update of {args.runs} runs", "")))
    say(f"of which the base's products {products:.3f} s")
    say(f"{ratio:.2f} times the throughput; peak memory of 1 run {size(peak['1'])}, of {args.runs} "
        f"{size(peak[str(args.runs)])}")  # fmt: skip
    result = {
        "machine": machine("transformers"),
        "command": "python benchmarks/sweep.py",
        "runs": args.runs, "batch_size": BATCH, "rank": RANK,
        "seconds_of_an_update_of_all": seconds, "throughput_ratio": ratio,
        "seconds_of_the_base_products": products, "peak_bytes": peak,
        "bytes_of_adapters_gradients_and_moments": {str(n): adapter_bytes(n) for n in (1, args.runs)},
        "seconds_of_commands": whole,
    }  # fmt: skip
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
