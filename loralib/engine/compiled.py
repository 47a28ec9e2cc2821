"""Decoder blocks compiled with torch.compile: the same code for all blocks of a class and rows of all lengths.

A block's forward reads nothing that differs from layer to layer, and the modules inside it are not overridden, so that
all layers share their code: one version for training and one for evaluation.  There are few row lengths (see
`flex.bucket`): the first is compiled as a constant, the second as a variable, and nothing is recompiled afterwards.
A copy of the class's function is compiled, because PyTorch stores compiled code and its recompilation counter with the
function; this way other models are not affected.
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


_BACKEND: Final = "inductor"  # for torch.compile


class CompiledBlocks:
    """The compiled decoder blocks of one model.

    Args:
        body: the module that contains the blocks.

    Attributes:
        overrides: overrides for the blocks; without a layout, or until `enabled`, they run their own forward.
        enabled: initially False, during the model's trial on short rows.
    """

    def __init__(self, body: nn.Module) -> None:
        self._codes: dict[tuple[type, bool], Callable[..., Any]] = {}  # by class, and whether gradients are enabled
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
                cause = getattr(error, "inner_exception", error)  # from the backend compiler
                warnings.warn(
                    f"torch.compile fails on {type(block).__name__}, so training continues without it, more slowly "
                    f"({type(cause).__name__}: {first_line(cause)})",
                    stacklevel=2,
                )
        return own_forward(block, *args, layout=layout, **kwargs)

    def _checkpointed(self, block: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs a block's code, with gradient checkpointing if the block's own forward would use it."""
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
            # Above frozen embeddings.  An unused gradient costs less than separately compiled code for the first block.
            args = args[0].detach().requires_grad_(), *args[1:]
        with with_layout():  # a checkpointed block runs again in another thread
            return self._codes[key](block, *args, **kwargs)


def _checkpoints(forward: Callable[..., Any]) -> bool:
    """Whether a function is transformers' checkpointing wrapper; before version 5.2, `__call__` did its work."""
    return getattr(getattr(forward, "__code__", None), "co_name", "") == "forward_with_checkpointing"


def copied(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a copy of a function with its own code object, to which PyTorch attaches what it compiles.

    Args:
        function: any callable; returned unchanged if it is not a plain function or is decorated.
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
