"""Adapt the layers of any model in place: match, check, switch classes, report, and take it all back.

`plan` is the pure half (which modules, with which rank, or every reason why not); `inject` carries it out.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .config import ALL_LINEAR, LoraConfig, first_match, matches
from .errors import TargetError, did_you_mean, list_faults
from .layers import (
    AttentionPath,
    ConvPath,
    EmbeddingPath,
    LinearPath,
    LoRALayer,
    ReadLinearPath,
    adapted_class,
)
from .utils import mark_only_lora_as_trainable

__all__ = [
    "InjectReport",
    "Injection",
    "Target",
    "adapted_layers",
    "disabled",
    "fingerprint",
    "inject",
    "injection_of",
    "merge",
    "plan",
    "remove",
    "unmerge",
]

_RECORD = "_loralib"  # where an injected model keeps its Injection


@dataclass(frozen=True)
class Target:
    """One module to adapt: where it is, what it becomes and with which settings."""

    name: str
    module: nn.Module
    path: type[LoRALayer]
    r: int
    lora_alpha: float
    pattern: str
    blocks: tuple[bool, ...] | None = None
    fan_in_fan_out: bool = False

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the adapter's two tensors by name: what a file must hold for this module."""
        twin = _shadow(self)
        shape_A, shape_B = twin.factor_shapes(self.r)
        key_A, key_B = factor_keys(self.name, self.path)
        return {key_A: shape_A, key_B: shape_B}


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
            f"  adapter size          {self.adapter_bytes / 1e6:>12,.2f} MB",
        ]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


@dataclass
class Injection:
    """What an injected model remembers: its settings and all that `remove` needs."""

    config: LoraConfig
    base: str  # fingerprint taken before anything was changed
    report: InjectReport
    saved: dict[str, nn.Module] = field(default_factory=dict)  # originals of modules_to_save
    biases: dict[str, Tensor] = field(default_factory=dict)  # originals of trained biases
    trainable: dict[str, bool] = field(default_factory=dict)  # requires_grad before


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
    targets = plan(model, config)
    record = Injection(
        config=config,
        base=fingerprint(model),
        report=cast(InjectReport, None),
        trainable={name: p.requires_grad for name, p in model.named_parameters()},
    )
    notes = _notes_on_tied_weights(model, targets)
    for target in targets:
        _adapt(target, config)
    mark_only_lora_as_trainable(model, config.bias)
    if config.bias != "none":
        record.biases = {name: p.detach().clone() for name, p in _biases(model) if p.requires_grad}
    for name in _modules_to_save(model, config):
        record.saved[name] = model.get_submodule(name)
        # A copy, so that a weight tied to it keeps the base's values.
        trained = copy.deepcopy(record.saved[name])
        for parameter in trained.parameters():
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
            parameter.requires_grad_(True)
        _set_submodule(model, name, trained)
    model.__dict__[_RECORD] = record
    if hasattr(model, "save_pretrained"):
        model.__dict__["save_pretrained"] = functools.partial(_save_pretrained, model)
    if any(issubclass(target.path, EmbeddingPath) or target.module is _head(model) for target in targets):
        if hasattr(model, "resize_token_embeddings"):
            model.__dict__["resize_token_embeddings"] = _refuse_to_resize
    record.report = _report(model, config, targets, notes)
    return record.report


def plan(model: nn.Module, config: LoraConfig) -> list[Target]:
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
    record = injection_of(model)
    hand_made = [] if record else [name for name, m in model.named_modules() if isinstance(m, LoRALayer) and m.r > 0]
    if hand_made:
        raise TargetError(
            f"the model already has LoRA layers of its own ({', '.join(hand_made[:3])}, ...); "
            "inject() adapts plain layers"
        )
    modules = {name: module for name, module in model.named_modules() if name}
    matched = _match(model, modules, config)
    faults = _unmatched(model, modules, matched, config)
    targets = []
    for name, pattern in matched.items():
        module = modules[name]
        path = _path_for(name, module, modules, config)
        if isinstance(path, str):
            faults.append(f"{name}: {path}")
            continue
        blocks = config.blocks_of(name)
        target = Target(
            name, module, path, config.rank_of(name), config.alpha_of(name), pattern, blocks, _is_conv1d(module)
        )
        if blocks is not None and (why := _block_fault(target)):
            faults.append(f"{name}: {why}")
            continue
        targets.append(target)
        if isinstance(module, nn.MultiheadAttention):
            # in_proj and out_proj belong together, as in PEFT.
            output = dataclasses.replace(
                target, name=f"{name}.out_proj", module=module.out_proj, path=ReadLinearPath, blocks=None
            )
            targets.append(output)
    if faults:
        count = f"{len(faults)} problem{'s' if len(faults) > 1 else ''}"
        raise TargetError(list_faults(f"{count} with target_modules in {type(model).__name__}", faults))
    return targets


def remove(model: nn.Module) -> None:
    """Takes the adapter off again: the model is bit for bit what it was before `inject`.

    Raises:
        TargetError: the model holds no adapter that `inject` made.
    """
    record = _need_injection(model)
    for name, original in record.saved.items():
        _set_submodule(model, name, _moved_like(original, model.get_submodule(name)))
    with torch.no_grad():
        for name, value in record.biases.items():
            model.get_parameter(name).copy_(value)
    for _, layer in adapted_layers(model):
        _restore(layer)
    for name in (_RECORD, "save_pretrained", "resize_token_embeddings"):
        model.__dict__.pop(name, None)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(record.trainable.get(name, parameter.requires_grad))


def merge(model: nn.Module) -> None:
    """Merges every LoRA layer into its base weight (fp32 arithmetic); see `LoRALayer.merge`.

    Raises:
        MergeError: an adapter holds NaN or infinite values; nothing stays merged.
        TargetError: the model has no LoRA layer.
    """
    layers = adapted_layers(model)
    if not layers:
        raise TargetError(f"{type(model).__name__} has no LoRA layer to merge; inject() or load_adapter() first")
    try:
        for _, layer in layers:
            layer.merge()
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
    were_on, were_merged = [layer.enabled for layer in layers], [layer.merged for layer in layers]
    trained = {name: model.get_submodule(name) for name in record.saved} if record else {}
    biases = {name: model.get_parameter(name).detach().clone() for name in record.biases} if record else {}
    try:
        for layer in layers:
            layer.unmerge()
            layer.enabled = False
        if record:
            for name, original in record.saved.items():
                _set_submodule(model, name, _moved_like(original, trained[name]))
            with torch.no_grad():
                for name, value in record.biases.items():
                    model.get_parameter(name).copy_(value)
        yield
    finally:
        for name, module in trained.items():
            _set_submodule(model, name, module)
        with torch.no_grad():
            for name, value in biases.items():
                model.get_parameter(name).copy_(value)
        for layer, on, was_merged in zip(layers, were_on, were_merged, strict=True):
            layer.enabled = on
            if was_merged:
                layer.merge()


def adapted_layers(model: nn.Module) -> list[tuple[str, LoRALayer]]:
    """Returns the LoRA layers of a model that have an adapter, with their names."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, LoRALayer) and m.r > 0]


def injection_of(model: nn.Module) -> Injection | None:
    """Returns what `inject` left on the model, or None."""
    return cast("Injection | None", model.__dict__.get(_RECORD))


def factor_keys(name: str, path: type[LoRALayer]) -> tuple[str, str]:
    """Returns the names of a module's two tensors in an adapter: embeddings have names of their own, as in PEFT."""
    kind = "lora_embedding_" if issubclass(path, EmbeddingPath) else "lora_"
    return f"{name}.{kind}A", f"{name}.{kind}B"


def fingerprint(model: nn.Module) -> str:
    """Returns a short text that tells base models apart: ``shapes:values``.

    The first half hashes parameter names and shapes, the second strided samples of the values rounded to bf16, so that
    the same base has the same fingerprint in fp32 and in bf16.  LoRA's own parameters do not count.
    """
    record = injection_of(model)
    if record is not None:
        return record.base
    shapes, values = hashlib.sha256(), hashlib.sha256()
    kept = {id(m._parameters[m._weight_name]): m.base_weight for m in model.modules() if isinstance(m, LoRALayer)}
    for name, parameter in model.named_parameters():
        if ".lora_" in f".{name}":
            continue
        parameter = kept.get(id(parameter), parameter)
        shapes.update(f"{name} {tuple(parameter.shape)}\n".encode())
        if parameter.device.type != "meta":
            flat = parameter.detach().reshape(-1)
            samples = flat[:: max(1, flat.numel() // 64)][:64].to("cpu", torch.bfloat16)
            values.update(samples.view(torch.int16).numpy().tobytes())
    return f"{shapes.hexdigest()[:16]}:{values.hexdigest()[:16]}"


# Matching.


def _match(model: nn.Module, modules: Mapping[str, nn.Module], config: LoraConfig) -> dict[str, str]:
    """Returns the pattern that fits each matched module."""
    matched: dict[str, str] = {}
    everything = config.target_modules == ALL_LINEAR
    head = _head(model)
    if everything:
        _refuse_expert_weights(model, config)
    inside_attention = {f"{name}.out_proj" for name, m in modules.items() if isinstance(m, nn.MultiheadAttention)}
    for name, module in modules.items():
        if everything:
            linear_like = isinstance(module, (nn.Linear, nn.MultiheadAttention)) or _is_conv1d(module)
            pattern = ALL_LINEAR if linear_like and module is not head and name not in inside_attention else None
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
    return any(re.match(rf"(^|.*\.){re.escape(saved)}($|\..*)", name) for saved in config.modules_to_save or ())


def _in_layers(name: str, config: LoraConfig) -> bool:
    chosen = config.layers_to_transform
    numbers = (chosen,) if isinstance(chosen, int) else tuple(chosen or ())
    patterns = (config.layers_pattern,) if isinstance(config.layers_pattern, str) else config.layers_pattern
    for pattern in patterns or (r"[^.]*",):
        found = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name)
        if found:
            return int(found[1]) in numbers
    return False


def _unmatched(
    model: nn.Module, modules: Mapping[str, nn.Module], matched: Mapping[str, str], config: LoraConfig
) -> list[str]:
    """Names every pattern of the config that fits no module."""
    faults = []
    wanted = config.target_modules
    patterns = [wanted] if isinstance(wanted, str) else list(wanted or ())
    used = set(matched.values())
    # An entry counts as used also where an earlier one of the list took all its modules.
    missing = [
        p
        for p in patterns
        if p not in used and not any(matches([p] if not isinstance(wanted, str) else p, name) for name in matched)
    ]
    if missing:
        near = "".join(did_you_mean(p, {name.rsplit(".", 1)[-1] for name in modules}) for p in missing)
        hidden = " (after exclude_modules, modules_to_save and layers_to_transform)" if _narrowed(config) else ""
        faults.append(f"target_modules {missing} match nothing{hidden}.{near} {_suggestion(model)}")
    for name in ("rank_pattern", "alpha_pattern", "enable_lora"):
        for key in getattr(config, name):
            if not any(first_match({key: None}, module) for module in matched):
                faults.append(f"{name}[{key!r}] matches none of the adapted modules")
    exclude = config.exclude_modules
    for entry in [exclude] if isinstance(exclude, str) else list(exclude or ()):
        if not any(matches([entry] if not isinstance(exclude, str) else entry, name) for name in modules):
            faults.append(f"exclude_modules {entry!r} matches nothing")
    for entry in config.modules_to_save or ():
        if not any(name == entry or name.endswith(f".{entry}") for name in modules):
            faults.append(f"modules_to_save {entry!r} matches nothing")
    if config.layers_to_transform is not None and matched:
        chosen = config.layers_to_transform
        for number in (chosen,) if isinstance(chosen, int) else chosen:
            only = config.replace(layers_to_transform=[number])
            if not any(_in_layers(name, only) for name in matched):
                faults.append(f"layers_to_transform names layer {number}, which has no adapted module")
    return faults


def _narrowed(config: LoraConfig) -> bool:
    return bool(config.exclude_modules or config.modules_to_save or config.layers_to_transform is not None)


def _suggestion(model: nn.Module) -> str:
    """Names what could be adapted, with counts, and something to try."""
    head = _head(model)
    linear = [name for name, m in model.named_modules() if name and m is not head and _looks_linear(m)]
    if not linear:
        return "The model has no linear-like module."
    counts = Counter(name.rsplit(".", 1)[-1] for name in linear)
    listing = ", ".join(f"{name} ({count})" for name, count in counts.most_common(12))
    return f"Linear-like modules: {listing}. Try target_modules=[{next(iter(counts))!r}] or 'all-linear'."


def _looks_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.MultiheadAttention)) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D (a linear layer whose weight is stored (in, out))."""
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)


def _head(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    return cast("nn.Module | None", get()) if callable(get) else None


def _refuse_expert_weights(model: nn.Module, config: LoraConfig) -> None:
    """Mixture-of-experts models keep their experts in 3-D parameters, which no linear layer holds."""
    experts = [
        name for name, p in model.named_parameters() if p.dim() == 3 and "expert" in name and "lora_" not in name
    ]
    if experts and not matches(config.exclude_modules, experts[0].rsplit(".", 1)[0]):
        raise TargetError(
            f"'all-linear' would miss {len(experts)} expert weights of {type(model).__name__} that are stored as 3-D "
            f"parameters ({experts[0]}, ...), which cannot be adapted. To adapt the other layers on purpose, name them "
            "(target_modules=['q_proj', 'v_proj']), or add the experts to exclude_modules."
        )


# What a module can become.


def _path_for(
    name: str, module: nn.Module, modules: Mapping[str, nn.Module], config: LoraConfig
) -> type[LoRALayer] | str:
    """Returns the mixin for a module, or the reason why it cannot be adapted."""
    base = _base_class(module)
    why = _bypass(module, base)
    if why:
        return why
    parent = modules.get(name.rpartition(".")[0])
    if isinstance(module, nn.MultiheadAttention):
        if not module._qkv_same_embed_dim:
            return "attention with kdim or vdim of its own keeps three weights and cannot be adapted"
        if config.lora_dropout:
            return f"lora_dropout {config.lora_dropout} cannot act inside nn.MultiheadAttention; set it to 0"
        return AttentionPath
    if isinstance(module, NonDynamicallyQuantizableLinear) and isinstance(parent, nn.MultiheadAttention):
        attention = name.rpartition(".")[0].rpartition(".")[2]
        return f"nn.MultiheadAttention reads this weight itself; target {attention!r}: in_proj and out_proj are adapted"
    if _is_conv1d(module) or base.forward is nn.Linear.forward:
        return ReadLinearPath if isinstance(parent, (nn.TransformerEncoderLayer, nn.MultiheadAttention)) else LinearPath
    if isinstance(module, nn.Embedding):
        if base.forward is not nn.Embedding.forward and not hasattr(module, "embed_scale"):
            return f"{base.__name__} computes something else than an nn.Embedding"
        return EmbeddingPath
    if base.forward in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward):
        if cast(nn.Conv2d, module).groups != 1:
            return (
                f"a convolution in {cast(nn.Conv2d, module).groups} groups has no low-rank update that can be merged; "
                "build it with loralib.Conv2d instead"
            )
        return ConvPath
    if isinstance(module, nn.Linear):
        return f"{base.__name__} has a forward of its own, which an update could not be added to safely"
    inside = [
        child.rpartition(".")[2] for child, m in modules.items() if child.startswith(f"{name}.") and _looks_linear(m)
    ]
    hint = f"; target what is inside it: {', '.join(dict.fromkeys(inside))}" if inside else ""
    return (
        f"{base.__name__} cannot be adapted (Linear, Conv1D, Embedding, Conv1d/2d/3d and MultiheadAttention can){hint}"
    )


def _bypass(module: nn.Module, base: type[nn.Module]) -> str | None:
    """Returns why switching the class of this module would silently do nothing, if so."""
    own = module.__dict__.get("forward")
    if own is not None and not _is_accelerate_hook(module):
        return "its forward was replaced on the instance, which would bypass the adapter; inject before wrapping it"
    if hasattr(module, "parametrizations"):
        return "its weight is computed by torch.nn.utils.parametrize; remove the parametrization first"
    if isinstance(module, (nn.Linear, nn.Embedding)):
        weight = module._parameters.get("weight")
        if weight is None:
            return "its weight is computed by a hook (weight_norm?), not held as a parameter"
        if not weight.is_floating_point() or type(weight.data) is not Tensor:
            return (
                f"its weight is quantised ({type(weight).__name__} of {weight.dtype}), expected a floating-point tensor"
            )
    return None


def _is_accelerate_hook(module: nn.Module) -> bool:
    """accelerate puts a forward on the instance that calls the kept, bound `_old_forward`."""
    old = module.__dict__.get("_old_forward")
    return hasattr(module, "_hf_hook") and getattr(old, "__self__", None) is module


def _block_fault(target: Target) -> str | None:
    blocks = target.blocks or ()
    if not issubclass(target.path, LinearPath):
        return f"enable_lora is for linear layers, not {type(target.module).__name__}"
    outputs = cast(LinearPath, _shadow(dataclasses.replace(target, blocks=None)))._sizes()[1]
    if outputs % len(blocks):
        return f"enable_lora has {len(blocks)} blocks, which does not divide its {outputs} outputs"
    return None


def _base_class(module: nn.Module) -> type[nn.Module]:
    halves = type(module).__dict__.get("_halves")
    return halves[1] if halves else type(module)


# Carrying it out.


def _adapt(target: Target, config: LoraConfig) -> None:
    module, base = target.module, type(target.module)
    module.__class__ = adapted_class(target.path, base)
    layer = cast(LoRALayer, module)
    if issubclass(target.path, LinearPath):
        layer.fan_in_fan_out, layer.blocks = target.fan_in_fan_out, target.blocks  # type: ignore[assignment]
    layer._init_lora(target.r, target.lora_alpha, config.lora_dropout, False, config.use_rslora)
    _rebind_accelerate(layer)


def _restore(layer: LoRALayer) -> None:
    layer.unmerge()
    for name in ("lora_A", "lora_B"):
        delattr(layer, name)
    for name in ("r", "lora_alpha", "lora_dropout", "scaling", "merge_weights", "enabled", "fan_in_fan_out", "blocks"):
        layer.__dict__.pop(name, None)
    layer.__class__ = _base_class(layer)  # type: ignore[assignment]
    _rebind_accelerate(layer)


def _rebind_accelerate(module: nn.Module) -> None:
    if "_old_forward" in module.__dict__ and hasattr(module, "_hf_hook"):
        module.__dict__["_old_forward"] = type(module).forward.__get__(module)


def _shadow(target: Target) -> LoRALayer:
    """Returns a throw-away view of the module as the layer it will become, to ask it for shapes."""
    cls = adapted_class(target.path, _base_class(target.module))
    twin = cls.__new__(cls)
    twin.__dict__.update(target.module.__dict__)
    if issubclass(target.path, LinearPath):
        twin.__dict__.update(fan_in_fan_out=target.fan_in_fan_out, blocks=target.blocks)
    return twin


def _modules_to_save(model: nn.Module, config: LoraConfig) -> list[str]:
    entries = config.modules_to_save or ()
    return [name for name, _ in model.named_modules() if any(name == e or name.endswith(f".{e}") for e in entries)]


def _biases(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if "lora_" not in name)


def _set_submodule(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _moved_like(original: nn.Module, current: nn.Module) -> nn.Module:
    """The model may have been moved since; what was set aside follows it."""
    where = next(current.parameters(), None)
    return original if where is None else original.to(where.device)


def _notes_on_tied_weights(model: nn.Module, targets: Sequence[Target]) -> tuple[str, ...]:
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    notes = []
    for target in targets:
        weight = target.module._parameters.get("weight")
        twins = [name for name in owners.get(id(weight), []) if name != target.name]
        if weight is not None and twins:
            notes.append(
                f"{target.name} shares its weight with {', '.join(twins)}: the update acts in {target.name} alone "
                "(as in PEFT), and merging gives it a weight of its own"
            )
    return tuple(notes)


def _report(model: nn.Module, config: LoraConfig, targets: Sequence[Target], notes: tuple[str, ...]) -> InjectReport:
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


def _save_pretrained(model: nn.Module, save_directory: Any, **kwargs: Any) -> None:
    """Saves the adapter, as PEFT's models do; transformers' own would write factors that from_pretrained drops."""
    from loralib import save_adapter  # through the public name, at call time: the formats stand above this module

    save_adapter(model, save_directory)


def _refuse_to_resize(*args: Any, **kwargs: Any) -> None:
    raise TargetError(
        "the token embeddings (or the head) are adapted, and resizing them would break the adapter: "
        "remove(model), resize, then inject() again"
    )
