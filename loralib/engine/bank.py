"""Many adapters over one base model: each row of a batch uses its own adapter, or none.

Adapters are stored apart from the base; nothing is injected.  For the rows x (T, in) of a pass that uses N adapters,
let A (R, in) be their A_i stacked vertically, B (out, R) their scaled B_i side by side, and M (T, R) the mask that
holds a row's scale in the columns of its own adapter and 0 elsewhere.  Then

    y = x W^T + ((x A^T) * M) B^T

takes two thin products for any number of adapters.  Many consecutive rows with the same adapter, such as those of a
prompt, are multiplied with that adapter's factors only.  With few rows, the overhead of two PyTorch calls exceeds the
work itself; if compiled kernels are available, one call gathers the factors of each row, as Chen et al. 2023
(arXiv:2310.18547) and Sheng et al. 2023 (arXiv:2311.03285) do on GPUs.
"""

from __future__ import annotations

import functools
import itertools
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..adapter import Adapter, check_fit, expand_blocks
from ..bases import refuse_classifier
from ..combine import more_than_low_rank, updates_of, way_out
from ..errors import AdapterError, UnsupportedModelError, did_you_mean, list_faults
from ..formats import read_adapter
from ..injection import adapted_layers
from ..layers import is_conv1d
from ..modes import evaluating
from ..wrapping import input_table, output_head, unwrapped
from .forward import plain_logits
from .kernels import FEW_ROWS, RowUpdate, loaded
from .placement import Hold, Override, Overrides, overriding, own_forward

__all__ = ["AdapterStatus", "Bank", "Slot", "bank_and_base"]

_LONG: Final = 16  # from this many rows of one adapter on, its own products are cheaper than those of all adapters
_SPARE: Final = 2  # stacked factors are reused while they hold at most this many times the number of adapters in use

_SCALES: Final = 64  # the number of scales remembered per adapter
_MOST_SCALE: Final = 1000.0

FactorPair = tuple[Tensor, Tensor]  # A (r, in) and B^T including the scaling (r, out)


@dataclass(eq=False)
class Slot:
    """One adapter in a bank.

    Attributes:
        name: the adapter's name.
        scale: factor applied to its updates; 1: as trained.
        pinned: whether it always stays in memory.
        nbytes: size of its factors in memory.
        factors: factors by module; None while they are on disk.
        ranks: r of each adapted module.
        users: number of sequences using it at the moment.
    """

    name: str
    scale: float
    pinned: bool
    nbytes: int
    factors: Mapping[str, FactorPair] | None
    ranks: Mapping[str, int]
    users: int = 0
    file: Path | None = None
    of: Slot | None = None  # the slot that owns these factors, if only the scale differs
    scaled: dict[float, Slot] = field(default_factory=dict)  # variants of this adapter at other scales


@dataclass(frozen=True)
class AdapterStatus:
    """The settings and state of an adapter in a bank.

    Attributes:
        name: the adapter's name.
        scale: factor applied to its updates.
        pinned: whether it always stays in memory.
        nbytes: size of its factors.
        in_memory: whether the factors are in memory rather than on disk.
        users: number of sequences using it at the moment.
        ranks: the distinct ranks of its modules.
        target_modules: the last components of their names.
    """

    name: str
    scale: float
    pinned: bool
    nbytes: int
    in_memory: bool
    users: int
    ranks: tuple[int, ...]
    target_modules: tuple[str, ...]


@dataclass(frozen=True)
class _RowRun:
    """Rows from `start` to `stop` that are computed together: with one adapter, or with several and a mask."""

    start: int
    stop: int
    slots: tuple[Slot | None, ...]  # of each row
    scales: tuple[float, ...]  # of each row, at the start of the pass


@dataclass
class _StackedFactors:
    """The stacked factors of several adapters."""

    slots: tuple[Slot, ...]
    factors: dict[str, FactorPair] = field(default_factory=dict)
    columns: dict[str, tuple[int, ...]] = field(default_factory=dict)  # index of the slot owning each column


class Bank:
    """Named adapters over one plain base model.

    Loading, replacing and unloading take the same time regardless of the number of adapters.  Running sequences keep
    the adapter they started with, even if its name is unloaded or reassigned in the meantime.

    Args:
        model: a causal language model without an adapter.
        max_bytes: memory limit for factors; beyond it, the least recently used adapters are moved to disk.  None: no
            limit.

    Attributes:
        model: the base model.

    Raises:
        AdapterError: the model has an adapter.
    """

    def __init__(self, model: nn.Module, *, max_bytes: int | None = None) -> None:
        model = unwrapped(model)
        if adapted_layers(model):
            raise AdapterError(
                f"this {type(model).__name__} holds an adapter, but a bank needs a plain base. Call "
                "lora.remove(model) first, and load the adapter into the bank by its name."
            )
        self.model, self._max_bytes = model, max_bytes
        self._modules = {name: module for name, module in model.named_modules() if _takes_rows(module)}
        self._head = output_head(model)
        self._slots: dict[str, Slot] = {}
        self._resident: dict[Slot, None] = {}  # adapters in memory, least recently used first
        self._nbytes = 0  # total size of these
        self._stack = _StackedFactors(())
        self._lock = threading.RLock()
        self._directory: Path | None = None

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, name: object) -> bool:
        return name in self._slots

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all adapters, in alphabetical order."""
        return tuple(sorted(self._slots))

    @property
    def modules(self) -> list[nn.Module]:
        """The modules that adapters may change."""
        return list(self._modules.values())

    @property
    def nbytes(self) -> int:
        """Bytes of factors in memory."""
        return self._nbytes

    def load(
        self,
        name: str,
        adapter: Adapter | str | Path,
        *,
        scale: float = 1.0,
        pin: bool = False,
        replace: bool = False,
        allow_base_mismatch: bool = False,
    ) -> None:
        """Adds an adapter to the bank.

        Args:
            name: the adapter's name in the bank.
            adapter: the adapter, or its location (see `loralib.load_adapter`).
            scale: factor applied to its updates.
            pin: keep it in memory.
            replace: whether to replace an adapter of the same name.
            allow_base_mismatch: accept an adapter that was trained on a base with different weights.

        Raises:
            AdapterError: the name is taken; or the adapter is damaged, does not fit the base, has anything other than
                low-rank updates of linear layers and embeddings, or changes no logits.
            BaseMismatchError: the adapter was trained on another base.
        """
        self._check_free(name, replace)
        value = adapter if isinstance(adapter, Adapter) else read_adapter(adapter, model=self.model)
        refuse_classifier(value, repr(name))
        check_fit(self.model, value, allow_base_mismatch=allow_base_mismatch)
        factors = self._factors_of(value)
        ranks = {module: len(A) for module, (A, _) in factors.items()}
        slot = Slot(name, scale, pin, sum(t.nbytes for pair in factors.values() for t in pair), factors, ranks)
        self._check_effect(slot)
        with self._lock:
            self._check_free(name, replace)  # another thread may have taken it meanwhile
            self._forget(name)
            self._slots[name] = slot
            self._keep(slot)

    def unload(self, name: str) -> None:
        """Removes an adapter from the bank.

        Raises:
            AdapterError: there is no adapter of that name.
        """
        self._find(name)
        with self._lock:
            self._forget(name)

    def set_scale(self, name: str, scale: float) -> None:
        """Sets the factor applied to an adapter's updates, from the next token on.

        Raises:
            AdapterError: there is no adapter of that name.
        """
        self._find(name).scale = scale

    def describe(self, name: str) -> AdapterStatus:
        """Returns the settings and state of an adapter, without loading it from disk.

        Raises:
            AdapterError: there is no adapter of that name.
        """
        with self._lock:
            slot = self._find(name)
            leaves = sorted({module.rpartition(".")[2] for module in slot.ranks})
            ranks = tuple(sorted(set(slot.ranks.values())))
            there = slot.factors is not None
            return AdapterStatus(name, slot.scale, slot.pinned, slot.nbytes, there, slot.users, ranks, tuple(leaves))

    def acquire(self, name: str | None) -> Slot | None:
        """Returns an adapter for use by a sequence, until `release` is called; None for the base alone.

        ``name@0.5`` is the adapter called ``name`` at a scale of 0.5, for this sequence only.

        Raises:
            AdapterError: there is no adapter of that name.
        """
        if name is None:
            return None
        with self._lock:
            self.check([name])
            own, scale = self._meant(name)
            slot = self._slots[own]
            slot.users += 1
            if slot.factors is None:
                slot.factors = torch.load(cast(Path, slot.file), weights_only=True)
            self._keep(slot)
            if scale is None:
                return slot
            if scale not in slot.scaled:
                while len(slot.scaled) >= _SCALES:
                    slot.scaled.pop(next(iter(slot.scaled)))
                slot.scaled[scale] = Slot(f"{own}@{scale:g}", scale, slot.pinned, 0, slot.factors, slot.ranks, of=slot)
            return slot.scaled[scale]

    def release(self, slot: Slot | None) -> None:
        """Ends a sequence's use of an adapter that `acquire` returned."""
        if slot is not None:
            with self._lock:
                (slot.of or slot).users -= 1
                self._evict()

    def overrides(
        self, rows: Sequence[tuple[Slot | None, int]], heads: Sequence[tuple[Slot | None, int]], below: Overrides
    ) -> Overrides:
        """Returns the functions that replace the modules' forwards in one pass.

        Args:
            rows: the adapters in the pass, or None, in row order, each with its number of rows.
            heads: the same for the rows whose logits are computed.
            below: overrides of the same modules that compute the base's output.
        """
        used = {slot for slot, _ in (*rows, *heads) if slot is not None}
        if not used:
            return below
        return self._overrides(rows, heads, below, used, self._stacked(used))

    def _overrides(
        self,
        rows: Sequence[tuple[Slot | None, int]],
        heads: Sequence[tuple[Slot | None, int]],
        below: Overrides,
        used: set[Slot],
        stack: _StackedFactors,
    ) -> Overrides:
        plans = {False: _runs(rows), True: _runs(heads)}
        groups = {False: _RowGroups.of_rows(rows), True: _RowGroups.of_rows(heads)}
        masks: dict[Any, Tensor] = {}
        changed = {name for slot in used for name in cast("Mapping[str, FactorPair]", slot.factors)}
        own: dict[nn.Module, Override] = {}
        for name in changed:
            module = self._modules[name]
            is_head = module is self._head
            base = below.get(module) or functools.partial(own_forward, module)
            mixed = functools.partial(_mixed, name, module, base, plans[is_head], stack, masks)
            own[module] = _by_kernel(name, module, base, groups[is_head], mixed) or mixed
        return {**below, **own}

    def check(self, names: Sequence[str | None]) -> None:
        """Checks that adapters of these names exist; None is the base alone.

        Raises:
            AdapterError: some do not exist; lists all of them.
        """
        missing = dict.fromkeys(name for name in names if name is not None and self._meant(name)[0] not in self._slots)
        if missing:
            raise self._no_such(missing)

    def _find(self, name: str) -> Slot:
        if name not in self._slots:
            raise self._no_such([name])
        return self._slots[name]

    def _no_such(self, names: Iterable[str]) -> AdapterError:
        faults = [f"{name}.{did_you_mean(name, self._slots)}" for name in names]
        return AdapterError(
            list_faults("there are no such adapters", faults, f"Loaded: {', '.join(self.names) or 'none'}.")
        )

    def called(self, name: str) -> str:
        """Returns the adapter's name without the scale that may follow it (see `acquire`)."""
        return self._meant(name)[0]

    def _meant(self, name: str) -> tuple[str, float | None]:
        """Splits a name into the adapter's name and its scale; None: the adapter's own scale."""
        own, at, word = name.rpartition("@")
        if name in self._slots or not at:
            return name, None
        try:
            scale = float(word)
        except ValueError:
            return name, None
        return (own, scale) if abs(scale) <= _MOST_SCALE else (name, None)

    def _check_free(self, name: str, replace: bool) -> None:
        if name in self._slots and not replace:
            raise AdapterError(f"there is already an adapter called {name!r}; unload it first, or pass replace=True")

    def _forget(self, name: str) -> None:
        slot = self._slots.pop(name, None)
        if slot is not None:
            self._let_go(slot)
            if slot.file is not None:
                slot.file.unlink(missing_ok=True)
        self._unstack(slot)

    def _unstack(self, slot: Slot | None) -> None:
        """Discards the stacked factors if they include an adapter, at any scale."""
        if slot is not None and any(slot in (each, each.of) for each in self._stack.slots):
            self._stack = _StackedFactors(())

    def _factors_of(self, adapter: Adapter) -> dict[str, FactorPair]:
        plain = expand_blocks(adapter)
        if more := more_than_low_rank(adapter):
            raise AdapterError(
                list_faults(
                    "a bank holds low-rank updates only, but this adapter has more", more, f"{way_out(adapter)}."
                )
            )
        faults = [f"{key}: trained in full" for key in plain.tensors if "lora_" not in key.rpartition(".")[2]]
        others = [name for name in plain.modules if name not in self._modules]
        faults += [
            f"{name}: {'a weight of experts' if plain.holds_experts(name) else _kind(self.model, name)}"
            for name in others
        ]
        if faults:
            raise AdapterError(
                list_faults(
                    "a bank holds low-rank updates of linear layers and embeddings only, but this adapter has more",
                    faults,
                    "Load it on its own with lora.load_adapter(model, ...).",
                )
            )
        factors = {}
        for name, update in updates_of(plain).items():
            weight = self._modules[name].weight
            A, B = update.plain()
            factors[name] = (A.to(weight).contiguous(), B.T.to(weight).contiguous())
        return factors

    def _check_effect(self, slot: Slot) -> None:
        """Rejects an adapter without effect, and a base in which rows cannot use different adapters."""
        table: Any = input_table(self.model)
        device = next(self.model.parameters()).device
        ids = torch.arange(8, device=device)[None] % (len(table.weight) if table is not None else 8)
        rows = [(cast("Slot | None", slot), ids.numel())]
        # A separate stack, because another thread may be generating with the bank's.
        overrides = self._overrides(rows, rows, {}, {slot}, _StackedFactors((slot,)))
        with Hold(self.model, self.modules, "inference"), evaluating(self.model.modules()), torch.no_grad():
            without = plain_logits(self.model, ids)
            with overriding(overrides):
                changed = plain_logits(self.model, ids)
        if torch.equal(without, changed):
            raise AdapterError(
                f"the adapter {slot.name!r} changes no logit of this {type(self.model).__name__}: it was not "
                "trained, or its updates are too small to matter. Train it, or leave it out."
            )

    def _keep(self, slot: Slot) -> None:
        """Marks an adapter as in memory and most recently used."""
        if slot not in self._resident:
            self._nbytes += slot.nbytes
        self._resident.pop(slot, None)
        self._resident[slot] = None
        self._evict()

    def _let_go(self, slot: Slot) -> None:
        if slot in self._resident:
            del self._resident[slot]
            self._nbytes -= slot.nbytes

    def _evict(self) -> None:
        while self._max_bytes is not None and self._nbytes > self._max_bytes:
            slot = next((each for each in self._resident if not each.users and not each.pinned), None)
            if slot is None:  # all are in use or pinned
                return
            self._to_disk(slot)

    def _to_disk(self, slot: Slot) -> None:
        if slot.file is None:
            if self._directory is None:
                self._directory = Path(tempfile.mkdtemp(prefix="loralib-bank-"))
                weakref.finalize(self, shutil.rmtree, self._directory, ignore_errors=True)
            slot.file = self._directory / f"{id(slot):x}.pt"
            torch.save(dict(cast("Mapping[str, FactorPair]", slot.factors)), slot.file)
        slot.factors = None
        self._let_go(slot)
        slot.scaled.clear()
        self._unstack(slot)

    def _stacked(self, used: set[Slot]) -> _StackedFactors:
        """Returns stacked factors that include these adapters, reusing the last ones if possible."""
        with self._lock:
            stack = self._stack
            if not used.issubset(stack.slots) or len(stack.slots) > max(_SPARE * len(used), 8):
                stack = self._stack = _StackedFactors(tuple(sorted(used, key=lambda slot: slot.name)))
            return stack


def bank_and_base(model: nn.Module | Bank) -> tuple[Bank | None, nn.Module]:
    """Returns the bank, if the argument is one, and the base model without wrappers."""
    return (model, model.model) if isinstance(model, Bank) else (None, unwrapped(model))


# --- one pass --------------------------------------------------------------------------------------------------------


def _runs(rows: Sequence[tuple[Slot | None, int]]) -> list[_RowRun]:
    """Joins consecutive rows of the same adapter, and short groups of different adapters."""
    runs: list[_RowRun] = []
    start = 0
    scales = {slot: 1.0 if slot is None else slot.scale for slot, _ in rows}  # read once: other threads may change them
    for slot, group in itertools.groupby(rows, key=lambda row: row[0]):
        count = sum(number for _, number in group)
        last = runs[-1] if runs else None
        own, factors = (slot,) * count, (scales[slot],) * count
        if count < _LONG and last is not None and last.stop - last.start < _LONG * max(1, len(set(last.slots))):
            runs[-1] = _RowRun(last.start, start + count, (*last.slots, *own), (*last.scales, *factors))
        else:
            runs.append(_RowRun(start, start + count, own, factors))
        start += count
    return runs


@dataclass(frozen=True)
class _RowGroups:
    """The rows of each adapter in a pass and its scale; `count` is the total number of rows."""

    count: int
    of: dict[Slot, tuple[float, list[int]]]

    @classmethod
    def of_rows(cls, rows: Sequence[tuple[Slot | None, int]]) -> _RowGroups | None:
        """Returns the groups; None if an adapter has so many rows that plain products are faster."""
        of: dict[Slot, tuple[float, list[int]]] = {}
        start = 0
        for slot, count in rows:
            if slot is not None:
                of.setdefault(slot, (slot.scale, []))[1].extend(range(start, start + count))
            start += count
        return None if any(len(own) > FEW_ROWS for _, own in of.values()) else cls(start, of)


def _by_kernel(
    name: str, module: nn.Module, base: Override, groups: _RowGroups | None, otherwise: Override
) -> Override | None:
    """Returns a function that computes a linear layer with each row's adapter in one call; None without a kernel."""
    kernels = loaded()
    if kernels is None or groups is None or isinstance(module, nn.Embedding):
        return None
    updates = [
        RowUpdate(rows, *pair, scale)
        for slot, (scale, rows) in groups.of.items()
        if (pair := cast("Mapping[str, FactorPair]", slot.factors).get(name)) is not None
    ]
    if not updates or not kernels.accept_row_updates(updates):
        return None
    add, A = kernels.row_updates(updates), updates[0].A
    dtype, numbers = A.dtype, groups.count * A.shape[1]

    def call(x: Tensor) -> Tensor:
        if x.dtype != dtype or x.numel() != numbers or not x.is_contiguous():
            return cast(Tensor, otherwise(x))
        y: Tensor = base(x).contiguous()
        if y.dtype != dtype:
            return cast(Tensor, otherwise(x))
        add(x, y)
        return y

    return call


def _mixed(
    name: str,
    module: nn.Module,
    base: Override,
    runs: list[_RowRun],
    stack: _StackedFactors,
    masks: dict[Any, Tensor],
    x: Tensor,
) -> Tensor:
    """Computes one module, applying each row's adapter."""
    y: Tensor = base(x)
    flat = y.view(-1, y.shape[-1])
    if len(flat) != runs[-1].stop:
        raise UnsupportedModelError(
            f"{name} computes {len(flat)} rows, but the pass has {runs[-1].stop}, so rows cannot choose adapters "
            "there. Load such an adapter on its own with lora.load_adapter(model, ...)."
        )
    looks_up = isinstance(module, nn.Embedding)
    inputs = x.reshape(-1) if looks_up else x.reshape(-1, x.shape[-1])
    for run in runs:
        part, out = inputs[run.start : run.stop], flat[run.start : run.stop]
        distinct = set(run.slots)
        if len(distinct) == 1:
            slot = run.slots[0]
            pair = None if slot is None else cast("Mapping[str, FactorPair]", slot.factors).get(name)
            if slot is not None and pair is not None:
                out.addmm_(_thin(part, pair[0], looks_up), pair[1], alpha=run.scales[0])
            continue
        A, B = _factors(stack, name)
        out.addmm_(_thin(part, A, looks_up).mul_(_mask(stack, name, run, masks, A)), B)
    return y


def _thin(x: Tensor, A: Tensor, looks_up: bool) -> Tensor:
    """Returns ``x A^T`` for rows x (T, in), or the columns of A for embedding indices x (T,)."""
    return F.embedding(x, A.T) if looks_up else F.linear(x, A)


def _factors(stack: _StackedFactors, name: str) -> FactorPair:
    if name not in stack.factors:
        # An adapter moved to disk since has no rows in this pass.
        pairs = [(number, (slot.factors or {}).get(name)) for number, slot in enumerate(stack.slots)]
        there = [(number, pair) for number, pair in pairs if pair is not None]
        stack.columns[name] = tuple(number for number, (A, _) in there for _ in range(len(A)))
        stack.factors[name] = (torch.cat([A for _, (A, _) in there]), torch.cat([B for _, (_, B) in there]))
    return stack.factors[name]


def _mask(stack: _StackedFactors, name: str, run: _RowRun, masks: dict[Any, Tensor], like: Tensor) -> Tensor:
    """Returns M (T, R): the scale of each row's adapter in the columns that belong to it, 0 elsewhere."""
    columns = stack.columns[name]
    key = (run.start, columns)
    if key not in masks:
        numbers = {slot: number for number, slot in enumerate(stack.slots)}
        own = torch.tensor([numbers.get(cast(Slot, slot), -1) for slot in run.slots])
        scales = torch.tensor(run.scales)
        masks[key] = ((own[:, None] == torch.tensor(columns)) * scales[:, None]).to(like)
    return masks[key]


def _takes_rows(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.Embedding)) or is_conv1d(type(module))


def _kind(model: nn.Module, name: str) -> str:
    return f"a {type(model.get_submodule(name)).__name__}"
