"""The layers: what they compute, exact unmerging, and none of the bugs of loralib 0.1.2."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import loralib as lora
from loralib.errors import ConfigError, MergeError
from loralib.layers import LoRALinear, adapted_class

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
quick = settings(max_examples=25, deadline=None, derandomize=True)


def fill(layer: Any, seed: int = 0) -> Any:
    """Fills a layer's factors with random values, so that they have an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for factor in (layer.lora_A, layer.lora_B):
            factor.copy_(torch.randn(factor.shape, generator=generator, dtype=torch.float64) * 0.3)
    return layer


def layers(**kwargs: Any) -> list[tuple[Any, Tensor]]:
    """One filled layer of each kind, with an input."""
    torch.manual_seed(0)
    dtype = kwargs.get("dtype", torch.float32)
    floats = [
        (lora.Linear(6, 5, r=2, lora_alpha=4, **kwargs), (3, 6)),
        (lora.Linear(6, 5, r=2, lora_alpha=4, fan_in_fan_out=True, **kwargs), (3, 6)),
        (lora.MergedLinear(6, 9, r=2, lora_alpha=4, enable_lora=[True, False, True], **kwargs), (3, 6)),
        (lora.Conv1d(4, 6, 3, r=2, lora_alpha=4, **kwargs), (2, 4, 9)),
        (lora.Conv2d(4, 6, 3, r=2, lora_alpha=4, **kwargs), (2, 4, 7, 6)),
        (lora.Conv3d(4, 6, 3, r=2, lora_alpha=4, **kwargs), (2, 4, 5, 4, 3)),
    ]
    table = lora.Embedding(11, 5, r=2, lora_alpha=4, **kwargs)
    made = [(fill(layer), torch.randn(shape).to(dtype)) for layer, shape in floats]
    return [*made, (fill(table), torch.tensor([[0, 3, 10], [3, 3, 7]]))]


def kinds() -> list[str]:
    return ["Linear", "Linear (in, out)", "MergedLinear", "Conv1d", "Conv2d", "Conv3d", "Embedding"]


every_layer = pytest.mark.parametrize("number", range(7), ids=kinds())


# What they compute.


@given(
    st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.floats(0.5, 32), st.booleans(), st.booleans(), st.data()
)
@quick
def test_linear_computes_the_definition(
    inputs: int, outputs: int, r: int, alpha: float, fan: bool, bias: bool, data: st.DataObject
) -> None:
    layer = fill(lora.Linear(inputs, outputs, r=r, lora_alpha=alpha, fan_in_fan_out=fan, bias=bias).double(), r)
    x = torch.randn(*data.draw(st.sampled_from([(inputs,), (3, inputs), (2, 3, inputs)])), dtype=torch.float64)
    weight = layer.weight.T if fan else layer.weight
    expected = F.linear(x, weight + alpha / r * layer.lora_B @ layer.lora_A, layer.bias)
    torch.testing.assert_close(layer.train()(x), expected)
    torch.testing.assert_close(layer.eval()(x), expected)
    assert layer.merged


@given(st.lists(st.booleans(), min_size=1, max_size=5).filter(any), st.integers(1, 3), st.integers(1, 3), st.booleans())
@quick
def test_merged_linear_adapts_the_enabled_blocks_alone(blocks: list[bool], size: int, r: int, fan: bool) -> None:
    n, k = len(blocks), sum(blocks)
    layer = lora.MergedLinear(4, size * n, r=r, lora_alpha=3, enable_lora=blocks, fan_in_fan_out=fan).double()
    assert layer.lora_A.shape == (r * k, 4)
    assert layer.lora_B.shape == (size * k, r)
    fill(layer, n)
    x = torch.randn(3, 4, dtype=torch.float64)
    expected = list(F.linear(x, layer.weight.T if fan else layer.weight, layer.bias).chunk(n, dim=-1))
    enabled = [number for number, on in enumerate(blocks) if on]
    for i, number in enumerate(enabled):
        A, B = layer.lora_A[i * r : (i + 1) * r], layer.lora_B[i * size : (i + 1) * size]
        expected[number] = expected[number] + x @ A.T @ B.T * 3 / r
    torch.testing.assert_close(layer.train()(x), torch.cat(expected, dim=-1))
    torch.testing.assert_close(layer.eval()(x), torch.cat(expected, dim=-1))


@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 3), st.data())
@quick
def test_embedding_computes_the_definition(count: int, width: int, r: int, data: st.DataObject) -> None:
    padding = data.draw(st.none() | st.integers(0, count - 1))
    layer = fill(lora.Embedding(count, width, r=r, lora_alpha=3, padding_idx=padding).double(), r)
    ids = torch.tensor(data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=6)))
    expected = layer.weight[ids] + (layer.lora_A.T @ layer.lora_B.T)[ids] * 3 / r
    torch.testing.assert_close(layer.train()(ids), expected)
    torch.testing.assert_close(layer.eval()(ids), expected)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@given(st.integers(1, 3), st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_convolutions_compute_the_definition(dims: int, data: st.DataObject) -> None:
    """Any kernel, stride, padding, dilation and groups: the update is B A in the shape of the weight."""

    def sizes(low: int, high: int) -> int | tuple[int, ...]:
        each = st.integers(low, high)
        return data.draw(each | st.tuples(*[each] * dims))

    groups = data.draw(st.integers(1, 2))
    stride, dilation = sizes(1, 2), sizes(1, 2)
    padding = data.draw(st.just("same") | st.just("valid")) if stride == 1 and data.draw(st.booleans()) else sizes(0, 2)
    cls = (lora.Conv1d, lora.Conv2d, lora.Conv3d)[dims - 1]
    layer: Any = cls(
        2 * groups,
        data.draw(st.integers(1, 2)) * groups,
        sizes(1, 3),
        r=2,
        lora_alpha=3,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=data.draw(st.booleans()),
        padding_mode=data.draw(st.sampled_from(["zeros", "circular"])),
    ).double()
    *others, last = layer.kernel_size
    a = torch.Size(others).numel()
    assert layer.lora_A.shape == (2 * last, layer.in_channels * last)
    assert layer.lora_B.shape == (layer.out_channels // groups * a, 2 * last)
    fill(layer, dims)
    plain = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=groups,
        bias=layer.bias is not None,
        padding_mode=layer.padding_mode,
    ).double()
    delta = (layer.lora_B @ layer.lora_A).view(layer.weight.shape) * 3 / 2
    plain.load_state_dict({"weight": layer.weight + delta} | ({"bias": layer.bias} if layer.bias is not None else {}))
    x = torch.randn(2, layer.in_channels, *[7] * dims, dtype=torch.float64)
    torch.testing.assert_close(layer.train()(x), plain(x))
    torch.testing.assert_close(layer.eval()(x), plain(x))
    if groups == 1:  # the form that inject() puts on convolutions is merged as it computes
        peft: Any = copy.deepcopy(plain)
        lora.inject(wrapper := nn.Sequential(peft), lora.LoraConfig(r=2, target_modules=["0"]))
        y = wrapper.train()(x) if fill(peft) is peft else None
        lora.merge(wrapper)
        torch.testing.assert_close(wrapper(x), y)


def test_square_kernels_have_microsofts_shapes() -> None:
    layer = lora.Conv2d(8, 12, 3, r=4, groups=2)
    assert layer.lora_A.shape == (4 * 3, 8 * 3)
    assert layer.lora_B.shape == (12 // 2 * 3, 4 * 3)


@every_layer
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merged_and_unmerged_agree_to_the_rounding_of_the_dtype(number: int, dtype: torch.dtype) -> None:
    layer, x = layers(dtype=dtype)[number]
    # Factors stay in at least fp32, whatever the base is kept in.
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.promote_types(dtype, torch.float32)
    y = layer.train()(x)
    merged = layer.eval()(x)
    assert y.dtype == merged.dtype == dtype
    tolerance = 8 * torch.finfo(dtype).eps * float(y.detach().abs().max())
    torch.testing.assert_close(merged, y, atol=tolerance, rtol=0)


@every_layer
def test_a_fresh_layer_computes_its_base(number: int) -> None:
    torch.manual_seed(0)
    layer, x = layers()[number]
    layer.reset_lora_parameters()
    with_adapter = layer.train()(x)
    layer.enabled = False
    assert torch.equal(layer(x), with_adapter)
    first, second = (layer.lora_A, layer.lora_B) if number < 6 else (layer.lora_B, layer.lora_A)
    assert first.abs().sum() > 0
    assert second.abs().sum() == 0


@every_layer
def test_gradients_reach_the_factors_and_nothing_else(number: int) -> None:
    layer, x = layers()[number]
    layer.train()(x).square().sum().backward()
    assert layer.lora_A.grad.abs().sum() > 0
    assert layer.lora_B.grad.abs().sum() > 0
    assert layer.weight.grad is None


def test_dropout_acts_on_the_low_rank_path_alone_and_keeps_its_expectation() -> None:
    """Also in convolutions, where loralib 0.1.2 ignores it."""
    torch.manual_seed(0)
    for layer, x in (
        (lora.Linear(16, 4, r=2, lora_dropout=0.25, bias=False), torch.randn(1, 16)),
        (lora.MergedLinear(16, 4, r=2, lora_dropout=0.25, enable_lora=[True, True], bias=False), torch.randn(1, 16)),
        (lora.Conv2d(3, 4, 3, r=2, lora_dropout=0.25, bias=False), torch.randn(1, 3, 6, 6)),
    ):
        fill(layer)
        base = type(layer)(*(16, 4) if x.dim() == 2 else (3, 4, 3), bias=False)
        base.load_state_dict({"weight": layer.weight})
        with torch.no_grad():
            update = layer(x.expand(6000, *x.shape[1:])) - base(x)
            exact = layer.eval()(x) - base(x)
        assert update.std(dim=0).min() > 0, type(layer)
        error = (update.mean(dim=0, keepdim=True) - exact).abs() / update.std(dim=0).clamp_min(1e-3)
        assert error.max() < 5 / 6000**0.5, type(layer)  # standard errors
    with pytest.raises(ConfigError, match=r"lora_dropout is 1\.5"):
        lora.Linear(4, 4, r=2, lora_dropout=1.5)


def test_dropout_drops_the_stated_share() -> None:
    torch.manual_seed(0)
    layer = lora.Linear(1, 1, r=1, lora_dropout=0.3, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
        layer.lora_A.fill_(1.0)
        layer.lora_B.fill_(1.0)
        y = layer(torch.ones(20000, 1))
    assert abs(float((y == 0).float().mean()) - 0.3) < 0.02
    assert torch.allclose(y[y != 0], torch.tensor(1 / 0.7))
    assert torch.equal(layer.eval()(torch.ones(5, 1)), torch.ones(5, 1))


# Merging.


@every_layer
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_thousand_merges_leave_the_base_bit_for_bit(number: int, dtype: torch.dtype) -> None:
    """With an adapter that moves between them; in bf16, 100 cycles of loralib 0.1.2 lose 0.5 % of the weights' norm."""
    cycles = 1000 if number == 0 and dtype == torch.bfloat16 else 20
    layer, x = layers(dtype=dtype)[number]
    weight, before = layer.weight, layer.weight.clone()
    for _ in range(cycles):
        layer.eval()
        assert layer.merged
        layer.train()
        with torch.no_grad():
            layer.lora_B.add_(torch.randn_like(layer.lora_B), alpha=0.1)
    assert layer.weight is weight
    assert torch.equal(layer.weight.view(torch.uint8), before.view(torch.uint8))
    assert not torch.equal(layer.eval().weight, before)
    assert torch.isfinite(layer(x)).all()


@every_layer
def test_train_and_eval_merge_only_where_asked_and_return_the_layer(number: int) -> None:
    layer, _ = layers()[number]
    assert layer.eval() is layer
    assert layer.merged
    assert layer.train() is layer
    assert not layer.merged
    layer.merge_weights = False
    layer.eval()
    assert not layer.merged


@every_layer
def test_a_state_dict_holds_base_weights_also_while_merged(number: int) -> None:
    """loralib 0.1.2 saves merged weights in eval mode, so that reloading applies the update twice."""
    layer, x = layers()[number]
    before = {name: tensor.clone() for name, tensor in layer.train().state_dict().items()}
    y = layer(x)
    merged_state = layer.eval().state_dict()
    assert list(merged_state) == list(before)
    assert all(torch.equal(merged_state[name], tensor) for name, tensor in before.items())
    assert layer.state_dict(keep_vars=True)["weight"] is layer.base_weight
    fresh, _ = layers()[number]
    fresh.load_state_dict(merged_state)
    torch.testing.assert_close(fresh.train()(x), y)


@every_layer
@pytest.mark.parametrize("assign", [False, True])
def test_loading_while_merged_loads(number: int, assign: bool) -> None:
    """loralib 0.1.2 ignores it, and corrupts the base on the next train()."""
    layer, x = layers()[number]
    other, _ = layers()[number]
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    expected = other.train()(x)
    layer.eval()
    layer.load_state_dict(other.state_dict(), assign=assign)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.train()(x), expected)
    assert torch.equal(layer.weight, other.weight)


def test_freezing_while_merged_holds_after_unmerging() -> None:
    layer = fill(lora.Linear(4, 4, r=2))
    layer.eval()
    layer.weight.requires_grad_(True)
    assert layer.train().weight.requires_grad


@every_layer
@pytest.mark.parametrize("merged", [False, True])
def test_moving_and_casting_moves_the_kept_base_too(number: int, merged: bool) -> None:
    layer, x = layers()[number]
    (layer.eval if merged else layer.train)()
    base = layer.base_weight.detach().clone()
    layer.to(torch.bfloat16)
    assert layer.base_weight.dtype == layer.weight.dtype == torch.bfloat16
    layer.to(torch.float64)
    assert torch.equal(layer.base_weight, base.to(torch.bfloat16).double())
    assert torch.equal(layer.train().weight, base.to(torch.bfloat16).double())
    assert layer(x.double() if x.is_floating_point() else x).dtype == torch.float64
    layer.train(not merged).to("meta")
    assert layer.base_weight.is_meta
    assert layer.weight.is_meta
    layer.to_empty(device="cpu")
    assert not layer.train().weight.is_meta


def test_an_adapter_with_nan_is_not_merged() -> None:
    layer = fill(lora.Linear(4, 4, r=2))
    before = layer.weight.clone()
    with torch.no_grad():
        layer.lora_B[0, 0] = float("nan")
    with pytest.raises(MergeError, match="NaN"):
        layer.merge()
    assert not layer.merged
    assert torch.equal(layer.weight, before)


def test_a_sum_too_large_for_the_weights_dtype_is_not_merged() -> None:
    layer = fill(lora.Linear(4, 4, r=2)).half()
    with torch.no_grad():
        layer.lora_A.fill_(300)
        layer.lora_B.fill_(300)
    with pytest.raises(MergeError, match=r"too large for torch\.float16"):
        layer.merge()
    assert not layer.merged


def test_merging_gives_a_tied_layer_a_weight_of_its_own() -> None:
    table = fill(lora.Embedding(7, 4, r=2))
    head = nn.Linear(4, 7, bias=False)
    head.weight = table.weight
    before = table.weight.clone()
    table.eval()
    assert torch.equal(head.weight, before)
    assert not torch.equal(table.weight, before)
    assert table.train().weight is head.weight


def test_reset_parameters_draws_anew_also_while_merged() -> None:
    for number in range(7):
        layer, x = layers()[number]
        before = layer.eval().base_weight.clone()
        layer.reset_parameters()
        assert not torch.equal(layer.base_weight, before)
        y = layer(x)
        layer.enabled = False
        assert torch.equal(layer.train()(x), y)


# Known faults of loralib 0.1.2 (others are among the tests above).


def test_merged_linear_with_nothing_enabled_is_plain() -> None:
    layer = lora.MergedLinear(4, 6, r=2, enable_lora=[False, False, False])
    x = torch.randn(3, 4)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert torch.equal(layer.eval()(x), layer.train()(x))
    assert set(layer.state_dict()) == {"weight", "bias"}
    assert layer.weight.requires_grad


def test_blocks_that_do_not_divide_are_refused() -> None:
    for blocks in ([True, False], []):
        with pytest.raises(AssertionError, match="enable_lora has") as refused:
            lora.MergedLinear(4, 7, r=2, enable_lora=blocks)
        assert isinstance(refused.value, ConfigError)
    with pytest.raises(ConfigError, match="r is -1"):
        lora.Linear(4, 4, r=-1)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@every_layer
@pytest.mark.parametrize("merged", [False, True])
def test_layers_pickle_and_copy(number: int, merged: bool, dropout: float) -> None:
    """Those of loralib 0.1.2 without dropout contain a lambda, and cannot be pickled."""
    layer, x = layers()[number]
    layer.lora_dropout = dropout
    layer.train(not merged)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (
        pickle.loads(pickle.dumps(layer)),
        copy.deepcopy(layer),
        torch.load(file, weights_only=False),
    ):
        assert type(twin) is type(layer)
        assert twin.merged == merged
        assert torch.equal(twin.eval()(x), layer.eval()(x))
        assert torch.equal(twin.train().weight, layer.train().weight)
        layer.train(not merged)
    with torch.no_grad():
        twin.lora_B.add_(1)
    assert not torch.equal(twin.lora_B, layer.lora_B)


def test_max_norm_leaves_the_factors_alone() -> None:
    """loralib 0.1.2 passes it on to the look-up of lora_A, whose columns are then rescaled in place."""
    torch.manual_seed(0)
    table = fill(lora.Embedding(9, 4, r=2, lora_alpha=8, max_norm=1.0))
    A, ids = table.lora_A.clone(), torch.arange(9)
    with torch.no_grad():
        table.weight.mul_(3)
        limited = table.weight.renorm(2, 0, 1.0)
        y = table(ids)
    assert torch.equal(table.lora_A, A)
    torch.testing.assert_close(y, limited + (table.lora_A.T @ table.lora_B.T) * 4)
    # The limit is the base rows'; a merged row may be longer, and must not be cut.
    torch.testing.assert_close(table.eval()(ids), y)
    torch.testing.assert_close(table(ids), y)


def test_padding_rows_get_no_gradient() -> None:
    table = fill(lora.Embedding(5, 3, r=2, padding_idx=1))
    table(torch.tensor([0, 1, 2])).sum().backward()
    assert table.lora_A.grad[:, 1].abs().sum() == 0
    assert table.lora_A.grad[:, 0].abs().sum() > 0


def test_sparse_and_scaled_gradients_of_embeddings_work() -> None:
    ids = torch.tensor([0, 1, 1, 1])
    plain = fill(lora.Embedding(5, 3, r=2))
    plain(ids).sum().backward()
    for options in ({"sparse": True}, {"scale_grad_by_freq": True}):
        table = fill(lora.Embedding(5, 3, r=2, **options))
        table(ids).sum().backward()
        grad = table.lora_A.grad
        assert torch.allclose(grad[:, 0], plain.lora_A.grad[:, 0])
        share = 3 if "scale_grad_by_freq" in options else 1
        assert torch.allclose(grad[:, 1] * share, plain.lora_A.grad[:, 1])


def test_a_layer_without_rank_is_plain() -> None:
    for layer, x in (
        (lora.Linear(4, 3, r=0), torch.randn(2, 4)),
        (lora.Embedding(4, 3, r=0), torch.tensor([1, 2])),
        (lora.Conv2d(2, 3, 3, r=0), torch.randn(1, 2, 5, 5)),
    ):
        assert layer.weight.requires_grad
        y = layer(x)
        assert torch.equal(layer.eval()(x), y)
        assert layer.train() is layer
        assert not any("lora_" in name for name in layer.state_dict())


def test_constructors_take_microsofts_arguments_in_order() -> None:
    linear = lora.Linear(4, 6, 2, 8, 0.1, True, False, bias=False)
    assert (linear.r, linear.lora_alpha, linear.lora_dropout, linear.scaling) == (2, 8, 0.1, 4.0)
    assert linear.weight.shape == (4, 6)
    assert linear.bias is None
    assert not linear.merge_weights
    merged = lora.MergedLinear(4, 6, 2, 8, 0.1, [True, False], True, False)
    assert merged.enable_lora == [True, False]
    assert lora.Embedding(4, 6, 2, 8, False, padding_idx=1).padding_idx == 1
    conv = lora.Conv2d(4, 6, 3, 2, 8, 0.1, False, stride=2)
    assert (conv.r, conv.lora_alpha, conv.lora_dropout, conv.merge_weights, conv.stride) == (2, 8, 0.1, False, (2, 2))
    defaults = lora.Linear(4, 6)
    assert (defaults.r, defaults.lora_alpha, defaults.lora_dropout, defaults.merge_weights) == (0, 1, 0.0, True)
    assert all(isinstance(layer, lora.LoRALayer) for layer in (linear, merged, conv, defaults))
    assert isinstance(linear, nn.Linear)
    assert isinstance(conv, nn.Conv2d)
    on_meta = lora.Linear(4, 6, r=2, device="meta", dtype=torch.bfloat16)
    assert on_meta.lora_A.is_meta
    assert on_meta.lora_A.dtype == torch.float32


def test_classes_made_on_the_fly_are_made_once() -> None:
    cls = adapted_class(LoRALinear, nn.Linear)
    assert cls is adapted_class(LoRALinear, nn.Linear)
    assert cls.__name__ == "Linear"
    assert issubclass(cls, nn.Linear)


def test_autocast_runs_both_paths_in_its_dtype() -> None:
    for number in range(6):
        layer, x = layers()[number]
        with torch.autocast("cpu", torch.bfloat16):
            y = layer.train()(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), layer(x), atol=0.1, rtol=0.05)
