"""DoRA, weight-decomposed LoRA: beside A and B a layer trains the length of each row of its weight.

    y = m / ||W + s B A|| * (W x + s B A x) + bias        (Liu et al. 2024, arXiv:2402.09353, equation 5)

The norm counts as a constant in the backward pass (section 4.3).  At the start m is the norm of the base's rows, so
that training begins at the base.
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
class _Kept:
    """What a layer computed before: the squared norms of W's rows, and the norms of those of W + s B A."""

    of_base: tuple[Any, ...]  # what W was
    squares: Tensor
    factors: tuple[Tensor, ...] | None = None  # A and B; None where the norms may be of others
    norms: Tensor | None = None


class DoRALayer(LoRALayer):
    """What DoRA adds to a LoRA layer of any kind, whose mixin comes after this one.

    Attributes:
        lora_magnitude_vector: m, one number for each output; for a convolution (1, out, 1, ...), as in PEFT.
    """

    lora_magnitude_vector: Parameter
    _kept: _Kept

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
        """Returns ``||W + s B A||`` (out,).  Outside training it is kept for as long as W, A and B stay the same."""
        # Also inside inference_mode, whose tensors could not take part in a later backward pass.
        with torch.inference_mode(False), torch.no_grad():
            if torch.compiler.is_compiling():
                return self._computed_norms(row_squares(self.as_matrix(dense(self.base_weight))))
            of_base = state_of(self.base_weight)
            kept = self.__dict__.get("_kept")
            if kept is None or kept.of_base != of_base:
                kept = self._kept = _Kept(of_base, row_squares(self.as_matrix(dense(self.base_weight))))
            # By value: not every optimiser counts its changes of a tensor.
            if self.training or kept.factors is None or not all(map(torch.equal, kept.factors, self._pair())):
                kept.norms = self._computed_norms(kept.squares)
                kept.factors = None if self.training else tuple(factor.detach().clone() for factor in self._pair())
            return cast(Tensor, kept.norms)

    def _pair(self) -> tuple[Tensor, Tensor]:
        return self.lora_A, self.lora_B

    def _computed_norms(self, squares: Tensor) -> Tensor:
        return dora_norms(self.as_matrix(dense(self.base_weight)), squares, *self.factors(), self.scaling)

    # Other tensors may come to lie where the known ones lay.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoRALayer:
        self.__dict__.pop("_kept", None)
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.__dict__.pop("_kept", None)
        super()._load_from_state_dict(*args, **kwargs)


class DoRALinear(DoRALayer, LoRALinear):
    """A linear layer, as `LoRALinear`; with `blocks`, the other blocks' magnitudes train too."""


class DoRAReadLinear(DoRALayer, LoRAReadLinear):
    """A linear layer whose weight is read (`LoRAReadLinear`)."""


class DoRAEmbedding(DoRALayer, LoRAEmbedding):
    """A table, whose outputs are the numbers of a row: m (d,) scales columns, as in PEFT."""


class DoRAConv(DoRALayer, LoRAConv):
    """A convolution, whose outputs are channels."""

    def tensor_shapes(self, r: int) -> dict[str, tuple[int, ...]]:
        shapes = super().tensor_shapes(r)
        outputs, _, *kernel = self._base_shape
        return shapes | {"lora_magnitude_vector": (1, outputs, *(1 for _ in kernel))}
