"""The model's side of generation: each step adds one token to every branch of every sequence and returns logits.

A `SequenceGroup` is a prompt and its branches: one, or the beams of a search.  Whoever generates opens groups, says how
they grow, and calls `step`, which computes all that is new in all open groups in one pass through the model.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..engine.attention import KVCache, TreeLayout, interface_name, resized, with_layout
from ..engine.bank import Bank, Slot, bank_and_base
from ..engine.causal import require_causal
from ..engine.forward import device_of, logits_of, plain_logits, runs_here
from ..engine.frozen_linear import FrozenLinear, prepacked_overrides
from ..engine.operators import operator_overrides
from ..engine.placement import Hold, Overrides, engine_mode, evaluating, overriding
from ..engine.rope import apart, forget_length, remembers_length, rope_limit
from ..errors import BusyModelError, UnsupportedModelError

__all__ = ["Decoder", "SequenceGroup", "make_decoder"]

# Columns by which the cache grows.
_COLUMNS: Final = 32
# Weights are prepacked after this many steps, or at once for this many sequences.  That costs about what two steps of a
# beam search save, or ten of a single sequence, and how long a generation goes on is not known before.
_PREPACK_AFTER: Final = 4
_MANY_SEQUENCES: Final = 16


@dataclass(eq=False)
class SequenceGroup:
    """A prompt and the tree of its continuations.

    Attributes:
        prompt: its token ids.
        length: tokens from the prompt's first to a branch's newest; all branches are equally long.
        slot: its adapter in a bank; None: the model as it is.
        rows: which rows of the last step's logits belong to it, one per branch.
        row: its row in the cache.
        parents, tokens: what the next step adds: token i to a copy of branch parents[i].
        paths: the tokens of each branch, where there is no cache.
    """

    prompt: Sequence[int]
    slot: Slot | None = None
    length: int = 0
    rows: slice = field(default_factory=lambda: slice(0, 0))
    row: int = 0
    parents: Sequence[int] = ()
    tokens: Sequence[int] = ()
    paths: list[tuple[int, ...]] = field(default_factory=list)

    def grow(self, parents: Sequence[int], tokens: Sequence[int]) -> None:
        """Says what the next step adds: a token to each of some branches; a branch may come several times."""
        self.parents, self.tokens = parents, tokens


class Decoder:
    """Computes logits for open groups; while there are any, what it needs is in the model's place.

    Args:
        model: a causal language model.
        bank: adapters over it that groups may choose.
        modules: those that it may override.
        attention: whether the model's attention gets a layout.

    Attributes:
        longest: how many tokens a sequence may have; None: any number.
    """

    longest: int | None = None

    def __init__(
        self, model: nn.Module, bank: Bank | None, modules: Sequence[nn.Module] = (), *, attention: bool = False
    ) -> None:
        self._model, self._device, self._bank = model, device_of(model), bank
        self._switched = list(dict.fromkeys([*modules, *(bank.modules if bank is not None else ())]))
        self._attention = interface_name if attention else None
        self._groups: list[SequenceGroup] = []
        self._slots: list[Slot | None] = []  # those of the open groups
        self._release: weakref.finalize[Any, Any] | None = None

    def open(self, prompt: Sequence[int], adapter: str | None = None) -> SequenceGroup:
        """Takes a prompt in, with an adapter of the bank; the next step computes it.

        Raises:
            AdapterError: there is no such adapter.
            BusyModelError: the model is being trained.
        """
        if self._release is None:
            hold = Hold(self._model, self._switched, "inference", self._attention)
            # Also where the decoder is forgotten with groups still open.
            self._release = weakref.finalize(self, _release, hold, self._bank, self._slots)
        try:
            slot = None if self._bank is None else self._bank.acquire(adapter)
        except BaseException:
            self._end()
            raise
        self._slots.append(slot)
        group = SequenceGroup(prompt, slot, row=len(self._groups))
        self._groups.append(group)
        return group

    def close(self, group: SequenceGroup) -> None:
        """Forgets a group."""
        self._forget(group)
        self._slots.remove(group.slot)
        if self._bank is not None:
            self._bank.release(group.slot)
        self._end()

    def _end(self) -> None:
        if not self._groups and self._release is not None:
            self._release()
            self._release = None

    def close_all(self) -> None:
        """Forgets all groups."""
        for group in reversed(self._groups):
            self.close(group)

    def _forget(self, group: SequenceGroup) -> None:
        self._groups.remove(group)

    def step(self) -> Tensor:
        """Computes all new tokens of all open groups; returns logits, in which each group has its `rows`."""
        raise NotImplementedError


def _release(hold: Hold, bank: Bank | None, slots: list[Slot | None]) -> None:
    hold.release()
    if bank is not None:
        for slot in slots:
            bank.release(slot)


class CachedDecoder(Decoder):
    """Keeps keys and values, each token's once a sequence, and computes without padding (see `TreeLayout`)."""

    def __init__(self, model: nn.Module, bank: Bank | None = None) -> None:
        self._modules = list(model.modules())
        self._fast = runs_here(model)
        self._operators: Overrides = operator_overrides(model) if self._fast else {}
        self._prepacked: Overrides = {}
        linears = [module for module in self._modules if FrozenLinear.accepts(module)] if self._fast else []
        super().__init__(model, bank, [*self._operators, *linears], attention=True)
        self._cache = KVCache()
        self._steps = 0
        # Which columns each branch of each group sees (rows, N, C), and the place in its group of each token (rows, C).
        self._visible = torch.zeros(0, 1, 0, dtype=torch.bool, device=self._device)
        self._positions = torch.zeros(0, 0, dtype=torch.long, device=self._device)

    def _forget(self, group: SequenceGroup) -> None:
        if len(self._groups) == 1:  # weights may change before the next one
            self._prepacked, self._steps = {}, 0
        last = self._groups.pop()
        if last is not group:
            # The last group takes its place, so that the open groups are always the first rows of the cache.
            if last.length:
                self._cache.move(last.row, group.row)
                self._visible[group.row] = self._visible[last.row]
                self._positions[group.row] = self._positions[last.row]
            last.row = group.row
            self._groups[group.row] = last

    @torch.no_grad()
    def step(self) -> Tensor:
        growing = [group for group in self._groups if group.length]
        fresh = [group for group in self._groups if not group.length]
        ids = [token for group in growing for token in group.tokens]
        positions = [group.length for group in growing for _ in group.tokens]
        last = list(range(len(ids)))
        layout = self._lay_out(growing, fresh)
        for group in growing:
            group.length += 1
        for group in fresh:
            group.length = len(group.prompt)
            ids += group.prompt
            positions += range(group.length)
            last.append(len(ids) - 1)
        long = self._steps >= _PREPACK_AFTER or len(self._groups) >= _MANY_SEQUENCES
        if self._fast and long and not self._prepacked:
            self._prepacked = prepacked_overrides(self._modules)
        self._steps += 1
        overrides: Overrides = {**self._operators, **self._prepacked}
        if self._bank is not None:
            rows = [(group.slot, len(group.tokens)) for group in growing]
            prompts = [(group.slot, group.length) for group in fresh]
            overrides = self._bank.overrides([*rows, *prompts], [*rows, *((slot, 1) for slot, _ in prompts)], overrides)
        with evaluating(self._modules), with_layout(), overriding(overrides):
            output: Any = self._model(
                input_ids=self._tensor(ids)[None],
                position_ids=self._tensor(positions)[None],
                use_cache=False,
                logits_to_keep=self._tensor(last),
                layout=layout,
            )
        logits = logits_of(output)[0]
        if logits.shape[0] != len(last) or not self._cache.keys:
            raise UnsupportedModelError(f"{type(self._model).__name__} does not pass its layout on to its attention")
        return logits

    def _lay_out(self, growing: list[SequenceGroup], fresh: list[SequenceGroup]) -> TreeLayout:
        """Says what the pass computes, and notes down what branches will see after it."""
        branches = max([len(group.tokens) for group in growing], default=0)
        group_rows: list[int] = []
        parents: list[int] = []
        places: list[int] = []
        rows = 0
        for group in growing:
            count = len(group.tokens)
            group_rows += [group.row] * count
            parents += group.parents
            places += range(group.row * branches, group.row * branches + count)
            group.rows = slice(rows, rows + count)
            rows += count
        for group in fresh:
            group.rows = slice(rows, rows + 1)
            rows += 1
        at_group, grid_index = self._tensor(group_rows), self._tensor(places)
        parents_see = self._visible[at_group, self._tensor(parents)]  # (R, C)
        visible = self._grid(grid_index, parents_see, branches)
        alive = visible.any(1)  # (rows, C): the others are free, those of branches that were given up among them
        needed = max([*(int(number) for number in (alive.sum(1) + branches).tolist()), *(len(t.prompt) for t in fresh)])
        if self._fit(needed, alive):
            parents_see = resized(parents_see, (len(group_rows), self._cache.columns))
            visible = self._grid(grid_index, parents_see, branches)
            alive = visible.any(1)
        free = torch.argsort(alive.to(torch.uint8), dim=1, stable=True)[:, :branches]  # (rows, N)
        at_column = free.reshape(-1)[grid_index]
        visible.view(-1, self._cache.columns)[grid_index, at_column] = True
        at_position = self._tensor([group.length for group in growing for _ in group.tokens])
        self._positions[at_group, at_column] = at_position
        branch_positions = self._positions.new_zeros(len(self._groups) * branches)
        branch_positions[grid_index] = at_position
        layout = TreeLayout(
            cache=self._cache,
            sequence=at_group,
            column=at_column,
            grid_index=None if len(group_rows) == len(self._groups) * branches else grid_index,
            visible=visible[: len(self._groups)],
            branch_positions=branch_positions.view(len(self._groups), branches),
            positions=self._positions[: len(self._groups)],
            prompts=[(group.row, len(group.prompt)) for group in fresh],
        )
        self._visible = visible if branches else self._visible.new_zeros(self._cache.rows, 1, self._cache.columns)
        for group in fresh:
            length = len(group.prompt)
            self._visible[group.row, 0, :length] = True
            self._positions[group.row, :length] = torch.arange(length, device=self._device)
        return layout

    def _grid(self, places: Tensor, parents_see: Tensor, branches: int) -> Tensor:
        """Spreads what branches see (R, C) over groups and their branches (rows, N, C)."""
        grid = parents_see.new_zeros(self._cache.rows * branches, parents_see.shape[1])
        grid[places] = parents_see
        return grid.view(self._cache.rows, branches, parents_see.shape[1])

    def _fit(self, needed: int, alive: Tensor) -> bool:
        """Gives the cache as many rows and columns as are needed, and not many more; tells whether it changed."""
        rows, columns = self._cache.rows, self._cache.columns
        if len(self._groups) > rows:
            rows = max(len(self._groups), min(2 * rows, rows + 8))
        fitting = -(-needed // _COLUMNS) * _COLUMNS
        if needed > columns:
            columns = fitting
        elif fitting * 2 <= columns:  # a long group has gone
            last = int(alive.any(0).nonzero().max()) + 1 if bool(alive.any()) else 0
            columns = max(fitting, -(-last // _COLUMNS) * _COLUMNS)
        if (rows, columns) == (self._cache.rows, self._cache.columns):
            return False
        self._cache.resize(rows, columns)
        self._positions = resized(self._positions, (rows, columns))
        return True

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._device)


class PlainDecoder(Decoder):
    """Computes every token of every branch again at each step: right for any causal model, and slow."""

    def __init__(self, model: nn.Module, bank: Bank | None = None) -> None:
        super().__init__(model, bank)
        self._rope_limit, self._remembers = rope_limit(model), remembers_length(model)

    @torch.no_grad()
    def step(self) -> Tensor:
        rows: list[tuple[int, ...]] = []
        for group in self._groups:
            if group.length:
                group.paths = [
                    (*group.paths[parent], token) for parent, token in zip(group.parents, group.tokens, strict=True)
                ]
            else:
                group.paths = [tuple(group.prompt)]
            group.length = len(group.paths[0])
            group.rows = slice(len(rows), len(rows) + len(group.paths))
            rows += group.paths
        slots = [group.slot for group in self._groups for _ in group.paths]
        parts = list(apart(range(len(rows)), self._rope_limit, lambda row: len(rows[row])))
        with evaluating(self._model.modules()):
            logits = torch.cat([self._last_logits([rows[n] for n in part], [slots[n] for n in part]) for part in parts])
        places = torch.empty(len(rows), dtype=torch.long, device=self._device)
        places[[row for part in parts for row in part]] = torch.arange(len(rows), device=self._device)
        return logits[places]

    def _last_logits(self, rows: Sequence[Sequence[int]], slots: Sequence[Slot | None]) -> Tensor:
        """Returns the logits (R, V) after the last token of each row, which has its adapter."""
        # Padded behind, where causal models do not look.
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)
        last = torch.tensor([len(row) - 1 for row in rows], device=self._device)
        if self._remembers:
            forget_length(self._model)
        overrides: Overrides = {}
        if self._bank is not None:
            whole = [(slot, ids.shape[1]) for slot in slots]
            overrides = self._bank.overrides(whole, whole, {})
        with overriding(overrides):
            logits = plain_logits(self._model, ids.to(self._device))
        return logits[torch.arange(len(rows), device=self._device), last]


_FAULTS: Final[weakref.WeakKeyDictionary[nn.Module, str]] = weakref.WeakKeyDictionary()


def make_decoder(model: nn.Module | Bank, longest: int = 0) -> Decoder:
    """Returns the fastest decoder that is right for a model, or for a bank of adapters over one.

    Sequences have up to `longest` tokens.

    Models that call transformers' attention interface get a cache.  That it changes no logits is tried once on a few
    random tokens.

    Raises:
        UnsupportedModelError: the model is not causal.
    """
    bank, model = bank_and_base(model)  # without torch.compile's wrapper: a graph has no place for a layout
    require_causal(model)
    if engine_mode() == "off":
        return PlainDecoder(model, bank)
    if model not in _FAULTS:
        _FAULTS.setdefault(model, _why_not_cached(model))
    if _FAULTS[model]:
        return PlainDecoder(model, bank)
    limit = rope_limit(model)
    if limit is not None and longest > limit:
        return PlainDecoder(model, bank)
    decoder = CachedDecoder(model, bank)
    decoder.longest = limit
    return decoder


def _why_not_cached(model: nn.Module) -> str:
    """Grows two random prompts by branches that part; returns what is wrong with their logits, or ""."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    if embeddings is None or not hasattr(getattr(model, "config", None), "_attn_implementation"):
        return f"{type(model).__name__} is not built like transformers' causal language models"
    rng = random.Random(0)
    vocabulary = embeddings.weight.shape[0]
    prompts = [[rng.randrange(vocabulary) for _ in range(length)] for length in (7, 4)]
    steps = [([0, 0], 2), ([1, 0, 1], 3)]
    plain, cached = PlainDecoder(model), CachedDecoder(model)
    try:
        theirs = [plain.open(prompt) for prompt in prompts]
        ours = [cached.open(prompt) for prompt in prompts]
        for parents, count in [([], 0), *steps]:
            for pair in zip(theirs, ours, strict=True):
                tokens = [rng.randrange(vocabulary) for _ in range(count)]
                for group in pair:
                    group.grow(parents, tokens)
            expected, got = plain.step().float(), cached.step().float()
            apart = float((got - expected).square().mean().sqrt() / expected.std())
            if not apart < max(1e-3, 16 * torch.finfo(embeddings.weight.dtype).eps):
                return f"{type(model).__name__} computes other logits with the cache (off by {apart:.1%})"
    except BusyModelError:
        raise
    except UnsupportedModelError as error:
        return str(error)
    except Exception as error:  # whatever a model does that the cache does not expect, PlainDecoder remains
        return f"{type(model).__name__} fails with the cache: {type(error).__name__}: {error}"
    finally:
        plain.close_all()
        cached.close_all()
    return ""
