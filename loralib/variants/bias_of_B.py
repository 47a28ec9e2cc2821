"""LoRA with a bias for B: ``y = W x + bias + s (B A x + b)`` (PEFT's `lora_bias`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from ..delta import add_delta
from ..errors import MergeError
from ..layers import LoRALinear

__all__ = ["BiasedLinear"]


class BiasedLinear(LoRALinear):
    """A linear layer that also trains b (out,); merging adds it to the layer's bias, or creates one."""

    lora_B_bias: Parameter

    def tensor_shapes(self, r: int) -> dict[str, tuple[int, ...]]:
        return super().tensor_shapes(r) | {"lora_B_bias": (self._sizes()[1],)}

    def tensor_keys(self) -> dict[str, str]:
        return super().tensor_keys() | {"lora_B_bias": "lora_B.bias"}

    def reset_lora_parameters(self) -> None:
        super().reset_lora_parameters()
        nn.init.zeros_(self.lora_B_bias)

    def output_shift(self) -> Tensor:
        return self.lora_B_bias * self.scaling

    def _merged_tensors(self) -> dict[str, Tensor]:
        merged, shift = super()._merged_tensors(), self.output_shift()
        if not torch.isfinite(shift).all():
            raise MergeError("the bias of B holds NaN or infinite values and was not merged; train again")
        bias = self._parameters["bias"]
        return merged | {"bias": shift.to(self.base_weight.dtype) if bias is None else add_delta(bias, shift)}
