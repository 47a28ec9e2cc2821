"""The settings of a job's run: made from what a client asks for, checked on the data, written for the process."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ..errors import ConfigError, LoraError, list_faults
from ..files import write_errors, write_text
from ..settings import setting_faults
from ..targets import match_modules
from ..training import TrainConfig
from ..training.plan import make_plan
from ..training.record import write_settings
from .preview import Preview, make_preview
from .records import Job, training_speed
from .state import RequestError, State
from .uploads import FileStore

__all__ = ["NOT_SETTABLE", "Planner"]

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
_SAVE_STEPS: Final = 25  # updates between checkpoints by default: a kill loses no more than this


class Planner:
    """Plans the runs of jobs.  Any thread may use it.

    Args:
        state: the directory for files and jobs.
        model: the base model that jobs train on, a name or a path.
        base: the base model in memory and its tokenizer; they are not changed.
        chat_template: the template that jobs train with, if it is not the base's own.
        quantize: how the served base is quantised: jobs train on it in the same form, unless they say otherwise.

    Attributes:
        directory: the directory of the jobs.
        files: the uploaded files.
        inherited: settings that a job has from the server, unless a client gives others.

    Raises:
        OutputError: the directory cannot be written.
    """

    def __init__(
        self, state: State, model: str, base: tuple[Any, Any], *, chat_template: str | None, quantize: str
    ) -> None:
        self.directory = state.directory / "jobs"
        with write_errors(state.directory):
            self.directory.mkdir(exist_ok=True)
            self.files = FileStore(state)
        self.inherited = {} if quantize == "none" else {"quantize": quantize}
        self._state, self._base, self._chat_template = state, base, chat_template
        self._model = str(Path(model).expanduser().absolute()) if Path(model).expanduser().exists() else model

    def config(
        self, job_id: str, settings: Mapping[str, Any], training_file: str, validation_file: str | None = None
    ) -> TrainConfig:
        """Returns the settings for a job's run.

        Raises:
            RequestError: there is no such file, or settings are invalid or may not be chosen by clients; all faults
                are listed.
        """
        _check(settings)
        paths: dict[str, Any] = {"train_data": [str(self.files.get(training_file, "training_file").path)]}
        if validation_file is not None:
            paths["valid_data"] = [str(self.files.get(validation_file, "validation_file").path)]
        template = self.directory / job_id / "chat_template.jinja"
        if self._chat_template is not None or template.exists():
            paths["chat_template"] = str(template)
        run = str(self.directory / job_id / "run")
        try:
            return TrainConfig(**{"save_steps": _SAVE_STEPS, **settings, **paths}, model=self._model, output_dir=run)
        except ConfigError as error:
            raise RequestError(str(error), param="loralib") from error

    def plan(self, job: Job) -> dict[str, Any]:
        """Validates a job's data, and plans its run; returns its settings, with a scaled rate.

        Raises:
            LoraError: the job would fail, for this reason.
        """
        config = self.config(job.id, job.settings, job.training_file, job.validation_file)
        multiplier = None if "lr" in job.settings else job.asked["learning_rate_multiplier"]
        ids = filter(None, (job.training_file, job.validation_file))
        if multiplier is None and not all(self.files.get(file_id).is_read for file_id in ids):
            return job.settings  # left to the job itself
        model, tokenizer = self._base
        match_modules(model, config.lora_config())
        plan = make_plan(model, config.train_data, config.valid_data, tokenizer, config, lambda line: None)
        return job.settings if multiplier is None else {**job.settings, "lr": plan.config.peak_lr * multiplier}

    def write(self, job: Job) -> None:
        """Writes what a job's process reads, into the job's directory.

        Raises:
            RequestError: a file was removed.
            OutputError: it cannot be written.
        """
        config = self.config(job.id, job.settings, job.training_file, job.validation_file)
        with write_errors(job.directory):
            job.directory.mkdir(exist_ok=True)
        if config.chat_template is not None and not Path(config.chat_template).exists():
            write_text(config.chat_template, self._chat_template or "")  # kept from the first start on
        given = {name: value for name, value in config.to_dict().items() if name not in ("resume", "overwrite")}
        write_settings(job.directory / "job.toml", given)

    def preview(self, training_file: str, settings: Mapping[str, Any] | None = None) -> Preview:
        """Describes what a job would do: how its data are read, what is trained, memory and time; see `make_preview`.

        It takes as long as reading and tokenizing the data; the page calls it in a thread.

        Raises:
            RequestError: there is no such file, a setting is invalid, or the data cannot be trained on.
        """
        config = self.config("preview", {**self.inherited, **(settings or {})}, training_file)
        try:
            return make_preview(config, *self._base, public=self.public, speed=training_speed(self._state))
        except LoraError as error:
            raise RequestError(self.public(str(error)), param="training_file") from error

    def public(self, text: str) -> str:
        """Replaces the server's paths in a text with names that clients know."""
        if str(self._state.directory) not in text:
            return text
        for file in self.files.list():
            text = text.replace(str(file.path), file.name)
        text = text.replace(f"{self.directory}{os.sep}", "")
        return text.replace(str(self._state.directory), "state_dir")


def _check(settings: Mapping[str, Any]) -> None:
    """Raises a RequestError with all faults of settings that a client has given."""
    try:
        json.dumps(settings, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (ValueError, TypeError) as error:  # such as NaN, which Python reads but JSON does not have
        raise RequestError(f"the job has settings that cannot be written: {error}", param="loralib") from error
    own = {name: value for name, value in settings.items() if name in NOT_SETTABLE}
    faults = [_NOT_SERVED.get(name, f"{name} is set by the server") for name in own]
    faults += setting_faults(TrainConfig, {name: value for name, value in settings.items() if name not in own})
    if faults:
        raise RequestError(list_faults("the job has invalid settings", faults), param="loralib")
