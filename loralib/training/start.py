"""What training starts from: a base model, and optionally an existing adapter."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..bases import DEFAULT_BASE, base_of, load_base, load_empty
from ..bases.classifiers import load_classifier
from ..bases.device import pick_device, pick_dtype
from ..bases.loading import load_tokenizer
from ..bases.made_up import is_made_up
from ..bases.sharded import shard
from ..budget import free_on, require_room
from ..config import LoraConfig
from ..console import counted
from ..data import Labels, TokenExample
from ..engine.forward import device_of
from ..engine.half import computes_in_half
from ..errors import BaseModelError, ConfigError, list_faults
from ..formats import is_read_with_base, read_adapter
from ..injection import adapted_layers, eva_start_for, injection_of
from ..variants import EvaStart
from ..wrapping import is_sharded, is_spread
from .config import TrainConfig
from .ranks import ALONE, Ranks

__all__ = [
    "EvaStarts",
    "adapter_to_train_on",
    "base_for",
    "data_start",
    "full_precision",
    "load_base_for",
    "refuse_other_variant",
    "spread",
]


def base_for(config: TrainConfig) -> str:
    """Returns the name of the base model that a run trains on.

    A run that continues from an adapter uses the base named by the adapter, unless the settings give a base other than
    the default.
    """
    if config.from_adapter is None or config.model != DEFAULT_BASE:
        return config.model
    if is_read_with_base(config.from_adapter):
        raise BaseModelError(f"{config.from_adapter} does not name its base model; give --model MODEL")
    return base_of(read_adapter(config.from_adapter))


def load_base_for(config: TrainConfig, ranks: Ranks = ALONE, labels: Labels | None = None) -> tuple[nn.Module, Any]:
    """Loads the base model that a run trains on, with a classification head if labels are given, and its tokenizer."""
    name, device = base_for(config), ranks.device(config.device)
    mesh = ranks.mesh(str(pick_device(device))) if config.shard else None
    dtype: Any = None if config.dtype == "auto" else config.dtype
    if ranks.size > 1:
        ranks.in_turn(lambda: load_tokenizer(name) and None)  # downloads and conversions happen once per machine
        if dtype is None and not is_made_up(name):  # picking a dtype measures the CPU, and one rank's might seem slow
            dtype = ranks.on_first_rank(lambda: pick_dtype(None, pick_device(device)))
    if config.shard and not is_made_up(name):
        ranks.on_all_ranks(lambda: require_room(load_empty(name, dtype=dtype), name, ranks.size, _room(device, ranks)))
    load = functools.partial(
        load_base if labels is None else functools.partial(load_classifier, labels=labels.names),
        name,
        dtype=dtype,
        device=device,
        quantize=config.quantize,
        seed=config.seed,
        hidden_dim=config.hidden_dim,
        num_layers=config.num_layers,
        **({"mesh": mesh} if labels is None else {}),
    )
    return (
        load() if config.shard else ranks.on_all_ranks(load)
    )  # a sharded model is loaded in steps agreed by all ranks


def _room(device: str | None, ranks: Ranks) -> float | None:
    """Returns how many bytes a process may use: those of the GPU, or its share of the machine's free memory."""
    place = torch.device(device or "cpu")
    free = free_on(place)
    return free if free is None or place.type == "cuda" else free / ranks.local_size


def spread(model: nn.Module, ranks: Ranks) -> None:
    """Shards a model's frozen weights over ranks (FSDP2), unless they already are; trained parameters stay whole.

    Raises:
        ConfigError: there is only one process, or a trained parameter is already sharded.
    """
    if computes_in_half(model):  # fp16 repeats passes that overflow, as each rank finds necessary
        raise ConfigError("shard is on and dtype is fp16, which do not work together: set dtype to bf16 or fp32")
    if not is_spread(model):
        with _hidden([(module, name, p) for module in model.modules() for name, p in module._parameters.items()
                      if p is not None and p.requires_grad]):  # fmt: skip
            shard(model, ranks.mesh(str(device_of(model))))
    apart = [name for name, p in model.named_parameters() if p.requires_grad and is_sharded(p)]
    if apart:
        fix = "Train only the factors (bias none, no modules_to_save), and let train() spread the weights."
        raise ConfigError(list_faults("these trained tensors are spread over processes", apart, fix, most=8))


@contextlib.contextmanager
def _hidden(parameters: Sequence[tuple[nn.Module, str, nn.Parameter]]) -> Iterator[None]:
    """Removes parameters from their modules meanwhile: some releases of FSDP2 cannot be told which to ignore."""
    for module, name, _ in parameters:
        del module._parameters[name]
    try:
        yield
    finally:
        for module, name, parameter in parameters:
            module._parameters[name] = parameter


def adapter_to_train_on(config: TrainConfig, model: nn.Module) -> Adapter:
    """Reads the adapter that a run continues training.

    Raises:
        AdapterError: there is none, or it cannot be read.
        ConfigError: settings contradict the adapter's; all are listed.
    """
    assert config.from_adapter is not None
    adapter = read_adapter(config.from_adapter, model=model)
    own, asked = _shape(adapter.config), _shape(config.lora_config())
    defaults = {spec.name: spec.default for spec in dataclasses.fields(TrainConfig)}
    faults = [
        f"{name} is {getattr(config, name)!r}, the adapter has {own[key]!r}"
        for name, key in _NAMES.items()
        if getattr(config, name) != defaults[name] and asked[key] != own[key]
    ]
    if faults:
        raise ConfigError(
            list_faults(
                f"training keeps the shape of {config.from_adapter}, but these settings differ from it",
                faults,
                "Leave these settings out. For another rank, run `loralib combine ADAPTER -o NEW --rank N` and "
                "continue from NEW; for anything else, train a new adapter.",
            )
        )
    return adapter


# Settings that define the form of an adapter, and the corresponding fields of its config.
_NAMES = {
    "rank": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "target_modules": "target_modules",
    "target_parameters": "target_parameters",
    "exclude_modules": "exclude_modules",
    "enable_lora": "enable_lora",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "lora_bias": "lora_bias",
    "trainable_token_indices": "trainable_token_indices",
    "bias": "bias",
}


def _shape(config: Any) -> Mapping[str, Any]:
    def plain(value: Any) -> Any:
        return sorted(value) if isinstance(value, (list, tuple, set)) else value

    return {key: plain(getattr(config, key)) for key in _NAMES.values()}


def refuse_other_variant(config: TrainConfig, model: nn.Module) -> None:
    """Refuses settings for a variant if the model already has an adapter that is not of that variant.

    Raises:
        ConfigError: names every such setting.
    """
    record, asked = injection_of(model), config.lora_config()
    own = record.config if record is not None else LoraConfig()
    faults = [
        f"{name} is {getattr(config, name)!r}"
        for name in ("use_dora", "lora_bias", "trainable_token_indices", "init_lora_weights")
        if getattr(asked, name) != getattr(LoraConfig(), name) and getattr(asked, name) != getattr(own, name)
    ]
    if faults:
        raise ConfigError(
            list_faults(
                f"the {type(model).__name__} already has an adapter, with different settings",
                faults,
                "Leave these settings out, or pass a model without an adapter.",
            )
        )


EvaStarts = dict[tuple[str, tuple[TokenExample, ...]], EvaStart]  # by the adapter's settings and the rows


def data_start(
    model: nn.Module, config: LoraConfig, examples: Sequence[TokenExample], known: EvaStarts | None = None
) -> EvaStart | None:
    """Returns the initialisation that ``init_lora_weights="eva"`` computes from some examples; None for other kinds.

    Results are looked up in `known` and added to it: runs of a sweep that differ only in their learning rate share one
    decomposition, which takes minutes at high ranks.
    """
    if config.init_lora_weights != "eva":
        return None
    rows, known = _eva_rows(examples), {} if known is None else known
    key = (json.dumps(config.to_dict(), sort_keys=True), rows)
    if key not in known:
        known[key] = eva_start_for(model, config, _eva_batches(model, rows))
    return known[key]


def _eva_rows(examples: Sequence[TokenExample]) -> tuple[TokenExample, ...]:
    """Returns the rows for ``init_lora_weights="eva"``, evenly spaced over all rows."""
    rows = [row for example in examples for row in example.rows]
    return tuple(rows[:: max(1, len(rows) // _EVA_ROWS)][:_EVA_ROWS])


def _eva_batches(model: nn.Module, rows: Sequence[TokenExample]) -> Iterator[dict[str, Tensor]]:
    """Yields some rows in the form that `loralib.inject` takes for ``init_lora_weights="eva"``."""
    device = device_of(model)
    for start in range(0, len(rows), _EVA_BATCH):
        batch = rows[start : start + _EVA_BATCH]
        longest = max(map(len, batch))
        ids = [example.ids + (0,) * (longest - len(example)) for example in batch]
        # A position counts if the prediction made there is trained.
        labels = [
            [0 if trained else -100 for trained in (*example.trained[1:], False)] + [-100] * (longest - len(example))
            for example in batch
        ]
        mask = [[1] * len(example) + [0] * (longest - len(example)) for example in batch]
        tensors = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        yield {name: torch.tensor(value, device=device) for name, value in tensors.items()}


_EVA_ROWS, _EVA_BATCH = 256, 16


def full_precision(model: nn.Module) -> list[str]:
    """Restores factors that were cast to a lower precision to fp32, as the optimiser needs; returns a note if any were.

    In bf16 most updates are smaller than half the distance between two numbers, and are lost to rounding.
    """
    cast = set()
    for _, layer in adapted_layers(model):
        for tensor in layer.trained_tensors().values():
            if tensor.requires_grad and tensor.is_floating_point() and tensor.dtype != torch.float32:
                if tensor.dtype.itemsize < 4:
                    cast.add((str(tensor.dtype).removeprefix("torch."), id(tensor)))
                    tensor.data = tensor.data.float()
    if not cast:
        return []
    kinds = " and ".join(sorted({kind for kind, _ in cast}))
    return [
        f"{counted(len(cast), 'trained tensor')} of the adapter had been cast to {kinds}, in which most updates would "
        "be lost; training converts them back to float32"
    ]
