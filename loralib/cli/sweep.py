"""Train many adapters at once, to find the best settings: all runs share one base model and its passes.

loralib sweep --train_data train.txt --lr 1e-4,3e-4,1e-3 --rank 8,32
loralib sweep --train_data train.txt --target_modules "all-linear;q_proj,v_proj" --seed 0,1,2
loralib sweep --config sweep.toml --resume

Settings of the adapter, the optimiser and the run take lists of values, and each combination is a run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..settings import canonical, read_toml
from ..training import TrainConfig
from ..training.sweep_job import SWEPT, configs_of, run_sweep
from . import add_fields

_OUTPUT = {"output_dir": "lora_sweep"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for every setting of training."""
    add_fields(parser, TrainConfig, _OUTPUT, several=SWEPT)


def run(args: argparse.Namespace) -> None:
    """Trains all runs and reports the best."""
    values = dict(_OUTPUT)
    if args.config is not None:
        values |= canonical(TrainConfig, read_toml(Path(args.config), f"--config {args.config}"))
        values.pop("record", None)
    given = {name: getattr(args, name, None) for name in TrainConfig().to_dict()}
    values |= {name: value for name, value in given.items() if value is not None}
    run_sweep(configs_of(values))
