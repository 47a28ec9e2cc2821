"""Linear layers computed in one product have the same outputs and gradients as alone, and leave nothing behind."""

import copy
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from loralib.config import LoraConfig
from loralib.engine import adapted_linears
from loralib.engine.adapted_linears import TrainingLinears
from loralib.engine.placement import Hold, overriding
from loralib.injection import adapted_layers, disabled, inject, merge, remove

TOLERANCE = 1e-6


class Net(nn.Module):
    """q, k and v read one tensor, the gate another; `twice` runs two times."""

    def __init__(self, size: int = 1) -> None:
        super().__init__()
        six, eight, four = 6 * size, 8 * size, 4 * size
        self.q, self.k, self.v = nn.Linear(six, eight), nn.Linear(six, four), nn.Linear(six, four, bias=False)
        self.gate, self.twice = nn.Linear(eight, eight), nn.Linear(eight, eight)
        self.fused = Conv1D(2 * six, eight)
        self.unused = False

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.unused:
            k = k.detach()
        gate = torch.sigmoid(self.gate(q)) * torch.cat([k, v], -1)
        return self.fused(self.twice(torch.tanh(self.twice(gate))))


def adapted(dtype=torch.float64, size=1, **settings):
    torch.manual_seed(0)
    net = Net(size).to(dtype)
    inject(net, LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": "all-linear"} | settings))
    with torch.no_grad():
        for _, layer in adapted_layers(net):
            layer.lora_B.normal_(std=1 / size)
    return net.train()


def learned(net, x):
    linears = TrainingLinears(list(net.modules()), list(net.modules()))
    with (
        Hold(net, linears.modules, "training"),
        linears.finding_groups() as recorders,
        overriding(recorders),
        torch.no_grad(),
    ):
        net(x)
    return linears


@contextmanager
def one_pass(net, linears):
    with Hold(net, linears.modules, "training"), linears.ready() as overrides, overriding(overrides):
        yield


def gradients(net):
    return {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}


def compare(net, x=None, linears=None):
    """Runs a net and its copy, both ways, with the same random numbers; returns the groups that were found."""
    x = torch.randn(2, 5, 6, dtype=net.q.weight.dtype) if x is None else x
    linears = linears or learned(net, x)
    twin = copy.deepcopy(net)
    results = []
    for model, way in ((twin, None), (net, linears)):
        seen = x.detach().clone().requires_grad_(x.requires_grad)
        for number in range(3):  # gradients of the last two passes are added up
            if number == 1:
                model.zero_grad()
            torch.manual_seed(1)
            if way is None:
                (out := model(seen)).square().sum().backward()
            else:
                with one_pass(model, way):
                    (out := model(seen)).square().sum().backward()
        results.append((out.detach(), seen.grad, gradients(model)))
    (expected, of_x, grads), (made, made_of_x, made_grads) = results
    torch.testing.assert_close(made, expected, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(made_of_x, of_x, rtol=TOLERANCE, atol=TOLERANCE)
    assert made_grads.keys() == grads.keys()
    for name in grads:
        torch.testing.assert_close(made_grads[name], grads[name], rtol=TOLERANCE, atol=TOLERANCE, msg=name)
    assert not any("forward" in module.__dict__ for module in net.modules())
    return linears


def names_of_groups(net, linears):
    names = {layer: name for name, layer in adapted_layers(net)}
    return [[names[layer] for layer in group.layers] for group in linears._groups]


def test_layers_that_read_the_same_tensor_are_found():
    net = adapted()
    linears = compare(net)
    assert names_of_groups(net, linears) == [["q", "k", "v"], ["gate"], ["twice"], ["fused"]]


@pytest.mark.parametrize("wants_gradient", [False, True])
def test_inputs_with_and_without_a_gradient(wants_gradient):
    compare(adapted(), torch.randn(3, 6, dtype=torch.float64, requires_grad=wants_gradient))


def test_ranks_and_scalings_of_their_own():
    compare(adapted(rank_pattern={"k": 3, "fused": 1}, alpha_pattern={"v": 7}, use_rslora=True))


def test_blocks_of_a_fused_projection():
    net = adapted(target_modules=["q", "v", "fused"], enable_lora={"fused": [True, False, True]})
    assert names_of_groups(net, compare(net)) == [["q", "v"], ["fused"]]


def test_outputs_that_are_scaled():
    """As in DoRA, where each output is scaled by a trained number before the bias is added."""
    net = adapted(use_dora=True)
    with torch.no_grad():
        net.q.lora_magnitude_vector.mul_(1.5)
    assert names_of_groups(net, compare(net))[0] == ["q", "k", "v"]
    assert net.q.lora_magnitude_vector.grad is not None


@pytest.mark.parametrize("variant", [{"init_lora_weights": "pissa"}, {"lora_bias": True}])
def test_variants_with_more_factors_and_biases(variant):
    net = adapted(**variant)
    assert names_of_groups(net, compare(net))[0] == ["q", "k", "v"]


def test_dropout_is_drawn_for_each_layer():
    torch.manual_seed(0)
    compare(adapted(lora_dropout=0.4))


def test_an_output_that_nobody_uses():
    net = adapted()
    net.unused = True
    compare(net)
    assert net.k.lora_A.grad is None


def test_a_trained_bias_is_left_to_the_layer_itself():
    net = adapted()
    net.q.bias.requires_grad_(True)
    compare(net)
    assert net.q.bias.grad is not None


@pytest.mark.usefixtures("both_ways")
def test_a_bias_of_another_dtype_is_refused_as_by_the_layer_itself():
    """A kernel would misread its bits."""
    net, x = adapted(torch.bfloat16, 16), torch.randn(2, 6 * 16).bfloat16()
    linears = learned(net, x)
    net.q.bias.data = net.q.bias.data.float()
    with pytest.raises(RuntimeError, match="dtype"), one_pass(net, linears):
        net(x)


def test_hooks_on_factors_are_called():
    net, seen = adapted(), []
    net.v.lora_B.register_hook(seen.append)
    net.gate.lora_A.register_post_accumulate_grad_hook(seen.append)
    compare(net)
    assert len(seen) == 6


@pytest.mark.parametrize("state", [merge, lambda net: net.eval(), lambda net: net.double()])
def test_what_a_model_is_at_the_moment_counts(state):
    net, x = adapted(torch.float32), torch.randn(2, 6)
    linears = learned(net, x)
    state(net)
    x = x.to(net.q.weight.dtype)
    expected = net(x)
    with one_pass(net, linears):
        torch.testing.assert_close(net(x), expected)


def test_autocast_is_followed():
    net, x = adapted(torch.float32), torch.randn(2, 6)
    linears = learned(net, x)
    with torch.autocast("cpu", torch.bfloat16), one_pass(net, linears):
        assert net(x).dtype == torch.bfloat16


def test_switched_off_adapters_stay_off():
    net, x = adapted(), torch.randn(2, 6, dtype=torch.float64)
    linears = learned(net, x)
    with disabled(net):
        expected = net(x)
        with one_pass(net, linears):
            torch.testing.assert_close(net(x), expected)


def test_a_tensor_that_changes_between_two_layers_is_read_again():
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.change = nn.Linear(4, 4), nn.Linear(4, 4), False

        def forward(self, x):
            first = self.a(x)
            if self.change:
                x += 1
            return first + self.b(x)

    net, x = Changing(), torch.randn(2, 4)
    inject(net, LoraConfig(r=2, target_modules="all-linear"))
    linears = learned(net, x)
    net.change = True
    with torch.no_grad():
        expected = net(x.clone())
        with one_pass(net, linears):
            torch.testing.assert_close(net(x.clone()), expected)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("size", [1, 16])  # the kernels take whole vectors only
@pytest.mark.parametrize("unused", [False, True])
@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.3}])
def test_half_precision_gives_the_gradients_of_each_layer_alone_but_for_rounding(size, unused, settings):
    net, x = adapted(torch.bfloat16, size, **settings), torch.randn(4, 5, 6 * size).bfloat16()
    net.unused = unused
    twin, linears = copy.deepcopy(net), learned(net, x)
    torch.manual_seed(1)
    with one_pass(net, linears):
        net(x).float().square().mean().backward()
    torch.manual_seed(1)
    twin(x).float().square().mean().backward()
    made = gradients(net)
    for name, expected in gradients(twin).items():
        assert made[name].dtype == torch.float32
        assert (made[name] - expected).norm() <= 0.02 * expected.norm(), name


class Odd(nn.Module):
    """Layers that are grouped at first, and later run separately, repeatedly or in place."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.q, self.k, self.kind, self.drop = nn.Linear(6, 6), nn.Linear(6, 6), kind, nn.Dropout(0.5)

    def forward(self, x):
        if self.kind == "once more":
            return self.k(torch.tanh(self.q(x) + self.k(x)))
        if self.kind == "apart in training":
            return self.q(self.drop(x)) * self.k(self.drop(x))
        if self.kind == "in place":
            return torch.relu_(self.q(x)) + torch.relu_(self.k(x))
        if self.kind == "partly without a graph":
            with torch.no_grad():
                q = self.q(x)
            return q * self.k(x)
        return (self.q(x[:0]).sum() + self.q(x[0, 0])) * self.k(x)  # empty, and of one dimension


@pytest.mark.parametrize("kind", ["once more", "apart in training", "in place", "partly without a graph", "empty"])
def test_layers_that_run_otherwise_than_when_they_were_found(kind):
    torch.manual_seed(0)
    net = Odd(kind).double()
    inject(net, LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        net.q.lora_B.normal_()
        net.k.lora_B.normal_()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    linears = learned(net.eval(), x)
    assert names_of_groups(net, linears)
    compare(net.train(), x, linears)


def test_a_layer_that_was_taken_back_or_has_a_forward_of_its_own_is_left_alone():
    net, x = adapted(), torch.randn(2, 6, dtype=torch.float64)
    linears = learned(net, x)
    net.gate.forward = lambda x: x
    expected = net(x)
    with one_pass(net, linears):
        torch.testing.assert_close(net(x), expected)
    assert "forward" in net.gate.__dict__
    del net.gate.forward
    remove(net)
    expected = net(x)
    with one_pass(net, linears):
        torch.testing.assert_close(net(x), expected)
    inject(net, LoraConfig(r=3, target_modules="all-linear"))
    with one_pass(net, linears):
        net(x).sum().backward()
    with one_pass(net, linears), torch.inference_mode():
        net(x)


def test_an_error_within_a_step_leaves_nothing_behind():
    net, x = adapted(), torch.randn(2, 6, dtype=torch.float64)
    linears = learned(net, x)
    with pytest.raises(RuntimeError, match="shape"), one_pass(net, linears):
        net(x[:, :3])
    assert not any("forward" in module.__dict__ for module in net.modules())
    compare(copy.deepcopy(net), x)


class Headed(nn.Module):
    """An adapted layer between frozen linears of both kinds that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.below, self.adapted, self.head = Conv1D(16, 8), nn.Linear(16, 16), nn.Linear(16, 32)

    def forward(self, x):
        return self.head(torch.tanh(self.adapted(torch.tanh(self.below(x)))))


def headed():
    torch.manual_seed(0)
    net = Headed().bfloat16()
    inject(net, LoraConfig(r=4, target_modules=["adapted"]))
    torch.nn.init.normal_(net.adapted.lora_B)
    return net.train()


def passed(net, x, linears=None):
    """Output, gradient of x, and gradients of the factors, in fp64."""
    net.zero_grad()
    x = x.clone().requires_grad_()
    with one_pass(net, linears) if linears else torch.enable_grad():
        out = net(x)
        out.float().square().mean().backward()
    return [value.double() for value in (out.detach(), x.grad, *gradients(net).values())]


@pytest.mark.bf16_units
@pytest.mark.parametrize("limit", [2**30, 0])
def test_prepacked_frozen_weights(limit, monkeypatch):
    """Results are as accurate as without them; copies that would be too large are not made."""
    monkeypatch.setattr(adapted_linears, "MAX_PREPACKED_BYTES", limit)
    monkeypatch.setenv("LORALIB_ENGINE", "torch")
    net, x = headed(), torch.randn(3, 5, 8).bfloat16()
    exact = passed(copy.deepcopy(net).double(), x.double())
    linears = learned(net, x)
    with one_pass(net, linears):
        assert ("forward" in net.head.__dict__) == ("forward" in net.below.__dict__) == bool(limit)
    for got, plain, truth in zip(passed(net, x, linears), passed(net, x), exact, strict=True):
        assert (got - truth).norm() <= 1.5 * (plain - truth).norm() + 1e-3 * truth.norm()


@pytest.mark.bf16_units
@pytest.mark.parametrize("name", ["below", "adapted", "head"])
def test_a_weight_that_changes_between_steps(name):
    net, x = headed(), torch.randn(5, 8).bfloat16()
    linears = learned(net, x)
    before = passed(net, x, linears)[0]
    with torch.no_grad():
        getattr(net, name).weight.neg_()
    got = passed(net, x, linears)[0]
    torch.testing.assert_close(got, passed(net, x)[0], rtol=0.05, atol=0.02)
    assert not torch.allclose(got, before, rtol=0.05, atol=0.02)


@pytest.mark.bf16_units
def test_a_head_that_is_trained_or_runs_under_autocast_keeps_its_own_way():
    net, x = headed(), torch.randn(5, 8).bfloat16()
    linears = learned(net, x)
    net.head.requires_grad_(True)
    passed(net, x, linears)
    assert net.head.weight.grad is not None
    net.head.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        passed(net, x, linears)
    with one_pass(net, linears), torch.inference_mode():
        net(x)
