"""The OpenAPI schema is correct: schemathesis derives valid and invalid requests from it, for every route.

A right request may still be refused for what no schema says: two fields do not go together, a prompt is too long for
the model.  The code of such an error tells it from one that the schema had to rule out.

    LORALIB_SCHEMA_EXAMPLES=500 pytest tests/test_serve_schema.py

searches for long, with requests that are new in each run.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

schemathesis = pytest.importorskip("schemathesis")

from schemathesis.engine import events, from_schema  # noqa: E402
from serving import FakeProcess, Running, tiny_adapter, tiny_base, upload  # noqa: E402

from loralib.serve import supervisor  # noqa: E402
from loralib.serve.errors import RequestError  # noqa: E402
from loralib.serve.settings import ServeConfig  # noqa: E402

EXAMPLES = int(os.environ.get("LORALIB_SCHEMA_EXAMPLES", "0"))
DATA = b'{"prompt": "Number 1 is", "completion": "1 when squared"}\n' * 8
CONFIG = {
    "generation": {"max-examples": EXAMPLES or 2, "deterministic": not EXAMPLES, "database": "none"},
    # 422: an adapter that cannot be used; 400: see below.
    "checks": {"positive_data_acceptance": {"expected-statuses": ["2xx", 400, 403, 404, 409, 422, 429]}},
    "request-timeout": 60,
}


class Patient(FakeProcess):
    """A training process that continues until it is stopped."""

    def stop(self, kill_after: float | None = None) -> None:
        self.end(143)

    leave = stop


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    base = tiny_base(tmp_path / "base")
    for seed, name in enumerate(("calm", "bold", "spare")):
        tiny_adapter(base, tmp_path / "adapters" / name, seed)
    FakeProcess.made = []
    monkeypatch.setattr(supervisor, "TrainingProcess", Patient)
    places = {"model": str(base), "adapters": str(tmp_path / "adapters"), "state_dir": str(tmp_path / "state")}
    running = Running(ServeConfig(**places, dtype="fp32", max_tokens=20))
    yield running
    running.close()


class Existing:
    """Puts existing names into most requests; with random names, all would end with 404."""

    def __init__(self, running: Running) -> None:
        self._jobs = running.server.jobs
        self._count = 0

    def put_into(self, case: Any) -> None:
        """Replaces names in a request; invalid parts stay invalid."""
        self._count += 1
        if self._count % 5 == 0:
            return
        body = case.body if isinstance(case.body, dict) else {}
        model = "base" if "jobs" in case.path else "calm"
        file = self._file()
        named = {"model": model, "path": "spare", "training_file": file, "validation_file": file}
        in_path = {"model": "calm", "name": "bold", "file_id": file, "fine_tuning_job_id": self._job()}
        turns = [(turn, {"role": "user"}) for turn in body.get("messages") or () if isinstance(turn, dict)]
        for place, names in ((case.path_parameters, in_path), (body, named), *turns):
            place.update({name: value for name, value in names.items() if isinstance(place.get(name), str)})
        if case.meta is not None and case.meta.generation.mode.is_positive:
            self._reconcile(body)

    def _reconcile(self, body: dict[str, Any]) -> None:
        """Makes fields compatible in most requests, since the schema does not say which are."""
        if "top_logprobs" in body:
            body["logprobs"] = True
        if "stream_options" in body:
            body["stream"] = True
        if "loralib" in body:
            body.pop("seed", None)

    def _file(self) -> str:
        files = self._jobs.files.list()
        return files[0].id if files else upload(self._jobs.files, "a.jsonl", DATA).id

    def _job(self) -> str:
        jobs = self._jobs.list()
        for job in jobs[20:]:
            if job.status in ("validating_files", "queued", "running", "paused"):
                with contextlib.suppress(RequestError):  # it ended meanwhile
                    self._jobs.cancel(job.id)
        return jobs[0].id if jobs else self._jobs.create(self._file()).id


@schemathesis.check
def refused_by_no_rule_of_the_schema(context: Any, response: Any, case: Any) -> None:
    if case.meta is not None and case.meta.generation.mode.is_positive and response.status_code == 400:
        error = response.json()["error"]
        assert error["code"] not in ("invalid_request", "unknown_field", "invalid_json"), error


@pytest.mark.filterwarnings("ignore")  # of schemathesis: what it cannot make
def test_schemathesis_finds_nothing(running: Running) -> None:
    config = schemathesis.Config.from_dict(CONFIG)
    schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json", config=config)
    existing = Existing(running)
    found, statuses = [], {}

    def before_call(context: Any, case: Any, kwargs: Any) -> None:
        existing.put_into(case)

    schemathesis.hook(before_call)
    try:
        for event in from_schema(schema).execute():
            if isinstance(event, (events.NonFatalError, events.FatalError)):
                found.append(str(event))
            if not isinstance(event, events.ScenarioFinished):
                continue
            checks = [check for each in event.recorder.checks.values() for check in each]
            found += [
                f"{check.name}: {check.failure_info.failure}\n{check.failure_info.code_sample}"
                for check in checks
                if check.failure_info is not None
            ]
            for number, interaction in event.recorder.interactions.items():
                operation = event.recorder.cases[number].value.operation.label
                if interaction.response is not None:
                    statuses.setdefault(operation, set()).add(interaction.response.status_code)
    finally:
        schemathesis.hooks.unregister(before_call)
    assert not found, "\n\n".join(dict.fromkeys(found))
    told = {each.ok().label for each in schema.get_all_operations()}
    assert set(statuses) == told
    unreached = [each for each, seen in statuses.items() if not any(status < 300 or status == 409 for status in seen)]
    assert not unreached, "no request to these did what it asked for"
