"""Initialisations that move a part of the base weight into the factors: PiSSA and OLoRA.

Training begins with factors A0 and B0 computed from the base weight W, which is replaced by W - s B0 A0, so the model
initially computes the same (PiSSA: Meng et al. 2024, arXiv:2404.02948; OLoRA: Büyükakyüz 2024, arXiv:2406.01775). Here
W is left unchanged, and what is subtracted from it becomes a second product:

    y = W x + s (B A - B0 A0) x = W x + s [B, -B0] [A; A0] x

This way nothing is rounded into the base, and the adapter is plain LoRA of rank 2r.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..delta import dense, olora_factors, pissa_factors
from ..errors import TargetError
from ..layers import LoRALinear

__all__ = ["WeightInitLinear", "start_factors"]


def start_factors(start: str, weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Returns the initial factors for a weight.

    Args:
        start: "pissa", "pissa_niter_N" (approximate, randomised) or "olora".
        weight: W (out, in).
        r: the rank.
        scaling: see `loralib.delta.scaling_of`.

    Returns:
        A0 (r, in) and B0 (out, r), in fp32.
    """
    if start.lower() == "olora":
        return olora_factors(weight, r)
    _, _, niter = start.lower().partition("_niter_")
    return pissa_factors(weight, r, scaling, int(niter) if niter else None)


class WeightInitLinear(LoRALinear):
    """A linear layer whose factors are initialised from its weight.

    Attributes:
        lora_start_A, lora_start_B: A0 (r, in) and B0 (out, r), which are not trained.
    """

    lora_start_A: Tensor
    lora_start_B: Tensor
    fixed_names = ("lora_start_A", "lora_start_B")

    def check_rank(self, r: int) -> None:
        if r > (limit := min(self._sizes())):
            raise TargetError(
                f"PiSSA and OLoRA (init_lora_weights) start from r directions of the weight, which has only {limit}, "
                f"but r is {r}; lower it, or give this module another r in rank_pattern"
            )

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        weight = self.as_matrix(dense(self.base_weight)).detach()
        A, B = start_factors(str(self.init_lora_weights), weight, self.r, self.scaling)
        self.lora_A.copy_(A)
        self.lora_B.copy_(B)
        for name, tensor in zip(self.fixed_names, (self.lora_A, self.lora_B), strict=True):
            self.register_buffer(name, tensor.detach().clone())

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = torch.cat([self.lora_A, self.lora_start_A]), torch.cat([self.lora_B, -self.lora_start_B], dim=1)
        return A, B

    def to_adapter(self) -> dict[str, Tensor]:
        """Returns the factors of the equivalent plain adapter of rank 2r."""
        A, B = self.factors()
        return {"lora_A": A.detach(), "lora_B": B.detach()}

    def begin_from(self, values: Mapping[str, Tensor]) -> None:
        self.lora_start_A.copy_(values["lora_A"])
        self.lora_start_B.copy_(values["lora_B"])

    def is_as_base(self, values: Mapping[str, Tensor]) -> bool:
        return torch.equal(values["lora_A"], self.lora_start_A) and torch.equal(values["lora_B"], self.lora_start_B)
