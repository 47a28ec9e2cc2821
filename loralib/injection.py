"""Adapts the layers of any model in place, and undoes it.

`inject` asks `loralib.targets.match_modules` which modules to adapt, then switches their classes: the base weights stay
the same Parameters under the same names, so that `remove` can restore the model bit for bit.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import operator
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from .blocks import mixed_blocks
from .config import LoraConfig, with_ranks
from .console import counted, size
from .delta import dense
from .errors import BusyModelError, ConfigError, MergeError, TargetError, list_faults
from .layers import LoRALayer, LoRALinear, LoRAMultiheadAttention, adapted_class
from .targets import (
    HEADS,
    TargetModule,
    fully_trained_tensors,
    is_in_use,
    is_own_forward,
    left_out,
    match_modules,
    tied_modules,
    unsaved_head,
    with_head,
)
from .variants import EvaStart, eva_start, share_rows
from .wrapping import (
    input_table,
    is_spread,
    named_modules,
    named_parameters,
    output_head,
    refuse_process_groups,
    submodule,
    unwrapped,
)

__all__ = [
    "InjectReport",
    "Injection",
    "adapted_layers",
    "adapted_model",
    "disabled",
    "eva_start_for",
    "find_targets",
    "fingerprint",
    "first_fingerprint",
    "inject",
    "inject_targets",
    "injection_of",
    "merge",
    "quantization_of",
    "refuse_in_use",
    "refuse_peft",
    "remove",
    "samples_of",
    "table_rows",
    "tensor_at",
    "token_tables",
    "unmerge",
]

WRAP_LATER = (
    "which would not synchronise an adapter added later between processes: add the adapter first, then wrap the model"
)
_RECORD = "_loralib"  # attribute of an injected model that holds its Injection


@dataclass(frozen=True, repr=False)
class InjectReport:
    """What `inject` did; ``print(report)`` shows it as a table.

    Attributes:
        model: class name of the model.
        patterns: number of modules that each pattern matched.
        targets: the names of the adapted modules.
        trainable, total: numbers of parameters.
        adapter_bytes: size of the trained tensors, in bytes.
        notes: anything unexpected that the user should know, one sentence each.
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
        """The number of parameters that are not trained."""
        return self.total - self.trainable

    def __repr__(self) -> str:
        notes = f"; notes: {len(self.notes)}" if self.notes else ""
        return (
            f"InjectReport({self.model}: {len(self.targets)} modules, {self.trainable:,} of {self.total:,} parameters "
            f"train{notes}; print it for more)"
        )

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
    """The record kept on an injected model: its settings and everything that `remove` needs.

    Attributes:
        config: the settings that were injected.
        trainable: requires_grad of each parameter before the injection.
        originals: tensors of the base that are trained in full; copies of them are trained in their place.
        layers: the names of the adapted modules.
        carried: which of the originals were replaced by a tensor that the adapter ships untrained.
    """

    config: LoraConfig
    trainable: dict[str, bool]
    originals: dict[str, Tensor] = field(default_factory=dict)
    layers: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()


def inject(
    model: nn.Module, config: LoraConfig, batches: Iterable[Any] | None = None, eva: EvaStart | None = None
) -> InjectReport:
    """Adapts a model in place and freezes everything but the adapter.

    Args:
        model: any torch.nn or transformers model.  Linear, Embedding, Conv1d/2d/3d, nn.MultiheadAttention and
            transformers' Conv1D can be adapted.
        config: which modules to adapt and with which rank; see `loralib.LoraConfig`.  May be a `peft.LoraConfig`.  With
            task_type "SEQ_CLS", "TOKEN_CLS" or "QUESTION_ANS" the model's head is trained too, as in PEFT.
        batches: for ``init_lora_weights="eva"``: some of the data, each batch as the model is called with it: a tensor,
            or keyword arguments, of which "attention_mask" and "labels" select the tokens that count, as in PEFT.
        eva: instead of batches, a result of `loralib.injection.eva_start_for`, to share among models with the same
            base.

    Returns:
        What was matched, and the parameter counts; ``print`` it.

    Raises:
        BusyModelError: the model is generating or being trained.
        TargetError: a pattern matches nothing, a module cannot be adapted, or the model already holds an adapter.
        ConfigError: PEFT's config uses features that are not trained here; or batches are missing or unusable.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> inject(model, LoraConfig(r=2, target_modules=["0"])).targets
    ('0',)
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['0.lora_A', '0.lora_B']
    """
    config = LoraConfig.of(config)
    refuse_process_groups(model, WRAP_LATER)
    model = unwrapped(model)
    refuse_peft(model)
    refuse_in_use(model)
    if injection_of(model) is not None:
        raise TargetError(
            f"{type(model).__name__} already holds an adapter; call remove(model) first, or let load_adapter() "
            "replace it"
        )
    by_hand = [name for name, _ in adapted_layers(model)]
    if by_hand:
        raise TargetError(
            f"{type(model).__name__} already has LoRA layers of its own ({', '.join(by_hand[:3])}"
            f"{', ...' if len(by_hand) > 3 else ''}); inject() adapts plain layers"
        )
    config = with_head(model, config)
    targets = find_targets(model, config)
    if config.init_lora_weights != "eva":
        if batches is not None or eva is not None:
            raise ConfigError(
                f"batches are only for init_lora_weights 'eva', but it is {config.init_lora_weights!r}; leave them out"
            )
        return inject_targets(model, config, targets)
    return _inject_eva(model, config, targets, eva or _eva_start(model, config, targets, batches))


def find_targets(model: nn.Module, config: LoraConfig) -> list[TargetModule]:
    """Returns the modules that `inject` would adapt, without changing any.

    Raises:
        TargetError: as in `inject`.
    """
    targets = match_modules(model, with_head(model, config))
    if faults := mixed_blocks(model, targets):
        raise TargetError(list_faults("these projections are not fused from equal blocks", faults))
    if config.init_lora_weights == "eva":
        others = [target for target in targets if not (issubclass(target.mixin, LoRALinear) or target.token_indices)]
        if faults := [f"{target.name} is of class {type(target.module).__name__}" for target in others]:
            fix = "Leave them out of target_modules, or leave out init_lora_weights."
            raise TargetError(list_faults("init_lora_weights 'eva' is for linear layers alone", faults, fix))
    return targets


def eva_start_for(model: nn.Module, config: LoraConfig, batches: Iterable[Any]) -> EvaStart:
    """Returns the EVA initialisation that `inject` would compute from these batches, for a config that uses EVA."""
    return _eva_start(model, config, find_targets(model, config), batches)


def _eva_start(
    model: nn.Module, config: LoraConfig, targets: Sequence[TargetModule], batches: Iterable[Any] | None
) -> EvaStart:
    if batches is None:
        raise ConfigError(
            "init_lora_weights is 'eva', which starts from data: call inject(model, config, batches), or let train() "
            "do it; without data, use 'pissa'"
        )
    return eva_start(model, _linears(targets), batches, config)


def _linears(targets: Sequence[TargetModule]) -> list[TargetModule]:
    return [target for target in targets if issubclass(target.mixin, LoRALinear)]


def _inject_eva(model: nn.Module, config: LoraConfig, targets: Sequence[TargetModule], start: EvaStart) -> InjectReport:
    """Adapts a model with the ranks and initial factors chosen by EVA; see `loralib.variants.eva`."""
    left = [target.name for target in targets if target.name in start.A]
    tables = {target.name for target in targets if target.token_indices}
    plain = config.replace(init_lora_weights=True, eva_config=None)
    plain = with_ranks(
        plain, {name: len(start.A[name]) for name in left}, {name: start.lora_alphas[name] for name in left}
    )
    if len(left) + len(tables) < len(targets):
        plain = plain.targeting("|".join(map(re.escape, left)))
    report = inject_targets(model, plain, match_modules(model, plain))
    with torch.no_grad():
        for name, layer in adapted_layers(model):
            if name in start.A:
                layer.lora_A.copy_(start.A[name])
    return report


def refuse_peft(model: nn.Module) -> None:
    """Refuses models that hold a PEFT adapter, which would train alongside ours but not be saved with it.

    Raises:
        TargetError: the model holds one.
    """
    theirs = [name for name, m in named_modules(model).items() if type(m).__module__.partition(".")[0] == "peft"]
    if theirs:
        where = f"its part {theirs[0]!r}" if theirs[0] else "it"
        raise TargetError(
            f"{type(model).__name__} holds an adapter of PEFT ({where} is PEFT's), which would not be trained or "
            "saved with loralib's. Merge it (model = model.merge_and_unload()) or remove it (model = "
            "model.unload()) first; to continue from it in loralib: model.save_pretrained(DIR), then "
            "load_adapter(base, DIR)"
        )


def refuse_in_use(model: nn.Module) -> None:
    """Refuses to change a model that another thread, or a Generator that is not finished, computes with.

    Raises:
        BusyModelError: the model is in use; the texts that it is generating would come from two adapters.
    """
    if any(map(is_in_use, named_modules(model).values())):
        raise BusyModelError(
            f"this {type(model).__name__} is generating, being evaluated or being trained, and its adapter cannot be "
            "changed meanwhile. Wait for that to end (close or finish a Generator), or use a copy of the model; a "
            "loralib.Bank generates with many adapters at once."
        )


def inject_targets(
    model: nn.Module, config: LoraConfig, targets: Sequence[TargetModule], carried: Mapping[str, Tensor] | None = None
) -> InjectReport:
    """Adapts modules of a model that holds no adapter: the part of `inject` that changes the model.

    Args:
        model: as in `inject`.
        config: as in `inject`.
        targets: what `loralib.targets.match_modules` returned for them.
        carried: untrained tensors by name that replace those of the base.
    """
    notes = _notes(model, targets, config)
    trainable = {name: p.requires_grad for name, p in named_parameters(model).items()}
    layers = tuple(target.name for target in targets)
    record = model.__dict__[_RECORD] = Injection(config, trainable, layers=layers)
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for target in targets:
            _adapt(target, config)
        share_rows([target.module for target in targets])
        in_full = fully_trained_tensors(model, config, [(target.name, target.module) for target in targets])
        record.originals = _swap_tensors(model, _trainable_copies(in_full, config))
        record.originals |= _swap_tensors(model, _carried(model, carried or {}))
        record.carried = tuple(carried or ())
        _guard_methods(model)
        return _report(model, targets, notes)
    except BaseException:
        if not is_spread(model):  # a failed injection leaves it unusable anyway; see `remove`
            remove(model)
        raise


def remove(model: nn.Module) -> None:
    """Removes the adapter: the model is restored bit for bit to what it was before `inject`.

    Raises:
        BusyModelError: the model is generating or being trained.
        TargetError: the model holds no adapter made by `inject`, or something applied on top must be removed first.
    """
    spread, model = is_spread(model), adapted_model(model)
    refuse_in_use(model)
    record = injection_of(model)
    if record is None:
        raise TargetError(f"{type(model).__name__} holds no adapter; add one with inject() or load_adapter()")
    layers = [(name, m) for name, m in named_modules(model).items() if isinstance(m, LoRALayer)]
    if spread:
        raise TargetError(
            "the model is spread over processes (FSDP, ZeRO), which would keep what is removed; reload it instead"
        )
    wrapped = [name for name, layer in layers if "_halves" not in type(layer).__dict__ and layer.r > 0]
    if wrapped:
        raise TargetError(
            f"{', '.join(wrapped)}: torch.nn.utils.parametrize has changed the class since inject(); call "
            "remove_parametrizations() first"
        )
    _swap_tensors(model, _originals(model, record))
    for _, layer in layers:
        _restore(layer)
    for name in (_RECORD, "save_pretrained", "resize_token_embeddings"):
        model.__dict__.pop(name, None)
    for name, parameter in named_parameters(model).items():
        parameter.requires_grad_(record.trainable.get(name, parameter.requires_grad))


def merge(model: nn.Module) -> None:
    """Merges every LoRA layer into its base weight (in fp32 arithmetic); see `LoRALayer.merge`.

    Raises:
        BusyModelError: the model is generating or being trained.
        MergeError: the adapter holds NaN or infinite values, or is switched off by `disabled`; nothing is left merged.
        TargetError: the model has no LoRA layer.
    """
    refuse_in_use(model)
    layers = adapted_layers(model)
    if not layers:
        raise TargetError(f"{type(model).__name__} has no LoRA layer to merge; call inject() or load_adapter() first")
    if is_spread(model):
        raise MergeError(
            "the model is spread over processes (FSDP, ZeRO), which would continue with their own copies of the "
            "weights; call save_adapter(), and merge in one process: load the base, load_adapter(), merge()"
        )
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
    """Restores every base weight, bit for bit.

    Raises:
        BusyModelError: the model is generating or being trained.
    """
    merged = [layer for _, layer in adapted_layers(model) if layer.merged]
    if merged:
        refuse_in_use(model)
    for layer in merged:
        layer.unmerge()


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Makes the model compute like its base inside a ``with`` block, whether it is merged or not.

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
    injected = [(m, m.__dict__[_RECORD]) for m in named_modules(model).values() if _RECORD in m.__dict__]
    layers = [layer for _, layer in adapted_layers(model)]
    if is_spread(model) and any(record.originals for _, record in injected):
        raise TargetError(
            "modules_to_save cannot be switched off while the model is spread over processes (FSDP, ZeRO)"
        )
    before = [(layer.enabled, layer.merged) for layer in layers]
    trained = list[tuple[nn.Module, dict[str, Tensor]]]()
    try:
        for layer in layers:
            layer.unmerge()
            layer.enabled = False
        for part, record in injected:
            trained.append((part, _swap_tensors(part, _originals(part, record))))
        yield
    finally:
        for part, tensors in trained:
            _swap_tensors(part, tensors)
        for layer, (enabled, merged) in zip(layers, before, strict=True):
            layer.enabled = enabled
            if merged and not (layer.merge_weights and layer.training):  # train() would have unmerged it
                layer.merge()


def adapted_layers(model: nn.Module) -> list[tuple[str, LoRALayer]]:
    """Returns a model's LoRA layers with rank above 0, with their names."""
    return [(name, m) for name, m in named_modules(model).items() if isinstance(m, LoRALayer) and m.r > 0]


def injection_of(model: nn.Module) -> Injection | None:
    """Returns the record that `inject` left on the model, or None."""
    return cast("Injection | None", unwrapped(model).__dict__.get(_RECORD))


def adapted_model(model: nn.Module) -> nn.Module:
    """Returns the model that holds an adapter, or could hold one, without its wrappers.

    Raises:
        TargetError: only a part of the model holds an adapter, so that the model's names differ from the adapter's; or
            modules that `inject` adapted have been replaced.
    """
    model = unwrapped(model)
    record = injection_of(model)
    modules = named_modules(model)
    if record is None:
        # A transformers model may have the adapter in its body; its own names apply then.
        whole = hasattr(type(model), "base_model_prefix")
        for name, part in () if whole else modules.items():
            if _RECORD in part.__dict__:
                raise TargetError(
                    f"{type(model).__name__} holds no adapter itself; its part {name!r} ({type(part).__name__}) does, "
                    f"so pass model.get_submodule({name!r})"
                )
        return model
    gone = [name for name in record.layers if not isinstance(modules.get(name), LoRALayer)]
    if gone:
        kinds = ", ".join(f"{name} is {_kind(modules.get(name))}" for name in gone[:3])
        raise TargetError(
            f"{len(gone)} of {len(record.layers)} adapted modules were replaced or wrapped after inject(): {kinds}. "
            "Undo that first: the adapter uses the names in the model"
        )
    return model


def _kind(module: nn.Module | None) -> str:
    return "not there" if module is None else f"now a {type(module).__name__} of {type(module).__module__}"


def fingerprint(
    model: nn.Module, left_out: Collection[str] = (), rows: int | None = None, *, in_fp16: bool = False
) -> str:
    """Returns a short string that identifies a base model to an adapter, in the form ``shapes:values``.

    The first part hashes parameter names and shapes, the second strided samples of the values rounded to bf16, so that
    a base has the same fingerprint in fp32 and in bf16.  Token tables may be padded later: only their first `rows` rows
    count, with extra samples from the last of these, and a third part of the fingerprint gives the number of rows.

    Args:
        model: with or without an adapter, whose own parameters are ignored.
        left_out: names of parameters that the adapter ships.
        rows: how many rows of the token tables to include; default: all.
        in_fp16: compute it as if the model had been loaded in fp16, which has fewer small numbers than bf16.
    """
    record = injection_of(model)
    originals: Mapping[str, Tensor] = record.originals if record is not None else {}
    tables = token_tables(model)
    rows = table_rows(model) if rows is None else rows
    shapes, values = hashlib.sha256(), hashlib.sha256()
    seen = set[int]()
    # Sorted by name, because undoing a pruning changes the order of a module's parameters.
    for name, parameter in sorted(_base_parameters(model, originals), key=operator.itemgetter(0)):
        if name in left_out or id(parameter) in seen:
            continue
        seen.add(id(parameter))
        is_table = name.rpartition(".")[0] in tables
        shapes.update(f"{name} {('rows', *parameter.shape[1:]) if is_table else tuple(parameter.shape)}\n".encode())
        if parameter.is_meta:
            continue
        if is_table:
            _update(values, samples_of_table(parameter, rows), in_fp16=in_fp16)
        else:
            _update(values, samples_of(parameter), in_fp16=in_fp16)
    return f"{shapes.hexdigest()[:16]}:{values.hexdigest()[:16]}" + (f":{rows}" if tables else "")


def first_fingerprint(model: nn.Module) -> str:
    """Returns the old form of the fingerprint, ``shapes:values``, which included what an adapter ships."""
    record = injection_of(model)
    shapes, values = hashlib.sha256(), hashlib.sha256()
    seen = set[int]()
    for name, parameter in _base_parameters(model, record.originals if record is not None else {}):
        if ".lora_" in f".{name}" or id(parameter) in seen:
            continue
        seen.add(id(parameter))
        shapes.update(f"{name} {tuple(parameter.shape)}\n".encode())
        if not parameter.is_meta:
            _update(values, samples_of(parameter))
    return f"{shapes.hexdigest()[:16]}:{values.hexdigest()[:16]}"


def quantization_of(model: nn.Module) -> str:
    """Returns how a base's weights are quantised, as in `loralib.load_base`; "none" if they are not."""
    tables, kinds, ending = token_tables(model), set[str](), ""
    for name, weight in _base_parameters(model, {}):
        if getattr(weight, "ROUNDED", False):
            if name.rpartition(".")[0] in tables:
                ending = "+tables"
            else:
                kinds.add(weight.KIND)  # type: ignore[attr-defined]
    return ("+".join(sorted(kinds)) or "none") + ending


_LAST_ROWS = 16


def samples_of(weight: Tensor, count: int = 64) -> Tensor:
    """Returns samples from all over a weight, for fingerprints; quantised weights keep those of the original.

    Args:
        weight: of any shape.
        count: maximum number of samples.
    """
    kept = getattr(weight, "samples", None)
    if kept is not None:
        return cast(Tensor, kept)
    flat = dense(weight).detach().reshape(-1)
    return flat[:: max(1, flat.numel() // count)][:count].cpu()


def samples_of_table(table: Tensor, rows: int | None = None) -> Tensor:
    """Returns samples from the first `rows` rows of a table, and more from the last of them; see `samples_of`."""
    kept = getattr(table, "samples", None)
    if kept is not None and rows in (None, len(table)):
        return cast(Tensor, kept)
    weight = dense(table).detach()[:rows]
    return torch.cat([samples_of(weight), samples_of(weight[-_LAST_ROWS:], 64 * _LAST_ROWS)])


def _update(digest: Any, samples: Tensor, *, in_fp16: bool = False) -> None:
    samples = (samples.half() if in_fp16 else samples).to(torch.bfloat16)
    digest.update(bytes(samples.contiguous().view(torch.uint8).tolist()))


def _base_parameters(model: nn.Module, originals: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yields the base's parameters by name, even if the adapter has replaced them."""
    for path, module in named_modules(model, remove_duplicate=False).items():
        own = module.trained_tensors() if isinstance(module, LoRALayer) else {}
        for leaf, parameter in module._parameters.items():
            if parameter is not None and leaf not in own:
                name = f"{path}.{leaf}" if path else leaf
                kept = isinstance(module, LoRALayer) and module.merged and leaf in module.weight_names
                base = cast(LoRALayer, module).base_weight_of(leaf) if kept else parameter
                yield name, originals.get(name, base)


def token_tables(model: nn.Module) -> dict[str, nn.Module]:
    """Returns a transformers model's embedding and head by name, i.e. the tables that have a row per token."""
    inner = unwrapped(model)
    ids = {id(unwrapped(table)) for table in (input_table(inner), output_head(inner)) if table is not None}
    return {name: m for name, m in named_modules(model, remove_duplicate=False).items() if id(m) in ids}


def table_rows(model: nn.Module) -> int:
    """Returns the number of rows in a model's token tables; 0 if it has none."""
    weights = [table._parameters.get("weight") for table in token_tables(model).values()]
    return max((weight.shape[0] for weight in weights if weight is not None), default=0)


# One layer.


def _adapt(target: TargetModule, config: LoraConfig) -> None:
    layer = cast(LoRALayer, target.module)
    _switch_class(layer, adapted_class(target.mixin, type(target.module)))
    for name, value in target.attributes.items():
        setattr(layer, name, value)
    start = config.init_lora_weights
    layer._init_lora(target.r, target.lora_alpha, config.lora_dropout, False, config.use_rslora, start)


def _restore(layer: LoRALayer) -> None:
    halves = type(layer).__dict__.get("_halves")
    if halves is None:  # a layer of loralib's own, with r = 0
        return
    layer.unmerge()
    for name in layer.trained_tensors():
        del layer._parameters[name]
    for name in layer.fixed_names:
        delattr(layer, name)
    for mixin in halves[0].__mro__:
        if issubclass(mixin, LoRALayer):
            for name in mixin.__annotations__:
                layer.__dict__.pop(name, None)
    _switch_class(layer, halves[1])


def _switch_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Changes a module's class, and rebinds the forward that accelerate's hooks store on the instance."""
    for name in ("forward", "_old_forward"):
        if is_own_forward(module, module.__dict__.get(name)):
            module.__dict__[name] = cls.forward.__get__(module)
    module.__class__ = cls


# Parameters and buffers by name.


def _swap_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replaces parameters and buffers and returns the previous ones."""
    before = {name: tensor_at(model, name) for name in tensors}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        setattr(submodule(model, module), leaf, tensor)
    return before


def tensor_at(model: nn.Module, name: str) -> Tensor:
    """Returns a parameter or buffer by its name in the unwrapped model."""
    path, _, leaf = name.rpartition(".")
    module = submodule(model, path)
    return cast(Tensor, module._parameters[leaf] if leaf in module._parameters else module._buffers[leaf])


def _trainable_copies(tensors: Mapping[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """Returns trainable copies, so that a weight tied to an original keeps the base's values.

    Each module in modules_to_save gets its own copy, as in PEFT: a tied head and embedding are separated.
    """
    copies = dict[tuple[str, int], Tensor]()  # names that share a tensor share one copy
    for name, tensor in tensors.items():
        key = (config.saved_part(name), id(tensor))
        if key not in copies:
            copy = tensor.detach().clone()
            if isinstance(tensor, nn.Parameter):
                copy = nn.Parameter(copy, requires_grad=copy.is_floating_point())
            copies[key] = copy
    return {name: copies[config.saved_part(name), id(tensor)] for name, tensor in tensors.items()}


def _carried(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors that an adapter ships, in the model's dtypes; equal tensors under tied names stay one."""
    found, ours = dict[int, list[tuple[Tensor, Tensor]]](), dict[str, Tensor]()
    for name, tensor in tensors.items():
        old = tensor_at(model, name)
        twins = found.setdefault(id(old), [])
        new = next((new for seen, new in twins if torch.equal(seen, tensor)), None)
        if new is None:
            new = tensor.detach().clone().to(old.device, old.dtype)
            new = nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new
            twins.append((tensor, new))
        ours[name] = new
    return ours


def _originals(model: nn.Module, record: Injection) -> Mapping[str, Tensor]:
    """Returns the originals that were set aside, on the device and in the dtype that the model has by now."""
    for name, original in record.originals.items():
        copy = tensor_at(model, name)
        original.data = original.data.to(copy.device, copy.dtype)
    return record.originals


def _notes(model: nn.Module, targets: Sequence[TargetModule], config: LoraConfig) -> tuple[str, ...]:
    """Returns notes for the user, for example on tied weights or on full training in half precision."""
    notes = [
        f"{name} shares its weight with {twins}: the update acts only in {name} (as in PEFT), and merging gives it "
        "its own weight"
        for name, twins in tied_modules(model, targets).items()
    ]
    reasons: dict[str, list[str]] = {}
    for name, why in left_out(model, config).items():
        reasons.setdefault(why, []).append(name)
    notes += [
        f"'all-linear' leaves out {counted(len(names), 'module')} ({names[0]}): {why}" for why, names in reasons.items()
    ]
    attention = [target.name for target in targets if issubclass(target.mixin, LoRAMultiheadAttention)]
    if attention:
        notes.append(
            f"{attention[0]}: PEFT up to 0.21 applies the update of out_proj twice (huggingface/peft#3774), which "
            "matters if you exchange adapters with it; loralib applies it once"
        )
    parts = {} if hasattr(type(model), "base_model_prefix") else named_modules(model)
    whole = next((name for name, part in parts.items() if hasattr(type(part), "base_model_prefix")), None)
    if whole and all(target.name.startswith(f"{whole}.") for target in targets):
        notes.append(
            f"names in the adapter begin with {whole!r}, as {type(model).__name__} has them: for an adapter that other "
            f"tools put on {type(parts[whole]).__name__}, inject into that part"
        )
    if head := unsaved_head(model, config):
        notes.append(
            f"the weights of {head} are not saved with the adapter: if they are new and random, set task_type "
            f"({', '.join(map(repr, HEADS))}) or modules_to_save=[{head!r}]"
        )
    in_full = fully_trained_tensors(model, config, [(target.name, target.module) for target in targets])
    half = [name for name, t in in_full.items() if t.dtype in (torch.bfloat16, torch.float16)]
    if half:
        notes.append(
            f"{len(half)} tensors ({half[0]}, ...) are trained in full in {in_full[half[0]].dtype}, in which small "
            "updates are lost: load the base model in fp32 to train them well"
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


# Methods of transformers that would go wrong on an adapted model.


def _guard_methods(model: nn.Module) -> None:
    if hasattr(model, "save_pretrained"):
        model.__dict__["save_pretrained"] = functools.partial(_save_pretrained, model)
    if hasattr(model, "resize_token_embeddings"):
        model.__dict__["resize_token_embeddings"] = functools.partial(_resize_token_embeddings, model)


def _save_pretrained(
    model: nn.Module, save_directory: Any, is_main_process: bool = True, push_to_hub: bool = False, **kwargs: Any
) -> None:
    """Saves the adapter, as PEFT's models do; transformers would write factors that from_pretrained then drops."""
    from .formats.peft import save_adapter  # late import: the formats come later in the import order
    from .formats.trainer import is_trainer_checkpoint, save_trained_weights

    if push_to_hub:
        raise TargetError("push_to_hub does not work for adapters; save the adapter, and upload the directory")
    if any(layer.merged for _, layer in adapted_layers(model)):
        raise TargetError(
            "the adapter is merged, but save_pretrained would save the adapter, not the merged weights. For a merged "
            "model: `loralib merge ADAPTER DIR`; for the adapter: lora.save_adapter(model, DIR), or unmerge(model) "
            "first"
        )
    if is_main_process:
        save_adapter(model, save_directory)
        if "state_dict" in kwargs and is_trainer_checkpoint(save_directory):
            save_trained_weights(model, save_directory)


def _resize_token_embeddings(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Resizes token embeddings unless they are adapted: the adapter would not survive that."""
    record = injection_of(model)
    for name, table in token_tables(model).items():
        replaced = record is not None and any(key.rpartition(".")[0] == name for key in record.originals)
        if isinstance(table, LoRALayer) or replaced:
            raise TargetError(
                "the token embeddings (or the head) are adapted or trained, and resizing them would break the "
                "adapter: call remove(model), resize, then inject() again"
            )
    resized = type(model).resize_token_embeddings(model, *args, **kwargs)  # type: ignore[attr-defined]
    for new in (input_table(model), output_head(model)):
        if new is not None:
            new.requires_grad_(False)  # new embeddings are trainable
    return resized
