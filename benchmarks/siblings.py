"""The effect of prompt sharing on learning: validation loss on E2E after the same examples, over several seeds.

python benchmarks/siblings.py --data DIR       about an hour on one core; writes benchmarks/siblings.json
python benchmarks/siblings.py --only noise     the effect of a shared dropout mask on one step's gradient; a minute
python benchmarks/siblings.py --batch 32 --examples 1280 --only loss --runs "uniform shuffle" "4 siblings"
                                               larger batches, ten minutes on two cores; benchmarks/siblings_32.json

DIR contains the E2E challenge's train.txt and valid.txt (default: the repository's sample of the same format).  A run
is `loralib.train` with default settings on SmolLM2-135M, except for what its name says, the batches, and the use of
complete prompts with all their texts: examples drawn across prompts would have no siblings, i.e. examples of the same
prompt.  Results are saved after each run, and existing runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import loralib as lora
from loralib.console import say, table
from loralib.data import Example, TokenExample, encode, read_examples
from loralib.data.packing import epoch_order
from loralib.training.step import make_step

HERE = Path(__file__).resolve().parent
# Each run, and its baseline.  "own masks" trains on the very batches of "shared mask", but each example separately.
RUNS: dict[str, tuple[dict[str, Any], str]] = {
    "uniform shuffle": ({"max_siblings": 1}, ""),
    "4 siblings": ({"max_siblings": 4}, "uniform shuffle"),
    "dropout 0.1, own masks": ({"lora_dropout": 0.1, "share_prompts": False, "shuffle": False}, ""),
    "dropout 0.1, shared mask": ({"lora_dropout": 0.1, "shuffle": False}, "dropout 0.1, own masks"),
    "2 siblings": ({"max_siblings": 2}, "uniform shuffle"),
}


def whole_prompts(examples: Sequence[Example], count: int) -> list[Example]:
    """Draws random prompts with all their texts, until there are `count` examples."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.prompt, []).append(example)
    prompts = list(groups)
    random.Random(0).shuffle(prompts)
    return [example for prompt in prompts for example in groups[prompt]][:count]


def validation_loss(
    model: Any,
    examples: Sequence[TokenExample],
    valid: Sequence[TokenExample],
    batch_size: int,
    seed: int,
    settings: dict[str, Any],
) -> tuple[float, float]:
    """Trains one epoch; returns the loss on `valid` before and after."""
    if not settings.get("shuffle", True):  # the order is given by the batches with siblings
        order = epoch_order(examples, batch_size, seed=seed, epoch=0, max_siblings=4)
        examples = [examples[index] for batch in order for index in batch]
    with tempfile.TemporaryDirectory() as folder:
        given = {"lr": 1e-4, "warmup_steps": 0, **settings}
        config = lora.TrainConfig(num_epochs=1, batch_size=batch_size, seed=seed, output_dir=folder, **given)
        result = lora.train(model, examples, config, valid_data=valid, verbose=False)
    lora.remove(model)
    return result.valid_losses[0][1], result.valid_losses[-1][1]


def noise(model: Any, examples: Sequence[TokenExample], batch_size: int, draws: int = 24) -> dict[str, float]:
    """How much dropout alone scatters one step's gradient, with shared and with separate masks.

    For each single example, dropout is the same either way, and so is the expected gradient; but the errors of siblings
    that share a mask point in the same direction, so the gradient scatters more.

    Returns:
        For each, the root mean square distance of the gradient from its mean over the draws, as a fraction of the
        gradient's norm without dropout.
    """
    batch = [examples[index] for index in epoch_order(examples, batch_size, seed=0, epoch=0, max_siblings=4)[0]]
    torch.manual_seed(0)
    config = lora.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.1, target_modules="all-linear")
    lora.inject(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)  # at B = 0, A would have no gradient

    def gradient(step: Any) -> torch.Tensor:
        model.zero_grad()
        step.forward_backward(batch, loss_scale=1 / sum(sum(example.trained) for example in batch))
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()

    figures = {}
    size = float(gradient(make_step(model.eval())).norm())
    model.train()
    for name, share in (("shared mask", True), ("own masks", False)):
        step = make_step(model, share_prompts=share)
        drawn = [gradient(step) for _ in range(draws)]
        mean = torch.stack(drawn).mean(0)
        spread = (sum(float((g - mean).square().sum()) for g in drawn) / (draws - 1)) ** 0.5
        figures[name] = spread / size
    lora.remove(model)
    return figures


def rows(results: dict[str, dict[str, float]]) -> Iterator[tuple[str, str, str, str]]:
    """Yields one row per run: its losses by seed, and their difference from the baseline."""
    for name, (_, beside) in RUNS.items():
        losses = results.get(name, {})
        other = results.get(beside, {})
        apart = [losses[seed] - other[seed] for seed in losses if seed in other]
        told = ""
        if apart:
            told = f"{statistics.mean(apart):+.4f}"
            told += f" ± {statistics.stdev(apart) / len(apart) ** 0.5:.4f}" if len(apart) > 1 else ""
        mean = f"{statistics.mean(losses.values()):.4f}" if losses else ""
        yield name, "  ".join(f"{loss:.4f}" for loss in losses.values()), mean, told and f"{told} than {beside}"


def main() -> None:
    """Trains the missing runs, and writes the JSON after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE.parent / "examples" / "NLG" / "data" / "e2e")
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--valid", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--only", choices=["noise", "loss"])
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--out", type=Path, help="default: siblings.json, or siblings_32.json for batches of 32")
    args = parser.parse_args()
    args.out = args.out or HERE / ("siblings.json" if args.batch == 8 else f"siblings_{args.batch}.json")
    transformers.logging.set_verbosity_error()
    found = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    model, tokenizer = lora.load_base("smollm2-135m")
    examples = encode(whole_prompts(read_examples(args.data / "train.txt"), args.examples), tokenizer, 128).examples
    valid = encode(read_examples(args.data / "valid.txt"), tokenizer, 128).examples
    valid = valid[:: max(1, len(valid) // args.valid)][: args.valid]  # across all prompts
    about = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "dtype": str(next(model.parameters()).dtype),
        "examples": len(examples),
        "prompts": len({e.ids[: e.trained.index(True)] for e in examples}),
        "validation_examples": len(valid),
        "batch_size": args.batch,
    }
    if found.get("about", about) != about:
        raise SystemExit(f"{args.out} is of another setting: {found['about']}, now {about}. Remove it, or give --out.")
    found.setdefault("about", about)

    def keep() -> None:
        args.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")

    if args.only != "loss" and "noise" not in found:
        found["noise"] = noise(model, examples, args.batch)
        keep()
    losses = found.setdefault("validation_loss", {})
    todo = [
        (seed, name) for seed in range(args.seeds) for name in ("uniform shuffle", "4 siblings")
    ]  # the most important results
    todo += [(seed, name) for name in RUNS for seed in range(args.seeds)]
    for seed, name in todo if args.only != "noise" else ():
        settings, _ = RUNS[name]
        if name in args.runs and str(seed) not in losses.get(name, {}):
            before, after = validation_loss(model, examples, valid, args.batch, seed, settings)
            found["validation_loss_before"] = before
            losses.setdefault(name, {})[str(seed)] = after
            keep()
            say(f"seed {seed}, {name}: {before:.4f} -> {after:.4f}")
    if "noise" in found:
        say(", ".join(f"{name}: {figure:.3f}" for name, figure in found["noise"].items()))
    say(table(list(rows(losses)), ("run", "validation loss by seed", "mean", "difference")))


if __name__ == "__main__":
    main()
