"""Adapt the layers of any model in place: match, check, switch classes, report, and take it all back.

`match_modules` is the pure half (which modules, with which rank, or every reason why not); `inject` carries it out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedParameter

from .config import ALL_LINEAR, LoraConfig, first_match, matches
from .console import size
from .delta import dense
from .errors import MergeError, TargetError, did_you_mean, list_faults
from .layers import (
    LoRAConv,
    LoRAEmbedding,
    LoRALayer,
    LoRALinear,
    LoRAMultiheadAttention,
    LoRAReadLinear,
    adapted_class,
    is_conv1d,
)
from .utils import mark_only_lora_as_trainable

__all__ = [
    "InjectReport",
    "Injection",
    "TargetModule",
    "adapted_layers",
    "disabled",
    "fingerprint",
    "inject",
    "injection_of",
    "match_modules",
    "merge",
    "remove",
    "unmerge",
]

_RECORD = "_loralib"  # where an injected model keeps its Injection


@dataclass(frozen=True)
class TargetModule:
    """One module to adapt: where it is, what it becomes and with which settings."""

    name: str
    module: nn.Module
    mixin: type[LoRALayer]
    r: int
    lora_alpha: float
    pattern: str
    blocks: tuple[bool, ...] | None = None
    fan_in_fan_out: bool = False

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the adapter's tensors by name: what a file must hold for this module."""
        layer = _as_adapted(self)
        keys = layer.tensor_keys()
        return {f"{self.name}.{keys[name]}": shape for name, shape in layer.tensor_shapes(self.r).items()}


@dataclass(frozen=True)
class InjectReport:
    """What `inject` did; ``print(report)`` shows it as a table.

    Attributes:
        model: class name of the model.
        patterns: how many modules each pattern matched.
        targets: the names of the adapted modules.
        trainable, total: numbers of parameters.
        adapter_bytes: size of the trained tensors, in bytes.
        notes: what a user should know, one sentence each.
    """

    model: str
    patterns: Mapping[str, int]
    targets: tuple[str, ...]
    trainable: int
    total: int
    adapter_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def frozen(self) -> int:
        """How many parameters do not train."""
        return self.total - self.trainable

    def __str__(self) -> str:
        width = max(len("pattern"), *(len(pattern) for pattern in self.patterns))
        lines = [f"LoRA on {self.model}", f"  {'pattern':<{width}}  modules"]
        lines += [f"  {pattern:<{width}}  {count:>7,}" for pattern, count in self.patterns.items()]
        share = 100 * self.trainable / self.total
        lines += [
            f"  trainable parameters  {self.trainable:>15,}  ({share:.2f}%)",
            f"  frozen parameters     {self.frozen:>15,}  ({100 - share:.2f}%)",
            f"  total parameters      {self.total:>15,}",
            f"  adapter size          {size(self.adapter_bytes):>15}",
        ]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


@dataclass
class Injection:
    """What an injected model remembers: its settings and all that `remove` needs."""

    config: LoraConfig
    trainable: dict[str, bool]  # requires_grad before
    originals: dict[str, Tensor] = field(default_factory=dict)  # what copies train in place of: biases, modules_to_save


def inject(model: nn.Module, config: LoraConfig) -> InjectReport:
    """Adapts a model in place and freezes all but the adapter.

    Args:
        model: any torch.nn or transformers model.  Linear, Embedding, Conv1d/2d/3d, nn.MultiheadAttention and
            transformers' Conv1D can be adapted.
        config: which modules, with which rank; see `loralib.LoraConfig`.

    Returns:
        What was matched, and the parameter counts; ``print`` it.

    Raises:
        TargetError: a pattern matches nothing, a module cannot be adapted, or the model holds an adapter already.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> inject(model, LoraConfig(r=2, target_modules=["0"])).targets
    ('0',)
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['0.lora_A', '0.lora_B']
    """
    if injection_of(model) is not None:
        raise TargetError(
            f"{type(model).__name__} holds an adapter already; remove(model) first, or let load_adapter() replace it"
        )
    targets = match_modules(model, config)
    notes = _notes(model, targets, config)
    trainable = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    record = model.__dict__[_RECORD] = Injection(config, trainable)
    try:
        for target in targets:
            _adapt(target, config)
        mark_only_lora_as_trainable(model)
        in_full = fully_trained_tensors(model, config, [(target.name, target.module) for target in targets])
        record.originals = _put(model, _copies(in_full))
        _guard_methods(model)
        return _report(model, targets, notes)
    except BaseException:
        remove(model)
        raise


def match_modules(model: nn.Module, config: LoraConfig) -> list[TargetModule]:
    """Finds the modules that a config adapts, without touching the model.

    Args:
        model: may hold an adapter that `inject` made: the plan is for its base.
        config: see `inject`.

    Returns:
        One entry a module, in the model's order.

    Raises:
        TargetError: as `inject`; all faults are reported together.
    """
    if config.use_dora or config.lora_bias or config.init_lora_weights not in (True, "kaiming"):
        asked = "use_dora" if config.use_dora else "lora_bias" if config.lora_bias else "init_lora_weights"
        raise TargetError(
            f"{asked} = {getattr(config, asked)!r} cannot be injected; LoRA and rsLoRA with the default start can. "
            "Convert such an adapter with `loralib convert --target peft` first."
        )
    if config.target_modules is None:
        raise TargetError(f"target_modules is not given. {_suggestion(model)}")
    hand_made = [] if injection_of(model) else [name for name, _ in adapted_layers(model)]
    if hand_made:
        raise TargetError(
            f"{type(model).__name__} already has LoRA layers of its own ({', '.join(hand_made[:3])}"
            f"{', ...' if len(hand_made) > 3 else ''}); inject() adapts plain layers"
        )
    modules = dict(_modules(model))
    matched = _match(model, config)
    faults = _unmatched(model, modules, matched, config)
    targets = list[TargetModule]()
    for name, pattern in matched.items():
        module = modules[name]
        path = _path_for(name, module, modules, config)
        if isinstance(path, str):
            faults.append(f"{name}: {path}")
            continue
        blocks = config.blocks_of(name)
        target = TargetModule(
            name, module, path, config.rank_of(name), config.alpha_of(name), pattern, blocks, is_conv1d(module)
        )
        if blocks is not None and (why := _block_fault(target)):
            faults.append(f"{name}: {why}")
            continue
        targets.append(target)
        if isinstance(module, nn.MultiheadAttention):
            # in_proj and out_proj belong together, as in PEFT.
            output = TargetModule(
                name=(inner := f"{name}.out_proj"),
                module=module.out_proj,
                mixin=LoRAReadLinear,
                r=config.rank_of(inner),
                lora_alpha=config.alpha_of(inner),
                pattern=pattern,
            )
            if why := _bypass(output.module, output.mixin._weight_name):
                faults.append(f"{output.name}: {why}")
            targets.append(output)
    if faults:
        count = f"{len(faults)} problem{'s' if len(faults) > 1 else ''}"
        raise TargetError(list_faults(f"{count} with target_modules in {type(model).__name__}", faults))
    return targets


def remove(model: nn.Module) -> None:
    """Takes the adapter off again: the model is bit for bit what it was before `inject`.

    Raises:
        TargetError: the model holds no adapter that `inject` made, or what was put on top of it must come off first.
    """
    record = _need_injection(model)
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, LoRALayer)]
    wrapped = [name for name, layer in layers if "_halves" not in type(layer).__dict__ and layer.r > 0]
    if wrapped:
        raise TargetError(
            f"{', '.join(wrapped)}: torch.nn.utils.parametrize has changed the class since inject(); "
            "remove_parametrizations() first"
        )
    _put(model, _moved(model, record.originals))
    for _, layer in layers:
        _restore(layer)
    for name in (_RECORD, "save_pretrained", "resize_token_embeddings"):
        model.__dict__.pop(name, None)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(record.trainable.get(name, parameter.requires_grad))


def merge(model: nn.Module) -> None:
    """Merges every LoRA layer into its base weight (fp32 arithmetic); see `LoRALayer.merge`.

    Raises:
        MergeError: adapters hold NaN or infinite values, or are switched off by `disabled`; nothing stays merged.
        TargetError: the model has no LoRA layer.
    """
    layers = adapted_layers(model)
    if not layers:
        raise TargetError(f"{type(model).__name__} has no LoRA layer to merge; inject() or load_adapter() first")
    faults = []
    try:
        for name, layer in layers:
            try:
                layer.merge()
            except MergeError as error:
                faults.append(f"{name}: {error}")
        if faults:
            raise MergeError(list_faults(f"{len(faults)} of {len(layers)} layers cannot be merged; none was", faults))
    except BaseException:
        unmerge(model)
        raise


def unmerge(model: nn.Module) -> None:
    """Puts every base weight back, bit for bit."""
    for _, layer in adapted_layers(model):
        layer.unmerge()


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Lets the model compute as its base inside a ``with`` block, whether it is merged or not.

    >>> model = nn.Sequential(nn.Linear(4, 4))
    >>> x = torch.ones(1, 4); before = model(x)
    >>> _ = inject(model, LoraConfig(r=2, target_modules=["0"]))
    >>> _ = nn.init.ones_(model[0].lora_B)
    >>> with disabled(model):
    ...     bool((model(x) == before).all())
    True
    >>> bool((model(x) == before).all())
    False
    """
    record = injection_of(model)
    layers = [layer for _, layer in adapted_layers(model)]
    before = [(layer.enabled, layer.merged) for layer in layers]
    trained = dict[str, Tensor]()
    try:
        for layer in layers:
            layer.unmerge()
            layer.enabled = False
        if record is not None:
            trained = _put(model, _moved(model, record.originals))
        yield
    finally:
        _put(model, trained)
        for layer, (enabled, merged) in zip(layers, before, strict=True):
            layer.enabled = enabled
            if merged and not (layer.merge_weights and layer.training):  # train() would have unmerged it
                layer.merge()


def fully_trained_tensors(
    model: nn.Module, config: LoraConfig, adapted: Iterable[tuple[str, nn.Module]]
) -> dict[str, Tensor]:
    """Returns what a config trains besides low-rank factors, by name: biases, and all that modules_to_save hold.

    Args:
        model: plain or adapted.
        config: `bias` and `modules_to_save` count.
        adapted: the adapted modules with their names, for ``bias="lora_only"``.
    """
    chosen = dict[str, Tensor]()
    if config.bias == "all":
        # PEFT leaves out in_proj_bias where it adapts the attention.
        left_out = {f"{name}.in_proj_bias" for name, module in adapted if isinstance(module, nn.MultiheadAttention)}
        parameters = model.named_parameters(remove_duplicate=False)
        chosen |= {n: p for n, p in parameters if "bias" in n and "lora_" not in n and n not in left_out}
    elif config.bias == "lora_only":
        biases = ((f"{name}.bias", module._parameters.get("bias")) for name, module in adapted)
        chosen |= {name: bias for name, bias in biases if bias is not None}
    for name, module in model.named_modules():
        if config.saves(name):
            state = module.state_dict(prefix=f"{name}.", keep_vars=True)
            chosen |= {key: tensor for key, tensor in state.items() if isinstance(tensor, Tensor)}
    return chosen


def applicable(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """Returns the config of a finished adapter without what says nothing about this model.

    PEFT lets entries that match nothing pass, and writes some itself (``modules_to_save=["classifier", "score"]``).
    When an adapter is loaded its tensors decide what is adapted, so such entries may go; for `inject` they are errors.
    """
    idle = _idle(model, dict(_modules(model)), _match(model, config), config)
    changes: dict[str, Any] = {}
    for knob, entries in idle.items():
        value = getattr(config, knob)
        if isinstance(value, Mapping):
            changes[knob] = {key: setting for key, setting in value.items() if key not in entries}
        elif not isinstance(value, (str, int)) and set(value) - set(entries):
            changes[knob] = [entry for entry in value if entry not in entries]
        elif knob not in ("target_modules", "layers_to_transform"):
            changes[knob] = None
    if not config.changes_base:  # another start, once trained, is like any other
        changes["init_lora_weights"] = True
    return config.replace(**changes)


def adapted_layers(model: nn.Module) -> list[tuple[str, LoRALayer]]:
    """Returns the LoRA layers of a model that have an adapter, with their names."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, LoRALayer) and m.r > 0]


def injection_of(model: nn.Module) -> Injection | None:
    """Returns what `inject` left on the model, or None."""
    return cast("Injection | None", model.__dict__.get(_RECORD))


def fingerprint(model: nn.Module) -> str:
    """Returns a short text that tells base models apart: ``shapes:values``.

    The first half hashes parameter names and shapes, the second strided samples of the values rounded to bf16, so that
    the same base has the same fingerprint in fp32 and in bf16.  LoRA's own parameters do not count.
    """
    record = injection_of(model)
    originals = record.originals if record is not None else {}
    merged = {id(m._parameters[m._weight_name]): m.base_weight for m in model.modules() if isinstance(m, LoRALayer)}
    shapes, values = hashlib.sha256(), hashlib.sha256()
    seen = set[int]()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter = cast(nn.Parameter, originals.get(name, merged.get(id(parameter), parameter)))
        if ".lora_" in f".{name}" or id(parameter) in seen:
            continue
        seen.add(id(parameter))
        shapes.update(f"{name} {tuple(dense(parameter).shape)}\n".encode())
        if not parameter.is_meta:
            flat = dense(parameter).detach().reshape(-1)
            samples = flat[:: max(1, flat.numel() // 64)][:64].to("cpu", torch.bfloat16)
            values.update(bytes(samples.contiguous().view(torch.uint8).tolist()))
    return f"{shapes.hexdigest()[:16]}:{values.hexdigest()[:16]}"


# Matching.


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if name)


def _match(model: nn.Module, config: LoraConfig) -> dict[str, str]:
    """Returns the pattern that fits each matched module."""
    matched: dict[str, str] = {}
    everything = config.target_modules == ALL_LINEAR
    head = _head(model)
    if everything:
        _refuse_expert_weights(model, config)
    inside_attention = {f"{name}.out_proj" for name, m in _modules(model) if isinstance(m, nn.MultiheadAttention)}
    for name, module in _modules(model):
        if everything:
            chosen = _looks_linear(module) and module is not head and name not in inside_attention
            pattern = ALL_LINEAR if chosen else None
        else:
            pattern = matches(config.target_modules, name)
        if pattern is None or _excluded(name, config):
            continue
        if config.layers_to_transform is not None and not _in_layers(name, config):
            continue
        matched[name] = pattern
    return matched


def _excluded(name: str, config: LoraConfig) -> bool:
    return matches(config.exclude_modules, name) is not None or _within_saved(name, config)


def _within_saved(name: str, config: LoraConfig) -> bool:
    parts = name.split(".")
    return any(config.saves(".".join(parts[: i + 1])) for i in range(len(parts)))


def _in_layers(name: str, config: LoraConfig) -> bool:
    chosen = config.layers_to_transform
    return _layer_number(name, config) in ((chosen,) if isinstance(chosen, int) else chosen or ())


def _layer_number(name: str, config: LoraConfig) -> int | None:
    """Returns which layer a module belongs to: the first number in its name, or the one after layers_pattern."""
    for pattern in _entries(config.layers_pattern) or (r"[^.]*",):
        if found := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name):
            return int(found[1])
    return None


def _idle(
    model: nn.Module, modules: Mapping[str, nn.Module], matched: Mapping[str, str], config: LoraConfig
) -> dict[str, list[Any]]:
    """Returns the entries of each knob that match nothing."""

    def fits(entry: str, knob: str, names: Iterable[str]) -> bool:
        pattern = entry if isinstance(getattr(config, knob), str) else (entry,)
        return any(matches(pattern, name) for name in names)

    idle: dict[str, list[Any]] = {}
    # An entry counts as used also where an earlier one of the list took all its modules.
    wanted = _entries(config.target_modules)
    idle["target_modules"] = [e for e in wanted if e != ALL_LINEAR and not fits(e, "target_modules", matched)]
    if config.target_modules == ALL_LINEAR and not matched:
        idle["target_modules"] = [ALL_LINEAR]
    for knob in ("rank_pattern", "alpha_pattern", "enable_lora"):
        idle[knob] = [key for key in getattr(config, knob) if not any(first_match({key: None}, n) for n in matched)]
    idle["exclude_modules"] = [e for e in _entries(config.exclude_modules) if not fits(e, "exclude_modules", modules)]
    idle["modules_to_save"] = [e for e in config.modules_to_save or () if not any(n.endswith(e) for n in modules)]
    if config.layers_to_transform is not None:
        chosen = config.layers_to_transform
        numbers = (chosen,) if isinstance(chosen, int) else chosen
        used = {_layer_number(name, config) for name in matched}
        idle["layers_to_transform"] = [number for number in numbers if number not in used]
    return {knob: entries for knob, entries in idle.items() if entries}


def _unmatched(
    model: nn.Module, modules: Mapping[str, nn.Module], matched: Mapping[str, str], config: LoraConfig
) -> list[str]:
    """Says of every entry of the config that matches nothing what it might have meant."""
    faults = []
    for knob, entries in _idle(model, modules, matched, config).items():
        if knob == "target_modules":
            hidden = " (after exclude_modules, modules_to_save and layers_to_transform)" if _narrowed(config) else ""
            near = "".join(_near(model, entry, modules) for entry in entries)
            faults.append(f"target_modules {entries} match nothing{hidden}.{near} {_suggestion(model)}")
        elif knob == "layers_to_transform":
            if matched:
                faults += [f"layers_to_transform names layer {n}, which has no adapted module" for n in entries]
        elif knob in ("exclude_modules", "modules_to_save"):
            faults += [f"{knob} {entry!r} matches nothing.{_near(model, entry, modules)}" for entry in entries]
        else:
            faults += [
                f"{knob}[{key!r}] matches none of the adapted modules.{_near(model, key, matched)}" for key in entries
            ]
    return faults


def _near(model: nn.Module, entry: str, names: Iterable[str]) -> str:
    """Returns which module names, cut to as many parts as the entry has, are like it."""
    if any(name == entry or name.endswith(f".{entry}") for name, _ in model.named_parameters()):
        return f" {entry!r} is a parameter, not a module, and cannot be adapted."
    parts = entry.count(".") + 1
    if any(matches((entry,), name) for name in names):
        return ""  # it is there, and left out by another setting
    return did_you_mean(entry, dict.fromkeys(".".join(name.split(".")[-parts:]) for name in names))


def _entries(value: str | Sequence[str] | None) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def _narrowed(config: LoraConfig) -> bool:
    return bool(config.exclude_modules or config.modules_to_save or config.layers_to_transform is not None)


def _suggestion(model: nn.Module) -> str:
    """Names what could be adapted, with counts, and something to try."""
    head = _head(model)
    linear = [name for name, m in model.named_modules() if name and m is not head and _looks_linear(m)]
    if _looks_linear(model):
        return "It is a layer itself: inject() adapts what is inside a model, as nn.Sequential(layer)."
    if not linear:
        return "The model has no linear-like module."
    counts = Counter(name.rsplit(".", 1)[-1] for name in linear)
    listing = ", ".join(f"{name} ({count})" for name, count in counts.most_common(12))
    return f"Linear-like modules: {listing}. Try target_modules=[{next(iter(counts))!r}] or 'all-linear'."


def _looks_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.MultiheadAttention)) or is_conv1d(module)


def _head(model: nn.Module) -> nn.Module | None:
    try:
        return cast("nn.Module | None", model.get_output_embeddings())  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):  # no transformers model, or one without a head
        return None


def _refuse_expert_weights(model: nn.Module, config: LoraConfig) -> None:
    """Mixture-of-experts models keep their experts in parameters of their own, which no linear layer holds."""
    experts = [
        f"{name}.{leaf}"
        for name, module in _modules(model)
        for leaf, parameter in module.named_parameters(recurse=False)
        if "expert" in f"{name}.{type(module).__name__}".lower()
        and parameter.dim() > 1
        and not isinstance(module, nn.Embedding)
        and not _looks_linear(module)
        and not _excluded(name, config)
    ]
    if experts:
        raise TargetError(
            f"'all-linear' would miss {len(experts)} expert weights of {type(model).__name__} ({experts[0]}, ...): "
            "they are parameters of their own, not linear layers, and cannot be adapted. To adapt the other layers on "
            "purpose, name them (target_modules=['q_proj', 'v_proj']), or add the experts to exclude_modules."
        )


# What a module can become.


def _path_for(
    name: str, module: nn.Module, modules: Mapping[str, nn.Module], config: LoraConfig
) -> type[LoRALayer] | str:
    """Returns the mixin for a module, or the reason why it cannot be adapted."""
    base = _base_class(module)
    parent = modules.get(name.rpartition(".")[0])
    path = _kind(name, module, base, parent, modules)
    if isinstance(path, str):
        return path
    if issubclass(path, LoRAMultiheadAttention) and config.lora_dropout:
        return f"lora_dropout {config.lora_dropout} cannot act inside nn.MultiheadAttention; set it to 0"
    return _bypass(module, path._weight_name) or path


def _kind(
    name: str,
    module: nn.Module,
    base: type[nn.Module],
    parent: nn.Module | None,
    modules: Mapping[str, nn.Module],
) -> type[LoRALayer] | str:
    if isinstance(module, nn.MultiheadAttention):
        if not module._qkv_same_embed_dim:
            return "attention with kdim or vdim of its own keeps three weights and cannot be adapted"
        return LoRAMultiheadAttention if base.forward is nn.MultiheadAttention.forward else _own_forward(base)
    if isinstance(module, NonDynamicallyQuantizableLinear) and isinstance(parent, nn.MultiheadAttention):
        attention = name.rpartition(".")[0].rpartition(".")[2]
        return f"nn.MultiheadAttention reads this weight itself; target {attention!r}: in_proj and out_proj are adapted"
    if is_conv1d(module):
        return LoRALinear
    if isinstance(module, nn.Linear):
        if base.forward is not nn.Linear.forward:
            return _own_forward(base)
        return LoRAReadLinear if isinstance(parent, nn.TransformerEncoderLayer) else LoRALinear
    if isinstance(module, nn.Embedding):
        twins = [n for n, m in modules.items() if m is not module and _same_table(m, module)]
        if twins and name.rpartition(".")[2] == "shared":  # T5, BART and their like
            ends = sorted({twin.rpartition(".")[2] for twin in twins})
            return f"it only holds the weight of {', '.join(twins)}, which look rows up: target {ends} instead"
        # What has an embed_scale multiplies the rows with it (Gemma, BART); others do who knows what.
        scaled = base.forward is not nn.Embedding.forward and hasattr(module, "embed_scale")
        return LoRAEmbedding if scaled or base.forward is nn.Embedding.forward else _own_forward(base)
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        if base.forward not in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward):
            return _own_forward(base)
        if module.groups != 1:
            return (
                f"a convolution in {module.groups} groups has no low-rank update that can be merged; "
                "build it with loralib.Conv2d instead"
            )
        return LoRAConv
    inside = [
        child.rpartition(".")[2] for child, m in modules.items() if child.startswith(f"{name}.") and _looks_linear(m)
    ]
    hint = f"; target what is inside it: {', '.join(dict.fromkeys(inside))}" if inside else ""
    return (
        f"{base.__name__} cannot be adapted (Linear, Conv1D, Embedding, Conv1d/2d/3d and MultiheadAttention can){hint}"
    )


def _same_table(one: nn.Module, other: nn.Module) -> bool:
    return isinstance(one, nn.Embedding) and one._parameters.get("weight") is other._parameters.get("weight")


def _own_forward(base: type[nn.Module]) -> str:
    return f"{base.__name__} has a forward of its own, which an update could not be added to safely"


def _bypass(module: nn.Module, weight_name: str) -> str | None:
    """Returns why switching the class of this module would silently do nothing, or could not be done, if so."""
    bound = module.__dict__.get("_old_forward" if hasattr(module, "_hf_hook") else "forward")
    if bound is not None and not _is_own_forward(module, bound):
        return "its forward was replaced on the instance, which would bypass the adapter; inject before wrapping it"
    if hasattr(module, "parametrizations"):
        return "its weight is computed by torch.nn.utils.parametrize; remove the parametrization first"
    weight = module._parameters.get(weight_name)
    if weight is None:
        return "its weight is computed by a hook (weight_norm? pruning?), not held as a parameter; remove that first"
    if isinstance(weight, UninitializedParameter):
        return "it is lazy and has no size yet; run the model once before injecting"
    if not weight.is_floating_point() or type(weight.data) is not Tensor:
        kind = f"{type(weight.data).__name__} of {weight.dtype}"
        return f"its weight is quantised or of a special kind ({kind}), expected a floating-point tensor"
    if weight.is_meta and hasattr(module, "_hf_hook"):
        return "its weight is offloaded by accelerate; load the model without offloading this layer"
    return None


def _is_own_forward(module: nn.Module, bound: object) -> bool:
    """Whether a forward kept on the instance is its class's: accelerate leaves such ones, and they can be renewed."""
    return getattr(bound, "__self__", None) is module and getattr(bound, "__func__", None) is type(module).forward


def _block_fault(target: TargetModule) -> str | None:
    blocks = target.blocks or ()
    if not issubclass(target.mixin, LoRALinear):
        return f"enable_lora is for linear layers, not {type(target.module).__name__}"
    outputs = cast(LoRALinear, _as_adapted(dataclasses.replace(target, blocks=None)))._sizes()[1]
    if outputs % len(blocks):
        return f"enable_lora has {len(blocks)} blocks, which does not divide its {outputs} outputs"
    return None


def _base_class(module: nn.Module) -> type[nn.Module]:
    halves = type(module).__dict__.get("_halves")
    return halves[1] if halves else type(module)


# Carrying it out.


def _adapt(target: TargetModule, config: LoraConfig) -> None:
    layer = cast(LoRALayer, target.module)
    _switch_class(layer, adapted_class(target.mixin, type(target.module)))
    if isinstance(layer, LoRALinear):
        layer.fan_in_fan_out, layer.blocks = target.fan_in_fan_out, target.blocks
    layer._init_lora(target.r, target.lora_alpha, config.lora_dropout, False, config.use_rslora)


def _restore(layer: LoRALayer) -> None:
    halves = type(layer).__dict__.get("_halves")
    if halves is None:  # built from loralib's layers, with r = 0
        return
    layer.unmerge()
    for name in layer.trained_tensors():
        del layer._parameters[name]
    for mixin in halves[0].__mro__:
        if issubclass(mixin, LoRALayer):
            for name in mixin.__annotations__:
                layer.__dict__.pop(name, None)
    _switch_class(layer, halves[1])


def _switch_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Makes a module another class's, and renews what accelerate's hooks keep: the forward, bound to the instance."""
    for name in ("forward", "_old_forward"):
        if _is_own_forward(module, module.__dict__.get(name)):
            module.__dict__[name] = cls.forward.__get__(module)
    module.__class__ = cls


def _as_adapted(target: TargetModule) -> LoRALayer:
    """Returns a throw-away view of the module as the layer it will become, to ask it for shapes."""
    cls = adapted_class(target.mixin, _base_class(target.module))
    twin = cls.__new__(cls)
    twin.__dict__.update(target.module.__dict__)
    if issubclass(target.mixin, LoRALinear):
        twin.__dict__.update(fan_in_fan_out=target.fan_in_fan_out, blocks=target.blocks)
    return twin


# Parameters and buffers by name.


def _put(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Puts parameters and buffers in their places and returns what was there."""
    places = {name: (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in tensors}
    before = {name: _held(module, leaf) for name, (module, leaf) in places.items()}
    for name, (module, leaf) in places.items():
        setattr(module, leaf, tensors[name])
    return before


def _held(module: nn.Module, leaf: str) -> Tensor:
    return cast(Tensor, module._parameters[leaf] if leaf in module._parameters else module._buffers[leaf])


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns copies that train, so that a weight tied to an original keeps the base's values."""
    copies = dict[int, Tensor]()  # names of one tensor share one copy
    for tensor in tensors.values():
        if id(tensor) not in copies:
            copy = tensor.detach().clone()
            trains = isinstance(tensor, nn.Parameter)
            copies[id(tensor)] = nn.Parameter(copy, requires_grad=copy.is_floating_point()) if trains else copy
    return {name: copies[id(tensor)] for name, tensor in tensors.items()}


def _moved(model: nn.Module, originals: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The model may have been moved or cast since: what was set aside follows it."""
    for name, original in originals.items():
        now = _held(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
        original.data = original.data.to(now.device, now.dtype)
    return originals


def _notes(model: nn.Module, targets: Sequence[TargetModule], config: LoraConfig) -> tuple[str, ...]:
    """Returns what a user should know about tied weights, and about training in full in half precision."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    notes = []
    for target in targets:
        weight = target.module._parameters.get(target.mixin._weight_name)
        twins = [name for name in owners[id(weight)] if name != target.name]
        if twins:
            notes.append(
                f"{target.name} shares its weight with {', '.join(twins)}: the update acts in {target.name} alone "
                "(as in PEFT), and merging gives it a weight of its own"
            )
    attention = [target.name for target in targets if issubclass(target.mixin, LoRAMultiheadAttention)]
    if attention:
        notes.append(
            f"{attention[0]}: PEFT up to 0.21 applies the update of out_proj twice (huggingface/peft#3774), which an "
            "adapter exchanged with it must not forget; here it is applied once"
        )
    in_full = fully_trained_tensors(model, config, [(target.name, target.module) for target in targets])
    half = [name for name, t in in_full.items() if t.dtype in (torch.bfloat16, torch.float16)]
    if half:
        notes.append(
            f"{len(half)} tensors ({half[0]}, ...) train in full in {in_full[half[0]].dtype}, where small updates are "
            "lost: load the base model in fp32 to train them well"
        )
    return tuple(notes)


def _report(model: nn.Module, targets: Sequence[TargetModule], notes: tuple[str, ...]) -> InjectReport:
    trained = [p for p in model.parameters() if p.requires_grad]
    return InjectReport(
        model=type(model).__name__,
        patterns=dict(Counter(target.pattern for target in targets)),
        targets=tuple(target.name for target in targets),
        trainable=sum(p.numel() for p in trained),
        total=sum(p.numel() for p in model.parameters()),
        adapter_bytes=sum(p.numel() * p.element_size() for p in trained),
        notes=notes,
    )


def _need_injection(model: nn.Module) -> Injection:
    record = injection_of(model)
    if record is None:
        raise TargetError(f"{type(model).__name__} holds no adapter; inject() or load_adapter() puts one on")
    return record


# What transformers' own methods would get wrong on an adapted model.


def _guard_methods(model: nn.Module) -> None:
    if hasattr(model, "save_pretrained"):
        model.__dict__["save_pretrained"] = functools.partial(_save_pretrained, model)
    if hasattr(model, "resize_token_embeddings"):
        model.__dict__["resize_token_embeddings"] = functools.partial(_resize_token_embeddings, model)


def _save_pretrained(
    model: nn.Module, save_directory: Any, is_main_process: bool = True, push_to_hub: bool = False, **kwargs: Any
) -> None:
    """Saves the adapter, as PEFT's models do; transformers' own would write factors that from_pretrained drops."""
    from loralib import save_adapter  # through the public name, at call time: the formats stand above this module

    if push_to_hub:
        raise TargetError("push_to_hub is not done for an adapter; save it, and upload the directory")
    if is_main_process:
        save_adapter(model, save_directory)


def _resize_token_embeddings(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Resizes embeddings that the adapter leaves alone: it would not survive those that it adapts."""
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):  # type: ignore[operator]
        if isinstance(table, LoRALayer) or (table is not None and any(p.requires_grad for p in table.parameters())):
            raise TargetError(
                "the token embeddings (or the head) are adapted or trained, and resizing them would break the adapter: "
                "remove(model), resize, then inject() again"
            )
    resized = type(model).resize_token_embeddings(model, *args, **kwargs)  # type: ignore[attr-defined]
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):  # type: ignore[operator]
        if table is not None:
            table.requires_grad_(False)  # new tables come trainable
    return resized
