"""Linears whose weights lie in the processor's order (`loralib.ordered`), for generations that go on for a while.

With the few rows of a step of generation, bringing weights into that order is a good part of its time.  So copies that
lie so are made, and dropped when the generation ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, cast

from torch import Tensor, nn

from ..layers import LoRALayer, LoRALinear
from .ordered import MOST_BYTES, OrderedWeight, can_order

__all__ = ["MANY_TEXTS", "PACK_AFTER", "packed", "using_packed"]

# Copies are made after so many steps, or at once for so many texts.  They cost about what two steps of a beam search
# save, or ten of a single text, and how long a generation goes on is not known before.
PACK_AFTER: Final = 4
MANY_TEXTS: Final = 16

Product = Callable[[Tensor], Tensor]


def packed(modules: Iterable[nn.Module]) -> dict[nn.Module, Product]:
    """Returns, for each linear that gains by it, a function that computes its product with a packed weight.

    For a layer with LoRA it is the base's product.
    """
    found = [module for module in modules if _is_linear(module)]
    if sum(cast(Tensor, module.weight).nbytes for module in found) > MOST_BYTES:
        return {}
    return {module: _product(module) for module in found}


@contextmanager
def using_packed(products: Mapping[nn.Module, Product]) -> Iterator[None]:
    """Lets the modules compute their products so."""
    names = {module: "_base_forward" if isinstance(module, LoRALinear) else "forward" for module in products}
    for module, name in names.items():
        module.__dict__[name] = products[module]
    try:
        yield
    finally:
        for module, name in names.items():
            del module.__dict__[name]


def _is_linear(module: nn.Module) -> bool:
    kind: Any = type(module)
    if isinstance(module, LoRALinear):
        if module.fan_in_fan_out or kind.forward is not LoRALinear.forward:
            return False
        kind = next(base for base in kind.__mro__ if not issubclass(base, LoRALayer))
    own = {"forward", "_base_forward"} & module.__dict__.keys()
    weight = module._parameters.get("weight")
    return kind.forward is nn.Linear.forward and not own and type(weight) is nn.Parameter and can_order(weight)


def _product(module: Any) -> Product:
    order = OrderedWeight(module.weight)

    def product(x: Tensor) -> Tensor:
        weight, bias = module.weight, module.bias
        if not order.is_of(weight) or x.dtype != weight.dtype:  # merged or changed in the meantime
            return nn.functional.linear(x, weight, bias)
        return order.times(x, bias=bias)

    return product
