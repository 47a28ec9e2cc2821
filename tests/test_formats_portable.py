"""Portable export: what is refused and why, what is reported, and round trips of GGUF and MLX files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import safetensors.torch
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import loralib as lora
from loralib.adapter import Adapter, adapter_of
from loralib.combine import updates_of
from loralib.config import LoraConfig
from loralib.errors import AdapterError, ConfigError, FormatError, LoraError
from loralib.formats import check_portable, export, make_portable, read_adapter, read_gguf, write_gguf, write_mlx
from loralib.formats.gguf import gguf_names, parse_gguf
from loralib.formats.portable import TARGETS

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama(**more: Any) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**(SIZES | {"tie_word_embeddings": False} | more))
    ).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1)
    ).eval()


def tiny(kind: str, **more: Any) -> Any:
    """A causal language model on the meta device: only names and shapes matter."""
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **heads, "tie_word_embeddings": False, **more})
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def classifier(kind: str) -> Any:
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = getattr(transformers, f"{kind}Config")(
        **sizes, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0
    )
    torch.manual_seed(0)
    return transformers.AutoModelForSequenceClassification.from_config(config)


def adapter_on(base: nn.Module, seed: int = 0, **more: Any) -> Adapter:
    model = copy.deepcopy(base)
    lora.inject(model, LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "up_proj"], **more}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return adapter_of(model)


# Refusals.

REFUSED: list[tuple[str, Any, dict[str, Any], str]] = [
    ("vllm", llama, {"modules_to_save": ["lm_head"]}, r"modules_to_save \['lm_head'\].*merge"),
    ("mlx", llama, {"bias": "all"}, r"bias 'all'.*merge"),
    ("llamacpp", lambda: llama(tie_word_embeddings=True), {"target_modules": ["embed_tokens"]}, "shares its weight"),
    (
        "llamacpp",
        lambda: llama(tie_word_embeddings=True),
        {"target_modules": ["lm_head"]},
        "shares its weight with model.e",
    ),
    ("mlx", lambda: llama(tie_word_embeddings=True), {"target_modules": ["lm_head", "q_proj"]}, "shares its weight"),
    ("vllm", lambda: llama(tie_word_embeddings=True), {"target_modules": ["embed_tokens"]}, "shares its weight"),
    ("vllm", gpt2, {"target_modules": ["c_attn"]}, "no adapters on GPT2LMHeadModel"),
    ("vllm", lambda: tiny("Olmo"), {}, "no adapters on OlmoForCausalLM"),
    ("vllm", lambda: tiny("Bloom"), {"target_modules": ["query_key_value"]}, "no adapters on BloomForCausalLM"),
    ("vllm", lambda: tiny("Falcon"), {"target_modules": ["query_key_value"]}, "no adapters on FalconForCausalLM"),
    ("vllm", lambda: tiny("GPTJ", n_embd=16, n_layer=1, n_head=2, rotary_dim=4), {}, "no adapters on GPTJForCausalLM"),
    (
        "vllm",
        lambda: tiny("Qwen2"),
        {"target_modules": ["embed_tokens", "q_proj"]},
        "model.embed_tokens: vLLM does not load",
    ),
    (
        "vllm",
        lambda: tiny("Qwen2"),
        {"target_modules": ["lm_head"]},
        "lm_head: vLLM does not load adapters for the head of",
    ),
    (
        "vllm",
        lambda: tiny("Mistral"),
        {"target_modules": ["embed_tokens"]},
        "adapters for embeddings of MistralForCausalLM",
    ),
    ("vllm", lambda: tiny("Olmo2"), {"target_modules": ["lm_head"]}, "adapters for the head of Olmo2ForCausalLM"),
    ("vllm", lambda: tiny("Glm4"), {"target_modules": ["gate_up_proj"]}, "gate_proj and up_proj of Glm4ForCausalLM"),
    ("vllm", llama, {"modules_to_save": ["norm"]}, "only the head of a classifier"),
    ("vllm", llama, {"modules_to_save": ["lm_head", "norm"]}, "only the head of a classifier"),
    ("llamacpp", lambda: classifier("Llama"), {"modules_to_save": ["score"]}, r"modules_to_save \['score'\]"),
    (
        "llamacpp",
        gpt2,
        {"target_modules": ["wpe", "c_attn"]},
        "transformer.wpe: llama.cpp does not apply adapters to this module",
    ),
    ("llamacpp", gpt2, {"target_modules": ["wte"]}, "transformer.wte shares its weight with lm_head"),
    (
        "llamacpp",
        lambda: tiny("Qwen3Moe", num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8),
        {"target_modules": None, "target_parameters": ["experts.down_proj"]},
        "mlp.experts: adapters of experts and routers cannot be written for llama.cpp.*loralib merge",
    ),
    ("mlx", llama, {"lora_bias": True}, "lora_bias"),
]


@pytest.mark.parametrize(("target", "base", "config", "expected"), REFUSED)
def test_refused_before_training_with_the_reason(target: str, base: Any, config: dict[str, Any], expected: str) -> None:
    with pytest.raises(AdapterError, match=f"(?s){expected}"):
        check_portable(LoraConfig(**{"target_modules": ["q_proj"], **config}), base(), target)


@pytest.mark.parametrize("config", [{"lora_bias": True}, {"trainable_token_indices": [3]}])
def test_peft_reads_what_it_has_itself(config: dict[str, Any]) -> None:
    check_portable(LoraConfig(target_modules=["q_proj"], **config), llama(), "peft")


def test_all_reasons_are_told_at_once() -> None:
    config = LoraConfig(target_modules=["embed_tokens", "lm_head"], bias="all")
    with pytest.raises(AdapterError) as caught:
        check_portable(config, llama(tie_word_embeddings=True), "llamacpp")
    assert len(str(caught.value).splitlines()) == 5


@pytest.mark.parametrize("target", TARGETS)
def test_ordinary_configs_are_welcome(target: str) -> None:
    check_portable(
        LoraConfig(target_modules="all-linear", use_rslora=True, rank_pattern={"q_proj": 3}), llama(), target
    )
    # Only names and shapes count, so the weights need not be there.
    with torch.device("meta"):
        check_portable(LoraConfig(target_modules=["q_proj"]), llama(tie_word_embeddings=True), target)


@pytest.mark.parametrize(
    ("base", "config"),
    [
        (lambda: tiny("Qwen2"), {}),
        (lambda: tiny("Qwen3"), {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
        (lambda: tiny("Phi3"), {"target_modules": ["qkv_proj", "lm_head"]}),
        (lambda: tiny("Cohere"), {"target_modules": ["q_proj", "embed_tokens"]}),
        (lambda: classifier("Qwen2"), {"modules_to_save": ["score"]}),
    ],
)
def test_what_vllm_loads_is_not_refused(base: Any, config: dict[str, Any]) -> None:
    check_portable(LoraConfig(**{"target_modules": ["q_proj"], **config}), base(), "vllm")


def test_a_classifiers_head_goes_to_vllm_under_the_name_that_it_reads(tmp_path: Path) -> None:
    model = classifier("Qwen2")
    adapter = adapter_on(model, modules_to_save=["score"], task_type="SEQ_CLS")
    export(make_portable(adapter, "vllm", model), "vllm", tmp_path, model)
    names = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(names["base_model.model.score.weight"], adapter.tensors["score.weight"])


def test_unknown_things_are_named() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'llamacpp'"):
        check_portable(LoraConfig(target_modules=["q_proj"]), llama(), "llama.cpp")
    torch.manual_seed(0)
    other = transformers.AutoModelForCausalLM.from_config(transformers.OPTConfig(**SMALL_OPT))
    for target, hint in (("llamacpp", "convert_lora_to_gguf.py"), ("mlx", "Merge")):
        with pytest.raises(AdapterError, match=f"(?s)opt.*{hint}"):
            check_portable(LoraConfig(target_modules=["q_proj"]), other, target)
    adapter = adapter_on(llama())
    for target in ("llamacpp", "mlx"):
        with pytest.raises(AdapterError, match="give the base"):
            export(make_portable(adapter, target), target, "nowhere")


SMALL_OPT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "ffn_dim": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "word_embed_proj_dim": 16,
}


def test_vllm_is_told_its_rank() -> None:
    adapter = adapter_on(llama(), r=9)
    assert "start vLLM with --enable-lora --max-lora-rank 16" in make_portable(adapter, "vllm").notes
    wide = Adapter(
        LoraConfig(r=600, lora_alpha=600, target_modules=["q_proj"]),
        {"q_proj.lora_A": torch.ones(600, 2), "q_proj.lora_B": torch.ones(2, 600)},
    )
    with pytest.raises(AdapterError, match="up to 512, but this adapter has rank 600"):
        make_portable(wide, "vllm")
    assert make_portable(wide, "vllm", r=8).error < 1e-6


# The form.


@given(
    ranks=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    alphas=st.tuples(st.floats(-8, 8).filter(lambda x: abs(x) > 0.1), st.floats(0.5, 8)),
    rslora=st.booleans(),
    target=st.sampled_from(list(TARGETS)),
)
@settings(max_examples=30, deadline=None)
def test_the_update_is_the_same(ranks: tuple[int, int], alphas: tuple[float, float], rslora: bool, target: str) -> None:
    adapter = adapter_on(
        llama(),
        r=ranks[1],
        rank_pattern={"q_proj": ranks[0]},
        lora_alpha=alphas[0],
        alpha_pattern={"up_proj": alphas[1]},
        use_rslora=rslora,
    )
    portable = make_portable(adapter, target)
    config = portable.adapter.config
    assert config.r == config.lora_alpha == max(ranks)
    assert (config.use_rslora, config.rank_pattern, config.alpha_pattern, config.enable_lora) == (False, {}, {}, {})
    assert portable.error == 0
    theirs = updates_of(portable.adapter)
    for name, update in updates_of(adapter).items():
        expected = update.scaling * update.B @ update.A
        torch.testing.assert_close(
            theirs[name].scaling * theirs[name].B @ theirs[name].A, expected, rtol=1e-5, atol=1e-5
        )


def test_notes_say_what_was_done() -> None:
    base = gpt2()
    adapter = adapter_on(
        base, target_modules=["c_attn", "c_fc"], enable_lora={"c_attn": [True, False, True]}, rank_pattern={"c_fc": 1}
    )
    notes = " ".join(make_portable(adapter, "peft", base).notes)
    for said in ("fused blocks are written", "scaling is now part of B", "now have rank 4, the smaller ones padded"):
        assert said in notes
    plain = Adapter(
        LoraConfig(r=2, lora_alpha=2, target_modules=["q"]),
        {"q.lora_A": torch.ones(2, 3), "q.lora_B": torch.ones(4, 2)},
    )
    assert make_portable(plain, "peft").notes == ()
    assert "off by" in make_portable(adapter_on(llama()), "peft", r=1).notes[0]


def test_narrow_tensors_stay_narrow_where_nothing_is_lost() -> None:
    adapter = adapter_on(llama(), lora_alpha=4)
    half = Adapter(adapter.config, {name: t.bfloat16() for name, t in adapter.tensors.items()})
    assert {t.dtype for t in make_portable(half, "peft").adapter.tensors.values()} == {torch.bfloat16}
    odd = Adapter(adapter.config.replace(lora_alpha=3), half.tensors)
    kinds = {name[-1]: t.dtype for name, t in make_portable(odd, "peft").adapter.tensors.items()}
    assert kinds == {"A": torch.bfloat16, "B": torch.float32}


def test_damage_is_not_exported() -> None:
    adapter = adapter_on(llama())
    name = next(iter(adapter.tensors))
    broken = Adapter(adapter.config, {**adapter.tensors, name: torch.full_like(adapter.tensors[name], float("nan"))})
    with pytest.raises(AdapterError, match=f"{name}: holds NaN"):
        make_portable(broken, "peft")
    large = Adapter(adapter.config, {n: t * 1e6 for n, t in adapter.tensors.items()})
    with pytest.raises(AdapterError, match="infinite"):
        export(make_portable(large, "peft"), "peft", "nowhere", dtype=torch.float16)
    assert not Path("nowhere").exists()


def test_what_was_written_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bit that the disk changed is detected."""
    from loralib.formats import portable as module

    def bad_read(path: Any) -> Adapter:
        read = lora.read_adapter(path)
        name = next(iter(read.tensors))
        return Adapter(read.config, {**read.tensors, name: read.tensors[name] * (1 + 1e-6)}, read.metadata)

    monkeypatch.setattr(module, "read_peft", bad_read)
    with pytest.raises(AdapterError, match=r"(?s)does not read back as it was written.*lora_[AB] differs"):
        export(make_portable(adapter_on(llama()), "peft"), "peft", tmp_path)


# GGUF.


@pytest.mark.parametrize("make", [llama, gpt2])
def test_gguf_there_and_back(make: Any, tmp_path: Path) -> None:
    base = make()
    adapter = adapter_on(base, target_modules="all-linear", rank_pattern={"0.*": 3})
    write_gguf(adapter, tmp_path / "a.gguf", base)
    back = read_gguf(tmp_path / "a.gguf", base)
    assert all(torch.equal(tensor, back.tensors[name]) for name, tensor in adapter.tensors.items())
    assert len(back.tensors) == len(adapter.tensors)
    assert {name: u.scaling for name, u in updates_of(back).items()} == {
        name: u.scaling for name, u in updates_of(adapter).items()
    }
    assert back.metadata == adapter.metadata
    # And as the reference reader sees it.
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    fields, tensors = parse_gguf((tmp_path / "a.gguf").read_bytes())
    assert fields["adapter.lora.alpha"] == 3
    assert {t.name for t in reader.tensors} == set(tensors)
    for found in reader.tensors:
        torch.testing.assert_close(torch.tensor(found.data), tensors[found.name])


def test_gguf_of_quantised_adapters(tmp_path: Path) -> None:
    """llama.cpp's converter can write Q8_0."""
    base = llama(hidden_size=32)
    values = torch.randn(2, 32)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("blk.0.attn_v.weight.lora_a", gguf.quants.quantize(values.numpy(), kind), raw_dtype=kind)
    writer.add_tensor("blk.0.attn_v.weight.lora_b", torch.ones(16, 2).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    back = read_gguf(tmp_path / "a.gguf", base)
    torch.testing.assert_close(back.tensors["model.layers.0.self_attn.v_proj.lora_A"], values, rtol=0, atol=0.03)
    assert updates_of(back)["model.layers.0.self_attn.v_proj"].scaling == 2


def test_gguf_refusals(tmp_path: Path) -> None:
    base = llama()
    write_gguf(adapter_on(base), tmp_path / "a.gguf", base)
    with pytest.raises(AdapterError, match="give the base model"):
        read_adapter(tmp_path / "a.gguf")
    with pytest.raises(AdapterError, match="architecture 'llama', but the base model GPT2LMHeadModel is 'gpt2'"):
        read_gguf(tmp_path / "a.gguf", gpt2())
    with pytest.raises(AdapterError, match=r"(?s)does not fit the base model.*blk\.1\.attn_q"):
        read_gguf(tmp_path / "a.gguf", llama(num_hidden_layers=1))
    with pytest.raises(AdapterError, match="scaling is not the same alpha"):
        write_gguf(adapter_on(base, use_rslora=True), tmp_path / "b.gguf", base)
    model = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(model, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(FormatError, match="not a LoRA adapter"):
        read_gguf(model, base)
    assert "position_embd" not in gguf_names(gpt2()).values()


# MLX.


def test_mlx_settings(tmp_path: Path) -> None:
    base = llama(num_hidden_layers=3)
    adapter = adapter_on(base, layers_to_transform=[1, 2], target_modules=["q_proj", "down_proj"])
    export(make_portable(adapter, "mlx", base), "mlx", tmp_path, base)
    written = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert written["fine_tune_type"] == "lora"
    assert written["num_layers"] == 2
    assert written["lora_parameters"] == {
        "rank": 2,
        "scale": 1.0,
        "dropout": 0.0,
        "keys": ["self_attn.q_proj", "mlp.down_proj"],
    }
    with pytest.raises(AdapterError, match="give the base model"):
        read_adapter(tmp_path)
    with pytest.raises(AdapterError, match="no such adapter tensor"):
        read_adapter(tmp_path, model=gpt2())


def test_mlx_adapters_from_mlx_lm(tmp_path: Path) -> None:
    """A scale that is not 1, and DoRA, as mlx-lm's training writes them."""
    base = llama()
    adapter = adapter_on(base, lora_alpha=40)
    write_mlx(adapter, tmp_path, base)
    back = read_adapter(tmp_path, model=base)
    assert updates_of(back)["model.layers.0.self_attn.q_proj"].scaling == 20
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "adapters.safetensors")
    tensors |= {name.replace("lora_a", "m"): torch.ones(t.shape[0]) for name, t in tensors.items() if "lora_a" in name}
    save_file(tensors, tmp_path / "adapters.safetensors")
    values = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    (tmp_path / "adapter_config.json").write_text(json.dumps({**values, "fine_tune_type": "dora"}), encoding="utf-8")
    dora = read_adapter(tmp_path, model=base)
    assert dora.config.use_dora
    assert dora.tensors["model.layers.0.self_attn.q_proj.lora_magnitude_vector"].shape == (16,)
    for change, expected in (
        ({"fine_tune_type": "full"}, "fine_tune_type is 'full'"),
        ({"lora_parameters": {"rank": 2}}, "scale is None"),
        ({"lora_parameters": 3}, "no lora_parameters"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**values, **change}), encoding="utf-8")
        with pytest.raises(LoraError, match=expected):
            read_adapter(tmp_path, model=base)
