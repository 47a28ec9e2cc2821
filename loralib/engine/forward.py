"""The forward pass of a causal language model, for losses and gradients: its faster parts, and body and head apart.

Most causal language models in transformers consist of a body and a head.  The body then runs once, and the head runs in
chunks over only those hidden states that predict something, exactly as the model's own forward does after its body:
soft-capping, scaling and an adapted head remain the model's own.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UnsupportedModelError
from ..modes import evaluating
from ..wrapping import is_spread, output_head
from .adapted_linears import TrainingLinears
from .attention import Layout, PackedLayout, interface_name, with_layout
from .compiled import CompiledBlocks
from .device_linears import DeviceLinears
from .flex import FlexLayout, bucket, has_compiler, has_flex
from .liger import LigerLoss, has_liger
from .operators import operator_overrides
from .placement import Hold, Overrides, Use, engine_mode, overriding, own_forward
from .quantized_experts import expert_overrides
from .row_linears import RowLinears
from .transfer import to_device

__all__ = ["Forward", "Path", "device_of", "logits_of", "path_of", "plain_logits", "runs_here", "why_not_compiled"]


def device_of(model: nn.Module) -> torch.device:
    """Returns the device of a model's first parameter, where inputs must be placed."""
    return next(model.parameters()).device


Path = Literal["cpu", "gpu", "plain"]
_PATHS: Final[dict[str, Path]] = {"cpu": "cpu", "cuda": "gpu", "mps": "gpu", "xpu": "gpu"}


def path_of(model: nn.Module) -> Path:
    """Returns how a model is computed: with the CPU engine, with the GPU engine, or plainly as in transformers.

    The last applies to all other devices, and if LORALIB_ENGINE is "off".
    """
    if engine_mode() == "off":
        return "plain"
    return _PATHS.get(device_of(model).type, "plain")


def runs_here(model: nn.Module) -> bool:
    """Returns whether a model is computed with the CPU engine."""
    return path_of(model) == "cpu"


def may_compile(device: torch.device) -> bool:
    """Returns whether blocks may be compiled: on CUDA or ROCm, with a compiler, unless LORALIB_ENGINE forbids it."""
    return device.type == "cuda" and engine_mode() == "full" and has_compiler()


def why_not_compiled(device: torch.device) -> str:
    """Returns why blocks cannot be compiled for a device, or "" if they can."""
    if may_compile(device):
        return ""
    if device.type != "cuda":
        return f"the model is on {device.type}, expected cuda"
    return "triton is not installed, or LORALIB_ENGINE is not full"


def liger_for(model: nn.Module, hidden: Tensor, logits: Tensor) -> LigerLoss | None:
    """Returns Liger's loss for a model, if it is installed and the model's head is a plain product; else None.

    Args:
        model: a causal language model.
        hidden: (T, D) some hidden states.
        logits: (T, V) the model's logits for them.
    """
    head: Any = output_head(model)
    if hidden.device.type != "cuda" or engine_mode() != "full" or not has_liger() or not LigerLoss.accepts(head):
        return None
    plain = F.linear(hidden, head.weight, head.bias)  # without soft-capping or scaling
    return LigerLoss(head) if torch.allclose(plain, logits, rtol=1e-3, atol=1e-3 * float(logits.std())) else None


def logits_of(output: Any) -> Tensor:
    """Returns the logits (B, T, V) from the output of a causal language model.

    Raises:
        UnsupportedModelError: the output has none.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise UnsupportedModelError(
            f"the model returns {type(output).__name__}, expected logits of shape (batch, tokens, vocabulary), or an "
            "object with them as `logits`"
        )
    return logits


def plain_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Returns the logits (B, T, V) of ids (B, T), for any kind of model, without a KV cache.

    Raises:
        UnsupportedModelError: the model returns no logits.
    """
    takes = inspect.signature(model.forward).parameters
    return logits_of(model(ids, use_cache=False) if "use_cache" in takes else model(ids))


class Forward:
    """One model's forward pass.

    Args:
        model: a causal language model, adapted or not.
        compiles: whether its blocks may be compiled, on a GPU.
        twins: adapted models that share its weights; each takes some rows of a pass (`engine/row_linears.py`).

    Attributes:
        model: the model.
        path: see `path_of`.
        device: where inputs must be placed.
        compiles: whether decoder blocks are compiled.
        splits: whether the model consists of a body and a head; otherwise only `logits` can be computed.
        has_layouts: whether passes may have a layout; otherwise attention is unchanged.
        liger: computes head and loss together, if possible on a GPU; else None.
        lock: allows only one pass at a time.
    """

    def __init__(self, model: nn.Module, *, compiles: bool = True, twins: Sequence[nn.Module] = ()) -> None:
        self.model, self.device, self.path = model, device_of(model), path_of(model)
        self._is_spread = is_spread(model)
        self._body = self._find_body() if self.path != "plain" else None
        # Sharded blocks, which are gathered when they are called, are not compiled.
        compiles = compiles and self._body is not None and not self._is_spread
        self.compiles = compiles and self.path == "gpu" and may_compile(self.device)
        self._blocks = CompiledBlocks(cast(nn.Module, self._body)) if self.compiles else None
        self._has_flex = engine_mode() == "full" and has_flex(self.device)
        self._linears = self._find_linears(twins)
        self._overrides: Overrides = (
            {**operator_overrides(model), **expert_overrides(model.modules())} if self.path == "cpu" else {}
        )
        if self._blocks is not None:
            self._overrides = self._blocks.overrides
        self._windows: frozenset[int | None] = frozenset()  # window sizes of the layers seen so far
        self.liger: LigerLoss | None = None
        self._states: Tensor | None = None  # returned by the body while the head runs
        self._is_held = False
        self.has_layouts = self._body is not None
        self.lock = threading.RLock()
        with self.hold_model("inference"), evaluating(model.modules()), torch.no_grad():
            self.splits = False
            self.splits = self._probe()

    def _find_linears(self, twins: Sequence[nn.Module]) -> TrainingLinears | DeviceLinears | RowLinears:
        if twins:
            return RowLinears(self.model, twins, fast=self.path == "cpu")
        # Layers outside the body are not grouped: the head runs several times per pass, on chunks.
        in_body = list(self._body.modules()) if self._body is not None else []
        if self.path == "cpu":
            return TrainingLinears(in_body, list(self.model.modules()))
        return DeviceLinears([] if self.compiles else in_body)

    @contextmanager
    def assigned_rows(self, rows: Sequence[int], random: Sequence[torch.Generator]) -> Iterator[None]:
        """Assigns each twin, in order, its number of rows of the passes inside, and its generator for dropout."""
        assert isinstance(self._linears, RowLinears)
        self._linears.rows, self._linears.random = rows, random
        try:
            yield
        finally:
            self._linears.rows = None

    @property
    def prepacked_bytes(self) -> int:
        """Size of the prepacked copies of frozen weights."""
        return self._linears.prepacked_bytes

    @contextmanager
    def hold_model(self, use: Use) -> Iterator[None]:
        """Installs what the pass needs on the model, and removes it afterwards; does nothing if it is already held.

        Raises:
            BusyModelError: the model is in a conflicting use.
        """
        if self._is_held:
            yield
            return
        modules = [*self._overrides, *self._linears.modules]
        if self._body is not None:
            modules.append(self._body)
        attention = interface_name if self.has_layouts else None
        with Hold(self.model, modules, use, attention):
            self._is_held = True
            try:
                yield
            finally:
                self._is_held = False

    @contextmanager
    def computing(self, use: Use, *, gradient: bool) -> Iterator[None]:
        """Context for one pass, or several related ones, with everything that they need installed on the model."""
        with self.lock, torch.set_grad_enabled(gradient), self.hold_model(use), self.overriding():
            yield

    @contextmanager
    def overriding(self) -> Iterator[None]:
        """Overrides modules in this thread; include the backward pass, which may recompute checkpointed layers."""
        body: Overrides = {} if self._body is None else {self._body: self._body_or_states}
        in_backward = self.path == "gpu" and torch.is_grad_enabled()
        with (
            self._whole(),
            self._linears.ready() as linears,
            overriding({**self._overrides, **linears, **body}, in_backward=in_backward),
        ):
            yield

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Keeps the weights outside the blocks of a sharded model gathered during one pass, forward and backward.

        FSDP2 gathers a module's weights when the module is called.  Blocks are called as usual; embedding, last norm
        and head belong to the model itself, which is not called when body and head run separately.
        """
        model: Any = self.model
        if not (self._is_spread and self.splits and hasattr(model, "unshard")):
            yield
            return
        model.unshard()
        try:
            yield
        finally:
            model.reshard()

    def hidden(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns the last hidden states (B, T, D), after the final norm.

        Args:
            ids: (B, T) token ids.
            mask: (B, T) 1 for tokens, 0 for padding.
        """
        output = self._run_body(input_ids=ids, attention_mask=mask)
        return cast(Tensor, output.last_hidden_state)

    def compile_blocks(self) -> None:
        """Enables compiled blocks, if supported; called after a trial on short rows."""
        if self._blocks is not None:
            self._blocks.enabled = True

    def row_length(self, tokens: int) -> int:
        """Returns the required length of a packed row with this many tokens: on a GPU, one of few lengths."""
        return bucket(tokens) if self.path == "gpu" else tokens

    def packed_hidden(self, ids: Tensor, positions: Tensor, ends: Tensor) -> Tensor:
        """Returns the last hidden states (1, T, D) of a packed row.

        Args:
            ids: (1, T) token ids; on the CPU, like the other arguments; T is a `row_length`.
            positions: (1, T) position of each token in its example.
            ends: (T,) see `loralib.data.packing.Pack`.

        Raises:
            UnsupportedModelError: the model's attention needs something that is not supported here.
        """
        layout: Layout = PackedLayout(ends, positions[0])
        if self.path == "gpu":
            layout = FlexLayout(ends, positions[0], self.device, flex=self._has_flex, windows=self._windows)
        ids, positions = to_device(ids, self.device), to_device(positions, self.device)
        with with_layout():
            output = self._run_body(input_ids=ids, position_ids=positions, layout=layout)
        if isinstance(layout, FlexLayout):
            self._windows |= layout.windows
        return cast(Tensor, output.last_hidden_state)

    def head(self, states: Tensor) -> Tensor:
        """Returns the model's logits (R, V) for hidden states (R, D)."""
        self._states = states[None]
        try:
            # FSDP2's own hooks would mistake the end of a chunk's gradients for the end of the backward pass.
            output = own_forward(self.model, use_cache=False) if self._is_spread else self.model(use_cache=False)
            return logits_of(output).flatten(0, 1)
        finally:
            self._states = None

    def logits(self, ids: Tensor) -> Tensor:
        """Returns the logits (B, T, V), for any kind of model."""
        return plain_logits(self.model, ids)

    def _run_body(self, **inputs: Any) -> Any:
        assert self._body is not None
        return self._body(**inputs, use_cache=False)

    def _body_or_states(self, *args: Any, **kwargs: Any) -> Any:
        assert self._body is not None
        return own_forward(self._body, *args, **kwargs) if self._states is None else _BodyOutput(self._states)

    def _find_body(self) -> nn.Module | None:
        prefix = getattr(self.model, "base_model_prefix", "")
        body = getattr(self.model, prefix, None) if prefix else None
        return body if isinstance(body, nn.Module) and hasattr(self.model, "config") else None

    def _probe(self) -> bool:
        """Tests whether body and head reproduce the model's own logits; also finds the groups of linear layers."""
        if self._body is None:
            return False
        ids = torch.arange(4, device=self.device)[None]
        with self._linears.finding_groups() as recorders, overriding(recorders):
            whole = self.logits(ids)
        with overriding({self._body: self._body_or_states}):
            try:
                hidden = self.hidden(ids)[0]
                apart = self.head(hidden)
            except Exception:  # its forward accesses parts of the body, or takes other inputs
                return False
        spread = float(whole.float().std())
        self.liger = liger_for(self.model, hidden, apart)
        return spread < float("inf") and torch.allclose(apart, whole[0], rtol=1e-3, atol=1e-3 * spread)


class _BodyOutput:
    """The output of a body: the last hidden states, and None for any other attribute."""

    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = states

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]
