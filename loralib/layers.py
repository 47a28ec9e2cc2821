"""The LoRA layers: a mixin, `LoRALayer`, combined with a layer's existing class.

Microsoft's classes (`Linear`, `MergedLinear`, `Embedding`, `Conv1d`, `Conv2d`, `Conv3d`) combine the mixins below with
torch's own layers, and have the constructor arguments of loralib 0.1.2.  `loralib.inject` builds the same kind of class
from a module's class (`adapted_class`) and assigns it to ``module.__class__``: the base weight stays the same Parameter
under the same name, and ``isinstance`` keeps working.

A mixin defines which tensors it trains (`tensor_shapes`) and what they add to the base weight (`delta_weight`), using
the formulas of `loralib.delta`.  A variant that trains another tensor is another mixin, a file in `loralib.variants`;
no other code needs to know about it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import Parameter

from .delta import (
    add_delta,
    all_finite,
    block_diagonal_B,
    delta_weight,
    dense,
    low_rank,
    scale_outputs,
    scaling_of,
)
from .errors import AdapterError, ConfigError, MergeError, UnsupportedModelError
from .wrapping import is_sharded

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Embedding",
    "Linear",
    "LoRAConv",
    "LoRALayer",
    "MergedLinear",
    "adapted_class",
    "base_class",
    "is_conv1d",
]


class LoRALayer(nn.Module):
    """The common base of all LoRA layers.

    Attributes:
        r: the rank; 0 for a layer without an adapter.
        lora_alpha: see `loralib.delta.scaling_of`.
        lora_dropout: probability of dropping an input of the low-rank path in training mode.
        scaling: factor applied to the update.
        merged: whether the weight currently is base + update; see `merge` and `unmerge`.
        merge_weights: whether ``eval()`` merges and ``train()`` unmerges: Microsoft's default, off in injected layers.
        enabled: False inside `loralib.disabled`.
        init_lora_weights: how the factors are initialised, as in `loralib.LoraConfig`.
        lora_A, lora_B: the trained factors (absent when r is 0).
    """

    r: int
    lora_alpha: float
    lora_dropout: float
    scaling: float
    # Stored in the instance's dictionary, which torch.compile guards: a compiled model follows merge() and unmerge().
    merged: bool = False
    merge_weights: bool
    enabled: bool
    init_lora_weights: bool | str
    lora_A: Parameter
    lora_B: Parameter
    lora_names: tuple[str, ...] = ()  # trained tensors created by _init_lora; the base may have similar names
    fixed_names: tuple[str, ...] = ()  # buffers that a variant keeps beside them
    output_factors: tuple[str, ...] = ("lora_B",)  # which trained tensors start at zero and are applied after A
    may_rest: bool = False  # whether all of a layer's gradients may be zero for a batch

    _weight_name = "weight"

    @property
    def weight_names(self) -> tuple[str, ...]:
        """The names of the parameters that the layer adapts: a single one, except for a mixture's experts."""
        return (self._weight_name,)

    def _init_lora(
        self,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        merge_weights: bool = False,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
    ) -> None:
        """Sets the layer's attributes and, if r > 0, creates its trained tensors; the base weight must exist."""
        if r < 0:
            raise ConfigError(f"r is {r}, expected 0 (no adapter) or a positive rank")
        if not 0 <= lora_dropout <= 1:
            raise ConfigError(f"lora_dropout is {lora_dropout}, expected a probability from 0 to 1")
        self.r, self.lora_alpha, self.lora_dropout = r, lora_alpha, lora_dropout
        self.scaling = scaling_of(r, lora_alpha, use_rslora)
        self.merged, self.merge_weights, self.enabled = False, merge_weights, True
        self.init_lora_weights = init_lora_weights
        if r > 0:
            device, dtype = self.base_weight.device, self.base_weight.dtype
            shapes = self.tensor_shapes(r)
            self.lora_names = tuple(shapes)
            for name, shape in shapes.items():
                tensor = torch.empty(shape, dtype=torch.promote_types(dtype, torch.float32), device=device)
                self.register_parameter(name, Parameter(tensor))
            self.reset_lora_parameters()

    # Properties defined by mixins.

    def tensor_shapes(self, r: int) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the tensors that the layer trains at rank r, by parameter name, in a fixed order.

        Every name begins with ``lora_``, which `mark_only_lora_as_trainable` and `lora_state_dict` rely on.
        """
        raise NotImplementedError

    def tensor_keys(self) -> dict[str, str]:
        """Returns the name of each trained tensor in an adapter, by parameter name."""
        return {name: name for name in self.tensor_shapes(1)}

    def trained_tensors(self) -> dict[str, Parameter]:
        """Returns the tensors that the layer trains, by parameter name, in the order of `tensor_shapes`."""
        return {name: p for name in self.lora_names if (p := self._parameters.get(name)) is not None}

    def check_stored(self) -> None:
        """Checks that the weight and the trained tensors are parameters, so that an adapter can be extracted.

        Raises:
            AdapterError: one is computed (pruned or parametrized), or is only a process' shard of a tensor.
        """
        names = self.lora_names if self.merged else (*self.weight_names, *self.lora_names)
        computed = [name for name in names if self._parameters.get(name) is None]
        if computed:
            raise AdapterError(
                f"{' and '.join(computed)} is computed since inject() (pruned or parametrized); undo that first: "
                "torch.nn.utils.prune.remove, or remove_parametrizations"
            )
        shapes = self.tensor_shapes(self.r)
        if any(is_sharded(p) and p.dim() < len(shapes[name]) for name, p in self.trained_tensors().items()):
            raise AdapterError(
                "its tensors are spread over processes; gather them for the duration of the call, on every process: "
                "FSDP.summon_full_params(model), or deepspeed.zero.GatheredParameters(list(model.parameters()))"
            )

    def to_adapter(self) -> dict[str, Tensor]:
        """Returns the trained tensors as stored in an adapter, by the names of `tensor_keys`."""
        keys = self.tensor_keys()
        return {keys[name]: tensor.detach() for name, tensor in self.trained_tensors().items()}

    def from_adapter(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the values of the trained tensors by parameter name; the inverse of `to_adapter`."""
        return {name: tensors[key] for name, key in self.tensor_keys().items()}

    def factors(self) -> tuple[Tensor, Tensor]:
        """Returns A (r, in) and B (out, r) as matrices, whose product times `scaling` is the low-rank update."""
        return self.lora_A.flatten(1), self.lora_B.flatten(1)

    def as_matrix(self, weight: Tensor) -> Tensor:
        """Returns a tensor of the base weight's shape as the matrix (out, in) to which the update is added."""
        return weight.flatten(1)

    def as_stored(self, matrix: Tensor) -> Tensor:
        """Returns a matrix (out, in) reshaped to the base weight; the inverse of `as_matrix`."""
        return matrix.view(self._base_shape)

    def delta_weight(self) -> Tensor:
        """Returns what the adapter adds to the base weight, in the weight's shape and in fp32 or wider."""
        return self.as_stored(delta_weight(*self.factors(), self.scaling))

    def delta_weight_of(self, name: str) -> Tensor:
        """Returns what the adapter adds to the base weight of that name (see `weight_names`)."""
        return self.delta_weight()

    def output_scale(self) -> Tensor | None:
        """Returns the factor of each output (out,), applied before the bias is added, in fp32; None: 1."""
        return None

    def output_shift(self) -> Tensor | None:
        """Returns what is added to each output (out,) besides the base's bias, in fp32; None: nothing."""
        return None

    def _used_weight(self, weight: Tensor) -> Tensor:
        """Returns the base weight as used by forward (an embedding's max_norm changes it)."""
        return weight

    def begin_from(self, values: Mapping[str, Tensor]) -> None:
        """Receives the values of the trained tensors before the first update of a resumed run, by parameter name."""

    def is_as_base(self, values: Mapping[str, Tensor]) -> bool:
        """Whether the layer computes the same as its base with these values of the trained tensors, by parameter."""
        return any(not values[name].any() for name in ("lora_A", "lora_B"))

    def check_rank(self, r: int) -> None:
        """Raises TargetError if the layer cannot have this rank; called before the trained tensors are created."""

    def reset_lora_parameters(self) -> None:
        """Initialises A as nn.Linear does its weight, and B to zero, so that the layer starts out equal to its base."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    # State.

    @property
    def base_weight(self) -> Parameter:
        """The base weight, even while the layer is merged."""
        return self.base_weight_of(self._weight_name)

    def base_weight_of(self, name: str) -> Parameter:
        """Returns the base weight of that name (see `weight_names`), even while the layer is merged."""
        weight = (self.__dict__["_unmerged"] if self.merged else self._parameters).get(name)
        if weight is None:
            raise AdapterError("its weight is computed (pruned or parametrized since inject()); undo that first")
        return cast(Parameter, weight)

    @property
    def _base_shape(self) -> torch.Size:
        return self.base_weight.shape

    @property
    def _active(self) -> bool:
        """Whether forward must add the update."""
        return self.r > 0 and self.enabled and not self.merged

    def merge(self) -> None:
        """Replaces the weight with base + update, computed in fp32.  The base tensor itself is kept, unchanged.

        The merged weight is a new Parameter: modules that share the base weight (a tied head) keep the base's values.

        Raises:
            MergeError: the update or the merged weight holds NaN or infinite values, the update is disabled, or the
                weight is not a parameter.
        """
        if self.merged or self.r == 0:
            return
        if not self.enabled:
            raise MergeError("the adapter is disabled and was not merged; merge after the `with disabled()` block")
        if any(self._parameters.get(name) is None for name in self.weight_names):
            raise MergeError("its weight is computed (pruned or parametrized since inject()); undo that before merging")
        if any(is_sharded(self.base_weight_of(name)) for name in self.weight_names):
            raise MergeError("its weight is spread over processes (FSDP, ZeRO)")
        with torch.no_grad():
            merged = self._merged_tensors()
        if not all(map(all_finite, merged.values())):
            raise MergeError(
                f"base and update are too large for {next(iter(merged.values())).dtype}, or the base holds NaN or "
                "infinite values; merge into a base in bf16 or fp32"
            )
        self.__dict__["_unmerged"] = {name: self._parameters[name] for name in merged}
        for name, tensor in merged.items():
            base = self._parameters[name]
            self._parameters[name] = Parameter(tensor, requires_grad=base is not None and base.requires_grad)
        self.merged = True

    def _merged_tensors(self) -> dict[str, Tensor]:
        """Returns the tensors that replace the base's parameters when merging, by name."""
        merged = dict[str, Tensor]()
        for name in self.weight_names:
            delta = self.delta_weight_of(name)
            if not torch.isfinite(delta).all():
                raise MergeError(
                    "the adapter holds NaN or infinite values and was not merged; train again or load another"
                )
            merged[name] = add_delta(self._used_weight(dense(self.base_weight_of(name))), delta)
        return merged

    def unmerge(self) -> None:
        """Restores the base weight, bit for bit."""
        if not self.merged:
            return
        originals: dict[str, Parameter | None] = self.__dict__.pop("_unmerged")
        for name, base in originals.items():
            if base is not None:
                # Freezing or unfreezing the merged weight is meant for the base weight.
                base.requires_grad_(cast(Parameter, self._parameters[name]).requires_grad)
            self._parameters[name] = base
        self.merged = False

    def train(self, mode: bool = True) -> LoRALayer:
        super().train(mode)
        if self.__dict__.get("merge_weights"):
            if mode:
                self.unmerge()
            elif self.enabled:
                self.merge()
        return self

    # A state dict holds base weights, merged or not, and moving a layer also moves the base weight it keeps.

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, base in self.__dict__["_unmerged"].items() if self.merged else ():
            if base is None:
                del destination[prefix + name]
            else:
                destination[prefix + name] = base if keep_vars else base.detach()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unmerge()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoRALayer:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.merged:
            # torch knows which moves keep the Parameter and which create another.
            for name, base in self.__dict__["_unmerged"].items():
                if base is not None:
                    self.__dict__["_unmerged"][name] = nn.ParameterList([base])._apply(fn)[0]
        return self

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.lora_dropout, self.training) if self.lora_dropout else x

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Classes made by `adapted_class` cannot be imported by name, so they are rebuilt from their two halves.
        halves = type(self).__dict__.get("_halves")
        if halves is None:
            return super().__reduce_ex__(protocol)
        return _rebuild, halves, self.__dict__


class LoRALinear(LoRALayer):
    """``y = W x + scaling * B A x`` with A (r, in) and B (out, r).

    With `blocks`, k of the n equal blocks of a fused projection are adapted: A (r*k, in), B (out/n*k, r).
    """

    fan_in_fan_out: bool = False  # weight stored (in, out)
    blocks: tuple[bool, ...] | None = None

    def _sizes(self) -> tuple[int, int]:
        rows, columns = self._base_shape
        return (columns, rows) if not self.fan_in_fan_out else (rows, columns)

    def tensor_shapes(self, r: int) -> dict[str, tuple[int, ...]]:
        inputs, outputs = self._sizes()
        if self.blocks is None:
            return {"lora_A": (r, inputs), "lora_B": (outputs, r)}
        k = sum(self.blocks)
        return {"lora_A": (r * k, inputs), "lora_B": (outputs // len(self.blocks) * k, r)}

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_A, self.lora_B if self.blocks is None else block_diagonal_B(self.lora_B, self.blocks)

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.T if self.fan_in_fan_out else weight

    def as_stored(self, matrix: Tensor) -> Tensor:
        return self.as_matrix(matrix)

    def _base_forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, super().forward(x))

    def forward(self, x: Tensor) -> Tensor:
        y = self._base_forward(x)
        if not self._active:
            return y
        return self.finished(y + low_rank(self._drop(x), *self.factors(), self.scaling))

    def finished(self, y: Tensor, *, in_place: bool = False) -> Tensor:
        """Returns the layer's output, given y (..., out) before the final steps that a variant adds.

        Args:
            y: any number of rows.
            in_place: whether y may be overwritten by the output.
        """
        y = scale_outputs(y, self.output_scale(), cast("Tensor | None", self.bias), in_place=in_place)
        shift = self.output_shift()
        return y if shift is None else y + shift.to(y.dtype)


def _summed_weight(name: str) -> property:
    """Creates a property that reads a weight as base + update, for code that does not call the layer."""

    def read(self: LoRALinear) -> Tensor:
        base = self._parameters.get(name)
        if base is None:  # as hasattr() expects
            raise AttributeError(f"{type(self).__name__} currently has no {name}")
        if is_sharded(base):
            raise UnsupportedModelError(_NOT_SHARDED.format(type(self).__name__))
        return add_delta(dense(base), self.delta_weight()) if self._active else base

    def write(self: LoRALinear, value: Tensor) -> None:
        if not isinstance(value, Parameter):  # FSDP1 replaces the parameter with a view of its own
            raise UnsupportedModelError(_NOT_SHARDED.format(type(self).__name__))
        self.register_parameter(name, value)

    return property(read, write)


# FSDP reads a weight to detect changes, and would take base + update for a new base.
_NOT_SHARDED = (
    "the weight of an adapted {} reads as base + update and cannot be spread over processes; leave it out "
    "(FSDP(..., ignored_modules=[...]), fully_shard(..., ignored_params={{...}})), or adapt other modules"
)


class LoRAReadLinear(LoRALinear):
    """A linear layer whose parent reads its weight without calling it (nn.TransformerEncoderLayer's fast path).

    `weight` reads as base + update; `forward` computes as in `LoRALinear`.
    """

    weight = _summed_weight("weight")

    def _base_forward(self, x: Tensor) -> Tensor:
        return F.linear(x, cast(Tensor, self._parameters["weight"]), cast("Tensor | None", self._parameters["bias"]))


class LoRARouter(LoRALinear):
    """The router of a mixture, whose class reads its weight (experts, in) directly, which returns base + update."""

    weight = _summed_weight("weight")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super(LoRALinear, self).forward(*args, **kwargs)


class LoRAMultiheadAttention(LoRALinear):
    """nn.MultiheadAttention, which reads its in_proj_weight (3 * embed_dim, embed_dim): it returns base + update."""

    _weight_name = "in_proj_weight"

    in_proj_weight = _summed_weight("in_proj_weight")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return nn.MultiheadAttention.forward(cast(nn.MultiheadAttention, self), *args, **kwargs)


class LoRAEmbedding(LoRALayer):
    """``y = W[i] + scaling * B A[:, i]``, where A (r, n) starts at zero and B (d, r) is normally distributed."""

    def tensor_shapes(self, r: int) -> dict[str, tuple[int, ...]]:
        count, width = self._base_shape
        return {"lora_A": (r, count), "lora_B": (width, r)}

    def tensor_keys(self) -> dict[str, str]:
        return super().tensor_keys() | {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}  # as in PEFT

    def reset_lora_parameters(self) -> None:
        nn.init.zeros_(self.lora_A)
        nn.init.normal_(self.lora_B)

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def as_stored(self, matrix: Tensor) -> Tensor:
        return matrix.T

    def _used_weight(self, weight: Tensor) -> Tensor:
        table = cast(nn.Embedding, self)
        return weight if table.max_norm is None else torch.renorm(weight, table.norm_type, 0, table.max_norm)

    def _rows(self, weight: Tensor, x: Tensor) -> Tensor:
        """Looks up rows without max_norm, which rescales in place, and with a dense gradient, as A needs it."""
        table = cast(nn.Embedding, self)
        return F.embedding(x, weight, table.padding_idx, scale_grad_by_freq=table.scale_grad_by_freq)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged and cast(nn.Embedding, self).max_norm is not None:
            return self._rows(cast(Tensor, self.weight), x)
        y = cast(Tensor, super().forward(x))
        if not self._active:
            return y
        update = F.linear(self._rows(self.lora_A.T, x), self.lora_B) * self.scaling
        # Gemma's embedding multiplies its rows by embed_scale, which also applies to a merged weight.
        scale = getattr(self, "embed_scale", None)
        y = y + (update if scale is None else update * scale).to(y.dtype)
        return scale_outputs(y, self.output_scale())


class LoRAConv(LoRALayer):
    """A convolution to r channels, A (r, in, *kernel), then a 1x1 convolution, B (out, r, 1, ...), as in PEFT."""

    def tensor_shapes(self, r: int) -> dict[str, tuple[int, ...]]:
        outputs, inputs, *kernel = self._base_shape
        return {"lora_A": (r, inputs, *kernel), "lora_B": (outputs, r, *(1 for _ in kernel))}

    def forward(self, x: Tensor) -> Tensor:
        y = cast(Tensor, super().forward(x))
        if not self._active:
            return y
        conv = cast(nn.Conv2d, self)
        narrow = conv._conv_forward(self._drop(x), self.lora_A.to(x.dtype), None) * self.scaling
        one_by_one = (F.conv1d, F.conv2d, F.conv3d)[self.lora_B.dim() - 3]
        y = y + one_by_one(narrow, self.lora_B.to(x.dtype))
        return scale_outputs(y, self.output_scale(), conv.bias, channels=self.lora_B.dim() - 2)


class LoRAFoldedConv(LoRALayer):
    """A convolution whose update is ``B A`` reshaped to the weight, as in Microsoft's loralib.

    With b the last kernel size and a the product of the others, A is (r*b, in*b) and B (out/groups*a, r*b).  For square
    2-D kernels, the only ones supported by loralib 0.1.2, these are its shapes.
    """

    def tensor_shapes(self, r: int) -> dict[str, tuple[int, ...]]:
        conv = cast(nn.Conv2d, self)
        *others, last = conv.kernel_size
        rows = conv.out_channels // conv.groups * math.prod(others)
        return {"lora_A": (r * last, conv.in_channels * last), "lora_B": (rows, r * last)}

    def to_adapter(self) -> dict[str, Tensor]:
        """Returns the factors in PEFT's form: a plain convolution of rank r * prod(kernel)."""
        conv = cast(nn.Conv2d, self)
        if conv.groups != 1:
            raise AdapterError(
                f"a convolution with {conv.groups} groups has no portable form; save it with "
                "torch.save(loralib.lora_state_dict(model), path)"
            )
        A, B = self.lora_A.detach(), self.lora_B.detach()
        return {"lora_A": self._unfolded(A), "lora_B": B.reshape(conv.out_channels, -1, *(1 for _ in conv.kernel_size))}

    def from_adapter(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        A, B = tensors["lora_A"], tensors["lora_B"]
        if A.shape != self.lora_A.shape:
            rows, columns = self.lora_A.shape
            narrow = A.flatten(1)[:rows, :columns]
            if not torch.equal(self._unfolded(narrow), A):
                raise AdapterError("not in Microsoft's folded form; load this adapter into a plain model instead")
            A, B = narrow, B.reshape(self.lora_B.shape)
        return {"lora_A": A, "lora_B": B}

    def _unfolded(self, A: Tensor) -> Tensor:
        """Returns the A of PEFT's convolution.

        Row o of the weight, as a matrix, is `a` consecutive rows of the folded product side by side.  This equals a
        plain product of rank r * prod(kernel), with A repeated block-diagonally.
        """
        outputs, inputs, *kernel = self._base_shape
        repeated: Tensor = torch.block_diag(*[A] * (self.lora_B.shape[0] // outputs))
        return repeated.view(-1, inputs, *kernel)

    def forward(self, x: Tensor) -> Tensor:
        if not self._active:
            return cast(Tensor, super().forward(x))
        conv = cast(nn.Conv2d, self)
        delta = self.delta_weight()
        if self.lora_dropout and self.training:
            update: Tensor = conv._conv_forward(self._drop(x), delta.to(x.dtype), None)
            return cast(Tensor, super().forward(x)) + update
        y: Tensor = conv._conv_forward(x, add_delta(dense(self.base_weight), delta), conv.bias)
        return y

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # loralib 0.1.2 saved base weights twice, as `weight` and as `conv.weight`.
        for name in ("weight", "bias"):
            twin = state_dict.pop(f"{prefix}conv.{name}", None)
            if twin is not None:
                state_dict.setdefault(prefix + name, twin)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


# Microsoft's classes.


class _BuiltLayer(LoRALayer):
    """The common base of Microsoft's classes: the constructor creates base and adapter together."""

    def _init_lora(self, *args: Any, **kwargs: Any) -> None:
        super()._init_lora(*args, **kwargs)
        if self.r > 0:
            self.base_weight.requires_grad_(False)

    def reset_parameters(self) -> None:
        """Initialises the base weight again and, if there is an adapter, its tensors."""
        self.unmerge()
        super().reset_parameters()  # type: ignore[misc]
        if self.trained_tensors():
            self.reset_lora_parameters()


class Linear(_BuiltLayer, LoRALinear, nn.Linear):
    """nn.Linear with a low-rank update (section 4.1 of the paper).

    Args:
        in_features: size of an input.
        out_features: size of an output.
        r: rank of the update; 0 makes it a plain nn.Linear.
        lora_alpha: the update is scaled by lora_alpha / r.
        lora_dropout: probability of dropping an input of the low-rank path in training mode.
        fan_in_fan_out: store the weight as (in, out), as GPT-2's Conv1D does.
        merge_weights: merge on ``eval()``, unmerge on ``train()``.
        **kwargs: arguments of nn.Linear (bias, device, dtype).

    >>> layer = Linear(8, 4, r=2, lora_alpha=4)
    >>> tuple(layer.lora_A.shape), tuple(layer.lora_B.shape), layer.scaling
    ((2, 8), (4, 2), 2.0)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        self.fan_in_fan_out = fan_in_fan_out
        if fan_in_fan_out:
            self.weight.data = self.weight.data.T.contiguous()
        self._init_lora(r, lora_alpha, lora_dropout, merge_weights)

    def _base_forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.T, self.bias) if self.fan_in_fan_out else nn.Linear.forward(self, x)


class MergedLinear(Linear):
    """A fused projection (such as GPT-2's q, k, v in one) in which only some output blocks are adapted.

    The other arguments are those of `Linear`.

    Args:
        out_features: size of an output; a multiple of len(enable_lora).
        r: rank of each adapted block.
        enable_lora: which of the equal output blocks are adapted; with k of n: A (r*k, in), B (out/n*k, r).

    Raises:
        ConfigError: len(enable_lora) does not divide out_features.

    >>> layer = MergedLinear(8, 12, r=2, enable_lora=[True, False, True])
    >>> tuple(layer.lora_A.shape), tuple(layer.lora_B.shape)
    ((4, 8), (8, 2))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: Sequence[bool] = (False,),
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        blocks = tuple(bool(on) for on in enable_lora)
        if not blocks or out_features % len(blocks):
            raise BlockError(
                f"enable_lora has {len(blocks)} blocks, which does not divide out_features {out_features}; give one "
                "boolean for each of the output's equal blocks"
            )
        self.enable_lora = list(blocks)
        self.blocks = blocks
        # Without an enabled block there is no adapter (loralib 0.1.2 fails on the first forward).
        r = r if any(blocks) else 0
        super().__init__(
            in_features, out_features, r, lora_alpha, lora_dropout, fan_in_fan_out, merge_weights, **kwargs
        )


class BlockError(ConfigError, AssertionError):
    """len(enable_lora) does not divide out_features (loralib 0.1.2 raises AssertionError)."""


class Embedding(_BuiltLayer, LoRAEmbedding, nn.Embedding):
    """nn.Embedding with a low-rank update: A (r, n) starts at zero, B (d, r) is normally distributed.

    Args:
        num_embeddings: n, the number of rows.
        embedding_dim: d, the width of a row.
        r: rank of the update; 0 makes it a plain nn.Embedding.
        lora_alpha: the update is scaled by lora_alpha / r.
        merge_weights: merge on ``eval()``, unmerge on ``train()``.
        **kwargs: arguments of nn.Embedding.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 0,
        lora_alpha: float = 1,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, **kwargs)
        self._init_lora(r, lora_alpha, 0.0, merge_weights)


class _Conv(_BuiltLayer, LoRAFoldedConv):
    """The constructor shared by Conv1d, Conv2d and Conv3d."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, **kwargs)
        self._init_lora(r, lora_alpha, lora_dropout, merge_weights)


class Conv1d(_Conv, nn.Conv1d):
    """nn.Conv1d with a low-rank update in Microsoft's form (see `LoRAFoldedConv`)."""


class Conv2d(_Conv, nn.Conv2d):
    """nn.Conv2d with a low-rank update in Microsoft's form (see `LoRAFoldedConv`)."""


class Conv3d(_Conv, nn.Conv3d):
    """nn.Conv3d with a low-rank update in Microsoft's form (see `LoRAFoldedConv`)."""


# Classes derived from other classes.


def is_conv1d(layer: nn.Module | type[nn.Module]) -> bool:
    """Whether a module or class is transformers' Conv1D: a linear layer whose weight is stored (in, out).

    Does not import transformers.

    >>> is_conv1d(nn.Linear(2, 2))
    False
    """
    kind = layer if isinstance(layer, type) else type(layer)
    return any(f"{c.__module__}.{c.__name__}" == "transformers.pytorch_utils.Conv1D" for c in kind.__mro__)


def adapted_class(mixin: type[LoRALayer], base: type[nn.Module]) -> type[LoRALayer]:
    """Returns the subclass of `mixin` and `base` with the name of `base`; there is only one per pair.

    >>> adapted_class(LoRALinear, nn.Linear).__mro__[1:3] == (LoRALinear, LoRALayer)
    True
    """
    halves = (mixin, base)
    if halves not in _CLASSES:
        namespace = {"__module__": base.__module__, "__doc__": base.__doc__, "_halves": halves}
        # Two threads may get here at once: both use the first class.
        _CLASSES.setdefault(halves, cast("type[LoRALayer]", type(base.__name__, halves, namespace)))
    return _CLASSES[halves]


_CLASSES: dict[tuple[type[LoRALayer], type[nn.Module]], type[LoRALayer]] = {}


def base_class(module: nn.Module) -> type[nn.Module]:
    """Returns the class of a module before `adapted_class`, or its own class if it is not adapted."""
    halves = type(module).__dict__.get("_halves")
    return halves[1] if halves else type(module)


def _rebuild(mixin: type[LoRALayer], base: type[nn.Module]) -> LoRALayer:
    cls = adapted_class(mixin, base)
    return cls.__new__(cls)
