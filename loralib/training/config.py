"""`TrainConfig`: every setting of a training run, declared once.

A field's name becomes the flag and the TOML key; its help text is shown by the command line, ``help()`` and the docs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..bases.device import DTYPES
from ..bases.quant import KINDS
from ..config import ALL_LINEAR, LoraConfig, parse_enable_lora, parse_target_modules, parse_token_indices
from ..data import FORMATS, OBJECTIVES, PREFERENCES
from ..errors import ConfigError
from ..settings import canonical, check, setting, settings_class
from ..variants import contradictions
from .class_metrics import METRICS

__all__ = ["AUTOMATIC", "TrainConfig"]


_DEFAULT_BETA = 0.1  # TRL's default, for both DPO and ORPO
_DATA, _MADE_UP, _LOGS = "model and data", "made-up base", "validation and checkpoints"  # headings shared by settings


@settings_class
@dataclass(frozen=True)
class TrainConfig:
    """The settings of one training run; ``loralib train --help`` lists them too.

    Raises:
        ConfigError: one or more settings are invalid; the message lists all of them.

    >>> TrainConfig(rank=8).alpha
    16.0
    """

    # The model and the data.
    model: str = setting(
        "smollm2-135m",
        "base model: smollm2-135m, scratch, run-demo, a directory, a GGUF file or a hub id",
        _DATA,
        common=True,
    )
    train_data: str | Sequence[str] | None = setting(
        None,
        "training files, each `path` or `path:weight`: E2E lines, .jsonl, or any other data_format",
        _DATA,
        several="files",
        common=True,
    )
    valid_data: str | Sequence[str] | None = setting(
        None, "validation files (default: see valid_fraction)", _DATA, several="files", common=True
    )
    valid_fraction: float | None = setting(
        None,
        "fraction of the training examples to hold out for validation when no valid_data is given, split by prompt; "
        "0: none; auto: 5 %, or none with fewer than 100 examples",
        _DATA,
        at_least=0,
        below=1,
        auto=True,
    )
    data_format: str = setting(
        "auto",
        "format of the data files: auto detects it from their contents and reads .txt as E2E lines; text is plain text",
        _DATA,
        FORMATS,
    )
    columns: str | Mapping[str, str] | None = setting(
        None,
        "which field of the data has which meaning, as in prompt=question,completion=answer; system= leaves a field "
        "out, and prompt={context} {question} joins several",
        _DATA,
    )
    as_chat: bool = setting(False, "format prompts and completions with the model's chat template", _DATA)
    chat_template: str | None = setting(
        None,
        "file with a chat template (Jinja) to use instead of the model's own; it is saved with the adapter",
        _DATA,
    )
    output_dir: str = setting(
        "lora_model",
        "directory to write the adapter to",
        _DATA,
        rule=str.strip,
        expected="the name of a directory (. for the current one)",
        common=True,
    )
    max_train_samples: int = setting(
        0, "maximum number of training examples, drawn from as many prompts as possible; 0: all", _DATA, at_least=0
    )
    max_valid_samples: int = setting(200, "maximum number of validation examples; 0: all", _DATA, at_least=0)
    seq_len: int | None = setting(
        None,
        "maximum tokens per example; longer examples are dropped and counted; auto: as many as model and memory allow",
        _DATA,
        at_least=2,
        common=True,
        auto=True,
    )
    task: str = setting(
        "lm",
        "what the model does: lm writes text; classify labels text, from rows of text, text_pair and label",
        _DATA,
        ("lm", "classify"),
    )
    objective: str = setting(
        "clm",
        "train on completions only (clm), on all tokens (jlm), or on preferences: pairs of chosen and rejected "
        "answers (dpo, orpo)",
        _DATA,
        OBJECTIVES,
    )
    beta: float = setting(
        _DEFAULT_BETA,
        "with dpo, how strongly the model is held to the reference: lower values let it move further; with orpo, the "
        "weight of the odds ratio (the paper's lambda)",
        _DATA,
        above=0,
    )
    dtype: str = setting(
        "auto",
        "dtype of the frozen base model; auto uses bf16 where it is fast",
        _DATA,
        DTYPES,
    )
    quantize: str = setting(
        "none",
        "store the frozen base in fewer bits: int8, or nf4 (4 bits, QLoRA); +tables: also the embedding and head, "
        "in int8",
        _DATA,
        ("none", *KINDS),
    )
    device: str | None = setting(None, "cpu, cuda, mps, ...; default: the fastest available", _DATA)
    seed: int = setting(
        0, "random seed", _DATA, at_least=0, below=2**63, expected="a whole number of at least 0 and below 2**63"
    )

    # The size of a base model that is created from scratch.
    hidden_dim: int | None = setting(None, "width of --model scratch or run-demo (default 768)", _MADE_UP, at_least=1)
    num_layers: int | None = setting(
        None, "number of layers of --model scratch or run-demo (default 2)", _MADE_UP, at_least=1
    )

    # The adapter.
    from_adapter: str | None = setting(
        None,
        "adapter to continue training from, in any format that load_adapter reads; it sets the rank and similar "
        "settings",
        "adapter",
        aliases=("adapter",),
    )
    rank: int = setting(
        16, "LoRA rank r: the inner size of A and B", "adapter", at_least=1, aliases=("lora_dim",), common=True
    )
    lora_alpha: float | None = setting(
        None,
        "scale the update by lora_alpha / rank (default 2 * rank)",
        "adapter",
        rule=bool,
        expected="a number other than 0 (often 2 * rank)",
    )
    lora_dropout: float = setting(
        0.0, "dropout probability for the inputs of the LoRA path", "adapter", at_least=0, below=1
    )
    target_modules: str | Sequence[str] = setting(
        ALL_LINEAR,
        "modules to adapt: comma-separated names, a single regular expression, or all-linear",
        "adapter",
        several="names",
    )
    target_parameters: str | Sequence[str] | None = setting(
        None,
        "expert weights to adapt as well (all-linear already includes them): comma-separated names, as in "
        "experts.gate_up_proj,experts.down_proj",
        "adapter",
        several="names",
    )
    exclude_modules: str | Sequence[str] | None = setting(
        None,
        "modules and expert weights not to adapt: comma-separated names, or a single regular expression",
        "adapter",
        several="names",
    )
    enable_lora: str | Mapping[str, Sequence[bool | int]] | None = setting(
        None,
        "blocks of fused projections to adapt: c_attn=1,0,1 adapts q and v; semicolons separate projections",
        "adapter",
    )
    modules_to_save: str | Sequence[str] | None = setting(
        None,
        "modules to train in full and save with the adapter; task classify always adds the head and anything else "
        "that is new",
        "adapter",
        several="names",
    )
    use_rslora: bool = setting(False, "scale by lora_alpha / sqrt(rank) instead (rsLoRA)", "adapter")
    use_dora: bool = setting(
        False, "train the magnitudes and directions of the weights' rows separately (DoRA)", "adapter"
    )
    init_lora_weights: str = setting(
        "default",
        "how A and B start: default (A random, B zero), pissa, pissa_niter_16 (fast) or olora (part of the base "
        "weight), eva (A from the data)",
        "adapter",
        rule=re.compile(r"default|pissa(_niter_[1-9]\d{0,2})?|olora|eva").fullmatch,
        expected="default, pissa, pissa_niter_16 (or any other number), olora or eva",
    )
    eva_rho: float = setting(
        2.0,
        "with eva: the highest rank of a module, as a multiple of rank; 1: all modules have that rank",
        "adapter",
        at_least=1,
    )
    lora_bias: bool = setting(False, "train a bias of B as well", "adapter")
    trainable_token_indices: str | Sequence[int] | Mapping[str, Sequence[int]] | None = setting(
        None,
        "rows of the input embedding to train on their own, such as those of new tokens: 5,6; or of several tables: "
        "embed_tokens=5,6;lm_head=6",
        "adapter",
    )
    bias: str = setting("none", "biases to train as well", "adapter", ("none", "all", "lora_only"))
    target: str = setting(
        "none",
        "the tool that will use the adapter; settings that it would compute wrongly are refused before training",
        "adapter",
        ("none", "peft", "vllm", "llamacpp", "mlx"),
    )

    # The optimiser.
    num_epochs: int = setting(3, "passes over the data", "optimiser", at_least=0, common=True)
    max_steps: int = setting(0, "stop after this many updates; 0: after num_epochs", "optimiser", at_least=0)
    batch_size: int = setting(8, "examples per step, summed over all processes", "optimiser", at_least=1, common=True)
    grad_accum: int = setting(1, "steps whose gradients are accumulated into one update", "optimiser", at_least=1)
    lr: float | None = setting(
        None,
        "peak learning rate; auto: chosen from the model's width, lora_alpha and the trained tokens per update",
        "optimiser",
        above=0,
        common=True,
        auto=True,
    )
    loraplus_lr_ratio: float = setting(
        4.0, "learning rate of B divided by that of A (LoRA+, arXiv:2402.12354); 1: equal", "optimiser", above=0
    )
    schedule: str = setting(
        "linear", "learning rate schedule after warm-up", "optimiser", ("linear", "cosine", "constant")
    )
    warmup_steps: int | None = setting(
        None,
        "updates over which the learning rate rises; auto: 5 % of all updates, at most 100",
        "optimiser",
        at_least=0,
        auto=True,
    )
    weight_decay: float = setting(0.0, "decoupled weight decay of the adapter", "optimiser", at_least=0)
    beta1: float = setting(0.9, "AdamW's decay rate for the mean gradient", "optimiser", at_least=0, below=1)
    beta2: float = setting(0.999, "AdamW's decay rate for the mean squared gradient", "optimiser", at_least=0, below=1)
    adam_eps: float = setting(1e-8, "AdamW's epsilon", "optimiser", above=0)
    correct_bias: bool = setting(
        True,
        "correct the bias of AdamW's moments, which start at zero (always on with --arithmetic standard)",
        "optimiser",
    )
    max_grad_norm: float = setting(1.0, "clip the gradient to this norm; 0: never", "optimiser", at_least=0)
    label_smoothing: float = setting(
        0.0,
        "fraction of the target probability spread over the vocabulary; with dpo, the fraction of pairs assumed to "
        "have their labels swapped, below 0.5",
        "optimiser",
        at_least=0,
        below=1,
    )
    arithmetic: str = setting(
        "standard",
        "paper: the LoRA paper's own AdamW (eps before bias correction, decay after the update), schedule and loss, "
        "counted in micro-batches",
        "optimiser",
        ("standard", "paper"),
    )

    # The engine.
    packing: bool = setting(
        True, "pack the examples of a step into one row without padding, each attending only to itself", "engine"
    )
    share_prompts: bool = setting(
        True, "reuse the computation of a prompt that several examples in a step share", "engine"
    )
    max_siblings: int = setting(
        1, "maximum number of examples with the same prompt to draw into a step together", "engine", at_least=1
    )
    shuffle: bool = setting(True, "shuffle the examples in each epoch", "engine")
    shard: bool = setting(
        False,
        "under torchrun, shard the base model across the processes (FSDP2): for models that do not fit on one GPU",
        "engine",
    )
    compile: str = setting(
        "auto",
        "compile decoder blocks with torch.compile; auto: on a GPU (CUDA or ROCm) if triton is installed",
        "engine",
        ("auto", "on", "off"),
    )
    gradient_checkpointing: bool = setting(False, "use less memory at the cost of about a third more time", "engine")

    # Validation, checkpoints and logs.
    eval_steps: int = setting(0, "validate every this many updates; 0: at the end of each epoch", _LOGS, at_least=0)
    best_metric: str = setting(
        "loss",
        "with task classify, the validation metric that selects the best adapter: loss, accuracy, f1 (for two "
        "labels), macro_f1, matthews, or pearson (for numbers)",
        _LOGS,
        ("loss", *METRICS),
    )
    early_stopping: int = setting(
        0, "stop after this many validations in a row without a lower loss; 0: never", _LOGS, at_least=0
    )
    save_steps: int = setting(0, "checkpoint every this many updates; 0: at the end of each epoch", _LOGS, at_least=0)
    keep_checkpoints: int = setting(
        0,
        "number of recent checkpoints to keep after the run (during it, at least two are kept)",
        _LOGS,
        at_least=0,
    )
    resume: bool = setting(
        False, "continue from the last checkpoint in output_dir, or start if there is none", _LOGS, common=True
    )
    overwrite: bool = setting(False, "discard any earlier run in output_dir, finished or not", _LOGS)
    report_to: str = setting("none", "also log to this tool", _LOGS, ("none", "tensorboard"))

    def __post_init__(self) -> None:
        check(self, "the training run", self._faults)

    def _faults(self) -> list[str]:
        faults = []
        if self.shard and self.quantize != "none":
            faults.append(
                f"quantize is {self.quantize!r} and shard is on, expected only one of them: shards hold 16 or 32 "
                "bits. Leave out shard (in 4 bits each process needs only a quarter of the base's bytes), or leave "
                "out quantize"
            )
        if self.num_epochs == 0 and self.max_steps == 0:
            faults.append("num_epochs and max_steps are both 0, expected at least one of them to be positive")
        faults += self._objective_faults() + self._task_faults()
        for parse in (self._blocks, self._token_indices, self._patterns):
            try:
                parse()
            except ConfigError as error:
                faults.append(str(error))
        if self.init_lora_weights != "default" and self.from_adapter is not None:
            faults.append(
                f"init_lora_weights {self.init_lora_weights!r} starts a new adapter, but from_adapter names one to "
                "continue from: leave one of them out"
            )
        with contextlib.suppress(ConfigError):  # the checks of the fields themselves report invalid values
            faults += contradictions(self.lora_config(), trained=False)
        return faults

    def _task_faults(self) -> list[str]:
        if self.task != "classify":
            spare = f"best_metric is {self.best_metric!r}, which applies only to task classify: leave it out"
            return [spare] if self.best_metric != "loss" else []
        others = {
            "objective": (
                "clm",
                f"objective is {self.objective!r}, but task classify has its own: leave it out",
            ),
            "arithmetic": ("standard", "arithmetic is 'paper', which does not support task classify: leave it out"),
            "shard": (False, "shard is on, which applies only to task lm: leave it out; torchrun works without it"),
            "as_chat": (False, "as_chat is on, but task classify takes texts as they are: leave it out"),
            "chat_template": (None, "chat_template is given, but task classify takes texts as they are: leave it out"),
            "max_siblings": (1, f"max_siblings is {self.max_siblings}, which applies only to task lm: leave it out"),
            "compile": ("auto", f"compile is {self.compile!r}, which applies only to task lm: leave it at auto"),
        }
        faults = [text for name, (usual, text) in others.items() if getattr(self, name) != usual]
        if self.init_lora_weights == "eva":
            faults.append("init_lora_weights is 'eva', which applies only to task lm: use pissa, olora or default")
        if self.data_format in ("e2e", "text", "dart", "webnlg"):
            faults.append(f"data_format is {self.data_format!r}, which has no labels: use jsonl, csv, parquet or arrow")
        if self.target in ("vllm", "llamacpp", "mlx"):
            faults.append(f"target is {self.target!r}, which does not support adapters with a head: use peft or none")
        return faults

    def _objective_faults(self) -> list[str]:
        name, smoothing = self.objective, self.label_smoothing
        if name not in PREFERENCES:
            spare = f"beta is {self.beta!r}, which {name} does not use: leave it out, or set objective to dpo or orpo"
            return [spare] if self.beta != _DEFAULT_BETA else []
        faults = []
        if self.arithmetic == "paper":
            faults.append(
                f"arithmetic is 'paper', which does not support {name}: leave it out, or set objective to clm or jlm"
            )
        if name == "dpo" and smoothing >= 0.5:
            faults.append(
                f"label_smoothing is {smoothing!r}, expected less than 0.5 with dpo: from 0.5 on, the rejected "
                "answers would be preferred"
            )
        if name == "orpo" and smoothing:
            faults.append(f"label_smoothing is {smoothing!r}, which orpo does not use: leave it out, or use dpo")
        return faults

    @property
    def peak_lr(self) -> float:
        """The learning rate that was given or chosen.

        Raises:
            ConfigError: it is to be chosen automatically, for which the program has to see the model first.
        """
        if self.lr is None:
            raise ConfigError(
                "lr is auto, which a run replaces with a number once it has seen the model; give a number here"
            )
        return self.lr

    @property
    def alpha(self) -> float:
        """lora_alpha, or its default value."""
        return float(2 * self.rank if self.lora_alpha is None else self.lora_alpha)

    def lora_config(self) -> LoraConfig:
        """Returns the settings of the adapter that this run trains.

        >>> TrainConfig(target_modules="c_attn", enable_lora="c_attn=1,0,1").lora_config().enable_lora
        {'c_attn': (True, False, True)}
        """
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.lora_dropout,
            target_modules=_modules(self.target_modules),
            target_parameters=_names(self.target_parameters),
            exclude_modules=_modules(self.exclude_modules),
            enable_lora=self._blocks(),
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            init_lora_weights=True if self.init_lora_weights == "default" else self.init_lora_weights,
            eva_config={"rho": self.eva_rho} if self.init_lora_weights == "eva" else None,
            lora_bias=self.lora_bias,
            trainable_token_indices=self._token_indices(),
            bias=self.bias,
            modules_to_save=_names(self.modules_to_save),
            task_type="SEQ_CLS" if self.task == "classify" else "CAUSAL_LM",
        )

    def _blocks(self) -> dict[str, tuple[bool, ...]]:
        if isinstance(self.enable_lora, str):
            return parse_enable_lora(self.enable_lora, _modules(self.target_modules))
        return {name: tuple(map(bool, blocks)) for name, blocks in (self.enable_lora or {}).items()}

    def _patterns(self) -> LoraConfig:
        """Checks the names of modules, which `LoraConfig` alone knows how to read."""
        return LoraConfig(
            target_modules=_modules(self.target_modules),
            target_parameters=_names(self.target_parameters),
            exclude_modules=_modules(self.exclude_modules),
        )

    def _token_indices(self) -> Sequence[int] | Mapping[str, Sequence[int]] | None:
        rows = self.trainable_token_indices
        return parse_token_indices(rows) if isinstance(rows, str) else rows

    def replace(self, **changes: Any) -> TrainConfig:
        """Returns a copy with some values replaced."""
        return dataclasses.replace(self, **canonical(TrainConfig, changes))

    def to_dict(self) -> dict[str, Any]:
        """Returns all settings as plain values."""
        return dataclasses.asdict(self)


def _modules(given: str | Sequence[str] | None) -> str | Sequence[str] | None:
    """Reads names of modules given as one string: names separated by commas, or an expression."""
    return parse_target_modules(given) if isinstance(given, str) else given


def _names(given: str | Sequence[str] | None) -> Sequence[str] | None:
    """Splits names given as one comma-separated string into a list."""
    return [name.strip() for name in given.split(",")] if isinstance(given, str) else given


# Settings that the program chooses if they are not given.
AUTOMATIC = frozenset(spec.name for spec in dataclasses.fields(TrainConfig) if spec.metadata["auto"])
