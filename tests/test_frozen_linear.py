"""Prepacked weights: the same products, and a copy that is never used for other values than its own."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from loralib.engine.frozen_linear import FrozenLinear, FrozenWeight, PrepackedWeight, can_prepack

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
    """A base model that nobody froze, as under a bank: its generation must not take the slow way."""
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
