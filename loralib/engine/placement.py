"""The only file that puts anything in a model's place, and takes it back.

Two things are placed, both on one model's own modules, never in a file's globals or on an object that another model
reads:

- `forward` of a module becomes a `_Switch`.  It computes the class's own forward, unless the calling thread is inside
  `overriding(overrides)` and `overrides` has a function for this module.  So what a user, another thread or another
  model computes meanwhile does not change by a bit.
- `config` of a module that asks it for its attention function becomes a view of that config.  It shares all attributes,
  but inside a pass that has a layout (see `attention.py`) it names our function in transformers' attention interface.

A `Hold` places them for a whole run or generation.  Holds are counted, so that they can nest and overlap in threads;
the last one to end takes everything back.
"""

from __future__ import annotations

import os
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal, cast

import torch
from torch import nn

from ..errors import BusyModelError, ConfigError

__all__ = ["Hold", "Override", "Overrides", "engine_mode", "evaluating", "overriding", "own_forward", "require_free"]

Override = Callable[..., Any]
Overrides = Mapping[nn.Module, Override]
Use = Literal["training", "inference"]

_LOCK: Final = threading.RLock()
_THREAD: Final = threading.local()  # .overrides: those of the pass that this thread is inside of
_IN_BACKWARD: Final[dict[object, Overrides]] = {}  # see `overriding`
_MODES: Final = ("full", "torch", "off")


def engine_mode() -> str:
    """Returns what the environment variable LORALIB_ENGINE asks for.

    "full" (the default) uses all of the engine, "torch" all but the compiled kernels, and "off" places nothing: models
    compute as transformers wrote them, batches are padded, and generation recomputes every token.

    Raises:
        ConfigError: it has another value.
    """
    mode = os.environ.get("LORALIB_ENGINE") or "full"
    if mode not in _MODES:
        raise ConfigError(f"the environment variable LORALIB_ENGINE is {mode!r}, expected {', '.join(_MODES)}")
    return mode


@contextmanager
def overriding(overrides: Overrides, *, in_backward: bool = False) -> Iterator[None]:
    """Overrides modules in this thread, where a `Hold` has placed their switches.

    Args:
        overrides: for each overridden module, the function to call instead of its forward.
        in_backward: override them in all backward passes as well, for a model that this thread alone uses.  A GPU's
            backward pass has a thread of autograd's own, in which checkpointed layers run again.
    """
    before = getattr(_THREAD, "overrides", None)
    _THREAD.overrides = overrides
    this_pass = object()
    if in_backward:
        _IN_BACKWARD[this_pass] = overrides
    try:
        yield
    finally:
        _THREAD.overrides = before
        _IN_BACKWARD.pop(this_pass, None)


def _overrides_of_backward(module: nn.Module) -> Overrides | None:
    """Returns the overrides of the pass whose backward pass runs a module in this thread, if it is such a one."""
    if torch._C._current_graph_task_id() == -1:
        return None
    return next((overrides for overrides in list(_IN_BACKWARD.values()) if module in overrides), None)


def own_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Computes a module as its class does."""
    return type(module).forward(module, *args, **kwargs)


def _bound_forward(module: nn.Module) -> Override:
    return types.MethodType(type(module).forward, module)


class _Switch:
    """The forward of one module: its override in the pass that the calling thread is inside of, or its own."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)  # no cycle: a model that nobody needs any more is freed at once

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self._module()
        assert module is not None
        overrides = getattr(_THREAD, "overrides", None)
        if overrides is None and _IN_BACKWARD:
            overrides = _overrides_of_backward(module)
        override = None if overrides is None else overrides.get(module)
        return own_forward(module, *args, **kwargs) if override is None else override(*args, **kwargs)

    def __reduce__(self) -> Any:
        # A model that is copied or pickled meanwhile gets its class's forward, bound to the copy.
        return _bound_forward, (self._module(),)


def _new(kind: type) -> Any:
    return object.__new__(kind)


_VIEW_CLASSES: Final[dict[tuple[type, Any], type]] = {}


def _view_class(config_class: type, attention: Callable[[str | None], str | None]) -> type:
    if (config_class, attention) in _VIEW_CLASSES:
        return _VIEW_CLASSES[config_class, attention]

    def name(self: Any) -> str | None:
        return attention(self.__dict__.get("_attn_implementation_internal"))

    def rename(self: Any, value: Any) -> None:
        config_class._attn_implementation.fset(self, value)  # type: ignore[attr-defined]

    def reduce(self: Any, protocol: Any) -> Any:  # a copy is a plain config
        return _new, (config_class,), self.__dict__

    body: dict[str, Any] = {"_attn_implementation": property(name, rename), "__reduce_ex__": reduce}
    body["__module__"] = config_class.__module__
    _VIEW_CLASSES[config_class, attention] = type(config_class.__name__, (config_class,), body)
    return _VIEW_CLASSES[config_class, attention]


def _view(attention: Callable[[str | None], str | None], config: Any) -> Any:
    """A config with the same attributes, as the same dictionary, that names our attention function in our passes."""
    view: Any = object.__new__(_view_class(type(config), attention))
    object.__setattr__(view, "__dict__", config.__dict__)
    return view


_ABSENT: Final = object()


@dataclass
class _Slot:
    """An attribute of a module that something was placed in."""

    original: Any
    placed: Any
    holders: int = 1


_SLOTS: Final[dict[tuple[int, str], _Slot]] = {}  # by the module's id: holds keep their modules alive
_HOLDS: Final[set[Hold]] = set()


class Hold:
    """What one run or generation needs in a model's place, from its construction to `release`.

    Args:
        model: the model.
        modules: those that may be overridden; one whose forward was replaced by somebody else is left alone.
        use: "training" shares the model with nobody, "inference" with other inference.
        attention: the name of our attention function for a given one of transformers'; None: attention stays.

    Raises:
        BusyModelError: the model is in use in a way that rules this use out.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Iterable[nn.Module],
        use: Use,
        attention: Callable[[str | None], str | None] | None = None,
    ) -> None:
        self._use = use
        self._modules = frozenset(map(id, model.modules()))
        self._places: list[tuple[nn.Module, str]] = []
        with _LOCK:
            self._refuse_conflicts(model)
            _HOLDS.add(self)
            try:
                for module in modules:
                    if (id(module), "forward") in _SLOTS or _is_free(module):
                        self._place(module, "forward", _Switch(module))
                views: dict[int, Any] = {}
                for module in model.modules() if attention is not None else ():
                    config = module.__dict__.get("config")
                    if hasattr(config, "_attn_implementation"):
                        if id(config) not in views:
                            views[id(config)] = _view(cast(Any, attention), config)
                        self._place(module, "config", views[id(config)])
            except BaseException:
                self.release()
                raise

    def _refuse_conflicts(self, model: nn.Module) -> None:
        for other in list(_HOLDS):  # a forgotten generator may be collected meanwhile
            if "training" in (self._use, other._use) and not self._modules.isdisjoint(other._modules):
                words = {"training": "being trained", "inference": "generating or being evaluated"}
                raise BusyModelError(
                    f"this {type(model).__name__} is already {words[other._use]} and cannot be used for {self._use} "
                    "at the same time. Wait for that to end (close or finish a Generator), or use a copy of the model."
                )

    def _place(self, module: nn.Module, name: str, value: Any) -> None:
        slot = _SLOTS.get((id(module), name))
        if slot is not None:
            slot.holders += 1
        else:
            _SLOTS[id(module), name] = _Slot(module.__dict__.get(name, _ABSENT), value)
            module.__dict__[name] = value
        self._places.append((module, name))

    def release(self) -> None:
        """Takes back what no other hold needs; a second call does nothing."""
        with _LOCK:
            for module, name in self._places:
                slot = _SLOTS[id(module), name]
                slot.holders -= 1
                if slot.holders:
                    continue
                del _SLOTS[id(module), name]
                # What somebody has put over it since stays; it finds the original where ours was.
                if module.__dict__.get(name) is slot.placed:
                    if slot.original is _ABSENT:
                        del module.__dict__[name]
                    else:
                        module.__dict__[name] = slot.original
            self._places.clear()
            _HOLDS.discard(self)

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def require_free(model: nn.Module, use: Use) -> None:
    """Refuses a model that is in use in a way that rules this use out, before anything is done to it.

    Raises:
        BusyModelError: it is.
    """
    Hold(model, (), use).release()


def _is_free(module: nn.Module) -> bool:
    """Whether a module's forward is its class's; some tools, and copies of held models, keep it on the instance."""
    forward = module.__dict__.get("forward")
    own = getattr(forward, "__self__", None) is module and getattr(forward, "__func__", None) is type(module).forward
    return "forward" not in module.__dict__ or own


_EVALUATED: Final[weakref.WeakKeyDictionary[nn.Module, int]] = weakref.WeakKeyDictionary()


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Switches dropout off, and back on in those modules where it was on, once no thread needs it off any more."""
    with _LOCK:
        shared = len(_EVALUATED) > 0  # asked once: this runs at every generated token
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
