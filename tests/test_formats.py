"""Adapter files: PEFT directories and Microsoft checkpoints are read completely or not at all, and run no code."""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import loralib as lora
from loralib.errors import AdapterError, BaseMismatchError, FormatError, LoraError, OutputError
from loralib.formats import read_microsoft, read_peft, tensors, write_microsoft
from loralib.injection import injection_of

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(5))
CONFIG = lora.LoraConfig(r=2, lora_alpha=4, target_modules=["0", "2"])


def net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).eval()


def trained(seed: int = 1, config: lora.LoraConfig = CONFIG) -> Any:
    model = net()
    lora.inject(model, config)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    lora.save_adapter(trained(), tmp_path / "adapter")
    return tmp_path / "adapter"


def refused(path: Path, error: type[LoraError] = LoraError, **more: Any) -> str:
    """Loading fails with one of our errors, and leaves the model as it was."""
    for model in (net(), trained(seed=2)):
        before, held = {k: t.clone() for k, t in model.state_dict().items()}, injection_of(model) is not None
        with pytest.raises(error) as caught:
            lora.load_adapter(model, path, **more)
        assert list(model.state_dict()) == list(before)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert (injection_of(model) is not None) == held
    return str(caught.value)


# PEFT directories.


def test_an_adapter_without_values_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="on the meta device and have no values"):
        lora.save_adapter(trained().to("meta"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_tilde_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    lora.save_adapter(trained(), "~/mine")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert lora.read_adapter("~/mine").modules


def test_what_is_written(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    settings = json.loads((saved / "adapter_config.json").read_text(encoding="utf-8"))
    assert settings["peft_type"] == "LORA"
    assert settings["target_modules"] == ["0", "2"]
    assert not any("loralib" in key or key == "enable_lora" for key in settings)
    with safe_open(str(saved / "adapter_model.safetensors"), "pt") as file:
        assert set(file.keys()) == {f"base_model.model.{i}.lora_{f}.weight" for i in (0, 2) for f in "AB"}
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert set(metadata) == {"format", "loralib.base"}


@pytest.mark.parametrize("cache", ["/srv/me/.cache/huggingface/hub/", "D:\\me\\hub\\"])
def test_a_place_in_the_hubs_cache_is_written_as_the_models_name(cache: str, tmp_path: Path) -> None:
    slash = cache[-1]
    model = trained()
    model.name_or_path = slash.join([cache[:-1], "models--some--model-1", "snapshots", "0123abcd"])
    assert lora.save_adapter(model, tmp_path).config.base_model_name_or_path == "some/model-1"
    settings = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert settings["base_model_name_or_path"] == "some/model-1"


def test_what_is_read(saved: Path) -> None:
    expected = trained()(X)
    for path in (saved, str(saved), saved / "adapter_config.json", saved / "adapter_model.safetensors"):
        model = net()
        report = lora.load_adapter(model, path)
        assert str(report) == "4 of 4 tensors applied (base model checked)"
        assert torch.equal(model(X), expected)
    adapter = lora.read_adapter(saved)
    assert adapter.modules == ("0", "2")
    assert adapter.config.r == 2


def test_writing_again_replaces_ours_and_leaves_others(saved: Path) -> None:
    (saved / "notes.txt").write_text("mine", encoding="utf-8")
    other = trained(seed=3)
    lora.save_adapter(other, saved)
    model = net()
    lora.load_adapter(model, saved)
    assert torch.equal(model(X), other(X))
    assert (saved / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_a_run_killed_between_tensors_and_config_leaves_no_mixture(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["loralib.formats.tensors"]
    for step in ("write_safetensors", "write_json"):
        lora.save_adapter(trained(), saved)

        def killed(*args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(module, step, killed)
            with pytest.raises(KeyboardInterrupt):
                lora.save_adapter(trained(seed=3, config=CONFIG.replace(lora_alpha=32)), saved)
        assert "contains no adapter: adapter_config.json missing" in refused(saved, AdapterError)


def test_directories_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(OutputError, match="there is a file where a directory is needed"):
        lora.save_adapter(trained(), tmp_path / "file")
    with pytest.raises(LoraError, match="Sequential holds no adapter"):
        lora.save_adapter(net(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_directories_that_hold_no_adapter(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "nowhere", AdapterError)
    message = refused(tmp_path, AdapterError)
    assert "contains no adapter: adapter_config.json and adapter_model.safetensors missing" in message
    assert message.endswith("Give the directory that training or save_adapter() wrote.")
    for name in ("default", "other"):
        lora.save_adapter(trained(), tmp_path / name)
    assert refused(tmp_path, AdapterError).endswith(
        f"in it there are adapters in {tmp_path / 'default'}, {tmp_path / 'other'}."
    )


def test_tensors_missing(saved: Path) -> None:
    (saved / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors missing" in refused(saved, AdapterError)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 60, 200, -1])
def test_truncated_tensors(saved: Path, size: int) -> None:
    path = saved / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert str(path) in refused(saved, FormatError)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe\x00", b"null", b"[" * 100_000, b"3" * 5000, b'{"r": NaN}']
)
def test_broken_settings(saved: Path, content: bytes) -> None:
    (saved / "adapter_config.json").write_bytes(content)
    refused(saved)


def test_settings_with_a_byte_order_mark(saved: Path) -> None:
    path = saved / "adapter_config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    lora.load_adapter(net(), saved)


def test_settings_and_tensors_that_contradict(saved: Path) -> None:
    path = saved / "adapter_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**values, "r": 3}), encoding="utf-8")
    message = refused(saved, AdapterError)
    assert message.count("misshapen") == 4
    path.write_text(json.dumps({**values, "use_qalora": True}), encoding="utf-8")
    assert "use_qalora" in refused(saved, AdapterError)
    path.write_text(json.dumps({**values, "peft_type": "LOHA"}), encoding="utf-8")
    assert "LOHA" in refused(saved, AdapterError)


def test_an_adapter_for_another_base(saved: Path) -> None:
    other = net()
    with torch.no_grad():
        other[0].weight.mul_(2)
    with pytest.raises(BaseMismatchError, match="allow_base_mismatch=True"):
        lora.load_adapter(other, saved)
    assert lora.load_adapter(other, saved, allow_base_mismatch=True).base == "other"
    wide = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    with pytest.raises(AdapterError, match="misshapen"):
        lora.load_adapter(wide, saved)


def test_an_adapter_that_stores_its_settings_is_given_no_others(saved: Path) -> None:
    with pytest.raises(AdapterError, match="stores its own settings; leave out config"):
        lora.load_adapter(net(), saved, config=CONFIG)


def test_the_name_of_the_base_goes_along(tmp_path: Path) -> None:
    model = trained(config=CONFIG.replace(base_model_name_or_path="some/base"))
    lora.save_adapter(model, tmp_path)
    assert lora.read_adapter(tmp_path).config.base_model_name_or_path == "some/base"


def test_a_revision_of_the_base_goes_where_peft_reads_it(tmp_path: Path) -> None:
    lora.save_adapter(trained(config=CONFIG.replace(base_model_name_or_path="some/base@v2")), tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("some/base", "v2")
    assert lora.read_adapter(tmp_path).config.base_model_name_or_path == "some/base@v2"


def test_other_tools_read_the_name_that_our_base_has_on_the_hub(tmp_path: Path) -> None:
    ours, original = "smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct"
    lora.save_adapter(trained(config=CONFIG.replace(base_model_name_or_path=ours)), tmp_path / "a")
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text(encoding="utf-8"))
    assert settings["base_model_name_or_path"] == original
    adapter = lora.read_adapter(tmp_path / "a")
    assert adapter.config.base_model_name_or_path == ours  # which we load without a hub, as it was in training
    assert list(adapter.metadata) == ["loralib.base"]
    rounded = net()
    with torch.no_grad():
        rounded[0].weight.mul_(1.1)
    rounded.name_or_path = original
    assert "one of the two in 4 bits" in str(lora.load_adapter(rounded, tmp_path / "a"))
    rounded.name_or_path = "some/other"
    with pytest.raises(BaseMismatchError):
        lora.load_adapter(rounded, tmp_path / "a")


# Pickles.


class Hostile:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["torch", "pickle", "nested"])
@pytest.mark.parametrize("place", ["checkpoint", "directory"])
def test_a_hostile_pickle_is_refused_without_running(form: str, place: str, saved: Path, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    content: Any = Hostile(trap)
    if form == "nested":
        content = {"model_state_dict": {"0.lora_A": torch.zeros(2, 6), "x": content}}
    if place == "directory":
        (saved / "adapter_model.safetensors").unlink()
    path = saved / "adapter_model.bin" if place == "directory" else tmp_path / "model.pt"
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    message = refused(saved, FormatError) if place == "directory" else refused(path, FormatError, config=CONFIG)
    assert str(path) in message
    assert not trap.exists()
    pickle.loads(pickle.dumps(Hostile(trap)))  # the trap is one
    assert trap.exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"\x80\x04garbage", b"text"])
def test_files_that_are_no_checkpoint(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    assert str(path) in refused(path, FormatError, config=CONFIG)


def test_truncated_checkpoints(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(lora.lora_state_dict(trained()), buffer)
    for size in (1, 100, len(buffer.getvalue()) // 2, len(buffer.getvalue()) - 30):
        (tmp_path / "model.pt").write_bytes(buffer.getvalue()[:size])
        refused(tmp_path / "model.pt", FormatError, config=CONFIG)


# Microsoft's checkpoints.


def checkpoint(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize("form", ["flat", "released", "wrapped", "compiled", "lightning", "script", "safetensors"])
def test_microsofts_forms(form: str, tmp_path: Path) -> None:
    model = trained()
    state: dict[str, Tensor] = lora.lora_state_dict(model)
    path = tmp_path / "model.pt"
    if form == "flat":
        checkpoint(path, state)
    elif form == "released":
        checkpoint(path, {"model_state_dict": {f"module.{name}": tensor for name, tensor in state.items()}})
    elif form == "wrapped":
        checkpoint(path, {f"module.{name}": tensor for name, tensor in state.items()})
    elif form == "compiled":
        checkpoint(path, {f"_orig_mod.{name}": tensor for name, tensor in state.items()})
    elif form == "lightning":
        checkpoint(path, {"epoch": 1, "state_dict": state})
    elif form == "script":
        checkpoint(path, {"model": state, "optimizer": {"state": {}}})
    else:
        path = tmp_path / "model.safetensors"
        save_file(state, str(path))
    fresh = net()
    report = lora.load_adapter(fresh, path, config=CONFIG)
    assert (report.applied, report.base) == (4, "unknown")
    assert torch.equal(fresh(X), model(X))


def test_a_checkpoint_needs_settings_and_lora_tensors(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "model.pt", lora.lora_state_dict(trained()))
    assert "config=LoraConfig(r=..." in refused(path, AdapterError)
    assert "misshapen" in refused(path, AdapterError, config=CONFIG.replace(r=4))
    checkpoint(path, net().state_dict())
    assert "contains no LoRA tensors" in refused(path, FormatError, config=CONFIG)
    checkpoint(path, [torch.zeros(2)])
    assert "contains list, expected a mapping" in refused(path, FormatError, config=CONFIG)


def test_a_whole_model_in_a_pickle_is_not_said_to_lack_settings(tmp_path: Path) -> None:
    torch.save(trained(), tmp_path / "model.pt")
    assert "contains objects other than tensors" in refused(tmp_path / "model.pt", FormatError)


def test_a_trained_head_has_to_be_named(tmp_path: Path) -> None:
    """As in Microsoft's NLU checkpoints: flat, with a classifier."""
    model = trained(config=CONFIG.replace(target_modules=["0"], modules_to_save=["2"]))
    state = {name: t for name, t in model.state_dict().items() if "lora_" in name or name.startswith("2.")}
    path = checkpoint(tmp_path / "model.bin", state)
    only = CONFIG.replace(target_modules=["0"])
    message = refused(path, AdapterError, config=only)
    assert "2.weight (3, 6) differs from the model's (trained in full?)" in message
    assert "modules_to_save" in message
    fresh = net()
    lora.load_adapter(fresh, path, config=only.replace(modules_to_save=["2"]))
    assert torch.equal(fresh(X), model(X))


def test_biases_masks_and_doubled_convolutions_of_old_files(tmp_path: Path) -> None:
    """The bias of a layer called attn is kept; GPT-2's mask of that name and duplicates in conv.conv are ignored."""
    model = nn.ModuleDict({"attn": lora.Linear(4, 4, r=2), "conv": lora.Conv2d(2, 2, 3, r=2)})
    lora.mark_only_lora_as_trainable(model, bias="lora_only")
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    state: dict[str, Any] = {f"h.{name}": t for name, t in lora.lora_state_dict(model, bias="lora_only").items()}
    state |= {"h.conv.conv.bias": state["h.conv.bias"].clone(), "g.attn.bias": torch.ones(1, 1, 4, 4)}
    state |= {"g.attn.masked_bias": torch.tensor(-1e4), "epoch": 3}
    path = checkpoint(tmp_path / "model.pt", {"model_state_dict": state})
    fresh = nn.ModuleDict({"h": nn.ModuleDict({"attn": lora.Linear(4, 4, r=2), "conv": lora.Conv2d(2, 2, 3, r=2)})})
    read = read_microsoft(path, CONFIG)
    assert set(read.tensors) == {f"h.{p}.{leaf}" for p in ("attn", "conv") for leaf in ("lora_A", "lora_B", "bias")}
    assert torch.equal(read.tensors["h.attn.bias"], model["attn"].bias)
    assert lora.load_adapter(fresh, path, config=CONFIG.replace(bias="lora_only")).applied == 6
    assert torch.equal(fresh["h"]["attn"].bias, model["attn"].bias)  # type: ignore[index]
    assert torch.equal(fresh["h"]["conv"].lora_B, model["conv"].lora_B)  # type: ignore[index]


def test_writing_microsofts_form(tmp_path: Path) -> None:
    model = trained()
    path = tmp_path / "pytorch_model.bin"
    write_microsoft(lora.adapter_of(model), path)
    written = torch.load(path, weights_only=True)
    assert written.keys() == lora.lora_state_dict(model).keys()
    fresh = net()
    lora.load_adapter(fresh, path, config=CONFIG)
    assert torch.equal(fresh(X), model(X))
    adapter = lora.adapter_of(model)
    dora = {**adapter.tensors, "0.lora_magnitude_vector": torch.ones(6)}
    with pytest.raises(AdapterError, match="lora_magnitude_vector"):
        write_microsoft(lora.Adapter(adapter.config, dora), path)
    assert torch.load(path, weights_only=True).keys() == written.keys()


def test_reading_as_a_value_needs_no_model(saved: Path) -> None:
    adapter = read_peft(saved)
    assert set(adapter.tensors) == {"0.lora_A", "0.lora_B", "2.lora_A", "2.lora_B"}


def test_a_file_that_memory_has_no_room_for_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "adapter.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    monkeypatch.setattr(tensors, "free_memory", lambda: 50.0)
    with pytest.raises(AdapterError, match="104 bytes, which is more than fits in memory"):
        tensors.read_bytes(path, lambda data: pytest.fail("it was read"))


# Other tools' adapters.

FOREIGN = {
    "kohya": (["lora_unet_mid.lora_down.weight", "lora_unet_mid.lora_up.weight", "lora_te_q.alpha"], "kohya's format"),
    "diffusers": (["unet.down.attn.to_q.lora.down.weight", "unet.down.attn.to_q.lora.up.weight"], "diffusers' format"),
    "diffusers, as PEFT": (["transformer.blocks.0.to_q.lora_A.weight"], "diffusers' format"),
    "lycoris": (["lora_unet_mid.hada_w1_a"], "LyCORIS"),
    "PEFT": (
        ["base_model.model.0.lora_A.weight", "base_model.model.0.lora_B.weight"],
        "next to its adapter_config.json",
    ),
    "a model": (["0.weight", "0.bias"], "it contains no LoRA tensors"),
}


@pytest.mark.parametrize("form", ["safetensors", "pickle"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_other_tools_files_are_called_by_their_names(kind: str, form: str, tmp_path: Path) -> None:
    names, expected = FOREIGN[kind]
    values = {name: torch.ones(2, 2) for name in names}
    path = tmp_path / f"file.{form}"
    if form == "pickle":
        torch.save(values, path)
    else:
        save_file(values, path)
    for config in (None, CONFIG):
        with pytest.raises(AdapterError, match=expected) as caught:
            lora.read_adapter(path, config=config)
        assert "Microsoft" not in str(caught.value)


def test_a_pointer_of_git_lfs_is_called_by_its_name(saved: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\nsize 4096\n"
    (saved / "adapter_model.safetensors").write_text(pointer, encoding="utf-8")
    assert "git lfs pull" in refused(saved, FormatError)


def test_names_from_compiled_and_sharded_models_are_read(saved: Path) -> None:
    X = torch.ones(1, 6)
    model = net()
    lora.load_adapter(model, saved)
    tensors = load_file(saved / "adapter_model.safetensors")
    for prefix in (
        "_orig_mod.base_model.model.",
        "module.base_model.model.",
        "base_model.model._orig_mod.",
        "base_model.model._fsdp_wrapped_module.",
    ):
        names = {name.replace("base_model.model.", prefix): tensor for name, tensor in tensors.items()}
        save_file(names, saved / "adapter_model.safetensors", {"format": "pt"})
        lora.load_adapter(other := net(), saved)
        assert torch.equal(other(X), model(X))
