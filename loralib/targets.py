"""Decides which modules a config adapts and what each becomes, and reports why others cannot be.  Only reads the model.

`match_modules` is the entry point; `loralib.injection` carries out what it returns.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedParameter

from .config import ALL_LINEAR, LoraConfig, first_match, matches
from .delta import dense
from .errors import TargetError, did_you_mean, list_faults
from .layers import (
    LoRAConv,
    LoRAEmbedding,
    LoRALayer,
    LoRALinear,
    LoRAMultiheadAttention,
    LoRAReadLinear,
    LoRARouter,
    adapted_class,
    base_class,
    is_conv1d,
)
from .variants import (
    ExpertWeight,
    LoRAExperts,
    TokenRowsEmbedding,
    TokenRowsHead,
    contradictions,
    expert_weights,
    holds_experts,
    mixin_for,
)
from .wrapping import input_table, may_adapt, named_modules, named_parameters, named_tensors, output_head

__all__ = ["TargetModule", "fully_trained_tensors", "left_out", "match_modules", "tied_modules"]


@dataclass(frozen=True)
class TargetModule:
    """A module to adapt.

    Attributes:
        name: its dotted name in the model.
        module: the module itself.
        mixin: the LoRA class to combine with the module's own class.
        r, lora_alpha: its rank and alpha.
        pattern: the entry of target_modules that matched it.
        blocks: which equal blocks of a fused projection are adapted; None for a plain layer.
        token_indices: which rows of a token table are trained, if these are trained instead of a low-rank update.
        tied: whether these rows belong to another table, to which this one is tied.
        weights: which expert weights are adapted, if the module holds any.
    """

    name: str
    module: nn.Module
    mixin: type[LoRALayer]
    r: int
    lora_alpha: float
    pattern: str
    blocks: tuple[bool, ...] | None = None
    token_indices: tuple[int, ...] = ()
    tied: bool = False
    weights: tuple[ExpertWeight, ...] = ()

    @property
    def attributes(self) -> dict[str, Any]:
        """Attributes to set on the layer before it creates its tensors."""
        if issubclass(self.mixin, LoRALinear):
            return {"fan_in_fan_out": is_conv1d(self.module), "blocks": self.blocks}
        if self.weights:
            return {"adapted_weights": self.weights}
        return {"token_indices": self.token_indices, "tied": self.tied} if self.token_indices else {}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of this module's adapter tensors, by their names in the adapter."""
        layer = self.preview()
        shapes = layer.tensor_shapes(self.r)
        return {f"{self.name}.{key}": shapes[name] for name, key in layer.tensor_keys().items()}

    def preview(self) -> LoRALayer:
        """Returns the layer that the module will become, without trained tensors, to be asked for shapes."""
        cls = adapted_class(self.mixin, base_class(self.module))
        layer = cls.__new__(cls)
        layer.__dict__.update(self.module.__dict__, **self.attributes)
        return layer


def match_modules(model: nn.Module, config: LoraConfig, *, trained: bool = False) -> list[TargetModule]:
    """Finds the modules that a config adapts, without touching the model.

    Args:
        model: may hold an adapter made by `loralib.inject`; then its base is matched.
        config: see `loralib.inject`.
        trained: whether the config is that of a finished adapter.  Its tensors then decide, and entries may match
            nothing; PEFT accepts such entries, and writes some itself.

    Returns:
        One entry per module, in the model's order.

    Raises:
        TargetError: a pattern matches nothing or a module cannot be adapted; all faults are reported together.
    """
    _refuse_kinds(config, trained)
    if config.target_modules is None and not config.target_parameters:
        raise TargetError(f"target_modules is not given. {_suggestion(model)}")
    modules = _modules(model)
    matched = _matched_patterns(model, modules, config)
    faults = list[str]()
    targets = _experts(model, modules, config, trained, faults)
    if not trained or not (matched or targets):
        named = [*matched, *(target.name for target in targets if not target.weights)]
        named += [f"{target.name}.{weight.name}" for target in targets for weight in target.weights]
        faults += _unused_entry_faults(model, modules, matched, named, config)
    unfit = list[str]()
    named_already = {target.name for target in targets}
    for name, pattern in matched.items():
        if name in named_already:  # by target_parameters
            continue
        try:
            if not trained and _is_dt_proj(name, modules):
                raise TargetError(f"{_READS_DT_PROJ}; leave it out")
            targets.append(_target(name, pattern, _mixin_for(name, modules, config), modules, config))
        except TargetError as error:
            faults.append(f"{name}: {error}")
            unfit += [name] * (pattern == ALL_LINEAR)
            continue
        if isinstance(modules[name], nn.MultiheadAttention):
            # in_proj and out_proj are adapted together, as in PEFT.
            output = f"{name}.out_proj"
            try:
                targets.append(_target(output, pattern, LoRAReadLinear, modules, config))
            except TargetError as error:
                faults.append(f"{output}: {error}")
    targets += _token_rows(model, modules, config, {target.name for target in targets}, faults)
    order = {name: place for place, name in enumerate(modules)}
    targets.sort(key=lambda target: order[target.name])
    if faults:
        count = f"{len(faults)} problem{'s' if len(faults) > 1 else ''}"
        fix = f"{_excluding(unfit, matched)}." if unfit else ""
        raise TargetError(list_faults(f"{count} with target_modules in {type(model).__name__}", faults, fix))
    return targets


def left_out(model: nn.Module, config: LoraConfig) -> dict[str, str]:
    """Returns the linear modules that 'all-linear' does not adapt in a model, each with the reason."""
    if ALL_LINEAR not in _several(config.target_modules):
        return {}
    modules = _modules(model)
    return {name: why for name, why in _no_plain_linears(modules).items() if why and not _is_left_out(name, config)}


# The heads that PEFT trains in full for a task, in addition to the adapter.
HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


def with_head(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """Returns the config with the model's head added to modules_to_save, if its task_type implies one (PEFT's rule)."""
    names = named_modules(model)
    heads = [head for head in HEADS.get(config.task_type or "", ()) if any(name.endswith(head) for name in names)]
    missing = [head for head in heads if not any(config.saves(name) for name in names if name.endswith(head))]
    return config.replace(modules_to_save=(*(config.modules_to_save or ()), *missing)) if missing else config


def unsaved_head(model: nn.Module, config: LoraConfig) -> str:
    """Returns the name of a classifier head that is not trained in full; "" if there is none."""
    if not type(model).__name__.endswith(("Classification", "ForQuestionAnswering", "ForMultipleChoice")):
        return ""
    heads = {head for names in HEADS.values() for head in names}
    return next((name for name, _ in model.named_children() if name in heads and not config.saves(name)), "")


def fully_trained_tensors(
    model: nn.Module, config: LoraConfig, adapted: Iterable[tuple[str, nn.Module]]
) -> dict[str, Tensor]:
    """Returns by name the tensors that a config trains besides the layers' own: biases and all of modules_to_save.

    Args:
        model: plain or adapted.
        config: only `bias` and `modules_to_save` matter.
        adapted: the adapted modules with their names, for ``bias="lora_only"``.
    """
    tensors = dict[str, Tensor]()
    if config.bias == "all":
        # PEFT does not train in_proj_bias of an attention that it adapts.
        left_out = {f"{name}.in_proj_bias" for name, module in adapted if isinstance(module, nn.MultiheadAttention)}
        left_out |= {
            f"{name}.{leaf}"
            for name, module in named_modules(model).items()
            if isinstance(module, LoRALayer)
            for leaf in module.trained_tensors()
        }
        tensors |= {n: p for n, p in named_parameters(model).items() if "bias" in n and n not in left_out}
    elif config.bias == "lora_only":
        biases = ((f"{name}.bias", module._parameters.get("bias")) for name, module in adapted)
        tensors |= {name: bias for name, bias in biases if bias is not None}
    for name, module in named_modules(model).items():
        if config.saves(name):
            tensors |= {f"{name}.{key}": tensor for key, tensor in named_tensors(module).items()}
    held = {name: kind for name, tensor in tensors.items() if (kind := getattr(tensor, "KIND", None)) is not None}
    if held:
        faults = [f"{name} is stored in {kind}" for name, kind in held.items()]
        raise TargetError(
            list_faults(
                "quantised weights cannot be trained themselves",
                faults,
                "Leave them out of modules_to_save, and adapt them; or load the base without quantize.",
            )
        )
    return tensors


def tied_modules(model: nn.Module, targets: Sequence[TargetModule]) -> dict[str, str]:
    """Returns, for each target whose weight is tied, the names of the other modules that hold it."""
    owners: dict[int, list[str]] = {}
    for name, module in named_modules(model).items():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), []).append(name)
    tied = {}
    sharing = {id(target.module._parameters["weight"]) for target in targets if target.tied}
    for target in targets:
        if target.token_indices and id(target.module._parameters["weight"]) in sharing:  # they train the same rows
            continue
        weights = [target.module._parameters[name] for name in target.preview().weight_names]
        tied[target.name] = ", ".join(name for weight in weights for name in owners[id(weight)] if name != target.name)
    return {name: twins for name, twins in tied.items() if twins}


def _refuse_kinds(config: LoraConfig, trained: bool) -> None:
    """Refuses kinds of adapters that layers cannot compute, and says what to do instead of training or loading one."""
    if faults := contradictions(config, trained):
        raise TargetError(faults[0] if len(faults) == 1 else list_faults("these settings are not possible", faults))


def _token_rows(
    model: nn.Module, modules: Mapping[str, nn.Module], config: LoraConfig, adapted: Collection[str], faults: list[str]
) -> list[TargetModule]:
    """Returns the tables of which single rows are trained; appends to `faults`.

    As in PEFT, tables tied to the input embedding share its rows, unless one of them is named with other rows.  A tied
    head that is named without the embedding has rows of its own.
    """
    chosen = config.trainable_token_indices
    if not chosen:
        return []
    looked_up = input_table(model)
    owner = next((name for name, module in modules.items() if module is looked_up), "")
    if not isinstance(chosen, Mapping):
        chosen = {owner or "embed_tokens": chosen}
    named = {name: key for name in modules if (key := matches(tuple(chosen), name))}
    faults += [
        f"trainable_token_indices[{key!r}] matches nothing.{_similar_names(model, key, modules)}"
        for key in chosen
        if key not in named.values()
    ]
    tables = {name: tuple(chosen[key]) for name, key in named.items()}
    twins = _twins(owner, modules) if owner in tables else []
    if any(tables.get(twin, tables[owner]) != tables[owner] for twin in twins):
        twins = []
    tables |= dict.fromkeys(twins, tables.get(owner, ()))
    found = []
    for name, indices in tables.items():
        if fault := _token_rows_fault(name, modules[name], indices, config, adapted):
            faults.append(f"trainable_token_indices of {name}: {fault}")
            continue
        mixin = TokenRowsEmbedding if isinstance(modules[name], nn.Embedding) else TokenRowsHead
        found.append(
            TargetModule(
                name=name,
                module=modules[name],
                mixin=mixin,
                r=1,
                lora_alpha=1,
                pattern="trainable_token_indices",
                token_indices=indices,
                tied=name in twins,
            )
        )
    return found


def _twins(name: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """Returns the names of the other modules that have a module's weight."""
    weight = modules[name]._parameters.get("weight")
    return [n for n, m in modules.items() if n != name and weight is not None and m._parameters.get("weight") is weight]


def _token_rows_fault(
    name: str, module: nn.Module, indices: tuple[int, ...], config: LoraConfig, adapted: Collection[str]
) -> str:
    """Returns why single rows of a table cannot be trained; "" if they can."""
    if not isinstance(module, (nn.Embedding, nn.Linear)):
        return f"{base_class(module).__name__} is not an embedding or a head; name one of these"
    if name in adapted:
        return "target_modules already adapts all of it; leave it out of one of the two"
    if config.saved_part(f"{name}.weight"):
        return "modules_to_save already trains all of it; leave it out of one of the two"
    if getattr(module, "max_norm", None) is not None:
        return "max_norm rescales the rows of this table; they cannot be trained one by one"
    try:
        _refuse_bypassed(module, "weight")
    except TargetError as error:
        return str(error)
    rows = cast(Tensor, module._parameters["weight"]).shape[0]
    outside = [index for index in indices if not 0 <= index < rows]
    return f"there are no rows {outside[:5]}, the table has {rows} (counted from 0)" if outside else ""


# Matching names.


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in named_modules(model).items() if name}


def _matched_patterns(model: nn.Module, modules: Mapping[str, nn.Module], config: LoraConfig) -> dict[str, str]:
    """Returns the matching entry of target_modules for each module that has one."""
    entries = (config.target_modules,) if isinstance(config.target_modules, str) else config.target_modules or ()
    if ALL_LINEAR in entries:
        head, others = output_head(model), _no_plain_linears(modules)
        patterns = {
            name: ALL_LINEAR
            for name, module in modules.items()
            if _is_linear(module) and module is not head and name not in others
        }
        named = [entry for entry in entries if entry != ALL_LINEAR]
        chosen = {name: patterns.get(name) or matches(named, name) for name in modules}
        patterns = {name: entry for name, entry in chosen.items() if entry}
    else:
        patterns = {name: entry for name in modules if (entry := matches(config.target_modules, name))}
    return {name: pattern for name, pattern in patterns.items() if not _is_left_out(name, config)}


def _no_plain_linears(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Returns the linear modules that are not called as such, each with the reason; "" if their parent adapts them."""
    found = {f"{name}.out_proj": "" for name, module in modules.items() if isinstance(module, nn.MultiheadAttention)}
    for name, module in modules.items():
        kind = base_class(module)
        if _is_dt_proj(name, modules):
            found[name] = _READS_DT_PROJ
        elif isinstance(module, nn.Linear) and _is_named_router(kind) and not _computes_a_linear(module, kind):
            found[name] = f"{kind.__name__} is a router, which has its own forward"
    return found


def _is_dt_proj(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a module is the dt_proj of a Mamba mixer."""
    path, _, leaf = name.rpartition(".")
    mixer = modules.get(path)
    return leaf == "dt_proj" and mixer is not None and "A_log" in mixer._parameters and "x_proj" in mixer._modules


_READS_DT_PROJ = "Mamba reads this weight without calling the module, so that an adapter of it has no effect in PEFT"


def _is_left_out(name: str, config: LoraConfig) -> bool:
    """Whether exclude_modules, modules_to_save or layers_to_transform exclude a module."""
    chosen = config.layers_to_transform
    return _is_excluded(name, config) or (chosen is not None and _layer_number(name, config) not in _several(chosen))


def _is_excluded(name: str, config: LoraConfig) -> bool:
    parts = name.split(".")
    within_saved = any(config.saves(".".join(parts[: i + 1])) for i in range(len(parts)))
    return within_saved or matches(config.exclude_modules, name) is not None


def _layer_number(name: str, config: LoraConfig) -> int | None:
    """Returns the number of a module's layer: the first number in its name, or the one after layers_pattern."""
    for pattern in _several(config.layers_pattern) or (r"[^.]*",):
        if match := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name):
            return int(match[1])
    return None


def _several(value: Any) -> tuple[Any, ...]:
    """Returns the value of a setting that takes one value or a list, as a tuple."""
    return (value,) if isinstance(value, (int, str)) else tuple(value or ())


def _unused_entry_faults(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    matched: Mapping[str, str],
    adapted: Sequence[str],
    config: LoraConfig,
) -> list[str]:
    """Reports every entry that matches nothing, with what it might have meant.

    `adapted` holds the names of the modules in `matched` and of the expert weights that are adapted.
    """

    def unmatched(setting: str, names: Iterable[str]) -> list[str]:
        value = getattr(config, setting)
        patterns = [(value, value)] if isinstance(value, str) else [(entry, (entry,)) for entry in value or ()]
        return [entry for entry, pattern in patterns if not any(matches(pattern, name) for name in names)]

    faults = []
    # An entry also counts as used if earlier entries in the list already took all its modules.
    entries = [entry for entry in unmatched("target_modules", matched) if entry != ALL_LINEAR or not adapted]
    if entries:
        narrowed = config.exclude_modules or config.modules_to_save or config.layers_to_transform is not None
        after = " (after exclude_modules, modules_to_save and layers_to_transform)" if narrowed else ""
        hints = "".join(_similar_names(model, entry, modules) for entry in entries)
        if isinstance(config.target_modules, str) and "," in config.target_modules:
            names = [name.strip() for name in config.target_modules.split(",")]
            hints = f" A string is one regular expression; to give several names, use a list: {names}."
        faults.append(f"target_modules {entries} match nothing{after}.{hints} {_suggestion(model)}")
    unsaved = [entry for entry in config.modules_to_save or () if not any(name.endswith(entry) for name in modules)]
    there = [*modules, *(f"{n}.{leaf}" for n, m in modules.items() if holds_experts(n, m) for leaf in m._parameters)]
    for setting, entries in (("exclude_modules", unmatched("exclude_modules", there)), ("modules_to_save", unsaved)):
        faults += [f"{setting} {entry!r} matches nothing.{_similar_names(model, entry, modules)}" for entry in entries]
    for setting in ("rank_pattern", "alpha_pattern", "enable_lora"):
        faults += [
            f"{setting}[{key!r}] matches none of the adapted modules.{_similar_names(model, key, adapted)}"
            for key in getattr(config, setting)
            if not any(first_match((key,), name) for name in adapted)
        ]
    used = {_layer_number(name, config) for name in adapted}
    unused = [number for number in _several(config.layers_to_transform) if adapted and number not in used]
    return faults + [f"layers_to_transform names layer {number}, which has no adapted module" for number in unused]


def _similar_names(model: nn.Module, entry: str, names: Iterable[str]) -> str:
    """Returns a hint with module names, cut to as many parts as the entry has, that are similar to it."""
    parameters = [name for name in named_parameters(model) if matches((entry,), name)]
    if any(_is_expert_weight(model, name) for name in parameters):
        return f" {entry!r} is a parameter, not a module: name it in target_parameters."
    if parameters:
        return f" {entry!r} is a parameter, not a module, and cannot be adapted."
    if any(matches((entry,), name) for name in names):
        return ""  # the name exists, but another setting excludes it
    parts = entry.count(".") + 1
    return did_you_mean(entry, dict.fromkeys(".".join(name.split(".")[-parts:]) for name in names))


def _suggestion(model: nn.Module) -> str:
    """Lists what could be adapted, with counts, and suggests a setting to try."""
    if _is_linear(model):
        return (
            "It is a layer itself, but inject() adapts the layers inside a model: wrap it, as in nn.Sequential(layer)."
        )
    head = output_head(model)
    endings = (name.rpartition(".")[2] for name, m in _modules(model).items() if m is not head and _is_linear(m))
    if not (counts := Counter(endings)):
        return "The model has no linear-like modules."
    listing = ", ".join(f"{name} ({count})" for name, count in counts.most_common(12))
    holders = {name: module for name, module in _modules(model).items() if holds_experts(name, module)}
    experts = ", ".join(_known_experts(holders))
    beside = f" Expert weights, for target_parameters: {experts}." if experts else ""
    return f"Linear-like modules: {listing}. Try target_modules=[{next(iter(counts))!r}] or 'all-linear'.{beside}"


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.MultiheadAttention)) or is_conv1d(module)


# Experts, whose weights are three-dimensional parameters.


def _experts(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    config: LoraConfig,
    trained: bool,
    faults: list[str],
) -> list[TargetModule]:
    """Returns the expert modules whose weights are adapted; appends what is impossible to `faults`."""
    holders = {name: module for name, module in modules.items() if holds_experts(name, module)}
    chosen, matrices = _named_parameters_of(model, holders, config, trained, faults)
    unknown = dict[str, str]()
    if config.target_modules is not None and ALL_LINEAR in _several(config.target_modules):
        for name, module in holders.items():
            try:
                for leaf in expert_weights(module):
                    if not _is_left_out(name, config) and not _is_excluded(f"{name}.{leaf}", config):
                        chosen.setdefault(name, {}).setdefault(leaf, ALL_LINEAR)
            except TargetError as error:
                if not _is_left_out(name, config):
                    unknown[name] = str(error)
    if unknown:
        faults.append(_missed_experts(model, unknown))
    targets = []
    for name, entry in matrices.items():
        try:
            if config.lora_dropout and not trained:
                raise TargetError(f"lora_dropout {config.lora_dropout} cannot act inside a router; set it to 0")
            linear = isinstance(modules[name], nn.Linear)
            mixin = _mixin_for(name, modules, config) if linear else mixin_for(LoRARouter, config)
            targets.append(_target(name, entry, mixin, modules, config))
        except TargetError as error:
            faults.append(f"{name}: {error}")
    for name, leaves in chosen.items():
        try:
            targets.append(_experts_target(name, leaves, modules, config, trained))
        except TargetError as error:
            faults.append(f"{name}: {error}")
    return targets


def _experts_target(
    name: str,
    leaves: Mapping[str, str],
    modules: Mapping[str, nn.Module],
    config: LoraConfig,
    trained: bool,
) -> TargetModule:
    module = modules[name]
    weights = [
        ExpertWeight(leaf, config.rank_of(f"{name}.{leaf}"), config.alpha_of(f"{name}.{leaf}"))
        for leaf in expert_weights(module)
        if leaf in leaves
    ]
    for weight in weights:
        _refuse_bypassed(module, weight.name)
        if config.blocks_of(f"{name}.{weight.name}") is not None:
            raise TargetError(f"enable_lora is for linear layers, but {weight.name} holds expert weights")
    if config.init_lora_weights == "eva" and not trained:
        raise TargetError(
            "init_lora_weights 'eva' does not support the experts of a mixture; leave it out, or add them to "
            "exclude_modules"
        )
    target = TargetModule(
        name=name,
        module=module,
        mixin=mixin_for(LoRAExperts, config),
        r=max(weight.r for weight in weights),
        lora_alpha=weights[0].lora_alpha,
        pattern=next(iter(leaves.values())),
        weights=tuple(weights),
    )
    if not trained:
        target.preview().check_rank(target.r)
    return target


def _named_parameters_of(
    model: nn.Module,
    holders: Mapping[str, nn.Module],
    config: LoraConfig,
    trained: bool,
    faults: list[str],
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Returns which weights of which experts, and which routers and linears, target_parameters names, with its entry.

    Appends to `faults`.
    """
    chosen, matrices, used = dict[str, dict[str, str]](), dict[str, str](), set[str]()
    modules = named_modules(model) if config.target_parameters else {}
    for name in named_parameters(model):
        entry = matches(config.target_parameters, name)
        if entry is None:
            continue
        used.add(entry)
        path, _, leaf = name.rpartition(".")
        # PEFT takes any matrix for a parameter; to train one, there is target_modules.
        if leaf == "weight" and (_is_router(modules[path]) or (trained and isinstance(modules[path], nn.Linear))):
            matrices[path] = entry
            continue
        try:
            if config.saved_part(name):
                faults.append(
                    f"target_parameters {entry!r} names {name}, which modules_to_save trains in full; "
                    "leave it out of one of the two"
                )
                continue
            if leaf not in (known := expert_weights(holders[path]) if path in holders else ()):
                faults.append(f"target_parameters {entry!r} names {name}: {_no_expert_weight(known)}")
                continue
        except TargetError as error:
            faults.append(f"target_parameters {entry!r} names {name}: {error}")
            continue
        chosen.setdefault(path, {})[leaf] = entry
    unused = [entry for entry in config.target_parameters or () if entry not in used]
    if unused and not trained:
        faults.append(f"target_parameters {unused} match nothing.{_experts_suggestion(holders)}")
    return chosen, matrices


def _is_router(module: nn.Module) -> bool:
    """Whether a module is a router, judging by its class name, that reads its own 2-D weight, as in transformers 5."""
    weight = module._parameters.get("weight")
    two_dimensional = weight is not None and weight.dim() == 2
    return two_dimensional and _is_named_router(base_class(module)) and not _is_linear(module)


def _is_named_router(kind: type[nn.Module]) -> bool:
    return any(word in kind.__name__.lower() for word in ("router", "gate", "gating"))


def _no_expert_weight(known: Sequence[str]) -> str:
    if known:
        return f"only the experts' {' and '.join(known)} can be adapted"
    return "it is not an expert weight; name the module that holds it in target_modules or modules_to_save"


def _known_experts(holders: Mapping[str, nn.Module]) -> list[str]:
    """Returns the name endings of the expert weights that can be adapted."""
    known = dict[str, None]()
    for name, module in holders.items():
        with contextlib.suppress(TargetError):
            known |= dict.fromkeys(f"{name.rpartition('.')[2]}.{leaf}" for leaf in expert_weights(module))
    return list(known)


def _experts_suggestion(holders: Mapping[str, nn.Module]) -> str:
    if known := _known_experts(holders):
        return f" The experts of this model: {', '.join(known)}."
    return " The model holds no experts as parameters; leave out target_parameters."


def _missed_experts(model: nn.Module, unknown: Mapping[str, str]) -> str:
    name, why = next(iter(unknown.items()))
    return (
        f"'all-linear' would miss the expert weights of {len(unknown)} modules of {type(model).__name__} "
        f"({name}: {why}). {_excluding(list(unknown), _modules(model))}, or name what to adapt "
        "(target_modules=['q_proj', 'v_proj'])."
    )


def _excluding(unfit: Sequence[str], names: Iterable[str]) -> str:
    """Says how to adapt the rest of a model: with name endings, unless others of the names have these too."""
    endings = list(dict.fromkeys(name.rpartition(".")[2] for name in unfit))
    if {name for name in names if matches(endings, name)} > set(unfit):
        endings = list(unfit)
    return f"To adapt everything else, set exclude_modules to {','.join(endings)}"


def _is_expert_weight(model: nn.Module, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    module = named_modules(model).get(path)
    try:
        return module is not None and holds_experts(path, module) and leaf in expert_weights(module)
    except TargetError:
        return False


# What a module can become.  The functions below raise TargetError with only the reason; callers prefix the name.


def _target(
    name: str,
    pattern: str,
    mixin: type[LoRALayer],
    modules: Mapping[str, nn.Module],
    config: LoraConfig,
) -> TargetModule:
    module, parent = modules[name], modules.get(name.rpartition(".")[0])
    _refuse_bypassed(module, mixin._weight_name)
    blocks = None if isinstance(parent, nn.MultiheadAttention) else config.blocks_of(name)
    target = TargetModule(
        name=name,
        module=module,
        mixin=mixin,
        r=config.rank_of(name),
        lora_alpha=config.alpha_of(name),
        pattern=pattern,
        blocks=blocks,
    )
    target.preview().check_rank(target.r)
    if blocks is not None:
        _refuse_blocks(target, len(blocks))
    return target


def _mixin_for(name: str, modules: Mapping[str, nn.Module], config: LoraConfig) -> type[LoRALayer]:
    """Returns the LoRA class for a module, in the variant that the config selects."""
    return mixin_for(_plain_mixin_for(name, modules, config), config)


def _plain_mixin_for(name: str, modules: Mapping[str, nn.Module], config: LoraConfig) -> type[LoRALayer]:
    module, parent = modules[name], modules.get(name.rpartition(".")[0])
    base = base_class(module)
    if isinstance(module, nn.MultiheadAttention):
        if not module._qkv_same_embed_dim:
            raise TargetError("attention with its own kdim or vdim has three separate weights and cannot be adapted")
        _refuse_own_forward(base, nn.MultiheadAttention)
        if config.lora_dropout:
            raise TargetError(
                f"lora_dropout {config.lora_dropout} cannot act inside nn.MultiheadAttention; set it to 0"
            )
        return LoRAMultiheadAttention
    if isinstance(module, NonDynamicallyQuantizableLinear) and isinstance(parent, nn.MultiheadAttention):
        attention = name.split(".")[-2]
        raise TargetError(
            f"nn.MultiheadAttention reads this weight itself; target {attention!r}: in_proj and out_proj are adapted"
        )
    if is_conv1d(module):
        return LoRALinear
    if isinstance(module, nn.Linear):
        if not _computes_a_linear(module, base):
            _refuse_own_forward(base, nn.Linear)
        read = isinstance(parent, nn.TransformerEncoderLayer) or _is_dt_proj(name, modules)
        return LoRAReadLinear if read else LoRALinear
    if isinstance(module, nn.Embedding):
        if name.rpartition(".")[2] == "shared":
            _refuse_shared_table(name, modules)
        if not hasattr(module, "embed_scale"):  # scales the rows (Gemma, BART); see LoRAEmbedding
            _refuse_own_forward(base, nn.Embedding)
        return LoRAEmbedding
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        _refuse_own_forward(base, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        if module.groups != 1:
            raise TargetError(
                f"a convolution with {module.groups} groups has no low-rank update that can be merged; build it with "
                "loralib.Conv2d instead"
            )
        return LoRAConv
    if holds_experts(name, module):
        weights = [f"{name.rpartition('.')[2]}.{leaf}" for leaf in expert_weights(module)]
        raise TargetError(f"it holds expert weights, which are parameters: use target_parameters={weights}")
    inside = dict.fromkeys(
        n.rpartition(".")[2] for n, m in modules.items() if n.startswith(f"{name}.") and _is_linear(m)
    )
    hint = f"; target what is inside it: {', '.join(inside)}" if inside else ""
    raise TargetError(
        f"{base.__name__} cannot be adapted (Linear, Conv1D, Embedding, Conv1d/2d/3d and MultiheadAttention can){hint}"
    )


def _refuse_shared_table(name: str, modules: Mapping[str, nn.Module]) -> None:
    """Refuses the shared embedding of T5, BART and similar models, which is never called; others use its weight."""
    twins = [twin for twin in _twins(name, modules) if isinstance(modules[twin], nn.Embedding)]
    if twins:
        endings = sorted({twin.rpartition(".")[2] for twin in twins})
        raise TargetError(
            f"it only holds the weight of {', '.join(twins)}, which look rows up: target {endings} instead"
        )


def _refuse_own_forward(base: type[nn.Module], *kinds: type[nn.Module]) -> None:
    if base.forward not in [kind.forward for kind in kinds]:
        raise TargetError(f"{base.__name__} has its own forward, to which an update cannot be added safely")


def _computes_a_linear(module: nn.Linear, base: type[nn.Module]) -> bool:
    """Whether a class with its own forward computes ``W x + b`` (as Falcon's does), tested on small tensors."""
    if base.forward is nn.Linear.forward:
        return True
    if module._modules or {*module._parameters} != {"weight", "bias"} or module._buffers:
        return False
    probe = base.__new__(base)
    probe.__dict__.update(module.__dict__, in_features=5, out_features=3)
    generator = torch.Generator().manual_seed(0)
    sizes = {"weight": (3, 5), "bias": (3,)}
    probe.__dict__["_parameters"] = {
        name: None if p is None else nn.Parameter(torch.randn(sizes[name], generator=generator), requires_grad=False)
        for name, p in module._parameters.items()
    }
    x = torch.randn(2, 4, 5, generator=generator)
    try:
        with torch.no_grad():
            y = base.forward(probe, x)
    except Exception:  # it needs more than one input, or has its own sizes
        return False
    ours = nn.functional.linear(x, *probe.__dict__["_parameters"].values())
    return isinstance(y, Tensor) and y.shape == ours.shape and bool(torch.allclose(y, ours, atol=1e-5))


def _refuse_bypassed(module: nn.Module, weight_name: str) -> None:
    """Refuses a module whose class cannot be switched, or where that would silently have no effect."""
    if base_class(module) is type(module) and (names := [n for n in module._parameters if n in ("lora_A", "lora_B")]):
        raise TargetError(
            f"it already has parameters with these names ({', '.join(names)}): is there another LoRA on it?"
        )
    bound = module.__dict__.get("_old_forward" if hasattr(module, "_hf_hook") else "forward")
    if bound is not None and not is_own_forward(module, bound) and not is_in_use(module):
        raise TargetError(
            "its forward was replaced on the instance, which would bypass the adapter; inject before wrapping it"
        )
    if hasattr(module, "parametrizations"):
        raise TargetError("its weight is computed by torch.nn.utils.parametrize; remove the parametrization first")
    weight = module._parameters.get(weight_name)
    if weight is None:
        raise TargetError(
            "its weight is computed by a hook (weight_norm? pruning?), instead of being a parameter; remove the "
            "hook first"
        )
    if not may_adapt(weight):
        raise TargetError("its weight is already spread over processes (FSDP, ZeRO); inject first, then shard")
    if isinstance(weight, UninitializedParameter):
        raise TargetError("it is lazy and has no size yet; run the model once before injecting")
    if not (base := dense(weight)).is_floating_point() or type(base.data) is not Tensor:
        kind = f"{type(base.data).__name__} of {base.dtype}"
        raise TargetError(f"its weight is quantised or of a special type ({kind}), expected a floating-point tensor")
    if weight.is_meta and hasattr(module, "_hf_hook"):
        raise TargetError("its weight is offloaded by accelerate; load the model without offloading this layer")


def is_in_use(module: nn.Module) -> bool:
    """Whether a run or a generation holds the module at the moment; see `loralib.engine.placement`."""
    forward = module.__dict__.get("forward")
    return type(forward).__module__ == "loralib.engine.placement"  # not imported: it comes later in the import order


def is_own_forward(module: nn.Module, bound: object) -> bool:
    """Whether a forward stored on the instance is its class's own: accelerate stores these, and they can be rebound."""
    return getattr(bound, "__self__", None) is module and getattr(bound, "__func__", None) is type(module).forward


def _refuse_blocks(target: TargetModule, count: int) -> None:
    layer = target.preview()
    if not isinstance(layer, LoRALinear):
        raise TargetError(f"enable_lora is for linear layers, not {type(target.module).__name__}")
    outputs = layer._sizes()[1]
    if outputs % count:
        raise TargetError(f"enable_lora has {count} blocks, which does not divide its {outputs} outputs")
