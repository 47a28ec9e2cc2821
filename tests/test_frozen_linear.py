"""Prepacked weights: products are the same, and a copy is never used once its weight has changed."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import loralib as lora
from loralib.engine.frozen_linear import (
    FrozenLinear,
    FrozenWeight,
    PrepackedWeight,
    can_prepack,
    kernel_overrides,
)
from loralib.engine.placement import Hold, overriding

TOLERANCE = {"rtol": 2**-7, "atol": 2**-7}  # sums in another order, rounded to bf16


def drawn(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "prepack"),
    [(torch.float64, False), (torch.bfloat16, False), pytest.param(torch.bfloat16, True, marks=pytest.mark.bf16_units)],
)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_products_both_ways(dtype, prepack, transposed, rows):
    weight = drawn(24, 40, dtype=dtype).T if transposed else drawn(40, 24, dtype=dtype)
    x, gradient, bias = drawn(rows, 24, dtype=dtype), drawn(40, rows, dtype=dtype).T, drawn(40, dtype=dtype)
    product = FrozenWeight(weight, prepack)
    exact = x.double() @ weight.double().T
    tolerance = TOLERANCE if dtype == torch.bfloat16 else {}
    for given in ({}, {"bias": bias}, {"added": drawn(rows, 40, dtype=dtype)}):
        expected = exact + sum(part.double() for part in given.values())
        given = {name: part.clone() for name, part in given.items()}
        torch.testing.assert_close(product.times(x, **given).double(), expected, **tolerance)
    added = drawn(rows, 40, dtype=dtype)
    both = product.times(x, bias=bias, added=added.clone())
    torch.testing.assert_close(both.double(), exact + bias.double() + added.double(), **tolerance)
    exact = gradient.double() @ weight.double()
    torch.testing.assert_close(product.times_transposed(gradient).double(), exact, **tolerance)
    added = drawn(rows, 24, dtype=dtype)
    got = product.times_transposed(gradient, added=added.clone())
    torch.testing.assert_close(got.double(), exact + added.double(), **tolerance)


@pytest.mark.bf16_units
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.weight.add_(1),
        lambda layer: layer.load_state_dict({"weight": torch.ones(8, 8)}),
        lambda layer: setattr(layer, "weight", nn.Parameter(drawn(8, 8))),
        lambda layer: setattr(layer.weight, "data", drawn(8, 8)),
        lambda layer: layer.float(),
    ],
)
def test_a_copy_knows_when_its_weight_is_another(change):
    layer = nn.Linear(8, 8, bias=False).bfloat16()
    frozen = FrozenWeight(layer.weight.T, True)
    assert frozen.refreshed(layer.weight.T) is frozen
    assert frozen.refreshed(layer.weight) is not frozen
    with torch.no_grad():
        change(layer)
    assert frozen.refreshed(layer.weight.T) is not frozen


@pytest.mark.bf16_units
def test_leading_dimensions_are_kept():
    weight, x = drawn(8, 6), drawn(2, 3, 6)
    torch.testing.assert_close(PrepackedWeight(weight).times(x), F.linear(x, weight), **TOLERANCE)


def test_what_gains_nothing_is_left_as_it_is():
    assert not can_prepack(None)
    assert not can_prepack(torch.zeros(4, 4))
    assert not can_prepack(torch.zeros(4, dtype=torch.bfloat16))
    assert not can_prepack(torch.zeros(4, 4, dtype=torch.bfloat16, device="meta"))
    with torch.inference_mode():
        assert not can_prepack(torch.zeros(4, 4, dtype=torch.bfloat16))


@pytest.mark.bf16_units
def test_a_weight_that_could_be_trained_is_prepacked_where_no_gradient_is_wanted(monkeypatch):
    """A base model that is not frozen, as in a bank: generation must not take the slow path."""
    linear = nn.Linear(64, 32, dtype=torch.bfloat16)
    used = []
    times = PrepackedWeight.times
    monkeypatch.setattr(PrepackedWeight, "times", lambda self, *a, **k: (used.append(1), times(self, *a, **k))[1])
    override, x = FrozenLinear(linear, prepack=True), torch.randn(2, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(override(x), linear(x))
    assert used == [1]
    override(x).sum().backward()
    assert used == [1]
    assert linear.weight.grad is not None


# Layers with LoRA, in generation.

KINDS = {
    "plain": {},
    "odd rank": {"r": 3},
    "blocks": {"enable_lora": {"0": [True, False, True]}},
    "DoRA": {"use_dora": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "bias of B": {"lora_bias": True},
    "dropout": {"lora_dropout": 0.5},
}


def adapted(kind, dtype):
    """A model of one linear layer (48, 32) with a briefly trained adapter."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48)).to(dtype)
    lora.inject(model, lora.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["0"]} | KINDS[kind]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval()


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_layer_computes_few_rows_as_it_says_and_notices_what_changes(kind, dtype):
    """Between calls, a factor is trained, the scaling is changed, and the adapter is disabled and merged."""
    model = adapted(kind, dtype)
    layer, x = model[0], drawn(1, 70, 32, dtype=dtype)
    overrides = kernel_overrides(model.modules())
    tolerance = 2**-6 if dtype == torch.bfloat16 else 1e-5

    def check():
        for rows in (1, 2, 64, 65, 1):
            expected = layer(x[:, :rows])
            with overriding(overrides):
                assert (layer(x[:, :rows]) - expected).abs().max() <= tolerance * expected.abs().max()
        return expected

    with Hold(model, overrides, "inference"):
        known = [check()]
        layer.lora_B.mul_(2)
        known.append(check())
        layer.lora_A.data = -layer.lora_A.data
        known.append(check())
        layer.scaling *= 3
        known.append(check())
        with lora.disabled(model):
            known.append(check())
        assert all(not torch.equal(a, b) for i, a in enumerate(known) for b in known[:i])
        layer.merge()  # lora.merge(model) refuses a model in use
        check()


@pytest.mark.usefixtures("both_ways")
def test_few_rows_have_gradients_where_they_are_asked_for():
    model = adapted("plain", torch.float32)
    overrides = kernel_overrides(model.modules())
    with Hold(model, overrides, "inference"), overriding(overrides):
        model[0](drawn(2, 32, dtype=torch.float32)).sum().backward()
    assert model[0].lora_A.grad.any()
    assert model[0].lora_B.grad.any()
