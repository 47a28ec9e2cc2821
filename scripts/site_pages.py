"""What the site shows beyond docs/, for mkdocs (`hooks` in mkdocs.yml).

README, guide, changes and contributing are pages too, although they lie elsewhere in the repository.  Links lead from
page to page; one to a file that is no page, such as a test or a module, becomes plain text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
# Where files of the repository are on the site, if they are not in docs/.
ELSEWHERE = {
    "README.md": "index.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "examples/NLG/RUN_DEMO.md": "RUN_DEMO.md",
}
LINK = re.compile(r'(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)(\s+"[^"]*")?\)')
CODE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages from outside docs/."""
    for source, page in ELSEWHERE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Makes the links of a page lead to pages."""
    known = {file.src_uri for file in files}
    return outside_code(markdown, lambda text: relinked(text, page.file.src_uri, known))


def outside_code(markdown: str, change: Any) -> str:
    """Applies a change to all of a text but its fenced blocks."""
    parts, at = [], 0
    for block in CODE.finditer(markdown):
        parts += [change(markdown[at : block.start()]), block[0]]
        at = block.end()
    return "".join([*parts, change(markdown[at:])])


def relinked(markdown: str, page: str, known: set[str]) -> str:
    """Returns the text of a page with links that hold on the site.

    Args:
        markdown: the text.
        page: where the page is on the site.
        known: what else is there.
    """
    source = {there: here for here, there in ELSEWHERE.items()}.get(page, f"docs/{page}")

    def changed(link: re.Match[str]) -> str:
        mark, text, target, title = link.groups("")
        path, hash, anchor = target.partition("#")
        if not path or "://" in path:
            return link[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        there = ELSEWHERE.get(file, file.removeprefix("docs/") if file.startswith("docs/") else "")
        if there not in known:
            return text
        return f"{mark}[{text}]({posixpath.relpath(there, posixpath.dirname(page) or '.')}{hash}{anchor}{title})"

    return LINK.sub(changed, markdown)
