"""Adapters exchanged with PEFT in both directions have the same logits, to 1e-5 in fp32."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import loralib as lora
from loralib.errors import AdapterError
from loralib.inspection import inspect_adapter

IDS = torch.tensor([[5, 9, 3, 17, 8, 30], [1, 1, 2, 39, 0, 7]])
TOLERANCE = 1e-5


def gpt2() -> Any:
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 40}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).eval()


def llama(**more: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 3}
    config = hf.LlamaConfig(**sizes, vocab_size=40, max_position_embeddings=32, attention_bias=True, **more)
    return hf.LlamaForCausalLM(config).eval()


def bart() -> Any:
    """A model whose embedding, head, and tables of encoder and decoder are all tied."""
    torch.manual_seed(0)
    sizes = {"layers": 1, "attention_heads": 2, "ffn_dim": 24}
    sizes = {f"{side}_{size}": number for side in ("encoder", "decoder") for size, number in sizes.items()}
    config = hf.BartConfig(vocab_size=40, d_model=16, scale_embedding=True, max_position_embeddings=32, **sizes)
    return hf.BartForConditionalGeneration(config).eval()


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.c1 = nn.Conv1d(3, 4, 3, padding=1)
        self.c2 = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0))
        self.c3 = nn.Conv3d(1, 2, (2, 1, 3), bias=False)
        self.head = nn.Linear(2 * 5 * 3 * 3, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c1(x).tanh().view(-1, 4, 6, 6)
        x = self.c2(x).tanh()
        return self.head(self.c3(x[:, None]).flatten(1))  # type: ignore[no-any-return]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.ModuleDict({"attn": nn.MultiheadAttention(16, 2, batch_first=True)})
        self.head = nn.Linear(16, 3)
        for parameter in self.inner.parameters():
            nn.init.normal_(parameter, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.inner["attn"](x, x, x, need_weights=False)[0])  # type: ignore[no-any-return]


def picture() -> Tensor:
    return torch.randn(2, 3, 36, generator=torch.Generator().manual_seed(1))


def sequence() -> Tensor:
    return torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))


# name -> model, input, settings that both sides know, settings of ours alone, what differs on PEFT's side
CASES: dict[str, tuple[Callable[[], Any], Callable[[], Tensor], dict[str, Any]]] = {
    "gpt2": (gpt2, lambda: IDS, {"target_modules": ["c_attn", "c_proj"]}),
    "llama": (llama, lambda: IDS, {"target_modules": ["q_proj", "down_proj"]}),
    "all linear": (llama, lambda: IDS, {"target_modules": "all-linear"}),
    "patterns": (
        llama,
        lambda: IDS,
        {
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 4, "v_proj": 1},
            "alpha_pattern": {"up_proj": 32, r"model\.layers\.[02]\..*q_proj": 1},
        },
    ),
    "rslora": (llama, lambda: IDS, {"target_modules": ["q_proj"], "use_rslora": True, "rank_pattern": {"0.*": 4}}),
    "embedding": (llama, lambda: IDS, {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied embedding": (gpt2, lambda: IDS, {"target_modules": ["wte", "wpe", "c_attn"]}),
    "head": (llama, lambda: IDS, {"target_modules": ["lm_head", "q_proj"]}),
    "conv net": (ConvNet, picture, {"target_modules": ["c1", "c2", "c3", "head"]}),
    "attention": (Attention, sequence, {"target_modules": ["attn"]}),
    "attention and head": (Attention, sequence, {"target_modules": ["attn", "head"], "bias": "all"}),
    "dora": (llama, lambda: IDS, {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "dora on gpt2": (gpt2, lambda: IDS, {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "dora on an embedding": (llama, lambda: IDS, {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "dora of convolutions": (ConvNet, picture, {"target_modules": ["c1", "c2", "c3", "head"], "use_dora": True}),
    "bias of B": (llama, lambda: IDS, {"target_modules": ["q_proj", "down_proj"], "lora_bias": True}),
    "bias of B on gpt2": (gpt2, lambda: IDS, {"target_modules": ["c_attn"], "lora_bias": True}),
    "token rows": (llama, lambda: IDS, {"target_modules": ["q_proj"], "trainable_token_indices": [17, 5]}),
    "token rows of a tied head": (gpt2, lambda: IDS, {"target_modules": ["c_attn"], "trainable_token_indices": [3, 8]}),
    "token rows of tables": (
        llama,
        lambda: IDS,
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 9], "lm_head": [7]}},
    ),
    **{
        f"token rows of {rows}": (gpt2, lambda: IDS, {"target_modules": ["c_attn"], "trainable_token_indices": rows})
        for rows in ({"wte": [3, 8], "lm_head": [3, 8]}, {"wte": [3, 8], "lm_head": [9]}, {"lm_head": [3, 8]})
    },
    "token rows of a scaled table": (bart, lambda: IDS, {"target_modules": ["fc1"], "trainable_token_indices": [3, 8]}),
    "token rows of a twin": (
        bart,
        lambda: IDS,
        {"target_modules": ["fc1"], "trainable_token_indices": {"decoder.embed_tokens": [3, 8]}},
    ),
    "saved modules": (llama, lambda: IDS, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "saved tied head": (gpt2, lambda: IDS, {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]}),
    "all biases": (llama, lambda: IDS, {"target_modules": ["q_proj", "down_proj"], "bias": "all"}),
    "their biases": (llama, lambda: IDS, {"target_modules": ["q_proj", "down_proj"], "bias": "lora_only"}),
    "biases of gpt2": (gpt2, lambda: IDS, {"target_modules": ["c_attn"], "bias": "all"}),
    "some layers": (llama, lambda: IDS, {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 2]}),
    "one layer": (
        llama,
        lambda: IDS,
        {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    ),
    "expression": (llama, lambda: IDS, {"target_modules": r".*\.[12]\..*\.(q_proj|up_proj)"}),
    "exclusion": (
        llama,
        lambda: IDS,
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["0.self_attn.q_proj"]},
    ),
}


def stir(model: nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.15 if "lora" in name else 0.05)


def logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = model(x)
    return y.logits if hasattr(y, "logits") else y  # type: ignore[no-any-return]


def ignore_pefts_own() -> None:
    """Warnings of PEFT 0.21 that say nothing about the adapters here."""
    warnings.filterwarnings("ignore", ".*tied|.*fan_in_fan_out|.*target modules.*|.*lora_bias|Using Rank", UserWarning)
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def load_in_peft(base: nn.Module, directory: Path) -> nn.Module:
    """Loads strictly: whatever PEFT only warns about is an error here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        ignore_pefts_own()
        return applied_once(peft.PeftModel.from_pretrained(base, str(directory)).eval())


def in_peft(base: nn.Module, **settings: Any) -> nn.Module:
    with warnings.catch_warnings():
        ignore_pefts_own()
        model = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=8, **settings)).eval()
    stir(model)
    return applied_once(model)


def save_in_peft(model: Any, directory: Path) -> None:
    with warnings.catch_warnings():
        # PEFT takes a bias of B for a factor that lacks a dimension.
        ignored = "Setting `save_embedding_layers` to `True`|Adapter 'default'.*invalid shape"
        warnings.filterwarnings("ignore", ignored, UserWarning)
        model.save_pretrained(str(directory))


def applied_once(model: nn.Module) -> nn.Module:
    """Corrects a fault of PEFT up to 0.21 (huggingface/peft#3774): attention gets out_proj's update twice."""
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.layer.MultiheadAttention) and PEFT_DOUBLES:
            module.base_layer.out_proj.scaling["default"] /= 2
    return model


def peft_doubles_out_proj() -> bool:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(2, 1)})
    wrapped: Any = peft.get_peft_model(model, peft.LoraConfig(r=1, lora_alpha=1, target_modules=["attn"]))
    output = wrapped.base_model.model["attn"].base_layer.out_proj
    for factor in (output.lora_A, output.lora_B):
        nn.init.ones_(factor["default"].weight)
    before = output.base_layer.weight.detach().clone()
    wrapped.base_model.model["attn"].merge()
    return bool(((output.base_layer.weight - before).round() == 2).all())


PEFT_DOUBLES = peft_doubles_out_proj()


def assert_close(ours: Tensor, theirs: Tensor, base: Tensor) -> None:
    assert (theirs - base).abs().max() > 1e-3, "the adapter does nothing"
    assert (ours - theirs).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_to_peft_and_back(name: str, tmp_path: Path) -> None:
    make, inputs, settings = CASES[name]
    model, x = make(), inputs()
    base = logits(model, x)
    lora.inject(model, lora.LoraConfig(r=2, lora_alpha=8, **settings))
    stir(model)
    ours = logits(model, x)
    saved = lora.save_adapter(model, tmp_path)
    theirs = load_in_peft(make(), tmp_path)
    assert_close(ours, logits(theirs, x), base)
    # Back: what PEFT writes, and what we wrote ourselves.
    save_in_peft(theirs, tmp_path / "theirs")
    for directory in (tmp_path, tmp_path / "theirs"):
        fresh = make()
        report = lora.load_adapter(fresh, directory)
        assert report.applied >= len(saved.tensors) > 0
        assert_close(logits(fresh, x), ours, base)
        lora.merge(fresh)
        assert_close(logits(fresh, x), ours, base)
        lora.remove(fresh)
        assert torch.equal(logits(fresh, x), base)


@pytest.mark.parametrize("name", CASES)
def test_from_peft(name: str, tmp_path: Path) -> None:
    make, inputs, settings = CASES[name]
    x = inputs()
    theirs = in_peft(make(), **settings)
    save_in_peft(theirs, tmp_path)
    model = make()
    base = logits(model, x)
    report = lora.load_adapter(model, tmp_path)
    assert report.base == "unknown"
    assert str(report).startswith(f"{report.applied} of {report.applied} tensors applied")
    assert_close(logits(model, x), logits(theirs, x), base)


def test_target_parameters_may_name_linears_and_what_is_not_there(tmp_path: Path) -> None:
    """PEFT takes any matrix for a parameter, and its 'all-linear' names experts that a model may lack."""
    base = llama()
    settings = {"target_modules": ["v_proj"], "target_parameters": ["q_proj.weight", "experts.down_proj"]}
    theirs = in_peft(copy.deepcopy(base), **settings)
    save_in_peft(theirs, tmp_path / "theirs")
    ours = copy.deepcopy(base)
    lora.load_adapter(ours, tmp_path / "theirs")
    assert_close(logits(ours, IDS), logits(theirs, IDS), logits(base, IDS))
    lora.save_adapter(ours, tmp_path / "ours")
    assert_close(
        logits(load_in_peft(copy.deepcopy(base), tmp_path / "ours"), IDS), logits(theirs, IDS), logits(base, IDS)
    )


def test_what_peft_refuses_in_mamba_is_said(tmp_path: Path) -> None:
    config = hf.MambaConfig(vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=1)
    model = hf.MambaForCausalLM(config)
    verdicts = {}
    for exclude in (None, ["mixer.out_proj"]):
        lora.inject(model, lora.LoraConfig(r=2, target_modules="all-linear", exclude_modules=exclude))
        verdicts[bool(exclude)] = inspect_adapter(lora.save_adapter(model, tmp_path / str(bool(exclude)))).uses["peft"]
        lora.remove(model)
    assert verdicts[False].startswith("no: PEFT 0.21 refuses these modules in models of type mamba")
    assert "exclude_modules mixer.out_proj" in verdicts[False]
    with pytest.raises(ValueError, match="'out_proj' is incompatible with Mamba"):
        load_in_peft(hf.MambaForCausalLM(config), tmp_path / "False")
    assert verdicts[True] == "yes, as it is"
    load_in_peft(hf.MambaForCausalLM(config), tmp_path / "True")


@pytest.mark.parametrize("start", ["gaussian", False, "orthogonal"])
def test_other_starts_load_like_any_adapter(start: Any, tmp_path: Path) -> None:
    theirs = in_peft(llama(), target_modules=["q_proj"], init_lora_weights=start)
    theirs.save_pretrained(str(tmp_path))
    model = llama()
    base = logits(model, IDS)
    lora.load_adapter(model, tmp_path)
    assert_close(logits(model, IDS), logits(theirs, IDS), base)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_that_change_the_base_go_on_as_plain_ones_of_twice_the_rank(
    start: str, rslora: bool, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 3}}
    theirs = in_peft(llama(), **settings, init_lora_weights=start, use_rslora=rslora)
    theirs.save_pretrained(str(tmp_path))
    model = llama()
    base = logits(model, IDS)
    lora.load_adapter(model, tmp_path)
    assert_close(logits(model, IDS), logits(theirs, IDS), base)
    saved = lora.save_adapter(model, tmp_path / "plain")
    assert saved.config.init_lora_weights is True
    assert {saved.config.rank_of("a.q_proj"), saved.config.rank_of("a.v_proj")} == {4, 6}
    assert_close(logits(load_in_peft(llama(), tmp_path / "plain"), IDS), logits(theirs, IDS), base)
    again = llama()
    assert lora.load_adapter(again, tmp_path / "plain").base == "checked"
    assert_close(logits(again, IDS), logits(theirs, IDS), base)


def test_random_starts_that_change_the_base_are_refused(tmp_path: Path) -> None:
    in_peft(llama(), target_modules=["q_proj"], init_lora_weights="pissa_niter_4").save_pretrained(str(tmp_path))
    with pytest.raises(lora.LoraError, match=r"init_lora_weights = 'pissa_niter_4'.*loralib convert"):
        lora.load_adapter(llama(), tmp_path)


def test_classifiers_of_peft_name_heads_that_are_not_there(tmp_path: Path) -> None:
    """For SEQ_CLS PEFT writes modules_to_save ["classifier", "score"], and it lets unused targets pass."""

    def make() -> Any:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        return hf.RobertaForSequenceClassification(hf.RobertaConfig(**sizes, vocab_size=50)).eval()

    x = torch.tensor([[3, 4, 5, 6]])
    theirs = in_peft(make(), target_modules=["query", "value", "q_proj"], task_type="SEQ_CLS")
    theirs.save_pretrained(str(tmp_path))
    assert set(json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"]) == {"classifier", "score"}
    model = make()
    base = logits(model, x)
    lora.load_adapter(model, tmp_path)
    assert_close(logits(model, x), logits(theirs, x), base)
    lora.save_adapter(model, tmp_path / "again")
    assert_close(logits(load_in_peft(make(), tmp_path / "again"), x), logits(theirs, x), base)


def test_older_files_of_peft(tmp_path: Path) -> None:
    """adapter_model.bin, and names that still contain the adapter's name."""
    theirs = in_peft(llama(), target_modules=["q_proj", "embed_tokens"])
    theirs.save_pretrained(str(tmp_path), save_embedding_layers=False)
    state = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    old = {name.replace("lora_A.weight", "lora_A.default.weight"): tensor for name, tensor in state.items()}
    torch.save(
        {name.replace("embedding_B", "embedding_B.default"): t for name, t in old.items()},
        tmp_path / "adapter_model.bin",
    )
    model = llama()
    base = logits(model, IDS)
    lora.load_adapter(model, tmp_path)
    assert_close(logits(model, IDS), logits(theirs, IDS), base)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("in_full", [["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_tables_that_peft_saves_besides_modules_to_save(tied: bool, in_full: list[str], tmp_path: Path) -> None:
    """The file holds the trained tables twice, and the base's own."""
    theirs = in_peft(llama(tie_word_embeddings=tied), target_modules=["q_proj"], modules_to_save=in_full)
    theirs.save_pretrained(str(tmp_path), save_embedding_layers=True)
    assert any("original_module" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    model = llama(tie_word_embeddings=tied)
    base = logits(model, IDS)
    lora.load_adapter(model, tmp_path)
    assert_close(logits(model, IDS), logits(theirs, IDS), base)


# Fused blocks, which PEFT does not have.

FUSED = lora.LoraConfig(
    r=2, lora_alpha=8, target_modules=["c_attn", "c_fc"], enable_lora={"c_attn": [True, False, True]}
)


@pytest.mark.parametrize("rslora", [False, True])
def test_fused_blocks_are_plain_in_peft_and_fused_here(rslora: bool, tmp_path: Path) -> None:
    model = gpt2()
    base = logits(model, IDS)
    lora.inject(model, FUSED.replace(use_rslora=rslora, alpha_pattern={"0.attn.c_attn": 3}))
    stir(model)
    saved = lora.save_adapter(model, tmp_path)
    theirs = load_in_peft(gpt2(), tmp_path)
    assert_close(logits(model, IDS), logits(theirs, IDS), base)
    fresh = gpt2()
    lora.load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh, IDS), logits(model, IDS))
    assert fresh.transformer.h[1].attn.c_attn.blocks == (True, False, True)
    again = lora.adapter_of(fresh)
    assert again.tensors.keys() == saved.tensors.keys()
    assert all(torch.equal(tensor, saved.tensors[name]) for name, tensor in again.tensors.items())


def test_fused_blocks_of_attention(tmp_path: Path) -> None:
    model, x = Attention().eval(), sequence()
    base = logits(model, x)
    settings = {"target_modules": ["attn"], "enable_lora": {"attn": [True, False, True]}}
    lora.inject(model, lora.LoraConfig(r=2, lora_alpha=8, **settings))
    stir(model)
    lora.save_adapter(model, tmp_path)
    assert_close(logits(model, x), logits(load_in_peft(Attention(), tmp_path), x), base)
    fresh = Attention().eval()
    lora.load_adapter(fresh, tmp_path)
    assert_close(logits(fresh, x), logits(model, x), base)


# Models built from loralib's layers.


class Plain(nn.Module):
    """The same as `ByHand`, without LoRA."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(40, 8)
        self.up = nn.Linear(8, 16)
        self.fused = nn.Linear(16, 12)
        self.wide = hf.pytorch_utils.Conv1D(36, 12) if transposed else nn.Linear(12, 36)
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.line = nn.Conv1d(3, 2, 3)
        self.norm = nn.LayerNorm(34)
        self.classify = nn.Linear(2 * 34, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wide(self.fused(self.up(self.table(ids[:, 0])).tanh()))
        x = self.conv(x.view(-1, 1, 6, 6)).tanh().flatten(2)
        return self.classify(self.norm(self.line(x)).flatten(1))  # type: ignore[no-any-return]


class ByHand(Plain):
    def __init__(self, transposed: bool = False) -> None:
        super().__init__(transposed)
        plain = copy.deepcopy(self).state_dict()
        self.table = lora.Embedding(40, 8, r=2, lora_alpha=8)
        self.up = lora.Linear(8, 16, r=3, lora_alpha=8, lora_dropout=0.1)
        self.fused = lora.MergedLinear(16, 12, r=2, lora_alpha=8, enable_lora=[True, False, True])
        self.wide = lora.Linear(12, 36, r=2, lora_alpha=5, fan_in_fan_out=transposed)
        self.conv = lora.Conv2d(1, 3, 3, r=2, lora_alpha=8, padding=1)
        self.line = lora.Conv1d(3, 2, 3, r=1, lora_alpha=2)
        assert not self.load_state_dict(plain, strict=False).unexpected_keys


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
@pytest.mark.parametrize("merged", [False, True])
def test_hand_built_models_go_to_peft_and_back(bias: str, merged: bool, tmp_path: Path) -> None:
    model = ByHand()
    base = logits(Plain(), IDS)
    lora.mark_only_lora_as_trainable(model, bias=bias)
    stir(model)
    ours = logits(model.train(not merged).eval() if merged else model.eval(), IDS)
    saved = lora.save_adapter(model, tmp_path)
    assert saved.config.bias == bias
    assert ("norm.bias" in saved.tensors) == (bias == "all")
    assert_close(ours, logits(load_in_peft(Plain(), tmp_path), IDS), base)
    plain = Plain().eval()  # and here, where the layers are injected
    lora.load_adapter(plain, tmp_path)
    assert_close(logits(plain, IDS), ours, base)
    for training in (True, False):  # and into the same layers, whatever state they are in
        fresh = ByHand().train(training)
        report = lora.load_adapter(fresh, tmp_path)
        assert report.applied == len(saved.tensors)
        assert report.inject is None
        assert_close(logits(fresh.eval(), IDS), ours, base)
        assert all(torch.equal(tensor, fresh.state_dict()[key]) for key, tensor in model.state_dict().items())


def test_a_trained_head_of_a_hand_built_model_goes_along(tmp_path: Path) -> None:
    model = ByHand()
    base = logits(Plain(), IDS)
    lora.mark_only_lora_as_trainable(model)
    for parameter in model.classify.parameters():
        parameter.requires_grad_(True)
    stir(model)
    saved = lora.save_adapter(model.eval(), tmp_path)
    assert saved.config.modules_to_save == ("classify",)
    ours = logits(model, IDS)
    assert_close(ours, logits(load_in_peft(Plain(), tmp_path), IDS), base)
    for fresh in (Plain().eval(), ByHand().eval()):
        lora.load_adapter(fresh, tmp_path)
        assert_close(logits(fresh, IDS), ours, base)


def test_hand_built_layers_that_store_their_weight_transposed(tmp_path: Path) -> None:
    model = ByHand(transposed=True)
    lora.mark_only_lora_as_trainable(model)
    stir(model)
    lora.save_adapter(model.eval(), tmp_path)
    base, ours = logits(Plain(transposed=True), IDS), logits(model, IDS)
    assert_close(ours, logits(load_in_peft(Plain(transposed=True), tmp_path), IDS), base)
    plain = Plain(transposed=True).eval()
    assert lora.load_adapter(plain, tmp_path).base == "checked"
    assert_close(logits(plain, IDS), ours, base)


def test_what_an_adapter_has_no_place_for_is_refused(tmp_path: Path) -> None:
    grouped = nn.Sequential(lora.Conv2d(4, 4, 3, r=2, groups=2))
    lora.mark_only_lora_as_trainable(grouped)
    with pytest.raises(AdapterError, match="0: a convolution with 2 groups has no portable form"):
        lora.save_adapter(grouped, tmp_path)
    thawed = nn.Sequential(lora.Linear(4, 4, r=2), nn.Linear(4, 4))
    thawed[0].weight.requires_grad_(True)
    with pytest.raises(AdapterError, match=r"cannot store them:\n +0\.weight"):
        lora.save_adapter(thawed, tmp_path)
    alone = lora.Linear(4, 4, r=2)
    with pytest.raises(AdapterError, match="put it into a model"):
        lora.save_adapter(alone, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_plain_convolution_does_not_fit_microsofts_folded_form(tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Conv2d(2, 3, 3))
    lora.inject(plain, lora.LoraConfig(r=18, lora_alpha=6, target_modules=["0"]))
    stir(plain)
    lora.save_adapter(plain, tmp_path)
    by_hand = nn.Sequential(lora.Conv2d(2, 3, 3, r=2))
    before = {name: tensor.clone() for name, tensor in by_hand.state_dict().items()}
    with pytest.raises(AdapterError, match="not in Microsoft's folded form"):
        lora.load_adapter(by_hand, tmp_path, allow_base_mismatch=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in by_hand.state_dict().items())


def test_names_that_are_endings_of_others(tmp_path: Path) -> None:
    """A list that holds "0" also means "2.0": saved targets and patterns must not take in what was not adapted."""

    def make() -> Any:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))).eval()

    x = torch.randn(3, 4)
    base = logits(make(), x)
    for target, patterns in (("0", {}), (r"0|2\.1", {"rank_pattern": {"^0": 3}}), (["0"], {"rank_pattern": {"^0": 3}})):
        model = make()
        report = lora.inject(model, lora.LoraConfig(r=2, lora_alpha=8, target_modules=target, **patterns))
        stir(model)
        lora.save_adapter(model, tmp_path)
        assert_close(logits(model, x), logits(load_in_peft(make(), tmp_path), x), base)
        fresh = make()
        loaded = lora.load_adapter(fresh, tmp_path)
        assert loaded.inject is not None
        assert loaded.inject.targets == report.targets
        assert_close(logits(fresh, x), logits(model, x), base)
    by_hand = make()
    by_hand[0] = lora.Linear(4, 4, r=3, lora_alpha=8)
    by_hand[2][0] = lora.Linear(4, 4, r=2, lora_alpha=8)
    by_hand[0].load_state_dict(make()[0].state_dict(), strict=False)
    by_hand[2][0].load_state_dict(make()[2][0].state_dict(), strict=False)
    lora.mark_only_lora_as_trainable(by_hand)
    stir(by_hand)
    lora.save_adapter(by_hand.eval(), tmp_path)
    assert_close(logits(by_hand, x), logits(load_in_peft(make(), tmp_path), x), base)


def test_an_adapter_on_a_part_of_a_model_keeps_its_scaling(tmp_path: Path) -> None:
    model = llama()
    base = logits(model, IDS)
    lora.inject(model.model, lora.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"], use_rslora=True))
    stir(model.model)
    for parameter in model.lm_head.parameters():
        parameter.requires_grad_(False)
    lora.save_adapter(model, tmp_path)
    assert_close(logits(model, IDS), logits(load_in_peft(llama(), tmp_path), IDS), base)


# Names of modules from before transformers 5.


def mixtral() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = hf.MixtralConfig(vocab_size=32, num_key_value_heads=2, num_local_experts=2, **sizes)
    return hf.MixtralForCausalLM(config).eval()


def old_adapter(directory: Path, modules: dict[str, tuple[int, int]], **more: Any) -> dict[str, Tensor]:
    """Writes an adapter of rank 2 and lora_alpha 4 for modules of these sizes (out, in); returns their updates."""
    generator = torch.Generator().manual_seed(1)
    tensors, updates = dict[str, Tensor](), dict[str, Tensor]()
    for name, (rows, columns) in modules.items():
        A, B = torch.randn(2, columns, generator=generator), torch.randn(rows, 2, generator=generator)
        tensors |= {f"base_model.model.{name}.lora_A.weight": A, f"base_model.model.{name}.lora_B.weight": B}
        updates[name] = 2 * B @ A
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    leaves = sorted({name.rpartition(".")[2] for name in modules})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": leaves,
        **more,
    }
    (directory / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return updates


@pytest.mark.filterwarnings("default")
def test_experts_that_were_modules_are_found_in_the_tensor_that_holds_them_now(tmp_path: Path) -> None:
    prefix = "model.layers.0."
    sizes = {f"{prefix}self_attn.q_proj": (16, 16)}
    for expert in range(2):
        path = f"{prefix}block_sparse_moe.experts.{expert}"
        sizes |= {f"{path}.w1": (24, 16), f"{path}.w3": (24, 16), f"{path}.w2": (16, 24)}
    updates = old_adapter(tmp_path / "old", sizes)
    ours = mixtral()
    lora.load_adapter(ours, tmp_path / "old")
    wanted = mixtral()
    layer = wanted.model.layers[0]
    with torch.no_grad():
        layer.self_attn.q_proj.weight += updates[f"{prefix}self_attn.q_proj"]
        for expert in range(2):
            path = f"{prefix}block_sparse_moe.experts.{expert}"
            layer.mlp.experts.gate_up_proj[expert] += torch.cat([updates[f"{path}.w1"], updates[f"{path}.w3"]])
            layer.mlp.experts.down_proj[expert] += updates[f"{path}.w2"]
        theirs = peft.PeftModel.from_pretrained(mixtral(), tmp_path / "old").merge_and_unload().eval()
        ids = torch.arange(3, 13)[None]
        torch.testing.assert_close(theirs(ids).logits, wanted(ids).logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(ours(ids).logits, wanted(ids).logits, rtol=0, atol=1e-4)


def test_renamed_modules_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loralib.formats import old_names

    monkeypatch.setattr(old_names, "_renamings", lambda _: [(r"\.attention\.", ".self_attn.")])
    name = "model.layers.0.attention.q_proj"
    pattern = {"attention.q_proj": 8}  # keyed by the old name too
    updates = old_adapter(tmp_path / "old", {name: (16, 16)}, alpha_pattern=pattern)
    model, wanted = mixtral(), mixtral()
    lora.load_adapter(model, tmp_path / "old")
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        wanted.model.layers[0].self_attn.q_proj.weight += 2 * updates[name]
        torch.testing.assert_close(model(ids).logits, wanted(ids).logits, rtol=0, atol=1e-4)
