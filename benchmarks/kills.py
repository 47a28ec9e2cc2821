"""50 runs, each killed at a random moment (SIGKILL), resumed, and compared byte for byte with an uninterrupted one.

python benchmarks/kills.py             about three minutes; writes benchmarks/kills.json; needs fork (not Windows)
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import machine

import loralib as lora
from loralib.console import say
from loralib.data import TokenExample
from loralib.training.report import read_metrics
from loralib.training.run_directory import checkpoint_files

TRIALS = 50


def tiny_model() -> Any:
    """Creates a Llama of a few thousand parameters: its steps take milliseconds, so that kills also hit saves."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=23, initializer_range=0.3, **sizes))


def train(config: lora.TrainConfig) -> Path:
    """Trains one run on random examples."""
    rng = random.Random(0)
    flags = (False, False, False, True, True, True)
    examples = [TokenExample(tuple(rng.randrange(23) for _ in flags), flags) for _ in range(24)]
    return lora.train(tiny_model(), examples, config, valid_data=examples[:6], verbose=False).output_dir


def outcome(directory: Path) -> dict[str, Any]:
    """What must be identical: the adapters' bytes, and every event except for its time."""
    return {
        "adapter": (directory / "adapter_model.safetensors").read_bytes(),
        "best": (directory / "best" / "adapter_model.safetensors").read_bytes(),
        "config": (directory / "adapter_config.json").read_bytes(),
        "flat": (directory / "pytorch_model.bin").read_bytes(),
        "events": [{k: v for k, v in e.items() if k != "step_s"} for e in read_metrics(directory / "metrics.jsonl")],
    }


def killed_after(config: lora.TrainConfig, seconds: float) -> bool:
    """Runs in a child process that is killed after some time; returns whether it was still running."""
    child = os.fork()
    if child == 0:
        try:
            train(config)
            os._exit(0)
        except BaseException:
            os._exit(1)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def main() -> int:
    """Runs the trials and writes the JSON beside this file."""
    torch.set_num_threads(1)  # a forked child must not wait for its parent's threads
    rng = random.Random(0)
    kills = same = 0
    checkpoints = []
    with tempfile.TemporaryDirectory() as folder:
        config = lora.TrainConfig(
            output_dir=f"{folder}/whole", lora_dim=4, lr=5e-3, batch_size=6, num_epochs=6, save_steps=1, eval_steps=3,
            lora_dropout=0.1, warmup_steps=0,
        )  # fmt: skip
        train(config)  # warms up
        started = time.perf_counter()
        truth = outcome(train(config))
        lasts = time.perf_counter() - started
        trial = 0
        while kills < TRIALS:
            trial += 1
            config = config.replace(output_dir=f"{folder}/{trial}", resume=False)
            kills += killed_after(config, rng.uniform(0.05, 0.95) * lasts)
            kept = checkpoint_files(Path(config.output_dir) / "checkpoints")
            checkpoints.append(len(kept))
            same += outcome(train(config.replace(resume=bool(kept)))) == truth
    result = {
        "runs": trial,
        "kills": kills,
        "byte_identical": same,
        "resumed_from_a_checkpoint": sum(map(bool, checkpoints)),
    }
    say(f"{kills} kills in {trial} runs: {same} results byte-identical")
    Path(__file__).with_suffix(".json").write_text(
        json.dumps({"machine": machine(), "seed": 0, **result}, indent=2) + "\n", encoding="utf-8"
    )
    return 0 if same == trial else 1


if __name__ == "__main__":
    sys.exit(main())
