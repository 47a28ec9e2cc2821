"""The whole job: load a base model and data, freeze, inject, train, save, and tell what a learner wants to see."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..bases import load_base
from ..console import duration, size
from ..data import Encoded, read_sources
from ..errors import ConfigError
from ..formats import check_portable
from ..injection import adapted_layers, inject
from . import train
from .config import TrainConfig
from .report import parameter_table, tell
from .trainer import TrainResult, load_examples_of

__all__ = ["load_base_of", "run_job"]


def run_job(config: TrainConfig) -> TrainResult:
    """Trains an adapter from nothing but settings, and tells on the console what happens.

    Args:
        config: `train_data` must be given.

    Returns:
        What the run came to.

    Raises:
        LoraError: whatever goes wrong, with a message for the user.
    """
    if config.train_data is None:
        raise ConfigError("no training data given: --train_data FILE (E2E lines `meaning||text`, or .jsonl)")
    # Data first: a wrong file should show before a model is loaded.
    sources = read_sources(config.train_data, config.data_format)
    valid_sources = None if config.valid_data is None else read_sources(config.valid_data, config.data_format)
    tell(f"Loading {config.model} ...")
    model, tokenizer = load_base_of(config)
    training = load_examples_of(config, sources, tokenizer, config.max_train_samples)
    tell(f"Loaded {len(training):,} training examples{_dropped(training)}")
    valid = None
    if valid_sources is not None:
        valid = load_examples_of(config, valid_sources, tokenizer, config.max_valid_samples)
        tell(f"Loaded {len(valid):,} validation examples{_dropped(valid)}")
    _adapt(model, config)
    tell()
    tell(parameter_table(model))
    tell()
    result = train(model, training.examples, config, valid_data=valid.examples if valid else None)
    _tell(result)
    return result


def load_base_of(config: TrainConfig) -> tuple[nn.Module, Any]:
    """Loads the base model that a run trains on, and its tokenizer, as the run's settings say (see `load_base`)."""
    return load_base(
        config.model,
        dtype=None if config.dtype == "auto" else config.dtype,
        device=config.device,
        seed=config.seed,
        hidden_dim=config.hidden_dim,
        num_layers=config.num_layers,
    )


def _dropped(encoded: Encoded) -> str:
    return f" ({encoded.drop_note})" if encoded.drop_note else ""


def _adapt(model: nn.Module, config: TrainConfig) -> None:
    if adapted_layers(model):  # run-demo is built from LoRA layers
        tell("The network is built from LoRA layers of its own; --lora_dim and --target_modules do not apply.")
        return
    if config.target != "none":
        check_portable(config.lora_config(), model, config.target)
    torch.manual_seed(config.seed)
    report = inject(model, config.lora_config())
    matched = ", ".join(f"{pattern} ({number} modules)" for pattern, number in report.patterns.items())
    tell(f"LoRA on {matched}: r={config.lora_dim}, lora_alpha={config.alpha:g}")
    for note in report.notes:
        tell(f"  note: {note}")


def _tell(result: TrainResult) -> None:
    weights = result.output_dir / "adapter_model.safetensors"
    tell()
    tell(f"Done: {result.steps:,} updates in {duration(result.seconds)} ({result.tokens_per_second:,.0f} tokens/s).")
    if len(result.valid_losses) > 1:
        base, last = result.valid_losses[0][1], result.valid_losses[-1][1]
        tell(f"Validation loss {base:.4f} -> {last:.4f} ({last / base:.0%} of the base's)")
        if last > 0.98 * base:
            tell(
                "WARNING: that is next to nothing. A frozen base can only lend what it knows: a random one (scratch, "
                "run-demo) knows nothing. Take a pretrained --model, raise --lr, or train longer."
            )
    tell(f"Adapter: {weights} ({size(weights.stat().st_size)})")
    if result.best is not None and result.best[0] != result.valid_losses[-1][0]:
        step, loss = result.best
        tell(f"The best one was that of update {step} (validation loss {loss:.4f}): {result.output_dir / 'best'}")
    checkpoint = result.output_dir / "pytorch_model.bin"
    tell(f"Checkpoint for Microsoft's loralib: {checkpoint} ({size(checkpoint.stat().st_size)})")
    if (result.output_dir / "loss.png").exists():
        tell(f"Loss curve: {result.output_dir / 'loss.png'}")
