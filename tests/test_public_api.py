"""The public names: sorted, importable, documented, and never replaced by a module of the same name."""

from __future__ import annotations

import doctest
import importlib
import inspect
import json
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import loralib as lora

ROOT = Path(__file__).resolve().parent.parent

# What later work and outside users rely on.
PINNED = """Conv1d Conv2d Conv3d Embedding Linear LoRALayer LoraConfig MergedLinear TrainConfig beam_search disabled
generate inject load_adapter load_base lora_state_dict mark_only_lora_as_trainable merge remove save_adapter train
unmerge""".split()


def fresh(code: str) -> Any:
    """Runs code in a new interpreter and returns what it prints as JSON."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_names_are_sorted_unique_and_there() -> None:
    assert lora.__all__ == sorted(set(lora.__all__))
    assert set(PINNED) <= set(lora.__all__)
    for name in lora.__all__:
        assert getattr(lora, name) is not None
        assert name in dir(lora)
    with pytest.raises(AttributeError, match="no attribute 'Linaer'"):
        lora.Linaer  # noqa: B018


def test_every_modules_all_is_true() -> None:
    """Each name in a module's __all__ exists, and is listed once."""
    for info in pkgutil.walk_packages(lora.__path__, "loralib."):
        if info.name.endswith("__main__"):
            continue
        module = importlib.import_module(info.name)
        names = getattr(module, "__all__", [])
        assert len(names) == len(set(names)), info.name
        assert not [name for name in names if not hasattr(module, name)], info.name


def test_no_module_has_the_name_of_something_public() -> None:
    """``import loralib.x`` sets the attribute x of the package: a function of that name would be gone."""
    assert not {info.name for info in pkgutil.iter_modules(lora.__path__)} & set(lora.__all__)


def test_importing_loralib_imports_nothing_heavy() -> None:
    heavy = "transformers peft safetensors tokenizers numpy.testing sacrebleu matplotlib accelerate gguf tqdm".split()
    code = f"import json, sys, torch; a = set(sys.modules); import loralib; b = set(sys.modules) - a; \
print(json.dumps([n for n in {heavy!r} if n in b]))"
    assert fresh(code) == []


def test_public_names_are_documented() -> None:
    for name in lora.__all__:
        value = getattr(lora, name)
        assert (inspect.getdoc(value) or "").strip(), name
        assert getattr(value, "__module__", "loralib").startswith("loralib"), name


def test_functions_say_what_they_raise_and_take() -> None:
    for name in lora.__all__:
        value = getattr(lora, name)
        if not inspect.isfunction(value):
            continue
        text = inspect.getdoc(value) or ""
        documented = text.partition("Args:")[2]
        for parameter in list(inspect.signature(value).parameters)[1:]:
            assert f"{parameter}:" in documented or parameter in ("args", "kwargs"), f"{name}: {parameter}"


@pytest.mark.parametrize("name", ["inject", "disabled", "Linear", "MergedLinear", "LoraConfig"])
def test_the_main_names_have_examples(name: str) -> None:
    assert doctest.DocTestFinder(recurse=False).find(getattr(lora, name), name)[0].examples


def test_errors_are_ours_and_pythons() -> None:
    from loralib import errors

    kinds = [value for value in vars(errors).values() if inspect.isclass(value) and value.__module__ == errors.__name__]
    for kind in kinds:
        assert issubclass(kind, lora.LoraError)
        assert kind.__name__ in errors.__doc__
        if kind is not lora.LoraError:
            builtins = [base for base in kind.__mro__ if base.__module__ == "builtins"]
            assert {base.__name__ for base in builtins} - {"Exception", "BaseException", "object"}, kind
