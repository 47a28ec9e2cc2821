"""The adapters of a server: their names, origins, and the chats they were trained on.

The bank holds their tensors; this module has the information for the API, and the only way to load further ones: from a
directory below the configured one.
"""

from __future__ import annotations

import copy
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Final, TypeVar

from ..bases import tokenizer_for, trained_on_chats
from ..data.turn_ends import turn_ends
from ..engine.bank import Bank
from ..errors import did_you_mean
from ..formats import read_adapter
from .state import RequestError

__all__ = ["AdapterInfo", "AdapterStore", "adapter_directories", "directory_below"]

Result = TypeVar("Result")

_NAME: Final = re.compile(r"\w[\w .:/@+-]{0,199}")
_DEEPEST: Final = 4  # maximum depth of adapters below the configured directory
_HOLDS: Final = ("adapter_config.json", "adapters.safetensors")  # files that mark an adapter: PEFT, MLX


@dataclass(frozen=True)
class AdapterInfo:
    """Information about an adapter.

    Attributes:
        name: its name.
        source: the directory or file that it was read from.
        rank: its rank; the largest, if ranks differ.
        targets: the kinds of modules that it adapts.
        base: the model that it was trained on, according to its settings.
        chats: whether it was trained on chats; None: unknown.
        tokenizer: the tokenizer that it was trained with.
        ends: tokens that end a turn in its template.
        created: when it was loaded, in seconds since 1970.
    """

    name: str
    source: Path
    rank: int
    targets: tuple[str, ...]
    base: str | None
    chats: bool | None
    tokenizer: Any
    ends: frozenset[int]
    created: int


class AdapterStore:
    """The adapters of a server.  Any thread may use it.

    Args:
        bank: holds their tensors.
        tokenizer: the base's tokenizer.
        base: the base's name.
        root: the directory that clients may load from; None: loading is not allowed.

    Attributes:
        call: runs a function in the thread that owns the model.
    """

    def __init__(self, bank: Bank, tokenizer: Any, base: str, root: Path | None) -> None:
        self._bank, self._tokenizer, self._base = bank, tokenizer, base
        self.root = None if root is None else root.resolve()
        self.call: Callable[[Callable[[], Any]], Any] = lambda function: function()
        self._infos: dict[str, AdapterInfo] = {}
        self._busy: set[str] = set()
        self._lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        """The names of all adapters."""
        return sorted(self._infos)

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def get(self, name: str) -> AdapterInfo:
        """Returns an adapter.

        Raises:
            RequestError: there is no adapter with this name.
        """
        info = self._infos.get(name)
        if info is None:
            near = did_you_mean(name, self._infos)
            raise RequestError(f"there is no adapter {name[:200]!r}.{near}", 404, "adapter_not_found", "name")
        return info

    def load(
        self, name: str, source: Path, *, scale: float = 1.0, pin: bool = False, replace: bool = False
    ) -> AdapterInfo:
        """Loads an adapter; reading it does not delay texts that are being generated.

        Raises:
            RequestError: the name cannot be used, or is taken.
            LoraError: the adapter is damaged, does not fit the base, or has no effect.
        """
        if not _NAME.fullmatch(name) or name.strip() != name:
            raise RequestError(
                f"name is {name[:200]!r}, expected up to 200 letters, digits, and . _ - : / @ + in between",
                param="name",
            )
        if name == self._base:
            raise RequestError(f"{name!r} is the name of the base; choose another name", 409, "name_taken", "name")
        with self._reserved(name, replace):
            adapter = read_adapter(source, model=self._bank.model)
            own, ends = self._tokenizer_of(source)
            self.call(lambda: self._bank.load(name, adapter, scale=scale, pin=pin, replace=True))
            config = adapter.config
            info = AdapterInfo(
                name,
                source,
                max([config.r, *(getattr(config, "rank_pattern", None) or {}).values()]),
                tuple(sorted({module.rpartition(".")[2] for module in adapter.modules})),
                config.base_model_name_or_path,
                trained_on_chats(source),
                own,
                ends,
                int(time.time()),
            )
            with self._lock:
                self._infos[name] = info
        return info

    def unload(self, name: str) -> None:
        """Unloads an adapter; texts being generated with it continue to use it.

        Raises:
            RequestError: there is no adapter with this name, or it is being loaded.
        """
        self.get(name)
        with self._reserved(name, replace=True):
            self.get(name)
            self.call(lambda: self._bank.unload(name))
            with self._lock:
                del self._infos[name]

    def set_scale(self, name: str, scale: float) -> None:
        """Sets the scale of an adapter's updates.

        Raises:
            RequestError: there is no adapter with this name, or it is being loaded.
        """
        self.get(name)
        with self._reserved(name, replace=True):
            self.get(name)
            self.call(lambda: self._bank.set_scale(name, scale))

    def describe(self, name: str) -> dict[str, Any]:
        """Returns an adapter's description in the API.

        Raises:
            RequestError: there is no adapter with this name.
        """
        info = self.get(name)
        told = self._bank.describe(name)
        return {
            "id": name,
            "object": "adapter",
            "created": info.created,
            "base": self._base,
            "trained_on": info.base,
            "rank": info.rank,
            "targets": list(info.targets),
            "scale": told.scale,
            "pinned": told.pinned,
            "bytes": told.nbytes,
            "in_memory": told.in_memory,
            "in_use": told.users,
            "chats": info.chats,
            "source": self.public(str(info.source)) if self.root and info.source.is_relative_to(self.root) else None,
        }

    def unused(self) -> list[str]:
        """Returns the directories of adapters that are not loaded."""
        if self.root is None:
            return []
        used = {info.source for info in list(self._infos.values())}
        return [path.relative_to(self.root).as_posix() for path in adapter_directories(self.root) if path not in used]

    def public(self, text: str) -> str:
        """Removes the path of the configured directory from a text for clients."""
        if self.root is None:
            return text
        return text.replace(f"{self.root}/", "").replace(f"{self.root}\\", "").replace(str(self.root), "")

    @contextmanager
    def _reserved(self, name: str, replace: bool) -> Iterator[None]:
        """Reserves a name for one thread, so that two of them cannot load it at the same time."""
        with self._lock:
            if name in self._busy or (name in self._infos and not replace):
                state = "is being loaded or unloaded" if name in self._busy else "is already loaded; unload it first"
                raise RequestError(f"the adapter {name!r} {state}", 409, "name_taken", "name")
            self._busy.add(name)
        try:
            yield
        finally:
            with self._lock:
                self._busy.discard(name)

    def _tokenizer_of(self, source: Path) -> tuple[Any, frozenset[int]]:
        """Returns the tokenizer that an adapter was trained with, and the tokens that end a turn in its template.

        Parts equal to the base's are not stored twice, because vocabularies are large.
        """
        base = self._tokenizer
        own = tokenizer_for(str(source), self._bank.model, base)
        if own is base:
            return base, frozenset()
        if _same_words(own, base):
            if own.chat_template in (None, base.chat_template):
                return base, frozenset()
            template, own = own.chat_template, copy.copy(base)
            own.chat_template = template
        ends = set(turn_ends(own))
        if own.eos_token_id is not None:
            ends.add(own.eos_token_id)
        return own, frozenset(ends)


def _same_words(one: Any, other: Any) -> bool:
    """Tells whether two tokenizers tokenize every text identically."""
    texts = [getattr(getattr(each, "backend_tokenizer", None), "to_str", lambda: None)() for each in (one, other)]
    return texts[0] is not None and texts[0] == texts[1] and one.eos_token_id == other.eos_token_id


def adapter_directories(root: Path) -> list[Path]:
    """Returns all directories of adapters and GGUF files below a directory; ignores links that lead outside of it."""
    root = root.resolve()
    found: list[Path] = []

    def look(directory: Path, depth: int) -> None:
        with suppress(OSError):
            for path in sorted(directory.iterdir()):
                if not path.resolve().is_relative_to(root):
                    continue
                if path.is_dir():
                    if any((path / name).is_file() for name in _HOLDS):
                        found.append(path)
                    elif depth < _DEEPEST:
                        look(path, depth + 1)
                elif path.suffix == ".gguf":
                    found.append(path)

    look(root, 1)
    return found


def directory_below(root: Path | None, name: str) -> Path:
    """Returns the directory of an adapter below the configured one.

    Raises:
        RequestError: the name leads outside of it, or does not exist.
    """
    if root is None:
        raise RequestError(
            "this server does not load adapters while running; start it with --adapters DIR", 403, "no_adapters"
        )
    root = root.resolve()
    windows = PureWindowsPath(name)
    # Both path syntaxes are checked on every system: C:, \\host\share, a\..\b.
    leads_out = ".." in (*windows.parts, *PurePosixPath(name).parts) or bool(windows.drive) or "\0" in name
    if not name.strip() or leads_out or len(name) > 1000:
        raise RequestError(
            f"path is {name[:200]!r}, expected a directory below --adapters, without '..' or a drive",
            403,
            "outside_adapters",
            "path",
        )
    try:
        path = (root / name).resolve()
        outside = not path.is_relative_to(root) or path == root
        if not outside and path.is_dir():
            outside = any(not inner.resolve().is_relative_to(root) for inner in path.iterdir())
        exists = not outside and path.exists()
    except (OSError, RuntimeError, ValueError):  # the name is too long, or links form a cycle
        outside, exists = False, False
    if outside:
        raise RequestError(f"{name[:200]!r} leads outside --adapters", 403, "outside_adapters", "path")
    if not exists:
        known = [found.relative_to(root).as_posix() for found in adapter_directories(root)]
        near = did_you_mean(name, known)
        raise RequestError(f"there is no adapter in {name[:200]!r} below --adapters.{near}", 404, "no_adapter", "path")
    return path
