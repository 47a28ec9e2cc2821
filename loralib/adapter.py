"""An adapter as a value: settings and tensors, taken from a model or applied to one.

A tensor's name is its module's name followed by ``.lora_A`` or ``.lora_B`` (``.lora_embedding_A`` or ``_B`` for
embeddings, as in PEFT), or by the name of whatever else the layer trains; modules and biases that are trained in full
keep their parameters' names.  Expert weights that are stored as one parameter count as a module each, with the factors
``.lora_experts_A`` (experts, r, in) and ``.lora_experts_B`` (experts, out, r).
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import ALL_LINEAR, HUB_NAMES, LoraConfig, as_pattern, is_plain_name, matches, matching_steps, with_ranks
from .console import counted, size
from .delta import all_finite, block_diagonal_B, dense, diagonal_blocks, scaling_of
from .errors import AdapterError, BaseMismatchError, TargetError, list_faults
from .injection import (
    WRAP_LATER,
    InjectReport,
    adapted_layers,
    adapted_model,
    fingerprint,
    first_fingerprint,
    inject_targets,
    injection_of,
    quantization_of,
    refuse_in_use,
    refuse_peft,
    remove,
    table_rows,
    tensor_at,
    token_tables,
    unmerge,
)
from .layers import LoRAFoldedConv, LoRALayer, LoRALinear
from .targets import fully_trained_tensors, match_modules
from .wrapping import gathered, is_spread, named_modules, named_parameters, plain_name, refuse_process_groups, unwrapped

__all__ = [
    "Adapter",
    "ApplyReport",
    "adapter_of",
    "apply_adapter",
    "check_savable",
    "compare_base",
    "expand_blocks",
    "narrow_blocks",
]

LABELS = "loralib.labels"  # metadata: a classifier's labels as a JSON list; an empty list: it predicts a number
BASE = "loralib.base"  # metadata: fingerprint of the base model
QUANTIZE = "loralib.quantize"  # metadata: how the base was quantised during training; absent if it was not
MODEL_TYPE = "loralib.model_type"  # metadata: transformers' name for the kind of base model, such as "llama"
BLOCKS = "loralib.enable_lora"  # metadata: which blocks of fused projections are adapted

_COPIES = {*HUB_NAMES.items(), *((original, copy) for copy, original in HUB_NAMES.items())}
_KINDS = ("lora_embedding_", "lora_experts_", "lora_")
_FACTORS = tuple(f".{kind}{half}" for kind in _KINDS for half in "AB")
_MAX_STEPS = 1e9  # upper limit for `matching_steps`; corresponds to a few seconds


@dataclass(frozen=True, repr=False)
class Adapter:
    """A trained adapter, independent of any model.

    Attributes:
        config: its settings.
        tensors: its tensors by name; see the top of this module.
        metadata: other facts as text; ``loralib.base`` is the fingerprint of the base model.
    """

    config: LoraConfig
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def modules(self) -> tuple[str, ...]:
        """The names of the modules, and of the expert weights, that have low-rank factors."""
        return tuple(dict.fromkeys(n.rpartition(".")[0] for n in self.tensors if n.endswith(_FACTORS)))

    @property
    def target_modules(self) -> tuple[str, ...]:
        """The modules to name in target_modules; those that are adapted along with another module are left out."""
        parameters = set(self.target_parameters)
        modules = (name for name in self.modules if not {name, f"{name}.weight"} & parameters)
        return tuple(dict.fromkeys(map(self.target_of, modules)))

    @property
    def target_parameters(self) -> tuple[str, ...]:
        """The parameters to name in target_parameters: expert weights, and other weights that the settings name."""
        chosen = self.config.target_parameters
        names = (name if self.holds_experts(name) else f"{name}.weight" for name in self.modules)
        return tuple(name for name in names if self.holds_experts(name) or matches(chosen, name))

    @property
    def expert_weights(self) -> tuple[str, ...]:
        """The expert weights that have low-rank factors."""
        return tuple(filter(self.holds_experts, self.modules))

    def holds_experts(self, module: str) -> bool:
        """Whether a name in `modules` is that of a parameter that stacks the weights of all experts of a layer."""
        return any(f"{module}.lora_experts_{half}" in self.tensors for half in "AB")

    def target_of(self, module: str) -> str:
        """Returns the module to target for a module: for the out_proj of an nn.MultiheadAttention, the attention."""
        attention = module.removesuffix(".out_proj")
        return attention if f"{attention}.lora_A" in self.tensors else module

    def factor_keys(self, module: str) -> tuple[str, str]:
        """Returns the tensor names of a module's A and B; embeddings (as in PEFT) and experts have their own."""
        places = ((half, kind) for half in "AB" for kind in _KINDS)  # one of the two may be missing
        kind = next((kind for half, kind in places if f"{module}.{kind}{half}" in self.tensors), "lora_")
        return f"{module}.{kind}A", f"{module}.{kind}B"

    @property
    def nbytes(self) -> int:
        """Size of the tensors in bytes."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def __repr__(self) -> str:
        return f"Adapter({self.config!r}, {len(self.tensors)} tensors, {size(self.nbytes)})"


@dataclass(frozen=True)
class ApplyReport:
    """The result of applying an adapter to a model.

    Attributes:
        applied: number of tensors copied.
        base: 'checked', 'quantized' (the same, but quantised differently than in training), 'unknown' (the adapter does
            not name its base), 'copy' (one is a quantised copy of the other) or 'other' (a mismatch was allowed).
        inject: what was adapted; None if the layers were already there.
        carried: token tables that the adapter ships with other values than the base's; they replaced the base's.
        ignored: other base tensors that the adapter holds with other values, which was allowed.
    """

    applied: int
    base: str
    inject: InjectReport | None = None
    carried: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    def __str__(self) -> str:
        bases = {
            "checked": "base model checked",
            "quantized": "base model checked, but in a different precision than in training: expect small differences",
            "unknown": "base model not checked: the adapter does not record which one it belongs to",
            "copy": "trained on a copy of this base model, one of the two in 4 bits: expect small differences",
            "other": "trained on a base model with different values, as allowed",
        }
        carried = f"; replacing the base's: {', '.join(self.carried)}" if self.carried else ""
        ignored = f"; keeping the base's own: {', '.join(self.ignored)}" if self.ignored else ""
        total = self.applied + len(self.ignored)
        return f"{self.applied} of {total} tensors applied ({bases[self.base]}{carried}{ignored})"


def adapter_of(model: nn.Module) -> Adapter:
    """Copies the adapter that a model holds.

    Args:
        model: adapted by `inject`, or built from loralib's layers.

    Raises:
        TargetError: the model holds no adapter.
        AdapterError: a layer's update cannot be expressed in the adapter format.
    """
    wrapped, model = model, adapted_model(model)
    refuse_peft(model)
    layers = adapted_layers(model)
    if not layers:
        raise TargetError(f"{type(model).__name__} holds no adapter; add one with inject() or load_adapter()")
    if layers[0][0] == "":
        raise AdapterError(f"a {type(model).__name__} on its own has no name to be saved under; put it into a model")
    with gathered(wrapped):
        return _taken(model, layers)


def check_savable(model: nn.Module) -> None:
    """Checks that `adapter_of` could copy all that a model trains, which is good to know before training.

    Args:
        model: without wrappers; may hold an adapter.

    Raises:
        TargetError: it holds an adapter of PEFT.
        AdapterError: something that trains cannot be stored in an adapter.
    """
    refuse_peft(model)
    if layers := adapted_layers(model):
        _trained_in_full(model, layers)


def _trained_in_full(model: nn.Module, layers: list[tuple[str, LoRALayer]]) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Returns a model's settings, and what it stores besides the layers' own tensors, if all of it can be stored."""
    record = injection_of(model)
    for name, layer in layers:
        with _named_errors(name):
            layer.check_stored()
    config = record.config if record is not None else _config_of(model, layers)
    in_full = fully_trained_tensors(model, config, layers)
    if record is not None:
        in_full |= {name: tensor_at(model, name) for name in record.carried}
        _refuse_unsaved(model, layers, in_full)
    return config, in_full


def _taken(model: nn.Module, layers: list[tuple[str, LoRALayer]]) -> Adapter:
    record = injection_of(model)
    config, in_full = _trained_in_full(model, layers)
    config = config.with_start() if config.changes_base else config
    tensors = dict[str, Tensor]()
    for name, layer in layers:
        with _named_errors(name):
            tensors |= {f"{name}.{key}": tensor for key, tensor in layer.to_adapter().items()}
    # A model built by hand keeps no originals of the tensors it trains: nothing tells which base it started from.
    known_base = record is not None or not in_full
    return Adapter(
        config=config,
        tensors={name: dense(tensor.detach()).clone() for name, tensor in (tensors | in_full).items()},
        metadata={
            **({BASE: fingerprint(model, in_full.keys())} if known_base else {}),
            **kind_of(model),
            **_held_in(model),
            **_labels_of(model, config),
        },
    )


def kind_of(model: nn.Module) -> dict[str, str]:
    """Returns the metadata that records the kind of a base model: nothing, if it is not a transformers model."""
    found = getattr(getattr(model, "config", None), "model_type", None)
    return {MODEL_TYPE: found} if isinstance(found, str) and found else {}


def _held_in(model: nn.Module) -> dict[str, str]:
    kind = quantization_of(model)
    return {} if kind == "none" else {QUANTIZE: kind}


def _labels_of(model: nn.Module, config: LoraConfig) -> dict[str, str]:
    """Returns the labels of a classifier's logits, for which PEFT's settings have no field."""
    names = getattr(getattr(model, "config", None), "id2label", None)
    if config.task_type != "SEQ_CLS" or not isinstance(names, dict):
        return {}
    return {LABELS: json.dumps([str(names[number]) for number in sorted(names)] if len(names) > 1 else [])}


def _refuse_unsaved(model: nn.Module, layers: Sequence[tuple[str, LoRALayer]], in_full: Mapping[str, Tensor]) -> None:
    """Raises if parameters besides the adapter are set to train, which saving would silently leave out."""
    ours = {id(p) for _, layer in layers for p in layer.trained_tensors().values()} | {id(t) for t in in_full.values()}
    merged = {id(layer._parameters[name]) for _, layer in layers if layer.merged for name in layer.weight_names}
    others = [n for n, p in named_parameters(model).items() if p.requires_grad and id(p) not in ours | merged]
    if others:
        raise AdapterError(
            list_faults(
                "these parameters are trained in addition to the adapter, which cannot store them",
                others,
                "Freeze them (requires_grad_(False)); or name their modules in modules_to_save when you inject. To "
                "save what they have learned: torch.save(model.state_dict(), path).",
                most=8,
            )
        )


def apply_adapter(model: nn.Module, adapter: Adapter, *, allow_base_mismatch: bool = False) -> ApplyReport:
    """Applies an adapter to a model: injects the layers and copies every tensor, or changes nothing.

    Args:
        model: a plain model; one that holds an adapter, which is replaced once the new one has been checked; or one
            built from loralib's layers, which receive the tensors.
        adapter: the adapter.
        allow_base_mismatch: accept a base model whose values differ from those the adapter was trained on.

    Returns:
        What was applied; see `ApplyReport`.

    Raises:
        AdapterError: tensors are missing, unexpected, of the wrong shape or not finite; all are listed.
        BaseMismatchError: the adapter was trained on another base model.
        BusyModelError: the model is generating or being trained.
        TargetError: the adapter's target_modules do not fit the model.
    """
    adapter = _as_trained(adapter)
    wrapped, model = model, adapted_model(model)
    refuse_peft(model)
    refuse_in_use(model)
    layers = adapted_layers(model)
    record = injection_of(model)
    if not layers or (record is not None and record.config != adapter.config):
        refuse_process_groups(wrapped, WRAP_LATER)
    if is_spread(wrapped) and layers:
        raise TargetError(
            "the model is spread over processes (FSDP, ZeRO); add the adapter first, then shard the model"
        )
    for name, layer in layers:
        with _named_errors(name):
            layer.check_stored()
    by_hand = bool(layers) and record is None
    _refuse_other_names(model, adapter)
    expected, in_full = _expected(model, adapter, layers if by_hand else ())
    carried, ignored = _check_tensors(model, adapter, expected, allow_base_mismatch)
    carried = _under_tied_names(model, carried, expected)
    base = _check_base(model, adapter, allow_base_mismatch)
    report = None
    if by_hand:
        pairs = _pairs(layers, in_full, adapter)
        unmerge(model)
        _copy(pairs + [(tensor_at(model, name), tensor) for name, tensor in carried.items()])
    else:
        report = _replace(model, adapter, carried)
    applied = len(expected) + len(carried)
    return ApplyReport(applied=applied, base=base, inject=report, carried=tuple(carried), ignored=ignored)


def check_fit(model: nn.Module, adapter: Adapter, *, allow_base_mismatch: bool = False) -> None:
    """Checks an adapter against a plain base model as `apply_adapter` does, without changing anything.

    Raises:
        AdapterError: tensors are missing, unexpected, of the wrong shape or not finite; all are listed.
        BaseMismatchError: the adapter was trained on another base model.
        TargetError: the adapter's target_modules do not fit the model.
    """
    adapter = _as_trained(adapter)
    _refuse_other_names(model, adapter)
    expected, _ = _expected(model, adapter)
    carried, _ = _check_tensors(model, adapter, expected, allow_base_mismatch)
    if carried:
        raise AdapterError(
            list_faults("the adapter has its own embedding or head", list(carried), "Load it on its own.")
        )
    _check_base(model, adapter, allow_base_mismatch)


def _as_trained(adapter: Adapter) -> Adapter:
    """Returns the adapter without the setting for initialising its factors, which mattered only before training."""
    if not adapter.modules:
        raise AdapterError("the adapter contains no LoRA tensors (names that end in lora_A and lora_B); copy it again")
    if adapter.config.changes_base:
        return adapter
    return replace(adapter, config=adapter.config.replace(init_lora_weights=True))


def _refuse_other_names(model: nn.Module, adapter: Adapter) -> None:
    """Refuses an adapter of which the model has no module at all: settings do not help there.

    Raises:
        AdapterError: says how the names differ, if only by where they begin.
    """
    theirs = adapter.modules
    ours = {*named_modules(model), *(named_parameters(model) if adapter.expert_weights else ())}
    if not ours.isdisjoint(theirs):
        return
    named = adapter.config.base_model_name_or_path
    fix = f"Load it into the base model it was trained on{f' ({named})' if named else ''}."
    for start in _starts(theirs[0], theirs):
        if ours.issuperset(name.removeprefix(start) for name in theirs):
            fix = (
                f"Its names begin with {start!r}: load it into the model that holds this one as {start[:-1]!r}, or "
                "drop that from the names in the file."
            )
    for start in (name.removesuffix(theirs[0]) for name in ours if name.endswith(f".{theirs[0]}")):
        if ours.issuperset(f"{start}{name}" for name in theirs):
            fix = f"Here these begin with {start!r}: load it into model.get_submodule({start[:-1]!r})."
    some = ", ".join(theirs[:3]) + ", ..." * (len(theirs) > 3)
    raise AdapterError(
        f"the adapter does not fit {type(model).__name__}, which has none of the modules that it adapts ({some}). {fix}"
    )


def _starts(name: str, names: Sequence[str]) -> list[str]:
    """Returns the beginnings of a dotted name, up to a dot, that all names have.

    >>> _starts("net.model.q", ["net.model.q", "net.head"])
    ['net.']
    """
    starts = [name[: place + 1] for place, letter in enumerate(name) if letter == "."]
    return [start for start in starts if all(other.startswith(start) for other in names)]


def _expected(
    model: nn.Module, adapter: Adapter, by_hand: Sequence[tuple[str, LoRALayer]] = ()
) -> tuple[dict[str, tuple[int, ...]], dict[str, Tensor]]:
    """Returns the shapes of all tensors that an adapter must have, and the tensors of the model that it trains in full.

    `by_hand` lists the layers that a model was built from; without them, the adapter's config says what is adapted.
    """
    adapted: Sequence[tuple[str, nn.Module]] = by_hand
    if by_hand:
        expected = _shapes_of(by_hand, adapter)
    else:
        targets = match_modules(model, adapter.config, trained=True)
        adapted = [(target.name, target.module) for target in targets]
        expected = {key: shape for target in targets for key, shape in target.shapes().items()}
    in_full = fully_trained_tensors(model, adapter.config, adapted)
    return expected | {name: tuple(tensor.shape) for name, tensor in in_full.items()}, in_full


def _replace(model: nn.Module, adapter: Adapter, carried: Mapping[str, Tensor]) -> InjectReport | None:
    """Applies an adapter that has been checked; if anything fails, the model keeps the adapter it had."""
    record = injection_of(model)
    previous = adapter_of(model) if record is not None else None
    kept = {name: tensor_at(model, name) for name in record.carried} if record is not None else {}
    try:
        return _put_on(model, adapter, carried)
    except BaseException:
        if previous is not None:
            _put_on(model, previous, kept)
        elif injection_of(model) is not None:
            remove(model)
        raise


def _put_on(model: nn.Module, adapter: Adapter, carried: Mapping[str, Tensor]) -> InjectReport | None:
    """Injects an adapter that has been checked, replacing the one that the model holds."""
    record, report = injection_of(model), None
    if record is not None and record.config == adapter.config and not (carried or record.carried):
        unmerge(model)  # the layers stay the same and only their values change: copying is enough
    else:
        if record is not None:
            remove(model)
        report = inject_targets(model, adapter.config, match_modules(model, adapter.config, trained=True), carried)
    layers = adapted_layers(model)
    _copy(_pairs(layers, fully_trained_tensors(model, adapter.config, layers), adapter))
    return report


def _shapes_of(layers: Sequence[tuple[str, LoRALayer]], adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """Returns the shapes that an adapter's tensors must have to fit the layers that a model was built from."""
    expected = dict[str, tuple[int, ...]]()
    for name, layer in layers:
        keys = layer.tensor_keys()
        shapes = {f"{name}.{keys[leaf]}": tuple(tensor.shape) for leaf, tensor in layer.trained_tensors().items()}
        # lora_state_dict writes Microsoft's folded convolutions in their own layout.
        if any(key in adapter.tensors and adapter.tensors[key].shape != shape for key, shape in shapes.items()):
            with _named_errors(name):
                shapes = {f"{name}.{key}": tuple(tensor.shape) for key, tensor in layer.to_adapter().items()}
        expected |= shapes
    return expected


def _pairs(
    layers: Sequence[tuple[str, LoRALayer]], in_full: Mapping[str, Tensor], adapter: Adapter
) -> list[tuple[Tensor, Tensor]]:
    """Pairs each trained tensor of a model with the adapter's values for it."""
    pairs = [(tensor, adapter.tensors[name]) for name, tensor in in_full.items()]
    for name, layer in layers:
        with _named_errors(name):
            values = layer.from_adapter({key: adapter.tensors[f"{name}.{key}"] for key in layer.tensor_keys().values()})
        pairs += [(parameter, values[leaf]) for leaf, parameter in layer.trained_tensors().items() if leaf in values]
    return pairs


@torch.no_grad()
def _copy(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for tensor, values in pairs:
        tensor.copy_(values)


@contextlib.contextmanager
def _named_errors(name: str) -> Iterator[None]:
    """Prefixes errors with the layer's name."""
    try:
        yield
    except AdapterError as error:
        raise AdapterError(f"{name}: {error}") from None


def expand_blocks(adapter: Adapter) -> Adapter:
    """Returns the same adapter with its fused blocks expanded to plain low-rank updates.

    A module of rank r with k of n blocks enabled equals a plain module of rank r * k with a block-diagonal B and
    lora_alpha * k (lora_alpha * sqrt(k) with rsLoRA).  The metadata records which blocks were enabled, so that
    `narrow_blocks` can restore them.
    """
    config = adapter.config
    if not config.enable_lora:
        return adapter
    tensors = dict(adapter.tensors)
    ranks, alphas = dict[str, int](), dict[str, float]()
    for module in adapter.modules:
        r, alpha = config.rank_of(module), config.alpha_of(module)
        blocks = config.blocks_of(adapter.target_of(module))
        if blocks is not None:
            k = sum(blocks)
            if module == adapter.target_of(module):
                tensors[f"{module}.lora_B"] = block_diagonal_B(tensors[f"{module}.lora_B"], blocks)
            else:  # PEFT has one rank for both projections of an nn.MultiheadAttention
                tensors[f"{module}.lora_A"] = F.pad(tensors[f"{module}.lora_A"], (0, 0, 0, r * (k - 1)))
                tensors[f"{module}.lora_B"] = F.pad(tensors[f"{module}.lora_B"], (0, r * (k - 1)))
            r, alpha = r * k, alpha * (k**0.5 if config.use_rslora else k)
        ranks[module], alphas[module] = r, alpha
    plain = with_ranks(config.replace(enable_lora={}), ranks, alphas)
    return Adapter(plain, tensors, {**adapter.metadata, BLOCKS: json.dumps(config.enable_lora)})


def narrow_blocks(adapter: Adapter, enable_lora: Mapping[str, Any]) -> Adapter:
    """Undoes `expand_blocks`, for every adapter that it made.

    Raises:
        AdapterError: a B that should be block-diagonal is not, or a rank is not divisible by the number of blocks.
    """
    enable_lora = LoraConfig(enable_lora=enable_lora).enable_lora
    _check_matching(BLOCKS, enable_lora, adapter.modules)
    fused = adapter.config.replace(enable_lora=enable_lora)
    if not all(map(is_plain_name, enable_lora)):
        blocks_by_name = {name: fused.blocks_of(name) for name in adapter.modules}
        fused = fused.replace(enable_lora=as_pattern(blocks_by_name, None))
    tensors = dict(adapter.tensors)
    ranks, alphas, faults = dict[str, int](), dict[str, float](), []
    for module in adapter.modules:
        r, alpha = adapter.config.rank_of(module), adapter.config.alpha_of(module)
        blocks = fused.blocks_of(adapter.target_of(module))
        if blocks is not None:
            k = sum(blocks)
            r, alpha = r // k, alpha / (k**0.5 if fused.use_rslora else k)
            A, B = tensors[f"{module}.lora_A"], tensors[f"{module}.lora_B"]
            if module != adapter.target_of(module):
                if A[r:].any() or B[:, r:].any():
                    faults.append(f"{module}: has a rank above {r}, which it shares with {adapter.target_of(module)}")
                A, B = A[:r].clone(), B[:, :r].clone()
            else:
                fits = B.dim() == 2 and B.shape[0] % len(blocks) == 0 and B.shape[1] == r * k
                wide, B = B, diagonal_blocks(B, blocks) if fits else B
                if not fits or not torch.equal(block_diagonal_B(B, blocks), wide):
                    shape, on = tuple(wide.shape), list(blocks)
                    faults.append(f"{module}: lora_B {shape} is not block-diagonal for blocks {on}")
            tensors[f"{module}.lora_A"], tensors[f"{module}.lora_B"] = A, B
        ranks[module], alphas[module] = r, alpha
    if faults:
        raise AdapterError(list_faults("the fused blocks in the file's metadata do not match its tensors", faults))
    metadata = {key: value for key, value in adapter.metadata.items() if key != BLOCKS}
    return Adapter(with_ranks(fused, ranks, alphas), tensors, metadata)


def without_expressions(adapter: Adapter) -> Adapter:
    """Returns an adapter read from a file with module names in place of the file's regular expressions.

    The tensors tell which modules are adapted and with which r, so the file's expressions for these are never matched:
    that could take forever.  Those in alpha_pattern are matched once, against the modules that have tensors.

    Raises:
        AdapterError: alpha_pattern contains expressions that could take forever to match.
    """
    config, modules = adapter.config, adapter.modules
    _check_matching("alpha_pattern", config.alpha_pattern, modules)
    if not all(map(is_plain_name, (*config.rank_pattern, *config.alpha_pattern))):
        ranks = dict.fromkeys(modules, config.r)
        for module in modules:
            A = adapter.tensors.get(adapter.factor_keys(module)[0])
            # A rank that no setting explains is reported later.
            if A is None or A.dim() == 0:
                continue
            r = A.shape[1] if adapter.holds_experts(module) and A.dim() > 1 else A.shape[0]
            if r in config.rank_pattern.values():
                ranks[module] = r
        config = with_ranks(config, ranks, {module: config.alpha_of(module) for module in modules})
    target, exclude = config.target_modules, config.exclude_modules
    layers = (config.layers_pattern,) if isinstance(config.layers_pattern, str) else config.layers_pattern or ()
    if (
        (isinstance(target, str) and target != ALL_LINEAR)
        or isinstance(exclude, str)
        or not all(map(is_plain_name, layers))
    ):
        # A regular expression, because list entries also match as endings of other names.
        config = config.targeting("|".join(map(re.escape, adapter.target_modules)) or None)
    return replace(adapter, config=config)


def _check_matching(setting: str, patterns: Collection[str], modules: Sequence[str]) -> None:
    """Refuses a file's expressions if they could take forever to match against the modules that it names."""
    if matching_steps(patterns, modules) > _MAX_STEPS:
        raise AdapterError(
            list_faults(
                f"matching the expressions in {setting} with {len(modules):,} modules could take forever",
                [key[:80] for key in patterns if not is_plain_name(key)],
                f"Use names of modules or their endings in {setting} instead.",
            )
        )


def _config_of(model: nn.Module, layers: list[tuple[str, LoRALayer]]) -> LoraConfig:
    """Returns the settings of a model that was built from loralib's layers.

    Raises:
        AdapterError: a parameter trains that cannot be stored in an adapter.
    """
    ranks, alphas, blocks = dict[str, int](), dict[str, float](), dict[str, tuple[bool, ...]]()
    for name, layer in layers:
        factor = layer._base_shape[2:].numel() if isinstance(layer, LoRAFoldedConv) else 1  # see to_adapter
        plain = layer.scaling == scaling_of(layer.r, layer.lora_alpha)  # false with rsLoRA
        ranks[name] = layer.r * factor
        alphas[name] = (layer.lora_alpha if plain else layer.scaling * layer.r) * factor
        if isinstance(layer, LoRALinear) and layer.blocks is not None:
            blocks[name] = layer.blocks
    bias, modules_to_save = _trained_besides(model, layers)
    config = LoraConfig(
        target_modules=[name for name, _ in layers],
        lora_dropout=max(layer.lora_dropout for _, layer in layers),
        bias=bias,
        modules_to_save=modules_to_save or None,
        enable_lora=as_pattern({name: blocks.get(name) for name, _ in layers}, None),
    )
    return with_ranks(config, ranks, alphas)


def _trained_besides(model: nn.Module, layers: list[tuple[str, LoRALayer]]) -> tuple[str, list[str]]:
    """Returns `bias` and `modules_to_save` for the parameters that train besides the layers' own tensors."""
    ours = {id(p) for _, layer in layers for p in layer.trained_tensors().values()}
    trained = {name for name, p in named_parameters(model).items() if p.requires_grad and id(p) not in ours}
    bias = "none"
    for mode in ("all", "lora_only"):
        biases = fully_trained_tensors(model, LoraConfig(bias=mode), layers)
        if biases and all(parameter.requires_grad for parameter in biases.values()):
            bias, trained = mode, trained - biases.keys()
            break
    owners = dict.fromkeys(name.rpartition(".")[0] for name in sorted(trained))
    adapted = {name for name, _ in layers}
    unsaved = [name for name in sorted(trained) if name.rpartition(".")[0] in adapted | {""}]
    if unsaved:
        raise AdapterError(
            list_faults(
                "these parameters are trained, but an adapter cannot store them",
                unsaved,
                "Freeze them with mark_only_lora_as_trainable(model), or save the whole model with torch.save.",
            )
        )
    return bias, list(owners)


def _check_tensors(
    model: nn.Module, adapter: Adapter, expected: Mapping[str, tuple[int, ...]], allow_mismatch: bool
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Checks an adapter's tensors against the expected ones.

    Returns:
        The token tables that differ from the base's, which PEFT saves if tokens were added; and the names of other base
        tensors that differ, if that is allowed.
    """
    faults = [f"missing     {name} {shape}" for name, shape in expected.items() if name not in adapter.tensors]
    bad = list[str]()  # tensors that fit, but hold unusable values
    record = injection_of(model)
    base = {plain_name(name): tensor for name, tensor in model.state_dict().items()}
    base |= record.originals if record is not None else {}
    tables, carried, ignored = token_tables(model), dict[str, Tensor](), list[str]()
    for name, tensor in adapter.tensors.items():
        shape, is_table = tuple(tensor.shape), name.rpartition(".")[0] in tables
        wanted = expected.get(name, tuple(base[name].shape) if name in base else None)
        if wanted is None:
            faults.append(f"unexpected  {name} {shape}")
        elif shape != wanted:
            kind = "misshapen  " if name in expected else "other base "
            faults.append(f"{kind} {name} {shape}, expected {wanted}")
            if is_table and len(shape) == 2 and shape[1:] == wanted[1:]:
                faults[-1] += f" (tokens were added: call model.resize_token_embeddings({shape[0]}) first)"
        elif not tensor.is_floating_point() and (name not in base or base[name].is_floating_point()):
            bad.append(f"not a float {name} of {tensor.dtype}")
        elif not all_finite(tensor):
            bad.append(f"not finite  {name} holds NaN or infinite values")
        elif name not in expected and not _same_values(base[name], tensor):
            # Some files also hold base weights (PEFT saves embeddings, Microsoft whole models).
            if is_table:
                carried[name] = tensor
            elif allow_mismatch:
                ignored.append(name)
            else:
                faults.append(f"other base  {name} {shape} differs from the model's (trained in full?)")
    if faults or bad:
        advice = ["Copy the adapter again from its source, or train it again."] if bad else []
        if faults:
            advice.append(
                "Load it into the base model it was trained on; check r and target_modules, and list the modules "
                "trained in full in modules_to_save (for a directory, in adapter_config.json)."
            )
        title = f"the adapter does not fit {type(model).__name__}, which takes {counted(len(expected), 'tensor')}"
        found = f"{title}: {counted(len(faults) + len(bad), 'fault')}"
        raise AdapterError(list_faults(found, bad + faults, " ".join(advice)))
    return carried, tuple(ignored)


def _under_tied_names(model: nn.Module, carried: Mapping[str, Tensor], expected: Collection[str]) -> dict[str, Tensor]:
    """Returns replaced tables of the base under all names of their parameters, so that a tied head changes too."""
    record, parameters = injection_of(model), named_parameters(model)
    parameters |= cast("dict[str, nn.Parameter]", record.originals if record is not None else {})
    followed = dict[str, Tensor]()
    for name, tensor in carried.items():
        twins = [twin for twin, parameter in parameters.items() if parameter is parameters.get(name)]
        followed |= {twin: tensor for twin in twins if twin not in expected}
    return {**followed, **carried}


def _same_values(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors hold the same values, apart from rounding to the dtype of either."""
    ours, theirs = ours.detach().cpu(), theirs.detach().cpu()
    return torch.equal(ours.to(theirs.dtype), theirs) or torch.equal(theirs.to(ours.dtype), ours)


def compare_base(model: nn.Module, adapter: Adapter) -> str:
    """Compares a model with the base that an adapter was trained on.

    Returns:
        'checked' (the same), 'unknown' (the adapter does not say), 'shapes' (other parameters), 'rows' (fewer token
        rows than in training), 'copy' (judging by name, one is a quantised copy of the other) or 'values'.
    """
    theirs = adapter.metadata.get(BASE)
    if theirs is None:
        return "unknown"
    shapes, _, values = theirs.partition(":")
    count = values.partition(":")[2]
    rows = int(count) if count.isdecimal() else 0
    # What the adapter ships is left out of the fingerprint when it is saved, except in files of earlier versions, or if
    # it ships an unchanged table of the base.
    found = set[str]()
    for left_out in (adapter.tensors.keys(), (), None):
        ours = first_fingerprint(model) if left_out is None else fingerprint(model, left_out, rows)
        if ours == theirs:
            return "checked"
        found.add(ours.partition(":")[0])
    # It may have been trained in fp16, which rounds the smallest values.
    if any(fingerprint(model, left_out, rows, in_fp16=True) == theirs for left_out in (adapter.tensors.keys(), ())):
        return "checked"
    if shapes not in found:
        return "shapes"
    if rows > table_rows(model):
        return "rows"
    names = adapter.config.base_model_name_or_path, getattr(unwrapped(model), "name_or_path", None)
    return "copy" if names in _COPIES else "values"


def _check_base(model: nn.Module, adapter: Adapter, allow_mismatch: bool) -> str:
    """Compares fingerprints and returns the value for `ApplyReport.base`."""
    found = compare_base(model, adapter)
    if found == "checked" and adapter.metadata.get(QUANTIZE, "none") != quantization_of(model):
        return "quantized"
    if found in ("checked", "unknown", "copy"):
        return found
    if found != "shapes" and allow_mismatch:
        return "other"
    theirs, named = adapter.metadata[BASE], adapter.config.base_model_name_or_path
    load = f"Load the base it was trained on{f' ({named})' if named else ''}."
    if found == "shapes":
        raise BaseMismatchError(
            f"the adapter was trained on a base model with different parameters than this {type(model).__name__} "
            f"(fingerprint {theirs}). {load}"
        )
    allow = "To use this one anyway: allow_base_mismatch=True in Python, --allow_base_mismatch of `loralib merge`."
    if found == "rows":
        rows = theirs.rpartition(":")[2]
        raise BaseMismatchError(
            f"the adapter was trained on a base model with {rows} rows in its embedding, but this "
            f"{type(model).__name__} has {table_rows(model)}. {load} If tokens were added to it: call "
            f"model.resize_token_embeddings({rows}) and restore their values. {allow}"
        )
    in_fp16 = any(p.dtype == torch.float16 for p in model.parameters())
    rounded = " This one is in fp16, which rounds small values: load it in bf16 or fp32 to compare." * in_fp16
    raise BaseMismatchError(
        f"the adapter was trained on a base model with the same shapes but different values (fingerprint {theirs}; "
        f"rows of added tokens count too). {load}{rounded} {allow}"
    )
