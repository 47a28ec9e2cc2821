"""The forms in which other tools store adapters of experts whose weights are one parameter.

PEFT wraps the module of the experts once per parameter, one wrapper inside another, and stores 2-D factors:

    experts.base_layer.lora_A.weight   of gate_up_proj   (experts * r, in), expert by expert
    experts.base_layer.lora_B.weight                     (out, r * experts), where the expert index varies fastest
    experts.lora_A.weight, ...         of down_proj, the outer wrapper

Only target_parameters tells which parameters these belong to.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..combine import Update, update_of
from ..config import LoraConfig, is_plain_name, matching_steps, with_ranks
from ..delta import dense
from ..errors import AdapterError, FormatError, TargetError, list_faults
from ..injection import tensor_at
from ..variants import EXPERT_WEIGHTS, expert_weights, holds_experts
from ..wrapping import named_modules, named_parameters, submodule

__all__ = ["from_peft", "of_experts", "parameter_names", "stack_experts", "to_peft", "unstack_experts", "with_both"]

_WRAPPED = re.compile(r"(?P<path>.+?)(?P<depth>(?:\.base_layer)*)\.lora_(?P<half>[AB])\.weight")
_MAX_STEPS = 1e9  # upper limit for `matching_steps`; corresponds to a few seconds


def to_peft(adapter: Adapter) -> dict[str, Tensor]:
    """Returns an adapter's expert tensors as stored by PEFT, under PEFT's names without their prefix."""
    found = dict[str, Tensor]()
    for path, names in _by_module(adapter.expert_weights).items():
        for place, name in enumerate(names):
            A, B = (adapter.tensors[key] for key in adapter.factor_keys(f"{path}.{name}"))
            wrapper = path + ".base_layer" * (len(names) - 1 - place)
            found[f"{wrapper}.lora_A.weight"] = A.reshape(-1, A.shape[-1]).contiguous()
            found[f"{wrapper}.lora_B.weight"] = B.permute(1, 2, 0).reshape(B.shape[1], -1).contiguous()
        inside = path + ".base_layer" * len(names)
        found |= {f"{inside}.{leaf}": adapter.tensors[f"{path}.{leaf}"] for leaf in _trained_beside(adapter, path)}
    return found


def _trained_beside(adapter: Adapter, path: str) -> list[str]:
    """Returns the names of the tensors that are trained in full in a module of experts: its biases."""
    names = (name.rpartition(".") for name in adapter.tensors)
    return [leaf for module, _, leaf in names if module == path and not leaf.startswith("lora_")]


def of_experts(adapter: Adapter) -> set[str]:
    """Returns the names of all tensors that `to_peft` converts."""
    names = {key for name in adapter.expert_weights for key in adapter.factor_keys(name)}
    return names | {
        f"{path}.{leaf}" for path in _by_module(adapter.expert_weights) for leaf in _trained_beside(adapter, path)
    }


def from_peft(tensors: Mapping[str, Tensor], config: LoraConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Extracts the factors of experts from the tensors in a PEFT file.

    Args:
        tensors: the tensors under PEFT's names without their prefix.
        config: its target_parameters tell which of them belong to experts.

    Returns:
        The experts' factors under our names, and all other tensors unchanged.

    Raises:
        AdapterError: matching the expressions of rank_pattern may take forever.
        FormatError: factors are missing or have inconsistent shapes.
    """
    if not config.target_parameters:
        return {}, dict(tensors)
    wrapped = dict[str, dict[tuple[int, str], str]]()  # by module: depth and half -> name in the file
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
            faults.append(f"{path}: factors for {' and '.join(names)} are incomplete")
            continue
        for place, name in enumerate(names):
            A, B = (rest.pop(places[len(names) - 1 - place, half]) for half in "AB")
            ours |= _stacked(f"{path}.{name}", A, B, config, faults)
    if faults:
        raise FormatError(
            list_faults("the factors of experts do not match each other", faults, "Copy the adapter again.")
        )
    return ours, rest


def _stacked(module: str, A: Tensor, B: Tensor, config: LoraConfig, faults: list[str]) -> dict[str, Tensor]:
    """Converts PEFT's factors to A (experts, r, in) and B (experts, out, r); appends to `faults`."""
    patterns = config.rank_pattern
    if not all(map(is_plain_name, patterns)) and matching_steps(patterns, [module]) > _MAX_STEPS:
        raise AdapterError("matching the expressions in rank_pattern could take forever; use names of modules instead")
    r = config.rank_of(module)
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] % r or A.shape[0] != B.shape[1]:
        faults.append(f"{module}: A {tuple(A.shape)} and B {tuple(B.shape)} are not factors of experts of rank {r}")
        return {}
    return {
        f"{module}.lora_experts_A": A.view(-1, r, A.shape[1]),
        f"{module}.lora_experts_B": B.view(B.shape[0], r, -1).permute(2, 0, 1).contiguous(),
    }


def parameter_names(adapter: Adapter, parameters: Sequence[str]) -> list[str]:
    """Returns target_parameters that select exactly the adapted expert weights: name endings if these suffice.

    Args:
        adapter: may have experts.
        parameters: the names of all parameters of its model; empty if unknown.
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
    """Groups names of parameters by module, in the order in which PEFT wraps them, which is the module's."""
    modules = dict[str, list[str]]()
    for name in parameters:
        path, _, leaf = name.rpartition(".")
        modules.setdefault(path, []).append(leaf)
    return {path: sorted(names, key=EXPERT_WEIGHTS.index) for path, names in modules.items()}


# Experts that are separate modules, as in checkpoints and in older versions of transformers.


@dataclass(frozen=True)
class _Projection:
    """One weight of all experts, and the names of its parts in a checkpoint.

    Attributes:
        name: name of the parameter in the model.
        parts: names with ``{}`` for the expert's number; the weight contains their outputs one after another.
        experts, inputs, outputs: its sizes; outputs are those of all parts together.
    """

    name: str
    parts: tuple[str, ...]
    experts: int
    inputs: int
    outputs: int


def unstack_experts(adapter: Adapter, model: nn.Module) -> Adapter:
    """Converts an adapter to one module per expert and projection, named as in the model's checkpoints.

    The parts of a weight share its A and get their rows of its B, which is exact.  If one weight of a layer is adapted,
    the others get a zero update: vLLM requires all or none.

    Raises:
        AdapterError: the names of the model's experts are unknown.
    """
    found, faults = _projections(model)
    known = {projection.name: projection for projection in found}
    chosen = {name.rpartition(".")[0] for name in adapter.expert_weights}
    if unknown := [name for name in adapter.expert_weights if name not in known]:
        faults += [name for name in unknown if not any(name in fault for fault in faults)]
        what = f"loralib does not know how checkpoints of {type(model).__name__} name individual experts"
        raise AdapterError(list_faults(what, faults, "`loralib merge` writes the merged model instead."))
    tensors = {name: tensor for name, tensor in adapter.tensors.items() if ".lora_experts_" not in name}
    leaves = list[str]()
    for projection in found:
        if projection.name.rpartition(".")[0] not in chosen:
            continue
        for place, part in enumerate(projection.parts):
            leaves.append(part.rpartition(".")[2])
            for expert, (A, B) in enumerate(zip(*_factors(adapter, projection), strict=True)):
                name = part.format(expert)
                tensors[f"{name}.lora_A"] = A.clone()
                tensors[f"{name}.lora_B"] = B.chunk(len(projection.parts))[place].clone()
    targets = adapter.config.target_modules
    named = [targets] if isinstance(targets, str) else list(targets or ())
    config = adapter.config.replace(
        target_modules=[*named, *dict.fromkeys(leaves)]
        if not isinstance(targets, str)
        else "|".join([targets, *(rf".*\.{leaf}" for leaf in dict.fromkeys(leaves))]),
        target_parameters=None,
    )
    return Adapter(config, tensors, adapter.metadata)


def with_both(adapter: Adapter, model: nn.Module) -> Adapter:
    """Returns an adapter with zero updates for the remaining expert weights of layers that it adapts."""
    tensors, chosen = dict(adapter.tensors), {name.rpartition(".")[0] for name in adapter.expert_weights}
    for path, module in named_modules(model).items():
        for leaf in expert_weights(module) if path in chosen else ():
            A, B = _factors(adapter, _projection(model, f"{path}.{leaf}", ()))
            tensors |= {f"{path}.{leaf}.lora_experts_A": A, f"{path}.{leaf}.lora_experts_B": B}
    whole = Adapter(adapter.config, tensors, adapter.metadata)
    names = parameter_names(whole, list(named_parameters(model)))
    return Adapter(adapter.config.replace(target_parameters=names), tensors, adapter.metadata)


def _factors(adapter: Adapter, projection: _Projection) -> tuple[Tensor, Tensor]:
    """Returns the factors of all experts, which are zero if the adapter does not adapt this weight."""
    if adapter.holds_experts(projection.name):
        key_A, key_B = adapter.factor_keys(projection.name)
        return adapter.tensors[key_A], adapter.tensors[key_B]
    like = next(t for name, t in adapter.tensors.items() if name.endswith(".lora_experts_A"))
    count, r = projection.experts, like.shape[1]
    return like.new_zeros(count, r, projection.inputs), like.new_zeros(count, projection.outputs, r)


def stack_experts(adapter: Adapter, model: nn.Module) -> Adapter:
    """Converts an adapter of experts that are separate modules to one of weights that hold all experts.

    Parts of a weight that share the same A become one update of that rank; otherwise the ranks are added, with a
    block-diagonal B, as in PEFT.  Both are exact.  Experts and parts without an update get a zero update.
    """
    tensors, config = dict(adapter.tensors), adapter.config
    ranks = {name: config.rank_of(name) for name in adapter.modules}
    alphas = {name: config.alpha_of(name) for name in adapter.modules}
    parameters = list[str]()
    for projection in _projections(model)[0]:
        names = [[part.format(expert) for part in projection.parts] for expert in range(projection.experts)]
        if not any(name in ranks for of_expert in names for name in of_expert):
            continue
        A, B = _joined([[_scaled(adapter, name, projection) for name in of_expert] for of_expert in names])
        for name in (name for of_expert in names for name in of_expert):
            for key in (f"{name}.lora_A", f"{name}.lora_B"):
                tensors.pop(key, None)
            ranks.pop(name, None)
            alphas.pop(name, None)
        tensors |= {f"{projection.name}.lora_experts_A": A, f"{projection.name}.lora_experts_B": B}
        r = A.shape[1]
        ranks[projection.name], alphas[projection.name] = r, r**0.5 if config.use_rslora else float(r)
        parameters.append(projection.name)
    if not parameters:
        return adapter
    whole = Adapter(config, tensors, adapter.metadata)
    config = config.targeting(list(whole.target_modules)).replace(target_parameters=parameters)
    return Adapter(with_ranks(config, ranks, alphas), tensors, adapter.metadata)


def _scaled(adapter: Adapter, name: str, projection: _Projection) -> tuple[Tensor, Tensor]:
    """Returns a part's factors with the scaling in B; of rank 0 if there are none."""
    if f"{name}.lora_A" in adapter.tensors:
        return update_of(adapter, name).plain()
    return torch.zeros(0, projection.inputs), torch.zeros(projection.outputs // len(projection.parts), 0)


def _joined(pairs: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> tuple[Tensor, Tensor]:
    """Combines the factors of each expert's parts to A (experts, r, in) and B (experts, out, r)."""
    if all(torch.equal(A, parts[0][0]) for parts in pairs for A, _ in parts):
        joined = [(parts[0][0], torch.cat([B for _, B in parts])) for parts in pairs]
    else:
        joined = [(torch.cat([A for A, _ in parts]), torch.block_diag(*(B for _, B in parts))) for parts in pairs]
    r = max(len(A) for A, _ in joined)
    padded = [Update(A, B, 1.0).plain(r) for A, B in joined]
    return torch.stack([A for A, _ in padded]), torch.stack([B for _, B in padded])


def _projections(model: nn.Module) -> tuple[list[_Projection], list[str]]:
    """Returns how checkpoints name a model's experts, according to transformers' table; and which ones are unknown."""
    found, faults = list[_Projection](), list[str]()
    rules = _conversions(model)
    for path, module in named_modules(model).items():
        if not holds_experts(path, module):
            continue
        try:
            names = expert_weights(module)
        except TargetError as error:
            faults.append(f"{path}: {error}")
            continue
        for leaf in names:
            name = f"{path}.{leaf}"
            parts = next((parts for rule in rules if (parts := _parts_of(name, rule, rules))), ())
            if not parts:
                faults.append(f"{name}: in transformers' checkpoints, one tensor holds all its experts")
                continue
            found.append(_projection(model, name, parts))
    return found, faults


def _projection(model: nn.Module, name: str, parts: tuple[str, ...]) -> _Projection:
    experts, rows, columns = dense(tensor_at(model, name)).shape
    transposed = getattr(submodule(model, name.rpartition(".")[0]), "is_transposed", False)
    inputs, outputs = (rows, columns) if transposed else (columns, rows)
    return _Projection(name, parts, experts, inputs, outputs)


def _parts_of(name: str, rule: Any, rules: Sequence[Any]) -> tuple[str, ...]:
    """Returns a rule's names for the parts of an expert weight; () if the rule concerns another weight."""
    operations = [type(operation).__name__ for operation in getattr(rule, "operations", None) or ()]
    target = rule.target_patterns[0]
    if not operations or set(operations) - {"MergeModulelist", "Concatenate"} or not name.endswith(target):
        return ()
    stem = name.removesuffix(target)
    parts = [stem + source.removesuffix(".weight").replace("*", "{}") for source in rule.source_patterns]
    if any(part.count("{}") != 1 for part in parts):
        return ()
    renamed = [(other.target_patterns[0], other.source_patterns[0]) for other in rules if _is_plain_renaming(other)]
    for new, old in renamed:
        parts = [part.replace(new, old) for part in parts]
    return tuple(parts)


def _is_plain_renaming(rule: Any) -> bool:
    """Whether a rule only replaces one string with another, such as ``.block_sparse_moe.`` with ``.mlp.``."""
    texts = [*rule.source_patterns, *rule.target_patterns]
    return not getattr(rule, "operations", None) and len(texts) == 2 and all(_PLAIN.fullmatch(text) for text in texts)


_PLAIN = re.compile(r"[\w.]+")


def _conversions(model: Any) -> list[Any]:
    """Returns transformers' rules for reading a model's checkpoints."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping

        return list(get_model_conversion_mapping(model))
    except (ImportError, AttributeError, TypeError):  # transformers does not guarantee this interface
        return []
