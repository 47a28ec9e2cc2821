"""Portable adapters, which all tools compute identically, and what each tool accepts.

A portable adapter has one rank, lora_alpha = r (the scaling is in B), no rsLoRA, no patterns and a plain
initialisation.  Anything that is more than a low-rank update is converted to one, exactly if possible, otherwise with a
stated approximation error; or it is refused with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..adapter import Adapter, expand_blocks, kind_of
from ..combine import Update, check_sound, resize, update_of, updates_of, with_updates
from ..config import LoraConfig
from ..delta import balanced_factors, delta_weight, dense, dora_weight, olora_factors, pissa_factors
from ..errors import AdapterError, ConfigError, did_you_mean, list_faults
from ..layers import LoRAEmbedding, LoRALinear, LoRARouter, is_conv1d
from ..targets import TargetModule, match_modules, tied_modules
from ..wrapping import named_parameters
from . import experts, vllm
from .gguf import gguf_names, read_gguf, write_gguf
from .mlx import mlx_names, read_mlx, write_mlx
from .peft import load_faults, read_peft, target_names, task_type_of, write_peft

__all__ = [
    "TARGETS",
    "Portable",
    "base_matrix",
    "check_portable",
    "export",
    "full_delta",
    "make_portable",
    "to_stored_layout",
]


# Export targets, and their names.  All but PEFT accept only low-rank updates of linear layers and embeddings: no
# biases, no modules trained in full (except a classifier's head in vLLM), no convolutions, no attention modules, and no
# weights shared by modules.
TARGETS: Mapping[str, str] = {"peft": "PEFT", "vllm": "vLLM", "llamacpp": "llama.cpp", "mlx": "MLX"}

_MAX_RANK_FACTOR = 4  # limits the search for a good approximation to this multiple of the adapter's own rank
_MERGE = "`loralib merge` writes the merged model instead, which every tool reads."


@dataclass(frozen=True)
class Portable:
    """A portable adapter, and what was changed to make it portable.

    Attributes:
        adapter: the adapter.
        error: relative error of its updates (Frobenius norm); 0: exact.
        notes: what was changed, and what to know when using it in the tool; one sentence each.
    """

    adapter: Adapter
    error: float
    notes: tuple[str, ...]


def check_portable(config: LoraConfig, model: nn.Module | None, target: str) -> None:
    """Checks before training that the adapter will be usable in a tool.

    Args:
        config: the adapter to be trained.
        model: the base model; its weights are not read. None: only check the settings.
        target: one of `TARGETS`.

    Raises:
        AdapterError: the tool cannot compute the adapter; lists every reason.
        ConfigError: there is no such target.
    """
    if target not in TARGETS:
        raise ConfigError(f"target is {target!r}, expected one of {', '.join(TARGETS)}.{did_you_mean(target, TARGETS)}")
    if target == "peft":  # which reads a bias of B and rows of tables too
        faults = [] if model is None else load_faults([m.name for m in _adapted(config, model)], kind_of(model))
    else:
        faults = _not_plain(config)
        if target == "vllm":
            faults += vllm.head_faults(config, model)
        elif config.modules_to_save:
            faults.append(f"modules_to_save {list(config.modules_to_save)}: modules trained in full are not loaded")
        if config.bias != "none":
            faults.append(f"bias {config.bias!r}: trained biases are not loaded")
        if model is not None:
            faults += _module_faults(config, model, target)
    if faults:
        title = TARGETS[target]
        raise AdapterError(list_faults(f"{title} would apply this adapter incorrectly", faults, _MERGE))


def _not_plain(config: LoraConfig) -> list[str]:
    """Returns the settings whose tensors are no factors of linear layers, and thus cannot be in portable form."""
    faults = ["lora_bias: a portable adapter cannot have a bias of B"] if config.lora_bias else []
    if config.trainable_token_indices:
        faults.append("trainable_token_indices: a portable adapter cannot have trained rows of embeddings or heads")
    return faults


def make_portable(
    adapter: Adapter,
    target: str,
    model: nn.Module | None = None,
    *,
    r: int | None = None,
    max_error: float = 0.01,
    initial: Adapter | None = None,
) -> Portable:
    """Makes an adapter portable, so that a tool computes it correctly.

    Args:
        adapter: any adapter that can be read.
        target: one of `TARGETS`.
        model: the base model; needed for all targets except "peft" and "vllm", and for adapters that depend on the base
            weights (DoRA, PiSSA, OLoRA).
        r: the rank of the result; default: the smallest that is exact, or for DoRA the smallest within max_error.
        max_error: the maximum relative error to accept if r is not given.
        initial: the adapter as saved before training, for initialisations that cannot be recomputed (CorDA, randomised
            PiSSA).

    Raises:
        AdapterError: it cannot be made portable, or not within max_error; the message says why and what to do.
        ConfigError: there is no such target.
    """
    check_sound(adapter)
    check_portable(adapter.config, model, target)
    if faults := _not_plain(adapter.config):
        raise AdapterError(list_faults("PEFT reads this adapter as it is, but not in portable form", faults, _MERGE))
    if target == "vllm" and (faults := vllm.tensor_faults(adapter.tensors)):
        raise AdapterError(list_faults("vLLM would refuse this adapter", faults, _MERGE))
    if target == "peft" and (faults := load_faults(adapter.target_modules, adapter.metadata)):
        raise AdapterError(list_faults("PEFT would apply this adapter incorrectly", faults, _MERGE))
    notes = []
    source = expand_blocks(adapter)
    if adapter.config.enable_lora:
        notes.append("fused blocks are written with a block-diagonal B (exact)")
    plain, error, why = _as_plain(source, model, r, max_error, initial)
    notes += why
    config = plain.config
    if config.use_rslora or config.lora_alpha != config.r or config.alpha_pattern or config.rank_pattern:
        notes.append("the scaling is now part of B, and lora_alpha = r (exact)")
    updates = updates_of(plain)
    rank = max(update.r for update in updates.values())
    if any(update.r != rank for update in updates.values()):
        notes.append(f"all modules now have rank {rank}, the smaller ones padded with zeros (exact)")
    if target == "vllm":
        limit = next((limit for limit in vllm.accepted_ranks if limit >= rank), None)
        if limit is None:
            raise AdapterError(
                f"vLLM accepts ranks up to {vllm.accepted_ranks[-1]}, but this adapter has rank {rank}; give a "
                "smaller r"
            )
        notes.append(f"start vLLM with --enable-lora --max-lora-rank {limit}")
    result = with_updates(plain, {name: update.plain(rank) for name, update in updates.items()})
    parameters = [] if model is None else list(named_parameters(model))
    settings = result.config.targeting(target_names(plain, model)).replace(
        target_parameters=experts.parameter_names(plain, parameters),
        init_lora_weights=True,
        lora_dropout=0.0,
        task_type=plain.config.task_type or task_type_of(model),
    )
    tensors = {name: _like(tensor, adapter.tensors.get(name)) for name, tensor in result.tensors.items()}
    portable = Adapter(settings, tensors, result.metadata)
    if target == "vllm" and plain.expert_weights:
        portable, note = vllm.with_experts(portable, model)
        notes.append(note)
    return Portable(portable, error, tuple(notes))


def export(
    portable: Portable,
    target: str,
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> float:
    """Writes a portable adapter for a tool, reads it back, and compares.

    Args:
        portable: result of `make_portable` for the same target.
        target: one of `TARGETS`.
        path: a directory, or for "llamacpp" a file.
        model: the base model; see `make_portable`.
        dtype: dtype of the tensors; default: unchanged, for GGUF fp32.

    Returns:
        The largest relative change of an update caused by rounding to dtype; 0 without dtype.

    Raises:
        AdapterError: what was read back differs from what was written.
        OutputError: the path cannot be written.
    """
    written = portable.adapter
    if target == "llamacpp":
        dtype = dtype or torch.float32
    if dtype is not None:
        written = replace(written, tensors={name: t.to(dtype) for name, t in written.tensors.items()})
        check_sound(written)  # the largest number in fp16 is 65504
    if target in ("peft", "vllm"):
        write_peft(written, path)
        back = read_peft(path)
    elif model is None:
        raise AdapterError(f"{TARGETS[target]} has its own names for modules; give the base model (--model)")
    elif target == "mlx":
        write_mlx(written, path, model)
        back = read_mlx(path, model)
    else:
        write_gguf(written, path, model, dtype=dtype or torch.float32)
        back = read_gguf(path, model)
    faults = _differences(written, back)
    if faults:
        raise AdapterError(
            list_faults(f"{path} does not read back as it was written", faults, "Is the disk failing? Try another one.")
        )
    return 0.0 if dtype is None else _rounding(portable.adapter, written)


# Updates as full matrices.


def full_delta(adapter: Adapter, module: str, weight: Tensor, initial: Adapter | None = None) -> Tensor:
    """Returns what any kind of adapter adds to a module's base weight, as a full matrix.

    Args:
        adapter: without fused blocks (see `expand_blocks`).
        module: the module's name.
        weight: the base weight as a matrix (out, in); see `base_matrix`.
        initial: see `make_portable`.

    Returns:
        (out, in), in at least fp32.
    """
    update = update_of(adapter, module)
    delta = delta_weight(update.A, update.B, update.scaling)
    if _starts_with_base(adapter, module):
        start = _initial_update(adapter, module, weight, initial)
        delta = delta - delta_weight(start.A, start.B, start.scaling)
    magnitude = adapter.tensors.get(f"{module}.lora_magnitude_vector")
    if magnitude is not None:
        delta = dora_weight(weight, delta, magnitude.flatten()) - weight.float()
    return delta


def _starts_with_base(adapter: Adapter, module: str) -> bool:
    """Whether a module's factors were initialised from its weight; those of embeddings never are in PEFT."""
    return adapter.config.changes_base and f"{module}.lora_A" in adapter.tensors


def base_matrix(model: nn.Module, module: str) -> Tensor:
    """Returns a module's base weight as the matrix (out, in) that low-rank updates are added to."""
    layer: Any = model.get_submodule(module)
    weight = layer.in_proj_weight if isinstance(layer, nn.MultiheadAttention) else layer.weight
    return to_stored_layout(layer, dense(weight).detach().flatten(1))


def to_stored_layout(layer: nn.Module, matrix: Tensor) -> Tensor:
    """Transposes an (out, in) matrix if the layer stores its weight as (in, out); this is its own inverse."""
    stored_in_out = isinstance(layer, nn.Embedding) or is_conv1d(layer)
    return matrix.T if stored_in_out else matrix


def _as_plain(
    adapter: Adapter, model: nn.Module | None, r: int | None, max_error: float, initial: Adapter | None
) -> tuple[Adapter, float, list[str]]:
    """Converts any adapter to a plain one; returns it, its relative error, and notes on what was done."""
    config = adapter.config
    dora = any(name.endswith("lora_magnitude_vector") for name in adapter.tensors)
    if config.lora_bias or any(name.endswith("lora_B.bias") for name in adapter.tensors):
        raise AdapterError(f"lora_bias: a portable adapter cannot have a bias of B. {_MERGE}")
    if config.use_dora != dora:
        held = "contains no lora_magnitude_vector" if config.use_dora else "contains lora_magnitude_vector"
        raise AdapterError(f"use_dora is {config.use_dora}, but the adapter {held}; copy it again")
    notes = []
    if dora or (config.changes_base and initial is None):
        if model is None:
            kind = "DoRA" if dora else f"init_lora_weights {config.init_lora_weights!r}"
            raise AdapterError(
                f"converting {kind} to plain LoRA needs the weights of the base model; give --model MODEL"
            )
        if dora:
            return _nearest(adapter, model, r, max_error, initial)
    if config.changes_base:
        differences = {}
        for name in adapter.modules:
            if not _starts_with_base(adapter, name):
                differences[name] = update_of(adapter, name).plain()
                continue
            start = _initial_update(adapter, name, None if model is None else base_matrix(model, name), initial)
            differences[name] = (update_of(adapter, name) + start * -1).plain()
        adapter = with_updates(adapter, differences)
        adapter = replace(adapter, config=adapter.config.replace(init_lora_weights=True))
        notes.append(f"{config.init_lora_weights} became plain LoRA of twice the rank, on the original base (exact)")
    if r is None:
        return adapter, 0.0, notes
    resized = resize(adapter, r)
    return (
        resized.adapter,
        resized.error,
        [*notes, f"the rank is now {r}, off by {resized.error:.2%} of the update"],
    )


def _nearest(
    adapter: Adapter, model: nn.Module, r: int | None, max_error: float, initial: Adapter | None
) -> tuple[Adapter, float, list[str]]:
    """Approximates DoRA, whose update has full rank, by truncating the SVD of the update."""
    own = max(update_of(adapter, name).r for name in adapter.modules)
    largest = r or _MAX_RANK_FACTOR * own
    lost, total, parts = torch.zeros(largest + 1, dtype=torch.float64), 0.0, {}
    for name in adapter.modules:
        delta = full_delta(adapter, name, base_matrix(model, name), initial)
        U, S, Vh = torch.linalg.svd(delta.double(), full_matrices=False)
        squares = F.pad(S**2, (1, max(0, largest - len(S))))
        # lost[k]: the squared norm lost when truncating to rank k.
        lost += (squares.sum() - torch.cumsum(squares, 0)[: largest + 1]).clamp(min=0)
        total += float(squares.sum())
        parts[name] = U[:, :largest].clone(), S[:largest].clone(), Vh[:largest].clone()
    errors = (lost / total if total else lost).sqrt().tolist()
    rank = r or next((k for k in range(1, largest + 1) if errors[k] <= max_error), None)
    if rank is None:
        raise AdapterError(
            f"DoRA's update has full rank: plain LoRA of rank {own} would differ from it by {errors[own]:.1%}, of "
            f"rank {largest} by {errors[largest]:.1%}, but the limit is {max_error:.1%}. If that is good enough, "
            f"choose a rank (--rank). {_MERGE}"
        )
    result = with_updates(adapter, {name: balanced_factors(U, S, Vh, rank) for name, (U, S, Vh) in parts.items()})
    result = replace(result, config=result.config.replace(use_dora=False, init_lora_weights=True))
    return (
        result,
        errors[rank],
        [f"DoRA became plain LoRA of rank {rank}, off by {errors[rank]:.2%} of the update"],
    )


def _initial_update(adapter: Adapter, module: str, weight: Tensor | None, initial: Adapter | None) -> Update:
    """Returns the update at initialisation, which PEFT subtracted from the base weight."""
    kind = str(adapter.config.init_lora_weights).lower()
    update = update_of(adapter, module)
    if initial is not None:
        if f"{module}.lora_A" not in initial.tensors:
            raise AdapterError(
                f"the initial adapter has no factors for {module}; give the adapter that was saved before training"
            )
        return update_of(initial, module)
    if weight is not None and kind == "pissa":
        return Update(*pissa_factors(weight, update.r, update.scaling), update.scaling)
    if weight is not None and kind == "olora":
        return Update(*olora_factors(weight, update.r), update.scaling)
    reasons = {
        "loftq": "LoftQ belongs to a base that it quantised itself; no plain LoRA matches the original base.",
        "pissa": "it was initialised with random numbers, and the values cannot be reproduced exactly.",
        "corda": "it was initialised from data.",
    }
    reason = next(text for name, text in reasons.items() if kind.startswith(name))
    fix = "" if kind.startswith("loftq") else " Give the adapter that was saved before training (--initial_adapter)."
    raise AdapterError(f"init_lora_weights {adapter.config.init_lora_weights!r}: {reason}{fix}")


# Checks.


def _module_faults(config: LoraConfig, model: nn.Module, target: str) -> list[str]:
    """Returns the adapted modules that a tool would compute incorrectly, with reasons."""
    if target == "vllm" and not vllm.takes_adapters(model):
        return [f"vLLM accepts no adapters on {type(model).__name__}"]
    title = TARGETS[target]
    modules = _adapted(config, model)
    of_mixture = [module.name for module in modules if module.weights or module.mixin is LoRARouter]
    names: Mapping[str, str] | None = None
    if target != "vllm":
        if of_mixture:
            return [f"{name}: adapters of experts and routers cannot be written for {title}" for name in of_mixture]
        names = gguf_names(model) if target == "llamacpp" else mlx_names(model)
    faults = []
    if target == "vllm":
        faults += vllm.load_faults(model, [(module.name, module.module) for module in modules])
    shared = tied_modules(model, modules)
    for module in modules:
        name, layer = module.name, module.module
        if module.weights and target == "vllm":
            continue  # handled by `vllm.with_experts`
        plain = issubclass(module.mixin, (LoRALinear, LoRAEmbedding)) and module.mixin is not LoRARouter
        if not plain or isinstance(layer, nn.MultiheadAttention):
            faults.append(f"{name}: {title} does not adapt {type(layer).__name__}")
        elif name in shared:
            faults.append(
                f"{name} shares its weight with {shared[name]}; {title} keeps one copy for both, so the update would "
                "act on both or fail"
            )
        elif names is not None and name not in names:
            faults.append(f"{name}: {title} does not apply adapters to this module")
    return faults


def _adapted(config: LoraConfig, model: nn.Module) -> list[TargetModule]:
    """Returns the modules of a model that a config adapts, each with plain LoRA."""
    plain = config.replace(use_dora=False, lora_bias=False, init_lora_weights=True, trainable_token_indices=None)
    return match_modules(model, plain, trained=True)


# Helpers.


def _like(tensor: Tensor, original: Tensor | None) -> Tensor:
    """Returns a tensor in the half-precision dtype of the original, if that is exact."""
    if original is None or original.dtype not in (torch.float16, torch.bfloat16):
        return tensor
    narrow = tensor.to(original.dtype)
    return narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor


def _differences(written: Adapter, back: Adapter) -> list[str]:
    """Lists tensors that are not identical bit for bit, and scalings that differ."""
    faults = [f"{name} is missing" for name in written.tensors if name not in back.tensors]
    faults += [f"{name} is unexpected" for name in back.tensors if name not in written.tensors]
    if not faults:
        faults += [f"{name} differs" for name, t in written.tensors.items() if not torch.equal(t, back.tensors[name])]
    if not faults:
        ours, theirs = updates_of(written), updates_of(back)
        faults += [
            f"{name}: scaling {theirs[name].scaling}, expected {update.scaling}"
            for name, update in ours.items()
            if theirs[name].scaling != update.scaling
        ]
    return faults


def _rounding(exact: Adapter, rounded: Adapter) -> float:
    """Returns the maximum relative error of the updates."""
    if all(torch.equal(tensor, rounded.tensors[name].to(tensor.dtype)) for name, tensor in exact.tensors.items()):
        return 0.0
    largest, theirs = 0.0, updates_of(rounded)
    for name, update in updates_of(exact).items():
        norm, gap = update.norm(), float((update + theirs[name] * -1).svd()[1].norm())
        largest = max(largest, gap / norm if norm else gap)
    return largest
