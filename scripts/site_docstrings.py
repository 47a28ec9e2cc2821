"""How docstrings become the site's reference, for griffe (`extensions` in mkdocs.yml).

Examples are fenced, since Markdown takes ``>>>`` for quotations; settings bring the list of their fields, which is made
when their class is.
"""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^( *)>>>.*(?:\n(?!\s*\n|\1[A-Z]\w+:$)\1.*)*", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Prepares the docstrings of loralib."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Fences the examples of a docstring."""
        if obj.docstring is None:
            return
        if any("settings_class" in str(decorator.value) for decorator in getattr(obj, "decorators", ())):
            made = getattr(importlib.import_module(obj.module.path), obj.name)
            obj.docstring.value = inspect.getdoc(made) or ""
        obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    """Returns a docstring with its examples as fenced blocks."""

    def block(found: re.Match[str]) -> str:
        indent = found[1]
        return f"{indent}```pycon\n{found[0]}\n{indent}```"

    return EXAMPLE.sub(block, text)
