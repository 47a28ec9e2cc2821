"""The model's side of generation: texts grow by a token a branch, the logits of what comes next come out.

A `Text` is a prompt and its branches: one, or the beams of a search.  Whoever generates opens texts, says how they
grow, and calls `step`, which computes all that is new in all open texts in one pass through the model.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn

from ..engine.operators import Operators
from ..engine.packed import MANY_TEXTS, PACK_AFTER, Product, packed, using_packed
from ..engine.tree_attention import Cache, Unsupported, Work, configs_of, resized, using

__all__ = ["Decoder", "Text", "make_decoder"]

# The cache grows by so many columns.
_COLUMNS: Final = 32


@dataclass(eq=False)
class Text:
    """A prompt and the tree of its continuations.

    Attributes:
        prompt: its token ids.
        length: tokens from the prompt's first to a branch's newest; all branches are equally long.
        rows: the rows of the logits of the last step that belong to it, one a branch.
        row: where the text lies in the cache.
        parents, tokens: what the next step adds: token i to a copy of branch parents[i].
        paths: the tokens of each branch, where there is no cache.
    """

    prompt: Sequence[int]
    length: int = 0
    rows: slice = field(default_factory=lambda: slice(0, 0))
    row: int = 0
    parents: Sequence[int] = ()
    tokens: Sequence[int] = ()
    paths: list[tuple[int, ...]] = field(default_factory=list)

    def grow(self, parents: Sequence[int], tokens: Sequence[int]) -> None:
        """Says what the next step adds: a token to each of some branches of before; a branch may come several times."""
        self.parents, self.tokens = parents, tokens


class Decoder(Protocol):
    """Computes logits for open texts."""

    def open(self, prompt: Sequence[int]) -> Text:
        """Takes a prompt in; the next step computes it."""

    def close(self, text: Text) -> None:
        """Forgets a text."""

    def step(self) -> Tensor:
        """Computes what is new in all open texts; returns logits, whose rows each text's `rows` tell."""


class CachedDecoder:
    """Keeps keys and values, each token's once a text, and computes without padding (see `attention`)."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules = list(model.modules())
        self._configs = configs_of(model)
        self._operators = Operators.of(model)
        self._device = next(model.parameters()).device
        self._cache = Cache()
        self._texts: list[Text] = []
        self._steps = 0
        self._products: dict[nn.Module, Product] | None = None
        # The columns that each branch of each text sees (rows, N, C), and which token of the text is where (rows, C).
        self._sees = torch.zeros(0, 1, 0, dtype=torch.bool, device=self._device)
        self._positions = torch.zeros(0, 0, dtype=torch.long, device=self._device)

    def open(self, prompt: Sequence[int]) -> Text:
        text = Text(prompt, row=len(self._texts))
        self._texts.append(text)
        return text

    def close(self, text: Text) -> None:
        last = self._texts.pop()
        if last is not text:
            # The last text takes the place, so that the texts in use are always the first rows of the cache.
            if last.length:
                self._cache.move(last.row, text.row)
                self._sees[text.row] = self._sees[last.row]
                self._positions[text.row] = self._positions[last.row]
            last.row = text.row
            self._texts[text.row] = last

    @torch.no_grad()
    def step(self) -> Tensor:
        growing = [text for text in self._texts if text.length]
        fresh = [text for text in self._texts if not text.length]
        ids = [token for text in growing for token in text.tokens]
        positions = [text.length for text in growing for _ in text.tokens]
        wanted = list(range(len(ids)))
        work = self._lay_out(growing, fresh)
        for text in growing:
            text.length += 1
        for text in fresh:
            text.length = len(text.prompt)
            ids += text.prompt
            positions += range(text.length)
            wanted.append(len(ids) - 1)
        if self._products is None and (self._steps >= PACK_AFTER or len(self._texts) >= MANY_TEXTS):
            self._products = packed(self._modules)
        self._steps += 1
        products = using_packed(self._products or {})
        with evaluating(self._modules), using(self._configs), self._operators.shorter(), products:
            output: Any = self._model(
                input_ids=self._tensor(ids)[None],
                position_ids=self._tensor(positions)[None],
                use_cache=False,
                logits_to_keep=self._tensor(wanted),
                work=work,
            )
        logits: Tensor = output.logits[0]
        if logits.shape[0] != len(wanted) or not self._cache.keys:
            raise Unsupported(f"{type(self._model).__name__} does not hand its work through")
        return logits

    def _lay_out(self, growing: list[Text], fresh: list[Text]) -> Work:
        """Says what the pass computes, and notes down what branches will see after it."""
        branches = max([len(text.tokens) for text in growing], default=0)
        texts: list[int] = []
        parents: list[int] = []
        places: list[int] = []
        rows = 0
        for text in growing:
            count = len(text.tokens)
            texts += [text.row] * count
            parents += text.parents
            places += range(text.row * branches, text.row * branches + count)
            text.rows = slice(rows, rows + count)
            rows += count
        for text in fresh:
            text.rows = slice(rows, rows + 1)
            rows += 1
        at_text, at_place = self._tensor(texts), self._tensor(places)
        seen = self._sees[at_text, self._tensor(parents)]  # (R, C)
        sees = self._grid(at_place, seen, branches)
        alive = sees.any(1)  # (rows, C): the others are free, those of branches that were given up among them
        needed = max([*(int(number) for number in (alive.sum(1) + branches).tolist()), *(len(t.prompt) for t in fresh)])
        if self._fit(needed, alive):
            seen = resized(seen, (len(texts), self._cache.columns))
            sees = self._grid(at_place, seen, branches)
            alive = sees.any(1)
        free = torch.argsort(alive.to(torch.uint8), dim=1, stable=True)[:, :branches]  # (rows, N)
        at_column = free.reshape(-1)[at_place]
        sees.view(-1, self._cache.columns)[at_place, at_column] = True
        at_position = self._tensor([text.length for text in growing for _ in text.tokens])
        self._positions[at_text, at_column] = at_position
        branch_positions = self._positions.new_zeros(len(self._texts) * branches)
        branch_positions[at_place] = at_position
        work = Work(
            cache=self._cache,
            text=at_text,
            column=at_column,
            place=None if len(texts) == len(self._texts) * branches else at_place,
            sees=sees[: len(self._texts)],
            branch_positions=branch_positions.view(len(self._texts), branches),
            positions=self._positions[: len(self._texts)],
            prompts=[(text.row, len(text.prompt)) for text in fresh],
        )
        self._sees = sees if branches else self._sees.new_zeros(self._cache.rows, 1, self._cache.columns)
        for text in fresh:
            length = len(text.prompt)
            self._sees[text.row, 0, :length] = True
            self._positions[text.row, :length] = torch.arange(length, device=self._device)
        return work

    def _grid(self, places: Tensor, seen: Tensor, branches: int) -> Tensor:
        """Spreads what branches see (R, C) over texts and their branches (rows, N, C)."""
        grid = seen.new_zeros(self._cache.rows * branches, seen.shape[1])
        grid[places] = seen
        return grid.view(self._cache.rows, branches, seen.shape[1])

    def _fit(self, needed: int, alive: Tensor) -> bool:
        """Gives the cache as many rows and columns as are needed, and not many more; tells whether it changed."""
        rows, columns = self._cache.rows, self._cache.columns
        if len(self._texts) > rows:
            rows = max(len(self._texts), min(2 * rows, rows + 8))
        wanted = -(-needed // _COLUMNS) * _COLUMNS
        if needed > columns:
            columns = wanted
        elif wanted * 2 <= columns:  # a long text has gone
            last = int(alive.any(0).nonzero().max()) + 1 if bool(alive.any()) else 0
            columns = max(wanted, -(-last // _COLUMNS) * _COLUMNS)
        if (rows, columns) == (self._cache.rows, self._cache.columns):
            return False
        self._cache.resize(rows, columns)
        self._positions = resized(self._positions, (rows, columns))
        return True

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._device)


class PlainDecoder:
    """Computes every token of every branch again at each step: right for any causal model, and slow."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._device = next(model.parameters()).device
        self._texts: list[Text] = []

    def open(self, prompt: Sequence[int]) -> Text:
        text = Text(prompt)
        self._texts.append(text)
        return text

    def close(self, text: Text) -> None:
        self._texts.remove(text)

    @torch.no_grad()
    def step(self) -> Tensor:
        rows: list[tuple[int, ...]] = []
        for text in self._texts:
            if text.length:
                text.paths = [
                    (*text.paths[parent], token) for parent, token in zip(text.parents, text.tokens, strict=True)
                ]
            else:
                text.paths = [tuple(text.prompt)]
            text.length = len(text.paths[0])
            text.rows = slice(len(rows), len(rows) + len(text.paths))
            rows += text.paths
        # Padded behind, where causal models do not look.
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)
        last = torch.tensor([len(row) - 1 for row in rows], device=self._device)
        with evaluating(self._model.modules()):
            output = self._model(ids.to(self._device))
        logits: Tensor = getattr(output, "logits", output)
        return logits[torch.arange(len(rows), device=self._device), last]


_CHECKED: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def make_decoder(model: nn.Module) -> Decoder:
    """Returns the fastest decoder that is right for a model.

    Models that call transformers' attention interface get a cache.  That they get the same logits with it as without is
    tried once on a few random tokens.
    """
    if model not in _CHECKED:
        _CHECKED[model] = _why_not_cached(model)
    return PlainDecoder(model) if _CHECKED[model] else CachedDecoder(model)


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Switches dropout off, module by module back as it was: parts of a model may be in different modes."""
    trained = [module for module in modules if module.training]
    for module in trained:
        module.training = False
    try:
        yield
    finally:
        for module in trained:
            module.training = True


def _why_not_cached(model: nn.Module) -> str:
    """Grows two random texts by branches that part; returns what is wrong with their logits, or ""."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    if not configs_of(model) or embeddings is None:
        return f"{type(model).__name__} is not built like transformers' causal language models"
    rng = random.Random(0)
    vocabulary = embeddings.weight.shape[0]
    prompts = [[rng.randrange(vocabulary) for _ in range(length)] for length in (7, 4)]
    steps = [([0, 0], 2), ([1, 0, 1], 3)]
    try:
        plain, cached = PlainDecoder(model), CachedDecoder(model)
        theirs = [plain.open(prompt) for prompt in prompts]
        ours = [cached.open(prompt) for prompt in prompts]
        for parents, count in [([], 0), *steps]:
            for pair in zip(theirs, ours, strict=True):
                tokens = [rng.randrange(vocabulary) for _ in range(count)]
                for text in pair:
                    text.grow(parents, tokens)
            expected, got = plain.step().float(), cached.step().float()
            apart = float((got - expected).square().mean().sqrt() / expected.std())
            if not apart < max(1e-3, 16 * torch.finfo(embeddings.weight.dtype).eps):
                return f"{type(model).__name__} computes other logits with the cache (off by {apart:.1%})"
    except Unsupported as error:
        return str(error)
    except Exception as error:  # whatever a model does that the cache did not think of, the plain way remains
        return f"{type(model).__name__} fails with the cache: {type(error).__name__}: {error}"
    return ""
