"""The processes of training jobs: started in order, watched, and started again when they are killed.

A job is ``loralib train --resume`` in its own directory, which holds all of its progress.  Any server that finds a job
unfinished can therefore start it again, and the result is identical to that of an undisturbed run.
"""

from __future__ import annotations

import json
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from sqlite3 import Connection
from typing import Any, Final

from ..console import say
from ..errors import LoraError, OutputError, first_line
from ..training import TrainConfig
from ..training.plan import updates_per_epoch
from ..training.record import read_record
from .jobs import Jobs
from .process import LogTail, MetricsTail, TrainingProcess, last_words
from .records import Job, add_event, fail, progress_of, set_status
from .state import RequestError, now

__all__ = ["Supervisor"]

_TICK: Final = 0.2  # seconds between two checks of what is running
_CANCEL_WITHIN: Final = 30.0  # seconds until a cancelled job is killed
_MOST_DEATHS: Final = 3  # how often in a row a process may be killed without any progress


class _Run:
    """A process of this server, and what has been read from its files so far."""

    def __init__(self, job: Job, process: TrainingProcess, began: int) -> None:
        self.job, self.process = job, process
        self.began = self.last_step = began  # updates done before it started, and at last
        self.is_handed_over = False
        self._steps: int | None = None
        self.rewind()

    def rewind(self) -> None:
        """Makes `record` read everything again."""
        self._log, self._metrics = (
            LogTail(self.job.directory / "output.log"),
            MetricsTail(self.job.run / "metrics.jsonl"),
        )

    def record(self, database: Connection, public: Callable[[str], str]) -> None:
        """Adds events for what the process has written since the last time; those that are known already stay alone."""
        for start, line in self._log.lines():
            if line:
                level = "warn" if line.lower().startswith("warning") else "info"
                add_event(database, self.job.id, public(line), level, key=f"log:{start}")
        for event in self._metrics.events():
            self._steps = self._steps or _total_steps(self.job.run)
            step, kind = event["step"], event["event"]
            self.last_step = max(self.last_step, step)
            data = {"step": step, "total_steps": self._steps, f"{kind}_loss": event["loss"]}
            data |= {f"{kind}_{name}": event[name] for name in ("accuracy", "margin") if name in event}
            data |= {name: event[name] for name in ("epoch", "lr", "examples", "tokens", "trained_tokens", "step_s")}
            what = "training" if kind == "train" else "validation"
            words = f"Step {step}/{self._steps}: {what} loss={event['loss']:.4f}"
            add_event(database, self.job.id, words, key=f"{kind}:{step}", metrics=data)


class Supervisor:
    """Checks, starts and watches the jobs of a server, in two threads.

    Args:
        jobs: the jobs; those that an earlier server left unfinished are taken over.
        on_finished: called with each job that succeeded, from the supervising thread; for jobs finished under an
            earlier server, before the constructor returns.

    Raises:
        OutputError: the database cannot be written.
    """

    def __init__(self, jobs: Jobs, on_finished: Callable[[Job], object]) -> None:
        self._jobs, self._state, self._public = jobs, jobs.state, jobs.planner.public
        self._on_finished = on_finished
        self._runs: list[_Run] = []
        self._deaths: dict[str, int] = {}
        self._finish_within = 0.0
        self._recover()
        self._threads = [
            threading.Thread(target=self._repeat, args=(self._validate,), name="loralib-validate", daemon=True),
            threading.Thread(target=self._supervise, name="loralib-jobs", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def close(self, finish_within: float = 30.0) -> None:
        """Ends the threads; running jobs save their state, and continue when the next server starts.

        A job that takes longer than `finish_within` seconds ends on its own, because its pipe is closed.
        """
        self._finish_within = finish_within
        self._state.end_waiting()
        for thread in self._threads:
            thread.join()
        self._state.close()

    def _recover(self) -> None:
        """Takes over from an earlier server: requeues jobs that were running, and hands over finished adapters."""
        jobs = self._jobs.list()[::-1]
        with self._state.transaction() as database:
            for job in jobs:
                if job.status not in ("running", "validating_files", "queued"):
                    continue
                wanted = {"cancel": "cancelled", "pause": "paused"}.get(job.wanted)
                if wanted is not None:
                    set_status(database, job.id, wanted, f"The job was {wanted}")
                elif job.status == "running":
                    again = "The server was restarted; the job continues from its last checkpoint"
                    set_status(database, job.id, "queued", again)
        for job in jobs:
            if job.status == "succeeded":
                self._hand_over(job)

    def _repeat(self, step: Callable[[], None]) -> None:
        """Repeats a step until the server shuts down; whatever was not recorded is recorded later."""
        problem = ""
        while not self._state.is_closing:
            try:
                step()
                problem = ""
            except Exception as error:  # such as a full disk
                if problem != str(error):
                    say(f"Training jobs: {error if isinstance(error, LoraError) else traceback.format_exc()}")
                problem = str(error) or "?"
                self._state.wait_for(lambda: False, 1.0)

    def _validate(self) -> None:
        """Validates the data of the next job by reading them as its run will."""
        self._state.wait_for(lambda: self._jobs.oldest("validating_files"))
        job = self._jobs.oldest("validating_files")
        if job is None or self._state.is_closing:
            return
        settings, fault = job.settings, ""
        try:
            settings = self._jobs.planner.plan(job)
        except LoraError as error:
            fault = self._public(str(error))
        except Exception as error:
            fault = f"the data cannot be read: {type(error).__name__}: {first_line(error)}"
        with self._state.transaction() as database:
            if self._jobs.get(job.id).status != "validating_files":
                return  # it was cancelled in the meantime
            if fault:
                fail(database, job.id, "invalid_job", fault, "training_file")
            else:
                ready = "Files validated, moving job to queued state"
                set_status(database, job.id, "queued", ready, settings=json.dumps(settings))

    def _supervise(self) -> None:
        """Runs jobs until the server shuts down; then asks them to save their state, and waits a while."""
        self._repeat(self._look)
        for run in self._runs:
            run.process.stop()
        deadline = time.monotonic() + self._finish_within
        while self._runs and time.monotonic() < deadline:
            for run in list(self._runs):
                with suppress(LoraError):  # if the disk is full, the next server records it
                    self._collect(run)
            time.sleep(0.05)
        for run in self._runs:
            run.process.leave()

    def _look(self) -> None:
        """Waits until there is something to do; then collects what the processes have written, and starts the next."""
        self._state.wait_for(self._startable, _TICK if self._runs else None)
        if self._state.is_closing:
            return
        faults = []
        for run in list(self._runs):
            try:
                self._collect(run)
            except LoraError as error:  # continue with the others
                faults.append(error)
        if faults:
            raise faults[0]
        if job := self._startable():
            self._start(job)

    def _startable(self) -> Job | None:
        return self._jobs.oldest("queued") if len(self._runs) < self._jobs.max_jobs else None

    def _start(self, job: Job) -> None:
        try:
            self._jobs.planner.write(job)
        except RequestError as error:  # a file was removed
            with self._state.transaction() as database:
                fail(database, job.id, "invalid_job", self._public(str(error)))
            return
        with self._state.transaction() as database:
            if self._jobs.get(job.id).status != "queued":
                return
            set_status(database, job.id, "running", "Fine-tuning job started", started=job.started or now())
        began = progress_of(self._state, job.id).step
        try:
            self._runs.append(_Run(job, TrainingProcess(job.directory), began))
        except OutputError as error:
            with self._state.transaction() as database:
                fail(database, job.id, "not_started", self._public(str(error)))

    def _collect(self, run: _Run) -> None:
        """Records what a process has written since the last check, and whether it has ended."""
        job = self._jobs.get(run.job.id)
        if job.wanted:
            run.process.stop(_CANCEL_WITHIN if job.wanted == "cancel" else None)
        code = run.process.poll()  # first, so that everything it wrote before it ended is read below
        is_closing = self._state.is_closing
        if code == 0 and not run.is_handed_over and not is_closing:
            self._hand_over(job)  # the adapter must be available before the job is reported as succeeded
            run.is_handed_over = True
        try:
            with self._state.transaction() as database:
                run.record(database, self._public)
                if code in (0, 2) or not (code is None or is_closing):  # the next server restarts what was stopped
                    self._end(database, run, code)
        except LoraError:
            run.rewind()  # nothing was recorded
            raise
        if code is not None:
            self._runs.remove(run)

    def _end(self, database: Connection, run: _Run, code: int) -> None:
        """Determines what the end of a process means for its job."""
        job = self._jobs.get(run.job.id)  # again, because a client may have asked for something in the meantime
        deaths = self._deaths.pop(job.id, 0)
        if code == 0:
            set_status(database, job.id, "succeeded", "The job has successfully completed")
        elif job.wanted == "cancel":
            set_status(database, job.id, "cancelled", "The job was cancelled")
        elif job.wanted == "pause" and code != 2:
            set_status(database, job.id, "paused", "The job was paused")
        elif code < 0 or code > 128:  # 128 + a signal: it saved its state, as when the whole machine shuts down
            deaths = 0 if run.last_step > run.began else deaths + 1
            self._restart(database, job, -code if code < 0 else code - 128, deaths)
        else:
            words = self._public(last_words(job.directory / "errors.log"))
            fail(database, job.id, "training_failed", words or f"the training process ended with code {code}")

    def _restart(self, database: Connection, job: Job, signal: int, deaths: int) -> None:
        """Requeues a job whose process was killed, unless that happens repeatedly without any progress."""
        if deaths < _MOST_DEATHS:
            self._deaths[job.id] = deaths
            set_status(database, job.id, "queued", f"The training process was killed (signal {signal}); restarting it")
            return
        words = (
            f"the training process was killed (signal {signal}) {deaths} times without making progress. It may have "
            "run out of memory: lower batch_size or seq_len, or set gradient_checkpointing; then create a new job."
        )
        fail(database, job.id, "training_killed", words)

    def _hand_over(self, job: Job) -> None:
        try:
            self._on_finished(job)
        except Exception as error:
            why = error if isinstance(error, LoraError) else f"{type(error).__name__}: {error}"
            with self._state.transaction() as database:
                words = self._public(f"The adapter is in {job.run}, but could not be loaded: {why}")
                add_event(database, job.id, words, "warn")


def _total_steps(run: Path) -> int | None:
    """Returns the total number of updates in a run, once it has begun."""
    settings, record = read_record(run)
    facts: Any = next((each for each in record.get("data", ()) if each.get("kind") == "training"), None)
    if facts is None:
        return None
    config = TrainConfig(**settings)
    return config.max_steps or config.num_epochs * updates_per_epoch(config, int(facts["examples"]))
