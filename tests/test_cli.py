"""How the fields of settings become flags."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from loralib.cli import add_fields, from_args
from loralib.cli._inference import InferenceConfig
from loralib.generation import Sampling
from loralib.settings import setting
from loralib.training import TrainConfig


@dataclass(frozen=True)
class Walk:
    via: str | Sequence[str] | None = setting(None, "places to pass", "walk", several="in a row")
    avoid: str | Sequence[str] = setting((), "what to keep away from", "walk", several="one by one")
    pace: str = setting("slow", "how fast", "walk", ("slow", "fast"))


@pytest.mark.parametrize(
    ("argv", "walk"),
    [
        ([], Walk()),
        (["--via", "mill", "pond"], Walk(via=["mill", "pond"])),
        (["home", "--avoid", "dogs", "--avoid", "rain", "--pace", "fast"], Walk(avoid=["dogs", "rain"], pace="fast")),
        (["--avoid", "dogs", "home"], Walk(avoid=["dogs"])),  # and what stands behind is left to others
    ],
)
def test_a_field_says_how_its_flag_takes_several_values(argv: list[str], walk: Walk) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("destination", nargs="?", default="home")
    add_fields(parser, Walk)
    args = parser.parse_args(argv)
    assert from_args(Walk, args) == walk
    assert args.destination == "home"


def test_which_flags_take_several_values() -> None:
    parser = argparse.ArgumentParser(conflict_handler="resolve")
    for config in (TrainConfig, InferenceConfig, Sampling):
        add_fields(parser, config)
    line = "--train_data a b --valid_data c d --adapter e f --stop g --stop h".split()
    args = parser.parse_args(line)
    given = {name: value for name, value in vars(args).items() if isinstance(value, list)}
    assert given == {
        "train_data": ["a", "b"],
        "valid_data": ["c", "d"],
        "adapter": ["e", "f"],
        "stop": ["g", "h"],
    }
