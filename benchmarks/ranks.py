"""Several processes on one machine: how fast they train together, and whether kills cost anything but time.

python benchmarks/ranks.py scaling     two single-threaded processes vs. one with two threads; the default base
python benchmarks/ranks.py kills       20 ranks killed (SIGKILL) at random moments, each run restarted with resume
python benchmarks/ranks.py             both; about 20 minutes; writes benchmarks/ranks.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from kills import tiny_model
from machine import machine

import loralib as lora
from loralib.console import say
from loralib.data import TokenExample
from loralib.formats import read_adapter
from loralib.training.report import read_metrics
from loralib.training.run_directory import checkpoint_files, last_checkpoint

FILE = Path(__file__)
WORDS = "the a small red old boat house river market garden opens closes sells finds near behind with without".split()
SAVE_STEPS = 10
WARM_UP = 3  # updates that do not count: kernels are chosen, memory is allocated


def started(ranks: int, threads: int, words: list[str]) -> subprocess.Popen[bytes]:
    """Starts a Python command as one process, or as several using torchrun."""
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *launch, *words], env=environment, **quiet)


# Scaling.


def write_data(path: Path, rng: random.Random) -> None:
    """Writes examples like E2E's: about 60 tokens, half of them trained, all with different prompts."""
    rows = [
        {"prompt": " ".join(rng.choices(WORDS, k=28)), "completion": " " + " ".join(rng.choices(WORDS, k=28))}
        for _ in range(400)
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")


def tokens_a_second(folder: Path, ranks: int, updates: int, batch_size: int) -> float:
    """One run on two cores: the tokens of its updates divided by their time."""
    output = folder / f"run-{ranks}"
    flags = {
        "train_data": folder / "data.jsonl", "output_dir": output, "valid_fraction": 0, "rank": 8,
        "max_steps": updates, "batch_size": batch_size, "save_steps": 10**6, "device": "cpu",
    }  # fmt: skip
    words = ["-m", "loralib", "train", "--overwrite", *(str(w) for k, v in flags.items() for w in (f"--{k}", v))]
    process = started(ranks, 2 // ranks, words)
    _, err = process.communicate()
    if process.returncode:
        raise SystemExit(err.decode())
    events = [event for event in read_metrics(output / "metrics.jsonl") if event["event"] == "train"]
    counted = events[WARM_UP:]
    return float((events[-1]["tokens"] - events[WARM_UP - 1]["tokens"]) / sum(event["step_s"] for event in counted))


def scaling(rounds: int, updates: int) -> dict[str, Any]:
    """Best and median of several runs each, interleaved because the machine may be busy."""
    result: dict[str, Any] = {"rounds": rounds, "updates": updates, "batch_sizes": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder / "data.jsonl", random.Random(0))
        for batch_size in (8, 32):
            found: dict[int, list[float]] = {1: [], 2: []}
            for _ in range(rounds):
                for ranks in found:
                    found[ranks].append(tokens_a_second(folder, ranks, updates, batch_size))
                    say(f"batch {batch_size}, {ranks} process(es): {found[ranks][-1]:,.0f} tokens a second")
            result["batch_sizes"][batch_size] = {
                "one_process_two_threads": {"best": max(found[1]), "median": statistics.median(found[1])},
                "two_processes_one_thread": {"best": max(found[2]), "median": statistics.median(found[2])},
                "ratio_of_best": max(found[2]) / max(found[1]),
            }
    return result


# Kills.


def train(output: str, updates: int) -> None:
    """Runs in each rank: a tiny model, so that kills also hit moments between updates."""
    torch.set_num_threads(1)
    rng = random.Random(0)
    flags = (False, False, False, True, True, True)
    examples = [TokenExample(tuple(rng.randrange(23) for _ in flags), flags) for _ in range(240)]
    config = lora.TrainConfig(
        output_dir=output, rank=4, lr=1e-3, batch_size=6, max_steps=updates, save_steps=SAVE_STEPS, eval_steps=50,
        lora_dropout=0.1, warmup_steps=0, resume=True,
    )  # fmt: skip
    lora.train(tiny_model(), examples, config, valid_data=examples[:6], verbose=False)


def updates_of(output: Path) -> int:
    """Returns the number of updates recorded by a run."""
    log = output / "metrics.jsonl"
    return max((event["step"] for event in read_metrics(log)), default=0) if log.exists() else 0


def saved(output: Path) -> int:
    """Returns the update of the last checkpoint."""
    last = last_checkpoint(output / "checkpoints")
    return last[0].progress.step if last is not None else 0


def killed(output: Path, ranks: int, updates: int, rng: random.Random, seconds: float) -> dict[str, Any] | None:
    """Runs until a random rank is killed at a random moment; None if the run ended before."""
    before = updates_of(output)
    process = started(ranks, 1, [str(FILE), "train", str(output), str(updates)])
    while updates_of(output) <= before and process.poll() is None:
        time.sleep(0.05)
    time.sleep(rng.uniform(0, seconds))
    victim = rng.randrange(ranks)
    try:
        children = psutil.Process(process.pid).children()
        next(child for child in children if child.environ().get("RANK") == str(victim)).kill()
    except (StopIteration, psutil.Error):
        process.communicate()
        return None
    at = time.perf_counter()
    _, err = process.communicate()
    if process.returncode == 0:
        return None
    return {
        "rank": victim,
        "ranks": ranks,
        "ended_within_s": round(time.perf_counter() - at, 2),
        "told": b"has died" in err,
        "updates": updates_of(output),
        "lost": updates_of(output) - saved(output),
    }


def kills(count: int, updates: int, seconds: float) -> dict[str, Any]:
    """Kills this many ranks; finished runs are compared with an undisturbed one, and followed by the next."""
    rng, done, runs = random.Random(0), list[dict[str, Any]](), list[bool]()
    with tempfile.TemporaryDirectory() as name:
        truth = Path(name) / "truth"
        process = started(2, 1, [str(FILE), "train", str(truth), str(updates)])
        if process.wait():
            raise SystemExit("the undisturbed run failed")
        while len(done) < count:
            output = Path(name) / f"run-{len(runs)}"
            over = False
            while not over:
                event = None
                if len(done) < count:
                    event = killed(output, 2, updates, rng, seconds)
                else:
                    started(2, 1, [str(FILE), "train", str(output), str(updates)]).communicate()
                over = event is None
                if event is not None:
                    done.append(event)
                    say(f"kill {len(done)}: {event}")
            runs.append(same(output, truth))
            if not runs[-1]:
                break
    return {
        "kills": len(done),
        "save_steps": SAVE_STEPS,
        "most_updates_lost": max(event["lost"] for event in done),
        "slowest_end_s": max(event["ended_within_s"] for event in done),
        "told": sum(event["told"] for event in done),
        "runs": len(runs),
        "runs_whose_adapter_is_that_of_an_undisturbed_one": sum(runs),
        "events": done,
    }


def same(one: Path, other: Path) -> bool:
    """Whether two runs produced the same adapter, bit for bit, and left no checkpoint behind."""
    a, b = read_adapter(one).tensors, read_adapter(other).tensors
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a) and not checkpoint_files(one / "checkpoints")


def main() -> int:
    """Measures the requested parts, and updates the JSON beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["scaling", "kills"])
    parser.add_argument("--rounds", type=int, default=5, help="runs of each kind, for scaling")
    parser.add_argument("--updates", type=int, default=15, help="updates of each, for scaling")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=1500, help="updates of a run that is killed")
    parser.add_argument("--seconds", type=float, default=3.0, help="until a kill, at most")
    parser.add_argument("--out", type=Path, default=FILE.with_suffix(".json"))
    args = parser.parse_args()
    if args.what[0] == "train":
        train(args.what[1], int(args.what[2]))
        return 0
    result = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    result |= {"machine": machine(), "seed": 0}
    if "scaling" in args.what:
        result["scaling"] = scaling(args.rounds, args.updates)
    if "kills" in args.what:
        result["kills"] = kills(args.kills, args.steps, args.seconds)
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
