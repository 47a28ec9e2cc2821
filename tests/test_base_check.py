"""What an adapter needs from its base, and what it contains: tables, heads, and other libraries' settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loralib as lora
from loralib.adapter import BASE, Adapter
from loralib.errors import AdapterError, BaseMismatchError, ConfigError, TargetError
from loralib.formats import merge_and_compare, read_adapter
from loralib.injection import first_fingerprint

hf = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.arange(3, 11)[None]
ADDED = torch.tensor([[5, 65, 66, 7]])  # two of the tokens that `grown` adds


def llama(**more: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, vocab_size=64, **more)).eval()


def grown(seed: int, **more: Any) -> Any:
    """A base to which tokens were added, whose rows are random."""
    model = llama(**more)
    torch.manual_seed(seed)
    model.resize_token_embeddings(68, mean_resizing=False)
    return model


def stir(model: Any) -> Any:
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.2
    return model.eval()


def trained(model: Any, target: Any = ("q_proj",), **more: Any) -> Any:
    lora.inject(model, lora.LoraConfig(r=2, lora_alpha=8, target_modules=list(target), **more))
    return stir(model)


def in_peft(model: Any, target: Any = ("q_proj",), **more: Any) -> Any:
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=list(target), **more)
    return stir(peft.get_peft_model(model, config))


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits  # type: ignore[no-any-return]


# The base.


def test_rows_of_added_tokens_are_a_part_of_the_base() -> None:
    adapter = lora.adapter_of(trained(grown(1)))
    assert lora.apply_adapter(grown(1), adapter).base == "checked"
    with pytest.raises(BaseMismatchError, match="rows of added tokens count too"):
        lora.apply_adapter(grown(2), adapter)


def test_rows_that_come_later_change_nothing() -> None:
    model = trained(llama())
    padded = llama()
    padded.resize_token_embeddings(72)
    assert lora.apply_adapter(padded, lora.adapter_of(model)).base == "checked"
    assert torch.equal(logits(padded)[..., :64], logits(model))


def test_rows_that_are_missing_are_named_and_may_be_allowed() -> None:
    adapter = lora.adapter_of(trained(grown(1)))
    with pytest.raises(BaseMismatchError, match=r"68 rows .* has 64.*resize_token_embeddings\(68\)"):
        lora.apply_adapter(llama(), adapter)
    assert lora.apply_adapter(llama(), adapter, allow_base_mismatch=True).base == "other"


def test_files_of_earlier_versions_are_checked_as_before() -> None:
    model = trained(llama())
    adapter = lora.adapter_of(model)
    first = Adapter(adapter.config, adapter.tensors, {BASE: first_fingerprint(model)})
    assert lora.apply_adapter(llama(), first).base == "checked"
    with pytest.raises(BaseMismatchError):
        lora.apply_adapter(stir(llama()), first)


SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
CLASSIFIERS: dict[str, Any] = {
    "BertForSequenceClassification": (hf.BertConfig, "SEQ_CLS", ["query", "value"]),
    "BertForTokenClassification": (hf.BertConfig, "TOKEN_CLS", ["query"]),
    "BertForQuestionAnswering": (hf.BertConfig, "QUESTION_ANS", ["query"]),
    "RobertaForSequenceClassification": (hf.RobertaConfig, "SEQ_CLS", ["query", "dense"]),
    "LlamaForSequenceClassification": (hf.LlamaConfig, "SEQ_CLS", "all-linear"),
}


def classifier(name: str, seed: int) -> Any:
    """A pretrained body under a head that is new, and random."""
    torch.manual_seed(0)
    model = getattr(hf, name)(CLASSIFIERS[name][0](**SMALL, vocab_size=64, pad_token_id=0)).eval()
    torch.manual_seed(seed)
    for key, parameter in model.named_parameters():
        if key.startswith(("classifier", "score", "qa_outputs")):
            nn.init.normal_(parameter)
    return model


def scores(model: Any) -> Tensor:
    with torch.no_grad():
        output = model(IDS)
    return output.logits if "logits" in output else torch.cat([output.start_logits, output.end_logits])  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifiers_head_goes_along_with_its_task(name: str, tmp_path: Path) -> None:
    _, task, target = CLASSIFIERS[name]
    settings = {"r": 2, "target_modules": target, "task_type": task}
    ours = classifier(name, 1)
    report = lora.inject(ours, peft.LoraConfig(**settings))  # PEFT's own settings are taken over
    theirs = peft.get_peft_model(classifier(name, 1), peft.LoraConfig(**settings))
    assert report.trainable == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    lora.save_adapter(stir(ours), tmp_path / "ours")
    stir(theirs).save_pretrained(tmp_path / "theirs")
    # Each reads the other's, on a base with another random head.
    loaded = peft.PeftModel.from_pretrained(classifier(name, 2), tmp_path / "ours").eval()
    assert torch.equal(scores(loaded), scores(ours))
    again, other = classifier(name, 3), classifier(name, 4)
    lora.load_adapter(other, tmp_path / "theirs")
    assert torch.equal(scores(other), scores(theirs))
    assert lora.load_adapter(again, tmp_path / "ours").base == "checked"
    assert torch.equal(scores(again), scores(ours))


def test_a_head_that_is_not_saved_is_noted() -> None:
    config = lora.LoraConfig(r=2, target_modules=["query"])
    assert "classifier are not saved" in lora.inject(classifier("BertForSequenceClassification", 1), config).notes[0]
    saved = config.replace(modules_to_save=["classifier"])
    assert not lora.inject(classifier("BertForSequenceClassification", 1), saved).notes


# Tables.


@pytest.mark.parametrize("tied", [True, False])
def test_a_table_and_a_head_trained_in_full_part_ways_as_in_peft(tied: bool, tmp_path: Path) -> None:
    both = {"modules_to_save": ["embed_tokens", "lm_head"]}
    theirs = in_peft(llama(tie_word_embeddings=tied), **both)
    theirs.save_pretrained(tmp_path / "theirs")
    model = llama(tie_word_embeddings=tied)
    lora.load_adapter(model, tmp_path / "theirs")
    torch.testing.assert_close(logits(model), logits(theirs))
    ours = trained(llama(tie_word_embeddings=tied), **both)
    assert ours.lm_head.weight is not ours.model.embed_tokens.weight
    lora.save_adapter(ours, tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(llama(tie_word_embeddings=tied), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(loaded), logits(ours))
    merged = llama(tie_word_embeddings=tied)
    merge_and_compare(merged, read_adapter(tmp_path / "theirs"), [IDS[0]], torch.float32)
    torch.testing.assert_close(logits(merged), logits(theirs))


@pytest.mark.parametrize("target", [["q_proj"], ["q_proj", "embed_tokens"]])
def test_tables_that_peft_saves_after_resizing_are_put_in_place(target: list[str], tmp_path: Path) -> None:
    theirs = in_peft(grown(1, tie_word_embeddings=True), target)
    want = logits(theirs, ADDED)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    model = grown(2, tie_word_embeddings=True)
    before = logits(model, ADDED)
    report = lora.load_adapter(model, tmp_path / "theirs")
    assert torch.equal(logits(model, ADDED), want)
    assert set(report.carried) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert "replacing the base's: " in str(report)
    # They stay with the adapter.
    lora.save_adapter(model, tmp_path / "again")
    loaded = peft.PeftModel.from_pretrained(grown(3, tie_word_embeddings=True), tmp_path / "again").eval()
    assert torch.equal(logits(loaded, ADDED), want)
    again = grown(4, tie_word_embeddings=True)
    assert lora.load_adapter(again, tmp_path / "again").base == "checked"
    assert torch.equal(logits(again, ADDED), want)
    merged = grown(5, tie_word_embeddings=True)
    merge_and_compare(merged, read_adapter(tmp_path / "theirs"), [ADDED[0]], torch.float32)
    torch.testing.assert_close(logits(merged, ADDED), want)
    with lora.disabled(model):
        assert torch.equal(logits(model, ADDED), before)
    lora.remove(model)
    assert torch.equal(logits(model, ADDED), before)


def test_tables_of_another_size_are_refused_with_the_way_out(tmp_path: Path) -> None:
    in_peft(grown(1)).save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.raises(AdapterError, match=r"tokens were added: call model.resize_token_embeddings\(68\) first"):
        lora.load_adapter(llama(), tmp_path)


def test_a_tied_table_and_head_adapted_together_agree_with_peft(tmp_path: Path) -> None:
    target = ["embed_tokens", "lm_head", "q_proj"]
    ours = trained(llama(tie_word_embeddings=True), target)
    lora.save_adapter(ours, tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(llama(tie_word_embeddings=True), tmp_path / "ours").eval()
    assert torch.equal(logits(loaded), logits(ours))
    in_peft(llama(tie_word_embeddings=True), target).save_pretrained(tmp_path / "theirs")
    want = logits(peft.PeftModel.from_pretrained(llama(tie_word_embeddings=True), tmp_path / "theirs").eval())
    model = llama(tie_word_embeddings=True)
    lora.load_adapter(model, tmp_path / "theirs")
    assert torch.equal(logits(model), want)
    lora.merge(model)
    torch.testing.assert_close(logits(model), want)


def test_tensors_of_the_base_that_stay_unused_are_named() -> None:
    adapter = lora.adapter_of(trained(llama()))
    norm = {"model.norm.weight": torch.full((16,), 2.0)}
    other = Adapter(adapter.config, {**adapter.tensors, **norm})
    with pytest.raises(AdapterError, match=r"other base  model\.norm\.weight"):
        lora.apply_adapter(llama(), other)
    report = lora.apply_adapter(llama(), other, allow_base_mismatch=True)
    assert report.ignored == ("model.norm.weight",)
    assert "2 of 3 tensors applied" in str(report)


# Names and other libraries' adapters.


class Named(nn.Module):
    """A base with names like LoRA's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(6, 6)
        self.lora_head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lora_head(self.up(x))
        return y


def test_freezing_goes_by_identity() -> None:
    model = Named().requires_grad_(False)
    model.up.bias.requires_grad_(True)
    lora.inject(model, lora.LoraConfig(r=2, target_modules=["up"]))
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["up.lora_A", "up.lora_B"]
    assert set(lora.lora_state_dict(model)) == set(lora.adapter_of(model).tensors) == {"up.lora_A", "up.lora_B"}
    lora.mark_only_lora_as_trainable(model)
    assert not model.lora_head.weight.requires_grad
    lora.remove(model)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["up.bias"]


def test_a_base_with_lora_in_a_name_is_checked_and_trained_in_full(tmp_path: Path) -> None:
    model = Named()
    lora.inject(model, lora.LoraConfig(r=2, target_modules=["up"], modules_to_save=["lora_head"], bias="all"))
    adapter = lora.save_adapter(stir(model), tmp_path)
    assert {"lora_head.weight", "lora_head.bias", "up.bias"} <= set(adapter.tensors)
    fresh, x = Named(), torch.ones(2, 6)
    lora.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(x), model(x))
    other = Named()
    nn.init.ones_(other.lora_head.weight)
    plain = Named()
    lora.inject(plain, lora.LoraConfig(r=2, target_modules=["up"]))
    with pytest.raises(BaseMismatchError):
        lora.apply_adapter(other, lora.adapter_of(plain))


def test_beside_an_adapter_of_peft() -> None:
    with pytest.raises(TargetError, match=r"holds an adapter of PEFT.*merge_and_unload.*unload"):
        lora.inject(in_peft(llama()), lora.LoraConfig(target_modules=["v_proj"]))
    base = llama()
    in_peft(base)
    with pytest.raises(TargetError, match="adapter of PEFT"):
        lora.inject(base, lora.LoraConfig(target_modules=["v_proj"]))
    model = trained(llama())
    in_peft(model, ["v_proj"])
    with pytest.raises(TargetError, match=r"layers.0.self_attn.v_proj' is PEFT's"):
        lora.adapter_of(model)
    wrapped = trained(llama())
    in_peft(wrapped, ["q_proj"])
    with pytest.raises(TargetError, match=r"q_proj is now a Linear of peft"):
        lora.adapter_of(wrapped)


@pytest.mark.parametrize(
    ("more", "way"),
    [
        ({"target_parameters": ["a.b"]}, "leave out target_parameters"),
        ({"alora_invocation_tokens": [3]}, "leave it out for plain LoRA"),
        ({"ensure_weight_tying": True, "modules_to_save": ["lm_head"]}, "leave it out"),
        ({"layer_replication": [(0, 1)]}, "repeat them in the model first"),
        ({"init_lora_weights": "gaussian"}, "leave it out for the default start"),
    ],
)
def test_what_pefts_settings_ask_for_and_is_not_trained_leads_out(more: dict[str, Any], way: str) -> None:
    with pytest.raises((ConfigError, TargetError), match=way) as refused:
        lora.inject(llama(), peft.LoraConfig(target_modules=["q_proj"], **more))
    assert next(iter(more)) in str(refused.value)


def test_other_settings_are_no_config() -> None:
    for other in (peft.PromptTuningConfig(num_virtual_tokens=3), {"r": 3}, None):
        with pytest.raises(ConfigError, match=r"expected a loralib\.LoraConfig"):
            lora.inject(llama(), other)  # type: ignore[arg-type]


# What names of targets mean.


@pytest.mark.parametrize(
    ("target", "count"), [(["all-linear"], 7), (["all-linear", "lm_head"], 8), (["lm_head", "all-linear"], 8)]
)
def test_all_linear_in_a_list_is_all_linear(target: list[str], count: int) -> None:
    assert len(lora.inject(llama(), lora.LoraConfig(r=2, target_modules=target)).targets) == count


def test_empty_texts_are_none_as_in_peft() -> None:
    config = lora.LoraConfig(target_modules=["q_proj"], layers_to_transform=[0], layers_pattern="", exclude_modules="")
    assert len(lora.inject(llama(), config).targets) == 1


def test_names_in_one_text_are_told_to_be_a_list() -> None:
    with pytest.raises(TargetError, match=r"to give several names, use a list: \['q_proj', 'v_proj'\]"):
        lora.inject(llama(), lora.LoraConfig(target_modules="q_proj, v_proj"))


# Linear layers and blocks of the models themselves.


def falcon(**more: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "alibi": False}
    return hf.FalconForCausalLM(hf.FalconConfig(**sizes, new_decoder_architecture=True, num_kv_heads=2, **more)).eval()


@pytest.mark.parametrize("bias", [True, False])
def test_linears_with_a_forward_of_their_own_are_adapted_if_they_are_linear(bias: bool, tmp_path: Path) -> None:
    model = trained(falcon(bias=bias), ["query_key_value", "dense_h_to_4h"])
    lora.save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(falcon(bias=bias), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    want = logits(model)
    lora.merge(model)
    torch.testing.assert_close(logits(model), want)
    lora.remove(model)
    assert torch.equal(logits(model), logits(falcon(bias=bias)))


GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 4}
MPT = {"vocab_size": 64, "d_model": 32, "n_layers": 1, "n_heads": 4}
BLOOM = {"vocab_size": 64, "hidden_size": 32, "n_layer": 1, "n_head": 4}
OTHERS = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 8}
GROUPED = {**OTHERS, "num_key_value_heads": 1, "pad_token_id": 0}
FUSED: list[tuple[str, str, dict[str, Any], str, list[bool], bool]] = [
    ("GPT2LMHeadModel", "GPT2Config", GPT2, "c_attn", [True, False, True], True),
    ("MptForCausalLM", "MptConfig", MPT, "Wqkv", [True, False, True], True),
    ("Phi3ForCausalLM", "Phi3Config", {**GROUPED, "num_key_value_heads": 4}, "qkv_proj", [True, False, True], True),
    ("Phi3ForCausalLM", "Phi3Config", GROUPED, "gate_up_proj", [True, False], True),
    ("Phi3ForCausalLM", "Phi3Config", GROUPED, "qkv_proj", [True, False, True], False),
    ("GPTNeoXForCausalLM", "GPTNeoXConfig", OTHERS, "query_key_value", [True, False, True], False),
    ("BloomForCausalLM", "BloomConfig", BLOOM, "query_key_value", [True, False, True], False),
    ("DebertaForMaskedLM", "DebertaConfig", OTHERS, "in_proj", [True, False, True], False),
]


@pytest.mark.parametrize(("name", "settings", "sizes", "target", "blocks", "equal"), FUSED)
def test_blocks_are_what_the_model_makes_of_them(
    name: str, settings: str, sizes: dict[str, Any], target: str, blocks: list[bool], equal: bool
) -> None:
    model = getattr(hf, name)(getattr(hf, settings)(**sizes))
    config = lora.LoraConfig(r=2, target_modules=[target], enable_lora={target: blocks})
    if equal:
        assert lora.inject(model, config).targets
    else:
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        with pytest.raises(TargetError, match=rf"{target}: enable_lora takes 3 equal blocks .* without enable_lora"):
            lora.inject(model, config)
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
        assert model.training
        assert lora.inject(model, config.replace(enable_lora={})).targets


def test_what_a_session_shows_is_short() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(300)))
    report = lora.inject(model, lora.LoraConfig(r=2, target_modules=[str(i) for i in range(300)]))
    adapter = lora.adapter_of(model)
    assert repr(adapter) == "Adapter(LoraConfig(r=2, target_modules=<300 entries>), 600 tensors, 18.75 KB)"
    assert len(repr(lora.apply_adapter(model, adapter))) < 300
    assert len(repr(report)) < 200


def test_a_model_in_a_users_module_is_noted() -> None:
    owner = nn.ModuleDict({"language": llama()})
    (note,) = lora.inject(owner, lora.LoraConfig(r=2, target_modules=["q_proj"])).notes
    assert "begin with 'language'" in note
    assert not lora.inject(llama(), lora.LoraConfig(r=2, target_modules=["q_proj"])).notes


def test_a_table_that_came_along_is_not_resized(tmp_path: Path) -> None:
    in_peft(grown(1)).save_pretrained(tmp_path, save_embedding_layers=True)
    model = grown(2)
    lora.load_adapter(model, tmp_path)
    with pytest.raises(TargetError, match="resizing them would break the adapter"):
        model.resize_token_embeddings(80)


def test_a_base_that_trained_in_fp16_is_itself_in_other_dtypes(tmp_path: Path) -> None:
    half = llama().half()
    assert any(not torch.equal(p.bfloat16(), p.half().bfloat16()) for p in llama().parameters()), "else it says nothing"
    lora.inject(half, lora.LoraConfig(r=2, target_modules=["q_proj"]))
    lora.save_adapter(half, tmp_path)
    for model in (llama(), llama().half()):
        assert lora.load_adapter(model, tmp_path).base == "checked"
    other = llama()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    with pytest.raises(BaseMismatchError, match="different values"):
        lora.load_adapter(other, tmp_path)
    lora.inject(other, lora.LoraConfig(r=2, target_modules=["q_proj"]))
    lora.save_adapter(other, tmp_path)
    with pytest.raises(BaseMismatchError, match="This one is in fp16"):
        lora.load_adapter(llama().half(), tmp_path)
