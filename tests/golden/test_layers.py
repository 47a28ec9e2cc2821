"""The layers, the helpers and the checkpoints of Microsoft's loralib 0.1.2, number by number."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import loralib as lora

pytestmark = pytest.mark.golden

BIAS_MODES = ("none", "all", "lora_only")


# transformers' GPT-2 and Microsoft's, both without an adapter, differ by up to 2e-6 of the largest logit.
LOGITS = 1e-5


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-6) -> bool:
    """Whether two tensors agree to 1e-6 of the largest value."""
    worst = float((ours.detach().double() - theirs.double()).abs().max())
    return ours.shape == theirs.shape and worst <= tolerance * max(1.0, float(theirs.abs().max()))


@pytest.fixture(scope="module")
def layers(golden_dir: Path) -> list[tuple[dict[str, Any], dict[str, Tensor]]]:
    """Each layer's settings, and its tensors by field."""
    tensors = load_file(golden_dir / "layers" / "layers.safetensors")
    settings = json.loads((golden_dir / "layers" / "layers.json").read_text(encoding="utf-8"))
    fields: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, field = key.rpartition(".")
        fields.setdefault(name, {})[field] = tensor
    assert fields.keys() == {entry["name"] for entry in settings}
    return [(entry, fields[entry["name"]]) for entry in settings]


def filled(entry: Mapping[str, Any], fields: Mapping[str, Tensor]) -> nn.Module:
    layer: nn.Module = getattr(lora, entry["cls"])(**entry["args"])
    layer.load_state_dict({name: fields[name] for name in ("weight", "bias", "lora_A", "lora_B") if name in fields})
    return layer


def test_every_layer_computes_what_microsofts_does(
    layers: list[tuple[dict[str, Any], dict[str, Tensor]]],
) -> None:
    wrong = []
    for entry, fields in layers:
        layer = filled(entry, fields).train()
        before = fields["weight"].clone()

        def check(what: str, ours: Tensor, field: str, entry: Any = entry, fields: Any = fields) -> None:
            if not close(ours, fields[field]):
                wrong.append(f"{entry['name']}: {what}")

        y = layer(fields["x"])
        check("unmerged output", y, "y_unmerged")
        y.backward(fields["grad_y"])
        check("gradient of A", layer.lora_A.grad, "grad_lora_A")
        check("gradient of B", layer.lora_B.grad, "grad_lora_B")
        layer.eval()
        check("merged weight", layer.weight, "merged_weight")
        check("merged output", layer(fields["x"]), "y_merged")
        layer.train()
        check("weight after unmerging", layer.weight, "weight_after_unmerge")
        if not torch.equal(layer.weight, before):  # theirs is off by rounding, ours is not
            wrong.append(f"{entry['name']}: unmerging is not exact")
        if "merge_AB" in fields:
            check("update", layer.delta_weight() / layer.scaling, "merge_AB")
        if layer.scaling != entry["scaling"]:
            wrong.append(f"{entry['name']}: scaling {layer.scaling}")
        keys = [key for key in entry["state_dict_keys"] if not key.startswith("conv.")]
        if list(layer.state_dict()) != keys:
            wrong.append(f"{entry['name']}: keys {list(layer.state_dict())}")
    assert layers
    assert not wrong


def test_layers_load_microsofts_doubled_keys(layers: list[tuple[dict[str, Any], dict[str, Tensor]]]) -> None:
    doubled = [(entry, fields) for entry, fields in layers if "conv.weight" in entry["state_dict_keys"]]
    for entry, fields in doubled:
        layer: nn.Module = getattr(lora, entry["cls"])(**entry["args"])
        layer.load_state_dict({key: fields[key.removeprefix("conv.")] for key in entry["state_dict_keys"]})
        assert close(layer.train()(fields["x"]), fields["y_unmerged"])
    assert doubled


class Composite(nn.Module):
    """The model that composite.json describes."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = lora.Embedding(10, 8, r=2)
        self.lin = lora.Linear(8, 6, r=2)
        self.lin_nobias = lora.Linear(8, 6, r=2, bias=False)
        self.lin_r0 = lora.Linear(8, 6, r=0)
        self.conv = lora.Conv2d(2, 4, 3, r=2)
        self.plain = nn.Linear(6, 3)
        self.blocks = nn.ModuleList(self.block() for _ in range(2))
        self.rel_bias_table = nn.Parameter(torch.zeros(3))
        self.head = nn.Linear(8, 2, bias=False)

    @staticmethod
    def block() -> nn.Module:
        attn = lora.MergedLinear(8, 24, r=2, enable_lora=[True, False, True])
        return nn.ModuleDict({"attn": attn, "proj": nn.Linear(8, 8), "norm": nn.LayerNorm(8)})


@pytest.fixture(scope="module")
def composite(golden_dir: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((golden_dir / "layers" / "composite.json").read_text(encoding="utf-8"))
    return facts


def own(keys: list[str]) -> list[str]:
    """Without the second copy of convolutions' weights, which is a fault of 0.1.2."""
    return [key for key in keys if ".conv." not in key]


def test_composite_has_microsofts_keys(composite: dict[str, Any]) -> None:
    model = Composite()
    assert list(model.state_dict()) == own(composite["state_dict_keys"])
    assert [name for name, _ in model.named_parameters()] == composite["parameter_names"]
    state = model.state_dict()
    doubled = {key: state[key.replace(".conv.", ".")] for key in composite["state_dict_keys"]}
    assert Composite().load_state_dict(doubled)  # strict: their keys are all accepted


@pytest.mark.parametrize("bias", BIAS_MODES)
def test_composite_trains_and_saves_what_microsofts_does(composite: dict[str, Any], bias: str) -> None:
    model, facts = Composite(), composite[bias]
    lora.mark_only_lora_as_trainable(model, bias=bias)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(trainable) == sorted(facts["trainable"])
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == facts["trainable_numel"]
    assert sorted(lora.lora_state_dict(model, bias=bias)) == sorted(own(facts["lora_state_dict_keys"]))


def test_composite_refuses_bad_modes_with_their_error(composite: dict[str, Any]) -> None:
    import builtins

    with pytest.raises(getattr(builtins, composite["bad_mode_error"])):
        lora.mark_only_lora_as_trainable(Composite(), bias="some")
    with pytest.raises(getattr(builtins, composite["bad_mode_error_state_dict"])):
        lora.lora_state_dict(Composite(), bias="some")


def test_recorded_failures_are_not_copied(golden_dir: Path) -> None:
    """For each use in errors.json: what wrongly fails there works here; what rightly fails there fails here too."""

    def runs(layer: nn.Module, *shape: int) -> None:
        x = torch.randn(2, *shape)
        nn.init.normal_(layer.lora_B)
        y = layer(x)
        assert torch.allclose(layer.eval()(x), y, atol=1e-5)
        layer.train()
        assert not torch.allclose(y, layer._conv_forward(x, layer.weight, layer.bias))

    def nothing_enabled() -> None:
        layer = lora.MergedLinear(4, 6, r=2, enable_lora=[False, False, False])
        x = torch.randn(2, 4)
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))

    def fan_in() -> None:
        layer = lora.MergedLinear(4, 6, r=2, enable_lora=[True, False], fan_in_fan_out=True)
        nn.init.normal_(layer.lora_B)
        x = torch.randn(2, 4)
        assert torch.allclose(layer(x), layer.eval()(x), atol=1e-5)

    def plain() -> None:
        layer = lora.Linear(4, 6, r=0)
        assert layer.eval().train() is layer

    def not_divisible() -> None:
        with pytest.raises(AssertionError):
            lora.MergedLinear(4, 7, r=2, enable_lora=[True, False])

    uses = {
        "Conv1d kernel 3": lambda: runs(lora.Conv1d(4, 6, 3, r=2), 4, 9),
        "Conv3d kernel 3": lambda: runs(lora.Conv3d(4, 6, 3, r=2), 4, 5, 5, 5),
        "Conv2d kernel_size tuple": lambda: runs(lora.Conv2d(4, 6, (3, 2), r=2), 4, 5, 5),
        "MergedLinear r=2 enable_lora all False forward (train)": nothing_enabled,
        "MergedLinear out_features not divisible": not_divisible,
        "MergedLinear fan_in_fan_out forward, in != out": fan_in,
        "Linear r=0 eval/train": plain,
    }
    recorded = json.loads((golden_dir / "layers" / "errors.json").read_text(encoding="utf-8"))
    assert recorded.keys() <= uses.keys()
    for use in recorded:
        uses[use]()


# Checkpoints of Microsoft's GPT-2.


@pytest.fixture(scope="module")
def facts(golden_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((golden_dir / "layers" / "ms_checkpoint.json").read_text(encoding="utf-8"))
    return found


def base_model(golden_dir: Path, facts: dict[str, Any]) -> GPT2LMHeadModel:
    folder = golden_dir / "layers"
    config = GPT2Config(**json.loads((golden_dir / "train" / "config.json").read_text(encoding="utf-8")))
    model = GPT2LMHeadModel(config).eval()
    missing = model.transformer.load_state_dict(load_file(folder / facts["base_weights"]), strict=False)
    assert not missing.unexpected_keys
    assert not missing.missing_keys
    model.tie_weights()
    return model


def settings(facts: dict[str, Any]) -> lora.LoraConfig:
    return lora.LoraConfig(
        r=facts["lora_r"],
        lora_alpha=facts["lora_alpha"],
        target_modules=["c_attn"],
        enable_lora={"c_attn": facts["enable_lora"]},
    )


@pytest.mark.parametrize("form", ["released", "flat", "safetensors"])
@pytest.mark.parametrize("which", ["lora_checkpoint", "full_checkpoint"])
def test_microsofts_checkpoints_load(
    golden_dir: Path, facts: dict[str, Any], which: str, form: str, tmp_path: Path
) -> None:
    folder = golden_dir / "layers"
    state, path = load_file(folder / facts[which]["file"]), tmp_path / "model.pt"
    if form == "released":
        torch.save({"model_state_dict": state}, path)
    elif form == "flat":  # what lora_state_dict gives, without DistributedDataParallel around the model
        torch.save({name.removeprefix("module."): tensor for name, tensor in state.items()}, path)
    else:
        path = folder / facts[which]["file"]
    model = base_model(golden_dir, facts)
    expected = load_file(folder / facts["expected"].split()[0])
    with torch.no_grad():
        assert close(model(expected["input_ids"]).logits, expected["logits_base_only"], LOGITS)
        report = lora.load_adapter(model, path, config=settings(facts))
        factors = [name for name in state if "lora_" in name]
        assert str(report).startswith(f"{len(factors)} of {len(factors)} tensors applied")
        assert close(model(expected["input_ids"]).logits, expected["logits"], LOGITS)
        lora.merge(model)
        merged = load_file(folder / facts["merged"].split()[0])
        for name, tensor in merged.items():
            assert close(model.transformer.get_parameter(name), tensor), name
        lora.unmerge(model)
        with lora.disabled(model):
            assert close(model(expected["input_ids"]).logits, expected["logits_base_only"], LOGITS)


def test_a_checkpoint_written_here_is_microsofts(golden_dir: Path, facts: dict[str, Any], tmp_path: Path) -> None:
    """Loading, then lora_state_dict: the same keys (but for the wrapper's prefix) and the same bits."""
    theirs = load_file(golden_dir / "layers" / facts["lora_checkpoint"]["file"])
    model = base_model(golden_dir, facts)
    lora.load_adapter(model, golden_dir / "layers" / facts["lora_checkpoint"]["file"], config=settings(facts))
    ours = lora.lora_state_dict(model)
    assert {f"module.{name}" for name in ours} == set(theirs)
    assert all(torch.equal(tensor, theirs[f"module.{name}"]) for name, tensor in ours.items())


def test_a_whole_checkpoint_of_another_base_is_refused(golden_dir: Path, facts: dict[str, Any]) -> None:
    model = base_model(golden_dir, facts)
    with torch.no_grad():
        model.transformer.wpe.weight.add_(1.0)
    with pytest.raises(lora.LoraError, match=r"other base .*wpe\.weight"):
        lora.load_adapter(model, golden_dir / "layers" / facts["full_checkpoint"]["file"], config=settings(facts))
