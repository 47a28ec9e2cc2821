"""Train LoRA on E2E data: freeze a pretrained model, learn two thin matrices per layer, save a few megabytes.

  python examples/NLG/run_training.py
  python examples/NLG/run_training.py --num_epochs 3 --batch_size 8 --lora_dim 32 --lr 5e-5 --max_train_samples 200
  python examples/NLG/run_training.py --model run-demo --output_dir demo_model

LoRA: https://arxiv.org/abs/2106.09685; Microsoft's loralib: https://github.com/microsoft/LoRA;
Hugging Face PEFT, which loads what this writes: https://github.com/huggingface/peft
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from loralib.cli import add_fields, from_args, run_command

DATA = Path(__file__).resolve().parent / "data" / "e2e"
# A first run of a minute: a sample of the data, in small steps.  `loralib train` has defaults for data of one's own.
DEFAULTS = {
    "train_data": str(DATA / "train.txt"),
    "valid_data": str(DATA / "valid.txt"),
    "max_train_samples": 100,
    "max_valid_samples": 64,
    "seq_len": 64,
    "num_epochs": 2,
    "batch_size": 4,
    "lr": 1e-4,
    "loraplus_lr_ratio": 16.0,
    "warmup_steps": 0,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for every setting; the data beside this script is the default."""
    from loralib import TrainConfig

    add_fields(parser, TrainConfig, DEFAULTS)


def run(args: argparse.Namespace) -> None:
    """Trains and saves the adapter."""
    from loralib import TrainConfig
    from loralib.training.job import run_job

    run_job(from_args(TrainConfig, args, DEFAULTS))


if __name__ == "__main__":
    sys.exit(run_command(sys.modules[__name__], Path(__file__).name, sys.argv[1:]))
