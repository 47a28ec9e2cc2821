"""Merged models: what from_pretrained loads computes what base plus adapter computed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import loralib as lora
from loralib.adapter import Adapter, adapter_of, apply_adapter
from loralib.config import LoraConfig
from loralib.errors import AdapterError, BaseMismatchError, MergeError, OutputError, TargetError
from loralib.formats import MergeReport, merge_and_compare, merge_into, read_adapter, save_merged

SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
IDS = torch.tensor([3, 14, 15, 9, 2, 6])


def qwen2(**more: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**(SIZES | {"tie_word_embeddings": True} | more))
    return transformers.Qwen2ForCausalLM(config).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=48, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1)
    return transformers.GPT2LMHeadModel(config).eval()


def adapted(base: nn.Module, **more: Any) -> Any:
    model = copy.deepcopy(base)
    lora.inject(model, LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": "all-linear", **more}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS[None]).logits[0].float()


CASES: dict[str, tuple[Any, dict[str, Any], bool]] = {
    "linear layers": (qwen2, {}, True),
    "Conv1D, fused blocks": (
        gpt2,
        {"target_modules": ["c_attn", "c_fc"], "enable_lora": {"c_attn": [True, False, True]}},
        True,
    ),
    "tied embedding": (qwen2, {"target_modules": ["embed_tokens", "q_proj"]}, False),
    "tied head": (gpt2, {"target_modules": ["lm_head"]}, False),
    "tied head trained in full": (qwen2, {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}, False),
    "biases": (qwen2, {"bias": "all", "target_modules": ["q_proj"]}, True),
}


@pytest.mark.parametrize("case", CASES)
def test_from_pretrained_computes_the_same(case: str, tmp_path: Path) -> None:
    make, config, tied = CASES[case]
    base = make()
    model = adapted(base, **config)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    merged = copy.deepcopy(base)
    assert merge_into(merged, adapter_of(model)) == len(adapter_of(model).modules)
    assert not any("lora_" in name for name in merged.state_dict())
    assert type(merged) is type(base)
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=1e-5)
    save_merged(merged, tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["tie_word_embeddings"] is tied
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) is tied
    names = {name for file in tmp_path.glob("*.safetensors") for name in tensor_names(file)}
    assert any(name.startswith("lm_head") for name in names) is not tied
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def tensor_names(path: Path) -> list[str]:
    from loralib.formats.tensors import read_safetensors

    return list(read_safetensors(path)[0])


def test_large_models_take_several_files_and_replace_what_stood_there(tmp_path: Path) -> None:
    base = qwen2()
    model = adapted(base)
    merged = copy.deepcopy(base)
    merge_into(merged, adapter_of(model))
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    save_merged(base, tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    files = save_merged(merged, tmp_path, max_shard_size="10KB")
    assert sum(name.endswith(".safetensors") for name in files) > 1
    assert not (tmp_path / "model.safetensors").exists()
    torch.testing.assert_close(
        logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(model), rtol=0, atol=1e-5
    )
    save_merged(merged, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("model*")) == ["model.safetensors"]
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_report_stands_beside_the_rounding_to_be_expected(dtype: torch.dtype) -> None:
    base = qwen2()
    model = adapted(base)
    merged = copy.deepcopy(base)
    report = merge_and_compare(merged, adapter_of(model), [IDS, IDS[:3]], dtype)
    assert report.as_expected
    assert report.modules == 14
    assert {parameter.dtype for parameter in merged.parameters()} == {dtype}
    low, high = {torch.float32: (0, 1e-5), torch.float16: (1e-5, 0.05), torch.bfloat16: (1e-4, 0.4)}[dtype]
    assert low <= report.mean_difference <= report.max_difference < high
    assert report.expected_max < high
    rounded = copy.deepcopy(merged).float()
    torch.testing.assert_close(
        float((logits(rounded) - logits(model)).abs().max()), report.max_difference, rtol=0.5, atol=1e-5
    )
    assert "explained by rounding" in str(report)


def test_rounding_that_adds_up_is_expected() -> None:
    """A base that was quantised before: all weights have one of a few values, whose rounding errors have one sign."""
    base = qwen2()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(torch.where(parameter.abs() > 0.1, 0.2505, 0.01003))  # above and below what bf16 has
    adapter = adapter_of(adapted(base, r=1))
    small = Adapter(adapter.config, {name: t * 1e-3 for name, t in adapter.tensors.items()}, adapter.metadata)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    report = merge_and_compare(copy.deepcopy(base), small, [IDS], torch.bfloat16)
    assert report.as_expected, report
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_more_than_rounding_is_seen() -> None:
    report = MergeReport(1.0, 0.1, 0.1, 0.01, torch.bfloat16, 4)
    assert not report.as_expected
    assert "MORE than rounding" in str(report)


def test_a_fault_in_one_tensor_is_seen_though_rounding_is_coarser(monkeypatch: pytest.MonkeyPatch) -> None:
    """For example rows of the head that the model does not multiply with: few logits differ, by less than rounding."""
    base = qwen2()
    adapter = adapter_of(adapted(base, r=2, target_modules=["q_proj", "lm_head"]))

    def wrong(model: Any, adapter: Adapter, **more: Any) -> int:
        modules = merge_into(model, adapter, **more)
        with torch.no_grad():
            model.lm_head.weight[3] *= 1.02
        return modules

    assert merge_and_compare(copy.deepcopy(base), adapter, [IDS], torch.bfloat16).as_expected
    monkeypatch.setattr("loralib.formats.merged.merge_into", wrong)
    report = merge_and_compare(copy.deepcopy(base), adapter, [IDS], torch.bfloat16)
    assert report.mean_difference < 3 * report.expected_mean
    assert not report.as_expected


def test_rounding_that_sends_a_token_to_another_expert_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(330)  # with these weights, bf16 changes the choice of an expert
    experts = {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 1, "decoder_sparse_step": 1}
    base = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES, **experts)).eval()
    places = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    adapter, prompts = adapter_of(adapted(base, **places)), [IDS, IDS[:3]]
    report = merge_and_compare(copy.deepcopy(base), adapter, prompts, torch.bfloat16)
    assert report.mean_difference > 10 * report.expected_mean
    assert report.as_expected
    assert "explained by rounding, which sends some tokens to other experts" in str(report)

    def wrong(model: Any, adapter: Adapter, **more: Any) -> int:
        modules = merge_into(model, adapter, **more)
        model.model.layers[0].mlp.experts.down_proj.data[0] *= 1.01  # of a single expert
        return modules

    monkeypatch.setattr("loralib.formats.merged.merge_into", wrong)
    assert "MORE than rounding" in str(merge_and_compare(base, adapter, prompts, torch.bfloat16))


def test_a_weight_that_is_not_what_the_file_says_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from loralib import layers
    from loralib.formats import merged as module

    base, adapter = qwen2(), adapter_of(adapted(qwen2(), modules_to_save=["norm"]))
    right = module.add_delta
    changed = {**adapter.tensors, "model.norm.weight": torch.full_like(adapter.tensors["model.norm.weight"], 2)}
    other = Adapter(adapter.config, changed, adapter.metadata)
    factors = r"q_proj.weight: is not the base weight plus the adapter's update"
    for place, name, wrong, expected in (
        (module, "add_delta", lambda weight, delta: right(weight, delta * 1.001), factors),
        (module, "add_delta", lambda weight, delta: weight, factors),
        # Also where the layers compute the same wrong thing, so that logits would agree with them.
        (layers.LoRALinear, "delta_weight", lambda layer: torch.zeros_like(layer.base_weight), factors),
        (
            module,
            "apply_adapter",
            lambda model, _, **more: apply_adapter(model, adapter, **more),
            "norm.weight: is not the",
        ),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, wrong)
            with pytest.raises(MergeError, match=expected):
                merge_into(base, other)
    assert merge_into(base, adapter) == 14


def llama(**more: Any) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(SIZES | more))).eval()


@pytest.mark.filterwarnings("default")  # PEFT's, about biases
@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (qwen2, ["q_proj", "v_proj"]),  # which have biases
        (llama, ["q_proj", "down_proj"]),  # which get them, as all projections of attention and MLP do
        (gpt2, ["c_attn", "c_fc"]),
    ],
)
def test_biases_of_B_become_biases_of_the_layers(make: Any, targets: list[str], tmp_path: Path) -> None:
    from peft import LoraConfig as Config
    from peft import get_peft_model

    base = make()
    config = Config(r=2, lora_alpha=6, lora_bias=True, target_modules=targets, fan_in_fan_out=make is gpt2)
    theirs = get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.rand_like(parameter) * 0.1)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    assert merge_and_compare(base, read_adapter(tmp_path / "adapter"), [IDS], torch.float32).as_expected
    save_merged(base, tmp_path / "merged")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(loaded), logits(theirs), rtol=0, atol=1e-4)


def test_biases_without_a_place_are_refused(tmp_path: Path) -> None:
    adapter = adapter_of(adapted(qwen2(), target_modules=["down_proj"]))
    biases = {f"{name}.lora_B.bias": torch.ones(16) for name in adapter.modules}
    wide = Adapter(adapter.config.replace(lora_bias=True), {**adapter.tensors, **biases}, adapter.metadata)
    with pytest.raises(
        MergeError, match=r"(?s)down_proj: Qwen2ForCausalLM has no bias in this module.*PeftModel.from_pretrained"
    ):
        merge_into(qwen2(), wide)


@pytest.mark.parametrize("make", [qwen2, gpt2])
@pytest.mark.parametrize("kind", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_dora_and_pissa_merge_exactly(make: Any, kind: dict[str, Any], tmp_path: Path) -> None:
    import warnings

    from peft import LoraConfig as Config
    from peft import PeftModel, get_peft_model

    base = make()
    targets = ["c_attn", "c_fc"] if make is gpt2 else ["q_proj", "down_proj"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(
            copy.deepcopy(base), Config(r=2, target_modules=targets, fan_in_fan_out=make is gpt2, **kind)
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.add_(torch.rand_like(parameter) * 0.1)
        model.save_pretrained(str(tmp_path))
        theirs = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    merged = copy.deepcopy(base)
    merge_into(merged, read_adapter(tmp_path))
    torch.testing.assert_close(logits(merged), logits(theirs), rtol=0, atol=1e-4)
    report = merge_and_compare(copy.deepcopy(base), read_adapter(tmp_path), [IDS], torch.bfloat16)
    assert report.as_expected


def test_nothing_is_merged_where_something_is_wrong(tmp_path: Path) -> None:
    base = qwen2()
    adapter = adapter_of(adapted(base))
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    kind = type(base.model.layers[0].self_attn.q_proj)

    def unchanged() -> bool:
        same = all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
        return same and type(base.model.layers[0].self_attn.q_proj) is kind and len(base.state_dict()) == len(before)

    name = "model.layers.1.mlp.up_proj.lora_B"
    for value in (float("nan"), float("inf")):
        bad = Adapter(adapter.config, {**adapter.tensors, name: torch.full_like(adapter.tensors[name], value)})
        with pytest.raises(AdapterError, match=name):
            merge_into(base, bad)
    huge = Adapter(adapter.config, {k: t * (1e30 if "1.mlp.up" in k else 1) for k, t in adapter.tensors.items()})
    with pytest.raises(MergeError, match=r"(?s)nothing was merged.*model\.layers\.1\.mlp\.up_proj: the adapter"):
        merge_into(base, huge)
    with pytest.raises(BaseMismatchError):
        merge_into(
            base,
            Adapter(adapter.config, adapter.tensors, {"loralib.base": adapter.metadata["loralib.base"][:-1] + "x"}),
        )
    with pytest.raises(AdapterError, match="missing"):
        merge_into(base, Adapter(adapter.config, {k: t for k, t in adapter.tensors.items() if k != name}))
    assert unchanged()
    large = Adapter(adapter.config, {k: t * 500 for k, t in adapter.tensors.items()})
    with pytest.raises(MergeError, match=r"are out of range for torch.float16: they would be infinite"):
        merge_and_compare(copy.deepcopy(base), large, [IDS], torch.float16)
    with pytest.raises(TargetError, match="already holds an adapter"):
        merge_into(adapted(base), adapter)
    broken = copy.deepcopy(base)
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(MergeError, match="the base weight holds NaN"):
        merge_into(broken, adapter, allow_base_mismatch=True)


def test_directories_that_cannot_hold_a_model(tmp_path: Path) -> None:
    lora.save_adapter(adapted(qwen2()), tmp_path / "adapter")
    with pytest.raises(OutputError, match="would load on top of the merged model"):
        save_merged(qwen2(), tmp_path / "adapter")
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(OutputError, match="cannot write"):
        save_merged(qwen2(), tmp_path / "file")
    with pytest.raises(AdapterError, match="is not a transformers model"):
        save_merged(nn.Linear(2, 2), tmp_path / "plain")


def test_weights_of_the_base_in_the_file_do_not_stop_a_merge() -> None:
    base, adapter = qwen2(), adapter_of(adapted(qwen2(), target_modules=["q_proj"]))
    name = "model.layers.0.mlp.up_proj.weight"
    own = base.state_dict()[name]
    for tensor, allowed in ((own.bfloat16(), False), (own + 1, True)):
        more = Adapter(adapter.config, {**adapter.tensors, name: tensor}, adapter.metadata)
        model = copy.deepcopy(base)
        merge_into(model, more, allow_base_mismatch=allowed)
        assert torch.equal(model.state_dict()[name], own)


def test_convolutions_and_attention_modules_merge() -> None:
    torch.manual_seed(0)
    base = nn.ModuleDict(
        {"conv": nn.Conv2d(4, 6, (3, 2)), "mha": nn.MultiheadAttention(8, 2), "table": nn.Embedding(5, 4)}
    )
    model = adapted(base, r=2, target_modules=["conv", "mha", "table"])
    X, Y, Z = torch.randn(1, 4, 5, 5), torch.randn(3, 1, 8), torch.arange(5)
    assert merge_into(base, adapter_of(model)) == 4
    torch.testing.assert_close(base["conv"](X), model["conv"](X))
    torch.testing.assert_close(base["mha"](Y, Y, Y)[0], model["mha"](Y, Y, Y)[0])
    torch.testing.assert_close(base["table"](Z), model["table"](Z))
