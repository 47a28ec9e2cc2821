"""The package as users have it: built, installed outside the checkout, and used on their own files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SITE = Path("Lib/site-packages") if os.name == "nt" else Path(f"lib/python{sys.version_info[0]}.{sys.version_info[1]}")
PYTHON = Path("Scripts/python.exe" if os.name == "nt" else "bin/python")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the packages of this one, and loralib as installed by ``pip install .``."""
    place = tmp_path_factory.mktemp("installed")
    source, home = place / "source", place / "home"
    shutil.copytree(ROOT / "loralib", source / "loralib", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    venv.create(home)
    site = home / SITE if os.name == "nt" else home / SITE / "site-packages"
    (site / "others.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    pip = [home / PYTHON, "-m", "pip", "--disable-pip-version-check", "install"]
    done = subprocess.run(
        [*pip, "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed", str(source)],
        capture_output=True,
        encoding="utf-8",
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    return home


def environment() -> dict[str, str]:
    """The variables for a program of that environment: it must not find the checkout."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def run(command: list[str | Path], cwd: Path, input: str = "") -> str:
    done = subprocess.run(
        command, cwd=cwd, env=environment(), input=input, capture_output=True, encoding="utf-8", timeout=300
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def test_the_wheel_holds_all_that_the_package_reads(installed: Path) -> None:
    code = "import json, loralib, pathlib; print(json.dumps(str(pathlib.Path(loralib.__file__).parent)))"
    there = Path(json.loads(run([installed / PYTHON, "-c", code], installed)))
    assert installed in there.parents

    def files(folder: Path) -> set[str]:
        found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        return {path.as_posix() for path in found if "__pycache__" not in path.parts}

    assert files(there) == files(ROOT / "loralib")
    assert {"py.typed", "engine/kernels.c"} <= files(there)


# One process for all commands, since most of the time of each is that of importing torch and transformers.
COMMANDS = """
import sys
from loralib.cli import main

for line in sys.argv[1:]:
    code = main(line.split("|"))
    if code:
        sys.exit(f"{line} ended with {code}")
"""


def test_own_files_are_trained_on_and_used(installed: Path, tmp_path: Path) -> None:
    lines = [f'{{"prompt": "What is {n} and {n}?", "completion": " {2 * n}, bạn nhé."}}\n' for n in range(12)]
    (tmp_path / "sums.jsonl").write_text("".join(lines), encoding="utf-8")
    base = ["--model", "scratch-32x1-seed0"]
    commands = [
        ["train", *base, "--train_data", "sums.jsonl", "--num_epochs", "1", "--batch_size", "4"],
        ["generate", "What is 3 and 3?", "--adapter", "lora_model", "--max_new_tokens", "3"],
        ["chat", "--adapter", "lora_model", "--max_new_tokens", "3"],
        ["inspect", "lora_model"],
    ]
    shown = run([installed / PYTHON, "-c", COMMANDS, *map("|".join, commands)], tmp_path, "How are you?\nViệt Nam\n")
    assert "Done: 3 updates" in shown
    assert (tmp_path / "lora_model" / "adapter_config.json").is_file()
    program = installed / PYTHON.parent / ("loralib.exe" if os.name == "nt" else "loralib")
    assert run([program, "--version"], tmp_path).startswith("loralib ")


USER = """
import loralib as lora
import torch
from torch import nn


def tuned(place: str, texts: list[str]) -> float:
    model, tokenizer = lora.load_base("smollm2-135m")
    report: lora.InjectReport = lora.inject(model, lora.LoraConfig(r=16, target_modules="all-linear"))
    print(report.trainable, report.notes)
    examples = [lora.Example.of("question", text) for text in texts]
    config = lora.TrainConfig(num_epochs=2, output_dir=place)
    result: lora.TrainResult = lora.train(model, examples, config, tokenizer=tokenizer, valid_data="valid.txt")
    print(model.config.eos_token_id, model.generate(**tokenizer("x", return_tensors="pt")), model.name_or_path)
    model.model.layers[0].self_attn.q_proj.requires_grad_(False)
    return result.valid_losses[-1][1]


def written(model: nn.Module, tokenizer: object) -> list[str]:
    applied: lora.ApplyReport = lora.load_adapter(model, "there")
    print(applied.base)
    with lora.disabled(model):
        texts: list[lora.Generation] = lora.generate(model, tokenizer, ["x"], lora.Sampling(max_new_tokens=3))
    lora.merge(model)
    return [text.text for text in texts]


def ones(layer: lora.Linear) -> torch.Tensor:
    return layer.weight + torch.ones(1)


lora.mark_only_lora_as_trainable(nn.Sequential(lora.Linear(4, 4, r=2)), bias="lora_only")
adapter: lora.Adapter = lora.read_adapter("there")
lora.Linaer
"""


def test_a_user_s_script_passes_mypy_strict(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER, encoding="utf-8")
    quick = ["--config-file", str(ROOT / "pyproject.toml")]  # which skips what nothing here uses
    mypy = [sys.executable, "-m", "mypy", *quick, "--strict", "--python-executable", str(installed / PYTHON), "user.py"]
    cache = ROOT / ".mypy_cache" / "installed"
    done = subprocess.run(
        [*mypy, "--cache-dir", str(cache)], cwd=tmp_path, env=environment(), capture_output=True, encoding="utf-8"
    )
    assert len(done.stdout.splitlines()) == 2, done.stdout
    fault, summary = done.stdout.splitlines()
    assert 'Module has no attribute "Linaer"' in fault
    assert summary.startswith("Found 1 error in 1 file")
