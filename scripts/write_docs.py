"""Writes the generated parts of the docs: `python scripts/write_docs.py`, in the project's environment.

A generated part stands between ``<!-- NAME -->`` and ``<!-- /NAME -->``; `PARTS` lists them by document.  A test fails
when one is out of date.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = "data/e2e"  # beside the two scripts
_GENERATED = frozenset(
    {"__pycache__", "build", "dist", "lora_model", "reproduced", "site"}
)  # folders made by running things


def files() -> list[str]:
    """The files of the repository: those that git tracks or, without git, all that do not look generated."""
    try:
        names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, encoding="utf-8").stdout.splitlines()
    except OSError:  # no git
        names = []
    if not names:
        walked = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
        names = [path.as_posix() for path in walked if not any(_is_generated(part) for part in path.parts)]
    return sorted(name for name in names if (ROOT / name).is_file())


def import_order() -> str:
    """Which module may import which, as the test that checks the order has it."""
    source = (ROOT / "tests" / "test_architecture.py").read_text(encoding="utf-8")
    (rows,) = (
        ast.literal_eval(node.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ROWS"
    )
    here = [[name for name in row if _is_module(name)] for row in rows]
    shown = "\n-> ".join(", ".join(row) for row in here if row)
    return f"```\n{shown}\n```"


def flags(config: str) -> str:
    """The settings of a dataclass as tables of flags, one per group."""
    groups: dict[str, list[tuple[str, str, str]]] = {}
    for spec in dataclasses.fields(_config(config)):
        on = spec.default is True
        flag = f"`--{'no_' if on else ''}{spec.name}`"
        text = str(spec.metadata["help"])
        text = f"do not {text}" if on else text
        text += "".join(f" (also `--{name}`)" for name in spec.metadata["aliases"])
        groups.setdefault(spec.metadata["group"], []).append((flag, _default(spec, config), text))
    header = ("flag", "default", "meaning")
    titles = [f"**{title.capitalize()}**\n\n" if len(groups) > 1 else "" for title in groups]
    return "\n\n".join(title + table(header, rows) for title, rows in zip(titles, groups.values(), strict=True))


def commands() -> str:
    """The commands of the command line, as a table."""
    from loralib.cli import COMMANDS

    here = [
        (f"`loralib {name}`", about) for name, about in COMMANDS.items() if _is_module(f"cli/{name.replace('-', '_')}")
    ]
    return table(("command", "what it does"), here)


def figures(name: str) -> str:
    """A table of a benchmark's results."""
    header, *rows = runpy.run_path(str(ROOT / "benchmarks" / "tables.py"))["TABLES"][name]()
    return table(header, rows)


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(cells[0]), *lines[1:]])


PARTS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"commands": commands, "comparison": functools.partial(figures, "comparison")},
    "docs/performance.md": {
        name: functools.partial(figures, name)
        for name in ("speed", "speed on another processor", "time to loss", "memory", "breakdown", "generation")
    },
    "docs/serving.md": {"serving": functools.partial(figures, "serving")},
    "docs/vi/serving.md": {"serving": functools.partial(figures, "serving")},
    "docs/results/variants.md": {name: functools.partial(figures, name) for name in ("study", "variants")},
    "docs/scaling.md": {"processes": functools.partial(figures, "processes")},
    "docs/architecture.md": {"import order": import_order},
    "examples/NLG/RUN_DEMO.md": {
        "training flags": lambda: flags("TrainConfig"),
        "inference flags": lambda: flags("InferenceConfig"),
    },
}


def updated(name: str) -> str:
    """Returns a document with its generated parts brought up to date."""
    text = (ROOT / name).read_text(encoding="utf-8")
    for part, make in PARTS[name].items():
        pattern = re.compile(rf"(<!-- {part} -->\n)(?:.*?\n)?(<!-- /{part} -->)", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"{name} has no part between <!-- {part} --> and <!-- /{part} -->, or more than one")
        made = make() + "\n"
        text = pattern.sub(lambda found, made=made: found[1] + made + found[2], text)
    return text


def _config(name: str) -> Any:
    from loralib.cli._inference import InferenceConfig
    from loralib.training import TrainConfig

    return {"TrainConfig": TrainConfig, "InferenceConfig": InferenceConfig}[name]


def _default(spec: Any, config: str) -> str:
    """The default of a setting in the two scripts of examples/NLG."""
    if spec.name.endswith("_data"):
        return f"`{SAMPLE}/{spec.name.removesuffix('_data')}.txt`"
    default = _own_defaults(config).get(spec.name, spec.default)
    if default is None and spec.metadata["auto"]:
        return "`auto`"
    if default is None or isinstance(default, bool):
        return ""
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"


@functools.cache
def _own_defaults(config: str) -> dict[str, Any]:
    """What the script has in the place of the settings' own defaults."""
    script = {"TrainConfig": "run_training.py", "InferenceConfig": "run_inference.py"}[config]
    own: dict[str, Any] = runpy.run_path(str(ROOT / "examples" / "NLG" / script))["DEFAULTS"]
    return own


def _is_generated(part: str) -> bool:
    return part in _GENERATED or part.endswith((".egg-info", ".pyc")) or (part.startswith(".") and part not in _HIDDEN)


_HIDDEN = frozenset({".ci", ".gitattributes", ".gitignore"})


def _is_module(name: str) -> bool:
    place = ROOT / "loralib" / name
    return place.with_name(place.name + ".py").is_file() or (place / "__init__.py").is_file()


def main() -> None:
    for name in PARTS:
        text = updated(name)
        if text != (ROOT / name).read_text(encoding="utf-8"):
            (ROOT / name).write_bytes(text.encode("utf-8"))
            print(f"{name}: written")


if __name__ == "__main__":
    sys.exit(main())
