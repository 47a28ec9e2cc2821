"""Decoder blocks by torch.compile: one piece of compiled code for all blocks of a class, and for rows of all lengths.

A block's forward reads nothing that differs from layer to layer, and nothing is placed on the modules inside it, so
that all layers share their code: one kind of code for training, and one for evaluation.  Lengths are few (see
`flex.bucket`): the first is compiled as a constant, the second as a variable, and after that nothing is compiled again.
What is compiled is a copy of the class's function, since PyTorch keeps what it compiled with the function, and counts
how often it did: other models are not affected.
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
from ..wrapping import decoder_blocks
from .attention import with_layout
from .placement import Overrides, own_forward

__all__ = ["CompiledBlocks", "copied"]


_BACKEND: Final = "inductor"  # of torch.compile


class CompiledBlocks:
    """The compiled blocks of one model.

    Args:
        body: what holds the blocks.

    Attributes:
        overrides: of the blocks; in a pass without a layout, and until `enabled`, they compute their own forward.
        enabled: False at first, while a model is tried on short rows.
    """

    def __init__(self, body: nn.Module) -> None:
        self._codes: dict[tuple[type, bool], Callable[..., Any]] = {}  # of a class, with gradients and without
        self.enabled = False
        self.overrides: Overrides = {block: functools.partial(self._run, block) for block in decoder_blocks(body)}

    def _run(self, block: nn.Module, *args: Any, layout: Any = None, **kwargs: Any) -> Any:
        if layout is None:
            return own_forward(block, *args, **kwargs)
        if self.enabled:
            try:
                return self._checkpointed(block, *args, layout=layout, **kwargs)
            except torch._dynamo.exc.TorchDynamoException as error:
                self.enabled = False
                cause = getattr(error, "inner_exception", error)  # of the compiler behind it
                warnings.warn(
                    f"torch.compile fails on {type(block).__name__}, so training continues without it, more slowly "
                    f"({type(cause).__name__}: {first_line(cause)})",
                    stacklevel=2,
                )
        return own_forward(block, *args, layout=layout, **kwargs)

    def _checkpointed(self, block: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs a block's code, within gradient checkpointing if the block's own forward would do that."""
        compute = functools.partial(self._computed, block, **kwargs)
        if _checkpoints(type(block).forward) and block.gradient_checkpointing and block.training:
            return block._gradient_checkpointing_func(compute, *args)
        return compute(*args)

    def _computed(self, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        key = type(block), torch.is_grad_enabled()
        if key not in self._codes:
            forward = type(block).forward
            while _checkpoints(forward):
                forward = forward.__wrapped__  # type: ignore[attr-defined]
            self._codes[key] = torch.compile(copied(forward), backend=_BACKEND)
        if torch.is_grad_enabled() and args and not args[0].requires_grad:
            # Above frozen embeddings.  A gradient that nobody uses costs less than code of its own for the first block.
            args = args[0].detach().requires_grad_(), *args[1:]
        with with_layout():  # a checkpointed block runs again in another thread
            return self._codes[key](block, *args, **kwargs)


def _checkpoints(forward: Callable[..., Any]) -> bool:
    """Whether a function is transformers' wrapper of a block's forward; before version 5.2 `__call__` did its work."""
    return getattr(getattr(forward, "__code__", None), "co_name", "") == "forward_with_checkpointing"


def copied(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the same function with code of its own, which PyTorch keeps what it compiled with.

    Args:
        function: any; what is no plain function, or stands behind a decorator, is returned as it is.
    """
    if hasattr(function, "__wrapped__") or not isinstance(function, types.FunctionType):
        return function
    copy = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
