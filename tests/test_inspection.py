"""Inspection: statistics without the full update matrix, and every fault of an adapter in plain words."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import loralib as lora
from loralib.adapter import Adapter, adapter_of
from loralib.config import LoraConfig
from loralib.delta import effective_rank, product_svd
from loralib.errors import AdapterError, ConfigError, TargetError
from loralib.inspection import CheckResult, inspect_adapter, plot, verify


class Characters:
    """A tokenizer with one token per letter; "." is the end token."""

    eos_token_id: int | None = 1
    bos_token_id = None
    pad_token_id = 1
    name_or_path = "characters"
    chat_template = None
    all_special_ids = (1,)

    def __call__(self, text: str | list[str], **kwargs: Any) -> dict[str, Any]:
        if isinstance(text, list):
            return {"input_ids": [self(one)["input_ids"] for one in text]}
        return {"input_ids": [ord(char) % 48 for char in text]}

    def encode(self, text: str, **kwargs: Any) -> list[int]:
        return [ord(char) % 48 for char in text]

    def decode(self, ids: Any, **kwargs: Any) -> str:
        return "".join(chr(97 + int(i) % 26) for i in ids)

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        return chr(97 + ids % 26) if isinstance(ids, int) else [chr(97 + i % 26) for i in ids]


PROMPTS = ["hello there", "abc"]


@pytest.fixture(scope="module")
def base() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config).eval()


def trained(base: nn.Module, learned: bool = True, **more: Any) -> Adapter:
    model = copy.deepcopy(base)
    lora.inject(model, LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **more}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and (learned or not name.endswith("lora_B")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return adapter_of(model)


def told(checks: list[CheckResult] | tuple[CheckResult, ...], level: str) -> str:
    return "\n".join(str(check) for check in checks if check.level == level)


@given(
    r=st.integers(1, 8),
    outputs=st.integers(1, 12),
    inputs=st.integers(1, 12),
    scaling=st.floats(-3, 3).filter(lambda x: abs(x) > 1e-3),
)
@settings(max_examples=60, deadline=None)
def test_singular_values_of_the_whole_update(r: int, outputs: int, inputs: int, scaling: float) -> None:
    A, B = torch.randn(r, inputs), torch.randn(outputs, r)
    whole = scaling * B.double() @ A.double()
    U, S, Vh = product_svd(A, B, scaling)
    torch.testing.assert_close(U @ torch.diag(S) @ Vh, whole)
    torch.testing.assert_close(S, torch.linalg.svdvals(whole)[: len(S)], rtol=1e-9, atol=1e-9)
    assert S.shape[0] == min(r, outputs, inputs)
    assert 1 - 1e-9 <= effective_rank(S) <= len(S) + 1e-9


def test_what_an_adapter_is(base: Any) -> None:
    adapter = trained(base, rank_pattern={"q_proj": 1}, use_rslora=True)
    inspection = inspect_adapter(adapter)
    views = {view.name: view for view in inspection.modules}
    view = views["model.layers.1.mlp.down_proj"]
    A, B = (adapter.tensors[f"{view.name}.lora_{half}"] for half in "AB")
    whole = 6 / 3**0.5 * B @ A
    assert (view.shape, view.r) == ((16, 24), 3)
    assert view.norm == pytest.approx(float(whole.norm()), rel=1e-5)
    assert view.singular_values == pytest.approx(torch.linalg.svdvals(whole)[:3].tolist(), rel=1e-4)
    assert views["model.layers.0.self_attn.q_proj"].effective_rank == pytest.approx(1)
    text = str(inspection)
    for said in ("3 (q_proj: 1)", "use_rslora", "self_attn.q_proj", "mlp.down_proj", "8 float32", "llama.cpp"):
        assert said in text
    assert "model.layers.0.self_attn.q_proj" in inspection.by_layer()


def test_where_it_can_be_used(base: Any) -> None:
    uses = inspect_adapter(trained(base)).uses
    assert uses["peft"] == uses["vllm"] == "yes, as it is"
    assert uses["llamacpp"].startswith("after loralib convert --target llamacpp")
    assert "convert" in inspect_adapter(trained(base, alpha_pattern={"q_proj": 2})).uses["vllm"]
    for more in ({"modules_to_save": ["lm_head"]}, {"bias": "all"}):
        uses = inspect_adapter(trained(base, **more)).uses
        assert uses["peft"].startswith("yes")
        assert all(uses[target].startswith("no: ") for target in ("vllm", "llamacpp", "mlx"))
    classifier = transformers.LlamaForSequenceClassification(base.config)
    uses = inspect_adapter(trained(classifier, modules_to_save=["score"])).uses
    assert uses["vllm"] == "yes, as it is, on a base that has a head of the same size"
    assert uses["llamacpp"].startswith("no: ")
    dora = trained(base)
    dora = Adapter(dora.config.replace(use_dora=True), dora.tensors)
    assert "DoRA becomes plain LoRA" in inspect_adapter(dora).uses["vllm"]


def test_faults_that_show_without_a_base(base: Any) -> None:
    nothing = inspect_adapter(trained(base, learned=False))
    assert "nothing was learned" in told(nothing.checks, "fault")
    some = trained(base)
    name = "model.layers.0.self_attn.q_proj.lora_B"
    some = Adapter(some.config, {**some.tensors, name: torch.zeros_like(some.tensors[name])})
    assert "1 of 4 modules learned nothing: model.layers.0" in told(inspect_adapter(some).checks, "warning")
    broken = Adapter(some.config, {k: t for k, t in some.tensors.items() if k != name})
    assert "lora_B is missing" in told(inspect_adapter(broken).checks, "fault")
    assert len(inspect_adapter(broken).modules) == 3
    scaled = told(inspect_adapter(trained(base, use_rslora=True, alpha_pattern={"q_proj": 1})).checks, "warning")
    assert "would scale by 2 instead of 3.464" in scaled
    assert "alpha_pattern" in scaled
    odd = Adapter(some.config.replace(init_lora_weights="pissa"), some.tensors)
    assert "would add the adapter to the wrong base" in told(inspect_adapter(odd).checks, "warning")


def test_heat_map(base: Any, tmp_path: Path) -> None:
    plot(inspect_adapter(trained(base, target_modules=["q_proj", "down_proj", "lm_head"])), tmp_path / "norms.png")
    assert (tmp_path / "norms.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(AdapterError, match="no valid factors"):
        plot(inspect_adapter(Adapter(LoraConfig(target_modules=["x"]), {})), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_verify_a_good_adapter(base: Any) -> None:
    before = copy.deepcopy(base.state_dict())
    checks = verify(base, Characters(), trained(base), PROMPTS, max_new_tokens=8)
    assert told(checks, "fault") == ""
    good = told(checks, "ok")
    for said in (
        "base that the adapter was trained on",
        "moves logits",
        "merged: logits differ",
        "for PEFT",
        "for llama.cpp",
        "for MLX",
        "for vLLM",
    ):
        assert said in good
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert set(before) == set(base.state_dict())


def test_verify_names_the_wrong_base(base: Any) -> None:
    other = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    assert "wrong base: the parameters have the same shapes" in told(
        verify(other, Characters(), trained(base), PROMPTS), "fault"
    )
    adapter = trained(base)
    strange = Adapter(adapter.config, adapter.tensors)
    assert "does not record which base" in told(
        verify(base, Characters(), strange, PROMPTS, max_new_tokens=2), "warning"
    )
    small = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=48, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    )
    wrong = told(verify(small, Characters(), adapter, PROMPTS), "fault")
    assert "wrong base: LlamaForCausalLM has different parameters" in wrong
    assert "misshapen" in wrong or "missing" in wrong or "unexpected" in wrong


def test_verify_names_unexpected_tensors_and_no_effect(base: Any) -> None:
    adapter = trained(base)
    extra = Adapter(adapter.config, {**adapter.tensors, "model.norm.extra": torch.ones(2)}, adapter.metadata)
    assert "unexpected" in told(verify(base, Characters(), extra, PROMPTS), "fault")
    # B is not zero, but the input of a layer that nothing follows is: no logit moves.
    silent = copy.deepcopy(base)
    with torch.no_grad():
        for layer in silent.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    quiet = trained(silent, target_modules=["q_proj"])
    assert "changes no logit" in told(verify(silent, Characters(), quiet, PROMPTS, max_new_tokens=2), "fault")


def test_verify_looks_for_the_end(base: Any) -> None:
    adapter = trained(base)
    never = copy.deepcopy(base)
    with torch.no_grad():
        never.lm_head.weight[1] = 0  # the end token's logit stays at 0, others go above
    checks = verify(never, Characters(), trained(never), PROMPTS, max_new_tokens=5)
    assert "0 of 2 continuations end" in told(checks, "warning")
    assert "end token missing" in told(checks, "warning")
    endless = Characters()
    endless.eos_token_id = None
    assert "has no end token" in told(verify(base, endless, adapter, PROMPTS, max_new_tokens=2), "fault")


def test_verify_says_why_a_tool_cannot_use_it(base: Any) -> None:
    adapter = trained(base, modules_to_save=["lm_head"])
    checks = verify(base, Characters(), adapter, PROMPTS, max_new_tokens=2)
    for title in ("vLLM", "llama.cpp", "MLX"):
        assert f"cannot be used in {title}" in told(checks, "warning")
    assert "exported for PEFT" in told(checks, "ok")


def test_verify_finds_a_merge_that_goes_wrong(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import loralib.layers as layers

    monkeypatch.setattr(layers, "add_delta", lambda weight, delta: weight)
    checks = verify(base, Characters(), trained(base), PROMPTS, max_new_tokens=2)
    assert "merged: logits differ by" in told(checks, "fault")


def test_verify_wants_a_plain_base_and_prompts(base: Any) -> None:
    model = copy.deepcopy(base)
    lora.inject(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TargetError, match="plain base"):
        verify(model, Characters(), trained(base), PROMPTS)
    with pytest.raises(ConfigError, match="at least one prompt"):
        verify(base, Characters(), trained(base), [])
