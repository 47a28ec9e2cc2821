"""Merged models: base and adapter as one transformers model that ``from_pretrained`` loads without any of this."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..adapter import Adapter, apply_adapter, expand_blocks
from ..combine import depends_on_base
from ..delta import add_delta
from ..errors import AdapterError, MergeError, OutputError, TargetError, list_faults
from ..files import remove_file, write_whole
from ..injection import adapted_layers, injection_of, remove
from .portable import base_matrix, full_delta, turned

__all__ = ["MergeReport", "merge_and_compare", "merge_into", "save_merged"]

_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class MergeReport:
    """What merging did to the logits of sample prompts.

    Attributes:
        max_difference, mean_difference: between the merged model and base plus adapter in fp32.
        expected_max, expected_mean: what rounding to the dtype must be expected to do: the effect of errors of the same
            size with random signs, or what rounding does to the base alone, where that is more (a base that was
            quantised before has few different values, and so errors that add up).
        dtype: of the merged weights.
        modules: how many modules were merged.
    """

    max_difference: float
    mean_difference: float
    expected_max: float
    expected_mean: float
    dtype: torch.dtype
    modules: int

    @property
    def as_expected(self) -> bool:
        """Whether rounding explains the difference."""
        return self.mean_difference <= 3 * self.expected_mean + 1e-5

    def __str__(self) -> str:
        verdict = "rounding explains it" if self.as_expected else "MORE than rounding explains"
        return (
            f"{self.modules} modules merged in fp32, then cast to {str(self.dtype).removeprefix('torch.')}\n"
            f"  logit difference   max {self.max_difference:.2e}  mean {self.mean_difference:.2e}\n"
            f"  rounding expected  max {self.expected_max:.2e}  mean {self.expected_mean:.2e}: {verdict}"
        )


def merge_into(
    model: nn.Module, adapter: Adapter, *, initial: Adapter | None = None, allow_base_mismatch: bool = False
) -> int:
    """Turns a base model into base plus adapter, in place and for good; the arithmetic is fp32, then cast.

    Weights that were tied to one that the adapter changes get a tensor of their own, and ``tie_word_embeddings`` is
    set to False where that is the head's.

    Args:
        model: the base, without an adapter.
        adapter: of any kind that can be read, also DoRA and PiSSA.
        initial: see `loralib.formats.portable.make_portable`.
        allow_base_mismatch: see `loralib.adapter.apply_adapter`.

    Returns:
        How many modules were merged.

    Raises:
        AdapterError: the adapter does not fit.
        MergeError: a merged weight would be NaN or infinite; the model stays as it was.
    """
    if injection_of(model) is not None:
        raise TargetError(f"{type(model).__name__} holds an adapter already; merge into the plain base model")
    with _applied(model, adapter, allow_base_mismatch):
        merged = _merged_weights(model, adapter, initial)
        modules, record, state = len(merged), injection_of(model), model.state_dict()
        merged |= {name: state[name].clone() for name in (record.originals if record is not None else ())}
    for name, value in merged.items():
        # A tensor of its own: what was tied to the old one keeps the base's values.
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        old = module._parameters.get(leaf)
        if old is not None:
            module._parameters[leaf] = nn.Parameter(value.to(old.dtype))
        else:
            module._buffers[leaf] = value
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
    """Merges as `merge_into` does, casts to a dtype, and measures what that does to the logits.

    Args:
        model: the base in fp32; afterwards the merged model in `dtype`.
        adapter: see `merge_into`.
        inputs: token ids (T,) of sample prompts.
        dtype: of the merged weights.
        initial: see `merge_into`.
        allow_base_mismatch: see `merge_into`.

    Raises:
        MergeError: a weight would be NaN or infinite in that dtype.
    """
    reference = None
    if not depends_on_base(adapter):  # other kinds can only be computed merged
        with _applied(model, adapter, allow_base_mismatch):
            reference = _logits(model, inputs)
    base_moves = _rounding_of_base(model, inputs, dtype)
    modules = merge_into(model, adapter, initial=initial, allow_base_mismatch=allow_base_mismatch)
    unrounded = _logits(model, inputs)
    reference = reference if reference is not None else unrounded
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
                f"merged weights do not fit {dtype}: they would be infinite", faults, "Use --dtype bf16 or fp32."
            )
        )
    signed = _compare(unrounded, _logits(model, inputs))
    expected = max(signed[0], base_moves[0]), max(signed[1], base_moves[1])
    with torch.no_grad():
        for name, rounded in exact.items():
            model.get_parameter(name).copy_(rounded)
    found = _compare(reference, _logits(model, inputs))
    model.to(dtype)
    return MergeReport(*found, *expected, dtype=dtype, modules=modules)


def save_merged(
    model: nn.Module, directory: str | os.PathLike[str], tokenizer: Any = None, *, max_shard_size: str = "5GB"
) -> tuple[str, ...]:
    """Writes a merged model for ``from_pretrained``: safetensors, in several files when large, config and tokenizer.

    Args:
        model: a transformers model.
        directory: made if needed; weights of a model that stood there are replaced, the config comes last.
        tokenizer: is saved with it.
        max_shard_size: the largest size of one file, as "5GB".

    Returns:
        The names of the files.

    Raises:
        OutputError: the directory cannot be written, or holds an adapter.
    """
    directory = Path(directory)
    if not hasattr(model, "save_pretrained"):
        raise AdapterError(
            f"{type(model).__name__} is no transformers model; save it with torch.save(model.state_dict(), path)"
        )
    if (directory / "adapter_config.json").exists():
        raise OutputError(
            f"{directory} holds an adapter, which from_pretrained would load on top of the merged model; "
            "choose another directory"
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".merged.", dir=directory) as aside:
            save = cast(Any, model).save_pretrained
            save(aside, max_shard_size=max_shard_size)
            if tokenizer is not None:
                tokenizer.save_pretrained(aside)
            names = sorted(path.name for path in Path(aside).iterdir())
            # Without its config what stands there is no model: a killed run leaves no mixture of two.
            remove_file(directory / "config.json")
            for stale in {path for pattern in _WEIGHTS for path in directory.glob(pattern)}:
                remove_file(stale)
            for name in [name for name in names if name != "config.json"] + ["config.json"]:
                source = Path(aside) / name
                write_whole(directory / name, functools.partial(shutil.move, source))
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"cannot write the merged model to {directory}: {error.strerror or error}") from error
    return tuple(names)


@contextmanager
def _applied(model: nn.Module, adapter: Adapter, allow_base_mismatch: bool) -> Iterator[None]:
    """Puts the low-rank part of an adapter on a model for a while; that checks that everything fits."""
    if adapter.config.lora_bias or any(name.endswith("lora_B.bias") for name in adapter.tensors):
        raise AdapterError("lora_bias: adapters with a bias of B are not merged here; merge with PEFT")
    config = adapter.config.replace(use_dora=False, init_lora_weights=True)
    tensors = {name: t for name, t in adapter.tensors.items() if not name.endswith("lora_magnitude_vector")}
    apply_adapter(model, replace(adapter, config=config, tensors=tensors), allow_base_mismatch=allow_base_mismatch)
    try:
        yield
    finally:
        remove(model)


def _merged_weights(model: nn.Module, adapter: Adapter, initial: Adapter | None) -> dict[str, Tensor]:
    """Returns the merged weights of a model that holds the adapter, by name."""
    plain = expand_blocks(adapter)
    merged, faults = dict[str, Tensor](), []
    for name, layer in adapted_layers(model):
        weight = layer.base_weight.detach()
        with torch.no_grad():
            if not depends_on_base(adapter):
                delta = layer.delta_weight()
            else:
                delta = turned(layer, full_delta(plain, name, base_matrix(model, name), initial)).reshape(weight.shape)
            total = merged[f"{name}.{layer._weight_name}"] = add_delta(weight, delta)
        if not torch.isfinite(total).all():
            where = "the base weight" if not torch.isfinite(weight).all() else "the adapter"
            faults.append(f"{name}: {where} holds NaN or infinite values, or their sum is too large for {weight.dtype}")
    if faults:
        raise MergeError(list_faults("nothing was merged", faults, "Train again, or load another adapter or base."))
    return merged


def _rounding_of_base(model: nn.Module, inputs: Sequence[Tensor], dtype: torch.dtype) -> tuple[float, float]:
    """Returns how far rounding its weights moves a model's logits, at most and on average; the model stays as it is."""
    exact = _logits(model, inputs)
    originals = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
        moved = _compare(exact, _logits(model, inputs))
        for name, original in originals.items():
            model.get_parameter(name).copy_(original)
    return moved


def _untie(model: nn.Module) -> None:
    """Says in the model's config that head and embedding are two, if they are two now."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_output_embeddings"):
        return
    tied = cast(Any, model)
    head, table = tied.get_output_embeddings(), tied.get_input_embeddings()
    if head is not None and table is not None and head.weight is not table.weight:
        for part in (config, config.get_text_config() if hasattr(config, "get_text_config") else config):
            part.tie_word_embeddings = False


def _logits(model: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    device = next(model.parameters()).device
    with torch.no_grad():
        return [model(ids[None].to(device)).logits[0].float().cpu() for ids in inputs]


def _compare(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> tuple[float, float]:
    gaps = torch.cat([(a - b).abs().flatten() for a, b in zip(ours, theirs, strict=True)])
    return float(gaps.max()), float(gaps.mean())
