"""Faster operators for transformers' models have the same values and gradients, and are used only if they do."""

import types
from contextlib import contextmanager

import pytest
import torch
import transformers
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from loralib.engine.operators import operator_overrides
from loralib.engine.placement import Hold, overriding


@contextmanager
def faster(model, overrides=None):
    overrides = operator_overrides(model) if overrides is None else overrides
    with Hold(model, overrides, "training"), overriding(overrides):
        yield overrides


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_rms_norm(dtype, tolerance):
    torch.manual_seed(0)
    norm = LlamaRMSNorm(32, eps=1e-5).double().requires_grad_(False)
    norm.weight.uniform_(-1, 2)
    x, gradient = torch.randn(3, 5, 32, dtype=torch.float64).to(dtype), torch.randn(3, 5, 32, dtype=torch.float64)
    exact = x.double().requires_grad_()
    normalised = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-5)
    (normalised * norm.weight.to(dtype).double()).backward(gradient.to(dtype).double())
    norm.to(dtype)
    seen = x.clone().requires_grad_()
    with faster(norm):
        assert "forward" in norm.__dict__
        out = norm(seen)
        out.backward(gradient.to(dtype))
    assert "forward" not in norm.__dict__
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), normalised * norm.weight.double(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(seen.grad.double(), exact.grad, rtol=tolerance, atol=tolerance)


class OtherRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states):
        return super().forward(hidden_states) + hidden_states.mean(-1, keepdim=True)


class BareRMSNorm(LlamaRMSNorm):
    def __init__(self, width):
        super().__init__(width)
        self.weight = None


class NewGELUActivation(nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize("make", [OtherRMSNorm, BareRMSNorm, nn.RMSNorm, lambda width: NewGELUActivation()])
def test_what_computes_something_else_keeps_its_own_way(make):
    norm = make(8)
    with faster(norm):
        assert "forward" not in norm.__dict__


def test_a_norm_without_a_weight_beside_one_that_was_tried():
    class OptionalRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states):
            return super().forward(hidden_states) if self.weight is not None else 2 * hidden_states

    assert operator_overrides(OptionalRMSNorm(8).requires_grad_(False))
    norm, x = OptionalRMSNorm(8), torch.randn(2, 8)
    norm.weight = None
    with faster(norm):
        assert torch.equal(norm(x), 2 * x)


def test_a_norm_that_comes_to_be_trained_gets_its_gradient():
    norm, x = LlamaRMSNorm(8).requires_grad_(False), torch.randn(2, 8)
    overrides = operator_overrides(norm)
    norm.requires_grad_(True)
    with faster(norm, overrides):
        norm(x).sum().backward()
    assert norm.weight.grad is not None


def test_the_gelu_of_gpt2():
    gelu, x = transformers.activations.NewGELUActivation(), torch.linspace(-8, 8, 1001, dtype=torch.float64)
    expected = gelu(x)
    with faster(gelu):
        assert "forward" in gelu.__dict__
        torch.testing.assert_close(gelu(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("both_ways")
def test_keywords_and_other_shapes():
    norm = LlamaRMSNorm(8).requires_grad_(False)
    for x in (torch.randn(2, 3, 4, 8).transpose(1, 2), torch.randn(8), torch.randn(0, 8)):
        expected = norm(x)
        with faster(norm):
            torch.testing.assert_close(norm(x), expected)
            torch.testing.assert_close(norm(hidden_states=x), expected)


def rotated(function, q, k, cos, sin, *others):
    q, k = q.clone().requires_grad_(), k.clone().requires_grad_()
    outputs = function(q, k, cos, sin, *others)
    sum((output * torch.arange(output.shape[-1])).square().sum() for output in outputs).backward()
    return [*outputs, q.grad, k.grad]


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "mistral"])
def test_rotary_positions(family):
    """The attention's code calls another function; its module and its class are not modified."""
    config = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 8, "vocab_size": 8}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **config))
    attention = model.model.layers[0].self_attn
    theirs = type(attention).forward.__globals__["apply_rotary_pos_emb"]
    override = operator_overrides(model)[attention]
    ours = override.__func__.__globals__["apply_rotary_pos_emb"]
    assert isinstance(override, types.MethodType)
    assert override.__func__.__code__ is type(attention).forward.__code__
    assert ours is not theirs
    assert type(attention).forward.__globals__["apply_rotary_pos_emb"] is theirs
    torch.manual_seed(0)
    q, k = (torch.randn(1, 5, heads, 8, dtype=torch.float64).transpose(1, 2) for heads in (4, 2))
    cos, sin = torch.randn(2, 1, 5, 8, dtype=torch.float64)
    got = rotated(ours, q, k, cos, sin)
    along = rotated(ours, q.transpose(1, 2), k.transpose(1, 2), cos, sin, 2)
    for one, other in zip(got, rotated(theirs, q, k, cos, sin), strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(along, got, strict=True):
        torch.testing.assert_close(one.transpose(1, 2), other)


def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    return q * cos, k * cos


class OddlyRotating(nn.Module):
    def forward(self, q, k, cos, sin):
        return apply_rotary_pos_emb(q, k, cos, sin)


def test_another_rotation_is_left_as_it_is():
    assert not operator_overrides(OddlyRotating())


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_gradient_the_numbers_are_the_same_bits(dtype):
    config = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "vocab_size": 8}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("llama", **config)).to(
        dtype
    )
    with faster(model.requires_grad_(False)):
        with torch.no_grad():
            logits = model(torch.tensor([[1, 5, 2]])).logits
        assert torch.equal(logits, model(torch.tensor([[1, 5, 2]])).logits)
