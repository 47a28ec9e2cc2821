"""Experts in 8 and 4 bits: each is quantised separately, and no step makes all of them dense."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loralib as lora
from loralib.bases.quant import QuantizedWeight, make_dense, quantize, quantize_model, round_model
from loralib.budget import training_budget
from loralib.data import TokenExample
from loralib.delta import stored_bytes
from loralib.engine.kernels import Kernels, compiled
from loralib.errors import BaseMismatchError
from loralib.injection import fingerprint
from loralib.training.step import make_step

hf = pytest.importorskip("transformers")

KINDS = ("int8", "nf4")
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, Callable[[], Any]] = {
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, head_dim=32)
    ),
    # Transposed weights, interleaved gates, biases.
    "gpt_oss": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(
            **SIZES,
            num_local_experts=4,
            num_experts_per_tok=2,
            head_dim=32,
            layer_types=["full_attention"] * 2,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        )
    ),
}
IDS = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(5))
BATCH = [TokenExample(tuple(row), (False,) * 3 + (True,) * 6) for row in IDS.tolist()]


def model_of(family: str = "qwen3_moe", seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = FAMILIES[family]()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    return model.bfloat16().eval()


def quantized(kind: str, family: str = "qwen3_moe", seed: int = 0) -> Any:
    model = model_of(family, seed)
    quantize_model(model, kind)
    return model


def dense_copy(model: Any) -> Any:
    """The same values in ordinary tensors."""
    model = copy.deepcopy(model)
    make_dense(model)
    return model


def adapted(model: Any) -> Any:
    lora.inject(model, lora.LoraConfig(r=4, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def stacks(model: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if n.endswith(("experts.gate_up_proj", "experts.down_proj"))}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def none_may_be_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, the test fails if a whole stack is made dense; a single expert's weight may be."""
    as_dense = QuantizedWeight.dense

    def of_one(weight: QuantizedWeight) -> Tensor:
        assert weight.dim() == 2, "all experts of a layer were made dense at once"
        return as_dense(weight)

    monkeypatch.setattr(QuantizedWeight, "dense", of_one)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("turned", [False, True])
def test_each_expert_is_quantised_like_a_weight_of_its_own(kind: str, turned: bool) -> None:
    weights = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(0))
    stack = quantize(weights, kind, turned=turned)
    alone = [quantize(weight, kind, turned=turned) for weight in weights]
    expected = torch.stack([weight.dense() for weight in alone])
    assert stack.shape == weights.shape
    assert stack.stored_bytes == sum(weight.stored_bytes for weight in alone)
    assert torch.equal(stack.dense(), expected)
    for number, weight in enumerate(stack.unbind()):
        assert isinstance(weight, type(stack))
        assert torch.equal(weight.dense(), expected[number])
        assert torch.equal(stack[number].dense(), expected[number])
    assert isinstance(stack.mT, type(stack))
    assert torch.equal(stack.mT.dense(), expected.mT)
    assert torch.equal(stack.permute(0, 2, 1).dense(), expected.mT)


def test_whatever_else_reads_a_stack_reads_the_dense_numbers() -> None:
    stack = quantize(torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)), "int8")
    expected = stack.dense()
    for read in (
        lambda w: w.transpose(0, 1),
        lambda w: w.permute(2, 0, 1),
        lambda w: w.select(1, 2),
        lambda w: w[:, :, 1],
        lambda w: w[torch.tensor([2, 0])],
        lambda w: w.unbind(2)[1],
        lambda w: torch.bmm(torch.ones(3, 2, 5), w.mT),
    ):
        assert torch.equal(read(stack), read(expected))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_experts_are_equal(copied: Callable[[Any], Any]) -> None:
    held = nn.Parameter(quantize(torch.randn(3, 24, 64), "nf4", turned=True), requires_grad=False)
    other = copied(held)
    assert isinstance(other, nn.Parameter)
    assert torch.equal(other.dense(), held.dense())
    assert other.codes.data_ptr() != held.codes.data_ptr()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_training_and_generation_are_those_on_the_dense_numbers(
    family: str, kind: str, both_ways: None, smollm2: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16, where our kernels and PyTorch's products add up in another order."""
    model = quantized(kind, family)
    assert all(isinstance(weight, QuantizedWeight) for weight in stacks(model).values())
    other = dense_copy(model)
    torch.testing.assert_close(model(IDS).logits, other(IDS).logits, rtol=0, atol=2e-2)  # transformers' own, no adapter
    model, other = adapted(model).train(), adapted(other).train()
    none_may_be_dense(monkeypatch)
    for way in (model, other):
        way(input_ids=IDS, labels=IDS).loss.backward()  # a user's own loop
    plain, expected = gradients(model), gradients(other)
    assert plain.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(plain[name], expected[name], rtol=1e-2, atol=1e-3)
    steps = [make_step(way).forward_backward(BATCH, loss_scale=1.0) for way in (model, other)]
    assert float(steps[0].loss_sum) == pytest.approx(float(steps[1].loss_sum), rel=1e-3)
    ours, expected = gradients(model), gradients(other)
    for name in expected:
        assert (ours[name] - expected[name]).norm() <= 0.05 * expected[name].norm(), name
    said = [
        lora.generate(way.eval(), smollm2[1], [IDS[0].tolist()], max_new_tokens=6, min_new_tokens=6)[0].ids
        for way in (model, other)
    ]
    assert said[0] == said[1]


@pytest.mark.bf16_units
def test_kernels_multiply_with_each_experts_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORALIB_ENGINE", "full")
    kernels = compiled()
    if kernels is None or not kernels.accept_weight(quantize(torch.randn(64, 64).bfloat16(), "nf4")):
        pytest.skip("no compiled kernels, or no units for pairs of bf16")
    multiplied: list[tuple[int, int]] = []
    product = Kernels.product

    def noted(kernels: Kernels, x: Tensor, weight: Tensor, added: Tensor | None = None) -> Tensor:
        if isinstance(weight, QuantizedWeight):
            multiplied.append((weight.shape[0], weight.shape[1]))
        return product(kernels, x, weight, added)

    model = adapted(quantized("nf4")).train()
    step = make_step(model)
    monkeypatch.setattr(Kernels, "product", noted)
    step.forward_backward(BATCH, loss_scale=1.0)
    assert {(128, 64), (64, 64)} <= set(multiplied)  # gate and up, and down, forward
    assert (64, 128) in multiplied  # gate and up, backward


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_merging_makes_them_dense_and_unmerging_puts_the_codes_back(family: str, kind: str) -> None:
    model = adapted(quantized(kind, family))
    held = stacks(model)
    with torch.no_grad():
        before = model(IDS).logits
        lora.merge(model)
        assert not any(isinstance(weight, QuantizedWeight) for weight in stacks(model).values())
        torch.testing.assert_close(model(IDS).logits, before, rtol=0, atol=0.3)
        lora.unmerge(model)
        assert all(weight is held[name] for name, weight in stacks(model).items())
        assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_experts_knows_its_base_in_any_bits_and_no_other(kind: str, tmp_path: Path) -> None:
    model = adapted(quantized(kind))
    assert fingerprint(model) == fingerprint(model_of())
    lora.save_adapter(model, tmp_path)
    assert "in a different precision than in training" in str(lora.load_adapter(model_of(), tmp_path))
    with pytest.raises(BaseMismatchError, match="same shapes but different values"):
        lora.load_adapter(model_of(seed=1), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_quantised_while_a_base_is_read(
    family: str, kind: str, tmp_path: Path, smollm2: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints of Qwen have a tensor for each expert's weights, those of gpt-oss one for all of them."""
    monkeypatch.setitem(SIZES, "vocab_size", len(smollm2[1]))
    model_of(family).save_pretrained(tmp_path)
    smollm2[1].save_pretrained(tmp_path)
    (read, _), whole = lora.load_base(tmp_path, dtype="bf16", device="cpu", quantize=kind), quantized(kind, family)
    expected = stacks(whole)
    for name, weight in stacks(read).items():
        assert isinstance(weight, type(expected[name]))
        assert torch.equal(weight.dense(), expected[name].dense())
    assert fingerprint(read) == fingerprint(model_of(family))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_counts_their_bits(family: str, kind: str) -> None:
    expected = sum(map(stored_bytes, quantized(kind, family).parameters()))
    assert training_budget(model_of(family), 64, quantize=kind).weights == expected
    assert training_budget(adapted(model_of(family)), 64, quantize=kind).weights == expected


def test_rounding_gives_the_numbers_that_codes_stand_for() -> None:
    model, codes = model_of("gpt_oss"), quantized("nf4", "gpt_oss")
    assert 0.05 < round_model(model, "nf4").total < 0.12
    for name, weight in stacks(codes).items():
        assert torch.equal(stacks(model)[name], weight.dense())
