"""Arithmetic on adapters: sums, differences, mixtures and other ranks, all pure functions on `Adapter`.

An adapter's update of a module is ``scaling * B A``.  The sum of such updates is low-rank too: exactly, by stacking the
factors (`cat`), or approximately, by keeping the largest singular values of that (`svd`).  The other methods are
published heuristics, as implemented by PEFT's ``add_weighted_adapter``.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from .adapter import BASE, BLOCKS, MODEL_TYPE, Adapter, expand_blocks
from .config import LoraConfig, with_ranks
from .delta import all_finite, balanced_factors, delta_weight, product_svd, scaling_of
from .errors import AdapterError, BaseMismatchError, ConfigError, did_you_mean, list_faults
from .variants import ROWS

__all__ = [
    "METHODS",
    "Combination",
    "Update",
    "check_sound",
    "combine",
    "depends_on_base",
    "factors",
    "faults_of",
    "located_faults",
    "more_than_low_rank",
    "resize",
    "update_of",
    "updates_in",
    "updates_of",
    "way_out",
    "with_updates",
]

FactorPair: TypeAlias = tuple[Tensor, Tensor]  # A (r, in), B (out, r)
Loss: TypeAlias = tuple[float, float]  # Frobenius norms of the error and of the exact update

# The methods of `combine`, and what each is good for.
METHODS: Mapping[str, str] = {
    "cat": "the exact weighted sum; the ranks add up",
    "svd": "the best approximation of that sum of a given rank",
    "linear": "the weighted sums of A and of B separately: fast but rough, since it also multiplies one adapter's B "
    "with another's A (task arithmetic, arXiv:2212.04089)",
    "ties": "keep the largest values, elect a sign, average the values that have it (TIES, arXiv:2306.01708), applied "
    "to the factors",
    "dare_linear": "drop values at random, rescale the others and sum (DARE, arXiv:2311.03099), applied to the factors",
    "dare_ties": "DARE's dropping with TIES's signs, applied to the factors",
    "magnitude_prune": "keep the largest values, then sum, applied to the factors",
    "ties_svd": "TIES applied to whole updates, then reduced to a given rank",
    "dare_linear_svd": "DARE applied to whole updates, then reduced to a given rank",
    "dare_ties_svd": "DARE with TIES's signs applied to whole updates, then reduced to a given rank",
    "magnitude_prune_svd": "keep the largest values of whole updates, sum them, then reduce to a given rank",
}


@dataclass(frozen=True)
class Update:
    """The low-rank update of one module as matrices, regardless of the type of layer: ``scaling * B A``.

    Attributes:
        A: (r, in); a convolution's input channels and kernel are flattened into one axis.
        B: (out, r).
        scaling: see `loralib.delta.scaling_of`.
    """

    A: Tensor
    B: Tensor
    scaling: float

    @property
    def r(self) -> int:
        """The rank of the factors."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the update, (out, in)."""
        return self.B.shape[0], self.A.shape[1]

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the singular value decomposition; see `loralib.delta.product_svd`."""
        return product_svd(self.A, self.B, self.scaling)

    def norm(self) -> float:
        """Returns the Frobenius norm, computed from the factors' Gram matrices."""
        A, B = self.A.double(), self.B.double()
        squared = torch.sum((B.T @ B) * (A @ A.T)).clamp(min=0)
        return abs(self.scaling) * float(squared.sqrt())

    def __add__(self, other: Update) -> Update:
        """Returns the exact sum, whose rank is the sum of the two ranks, with scaling 1."""
        (A, B), (other_A, other_B) = self.plain(), other.plain()
        return Update(torch.cat([A, other_A]), torch.cat([B, other_B], dim=1), 1.0)

    def __mul__(self, weight: float) -> Update:
        return Update(self.A, self.B, self.scaling * weight)

    def plain(self, r: int | None = None) -> FactorPair:
        """Returns A and B in fp32 with the scaling folded into B, zero-padded to a larger rank if r is given."""
        missing = 0 if r is None else r - self.r
        return F.pad(self.A.float(), (0, 0, 0, missing)), F.pad(self.B.float() * self.scaling, (0, missing))


@dataclass(frozen=True)
class Combination:
    """The result of combining adapters.

    Attributes:
        adapter: the result, with lora_alpha = r, so that its updates are plain B A.
        error: relative error of its updates, ``||result - exact|| / ||exact||`` over all modules (Frobenius norm).
            Exact means the weighted sum of the updates or, for methods that end in ``_svd``, the merged updates before
            truncation.  0 if nothing but rounding is lost.
        errors: the same for each module.
    """

    adapter: Adapter
    error: float
    errors: Mapping[str, float]

    @property
    def energy(self) -> float:
        """The share of the squared norm that is kept, for results that are best low-rank approximations."""
        return 1 - self.error**2


def faults_of(adapter: Adapter) -> list[str]:
    """Lists what is wrong with an adapter's tensors, as far as this can be told without a model."""
    return [f"{place}: {fault}" if place else fault for place, fault in located_faults(adapter)]


def located_faults(adapter: Adapter) -> list[tuple[str, str]]:
    """Lists the faults, each with the name of the module or tensor that it concerns."""
    faults = []
    for module in adapter.modules:
        keys = adapter.factor_keys(module)
        A, B = map(adapter.tensors.get, keys)
        if A is None or B is None:
            faults.append((module, f"{keys[A is not None].rpartition('.')[2]} is missing"))
            continue
        experts = adapter.holds_experts(module)
        together = A.dim() == B.dim() == 3 and len(A) == len(B) if experts else _belong_together(A, B)
        if not together:
            faults.append((module, f"factors of shapes {tuple(A.shape)} and {tuple(B.shape)} do not match each other"))
            continue
        r, blocks = adapter.config.rank_of(module), adapter.config.blocks_of(module)
        expected = r if blocks is None else r * sum(blocks)
        if A.shape[int(experts)] != expected or B.shape[1 + int(experts)] != r:
            rank = f"r = {r}" if blocks is None else f"r = {r} with {sum(blocks)} blocks"
            faults.append((module, f"A {tuple(A.shape)} and B {tuple(B.shape)} do not have rank {rank}"))
        elif blocks is not None and B.shape[0] % sum(blocks):
            faults.append((module, f"B {tuple(B.shape)} does not divide into {sum(blocks)} blocks"))
    for name, tensor in adapter.tensors.items():
        if tensor.numel() == 0:
            faults.append((name, f"shape {tuple(tensor.shape)} holds no values"))
        elif "lora_" in name and not tensor.is_floating_point():
            faults.append((name, f"{tensor.dtype}, expected floating-point values"))
        elif tensor.is_floating_point() and not all_finite(tensor):
            faults.append((name, "holds NaN or infinite values"))
    if not adapter.modules:
        faults.append(("", "there are no LoRA factors (names that end in lora_A and lora_B)"))
    return faults


def check_sound(adapter: Adapter) -> None:
    """Raises AdapterError with all of `faults_of`, if there are any."""
    faults = faults_of(adapter)
    if faults:
        raise AdapterError(
            list_faults("the adapter is damaged", faults, "Copy it again from its source, or train it again.")
        )


def updates_of(adapter: Adapter) -> dict[str, Update]:
    """Returns the update of each module.

    Args:
        adapter: with fused blocks expanded (`loralib.adapter.expand_blocks`).

    Raises:
        AdapterError: factors are missing, of the wrong shape or not finite, or the update is more than B A.
    """
    check_sound(adapter)
    more = more_than_low_rank(adapter)
    if more:
        raise AdapterError(
            list_faults(
                "the adapter is not simply a low-rank update added to the base weights",
                more,
                f"{way_out(adapter)}.",
            )
        )
    plain = expand_blocks(adapter)
    return {name: update for module in plain.modules for name, update in updates_in(plain, module).items()}


def update_of(adapter: Adapter, module: str) -> Update:
    """Returns the low-rank part of an adapter's update of a module, for adapters without fused blocks."""
    A, B = factors(adapter, module)
    return Update(A.flatten(1), B.flatten(1), _scaling(adapter, module))


def updates_in(adapter: Adapter, module: str) -> dict[str, Update]:
    """Returns the low-rank part of an adapter's update of a module by name, for adapters without fused blocks.

    An expert weight has one update per expert, named ``module[0]``, ``module[1]`` and so on.
    """
    if not adapter.holds_experts(module):
        return {module: update_of(adapter, module)}
    scaling, pairs = _scaling(adapter, module), zip(*factors(adapter, module), strict=True)
    return {f"{module}[{expert}]": Update(A, B, scaling) for expert, (A, B) in enumerate(pairs)}


def _scaling(adapter: Adapter, module: str) -> float:
    config = adapter.config
    return scaling_of(config.rank_of(module), config.alpha_of(module), config.use_rslora)


def _belong_together(A: Tensor, B: Tensor) -> bool:
    """Whether A (r, in) and B (out, r), or those of a convolution, are factors of one update."""
    return A.dim() > 1 and A.dim() == B.dim() and (A.dim() == 2 or B[:1, :1].numel() == 1)


def factors(adapter: Adapter, module: str) -> FactorPair:
    """Returns a module's A and B as they are stored."""
    key_A, key_B = adapter.factor_keys(module)
    return adapter.tensors[key_A], adapter.tensors[key_B]


def with_updates(adapter: Adapter, updates: Mapping[str, FactorPair]) -> Adapter:
    """Returns an adapter with new factors, A (r, in) and B (out, r), and lora_alpha = r, so that its update is B A.

    Args:
        adapter: supplies the layer type of each module, and all settings except ranks and alphas.
        updates: new factors; modules not named here are dropped.  Parameters trained in full stay.  The experts of one
            weight all get the largest rank among them, padded with zeros.
    """
    updates, stacks = _stacked(adapter, updates)
    tensors = {name: tensor for name, tensor in adapter.tensors.items() if not _is_factor(name)}
    for name, (A, B) in updates.items():
        old_A, old_B = factors(adapter, name)
        key_A, key_B = adapter.factor_keys(name)
        tensors[key_A] = A.reshape(A.shape[0], *old_A.shape[1:]).contiguous()
        tensors[key_B] = B.reshape(*B.shape, *(1 for _ in old_B.shape[2:])).contiguous()
    tensors |= {f"{name}.lora_experts_{half}": tensor for name, pair in stacks.items() for half, tensor in pair.items()}
    ranks = {name: A.shape[0] for name, (A, _) in updates.items()}
    ranks |= {name: pair["A"].shape[1] for name, pair in stacks.items()}
    config = with_ranks(adapter.config.replace(enable_lora={}, use_rslora=False), ranks, dict(ranks))
    return Adapter(config, tensors, {key: text for key, text in adapter.metadata.items() if key != BLOCKS})


def _stacked(
    adapter: Adapter, updates: Mapping[str, FactorPair]
) -> tuple[dict[str, FactorPair], dict[str, dict[str, Tensor]]]:
    """Returns the factors of modules; and, per expert weight (see `updates_in`), those of experts as "A" and "B"."""
    rest, experts = dict(updates), dict[str, dict[int, FactorPair]]()
    for name in updates:
        module, _, number = name.removesuffix("]").rpartition("[")
        if number.isdecimal() and adapter.holds_experts(module):
            experts.setdefault(module, {})[int(number)] = rest.pop(name)
    stacks = {}
    for module, pairs in experts.items():
        r = max(A.shape[0] for A, _ in pairs.values())
        padded = [Update(A, B, 1.0).plain(r) for _, (A, B) in sorted(pairs.items())]
        stacks[module] = {"A": torch.stack([A for A, _ in padded]), "B": torch.stack([B for _, B in padded])}
    return rest, stacks


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    method: str = "svd",
    *,
    r: int | None = None,
    density: float | None = None,
    majority_sign: str = "total",
    seed: int = 0,
) -> Combination:
    """Combines several adapters of the same base model into one.

    Args:
        adapters: if some of them lack a module, they count as not updating it.
        weights: one for each adapter; may be negative.
        method: one of `METHODS`.
        r: for methods that end in svd: the rank of the result; default: the largest among the adapters.
        density: for methods that drop values: the share to keep, above 0 and up to 1.
        majority_sign: for TIES: "total" (the sign of the sum) or "frequency" (the more frequent sign).
        seed: for DARE.

    Returns:
        The adapter, and how far it is from the exact combination.

    Raises:
        AdapterError: an adapter is damaged, or has parts that are not low-rank updates.
        BaseMismatchError: the adapters belong to different base models.
        ConfigError: an argument is out of range, or ranks differ where they must be equal.

    >>> one = Adapter(LoraConfig(r=1, lora_alpha=2, target_modules=["q"]),
    ...               {"q.lora_A": torch.ones(1, 2), "q.lora_B": torch.ones(2, 1)})
    >>> combine([one, one], [1.0, -0.5], "cat").adapter.tensors["q.lora_B"].tolist()
    [[2.0, -1.0], [2.0, -1.0]]
    >>> combine([one, one], [1.0, -0.5], "svd").error < 1e-6
    True
    """
    _check_arguments(adapters, weights, method, r, density, majority_sign)
    updates_by_adapter = [updates_of(adapter) for adapter in adapters]
    template = _template(adapters)
    if len(adapters) == 1 and method != "svd":
        method = "cat"  # a single adapter is only scaled
    rank = r or max(update.r for updates in updates_by_adapter for update in updates.values())
    merger = _Merger(method.removesuffix("_svd"), density or 1.0, majority_sign, torch.Generator().manual_seed(seed))
    results: dict[str, FactorPair] = {}
    losses: dict[str, Loss] = {}
    for module in dict.fromkeys(name for updates in updates_by_adapter for name in updates):
        pairs = [(u[module], weight) for u, weight in zip(updates_by_adapter, weights, strict=True) if module in u]
        updates, shares = [update for update, _ in pairs], [weight for _, weight in pairs]
        total = functools.reduce(operator.add, (update * weight for update, weight in pairs))
        if method == "cat":
            results[module], losses[module] = total.plain(), (0.0, total.norm())
        elif method == "svd":
            results[module], losses[module] = _cut(*total.svd(), rank)
        elif method.endswith("_svd"):
            dense = merger.merge([delta_weight(u.A, u.B, u.scaling) for u in updates], shares)
            U, S, Vh = torch.linalg.svd(dense.double(), full_matrices=False)
            results[module], losses[module] = _cut(U, S, Vh, rank)
        else:
            results[module] = merger.merge_factors(module, updates, shares)
            losses[module] = (Update(*results[module], 1.0) + total * -1).norm(), total.norm()
    return _combination(with_updates(template, results), losses)


def resize(adapter: Adapter, r: int | None = None, *, energy: float | None = None) -> Combination:
    """Returns the best approximation of an adapter by one of another rank, truncating the SVD of each update.

    Args:
        adapter: any plain LoRA adapter.
        r: the new rank of all modules; a rank larger than before pads with zeros.
        energy: instead of r: the share of each update's squared norm to keep; ranks may then differ between modules.

    Returns:
        The adapter; `Combination.energy` is the share of the squared norm that was kept.

    Raises:
        ConfigError: neither or both of r and energy are given, or one is out of range.

    >>> two = Adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["q"]),
    ...               {"q.lora_A": torch.eye(2), "q.lora_B": torch.diag(torch.tensor([3.0, 4.0]))})
    >>> round(resize(two, 1).energy, 6)
    0.64
    """
    if (r is None) == (energy is None):
        raise ConfigError("give exactly one of r and energy: the new rank, or the fraction of the squared norm to keep")
    if r is not None and r < 1:
        raise ConfigError(f"r is {r}, expected a whole number of at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError(f"energy is {energy}, expected a fraction above 0 and at most 1")
    results, losses = {}, {}
    for module, update in updates_of(adapter).items():
        U, S, Vh = update.svd()
        results[module], losses[module] = _cut(U, S, Vh, r or _rank_for(S, energy or 1.0))
    return _combination(with_updates(expand_blocks(adapter), results), losses)


# Parts.


def depends_on_base(adapter: Adapter) -> bool:
    """Whether the update depends on the base weights (DoRA, PiSSA and similar), so that layers cannot simply add it."""
    return adapter.config.changes_base or any(name.endswith("lora_magnitude_vector") for name in adapter.tensors)


def way_out(adapter: Adapter) -> str:
    """Returns advice on how to convert an adapter that is more than low-rank into something every command accepts."""
    if adapter.config.lora_bias or adapter.config.trainable_token_indices:
        return "`loralib merge ADAPTER DIR` turns it into a model, and a single adapter can be used as it is"
    return "`loralib convert ADAPTER DIR --target peft --model MODEL` turns it into a plain one"


def more_than_low_rank(adapter: Adapter) -> list[str]:
    """Lists what an adapter holds besides low-rank updates of the base weights."""
    config = adapter.config
    faults = []
    if config.use_dora or any(name.endswith("lora_magnitude_vector") for name in adapter.tensors):
        faults.append("DoRA: it also rescales the rows of the base weight")
    if config.changes_base:
        faults.append(f"init_lora_weights {config.init_lora_weights!r}: it belongs to a changed base weight")
    if config.lora_bias or any(name.endswith("lora_B.bias") for name in adapter.tensors):
        faults.append("lora_bias: B has a bias")
    if config.trainable_token_indices or any(name.endswith(f".{ROWS}") for name in adapter.tensors):
        faults.append("trainable_token_indices: it replaces rows of an embedding or head")
    return faults


def _check_arguments(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    method: str,
    r: int | None,
    density: float | None,
    majority_sign: str,
) -> None:
    faults = []
    if method not in METHODS:
        faults.append(f"method is {method!r}, expected one of {', '.join(METHODS)}.{did_you_mean(method, METHODS)}")
    if not adapters or len(adapters) != len(weights):
        faults.append(
            f"there are {len(adapters)} adapters and {len(weights)} weights, expected one weight for each adapter"
        )
    if not all(math.isfinite(weight) for weight in weights):
        faults.append(f"weights are {list(weights)}, expected finite numbers")
    if r is not None and (not method.endswith("svd") or r < 1):
        faults.append(f"r is {r}, expected at least 1, and only for methods that end in svd")
    drops = method.removesuffix("_svd") in ("ties", "dare_linear", "dare_ties", "magnitude_prune")
    if drops and (density is None or not 0 < density <= 1):
        faults.append(f"density is {density}, expected the fraction of values to keep, above 0 and at most 1")
    if density is not None and not drops:
        faults.append(f"density is {density}, but {method} drops no values")
    if majority_sign not in ("total", "frequency"):
        faults.append(f"majority_sign is {majority_sign!r}, expected 'total' or 'frequency'")
    if faults:
        raise ConfigError(list_faults("these adapters cannot be combined in this way", faults))


def _template(adapters: Sequence[Adapter]) -> Adapter:
    """Returns an adapter with the modules of all adapters and the settings that they have in common."""
    rest = [
        f"{name} (adapter {number})"
        for number, adapter in enumerate(adapters, 1)
        for name in adapter.tensors
        if not _is_factor(name)
    ]
    if rest:
        raise AdapterError(
            list_faults(
                "only low-rank updates can be combined, but some modules or biases were trained in full",
                rest,
                "Merge such adapters into their base instead (`loralib merge`).",
            )
        )
    bases = {adapter.metadata[BASE] for adapter in adapters if BASE in adapter.metadata}
    if len(bases) > 1:
        raise BaseMismatchError(
            f"the adapters belong to different base models (fingerprints {', '.join(sorted(bases))}); "
            "only adapters of one base can be combined"
        )
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    tensors: dict[str, Tensor] = {}
    faults = []
    for adapter in adapters:
        plain = expand_blocks(adapter)
        for module in plain.modules:
            A, B = factors(plain, module)
            rank = 1 if plain.holds_experts(module) else 0  # the axis of A that holds the rank; in B it is the next one
            shape = (
                (*A.shape[:rank], *A.shape[rank + 1 :]),
                (*B.shape[: rank + 1], *B.shape[rank + 2 :]),
            )
            if shapes.setdefault(module, shape) != shape:
                faults.append(f"{module}: {shape[1][0]} x {shape[0]} here, {shapes[module]} before")
        tensors |= {name: tensor for name, tensor in plain.tensors.items() if name not in tensors}
    if faults:
        raise AdapterError(list_faults("the adapters' modules have different sizes", faults))
    base = {key: own.metadata[key] for own in adapters for key in (BASE, MODEL_TYPE) if key in own.metadata}
    return Adapter(_template_config(adapters, tensors), tensors, base)


def _template_config(adapters: Sequence[Adapter], tensors: Mapping[str, Tensor]) -> LoraConfig:
    config = adapters[0].config
    choose = operator.attrgetter(
        "target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"
    )
    if any(choose(adapter.config) != choose(config) for adapter in adapters):
        all_of_them = Adapter(config, tensors)
        config = config.targeting(all_of_them.target_modules).replace(target_parameters=all_of_them.target_parameters)
    return config.replace(init_lora_weights=True, lora_dropout=max(a.config.lora_dropout for a in adapters))


def _is_factor(name: str) -> bool:
    return name.rpartition(".")[2].startswith("lora_")


def _rank_for(S: Tensor, energy: float) -> int:
    kept = torch.cumsum(S**2, 0) / (S**2).sum().clamp(min=torch.finfo(S.dtype).tiny)
    return min(int((kept < energy - 1e-12).sum()) + 1, len(S))


def _cut(U: Tensor, S: Tensor, Vh: Tensor, r: int) -> tuple[FactorPair, Loss]:
    """Returns the best factors of rank r, and the norms of the error and of the exact update."""
    return balanced_factors(U, S, Vh, r), (float(S[r:].norm()), float(S.norm()))


def _combination(adapter: Adapter, losses: Mapping[str, Loss]) -> Combination:
    errors = {module: loss / (norm or 1.0) for module, (loss, norm) in losses.items()}
    total_loss, total_norm = (math.hypot(*values) for values in zip(*losses.values(), strict=True))
    return Combination(adapter, total_loss / (total_norm or 1.0), errors)


@dataclass(frozen=True)
class _Merger:
    """Merges tensors of equal shape by one of `METHODS` (without ``_svd``)."""

    method: str
    density: float
    majority_sign: str
    generator: torch.Generator

    def merge_factors(self, module: str, updates: Sequence[Update], weights: Sequence[float]) -> FactorPair:
        """Merges all A and all B; each is weighted by sqrt(weight * scaling), with the sign on A."""
        ranks = sorted({update.r for update in updates})
        if len(ranks) > 1:
            raise ConfigError(
                f"{module} has the ranks {ranks} in these adapters, and {self.method} needs equal ranks; use cat or svd"
            )
        scales = [update.scaling * weight for update, weight in zip(updates, weights, strict=True)]
        roots = [math.sqrt(abs(scale)) for scale in scales]
        signed = [math.copysign(root, scale) for root, scale in zip(roots, scales, strict=True)]
        A = self.merge([update.A.float() for update in updates], signed)
        return A, self.merge([update.B.float() for update in updates], roots)

    def merge(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        stack = torch.stack([self._sparse(tensor) for tensor in tensors])
        weighted = stack * torch.tensor(weights, dtype=stack.dtype).view(-1, *(1 for _ in tensors[0].shape))
        if not self.method.endswith("ties"):
            return weighted.sum(0)
        # TIES, section 3: the sign with the larger total wins; the mean is taken over the values that have it.
        votes = stack.sum(0) if self.majority_sign == "total" else stack.sign().sum(0)
        agrees = stack.sign() == torch.where(votes >= 0, 1.0, -1.0)
        return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)

    def _sparse(self, tensor: Tensor) -> Tensor:
        """Returns a tensor with only a share `density` of its values: random ones for DARE, otherwise the largest."""
        if self.density == 1:
            return tensor
        if self.method.startswith("dare"):
            mask = torch.bernoulli(torch.full_like(tensor, self.density), generator=self.generator)
            return tensor * mask / self.density
        flat = tensor.flatten()
        kept = torch.topk(flat.abs(), int(self.density * flat.numel())).indices
        return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view_as(tensor)
