"""Is `--lr auto` as good as a sweep?  SmolLM2 on E2E lines and on chats, over learning rate and LoRA+ ratio.

python benchmarks/learning_rates.py     several hours on one core; what learning_rates.json holds is not run again

First a grid with one seed, then two more seeds for every point within 3 % of the grid's best loss and for auto; other
ranks and batch sizes with one seed each.  Writes benchmarks/learning_rates.json and docs/results/learning-rates.md with
its picture.  Losses do not depend on how busy the machine is.
"""

from __future__ import annotations

import functools
import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from chats import chats
from machine import machine

import loralib as lora
from loralib.console import say, table
from loralib.data import Example, TokenExample, draw, encode, read_examples
from loralib.training.learning_rate import automatic_learning_rate

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
E2E = ROOT / "examples" / "NLG" / "data" / "e2e"
RESULTS = HERE / "learning_rates.json"
PAGE = ROOT / "docs" / "results" / "learning-rates.md"
UPDATES, SEEDS, CLOSE = 60, (0, 1, 2), 1.03
GRID = {
    16: (5e-5, 1e-4, 2e-4, 4e-4, 8e-4),
    4: (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3),
    1: (2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3),
}
DATA = ("e2e", "chats")
COLORS = {16: "#2171b5", 4: "#238b45", 1: "#d94801"}


class Run(NamedTuple):
    """One training run: its data, the rate of A, the LoRA+ ratio of B's rate to it, and what else varies."""

    data: str
    lr: float
    ratio: float
    seed: int = 0
    rank: int = 16
    batch: int = 8
    updates: int = UPDATES


@functools.cache
def base() -> tuple[Any, Any]:
    """The default base model and its tokenizer."""
    return lora.load_base("smollm2-135m")


@functools.cache
def examples(name: str, count: int) -> tuple[list[TokenExample], list[TokenExample]]:
    """Training and validation examples of one kind of data."""
    if name == "e2e":
        train = draw(read_examples(E2E / "train.txt"), count, 0, lambda example: example.prompt)
        valid = draw(read_examples(E2E / "valid.txt"), 96, 0, lambda example: example.prompt)
    else:
        train, valid = ([Example(messages=tuple(c)) for c in chats(n, seed)] for n, seed in ((count, 1), (64, 2)))
    tokenizer = base()[1]
    return encode(train, tokenizer, 512, "clm").examples, encode(valid, tokenizer, 512, "clm").examples


def final_loss(run: Run) -> float | None:
    """Trains once and returns the validation loss at the end; None where the run diverged."""
    train, valid = examples(run.data, run.batch * run.updates)
    model, tokenizer = base()
    with tempfile.TemporaryDirectory() as folder:
        config = lora.TrainConfig(
            output_dir=folder, rank=run.rank, batch_size=run.batch, num_epochs=50, max_steps=run.updates, lr=run.lr,
            loraplus_lr_ratio=run.ratio, seed=run.seed, eval_steps=run.updates, save_steps=10**6, seq_len=512,
            warmup_steps=0,
        )  # fmt: skip
        try:
            result = lora.train(model, train, config, tokenizer=tokenizer, valid_data=valid, verbose=False)
        except lora.LoraError:
            return None
        finally:
            lora.remove(model)
    return result.valid_losses[-1][1]


class Results:
    """What is measured so far, kept on disk."""

    def __init__(self) -> None:
        rows = json.loads(RESULTS.read_text(encoding="utf-8"))["runs"] if RESULTS.exists() else []
        self.losses: dict[Run, float | None] = {
            Run(**{name: row[name] for name in Run._fields}): row["loss"] for row in rows
        }

    def loss(self, run: Run) -> float:
        """The loss of a run, which is made now if it is not there yet; infinite where it diverged."""
        if run not in self.losses:
            self.losses[run] = final_loss(run)
            self.save()
            say(f"{run}: {self.losses[run]}")
        loss = self.losses[run]
        return float("inf") if loss is None else loss

    def mean(self, run: Run) -> float:
        """The mean loss over all seeds."""
        return statistics.fmean(self.loss(run._replace(seed=seed)) for seed in SEEDS)

    def save(self) -> None:
        rows = [{**run._asdict(), "loss": loss} for run, loss in sorted(self.losses.items())]
        text = ",\n  ".join(json.dumps(row) for row in rows)
        RESULTS.write_text(f'{{"machine": {json.dumps(machine())}, "runs": [\n  {text}\n]}}\n', encoding="utf-8")


def grid(data: str) -> Iterator[Run]:
    """The points of the sweep, with the first seed."""
    return (Run(data, lr, ratio) for ratio, rates in GRID.items() for lr in rates)


def auto(data: str, rank: int = 16, batch: int = 8) -> Run:
    """The run that `--lr auto` makes."""
    model = base()[0]
    lr, _ = automatic_learning_rate(sum(p.numel() for p in model.parameters()), model.config.hidden_size, batch)
    return Run(data, lr, lora.TrainConfig().loraplus_lr_ratio, rank=rank, batch=batch)


# --- the study -------------------------------------------------------------------------------------------------------


def study(results: Results, data: str) -> list[list[str]]:
    """Measures one kind of data; rows of the table of the points close to the best, with auto first."""
    first = {run: results.loss(run) for run in grid(data)}
    limit = CLOSE * min(first.values())
    means = {run: results.mean(run) for run in [auto(data), *(run for run, loss in first.items() if loss <= limit)]}
    best = min(means.values())
    return [
        [
            data if run == auto(data) else "",
            f"{run.lr:.2g}{' (auto)' if run == auto(data) else ''}",
            f"{run.ratio:g}",
            f"{mean:.4f}",
            " ".join(f"{results.loss(run._replace(seed=seed)):.4f}" for seed in SEEDS),
            f"{mean / best - 1:+.1%}",
        ]
        for run, mean in means.items()
    ]


def elsewhere(results: Results) -> list[list[str]]:
    """Other ranks and batch sizes on E2E: auto's rate, half of it and twice of it, one seed."""
    rows = []
    for rank, batch in ((4, 8), (64, 8), (16, 2), (16, 32)):
        run = auto("e2e", rank, batch)
        if batch == 32:
            run = run._replace(updates=30)
        losses = [results.loss(run._replace(lr=run.lr * factor)) for factor in (0.5, 1, 2)]
        rows.append([str(rank), str(batch), f"{run.lr:.2g}", *(f"{loss:.4f}" for loss in losses)])
        rows[-1].append(f"{losses[1] / min(losses) - 1:+.1%}")
    return rows


def draw_picture(results: Results) -> None:
    """Loss over learning rate, a line for each ratio, for both kinds of data."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, data in zip(figure.subplots(1, 2), DATA, strict=True):
        for ratio, rates in GRID.items():
            losses = [results.loss(Run(data, lr, ratio)) for lr in rates]
            axes.plot(rates, losses, "o-", color=COLORS[ratio], label=f"B at {ratio:g} times the rate of A")
        axes.axvline(auto(data).lr, color="#888888", linestyle=":", label="--lr auto")
        axes.set(xscale="log", title=data, xlabel="learning rate of A", ylabel="validation loss")
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(PAGE.with_suffix(".png"), dpi=110)


def markdown(header: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Runs what is missing and writes the JSON, the page and its picture."""
    torch.set_num_threads(1)  # the same sums in the same order on every machine of this kind
    results = Results()
    rows = [row for data in DATA for row in study(results, data)]
    header = ("data", "lr of A", "LoRA+ ratio", "mean loss, 3 seeds", "each seed", "against the best")
    others = elsewhere(results)
    other_header = ("rank", "batch", "auto", "half", "auto's loss", "twice", "against the best")
    results.save()
    draw_picture(results)
    say(table(rows, header))
    say(table(others, other_header))
    PAGE.write_text(
        PAGE_TEXT.format(table=markdown(header, rows), others=markdown(other_header, others)), encoding="utf-8"
    )


PAGE_TEXT = """# Learning rates: `--lr auto` beside a sweep

Made by `python benchmarks/learning_rates.py`; every run is in benchmarks/learning_rates.json. SmolLM2-135M (bf16), all
linear layers, rank 16, lora_alpha 32, 60 updates of 8 examples, linear decay without warm-up; validation loss at the
end. Two kinds of data: E2E lines (`examples/NLG/data`) and chats of a made-up shop (`benchmarks/chats.py`).

![Validation loss over learning rate](learning-rates.png)

The points of a grid of 15 that come within 3 % of its best loss, and auto, over three seeds:

{table}

Other ranks (lora_alpha = 2 rank) and batch sizes on E2E, one seed, with half and twice of the rate of auto; 60 updates,
30 at batch 32:

{others}
"""


if __name__ == "__main__":
    main()
