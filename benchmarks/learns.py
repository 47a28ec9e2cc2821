"""Does the default job really learn?  Loss, slot errors on unseen meanings, and texts that end by themselves.

python benchmarks/learns.py            about ten minutes on two cores; writes benchmarks/learns.json
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from machine import machine

import loralib as lora
from loralib.console import say, table
from loralib.data import group_by_prompt, prompt_ids, read_examples
from loralib.nlg.metrics.slots import slot_error_rate
from loralib.training.job import run_job

DATA = Path(__file__).resolve().parent.parent / "examples" / "NLG" / "data" / "e2e"
RUNS: dict[str, dict[str, Any]] = {
    "default flags": {},
    "--num_epochs 3 --batch_size 8 --lora_dim 32 --lr 5e-5 --max_train_samples 200": {
        "num_epochs": 3, "batch_size": 8, "lora_dim": 32, "lr": 5e-5, "max_train_samples": 200,
    },
}  # fmt: skip


def texts_of(model: Any, tokenizer: Any, prompts: list[str]) -> list[Any]:
    """Continues each prompt greedily."""
    ids = [prompt_ids(prompt, tokenizer) for prompt in prompts]
    return lora.generate(model, tokenizer, ids, max_new_tokens=80)


# The settings of examples/NLG/run_training.py.
GUIDE = {
    "max_train_samples": 100, "max_valid_samples": 64, "seq_len": 64, "num_epochs": 2, "batch_size": 4, "lr": 1e-4,
    "warmup_steps": 0,
}  # fmt: skip


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Trains with some settings and compares the adapted model with its base on unseen meanings."""
    with tempfile.TemporaryDirectory() as folder:
        result = run_job(
            lora.TrainConfig(
                train_data=str(DATA / "train.txt"),
                valid_data=str(DATA / "valid.txt"),
                output_dir=folder,
                **(GUIDE | settings),
            )
        )
        model, tokenizer = lora.load_base("smollm2-135m", dtype="fp32")
        lora.load_adapter(model, folder)
    unseen = [example.prompt for example in group_by_prompt(read_examples(DATA / "test.txt"))]
    adapted = texts_of(model, tokenizer, unseen)
    with lora.disabled(model):
        base = texts_of(model, tokenizer, unseen)
    figures: dict[str, Any] = {
        "validation_loss": {"base": result.valid_losses[0][1], "adapted": result.valid_losses[-1][1]},
        "updates": result.steps,
        "seconds": round(result.seconds, 1),
    }
    for name, texts in (("base", base), ("adapted", adapted)):
        slots = slot_error_rate(unseen, [text.text for text in texts])
        figures[f"slot_errors_{name}"] = {"errors": slots.errors, "slots": slots.slots, "signature": slots.signature}
        figures[f"ended_{name}"] = sum(text.finish_reason == "stop" for text in texts) / len(texts)
    return figures


def main() -> None:
    """Measures every run and writes the JSON beside this file."""
    results = {name: measure(settings) for name, settings in RUNS.items()}
    rows = []
    for name, figures in results.items():
        loss, before, after = figures["validation_loss"], figures["slot_errors_base"], figures["slot_errors_adapted"]
        rows.append(
            (
                name,
                f"{loss['base']:.3f} -> {loss['adapted']:.3f} ({loss['adapted'] / loss['base']:.0%})",
                f"{before['errors']} -> {after['errors']} of {after['slots']}",
                f"{figures['ended_base']:.0%} -> {figures['ended_adapted']:.0%}",
            )
        )
    say(table(rows, ("run", "validation loss", "slot errors, unseen meanings", "ended by itself")))
    Path(__file__).with_suffix(".json").write_text(
        json.dumps({"machine": machine(), "runs": results}, indent=2) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
