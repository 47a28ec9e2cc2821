"""Routes for uploaded files and training jobs, in the format of OpenAI's API."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import closing, suppress
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, StreamingResponse
from pydantic import Field, WithJsonSchema
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from ..errors import did_you_mean
from ..settings import settings_schema
from ..training import TrainConfig
from ..training.run_directory import checkpoint_files
from .bodies import WHOLE, Body
from .jobs import Jobs
from .planner import NOT_SETTABLE
from .records import OVER, Event, Job, events_of, losses_at, progress_of
from .state import RequestError
from .uploads import FileStore, Upload, UploadedFile

__all__ = ["router"]

router = APIRouter()

Item = TypeVar("Item")
Auto = Literal["auto"]
Limit = Annotated[int, Query(ge=1, le=10000)]


def _jobs(request: Request) -> Jobs:
    jobs: Jobs = request.app.state.server.jobs
    return jobs


# --- files -----------------------------------------------------------------------------------------------------------

_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "additionalProperties": False,
                    "properties": {
                        "file": {"type": "string", "format": "binary", "minLength": 1},
                        "purpose": {"type": "string", "enum": ["fine-tune"]},
                    },
                }
            }
        },
    }
}
_MOST_FIELD = 1 << 10  # maximum size in bytes of a form field that is not a file


class _Form:
    """Parses a multipart form incrementally: the file is written to disk as it arrives."""

    def __init__(self, content_type: str, begin: Callable[[], Upload]) -> None:
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or b"boundary" not in options:
            raise RequestError("expected a form (multipart/form-data) with the fields file and purpose", param="file")
        self._begin = begin
        self.upload: Upload | None = None
        self.name, self.is_whole = "", False
        self.fields: dict[str, bytes] = {}
        self._field, self._header, self._value = "", b"", b""
        self._headers: dict[bytes, bytes] = {}
        self._parser = MultipartParser(
            options[b"boundary"],
            {
                "on_part_begin": self._headers.clear,
                "on_header_begin": self._next_header,
                "on_header_field": self._header_field,
                "on_header_value": self._header_value,
                "on_header_end": self._header_end,
                "on_headers_finished": self._part,
                "on_part_data": self._data,
                "on_end": self._end,
            },
        )

    def write(self, piece: bytes) -> None:
        """Processes the next part of the body."""
        try:
            self._parser.write(piece)
        except MultipartParseError as error:
            raise RequestError(f"the form cannot be read: {error}", param="file") from error

    def close(self) -> None:
        """Discards an upload that was not kept."""
        if self.upload is not None:
            self.upload.close()

    def finish(self, files: FileStore) -> UploadedFile:
        """Keeps the uploaded file.

        Raises:
            RequestError: a part is missing, or the body ended early.
        """
        if not self.is_whole:
            raise RequestError("the upload ended prematurely; nothing was kept", param="file")
        if self.upload is None:
            raise RequestError("the form has no file", param="file")
        if "purpose" not in self.fields:
            raise RequestError("the form has no purpose, expected 'fine-tune'", param="purpose")
        return files.finish(self.upload, self.name, self.fields["purpose"].decode("utf-8", "replace"))

    def _next_header(self) -> None:
        self._header = self._value = b""

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        self._headers[self._header.lower()] = self._value

    def _part(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._field = options.get(b"name", b"").decode("utf-8", "replace")
        if self._field not in ("file", "purpose"):
            raise RequestError(
                f"the form has an unknown field {self._field[:80]!r}.{did_you_mean(self._field, ('file', 'purpose'))} "
                "Expected file and purpose.",
                param=self._field[:80],
            )
        if self._field in self.fields or (self._field == "file" and self.upload is not None):
            raise RequestError(f"the form has {self._field} twice", param=self._field)
        if self._field == "file":
            self.name = options.get(b"filename", b"file").decode("utf-8", "replace")
            self.upload = self._begin()
        else:
            self.fields[self._field] = b""

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._field == "file" and self.upload is not None:
            self.upload.write(data[start:end])
            return
        self.fields[self._field] += data[start:end]
        if len(self.fields[self._field]) > _MOST_FIELD:
            raise RequestError(f"{self._field} is too long", param=self._field)

    def _end(self) -> None:
        self.is_whole = True


@router.post("/v1/files", openapi_extra=_FORM)
async def create_file(request: Request) -> dict[str, Any]:
    """Accepts a file of examples, and immediately reports how it is read."""
    files = _jobs(request).files
    most = int(request.app.state.server.config.max_upload_mb * 1e6)
    with closing(_Form(request.headers.get("content-type", ""), lambda: files.begin(most))) as form:
        with suppress(ClientDisconnect):  # the client is gone, and the upload incomplete
            async for piece in request.stream():
                await run_in_threadpool(form.write, piece)
        return _file(await run_in_threadpool(form.finish, files))


@router.get("/v1/files")
def list_files(
    request: Request,
    after: str | None = None,
    limit: Limit = 10000,
    order: Literal["asc", "desc"] = "desc",
    purpose: str | None = None,
) -> dict[str, Any]:
    """Lists uploaded files, newest first unless `order` is asc: at most `limit`, after the file with the id `after`."""
    files = [file for file in _jobs(request).files.list() if purpose in (None, file.purpose)]
    return _page(files[::-1] if order == "asc" else files, after, limit, lambda file: file.id, _file)


@router.get("/v1/files/{file_id}")
def get_file(request: Request, file_id: str) -> dict[str, Any]:
    """Returns an uploaded file's name, size and purpose, and how its examples are read."""
    return _file(_jobs(request).files.get(file_id))


@router.get(
    "/v1/files/{file_id}/content",
    response_class=FileResponse,
    responses={200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}},
)
def get_file_content(request: Request, file_id: str) -> FileResponse:
    """Returns the bytes of a file."""
    file = _jobs(request).files.get(file_id)
    return FileResponse(file.path, media_type="application/octet-stream", filename=file.name)


@router.delete("/v1/files/{file_id}")
def delete_file(request: Request, file_id: str) -> dict[str, Any]:
    """Removes a file that no unfinished job needs."""
    _jobs(request).files.delete(file_id)
    return {"id": file_id, "object": "file", "deleted": True}


# --- jobs ------------------------------------------------------------------------------------------------------------


class Hyperparameters(Body):
    """Settings under OpenAI's names; "auto" leaves them to the trainer."""

    n_epochs: Auto | Annotated[int, Field(ge=1, le=10000), WHOLE] = "auto"
    batch_size: Auto | Annotated[int, Field(ge=1, le=100000), WHOLE] = "auto"
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=1e6)] = "auto"


class Supervised(Body):
    """Training on completions."""

    hyperparameters: Hyperparameters = Hyperparameters()


class PreferenceHyperparameters(Hyperparameters):
    """Settings of direct preference optimisation under OpenAI's names."""

    beta: Auto | Annotated[float, Field(gt=0, le=2)] = "auto"


class Preferences(Body):
    """Training on pairs of a chosen and a rejected answer."""

    hyperparameters: PreferenceHyperparameters = PreferenceHyperparameters()


class Method(Body):
    """The training method, supervised or dpo (preferences), with its hyperparameters."""

    type: Literal["supervised", "dpo"] = "supervised"
    supervised: Supervised | None = None
    dpo: Preferences | None = None

    def chosen(self) -> Hyperparameters:
        """Returns the settings of the selected method.

        Raises:
            RequestError: settings of another method are given.
        """
        other = "dpo" if self.type == "supervised" else "supervised"
        if getattr(self, other) is not None:
            raise RequestError(
                f"method.type is {self.type!r}, but method.{other} is given; leave it out, or change the type",
                param="method",
            )
        if self.type == "dpo":
            return (self.dpo or Preferences()).hyperparameters
        return (self.supervised or Supervised()).hyperparameters


class JobRequest(Body):
    """A training job to queue: the base model, ids of uploaded files, and settings; `loralib` has our own ones."""

    model: str
    training_file: str
    validation_file: str | None = None
    suffix: Annotated[str, Field(max_length=64)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31), WHOLE] | None = None
    hyperparameters: Hyperparameters | None = None
    method: Method | None = None
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None = Field(
        None, max_length=16
    )
    integrations: Annotated[list[Any], Field(max_length=0)] | None = None
    loralib: Annotated[dict[str, Any], WithJsonSchema(settings_schema(TrainConfig, NOT_SETTABLE))] = Field(
        {}, description="settings of `loralib train`, such as rank"
    )


@router.post("/v1/fine_tuning/jobs")
def create_job(request: Request, body: JobRequest) -> dict[str, Any]:
    """Queues a training job on the base model."""
    jobs = _jobs(request)
    if body.model != jobs.name:
        raise RequestError(
            f"model is {body.model[:200]!r}, expected {jobs.name!r}: jobs can only train on the base model."
            + did_you_mean(body.model, [jobs.name]),
            404,
            "model_not_found",
            "model",
        )
    if body.hyperparameters is not None and body.method is not None:
        raise RequestError("hyperparameters and method are both given; give only one of them", param="hyperparameters")
    given = body.hyperparameters or (body.method or Method()).chosen()
    multiplier = given.learning_rate_multiplier
    job = jobs.create(
        body.training_file,
        _settings(given, body.seed, body.loralib),
        body.suffix or "",
        validation_file=body.validation_file,
        learning_rate_multiplier=None if multiplier == "auto" else multiplier,
        asked={"hyperparameters": given.model_dump(), "metadata": body.metadata},
    )
    return _job(jobs, job)


def _settings(given: Hyperparameters, seed: int | None, own: dict[str, Any]) -> dict[str, Any]:
    """Maps OpenAI's names to training settings."""
    values: dict[str, Any] = {"num_epochs": given.n_epochs, "batch_size": given.batch_size, "seed": seed}
    if isinstance(given, PreferenceHyperparameters):
        values |= {"objective": "dpo", "beta": given.beta}
    settings = {name: value for name, value in values.items() if value not in ("auto", None)}
    if both := sorted(settings.keys() & own.keys()):
        raise RequestError(f"given both as a hyperparameter and in loralib: {', '.join(both)}", param="loralib")
    return {**settings, **own}


@router.get("/v1/fine_tuning/jobs")
def list_jobs(request: Request, after: str | None = None, limit: Limit = 20) -> dict[str, Any]:
    """Lists training jobs, newest first: at most `limit` of them, after the job with the id `after`."""
    jobs = _jobs(request)
    return _page(jobs.list(), after, limit, lambda job: job.id, lambda job: _job(jobs, job))


@router.get("/v1/fine_tuning/jobs/{fine_tuning_job_id}")
def get_job(request: Request, fine_tuning_job_id: str) -> dict[str, Any]:
    """Returns a training job: its status, settings, progress and, once it has succeeded, its adapter's name."""
    jobs = _jobs(request)
    return _job(jobs, jobs.get(fine_tuning_job_id))


def _changes(change: Callable[[Jobs, str], Job]) -> Callable[[Request, str], dict[str, Any]]:
    def answer(request: Request, fine_tuning_job_id: str) -> dict[str, Any]:
        jobs = _jobs(request)
        return _job(jobs, change(jobs, fine_tuning_job_id))

    return answer


for _name, _change, _about in (
    ("cancel", Jobs.cancel, "Cancels a job for good."),
    ("pause", Jobs.pause, "Pauses a job: its process saves its state and stops."),
    ("resume", Jobs.resume, "Resumes a paused or failed job from where it was saved."),
):
    _address = f"/v1/fine_tuning/jobs/{{fine_tuning_job_id}}/{_name}"
    router.add_api_route(_address, _changes(_change), methods=["POST"], name=f"{_name}_job", description=_about)


@router.get(
    "/v1/fine_tuning/jobs/{fine_tuning_job_id}/events",
    response_model=None,
    responses={200: {"content": {"application/json": {}, "text/event-stream": {}}}},
)
def list_events(
    request: Request,
    fine_tuning_job_id: str,
    after: Annotated[str, Query(pattern="^ftevent-[0-9]{1,17}$")] | None = None,
    limit: Limit = 20,
    stream: bool = False,
) -> dict[str, Any] | StreamingResponse:
    """Lists the events of a job, newest first; with stream, from the first one until the job is over."""
    jobs = _jobs(request)
    number = 0 if after is None else int(after.removeprefix("ftevent-"))
    jobs.get(fine_tuning_job_id)  # reports errors before the stream begins
    if stream:
        return StreamingResponse(_stream(jobs, fine_tuning_job_id, number, request), media_type="text/event-stream")
    events = events_of(jobs.state, fine_tuning_job_id, number, limit + 1, newest_first=True)
    return _cut(events, limit, _event_id, _event)


async def _stream(jobs: Jobs, job_id: str, after: int, request: Request) -> AsyncIterator[str]:
    """Yields a job's events as server-sent events."""
    while not await request.is_disconnected():
        job = jobs.get(job_id)  # read before its events, so that none is missed at the end
        events = await run_in_threadpool(events_of, jobs.state, job_id, after, 1000)
        for event in events:
            after = event.number
            yield f"data: {json.dumps(_event(event))}\n\n"
        if not events:
            if job.status in (*OVER, "paused"):
                break
            await run_in_threadpool(jobs.wait, job_id, 1.0, after=after)
    yield "data: [DONE]\n\n"


@router.get("/v1/fine_tuning/jobs/{fine_tuning_job_id}/checkpoints")
def list_checkpoints(
    request: Request, fine_tuning_job_id: str, after: str | None = None, limit: Limit = 10
) -> dict[str, Any]:
    """Lists the training states of a job on disk, newest first."""
    jobs = _jobs(request)
    found = list(_checkpoints(jobs, jobs.get(fine_tuning_job_id)))
    return _page(found, after, limit, lambda each: str(each["id"]), dict)


# --- formats ---------------------------------------------------------------------------------------------------------


def _page(
    items: Sequence[Item],
    after: str | None,
    limit: int,
    name: Callable[[Item], str],
    shape: Callable[[Item], dict[str, Any]],
) -> dict[str, Any]:
    """Returns at most `limit` items after the given one."""
    names = [name(item) for item in items]
    if after is not None and after not in names:
        raise RequestError(f"after is {after[:80]!r}, which is not in the list", 404, "not_found", "after")
    start = 0 if after is None else names.index(after) + 1
    return _cut(items[start:], limit, name, shape)


def _cut(
    items: Sequence[Item], limit: int, name: Callable[[Item], str], shape: Callable[[Item], dict[str, Any]]
) -> dict[str, Any]:
    shown = items[:limit]
    return {
        "object": "list",
        "data": [shape(item) for item in shown],
        "first_id": name(shown[0]) if shown else None,
        "last_id": name(shown[-1]) if shown else None,
        "has_more": len(items) > limit,
    }


def _file(file: UploadedFile) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created,
        "expires_at": None,
        "filename": file.name,
        "purpose": file.purpose,
        "status": "error" if file.facts["error"] else "processed",
        "status_details": file.facts["error"],
        "loralib": file.facts,
    }


def _job(jobs: Jobs, job: Job) -> dict[str, Any]:
    progress = progress_of(jobs.state, job.id)
    left = progress.seconds_left if job.status == "running" else None
    method = "dpo" if job.settings.get("objective") == "dpo" else "supervised"
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": job.created,
        "error": job.error,
        "estimated_finish": None if left is None else int(time.time() + left),
        "fine_tuned_model": job.adapter_name if job.status == "succeeded" else None,
        "finished_at": job.finished,
        "hyperparameters": job.asked.get("hyperparameters", {}),
        "integrations": [],
        "metadata": job.asked.get("metadata"),
        "method": {"type": method, method: {"hyperparameters": job.asked.get("hyperparameters", {})}},
        "model": jobs.name,
        "organization_id": "local",
        "result_files": [],
        "seed": job.settings.get("seed", 0),
        "status": job.status,
        "trained_tokens": progress.trained_tokens if job.status in OVER else None,
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "loralib": {"settings": job.settings, "step": progress.step, "steps": progress.steps},
    }


def _event_id(event: Event) -> str:
    return f"ftevent-{event.number}"


def _event(event: Event) -> dict[str, Any]:
    return {
        "id": _event_id(event),
        "object": "fine_tuning.job.event",
        "created_at": event.created,
        "level": event.level,
        "message": event.message,
        "type": event.type,
        "data": event.data,
    }


def _checkpoints(jobs: Jobs, job: Job) -> Iterator[dict[str, Any]]:
    for path in reversed(checkpoint_files(job.run / "checkpoints")):
        with suppress(OSError, ValueError):  # it was removed in the meantime, or is not ours
            step = int(path.stem.partition("-")[2])
            yield {
                "id": f"ftckpt-{job.id.partition('-')[2]}-{step}",
                "object": "fine_tuning.job.checkpoint",
                "created_at": int(path.stat().st_mtime),
                "fine_tuned_model_checkpoint": f"{job.adapter_name}:ckpt-step-{step}",
                "fine_tuning_job_id": job.id,
                "metrics": {"step": step, **losses_at(jobs.state, job.id, step)},
                "step_number": step,
            }
