"""Merged models: base and adapter combined in one transformers model, which ``from_pretrained`` loads on its own."""

from __future__ import annotations

import functools
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..adapter import Adapter, ApplyReport, apply_adapter, expand_blocks
from ..combine import depends_on_base, updates_in
from ..config import LoraConfig, matches
from ..delta import add_delta, delta_weight, dense
from ..errors import AdapterError, MergeError, OutputError, TargetError, list_faults
from ..files import remove_file, write_errors, write_whole
from ..injection import adapted_layers, injection_of, remove, tensor_at
from ..variants import ROWS, contradictions, holds_experts
from .lora_bias import BIAS, add_biases, biases_of_B, fields_for
from .portable import base_matrix, full_delta, to_stored_layout

__all__ = ["MergeReport", "logit_difference", "merge_and_compare", "merge_into", "prompt_logits", "save_merged"]

_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class MergeReport:
    """How merging changed the logits of sample prompts.

    Attributes:
        max_difference, mean_difference: between the logits of the merged model and of base plus adapter in fp32.
        expected_max, expected_mean: the differences that rounding is expected to cause: the effect of errors of the
            same size with random signs, or that of rounding the base alone if larger (a base that was quantised before
            has few distinct values, so its errors add up).
        dtype: dtype of the merged weights.
        modules: number of merged modules.
        before_cast: the maximum and mean difference in fp32, before the cast, as shares of the largest logit.  Rounding
            to a narrow dtype is so coarse that it would hide a fault in few of the weights; fp32 is not.
        has_experts: whether the model is a mixture of experts.  Rounding may send a token to another expert, which
            changes its logits by far more than rounding itself.
    """

    max_difference: float
    mean_difference: float
    expected_max: float
    expected_mean: float
    dtype: torch.dtype
    modules: int
    before_cast: tuple[float, float] = (0.0, 0.0)
    has_experts: bool = False

    @property
    def as_expected(self) -> bool:
        """Whether rounding explains the difference."""
        most, mean = self.before_cast
        return mean <= 1e-5 and (self.has_experts or (most <= 1e-3 and self._is_small))

    @property
    def _is_small(self) -> bool:
        return self.mean_difference <= 3 * self.expected_mean + 1e-5

    def __str__(self) -> str:
        verdict = "explained by rounding" if self.as_expected else "MORE than rounding would explain"
        if self.as_expected and not self._is_small:
            verdict += ", which sends some tokens to other experts"
        return (
            f"{self.modules} modules merged in fp32, equal to base and file, then cast to "
            f"{str(self.dtype).removeprefix('torch.')}\n"
            f"  logit difference   max {self.max_difference:.2e}  mean {self.mean_difference:.2e}\n"
            f"  rounding expected  max {self.expected_max:.2e}  mean {self.expected_mean:.2e}: {verdict}"
        )


def merge_into(
    model: nn.Module, adapter: Adapter, *, initial: Adapter | None = None, allow_base_mismatch: bool = False
) -> int:
    """Merges an adapter into a base model, in place and permanently; computes in fp32 and casts the result.

    Weights changed by the adapter are untied from others, and ``tie_word_embeddings`` is set to False if head and
    embedding no longer share their weight.

    Args:
        model: the base model, without an adapter.
        adapter: any adapter that can be read, including DoRA and PiSSA.
        initial: see `loralib.formats.portable.make_portable`.
        allow_base_mismatch: see `loralib.adapter.apply_adapter`.

    Returns:
        The number of merged modules.

    Raises:
        AdapterError: the adapter does not fit.
        MergeError: a merged weight would be NaN or infinite, or is not the sum of the base's and the adapter's update;
            or the model cannot hold a bias. The model is left unchanged.
    """
    if injection_of(model) is not None:
        raise TargetError(f"{type(model).__name__} already holds an adapter; merge into the plain base model")
    biases = biases_of_B(adapter)
    fields = fields_for(model, biases)
    with _applied(model, adapter, allow_base_mismatch) as report:
        merged = _merged_weights(model, adapter, initial)
        weights = {
            f"{name}.{leaf}": layer.base_weight_of(leaf)
            for name, layer in adapted_layers(model)
            for leaf in layer.weight_names
        }
        brought = {name: weights[name].detach() for name in report.carried if name in weights}
        modules, record, state = len(merged), injection_of(model), model.state_dict()
        merged = {name: state[name].clone() for name in (record.originals if record is not None else ())} | merged
    _check_against_file(model, adapter, merged, initial, brought, report.ignored)
    same = dict[int, tuple[Tensor, Tensor, nn.Parameter]]()  # by the id of the old tensor
    for name, value in merged.items():
        # Creates a new tensor, so that weights tied to the old one keep the base's values.
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        old = module._parameters.get(leaf)
        if old is not None:
            replaced = same.get(id(old))
            if replaced is None or not torch.equal(replaced[1], value):  # tied tables with equal results stay tied
                replaced = same[id(old)] = old, value, nn.Parameter(value.to(old.dtype))
            module._parameters[leaf] = replaced[2]
        else:
            module._buffers[leaf] = value
    add_biases(model, biases, fields)
    model.requires_grad_(False)
    _untie(model)
    return modules


def merge_and_compare(
    model: nn.Module,
    adapter: Adapter,
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    initial: Adapter | None = None,
    allow_base_mismatch: bool = False,
) -> MergeReport:
    """Merges like `merge_into`, casts to a dtype, and measures the effect on the logits.

    Args:
        model: the base model in fp32; afterwards the merged model in `dtype`.
        adapter: see `merge_into`.
        inputs: token ids (T,) of sample prompts.
        dtype: dtype of the merged weights.
        initial: see `merge_into`.
        allow_base_mismatch: see `merge_into`.

    Raises:
        MergeError: a weight would be NaN or infinite in this dtype.
    """
    reference = None
    if not contradictions(adapter.config, trained=True):  # other kinds can only be computed when merged
        with suppress(TargetError), _applied(model, adapter, allow_base_mismatch, whole=True):
            reference = prompt_logits(model, inputs)
    base_change = _rounding_of_base(model, inputs, dtype)
    modules = merge_into(model, adapter, initial=initial, allow_base_mismatch=allow_base_mismatch)
    unrounded = prompt_logits(model, inputs)
    reference = reference if reference is not None else unrounded
    largest = max(1.0, *(float(logits.abs().max()) for logits in reference))
    most, mean = logit_difference(reference, unrounded)
    before_cast = most / largest, mean / largest
    has_experts = any(holds_experts(*named) for named in model.named_modules())
    faults, exact = [], {}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            rounded = parameter.to(dtype).to(parameter.dtype)
            if not torch.isfinite(rounded).all():
                faults.append(name)
                continue
            error = rounded - parameter
            if dtype == torch.float32:
                error = parameter * 2**-24
            if error.any():
                signs = torch.randint(0, 2, error.shape, generator=generator, dtype=torch.int8) * 2 - 1
                exact[name] = rounded
                parameter.add_(error * signs.to(error.device))
    if faults:
        raise MergeError(
            list_faults(
                f"merged weights are out of range for {dtype}: they would be infinite",
                faults,
                "Use --dtype bf16 or fp32.",
            )
        )
    signed = logit_difference(unrounded, prompt_logits(model, inputs))
    expected = max(signed[0], base_change[0]), max(signed[1], base_change[1])
    with torch.no_grad():
        for name, rounded in exact.items():
            model.get_parameter(name).copy_(rounded)
    difference = logit_difference(reference, prompt_logits(model, inputs))
    model.to(dtype)
    return MergeReport(*difference, *expected, dtype, modules, before_cast, has_experts)


def save_merged(
    model: nn.Module, directory: str | os.PathLike[str], tokenizer: Any = None, *, max_shard_size: str = "5GB"
) -> tuple[str, ...]:
    """Writes a merged model for ``from_pretrained``: config, tokenizer, and one or more safetensors files.

    Args:
        model: a transformers model.
        directory: created if needed; the weights of a model in it are replaced, and the config is written last.
        tokenizer: saved with the model.
        max_shard_size: maximum size of a single file, such as "5GB".

    Returns:
        The names of the files.

    Raises:
        OutputError: the directory cannot be written, or holds an adapter.
    """
    directory = Path(directory)
    if not hasattr(model, "save_pretrained"):
        raise AdapterError(
            f"{type(model).__name__} is not a transformers model; save it with torch.save(model.state_dict(), path)"
        )
    if (directory / "adapter_config.json").exists():
        raise OutputError(
            f"{directory} contains an adapter, which from_pretrained would load on top of the merged model; choose "
            "another directory"
        )
    with write_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".merged.", dir=directory) as aside:
            save = cast(Any, model).save_pretrained
            save(aside, max_shard_size=max_shard_size)
            if tokenizer is not None:
                tokenizer.save_pretrained(aside)
            names = sorted(path.name for path in Path(aside).iterdir())
            # Without a config, a directory is not a model: an interrupted run cannot leave a mixture of two.
            remove_file(directory / "config.json")
            for stale in {path for pattern in _WEIGHTS for path in directory.glob(pattern)}:
                remove_file(stale)
            for name in [name for name in names if name != "config.json"] + ["config.json"]:
                source = Path(aside) / name
                write_whole(directory / name, functools.partial(shutil.move, source))
    return tuple(names)


@contextmanager
def _applied(
    model: nn.Module, adapter: Adapter, allow_base_mismatch: bool, *, whole: bool = False
) -> Iterator[ApplyReport]:
    """Temporarily applies an adapter, or only its low-rank part; this checks that everything fits."""
    if not whole:
        config = adapter.config.replace(use_dora=False, lora_bias=False, init_lora_weights=True)
        tensors = {name: t for name, t in adapter.tensors.items() if not name.endswith(("lora_magnitude_vector", BIAS))}
        adapter = replace(adapter, config=config, tensors=tensors)
    report = apply_adapter(model, adapter, allow_base_mismatch=allow_base_mismatch)
    try:
        yield report
    finally:
        remove(model)


def _merged_weights(model: nn.Module, adapter: Adapter, initial: Adapter | None) -> dict[str, Tensor]:
    """Returns by name the merged weights of a model that holds the adapter."""
    plain = expand_blocks(adapter)
    merged, faults = dict[str, Tensor](), []
    adapted = [(name, layer, leaf) for name, layer in adapted_layers(model) for leaf in layer.weight_names]
    for name, layer, leaf in adapted:
        weight = dense(layer.base_weight_of(leaf)).detach()
        with torch.no_grad():
            if name not in plain.modules or not depends_on_base(adapter):
                delta = layer.delta_weight_of(leaf)
            else:
                matrix = full_delta(plain, name, base_matrix(model, name), initial)
                delta = to_stored_layout(layer, matrix).reshape(weight.shape)
            total = merged[f"{name}.{leaf}"] = add_delta(weight, delta)
        if not torch.isfinite(total).all():
            where = "the base weight" if not torch.isfinite(weight).all() else "the adapter"
            faults.append(f"{name}: {where} holds NaN or infinite values, or their sum is too large for {weight.dtype}")
    if faults:
        raise MergeError(
            list_faults("nothing was merged", faults, "Train the adapter again, or load another adapter or base.")
        )
    return merged


def _check_against_file(
    model: nn.Module,
    adapter: Adapter,
    merged: Mapping[str, Tensor],
    initial: Adapter | None,
    brought: Mapping[str, Tensor],
    ignored: Collection[str],
) -> None:
    """Checks merged weights against the original base and file tensors: every tensor in the file must have been used.

    Args:
        model: the plain base model.
        adapter: as read from the file.
        merged: the merged weights by name.
        initial: see `merge_into`.
        brought: token tables shipped with the adapter that replace the base's and are adapted as well.
        ignored: tensors in the file that may be left out.
    """
    plain = expand_blocks(adapter)
    faults, used = [], set[str]()
    for name in plain.modules:
        if plain.holds_experts(name):
            used |= {name}
            faults += _experts_faults(model, plain, name, merged)
            continue
        key = next((f"{name}.{leaf}" for leaf in ("weight", "in_proj_weight") if f"{name}.{leaf}" in merged), None)
        used |= {key or name}
        if key is None:
            faults.append(f"{name}: its update is not in any weight")
            continue
        layer = model.get_submodule(name)
        base = to_stored_layout(layer, brought[key]) if key in brought else base_matrix(model, name)
        if key in brought and not _is_rounding(brought[key], plain.tensors.get(key, brought[key])):
            faults.append(f"{key}: is not the adapter's table")
        delta = full_delta(plain, name, base, initial)
        weight = to_stored_layout(layer, merged[key].flatten(1))
        if not _is_rounding(weight, base.float() + delta.to(base.device)):
            faults.append(f"{key}: is not the base weight plus the adapter's update")
    state = model.state_dict()
    for name, tensor in plain.tensors.items():
        if _LOW_RANK.search(name) or name in used or name in ignored:
            continue
        if name.endswith(f".{ROWS}"):
            faults += _rows_faults(adapter.config, name, tensor, merged)
            continue
        held = merged.get(name, state.get(name))
        # A file may also contain the base's own weights, in bf16.
        step = None if name in merged else 2**-7
        if held is None or held.shape != tensor.shape or not _is_rounding(held, tensor.to(held.device), step):
            faults.append(f"{name}: is not the adapter's")
    if faults:
        advice = "Nothing was merged. Please report this, with the adapter's settings and the model's name."
        raise MergeError(list_faults("the merged weights do not match the adapter's file", faults, advice))


def _experts_faults(model: nn.Module, adapter: Adapter, name: str, merged: Mapping[str, Tensor]) -> list[str]:
    """Checks the merged weights of each expert against the base's weight and the update."""
    if name not in merged:
        return [f"{name}: its update is not in any weight"]
    base, weights = dense(tensor_at(model, name)).detach(), merged[name]
    for weight, total, update in zip(base, weights, updates_in(adapter, name).values(), strict=True):
        delta = delta_weight(update.A, update.B, update.scaling).to(weight.device)
        # Only one of the two layouts gives the sum, unless the update is zero.
        fits = [form for form in (delta, delta.T) if form.shape == weight.shape]
        if not any(_is_rounding(total, weight.float() + form) for form in fits):
            return [f"{name}: is not the base weight plus the adapter's updates"]
    return []


def _rows_faults(config: LoraConfig, name: str, rows: Tensor, merged: Mapping[str, Tensor]) -> list[str]:
    """Checks rows of a merged table against those in the file."""
    table, chosen = name.removesuffix(f".{ROWS}"), config.trainable_token_indices or ()
    if isinstance(chosen, Mapping):
        chosen = chosen[matches(tuple(chosen), table) or ""]
    held = merged.get(f"{table}.weight")
    same = held is not None and _is_rounding(held[list(chosen)], rows.to(held.device))
    return [] if same else [f"{name}: is not in the table"]


_LOW_RANK = re.compile(r"\.lora_((embedding_|experts_)?[AB]|magnitude_vector|B\.bias)$")


def _is_rounding(ours: Tensor, exact: Tensor, step: float | None = None) -> bool:
    """Tells whether two tensors differ only by rounding to the first one's dtype, or by at most a relative `step`."""
    if not ours.is_floating_point():
        return torch.equal(ours, exact.to(ours.dtype))
    step = step or 4 * max(torch.finfo(ours.dtype).eps, torch.finfo(torch.float32).eps)
    gap = (ours.float() - exact.float()).abs()
    return bool((gap <= step * (exact.float().abs() + exact.float().abs().max())).all()) if gap.numel() else True


def _rounding_of_base(model: nn.Module, inputs: Sequence[Tensor], dtype: torch.dtype) -> tuple[float, float]:
    """Returns the maximum and mean change of a model's logits when its weights are rounded; restores the model."""
    exact = prompt_logits(model, inputs)
    originals = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
        change = logit_difference(exact, prompt_logits(model, inputs))
        for name, original in originals.items():
            model.get_parameter(name).copy_(original)
    return change


def _untie(model: nn.Module) -> None:
    """Sets ``tie_word_embeddings`` to False in a model's config, if head and embedding no longer share a weight."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_output_embeddings"):
        return
    tied = cast(Any, model)
    head, table = tied.get_output_embeddings(), tied.get_input_embeddings()
    if head is not None and table is not None and head.weight is not table.weight:
        for part in (config, config.get_text_config() if hasattr(config, "get_text_config") else config):
            part.tie_word_embeddings = False


def prompt_logits(model: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Returns a model's logits (T, V) for each prompt (T,), in fp32 on the CPU."""
    device = next(model.parameters()).device
    with torch.no_grad():
        outputs = [model(ids[None].to(device)) for ids in inputs]
    return [getattr(output, "logits", output)[0].float().cpu() for output in outputs]


def logit_difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> tuple[float, float]:
    """Returns the maximum and mean absolute difference between two results of `prompt_logits`."""
    gaps = torch.cat([(a - b).abs().flatten() for a, b in zip(ours, theirs, strict=True)])
    return float(gaps.max()), float(gaps.mean())
