"""Small operators that each make one pass over memory, and linear layers with LoRA, compiled on first use.

Between the matrix products of a small model, PyTorch runs thousands of operators on tensors that fit into the cache, so
the call overhead is about as large as the work itself.  `kernels.c` contains the few that matter and, for processors
with dot products of bf16 pairs, a linear layer that computes its low-rank update within the same sums.  It is compiled
in about a second if gcc is found, and kept in the cache directory; if that fails, or LORALIB_ENGINE forbids it,
`loaded` returns None, and PyTorch's operators are used instead.

Tensors are fp32 or bf16; results are rounded once, when they are stored.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import itertools
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from ctypes import c_float, c_int, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..bases.quant import (
    BLOCK,
    GGUF_BLOCK,
    Int8Weight,
    NF4Weight,
    Q4Weight,
    Q8Weight,
    QuantizedWeight,
    absmax_map,
    levels,
)
from ..errors import OutputError
from ..files import cache_directory, write_whole
from .placement import engine_mode

__all__ = [
    "FEW_ROWS",
    "LANES",
    "Factors",
    "GroupOperands",
    "Kernels",
    "RowUpdate",
    "RowUpdates",
    "VisibilityBlocks",
    "loaded",
]

_SOURCE: Final = Path(__file__).with_suffix(".c")
# No -ffast-math: NaN and infinity must be preserved, or a diverging run would go unnoticed.
_FLAGS: Final = ("-O3", "-march=native", "-fno-math-errno", "-fPIC", "-fopenmp")
# As in kernels.c: numbers computed at once (in attention: queries, or heads of queries), and keys.
LANES: Final = 16
_KEYS: Final = 8
# For products: rows, columns, the length of sums, and the number of parts of a sum computed at once.
_TILE, _PANEL, _DEPTH, _PIECES = 6, 64, 4096, 64
_READ_ON: Final = 16  # numbers read beyond the last pairs
# Up to this many rows, our kernel for low-rank updates is faster than PyTorch, but our kernel for products is not.
FEW_ROWS: Final = 64
_BLOCK: Final = 4  # rows with the same low-rank update, computed at once
_AT_ONCE: Final = 64  # number of bf16 pair multiplications that take about as long as any other operator on one number
# Size from which a second thread gains more than it costs.
_GRAIN: Final = 16384
# Threads sum gradients separately, in at most this many numbers in total.
_MAX_SUMS: Final = 2**26
_PLAIN: Final = (
    Tensor,
    nn.Parameter,
)  # other classes, such as quantised tensors, have different storage
_KINDS: Final = {torch.float32: "f32", torch.bfloat16: "bf16"}

# Argument types of each function: p for a pointer, n for a size, f for a float, i for a flag or a number of threads.
_ARGUMENTS: Final = {
    "rms_norm": "ppppnnfi",
    "rms_norm_back": "pppppnni",
    "swiglu": "pppni",
    "swiglu_back": "pppppni",
    "scaled_back": "pppppnni",
    "gelu": "ppni",
    "gelu_back": "pppni",
    "rotate": "ppppnnnnii",
    "row_updates": "ppppppppnnni",
    "copy_scaled": "pppppppnii",
    "log_sums": "ppppnnni",
    "attention": "ppppppppppppnnnnnnnnnfi",
    "attention_back": "ppppppppppppppppnnnnnnnfi",
}
# Functions that need a processor with dot products of bf16 pairs.
_OF_PAIRS: Final = {
    "product": "pppppnnnnnnpni",
    "lora": "ppppppppppppppnnnnnpni",
    "lora_back": "pppppppppppppppppppnnnnnpni",
}
_TYPES: Final[dict[str, Any]] = {"p": c_void_p, "n": c_int64, "f": c_float, "i": c_int}


@dataclass(frozen=True)
class VisibilityBlocks:
    """Which queries see which keys, for `Kernels.attention`: blocks of at most 16 lanes, one per query and head.

    Attributes:
        rows: (n + 1,) block b contains the queries rows[b] .. rows[b + 1] - 1.
        sequences: (n,) the sequence whose keys each block sees.
        starts: (n + 1,) block b sees keys[starts[b]], .., keys[starts[b + 1] - 1].
        keys: indices of keys in their sequence.
        seen: which lanes see each of these keys, as one bit per lane.
        heads: number of a query's heads that share keys and occupy consecutive lanes of one block.
        widest: the maximum number of keys of any block.
    """

    rows: Tensor
    sequences: Tensor
    starts: Tensor
    keys: Tensor
    seen: Tensor
    heads: int
    widest: int

    @property
    def count(self) -> int:
        """n, the number of blocks."""
        return len(self.sequences)

    @classmethod
    def of(cls, sees: Tensor, counts: Tensor, sequences: Tensor, heads: int = 1) -> VisibilityBlocks:
        """Returns the blocks for queries in groups.

        Args:
            sees: (n, 16 // heads, C) bool: which keys each query of a block sees; False for missing queries.
            counts: (n,) the number of queries of each block.
            sequences: (n,) the sequence of each block.
            heads: see the attributes.

        >>> sees = torch.tensor([[[True, False, True]] + [[False] * 3] * 15])
        >>> blocks = VisibilityBlocks.of(sees, counts=torch.tensor([1]), sequences=torch.tensor([0]))
        >>> blocks.keys.tolist(), blocks.starts.tolist(), blocks.rows.tolist()
        ([0, 2], [0, 2], [0, 1])
        """
        bits = _bits(sees, heads)  # (n, C)
        block, keys = bits.nonzero(as_tuple=True)
        of_each = torch.bincount(block, minlength=len(sees))
        return cls._listed(counts, sequences, of_each, keys, bits[block, keys], heads)

    @classmethod
    def of_tiles(cls, tiles: Sequence[tuple[Tensor, Tensor]]) -> VisibilityBlocks:
        """Returns the blocks of a single text, for heads computed one by one, without a mask of all queries and keys.

        Args:
            tiles: for each block, the keys (K,) that its queries see, and which query sees which of them: (L, K) bool.

        >>> blocks = VisibilityBlocks.of_tiles([(torch.tensor([0, 2]), torch.tensor([[True, True]]))])
        >>> blocks.keys.tolist(), blocks.starts.tolist(), blocks.rows.tolist()
        ([0, 2], [0, 2], [0, 1])
        """
        counts = torch.tensor([len(sees) for _, sees in tiles])
        of_each = torch.tensor([len(keys) for keys, _ in tiles])
        keys, seen = torch.cat([keys for keys, _ in tiles]), torch.cat([_bits(sees, 1) for _, sees in tiles])
        return cls._listed(counts, torch.zeros_like(counts), of_each, keys, seen, 1)

    @classmethod
    def _listed(
        cls, counts: Tensor, sequences: Tensor, of_each: Tensor, keys: Tensor, seen: Tensor, heads: int
    ) -> VisibilityBlocks:
        rows, starts, widest = _sums(counts), _sums(of_each), int(of_each.max())
        return cls(rows, sequences.to(torch.int32), starts, keys.to(torch.int32), seen, heads, widest)


def _bits(sees: Tensor, heads: int) -> Tensor:
    """Converts which query sees each key (..., L, K) into one bit per lane (..., K)."""
    lanes = (((1 << heads) - 1) << (heads * torch.arange(sees.shape[-2]))).to(torch.int16)
    return (sees * lanes[:, None]).sum(-2, dtype=torch.int16)


def _sums(counts: Tensor) -> Tensor:
    return F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)


class Factors(NamedTuple):
    """The LoRA factors of layers that read the same input, or their gradients.

    Attributes:
        A: (R, in), all A_i (r_i, in) stacked.
        B: B_i of each layer, transposed: (r_i, out_i).
    """

    A: Tensor
    B: list[Tensor]


class RowUpdate(NamedTuple):
    """A low-rank update of some rows.

    Attributes:
        rows: the row indices.
        A: (r, in).
        B: (r, out).
        scale: factor applied to the update.
    """

    rows: Sequence[int]
    A: Tensor
    B: Tensor
    scale: float


class RowUpdates:
    """A prepared kernel call for given rows; it keeps the factors alive whose addresses are among its arguments."""

    def __init__(self, function: Any, updates: Sequence[RowUpdate], arguments: tuple[Any, ...]) -> None:
        self._function, self._updates, self._arguments = function, tuple(updates), arguments

    def __call__(self, x: Tensor, y: Tensor) -> None:
        self._function(x.data_ptr(), y.data_ptr(), *self._arguments)


class _Packed(ctypes.Structure):
    """`struct packed` of kernels.c: the memory layout of a quantised weight."""

    _fields_ = (
        *((name, c_void_p) for name in ("codes", "absmax", "scales", "map", "levels")),
        *((name, c_void_p) for name in ("halves", "minima", "scale_codes", "minimum_codes")),
        ("offset", c_float),
        ("bits", c_int32),
        ("width", c_int64),
        ("shared", c_int64),
    )


def _packed(weight: Tensor) -> _Packed | None:
    """Returns the layout of a quantised weight, determined once; None for other weights."""
    if not isinstance(weight, QuantizedWeight):
        return None
    known: _Packed | None = weight.__dict__.get("_packed")
    if known is None:
        known = _Packed(weight.codes.data_ptr(), width=weight.stored_shape[1])
        places: dict[str, Tensor] = {}
        if isinstance(weight, NF4Weight):
            places = {"absmax": weight.absmax_codes, "scales": weight.absmax_scales}
            places |= {"map": absmax_map(), "levels": levels()}
            known.offset = float(weight.offset)
        elif isinstance(weight, Int8Weight):
            places = {"scales": weight.scales}
        elif isinstance(weight, Q8Weight):
            places = {"halves": weight.scales}
        elif isinstance(weight, Q4Weight):
            places = {"halves": weight.scales, "minima": weight.minima}
            places |= {name: getattr(weight, name) for name in ("scale_codes", "minimum_codes")}
            known.shared = (weight.codes.numel() * 2 // GGUF_BLOCK // len(weight.scales)).bit_length() - 1
        for name, place in places.items():
            setattr(known, name, place.data_ptr() if place.numel() else None)
        known.bits = 4 if isinstance(weight, NF4Weight | Q4Weight) else 8
        weight.__dict__["_packed"] = known
    return known


def _plain(weight: Tensor) -> Tensor | None:
    return None if isinstance(weight, QuantizedWeight) else weight


def _is_plain(weight: Tensor) -> bool:
    return type(weight) in _PLAIN and (weight.is_contiguous() or weight.T.is_contiguous())


def _has_known_codes(weight: QuantizedWeight) -> bool:
    return not isinstance(weight, NF4Weight) or not weight.stored_shape[1] % BLOCK


class GroupOperands:
    """The operands of layers that read the same input, and where the gradients of their factors are written.

    Memory addresses are looked up once, here: a step calls `Kernels.lora` hundreds of times.

    Args:
        weights: W_i (out_i, in).
        biases: (out_i,), or None.
        factors: A and B_i, of a single adapter or of several runs that each have their own rows.
        gradients: where to write their gradients, like the factors.
        rows: number of rows of each run; None: a single adapter has all rows.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        factors: Sequence[Factors],
        gradients: Sequence[Factors],
        rows: Sequence[int] | None = None,
    ) -> None:
        packed = [_packed(weight) for weight in weights]
        self.kept = (weights, biases, factors, gradients, packed)  # keeps them alive while their addresses are used
        self.count, self.runs, self.widths = len(weights), len(factors), [len(w) for w in weights]
        self.ranks, self.width, self.rows = [len(each.A) for each in factors], weights[0].shape[1], rows
        self.weights = (_pointers([_plain(w) for w in weights]), _addresses(packed))
        self.biases = _pointers(biases)
        self.A, self.grad_A = (_pointers([each.A for each in of]) for of in (factors, gradients))
        self.B, self.grad_B = (_pointers([b for each in of for b in each.B]) for of in (factors, gradients))
        self._ranks = _int64s([len(b) for each in factors for b in each.B])
        self._of_weights = (
            _int64s(self.widths),
            _int64s([weight.stride(1) for weight in weights]),
            _int64s([weight.stride(0) for weight in weights]),
        )

    def sizes(self, count: int) -> tuple[Any, ...]:
        """Returns the size arguments of the functions, for this many rows."""
        ends = [0, *itertools.accumulate([count] if self.rows is None else self.rows)]
        tables = (self._ranks, _int64s(ends), *self._of_weights)
        return (*tables, self.count, self.runs, max(self.ranks), count, self.width)


class Kernels:
    """The compiled functions of `kernels.c`.

    Args:
        library: the compiled shared library.

    Raises:
        OSError: it cannot be loaded.
    """

    def __init__(self, library: Path) -> None:
        functions = ctypes.CDLL(str(library))
        self._own = threading.local()  # workspace that each Python thread keeps for its next product
        self._functions: dict[tuple[str, torch.dtype], Any] = {}
        for name, arguments in _ARGUMENTS.items():
            for dtype, kind in _KINDS.items():
                function = getattr(functions, f"{name}_{kind}")
                self._functions[name, dtype] = _typed(function, arguments)
        for name, arguments in _OF_PAIRS.items():
            function = getattr(functions, f"{name}_bf16", None)
            if function is not None:
                self._functions[name, torch.bfloat16] = _typed(function, arguments)

    def accept(self, *tensors: Tensor) -> bool:
        """Returns whether the functions support these tensors: on the CPU, of one known dtype, in whole vectors."""
        dtype = tensors[0].dtype
        return dtype in _KINDS and all(
            x.dtype == dtype and x.device.type == "cpu" and x.shape[-1] % LANES == 0 and type(x) in _PLAIN
            for x in tensors
        )

    def accept_heads(self, x: Tensor, cos: Tensor, sin: Tensor) -> bool:
        """Returns whether `rotate` supports these tensors."""
        halves = x.dim() == 4 and len(x) == 1 and x.shape[-1] % (2 * LANES) == 0
        return halves and self.accept(x, cos, sin) and cos.shape == sin.shape == (1, 1, *x.shape[2:])

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Returns ``w x f`` with ``f = 1 / sqrt(mean(x^2) + eps)``, and f (..., 1).

        Args:
            x: (..., D).
            weight: w, (D,).
            eps: keeps f finite.
        """
        x = x.contiguous()
        y, factor = torch.empty_like(x), torch.empty(*x.shape[:-1], 1)
        self._run("rms_norm", x, weight, y, factor, factor.numel(), len(weight), eps, like=x)
        return y, factor

    def rms_norm_back(self, gradient: Tensor, x: Tensor, weight: Tensor, factor: Tensor) -> Tensor:
        """Returns the gradient of `rms_norm` in x, given the gradient (..., D) of its result."""
        gradient, x = gradient.contiguous(), x.contiguous()
        found = torch.empty_like(x)
        self._run("rms_norm_back", gradient, x, weight, factor, found, factor.numel(), len(weight), like=x)
        return found

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """Returns ``silu(gate) * up``, for two tensors of the same shape."""
        return self._each_number("swiglu", gate, up)

    def swiglu_back(self, gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the gradients of `swiglu` in gate and up, given the gradient of its result."""
        gradient, gate, up = gradient.contiguous(), gate.contiguous(), up.contiguous()
        of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
        self._run("swiglu_back", gradient, gate, up, of_gate, of_up, gate.numel(), like=gate)
        return of_gate, of_up

    def scaled_back(self, gradient: Tensor, y: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """Returns, for ``y = (1 + step) z``, the gradient in z (T, D) given that of y, and the sums of gradient y (D,).

        Args:
            gradient: (T, D).
            y: (T, D).
            step: (D,).
        """
        gradient, y = gradient.contiguous(), y.contiguous()
        grad_z, sums = torch.empty_like(y), torch.zeros(y.shape[-1])
        self._run("scaled_back", gradient, y, step, grad_z, sums, y.numel() // len(step), len(step), like=y)
        return grad_z, sums

    def gelu(self, x: Tensor) -> Tensor:
        """Returns ``0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))``."""
        return self._each_number("gelu", x)

    def gelu_back(self, gradient: Tensor, x: Tensor) -> Tensor:
        """Returns the gradient of `gelu` in x, given the gradient of its result."""
        return self._each_number("gelu_back", gradient, x)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
        """Returns ``(x1 cos1 - x2 sin1, x2 cos2 + x1 sin2)``, x1 and x2 the halves of x; back: its transpose.

        Args:
            x: (1, H, T, D); copied unless the heads of a token are adjacent in memory, as in a linear layer's output.
            cos: (1, 1, T, D).
            sin: (1, 1, T, D).
            back: whether x is the gradient of the result, and the gradient of the input is computed.
        """
        _, heads, count, width = x.shape
        if x.stride(3) != 1 or x.stride(1) != width:
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        cos, sin = cos.contiguous(), sin.contiguous()
        found = torch.empty(1, count, heads, width, dtype=x.dtype)
        self._run("rotate", x, cos, sin, found, count, heads, width, x.stride(2), back, like=x)
        return found.transpose(1, 2)

    def log_sums(self, x: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns, for each row of x (R, V): the maximum, the sum of e^(x - maximum), and the maximum of each group.

        Args:
            x: (R, V).
            group: how many consecutive numbers form a group; a multiple of 16 that divides V.
        """
        x = x.contiguous()
        rows, width = x.shape
        most, sums, of_groups = torch.empty(rows), torch.empty(rows), x.new_empty(rows, width // group)
        self._run("log_sums", x, most, sums, of_groups, rows, width, group, like=x)
        return most, sums, of_groups

    def accept_row_updates(self, updates: Sequence[RowUpdate]) -> bool:
        """Returns whether `row_updates` supports these updates."""
        return all(
            self.accept(each.A, each.B) and each.A.is_contiguous() and each.B.is_contiguous() for each in updates
        )

    def row_updates(self, updates: Sequence[RowUpdate]) -> RowUpdates:
        """Returns a function that adds low-rank updates to a linear layer's result, ``y += scale (x A^T) B``.

        It is called with x (n, in), and y (n, out), which it changes in the rows of each update; arguments are prepared
        once, for many steps.  Each row may occur only once.
        """
        blocks = [(each, each.rows[at : at + _BLOCK]) for each in updates for at in range(0, len(each.rows), _BLOCK)]
        count = len(blocks)
        places = (c_int32 * (count * _BLOCK))(
            *[row for _, rows in blocks for row in (*rows, *[0] * (_BLOCK - len(rows)))]
        )
        counts = (c_int32 * count)(*[len(rows) for _, rows in blocks])
        A, B = _pointers([each.A for each, _ in blocks]), _pointers([each.B for each, _ in blocks])
        ranks = (c_int32 * count)(*[len(each.A) for each, _ in blocks])
        scales = (c_float * count)(*[each.scale for each, _ in blocks])
        first = updates[0]
        function, size, width = self._functions["row_updates", first.A.dtype], first.A.shape[1], first.B.shape[1]
        work = sum(len(rows) * len(each.A) for each, rows in blocks) * (size + width)
        threads = min(torch.get_num_threads(), count) if work >= _AT_ONCE * _GRAIN else 1
        return RowUpdates(function, updates, (places, counts, A, B, ranks, scales, count, size, width, threads))

    def accept_copies(self, own: Sequence[Tensor], casts: Sequence[Tensor]) -> bool:
        """Returns whether `copy_scaled` supports these tensors."""
        dtype = casts[0].dtype
        return (
            dtype in _KINDS
            and all(each.dtype == dtype and each.is_cpu and 1 in each.stride() for each in casts)
            and all(
                each.dtype == torch.float32 and each.is_cpu and each.is_contiguous() and type(each) in _PLAIN
                for each in own
            )
        )

    def copy_scaled(
        self, own: Sequence[Tensor], casts: Sequence[Tensor], scales: Sequence[float], *, back: bool = False
    ) -> None:
        """Sets matrices to others times a scalar: casts from factors, or the factors' gradients from those of casts.

        Args:
            own: (n_i, d_i) in fp32.
            casts: (n_i, d_i), with contiguous rows or contiguous columns.
            scales: one for each matrix.
            back: sets `own` instead of `casts`.
        """
        shapes, steps = zip(*[each.shape for each in own], strict=True), [each.stride() for each in casts]
        # If there is only one column, its stride is irrelevant and may have any value.
        across = [1 if step[1] == 1 or each.shape[1] == 1 else step[1] for step, each in zip(steps, casts, strict=True)]
        tables = [*map(_int64s, shapes), _int64s([step[0] for step in steps]), _int64s(across)]
        threads = self._threads(sum(each.numel() for each in own))
        numbers = (c_float * len(own))(*scales)
        dtype = casts[0].dtype
        self._call("copy_scaled", *map(_pointers, (own, casts)), *tables, numbers, len(own), back, threads, dtype=dtype)

    def accept_queries(self, q: Tensor, k: Tensor, v: Tensor) -> bool:
        """Returns whether `attention` supports these: queries, keys and values, whose last dimension is a head's."""
        return self.accept(q, k, v) and q.shape[-1] == k.shape[-1] == v.shape[-1]

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, blocks: VisibilityBlocks, scaling: float, *, keep: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Returns softmax(scaling q k^T) v over the keys that each query sees, and the tensor `attention_back` needs.

        Args:
            q: (R, H, D).
            k: (T, H_kv, D), the keys of one text; or (S, H_kv, C, D), those of several.
            v: like k.
            blocks: which queries see which keys of which text.
            scaling: factor applied to the scores.
            keep: whether to keep the tensor that `attention_back` needs.
        """
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        (_, heads, width), count = q.shape, blocks.count
        if k.dim() == 3:
            kv_heads, steps = k.shape[1], (0, width, k.shape[1] * width)
        else:
            kv_heads, steps = k.shape[1], (k.stride(0), k.stride(1), width)
        threads, y = self._threads(q.numel()), torch.empty_like(q)
        kept = torch.empty(2, heads // blocks.heads, count, LANES) if keep else None
        most_and_share = (None, None) if kept is None else kept.unbind()
        each = _whole(blocks.widest) * 2 * width + (_whole(blocks.widest) + width) * LANES
        room = torch.empty(threads, each)
        tables = (blocks.rows, blocks.sequences, blocks.starts, blocks.keys, blocks.seen)
        sizes = (each, count, heads, kv_heads, width, blocks.heads, *steps)
        self._call("attention", q, k, v, y, *most_and_share, *tables, room, *sizes, scaling, threads, dtype=q.dtype)
        return y, kept

    def attention_back(
        self,
        gradient: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        y: Tensor,
        kept: Tensor,
        blocks: VisibilityBlocks,
        scaling: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the gradients of `attention` in q, k, v, over one text, head by head, given that of its result y."""
        gradient, q, k, v = gradient.contiguous(), q.contiguous(), k.contiguous(), v.contiguous()
        (_, heads, width), (total, kv_heads, _) = q.shape, k.shape
        threads, parts = self._threads(q.numel()), 1
        if kv_heads < 2 * threads:  # otherwise each thread sums gradients for its own heads
            threads = parts = max(1, min(threads, _MAX_SUMS // (2 * k.numel())))
        found = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
        sums = torch.zeros(parts, 2, k.numel())
        each = (_whole(blocks.widest) + LANES) * 2 * width + (2 * _whole(blocks.widest) + width) * LANES
        room = torch.empty(threads, each)
        tensors = (gradient, q, k, v, y, *kept.unbind(), *found, sums)
        tables = (blocks.rows, blocks.starts, blocks.keys, blocks.seen)
        sizes = (each, total, blocks.count, heads, kv_heads, width, parts)
        self._call("attention_back", *tensors, *tables, room, *sizes, scaling, threads, dtype=q.dtype)
        return found

    def accept_weight(self, weight: Tensor | None) -> bool:
        """Returns whether `product` and `lora` support this weight (out, in), and its transpose, on this machine."""
        return (
            weight is not None
            and ("product", weight.dtype) in self._functions
            and weight.device.type == "cpu"
            and weight.dim() == 2
            and all(size > 0 and size % (2 * LANES) == 0 for size in weight.shape)
            and (_has_known_codes(weight) if isinstance(weight, QuantizedWeight) else _is_plain(weight))
        )

    def product(self, x: Tensor, weight: Tensor, added: Tensor | None = None) -> Tensor:
        """Returns ``x W^T + added``, rounded once; a row's result does not depend on the number of rows.

        Args:
            x: (T, in).
            weight: W (out, in).
            added: (out,) or (T, out).
        """
        x, added = x.contiguous(), None if added is None else added.contiguous()
        (count, width), y = x.shape, x.new_empty(len(x), len(weight))
        room, each, threads = self._room_for_products(count, width, len(weight))
        step = 0 if added is None or added.dim() == 1 else len(weight)
        sizes = (count, width, len(weight), step, weight.stride(1), weight.stride(0))
        packed = _addressed(_packed(weight))
        self._call("product", x, _plain(weight), packed, added, y, *sizes, room, each, threads, dtype=x.dtype)
        return y

    def accept_factors(self, *runs: Factors) -> bool:
        """Returns whether `lora` supports factors of these shapes and dtype, for these runs, on this machine."""
        tensors = [each for A, B in runs for each in (A, *B)]
        layers = len(runs[0].B)
        here = ("lora", tensors[0].dtype) in self._functions and self.accept(*tensors) and layers + len(runs) <= _PIECES
        return (
            here
            and all(each.shape[1] % (2 * LANES) == 0 and each.is_contiguous() for each in tensors)
            and all(len(b) % 2 == 0 for _, B in runs for b in B)
        )

    def lora(self, x: Tensor, seen: Tensor, operands: GroupOperands) -> tuple[Tensor, list[Tensor]]:
        """Returns h = z A^T (T, R), and x W_i^T + bias_i + h_i B_i (T, out_i), rounded once.

        h_i are the columns of h that correspond to the rows of A_i.  Each of several runs has its own rows of x; R is
        the largest of their ranks, and the columns of h beyond a run's own rank are undefined.

        Args:
            x: (T, in).
            seen: z (T, in), x or x after dropout.
            operands: W_i, bias_i, A and B_i.
        """
        dense, of = x.contiguous(), operands
        x, seen = dense, dense if seen is x else seen.contiguous()
        count, widths = len(x), of.widths
        h, found = x.new_empty(count, max(of.ranks)), [x.new_empty(count, width) for width in widths]
        room, each, threads = self._room_for_products(count, of.width + sum(of.ranks), sum(widths), of.width)
        tensors = (x, seen, *of.weights, of.biases, of.A, of.B, h, _pointers(found))
        self._call("lora", *tensors, *of.sizes(count), room, each, threads, dtype=x.dtype)
        return h, found

    def lora_back(
        self,
        gradients: Sequence[Tensor],
        seen: Tensor,
        h: Tensor,
        operands: GroupOperands,
        *,
        wants_x: bool,
        wants_seen: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Computes the gradients of `lora`, given those of its results; returns those in x and z, if wanted.

        Args:
            gradients: (T, out_i) of each layer.
            seen: z, as for `lora`.
            h: the first result of `lora`.
            operands: as for `lora`; the factors' gradients are written to its gradient tensors.
            wants_x: whether the gradient in x is wanted.
            wants_seen: whether the gradient in z is wanted separately; otherwise it is part of the gradient in x.
        """
        gradients, seen, of = [gradient.contiguous() for gradient in gradients], seen.contiguous(), operands
        count, widths = len(seen), of.widths
        depth = sum(widths) + sum(of.ranks)
        room, each, threads = self._room_for_products(count, depth, of.width, of.width, *widths)
        grad_h = torch.empty_like(h)
        grad_x, grad_seen = (torch.empty_like(seen) if wanted else None for wanted in (wants_x, wants_seen))
        of_pairs = (count + of.runs) * h.shape[1]
        pairs = h.new_empty(2 * of_pairs + _READ_ON)  # of h, and of its gradient
        given = (_pointers(gradients), seen, h, *of.weights, of.A, of.B)
        results = (grad_h, grad_x, grad_seen, of.grad_A, of.grad_B, pairs, pairs[of_pairs:])
        self._call("lora_back", *given, *results, *of.sizes(count), room, each, threads, dtype=seen.dtype)
        return grad_x, grad_seen

    def _room_for_products(self, rows: int, depth: int, columns: int, *widths: int) -> tuple[Tensor, int, int]:
        """Returns a workspace where threads rearrange their operands, in vectors of `LANES` numbers.

        Args:
            rows: number of rows of the results.
            depth: number of products summed for each result.
            columns: total number of columns of all results.
            widths: widths of the factors whose rows are stored in pairs.
        """
        threads = self._threads(rows * depth * columns // _AT_ONCE)
        panel = min(depth, _DEPTH) // 2 * _PANEL // LANES
        sums = -(-rows // _TILE) * _TILE * _PANEL // LANES if depth > _DEPTH else 0
        each = max(panel + sums, *(width // 2 for width in widths), 0)
        room: Tensor | None = getattr(self._own, "room", None)
        if room is None or len(room) < threads * each:
            room = self._own.room = torch.empty(threads * each, LANES)
        return room, each, threads

    def _threads(self, numbers: int) -> int:
        return torch.get_num_threads() if numbers >= _GRAIN else 1

    def _each_number(self, name: str, *tensors: Tensor) -> Tensor:
        """Applies an elementwise function to one or more tensors."""
        given = [tensor.contiguous() for tensor in tensors]
        found = torch.empty_like(given[0])
        self._run(name, *given, found, found.numel(), like=found)
        return found

    def _run(self, name: str, *arguments: Any, like: Tensor) -> None:
        self._call(name, *arguments, self._threads(like.numel()), dtype=like.dtype)

    def _call(self, name: str, *arguments: Any, dtype: torch.dtype) -> None:
        given = [each.data_ptr() if isinstance(each, Tensor) else each for each in arguments]
        self._functions[name, dtype](*given)


def _typed(function: Any, arguments: str) -> Any:
    function.argtypes, function.restype = [_TYPES[each] for each in arguments], None
    return function


def _pointers(tensors: Sequence[Tensor | None]) -> Any:
    return (c_void_p * len(tensors))(*[None if tensor is None else tensor.data_ptr() for tensor in tensors])


def _addresses(packed: Sequence[_Packed | None]) -> Any:
    return (c_void_p * len(packed))(*map(_addressed, packed))


def _addressed(packed: _Packed | None) -> int | None:
    return None if packed is None else ctypes.addressof(packed)


def _int64s(values: Sequence[int]) -> Any:
    return (c_int64 * len(values))(*values)


def _whole(count: int) -> int:
    """Returns the count rounded up to a multiple of the keys that are multiplied together."""
    return -(-count // _KEYS) * _KEYS


def loaded() -> Kernels | None:
    """Returns the compiled functions, or None if they are unavailable or LORALIB_ENGINE forbids them."""
    return compiled() if engine_mode() == "full" else None


@functools.cache
def compiled() -> Kernels | None:
    """Returns the compiled functions, compiled at the first call; None if that fails."""
    compiler = shutil.which(os.environ.get("CC") or "gcc")
    try:
        return None if compiler is None else _load(compiler)
    except (OSError, subprocess.SubprocessError):  # PyTorch's operators do the same work
        return None


def _load(compiler: str) -> Kernels:
    made_of = [_SOURCE.read_bytes(), " ".join(_FLAGS).encode(), compiler.encode(), _processor()]
    name = f"kernels-{hashlib.sha256(b'|'.join(made_of)).hexdigest()[:16]}.so"
    kept = cache_directory() / name
    with contextlib.suppress(OSError):  # missing, or incomplete
        return Kernels(kept)
    with tempfile.TemporaryDirectory() as temporary:
        built = Path(temporary) / name
        # Compiled and linked separately, so that OpenMP is not linked: threads must be run by the library that PyTorch
        # loads, not a second one, whose threads would compete with PyTorch's.
        _call(compiler, *_FLAGS, "-c", str(_SOURCE), "-o", f"{built}.o")
        _call(compiler, "-shared", f"{built}.o", "-o", str(built))
        kernels = Kernels(built)
        with contextlib.suppress(OutputError):  # cannot be cached
            write_whole(kept, lambda aside: shutil.copyfile(built, aside))
        return kernels


def _call(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=120)


def _processor() -> bytes:
    """Returns what the compiler's -march=native depends on, since machines may share a cache directory."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
        return b"\n".join(sorted({line for line in lines if line.startswith((b"flags", b"model name", b"Features"))}))
    except OSError:
        return f"{platform.machine()} {platform.processor()}".encode()
