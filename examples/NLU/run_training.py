"""Train a classifier of messages to a bicycle shop: is it about delivery, payment or the product?

  python examples/NLU/run_training.py
  python examples/NLU/run_training.py --model scratch-encoder --hidden_dim 128
  python examples/NLU/run_training.py --model roberta-base --target_modules query,value

The first trains the default base model, the second a small encoder with random weights, which knows no words before;
both work offline.  The third is the LoRA paper's choice, a model on the hub.  Then the test data, which no training has
seen, are classified.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from loralib.cli import add_fields, from_args, run_command

DATA = Path(__file__).resolve().parent / "data"
DEFAULTS = {
    "task": "classify",
    "train_data": str(DATA / "train.jsonl"),
    "valid_data": str(DATA / "valid.jsonl"),
    "output_dir": "classifier",
    "best_metric": "accuracy",
    "num_epochs": 5,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for every setting; the data beside this script is the default."""
    from loralib import TrainConfig

    add_fields(parser, TrainConfig, DEFAULTS)


def run(args: argparse.Namespace) -> None:
    """Trains and saves the adapter, and measures it on the test data."""
    from loralib import TrainConfig
    from loralib.bases.classifiers import load_adapted_classifier
    from loralib.console import say
    from loralib.data import read_sources
    from loralib.training.job import run_job
    from loralib.training.predicting import metrics_of, predict

    config = from_args(TrainConfig, args, DEFAULTS)
    result = run_job(config)
    model, tokenizer = load_adapted_classifier(str(result.output_dir / "best"), dtype=None)
    (source,) = read_sources(str(DATA / "test.jsonl"), objective="classify")
    figures = metrics_of(model, source.examples, predict(model, tokenizer, source.examples))
    listed = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
    say(f"\nThe best adapter on the {len(source.examples)} test messages: {listed}")


if __name__ == "__main__":
    sys.exit(run_command(sys.modules[__name__], Path(__file__).name, sys.argv[1:]))
