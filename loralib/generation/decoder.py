"""The model's side of generation: each step adds one token to every branch of every sequence and returns logits.

A `SequenceGroup` is a prompt and its branches: a single one, or the beams of a search.  The caller opens groups, says
how they grow, and calls `step`, which computes everything new in all open groups in one pass through the model.

Cached prefixes of earlier texts are reused for new ones if they were computed in the same way: with the same adapter at
the same scale, over the same weights.  This relies on PyTorch's version counters of tensors; changes that bypass them,
for example through ``.data``, go unnoticed.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from ..engine.attention import KVCache, PromptChunk, TreeLayout, interface_name, resized, with_layout
from ..engine.bank import Bank, Slot, bank_and_base
from ..engine.causal import require_causal
from ..engine.forward import device_of, logits_of, plain_logits, runs_here
from ..engine.frozen_linear import FrozenLinear, kernel_overrides, prepacked_overrides
from ..engine.operators import operator_overrides
from ..engine.placement import Hold, Overrides, engine_mode, overriding
from ..engine.quantized_experts import expert_overrides
from ..engine.rope import forget_length, remembers_length, rope_limit, split_by_length
from ..errors import BusyModelError, UnsupportedModelError
from ..injection import adapted_layers
from ..modes import evaluating
from ..wrapping import input_table
from .pages import PAGE, Node, Pages, SequencePages, pages_of

__all__ = ["Decoder", "SequenceGroup", "make_decoder"]

# Number of columns by which the cache grows.
_COLUMNS: Final = 32
# Weights are prepacked after this many steps, or at once for this many sequences.  This costs what it saves in two
# steps of a beam search, or in ten of a single sequence, and a generation's length is not known in advance.
_PREPACK_AFTER: Final = 4
_MANY_SEQUENCES: Final = 16
# Number of tokens of a scored prompt to compute at once: each needs logits over the whole vocabulary.
_SCORED: Final = 256
_NONE: Final = slice(0, 0)


@dataclass(eq=False)
class SequenceGroup:
    """A prompt and the tree of its continuations.

    Attributes:
        prompt: its token ids.
        length: number of tokens from the start of the prompt to a branch's newest token; equal for all branches.  0:
            the prompt has not been computed completely.
        slot: its adapter in a bank; None: the model as it is.
        scored: whether logits are needed after each token of the prompt.
        rows: its rows in the last step's logits, one per branch.
        prompt_rows: the rows after the prompt's tokens, if it is `scored`.
        row: its index among the open groups.
        parents, tokens: what the next step adds: token i to a copy of branch parents[i].
        paths: the tokens of each branch, if there is no cache.
        pages: the pages of its keys and values.
        known: number of prompt tokens whose keys and values were already cached.
        done: number of prompt tokens that have been computed.
        text: the tokens computed so far, as long as there is a single branch.
        scale: the adapter's scale when the group was opened.
    """

    prompt: Sequence[int]
    slot: Slot | None = None
    scored: bool = False
    length: int = 0
    rows: slice = field(default_factory=lambda: _NONE)
    prompt_rows: slice = field(default_factory=lambda: _NONE)
    row: int = 0
    parents: Sequence[int] = ()
    tokens: Sequence[int] = ()
    paths: list[tuple[int, ...]] = field(default_factory=list)
    pages: SequencePages | None = None
    known: int = 0
    done: int = 0
    text: list[int] = field(default_factory=list)
    scale: float | None = None

    def grow(self, parents: Sequence[int], tokens: Sequence[int]) -> None:
        """Sets what the next step adds: one token to each given branch, in which a branch may occur several times."""
        self.parents, self.tokens = parents, tokens


class Decoder:
    """Computes logits for open groups; while there are any, it occupies the model (see `Hold`).

    Args:
        model: a causal language model.
        bank: adapters for it that groups may choose from.
        modules: modules whose forward it may override.
        attention: whether the model's attention receives a layout.

    Attributes:
        longest: maximum length of a sequence in tokens; None: unlimited.
        max_tokens: maximum number of tokens that are cached or reserved; None: unlimited.
    """

    longest: int | None = None
    max_tokens: int | None = None

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
        """Opens a group for a prompt, with an adapter of the bank; the following steps compute it.

        Raises:
            AdapterError: there is no such adapter.
            BusyModelError: the model is being trained.
        """
        group = self.admit(prompt, adapter)
        assert group is not None
        return group

    def admit(
        self, prompt: Sequence[int], adapter: str | None = None, *, limit: int = 0, scored: bool = False
    ) -> SequenceGroup | None:
        """Opens a group like `open`, or returns None if it has to wait.

        It has to wait while there is no room for the prompt and its continuation, or while a prefix that it shares with
        another prompt is being computed.

        Args:
            prompt: its token ids.
            adapter: the name of its adapter.
            limit: maximum number of tokens that will follow it.
            scored: whether logits are needed after each of its tokens.
        """
        if self._release is None:
            hold = Hold(self._model, self._switched, "inference", self._attention)
            # Also works if the decoder is garbage-collected with groups still open.
            self._release = weakref.finalize(self, _release, hold, self._bank, self._slots)
            self._begin()
        try:
            slot = None if self._bank is None else self._bank.acquire(adapter)
        except BaseException:
            self._end()
            raise
        group = SequenceGroup(prompt, slot, scored, row=len(self._groups), scale=None if slot is None else slot.scale)
        if not self._place(group, limit):
            if self._bank is not None:
                self._bank.release(slot)
            self._end()
            return None
        self._slots.append(slot)
        self._groups.append(group)
        return group

    def _begin(self) -> None:
        """Discards whatever may have become outdated while the model was free."""

    def _place(self, group: SequenceGroup, limit: int) -> bool:
        """Reserves room for a group and its continuation; returns whether there was enough."""
        return True

    def close(self, group: SequenceGroup, *, keep: bool = True) -> None:
        """Closes a group; what was computed for it is kept for others, if the decoder reuses prefixes."""
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
        """Closes all groups, and discards everything cached for earlier ones."""
        for group in reversed(self._groups):
            self.close(group)

    def _forget(self, group: SequenceGroup) -> None:
        self._groups.remove(group)

    def has_room(self, tokens: int, limit: int) -> bool:
        """Tells whether a prompt with this many tokens and its continuation can ever fit."""
        return True

    @property
    def used_tokens(self) -> int:
        """Number of tokens that are cached or reserved."""
        return 0

    @property
    def pending(self) -> int:
        """Number of prompt tokens that have not been computed yet."""
        return sum(len(group.prompt) - group.done for group in self._groups if not group.length)

    def step(self) -> Tensor:
        """Computes new tokens of open groups; returns logits, in which each group that can go on has its `rows`."""
        raise NotImplementedError


def _release(hold: Hold, bank: Bank | None, slots: list[Slot | None]) -> None:
    hold.release()
    if bank is not None:
        for slot in slots:
            bank.release(slot)


class CachedDecoder(Decoder):
    """Caches keys and values, once for each token of a sequence, and computes without padding (see `TreeLayout`).

    Args:
        model: a causal language model.
        bank: adapters for it that groups may choose from.
        max_tokens: maximum number of tokens whose keys and values are cached or reserved; None: unlimited.
        reuse: whether to keep what was computed for a text for others with the same prefix.  Does not apply to a model
            that holds an adapter: what its layers compute may change without a trace.
        max_prompt_tokens: maximum number of prompt tokens per step; longer prompts are computed in parts.
    """

    def __init__(
        self,
        model: nn.Module,
        bank: Bank | None = None,
        *,
        max_tokens: int | None = None,
        reuse: bool = False,
        max_prompt_tokens: int | None = None,
    ) -> None:
        self._modules = list(model.modules())
        self._fast = runs_here(model)
        self._operators: Overrides = (
            {**operator_overrides(model), **kernel_overrides(self._modules), **expert_overrides(self._modules)}
            if self._fast
            else {}
        )
        self._prepacked: Overrides = {}
        linears = [module for module in self._modules if FrozenLinear.accepts(module)] if self._fast else []
        super().__init__(model, bank, [*self._operators, *linears], attention=True)
        self.max_tokens, self._max_prompt_tokens = max_tokens, max_prompt_tokens
        self._cache = KVCache()
        self._pages = Pages(None if max_tokens is None else max_tokens // PAGE)
        self._roots: _CacheRoots | None = _CacheRoots(model) if reuse else None
        self._steps = 0
        self._last: tuple[Any, Overrides] | None = None  # the last step's rows, and the overrides for them
        # Which columns each branch of each group sees (rows, N, C), the position of each token in its sequence (rows,
        # C), and the cache page of each block of 16 columns.
        self._visible = torch.zeros(0, 1, 0, dtype=torch.bool, device=self._device)
        self._positions = torch.zeros(0, 0, dtype=torch.long, device=self._device)
        self._table = torch.zeros(0, 0, dtype=torch.long, device=self._device)
        self._mapped: list[int] = []  # how many pages of each group the table contains

    @property
    def used_tokens(self) -> int:
        return self._pages.used * PAGE

    def _begin(self) -> None:
        for override in (*self._operators.values(), *self._prepacked.values()):
            if isinstance(override, FrozenLinear):
                override.forget_update()  # it may have been trained; not every optimiser updates the version counters

    def has_room(self, tokens: int, limit: int) -> bool:
        return self._pages.budget is None or pages_of(tokens + max(limit - 1, 0)) <= self._pages.budget

    def _place(self, group: SequenceGroup, limit: int) -> bool:
        tokens = len(group.prompt) + max(limit - 1, 0)  # the last token is never fed to the model
        root = None if self._roots is None else self._roots.find(self._pages, group.slot, group.scale)
        if root is not None and not group.scored and self._is_coming(group.prompt, root):
            return False
        # Scored prompts need logits after each token, so all of their tokens are computed.
        group.pages = self._pages.reserve([] if group.scored else group.prompt, tokens, root)
        if group.pages is None:
            return False
        group.known = group.done = len(group.pages.nodes) * PAGE
        self._mapped.append(0)
        return True

    def _is_coming(self, prompt: Sequence[int], root: Node) -> bool:
        """Whether pages that a prompt could share are currently being computed."""
        kept = len(self._pages.kept(root, prompt[:-1]))
        first = prompt[: (kept + 1) * PAGE]
        return len(first) < len(prompt) and any(
            not group.length
            and group.pages is not None
            and group.pages.root is root
            and group.prompt[: len(first)] == first
            for group in self._groups
        )

    def close(self, group: SequenceGroup, *, keep: bool = True) -> None:
        assert group.pages is not None
        if keep:
            self._share(group, group.text)
        self._pages.release(group.pages)
        super().close(group)

    def close_all(self) -> None:
        for group in reversed(self._groups):
            self.close(group, keep=False)
        self._pages.clear()

    def _share(self, group: SequenceGroup, tokens: Sequence[int]) -> None:
        """Keeps what was computed for a group, provided that others would compute the same."""
        pages = group.pages
        if self._roots is None or pages is None or pages.root is None or not tokens:
            return
        scale = None if group.slot is None else group.slot.scale
        if scale == group.scale and self._roots.find(self._pages, group.slot, scale) is pages.root:
            self._pages.share(pages, tokens)
        else:
            pages.root = None  # the scale or a weight has changed since

    def _forget(self, group: SequenceGroup) -> None:
        if len(self._groups) == 1:
            self._last = None
            if self._roots is None:  # frees the copies; with reuse, more requests are expected
                self._prepacked, self._steps = {}, 0
        last = self._groups.pop()
        mapped = self._mapped.pop()
        if last is not group:
            # The last group moves into the gap, so that open groups always occupy the first rows.
            if last.row < len(self._table):
                for each in (self._visible, self._positions, self._table):
                    each[group.row] = each[last.row]
            self._mapped[group.row] = mapped
            last.row = group.row
            self._groups[group.row] = last

    @torch.no_grad()
    def step(self) -> Tensor:
        growing = [group for group in self._groups if group.length]
        parts = list(self._parts())
        ids = [token for group in growing for token in group.tokens]
        positions = [group.length for group in growing for _ in group.tokens]
        last = list(range(len(ids)))
        rows = [(group.slot, len(group.tokens)) for group in growing]
        heads = list(rows)
        layout = self._lay_out(growing, parts)
        for group, count in parts:
            rows.append((group.slot, count))
            first, stop = len(ids), len(ids) + count
            ids += group.prompt[group.done : group.done + count]
            positions += range(group.done, group.done + count)
            kept = range(first if group.scored else stop - 1, stop)
            if group.done + count < len(group.prompt) and not group.scored:
                kept = range(0)
            group.prompt_rows = slice(len(last), len(last) + len(kept)) if group.scored else _NONE
            last += kept
            heads.append((group.slot, len(kept)))
        nothing = not last
        if nothing:  # only incomplete prompts: computing one token's logits is simpler than none
            last.append(len(ids) - 1)
            heads[-1] = (heads[-1][0], 1)
        overrides = self._overrides(rows, [head for head in heads if head[1]])
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
        self._note_down(growing, parts)
        return logits[:0] if nothing else logits

    def _overrides(self, rows: list[tuple[Slot | None, int]], heads: list[tuple[Slot | None, int]]) -> Overrides:
        """Returns replacements for modules' forwards; reuses those of the last step if its rows were the same."""
        long = self._steps >= _PREPACK_AFTER or len(self._groups) >= _MANY_SEQUENCES
        if self._fast and long and not self._prepacked:
            self._prepacked = prepacked_overrides(self._modules)
            self._last = None
        self._steps += 1
        about = (rows, heads, [None if slot is None else slot.scale for slot, _ in rows])
        if self._last is None or (self._bank is not None and self._last[0] != about):
            below: Overrides = {**self._operators, **self._prepacked}
            self._last = about, below if self._bank is None else self._bank.overrides(rows, heads, below)
        return self._last[1]

    def _parts(self) -> Iterator[tuple[SequenceGroup, int]]:
        """Yields prompts to compute, with a number of tokens: whole prompts while they fit, or part of a long one."""
        left = self._max_prompt_tokens
        for group in sorted((group for group in self._groups if not group.length), key=lambda group: -group.done):
            count = len(group.prompt) - group.done
            if group.scored:
                count = min(count, _SCORED)
            if left is not None and count > left:
                if left < cast(int, self._max_prompt_tokens):
                    break
                count = left
            if left is not None:
                left -= count
            yield group, count

    def _note_down(self, growing: list[SequenceGroup], parts: list[tuple[SequenceGroup, int]]) -> None:
        """Records in the groups what has been computed."""
        row = 0
        for group in growing:
            group.prompt_rows = _NONE
            group.length += 1
            group.rows = slice(row, row + len(group.tokens))
            row += len(group.tokens)
            if self._roots is not None:
                if group.scale != (None if group.slot is None else group.slot.scale):
                    cast(SequencePages, group.pages).root = None
                group.text += group.tokens
        for group, count in parts:
            group.done += count
            kept = group.prompt_rows.stop - group.prompt_rows.start if group.scored else 0
            if group.done == len(group.prompt):
                group.length = group.done
                kept = max(kept, 1)
                group.rows = slice(row + kept - 1, row + kept)
                group.text = list(group.prompt)
                self._share(group, group.text)
            row += kept

    def _lay_out(self, growing: list[SequenceGroup], parts: list[tuple[SequenceGroup, int]]) -> TreeLayout:
        """Describes what the pass computes, and records what branches will see after it."""
        branches = max([len(group.tokens) for group in growing], default=0)
        group_rows: list[int] = []
        parents: list[int] = []
        places: list[int] = []
        for group in growing:
            count = len(group.tokens)
            group_rows += [group.row] * count
            parents += group.parents
            places += range(group.row * branches, group.row * branches + count)
        at_group, grid_index = self._tensor(group_rows), self._tensor(places)
        parents_see = self._visible[at_group, self._tensor(parents)]  # (R, C)
        visible = self._grid(grid_index, parents_see, branches)
        alive = visible.any(1)  # (rows, C); all other columns are free, including those of abandoned branches
        seen = alive.sum(1).tolist() if growing else []
        needed = [seen[group.row] + len(group.tokens) for group in growing]
        for group, columns in zip(growing, needed, strict=True):
            self._pages.extend(cast(SequencePages, group.pages), pages_of(columns))
        for group, count in parts:
            self._pages.extend(cast(SequencePages, group.pages), pages_of(group.done + count))
        prompts = [len(group.prompt) for group in self._groups if not group.length]
        if self._fit(max([*needed, *prompts, branches]), alive):
            parents_see = resized(parents_see, (len(group_rows), self._columns))
            visible = self._grid(grid_index, parents_see, branches)
            alive = visible.any(1)
        table = self._slots_of_columns()
        free = torch.argsort(alive.to(torch.uint8), dim=1, stable=True)[:, :branches]  # (rows, N)
        at_column = free.reshape(-1)[grid_index]
        visible.view(-1, self._columns)[grid_index, at_column] = True
        at_position = self._tensor([group.length for group in growing for _ in group.tokens])
        self._positions[at_group, at_column] = at_position
        branch_positions = self._positions.new_zeros(len(self._groups) * branches)
        branch_positions[grid_index] = at_position
        chunks = [PromptChunk(group.done, table[group.row, : group.done + count]) for group, count in parts]
        layout = TreeLayout(
            cache=self._cache,
            slots=torch.cat([table[at_group, at_column], *(chunk.slots[chunk.start :] for chunk in chunks)]),
            sequence=at_group,
            grid_index=None if len(group_rows) == len(self._groups) * branches else grid_index,
            visible=visible[: len(self._groups)],
            branch_positions=branch_positions.view(len(self._groups), branches),
            positions=self._positions[: len(self._groups)],
            table=table[: len(self._groups)],
            prompt_chunks=chunks,
        )
        self._visible = visible if branches else self._visible.new_zeros(self._rows, 1, self._columns)
        for group, count in parts:
            length = len(group.prompt)
            if group.done + count == length:
                self._visible[group.row, 0, :length] = True
                self._positions[group.row, :length] = torch.arange(length, device=self._device)
        return layout

    @property
    def _rows(self) -> int:
        return self._positions.shape[0]

    @property
    def _columns(self) -> int:
        return self._positions.shape[1]

    def _slots_of_columns(self) -> Tensor:
        """Returns the cache slot of each column of each group: (rows, C)."""
        rows: list[int] = []
        columns: list[int] = []
        pages: list[int] = []
        for group in self._groups:
            own, known = cast(SequencePages, group.pages).pages, self._mapped[group.row]
            count = min(len(own), self._table.shape[1])
            if count > known:
                rows += [group.row] * (count - known)
                columns += range(known, count)
                pages += own[known:count]
                self._mapped[group.row] = count
        if pages:
            self._table[self._tensor(rows), self._tensor(columns)] = self._tensor(pages)
        if self._pages.count * PAGE > self._cache.slots:
            self._cache.resize(self._pages.count * PAGE)
        return (self._table[:, :, None] * PAGE + torch.arange(PAGE, device=self._device)).flatten(1)

    def _grid(self, places: Tensor, parents_see: Tensor, branches: int) -> Tensor:
        """Scatters what branches see (R, C) to a grid of groups and branches (rows, N, C)."""
        grid = parents_see.new_zeros(self._rows * branches, parents_see.shape[1])
        grid[places] = parents_see
        return grid.view(self._rows, branches, parents_see.shape[1])

    def _fit(self, needed: int, alive: Tensor) -> bool:
        """Resizes to as many rows and columns as needed, without much excess; returns whether anything changed."""
        rows, columns = self._rows, self._columns
        if len(self._groups) > rows:
            rows = max(len(self._groups), min(2 * rows, rows + 8))
        fitting = -(-needed // _COLUMNS) * _COLUMNS
        if needed > columns:
            columns = fitting
        elif fitting * 2 <= columns:  # a long group was closed
            last = int(alive.any(0).nonzero().max()) + 1 if bool(alive.any()) else 0
            columns = max(fitting, -(-last // _COLUMNS) * _COLUMNS)
        if (rows, columns) == (self._rows, self._columns):
            return False
        self._positions = resized(self._positions, (rows, columns))
        self._table = self._table.new_zeros(rows, columns // PAGE)
        self._mapped = [0] * len(self._groups)
        return True

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._device)


class PlainDecoder(Decoder):
    """Recomputes every token of every branch at each step: correct for any causal model, but slow."""

    def __init__(self, model: nn.Module, bank: Bank | None = None) -> None:
        super().__init__(model, bank)
        self._rope_limit, self._remembers = rope_limit(model), remembers_length(model)

    @torch.no_grad()
    def step(self) -> Tensor:
        rows: list[tuple[int, ...]] = []
        scored: list[SequenceGroup] = []
        for group in self._groups:
            group.prompt_rows = _NONE
            if group.length:
                group.paths = [
                    (*group.paths[parent], token) for parent, token in zip(group.parents, group.tokens, strict=True)
                ]
            else:
                group.paths = [tuple(group.prompt)]
                scored += [group] if group.scored else []
            group.done = group.length = len(group.paths[0])
            group.rows = slice(len(rows), len(rows) + len(group.paths))
            rows += group.paths
        slots = [group.slot for group in self._groups for _ in group.paths]
        parts = list(split_by_length(range(len(rows)), self._rope_limit, lambda row: len(rows[row])))
        with evaluating(self._model.modules()):
            results = [self._logits([rows[n] for n in part], [slots[n] for n in part]) for part in parts]
            places = torch.empty(len(rows), dtype=torch.long, device=self._device)
            places[[row for part in parts for row in part]] = torch.arange(len(rows), device=self._device)
            logits = [torch.cat([_after_last(*result) for result in results])[places]]
            count = len(rows)
            for group in scored:
                logits.append(self._logits([group.paths[0]], [group.slot])[0][0])
                group.prompt_rows = slice(count, count + group.length)
                count += group.length
        return torch.cat(logits) if scored else logits[0]

    def _logits(self, rows: Sequence[Sequence[int]], slots: Sequence[Slot | None]) -> tuple[Tensor, Tensor]:
        """Returns logits (R, T, V) of rows, each with its own adapter, and the index of each row's last token."""
        # Padded on the right, which causal models do not see.
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
        return logits, last


def _after_last(logits: Tensor, last: Tensor) -> Tensor:
    return logits[torch.arange(len(logits), device=logits.device), last]


class _CacheRoots:
    """The roots of cached texts: one for each way of computing them, valid while the weights stay unchanged."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._base: Node | None = None
        self._of_slots: weakref.WeakKeyDictionary[Slot, dict[float, Node]] = weakref.WeakKeyDictionary()
        self._weights: list[Any] = []
        self._counts: list[int] = []
        self._holds = False

    def find(self, pages: Pages, slot: Slot | None, scale: float | None) -> Node | None:
        """Returns the root for an adapter at a scale, or for the base alone; None: nothing may be cached."""
        weights, counts = _state_of(self._model)
        if counts != self._counts or any(a is not b for a, b in zip(weights, self._weights, strict=True)):
            self._weights, self._counts = weights, counts
            self._base, self._holds = None, bool(adapted_layers(self._model))
            self._of_slots.clear()
            pages.clear()
        if self._holds:
            return None
        if slot is None:
            self._base = self._base or Node()
            return self._base
        return self._of_slots.setdefault(slot, {}).setdefault(cast(float, scale), Node())


def _state_of(model: nn.Module) -> tuple[list[Any], list[int]]:
    """Returns a model's modules and tensors, and numbers that change when one of the tensors does."""
    parts: list[Any] = list(model.modules())
    tensors = [
        tensor
        for module in parts
        for each in (module._parameters, module._buffers)
        for tensor in each.values()
        if tensor is not None
    ]
    counts = [number for t in tensors for number in (t.data_ptr(), 0 if t.is_inference() else t._version)]
    return [*parts, *tensors], counts


_FAULTS: Final[weakref.WeakKeyDictionary[nn.Module, str]] = weakref.WeakKeyDictionary()


def make_decoder(model: nn.Module | Bank, longest: int = 0, **settings: Any) -> Decoder:
    """Returns the fastest decoder that is correct for a model, or for a bank of adapters for one.

    Sequences have up to `longest` tokens; `settings` are passed to `CachedDecoder`.

    Models that use transformers' attention interface get a cache.  A test with a few random tokens, once per model,
    checks that it does not change the logits.

    Raises:
        UnsupportedModelError: the model is not causal.
    """
    bank, model = bank_and_base(model)  # without torch.compile's wrapper, as a compiled graph cannot take a layout
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
    decoder = CachedDecoder(model, bank, **settings)
    decoder.longest = limit
    return decoder


def _why_not_cached(model: nn.Module) -> str:
    """Extends two random prompts in several branches; returns what is wrong with their logits, or ""."""
    embeddings: Any = input_table(model)
    if embeddings is None or not hasattr(getattr(model, "config", None), "_attn_implementation"):
        return f"{type(model).__name__} is not built like transformers' causal language models"
    rng = random.Random(0)
    vocabulary = embeddings.weight.shape[0]
    prompts = [[rng.randrange(vocabulary) for _ in range(length)] for length in (7, 4)]
    steps = [([0, 0], 2), ([1, 0, 1], 3)]
    both: list[tuple[Tensor, Tensor]] = []
    plain, cached = PlainDecoder(model), CachedDecoder(model)
    try:
        theirs = [plain.open(prompt) for prompt in prompts]
        ours = [cached.open(prompt) for prompt in prompts]
        for parents, count in [([], 0), *steps]:
            for pair in zip(theirs, ours, strict=True):
                tokens = [rng.randrange(vocabulary) for _ in range(count)]
                for group in pair:
                    group.grow(parents, tokens)
            both.append((plain.step(), cached.step()))
        expected, got = (torch.cat(logits).float() for logits in zip(*both, strict=True))
        apart = float((got - expected).square().mean().sqrt() / expected.std())
        # Over all tokens: in bf16, rounding alone causes deviations of up to 0.15 in a single step, but 0.08 overall.
        if not apart < max(1e-3, 16 * torch.finfo(embeddings.weight.dtype).eps):
            return f"{type(model).__name__} computes different logits with the cache (off by {apart:.1%})"
    except BusyModelError:
        raise
    except UnsupportedModelError as error:
        return str(error)
    except Exception as error:  # a model can fail in any way with the cache; fall back to PlainDecoder
        return f"{type(model).__name__} fails with the cache: {type(error).__name__}: {error}"
    finally:
        plain.close_all()
        cached.close_all()
    return ""
