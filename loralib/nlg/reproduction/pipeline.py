"""Runs the stages of a reproduction: data, base, train, decode, perplexity, scores, report."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from ...adapter import apply_adapter
from ...console import say
from ...data import Encoded
from ...errors import DataError, InterruptedRunError
from ...files import hold_directory, remove_file, write_json, write_text
from ...formats import read_adapter
from ...training import TrainConfig, train
from ...training.job import load_examples_for
from ...training.report import read_metrics
from ...training.run_directory import last_checkpoint
from ...training.start import load_base_for
from ..convert import format_rows, read_formatted
from ..evaluation import evaluate, read_texts
from ..perplexity import perplexity
from ..published import Row
from .decode import decode, one_line, read_decoded, write_decoded
from .recipe import Recipe
from .report import PICTURES, write_report
from .sources import Input, SplitFiles, as_source, group_inputs, prompt_of, read_split
from .stages import Stages, digest

__all__ = ["reproduce"]

# Settings that change what is kept or shown, or where it is computed, but not the result.
_FREE: Final = frozenset(
    "model train_data valid_data data_format output_dir device target resume overwrite".split()
    + "save_steps keep_checkpoints report_to".split()
)
_STAGES: Final = ("data", "base", "train", "decode", "perplexity", "scores")
_EXAMPLES: Final = 5  # inputs whose texts are shown side by side


def reproduce(dataset: str, recipe: Recipe, files: SplitFiles, output_dir: str | Path) -> Path:
    """Trains, decodes and scores; skips stages whose results are still valid, and resumes interrupted ones.

    Args:
        dataset: "e2e", "dart" or "webnlg".
        recipe: the settings; ``recipe.train.model`` is the base model.
        files: the data.
        output_dir: receives the records of the stages, the adapter, the texts, the scores and the report.

    Returns:
        The path of the report (Markdown); report.json is beside it.

    Raises:
        LoraError: whatever goes wrong, with a message for the user.
    """
    with hold_directory(output_dir) as directory:
        return _Reproduction(dataset, recipe, files, directory, Path(output_dir)).run()


class _Reproduction:
    """The state that the stages of one reproduction share."""

    def __init__(self, dataset: str, recipe: Recipe, files: SplitFiles, directory: Path, shown: Path) -> None:
        self.dataset, self.recipe, self.files = dataset, recipe, files
        self.directory, self.shown = directory, shown
        self.stages = Stages(directory)
        self.adapter = directory / "adapter"
        self.test = directory / "test.jsonl"
        self.texts = directory / "texts.txt"
        self.decoded = directory / "texts.jsonl"
        self._loaded: tuple[Any, Any] | None = None
        self._adapted = False

    def run(self) -> Path:
        """Runs the stages that need it and returns the path of the report."""
        run, recipe, training = self.stages.run, self.recipe, self.recipe.train
        model = {"name": training.model, "files": _model_files(training.model), "dtype": training.dtype}
        if training.model in ("scratch", "run-demo"):  # such a model is made here from these settings
            model |= {name: getattr(training, name) for name in ("hidden_dim", "num_layers", "seed")}
        sources = {split: digest(path) for split, path in self.files._asdict().items()}
        decoding = dataclasses.asdict(recipe.decode)
        data = run(
            "data",
            {"dataset": self.dataset, "files": sources, "max_inputs": recipe.max_inputs},
            self._data,
            ["test.jsonl"],
        )
        asked = {"form": recipe.form, "model": model, "test": digest(self.test)}
        base = run("base", {**asked, "decode": decoding}, self._base, [])
        settings = {name: value for name, value in training.to_dict().items() if name not in _FREE}
        used = {split: sources[split] for split in ("train", "valid")}
        kept = ["adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/metrics.jsonl"]
        trained = run(
            "train", {"form": recipe.form, "model": model, "files": used, "train": settings}, self._train, kept
        )
        asked["adapter"] = digest(self.adapter / "adapter_model.safetensors")
        decoded = run("decode", {**asked, "decode": decoding}, self._decode, ["texts.jsonl", "texts.txt"])
        adapted = run("perplexity", asked, self._perplexity, [])
        scores = run("scores", {"texts": digest(self.texts), **asked, **_programs()}, self._scores, ["scores.json"])
        facts = {
            "dataset": self.dataset,
            "model": training.model,
            "recipe": _recipe(recipe),
            "settings": {"train": _plain(training), "decode": _plain(recipe.decode)},
            "data": {**data, "files": [path.name for path in self.files]},
            "training": trained,
            "decoding": decoded,
            "scores": scores,
            "perplexity": {"base": base["perplexity"], "adapted": adapted},
            "examples": self._examples(base["texts"]),
            "seconds": self.stages.seconds(_STAGES),
            "machine": _machine(),
        }
        pictures = list(PICTURES) if importlib.util.find_spec("matplotlib") else []
        told = {"facts": hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest(), "pictures": pictures}
        run("report", told, lambda _: self._report(facts), ["report.md", "report.json", *pictures])
        say(f"Report: {self.shown / 'report.md'}")
        return self.directory / "report.md"

    # The stages.

    def _data(self, _: bool) -> Mapping[str, Any]:
        rows = {split: read_split(path, self.dataset) for split, path in self.files._asdict().items()}
        inputs = group_inputs(rows["test"])[: self.recipe.max_inputs or None]
        chosen = {each.row.context for each in inputs}
        write_text(self.test, format_rows(row for row in rows["test"] if row.context in chosen))
        counts = {split: len(found) for split, found in rows.items()}
        say(
            f"  {counts['train']:,} texts to train on, {counts['valid']:,} to validate on, "
            f"{len(inputs):,} inputs to test"
        )
        return {"texts": counts, "inputs": len(inputs), "references": sum(len(each.references) for each in inputs)}

    def _base(self, _: bool) -> Mapping[str, Any]:
        """Returns texts by the base model without an adapter, and its perplexity on the references."""
        model, tokenizer = self._model()
        chosen = self._shown_inputs()
        prompts = [self._prompts()[number] for number in chosen]
        found = dict(decode(model, tokenizer, prompts, self.recipe.decode, self.recipe.form, chosen))
        texts = {str(chosen[place]): one_line(text.text, self.recipe.form) for place, text in found.items()}
        return {"texts": texts, "perplexity": self._measured()}

    def _train(self, unfinished: bool) -> Mapping[str, Any]:
        resume = unfinished and last_checkpoint(self.adapter / "checkpoints") is not None
        config = self.recipe.train.replace(output_dir=str(self.adapter), resume=resume, overwrite=not resume)
        model, _ = self._model()
        training = self._encoded(self.files.train, config, config.max_train_samples)
        valid = self._encoded(self.files.valid, config, config.max_valid_samples)
        say(
            f"  {len(training):,} training examples{_dropped(training)}, {len(valid):,} to validate on{_dropped(valid)}"
        )
        try:
            result = train(model, training.examples, config, valid_data=valid.examples)
        except InterruptedRunError as error:
            text = str(error).replace("Run the same command with --resume", "Run the same command again")
            raise InterruptedRunError(text, error.exit_code - 128) from error
        self._adapted = True
        steps = [event["step_s"] for event in read_metrics(self.adapter / "metrics.jsonl") if event["event"] == "train"]
        return {
            "updates": result.steps,
            "seconds": round(sum(steps), 2),
            "examples": len(training),
            "dropped": training.dropped,
            "train_losses": result.train_losses,
            "valid_losses": [list(pair) for pair in result.valid_losses],
            "note": result.note,
        }

    def _decode(self, unfinished: bool) -> Mapping[str, Any]:
        prompts = self._prompts()
        if not unfinished:
            remove_file(self.decoded)
        if len(read_decoded(self.decoded, prompts)) < len(prompts):
            model, tokenizer = self._adapted_model()
            write_decoded(self.decoded, model, tokenizer, prompts, self.recipe.decode, self.recipe.form)
        found = read_decoded(self.decoded, prompts)
        write_text(self.texts, "".join(f"{found[number]['text']}\n" for number in range(len(prompts))))
        ended = sum(record["finish_reason"] == "stop" for record in found.values())
        return {"texts": len(found), "ended": ended, "tokens": sum(record["tokens"] for record in found.values())}

    def _perplexity(self, _: bool) -> Mapping[str, Any]:
        self._adapted_model()
        return self._measured()

    def _scores(self, _: bool) -> Mapping[str, Any]:
        if not self.texts.read_text(encoding="utf-8").strip():
            raise DataError(
                f"the adapted model generated no text for any of {len(self._inputs)} inputs: it stops immediately, "
                f"so there is nothing to score ({self.shown / 'texts.jsonl'}). "
                "Train longer, or set decode.min_new_tokens."
            )
        done = evaluate(read_texts(self.test, self.texts, "data")).as_json()
        write_json(self.directory / "scores.json", done)
        return done

    def _report(self, facts: Mapping[str, Any]) -> Mapping[str, Any]:
        write_report(self.directory, facts)
        return {}

    # What the stages need.

    def _model(self) -> tuple[Any, Any]:
        """Returns the model in its current state: the base, or adapted after training or loading the adapter."""
        if self._loaded is None:
            config = self.recipe.train
            say(f"  loading {config.model}")
            self._loaded = load_base_for(config)
        return self._loaded

    def _adapted_model(self) -> tuple[Any, Any]:
        model, tokenizer = self._model()
        if not self._adapted:
            apply_adapter(model, read_adapter(self.adapter))
            self._adapted = True
        return model.eval(), tokenizer

    def _encoded(self, path: Path, config: TrainConfig, most: int) -> Encoded:
        _, tokenizer = self._model()
        source = as_source(read_split(path, self.dataset), path, self.recipe.form, tokenizer)
        return load_examples_for(config, [source], tokenizer, most)

    @functools.cached_property
    def _rows(self) -> list[Row]:
        return read_formatted(self.test)

    @functools.cached_property
    def _inputs(self) -> list[Input]:
        return group_inputs(self._rows)

    def _prompts(self) -> list[str]:
        end = self._end_token
        return [prompt_of(each.row.context, self.recipe.form, end) for each in self._inputs]

    @functools.cached_property
    def _end_token(self) -> str:
        # Loading the model for it is no waste: only form "paper" needs it, and then the model is needed anyway.
        return str(self._model()[1].eos_token) if self.recipe.form == "paper" else ""

    def _measured(self) -> dict[str, Any]:
        model, tokenizer = self._model()
        source = as_source(self._rows, self.test, self.recipe.form, tokenizer)
        found = perplexity(model, tokenizer, source.examples)
        values = {name: score.value for name, score in found.scores.items()}
        return {
            **values,
            "loss": found.loss,
            "tokens": found.tokens,
            "words": found.words,
            "signature": found.signature,
        }

    def _shown_inputs(self) -> list[int]:
        """Returns the indices of the inputs whose texts are shown, spread over the test file."""
        last, count = len(self._inputs) - 1, min(_EXAMPLES, len(self._inputs))
        return [round(last * number / max(1, count - 1)) for number in range(count)]

    def _examples(self, base: Mapping[str, str]) -> list[dict[str, str]]:
        adapted = self.texts.read_text(encoding="utf-8").split("\n")
        return [
            {
                "input": self._inputs[number].row.context.strip(),
                "base": base[str(number)],
                "adapted": adapted[number],
                "reference": self._inputs[number].references[0].strip(),
            }
            for number in self._shown_inputs()
        ]


def _dropped(encoded: Encoded) -> str:
    return f" ({encoded.drop_note})" if encoded.drop_note else ""


def _model_files(name: str) -> dict[str, list[int]]:
    """Returns size and time of each file of a model in a directory; a change means another model."""
    path = Path(name).expanduser()
    if not path.is_dir():
        return {}
    stats = {entry.name: entry.stat() for entry in sorted(path.iterdir()) if entry.is_file()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items() if not name.startswith(".")}


def _programs() -> dict[str, dict[str, bool]]:
    """Returns which optional dependencies of scores are installed, so that installing one reruns the stage."""
    packages = {name: importlib.util.find_spec(name) is not None for name in ("sacrebleu", "pycocoevalcap")}
    return {"programs": {**packages, "java": shutil.which("java") is not None}}


def _recipe(recipe: Recipe) -> dict[str, Any]:
    """Returns the recipe as plain values; of its settings, only those that differ from the defaults."""
    return {
        "name": recipe.name,
        "form": recipe.form,
        "max_inputs": recipe.max_inputs,
        "train": _changed(recipe.train),
        "decode": _changed(recipe.decode),
        "published": {part: dict(figures) for part, figures in recipe.published.items()},
        "source": recipe.source,
        "note": recipe.note,
    }


def _plain(config: Any) -> dict[str, Any]:
    """Returns settings as JSON values, without paths on this machine."""
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    return {name: value for name, value in values.items() if name not in ("output_dir", "train_data", "valid_data")}


def _changed(config: Any) -> dict[str, Any]:
    default = _plain(type(config)())
    return {name: value for name, value in _plain(config).items() if value != default[name]}


def _machine() -> dict[str, Any]:
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
