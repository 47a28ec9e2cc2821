"""What ends a run: a signal, or a fault, since nothing fails silently.

SIGINT, SIGTERM, SIGHUP and Ctrl-Break ask it to finish its update, save, and end.  Otherwise the loss stays finite,
gradients reach every adapted layer, and the adapter learns.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType

import torch
from torch import Tensor, nn

from ..delta import dense
from ..errors import InterruptedRunError, NothingLearnedError, list_faults
from ..injection import adapted_layers
from ..layers import LoRALayer

__all__ = ["StopRequest", "check_gradients", "check_learned", "loss_fault", "starts_as_base", "stop_on_signal"]

_WINDOW = 20  # updates whose average loss tells an explosion from noise


def loss_fault(losses: Sequence[float], loss: float, gradient_norm: float, step: int) -> str:
    """Returns what is wrong with an update's loss or gradient, or ""; `losses` are those of the updates before."""
    if not math.isfinite(loss):
        return f"the training loss became {loss} at update {step}"
    recent = losses[-_WINDOW:]
    if len(recent) == _WINDOW and sum(recent) / _WINDOW >= 2 * losses[0] + 1:
        return f"the training loss exploded: {sum(recent) / _WINDOW:.3g} over the last {_WINDOW} updates"
    if not math.isfinite(gradient_norm):  # a finite loss can have such a gradient; the update would spoil every weight
        return f"the gradient became {gradient_norm} at update {step}"
    return ""


def check_gradients(model: nn.Module) -> str:
    """Checks, before the first real update, that the gradient reaches every adapted layer that took part.

    An embedding's B starts with a gradient of exactly zero, so that one of a layer's tensors must have some.

    Returns:
        A note about layers that never ran, or "".

    Raises:
        NothingLearnedError: names every layer whose gradient is zero, or all layers if none ran.
    """
    layers = adapted_layers(model)
    idle, running = [], {}
    for name, layer in layers:
        gradients = [tensor.grad for tensor in layer.trained_tensors().values() if tensor.grad is not None]
        if gradients:
            running[name] = torch.stack([gradient.any() for gradient in gradients]).any()
        else:
            idle.append(name)
    faults = [f"{name}: its gradient is zero" for name, any_gradient in running.items() if not any_gradient]
    if not running:
        faults = [f"{name}: never ran" for name in idle]
    if faults:
        raise NothingLearnedError(
            list_faults(
                f"{len(faults)} of {len(layers)} adapted layers would learn nothing",
                faults,
                "Leave them out of target_modules, or find what keeps the gradient from them (a detach(), no_grad(), "
                "a frozen path).",
            )
        )
    return (
        list_faults(f"{len(idle)} of {len(layers)} adapted layers never ran and will not learn", idle) if idle else ""
    )


def starts_as_base(model: nn.Module, initial: Mapping[str, Tensor]) -> bool:
    """Whether the model computed what its base does before the first update: one tensor of each layer was zero."""
    return all(
        any(not tensor.any() for tensor in _initial_of(name, layer, initial).values())
        for name, layer in adapted_layers(model)
    )


def check_learned(model: nn.Module, initial: Mapping[str, Tensor], steps: int, lr: float) -> None:
    """Checks that training changed some weight of the model, as far as fp32 can tell.

    Raises:
        NothingLearnedError: the trained parameters have the effect of their `initial` values.
    """
    if not _has_learned(model, initial):
        raise NothingLearnedError(
            f"the adapter ended as it began: its {len(initial)} tensors changed nothing in {steps} updates. "
            f"Raise --lr (now {lr:g}) and look at metrics.jsonl."
        )


@torch.no_grad()
def _has_learned(model: nn.Module, initial: Mapping[str, Tensor]) -> bool:
    layers = adapted_layers(model)
    for name, layer in layers:
        tensors, after = layer.trained_tensors(), layer.delta_weight()
        values = {leaf: tensor.data for leaf, tensor in tensors.items()}
        for leaf, tensor in _initial_of(name, layer, initial).items():
            tensors[leaf].data = tensor
        before = layer.delta_weight()
        for leaf, tensor in values.items():
            tensors[leaf].data = tensor
        if (after - before).norm() > torch.finfo(torch.float32).eps * dense(layer.base_weight).float().norm():
            return True
    in_layers = {id(tensor) for _, layer in layers for tensor in layer.trained_tensors().values()}
    others = ((name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in in_layers)
    return any(not torch.equal(parameter, initial[name]) for name, parameter in others)


def _initial_of(name: str, layer: LoRALayer, initial: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A layer's tensors before the first update; frozen ones are what they were."""
    prefix = f"{name}." if name else ""
    return {leaf: initial.get(prefix + leaf, tensor.detach()) for leaf, tensor in layer.trained_tensors().items()}


_SIGHUP = getattr(signal, "SIGHUP", None)  # the terminal was closed; Windows has no such signal


class StopRequest:
    """A signal handler that remembers the first signal (0: none yet); a second one raises KeyboardInterrupt."""

    signal_number = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number and number != _SIGHUP:  # SIGHUP arrives twice: from the system and from the shell
            raise KeyboardInterrupt
        self.signal_number = self.signal_number or number

    def __bool__(self) -> bool:
        return self.signal_number != 0

    def error(self, message: str) -> InterruptedRunError:
        """Returns the error that ends the run; for its exit code Ctrl-Break counts as SIGTERM, as Windows means it."""
        is_break = self.signal_number == getattr(signal, "SIGBREAK", None)
        name = signal.Signals(self.signal_number).name
        return InterruptedRunError(f"{name}: {message}", signal.SIGTERM if is_break else self.signal_number)


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Collects stop signals instead of dying of them; only the main thread can, elsewhere none ever arrives."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    names = ("SIGINT", "SIGTERM", "SIGBREAK", "SIGHUP")  # SIGBREAK: Ctrl-Break on Windows
    handlers = {getattr(signal, n): signal.getsignal(getattr(signal, n)) for n in names if hasattr(signal, n)}
    if _SIGHUP is not None and handlers[_SIGHUP] is signal.SIG_IGN:  # under nohup the run outlives its terminal
        del handlers[_SIGHUP]
    for number in handlers:
        signal.signal(number, stop)
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
