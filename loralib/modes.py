"""Train and eval mode of a model's modules: changed for a while, and given back to each module as it was."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final

from torch import nn

__all__ = ["evaluating", "keeping_modes"]

_LOCK: Final = threading.Lock()
_EVALUATED: Final[weakref.WeakKeyDictionary[nn.Module, int]] = weakref.WeakKeyDictionary()


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Puts modules in eval mode, and back in train mode those that were in it, once no thread needs eval mode any more.

    `eval()` is not called, because layers with ``merge_weights`` would merge.

    >>> model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    >>> with evaluating(model):
    ...     [module.training for module in model]
    [False, False]
    >>> [module.training for module in model]
    [True, False]
    """
    with _LOCK:
        shared = len(_EVALUATED) > 0  # checked once: this runs for every generated token
        switched = [module for module in modules if module.training or (shared and module in _EVALUATED)]
        for module in switched:
            _EVALUATED[module] = _EVALUATED.get(module, 0) + 1
            module.training = False
    try:
        yield
    finally:
        with _LOCK:
            for module in switched:
                _EVALUATED[module] -= 1
                if not _EVALUATED[module]:
                    del _EVALUATED[module]
                    module.training = True


@contextmanager
def keeping_modes(model: nn.Module) -> Iterator[None]:
    """Puts each module of a model back in its own mode afterwards, as `train()` or `eval()` of that module would.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).eval())
    >>> with keeping_modes(model):
    ...     _ = model.train()
    >>> [module.training for module in model]
    [True, False]
    """
    before = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in before:  # parents come first: their train() reaches their children too
            if module.training != mode:
                module.train(mode)
