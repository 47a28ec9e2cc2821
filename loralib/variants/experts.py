"""Adapters for the experts of a mixture, whose weights transformers 5 stores in one tensor (experts, out, in).

A router sends each token to k experts e.  With a low-rank update of each weight,

    h = W[e] x + scaling * B[e] A[e] x        A (experts, r, in), B (experts, out, r)

The tokens are sorted by expert, and each product is computed once for all tokens of an expert, as in transformers'
``grouped_mm``.  ``W[e] + scaling * B[e] A[e]`` is never formed in training.

transformers decorates the classes that compute this way (``use_experts_implementation``), with arguments that describe
the layout of the weights.  `expert_weights` compares the formula with the class's own forward on small tensors, so that
classes that compute differently are rejected rather than adapted wrongly.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..delta import delta_weight, dense, grouped_linear, scaling_of
from ..errors import TargetError
from ..layers import LoRALayer, base_class
from ..wrapping import is_sharded

__all__ = [
    "EXPERT_WEIGHTS",
    "ExpertWeight",
    "LoRAExperts",
    "expert_stacks",
    "expert_weights",
    "experts_forward",
    "holds_experts",
    "is_transposed",
    "kept_per_token",
    "stored_as_rows",
]

# transformers' names for the weights of experts: into the hidden layer, with or without its gate, and out of it.
_INNER, _OUTER = ("gate_up_proj", "up_proj"), "down_proj"
EXPERT_WEIGHTS = (*_INNER, _OUTER)  # in the order of their modules


@dataclass(frozen=True)
class ExpertWeight:
    """One weight to adapt, of all experts of a layer.

    Attributes:
        name: name of the parameter in its module.
        r, lora_alpha: its rank and alpha.
    """

    name: str
    r: int
    lora_alpha: float


class LoRAExperts(LoRALayer):
    """The experts of a mixture, where some of the weights have a low-rank update for each expert.

    Attributes:
        adapted_weights: the adapted weights, with their ranks.
        scalings: factor applied to the update of each weight.
    """

    adapted_weights: tuple[ExpertWeight, ...]
    scalings: Mapping[str, float]

    @property
    def weight_names(self) -> tuple[str, ...]:
        return tuple(weight.name for weight in self.adapted_weights)

    @property
    def _weight_name(self) -> str:  # type: ignore[override]
        return self.adapted_weights[0].name

    def _init_lora(
        self,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        merge_weights: bool = False,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
    ) -> None:
        super()._init_lora(r, lora_alpha, lora_dropout, merge_weights, use_rslora, init_lora_weights)
        self.scalings = {w.name: scaling_of(w.r, w.lora_alpha, use_rslora) for w in self.adapted_weights}

    # Trained tensors.

    def _sizes(self, name: str) -> tuple[int, int, int]:
        """Returns the numbers of experts, inputs and outputs of a weight."""
        experts, rows, columns = self.base_weight_of(name).shape
        return (experts, rows, columns) if is_transposed(self) else (experts, columns, rows)

    def tensor_shapes(self, r: int) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for weight in self.adapted_weights:
            experts, inputs, outputs = self._sizes(weight.name)
            shapes[f"lora_A_{weight.name}"] = (experts, weight.r, inputs)
            shapes[f"lora_B_{weight.name}"] = (experts, outputs, weight.r)
        return shapes

    def tensor_keys(self) -> dict[str, str]:
        return {f"lora_{half}_{name}": f"{name}.lora_experts_{half}" for name in self.weight_names for half in "AB"}

    @property
    def output_factors(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(f"lora_B_{name}" for name in self.weight_names)

    def check_rank(self, r: int) -> None:
        limits = {weight.name: min(self._sizes(weight.name)[1:]) for weight in self.adapted_weights}
        above = {weight.name: weight.r for weight in self.adapted_weights if weight.r > limits[weight.name]}
        if above:
            what = " and ".join(f"{r} for {name}" for name, r in above.items())
            sizes = " and ".join("{2} x {1}".format(*self._sizes(name)) for name in above)
            raise TargetError(
                f"r is {what}, but an expert's weight there is only {sizes}, so a rank this high adds nothing; lower "
                f"r, or give it another one: rank_pattern={ ({name: limits[name] for name in above}) }"
            )

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        for name in self.weight_names:
            A, B = self.factors_of(name)
            nn.init.kaiming_uniform_(A.view(-1, A.shape[-1]), a=math.sqrt(5))  # each expert like a linear layer
            nn.init.zeros_(B)

    def is_as_base(self, values: Mapping[str, Tensor]) -> bool:
        return all(
            not values[f"lora_A_{name}"].any() or not values[f"lora_B_{name}"].any() for name in self.weight_names
        )

    # Updates.

    def factors(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("experts have factors for each of their weights: factors_of")

    def factors_of(self, name: str) -> tuple[Tensor, Tensor]:
        """Returns A (experts, r, in) and B (experts, out, r) of a weight."""
        return self._parameters[f"lora_A_{name}"], self._parameters[f"lora_B_{name}"]  # type: ignore[return-value]

    def delta_weight(self) -> Tensor:
        raise NotImplementedError("experts have an update for each of their weights: delta_weight_of")

    def delta_weight_of(self, name: str) -> Tensor:
        delta = delta_weight(*self.factors_of(name), self.scalings[name])
        return delta.transpose(1, 2) if is_transposed(self) else delta

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if not self._active:
            return cast(Tensor, super().forward(hidden_states, top_k_index, top_k_weights))
        return experts_forward(self, hidden_states, top_k_index, top_k_weights)


# The formula.


def base_product(layer: nn.Module, name: str, x: Tensor, counts: Sequence[int]) -> Tensor:
    """Computes the product of the experts' base weights with rows (S, in) sorted by expert."""
    weight = stored_as_rows(layer, name)
    weight = dense(weight) if is_sharded(weight) else weight  # quantised weights are dequantised expert by expert
    return grouped_linear(x, weight, counts, layer._parameters.get(f"{name}_bias"))


BaseProduct = Callable[[nn.Module, str, Tensor, Sequence[int]], Tensor]


def experts_forward(
    layer: nn.Module,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    multiply: BaseProduct = base_product,
) -> Tensor:
    """Computes the experts' outputs, for each expert with all of its tokens at once.

    Args:
        layer: the experts of a layer; adapted if it is a `LoRAExperts`.
        hidden_states: (T, D).
        top_k_index: the experts of each token (T, k); indices beyond the last expert are ignored (expert parallelism).
        top_k_weights: the weight of each expert's output (T, k).
        multiply: computes a weight's product without its update.

    Returns:
        (T, D).
    """
    k, theirs = top_k_index.shape[-1], cast(Any, layer)
    inner = _inner_name(layer)
    # 1. Sort the T * k pairs of token and expert by expert, so that each expert has consecutive rows.
    order = top_k_index.reshape(-1).sort(stable=True).indices
    experts = len(theirs._parameters[_OUTER])
    counts = top_k_index.reshape(-1).bincount(minlength=experts)[:experts].tolist()
    x = hidden_states[order // k]  # (T k, D)
    # 2. Into the hidden layer, through the activation or gate, and out.
    y = _product(layer, inner, x, counts, multiply)
    y = theirs._apply_gate(y) if inner == "gate_up_proj" else theirs.act_fn(y)
    y = _product(layer, _OUTER, y, counts, multiply)  # (T k, D)
    if getattr(layer, "has_post_expert_norm", False):
        y = theirs.post_expert_norm(y)
    # 3. Restore the order of the tokens, and sum the experts' weighted outputs for each.
    y = y * top_k_weights.reshape(-1)[order, None]
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    return y[places].view(-1, k, y.shape[-1]).sum(1).to(hidden_states.dtype)


def _product(layer: nn.Module, name: str, x: Tensor, counts: Sequence[int], multiply: BaseProduct) -> Tensor:
    """Computes a weight's product with rows (S, in) sorted by expert, including its update if it is adapted."""
    y = multiply(layer, name, x, counts)
    if not isinstance(layer, LoRAExperts) or not layer._active or name not in layer.weight_names:
        return y
    A, B = (factor.to(x.dtype) for factor in layer.factors_of(name))
    narrow = grouped_linear(layer._drop(x), A, counts) * layer.scalings[name]
    return y.add_(grouped_linear(narrow, B, counts))


def is_transposed(layer: nn.Module) -> bool:
    """Whether the weights are stored as (experts, in, out), as in gpt-oss."""
    return bool(getattr(layer, "is_transposed", False))


def stored_as_rows(layer: nn.Module, name: str) -> Tensor:
    """Returns the base weight that experts compute with, merged or not, as (experts, out, in)."""
    weight = cast(Tensor, layer._parameters[name])
    return weight.transpose(1, 2) if is_transposed(layer) else weight


def _inner_name(layer: nn.Module) -> str:
    return next(name for name in _INNER if layer._parameters.get(name) is not None)


# Detection of modules that hold experts.


def holds_experts(name: str, module: nn.Module) -> bool:
    """Whether a module directly holds weights of experts, judging by its name or class and their shapes."""
    return "expert" in f"{name}.{base_class(module).__name__}".lower() and any(
        parameter is not None and parameter.dim() > 2 for parameter in module._parameters.values()
    )


def expert_stacks(path: str, module: nn.Module) -> tuple[str, ...]:
    """Returns the names of a module's stacked weights, (experts, out, in), if it holds experts.

    Args:
        path: the module's name in its model.
        module: adapted or not.
    """
    if not holds_experts(path, module):
        return ()
    own = module.trained_tensors() if isinstance(module, LoRALayer) else {}
    return tuple(name for name, p in module._parameters.items() if p is not None and p.dim() == 3 and name not in own)


def expert_weights(module: nn.Module) -> tuple[str, ...]:
    """Returns the names of the weights that can be adapted in a module that holds experts.

    Raises:
        TargetError: it computes in an unsupported way.
    """
    base = base_class(module)
    names = tuple(name for name, p in module._parameters.items() if name in EXPERT_WEIGHTS and p is not None)
    shapes = [cast(Tensor, module._parameters[name]).shape for name in names]
    if len(names) != 2 or names[1] != _OUTER or any(len(shape) != 3 for shape in shapes):
        known = f"{' or '.join(_INNER)} and {_OUTER}, with three dimensions"
        raise TargetError(f"{base.__name__} lays out its experts in a way that loralib does not know, expected {known}")
    if shapes[0][0] != shapes[1][0] or not _computes_experts(module, base):
        raise TargetError(f"{base.__name__} computes its experts in its own way, to which no update can be added")
    return names


def _on_cpu(module: nn.Module) -> nn.Module:
    """Returns a copy in fp32 on the CPU; a module on the meta device, which has no values, is filled with ones."""
    if not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        return copy.deepcopy(module).float().cpu()
    filled = copy.deepcopy(module).float().to_empty(device="cpu")
    for tensor in (*filled.parameters(), *filled.buffers()):
        tensor.detach().fill_(1)
    return filled


def kept_per_token(module: nn.Module, adapted: bool) -> int:
    """Returns how many numbers experts keep for the backward pass, per token and summed over the token's experts.

    For each expert, these are the outputs of the inner product, of the activation and of the outer product; with an
    adapter also the inputs of both products, and the outputs of A.
    """
    try:
        inner, outer = (stored_as_rows(module, name).shape for name in expert_weights(module))
    except TargetError:  # it computes in an unsupported way
        return 0
    (_, made, inputs), (_, outputs, hidden) = inner, outer
    numbers = made + hidden + outputs
    if adapted:
        numbers += inputs + hidden + sum(weight.r for weight in getattr(module, "adapted_weights", ()))
    return int(numbers * _experts_per_token(module))


def _experts_per_token(module: nn.Module) -> int:
    config = getattr(module, "config", None)
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_top_k")
    return max((value for name in names if isinstance(value := getattr(config, name, None), int)), default=1)


def _computes_experts(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether a class computes the same as `experts_forward`, tested on small tensors."""
    generator = torch.Generator().manual_seed(0)
    experts, hidden = 3, 4
    width = stored_as_rows(module, _OUTER).shape[1]  # the model's own, because of norms inside
    inner = 2 * hidden if _inner_name(module) == "gate_up_proj" else hidden
    sizes = {_inner_name(module): (width, inner), _OUTER: (hidden, width)}
    probe = base.__new__(base)
    probe.__dict__.update(module.__dict__, num_experts=experts)
    probe.__dict__["_parameters"] = parameters = {}
    for name, parameter in module._parameters.items():
        inputs, outputs = sizes.get(name.removesuffix("_bias"), (0, 0))
        if parameter is None or not inputs:
            parameters[name] = parameter
            continue
        matrix = (inputs, outputs) if is_transposed(module) else (outputs, inputs)
        shape = (outputs,) if name.endswith("_bias") else matrix
        parameters[name] = nn.Parameter(torch.randn(experts, *shape, generator=generator) / inputs**0.5, False)
    probe.__dict__["_modules"] = {name: _on_cpu(inner) for name, inner in module._modules.items() if inner is not None}
    x = torch.randn(6, width, generator=generator)
    index = torch.tensor([[0, 1], [2, 0], [1, 2], [0, 2], [1, 0], [2, 1]])
    weights = torch.rand(6, 2, generator=generator)
    try:
        with torch.no_grad():
            theirs = inspect.unwrap(base.forward)(probe, x, index, weights)
            ours = experts_forward(probe, x, index, weights)
    except Exception:  # it needs other inputs, or fixed sizes
        return False
    return isinstance(theirs, Tensor) and theirs.shape == ours.shape and bool(torch.allclose(theirs, ours, atol=1e-4))
