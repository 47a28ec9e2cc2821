"""Runs a complete sweep from settings, some of them lists: creates its runs, loads data and base model."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from ..errors import ConfigError, list_faults
from .config import TrainConfig
from .job import read_data
from .report import Reporter
from .start import base_for, load_base_for

if TYPE_CHECKING:
    from .sweep_record import SweepResult

__all__ = ["SWEPT", "configs_of", "run_sweep"]

# Settings that may be lists: single-valued ones that may differ between runs on the same base and data.
SWEPT: Final = frozenset(
    "seed rank lora_alpha lora_dropout target_modules use_rslora use_dora init_lora_weights eva_rho lora_bias "
    "num_epochs max_steps batch_size grad_accum lr loraplus_lr_ratio schedule warmup_steps weight_decay beta1 beta2 "
    "adam_eps correct_bias max_grad_norm arithmetic max_siblings".split()
)


def configs_of(values: Mapping[str, Any]) -> list[TrainConfig]:
    """Returns a run for each combination of settings; those in `SWEPT` may be lists, the last of which varies fastest.

    Raises:
        ConfigError: settings are invalid; all are listed.

    >>> [(config.lr, config.rank) for config in configs_of({"lr": [1e-4, 3e-4], "rank": [8]})]
    [(0.0001, 8), (0.0003, 8)]
    """
    axes = {name: _alternatives(name, value) for name, value in values.items() if name in SWEPT}
    rest = {name: value for name, value in values.items() if name not in SWEPT}
    configs, faults = [], dict[str, None]()
    for chosen in itertools.product(*axes.values()):
        try:
            configs.append(TrainConfig(**rest, **dict(zip(axes, chosen, strict=True))))
        except ConfigError as error:
            faults[str(error)] = None
    if faults:
        raise ConfigError(
            list_faults("some runs of the sweep have invalid settings", list(faults))
            if len(faults) > 1
            else next(iter(faults))
        )
    return configs


def _alternatives(name: str, value: Any) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        return [value]
    if name == "target_modules" and isinstance(value, list) and all(isinstance(each, str) for each in value):
        return [value]  # in TOML, a flat list of names is a single choice of modules; flags yield a tuple of choices
    if not value:
        raise ConfigError(f"{name} is an empty list, expected at least one value")
    if twice := [repr(each) for number, each in enumerate(value) if each in value[:number]]:
        raise ConfigError(f"{name} lists {', '.join(twice)} more than once; list each value only once")
    return list(value)


def run_sweep(configs: list[TrainConfig]) -> SweepResult:
    """Trains all runs from settings alone, including `train_data`; see `train_many`."""
    from .many import run_names, train_all

    config = configs[0]
    if config.train_data is None:
        raise ConfigError("no training data given: add --train_data FILE (E2E lines `meaning||text`, or .jsonl)")
    run_names(configs)  # checks whatever needs no model before loading one
    sources, valid_sources, _ = read_data(config)
    Reporter().say(f"Loading {base_for(config)} ...")
    model, tokenizer = load_base_for(config)
    return train_all(model, sources, configs, tokenizer, valid_sources, config.output_dir, verbose=True)
