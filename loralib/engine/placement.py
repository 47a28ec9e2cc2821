"""The only file that installs anything on a model, and removes it again.

Two things are installed, both only on the model's own modules, never in a file's globals or on an object that another
model uses:

- A module's `forward` becomes a `_Switch`.  It runs the class's own forward, unless the calling thread is inside
  `overriding(overrides)` and `overrides` has a function for this module.  So whatever a user, another thread or
  another model computes in the meantime remains bit for bit the same.
- A module's `config` that names its attention function becomes a view of that config.  It shares all attributes,
  but inside a pass that has a layout (see `attention.py`) it names our function in transformers' attention interface.

A `Hold` installs them for a whole run or generation.  Holds are counted, so that they can nest and overlap in threads;
the last one to end restores everything.
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

__all__ = ["Hold", "Override", "Overrides", "engine_mode", "overriding", "own_forward", "require_free"]

Override = Callable[..., Any]
Overrides = Mapping[nn.Module, Override]
Use = Literal["training", "inference"]

_LOCK: Final = threading.RLock()
_THREAD: Final = threading.local()  # .overrides: those of the thread's current pass
_IN_BACKWARD: Final[dict[object, Overrides]] = {}  # see `overriding`
_MODES: Final = ("full", "torch", "off")


def engine_mode() -> str:
    """Returns the value of the environment variable LORALIB_ENGINE.

    "full" (the default) uses all of the engine, "torch" all but the compiled kernels, and "off" installs nothing:
    models compute as in transformers, batches are padded, and generation recomputes every token.

    Raises:
        ConfigError: it has an unknown value.
    """
    mode = os.environ.get("LORALIB_ENGINE") or "full"
    if mode not in _MODES:
        raise ConfigError(f"the environment variable LORALIB_ENGINE is {mode!r}, expected {', '.join(_MODES)}")
    return mode


@contextmanager
def overriding(overrides: Overrides, *, in_backward: bool = False) -> Iterator[None]:
    """Overrides modules in this thread, if a `Hold` has installed their switches.

    Args:
        overrides: the function to call instead of the forward of each overridden module.
        in_backward: also override them in all backward passes, for a model used only by this thread.  A GPU's backward
            pass runs in one of autograd's own threads, in which checkpointed layers are recomputed.
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
    """Returns the overrides that apply to a module in the backward pass run by this thread; None if there are none."""
    if torch._C._current_graph_task_id() == -1:
        return None
    return next((overrides for overrides in list(_IN_BACKWARD.values()) if module in overrides), None)


def own_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Runs the forward of a module's class."""
    return type(module).forward(module, *args, **kwargs)


def _bound_forward(module: nn.Module) -> Override:
    return types.MethodType(type(module).forward, module)


class _Switch:
    """The forward of one module: its override in the calling thread's current pass, if any, or its own forward."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)  # avoids a cycle, so that an unused model is freed at once

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self._module()
        assert module is not None
        overrides = getattr(_THREAD, "overrides", None)
        if overrides is None and _IN_BACKWARD:
            overrides = _overrides_of_backward(module)
        override = None if overrides is None else overrides.get(module)
        return own_forward(module, *args, **kwargs) if override is None else override(*args, **kwargs)

    def __reduce__(self) -> Any:
        # A copied or pickled model gets its class's forward, bound to the copy.
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
    """Returns a view of a config, sharing its attribute dictionary, that names our attention function in our passes."""
    view: Any = object.__new__(_view_class(type(config), attention))
    object.__setattr__(view, "__dict__", config.__dict__)
    return view


_ABSENT: Final = object()


@dataclass
class _Slot:
    """An attribute of a module in which something was installed."""

    original: Any
    placed: Any
    holders: int = 1


_SLOTS: Final[dict[tuple[int, str], _Slot]] = {}  # by the module's id, which stays valid: holds keep modules alive
_HOLDS: Final[set[Hold]] = set()


class Hold:
    """Everything that one run or generation installs on a model, from its construction to `release`.

    Args:
        model: the model.
        modules: the modules that may be overridden; those whose forward was replaced by other code are left alone.
        use: "training" requires exclusive use of the model; "inference" may overlap with other inference.
        attention: maps the name of an attention implementation of transformers to ours; None: attention is unchanged.

    Raises:
        BusyModelError: the model is in a conflicting use.
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
        for other in list(_HOLDS):  # a forgotten generator may be garbage-collected in this loop
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
        """Removes whatever no other hold needs; a second call does nothing."""
        with _LOCK:
            for module, name in self._places:
                slot = _SLOTS[id(module), name]
                slot.holders -= 1
                if slot.holders:
                    continue
                del _SLOTS[id(module), name]
                # Anything installed over ours since stays; through ours, it still reaches the original.
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
    """Rejects a model that is in a conflicting use, before anything is done to it.

    Raises:
        BusyModelError: it is in use.
    """
    Hold(model, (), use).release()


def _is_free(module: nn.Module) -> bool:
    """Whether a module's forward is its class's; some tools, and copies of held models, set it on the instance."""
    forward = module.__dict__.get("forward")
    own = getattr(forward, "__self__", None) is module and getattr(forward, "__func__", None) is type(module).forward
    return "forward" not in module.__dict__ or own
