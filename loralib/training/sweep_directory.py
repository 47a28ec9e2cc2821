"""What an earlier sweep left in an output directory: continued, refused, moved aside or discarded, never mixed with."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..console import counted
from ..errors import ConfigError, TrainingError
from ..files import remove_file
from ..formats.tensors import CONFIG_FILE
from .config import TrainConfig
from .ranks import ALONE
from .record import RUN_FILE, SWEEP_FILE
from .run_directory import (
    checkpoint_files,
    hold_run,
    move_file,
    remove_if_empty,
    remove_temporary,
    unused_directory,
)
from .sweep_record import read_record_of

__all__ = ["BEST", "PLOT_FILE", "clear_for_sweep", "runs_to_resume"]

BEST, PLOT_FILE = "best", "sweep.png"


def runs_to_resume(path: Path, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the entries of sweep.json by name; empty if there are none.

    Args:
        path: the sweep's directory.
        settings: of each run by name, those in which runs differ.

    Raises:
        ConfigError: the sweep there has other runs.
    """
    _refuse_single_run(path)
    for folder in (path, path / BEST):
        remove_temporary(folder)
    known = read_record_of(path)
    now = json.loads(json.dumps(settings))  # tuples become lists
    if known and {name: entry.get("settings") for name, entry in known.items()} != now:
        raise ConfigError(
            f"{path} contains a sweep with different runs ({', '.join(sorted(known))}): resume it with its own "
            "settings, start over with --overwrite instead of --resume, or choose another --output_dir"
        )
    return known


def clear_for_sweep(path: Path, names: Sequence[str], config: TrainConfig, say: Callable[[str], None]) -> None:
    """Moves a finished sweep aside, or discards any earlier one if `overwrite` is set.

    Args:
        path: the sweep's directory, locked by the caller.
        names: of the new runs.
        config: settings of one of them.
        say: called with where files were moved.

    Raises:
        ConfigError: the directory is that of a single run.
        TrainingError: an unfinished sweep or run would be lost.
    """
    _refuse_single_run(path)
    known = read_record_of(path)
    folders = [path / name for name in dict.fromkeys([*known, *names])]
    ended = sum(entry.get("state") != "unfinished" for entry in known.values())
    if ended < len(known) and any(_has_work(each) for each in folders) and not config.overwrite:
        raise TrainingError(
            f"{path} contains a sweep that stopped after {ended} of its {counted(len(known), 'run')}. Add --resume, "
            "with its own settings, to continue it, add --overwrite to discard it, or choose another --output_dir."
        )
    aside = unused_directory(path)
    for folder in [each for each in (*folders, path / BEST) if each.is_dir()]:
        with hold_run(config.replace(output_dir=str(folder)), ALONE) as run:
            run.look()
            if config.overwrite:
                run.discard()
            else:
                run.move(aside / folder.name)
        remove_if_empty(folder)
    for file in (path / PLOT_FILE, path / SWEEP_FILE):  # the record last: it says which directories are runs
        if config.overwrite:
            remove_file(file)
        elif file.exists():
            move_file(file, aside / file.name)
    if aside.exists():
        say(f"The files of an earlier sweep were moved to {aside}")


def _has_work(folder: Path) -> bool:
    return (folder / CONFIG_FILE).exists() or bool(checkpoint_files(folder / "checkpoints"))


def _refuse_single_run(path: Path) -> None:
    if (path / RUN_FILE).exists() or _has_work(path):
        raise ConfigError(f"{path} contains a run of `loralib train`: choose another --output_dir for the sweep")
