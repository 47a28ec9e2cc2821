"""Linears whose weights lie as the processor multiplies them: PyTorch brings them into that order at every call.

With the few rows of a step of generation that is a good part of its time.  oneDNN can keep a copy in its own order; the
products are the same.  So a generation that goes on for a while makes such copies, and drops them when it ends.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from ..layers import LinearPath, LoRALayer

__all__ = ["PACK_AFTER", "packed", "using_packed"]

# Copies are made after so many steps.  They cost about what ten steps save, whatever the number of rows, and how long a
# generation goes on is not known before.
PACK_AFTER: Final = 8
# Copies of larger models could fill the memory.
_MOST_BYTES: Final = 2**30

Product = Callable[[Tensor], Tensor]


def packed(modules: Iterable[nn.Module]) -> dict[nn.Module, Product]:
    """Returns, for each linear that gains by it, a function that computes its product with a packed weight.

    Those are linears in bf16 on an x86 processor with units for it.  For a layer with LoRA it is the base's product.
    """
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return {}
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return {}
    found = [module for module in modules if _is_linear(module)]
    if sum(cast(Tensor, module.weight).nbytes for module in found) > _MOST_BYTES:
        return {}
    return {module: _product(module) for module in found}


@contextmanager
def using_packed(products: Mapping[nn.Module, Product]) -> Iterator[None]:
    """Lets the modules compute their products so."""
    names = {module: "_base_forward" if isinstance(module, LinearPath) else "forward" for module in products}
    for module, name in names.items():
        module.__dict__[name] = products[module]
    try:
        yield
    finally:
        for module, name in names.items():
            del module.__dict__[name]


def _is_linear(module: nn.Module) -> bool:
    kind: Any = type(module)
    if isinstance(module, LinearPath):
        if module.fan_in_fan_out or kind.forward is not LinearPath.forward:
            return False
        kind = next(base for base in kind.__mro__ if not issubclass(base, LoRALayer))
    own = {"forward", "_base_forward"} & module.__dict__.keys()
    weight = module._parameters.get("weight")
    return (
        kind.forward is nn.Linear.forward
        and not own
        and type(weight) is nn.Parameter
        and type(weight.data) is Tensor
        and not weight.is_inference()
        and weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
    )


def _product(module: Any) -> Product:
    weight: Tensor = module.weight
    bias: Tensor | None = module.bias
    version, order = weight._version, torch.ops.mkldnn._reorder_linear_weight(weight.detach())

    def product(x: Tensor) -> Tensor:
        same = module.weight is weight and module.bias is bias and weight._version == version
        if not same or x.dtype != weight.dtype:  # merged or changed in the meantime
            return nn.functional.linear(x, module.weight, module.bias)
        return torch.ops.mkldnn._linear_pointwise(x, order, bias, "none", [], "")  # type: ignore[no-any-return]

    return product
