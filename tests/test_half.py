"""Training a model in fp16: its gradients are those of fp32, however many tokens an update has."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import transformers

from loralib import LoraConfig, inject
from loralib.data.tokens import TokenExample
from loralib.engine import half
from loralib.training.step import make_step

_RANDOM = random.Random(0)
EXAMPLES = [
    TokenExample(tuple(_RANDOM.randrange(4000) for _ in range(24)), (False, *[True] * 23)) for _ in range(4)
]  # fmt: skip
TRAINED = 4 * 23


def adapted(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=4000, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config).to(torch.float16).to(dtype)  # the same weights in every dtype
    inject(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.01)
    return model


def gradients(dtype: torch.dtype, scale: float, parts: int = 1, **settings: Any) -> torch.Tensor:
    """All gradients of an update, concatenated and per token."""
    model = adapted(dtype)
    step = make_step(model, **settings)
    for part in range(parts):
        step.forward_backward(EXAMPLES[part::parts], loss_scale=scale)
    found = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(gradient is not None and gradient.dtype == torch.float32 for gradient in found)
    return torch.cat([gradient.flatten() for gradient in found if gradient is not None]) / scale


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("settings", [{}, {"packing": False}], ids=["packed", "padded"])
@pytest.mark.parametrize("tokens", [TRAINED, 2**17, 2**24])
def test_gradients_do_not_depend_on_how_many_tokens_an_update_has(tokens: int, settings: dict[str, Any]) -> None:
    exact = gradients(torch.float32, 1 / TRAINED)
    assert apart(gradients(torch.float16, 1 / tokens, **settings), exact) < 0.01
    assert apart(gradients(torch.float16, 1 / tokens, 2, **settings), exact) < 0.01


@pytest.mark.parametrize("power", [14, 18, 40])
def test_a_gradient_that_overflows_is_computed_from_a_smaller_start(
    power: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(half, "_START", 2.0**power)
    assert apart(gradients(torch.float16, 1 / 2**17, 2), gradients(torch.float32, 1 / TRAINED)) < 0.01


def test_a_loss_that_is_not_finite_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(torch.float16)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    step = make_step(model)
    calls: list[float] = []
    compute = half.scaled_backward
    monkeypatch.setattr(
        "loralib.training.step.scaled_backward",
        lambda function, *rest: compute(lambda scale: (calls.append(scale), function(scale))[1], *rest),
    )
    assert not step.forward_backward(EXAMPLES, loss_scale=0.1).loss_sum.isfinite()
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_are_left_alone(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loralib.training.step.scaled_backward", None)
    assert gradients(dtype, 1 / 64).isfinite().all()
