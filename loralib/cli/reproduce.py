"""Reproduce the LoRA paper in one command: train, decode each distinct input of the test set, score, report.

loralib reproduce e2e
loralib reproduce e2e --data data/e2e --model gpt2-medium
loralib reproduce webnlg --model gpt2-large --output_dir webnlg_large --set train.num_epochs=1

Run it again to continue after an interruption: stages whose settings and data have not changed are skipped, and after a
change only the stages that depend on it run again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..console import say
from ..errors import ConfigError, did_you_mean
from ..nlg import reproduction
from ._adapters import add_dtype


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the data set, the model, the recipe and changes to it."""
    parser.add_argument("dataset", metavar="e2e|dart|webnlg", help="the data set")
    parser.add_argument("--model", default="smollm2-135m", help="base model (default smollm2-135m)")
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="directory with the published training, validation and test files (default: data/NAME; for e2e, also the "
        "sample in examples/NLG/data/e2e)",
    )
    parser.add_argument(
        "--recipe",
        metavar="FILE.toml",
        help="how to train and decode: a file, or the name of a built-in recipe (default: the one for this data set "
        "and model, else smollm2-135m)",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        dest="changes",
        help="change settings of the recipe, as in train.lr=1e-4 decode.num_beams=4 max_inputs=50",
    )
    parser.add_argument(
        "--output_dir", metavar="DIR", help="directory for all results (default: reproduced/NAME-MODEL)"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="random seed for training (default: the recipe's)")
    add_dtype(parser, "dtype of the base model (default: the recipe's)", default=None)
    parser.add_argument("--device", help="cpu, cuda, mps, ... (default: the fastest available)")
    parser.add_argument(
        "--print_recipe", action="store_true", help="print the recipe as TOML, as a starting point for your own"
    )


def run(args: argparse.Namespace) -> None:
    """Runs the recipe, or prints it."""
    if args.dataset not in reproduction.DATASETS:
        near, known = did_you_mean(args.dataset, reproduction.DATASETS), ", ".join(reproduction.DATASETS)
        raise ConfigError(f"there is no data set {args.dataset!r}.{near} Known: {known}.")
    name = reproduction.choose_recipe(args.dataset, args.model, args.recipe)
    flags = {"seed": args.seed, "dtype": args.dtype}
    changes = [*args.changes, *(f"train.{key}={value}" for key, value in flags.items() if value is not None)]
    recipe = reproduction.load_recipe(name, changes, model=args.model, device=args.device)
    if args.print_recipe:
        say(reproduction.recipe_text(name, changes), end="")
        return
    files = reproduction.find_files(args.dataset, args.data)
    last = Path(args.model).name or "model"
    output = Path("reproduced") / f"{args.dataset}-{last}" if args.output_dir is None else args.output_dir
    if args.recipe is None and recipe.name not in (last, f"{args.dataset}-{last}"):
        say(f"There is no recipe for {args.dataset} with {args.model}: using {recipe.name} "
            f"(choose another with --recipe: {', '.join(reproduction.recipe_names())})")  # fmt: skip
    say(f"{args.dataset} with {args.model}, recipe {recipe.name}, data {files.train.parent}")
    reproduction.reproduce(args.dataset, recipe, files, output)
