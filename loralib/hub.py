"""The Hugging Face Hub: from the id of a base model or an adapter to a local directory with its files."""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .console import say
from .errors import LoraError, MissingDependencyError, first_line

__all__ = ["fetch", "is_hub_id"]

_TIMEOUT = 10  # seconds to wait for the Hub
_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?)(?P<folder>(/[\w.-]+)*)(@(?P<revision>[\w./-]+))?"
)


def is_hub_id(name: str) -> bool:
    """Tells whether a name is a possible repository id: ``name``, ``owner/name``, ``owner/name@revision``.

    >>> is_hub_id("gpt2"), is_hub_id("someone/my-lora@v2"), is_hub_id("someone/loras/french"), is_hub_id("../gpt2")
    (True, True, True, False)
    """
    return _parts(name) is not None


def _parts(name: str) -> tuple[str, str, str | None] | None:
    """Returns the repository, folder and revision in a name; None if it is not a valid id.

    >>> _parts("someone/loras/french@v2")
    ('someone/loras', 'french', 'v2')
    """
    match = _ID.fullmatch(name)
    if match is None or ".." in name:
        return None
    return match["repo"], match["folder"].strip("/"), match["revision"]


def fetch(
    name: str,
    choose: Callable[[list[str]], list[str]],
    cached: list[str],
    *,
    error: Callable[[str], LoraError],
    what: str,
    advice: str,
) -> Path:
    """Downloads files of a repository into the Hub's own cache, unless they are there already.

    Args:
        name: an id; see `is_hub_id`.
        choose: called with the names of all files in the folder; returns those that are needed, or raises a
            `LoraError`.
        cached: patterns for the files to look for in the cache if the Hub cannot be reached.
        error: the error class to raise.
        what: what should be found there, for messages.
        advice: a sentence saying what else the user can do.

    Returns:
        The directory that contains the files.

    Raises:
        LoraError: there is no such repository, its owners require consent, or the Hub cannot be reached.
        MissingDependencyError: huggingface_hub is not installed.
    """
    parts = _parts(name)
    if parts is None:
        raise error(f"{name!r} is not a valid id on the hub (such as owner/name). {advice}")
    with contextlib.suppress(KeyError):
        return _known[name, what]
    _known[name, what] = path = _fetch(name, *parts, choose, cached, error, what, advice)
    return path


_known: dict[tuple[str, str], Path] = {}  # because a command may request the same adapter several times


def _fetch(
    name: str,
    repo: str,
    folder: str,
    revision: str | None,
    choose: Callable[[list[str]], list[str]],
    cached: list[str],
    error: Callable[[str], LoraError],
    what: str,
    advice: str,
) -> Path:
    hub = _client()
    prefix = f"{folder}/" if folder else ""
    say(f"note: looking for {name} on the hub", file=sys.stderr)
    try:
        info = hub.HfApi().model_info(repo, revision=revision, timeout=_TIMEOUT)
        names = [file.rfilename for file in info.siblings or []]
        files = choose([each.removeprefix(prefix) for each in names if each.startswith(prefix)])
        wanted = [prefix + each for each in files]
        download = functools.partial(hub.snapshot_download, repo, revision=revision, allow_patterns=wanted)
        return Path(download(etag_timeout=_TIMEOUT)) / folder
    except hub.errors.GatedRepoError as fault:
        raise error(
            f"{name!r} is on the hub, but access is restricted: accept the terms on its page, then run `hf auth login`."
        ) from fault
    except hub.errors.RevisionNotFoundError as fault:
        raise error(
            f"{repo!r} is on the hub, but has no revision {revision!r}; its page lists the revisions."
        ) from fault
    except hub.errors.RepositoryNotFoundError as fault:
        raise error(
            f"there is no local directory {name!r}, and no public {what} of that name on the hub. {advice} For a "
            "private one, run `hf auth login` first."
        ) from fault
    except LoraError:
        raise
    except Exception as fault:  # errors of the Hub's client, HTTP library and disk share no base class
        patterns = [prefix + pattern for pattern in cached]
        ignored = [f"{prefix}*/*"]
        with contextlib.suppress(Exception):  # it may have been downloaded earlier
            options: dict[str, Any] = {"local_files_only": True, "allow_patterns": patterns, "ignore_patterns": ignored}
            return Path(hub.snapshot_download(repo, revision=revision, **options)) / folder
        raise error(
            f"{name!r} is not a local directory, and could not be downloaded from the hub at {hub.constants.ENDPOINT} "
            f"({first_line(fault)}). {advice}"
        ) from fault


def _client() -> Any:
    try:
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        raise MissingDependencyError(
            "fetching from the hub needs huggingface_hub: pip install 'loralib[train]'"
        ) from error
    return huggingface_hub
