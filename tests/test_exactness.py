"""Packed steps with shared prompts equal padded ones: trees of shared prefixes, partly trained texts, more models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import loralib as lora
from loralib.data import TokenExample
from loralib.training.step import make_step

pytestmark = pytest.mark.usefixtures("both_ways")

VOCABULARY = 29
WINDOW = 5
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip

# Beyond the shapes of test_step.py: a scale of the logits, norms of queries and keys, fused projections, layers without
# rotation, biases, a parallel MLP.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere": ("CohereForCausalLM", {"logit_scale": 0.3}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 32}),
    "phi3": ("Phi3ForCausalLM", {"sliding_window": WINDOW}),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "smollm3": ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 0]}),
    "starcoder2": ("Starcoder2ForCausalLM", {"sliding_window": WINDOW}),
    "gpt_neox": ("GPTNeoXForCausalLM", {}),
    "gemma3": (
        "Gemma3ForCausalLM",
        {"head_dim": 16, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    ),
}


@pytest.fixture(scope="module", params=SHAPES)
def model(request: pytest.FixtureRequest) -> Any:
    """A model whose weights are large enough that a leak between examples, or a wrong position, shows."""
    torch.manual_seed(0)
    name, own = SHAPES[request.param]
    kind = getattr(transformers, name)
    made = kind(kind.config_class(**SIZES | {"attention_dropout": 0.0} | own))
    lora.inject(made, lora.LoraConfig(r=3, lora_alpha=6, target_modules="all-linear"))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return made.train()


@st.composite
def trees(draw: Any) -> list[TokenExample]:
    """Examples over two tokens, which branch at every depth; chats train some turns and not others."""
    batch = []
    for _ in range(draw(st.integers(1, 5))):
        ids = draw(st.lists(st.integers(3, 4), min_size=2, max_size=4 * WINDOW))
        trained = draw(st.lists(st.booleans(), min_size=len(ids) - 1, max_size=len(ids) - 1))
        batch.append(TokenExample(tuple(ids), (False, *trained)))
    return batch


def padded(model: Any, batch: list[TokenExample], scale: float) -> float:
    """The step in its simplest form."""
    width = max(map(len, batch))
    ids = torch.tensor([[*example.ids, *[2] * (width - len(example))] for example in batch])
    mask = torch.tensor([[1] * len(example) + [0] * (width - len(example)) for example in batch])
    trained = torch.tensor([[*example.trained, *[False] * (width - len(example))] for example in batch])
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].flatten(0, 1)
    targets = torch.where(trained, ids, -100)[:, 1:].flatten()
    loss = F.cross_entropy(logits, targets, reduction="sum")
    (loss * scale).backward()
    return loss.item()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(batch=trees(), share=st.booleans())
def test_deep_trees_with_gaps(model: Any, batch: list[TokenExample], share: bool) -> None:
    count = sum(sum(example.trained) for example in batch)
    step = make_step(model, share_prompts=share)
    assert step.packing, step.note
    stats = step.forward_backward(batch, loss_scale=1 / max(1, count))
    made = gradients(model)
    if count == 0:
        assert (stats.loss_sum, made) == (0.0, {})
        return
    assert stats.loss_sum == pytest.approx(padded(model, batch, 1 / count), rel=1e-5)
    reference = gradients(model)
    assert made.keys() == reference.keys()
    for name, gradient in reference.items():
        assert (made[name] - gradient).abs().max() <= 1e-5 * max(1.0, float(gradient.abs().max())), name
