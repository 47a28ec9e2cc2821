"""Families of models beyond their windows, chunks and rotary limits: texts and gradients are the model's own."""

from __future__ import annotations

import copy
import functools
import random
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional as F

from loralib.data.tokens import TokenExample
from loralib.generation import Sampling, beam_search, generate
from loralib.generation.decoder import CachedDecoder, make_decoder
from loralib.generation.streaming import Generator
from loralib.training.step import make_step

WINDOW = 16  # of attention, of chunks, and where rotary positions change
VOCABULARY = 64
_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_LAYERS = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
_SIZES = {**_TOKENS, **_LAYERS, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 256}
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
_GPT2 = {**_TOKENS, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, **more}


_LONG = _rope(
    "longrope",
    short_factor=[1.0] * 4,
    long_factor=[4.0] * 4,
    original_max_position_embeddings=WINDOW,
    factor=16.0,
)
_MSCALES = {"short_mscale": 1.0, "long_mscale": 1.5}
_PHIMOE = {"num_local_experts": 4, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0}


@functools.cache
def configs() -> dict[str, Any]:
    t = transformers
    return {
        "llama": t.LlamaConfig(**_SIZES),
        "llama3": t.LlamaConfig(
            **_SIZES,
            rope_parameters=_rope(
                "llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=WINDOW,
            ),
        ),
        "yarn": t.LlamaConfig(
            **_SIZES, rope_parameters=_rope("yarn", factor=4.0, original_max_position_embeddings=WINDOW)
        ),
        "dynamic": t.LlamaConfig(
            **_SIZES | {"max_position_embeddings": WINDOW}, rope_parameters=_rope("dynamic", factor=4.0)
        ),
        "llama4": t.Llama4TextConfig(
            **_SIZES,
            head_dim=16,
            attention_chunk_size=WINDOW,
            num_local_experts=2,
            num_experts_per_tok=1,
            intermediate_size_mlp=32,
            interleave_moe_layer_step=2,
            no_rope_layers=[1, 1, 0],
            layer_types=["chunked_attention", "chunked_attention", "full_attention"],
        ),
        "llama4_tuned": t.Llama4TextConfig(
            **_SIZES,
            head_dim=16,
            num_local_experts=2,
            num_experts_per_tok=1,
            intermediate_size_mlp=32,
            no_rope_layers=[1, 0, 0],
            floor_scale=WINDOW,
            attn_scale=2.0,
            layer_types=["full_attention"] * 3,
        ),
        "qwen2_moe": t.Qwen2MoeConfig(
            **_SIZES,
            **_EXPERTS,
            use_sliding_window=True,
            sliding_window=WINDOW,
            max_window_layers=1,
            shared_expert_intermediate_size=16,
        ),
        "qwen3": t.Qwen3Config(**_SIZES, head_dim=16),
        "qwen3_moe": t.Qwen3MoeConfig(**_SIZES, **_EXPERTS, head_dim=16),
        "phimoe": t.PhimoeConfig(**_SIZES, **_PHIMOE, sliding_window=WINDOW),
        "phimoe_long": t.PhimoeConfig(**_SIZES, **_PHIMOE, rope_parameters=_LONG | _MSCALES),
        "phi3_long": t.Phi3Config(
            **_SIZES, rope_parameters=_LONG, original_max_position_embeddings=WINDOW, sliding_window=None
        ),
        "gemma2": t.Gemma2Config(**_SIZES, head_dim=16, sliding_window=WINDOW, layer_types=_SLIDING),
        "gemma3": t.Gemma3TextConfig(**_SIZES, head_dim=16, sliding_window=WINDOW, layer_types=_SLIDING),
        "mistral": t.MistralConfig(**_SIZES, sliding_window=WINDOW),
        "ministral3": t.Ministral3Config(
            **_SIZES,
            head_dim=16,
            rope_parameters=_rope(
                "yarn",
                factor=4.0,
                original_max_position_embeddings=WINDOW,
                llama_4_scaling_beta=0.5,
                beta_fast=32.0,
                beta_slow=1.0,
                mscale=1.0,
                mscale_all_dim=1.0,
            ),
        ),
        "gpt_oss": t.GptOssConfig(
            **_SIZES,
            head_dim=16,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=WINDOW,
            layer_types=_SLIDING,
            rope_parameters=_rope("default"),
        ),
        "olmo2": t.Olmo2Config(**_SIZES),
        "olmo3": t.Olmo3Config(**_SIZES, sliding_window=WINDOW, layer_types=_SLIDING),
        "cohere2": t.Cohere2Config(**_SIZES, sliding_window=WINDOW, layer_types=_SLIDING),
        "deepseek_v3": t.DeepseekV3Config(
            **_SIZES | {"num_key_value_heads": 4},
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
            n_routed_experts=4,
            n_group=2,
            topk_group=1,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            first_k_dense_replace=1,
        ),
        "deepseek_v32": t.DeepseekV32Config(
            **_SIZES | {"num_key_value_heads": 4},
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
            n_routed_experts=4,
            n_group=2,
            topk_group=1,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            first_k_dense_replace=1,
            index_topk=WINDOW,
            index_n_heads=2,
            index_head_dim=16,
        ),
        "falcon_alibi": t.FalconConfig(**_TOKENS, **_LAYERS, alibi=True, max_position_embeddings=256),
        "bloom": t.BloomConfig(**_TOKENS, hidden_size=32, n_layer=3, n_head=4),
        "mpt": t.MptConfig(**_TOKENS, d_model=32, n_layers=3, n_heads=4, max_seq_len=256),
        "opt": t.OPTConfig(
            **_TOKENS, **_LAYERS, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=256, dropout=0.0
        ),
        "gpt2": t.GPT2Config(**_GPT2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
        "gptj": t.GPTJConfig(**_GPT2, rotary_dim=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
        "gpt_neox": t.GPTNeoXConfig(**_TOKENS, **_LAYERS, intermediate_size=48, max_position_embeddings=256),
        "gpt_neo": t.GPTNeoConfig(
            **_TOKENS,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=WINDOW,
            max_position_embeddings=256,
            resid_dropout=0.0,
            embed_dropout=0.0,
            attention_dropout=0.0,
        ),
        "mamba": t.MambaConfig(**_TOKENS, hidden_size=32, num_hidden_layers=2, state_size=4),
        "lfm2": t.Lfm2Config(**_SIZES, layer_types=["conv", "full_attention", "conv"]),
    }


FAMILIES = (
    "llama", "llama3", "yarn", "dynamic", "llama4", "llama4_tuned", "qwen2_moe", "qwen3", "qwen3_moe", "phimoe",
    "phimoe_long", "phi3_long", "gemma2", "gemma3", "mistral", "ministral3", "gpt_oss", "olmo2", "olmo3", "cohere2",
    "deepseek_v3", "deepseek_v32",
    "falcon_alibi", "bloom", "mpt", "opt", "gpt2", "gptj", "gpt_neox", "gpt_neo", "mamba", "lfm2",
)  # fmt: skip
# A dynamic model ends where its positions begin to change, so that it is never asked to write beyond.
WRITERS = tuple(name for name in FAMILIES if name != "dynamic")
RANDOM = random.Random(5)
PROMPTS = [[RANDOM.randrange(3, VOCABULARY) for _ in range(length)] for length in (5, 45, 12, 40)]


@functools.cache
def built(name: str) -> Any:
    """A model whose next tokens are neither certain nor equally likely."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = transformers.AutoModelForCausalLM.from_config(configs()[name])
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.3)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    return model.eval()


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """What a fresh copy of the model generates if each token is computed without a cache."""
    model = copy.deepcopy(model)
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


class Numbers:
    """A tokenizer that writes ids."""

    eos_token_id = None

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(map(str, ids))


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.filterwarnings("ignore")
def test_texts_are_the_models_own(name: str) -> None:
    model = built(name)
    expected = [greedy(model, prompt, 8) for prompt in PROMPTS]
    assert [list(text.ids) for text in generate(model, Numbers(), PROMPTS, max_new_tokens=8)] == expected
    found = beam_search(model, PROMPTS[:2], num_beams=1, max_new_tokens=8, eos_token_id=[])
    assert [list(best.ids) for best in found] == expected[:2]


def test_a_request_that_joins_later_waits_for_those_whose_positions_it_would_change() -> None:
    model = built("phi3_long")
    assert isinstance(make_decoder(model, WINDOW), CachedDecoder)
    generator, texts = Generator(model, Numbers()), {}
    requests = [(PROMPTS[0], 6), (PROMPTS[1], 4), (PROMPTS[2], 8), (PROMPTS[0], 3)]
    numbers = [generator.add(*request) for request in ((p, Sampling(max_new_tokens=n)) for p, n in requests)]
    while len(generator):
        for chunk in generator.step():
            texts.setdefault(chunk.request, []).extend(chunk.ids)
    assert [texts[number] for number in numbers] == [greedy(model, *request) for request in requests]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_gradients_are_those_of_examples_alone(name: str) -> None:
    """Of examples longer and shorter than windows, some of which share their beginnings."""
    model = copy.deepcopy(built(name)).train()
    rows = [*PROMPTS, [*PROMPTS[1][:30], *PROMPTS[3][:13]]]
    examples = [TokenExample((*row, 1), (*[False] * 3, *[True] * (len(row) - 2))) for row in rows]
    trained = [p for key, p in model.named_parameters() if "embed" not in key and p.requires_grad][-6:]
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_()
    total = 0.0
    for row, example in zip(rows, examples, strict=True):
        alone = copy.deepcopy(model)
        logits = alone(torch.tensor([row]), use_cache=False).logits[0, 2:]
        loss = F.cross_entropy(logits.float(), torch.tensor(example.ids[3:]), reduction="sum")
        loss.backward()
        total += float(loss.detach())
        for parameter, other in zip(model.parameters(), alone.parameters(), strict=True):
            if other.grad is not None:
                parameter.grad = other.grad + (0 if parameter.grad is None else parameter.grad)
    expected = [parameter.grad for parameter in trained]
    model.zero_grad()
    stats = make_step(model).forward_backward(examples, loss_scale=1.0)
    assert stats.trained_tokens == sum(sum(example.trained) for example in examples)
    assert float(stats.loss_sum) == pytest.approx(total, rel=1e-4)
    for parameter, gradient in zip(trained, expected, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))
