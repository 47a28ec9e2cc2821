"""The queue of training jobs: clients add jobs to it, and change their states."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from sqlite3 import Connection
from typing import Any, Final

from .planner import Planner
from .records import OVER, Job, add_event, events_of, set_status
from .state import RequestError, State, new_id, now

__all__ = ["Jobs"]

_ID: Final = re.compile(r"ftjob-[A-Za-z0-9]{24}", re.ASCII)
_SUFFIX: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_MOST_OPEN: Final = 100  # maximum number of unfinished jobs


class Jobs:
    """The training jobs of a server.  Any thread may use it.

    Args:
        state: the database.
        planner: checks the settings of jobs.
        name: the base model's name in the API.
        max_jobs: number of jobs that train at the same time; others wait in order.

    Attributes:
        files: the uploaded files.
    """

    def __init__(self, state: State, planner: Planner, name: str, max_jobs: int = 1) -> None:
        self.state, self.planner, self.name, self.max_jobs = state, planner, name, max_jobs
        self.files = planner.files

    def create(
        self,
        training_file: str,
        settings: Mapping[str, Any] | None = None,
        suffix: str = "",
        *,
        validation_file: str | None = None,
        learning_rate_multiplier: float | None = None,
        asked: Mapping[str, Any] | None = None,
    ) -> Job:
        """Queues a job.

        Args:
            training_file: the id of an uploaded file.
            settings: fields of `TrainConfig`.
            suffix: a part of the adapter's name: letters, digits, ``.``, ``_`` and ``-``.
            validation_file: the id of another uploaded file.
            learning_rate_multiplier: factor for the learning rate that training would choose.
            asked: other values to include in the job's description.

        Raises:
            RequestError: there is no such file, or a setting is invalid; all faults are listed.
            OutputError: the disk is full.
        """
        if not self.max_jobs:
            raise RequestError("this server does not run training jobs (--max_jobs 0)", 403, "jobs_are_off")
        job_id = new_id("ftjob")
        # The inherited ones are stored, because the next server may quantise its base differently.
        settings = {**self.planner.inherited, **(settings or {})}
        self.planner.config(job_id, settings, training_file, validation_file)  # raises if they are invalid
        if suffix and not _SUFFIX.fullmatch(suffix):
            words = f"suffix is {suffix[:80]!r}, expected at most 64 letters, digits, dots, hyphens and underscores"
            raise RequestError(words, param="suffix")
        if learning_rate_multiplier is not None and "lr" in settings:
            words = f"learning_rate_multiplier is {learning_rate_multiplier:g}, but lr is given as well"
            raise RequestError(words, param="hyperparameters")
        described = json.dumps({**(asked or {}), "learning_rate_multiplier": learning_rate_multiplier})
        with self.state.transaction() as database:
            _require_room(database)
            database.execute(
                "INSERT INTO jobs (id, status, wanted, suffix, training_file, validation_file, settings, asked, "
                "created) VALUES (?, 'validating_files', '', ?, ?, ?, ?, ?, ?)",
                (job_id, suffix, training_file, validation_file, json.dumps(settings), described, now()),
            )
            add_event(database, job_id, f"Created fine-tuning job {job_id}")
        return self.get(job_id)

    def list(self) -> list[Job]:
        """Returns all jobs, newest first."""
        return [self._job(row) for row in self.state.rows("SELECT * FROM jobs ORDER BY number DESC")]

    def oldest(self, status: str) -> Job | None:
        """Returns the first of the jobs with a status; None: there is none."""
        rows = self.state.rows("SELECT * FROM jobs WHERE status = ? ORDER BY number LIMIT 1", status)
        return self._job(rows[0]) if rows else None

    def get(self, job_id: str) -> Job:
        """Returns a job.

        Raises:
            RequestError: there is no job with this id.
        """
        rows = self.state.rows("SELECT * FROM jobs WHERE id = ?", job_id) if _ID.fullmatch(job_id) else []
        if not rows:
            words = f"there is no fine-tuning job {job_id[:80]!r}"
            raise RequestError(words, 404, "job_not_found", "fine_tuning_job_id")
        return self._job(rows[0])

    def wait(self, job_id: str, timeout: float | None = None, *, after: int = 0) -> Job:
        """Waits until a job is over or paused, or has an event with a number above `after`, if that is given."""

        def is_there() -> bool:
            done = self.get(job_id).status in (*OVER, "paused")
            return done or bool(after and events_of(self.state, job_id, after, 1))

        self.state.wait_for(is_there, timeout)
        return self.get(job_id)

    def cancel(self, job_id: str) -> Job:
        """Ends a job permanently; its process gets half a minute to save its state.

        Raises:
            RequestError: there is no such job, or it is over.
        """
        return self._want(job_id, "cancel", ("validating_files", "queued", "running", "paused"), "cancelled")

    def pause(self, job_id: str) -> Job:
        """Ends a job's process after it has saved its state; `resume` continues from there.

        Raises:
            RequestError: there is no such job, or it is neither running nor waiting.
        """
        return self._want(job_id, "pause", ("validating_files", "queued", "running"), "paused")

    def resume(self, job_id: str) -> Job:
        """Queues a job that was paused or has failed, to continue from its last checkpoint.

        Raises:
            RequestError: there is no such job, or it is neither paused nor failed.
        """
        with self.state.transaction() as database:
            self._require(job_id, ("paused", "failed"), "resumed")
            set_status(database, job_id, "validating_files", "The job continues")
        return self.get(job_id)

    def _want(self, job_id: str, wanted: str, states: Sequence[str], becomes: str) -> Job:
        with self.state.transaction() as database:
            if self._require(job_id, states, becomes).status == "running":
                database.execute("UPDATE jobs SET wanted = ? WHERE id = ?", (wanted, job_id))
                add_event(database, job_id, f"The job is being {becomes}")
            else:
                set_status(database, job_id, becomes, f"The job was {becomes}")
        return self.get(job_id)

    def _require(self, job_id: str, states: Sequence[str], becomes: str) -> Job:
        job = self.get(job_id)
        if job.status not in states:
            words = f"{job_id} is {job.status}, so it cannot be {becomes}; expected {' or '.join(states)}"
            raise RequestError(words, 409, "wrong_status")
        return job

    def _job(self, row: Any) -> Job:
        short = row["id"].partition("-")[2][:8]
        return Job(
            row["id"], row["status"], row["wanted"], row["training_file"], row["validation_file"],
            json.loads(row["settings"]), json.loads(row["asked"]), json.loads(row["error"]) if row["error"] else None,
            row["created"], row["started"], row["finished"], self.planner.directory / row["id"],
            f"ft:{self.name}:{row['suffix']}:{short}",
        )  # fmt: skip


def _require_room(database: Connection) -> None:
    unfinished = database.execute(f"SELECT COUNT(*) FROM jobs WHERE status NOT IN {OVER}").fetchone()[0]
    if unfinished >= _MOST_OPEN:
        words = f"{_MOST_OPEN} jobs are already waiting; try again when some have finished"
        raise RequestError(words, 429, "too_many_jobs")
