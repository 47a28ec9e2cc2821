"""Recipes: TOML files that say how to train and decode for a data set, with scores that others published for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ...bases import DEFAULT_BASE
from ...errors import ConfigError, LoraError, did_you_mean, list_faults
from ...generation import Sampling
from ...settings import canonical, check, parse_toml, read_toml, setting, setting_faults, settings_class
from ...training import TrainConfig
from ...training.record import settings_text
from ..metrics import SCORES

__all__ = ["DATASETS", "FORMS", "Recipe", "choose_recipe", "load_recipe", "recipe_names", "recipe_text"]

DATASETS: Final = ("e2e", "dart", "webnlg")
FORMS: Final = ("lines", "paper")

_FOLDER: Final = Path(__file__).parent / "recipes"
# Training settings that come from the command, so that a recipe may not set them.
_GIVEN: Final = ("model", "train_data", "valid_data", "data_format", "output_dir", "resume", "overwrite", "device")


@settings_class
@dataclass(frozen=True)
class Recipe:
    """How to train a model and decode with it for a data set.

    Raises:
        ConfigError: one or more settings are invalid; the message lists all of them.
    """

    name: str = setting("", "name of the recipe's file, for the reader")
    form: str = setting(
        "lines",
        "how a row becomes a prompt: lines (input, line end, text) or paper (input, end token, blank, text, as in the "
        "LoRA paper's code, which also ends a text at a blank line)",
        choices=FORMS,
    )
    max_inputs: int = setting(
        0,
        "decode and score only the first inputs of the test file; 0: all",
        at_least=0,
        expected="0 (all) or a number of inputs",
    )
    train: TrainConfig = field(default_factory=TrainConfig, metadata={"help": "the settings of training"})
    decode: Sampling = field(default_factory=Sampling, metadata={"help": "the settings of decoding"})
    published: Mapping[str, Mapping[str, float]] = setting(
        {}, "published scores by subset (all, seen, unseen) and metric, in the scale of our metrics"
    )
    source: str = setting("", "where the published scores come from")
    note: str = setting("", "what a reader should know about them")

    def __post_init__(self) -> None:
        check(self, "the recipe")


def recipe_names() -> list[str]:
    """Returns the names of the recipes that come with loralib.

    >>> "e2e-gpt2-medium" in recipe_names()
    True
    """
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def choose_recipe(dataset: str, model: str, asked: str | None = None) -> str:
    """Returns the name or path of the recipe for a data set and a model.

    Args:
        dataset: one of `DATASETS`.
        model: a name or a directory; its last part decides.
        asked: what the user chose: a TOML file, or a recipe by name.

    >>> choose_recipe("dart", "openai-community/gpt2-large"), choose_recipe("dart", "my/model")
    ('dart-gpt2-large', 'smollm2-135m')
    """
    if asked is not None:
        return asked
    last = Path(model).name.lower()
    names = recipe_names()
    return next((name for name in (f"{dataset}-{last}", last) if name in names), DEFAULT_BASE)


def recipe_text(name: str, changes: Iterable[str] = ()) -> str:
    """Returns a recipe as TOML: with changes (see `load_recipe`), or as its file has it, comments included.

    Raises:
        ConfigError: there is no such recipe or file.
    """
    values, changed = _read(name), _read(name, changes)
    return _path(name).read_text(encoding="utf-8") if changed == values else settings_text(changed)


def load_recipe(name: str, changes: Iterable[str] = (), **given: Any) -> Recipe:
    """Reads a recipe and applies changes to its settings.

    Args:
        name: the name of a recipe that comes with loralib, or a TOML file.
        changes: ``key=value`` each, such as ``train.lr=1e-4`` or ``max_inputs=10``; they override the file.
        **given: training settings from elsewhere, such as ``model=...``; they override both.

    Returns:
        The recipe.

    Raises:
        ConfigError: it cannot be read, or has unknown keys or invalid values; the message lists all of them.

    >>> load_recipe("e2e-gpt2-medium").decode.length_penalty
    0.9
    """
    values = _read(name, changes)
    train, decode = _table(values, "train"), _table(values, "decode")
    published = _table(values, "published")
    faults = [f"train.{key} is given by the command, not by a recipe" for key in _GIVEN if key in train]
    faults += setting_faults(TrainConfig, train, "train.") + setting_faults(Sampling, decode, "decode.")
    faults += _own_faults(values) + _published_faults(published)
    if faults:
        raise ConfigError(list_faults(f"recipe {name} has invalid settings", faults))
    figures = {"all": {key: float(published[key]) for key in SCORES if key in published}}
    figures |= {part: dict(published[part]) for part in ("seen", "unseen") if part in published}
    made: list[Any] = []
    for config, settings in ((TrainConfig, {**train, **given}), (Sampling, decode)):
        try:
            made.append(config(**settings))
        except LoraError as error:
            faults.append(str(error))
    if faults:
        raise ConfigError(list_faults(f"recipe {name} cannot be used", faults))
    return Recipe(
        name=Path(name).stem,
        form=values.get("form", "lines"),
        max_inputs=values.get("max_inputs", 0),
        train=made[0],
        decode=made[1],
        published={part: numbers for part, numbers in figures.items() if numbers},
        source=published.get("source", ""),
        note=published.get("note", ""),
    )


def _path(name: str) -> Path:
    if name in recipe_names():
        return _FOLDER / f"{name}.toml"
    path = Path(name).expanduser()
    if path.suffix.lower() == ".toml":
        if not path.is_file():
            raise ConfigError(
                f"recipe {name} does not exist; give a TOML file, or one of: {', '.join(recipe_names())}."
            )
        return path
    known = recipe_names()
    raise ConfigError(
        f"there is no recipe {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}; or give a file NAME.toml."
    )


def _read(name: str, changes: Iterable[str] = ()) -> dict[str, Any]:
    values = read_toml(_path(name), f"recipe {name}")
    for change in changes:
        _change(values, change)
    return values


def _change(values: dict[str, Any], change: str) -> None:
    """Applies ``key=value``, which replaces any other spelling of the key; text that is not TOML is a string."""
    key, equals, text = change.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {change!r} is not of the form key=value, as in train.lr=1e-4 or max_inputs=10.")
    try:
        value = parse_toml(f"value = {text}", "a value")["value"]
    except ConfigError:
        value = text
    *tables, last = key.strip().split(".")
    place = values
    for name in tables:
        place = place.setdefault(name, {})
        if not isinstance(place, dict):
            raise ConfigError(
                f"--set {change!r}: {name} is not a table of the recipe. Its tables are train and decode."
            )
    config = {"train": TrainConfig, "decode": Sampling}.get(".".join(tables), Recipe)
    same = [name for name in place if canonical(config, {name: value}) == canonical(config, {last: value})]
    for other in same:
        del place[other]
    place[last] = value


def _table(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    table = values.get(name, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{name} is {table!r} in the recipe, expected a table [{name}]")
    return table


def _own_faults(values: Mapping[str, Any]) -> list[str]:
    known = ["form", "max_inputs", "train", "decode", "published"]
    everywhere = [*known, *(f"train.{spec.name}" for spec in dataclasses.fields(TrainConfig))]
    everywhere += [f"decode.{spec.name}" for spec in dataclasses.fields(Sampling)]
    faults = []
    for name in values:
        if name not in known:
            inside = [key for key in everywhere if key.endswith(f".{name}")]
            near = f" Did you mean {' or '.join(map(repr, inside))}?" if inside else did_you_mean(name, known)
            faults.append(f"{name} is not a key of a recipe.{near}")
    own = ("form", "max_inputs")
    return faults + setting_faults(Recipe, {name: values[name] for name in own if name in values})


def _published_faults(published: Mapping[str, Any], where: str = "published.") -> list[str]:
    faults = []
    for name, value in published.items():
        known = [*SCORES, *(("seen", "unseen", "source", "note") if where == "published." else ())]
        if name not in known:
            faults.append(f"{where}{name} is not a metric.{did_you_mean(name, known)}")
        elif name in ("seen", "unseen"):
            good = isinstance(value, dict)
            faults += _published_faults(value, f"{where}{name}.") if good else [f"{where}{name} is not a table"]
        elif name in ("source", "note"):
            faults += [] if isinstance(value, str) else [f"{where}{name} is {value!r}, expected text"]
        elif not isinstance(value, (int, float)) or isinstance(value, bool):
            faults.append(f"{where}{name} is {value!r}, expected a number")
    return faults
