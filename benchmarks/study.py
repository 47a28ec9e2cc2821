"""Which variant of LoRA, and at which rank?  Six of them on E2E, each at its own best learning rate, three seeds.

python benchmarks/study.py train    an hour and a half on two cores, one variant per core; resumes where it was stopped
python benchmarks/study.py picture  draws docs/results/variants.png again, from study.json

SmolLM2-135M in bf16, all linear layers, lora_alpha = 2 rank, 60 updates of 4 examples (one pass over 240).  For each
variant and rank, `loralib.train_many` tries three learning rates, each twice the last, with the first seed, and further
ones while the best is at an end; two more seeds follow at the best.  Losses do not depend on the machine's load.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from machine import machine
from quality import score, texts_of
from tables import results, with_best_rate

import loralib as lora
from loralib.console import say
from loralib.data import TokenExample, draw, encode, group_by_prompt, read_examples
from loralib.errors import InterruptedRunError, TrainingError
from loralib.generation import Sampling

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
E2E = ROOT / "examples" / "NLG" / "data" / "e2e"
RESULTS = HERE / "study.json"
PICTURE = ROOT / "docs" / "results" / "variants.png"
RANKS, SEEDS, UPDATES, BATCH, EXTRA = (1, 8, 64), (0, 1, 2), 60, 4, 4
VARIANTS: dict[str, dict[str, Any]] = {
    "LoRA": {"loraplus_lr_ratio": 1.0},
    "LoRA+": {"loraplus_lr_ratio": 4.0},
    "rsLoRA": {"loraplus_lr_ratio": 1.0, "use_rslora": True},
    "DoRA": {"loraplus_lr_ratio": 1.0, "use_dora": True},
    "PiSSA": {"loraplus_lr_ratio": 1.0, "init_lora_weights": "pissa_niter_16"},
    "EVA": {"loraplus_lr_ratio": 1.0, "init_lora_weights": "eva"},
}
# Learning rates at which the search starts; it continues to either side.
GUESS = {1: 6.4e-3, 8: 3.2e-3, 64: 1.6e-3}
BESIDE = {"LoRA": 1.0, "LoRA+": 0.5, "rsLoRA": 1.0, "DoRA": 1.0, "PiSSA": 0.25, "EVA": 0.5}
SCORES = ("BLEU", "NIST", "ROUGE_L", "CIDEr", "SER")
COLORS = dict(zip(VARIANTS, ("#222222", "#2171b5", "#238b45", "#d94801", "#6a51a3", "#c51b8a"), strict=True))

Row = dict[str, Any]  # per run: rank, lr, seed, loss (None: dropped), and at the best lr, scores and bytes


@functools.cache
def base() -> tuple[Any, Any]:
    """The default base model and its tokenizer."""
    return lora.load_base("smollm2-135m")


@functools.cache
def examples(split: str, count: int) -> list[TokenExample]:
    rows = draw(read_examples(E2E / f"{split}.txt"), count, 0, lambda example: example.prompt)
    return list(encode(rows, base()[1], 512, "clm").examples)


# --- one variant, in a separate process ------------------------------------------------------------------------------


class Search:
    """The runs of one variant, stored on disk."""

    def __init__(self, variant: str, folder: Path, updates: int) -> None:
        self.variant, self.updates = variant, updates
        self.folder, self.file = folder / variant, folder / f"{variant}.json"
        self.rows: list[Row] = json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else []

    def save(self) -> None:
        self.file.write_text(json.dumps(self.rows), encoding="utf-8")

    def row(self, rank: int, lr: float, seed: int) -> Row | None:
        wanted = (rank, lr, seed)
        return next((row for row in self.rows if (row["rank"], row["lr"], row["seed"]) == wanted), None)

    def run(self, runs: Sequence[tuple[int, float, int]]) -> None:
        """Trains the missing runs among these, given as (rank, lr, seed), in one sweep."""
        runs = [run for run in runs if self.row(*run) is None]
        if not runs:
            return
        configs = [
            lora.TrainConfig(
                rank=rank, lr=lr, seed=seed, batch_size=BATCH, num_epochs=50, max_steps=self.updates, warmup_steps=4,
                eval_steps=self.updates, save_steps=10**6, seq_len=512, resume=True, **VARIANTS[self.variant],
            )
            for rank, lr, seed in runs
        ]  # fmt: skip
        path = self.folder / f"{len(self.rows)}"
        model, tokenizer = base()
        train, valid = examples("train", BATCH * self.updates), examples("valid", 64)
        try:
            result = lora.train_many(
                model, train, configs, tokenizer=tokenizer, valid_data=valid, output_dir=str(path), verbose=False
            )
        except InterruptedRunError:
            raise
        except TrainingError:  # all diverged
            self.rows += [{"rank": rank, "lr": lr, "seed": seed, "loss": None} for rank, lr, seed in runs]
        else:
            for (rank, lr, seed), outcome in zip(runs, result.runs, strict=True):
                loss = None if outcome.dropped else outcome.loss
                row = {"rank": rank, "lr": lr, "seed": seed, "loss": loss, "path": str(outcome.adapter)}
                self.rows.append(row)
        self.save()

    def tried(self, rank: int) -> dict[float, float]:
        """Returns the first seed's losses by learning rate."""
        rows = [row for row in self.rows if row["rank"] == rank and row["seed"] == SEEDS[0]]
        return {row["lr"]: math.inf if row["loss"] is None else row["loss"] for row in rows}

    def best(self, rank: int) -> float:
        tried = self.tried(rank)
        return min(tried, key=lambda lr: tried[lr])

    def beyond(self, rank: int) -> list[float]:
        """Returns the next learning rate to try, if the best one is at an end of those tried."""
        tried = sorted(self.tried(rank))
        if len(tried) >= 3 + EXTRA:
            return []
        best = self.best(rank)
        return [tried[0] / 2] * (best == tried[0]) + [tried[-1] * 2] * (best == tried[-1])

    def search(self) -> None:
        first = {rank: GUESS[rank] * BESIDE[self.variant] for rank in RANKS}
        if self.variant == "rsLoRA":  # its scaling factor is sqrt(rank) times that of the others
            first = {rank: lr / 2 ** round(math.log2(rank) / 2) for rank, lr in first.items()}
        runs = [(rank, lr * factor, SEEDS[0]) for rank, lr in first.items() for factor in (0.5, 1, 2)]
        while runs:
            self.run(runs)
            runs = [(rank, lr, SEEDS[0]) for rank in RANKS for lr in self.beyond(rank)]
        self.run([(rank, self.best(rank), seed) for rank in RANKS for seed in SEEDS[1:]])

    def score(self, prompts_at_most: int | None) -> None:
        """Generates texts for the test set with the runs at the best learning rates, and scores them."""
        inputs = group_by_prompt(read_examples(E2E / "test.txt"))[:prompts_at_most]
        model, tokenizer = base()
        for rank in RANKS:
            for seed in SEEDS:
                row = self.row(rank, self.best(rank), seed)
                if row is None or row["loss"] is None or "scores" in row:
                    continue
                lora.load_adapter(model, row["path"])
                texts = texts_of(model, tokenizer, [example.prompt for example in inputs], GREEDY)
                lora.remove(model)
                found = score(inputs, texts)
                row["scores"] = {name: found[name] for name in SCORES}
                row["adapter_bytes"] = sum(file.stat().st_size for file in Path(row["path"]).glob("adapter_model*"))
                self.save()
                say(f"{self.variant}, rank {rank}, seed {seed}: {row['loss']:.4f}, {row['scores']}")


GREEDY = Sampling(temperature=0.0, max_new_tokens=64)


def train(folder: Path, updates: int, names: Sequence[str], prompts_at_most: int | None) -> None:
    """Trains all variants in single-threaded processes, as many at once as there are cores."""

    def run(name: str) -> None:
        words = [sys.executable, __file__, "one", "--variants", name, "--folder", str(folder)]
        words += ["--updates", str(updates), *(["--prompts", str(prompts_at_most)] if prompts_at_most else [])]
        subprocess.run(words, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, names))
    runs = {name: [without_path(row) for row in Search(name, folder, updates).rows] for name in names}
    found = {"updates": updates, "batch_size": BATCH, "machine": machine("transformers"), "runs": runs}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def without_path(row: Row) -> Row:
    return {name: value for name, value in row.items() if name != "path"}


# --- the plot --------------------------------------------------------------------------------------------------------


def draw_picture() -> None:
    """Plots losses by rank at the best learning rates, and by learning rate at rank 8."""
    from matplotlib.figure import Figure

    runs: dict[str, list[Row]] = results("study")["runs"]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (name, of) in enumerate(runs.items()):
        best = [[row["loss"] for row in with_best_rate(of, rank)] for rank in RANKS]
        beside = [rank * 1.04 ** (number - 2.5) for rank in RANKS]
        means = [statistics.fmean(losses) for losses in best]
        ends = [[m - min(losses) for m, losses in zip(means, best, strict=True)],
                [max(losses) - m for m, losses in zip(means, best, strict=True)]]  # fmt: skip
        left.errorbar(beside, means, ends, fmt="o-", color=COLORS[name], label=name, capsize=2, markersize=4)
        tried = sorted((row["lr"], row["loss"]) for row in of if row["rank"] == 8 and row["seed"] == 0 and row["loss"])
        right.plot(*zip(*tried, strict=True), "o-", color=COLORS[name], label=name, markersize=4)
    left.set(xscale="log", xlabel="rank", ylabel="validation loss", title="at the best learning rate, 3 seeds")
    left.set_xticks(RANKS, [str(rank) for rank in RANKS])
    left.minorticks_off()
    right.set(xscale="log", xlabel="learning rate (of A)", ylabel="validation loss", title="rank 8, first seed")
    rates = [GUESS[8] * 2.0**power for power in range(-3, 2)]
    right.set_xticks(rates, [f"{rate:.2g}" for rate in rates])
    right.minorticks_off()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    right.legend(fontsize=8, loc="upper center")
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "picture", "one"))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "loralib-study")
    parser.add_argument("--updates", type=int, default=UPDATES)
    parser.add_argument("--prompts", type=int, help="texts to write for the scores; all of the test set's by default")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.what == "one":
        torch.set_num_threads(1)  # the same sums in the same order on every machine of this kind
        search = Search(args.variants[0], args.folder, args.updates)
        search.search()
        search.score(args.prompts)
    elif args.what == "train":
        train(args.folder, args.updates, args.variants, args.prompts)
    else:
        draw_picture()


if __name__ == "__main__":
    main()
