"""How to add a variant: another trained tensor takes one class, another storage of weights takes one line."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import Parameter

import loralib as lora
from loralib import layers, targets
from loralib.adapter import Adapter
from loralib.delta import dense, dora_weight
from loralib.injection import adapted_layers
from loralib.layers import LoRALayer, LoRALinear

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(5))


class MagnitudeLinear(LoRALinear):
    """Like DoRA: a third tensor scales the rows of W + delta."""

    lora_magnitude_vector: Parameter
    computed: int  # a setting of its own, which must be gone after remove()

    def tensor_shapes(self, r: int) -> dict[str, tuple[int, ...]]:
        return {**super().tensor_shapes(r), "lora_magnitude_vector": (self._sizes()[1],)}

    def reset_lora_parameters(self) -> None:
        super().reset_lora_parameters()
        self.computed = 0
        with torch.no_grad():
            self.lora_magnitude_vector.copy_(dense(self.base_weight).norm(dim=1))

    def delta_weight(self) -> Tensor:
        weight = dense(self.base_weight)
        return dora_weight(weight, super().delta_weight(), self.lora_magnitude_vector) - weight

    def forward(self, x: Tensor) -> Tensor:
        y = self._base_forward(x)
        return y + F.linear(x, self.delta_weight().to(x.dtype)) if self._active else y


@pytest.fixture(autouse=True)
def chosen_for_linear_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    choose = targets._mixin_for

    def mixin_for(*args: Any) -> type[LoRALayer]:
        mixin = choose(*args)
        return MagnitudeLinear if mixin is LoRALinear else mixin

    monkeypatch.setattr(targets, "_mixin_for", mixin_for)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)).eval()


def trained() -> nn.Sequential:
    """A model whose adapter was trained for some steps; each of the three tensors has its own gradients."""
    model = net()
    lora.inject(model, lora.LoraConfig(r=2, target_modules=["0", "2"]))
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    assert len(before) == 6
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
    after = [p for p in model.parameters() if p.requires_grad]
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    return model


def test_it_starts_as_the_base_and_goes_without_a_trace() -> None:
    model = net()
    base, own = model(X), [sorted(vars(module)) for module in model.modules()]
    report = lora.inject(model, lora.LoraConfig(r=2, target_modules=["0", "2"]))
    assert report.trainable == 2 * (6 + 4) + 4 + 2 * (4 + 2) + 2
    torch.testing.assert_close(model(X), base)
    lora.remove(model)
    assert torch.equal(model(X), base)
    assert [sorted(vars(module)) for module in model.modules()] == own
    assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_its_tensors_are_taken_put_on_saved_and_loaded(tmp_path: Path) -> None:
    model = trained()
    adapter = lora.adapter_of(model)
    leaves = ("lora_A", "lora_B", "lora_magnitude_vector")
    assert list(adapter.tensors) == [f"{name}.{leaf}" for name in "02" for leaf in leaves]
    assert list(adapted_layers(model)[0][1].trained_tensors()) == list(leaves)
    other = net()
    assert lora.apply_adapter(other, adapter).applied == 6
    assert torch.equal(other(X), model(X))
    lora.save_adapter(model, tmp_path)
    loaded = net()
    lora.load_adapter(loaded, tmp_path)
    assert torch.equal(loaded(X), model(X))
    kept = {name: tensor for name, tensor in adapter.tensors.items() if name != "2.lora_magnitude_vector"}
    with pytest.raises(lora.LoraError, match=r"missing +2\.lora_magnitude_vector \(2,\)"):
        lora.apply_adapter(net(), Adapter(adapter.config, kept))
    assert lora.lora_state_dict(model).keys() == adapter.tensors.keys()


def test_it_merges_switches_off_and_is_removed_bit_exactly() -> None:
    model, base = trained(), net()
    adapted = model(X)
    assert not torch.allclose(adapted, base(X))
    with lora.disabled(model):
        assert torch.equal(model(X), base(X))
    twin = copy.deepcopy(model)
    assert torch.equal(twin(X), adapted)
    lora.merge(model)
    torch.testing.assert_close(model(X), adapted)
    lora.remove(model)
    assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert [type(module) for module in model] == [nn.Linear, nn.Tanh, nn.Linear]


def test_the_base_weight_is_made_dense_by_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here, a weight that is stored at half its size."""
    layer = lora.Linear(4, 3, r=2, merge_weights=False)
    nn.init.ones_(layer.lora_B)
    weight, delta = layer.weight.clone(), layer.delta_weight()
    monkeypatch.setattr(layers, "dense", lambda stored: 2 * stored)
    layer.merge()
    torch.testing.assert_close(layer.weight, 2 * weight + delta)
    layer.unmerge()
    assert torch.equal(layer.weight, weight)


def test_threads_get_one_class_for_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2)

    class Classes(dict[Any, Any]):
        def __contains__(self, key: object) -> bool:
            present = super().__contains__(key)
            both.wait(timeout=10)  # until the other thread has found none either
            return present

    monkeypatch.setattr(layers, "_CLASSES", Classes())
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: layers.adapted_class(LoRALinear, nn.Linear), range(2))
    assert one is other
