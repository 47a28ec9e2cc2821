"""Finds what explains a server's log-probabilities: the adapter, none, another scale, part of it, or something else."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from ..adapter import Adapter, apply_adapter
from ..combine import depends_on_base
from ..config import LoraConfig
from ..delta import scaling_of
from ..engine.forward import device_of, plain_logits
from ..formats import make_portable
from ..formats.gguf import permuted_heads, reorder_rows
from ..injection import adapted_layers, disabled, remove

__all__ = ["Reference", "ServerLogprobs", "Verdict", "judge"]

_SCALES: Final = (-2.0, -1.0, -0.5, 0.0, *(2.0**power for power in range(-6, 6)))
_ATTENTION: Final = re.compile(r"attn|attention")
_MLP: Final = re.compile(r"mlp|ffn|feed_forward|(^|\.)fc\d?($|\.)")
_EXACT: Final = 1e-3  # nats per token; no server is expected to agree more closely
_UNKNOWN_NOISE: Final = 0.02  # nats per token, as bf16 rounds; for servers whose base cannot be queried
_GOLDEN: Final = (math.sqrt(5) - 1) / 2

Factor = Callable[[str], float]
Rows = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class Deviation:
    """A way in which a server may compute an adapter differently.

    Attributes:
        factor: for each module, the factor by which its update differs from the correct one.
        rows: reorders the rows of a module's lora_B; None leaves them as they are.
    """

    factor: Factor = lambda _: 1.0
    rows: Rows | None = None


_NO_DEVIATION = Deviation()


@dataclass(frozen=True)
class ServerLogprobs:
    """What a server reported about one text.

    Attributes:
        ids: the token ids of the text.
        values: position, token id, and the log-probability of that token at that position, in nats.
    """

    ids: tuple[int, ...]
    values: tuple[tuple[int, int, float], ...]


class Reference:
    """Computes the same log-probabilities here, with any part of the adapter at any scale."""

    def __init__(self, model: nn.Module, config: LoraConfig) -> None:
        self._model, self.config = model, config
        # Trained token rows (`trainable_token_indices`) have no lora_B.
        layers = adapted_layers(model)
        self._layers = [(name, layer, layer.scaling, getattr(layer, "lora_B", None)) for name, layer in layers]

    @classmethod
    @contextmanager
    def of(cls, model: nn.Module, adapter: Adapter, *, allow_base_mismatch: bool = False) -> Iterator[Reference]:
        """Applies an adapter to its base for the duration of the context.

        Raises:
            AdapterError: the adapter does not fit the base.
        """
        plain = make_portable(adapter, "vllm", model).adapter if depends_on_base(adapter) else adapter
        apply_adapter(model, plain, allow_base_mismatch=allow_base_mismatch)
        try:
            yield cls(model.eval(), plain.config)
        finally:
            remove(model)

    @property
    def modules(self) -> dict[str, float]:
        """The scaling of each adapted module."""
        return {name: scaling for name, _, scaling, _ in self._layers}

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each adapted module."""
        return {name: int(layer.r) for name, layer, _, _ in self._layers}

    def in_other_order(self, *, to_gguf: bool) -> Rows | None:
        """Returns a function that reorders rows of q and k for llama.cpp, or back; None if the orders are the same."""
        heads = {name: permuted_heads(self._model, name) for name in self.modules}
        if not any(heads.values()):
            return None
        return lambda name, B: reorder_rows(B, heads[name], to_gguf=to_gguf)

    def __call__(self, texts: Sequence[ServerLogprobs], deviation: Deviation | None) -> Tensor:
        """Returns the log-probability of each observed token.

        Args:
            texts: what the server reported.
            deviation: how to compute the adapter; None for the base alone.
        """
        if deviation is None:
            with disabled(self._model):
                return self._computed(texts)
        try:
            for name, layer, scaling, B in self._layers:
                layer.scaling = scaling * deviation.factor(name)
                if deviation.rows is not None and B is not None:
                    layer.lora_B = nn.Parameter(deviation.rows(name, B.detach()), requires_grad=False)
            return self._computed(texts)
        finally:
            for _, layer, scaling, B in self._layers:
                layer.scaling = scaling
                if B is not None:
                    layer.lora_B = B

    @torch.no_grad()
    def _computed(self, texts: Sequence[ServerLogprobs]) -> Tensor:
        parts = []
        for text in texts:
            ids = torch.tensor([text.ids], device=device_of(self._model))
            scores = plain_logits(self._model, ids)[0].float().log_softmax(-1).cpu()
            at = torch.tensor([position - 1 for position, _, _ in text.values], dtype=torch.long)
            parts.append(scores[at, torch.tensor([token for _, token, _ in text.values], dtype=torch.long)])
        return torch.cat(parts)


@dataclass(frozen=True)
class Verdict:
    """The result of the comparison.

    Attributes:
        kind: "right", "none", "scaled", "partly", "other", "base", "merged" or "unclear".
        text: the same in words.
        values: the number of log-probabilities compared.
        positions: the number of positions in texts at which they were compared.
        from_adapter: mean |difference| between the server's adapter and the adapter computed here, in nats per token.
        from_base: mean |difference| between the server's adapter and the base computed here.
        effect: mean |difference| between the adapter and the base, both computed here.
        base_error: mean |difference| between the server's base and the base computed here; None if it was not queried.
        scale: the scale that fits the server's values best; None if none was searched for.
        scale_error: mean |difference| that remains at that scale.
    """

    kind: str
    text: str
    values: int
    positions: int
    from_adapter: float
    from_base: float
    effect: float
    base_error: float | None
    scale: float | None = None
    scale_error: float | None = None

    @property
    def exit_code(self) -> int:
        """0 if the adapter is computed correctly, 1 if it is not, 2 if the comparison is inconclusive."""
        return {"right": 0, "unclear": 2}.get(self.kind, 1)


@dataclass(frozen=True)
class _Figures:
    from_adapter: float
    from_base: float
    effect: float
    base_error: float | None
    base_from_adapter: float | None

    @property
    def tolerance(self) -> float:
        """The difference that counts as none: the rounding error estimated from the base, or a tenth of the effect."""
        noise = _UNKNOWN_NOISE if self.base_error is None else max(_EXACT, 3 * self.base_error)
        return max(noise, 0.1 * self.effect)

    @property
    def is_exact(self) -> bool:
        """Whether the difference is no more than rounding, so that no better scale needs to be searched for."""
        return self.from_adapter <= max(_EXACT, 0.1 * self.effect)


def judge(reference: Reference, adapted: Sequence[ServerLogprobs], base: Sequence[ServerLogprobs] | None) -> Verdict:
    """Finds what explains the server's log-probabilities.

    Args:
        reference: computes them here.
        adapted: the server's values with the adapter.
        base: the server's values without it; None if the base cannot be queried.
    """
    found = _found(adapted)
    without, with_all = reference(adapted, None), reference(adapted, _NO_DEVIATION)
    own = None if base is None else (_gap(_found(base), reference(base, None)))
    other = None if base is None else (_gap(_found(base), reference(base, _NO_DEVIATION)))
    figures = _Figures(_gap(found, with_all), _gap(found, without), _gap(with_all, without), own, other)
    kind, text = _plainly(figures)
    scale = error = None
    if kind is None or (kind == "right" and not figures.is_exact):
        scale, error = _best_scale(reference, adapted, found)
    if scale is not None and error is not None:
        if kind is None or (error < 0.9 * figures.from_adapter and not 0.8 < scale < 1.25):
            kind, text = _by_search(reference, adapted, found, figures, scale, error)
    elif kind == "merged" and _gap(found, reference(adapted, Deviation(lambda _: 2.0))) <= figures.tolerance:
        text += "; and the adapter is then added once more"
    assert kind is not None
    positions = sum(len({position for position, _, _ in each.values}) for each in adapted)
    return Verdict(
        kind, text, len(found), positions, figures.from_adapter, figures.from_base, figures.effect, own, scale, error
    )


def _plainly(figures: _Figures) -> tuple[str | None, str]:
    """Returns the verdict's kind and text if no search is needed, else (None, "")."""
    base, noise = figures.base_error, figures.base_error or 0.0
    if base is not None and figures.base_from_adapter is not None and base > 3 * max(_EXACT, figures.base_from_adapter):
        text = "the supposed base behaves like the adapter: its weights have the adapter merged, or the name is wrong"
        return "merged", text
    if noise > max(0.3, figures.effect / 2):
        return "base", "a different base, or coarsely quantised weights: even the base alone answers differently"
    if figures.effect <= 3 * max(noise, 1e-5):
        text = (
            "cannot tell: the adapter changes these texts no more than the server's rounding. Give --prompt TEXT as in "
        )
        return "unclear", text + "its training data"
    if figures.from_adapter <= figures.tolerance and figures.from_adapter < figures.from_base:
        return "right", "works as it should"
    if figures.from_base <= min(figures.tolerance, figures.effect / 3):
        return "none", "has no effect: the server answers as the base alone does"
    return None, ""


def _by_search(
    reference: Reference,
    adapted: Sequence[ServerLogprobs],
    found: Tensor,
    figures: _Figures,
    scale: float,
    error: float,
) -> tuple[str, str]:
    gaps = {text: _gap(found, reference(adapted, deviation)) for text, deviation in _hypotheses(reference).items()}
    text = min(gaps, key=lambda each: gaps[each], default=None)
    bound = min(figures.tolerance, 0.3 * max(figures.from_base, figures.effect))
    if text is not None and gaps[text] <= bound and gaps[text] < 0.7 * error:
        return "partly", f"works differently: {text}"
    if error > bound:
        what = (
            "a different adapter has this name"
            if figures.base_error is not None
            else "a different adapter or a different base"
        )
        rest = f"the best one, {scale:.3g}, leaves {error:.3g} nats per token"
        return "other", f"works differently: {what}; no scale explains the answers ({rest})"
    why = " or ".join(_reasons(reference, scale))
    return "scaled", f"works differently: its scaling is {scale:.3g} of what it should be" + (why and f", {why}")


def _reasons(reference: Reference, scale: float) -> list[str]:
    """Returns the known mistakes that result in this scale."""
    config, usual = reference.config, _plain_scaling(reference.config)
    root = math.sqrt(config.r)
    known = {
        "as if it were applied twice": 2.0,
        "as if it were subtracted": -1.0,
        "as if lora_alpha / r were left out": 1 / usual if usual else math.nan,
        "as if its scaling were applied twice": usual,
        "as if its use_rslora were ignored" if config.use_rslora else "as if it were rsLoRA": (
            1 / root if config.use_rslora else root
        ),
    }
    return [text for text, value in known.items() if math.isclose(scale, value, rel_tol=0.03) and value != 1]


def _plain_scaling(config: LoraConfig) -> float:
    """Returns an adapter's scaling without alpha_pattern and rank_pattern."""
    return scaling_of(config.r, config.lora_alpha, config.use_rslora)


def _hypotheses(reference: Reference) -> dict[str, Deviation]:
    """Returns ways to misapply an adapter other than by a common factor, keyed by the text that explains each."""
    modules, usual = reference.modules, _plain_scaling(reference.config)
    kinds = {name: _kind(name) for name in modules}
    leaves = {name: name.rpartition(".")[2] for name in modules}
    result: dict[str, Deviation] = {}
    for names in (kinds, leaves):
        different = sorted(set(names.values()))
        if len(different) < 2:
            continue
        for part in different:
            result[f"only its part in {part} explains the answers"] = Deviation(_among(names, part))
            if len(different) > 2:  # with two kinds, leaving one out is the same as keeping the other
                rest = _among(names, *(other for other in different if other != part))
                result[f"everything except its part in {part} explains the answers"] = Deviation(rest)
    if any(scaling != usual for scaling in modules.values()):
        result["one scaling for all modules explains the answers (alpha_pattern or rank_pattern is ignored)"] = (
            Deviation(lambda name: usual / modules[name] if modules[name] else 1.0)
        )
    ranks = reference.ranks
    if reference.config.use_rslora and len(set(ranks.values())) > 1:  # otherwise it is the same as another scale
        result["its use_rslora is ignored"] = Deviation(lambda name: ranks[name] ** -0.5)
    for to_gguf in (False, True):
        if (rows := reference.in_other_order(to_gguf=to_gguf)) is not None:
            way = "twice" if to_gguf else "not"
            result[f"its q and k rows are in the wrong order (lora_B was {way} permuted for llama.cpp)"] = Deviation(
                rows=rows
            )
    return result


def _among(names: dict[str, str], *parts: str) -> Factor:
    return lambda name: float(names[name] in parts)


def _kind(name: str) -> str:
    if _ATTENTION.search(name):
        return "the attention"
    return "the MLP" if _MLP.search(name) else "embeddings, head and others"


def _best_scale(reference: Reference, adapted: Sequence[ServerLogprobs], found: Tensor) -> tuple[float, float]:
    """Returns the best-fitting scale and its error, by a grid search and then a golden-section search."""

    def error(scale: float) -> float:
        return _gap(found, reference(adapted, Deviation(lambda _: scale)))

    grid = sorted((*_SCALES, 64.0))
    errors = [error(scale) for scale in grid]
    best = min(range(len(grid)), key=errors.__getitem__)
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    tried = {grid[best]: errors[best]}
    for _ in range(12):
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        for scale in (left, right):
            if scale not in tried:
                tried[scale] = error(scale)
        low, high = (low, right) if tried[left] <= tried[right] else (left, high)
    scale = min(tried, key=lambda each: tried[each])
    return scale, tried[scale]


def _found(texts: Sequence[ServerLogprobs]) -> Tensor:
    return torch.tensor([value for text in texts for _, _, value in text.values])


def _gap(first: Tensor, second: Tensor) -> float:
    """Returns the mean |difference|; a value that is not finite, as at absurd scales, counts as infinite."""
    gap = float((first - second).abs().mean())
    return gap if math.isfinite(gap) else math.inf
