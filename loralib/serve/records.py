"""What is kept of a training job: its row in the database, and its events."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from sqlite3 import Connection
from typing import Any, Final

from .state import State, new_id, now

__all__ = [
    "OVER", "Event", "Job", "JobProgress", "add_event", "events_of", "fail", "losses_at", "progress_of", "set_status",
    "training_speed",
]  # fmt: skip

OVER: Final = ("succeeded", "failed", "cancelled")
_LATEST: Final = 50  # number of metrics to estimate a job's speed from


@dataclass(frozen=True)
class Job:
    """A training job.

    Attributes:
        id: its random id.
        status: validating_files, queued, running, paused, succeeded, failed or cancelled.
        wanted: what a client has asked of its process: cancel or pause; empty: nothing.
        training_file, validation_file: ids of uploaded files.
        settings: fields of `TrainConfig` that were given.
        asked: other values given by the client, which are not training settings: hyperparameters, metadata, seed.
        error: why it failed: code, message and param; None: it did not fail.
        created, started, finished: seconds since 1970; None: not yet.
        directory: the job's directory.
        adapter_name: name of its adapter in the bank.
    """

    id: str
    status: str
    wanted: str
    training_file: str
    validation_file: str | None
    settings: dict[str, Any]
    asked: dict[str, Any]
    error: dict[str, Any] | None
    created: int
    started: int | None
    finished: int | None
    directory: Path
    adapter_name: str

    @property
    def run(self) -> Path:
        """The run's directory; if the job succeeded, also the adapter's."""
        return self.directory / "run"


def set_status(
    database: Connection, job_id: str, status: str, message: str, *, error: Any = None, **columns: Any
) -> None:
    """Changes the status of a job, and tells so; other columns of its row may change with it."""
    finished = now() if status in OVER else None
    columns |= {"status": status, "wanted": "", "error": error and json.dumps(error), "finished": finished}
    names = ", ".join(f"{name} = ?" for name in columns)
    database.execute(f"UPDATE jobs SET {names} WHERE id = ?", (*columns.values(), job_id))
    add_event(database, job_id, message, "error" if error else "info")


def fail(database: Connection, job_id: str, code: str, message: str, param: str | None = None) -> None:
    """Ends a job with an error."""
    error = {"code": code, "message": message, "param": param}
    set_status(database, job_id, "failed", f"The job failed: {message}", error=error)


@dataclass(frozen=True)
class Event:
    """Something that happened to a job.

    Attributes:
        number: increases over all jobs.
        created: seconds since 1970.
        level: info, warn or error.
        type: message or metrics.
        message: a message for people.
        data: for metrics: step, total_steps, train_loss or valid_loss, and so on.
    """

    number: int
    created: int
    level: str
    type: str
    message: str
    data: dict[str, Any]


def add_event(
    database: Connection, job_id: str, message: str, level: str = "info", key: str = "", metrics: Any = None
) -> None:
    """Adds an event to a job, unless it already has one with this key."""
    kind = "metrics" if metrics else "message"
    database.execute(
        "INSERT OR IGNORE INTO events (job, key, created, level, type, message, data) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (job_id, key or new_id("state"), now(), level, kind, message, json.dumps(metrics or {})),
    )


def events_of(
    state: State, job_id: str, after: int = 0, limit: int = -1, *, newest_first: bool = False
) -> Sequence[Event]:
    """Returns the events of a job: at most `limit` of those after event number `after`.

    With `newest_first`, the order is reversed; then those before `after` are returned, unless it is 0.
    """
    order, beyond = "DESC" if newest_first else "ASC", "<" if newest_first and after else ">"
    query = f"SELECT * FROM events WHERE job = ? AND number {beyond} ? ORDER BY number {order} LIMIT ?"
    return [
        Event(row["number"], row["created"], row["level"], row["type"], row["message"], json.loads(row["data"]))
        for row in state.rows(query, job_id, after, limit)
    ]


@dataclass(frozen=True)
class JobProgress:
    """The progress of a job.

    Attributes:
        step, steps: updates done, and in the whole run; None: not known yet.
        seconds_left: estimated training time of the other updates; None: unknown.
        trained_tokens: number of trained tokens seen so far.
    """

    step: int
    steps: int | None
    seconds_left: float | None
    trained_tokens: int


def progress_of(state: State, job_id: str) -> JobProgress:
    """Returns the progress of a job."""
    events = _metrics(state, "job = ? AND type = 'metrics' ORDER BY number DESC LIMIT ?", job_id, _LATEST)
    train = [event for event in events if "train_loss" in event]
    last = train[0] if train else {"step": 0, "trained_tokens": 0}
    steps = events[0]["total_steps"] if events else None
    left = max(0, steps - last["step"]) * sum(e["step_s"] for e in train) / len(train) if steps and train else None
    return JobProgress(last["step"], steps, left, last["trained_tokens"])


def training_speed(state: State) -> float | None:
    """Returns the speed of the latest runs, in tokens per second; None: there were none."""
    events = _metrics(state, "type = 'metrics' AND key LIKE 'train:%' ORDER BY number DESC LIMIT 200")
    pairs = [
        (later["tokens"] - earlier["tokens"], later["step_s"])
        for later, earlier in itertools.pairwise(events)
        if later["step"] == earlier["step"] + 1
    ]
    seconds = sum(step_s for _, step_s in pairs)
    return sum(tokens for tokens, _ in pairs) / seconds if len(pairs) >= 5 and seconds else None


def losses_at(state: State, job_id: str, step: int) -> dict[str, float]:
    """Returns the losses of a job after an update."""
    events = _metrics(state, "job = ? AND key IN (?, ?)", job_id, f"train:{step}", f"valid:{step}")
    return {name: loss for event in events for name, loss in event.items() if name.endswith("_loss")}


def _metrics(state: State, which: str, *values: Any) -> list[dict[str, Any]]:
    return [json.loads(row["data"]) for row in state.rows(f"SELECT data FROM events WHERE {which}", *values)]
