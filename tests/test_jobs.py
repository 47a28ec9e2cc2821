"""Uploaded files and training jobs of a server: with the official client, kills, full disks and invalid requests."""

from __future__ import annotations

import contextlib
import errno
import functools
import gzip
import json
import random
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loralib.bases import load_base
from loralib.cli import main
from loralib.errors import OutputError
from loralib.training.report import read_metrics

openai = pytest.importorskip("openai")
psutil = pytest.importorskip("psutil")
pytest.importorskip("python_multipart")

from fastapi import FastAPI  # noqa: E402
from fastapi.testclient import TestClient  # noqa: E402
from serving import FakeProcess, upload  # noqa: E402

from loralib.serve import supervisor as supervisor_module  # noqa: E402
from loralib.serve import tuning, uploads  # noqa: E402
from loralib.serve.app import create_app  # noqa: E402
from loralib.serve.errors import install  # noqa: E402
from loralib.serve.jobs import Jobs  # noqa: E402
from loralib.serve.planner import Planner  # noqa: E402
from loralib.serve.process import LogTail, MetricsTail, last_words  # noqa: E402
from loralib.serve.records import Job, events_of, progress_of  # noqa: E402
from loralib.serve.server import start  # noqa: E402
from loralib.serve.settings import ServeConfig  # noqa: E402
from loralib.serve.state import RequestError, State  # noqa: E402
from loralib.serve.supervisor import Supervisor  # noqa: E402

MODEL = "scratch-32x1-seed0"
ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = "".join(f'{{"prompt": "Number {n} is", "completion": "{n * n} when squared"}}\n' for n in range(40)).encode()
QUICK = {"rank": 2, "lr": 1e-2, "batch_size": 4, "num_epochs": 2, "dtype": "fp32", "valid_fraction": 0.2}
PATIENCE = 120.0


def client_of(app: FastAPI) -> Any:
    """OpenAI's client, connected to an application."""
    return openai.OpenAI(
        api_key="none",
        base_url="http://127.0.0.1/v1",
        http_client=TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False),
        max_retries=0,
    )


def app_of(jobs: Jobs, **settings: Any) -> FastAPI:
    """An application with only the routes for files and jobs."""
    app = FastAPI()
    install(app)
    app.include_router(tuning.router)
    app.state.server = SimpleNamespace(jobs=jobs, config=ServeConfig(**settings))
    return app


load_once = functools.cache(load_base)


def supervise(
    state_dir: Path, on_finished: Any = lambda job: None, max_jobs: int = 1, base: Any = None, quantize: str = "none"
) -> tuple[Jobs, Supervisor]:
    """The jobs of a server, without the rest of it."""
    state = State(state_dir)
    base = base or load_once(MODEL, dtype="fp32")
    jobs = Jobs(state, Planner(state, MODEL, base, chat_template=None, quantize=quantize), MODEL, max_jobs)
    return jobs, Supervisor(jobs, on_finished)


@contextlib.contextmanager
def supervised(state_dir: Path, *how: Any, finish_within: float = 30.0, **else_how: Any) -> Iterator[Jobs]:
    jobs, supervisor = supervise(state_dir, *how, **else_how)
    try:
        yield jobs
    finally:
        supervisor.close(finish_within)


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    with supervised(tmp_path / "state") as each:
        yield each


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[FakeProcess]:
    FakeProcess.made = []
    monkeypatch.setattr(supervisor_module, "TrainingProcess", FakeProcess)
    return FakeProcess.made


def eventually(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def steps(jobs: Jobs, job: str) -> list[int]:
    """The updates that a job has told of."""
    return [event.data["step"] for event in events_of(jobs.state, job) if "train_loss" in event.data]


# A whole job.


def test_a_client_uploads_trains_and_asks_the_adapter(tmp_path: Path) -> None:
    settings = ServeConfig(model=MODEL, dtype="fp32", state_dir=str(tmp_path / "state"))
    with contextlib.closing(start(settings)) as server:
        client = client_of(create_app(server))
        file = client.files.create(file=("numbers.jsonl", EXAMPLES), purpose="fine-tune")
        assert (file.bytes, file.status, file.loralib["format"], file.loralib["examples"]) == (
            len(EXAMPLES), "processed", "jsonl", 40,
        )  # fmt: skip
        before = server.jobs.planner.preview(file.id, {"rank": 2, "num_epochs": 2, "batch_size": 4})
        assert (before.given, before.used, before.steps, before.measured) == (40, 40, 20, False)
        assert before.memory > 4 * 1_650_000
        assert before.seconds > 0
        first = before.examples[0]
        assert first.source == "numbers.jsonl:1"
        assert "".join(text for text, trained in first.pieces if not trained) == "Number 0 is"
        assert "".join(text for text, trained in first.pieces if trained).startswith("0 when squared")

        job = client.fine_tuning.jobs.create(
            model=MODEL,
            training_file=file.id,
            validation_file=file.id,
            suffix="squares",
            seed=3,
            method={
                "type": "supervised",
                "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 0.5}},
            },
            metadata={"purpose": "a test"},
            extra_body={"loralib": {"rank": 2, "dtype": "fp32"}},
        )
        assert job.status == "validating_files"
        with pytest.raises(openai.ConflictError, match=f"in use by {job.id}"):
            client.files.delete(file.id)
        assert server.jobs.wait(job.id, PATIENCE).status == "succeeded"
        job = client.fine_tuning.jobs.retrieve(job.id)
        name = f"ft:{MODEL}:squares:{job.id.partition('-')[2][:8]}"
        assert (job.status, job.fine_tuned_model, job.seed, job.metadata) == (
            "succeeded",
            name,
            3,
            {"purpose": "a test"},
        )
        assert job.loralib["settings"]["lr"] == 0.5 * before.config.peak_lr
        assert job.method.supervised.hyperparameters.learning_rate_multiplier == 0.5
        assert job.trained_tokens
        assert job.estimated_finish is None

        events = list(client.fine_tuning.jobs.list_events(job.id, limit=9))  # page by page, the newest first
        assert [events[0].message, events[-1].message] == [
            "The job has successfully completed",
            f"Created fine-tuning job {job.id}",
        ]
        assert len({event.id for event in events}) == len(events) > 30
        steps = [event.data["step"] for event in events if event.type == "metrics" and "train_loss" in event.data]
        assert steps == list(range(20, 0, -1))
        assert [e.data["step"] for e in reversed(events) if "valid_loss" in (e.data or {})] == [0, 10, 20]
        assert not any(str(tmp_path) in event.message for event in events)
        assert [each.id for each in client.fine_tuning.jobs.list()] == [job.id]
        with client.fine_tuning.jobs.with_streaming_response.list_events(job.id, extra_query={"stream": True}) as lines:
            streamed = [line.removeprefix("data: ") for line in lines.iter_lines() if line]
        assert streamed.pop() == "[DONE]"
        assert [json.loads(line)["id"] for line in streamed] == [event.id for event in reversed(events)]

        assert (job.loralib["step"], job.loralib["steps"]) == (20, 20)
        losses = [e.data["valid_loss"] for e in reversed(events) if "valid_loss" in (e.data or {})]
        assert losses[0] > losses[-1]
        assert server.jobs.planner.preview(file.id).measured
        assert {model.id for model in client.models.list()} == {MODEL, name}
        answers = {
            model: client.completions.create(model=model, prompt="Number 4 is", max_tokens=3, temperature=0)
            for model in (MODEL, name)
        }
        assert answers[MODEL].choices[0].text != answers[name].choices[0].text
        assert client.files.delete(file.id).deleted

    with contextlib.closing(start(settings)) as server:
        assert server.bank.names == (name,), "an adapter that was trained is there again"


SERVER = """
import os, sys
from loralib.serve import process
from loralib.serve.server import start
from loralib.serve.settings import ServeConfig
process.loralib_command = lambda *words: ([*sys.argv[3:], *words], dict(os.environ))
jobs = start(ServeConfig(model=sys.argv[2], dtype="fp32", state_dir=sys.argv[1])).jobs
jobs.wait(jobs.list()[0].id)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_job_whose_server_is_killed_and_that_is_paused_ends_with_the_same_bytes(
    warm_command: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its three processes begin at once; above, a job is one that loralib_command starts."""
    monkeypatch.setattr("loralib.serve.process.loralib_command", warm_command)
    state = tmp_path / "state"
    settings = {**QUICK, "num_epochs": 8, "save_steps": 3, "eval_steps": 5, "lora_dropout": 0.1}
    with supervised(state, finish_within=0) as jobs:
        job = jobs.create(upload(jobs.files, "numbers.jsonl", EXAMPLES).id, settings).id
    run = state / "jobs" / job / "run"

    command, _ = warm_command()
    with subprocess.Popen([sys.executable, "-c", SERVER, str(state), MODEL, *command], cwd=ROOT) as server:
        metrics = run / "metrics.jsonl"
        eventually(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") > 4)
        server.kill()  # its job saves itself and ends
    with supervised(state) as jobs:
        before = progress_of(jobs.state, job).step
        eventually(lambda: progress_of(jobs.state, job).step > before + 8)
        jobs.pause(job)
        assert jobs.wait(job, PATIENCE).status == "paused"
        checkpoint = client_of(app_of(jobs)).fine_tuning.jobs.checkpoints.list(job).data[0]
        assert checkpoint.step_number == progress_of(jobs.state, job).step == checkpoint.metrics.step
        assert checkpoint.metrics.train_loss > 0
        jobs.resume(job)
        assert jobs.wait(job, PATIENCE).status == "succeeded"
        events = events_of(jobs.state, job)
        data = [(kind, event.data) for event in events for kind in ("train", "valid") if f"{kind}_loss" in event.data]
        told = [(kind, each["step"], each[f"{kind}_loss"]) for kind, each in data]
        assert any(f"Resuming from step-{checkpoint.step_number:08}" in event.message for event in events)

    whole = tmp_path / "whole"
    assert main(["train", "--config", str(state / "jobs" / job / "job.toml"), "--output_dir", str(whole)]) == 0
    files = ("adapter_model.safetensors", "best/adapter_model.safetensors", "adapter_config.json", "pytorch_model.bin")
    for name in files:
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    ours, theirs = (
        [(event["event"], event["step"], event["loss"]) for event in read_metrics(path / "metrics.jsonl")]
        for path in (run, whole)
    )
    assert ours == theirs
    assert sorted(told) == sorted(theirs), "no event is lost, and none told twice"


# The watch over processes.


def test_a_process_that_is_killed_is_started_again_while_it_gets_further(
    jobs: Jobs, processes: list[FakeProcess]
) -> None:
    job = jobs.create(upload(jobs.files, "a.jsonl", EXAMPLES).id, QUICK)
    for number in range(5):
        eventually(lambda number=number: len(processes) == number + 1)
        processes[-1].train(number + 1)
        processes[-1].end(-9)
    for number in range(5, 8):
        eventually(lambda number=number: len(processes) == number + 1)
        processes[-1].end(137)
    assert jobs.wait(job.id, PATIENCE).status == "failed"
    assert "killed (signal 9) 3 times without making progress" in jobs.get(job.id).error["message"]  # type: ignore[index]
    assert steps(jobs, job.id) == [1, 2, 3, 4, 5]
    jobs.resume(job.id)  # once there is more memory
    eventually(lambda: len(processes) == 9)
    processes[-1].end(0)
    assert jobs.wait(job.id, PATIENCE).status == "succeeded"


def test_a_job_fails_with_the_trainer_s_words(
    tmp_path: Path, jobs: Jobs, processes: list[FakeProcess], capfd: pytest.CaptureFixture[str]
) -> None:
    job = jobs.create(upload(jobs.files, "a.jsonl", EXAMPLES).id, {**QUICK, "valid_fraction": 0, "early_stopping": 3})
    eventually(lambda: processes)
    code = main(["train", "--config", str(job.directory / "job.toml")])
    processes[0].end(code, capfd.readouterr().err)
    assert jobs.wait(job.id, PATIENCE).status == "failed"
    error = jobs.get(job.id).error
    assert error is not None
    assert error["code"] == "training_failed"
    assert error["message"].startswith("early_stopping is 3, but there is no validation data")
    assert events_of(jobs.state, job.id)[-1].level == "error"


def test_a_job_trains_on_the_base_as_it_is_served_unless_it_says_otherwise(
    tmp_path: Path, processes: list[FakeProcess]
) -> None:
    with supervised(tmp_path, quantize="nf4") as jobs:
        file = upload(jobs.files, "a.jsonl", EXAMPLES).id
        choices = (({}, "nf4"), ({"quantize": "int8"}, "int8"), ({"quantize": "none"}, "none"))
        for number, (given, expected) in enumerate(choices):
            job = jobs.create(file, {**QUICK, **given})
            eventually(lambda number=number: len(processes) > number)
            assert f'quantize = "{expected}"' in (job.directory / "job.toml").read_text(encoding="utf-8")
            processes[-1].end(0)
            jobs.wait(job.id, PATIENCE)
    # A server that holds its base in other bits goes on with a job as it began.
    with supervised(tmp_path, quantize="int8") as jobs:
        assert [job.settings.get("quantize") for job in jobs.list()] == ["none", "int8", "nf4"]


def test_jobs_run_in_order_and_at_most_so_many_at_once(tmp_path: Path, processes: list[FakeProcess]) -> None:
    finished: list[str] = []
    with supervised(tmp_path, lambda job: finished.append(job.id), max_jobs=2) as jobs:
        file = upload(jobs.files, "a.jsonl", EXAMPLES).id
        made = [jobs.create(file, QUICK).id for _ in range(4)]
        for number in range(4):
            eventually(lambda number=number: len(processes) == min(4, number + 2))
            eventually(lambda: jobs.get(made[-1]).status != "validating_files")
            assert sum(jobs.get(job).status == "running" for job in made) == min(2, 4 - number)
            processes[number].end(0)
            jobs.wait(made[number], PATIENCE)
        assert [process.directory.name for process in processes] == finished == made


def test_a_server_that_shuts_down_lets_its_jobs_save_and_the_next_one_goes_on(
    tmp_path: Path, processes: list[FakeProcess]
) -> None:
    jobs, supervisor = supervise(tmp_path)
    job = jobs.create(upload(jobs.files, "a.jsonl", EXAMPLES).id, QUICK)
    eventually(lambda: processes)
    closing = threading.Thread(target=supervisor.close)
    closing.start()
    assert processes[0].is_asked.wait(PATIENCE)
    processes[0].train(1, 2)
    processes[0].end(143)
    closing.join(PATIENCE)
    with supervised(tmp_path) as jobs:
        eventually(lambda: len(processes) == 2)
        assert steps(jobs, job.id) == [1, 2]
        assert progress_of(jobs.state, job.id).seconds_left is None, "how many updates there are is not known yet"
        jobs.cancel(job.id)
        assert processes[1].is_asked.wait(PATIENCE)
        processes[1].end(143)
        assert jobs.wait(job.id, PATIENCE).status == "cancelled"


@pytest.mark.parametrize(("wanted", "becomes"), [("pause", "paused"), ("cancel", "cancelled")])
def test_what_was_asked_for_before_a_crash_is_done_after_it(
    tmp_path: Path, processes: list[FakeProcess], wanted: str, becomes: str
) -> None:
    with supervised(tmp_path, finish_within=0) as jobs:
        job = jobs.create(upload(jobs.files, "a.jsonl", EXAMPLES).id, QUICK)
        eventually(lambda: processes)
        getattr(jobs, wanted)(job.id)
    with supervised(tmp_path) as jobs:
        assert jobs.get(job.id).status == becomes
        assert len(processes) == 1


def test_an_adapter_that_cannot_be_loaded_is_said_and_kept(tmp_path: Path, processes: list[FakeProcess]) -> None:
    def refuse(job: Job) -> None:
        raise ValueError(f"{job.run} changes nothing")

    with supervised(tmp_path, refuse) as jobs:
        job = jobs.create(upload(jobs.files, "a.jsonl", EXAMPLES).id, QUICK)
        eventually(lambda: processes)
        processes[0].end(0)
        assert jobs.wait(job.id, PATIENCE).status == "succeeded"
        warnings = [event.message for event in events_of(jobs.state, job.id) if event.level == "warn"]
        assert warnings == [
            f"The adapter is in {job.id}/run, but could not be loaded: ValueError: {job.id}/run changes nothing"
        ]


# Tails.


def test_a_tail_neither_loses_nor_doubles_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail, seen = MetricsTail(path), dict[int, float]()
    lines = [json.dumps({"step": step, "loss": 1 / (step + 1)}).encode() + b"\n" for step in range(60)]
    rng = random.Random(0)
    content = b""
    while len(content) < sum(map(len, lines)):
        if rng.random() < 0.2 and content:  # the run resumes: cut to whole lines, then written again
            content = b"".join(lines[: rng.randrange(content.count(b"\n") + 1)])
        whole = b"".join(lines)
        content = whole[: len(content) + rng.randrange(200)]
        path.write_bytes(content)
        seen |= {event["step"]: event["loss"] for event in tail.events()}
        assert sorted(seen) == list(range(len(seen)))
        assert len(seen) >= content.count(b"\n")
    assert len(seen) == 60

    log = LogTail(path)
    path.write_bytes(b"one\ntwo\n thr")
    assert list(log.lines()) == [(0, "one"), (4, "two")]
    path.write_bytes("one\ntwo\n three ü\n".encode())
    assert list(log.lines()) == [(8, "three ü")]
    assert list(LogTail(tmp_path / "none").lines()) == []


def test_the_last_words_are_the_error_and_not_what_libraries_print(tmp_path: Path) -> None:
    log = tmp_path / "errors.log"
    log.write_text("some library: a warning\nloralib train: it is\n  so\nand so\n", encoding="utf-8")
    assert last_words(log) == "it is\n  so\nand so"
    log.write_text('Traceback (most recent call last):\n  File "/x.py"\nValueError: no\n', encoding="utf-8")
    assert last_words(log) == "ValueError: no"
    assert last_words(tmp_path / "none") == ""


# Files.


def test_an_upload_says_at_once_how_it_is_read(jobs: Jobs) -> None:
    client = client_of(app_of(jobs))

    def sent(name: str, content: bytes) -> Any:
        return client.files.create(file=(name, content), purpose="fine-tune")

    good = sent("../../../etc/a\\b\u200b.csv", b"prompt,completion\nHi,there\n")
    assert (good.filename, good.loralib["format"], good.loralib["examples"]) == ("b.csv", "csv", 1)
    bad = sent("bad.jsonl", b'{"prompt": "a", "completion": "b"}\n{"prompt": 3}\n')
    assert (bad.status, bad.loralib["examples"]) == ("error", None)
    assert "bad.jsonl:2" in bad.status_details
    assert "state" not in bad.status_details
    assert client.files.content(good.id).read() == b"prompt,completion\nHi,there\n"
    assert [file.id for file in client.files.list(limit=1)] == [bad.id, good.id], "the client asks page by page"
    assert [file.id for file in client.files.list(order="asc")] == [good.id, bad.id]
    assert client.files.retrieve(good.id) == good
    assert client.files.delete(bad.id).deleted
    packed = sent("many.jsonl.gz", gzip.compress(b" " * (65 << 20)))
    assert packed.loralib["notes"] == ["many.jsonl.gz: larger than 67 MB, so it is read only when a job runs"]
    client.files.delete(packed.id)
    with pytest.raises(openai.NotFoundError, match="there is no file"):
        client.files.retrieve(bad.id)
    stored = [path.name for path in (jobs.files.get(good.id).path.parent).iterdir()]
    assert stored == [f"{good.id}.csv"], "a client's name is no path"


@pytest.mark.parametrize(
    "name", ["../state.sqlite", "..%2fstate.sqlite", "file-" + "a" * 24, "file-" + "/" * 24, "x" * 999]
)
def test_an_id_is_no_path(jobs: Jobs, name: str) -> None:
    client = TestClient(app_of(jobs))
    for path in (f"/v1/files/{name}", f"/v1/files/{name}/content", f"/v1/fine_tuning/jobs/{name}"):
        assert client.get(path).status_code == 404
    with pytest.raises(RequestError, match="there is no file"):
        jobs.files.get(name)
    with pytest.raises(RequestError, match="there is no fine-tuning job"):
        jobs.get(name)


JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "multipart/form-data; boundary=x"}


def part(name: str, content: str, file: str = "") -> str:
    filename = f'; filename="{file}"' if file else ""
    return f'--x\r\nContent-Disposition: form-data; name="{name}"{filename}\r\n\r\n{content}\r\n'


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (part("file", "{}", "a") + "--x--\r\n", 400, "no purpose"),
        (part("purpose", "fine-tune") + "--x--\r\n", 400, "no file"),
        (part("purpose", "fine-tune") + part("file", "", "a") + "--x--\r\n", 400, "the file is empty"),
        (part("purpose", "fine-tune") + part("file", "{}", "a"), 400, "ended prematurely"),
        (part("purpose", "assistants") + part("file", "{}", "a") + "--x--\r\n", 400, "expected 'fine-tune'"),
        (part("purpose", "fine-tune") + part("flie", "{}") + "--x--\r\n", 400, "Did you mean 'file'?"),
        (part("file", "{}", "a") + part("file", "{}", "a") + "--x--\r\n", 400, "file twice"),
        (part("purpose", "f" * 5000) + "--x--\r\n", 400, "too long"),
        (part("purpose", "fine-tune") + part("file", "y" * 20_000, "a") + "--x--\r\n", 413, "larger than the 0.0 MB"),
        ("nonsense", 400, "cannot be read"),
        ("", 400, "ended prematurely"),
    ],
)
def test_an_upload_that_is_wrong_leaves_nothing(tmp_path: Path, jobs: Jobs, body: str, status: int, words: str) -> None:
    answer = TestClient(app_of(jobs, max_upload_mb=0.01)).post("/v1/files", content=body, headers=FORM)
    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"]["message"]
    assert not list((tmp_path / "state" / "files").iterdir())


def test_an_upload_whose_client_goes_away_leaves_nothing(tmp_path: Path) -> None:
    def pieces() -> Iterator[bytes]:
        yield part("purpose", "fine-tune").encode() + part("file", "y" * 5000, "a").encode()
        raise ConnectionResetError

    with supervised(tmp_path / "state") as jobs, pytest.raises(ConnectionResetError):
        TestClient(app_of(jobs)).post("/v1/files", content=pieces(), headers=FORM)
    assert not list((tmp_path / "state" / "files").iterdir())
    left = [tmp_path / "state" / "files" / name for name in (f".upload-{'a' * 24}.tmp", f"file-{'b' * 24}.csv", "mine")]
    for path in left:
        path.write_bytes(b"what a kill left, and what is somebody's")
    with supervised(tmp_path / "state"):
        pass
    assert [path.exists() for path in left] == [False, False, True]


def test_a_full_disk_refuses_and_the_server_goes_on(
    tmp_path: Path, jobs: Jobs, processes: list[FakeProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = client_of(app_of(jobs))
    file = client.files.create(file=("a.jsonl", EXAMPLES), purpose="fine-tune")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(uploads.os, "fsync", full)
        with pytest.raises(openai.InternalServerError, match="disk is full") as refused:
            client.files.create(file=("b.jsonl", EXAMPLES), purpose="fine-tune")
    assert (refused.value.status_code, refused.value.code) == (507, "disk_full")
    assert len(list((tmp_path / "state" / "files").iterdir())) == 1

    database = jobs.state._connection
    (pages,) = database.execute("PRAGMA page_count").fetchone()
    database.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(openai.InternalServerError, match="disk is full"):
        client.fine_tuning.jobs.create(
            model=MODEL, training_file=file.id, metadata={str(n): "x" * 512 for n in range(16)}
        )
    assert not list(client.fine_tuning.jobs.list())
    database.execute("PRAGMA max_page_count = 1000000")
    assert client.fine_tuning.jobs.create(model=MODEL, training_file=file.id).status == "validating_files"
    eventually(lambda: processes)
    processes[0].end(0)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if sys.platform != "linux" or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_disk_that_fills_up_loses_nothing_that_was_said_to_be_kept(
    small_disk: Path, processes: list[FakeProcess]
) -> None:
    with supervised(small_disk / "state") as jobs:
        client = client_of(app_of(jobs))
        with pytest.raises(openai.InternalServerError, match="disk is full") as refused:
            client.files.create(file=("large.jsonl", EXAMPLES * 2000), purpose="fine-tune")
        assert (refused.value.status_code, refused.value.code) == (507, "disk_full")
        job = jobs.create(client.files.create(file=("a.jsonl", EXAMPLES), purpose="fine-tune").id, QUICK)
        eventually(lambda: processes)
        processes[0].train(1, 2)
        eventually(lambda: progress_of(jobs.state, job.id).step == 2)
        filler = small_disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(b"x" * 4096):
                pass
        with pytest.raises(OSError, match="No space"):
            processes[0].train(*range(3, 200))
        words = "loralib train: cannot write: the disk is full"
        with contextlib.suppress(OSError):
            processes[0].end(2, words)
        processes[0].code = 2
        assert client.fine_tuning.jobs.retrieve(job.id).id == job.id, "the server goes on"
        with pytest.raises(openai.InternalServerError, match="disk is full"):
            client.files.create(file=("b.jsonl", EXAMPLES * 20), purpose="fine-tune")
        filler.unlink()
        assert jobs.wait(job.id, PATIENCE).status == "failed"
        jobs.resume(job.id)
        eventually(lambda: len(processes) == 2)
        metrics = job.directory / "run" / "metrics.jsonl"
        kept = metrics.read_bytes().rpartition(b"\n")[0] + b"\n"  # as a run that resumes does
        metrics.write_bytes(kept)
        processes[1].train(*range(kept.count(b"\n") + 1, 201))
        processes[1].end(0)
        assert jobs.wait(job.id, PATIENCE).status == "succeeded"
        assert steps(jobs, job.id) == list(range(1, 201))


# Jobs that cannot be.


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"model": "scratch-32x1-seed1"}, 404, f"Did you mean '{MODEL}'?"),
        ({"training_file": "file-nothing"}, 404, "there is no file 'file-nothing'"),
        ({"validation_file": "../x"}, 404, "there is no file"),
        ({"suffix": "a/../b"}, 400, "suffix is 'a/../b'"),
        ({"traning_file": "x"}, 400, "traning_file"),
        ({"hyperparameters": {"n_epoch": 3}}, 400, "n_epoch"),
        ({"hyperparameters": {"n_epochs": 0}}, 400, "n_epochs"),
        ({"hyperparameters": {}, "method": {"type": "supervised"}}, 400, "give only one of them"),
        ({"hyperparameters": {"learning_rate_multiplier": 2}, "loralib": {"lr": 1e-3}}, 400, "lr is given as well"),
        ({"hyperparameters": {"n_epochs": 3}, "loralib": {"num_epochs": 3}}, 400, "given both"),
        ({"method": {"type": "reinforcement"}}, 400, "method.type"),
        ({"method": {"type": "dpo", "supervised": {}}}, 400, "method.supervised is given"),
        ({"method": {"type": "dpo"}, "loralib": {"objective": "orpo"}}, 400, "given both"),
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0}}}}, 400, "beta"),
        ({"loralib": {"objective": "dpo", "label_smoothing": 0.6}}, 400, "less than 0.5 with dpo"),
        ({"integrations": [{"type": "wandb"}]}, 400, "integrations"),
        ({"loralib": {"output_dir": "/etc", "train_data": "/etc/passwd"}}, 400, "output_dir is set by the server"),
        ({"loralib": {"from_adapter": "/etc"}}, 400, "from_adapter is set by the server"),
        ({"loralib": {"task": "classify"}}, 400, "loralib train --task classify"),
        ({"loralib": {"rnak": 8}}, 400, "Did you mean 'rank'?"),
        ({"loralib": {"rank": -1, "lora_dropout": 2}}, 400, "lora_dropout is 2"),
        ({"loralib": {"lora_dim": 1, "rank": 2}}, 400, "are two names for the same setting"),
        ({"loralib": {"columns": {"prompt": "\ud800"}}}, 400, "half of a surrogate pair"),
    ],
)  # fmt: skip
def test_a_job_that_cannot_be_is_refused(jobs: Jobs, changes: dict[str, Any], status: int, words: str) -> None:
    file = upload(jobs.files, "a.jsonl", EXAMPLES).id
    body = {"model": MODEL, "training_file": file, **changes}
    answer = TestClient(app_of(jobs)).post("/v1/fine_tuning/jobs", content=json.dumps(body), headers=JSON)
    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"]["message"]
    assert not jobs.list()


def test_a_job_learns_from_preferences_as_openai_s_do(tmp_path: Path, processes: list[FakeProcess]) -> None:
    row = {
        "input": {
            "messages": [{"role": "user", "content": "How many legs?"}],
            "tools": [],
            "parallel_tool_calls": True,
        },
        "preferred_output": [{"role": "assistant", "content": "Eight."}],
        "non_preferred_output": [{"role": "assistant", "content": "It depends."}],
    }
    base = load_base(MODEL, dtype="fp32")
    base[1].chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with supervised(tmp_path, base=base) as jobs:
        client = client_of(app_of(jobs))
        file = client.files.create(file=("a.jsonl", json.dumps(row).encode()), purpose="fine-tune")
        assert file.loralib["notes"] == [
            "a.jsonl: preferences (input, preferred_output, non_preferred_output), 1 example"
        ]
        assert file.loralib["preferences"], "the page then proposes DPO"
        method = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": 2}}}
        job = client.fine_tuning.jobs.create(model=MODEL, training_file=file.id, method=method)  # type: ignore[arg-type]
        assert job.method.type == "dpo"
        assert job.method.dpo.hyperparameters.beta == 0.2
        eventually(lambda: processes or jobs.get(job.id).error)
        assert jobs.get(job.id).error is None
        written = (jobs.get(job.id).directory / "job.toml").read_text(encoding="utf-8")
        assert 'objective = "dpo"\nbeta = 0.2\n' in written
        processes[0].end(0)
        for content, wrong in ((EXAMPLES, method), (json.dumps(row).encode(), {"type": "supervised"})):
            other = client.files.create(file=("b.jsonl", content), purpose="fine-tune")
            assert other.status == "processed"
            refused = client.fine_tuning.jobs.create(model=MODEL, training_file=other.id, method=wrong)  # type: ignore[arg-type]
            assert jobs.wait(refused.id, PATIENCE).status == "failed"
            error = jobs.get(refused.id).error
            assert error is not None
            assert "b.jsonl:1: found" in error["message"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"prompt": "a", "completion": "b"}\n{"promt": "a"}\n', "a.jsonl:2"),
        ("a.txt", b"no separator\n", "a.txt:1"),
        ("a.parquet", b"no parquet", "a.parquet is not a Parquet file"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
            "template",
        ),
        ("a.jsonl", b'{"prompt": "a", "completion": " "}', "no example of a.jsonl is left"),
    ],
)
def test_data_that_are_wrong_fail_with_the_reader_s_message(
    tmp_path: Path, processes: list[FakeProcess], name: str, content: bytes, words: str
) -> None:
    base = load_base(MODEL, dtype="fp32")
    base[1].chat_template = None
    with supervised(tmp_path, base=base) as jobs:
        job = jobs.create(upload(jobs.files, name, content).id, QUICK)
        assert jobs.wait(job.id, PATIENCE).status == "failed"
        error = jobs.get(job.id).error
        assert error is not None
        assert words in error["message"]
        assert (error["code"], error["param"]) == ("invalid_job", "training_file")
        assert str(tmp_path) not in error["message"]
        assert not processes


def test_a_job_is_asked_only_for_what_it_can_still_do(jobs: Jobs, processes: list[FakeProcess]) -> None:
    client = client_of(app_of(jobs))
    job = jobs.create(upload(jobs.files, "a.jsonl", EXAMPLES).id, QUICK).id
    eventually(lambda: processes)
    with pytest.raises(openai.ConflictError, match="is running, so it cannot be resumed"):
        client.fine_tuning.jobs.resume(job)
    assert client.fine_tuning.jobs.pause(job).status == "running", "until it has saved itself"
    processes[0].end(143)
    assert jobs.wait(job, PATIENCE).status == "paused"
    assert client.fine_tuning.jobs.cancel(job).status == "cancelled"
    for action in ("cancel", "pause", "resume"):
        with pytest.raises(openai.ConflictError, match="is cancelled"):
            getattr(client.fine_tuning.jobs, action)(job)
    assert client.fine_tuning.jobs.checkpoints.list(job).data == []
    for query in ("after=ftevent-x", "limit=0", "limit=x", "after=-1"):
        assert TestClient(app_of(jobs)).get(f"/v1/fine_tuning/jobs/{job}/events?{query}").status_code == 400


# The directory.


def test_a_directory_has_one_server_and_a_database_of_ours(tmp_path: Path) -> None:
    with contextlib.closing(State(tmp_path / "one")), pytest.raises(OutputError, match="in use by another run"):
        State(tmp_path / "one")
    State(tmp_path / "one").close()
    with contextlib.closing(sqlite3.connect(tmp_path / "one" / "state.sqlite")) as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(OutputError, match="written by a newer loralib"):
        State(tmp_path / "one")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "state.sqlite").write_bytes(b"something else " * 100)
    with pytest.raises(OutputError, match="cannot be used: file is not a database"):
        State(tmp_path / "two")


def test_a_transaction_that_fails_changes_nothing(tmp_path: Path) -> None:
    with contextlib.closing(State(tmp_path)) as state:
        insert = "INSERT INTO events (job, key, created, level, type, message, data) VALUES ('j', ?, 0, '', '', '', '')"

        def add(*keys: str) -> None:
            with state.transaction() as database:
                for key in keys:
                    database.execute(insert, (key.strip("!"),))
                    if key.endswith("!"):
                        raise KeyError

        with pytest.raises(KeyError):
            add("a", "b!")
        with pytest.raises(OutputError, match="UNIQUE"):
            add("a", "a")
        assert state.rows("SELECT * FROM events") == []
