"""`TrainConfig`: every knob of training, declared once.

A field's help text becomes the command line's, its name the flag and the TOML key.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import ALL_LINEAR, LoraConfig
from ..data import FORMATS
from ..errors import ConfigError, list_faults
from ..settings import setting

__all__ = ["TrainConfig"]


@dataclass(frozen=True)
class TrainConfig:
    """The settings of one training run; see ``loralib train --help`` for what each means.

    Raises:
        ConfigError: one or more settings cannot be used; all are reported together.

    >>> TrainConfig(lora_dim=8).alpha
    16.0
    """

    # What is trained on what.
    model: str = setting(
        "smollm2-135m", "base model: smollm2-135m, scratch, run-demo, a local directory or a hub id", "model and data"
    )
    train_data: str | Sequence[str] | None = setting(
        None,
        "training file(s), `path` or `path:weight`: E2E lines, .jsonl, or see data_format",
        "model and data",
        several="in a row",
    )
    valid_data: str | Sequence[str] | None = setting(None, "validation file(s)", "model and data", several="in a row")
    data_format: str = setting(
        "auto",
        "of the data files: auto goes by their names and takes .txt for E2E lines; text is plain text",
        "model and data",
        FORMATS,
    )
    output_dir: str = setting("lora_model", "where the adapter goes", "model and data")
    max_train_samples: int = setting(100, "examples to train on, drawn across prompts; 0: all", "model and data")
    max_valid_samples: int = setting(64, "examples to validate on; 0: all", "model and data")
    seq_len: int = setting(64, "tokens an example may have; longer ones are dropped and counted", "model and data")
    objective: str = setting("clm", "train completions (clm) or all tokens (jlm)", "model and data", ("clm", "jlm"))
    hidden_dim: int | None = setting(None, "width of the scratch model (default 768)", "model and data")
    num_layers: int | None = setting(None, "layers of the scratch model (default 2)", "model and data")
    dtype: str = setting(
        "auto",
        "of the frozen base: auto takes bf16 where it is fast",
        "model and data",
        ("auto", "fp32", "bf16", "fp16"),
    )
    device: str | None = setting(None, "cpu, cuda, mps ...; default: the fastest there is", "model and data")
    seed: int = setting(0, "of every random choice", "model and data")

    # The adapter.
    lora_dim: int = setting(16, "rank r of the update: the inner size of A and B", "adapter")
    lora_alpha: float | None = setting(None, "the update is scaled by lora_alpha / r; default 2 * lora_dim", "adapter")
    lora_dropout: float = setting(0.0, "probability of dropping an input of the low-rank path", "adapter")
    target_modules: str | Sequence[str] = setting(
        ALL_LINEAR, "modules to adapt: names separated by commas, one regular expression, or all-linear", "adapter"
    )
    enable_lora: str | Mapping[str, Sequence[bool]] | None = setting(
        None, "blocks of fused projections, as c_attn=1,0,1 (q and v)", "adapter"
    )
    use_rslora: bool = setting(False, "scale by lora_alpha / sqrt(r)", "adapter")
    bias: str = setting("none", "biases to train as well", "adapter", ("none", "all", "lora_only"))
    target: str = setting(
        "none",
        "the tool that will use the adapter: what it could not compute rightly is refused before training",
        "adapter",
        ("none", "peft", "vllm", "llamacpp", "mlx"),
    )

    # The optimiser.
    num_epochs: int = setting(2, "times through the data", "optimiser")
    max_steps: int = setting(0, "stop after so many updates; 0: after num_epochs", "optimiser")
    batch_size: int = setting(4, "examples a step", "optimiser")
    grad_accum: int = setting(1, "steps whose gradients make one update", "optimiser")
    lr: float = setting(1e-4, "peak learning rate", "optimiser")
    loraplus_lr_ratio: float = setting(
        16.0, "B learns so many times faster than A (LoRA+, arXiv:2402.12354); 1: equally fast", "optimiser"
    )
    schedule: str = setting(
        "linear", "of the learning rate after warm-up", "optimiser", ("linear", "cosine", "constant")
    )
    warmup_steps: int = setting(0, "updates over which the learning rate rises", "optimiser")
    weight_decay: float = setting(0.0, "decoupled weight decay of the adapter", "optimiser")
    beta1: float = setting(0.9, "AdamW's decay of the mean gradient", "optimiser")
    beta2: float = setting(0.999, "AdamW's decay of the mean square", "optimiser")
    adam_eps: float = setting(1e-8, "AdamW's epsilon", "optimiser")
    correct_bias: bool = setting(
        True, "correct AdamW's moments for their start at zero (always done with --arithmetic standard)", "optimiser"
    )
    max_grad_norm: float = setting(1.0, "clip the gradient to this norm; 0: never", "optimiser")
    label_smoothing: float = setting(0.0, "share of the target spread over the vocabulary", "optimiser")
    arithmetic: str = setting(
        "standard",
        "paper: the LoRA paper's own AdamW (eps before bias correction, decay after the update), schedule and loss, "
        "counted in micro-batches",
        "optimiser",
        ("standard", "paper"),
    )

    # The engine.
    packing: bool = setting(
        True, "lay the examples of a step out in one row without padding, each seeing only itself", "engine"
    )
    share_prompts: bool = setting(True, "compute a prompt once for the examples of a step that share it", "engine")
    max_siblings: int = setting(1, "examples of one prompt drawn into a step together, at most", "engine")
    shuffle: bool = setting(True, "draw the examples in a new order each epoch", "engine")
    gradient_checkpointing: bool = setting(False, "less memory, a third more time", "engine")

    # What is kept and shown.
    eval_steps: int = setting(0, "validate every so many updates; 0: at the end of each epoch", "keeping and showing")
    early_stopping: int = setting(
        0, "stop after so many validations without a better loss; 0: never", "keeping and showing"
    )
    save_steps: int = setting(0, "checkpoint every so many updates; 0: at the end of each epoch", "keeping and showing")
    keep_checkpoints: int = setting(2, "how many of the last checkpoints stay", "keeping and showing")
    resume: bool = setting(False, "go on from the last checkpoint in output_dir", "keeping and showing")
    overwrite: bool = setting(False, "throw away an unfinished run in output_dir", "keeping and showing")
    report_to: str = setting("none", "also log there", "keeping and showing", ("none", "tensorboard"))

    def __post_init__(self) -> None:
        faults = list(self._faults())
        if faults:
            count = f"{len(faults)} setting{'s' if len(faults) > 1 else ''}"
            raise ConfigError(list_faults(f"{count} of the training run cannot be used", faults))

    def _faults(self) -> list[str]:
        faults = []
        whole = {
            "lora_dim": 1, "batch_size": 1, "grad_accum": 1, "seq_len": 2, "num_epochs": 0, "max_steps": 0,
            "max_train_samples": 0, "max_valid_samples": 0, "warmup_steps": 0, "eval_steps": 0, "save_steps": 0,
            "early_stopping": 0, "keep_checkpoints": 1, "max_siblings": 1,
        }  # fmt: skip
        for name, least in whole.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                faults.append(f"{name} is {value!r}, expected a whole number of at least {least}")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            faults.append(f"seed is {self.seed!r}, expected a whole number from 0 to below 2**63")
        for name in ("lr", "adam_eps", "loraplus_lr_ratio"):
            value = getattr(self, name)
            if not _is_finite(value) or value <= 0:
                faults.append(f"{name} is {value!r}, expected a number above 0")
        for name in ("weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            if not _is_finite(value) or value < 0:
                faults.append(f"{name} is {value!r}, expected a number of at least 0")
        for name in ("beta1", "beta2", "label_smoothing", "lora_dropout"):
            value = getattr(self, name)
            if not _is_finite(value) or not 0 <= value < 1:
                faults.append(f"{name} is {value!r}, expected a number from 0 to below 1")
        if self.lora_alpha is not None and (not _is_finite(self.lora_alpha) or self.lora_alpha == 0):
            faults.append(f"lora_alpha is {self.lora_alpha!r}, expected a number other than 0 (often 2 * lora_dim)")
        for name in ("hidden_dim", "num_layers"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                faults.append(f"{name} is {value!r}, expected a whole number of at least 1")
        if not str(self.output_dir).strip():
            faults.append(f"output_dir is {self.output_dir!r}, expected the name of a directory (. is the current one)")
        for spec in dataclasses.fields(self):
            choices = spec.metadata["choices"]
            if choices and getattr(self, spec.name) not in choices:
                faults.append(
                    f"{spec.name} is {getattr(self, spec.name)!r}, expected {' or '.join(map(repr, choices))}"
                )
        if self.num_epochs == 0 and self.max_steps == 0:
            faults.append("num_epochs and max_steps are both 0, expected one of them to be positive")
        return faults

    @property
    def alpha(self) -> float:
        """lora_alpha, or what it is by default."""
        return float(2 * self.lora_dim if self.lora_alpha is None else self.lora_alpha)

    def lora_config(self) -> LoraConfig:
        """Returns the settings of the adapter that this run trains.

        >>> TrainConfig(target_modules="c_attn", enable_lora="c_attn=1,0,1").lora_config().enable_lora
        {'c_attn': (True, False, True)}
        """
        targets = self.target_modules
        if isinstance(targets, str) and targets != ALL_LINEAR and all(part.isidentifier() for part in _parts(targets)):
            targets = _parts(targets)
        return LoraConfig(
            r=self.lora_dim,
            lora_alpha=self.alpha,
            lora_dropout=self.lora_dropout,
            target_modules=targets,
            enable_lora=_blocks(self.enable_lora),
            use_rslora=self.use_rslora,
            bias=self.bias,
            task_type="CAUSAL_LM",
        )

    def replace(self, **changes: Any) -> TrainConfig:
        """Returns a copy with other values."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Returns all settings as plain values."""
        return dataclasses.asdict(self)


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _blocks(text: str | Mapping[str, Sequence[bool]] | None) -> dict[str, tuple[bool, ...]]:
    """Reads ``c_attn=1,0,1``; several projections are separated by semicolons."""
    if text is None:
        return {}
    if not isinstance(text, str):
        return {name: tuple(bool(on) for on in blocks) for name, blocks in text.items()}
    blocks = {}
    for entry in filter(None, text.split(";")):
        name, equals, flags = entry.partition("=")
        values = _parts(flags)
        if not equals or not values or any(value not in ("0", "1") for value in values):
            raise ConfigError(f"enable_lora is {text!r}, expected blocks as in c_attn=1,0,1")
        blocks[name.strip()] = tuple(value == "1" for value in values)
    return blocks


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
