"""The claims of docs/models.md about each family, tested on a small random model: training, texts, PEFT, merging."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

import loralib as lora
from loralib.data.tokens import TokenExample
from loralib.generation.decoder import PlainDecoder, make_decoder
from loralib.injection import adapted_layers
from loralib.training.step import make_step

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
V = 48
SPECIAL: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 0, "pad_token_id": None}
PLAIN = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **SPECIAL}
GATED = {**PLAIN, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
WIDE = {**GATED, "head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
OLD = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, **SPECIAL}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Bloom": ("Bloom", {"vocab_size": V, "hidden_size": 32, "n_layer": 2, "n_head": 4, **SPECIAL}),
    "Cohere": ("Cohere", GATED),
    "Cohere 2": ("Cohere2", {**GATED, "sliding_window": 16}),
    "Gemma": ("Gemma", WIDE),
    "Gemma 2": ("Gemma2", {**WIDE, "sliding_window": 16}),
    "Gemma 3": ("Gemma3Text", {**WIDE, "sliding_window": 16}),
    "GLM 4": ("Glm4", WIDE),
    "GPT-2": ("GPT2", {**OLD, "n_positions": 64}),
    "GPT-J": ("GPTJ", {**OLD, "n_positions": 64, "rotary_dim": 8}),
    "GPT-Neo": (
        "GPTNeo",
        {
            "vocab_size": V,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global"], 2]],
            "max_position_embeddings": 64,
            **SPECIAL,
        },
    ),
    "GPT-NeoX (Pythia)": ("GPTNeoX", {**PLAIN, "intermediate_size": 48, "max_position_embeddings": 64}),
    "Granite": ("Granite", GATED),
    "Llama 1 to 3": ("Llama", GATED),
    "Mistral": ("Mistral", {**GATED, "sliding_window": 16}),
    "MPT": ("Mpt", {"vocab_size": V, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, **SPECIAL}),
    "OLMo 2": ("Olmo2", GATED),
    "OLMo 3": ("Olmo3", {**GATED, "sliding_window": 16}),
    "OPT": ("OPT", {**PLAIN, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}),
    "Phi 1 and 2": ("Phi", GATED),
    "Phi 3 and 4": ("Phi3", GATED),
    "Qwen 2 and 2.5": ("Qwen2", GATED),
    "Qwen 3": ("Qwen3", WIDE),
    "SmolLM 3": ("SmolLM3", GATED),
    "StableLM": ("StableLm", GATED),
    "StarCoder 2": ("Starcoder2", GATED),
    "Mixtral": ("Mixtral", {**GATED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen 2 MoE": ("Qwen2Moe", {**GATED, **EXPERTS, "shared_expert_intermediate_size": 24}),
    "Qwen 3 MoE": ("Qwen3Moe", {**WIDE, **EXPERTS}),
}


class Numbers:
    """A tokenizer with one token per number."""

    eos_token_id = 0

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(map(str, ids))


def small(family: str) -> Any:
    kind, sizes = FAMILIES[family]
    config = getattr(transformers, f"{kind}Config")(**sizes)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(std=0.2)
    return model.eval()


def tried(family: str, place: Path) -> list[str]:
    """Tests a family; returns the row that the page should have for it."""
    base = small(family)
    torch.manual_seed(0)
    model = copy.deepcopy(base)
    lora.inject(model, lora.LoraConfig(r=2, target_modules="all-linear"))
    rows = [[3, 4, 5, 6, 7, 8, 9], [3, 4, 5, 20, 21], [11, 12, 13, 14, 15, 16]]
    step = make_step(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    batch = [TokenExample(tuple(row), tuple(at >= 3 for at in range(len(row)))) for row in rows]
    for _ in range(2):
        assert float(step.loss(batch).loss_sum) == pytest.approx(loss_of(model, rows), rel=1e-4)
        model.train()
        step.forward_backward(batch, loss_scale=1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
    ids = torch.tensor(rows[:1])
    with torch.no_grad():
        logits = model(ids).logits
        assert not torch.allclose(logits, base(ids).logits, atol=1e-5)
    learned = [getattr(layer, name) for _, layer in adapted_layers(model) for name in layer.output_factors]
    assert all(bool(tensor.abs().max() > 0) for tensor in learned)
    written = lora.generate(model, Numbers(), [[5, 6, 7], [8, 9]], max_new_tokens=6, min_new_tokens=6)
    for prompt, text in zip([[5, 6, 7], [8, 9]], written, strict=True):
        assert list(text.ids) == greedily(model, prompt, 6)
    decoder = make_decoder(model)
    lora.save_adapter(model, place)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), place)
    with torch.no_grad():
        assert torch.allclose(theirs(ids).logits, logits, atol=1e-4)
        lora.merge(model)
        assert torch.allclose(model(ids).logits, logits, atol=1e-4)
    return [
        family,
        "without padding" if step.packing else "padded",
        "without a cache" if isinstance(decoder, PlainDecoder) else "with a cache",
    ]


def loss_of(model: nn.Module, rows: list[list[int]]) -> float:
    """The summed loss of all but the first three tokens of each row, each row on its own."""
    with torch.no_grad():
        logits = [model(torch.tensor([row])).logits[0] for row in rows]
    sums = [
        nn.functional.cross_entropy(x[2:-1], torch.tensor(row[3:]), reduction="sum")
        for x, row in zip(logits, rows, strict=True)
    ]
    return float(sum(sums))


def greedily(model: nn.Module, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            logits[0] = -torch.inf
            ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


def page_rows() -> list[list[str]]:
    table = PAGE.read_text(encoding="utf-8").partition("| family |")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()[2:]]


@pytest.mark.filterwarnings("ignore")  # transformers' own, of models that it leaves behind
@pytest.mark.parametrize("family", FAMILIES)
def test_the_page_says_what_the_family_does(family: str, tmp_path: Path) -> None:
    row = tried(family, tmp_path / "adapter")
    assert row in page_rows(), " | ".join(row)


def test_the_page_names_what_was_tried_and_nothing_else() -> None:
    assert [re.sub(r" \(attention.*", "", row[0]) for row in page_rows()] == [*FAMILIES]
