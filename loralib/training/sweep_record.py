"""What a sweep reports about its runs: sweep.json, the table, and the result of `train_many`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import table
from ..files import write_json
from .config import TrainConfig
from .record import SWEEP_FILE

if TYPE_CHECKING:
    from .trainer import TrainResult

__all__ = ["Outcome", "SweepResult", "differing_settings", "read_record_of", "sweep_table", "write_record_of"]


@dataclass(frozen=True)
class Outcome:
    """The outcome of one run of a sweep.

    Attributes:
        name: made of the settings in which it differs from other runs.
        settings: these settings.
        path: its run directory.
        loss: the lowest validation loss after any update; without validation data, the last epoch's training loss.
        step: the update with that loss.
        train_loss: average training loss of the last epoch.
        dropped: why the run was dropped, or "".
        result: as returned by `loralib.train`; None if it did not finish.
        adapter: directory of the adapter with that loss.
    """

    name: str
    settings: Mapping[str, Any]
    path: Path
    loss: float | None
    step: int
    train_loss: float | None
    dropped: str
    result: TrainResult | None = field(repr=False)
    adapter: Path = field(repr=False)

    @classmethod
    def of(
        cls,
        name: str,
        settings: Mapping[str, Any],
        path: Path,
        result: TrainResult | None,
        dropped: str,
        last_loss: float | None,
    ) -> Outcome:
        """Creates it from the result of a run, if there is one; `last_loss` is for a run that was dropped."""
        if result is None:
            return cls(name, settings, path, last_loss, 0, last_loss, dropped, None, path)
        trained = result.train_losses[-1] if result.train_losses else None
        step, loss = result.best if result.best is not None else (result.steps, trained)
        adapter = path / "best" if result.best is not None else path
        return cls(name, settings, path, loss, step, trained, dropped, result, adapter)


@dataclass(frozen=True)
class SweepResult:
    """The outcome of a sweep.

    Attributes:
        output_dir: holds a directory for each run, ``best``, ``sweep.json`` and ``sweep.png``.
        runs: outcome of each run, in the order given.
        best: the run with the lowest loss, whose adapter is in ``output_dir/best``; None if all were dropped.
    """

    output_dir: Path
    runs: list[Outcome]
    best: Outcome | None


def differing_settings(configs: Sequence[TrainConfig]) -> list[dict[str, Any]]:
    """Returns of each run the settings that are not the same in all runs, without "output_dir", which never is."""
    values = [config.to_dict() for config in configs]
    names = [name for name in values[0] if name != "output_dir" and any(v[name] != values[0][name] for v in values)]
    return [{name: each[name] for name in names} for each in values]


def write_record_of(directory: Path, outcomes: Sequence[Outcome]) -> None:
    """Writes sweep.json."""
    write_json(
        directory / SWEEP_FILE,
        {
            "runs": [
                {
                    "name": each.name,
                    "settings": dict(each.settings),
                    "state": "dropped" if each.dropped else "unfinished" if each.result is None else "finished",
                    "dropped": each.dropped,
                    "loss": each.loss,
                    "step": each.step,
                    "train_loss": each.train_loss,
                }
                for each in outcomes
            ]
        },
    )


def read_record_of(directory: Path) -> dict[str, dict[str, Any]]:
    """Returns the entries of sweep.json by run name; empty if there is no readable one."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        runs = json.loads((directory / SWEEP_FILE).read_text(encoding="utf-8"))["runs"]
        return {each["name"]: each for each in runs}
    return {}


def sweep_table(result: SweepResult) -> str:
    """Returns the runs as a table, the best first."""
    order = sorted(result.runs, key=lambda run: (bool(run.dropped), run.loss is None, run.loss or 0.0))
    rows = [
        (
            run.name,
            "" if run.loss is None or run.dropped else f"{run.loss:.4f}",
            "" if run.dropped else run.step,
            "" if run.train_loss is None else f"{run.train_loss:.4f}",
            f"dropped: {run.dropped}" if run.dropped else "best" if run is result.best else "",
        )
        for run in order
    ]
    return table(rows, ("run", "loss", "update", "training loss", ""))
