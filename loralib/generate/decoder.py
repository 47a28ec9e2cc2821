"""The model's side of generation: texts grow by a token a branch, the logits of what comes next come out.

A `Text` is a prompt and its branches: one, or the beams of a search.  Whoever generates opens texts, says how they
grow, and calls `step`, which computes all that is new in all open texts in one pass through the model.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .attention import Cache, Unsupported, Work, configs_of, using

__all__ = ["Decoder", "Text", "make_decoder"]

# The cache is tidied when so many of its columns are seen by no branch any more.
_TIDY_SHARE = 0.3


@dataclass(eq=False)
class Text:
    """A prompt and the tree of its continuations.

    Attributes:
        prompt: its token ids.
        length: tokens from the prompt's first to a branch's newest; all branches are equally long.
        rows: the rows of the logits of the last step that belong to it, one a branch.
        row: where the text lies in the cache.
        columns: how many columns of the cache it has used.
        parents, tokens: what the next step adds: token i to a copy of branch parents[i].
        paths: the tokens of each branch, where there is no cache.
    """

    prompt: Sequence[int]
    length: int = 0
    rows: slice = field(default_factory=lambda: slice(0, 0))
    row: int = 0
    columns: int = 0
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
        self._configs = configs_of(model)
        self._device = next(model.parameters()).device
        self._cache = Cache()
        self._texts: list[Text] = []
        self._sees = torch.zeros(0, 1, 0, dtype=torch.bool, device=self._device)
        self._positions = torch.zeros(0, 0, dtype=torch.long, device=self._device)

    def open(self, prompt: Sequence[int]) -> Text:
        text = Text(prompt, row=len(self._texts))
        self._texts.append(text)
        return text

    def close(self, text: Text) -> None:
        last = self._texts.pop()
        if last is text:
            return
        # The last text takes the place, so that the texts in use are always the first rows of the cache.
        if last.length:
            self._cache.move(last.row, text.row, last.columns)
            self._sees[text.row] = self._sees[last.row]
            self._positions[text.row] = self._positions[last.row]
        last.row = text.row
        self._texts[text.row] = last

    @torch.no_grad()
    def step(self) -> Tensor:
        growing = [text for text in self._texts if text.length]
        fresh = [text for text in self._texts if not text.length]
        self._make_room(growing, fresh)
        work, ids, positions = self._lay_out(growing, fresh)
        for text in growing:
            text.columns += len(text.tokens)
            text.length += 1
        for text in fresh:
            text.columns = text.length = len(text.prompt)
        branches = sum(len(text.tokens) for text in growing)
        wanted = list(range(branches))
        for text in fresh:
            wanted.append((wanted[-1] if len(wanted) > branches else branches - 1) + len(text.prompt))
        with using(self._configs):
            output: Any = self._model(
                input_ids=self._tensor(ids)[None],
                position_ids=self._tensor(positions)[None],
                use_cache=False,
                logits_to_keep=self._tensor(wanted),
                work=work,
            )
        logits: Tensor = output.logits[0]
        if logits.shape[0] != len(wanted) or len(work.cache.keys) == 0:
            raise Unsupported(f"{type(self._model).__name__} does not hand its work through")
        return logits

    def _make_room(self, growing: list[Text], fresh: list[Text]) -> None:
        used = max([text.columns for text in growing], default=0)
        if growing and self._is_untidy(growing):
            self._tidy(growing)
            used = max(text.columns for text in growing)
        columns = max([used + max([len(text.tokens) for text in growing], default=0), *(len(t.prompt) for t in fresh)])
        self._cache.reserve(len(self._texts), columns)
        texts, branches, before = self._sees.shape
        if self._cache.rows > texts or self._cache.columns > before:
            sees = self._sees.new_zeros(self._cache.rows, branches, self._cache.columns)
            sees[:texts, :, :before] = self._sees
            positions = self._positions.new_zeros(self._cache.rows, self._cache.columns)
            positions[:texts, :before] = self._positions
            self._sees, self._positions = sees, positions

    def _lay_out(self, growing: list[Text], fresh: list[Text]) -> tuple[Work, list[int], list[int]]:
        """Builds the work of a pass, and brings bits and positions to where the pass will leave the cache."""
        text: list[int] = []
        column: list[int] = []
        place: list[int] = []
        parent: list[int] = []
        ids: list[int] = []
        positions: list[int] = []
        texts, widest = len(self._texts), max([len(t.tokens) for t in growing], default=0)
        for grown in growing:
            count = len(grown.tokens)
            grown.rows = slice(len(ids), len(ids) + count)
            text += [grown.row] * count
            column += range(grown.columns, grown.columns + count)
            place += range(grown.row * widest, grown.row * widest + count)
            parent += grown.parents
            ids += grown.tokens
            positions += [grown.length] * count
        at_text, at_column, at_place = self._tensor(text), self._tensor(column), self._tensor(place)
        at_position = self._tensor(positions)
        kept = self._sees[at_text, self._tensor(parent)]  # (R, C)
        kept[torch.arange(len(ids), device=self._device), at_column] = True
        sees = self._sees.new_zeros(self._cache.rows, max(widest, 1), self._cache.columns)
        sees.view(-1, self._cache.columns)[at_place] = kept
        branch_positions = torch.zeros(texts * widest, dtype=torch.long, device=self._device)
        branch_positions[at_place] = at_position
        self._positions[at_text, at_column] = at_position
        rows = len(ids)
        for new in fresh:
            sees[new.row, 0, : len(new.prompt)] = True
            self._positions[new.row, : len(new.prompt)] = torch.arange(len(new.prompt), device=self._device)
            new.rows = slice(rows, rows + 1)
            rows += 1
            ids += new.prompt
            positions += range(len(new.prompt))
        self._sees = sees
        columns = max([t.columns + len(t.tokens) for t in growing], default=0)
        work = Work(
            cache=self._cache,
            text=at_text,
            column=at_column,
            place=None if len(text) == texts * widest else at_place,
            sees=sees[:texts, :widest, :columns],
            branch_positions=branch_positions.view(texts, widest),
            positions=self._positions[:texts, :columns],
            prompts=[(new.row, len(new.prompt)) for new in fresh],
        )
        return work, ids, positions

    def _is_untidy(self, growing: list[Text]) -> bool:
        """Whether many columns are dead: those of branches that no later branch came from."""
        if max(len(text.tokens) for text in growing) == 1 or growing[0].length % 8:  # looked at now and then
            return False
        used = max(text.columns for text in growing)
        alive = int(self._sees.any(1).sum(1).max())
        return alive < used * (1 - _TIDY_SHARE)

    def _tidy(self, growing: list[Text]) -> None:
        """Moves the columns that some branch sees to the front of each text."""
        texts = 1 + max(text.row for text in growing)
        alive = self._sees[:texts].any(1)  # (S, C)
        counts = alive.sum(1).tolist()
        order = torch.argsort(~alive, dim=1, stable=True)[:, : max(counts)]
        self._cache.select(order)
        width = order.shape[1]
        branches = self._sees.shape[1]
        self._sees[:texts, :, :width] = self._sees[:texts].gather(2, order[:, None].expand(texts, branches, width))
        self._sees[:texts, :, width:] = False
        self._positions[:texts, :width] = self._positions[:texts].gather(1, order)
        for text in growing:
            text.columns = counts[text.row]

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
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switches dropout off, module by module back as it was: parts of a model may be in different modes."""
    trained = [module for module in model.modules() if module.training]
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
    with evaluating(model):
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
