"""Adapters as values: taken from a model, applied completely or not at all, and bound to a base."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loralib as lora
from loralib.adapter import BASE, Adapter, expand_blocks, narrow_blocks, without_expressions
from loralib.combine import faults_of
from loralib.errors import AdapterError, BaseMismatchError, TargetError
from loralib.injection import adapted_layers, injection_of

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(5))


def net() -> Any:
    torch.manual_seed(0)
    parts = {"up": nn.Linear(6, 6), "act": nn.Tanh(), "norm": nn.BatchNorm1d(6), "down": nn.Linear(6, 6)}
    return nn.Sequential(*parts.values(), nn.Linear(6, 3)).eval()


def config(**more: Any) -> lora.LoraConfig:
    return lora.LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": ["0", "3"], **more})


def trained(seed: int = 1, **more: Any) -> Any:
    model = net()
    lora.inject(model, config(**more))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def changed(adapter: Adapter, **tensors: Tensor | None) -> Adapter:
    """The adapter with some tensors replaced; None removes one."""
    kept = {name: t for name, t in adapter.tensors.items() if tensors.get(name, t) is not None}
    return Adapter(adapter.config, {**kept, **{n: t for n, t in tensors.items() if t is not None}}, adapter.metadata)


def test_an_adapter_is_a_copy() -> None:
    model = trained()
    adapter = lora.adapter_of(model)
    assert adapter.modules == ("0", "3")
    assert adapter.nbytes == 4 * 2 * 2 * (6 + 6)
    before = {name: tensor.clone() for name, tensor in adapter.tensors.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert same(before, dict(adapter.tensors))
    fresh = net()
    lora.apply_adapter(fresh, adapter)
    with torch.no_grad():
        fresh[0].lora_A.zero_()
    assert same(before, dict(adapter.tensors))


@pytest.mark.parametrize("merged", [False, True])
def test_taking_and_putting_give_the_same_model(merged: bool) -> None:
    model = trained(modules_to_save=["4", "2"], bias="all")
    expected = model(X)
    if merged:
        lora.merge(model)
    fresh = net()
    report = lora.apply_adapter(fresh, lora.adapter_of(model))
    assert torch.equal(fresh(X), expected)
    assert report.base == "checked"
    # 4 factors; the head's weight and bias; the norm's weight, bias and three buffers; the biases of two layers
    assert str(report) == "13 of 13 tensors applied (base model checked)"
    assert {n for n, p in fresh.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def test_without_an_adapter_there_is_nothing_to_take() -> None:
    with pytest.raises(TargetError, match="Sequential holds no adapter"):
        lora.adapter_of(net())


# All or nothing.


def test_all_faults_are_listed_and_nothing_changes() -> None:
    adapter = lora.adapter_of(trained(modules_to_save=["2"]))
    nan = adapter.tensors["3.lora_A"].clone()
    nan[0, 0] = float("nan")
    broken = changed(
        adapter,
        **{
            "0.lora_A": torch.zeros(3, 6),
            "0.lora_B": None,
            "3.lora_A": nan,
            "3.lora_B": torch.ones(6, 2, dtype=torch.int64),
            "9.lora_A": torch.zeros(2, 6),
            "4.weight": torch.ones(3, 6),
        },
    )
    for model in (net(), trained(seed=2)):
        before, holds = state(model), injection_of(model) is not None
        with pytest.raises(AdapterError) as refused:
            lora.apply_adapter(model, broken)
        message = str(refused.value)
        assert "the adapter does not fit Sequential" in message
        for fault in (
            r"missing     0.lora_B (6, 2)",
            r"misshapen   0.lora_A (3, 6), expected (2, 6)",
            r"not finite  3.lora_A holds NaN",
            r"not a float 3.lora_B of torch.int64",
            r"unexpected  9.lora_A (2, 6)",
            r"other base  4.weight (3, 6) differs",
        ):
            assert re.search(re.escape(fault), message), fault
        assert same(state(model), before)
        assert (injection_of(model) is not None) == holds


def test_unusable_values_are_not_blamed_on_the_base() -> None:
    adapter = lora.adapter_of(trained())
    tensors = {**adapter.tensors, "0.lora_A": torch.full_like(adapter.tensors["0.lora_A"], float("nan"))}
    with pytest.raises(AdapterError, match="1 fault") as refused:
        lora.apply_adapter(net(), Adapter(adapter.config, tensors))
    assert "Copy the adapter again" in str(refused.value)
    assert "Load it into the base" not in str(refused.value)


def test_an_adapter_of_another_rank_or_target_is_refused() -> None:
    adapter = lora.adapter_of(trained())
    with pytest.raises(AdapterError, match="misshapen"):
        lora.apply_adapter(net(), Adapter(adapter.config.replace(r=4), adapter.tensors))
    with pytest.raises(AdapterError, match="missing "):
        lora.apply_adapter(net(), Adapter(adapter.config.replace(target_modules=["0", "3", "4"]), adapter.tensors))
    with pytest.raises(TargetError, match="match nothing"):
        lora.apply_adapter(net(), Adapter(adapter.config.replace(target_modules=["q_proj"]), adapter.tensors))


def test_an_adapter_that_has_none_of_a_models_names_is_told_why() -> None:
    adapter = lora.adapter_of(trained())
    whole = nn.ModuleDict({"net": net(), "head": nn.Linear(2, 2)})
    named = Adapter(adapter.config.replace(base_model_name_or_path="a/base"), adapter.tensors)
    inner = Adapter(adapter.config, {f"net.{name}": tensor for name, tensor in adapter.tensors.items()})
    for model, other, advice in (
        (whole, adapter, "Here these begin with 'net.': load it into model.get_submodule('net')."),
        (net(), inner, "Its names begin with 'net.': load it into the model that holds this one as 'net'"),
        (nn.ModuleDict({"a": nn.Linear(2, 2)}), named, "Load it into the base model it was trained on (a/base)."),
    ):
        with pytest.raises(AdapterError, match="none of the modules that it adapts") as refused:
            lora.apply_adapter(model, other)
        assert advice in str(refused.value)
    lora.apply_adapter(whole, inner)
    assert torch.equal(whole["net"](X), trained()(X))


def test_a_replaced_adapter_goes_only_once_the_new_one_fits() -> None:
    model, other = trained(seed=2), trained(seed=3, r=3, target_modules=["4"])
    before, y = state(model), model(X)
    with pytest.raises(AdapterError):
        lora.apply_adapter(model, changed(lora.adapter_of(other), **{"4.lora_B": None}))
    assert same(state(model), before)
    lora.apply_adapter(model, lora.adapter_of(other))
    assert torch.equal(model(X), other(X))
    assert [name for name, _ in adapted_layers(model)] == ["4"]
    lora.remove(model)
    assert same(state(model), state(net()))
    assert not torch.equal(model(X), y)


@pytest.mark.parametrize("held", [False, True])
def test_a_failure_while_putting_on_gives_back_what_was_there(held: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    module = sys.modules["loralib.adapter"]
    model = trained(seed=2, modules_to_save=["4"]) if held else net()
    before, y = state(model), model(X)
    other = lora.adapter_of(trained(seed=3, r=3, target_modules=["3"]))
    real, calls = module.inject_targets, []

    def fails(*args: Any) -> Any:
        calls.append(args)
        report = real(*args)
        if len(calls) == 1:
            raise MemoryError
        return report

    monkeypatch.setattr(module, "inject_targets", fails)
    with pytest.raises(MemoryError):
        lora.apply_adapter(model, other)
    assert same(state(model), before)
    assert torch.equal(model(X), y)
    assert (injection_of(model) is not None) == held


def test_switching_between_adapters_of_one_layout_also_while_merged() -> None:
    first, second = trained(seed=2), trained(seed=3)
    model = net()
    for other in (first, second, first):
        lora.apply_adapter(model, lora.adapter_of(other))
        assert torch.equal(model(X), other(X))
        lora.merge(model)
        torch.testing.assert_close(model(X), other(X))
    lora.remove(model)
    assert same(state(model), state(net()))


def test_hand_built_layers_are_filled_all_or_none() -> None:
    model = nn.Sequential(lora.Linear(6, 6, r=2), nn.Tanh(), lora.Conv2d(1, 2, 3, r=1)).eval()
    lora.mark_only_lora_as_trainable(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    adapter = lora.adapter_of(other)
    before = state(model)
    with pytest.raises(AdapterError, match=r"missing +2\.lora_B"):
        lora.apply_adapter(model, changed(adapter, **{"2.lora_B": None}))
    unfolded = adapter.tensors["2.lora_A"] + 1  # not block-diagonal any more
    with pytest.raises(AdapterError, match="2: not in Microsoft's folded form"):
        lora.apply_adapter(model, changed(adapter, **{"2.lora_A": unfolded}))
    assert same(state(model), before)
    lora.apply_adapter(model, adapter)
    assert same(state(model), state(other))


# The base.


def test_the_base_is_checked() -> None:
    adapter = lora.adapter_of(trained())
    assert re.fullmatch(r"[0-9a-f]{16}:[0-9a-f]{16}", adapter.metadata[BASE])
    assert lora.apply_adapter(net(), adapter).base == "checked"
    assert lora.apply_adapter(net().to(torch.bfloat16), adapter).base == "checked"  # the same base, rounded
    nowhere = lora.apply_adapter(net(), Adapter(adapter.config, adapter.tensors))
    assert nowhere.base == "unknown"
    assert "not checked" in str(nowhere)


def test_another_base_of_the_same_shapes_needs_permission() -> None:
    adapter = lora.adapter_of(trained())
    other = net()
    with torch.no_grad():
        other[4].weight.mul_(2)
    before = state(other)
    with pytest.raises(BaseMismatchError, match=r"same shapes but different values .* allow_base_mismatch=True"):
        lora.apply_adapter(other, adapter)
    assert same(state(other), before)
    report = lora.apply_adapter(other, adapter, allow_base_mismatch=True)
    assert report.base == "other"
    assert "as allowed" in str(report)


def test_a_base_of_other_shapes_is_refused_whatever_is_allowed() -> None:
    adapter = lora.adapter_of(trained())
    other = nn.Sequential(*net(), nn.Linear(3, 2))
    for allow in (False, True):
        with pytest.raises(BaseMismatchError, match="different parameters"):
            lora.apply_adapter(other, adapter, allow_base_mismatch=allow)


def test_base_weights_carried_along_must_be_the_bases() -> None:
    adapter = lora.adapter_of(trained())
    carried = changed(adapter, **{"4.weight": net()[4].weight.detach().to(torch.bfloat16)})
    assert lora.apply_adapter(net(), carried).applied == 4
    other = changed(adapter, **{"4.weight": torch.ones(3, 6)})
    with pytest.raises(AdapterError, match=r"other base +4\.weight"):
        lora.apply_adapter(net(), other)
    assert lora.apply_adapter(net(), other, allow_base_mismatch=True).applied == 4


# Fused blocks as plain updates.


@pytest.mark.parametrize("rslora", [False, True])
def test_blocks_are_written_out_and_restored_exactly(rslora: bool) -> None:
    fused = trained(enable_lora={"0": [True, False, True]}, rank_pattern={"3": 1}, use_rslora=rslora)
    adapter = lora.adapter_of(fused)
    plain = expand_blocks(adapter)
    assert not plain.config.enable_lora
    assert plain.config.rank_of("0") == 4
    assert plain.config.rank_of("3") == 1
    model = net()
    lora.apply_adapter(model, plain)
    torch.testing.assert_close(model(X), fused(X))
    back = narrow_blocks(plain, {"0": [True, False, True]})
    assert same(dict(back.tensors), dict(adapter.tensors))
    for name in adapter.modules:
        assert back.config.rank_of(name) == adapter.config.rank_of(name)
        assert back.config.alpha_of(name) == pytest.approx(adapter.config.alpha_of(name))
    assert expand_blocks(plain) is plain


def test_blocks_that_do_not_fit_are_refused() -> None:
    plain = expand_blocks(lora.adapter_of(trained(enable_lora={"0": [True, False, True]})))
    with pytest.raises(AdapterError, match=r"0: lora_B \(6, 4\) is not block-diagonal"):
        narrow_blocks(plain, {"0": [False, True, True]})
    with pytest.raises(AdapterError, match="not block-diagonal"):
        narrow_blocks(plain, {"0": [True, True, True]})


# Settings from files.


def test_the_tensors_of_a_file_say_what_its_expressions_would() -> None:
    tensors = {f"h.{n}.{leaf}.lora_{part}": torch.ones(2, 2) for n in (0, 1) for leaf in "qv" for part in "AB"}
    tensors |= {"h.1.q.lora_A": torch.ones(3, 2), "h.1.q.lora_B": torch.ones(2, 3)}
    config = lora.LoraConfig(
        r=2, target_modules=r"h\..*", rank_pattern={r".*1\.q": 3}, alpha_pattern={r"1\..*": 5, "q": 4}
    )
    read = without_expressions(Adapter(config, tensors)).config
    assert read.target_modules == r"h\.0\.q|h\.0\.v|h\.1\.q|h\.1\.v"
    assert [read.rank_of(f"h.{name}") for name in ("0.q", "0.v", "1.q", "1.v")] == [2, 2, 3, 2]
    assert [read.alpha_of(f"h.{name}") for name in ("0.q", "0.v", "1.q", "1.v")] == [4, 8, 5, 5]
    plain = config.replace(target_modules=["q", "v"], rank_pattern={"1.q": 3}, alpha_pattern={})
    assert without_expressions(Adapter(plain, tensors)).config == plain


def test_a_rank_that_no_setting_explains_stays_a_fault() -> None:
    tensors = {"q.lora_A": torch.ones(4, 2), "q.lora_B": torch.ones(2, 4)}
    config = lora.LoraConfig(r=2, target_modules=["q"], rank_pattern={".*q": 3})
    assert "do not have rank r = 2" in faults_of(without_expressions(Adapter(config, tensors)))[0]
