"""DoRA, weight-decomposed LoRA: in addition to A and B, a layer trains the norm of each row of its weight.

    y = m / ||W + s B A|| * (W x + s B A x) + bias        (Liu et al. 2024, arXiv:2402.09353, equation 5)

The norm is treated as a constant in the backward pass (section 4.3).  m is initialised with the norms of the base's
rows, so that training starts from the base.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from ..delta import delta_weight, dense, dora_norms, dora_weight, row_squares, state_of
from ..layers import LoRAConv, LoRAEmbedding, LoRALayer, LoRALinear, LoRAReadLinear

__all__ = ["DoRAConv", "DoRAEmbedding", "DoRALayer", "DoRALinear", "DoRAReadLinear"]


@dataclass
class _NormCache:
    """Cached values of a layer: the squared norms of W's rows, and the norms of the rows of W + s B A."""

    of_base: tuple[Any, ...]  # identifies the state of W
    squares: Tensor
    factors: tuple[Tensor, ...] | None = None  # A and B; None during training, when norms are not reused
    norms: Tensor | None = None


class DoRALayer(LoRALayer):
    """What DoRA adds to any kind of LoRA layer, whose mixin follows this one.

    Attributes:
        lora_magnitude_vector: m, one number per output; for a convolution (1, out, 1, ...), as in PEFT.
    """

    lora_magnitude_vector: Parameter
    _norm_cache: _NormCache

    def tensor_shapes(self, r: int) -> dict[str, tuple[int, ...]]:
        outputs = self.as_matrix(torch.empty(self._base_shape, device="meta")).shape[0]
        return super().tensor_shapes(r) | {"lora_magnitude_vector": (outputs,)}

    def reset_lora_parameters(self) -> None:
        super().reset_lora_parameters()
        with torch.no_grad():
            self.lora_magnitude_vector.copy_(self._row_norms().view_as(self.lora_magnitude_vector))

    def delta_weight(self) -> Tensor:
        weight = self.as_matrix(dense(self.base_weight))
        low_rank = delta_weight(*self.factors(), self.scaling)
        moved = dora_weight(weight, low_rank, self.lora_magnitude_vector.flatten())
        return self.as_stored(moved - weight.to(moved.dtype))

    def output_scale(self) -> Tensor:
        """Returns ``m / ||W + s B A||`` (out,)."""
        return self.lora_magnitude_vector.flatten() / self._row_norms()

    def _row_norms(self) -> Tensor:
        """Returns ``||W + s B A||`` (out,).  Outside training, it is cached as long as W, A and B do not change."""
        # Disables inference_mode, whose tensors could not take part in a later backward pass.
        with torch.inference_mode(False), torch.no_grad():
            if torch.compiler.is_compiling():
                return self._computed_norms(row_squares(self.as_matrix(dense(self.base_weight))))
            of_base = state_of(self.base_weight)
            cache = self.__dict__.get("_norm_cache")
            if cache is None or cache.of_base != of_base:
                cache = self._norm_cache = _NormCache(of_base, row_squares(self.as_matrix(dense(self.base_weight))))
            # Compared by value, because not every optimiser updates version counters.
            if self.training or cache.factors is None or not all(map(torch.equal, cache.factors, self._pair())):
                cache.norms = self._computed_norms(cache.squares)
                cache.factors = None if self.training else tuple(factor.detach().clone() for factor in self._pair())
            return cast(Tensor, cache.norms)

    def _pair(self) -> tuple[Tensor, Tensor]:
        return self.lora_A, self.lora_B

    def _computed_norms(self, squares: Tensor) -> Tensor:
        return dora_norms(self.as_matrix(dense(self.base_weight)), squares, *self.factors(), self.scaling)

    # New tensors may be allocated at the addresses of the cached ones.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoRALayer:
        self.__dict__.pop("_norm_cache", None)
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.__dict__.pop("_norm_cache", None)
        super()._load_from_state_dict(*args, **kwargs)


class DoRALinear(DoRALayer, LoRALinear):
    """A linear layer, like `LoRALinear`; with `blocks`, the magnitudes of the other blocks are trained too."""


class DoRAReadLinear(DoRALayer, LoRAReadLinear):
    """A linear layer whose weight is read by others (`LoRAReadLinear`)."""


class DoRAEmbedding(DoRALayer, LoRAEmbedding):
    """An embedding, whose outputs are the entries of a row: m (d,) scales columns, as in PEFT."""


class DoRAConv(DoRALayer, LoRAConv):
    """A convolution, whose outputs are channels."""

    def tensor_shapes(self, r: int) -> dict[str, tuple[int, ...]]:
        shapes = super().tensor_shapes(r)
        outputs, _, *kernel = self._base_shape
        return shapes | {"lora_magnitude_vector": (1, outputs, *(1 for _ in kernel))}
