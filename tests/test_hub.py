"""Adapters and bases by their ids on the Hub: what is fetched, and the error if there is nothing to fetch."""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import loralib as lora
from loralib import hub
from loralib.bases.loading import load_base
from loralib.errors import AdapterError, BaseModelError
from loralib.formats import locate_adapter

CONFIG = lora.LoraConfig(r=2, target_modules=["0"])


class Fake:
    """A fake Hub client whose repositories are folders; it records downloads."""

    def __init__(self, root: Path, reachable: bool) -> None:
        import huggingface_hub.constants
        import huggingface_hub.errors

        self.root, self.reachable = root, reachable
        self.fetched: list[str] = []
        self.errors, self.constants = huggingface_hub.errors, huggingface_hub.constants
        self.HfApi = lambda: self

    def model_info(self, repo: str, revision: str | None, timeout: float) -> Any:
        if not self.reachable:
            raise ConnectionError("the network is unreachable")
        folder = self.root / repo / (revision or "main")
        if not (self.root / repo).is_dir():
            raise self.errors.RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None))
        if not folder.is_dir():
            raise self.errors.RevisionNotFoundError("404", response=SimpleNamespace(headers={}, request=None))
        files = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files])

    def snapshot_download(self, repo: str, revision: str | None, allow_patterns: list[str], **options: Any) -> str:
        source, target = self.root / repo / (revision or "main"), self.root / "cache" / repo / (revision or "main")
        if options.get("local_files_only"):
            if not target.is_dir():
                raise FileNotFoundError(target)
            return str(target)
        for path in source.rglob("*"):
            name = path.relative_to(source).as_posix()
            if path.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target / name)
                self.fetched.append(name)
        return str(target)


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Fake]:
    """Replaces the Hub by one whose repositories are folders of `tmp_path`."""

    def start(reachable: bool = True) -> Fake:
        fake = Fake(tmp_path, reachable)
        monkeypatch.setattr(hub, "_client", lambda: fake)
        monkeypatch.setattr(hub, "_known", {})
        return fake

    return start


def net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))


def adapter_in(directory: Path, seed: int = 1) -> Any:
    model = net()
    lora.inject(model, CONFIG)
    torch.manual_seed(seed)
    nn.init.normal_(model[0].lora_B)
    lora.save_adapter(model, directory)
    return model


X = torch.ones(1, 6)


def test_an_adapter_comes_from_the_hub(tmp_path: Path, serve: Callable[..., Fake]) -> None:
    trained = adapter_in(tmp_path / "someone" / "my-lora" / "main")
    for name in ("optimizer.pt", "tokenizer.json", "chat_template.jinja", "checkpoint-5/adapter_model.safetensors"):
        (tmp_path / "someone" / "my-lora" / "main" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "someone" / "my-lora" / "main" / name).write_text("{}")
    fake = serve()
    model = net()
    lora.load_adapter(model, "someone/my-lora")
    assert torch.equal(model(X), trained(X))
    assert sorted(fake.fetched) == [
        *("adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "tokenizer.json")
    ]
    fake = serve(reachable=False)  # later, on the train: it is in the cache
    assert lora.read_adapter("someone/my-lora").modules == ("0",)


def test_a_revision_and_a_folder_of_a_repository(tmp_path: Path, serve: Callable[..., Fake]) -> None:
    trained = adapter_in(tmp_path / "someone" / "loras" / "v2" / "french", seed=3)
    adapter_in(tmp_path / "someone" / "loras" / "main" / "french", seed=4)
    serve()
    model = net()
    lora.load_adapter(model, "someone/loras/french@v2")
    assert torch.equal(model(X), trained(X))
    with pytest.raises(AdapterError, match="no revision 'v3'"):
        locate_adapter("someone/loras/french@v3")
    with pytest.raises(AdapterError, match="There are adapters in its subfolders: someone/loras/french"):
        locate_adapter("someone/loras")


def test_what_is_not_there_is_told(tmp_path: Path, serve: Callable[..., Fake]) -> None:
    serve()
    with pytest.raises(AdapterError, match=r"no local directory 'some/one', and no public adapter of that name"):
        locate_adapter("some/one")
    serve(reachable=False)
    with pytest.raises(AdapterError, match=r"'some/one' is not a local directory, .*hub.*the network is unreachable"):
        locate_adapter("some/one")
    with pytest.raises(AdapterError, match="does not exist"):  # no id: the hub is not asked
        lora.read_adapter("./some/one")


def test_models_and_adapters_are_not_taken_for_each_other(tmp_path: Path, serve: Callable[..., Fake]) -> None:
    adapter_in(tmp_path / "someone" / "my-lora" / "main")
    (tmp_path / "someone" / "model" / "main").mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "someone" / "model" / "main" / name).write_text("{}")
    serve()
    with pytest.raises(BaseModelError, match="is an adapter, not a base model"):
        load_base("someone/my-lora")
    with pytest.raises(AdapterError, match="is a model, not an adapter; give it as --model"):
        locate_adapter("someone/model")


def test_the_name_that_the_default_base_has_on_the_hub(
    serve: Callable[..., Fake], capsys: pytest.CaptureFixture[str], smollm2: tuple[Any, Any]
) -> None:
    serve(reachable=False)
    model, tokenizer = load_base("HuggingFaceTB/SmolLM2-135M-Instruct", dtype="fp32", device="cpu")
    assert "4-bit precision, is loaded instead" in capsys.readouterr().err
    assert model.name_or_path == tokenizer.name_or_path == "smollm2-135m"
    assert torch.equal(model.lm_head.weight, smollm2[0].lm_head.weight)
