"""Arithmetic on adapters: equal to PEFT's where PEFT has it, and to plain matrices everywhere."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import loralib as lora
from loralib.adapter import Adapter, adapter_of, apply_adapter
from loralib.combine import METHODS, Update, combine, faults_of, resize, updates_of
from loralib.config import LoraConfig
from loralib.errors import AdapterError, BaseMismatchError, ConfigError
from loralib.formats.peft import write_peft
from loralib.injection import inject


class Small(nn.Module):
    """Every kind of layer that has plain low-rank factors."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 12)
        self.wide = nn.Linear(12, 20)
        self.narrow = nn.Linear(20, 6)
        self.conv = nn.Conv1d(1, 5, 3)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.narrow(torch.tanh(self.wide(self.table(ids))))
        return self.conv(hidden.flatten(0, 1)[:, None]).flatten(1)


@pytest.fixture(scope="module")
def base() -> Small:
    torch.manual_seed(0)
    return Small()


def trained(base: nn.Module, seed: int, **settings: Any) -> tuple[nn.Module, Adapter]:
    """An adapted copy of the base whose factors are all random, and its adapter."""
    model = copy.deepcopy(base)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["table", "wide", "narrow", "conv"], **settings}
    inject(model, LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model, adapter_of(model)


def deltas(adapter: Adapter) -> dict[str, Tensor]:
    return {name: update.scaling * update.B @ update.A for name, update in updates_of(adapter).items()}


def peft_combines(base: nn.Module, adapters: list[Adapter], path: Path, weights: list[float], **how: Any) -> Any:
    """The model on which PEFT has combined the same adapters."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, adapter in enumerate(adapters):
            write_peft(adapter, path / str(number))
        model = PeftModel.from_pretrained(copy.deepcopy(base), str(path / "0"), adapter_name="0")
        for number in range(1, len(adapters)):
            model.load_adapter(str(path / str(number)), adapter_name=str(number))
        names = [str(number) for number in range(len(adapters))]
        seeded = model.base_model.inject_adapter

        def inject_and_seed(*args: Any, **kwargs: Any) -> None:
            seeded(*args, **kwargs)  # draws random factors first
            torch.manual_seed(5)

        model.base_model.inject_adapter = inject_and_seed
        model.add_weighted_adapter(names, weights, "both", **how)
        model.set_adapter("both")
    return model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("weights", [[0.7, 0.4], [1.0, -0.5]])
def test_equal_to_peft(base: Small, tmp_path: Path, method: str, weights: list[float]) -> None:
    # PEFT combines convolutions wrongly by cat (it fills two axes of four); linear layers and embeddings are compared.
    adapters = [trained(base, seed, target_modules=["table", "wide", "narrow"])[1] for seed in (1, 2)]
    how: dict[str, Any] = {"density": 0.4} if method.startswith(("ties", "dare", "magnitude")) else {}
    cut = method.endswith("svd")
    if method.startswith("dare") and method.endswith("svd"):
        # The random mask lies on the embedding's table the other way round in PEFT.
        adapters = [trained(base, seed, target_modules=["wide", "narrow"])[1] for seed in (1, 2)]
    mine = combine(adapters, weights, method, seed=5, r=3 if cut else None, **how)
    theirs = peft_combines(
        base, adapters, tmp_path, weights, combination_type=method, svd_rank=3 if cut else None, **how
    )
    for name, delta in deltas(mine.adapter).items():
        layer = theirs.base_model.model.get_submodule(name)
        expected = layer.get_delta_weight("both")
        torch.testing.assert_close(delta.T if name == "table" else delta, expected, rtol=0, atol=1e-5)
    ids = torch.arange(8).view(2, 4)
    model = copy.deepcopy(base)
    apply_adapter(model, mine.adapter)
    torch.testing.assert_close(model(ids), theirs(ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_ties_signs_equal_peft(base: Small, tmp_path: Path, sign: str) -> None:
    adapters = [trained(base, seed, target_modules=["wide"])[1] for seed in (1, 2, 3)]
    how: dict[str, Any] = {"density": 0.5, "majority_sign_method": sign}
    theirs = peft_combines(base, adapters, tmp_path, [1, 1, 1], combination_type="ties", **how)
    mine = combine(adapters, [1, 1, 1], "ties", density=0.5, majority_sign=sign)
    expected = theirs.base_model.model.wide.get_delta_weight("both")
    torch.testing.assert_close(deltas(mine.adapter)["wide"], expected, rtol=0, atol=1e-5)


@given(
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    weights=st.lists(st.floats(-2, 2), min_size=3, max_size=3),
    rank=st.integers(1, 12),
    rslora=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_sums_are_exact_and_cuts_are_best(ranks: list[int], weights: list[float], rank: int, rslora: bool) -> None:
    torch.manual_seed(0)
    base = Small()
    adapters = [trained(base, n, r=r, use_rslora=rslora)[1] for n, r in enumerate(ranks)]
    weights = weights[: len(adapters)]
    whole = combine(adapters, weights, "cat")
    cut = combine(adapters, weights, "svd", r=rank)
    assert whole.error == 0
    squares, lost = 0.0, 0.0
    for name in updates_of(adapters[0]):
        wanted = sum(w * deltas(adapter)[name] for w, adapter in zip(weights, adapters, strict=True))
        assert isinstance(wanted, Tensor)
        torch.testing.assert_close(deltas(whole.adapter)[name], wanted, rtol=1e-5, atol=1e-6)
        S = torch.linalg.svdvals(wanted.double())
        error = (deltas(cut.adapter)[name] - wanted).norm()
        torch.testing.assert_close(error.double(), S[rank:].norm(), rtol=1e-3, atol=1e-5)
        squares, lost = squares + float((S**2).sum()), lost + float((S[rank:] ** 2).sum())
    if squares > 1e-6:
        assert cut.error == pytest.approx((lost / squares) ** 0.5, abs=1e-5)


def test_modules_that_one_adapter_lacks_count_as_zero(base: Small) -> None:
    one = trained(base, 1, target_modules=["wide"])[1]
    two = trained(base, 2, target_modules=["narrow"], layers_to_transform=None)[1]
    both = combine([one, two], [0.5, 2.0], "cat").adapter
    assert set(updates_of(both)) == {"wide", "narrow"}
    model = copy.deepcopy(base)
    apply_adapter(model, both)
    torch.testing.assert_close(deltas(both)["narrow"], 2 * deltas(two)["narrow"])
    torch.testing.assert_close(deltas(both)["wide"], 0.5 * deltas(one)["wide"])


def test_interpolation_and_subtraction(base: Small) -> None:
    start, end = trained(base, 1)[1], trained(base, 2, r=2)[1]
    middle = combine([start, end], [0.75, 0.25], "cat")
    difference = combine([start, end], [1.0, -1.0], "cat")
    nothing = combine([start, start], [1.0, -1.0], "svd", r=2)
    for name, delta in deltas(start).items():
        other = deltas(end)[name]
        torch.testing.assert_close(deltas(middle.adapter)[name], 0.75 * delta + 0.25 * other)
        torch.testing.assert_close(deltas(difference.adapter)[name], delta - other)
        assert deltas(nothing.adapter)[name].norm() < 1e-5
    assert combine([start, end], [0.75, 0.25], "svd", r=1).error > 0.1


def test_fused_blocks_are_combined_as_what_they_compute(base: Small) -> None:
    fused = trained(base, 1, target_modules=["wide"], enable_lora={"wide": [True, False]})
    plain = trained(base, 2, target_modules=["wide"])
    both = combine([fused[1], plain[1]], [1.0, 1.0], "cat").adapter
    model = copy.deepcopy(base)
    apply_adapter(model, both)
    ids = torch.arange(4)[None]
    # The layer is linear: the updates' effects on its input add up.
    x = base.table(ids)
    expected = fused[0].wide(x) + plain[0].wide(x) - base.wide(x)
    torch.testing.assert_close(model.wide(x), expected, rtol=0, atol=1e-5)


def test_resize_keeps_what_it_says(base: Small) -> None:
    _, adapter = trained(base, 1)
    half, more = resize(adapter, 2), resize(adapter, 9)
    by_energy = resize(adapter, energy=0.9)
    for name, delta in deltas(adapter).items():
        S = torch.linalg.svdvals(delta)
        kept = (S[:2] ** 2).sum() / (S**2).sum()
        assert 1 - half.errors[name] ** 2 == pytest.approx(float(kept), abs=1e-5)
        torch.testing.assert_close(deltas(more.adapter)[name], delta, rtol=1e-4, atol=1e-5)
        assert 1 - by_energy.errors[name] ** 2 >= 0.9
        rank = by_energy.adapter.config.rank_of(name)
        assert rank == 1 or (S[: rank - 1] ** 2).sum() / (S**2).sum() < 0.9
    assert half.adapter.config.r == 2
    assert more.adapter.config.r == 9
    assert 0 < half.energy < 1
    assert more.energy == pytest.approx(1)


def test_nothing_is_edited_in_place(base: Small) -> None:
    _, adapter = trained(base, 1)
    before = {name: tensor.clone() for name, tensor in adapter.tensors.items()}
    resize(adapter, 1)
    for method in METHODS:
        drops = {"density": 0.5} if not method.startswith(("cat", "svd", "linear")) else {}
        combine([adapter, adapter], [1.0, 2.0], method, **drops)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.tensors.items())


def test_update_norm_needs_no_product() -> None:
    update = Update(torch.randn(3, 50), torch.randn(40, 3), -0.7)
    assert update.norm() == pytest.approx(float((0.7 * update.B @ update.A).norm()), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"method": "svdd"}, "did you mean 'svd'"),
        ({"weights": [1.0]}, "2 adapters and 1 weights"),
        ({"weights": [1.0, float("nan")]}, "finite"),
        ({"method": "ties"}, "density is None"),
        ({"method": "ties", "density": 1.5}, "density is 1.5"),
        ({"method": "cat", "density": 0.5}, "drops no values"),
        ({"method": "cat", "r": 4}, "only for methods that end in svd"),
        ({"r": 0}, "r is 0"),
        ({"majority_sign": "sum"}, "majority_sign is 'sum'"),
    ],
)
def test_arguments_that_cannot_be(base: Small, arguments: dict[str, Any], expected: str) -> None:
    adapter = trained(base, 1)[1]
    with pytest.raises(ConfigError, match=f"(?i){expected}"):
        combine(**{"adapters": [adapter, adapter], "weights": [1.0, 1.0], **arguments})


def test_adapters_that_cannot_be_combined(base: Small) -> None:
    adapter = trained(base, 1, target_modules=["wide"])[1]
    with_head = trained(base, 1, target_modules=["wide"], modules_to_save=["narrow"])[1]
    with pytest.raises(AdapterError, match=r"narrow.weight \(adapter 2\)"):
        combine([adapter, with_head], [1, 1], "cat")
    other = Adapter(adapter.config, adapter.tensors, {"loralib.base": "aaaa:bbbb"})
    with pytest.raises(BaseMismatchError, match="different base models"):
        combine([adapter, other], [1, 1], "cat")
    uneven = trained(base, 1, target_modules=["wide"], r=2)[1]
    with pytest.raises(ConfigError, match="equal ranks; use cat or svd"):
        combine([adapter, uneven], [1, 1], "linear")
    bigger = Adapter(
        adapter.config.replace(r=1),
        {"wide.lora_A": torch.ones(1, 13), "wide.lora_B": torch.ones(20, 1)},
    )
    with pytest.raises(AdapterError, match="different sizes"):
        combine([adapter, bigger], [1, 1], "cat")
    for odd in ({"use_dora": True}, {"init_lora_weights": "pissa"}, {"lora_bias": True}):
        with pytest.raises(AdapterError, match="not simply a low-rank update added to the base weights"):
            combine([Adapter(adapter.config.replace(**odd), adapter.tensors)], [1], "cat")
    with pytest.raises(ConfigError, match="exactly one of r and energy"):
        resize(adapter)
    with pytest.raises(ConfigError, match="energy is 0"):
        resize(adapter, energy=0.0)


def test_all_faults_of_a_damaged_adapter_are_named(base: Small) -> None:
    _, adapter = trained(base, 1)
    assert faults_of(adapter) == []
    broken = dict(adapter.tensors)
    del broken["wide.lora_B"]
    broken["narrow.lora_A"] = torch.full((4, 20), float("nan"))
    broken["conv.lora_A"] = torch.ones(3, 1, 3)
    broken["table.lora_embedding_A"] = torch.ones(4, 11, dtype=torch.int64)
    broken["extra.lora_A"], broken["extra.lora_B"] = torch.ones(4, 0), torch.ones(2, 4)
    told = "\n".join(faults_of(Adapter(adapter.config, broken)))
    for expected in (
        "wide: lora_B is missing",
        "narrow.lora_A: holds NaN",
        "conv: A (3, 1, 3)",
        "table.lora_embedding_A: torch.int64",
        "extra.lora_A: shape (4, 0) holds no values",
    ):
        assert expected in told
    assert "no LoRA factors" in faults_of(Adapter(LoraConfig(target_modules=["x"]), {}))[0]
    with pytest.raises(AdapterError, match="damaged"):
        updates_of(Adapter(adapter.config, broken))


def test_public_functions_work_on_an_injected_model(base: Small) -> None:
    model, adapter = trained(base, 3, target_modules=["wide", "narrow"])
    before = model(torch.arange(4)[None])
    lora.apply_adapter(model, resize(adapter, 4).adapter)
    torch.testing.assert_close(model(torch.arange(4)[None]), before, rtol=1e-4, atol=1e-5)
