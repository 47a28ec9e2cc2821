"""How other tools write the adapters of experts that are one parameter.

PEFT wraps the module of the experts once for each of its parameters, one wrapper around another, and keeps 2-D factors:

    experts.base_layer.lora_A.weight   of gate_up_proj   (experts * r, in), expert by expert
    experts.base_layer.lora_B.weight                     (out, r * experts), where the expert changes fastest
    experts.lora_A.weight, ...         of down_proj, the outer one

Which parameters these are is said by target_parameters alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from ..adapter import Adapter
from ..config import LoraConfig, is_plain_name, matching_steps
from ..errors import AdapterError, FormatError, list_faults
from ..variants import EXPERT_WEIGHTS

__all__ = ["from_peft", "parameter_names", "to_peft"]

_WRAPPED = re.compile(r"(?P<path>.+?)(?P<depth>(?:\.base_layer)*)\.lora_(?P<half>[AB])\.weight")
_MAX_STEPS = 1e9  # of matching names with expressions, a few seconds


def to_peft(adapter: Adapter) -> dict[str, Tensor]:
    """Returns the factors of an adapter's experts as PEFT stores them, by PEFT's names without their prefix."""
    found = dict[str, Tensor]()
    for path, names in _by_module(adapter.target_parameters).items():
        for place, name in enumerate(names):
            A, B = (adapter.tensors[key] for key in adapter.factor_keys(f"{path}.{name}"))
            wrapper = path + ".base_layer" * (len(names) - 1 - place)
            found[f"{wrapper}.lora_A.weight"] = A.reshape(-1, A.shape[-1]).contiguous()
            found[f"{wrapper}.lora_B.weight"] = B.permute(1, 2, 0).reshape(B.shape[1], -1).contiguous()
    return found


def from_peft(tensors: Mapping[str, Tensor], config: LoraConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Reads the factors of experts from what a file of PEFT's holds.

    Args:
        tensors: by PEFT's names without their prefix.
        config: its target_parameters say which of them belong to experts.

    Returns:
        The experts' factors by our names, and all other tensors as they are.

    Raises:
        AdapterError: parameters are adapted that are no weights of experts.
        FormatError: factors are missing or have shapes that do not fit together.
    """
    if not config.target_parameters:
        return {}, dict(tensors)
    wrapped = dict[str, dict[tuple[int, str], str]]()  # by module: depth and half, and the name in the file
    for name in tensors:
        match = _WRAPPED.fullmatch(name)
        if match and _names_of(match["path"], config.target_parameters):
            depth = match["depth"].count("base_layer")
            wrapped.setdefault(match["path"], {})[depth, match["half"]] = name
    ours, rest, faults = dict[str, Tensor](), dict(tensors), list[str]()
    for path, places in wrapped.items():
        names = _names_of(path, config.target_parameters)
        depths = [(depth, half) for depth in reversed(range(len(names))) for half in "AB"]
        if sorted(places) != sorted(depths):
            faults.append(f"{path}: factors for {' and '.join(names)} are not complete")
            continue
        for place, name in enumerate(names):
            A, B = (rest.pop(places[len(names) - 1 - place, half]) for half in "AB")
            ours |= _stacked(f"{path}.{name}", A, B, config, faults)
    if faults:
        raise FormatError(list_faults("the factors of experts do not fit together", faults, "Copy the adapter again."))
    return ours, rest


def _stacked(module: str, A: Tensor, B: Tensor, config: LoraConfig, faults: list[str]) -> dict[str, Tensor]:
    """Returns A (experts, r, in) and B (experts, out, r) of PEFT's factors; adds to `faults`."""
    patterns = config.rank_pattern
    if not all(map(is_plain_name, patterns)) and matching_steps(patterns, [module]) > _MAX_STEPS:
        raise AdapterError("matching the expressions of rank_pattern may take forever; write names of modules there")
    r = config.rank_of(module)
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] % r or A.shape[0] != B.shape[1]:
        faults.append(f"{module}: A {tuple(A.shape)} and B {tuple(B.shape)} are not of experts of rank {r}")
        return {}
    return {
        f"{module}.lora_experts_A": A.view(-1, r, A.shape[1]),
        f"{module}.lora_experts_B": B.view(B.shape[0], r, -1).permute(2, 0, 1).contiguous(),
    }


def parameter_names(adapter: Adapter, parameters: Sequence[str]) -> list[str]:
    """Returns target_parameters that select exactly the adapted weights of experts: endings where these are enough.

    Args:
        adapter: may have experts.
        parameters: the names of all parameters of its model; empty, if they are not known.
    """
    chosen = adapter.target_parameters
    short = list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in chosen))
    meant = {name for name in parameters if name.endswith(tuple(f".{ending}" for ending in short))} if short else set()
    return short if meant == set(chosen) and parameters else list(chosen)


def _names_of(path: str, entries: Sequence[str]) -> list[str]:
    """Returns which weights of a module target_parameters names, in the order in which PEFT wraps them."""
    found = set[str]()
    for entry in entries:
        owner, _, leaf = entry.rpartition(".")
        if f".{path}".endswith(f".{owner}") if owner else "expert" in path.rpartition(".")[2]:
            found.add(leaf)
    return [name for name in EXPERT_WEIGHTS if name in found]


def _by_module(parameters: Sequence[str]) -> dict[str, list[str]]:
    """Returns the names of parameters by module, in the order in which PEFT wraps them: that of the module."""
    modules = dict[str, list[str]]()
    for name in parameters:
        path, _, leaf = name.rpartition(".")
        modules.setdefault(path, []).append(leaf)
    return {path: sorted(names, key=EXPERT_WEIGHTS.index) for path, names in modules.items()}
