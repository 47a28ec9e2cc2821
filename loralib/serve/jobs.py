"""Training jobs: a queue in the database, one process per job, and one thread that supervises them.

A job is ``loralib train --resume`` in its own directory, which holds all of its progress.  Any server that finds a job
unfinished can therefore start it again, and the result is identical to that of an undisturbed run.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..console import say
from ..data import read_sources
from ..errors import ConfigError, LoraError, OutputError, first_line, list_faults
from ..files import write_errors, write_text
from ..settings import setting_faults
from ..targets import match_modules
from ..training import TrainConfig
from ..training.plan import how_to_read, make_plan, updates_per_epoch
from ..training.record import read_record, write_settings
from ..training.run_directory import checkpoint_files
from .preview import Preview, make_preview
from .process import LogTail, MetricsTail, TrainingProcess, last_words
from .state import RequestError, State, new_id, now
from .uploads import FileStore

__all__ = ["NOT_SETTABLE", "OVER", "Event", "Job", "JobCheckpoint", "JobProgress", "Jobs"]

OVER: Final = ("succeeded", "failed", "cancelled")
# Settings that name paths or belong to the server, and those with their own arguments.
NOT_SETTABLE: Final = frozenset(
    "model task modules_to_save train_data valid_data output_dir from_adapter adapter resume overwrite "
    "report_to device shard hidden_dim num_layers chat_template".split()
)
_HEADS: Final = "is not available for jobs, because their adapters are served and served adapters have no heads"
_NOT_SERVED: Final = {
    "task": f"task {_HEADS}: classifiers are trained by `loralib train --task classify`",
    "modules_to_save": f"modules_to_save {_HEADS}",
}
_TEMPLATE: Final = "chat_template.jinja"  # in the job's directory
_ID: Final = re.compile(r"ftjob-[A-Za-z0-9]{24}", re.ASCII)
_SUFFIX: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_TICK: Final = 0.2  # seconds between two checks of what is running
_CANCEL_WITHIN: Final = 30.0  # seconds until a cancelled job is killed
_SAVE_STEPS: Final = 25  # updates between checkpoints by default: a kill loses no more than this
# Events are identified by job and key, so adding the same one twice has no effect.
_ADD_EVENT: Final = (
    "INSERT OR IGNORE INTO events (job, key, created, level, type, message, data) VALUES (?, ?, ?, ?, ?, ?, ?)"
)
_LATEST: Final = 50  # number of metrics to estimate a job's speed from
_MOST_OPEN: Final = 100  # maximum number of unfinished jobs
_MOST_DEATHS: Final = 3  # how often in a row a process may be killed without any progress


@dataclass(frozen=True)
class Job:
    """A training job.

    Attributes:
        id: its random id.
        status: validating_files, queued, running, paused, succeeded, failed or cancelled.
        suffix: the client's part of the adapter's name.
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
    suffix: str
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


@dataclass(frozen=True)
class JobCheckpoint:
    """Training state on disk from which a job can continue."""

    job: str
    step: int
    created: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class JobProgress:
    """The progress of a job.

    Attributes:
        step, steps: updates done, and in the whole run; None: not known yet.
        train, valid: (update, loss) of each update and validation.
        seconds_left: estimated time until it is done; None: unknown.
        trained_tokens: number of trained tokens seen so far.
    """

    step: int
    steps: int | None
    train: list[tuple[int, float]]
    valid: list[tuple[int, float]]
    seconds_left: float | None
    trained_tokens: int


@dataclass
class _Running:
    """A process of this server, and what has been read from its files so far."""

    process: TrainingProcess
    metrics: MetricsTail
    log: LogTail
    began: int  # updates done before it started
    wanted: str = ""
    steps: int | None = None
    last_step: int = 0
    is_handed_over: bool = False


class Jobs:
    """The training jobs of a server.  Any thread may use it.

    Args:
        state_dir: directory for files, jobs and their adapters; locked by one server at a time.
        max_jobs: number of jobs that train at the same time; others wait in order.
        model: the base model that jobs train on, a name or a path.
        name: its name in the API; default: `model`.
        on_finished: called with each job that succeeded and its adapter's directory, from the jobs' thread; for jobs
            finished under an earlier server, before the constructor returns.
        base: the base model in memory and its tokenizer, for previews; they are not changed.
        chat_template: the template that jobs train with, if it is not the base's own.
        quantize: how the served base is quantised: jobs train on it in the same form, unless they say otherwise.

    Attributes:
        files: the uploaded files.

    Raises:
        OutputError: the directory is in use by another server, or cannot be written.
    """

    def __init__(
        self,
        state_dir: str | Path,
        *,
        max_jobs: int = 1,
        model: str = "smollm2-135m",
        name: str | None = None,
        on_finished: Callable[[Job, Path], object] = lambda job, directory: None,
        base: tuple[Any, Any] | None = None,
        chat_template: str | None = None,
        quantize: str = "none",
    ) -> None:
        self._chat_template, self._quantize = chat_template, quantize
        self._state = State(state_dir)
        self._directory = self._state.directory / "jobs"
        self._model = str(Path(model).expanduser().absolute()) if Path(model).expanduser().exists() else model
        self.name = name or model
        self._max_jobs, self._on_finished, self._base = max_jobs, on_finished, base
        self._running: dict[str, _Running] = {}
        self._deaths: dict[str, int] = {}
        self._wake, self._changed = threading.Event(), threading.Condition()
        self._closing: float | None = None
        try:
            self._directory.mkdir(exist_ok=True)
            self.files = FileStore(self._state)
            self._recover()
        except OSError as error:
            self._state.close()
            raise OutputError(f"{self._state.directory} cannot be used: {error}") from error
        self._validator = ThreadPoolExecutor(1, "loralib-validate")
        self._validating: set[str] = set()
        self._thread = threading.Thread(target=self._watch, name="loralib-jobs", daemon=True)
        self._wake.set()  # for jobs left by an earlier server
        self._thread.start()

    # --- requests by clients ----------------------------------------------------------------------------------------

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
        settings = self._as_served(settings)  # stored, because the next server may quantise its base differently
        if not self._max_jobs:
            raise RequestError("this server does not run training jobs (--max_jobs 0)", 403, "jobs_are_off")
        self.files.get(training_file, "training_file")
        if validation_file is not None:
            self.files.get(validation_file, "validation_file")
        if suffix and not _SUFFIX.fullmatch(suffix):
            raise RequestError(
                f"suffix is {suffix[:80]!r}, expected at most 64 letters, digits, dots, hyphens and underscores",
                param="suffix",
            )
        if learning_rate_multiplier is not None and ("lr" in settings or self._base is None):
            why = "lr is given as well" if "lr" in settings else "the base model is not in memory"
            raise RequestError(
                f"learning_rate_multiplier is {learning_rate_multiplier:g}, but {why}", param="hyperparameters"
            )
        job_id = new_id("ftjob")
        self._config(job_id, settings, training_file, validation_file)  # raises if they are invalid
        with self._state.transaction() as database:
            is_over = "status IN ('succeeded', 'failed', 'cancelled')"
            if database.execute(f"SELECT COUNT(*) FROM jobs WHERE NOT {is_over}").fetchone()[0] >= _MOST_OPEN:
                raise RequestError(
                    f"{_MOST_OPEN} jobs are already waiting; try again when some have finished", 429, "too_many_jobs"
                )
            database.execute(
                "INSERT INTO jobs (id, status, wanted, suffix, training_file, validation_file, settings, asked, "
                "created) VALUES (?, 'validating_files', '', ?, ?, ?, ?, ?, ?)",
                (
                    job_id, suffix, training_file, validation_file, json.dumps(settings),
                    json.dumps({**(asked or {}), "learning_rate_multiplier": learning_rate_multiplier}), now(),
                ),
            )  # fmt: skip
            self._say(database, job_id, f"Created fine-tuning job {job_id}")
        self._wake.set()
        return self.get(job_id)

    def list(self) -> list[Job]:
        """Returns all jobs, newest first."""
        return [self._made(row) for row in self._state.rows("SELECT * FROM jobs ORDER BY number DESC")]

    def get(self, job_id: str) -> Job:
        """Returns a job.

        Raises:
            RequestError: there is no job with this id.
        """
        rows = self._state.rows("SELECT * FROM jobs WHERE id = ?", job_id) if _ID.fullmatch(job_id) else []
        if not rows:
            raise RequestError(
                f"there is no fine-tuning job {job_id[:80]!r}", 404, "job_not_found", "fine_tuning_job_id"
            )
        return self._made(rows[0])

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
        with self._state.transaction() as database:
            self._require(job_id, ("paused", "failed"), "resumed")
            self._set(database, job_id, "validating_files", "The job continues", error=None, finished=None, wanted="")
        self._deaths.pop(job_id, None)
        self._wake.set()
        return self.get(job_id)

    def events(
        self, job_id: str, after: int = 0, limit: int | None = None, *, newest_first: bool = False
    ) -> Sequence[Event]:
        """Returns the events of a job: at most `limit` of those after event number `after`.

        With `newest_first`, the order is reversed; then those before `after` are returned, unless it is 0.
        """
        self.get(job_id)
        order, beyond = ("DESC", "<") if newest_first and after else ("DESC" if newest_first else "ASC", ">")
        rows = self._state.rows(
            f"SELECT * FROM events WHERE job = ? AND number {beyond} ? ORDER BY number {order} LIMIT ?",
            job_id, after, -1 if limit is None else limit,
        )  # fmt: skip
        return [_event(row) for row in rows]

    def checkpoints(self, job_id: str) -> Sequence[JobCheckpoint]:
        """Returns the training states of a job on disk, newest first."""
        job = self.get(job_id)
        found = []
        for path in reversed(checkpoint_files(job.run / "checkpoints")):
            with suppress(OSError, ValueError):
                step = int(path.stem.partition("-")[2])
                found.append(JobCheckpoint(job_id, step, int(path.stat().st_mtime), self._metrics_at(job_id, step)))
        return found

    def progress(self, job_id: str, *, curves: bool = True) -> JobProgress:
        """Returns the progress of a job; with `curves`, including all losses so far, otherwise only the latest."""
        job = self.get(job_id)
        rows = self._state.rows(
            "SELECT data FROM events WHERE job = ? AND type = 'metrics' ORDER BY number DESC LIMIT ?",
            job_id, -1 if curves else _LATEST,
        )  # fmt: skip
        events = [json.loads(row["data"]) for row in reversed(rows)]
        train = [event for event in events if "train_loss" in event]
        last = train[-1] if train else {"step": 0, "trained_tokens": 0}
        steps = events[-1]["total_steps"] if events else None
        seconds = [event["step_s"] for event in train[-_LATEST:]]
        left = None
        if job.status == "running" and steps and seconds:
            left = max(0, steps - last["step"]) * sum(seconds) / len(seconds)
        return JobProgress(
            last["step"],
            steps,
            [(event["step"], event["train_loss"]) for event in train],
            [(event["step"], event["valid_loss"]) for event in events if "valid_loss" in event],
            left,
            last["trained_tokens"],
        )

    def preview(
        self, training_file: str, settings: Mapping[str, Any] | None = None, *, validation_file: str | None = None
    ) -> Preview:
        """Describes what a job would do: how its data are read, what is trained, memory and time; see `make_preview`.

        It takes as long as reading and tokenizing the data; the page calls it in a thread.

        Raises:
            RequestError: there is no such file, a setting is invalid, or the data cannot be trained on.
        """
        if self._base is None:
            raise RequestError("the base model is not in memory, so nothing can be previewed")
        config = self._config("preview", self._as_served(settings), training_file, validation_file)
        try:
            return make_preview(config, *self._base, public=self._public, speed=self._speed())
        except LoraError as error:
            raise RequestError(self._public(str(error)), param="training_file") from error

    def _speed(self) -> float | None:
        """Returns the speed of the latest runs on this base, in tokens per second; None: there were none."""
        rows = self._state.rows(
            "SELECT data FROM events WHERE type = 'metrics' AND key LIKE 'train:%' ORDER BY number DESC LIMIT 200"
        )
        events = [json.loads(row["data"]) for row in rows]
        pairs = [
            (later["tokens"] - earlier["tokens"], later["step_s"])
            for later, earlier in itertools.pairwise(events)
            if later["step"] == earlier["step"] + 1
        ]
        seconds = sum(step_s for _, step_s in pairs)
        return sum(tokens for tokens, _ in pairs) / seconds if len(pairs) >= 5 and seconds else None

    def wait(self, job_id: str, timeout: float | None = None, *, after: int = 0) -> Job:
        """Waits until a job is over or paused, or has an event with a number above `after`, if that is given."""

        def is_there() -> bool:
            done = self._closing is not None or self.get(job_id).status in (*OVER, "paused")
            return done or (after > 0 and bool(self.events(job_id, after, 1)))

        with self._changed:
            self._changed.wait_for(is_there, timeout)
        return self.get(job_id)

    def close(self, finish_within: float = 30.0) -> None:
        """Ends the thread; running jobs save their state, and continue when the next server starts.

        A job that takes longer than `finish_within` seconds ends on its own, because its pipe is closed.
        """
        self._closing = finish_within
        self._wake.set()
        self._thread.join()
        self._validator.shutdown(cancel_futures=True)
        self._state.close()

    # --- settings ---------------------------------------------------------------------------------------------------

    def _as_served(self, settings: Mapping[str, Any] | None) -> dict[str, Any]:
        """Adds the settings that a job inherits from the server."""
        own = {} if self._quantize == "none" else {"quantize": self._quantize}
        return {**own, **(settings or {})}

    def _config(
        self, job_id: str, settings: Mapping[str, Any], training_file: str, validation_file: str | None
    ) -> TrainConfig:
        """Returns the settings for a job's run.

        Raises:
            RequestError: they are invalid, or may not be chosen by clients; all faults are listed.
        """
        try:
            json.dumps(settings, ensure_ascii=False, allow_nan=False).encode("utf-8")
        except (ValueError, TypeError) as error:  # lone surrogates, which are allowed in JSON but not in a file
            raise RequestError(f"the job has settings that cannot be written: {error}", param="loralib") from error
        own = {name: value for name, value in settings.items() if name in NOT_SETTABLE}
        faults = [_NOT_SERVED.get(name, f"{name} is set by the server") for name in own]
        faults += setting_faults(TrainConfig, {name: value for name, value in settings.items() if name not in own})
        if faults:
            raise RequestError(list_faults("the job has invalid settings", faults), param="loralib")
        paths: dict[str, Any] = {"train_data": [str(self.files.get(training_file, "training_file").path)]}
        if validation_file is not None:
            paths["valid_data"] = [str(self.files.get(validation_file, "validation_file").path)]
        template = self._directory / job_id / _TEMPLATE
        if self._chat_template is not None or template.exists():
            paths["chat_template"] = str(template)
        run = str(self._directory / job_id / "run")
        try:
            return TrainConfig(**{"save_steps": _SAVE_STEPS, **settings, **paths}, model=self._model, output_dir=run)
        except ConfigError as error:
            raise RequestError(str(error), param="loralib") from error

    def _public(self, text: str) -> str:
        """Replaces the server's paths in a text with names that clients know."""
        if str(self._state.directory) not in text:
            return text
        for file in self.files.list():
            text = text.replace(str(file.path), file.name)
        text = text.replace(f"{self._directory}{os.sep}", "")
        return text.replace(str(self._state.directory), "state_dir")

    # --- the jobs' thread -------------------------------------------------------------------------------------------

    def _recover(self) -> None:
        """Takes over from an earlier server: requeues jobs that were running, and hands over finished adapters."""
        with self._state.transaction() as database:
            for row in database.execute("SELECT * FROM jobs WHERE status IN ('running', 'validating_files', 'queued')"):
                wanted = {"cancel": "cancelled", "pause": "paused"}.get(row["wanted"])
                if wanted is not None:
                    self._set(database, row["id"], wanted, f"The job was {wanted}", wanted="")
                elif row["status"] == "running":
                    again = "The server was restarted; the job continues from its last checkpoint"
                    self._set(database, row["id"], "queued", again)
        for job in reversed(self.list()):
            if job.status == "succeeded":
                self._hand_over(job)

    def _watch(self) -> None:
        problem = ""
        while True:
            self._wake.wait(_TICK if self._running else 1.0 if problem else None)
            self._wake.clear()
            try:
                if self._closing is not None:
                    self._end()
                    return
                self._look()
                problem = ""
            except Exception as error:  # such as a full disk; whatever was not recorded is recorded later
                if problem != str(error):
                    say(f"Training jobs: {error if isinstance(error, LoraError) else traceback.format_exc()}")
                problem = str(error) or "?"

    def _look(self) -> None:
        """Performs one round: starts validations and jobs, collects events, ends jobs."""
        faults = []
        for job_id in list(self._running):
            try:
                self._collect(job_id)
            except LoraError as error:  # continue with the others
                faults.append(error)
        if faults:
            raise faults[0]
        for row in self._state.rows("SELECT id FROM jobs WHERE status = 'validating_files' ORDER BY number"):
            if row["id"] not in self._validating:
                self._validating.add(row["id"])
                self._validator.submit(self._validate, row["id"])
        for row in self._state.rows("SELECT id FROM jobs WHERE status = 'queued' ORDER BY number"):
            if len(self._running) >= self._max_jobs:
                break
            self._start(self.get(row["id"]))

    def _validate(self, job_id: str) -> None:
        """Validates a job's data by reading them as its run will."""
        try:
            job = self.get(job_id)
            settings, fault = job.settings, ""
            try:
                settings = self._planned(job)
            except LoraError as error:
                fault = self._public(str(error))
            except Exception as error:
                fault = f"the data cannot be read: {type(error).__name__}: {first_line(error)}"
            with self._state.transaction() as database:
                if self.get(job_id).status != "validating_files":
                    return  # it was cancelled in the meantime
                if fault:
                    self._fail(database, job_id, "invalid_job", fault, "training_file")
                else:
                    ready = "Files validated, moving job to queued state"
                    self._set(database, job_id, "queued", ready, settings=json.dumps(settings))
        except LoraError as error:  # the disk is full; try again
            say(f"Training jobs: {error}")
            time.sleep(1.0)
        finally:
            self._validating.discard(job_id)
            self._wake.set()
            self._notify()

    def _planned(self, job: Job) -> dict[str, Any]:
        """Validates a job's data, and plans its run if the base is in memory; returns its settings, with a scaled rate.

        Raises:
            LoraError: the job would fail, for this reason.
        """
        config = self._config(job.id, job.settings, job.training_file, job.validation_file)
        multiplier = None if "lr" in job.settings else job.asked["learning_rate_multiplier"]
        ids = filter(None, (job.training_file, job.validation_file))
        if multiplier is None and not all(self.files.get(file_id).is_read for file_id in ids):
            return job.settings  # left to the job itself
        if self._base is None:
            for data in filter(None, (config.train_data, config.valid_data)):
                read_sources(data, **how_to_read(config))
            return job.settings
        model, tokenizer = self._base
        match_modules(model, config.lora_config(), changes=False)
        plan = make_plan(model, config.train_data, config.valid_data, tokenizer, config, lambda line: None)
        return job.settings if multiplier is None else {**job.settings, "lr": plan.config.peak_lr * multiplier}

    def _start(self, job: Job) -> None:
        try:
            config = self._config(job.id, job.settings, job.training_file, job.validation_file)
        except LoraError as error:  # a file was removed
            with self._state.transaction() as database:
                self._fail(database, job.id, "invalid_job", self._public(str(error)))
            return
        with write_errors(job.directory):
            job.directory.mkdir(exist_ok=True)
        if config.chat_template is not None and not Path(config.chat_template).exists():
            write_text(config.chat_template, self._chat_template or "")  # kept from the first start on
        given = {name: value for name, value in config.to_dict().items() if name not in ("resume", "overwrite")}
        write_settings(job.directory / "job.toml", given)
        with self._state.transaction() as database:
            if self.get(job.id).status != "queued":
                return
            started = job.started or now()
            self._set(database, job.id, "running", "Fine-tuning job started", started=started)
        began = self.progress(job.id, curves=False).step
        try:
            process = TrainingProcess(job.directory)
        except OutputError as error:
            with self._state.transaction() as database:
                self._fail(database, job.id, "not_started", self._public(str(error)))
            return
        self._running[job.id] = _Running(process, *_tails(job), began)

    def _collect(self, job_id: str) -> None:
        """Records what a run has reported since the last check, and whether it has ended."""
        running, job = self._running[job_id], self.get(job_id)
        wanted = self._state.rows("SELECT wanted FROM jobs WHERE id = ?", job_id)[0]["wanted"]
        if wanted and running.wanted != wanted:
            running.wanted = wanted
            running.process.stop(_CANCEL_WITHIN if wanted == "cancel" else None)
        code = running.process.poll()  # first, so that everything it wrote before it ended is read below
        if code == 0 and not running.is_handed_over:
            self._hand_over(job)  # the adapter must be available before the job is reported as succeeded
            running.is_handed_over = True
        try:
            with self._state.transaction() as database:
                self._note(database, job, running)
                if code is not None:
                    self._ended(database, job, running, code)
        except LoraError:
            running.metrics, running.log = _tails(job)  # nothing was recorded: read everything again
            raise
        if code is not None:
            del self._running[job_id]
            self._wake.set()
        self._notify()

    def _note(self, database: Any, job: Job, running: _Running) -> None:
        rows = []
        for start, line in running.log.lines():
            if line:
                level = "warn" if line.lower().startswith("warning") else "info"
                rows.append((job.id, f"log:{start}", now(), level, "message", self._public(line), "{}"))
        for event in running.metrics.events():
            if running.steps is None:
                running.steps = _total_steps(job.run)
            step, kind = event["step"], event["event"]
            running.last_step = max(running.last_step, step)
            data = {"step": step, "total_steps": running.steps, f"{kind}_loss": event["loss"]}
            data |= {f"{kind}_{name}": event[name] for name in ("accuracy", "margin") if name in event}
            data |= {name: event[name] for name in ("epoch", "lr", "examples", "tokens", "trained_tokens", "step_s")}
            what = "training" if kind == "train" else "validation"
            words = f"Step {step}/{running.steps}: {what} loss={event['loss']:.4f}"
            rows.append((job.id, f"{kind}:{step}", now(), "info", "metrics", words, json.dumps(data)))
        database.executemany(_ADD_EVENT, rows)

    def _ended(self, database: Any, job: Job, running: _Running, code: int) -> None:
        """Determines what the end of a process means for its job."""
        words = self._public(last_words(job.directory / "errors.log"))
        if code == 0:
            self._set(database, job.id, "succeeded", "The job has successfully completed", finished=now())
        elif running.wanted == "cancel":
            self._set(database, job.id, "cancelled", "The job was cancelled", finished=now(), wanted="")
        elif running.wanted == "pause" and code != 2:
            self._set(database, job.id, "paused", "The job was paused", wanted="")
        elif code < 0 or code > 128:  # 128 + a signal: it saved its state, as when the whole machine shuts down
            self._died(database, job, running, -code if code < 0 else code - 128)
        else:
            self._fail(database, job.id, "training_failed", words or f"the training process ended with code {code}")

    def _died(self, database: Any, job: Job, running: _Running, signal: int) -> None:
        """Requeues a job whose process was killed, unless that happens repeatedly without any progress."""
        deaths = 0 if running.last_step > running.began else self._deaths.get(job.id, 0) + 1
        self._deaths[job.id] = deaths
        if deaths < _MOST_DEATHS:
            self._set(database, job.id, "queued", f"The training process was killed (signal {signal}); restarting it")
            return
        self._fail(
            database,
            job.id,
            "training_killed",
            f"the training process was killed (signal {signal}) {deaths} times without making progress. It may have "
            "run out of memory: lower batch_size or seq_len, or set gradient_checkpointing; then create a new job.",
        )

    def _end(self) -> None:
        """Asks running jobs to save their state, and waits a while."""
        for running in self._running.values():
            running.process.stop()
        deadline = time.monotonic() + (self._closing or 0)
        try:
            while self._running and time.monotonic() < deadline:
                for job_id, running in list(self._running.items()):
                    code = running.process.poll()
                    # If the disk is full, the next server records it.
                    with suppress(LoraError), self._state.transaction() as database:
                        self._note(database, self.get(job_id), running)
                        if code == 0 or code == 2:
                            self._ended(database, self.get(job_id), running, code)
                    if code is not None:
                        del self._running[job_id]
                time.sleep(0.05)
        finally:
            for running in self._running.values():
                running.process.leave()
            self._notify()

    def _hand_over(self, job: Job) -> None:
        try:
            self._on_finished(job, job.run)
        except Exception as error:
            why = error if isinstance(error, LoraError) else f"{type(error).__name__}: {error}"
            with self._state.transaction() as database:
                words = self._public(f"The adapter is in {job.run}, but could not be loaded: {why}")
                self._say(database, job.id, words, "warn")

    # --- database rows ----------------------------------------------------------------------------------------------

    def _want(self, job_id: str, wanted: str, states: Sequence[str], becomes: str) -> Job:
        with self._state.transaction() as database:
            job = self._require(job_id, states, becomes)
            if job.status == "running":
                database.execute("UPDATE jobs SET wanted = ? WHERE id = ?", (wanted, job_id))
                self._say(database, job_id, f"The job is being {becomes}")
            else:
                finished = now() if becomes in OVER else None
                self._set(database, job_id, becomes, f"The job was {becomes}", finished=finished)
        self._wake.set()
        self._notify()
        return self.get(job_id)

    def _require(self, job_id: str, states: Sequence[str], becomes: str) -> Job:
        job = self.get(job_id)
        if job.status not in states:
            raise RequestError(
                f"{job_id} is {job.status}, so it cannot be {becomes}; expected {' or '.join(states)}",
                409,
                "wrong_status",
            )
        return job

    def _set(self, database: Any, job_id: str, status: str, message: str, **columns: Any) -> None:
        columns = {"status": status, **columns}
        names = ", ".join(f"{name} = ?" for name in columns)
        database.execute(f"UPDATE jobs SET {names} WHERE id = ?", (*columns.values(), job_id))
        self._say(database, job_id, message)

    def _fail(self, database: Any, job_id: str, code: str, message: str, param: str | None = None) -> None:
        error = {"code": code, "message": message, "param": param}
        columns = {"status": "failed", "error": json.dumps(error), "finished": now(), "wanted": "", "id": job_id}
        database.execute(
            "UPDATE jobs SET status = :status, error = :error, finished = :finished, wanted = :wanted WHERE id = :id",
            columns,
        )
        self._say(database, job_id, f"The job failed: {message}", "error")

    def _say(self, database: Any, job_id: str, message: str, level: str = "info") -> None:
        database.execute(_ADD_EVENT, (job_id, new_id("state"), now(), level, "message", message, "{}"))

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _metrics_at(self, job_id: str, step: int) -> dict[str, float]:
        rows = self._state.rows(
            "SELECT data FROM events WHERE job = ? AND key IN (?, ?)", job_id, f"train:{step}", f"valid:{step}"
        )
        found: dict[str, float] = {"step": step}
        for row in rows:
            found |= {name: value for name, value in json.loads(row["data"]).items() if name.endswith("_loss")}
        return found

    def _made(self, row: Any) -> Job:
        short = row["id"].partition("-")[2][:8]
        return Job(
            row["id"], row["status"], row["suffix"], row["training_file"], row["validation_file"],
            json.loads(row["settings"]), json.loads(row["asked"]), json.loads(row["error"]) if row["error"] else None,
            row["created"], row["started"], row["finished"], self._directory / row["id"],
            f"ft:{self.name}:{row['suffix']}:{short}",
        )  # fmt: skip


def _tails(job: Job) -> tuple[MetricsTail, LogTail]:
    return MetricsTail(job.run / "metrics.jsonl"), LogTail(job.directory / "output.log")


def _event(row: Any) -> Event:
    return Event(row["number"], row["created"], row["level"], row["type"], row["message"], json.loads(row["data"]))


def _total_steps(run: Path) -> int | None:
    """Returns the total number of updates in a run, once it has begun."""
    settings, record = read_record(run)
    facts = next((each for each in record.get("data", ()) if each.get("kind") == "training"), None)
    if facts is None:
        return None
    config = TrainConfig(**settings)
    return config.max_steps or config.num_epochs * updates_per_epoch(config, int(facts["examples"]))
