"""Train on a Ray cluster: Ray Train starts the processes, and each does what `loralib train` does under torchrun.

pip install "ray[train]"
python examples/cluster/ray_train.py --workers 2 --train_data mine.jsonl --output_dir /shared/mine
python examples/cluster/ray_train.py --workers 8 --gpu --model meta-llama/Llama-3.1-8B --train_data mine.jsonl

All other flags are those of `loralib train`.  The output directory must be one that all workers see.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer

import loralib as lora
from loralib.cli import add_fields, from_args
from loralib.training.job import run_job


def train_on_worker(settings: dict[str, Any]) -> None:
    """Runs on each worker, in a process group that Ray has made."""
    run_job(lora.TrainConfig(**settings))


def absolute(value: Any) -> Any:
    """Returns a path, or a list of them, from the root; what is no path here, such as a hub id, as it is."""
    if isinstance(value, (list, tuple)):
        return [absolute(each) for each in value]
    return str(Path(value).resolve()) if value is not None and Path(value).exists() else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1, help="processes (default 1)")
    parser.add_argument("--gpu", action="store_true", help="give each worker a GPU")
    add_fields(parser, lora.TrainConfig)
    args = parser.parse_args()
    settings = from_args(lora.TrainConfig, args).to_dict()
    settings["output_dir"] = str(Path(settings["output_dir"]).resolve())  # workers have directories of their own
    for name in ("model", "train_data", "valid_data"):
        settings[name] = absolute(settings[name])
    trainer = TorchTrainer(
        train_on_worker,
        train_loop_config=settings,
        scaling_config=ScalingConfig(num_workers=args.workers, use_gpu=args.gpu),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
