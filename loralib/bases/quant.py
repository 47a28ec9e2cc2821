"""Base weights in 8 or 4 bits, with which frozen layers compute directly (QLoRA, arXiv:2305.14314).

int8   one byte per weight, and a scale for each output: ``W = codes * scales[:, None]``
nf4    4 bits per weight, in blocks of 64: ``W = LEVELS[codes] * absmax of the block``.  The absmax values are 8-bit
       codes themselves, in blocks of 256 (double quantisation, section 3 of the paper): 4.127 bits per weight in all

Embeddings and heads ("tables") stay in 16 bits, as in QLoRA, unless requested: ``int8+tables`` and ``nf4+tables`` store
them as int8.

Weights quantised by other tools may keep their own format, in blocks of 32 along a row (`loralib.bases.gguf`,
`loralib.bases.packed`):

q8_0   8 bits per weight, ``W = scale * codes``: 8.5 bits in all
q4     4 bits per weight, ``W = scale * codes + minimum``: 5 bits in all for GGUF's Q4_0 and Q4_1, 4.625 for Q4_K, and
       4.5 for GPTQ and AWQ with groups of 128

The weights of a layer's experts (experts, out, in) are a stack, in which each weight is quantised separately.

A quantised weight is a tensor that replaces a Parameter, with the shape and dtype of the original weight.  Products
with it dequantise it temporarily; where there are kernels (`engine/kernels.c`), only the few columns currently being
multiplied.  Any other access reads the dequantised weight.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Final, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from ..errors import ConfigError, UnsupportedModelError, did_you_mean
from ..injection import samples_of, samples_of_table
from ..layers import is_conv1d
from ..targets import HEADS
from ..variants import expert_stacks, is_transposed
from ..wrapping import input_table, output_head

__all__ = [
    "KINDS",
    "QUANTIZATIONS",
    "Int8Weight",
    "NF4Weight",
    "Q4Weight",
    "Q8Weight",
    "QuantizedWeight",
    "make_dense",
    "pack_nibbles",
    "quantize",
    "quantize_model",
    "quantize_tables",
    "round_model",
]

BLOCK: Final = 64  # weights that share an absmax
BLOCKS: Final = 256  # absmax values that share a scale
GGUF_BLOCK: Final = 32  # weights of a GGUF file that share a scale
_AT_ONCE: Final = 1 << 24  # weights in fp32 at a time during quantisation
_IN_CACHE: Final = 1 << 20  # the same for NF4, where finding the nearest level takes several passes over them
_HEADS: Final = {head for heads in HEADS.values() for head in heads}  # trained in full
_BLOCKS_AT_ONCE: Final = 1 << 15  # and blocks at a time during dequantisation, which should fit into the cache
aten = torch.ops.aten


class QuantizedWeight(Tensor):
    """A quantised weight (out, in), or its transpose; there is a subclass for each format.

    In a stack of weights (experts, out, in), or of their transposes, the parts of all weights are stacked.

    Attributes:
        codes: integers, in the order of (out, in).
        turned: whether this is (in, out): a transposed view, or stored as in GPT-2.
        samples: samples of the weight before quantisation, used for fingerprints (see `samples_of`).
    """

    KIND: ClassVar[str]
    PARTS: ClassVar[tuple[str, ...]]  # names of its tensors
    ROUNDED: ClassVar[bool] = True  # whether a different, original weight exists, which an adapter should record
    codes: Tensor
    turned: bool
    samples: Tensor

    @staticmethod
    def __new__(
        cls, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype, turned: bool, samples: Any
    ) -> Any:
        """Creates a weight from its parts; `shape` is (out, in), or (experts, out, in)."""
        *stack, outputs, inputs = shape
        seen, strides = ((inputs, outputs), (1, inputs)) if turned else ((outputs, inputs), (inputs, 1))
        weight = Tensor._make_wrapper_subclass(
            cls,
            (*stack, *seen),
            strides=(*[outputs * inputs for _ in stack], *strides),
            dtype=dtype,
            device=parts["codes"].device,
            requires_grad=False,
        )
        for name, part in parts.items():
            setattr(weight, name, part)
        weight.turned, weight.samples = turned, samples
        return weight

    def __init__(self, *args: Any) -> None:
        """Does nothing: everything happens in __new__, where a tensor's shape must be known."""

    @classmethod
    def of(cls, weight: Tensor) -> Mapping[str, Tensor]:
        """Returns the parts of the quantised form of a weight (out, in)."""
        raise NotImplementedError

    @classmethod
    def of_stack(cls, weights: Tensor) -> Mapping[str, Tensor]:
        """Returns the parts of the quantised form of weights (experts, out, in)."""
        parts = [cls.of(weight) for weight in weights]
        return {name: torch.stack([of[name] for of in parts]) for name in cls.PARTS}

    @classmethod
    def bytes_of(cls, outputs: int, inputs: int) -> int:
        """Returns the size in bytes of a quantised weight of that shape."""
        raise NotImplementedError

    def rows(self, dtype: torch.dtype) -> Tensor:
        """Returns the dequantised weight as (out, in)."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """Returns the dequantised weight as an ordinary tensor of the same shape and dtype."""
        if self.dim() == 3:
            return torch.stack([weight.dense() for weight in self.each()])
        rows = self.rows(self.dtype)
        return rows.T if self.turned else rows

    def at(self, number: int) -> QuantizedWeight:
        """Returns one weight of a stack."""
        parts = {name: part[number] for name, part in self._parts().items()}
        return type(self)(parts, self.stored_shape[1:], self.dtype, self.turned, self.samples)

    def each(self) -> list[QuantizedWeight]:
        """Returns all weights of a stack."""
        return [self.at(number) for number in range(len(self))]

    def looked_up(self, ids: Tensor, *_: Any) -> Tensor:
        """Returns the rows at these indices, for an embedding table (rows, width)."""
        return F.embedding(ids, self.dense())

    @property
    def stored_bytes(self) -> int:
        """Size in bytes of the quantised weight."""
        return sum(part.nbytes for part in self._parts().values())

    @property
    def stored_shape(self) -> torch.Size:
        """(out, in) or (experts, out, in), whether or not this tensor is transposed."""
        *stack, one, other = self.shape
        return torch.Size((*stack, other, one)) if self.turned else self.shape

    def _parts(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.PARTS}

    def _like(
        self, parts: Mapping[str, Tensor] | None = None, dtype: torch.dtype | None = None, turn: bool = False
    ) -> QuantizedWeight:
        parts = self._parts() if parts is None else parts
        return type(self)(parts, self.stored_shape, dtype or self.dtype, self.turned != turn, self.samples)

    def _mapped(self, function: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> QuantizedWeight:
        return self._like({name: function(part) for name, part in self._parts().items()}, dtype)

    # The interface that PyTorch requires of tensors composed of other tensors.

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return list(self.PARTS), (self.stored_shape, self.dtype, self.turned, self.samples)

    @classmethod
    def __tensor_unflatten__(cls, parts: Mapping[str, Tensor], context: Any, size: Any, stride: Any) -> QuantizedWeight:
        return cls(parts, *context)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (type(self), self._parts(), *self.__tensor_flatten__()[1], hasattr(self, "_is_param"))

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedWeight:
        copy = self._mapped(Tensor.clone)
        memo[id(self)] = copy = cast(QuantizedWeight, nn.Parameter(copy, False)) if hasattr(self, "_is_param") else copy
        return copy

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if args and isinstance(args[0], QuantizedWeight):
            if (known := _FUNCTIONS.get(func)) is not None:
                return known(*args, **(kwargs or {}))
            if func._schema.is_mutable:
                raise UnsupportedModelError(
                    f"a weight in {cls.KIND} cannot be modified ({func._schema.name}): make a new one with "
                    "loralib.bases.quant.quantize(), or load the base without quantize"
                )
        return func(*tree_map(_as_dense, args), **tree_map(_as_dense, kwargs or {}))


def _as_dense(value: Any) -> Any:
    return value.dense() if isinstance(value, QuantizedWeight) else value


def _converted(weight: QuantizedWeight, *, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> Any:
    return weight._mapped(lambda part: part if device is None else part.to(device), dtype)


def _transposed(weight: QuantizedWeight, one: int, other: int) -> Tensor:
    turned = {one % weight.dim(), other % weight.dim()}
    if len(turned) == 1 or min(turned) == weight.dim() - 2:
        return weight._like(turn=len(turned) == 2)
    return weight.dense().transpose(one, other)


def _permuted(weight: QuantizedWeight, dims: list[int]) -> Tensor:
    *stack, one, other = [dim % weight.dim() for dim in dims]
    return weight._like(turn=one > other) if stack == list(range(len(stack))) else weight.dense().permute(dims)


def _selected(weight: QuantizedWeight, dim: int, index: int) -> Tensor:
    return weight.at(index) if _is_along_stack(weight, dim) else weight.dense().select(dim, index)


def _unbound(weight: QuantizedWeight, dim: int = 0) -> Sequence[Tensor]:
    return weight.each() if _is_along_stack(weight, dim) else weight.dense().unbind(dim)


def _is_along_stack(weight: QuantizedWeight, dim: int) -> bool:
    return weight.dim() == 3 and dim % 3 == 0


# Operators whose result is also a quantised weight. All others, products among them, dequantise it temporarily;
# autograd keeps the quantised one for the backward pass.
_FUNCTIONS: Final[dict[Any, Callable[..., Any]]] = {
    aten.detach.default: QuantizedWeight._like,
    aten.alias.default: QuantizedWeight._like,
    aten.clone.default: lambda weight, **_: weight._mapped(Tensor.clone),
    aten._to_copy.default: _converted,
    aten.t.default: lambda weight: weight._like(turn=True),
    aten.transpose.int: _transposed,
    aten.permute.default: _permuted,
    aten.select.int: _selected,
    aten.unbind.int: _unbound,
    aten.embedding.default: lambda weight, ids, *_: weight.looked_up(
        ids
    ),  # dense, but without dequantising the whole table
}


def _rebuild(
    kind: type[QuantizedWeight],
    parts: Mapping[str, Tensor],
    shape: torch.Size,
    dtype: torch.dtype,
    turned: bool,
    samples: Any,
    is_parameter: bool,
) -> QuantizedWeight:
    weight = kind(parts, shape, dtype, turned, samples)
    return cast(QuantizedWeight, nn.Parameter(weight, False)) if is_parameter else weight


class Int8Weight(QuantizedWeight):
    """One byte per weight: ``codes`` (out, in) from -127 to 127, and ``scales`` (out,), a row's absmax / 127."""

    KIND = "int8"
    PARTS = ("codes", "scales")
    scales: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Mapping[str, Tensor]:
        codes, scales = [], []
        for rows in weight.split(max(1, _AT_ONCE // weight.shape[1])):
            wide = rows.float()
            scale = (wide.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
            codes.append((wide / scale[:, None]).round().to(torch.int8))
            scales.append(scale)
        return {"codes": torch.cat(codes), "scales": torch.cat(scales)}

    @classmethod
    def bytes_of(cls, outputs: int, inputs: int) -> int:
        return outputs * (inputs + 4)

    def rows(self, dtype: torch.dtype) -> Tensor:
        return (self.codes * self.scales[:, None]).to(dtype)

    def looked_up(self, ids: Tensor, *_: Any) -> Tensor:
        return (self.codes[ids] * self.scales[ids][..., None]).to(self.dtype)


class NF4Weight(QuantizedWeight):
    """4 bits per weight, in bitsandbytes' layout: two per byte, the first in the upper half.

    With ``b`` a block of 64 weights, ``absmax[b] = MAP[absmax_codes[b]] * absmax_scales[b // 256] + offset``.

    Attributes:
        codes: (out * in / 2,) bytes.
        absmax_codes: (blocks,) bytes.
        absmax_scales: (blocks / 256,) fp32.
        offset: () fp32, the mean of all absmax values.
    """

    KIND = "nf4"
    PARTS = ("codes", "absmax_codes", "absmax_scales", "offset")
    absmax_codes: Tensor
    absmax_scales: Tensor
    offset: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Mapping[str, Tensor]:
        flat = weight.reshape(-1)
        codes, absmax = [], []
        between = _middles(levels()).tolist()
        for some in flat.split(_IN_CACHE):  # a multiple of the block size, so that no block is split
            blocks = F.pad(some.float(), (0, -len(some) % BLOCK)).view(-1, BLOCK)
            most = blocks.abs().amax(1)
            shares = blocks / most.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
            absmax.append(most)
            places = torch.zeros(shares.shape, dtype=torch.uint8, device=shares.device)
            for middle in between:  # 15 comparisons in cache are faster than a search for each number
                places += shares > middle
            pairs = places.view(-1)[: len(some) + len(some) % 2].view(-1, 2)
            codes.append(pairs[:, 0] << 4 | pairs[:, 1])
        return {"codes": torch.cat(codes), **_absmax_parts(torch.cat(absmax))}

    @classmethod
    def bytes_of(cls, outputs: int, inputs: int) -> int:
        count = outputs * inputs
        blocks = -(-count // BLOCK)
        return -(-count // 2) + blocks + 4 * -(-blocks // BLOCKS) + 4

    def absmax(self) -> Tensor:
        """Returns the absmax of each block, (blocks,) fp32."""
        scales = self.absmax_scales.repeat_interleave(BLOCKS)[: len(self.absmax_codes)]
        return absmax_map().to(self.device)[self.absmax_codes.long()] * scales + self.offset

    def rows(self, dtype: torch.dtype) -> Tensor:
        if self.device.type == "cuda":
            from . import bnb  # imports this file

            if bnb.is_available():
                return bnb.dequantized(self, dtype)
        pairs, absmax, count = _pairs().to(self.device), self.absmax(), self.stored_shape.numel()
        found = torch.empty(len(absmax), BLOCK, dtype=dtype, device=self.device)
        for start in range(0, len(absmax), _BLOCKS_AT_ONCE):
            some = absmax[start : start + _BLOCKS_AT_ONCE]
            codes = self.codes[start * BLOCK // 2 : (start + len(some)) * BLOCK // 2].int()
            codes = F.pad(codes, (0, len(some) * BLOCK // 2 - len(codes)))  # the last block may be incomplete
            values = pairs.index_select(0, codes).view(torch.float32).view(-1, BLOCK)
            found[start : start + len(some)] = values.mul_(some[:, None])
        return found.view(-1)[:count].view(self.stored_shape)


class Q8Weight(QuantizedWeight):
    """Q8_0 of a GGUF file: ``codes`` (out, in) from -128 to 127, and ``scales`` (out, in / 32) in fp16."""

    KIND = "q8_0"
    PARTS = ("codes", "scales")
    ROUNDED = False
    scales: Tensor

    def rows(self, dtype: torch.dtype) -> Tensor:
        blocks = self.codes.view(*self.scales.shape, GGUF_BLOCK)
        return (blocks * self.scales.float()[..., None]).to(dtype).view(self.stored_shape)


class Q4Weight(QuantizedWeight):
    """Q4_0, Q4_1 or Q4_K of a GGUF file, or weights packed by GPTQ or AWQ; codes are packed in bytes as in `NF4Weight`.

    With ``b`` a block of 32 weights, and ``s = b // n`` for the n blocks that share a scale (a power of two),
    ``W = codes * scale_codes[b] * scales[s] + minimum_codes[b] * minima[s]``.

    Attributes:
        codes: (out * in / 2,) bytes.
        scales: (blocks / n,) fp16.
        minima: (blocks / n,) fp16.
        scale_codes: (blocks,) bytes; empty if all are 1.
        minimum_codes: likewise.
    """

    KIND = "q4"
    PARTS = ("codes", "scales", "minima", "scale_codes", "minimum_codes")
    ROUNDED = False
    scales: Tensor
    minima: Tensor
    scale_codes: Tensor
    minimum_codes: Tensor

    def rows(self, dtype: torch.dtype) -> Tensor:
        ones = torch.ones(1, 2 * len(self.codes) // GGUF_BLOCK // len(self.scales), device=self.device)
        scales, minima = (
            (shared.float()[:, None] * (codes.view(len(shared), -1) if len(codes) else ones)).view(-1, 1)
            for codes, shared in ((self.scale_codes, self.scales), (self.minimum_codes, self.minima))
        )
        found = torch.empty(len(scales), GGUF_BLOCK, dtype=dtype, device=self.device)
        for start in range(0, len(scales), _BLOCKS_AT_ONCE):
            some = slice(start, start + _BLOCKS_AT_ONCE)
            pairs = self.codes.view(-1, GGUF_BLOCK // 2)[some]
            codes = torch.stack((pairs >> 4, pairs & 15), -1).view(-1, GGUF_BLOCK)
            found[some] = codes * scales[some] + minima[some]
        return found.view(self.stored_shape)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Packs 4-bit codes as in `Q4Weight`, the first of two in the upper half of a byte.

    >>> pack_nibbles(torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8)).tolist()
    [18, 52]
    """
    pairs = codes.reshape(-1, 2)
    return pairs[:, 0] << 4 | pairs[:, 1]


def _absmax_parts(absmax: Tensor) -> Mapping[str, Tensor]:
    """Quantises the absmax values (blocks,) of a weight."""
    offset = absmax.mean()
    blocks = F.pad(absmax - offset, (0, -len(absmax) % BLOCKS)).view(-1, BLOCKS)
    scales = blocks.abs().amax(1)
    shares = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(shares, _middles(absmax_map())).to(torch.uint8).view(-1)[: len(absmax)]
    return {"absmax_codes": codes, "absmax_scales": scales, "offset": offset}


def _middles(values: Tensor) -> Tensor:
    """Returns the midpoints between neighbouring values, given in ascending order."""
    return (values[1:] + values[:-1]) / 2


@functools.cache
def levels() -> Tensor:
    """Returns the 16 levels of 4-bit NormalFloat (appendix E of the paper): quantiles of a normal distribution.

    >>> levels()[[0, 7, 15]].tolist()
    [-1.0, 0.0, 1.0]
    """
    negative = "1.0 0.6961928009986877 0.5250730514526367 0.39491748809814453 0.28444138169288635 0.18477343022823334"
    positive = (
        "0.0795802995562553 0.16093020141124725 0.24611230194568634 0.33791524171829224 0.44070982933044434 "
        "0.5626170039176941 0.7229568362236023 1.0"
    )
    below = [-float(value) for value in f"{negative} 0.09105003625154495".split()]
    return torch.tensor([*below, 0.0, *map(float, positive.split())])


@functools.cache
def _pairs() -> Tensor:
    """Returns the two levels that each byte stands for, (256,): two fp32 in one int64, to look up both at once."""
    table, byte = levels(), torch.arange(256)
    return torch.stack([table[byte >> 4], table[byte & 15]], 1).contiguous().view(torch.int64).view(-1)


@functools.cache
def absmax_map() -> Tensor:
    """Returns the 256 numbers of the dynamic 8-bit type (Dettmers et al. 2022, arXiv:2110.02861, section 2.1).

    A sign, a decimal exponent of varying length, and in the remaining bits the midpoints of equal parts of 0.1 to 1.

    >>> len(absmax_map()), absmax_map().min().item() < -0.99, absmax_map().max().item()
    (256, True, 1.0)
    """
    middles = [_middles(torch.linspace(0.1, 1, 2**bits + 1)) * 10.0 ** (bits - 6) for bits in range(7)]
    positive = torch.cat(middles)
    return torch.cat([positive, -positive, torch.tensor([0.0, 1.0])]).sort().values


QUANTIZATIONS: Final[Mapping[str, type[QuantizedWeight]]] = {kind.KIND: kind for kind in (Int8Weight, NF4Weight)}


_TABLES: Final = "+tables"
KINDS: Final = (*QUANTIZATIONS, *(f"{kind}{_TABLES}" for kind in QUANTIZATIONS))


def check_kind(kind: str) -> None:
    """Raises ConfigError unless the quantisation format exists."""
    if kind not in KINDS:
        expected = f"{', '.join(map(repr, KINDS[:-1]))} or {KINDS[-1]!r}"
        raise ConfigError(f"quantize is {kind!r}, expected {expected}.{did_you_mean(str(kind), KINDS)}")


def chosen_kind(quantize: str | None) -> str | None:
    """Returns the quantisation format given by a setting; None: no quantisation.

    Raises:
        ConfigError: the format does not exist.
    """
    if quantize in (None, "none"):
        return None
    check_kind(quantize)
    return quantize


def class_of(kind: str) -> type[QuantizedWeight]:
    """Returns the class of linear layers' quantised weights for one of the KINDS."""
    return QUANTIZATIONS[kind.removesuffix(_TABLES)]


def quantize(weight: Tensor, kind: str, *, turned: bool = False) -> QuantizedWeight:
    """Quantises a weight.

    Args:
        weight: (out, in), or (in, out) if it is turned; or a stack of either.  bf16, fp16 or fp32, which remains its
            nominal dtype.
        kind: one of the KINDS; "+tables" has no effect here.
        turned: whether it is stored as (in, out); it is quantised as (out, in) either way.

    Raises:
        ConfigError: the kind does not exist.

    >>> weight = quantize(torch.tensor([[1.0, -0.5], [0.25, 0.125]]), "int8")
    >>> weight.dense().tolist()[0][0], weight.codes.tolist()
    (1.0, [[127, -64], [127, 64]])
    """
    check_kind(kind)
    weight = weight.detach()
    rows, samples = weight.mT if turned else weight, samples_of(weight).clone()
    cls = class_of(kind)
    parts = cls.of(rows) if rows.dim() == 2 else cls.of_stack(rows)
    return cls(parts, rows.shape, weight.dtype, turned, samples)


def quantize_table(weight: Tensor) -> Int8Weight:
    """Quantises the weight (rows, width) of an embedding or a head to int8."""
    weight = weight.detach()
    return Int8Weight(Int8Weight.of(weight), weight.shape, weight.dtype, False, samples_of_table(weight).clone())


def quantize_model(model: nn.Module, kind: str) -> int:
    """Quantises the weights of a model's linear layers and experts in place, except for heads; returns their number.

    Norms are not quantised; embedding and head only if the kind includes tables.  Weights of this kind are kept.

    Raises:
        ConfigError: the kind does not exist, or the model has no linear layer.
    """
    check_kind(kind)
    count = 0
    for module, name in _weights_of(model):
        count += 1
        if not isinstance(module._parameters[name], class_of(kind)):
            weight = quantize(module._parameters[name], kind, turned=is_turned(module))
            module._parameters[name] = nn.Parameter(weight, requires_grad=False)
    if not count:
        raise ConfigError(f"quantize={kind!r} finds no linear layer in {type(model).__name__}")
    quantize_tables(model, kind)
    return count


def quantize_tables(model: nn.Module, kind: str, *, rounds: bool = False) -> None:
    """Quantises the weights of embedding and head, if the kind includes tables; or rounds them to quantised values."""
    known: dict[int, nn.Parameter] = {}  # tied weights stay tied
    for module in model.modules():
        if is_quantized_table(module, model, kind):
            weight: Any = module.weight
            if id(weight) not in known:
                held = quantize_table(weight.to(torch.bfloat16) if rounds else weight)
                values = held.dense().to(weight.dtype) if rounds else held
                known[id(weight)] = nn.Parameter(values, requires_grad=False)
                known[id(weight)].samples = samples_of_table(weight).clone()  # type: ignore[attr-defined]
            module.weight = known[id(weight)]


class Rounding(NamedTuple):
    """How far weights are from what they were before quantisation: ``||W' - W|| / ||W||``.

    Attributes:
        total: over all linear layers and experts.
        most: of the weight that is off the most; NaN if one is not finite.
        where: its name.
    """

    total: float
    most: float
    where: str


def round_model(model: nn.Module, kind: str) -> Rounding:
    """Rounds each weight that a kind quantises to its quantised values, stored in ordinary tensors.

    Args:
        model: its weights are replaced; fingerprints still use the original values.
        kind: one of the KINDS; weights are rounded to bf16 first, like the base of a training run.
    """
    errors, norms = dict[str, float](), dict[str, float]()
    names = {id(module): path for path, module in model.named_modules()}
    for module, name in _weights_of(model):
        weight = module._parameters[name].detach()
        held = quantize(weight.to(torch.bfloat16), kind, turned=is_turned(module))
        values = nn.Parameter(held.dense().to(weight.dtype).contiguous(), requires_grad=False)
        key = f"{names[id(module)]}.{name}"
        errors[key] = float((values.data - weight).double().square().sum())
        norms[key] = float(weight.double().square().sum())
        values.samples = samples_of(weight).clone()  # type: ignore[attr-defined]
        module._parameters[name] = values
    quantize_tables(model, kind, rounds=True)
    shares = {key: math.sqrt(error / norms[key]) if norms[key] else 0.0 for key, error in errors.items()}
    where = max(shares, key=lambda key: math.inf if math.isnan(shares[key]) else shares[key])
    total = math.sqrt(sum(errors.values()) / norm) if (norm := sum(norms.values())) else 0.0
    return Rounding(total, shares[where], where)


def make_dense(model: nn.Module) -> None:
    """Dequantises a model's quantised weights to ordinary tensors of the same values."""
    known: dict[int, nn.Parameter] = {}  # tied weights stay tied
    for module in model.modules():
        for name, parameter in module._parameters.items():
            held: Any = parameter
            if isinstance(held, QuantizedWeight):
                if id(held) not in known:
                    known[id(held)] = nn.Parameter(held.dense().contiguous(), requires_grad=False)
                    known[id(held)].samples = held.samples  # type: ignore[attr-defined]
                module._parameters[name] = known[id(held)]


def _weights_of(model: nn.Module) -> Iterator[tuple[Any, str]]:
    """Yields the weights of a model to quantise, as modules and parameter names."""
    for path, module in list(model.named_modules()):
        yield from ((module, name) for name in quantized_weights(path, module, model))


def quantized_weights(path: str, module: nn.Module, model: nn.Module) -> tuple[str, ...]:
    """Returns the names of a module's weights to quantise.

    These are the weights of linear layers, except for heads, and of experts stored in one tensor.

    Args:
        path: the module's name in the model.
        module: a module of the model.
        model: the model to quantise.
    """
    return ("weight",) if _is_linear_within(path, module, model) else expert_stacks(path, module)


def linears_of(model: nn.Module) -> Iterator[Any]:
    """Yields the linear layers of a model whose weights are quantised."""
    return (module for path, module in list(model.named_modules()) if _is_linear_within(path, module, model))


def _is_linear_within(path: str, module: nn.Module, model: nn.Module) -> bool:
    is_head = module is output_head(model) or path.partition(".")[0] in _HEADS
    return (type(module) is nn.Linear or is_conv1d(module)) and not is_head


def is_turned(module: nn.Module) -> bool:
    """Whether a module stores its weights as (in, out)."""
    return is_conv1d(module) or is_transposed(module)


def is_quantized_table(module: nn.Module, model: nn.Module, kind: str) -> bool:
    """Whether a kind quantises a module's weight as that of an embedding or a head."""
    if not kind.endswith(_TABLES):
        return False
    table, head = input_table(model), output_head(model)
    if module is head:
        return type(module) is nn.Linear
    return module is table and isinstance(module, nn.Embedding) and module.max_norm is None
