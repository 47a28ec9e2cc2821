"""What GPUs get, computed on the CPU: the same losses and gradients as the CPU's own way, which `test_step.py` checks.

flex_attention refuses to be trained through on a CPU, although PyTorch has the formulas of its backward pass.  Where
a test lifts that, the path is the GPU's but for the compiler: blocks are traced and run as they are.
"""

import copy
import threading

import pytest
import torch
import transformers
from torch import nn
from torch.nn.attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from loralib.config import LoraConfig
from loralib.data.tokens import TokenExample
from loralib.engine import compiled, flex, forward
from loralib.engine.device_linears import DeviceLinears
from loralib.engine.placement import Hold, overriding
from loralib.injection import inject
from loralib.training.memory import gradient_checkpointing
from loralib.training.step import make_step

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

VOCABULARY, WINDOW = 61, 6
_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_SOFTCAPS = {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 3.0, "attn_implementation": "eager"}
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 12, "sliding_window": WINDOW}


def gpt2():
    special = {"bos_token_id": 0, "eos_token_id": 1}
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=3, n_head=4, n_positions=512, **special)
    return transformers.GPT2LMHeadModel(config)


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_LLAMA))


def gemma2():  # soft-capped scores, and every second layer with a sliding window
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**_LLAMA, **_GEMMA, **_SOFTCAPS))


MODELS = {make.__name__: make for make in (gpt2, llama, gemma2)}


def adapted(make, **settings):
    torch.manual_seed(0)
    model = make()
    inject(model, LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.1) if "lora_B" in name else parameter.add_(torch.randn_like(parameter) * 0.15)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def batch_of(seed=0, prompts=2, completions=3, longest=40):
    """Prompts with several completions each, past sliding windows."""
    draw = torch.Generator().manual_seed(seed)

    def some():
        count = int(torch.randint(2, longest, (), generator=draw))
        return tuple(torch.randint(3, VOCABULARY, (count,), generator=draw).tolist())

    examples = []
    for _ in range(prompts):
        prompt = some()
        for _ in range(completions):
            ids = prompt + some()
            examples.append(TokenExample(ids, tuple(place >= len(prompt) for place in range(len(ids)))))
    return examples


def computed(step, model, batch):
    """The loss of a batch, and the gradients of the factors."""
    model.zero_grad()
    loss = step.forward_backward(batch, loss_scale=0.01).loss_sum
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(made, expected):
    torch.testing.assert_close(made[0], expected[0], rtol=1e-5, atol=1e-5)
    assert made[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(made[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.fixture
def on_gpu(monkeypatch):
    """Chooses the GPU's way for models on the CPU; where nothing can be compiled, at first."""

    def choose(way):
        monkeypatch.setattr(forward, "path_of", lambda model: "gpu")
        if way != "dense":
            monkeypatch.setattr(forward, "has_flex", lambda device: True)
            monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
        if way == "compiled":
            monkeypatch.setattr(forward, "may_compile", lambda: True)
            monkeypatch.setattr(compiled, "_BACKEND", "eager")

    return choose


@pytest.mark.parametrize("way", ["dense", "flex", "compiled"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_losses_and_gradients_are_those_of_the_cpus_way(make, way, on_gpu):
    model, batch = adapted(make), batch_of()
    expected = computed(make_step(model), model, batch)
    on_gpu(way)
    step = make_step(model)
    assert step.packing, step.note
    with step:
        assert_same(computed(step, model, batch), expected)
        assert step.loss(batch).loss_sum == pytest.approx(expected[0].item(), rel=1e-5)
    assert not [module for module in model.modules() if {"forward"} & module.__dict__.keys()]
