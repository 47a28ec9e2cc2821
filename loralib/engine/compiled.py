"""Decoder blocks by torch.compile: one piece of compiled code for all blocks of a class, and for rows of all lengths.

A block's forward reads nothing that differs from layer to layer, and nothing is placed on the modules inside it, so
that all layers share their code.  Lengths are few (see `flex.bucket`): the first is compiled as a constant, the second
as a variable, and after that nothing is compiled again.  The code that is compiled is a copy of the class's function:
what PyTorch keeps with it belongs to this model alone.
"""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn

from ..errors import first_line
from .attention import with_layout
from .placement import Overrides, own_forward

__all__ = ["CompiledBlocks", "decoder_blocks"]


_BACKEND: Final = "inductor"  # of torch.compile


def decoder_blocks(body: nn.Module) -> list[nn.Module]:
    """Returns the blocks of a decoder: the modules of that list which holds most of its parameters."""
    lists = [module for module in body.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=lambda modules: sum(p.numel() for p in modules.parameters()), default=[]))


class CompiledBlocks:
    """The compiled blocks of one model.

    Args:
        body: what holds the blocks.

    Attributes:
        overrides: of the blocks; in a pass without a layout they compute their own forward.
    """

    def __init__(self, body: nn.Module) -> None:
        self._codes: dict[type, Callable[..., Any]] = {}
        self._failed = False
        self.overrides: Overrides = {block: functools.partial(self._run, block) for block in decoder_blocks(body)}

    def _run(self, block: nn.Module, *args: Any, layout: Any = None, **kwargs: Any) -> Any:
        if layout is None:
            return own_forward(block, *args, **kwargs)
        if not self._failed:
            try:
                with with_layout():  # a checkpointed block runs again in another thread
                    return self._code(type(block))(block, *args, layout=layout, **kwargs)
            except torch._dynamo.exc.TorchDynamoException as error:
                self._failed = True
                warnings.warn(
                    f"torch.compile fails on {type(block).__name__}, and training goes on without it, more slowly "
                    f"({type(error).__name__}: {first_line(error)})",
                    stacklevel=2,
                )
        return own_forward(block, *args, layout=layout, **kwargs)

    def _code(self, kind: type) -> Callable[..., Any]:
        if kind not in self._codes:
            self._codes[kind] = torch.compile(_copied(kind.forward), backend=_BACKEND)  # type: ignore[attr-defined]
        return self._codes[kind]


def _copied(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the same function with code of its own."""
    inner = getattr(function, "__wrapped__", None)
    if inner is not None or not isinstance(function, types.FunctionType):
        return function  # behind a decorator, whose code is shared in any case
    copy = types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
