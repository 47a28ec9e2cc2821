"""inject, remove, merge, unmerge and disabled: what they match, change, report and restore."""

from __future__ import annotations

import copy
import io
import pickle
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import loralib as lora
from loralib.errors import MergeError, TargetError
from loralib.injection import adapted_layers, fingerprint, injection_of
from loralib.layers import LoRAEmbedding, LoRALayer
from loralib.targets import match_modules

IDS = torch.tensor([[5, 9, 3, 17, 8, 30]])


def gpt2(**more: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 40}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, **more)).eval()


def llama(**more: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 3}
    config = hf.LlamaConfig(**sizes, vocab_size=40, max_position_embeddings=32, **more)
    return hf.LlamaForCausalLM(config).eval()


class Net(nn.Module):
    """Two blocks and a head, with biases, a norm, a table and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(10, 8)
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 8), "down": nn.Linear(8, 8)}) for _ in range(3))
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = x + block["down"](block["up"](x).tanh())  # type: ignore[index]
        return self.head(self.norm(x))  # type: ignore[no-any-return]


ROWS = torch.tensor([1, 4, 7, 7])


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        y = model(ids)
    return y.logits if hasattr(y, "logits") else y  # type: ignore[no-any-return]


def stir(model: nn.Module, scale: float = 0.5) -> None:
    """Gives every trained parameter a random value, as if it had been trained."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=scale)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that remove must restore: bits, identity, classes, flags."""
    return {
        "bits": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "same": {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)},
        "flags": {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)},
        "classes": {name: type(module) for name, module in model.named_modules()},
        "own": {name: sorted(vars(module)) for name, module in model.named_modules()},
    }


def assert_same(after: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    assert list(after["bits"]) == list(before["bits"])
    for name, tensor in before["bits"].items():
        assert after["bits"][name].dtype == tensor.dtype, name
        assert torch.equal(after["bits"][name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), (
            name
        )
    for part in ("same", "flags", "classes", "own"):
        assert after[part] == before[part], part


def config(target: Any = "all-linear", **more: Any) -> lora.LoraConfig:
    return lora.LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": target, **more})


# What is matched.


@pytest.mark.parametrize(
    ("target", "more", "expected"),
    [
        (["up"], {}, [f"blocks.{i}.up" for i in range(3)]),
        (["blocks.1.up", "head"], {}, ["blocks.1.up", "head"]),
        (["1.up", "up"], {}, [f"blocks.{i}.up" for i in range(3)]),
        (r"blocks\.[02]\.(up|down)", {}, ["blocks.0.up", "blocks.0.down", "blocks.2.up", "blocks.2.down"]),
        ("head", {}, ["head"]),
        ("all-linear", {}, [*(f"blocks.{i}.{part}" for i in range(3) for part in ("up", "down")), "head"]),
        ("all-linear", {"exclude_modules": ["down", "blocks.0.up"]}, ["blocks.1.up", "blocks.2.up", "head"]),
        ("all-linear", {"exclude_modules": r"blocks.*"}, ["head"]),
        (
            "all-linear",
            {"modules_to_save": ["head"], "exclude_modules": ["down"]},
            [f"blocks.{i}.up" for i in range(3)],
        ),
        (["up"], {"layers_to_transform": 1}, ["blocks.1.up"]),
        (
            ["up", "head"],
            {"layers_to_transform": None, "exclude_modules": ["1.up"]},
            ["blocks.0.up", "blocks.2.up", "head"],
        ),
        (["up"], {"layers_to_transform": [2], "layers_pattern": "blocks"}, ["blocks.2.up"]),
        (["up"], {"layers_to_transform": [2], "layers_pattern": ["layers", "blocks"]}, ["blocks.2.up"]),
        (["table", "up"], {"layers_to_transform": None}, ["table", *(f"blocks.{i}.up" for i in range(3))]),
    ],
)
def test_targets(target: Any, more: dict[str, Any], expected: list[str]) -> None:
    model = Net()
    report = lora.inject(model, config(target, **more))
    assert list(report.targets) == expected == [name for name, _ in adapted_layers(model)]
    trainable = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert {name.partition(".")[0] for name in trainable} == set(more.get("modules_to_save", ()))


def test_all_linear_leaves_out_the_head() -> None:
    assert "lm_head" not in lora.inject(llama(), config()).targets
    assert "lm_head" not in lora.inject(gpt2(), config()).targets
    assert "lm_head" in lora.inject(llama(), config(["lm_head", "q_proj"])).targets
    classifier = hf.RobertaForSequenceClassification(
        hf.RobertaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=40
        )
    )
    saved = lora.inject(classifier, config(modules_to_save=["classifier"]))
    assert not [name for name in saved.targets if name.startswith("classifier")]


def test_patterns_of_rank_and_alpha_and_rslora() -> None:
    model = Net()
    lora.inject(
        model,
        config(
            ["up", "down", "head"],
            r=4,
            lora_alpha=8,
            rank_pattern={"1.up": 1, "up": 2},
            alpha_pattern={r"blocks\.2\..*": 32},
            use_rslora=True,
        ),
    )
    layers = dict(adapted_layers(model))
    assert [layers[f"blocks.{i}.up"].r for i in range(3)] == [2, 1, 2]
    assert layers["head"].r == layers["blocks.0.down"].r == 4
    assert layers["head"].scaling == 8 / 4**0.5
    assert layers["blocks.2.down"].scaling == 32 / 4**0.5
    assert layers["blocks.2.up"].scaling == 32 / 2**0.5


def test_fused_blocks() -> None:
    model = gpt2()
    before = logits(model)
    lora.inject(model, config(["c_attn"], enable_lora={"c_attn": [True, False, True]}))
    attn = model.transformer.h[0].attn.c_attn
    assert attn.lora_A.shape == (4, 16)
    assert attn.lora_B.shape == (32, 2)
    stir(model)
    delta = attn.delta_weight()
    assert delta.shape == (16, 48)  # as Conv1D stores it
    assert delta[:, 16:32].abs().sum() == 0
    assert delta[:, :16].abs().sum() > 0
    assert delta[:, 32:].abs().sum() > 0
    assert not torch.allclose(logits(model), before)


def test_dropout_acts_in_training_alone() -> None:
    model = Net()
    lora.inject(model, config(["up"], lora_dropout=0.5))
    stir(model)
    assert torch.equal(logits(model.eval(), ROWS), logits(model.eval(), ROWS))
    model.norm.eval()
    model.blocks.train()
    assert not torch.equal(logits(model, ROWS), logits(model, ROWS))


def test_biases() -> None:
    expected = {
        "none": set(),
        "lora_only": {f"blocks.{i}.up.bias" for i in range(3)},
        "all": {*(f"blocks.{i}.{part}.bias" for i in range(3) for part in ("up", "down")), "norm.bias", "head.bias"},
    }
    for bias, names in expected.items():
        model = Net()
        before = snapshot(model)
        base = logits(model.eval(), ROWS)
        lora.inject(model, config(["up"], bias=bias))
        trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
        assert trained == names
        stir(model)
        with lora.disabled(model):
            assert torch.equal(logits(model, ROWS), base)
        lora.remove(model)
        assert_same(snapshot(model), before)


def test_nested_modules_to_save_and_adapted_neighbours() -> None:
    model = Net()
    before = snapshot(model)
    lora.inject(model, config(["up"], modules_to_save=["blocks.1", "1.down", "norm"], bias="all"))
    assert [name for name, _ in adapted_layers(model)] == ["blocks.0.up", "blocks.2.up"]
    assert all(p.requires_grad for p in model.blocks[1].parameters())
    stir(model)
    model.train()(ROWS)  # moves the norm's running statistics
    lora.remove(model)
    assert_same(snapshot(model), before)


# What is refused, with all faults at once and near matches.


def fault(model: nn.Module, *args: Any, **more: Any) -> str:
    before = snapshot(model)
    with pytest.raises(TargetError) as refused:
        lora.inject(model, config(*args, **more))
    assert_same(snapshot(model), before)
    assert injection_of(model) is None
    assert isinstance(refused.value, ValueError)
    return str(refused.value)


def test_a_pattern_that_matches_nothing() -> None:
    message = fault(gpt2(), ["q_proj"])
    assert "target_modules ['q_proj'] match nothing" in message
    assert "GPT2LMHeadModel" in message
    assert "Linear-like modules: c_proj (4), c_attn (2), c_fc (2)" in message
    assert "Try target_modules=['c_attn']" in message
    message = fault(llama(), ["q_proj", "v_prj", "mlp.up_prj"])
    assert "['v_prj', 'mlp.up_prj'] match nothing" in message
    assert "'v_proj'" in message
    assert "'mlp.up_proj'" in message
    assert "Did you mean" in fault(llama(), "q_porj")
    assert "match nothing (after exclude_modules" in fault(llama(), ["q_proj"], exclude_modules=["q_proj"])
    assert "no linear-like modules" in fault(nn.Sequential(nn.ReLU()), "all-linear")
    assert "It is a layer itself" in fault(nn.Linear(4, 4), "all-linear")
    assert "target_modules is not given" in fault(Net(), None)


def test_all_faults_at_once() -> None:
    message = fault(
        Net(),
        ["up", "nrom", "norm", "blocks"],
        rank_pattern={"dwon": 2},
        alpha_pattern={"head": 2},
        enable_lora={"up": [True, True, False]},
        exclude_modules=["tabel"],
        modules_to_save=["haed"],
    )
    assert message.startswith("10 problems with target_modules in Net")
    for part in (
        "target_modules ['nrom'] match nothing",
        "Did you mean 'norm'?",
        "norm: BatchNorm1d cannot be adapted",
        "blocks: ModuleList cannot be adapted",
        "target what is inside it: up, down",
        "rank_pattern['dwon'] matches none of the adapted modules",
        "alpha_pattern['head'] matches none of the adapted modules",
        "exclude_modules 'tabel' matches nothing. Did you mean 'table'?",
        "modules_to_save 'haed' matches nothing. Did you mean 'head'?",
        "blocks.0.up: enable_lora has 3 blocks, which does not divide its 8 outputs",
        "blocks.2.up: enable_lora has 3 blocks",
    ):
        assert part in message, part


def test_layers_that_are_not_there() -> None:
    message = fault(Net(), ["up"], layers_to_transform=[1, 7, 9])
    assert "layer 7, which has no adapted module" in message
    assert "layer 9, which has no adapted module" in message
    assert "match nothing" in fault(Net(), ["up"], layers_to_transform=[7])
    assert "match nothing" in fault(Net(), ["up"], layers_to_transform=[1], layers_pattern="layers")


def test_fused_blocks_are_for_linear_layers() -> None:
    assert "enable_lora is for linear layers, not Embedding" in fault(Net(), ["table"], enable_lora={"table": [True]})


def test_a_second_injection_is_refused() -> None:
    model = Net()
    lora.inject(model, config(["up"]))
    before = snapshot(model)
    with pytest.raises(TargetError, match="already holds an adapter; call remove"):
        lora.inject(model, config(["down"]))
    assert_same(snapshot(model), before)
    outer = nn.Sequential(model)
    with pytest.raises(TargetError, match="already has LoRA layers of its own"):
        lora.inject(outer, config(["down"]))
    by_hand = nn.Sequential(lora.Linear(4, 4, r=2))
    with pytest.raises(TargetError, match="already has LoRA layers of its own"):
        lora.inject(by_hand, config(["0"]))


def test_without_an_adapter_there_is_nothing_to_remove_or_merge() -> None:
    with pytest.raises(TargetError, match="Net holds no adapter"):
        lora.remove(Net())
    with pytest.raises(TargetError, match="Net has no LoRA layer to merge"):
        lora.merge(Net())
    lora.unmerge(Net())
    with lora.disabled(Net()):
        pass


@pytest.mark.parametrize("step", ["_adapt", "_trainable_copies", "_guard_methods", "_report"])
def test_a_failure_in_between_leaves_the_model_untouched(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even an unexpected one, such as running out of memory at the third layer."""
    module = sys.modules["loralib.injection"]
    real, calls = getattr(module, step), iter((True, True, False))

    def fails(*args: Any) -> Any:
        if step == "_adapt" and next(calls):
            return real(*args)
        if step == "_adapt":  # in the middle of a layer: the class is switched, the factors are not there yet
            monkeypatch.setattr(LoRALayer, "_init_lora", lambda *args: (_ for _ in ()).throw(MemoryError()))
            return real(*args)
        raise MemoryError

    model = gpt2()
    before, base = snapshot(model), logits(model)
    monkeypatch.setattr(module, step, fails)
    with pytest.raises(MemoryError):
        lora.inject(model, config(["c_attn", "wte"], bias="all", modules_to_save=["ln_f"]))
    assert_same(snapshot(model), before)
    assert torch.equal(logits(model), base)
    monkeypatch.undo()
    lora.inject(model, config(["c_attn"]))


# The report.


def test_the_report_counts_and_prints() -> None:
    model = Net()
    report = lora.inject(model, config(["up", "head"], r=2))
    factors = 3 * 2 * (8 + 8) + 2 * (8 + 4)
    total = sum(p.numel() for p in model.parameters())
    assert dict(report.patterns) == {"up": 3, "head": 1}
    assert (report.trainable, report.total, report.frozen) == (factors, total, total - factors)
    assert report.adapter_bytes == 4 * factors
    printed = str(report)
    assert re.search(r"up +3\n", printed)
    assert re.search(r"head +1\n", printed)
    assert f"{factors:,}" in printed
    assert f"{total:,}" in printed
    assert f"({100 * factors / total:.2f}%)" in printed
    assert re.search(rf"adapter size +{4 * factors} bytes", printed)


def test_the_report_speaks_of_ties_and_half_precision() -> None:
    report = lora.inject(gpt2(), config(["wte", "c_attn"]))
    assert any("transformer.wte shares its weight with lm_head" in note for note in report.notes)
    assert not lora.inject(gpt2(), config(["c_attn"])).notes
    report = lora.inject(llama().to(torch.bfloat16), config(["q_proj"], modules_to_save=["lm_head"]))
    assert any("lm_head.weight, ...) are trained in full in torch.bfloat16" in note for note in report.notes)


# Taking it back, merging, switching off.


def models() -> Iterator[tuple[str, Any, Any, lora.LoraConfig]]:
    fused = {"enable_lora": {"c_attn": [True, False, True]}}
    yield "gpt2", gpt2(), IDS, config(["c_attn", "wte", "lm_head"], bias="all", modules_to_save=["ln_f"], **fused)
    yield "llama", llama(tie_word_embeddings=True), IDS, config(bias="lora_only", modules_to_save=["lm_head"])
    yield "net", Net().eval(), ROWS, config(["up", "table"], bias="all", modules_to_save=["head", "norm"])
    attention = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2).eval()
    yield "encoder", attention, torch.randn(2, 5, 16), config(bias="all")


NAMES = ["gpt2", "llama", "net", "encoder"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def pick(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Tensor, lora.LoraConfig]:
    model, x, settings = next((m, x, c) for n, m, x, c in models() if n == name)
    return model.to(dtype), x.to(dtype) if x.is_floating_point() else x, settings


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_merging_disabling_and_removing_give_back_every_bit(name: str, dtype: torch.dtype) -> None:
    model, x, settings = pick(name, dtype)
    before, base = snapshot(model), logits(model, x)
    lora.inject(model, settings)
    # Base weights stay under their names; the factors stand beside them.
    assert [key for key in model.state_dict() if "lora_" not in key] == list(before["bits"])
    assert torch.equal(logits(model, x), base)
    stir(model, 0.2)
    adapted = logits(model, x)
    assert not torch.equal(adapted, base)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for _ in range(3):
        lora.merge(model)
        lora.merge(model)  # twice is once
        merged = logits(model, x)
        tolerance = 64 * torch.finfo(dtype).eps * float(adapted.abs().max())
        torch.testing.assert_close(merged, adapted, atol=tolerance, rtol=0)
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
        with lora.disabled(model):
            assert torch.equal(logits(model, x), base)
        assert torch.equal(logits(model, x), merged)
        lora.unmerge(model)
        lora.unmerge(model)
        assert torch.equal(logits(model, x), adapted)
    with lora.disabled(model), lora.disabled(model):
        assert torch.equal(logits(model, x), base)
    assert torch.equal(logits(model, x), adapted)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    lora.merge(model)
    lora.remove(model)
    assert_same(snapshot(model), before)
    assert torch.equal(logits(model, x), base)


def test_removing_gives_back_flags_as_they_were() -> None:
    model = Net()
    model.table.requires_grad_(False)
    model.head.weight.requires_grad_(False)
    before = snapshot(model)
    lora.inject(model, config(["up"], modules_to_save=["head"]))
    lora.remove(model)
    assert_same(snapshot(model), before)


def test_disabled_survives_an_error_inside() -> None:
    model = Net()
    lora.inject(model, config(["up"], modules_to_save=["head"], bias="all"))
    stir(model)
    adapted = logits(model.eval(), ROWS)
    lora.merge(model)
    with pytest.raises(KeyError), lora.disabled(model):
        raise KeyError
    assert all(layer.merged and layer.enabled for _, layer in adapted_layers(model))
    lora.unmerge(model)
    assert torch.equal(logits(model, ROWS), adapted)


def test_disabled_on_layers_that_merge_themselves() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(lora.Linear(4, 4, r=2), nn.Tanh(), lora.Embedding(4, 4, r=0))
    nn.init.normal_(model[0].lora_B)
    layer, x = model[0], torch.randn(2, 4)
    base = nn.functional.linear(x, layer.weight, layer.bias)
    model.eval()
    assert layer.merged
    with lora.disabled(model):
        assert torch.equal(layer(x), base)
        model.eval()  # must not merge now
        assert torch.equal(layer(x), base)
        model.train()
    assert not layer.merged  # left in training mode
    assert not torch.allclose(layer(x), base)
    with lora.disabled(model), pytest.raises(MergeError, match="disabled"):
        layer.merge()


def test_a_model_with_nan_in_one_layer_is_not_merged_at_all() -> None:
    model = Net()
    lora.inject(model, config(["up"]))
    stir(model)
    with torch.no_grad():
        model.blocks[2]["up"].lora_A[0, 0] = float("inf")
    before = snapshot(model)
    with pytest.raises(MergeError, match=r"blocks\.2\.up"):
        lora.merge(model)
    assert_same(snapshot(model), before)
    assert not any(layer.merged for _, layer in adapted_layers(model))


def test_moving_and_casting_an_adapted_model() -> None:
    for merged in (False, True):
        model, x, settings = pick("net")
        lora.inject(model, settings)
        stir(model)
        if merged:
            lora.merge(model)
        model.to(torch.bfloat16)
        with lora.disabled(model):
            assert logits(model, x).dtype == torch.bfloat16
        lora.remove(model)
        twin = pick("net")[0].to(torch.bfloat16)
        assert all(torch.equal(t, twin.state_dict()[name]) for name, t in model.state_dict().items())


def test_loading_a_base_state_dict_while_merged() -> None:
    model, x, _ = pick("net")
    lora.inject(model, config(["up", "table"]))
    stir(model)
    expected = logits(model, x)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    lora.merge(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict(state)
    assert torch.equal(logits(model, x), expected)
    lora.merge(model)
    torch.testing.assert_close(logits(model, x), expected)


# Ties and shared modules.


@pytest.mark.parametrize("target", [["wte"], ["lm_head"], ["wte", "lm_head"]])
def test_tied_embeddings_and_head(target: list[str]) -> None:
    model = gpt2()
    head, table = model.lm_head, model.transformer.wte
    assert head.weight is table.weight
    before, base = snapshot(model), logits(model)
    lora.inject(model, config(target))
    stir(model)
    assert head.weight is table.weight  # one base weight; each update acts in its own module
    adapted = logits(model)
    assert not torch.allclose(adapted, base)
    weight = head.weight.clone()
    lora.merge(model)
    assert head.weight is not table.weight
    if len(target) == 1:
        alone = table if target == ["lm_head"] else head
        assert torch.equal(alone.weight, weight)
    torch.testing.assert_close(logits(model), adapted)
    lora.unmerge(model)
    assert head.weight is table.weight
    lora.remove(model)
    assert head.weight is table.weight
    assert_same(snapshot(model), before)


def test_a_tied_head_trained_in_full_leaves_the_table_alone() -> None:
    model = gpt2()
    lora.inject(model, config(["c_attn"], modules_to_save=["lm_head"]))
    assert model.lm_head.weight is not model.transformer.wte.weight
    table = model.transformer.wte.weight.clone()
    stir(model)
    assert torch.equal(model.transformer.wte.weight, table)
    lora.remove(model)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_tied_biases_train_as_one() -> None:
    """BERT's head contains its bias twice; training only one copy would have no effect."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = hf.BertForMaskedLM(hf.BertConfig(**sizes, vocab_size=40)).eval()
    head = model.cls.predictions
    assert head.bias is head.decoder.bias
    lora.inject(model, config(["query"], bias="all"))
    assert head.bias is head.decoder.bias
    before = logits(model)
    with torch.no_grad():
        head.bias.add_(1.0)
    torch.testing.assert_close(logits(model), before + 1)
    lora.remove(model)
    assert head.bias is head.decoder.bias


def test_a_module_under_two_names_is_adapted_once() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    x = torch.randn(2, 4)
    before, base = snapshot(model), model(x)
    assert lora.inject(model, config(["0"], bias="all")).targets == ("0",)
    stir(model)
    adapted = model(x)
    lora.merge(model)
    torch.testing.assert_close(model(x), adapted)
    with lora.disabled(model):
        assert torch.equal(model(x), base)
    lora.remove(model)
    assert_same(snapshot(model), before)


def test_albert_shares_one_layer_among_all() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = hf.AlbertModel(hf.AlbertConfig(**sizes, embedding_size=12, vocab_size=40)).eval()
    before = model(IDS).last_hidden_state
    assert len(lora.inject(model, config(["query"])).targets) == 1
    stir(model)
    assert not torch.allclose(model(IDS).last_hidden_state, before)


# Copies, files and compilers.


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_adapted_models_pickle_and_copy(name: str, merged: bool) -> None:
    model, x, settings = pick(name)
    base = logits(model, x)
    lora.inject(model, settings)
    stir(model)
    expected = logits(model, x)
    if merged:
        lora.merge(model)
        expected = logits(model, x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert torch.equal(logits(twin, x), expected)
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        record = injection_of(twin)
        assert record is not None
        assert record is not injection_of(model)
        with torch.no_grad():
            for parameter in twin.parameters():  # nothing is shared with the original
                parameter.zero_()
        lora.remove(twin)
        assert torch.equal(logits(model, x), expected)
    twin = copy.deepcopy(model)
    lora.remove(twin)
    assert torch.equal(logits(twin, x), base)
    assert torch.equal(logits(model, x), expected)


def test_a_copy_saves_itself_and_not_the_original(tmp_path: Any) -> None:
    model = gpt2()
    lora.inject(model, config(["c_attn"]))
    twin = copy.deepcopy(model)
    stir(twin)
    twin.save_pretrained(tmp_path)
    saved = lora.read_adapter(tmp_path)
    assert torch.equal(saved.tensors["transformer.h.0.attn.c_attn.lora_B"], twin.transformer.h[0].attn.c_attn.lora_B)


def test_compiled_models_follow_merging_and_disabling() -> None:
    """torch.compile reuses a trace until a guard fails; a merged update must not be added again."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    x = torch.tensor([[1, 4, 7]])
    base = logits(model, x)
    lora.inject(model, config(["0", "1", "3"]))
    stir(model)
    compiled = torch.compile(model, backend="eager")
    adapted = logits(model, x)
    assert not torch.allclose(adapted, base)
    torch.testing.assert_close(logits(compiled, x), adapted)
    lora.merge(model)
    torch.testing.assert_close(logits(compiled, x), adapted)
    lora.unmerge(model)
    torch.testing.assert_close(logits(compiled, x), adapted)
    with lora.disabled(model):
        torch.testing.assert_close(logits(compiled, x), base)
    torch.testing.assert_close(logits(compiled, x), adapted)
    compiled(x).sum().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    model(x).sum().backward()
    for ours, theirs in zip(grads, (p.grad for p in model.parameters() if p.requires_grad), strict=True):
        torch.testing.assert_close(ours, theirs)
    torch._dynamo.reset()


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inductor's own
def test_inductor_compiles_an_adapted_model() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    lora.inject(model, config(["0"]))
    stir(model)
    # Without vector instructions: inductor would first compile a program for each set of them, to see which run here.
    compiled, x = torch.compile(model, options={"cpp.vec_isa_ok": False}), torch.randn(2, 4)
    torch.testing.assert_close(logits(compiled, x), logits(model, x))
    lora.merge(model)
    torch.testing.assert_close(logits(compiled, x), logits(model, x))
    torch._dynamo.reset()


def test_adapted_models_export() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    lora.inject(model, config(["0"]))
    stir(model)
    x = torch.randn(3, 4)
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), model(x))


# transformers' own methods.


def test_resizing_embeddings_that_are_left_alone() -> None:
    model = gpt2()
    lora.inject(model, config(["c_attn"]))
    stir(model)
    before = logits(model)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    model.resize_token_embeddings(48, mean_resizing=False)
    assert logits(model).shape[-1] == 48
    torch.testing.assert_close(logits(model)[..., :40], before)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    # The adapter belongs to the resized base now.
    other = gpt2()
    other.resize_token_embeddings(48, mean_resizing=False)
    other.load_state_dict({k: t for k, t in model.state_dict().items() if "lora_" not in k})
    assert lora.apply_adapter(other, lora.adapter_of(model)).base == "checked"
    torch.testing.assert_close(logits(other), logits(model))


@pytest.mark.parametrize("more", [{"target": ["wte"]}, {"target": ["lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_resizing_adapted_embeddings_is_refused(more: dict[str, Any]) -> None:
    model = gpt2()
    lora.inject(model, config(more.pop("target", ["c_attn"]), **more))
    stir(model)
    before = logits(model)
    with pytest.raises(TargetError, match="resizing them would break the adapter"):
        model.resize_token_embeddings(48)
    assert torch.equal(logits(model), before)
    lora.remove(model)
    model.resize_token_embeddings(48, mean_resizing=False)
    assert logits(model).shape[-1] == 48


def test_save_pretrained_saves_the_adapter(tmp_path: Any) -> None:
    model = gpt2()
    lora.inject(model, config(["c_attn"]))
    stir(model)
    model.save_pretrained(tmp_path / "a", safe_serialization=True, state_dict=model.state_dict())
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    fresh = gpt2()
    lora.load_adapter(fresh, tmp_path / "a")
    assert torch.equal(logits(fresh), logits(model))
    model.save_pretrained(tmp_path / "b", is_main_process=False)
    assert not (tmp_path / "b").exists()
    with pytest.raises(TargetError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "b", push_to_hub=True)
    lora.remove(model)
    model.save_pretrained(tmp_path / "c")
    assert (tmp_path / "c" / "model.safetensors").exists()


# Fingerprints.


def test_fingerprints_tell_bases_apart_whatever_is_done_to_them() -> None:
    for name in NAMES:
        model, _, settings = pick(name)
        mark = fingerprint(model)
        assert fingerprint(pick(name)[0]) == mark
        assert fingerprint(copy.deepcopy(model).to(torch.bfloat16)) == mark
        lora.inject(model, settings)
        assert fingerprint(model) == mark
        stir(model)
        assert fingerprint(model) == mark
        lora.merge(model)
        assert fingerprint(model) == mark
        lora.remove(model)
        assert fingerprint(model) == mark
        with torch.no_grad():
            next(model.parameters()).add_(0.5)
        assert fingerprint(model).partition(":")[0] == mark.partition(":")[0]
        assert fingerprint(model) != mark
    assert fingerprint(gpt2()).partition(":")[0] != fingerprint(llama()).partition(":")[0]


def test_a_plan_changes_nothing_and_knows_the_shapes() -> None:
    model = gpt2()
    before = snapshot(model)
    settings = config(["c_attn", "wte"], enable_lora={"c_attn": [True, False, True]})
    shapes = {key: shape for target in match_modules(model, settings) for key, shape in target.shapes().items()}
    assert_same(snapshot(model), before)
    lora.inject(model, settings)
    tensors = lora.adapter_of(model).tensors
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == shapes


def test_injected_layers_keep_base_dtype_and_train_in_fp32() -> None:
    model = llama().to(torch.bfloat16)
    lora.inject(model, config(["q_proj", "embed_tokens"]))
    for _, layer in adapted_layers(model):
        assert layer.base_weight.dtype == torch.bfloat16
        assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
        assert not layer.base_weight.requires_grad
    assert logits(model).dtype == torch.bfloat16
    model(IDS).logits.sum().backward()
    for _, layer in adapted_layers(model):
        first = layer.lora_A if isinstance(layer, LoRAEmbedding) else layer.lora_B
        assert first.grad.abs().sum() > 0
    on_meta = nn.Sequential(nn.Linear(4, 4, device="meta"))
    lora.inject(on_meta, config(["0"]))
    assert on_meta[0].lora_A.is_meta


def test_save_pretrained_of_a_merged_model_is_refused(tmp_path: Any) -> None:
    model = gpt2()
    lora.inject(model, lora.LoraConfig(r=2, target_modules=["c_attn"]))
    lora.merge(model)
    with pytest.raises(lora.LoraError, match="not the merged weights"):
        model.save_pretrained(tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    lora.unmerge(model)
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
