"""EVA: A is initialised with the directions of largest input variance (Paischer et al. 2024, arXiv:2410.07170).

For inputs X of a layer, A is the top of V^T in the singular value decomposition X - mean = U S V^T, and B is zero.  The
layers share one budget of ranks: those whose directions explain more input variance get more, at most ``rho * r``.  The
decomposition is updated batch by batch (Ross et al. 2008), until its directions hardly change.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import LoraConfig
from ..errors import ConfigError, list_faults
from ..modes import evaluating

__all__ = ["EvaStart", "EvaTarget", "eva_start"]


class EvaTarget(Protocol):
    """A linear layer to be initialised by EVA; r and lora_alpha are the values before ranks are redistributed."""

    @property
    def name(self) -> str: ...
    @property
    def module(self) -> nn.Module: ...
    @property
    def r(self) -> int: ...
    @property
    def lora_alpha(self) -> float: ...


@dataclass(frozen=True)
class EvaStart:
    """What EVA computes from some data; layers missing here got no rank and are not adapted.

    Attributes:
        A: lora_A of each layer by name, (r, in).
        lora_alphas: lora_alpha of each layer, chosen to keep the scaling unchanged.
    """

    A: Mapping[str, Tensor]
    lora_alphas: Mapping[str, float]


@torch.no_grad()
def eva_start(model: nn.Module, targets: Sequence[EvaTarget], batches: Iterable[Any], config: LoraConfig) -> EvaStart:
    """Runs batches through a model and returns the initialisation of its layers.

    Args:
        model: the model, put in eval mode for the duration.
        targets: the layers.
        batches: the data to run; see `loralib.inject`.  Stops early once all directions have converged.
        config: `eva_config` may contain rho (2.0: no layer gets more than rho times its rank; 1: each keeps its own),
            tau (0.99: directions have converged if their cosine between two batches is at least this) and
            use_label_mask (True: inputs at labels of -100 are ignored).

    Raises:
        ConfigError: there are too few inputs.
    """
    settings = {"rho": 2.0, "tau": 0.99, "use_label_mask": True} | dict(config.eva_config or {})
    most = {target.name: round(target.r * settings["rho"]) for target in targets}
    inputs = _Inputs(targets, most)
    with evaluating(model.modules()):
        for batch in batches:
            inputs.see(model, batch, _counted_rows(batch, bool(settings["use_label_mask"])))
            if all(pca.cosine >= settings["tau"] for pca in inputs.pcas.values()):
                break
    few = [target.name for target in targets if len(inputs.of(target.name).directions) < target.r]
    if few:
        raise ConfigError(
            list_faults(
                "init_lora_weights 'eva': these modules saw fewer inputs than r", few, "Pass more data, or lower r."
            )
        )
    ranks = _shared_out(targets, inputs, most)
    chosen = [target for target in targets if ranks[target.name]]
    power = 0.5 if config.use_rslora else 1.0
    return EvaStart(
        A={t.name: inputs.of(t.name).directions[: ranks[t.name]].clone() for t in chosen},
        lora_alphas={t.name: t.lora_alpha * (ranks[t.name] / t.r) ** power for t in chosen},
    )


def _counted_rows(batch: Any, use_label_mask: bool) -> Tensor | None:
    """Returns a mask of the positions in a batch that count (B, T); None: all."""
    if not isinstance(batch, Mapping):
        return None
    masks = []
    if batch.get("attention_mask") is not None:
        masks.append(batch["attention_mask"].bool())
    if use_label_mask and batch.get("labels") is not None:
        masks.append(batch["labels"] != -100)
    return functools.reduce(torch.logical_and, masks) if masks else None


def _shared_out(targets: Sequence[EvaTarget], inputs: _Inputs, most: Mapping[str, int]) -> dict[str, int]:
    """Distributes the ranks of all layers to the directions that explain most of their inputs' variance."""
    shares = [
        (float(share), -number, target.name)
        for number, target in enumerate(targets)
        for share in inputs.of(target.name).explained()[: most[target.name]]
    ]
    budget = sum(target.r for target in targets)
    ranks = dict.fromkeys((target.name for target in targets), 0)
    for _, _, name in sorted(shares, reverse=True)[:budget]:
        ranks[name] += 1
    return ranks


@dataclass
class _IncrementalPCA:
    """Mean and principal directions (at most `count`) of the rows seen so far."""

    count: int
    rows: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros(()))
    squares: Tensor = field(default_factory=lambda: torch.zeros(()))  # sum of squared distances from the mean
    directions: Tensor = field(default_factory=lambda: torch.zeros(0, 0))  # (k, in)
    values: Tensor = field(default_factory=lambda: torch.zeros(0))  # singular values (k,)
    cosine: float = -1.0  # the smallest cosine between directions before and after the last update

    def see(self, x: Tensor) -> None:
        """Updates the statistics with rows x (n, in)."""
        if not len(x):
            return
        n, total = len(x), self.rows + len(x)
        mean = x.mean(0)
        parts = [x - mean]
        squares = parts[0].square().sum()
        if self.rows:
            shift = (self.rows * n / total) ** 0.5 * (self.mean - mean)
            parts += [self.values[:, None] * self.directions, shift[None]]
            squares = squares + self.squares + shift.square().sum()
            mean = self.mean + (mean - self.mean) * (n / total)
        values, directions = _right_vectors(torch.cat(parts), self.count)
        known = min(len(directions), len(self.directions))
        # Directions with opposite signs are equivalent.
        cosines = F.cosine_similarity(directions[:known], self.directions[:known]).abs() if known else torch.zeros(1)
        self.cosine = float(cosines.min()) if known == len(directions) else -1.0
        self.rows, self.mean, self.squares, self.values, self.directions = total, mean, squares, values, directions

    def explained(self) -> Tensor:
        """Returns the share of the variance explained by each direction."""
        return self.values.square() / self.squares.clamp(min=torch.finfo(torch.float32).tiny)


def _right_vectors(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Returns the largest singular values of a matrix (n, in) and its right singular vectors (k, in)."""
    if min(rows.shape) > 4 * count:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            _, values, V = torch.svd_lowrank(rows, q=2 * count, niter=4)
        return values[:count], V.T[:count]
    _, values, directions = torch.linalg.svd(rows, full_matrices=False)
    return values[:count], directions[:count]


class _Inputs:
    """The inputs of some layers; an input that several layers share is processed once."""

    def __init__(self, targets: Sequence[EvaTarget], most: Mapping[str, int]) -> None:
        self._targets, self._most = targets, most
        self._first: dict[str, str] = {}  # maps each layer to the first one with the same input
        self.pcas: dict[str, _IncrementalPCA] = {}

    def of(self, name: str) -> _IncrementalPCA:
        """Returns the statistics of a layer's inputs."""
        return self.pcas.get(self._first.get(name, ""), _IncrementalPCA(0))

    def see(self, model: nn.Module, batch: Any, counted: Tensor | None) -> None:
        """Runs one batch and updates the statistics of the layers' inputs."""
        seen: dict[str, Tensor] = {}
        hooks = [
            target.module.register_forward_pre_hook(functools.partial(_note, seen, target.name))
            for target in self._targets
        ]
        try:
            if isinstance(batch, Mapping):
                model(**{name: value for name, value in batch.items() if name != "labels"})
            else:
                model(batch)
        finally:
            for hook in hooks:
                hook.remove()
        if not self._first:
            by_tensor: dict[int, str] = {}
            for name, x in seen.items():
                self._first[name] = by_tensor.setdefault(id(x), name)
            for name, first in self._first.items():
                pca = self.pcas.setdefault(first, _IncrementalPCA(0))
                pca.count = max(pca.count, self._most[name])
        for name, pca in self.pcas.items():
            if name in seen:
                x = seen[name]
                rows = x[counted] if counted is not None else x.reshape(-1, x.shape[-1])
                pca.see(rows.float())


def _note(seen: dict[str, Tensor], name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
    seen[name] = inputs[0]
