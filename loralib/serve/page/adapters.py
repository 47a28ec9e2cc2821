"""The adapters that a server has or could load, with their properties and what they have learned."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...data import read_sources
from ...errors import LoraError, did_you_mean
from ...formats import read_adapter
from ...inspection import Inspection, inspect_adapter
from ...training.record import read_record
from ..server import Server
from ..state import RequestError

__all__ = ["AdapterSource", "describe", "heat_map", "inspect", "load", "prompts", "source", "sources"]


@dataclass(frozen=True)
class AdapterSource:
    """The origin of an adapter.

    Attributes:
        name: its name.
        directory: its directory.
        job: the id of the job that trained it; None: it was given to the server.
    """

    name: str
    directory: Path
    job: str | None = None


def sources(server: Server) -> dict[str, AdapterSource]:
    """Returns all adapters known to the server by name, loaded or not: requests cannot refer to any other path."""
    return {each.name: each for each in _sources(server)}


def _sources(server: Server) -> Iterator[AdapterSource]:
    if (root := server.adapters.root) is not None:
        yield from (AdapterSource(name, root / name) for name in server.adapters.unused())
    yield from (AdapterSource(name, Path(place)) for name, place in server.config.named_adapters)
    jobs = {job.adapter_name: job for job in server.jobs.list() if job.status == "succeeded"}
    yield from (AdapterSource(name, job.run, job.id) for name, job in jobs.items())
    for name in server.adapters.names:
        yield AdapterSource(name, server.adapters.get(name).source, jobs[name].id if name in jobs else None)


def source(server: Server, name: str) -> AdapterSource:
    """Returns the origin of an adapter.

    Raises:
        RequestError: there is no adapter with this name.
    """
    known = sources(server)
    if name not in known:
        raise RequestError(
            f"there is no adapter {name[:200]!r}.{did_you_mean(name, known)} Known: "
            f"{', '.join(sorted(known)) or 'none'}.",
            404,
            "adapter_not_found",
            "name",
        )
    return known[name]


def inspect(found: AdapterSource) -> Inspection:
    """Inspects an adapter; the result is cached.

    Raises:
        RequestError: it cannot be read.
    """
    try:
        stamp = max(path.stat().st_mtime_ns for path in (found.directory, *found.directory.glob("adapter_*")))
        return _inspect(found.directory, stamp)
    except (LoraError, OSError) as error:
        words = str(error).replace(str(found.directory), found.name)
        raise RequestError(f"the adapter {found.name!r} cannot be read: {words}", param="name") from error


@functools.lru_cache(32)
def _inspect(directory: Path, stamp: int) -> Inspection:
    return inspect_adapter(read_adapter(directory))


def describe(server: Server, found: AdapterSource) -> dict[str, Any]:
    """Returns an adapter's entry in the page's list."""
    facts: dict[str, Any] = {
        "name": found.name,
        "loaded": found.name in server.adapters,
        "job": found.job,
        "error": None,
    }
    try:
        inspection = inspect(found)
    except RequestError as error:
        return {**facts, "error": str(error)}
    adapter = inspection.adapter
    targets = adapter.config.target_modules
    return {
        **facts,
        "r": adapter.config.r,
        "lora_alpha": adapter.config.lora_alpha,
        "target_modules": targets if isinstance(targets, str) else sorted(targets or ()),
        "base": adapter.config.base_model_name_or_path,
        "bytes": adapter.nbytes,
        "parameters": sum(tensor.numel() for tensor in adapter.tensors.values()),
        "modules": len(adapter.modules),
        "checks": [{"level": check.level, "text": check.text, "fix": check.fix} for check in inspection.checks],
        "uses": dict(inspection.uses),
        "trained": _trained(server, found),
    }


def _trained(server: Server, found: AdapterSource) -> dict[str, Any] | None:
    """Returns what an adapter was trained on and how; None: unknown."""
    if found.job is not None:
        job = server.jobs.get(found.job)
        try:
            name = server.jobs.files.get(job.training_file).name
        except RequestError:  # it has been removed since
            name = None
        return {"data": name, "settings": job.settings}
    try:
        settings, _ = read_record(found.directory)
    except (LoraError, OSError, ValueError, AttributeError):
        return None
    names = ("rank", "num_epochs", "batch_size", "lr", "seed")
    data = settings.get("train_data")
    return {
        "data": [Path(str(each)).name for each in ([data] if isinstance(data, str) else data or ())],
        "settings": {name: settings[name] for name in names if name in settings},
    }


def prompts(server: Server, found: AdapterSource, most: int = 5) -> list[dict[str, Any]]:
    """Returns the first prompts of an adapter's training file, exactly as they were.

    Returns:
        Objects with a `prompt` or, for chats, the last question as `message`; empty if its data are unknown.
    """
    if found.job is None:
        return []
    job = server.jobs.get(found.job)
    try:
        file = server.jobs.files.get(job.training_file)
        if not file.facts["examples"]:  # too large for the server to have read it
            return []
        how = {"format": job.settings.get("data_format", "auto"), "columns": job.settings.get("columns")}
        [data] = read_sources(str(file.path), **how, as_chat=job.settings.get("as_chat", False), objective=None)
    except LoraError:  # it has been removed since
        return []
    asked = {}
    for example in data.examples:
        if example.messages:
            asked[next((turn.content for turn in example.messages if turn.role == "user"), "")] = "message"
        elif len(example.segments) > 1 and not example.segments[0][1]:
            asked[example.segments[0][0]] = "prompt"
        if len(asked) == most:
            break
    return [{kind: text} for text, kind in asked.items() if text]


def heat_map(inspection: Inspection) -> dict[str, Any]:
    """Returns the norms of an adapter's updates, by layer and kind of module.

    Returns:
        `layers`: their numbers (None: modules outside of layers); `kinds`: kinds of modules; `norms`: a row per layer,
        with a number or None for each kind; `effective_ranks`: the same for effective ranks.
    """
    layers = sorted({module.layer for module in inspection.modules}, key=lambda each: (each is None, each))
    kinds = list(dict.fromkeys(module.kind for module in inspection.modules))
    found = {(module.layer, module.kind): module for module in inspection.modules}
    cells = [[found.get((layer, kind)) for kind in kinds] for layer in layers]
    return {
        "layers": layers,
        "kinds": kinds,
        "norms": [[None if cell is None else cell.norm for cell in row] for row in cells],
        "effective_ranks": [[None if cell is None else cell.effective_rank for cell in row] for row in cells],
    }


def load(server: Server, name: str) -> None:
    """Loads an adapter that is known to the server.

    Raises:
        RequestError: there is no adapter with this name, or it is already loaded.
        LoraError: it cannot be loaded.
    """
    server.adapters.load(name, source(server, name).directory)
