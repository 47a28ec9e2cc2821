"""Who may import whom: each row of the design imports rows above it and none below, inside functions too."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "loralib"

# docs/architecture.md says why.  A package counts as one module here, and its files may import each other.
ROWS = [
    ["errors"],
    ["files", "console", "settings"],
    ["hub"],
    ["allocator"],
    ["delta", "config", "modes", "wrapping"],
    ["layers"],
    ["variants"],
    ["utils", "targets"],
    ["blocks"],
    ["injection"],
    ["adapter"],
    ["combine"],
    ["formats"],
    ["bases"],
    ["engine"],
    ["budget"],
    ["data"],
    ["training"],
    ["generation"],
    ["inspection"],
    ["verify"],
    ["nlg"],
    ["__init__"],
    ["serve"],
    ["cli"],
    ["__main__"],
]
COMES_WITH_TORCH = ("filelock", "psutil")  # torch requires the first; without the second, memory is not checked
RANK = {name: rank for rank, row in enumerate(ROWS) for name in row}
CORE = [name for row in ROWS[: RANK["adapter"] + 1] for name in row if name not in ("console", "settings", "hub")]

# The one import from below, at call time: save_pretrained() of an injected model saves its adapter.
UPWARDS = {("injection", "formats")}

# Which modules may import a library besides torch and the standard library; one with a single owner is easy to replace.
# "serve" stands for its whole room: a web framework shows in every route.
OUTSIDE = {
    "accelerate": {"bases.sharded"},
    "transformers": {
        "bases.gguf",
        "bases.loading",
        "bases.made_up",
        "bases.quantized_reading",
        "bases.sharded",
        "engine.attention",
        "formats.experts",
        "formats.old_names",
    },
    "huggingface_hub": {"hub"},
    "tokenizers": {"bases.gguf", "nlg.convert"},
    "bitsandbytes": {"bases.bnb"},
    "gguf": {"bases.gguf", "formats.gguf"},
    "safetensors": {"formats.tensors"},
    "numpy": {"formats.gguf"},
    "matplotlib": {"inspection", "nlg.reproduction.report", "training.report"},
    "sacrebleu": {"nlg.metrics.sacre"},
    "tqdm": {"console"},
    "datasets": {"data.tables"},
    "pyarrow": {"data.tables"},
    "filelock": {"files"},
    "psutil": {"files"},
    "liger_kernel": {"engine.liger"},
    "shtab": {"cli.completion"},
    "llguidance": {"generation.grammar"},
    "uvicorn": {"cli.serve"},
    "fastapi": {"serve"},
    "starlette": {"serve"},  # what FastAPI is made of
    "prometheus_client": {"serve"},
    "pydantic": {"serve"},
    "python_multipart": {"serve"},
    "tomli": {"settings"},  # Python 3.10 only
}


def files() -> Iterator[tuple[str, Path]]:
    """Yields each module's dotted name below loralib, and its file."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield ".".join(path.relative_to(PACKAGE).with_suffix("").parts), path


def imports(name: str, source: str) -> set[str]:
    """Returns what a module imports anywhere in its text: "loralib.x.y" for our own modules, dotted names for others.

    Args:
        name: the module's dotted name below loralib; a package's ends with "__init__".
        source: its text.
    """
    package = ["loralib", *name.split(".")[:-1]]
    result: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            result |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            # "from . import x": x may be a module
            result |= {f"{origin}.{alias.name}" for alias in node.names} if not node.module else {origin}
    return result


def reached(*modules: str) -> set[str]:
    """Returns all modules of loralib that these import, directly or through others (dotted names below loralib)."""
    result: set[str] = set()
    queue = list(modules)
    while queue:
        for other in GRAPH[queue.pop()]:
            name = other.removeprefix("loralib.")
            name = name if name in GRAPH else f"{name}.__init__"
            if other.startswith("loralib.") and name in GRAPH and name not in result:
                result.add(name)
                queue.append(name)
    return result


def defining(*functions: str) -> set[str]:
    """Returns the modules that define these functions (dotted names below loralib)."""
    return {
        name
        for name, path in files()
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name in functions
    }


def top(dotted: str) -> str:
    """Returns which row's entry "loralib.x.y" belongs to.

    >>> [top(name) for name in ("loralib.formats.peft", "loralib.errors", "loralib", "loralib.save_adapter")]
    ['formats', 'errors', '__init__', '__init__']
    """
    first = [*dotted.split("."), "__init__"][1]
    return first if first in RANK or (PACKAGE / first).is_dir() or (PACKAGE / f"{first}.py").exists() else "__init__"


GRAPH = {name: imports(name, path.read_text(encoding="utf-8")) for name, path in files()}
EDGES = {
    (name.split(".")[0], top(other))
    for name, others in GRAPH.items()
    for other in others
    if other.split(".")[0] == "loralib" and top(other) != name.split(".")[0]
}


def test_the_walker_sees_every_form_of_import() -> None:
    source = """
import os, loralib.layers
from . import sibling
from .peer import x
from ..errors import LoraError
def later():
    from .. import files
    import torch.nn as nn
    from loralib import inject
"""
    assert imports("formats.peft", source) == {
        "os",
        "loralib.layers",
        "loralib.formats.sibling",
        "loralib.formats.peer",
        "loralib.errors",
        "loralib.files",
        "torch.nn",
        "loralib",
    }
    assert imports("formats.__init__", "from .peft import x") == {"loralib.formats.peft"}
    assert imports("inject", "from . import layers") == {"loralib.layers"}


def test_every_module_has_its_row() -> None:
    assert {name.split(".")[0] for name in GRAPH} <= RANK.keys()
    assert {"errors", "layers", "injection", "adapter", "bases", "training", "cli"} <= {
        name.split(".")[0] for name in GRAPH
    }


def test_modules_import_only_rows_above_them() -> None:
    wrong = {(who, whom) for who, whom in EDGES if RANK[whom] >= RANK[who]}
    assert wrong == UPWARDS


def test_outside_libraries_have_their_owners() -> None:
    known = {*sys.stdlib_module_names, "torch", "loralib", "tomllib"}
    owners: dict[str, set[str]] = {}
    for name, others in GRAPH.items():
        for library in {other.split(".")[0] for other in others} - known:
            whole_room = OUTSIDE.get(library) == {"serve"} and name.startswith("serve.")
            owners.setdefault(library, set()).add("serve" if whole_room else name)
    assert owners == OUTSIDE


def test_nlg_is_imported_by_the_command_line_alone() -> None:
    assert {who for who, whom in EDGES if whom == "nlg"} == {"cli"}


@pytest.mark.parametrize("module", [m for m in ("nlg.perplexity", "inspection", "cli._inference") if m in GRAPH])
def test_measuring_and_writing_need_no_training_loop(module: str) -> None:
    assert "training.trainer" in GRAPH
    assert "training.trainer" not in reached(module)


def test_saving_needs_no_portable_export() -> None:
    savers = defining("save_adapter", "write_peft")
    assert "formats.peft" in savers
    assert {name.split(".")[0] for name in savers} == {"formats"}
    assert "formats.portable" not in reached(*savers)


@pytest.mark.parametrize("module", CORE)
def test_the_core_needs_torch_alone(module: str) -> None:
    for name, others in GRAPH.items():
        if name.split(".")[0] == module:
            outside = {other.split(".")[0] for other in others} - sys.stdlib_module_names
            assert outside <= {"torch", "loralib", *(COMES_WITH_TORCH if module == "files" else ())}, name


@pytest.mark.parametrize("module", ["config", "errors", "files", "console", "settings"])
def test_no_torch_where_none_is_needed(module: str) -> None:
    seen: set[str] = set()
    to_see = [module]
    while to_see:
        current = to_see.pop()
        seen.add(current)
        for name, others in GRAPH.items():
            if name.split(".")[0] == current:
                assert "torch" not in {other.split(".")[0] for other in others}, name
        to_see += [whom for who, whom in EDGES if who == current and whom not in seen]


def test_importing_loralib_loads_nothing_but_torch() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import loralib
outside = {name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
print(*sorted(outside - {name.split(".")[0] for name in before}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.stdout.split() == ["loralib"], done.stderr


def test_every_module_can_be_imported_by_its_name() -> None:
    """No function stands in the place of a module, and no module takes the place of a public name."""
    code = """
import importlib, json, sys
import loralib
def public(package):
    return {name: getattr(package, name) for name in getattr(package, "__all__", ())}
before = {"loralib": public(loralib)}
faults = []
for name in json.loads(sys.stdin.read()):
    scope = {}
    exec(f"import {name} as module", scope)
    if scope["module"] is not sys.modules[name]:
        faults.append(f"import {name} gives {scope['module']!r}")
    before[name] = public(sys.modules[name])
for name, values in before.items():
    faults += [f"{name}.{key} changed" for key, value in public(sys.modules[name]).items() if values[key] is not value]
print(json.dumps(faults))
"""
    names = [f"loralib.{name}".removesuffix(".__init__") for name in GRAPH if name not in ("__init__", "__main__")]
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(names), capture_output=True, text=True, cwd=PACKAGE.parent
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


# Text.


def texts_without_encoding(source: str) -> list[int]:
    """Returns the lines that open text, or read it from a program, in whatever encoding the system happens to have."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        given = {keyword.arg for keyword in node.keywords}
        words = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        method = isinstance(node.func, ast.Attribute)  # a bare read_text or write_text is one of ours, and UTF-8
        reads = method and name in ("read_text", "write_text") and not words
        mode = (words if method else words[1:] or ["r"])[:1]
        opens = name == "open" and bool(mode) and set(mode[0]) <= set("rwaxt+")
        runs = name in ("run", "Popen") and bool({"text", "universal_newlines"} & given)
        if (reads or opens or runs) and "encoding" not in given:
            found.append(node.lineno)
    return found


def test_text_has_an_encoding_everywhere() -> None:
    """Without one, Windows takes its code page, where Vietnamese letters are lost or raise an error."""
    root = PACKAGE.parent
    sources = [
        path for folder in ("loralib", "scripts", "examples", "benchmarks") for path in (root / folder).rglob("*.py")
    ]
    found = {path: texts_without_encoding(path.read_text(encoding="utf-8")) for path in sources}
    assert not {path.name: lines for path, lines in found.items() if lines}
    sample = (
        'open("x")\nPath("x").read_text()\nPath("x").open("w")\nrun([], text=True)\nopen("x", "rb")\np.open("ab")\n'
    )
    assert texts_without_encoding(sample) == [1, 2, 3, 4]
