"""The comparison with PEFT in README.md, row by row: both are given the same task."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import loralib as lora
from loralib.errors import AdapterError, BaseMismatchError, MergeError, TargetError

WEIGHTS = "adapter_model.safetensors"


class Small(nn.Module):
    """Two projections; the seed decides their weights."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.q, self.v = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.v(self.q(x))


def ours(model: nn.Module, *targets: str) -> nn.Module:
    """The model with a loralib adapter that has an effect."""
    lora.inject(model, lora.LoraConfig(r=4, target_modules=list(targets)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_()
    return model


def theirs(model: nn.Module, *targets: str) -> peft.PeftModel:
    """The model with a PEFT adapter that has an effect."""
    return peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False), mixed=False
    )


def rewrite(directory: Path, *, without: str = "", extra: str = "") -> None:
    """Removes a tensor from an adapter's file, or adds one."""
    tensors = load_file(directory / WEIGHTS)
    tensors = {name: tensor for name, tensor in tensors.items() if not (without and without in name)}
    if extra:
        tensors[extra] = torch.zeros(2, 2)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def test_merging_and_unmerging_a_bf16_base() -> None:
    model = ours(Small().bfloat16(), "q")
    before = model.q.weight.detach().clone()
    for _ in range(100):
        lora.merge(model)
        lora.unmerge(model)
    assert torch.equal(model.q.weight, before)

    wrapped = theirs(Small().bfloat16(), "q")
    layer = wrapped.base_model.model.q
    for _ in range(100):
        wrapped.merge_adapter()
        wrapped.unmerge_adapter()
    assert not torch.equal(layer.base_layer.weight, before)


def test_a_target_that_matches_nothing() -> None:
    with pytest.raises(TargetError, match="k_prj"):
        lora.inject(Small(), lora.LoraConfig(r=4, target_modules=["q", "k_prj"]))

    assert theirs(Small(), "q", "k_prj").targeted_module_names == ["q"]


def test_a_file_that_lacks_a_tensor(tmp_path: Path) -> None:
    lora.save_adapter(ours(Small(), "q", "v"), tmp_path / "ours")
    rewrite(tmp_path / "ours", without="v.lora_B")
    with pytest.raises(AdapterError, match="missing"):
        lora.load_adapter(Small(), tmp_path / "ours")

    theirs(Small(), "q", "v").save_pretrained(tmp_path / "theirs")
    rewrite(tmp_path / "theirs", without="v.lora_B")
    with pytest.warns(UserWarning, match="missing adapter keys"):
        peft.PeftModel.from_pretrained(Small(), tmp_path / "theirs")


def test_a_file_with_a_tensor_too_many(tmp_path: Path) -> None:
    extra = "base_model.model.k.lora_B.weight"
    lora.save_adapter(ours(Small(), "q", "v"), tmp_path / "ours")
    rewrite(tmp_path / "ours", extra=extra)
    with pytest.raises(AdapterError, match="unexpected"):
        lora.load_adapter(Small(), tmp_path / "ours")

    theirs(Small(), "q", "v").save_pretrained(tmp_path / "theirs")
    rewrite(tmp_path / "theirs", extra=extra)
    peft.PeftModel.from_pretrained(Small(), tmp_path / "theirs")  # a warning would be an error here


def test_an_adapter_of_another_base_of_the_same_shapes(tmp_path: Path) -> None:
    lora.save_adapter(ours(Small(seed=0), "q", "v"), tmp_path / "ours")
    with pytest.raises(BaseMismatchError):
        lora.load_adapter(Small(seed=1), tmp_path / "ours")

    theirs(Small(seed=0), "q", "v").save_pretrained(tmp_path / "theirs")
    peft.PeftModel.from_pretrained(Small(seed=1), tmp_path / "theirs")  # a warning would be an error here


@torch.no_grad()
def test_layers_whose_weights_a_parent_reads_itself() -> None:
    def encoder() -> nn.TransformerEncoder:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()

    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    plain = encoder()(x)
    assert not torch.allclose(ours(encoder(), "linear1", "linear2").eval()(x), plain)
    assert torch.equal(theirs(encoder(), "linear1", "linear2").eval()(x), plain)


def test_merging_an_adapter_with_nan() -> None:
    model = ours(Small(), "q")
    model.q.lora_A.data[0, 0] = float("nan")
    with pytest.raises(MergeError, match="NaN"):
        lora.merge(model)

    wrapped = theirs(Small(), "q")
    wrapped.base_model.model.q.lora_A["default"].weight.data[0, 0] = float("nan")
    assert wrapped.merge_and_unload().q.weight.isnan().any()
