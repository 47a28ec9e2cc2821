"""Train a LoRA adapter: the base model stays frozen, and only two thin matrices per layer learn.

loralib train --train_data train.txt --valid_data valid.txt
loralib train --train_data chat.jsonl --model ./my-model --rank 8 --num_epochs 3
loralib train --config run.toml --resume
"""

from __future__ import annotations

import argparse

from ..training import TrainConfig
from ..training.job import run_job
from . import add_fields, from_args


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for every setting of training."""
    add_fields(parser, TrainConfig)


def run(args: argparse.Namespace) -> None:
    """Trains and saves the adapter."""
    run_job(from_args(TrainConfig, args))
