"""Each variant in each part of the program: it is supported, or refused by name with a way out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import loralib as lora
from loralib.adapter import Adapter
from loralib.combine import combine, resize
from loralib.formats import export, make_portable, merge_and_compare, merge_into, write_microsoft
from loralib.inspection import inspect_adapter
from loralib.verify.judging import Reference

IDS = torch.tensor([[5, 9, 3, 17, 8, 30]])
LINEARS = ["q_proj", "down_proj"]
VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "eva": {"init_lora_weights": "eva"},
    "bias of B": {"lora_bias": True},
    "token rows": {"trainable_token_indices": [5, 9, 30]},
}


def llama(tied: bool = False) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    settings: dict[str, Any] = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": tied}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, vocab_size=40, max_position_embeddings=32, **settings)).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits  # type: ignore[no-any-return]


def trained(variant: str, model: Any) -> Adapter:
    config = lora.LoraConfig(r=2, lora_alpha=4, target_modules=LINEARS, **VARIANTS[variant])
    lora.inject(model, config, [IDS] if variant == "eva" else None)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return lora.adapter_of(model)


# Operations: from an adapter and its base, to logits that must be those of the adapter; or nothing to compare.


def in_a_bank(adapter: Adapter, base: Any, folder: Path) -> None:
    bank = lora.Bank(base)
    bank.load("it", adapter)  # which also tries it
    assert list(bank.names) == ["it"]


def saved(adapter: Adapter, base: Any, folder: Path) -> Tensor:
    lora.apply_adapter(base, adapter)
    lora.save_adapter(base, folder)
    lora.remove(base)
    lora.load_adapter(base, folder)
    return logits(base)


def merged(adapter: Adapter, base: Any, folder: Path) -> Tensor:
    merge_into(base, adapter)
    return logits(base)


def merged_and_compared(adapter: Adapter, base: Any, folder: Path) -> Tensor:
    report = merge_and_compare(base, adapter, [IDS[0]], torch.float32)
    assert report.max_difference < 1e-5
    return logits(base)


def scaled(adapter: Adapter, base: Any, folder: Path) -> Tensor:
    lora.apply_adapter(base, combine([adapter], [1.0], "cat").adapter)
    return logits(base)


def at_another_rank(adapter: Adapter, base: Any, folder: Path) -> Tensor:
    lora.apply_adapter(base, resize(adapter, 6).adapter)
    return logits(base)


def inspected(adapter: Adapter, base: Any, folder: Path) -> None:
    assert "kind" in str(inspect_adapter(adapter))


def verified(adapter: Adapter, base: Any, folder: Path) -> None:
    with Reference.of(base, adapter) as reference:
        assert reference.modules


def converted(target: str) -> Callable[[Adapter, Any, Path], Tensor]:
    def convert(adapter: Adapter, base: Any, folder: Path) -> Tensor:
        portable = make_portable(adapter, target, base, r=16 if adapter.config.use_dora else None)
        path = folder / "adapter.gguf" if target == "llamacpp" else folder / "adapter"
        export(portable, target, path, base)
        lora.load_adapter(base, path)
        return logits(base)

    return convert


def in_microsofts_form(adapter: Adapter, base: Any, folder: Path) -> None:
    write_microsoft(adapter, folder / "model.bin")


PLAIN_ONLY = {"dora": "DoRA.*loralib convert", "bias of B": "lora_bias.*loralib merge"}
PLAIN_ONLY |= {"token rows": "trainable_token_indices.*loralib merge"}
NOT_PORTABLE = {"bias of B": "lora_bias.*loralib merge", "token rows": "trainable_token_indices.*loralib merge"}
NOT_MICROSOFTS = {"dora": "magnitude", "bias of B": "lora_B.bias", "token rows": "token_adapter"}
# name -> what is done, and for which variants it is refused, with what the message says
OPERATIONS: dict[str, tuple[Callable[[Adapter, Any, Path], Any], dict[str, str]]] = {
    "save and load": (saved, {}),
    "merge": (merged, {}),
    "merge and compare": (merged_and_compared, {}),
    "combine": (scaled, PLAIN_ONLY),
    "resize": (at_another_rank, PLAIN_ONLY),
    "bank": (in_a_bank, PLAIN_ONLY),
    "inspect": (inspected, {}),
    "verify": (verified, {"dora": "DoRA's update has full rank.*loralib merge"}),
    "convert for PEFT": (converted("peft"), NOT_PORTABLE),
    "convert for vLLM": (converted("vllm"), NOT_PORTABLE),
    "convert for llama.cpp": (converted("llamacpp"), NOT_PORTABLE),
    "convert for MLX": (converted("mlx"), NOT_PORTABLE),
    "Microsoft's form": (in_microsofts_form, NOT_MICROSOFTS),
}


@pytest.fixture(scope="module")
def adapters() -> dict[str, tuple[Adapter, Tensor]]:
    """Each variant's adapter, and the logits of its model."""
    found = {}
    for variant in VARIANTS:
        model = llama()
        adapter = trained(variant, model)
        found[variant] = adapter, logits(model)
    return found


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_computed_or_refused_by_name(
    variant: str, operation: str, adapters: dict[str, tuple[Adapter, Tensor]], tmp_path: Path
) -> None:
    adapter, expected = adapters[variant]
    run, refusals = OPERATIONS[operation]
    base = llama()
    if variant in refusals:
        with pytest.raises(lora.LoraError, match=f"(?s){refusals[variant]}"):
            run(adapter, base, tmp_path)
        assert torch.equal(logits(base), logits(llama()))
        return
    result = run(adapter, base, tmp_path)
    if result is not None:
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=2e-5)


def test_tied_tables_stay_one_when_their_rows_are_merged() -> None:
    model = llama(tied=True)
    adapter = trained("token rows", model)
    expected = logits(model)
    base = llama(tied=True)
    merge_into(base, adapter)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    torch.testing.assert_close(logits(base), expected)


def test_rows_of_a_tied_head_alone_act_in_the_head_alone() -> None:
    model, base = llama(tied=True), llama(tied=True)
    report = lora.inject(model, lora.LoraConfig(target_modules=["q_proj"], trainable_token_indices={"lm_head": [5]}))
    assert "lm_head shares its weight with model.embed_tokens: the update acts only in lm_head" in report.notes[0]
    torch.nn.init.ones_(model.lm_head.lora_token_rows)
    merge_into(base, lora.adapter_of(model))
    torch.testing.assert_close(logits(base), logits(model))
    assert not base.config.tie_word_embeddings
    assert torch.equal(base.model.embed_tokens.weight, llama().model.embed_tokens.weight)


# Contradictions.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True, "lora_bias": True}, "use_dora and lora_bias do not work together"),
        (
            {"use_dora": True, "init_lora_weights": "pissa"},
            "use_dora and init_lora_weights 'pissa' do not work together",
        ),
        ({"lora_bias": True, "bias": "all"}, "lora_bias and bias 'all'.*leave one of them out"),
        ({"init_lora_weights": "olora", "enable_lora": {"q_proj": [True, False]}}, "enable_lora and init_lora_weights"),
        (
            {"init_lora_weights": "pissa", "r": 17},
            "start from r directions of the weight, which has only 16.*rank_pattern",
        ),
        ({"init_lora_weights": "pissa", "target_modules": ["embed_tokens"]}, "does not support an embedding"),
        ({"lora_bias": True, "target_modules": ["embed_tokens"]}, "lora_bias does not support an embedding"),
        ({"init_lora_weights": "eva"}, "starts from data"),
        ({"init_lora_weights": "corda"}, "'corda' is not one of the starts that loralib has.*'pissa'"),
        ({"trainable_token_indices": [40]}, r"no rows \[40\], the table has 40"),
        ({"trainable_token_indices": [4, 4]}, "expected each row once"),
        ({"trainable_token_indices": {"wte": [4]}}, r"trainable_token_indices\['wte'\] matches nothing"),
        ({"trainable_token_indices": {"norm": [4]}}, "is not an embedding or a head"),
        (
            {"trainable_token_indices": [4], "target_modules": ["embed_tokens"]},
            "target_modules already adapts all of it",
        ),
        (
            {"trainable_token_indices": [4], "modules_to_save": ["embed_tokens"]},
            "modules_to_save already trains all of it",
        ),
        ({"eva_config": {"rho": 0.5}}, "rho 0.5, expected at least 1"),
    ],
)
def test_what_cannot_be_is_said_before_anything_changes(settings: dict[str, Any], message: str) -> None:
    model = llama()
    with pytest.raises(lora.LoraError, match=f"(?s){message}"):
        lora.inject(model, lora.LoraConfig(**{"r": 2, "target_modules": LINEARS, **settings}))
    assert not any("lora" in name for name in model.state_dict())


def test_all_contradictions_are_said_together() -> None:
    config = lora.LoraConfig(target_modules=["q_proj"], use_dora=True, lora_bias=True, bias="all")
    with pytest.raises(lora.LoraError, match=r"(?s)use_dora and lora_bias.*lora_bias and bias"):
        lora.inject(llama(), config)


@pytest.mark.parametrize("kind", ["VERA", "LOHA", "LOKR", "ADALORA", "IA3", "OFT", "TRAINABLE_TOKENS"])
def test_other_kinds_of_peft_are_named_when_they_are_refused(kind: str) -> None:
    with pytest.raises(lora.LoraError, match=f"peft_type '{kind}', expected 'LORA'"):
        lora.LoraConfig.from_dict({"peft_type": kind, "target_modules": ["q_proj"]})
