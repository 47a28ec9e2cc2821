"""How the fields of settings become flags, TOML keys and arguments, in all their spellings."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import loralib as lora
from loralib.bases.device import DTYPES
from loralib.cli import COMMANDS, add_fields, from_args, main, parser_of
from loralib.cli._flags import Parser
from loralib.cli._inference import InferenceConfig
from loralib.errors import ConfigError
from loralib.generation import Sampling
from loralib.nlg.reproduction.recipe import Recipe
from loralib.settings import setting
from loralib.training import TrainConfig


@dataclass(frozen=True)
class Walk:
    via: str | Sequence[str] | None = setting(None, "places to pass", "walk", several="names")
    avoid: str | Sequence[str] = setting((), "what to keep away from", "walk", several="repeat")
    pace: str = setting("slow", "how fast", "walk", ("slow", "fast"))


@pytest.mark.parametrize(
    ("argv", "walk"),
    [
        ([], Walk()),
        (["--via", "mill", "pond"], Walk(via=["mill", "pond"])),
        (["--via", "mill,old.pond"], Walk(via=["mill", "old.pond"])),
        (["--via", ".*pond|mill{1,2}"], Walk(via=".*pond|mill{1,2}")),
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


def test_a_mapping_is_given_as_pairs_and_what_has_no_flag_is_python_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert parsed(Sampling, "--logit_bias", "13=-5", "--logit_bias", "7=1.5").logit_bias == {13: -5, 7: 1.5}
    assert parsed(Sampling, "--logit_bias", "13=-5,7=1.5").logit_bias == {13: -5, 7: 1.5}
    assert parsed(Sampling, "--logit_bias=13=-5").logit_bias == {13: -5}
    with pytest.raises(ConfigError, match=r"logit_bias\[13\] is 200.0, expected a number of at least -100 and at most"):
        parsed(Sampling, "--logit_bias", "13=200")
    for line in (["--logit_bias", "13:5"], ["--logprobs", "3"]):
        with pytest.raises(SystemExit):
            parsed(Sampling, *line)
    assert "'13:5' was given, expected pairs such as 13=-5" in capsys.readouterr().err


# Second spellings.


def parsed(config: Any, *argv: str) -> Any:
    parser = Parser()
    add_fields(parser, config)
    return from_args(config, parser.parse(argv))


def test_a_second_spelling_is_a_flag_a_key_and_an_argument(tmp_path: Path) -> None:
    expected = TrainConfig(rank=5)
    (tmp_path / "run.toml").write_text("lora_dim = 5\n", encoding="utf-8-sig")  # as Windows' Notepad may save it
    again = [
        TrainConfig(lora_dim=5),
        TrainConfig().replace(lora_dim=5),
        parsed(TrainConfig, "--rank", "5"),
        parsed(TrainConfig, "--lora_dim", "5"),
        parsed(TrainConfig, "--config", str(tmp_path / "run.toml")),
        parsed(TrainConfig, "--config", str(tmp_path / "run.toml"), "--lora_dim", "5"),
    ]
    assert again == [expected] * len(again)
    assert "lora_dim" not in expected.to_dict()


def test_two_spellings_of_one_setting_contradict_each_other(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("lora_dim = 5\nrank = 4\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="lora_dim and rank are two names for the same setting"):
        parsed(TrainConfig, "--config", str(tmp_path / "run.toml"))
    with pytest.raises(ConfigError, match="rank and lora_dim are two names for the same setting"):
        TrainConfig(rank=4, lora_dim=5)


@pytest.mark.parametrize("command", [*COMMANDS, "data preview", "data convert"])
def test_help_shows_the_first_spelling_alone(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    text = capsys.readouterr().out
    assert "`" not in text  # which is for Markdown
    shown = set(re.findall(r"--\w+", re.sub(r"(?m)^ *loralib .*$", "", text)))
    assert not shown & {"--base", "--format", "--batch", "--lora_dim"}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_dtype_is_chosen_alike_everywhere(command: str) -> None:
    writes = command in ("convert", "export-base", "merge")  # to files, for which auto means nothing
    chosen = [action.choices for action in parser_of(command)._actions if action.dest == "dtype"]
    assert chosen in ([], [DTYPES[1:] if writes else DTYPES])


@dataclass(frozen=True)
class Trip:
    shoes: str = setting("boots", "what to wear", "clothes")
    length: float = setting(12.0, "kilometres", "way", common=True)
    map_dir: str = setting("maps", "where maps are", "way")


def test_what_most_people_need_stands_first_in_help() -> None:
    parser = Parser(prog="trip", description="Walks.")
    parser.add_argument("goal")
    add_fields(parser, Trip)
    shown = parser.format_help()
    assert shown.startswith(
        "usage: trip [options] goal\n\nWalks.\n\npositional arguments:\n  goal\n\nmost commonly used flags"
    )
    places = [shown.index(text) for text in ("--length X", "(default 12)", "--shoes TEXT", "--map_dir DIR", "--help")]
    assert places == sorted(places)
    assert shown.count("--length") == 1


def test_ten_flags_are_those_that_most_people_need() -> None:
    common = {spec.name for spec in dataclasses.fields(TrainConfig) if spec.metadata["common"]}
    assert len(common) == 10
    assert {"model", "train_data", "output_dir", "lr", "num_epochs", "rank", "seq_len"} <= common


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_short_of_a_wall(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The usage takes one line, followed by the purpose of the command; every flag says what it does."""
    with pytest.raises(SystemExit):
        main([command, "--help"])
    usage, blank, about, *_ = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"usage: loralib {command} \[options\][^-]*", usage)
    assert not blank
    assert about
    flags = [action for action in parser_of(command)._actions if action.option_strings]
    assert not [action for action in flags if not action.help]


def test_a_comma_does_not_split_the_name_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a,b.txt").touch()
    assert parsed(TrainConfig, "--train_data", "a,b.txt", "c.txt,d.txt:2").train_data == ["a,b.txt", "c.txt", "d.txt:2"]


# What is checked.


@pytest.mark.parametrize("config", [lora.LoraConfig, TrainConfig, Sampling, InferenceConfig, Recipe])
def test_every_setting_is_explained_and_its_default_is_valid(config: Any) -> None:
    assert config()
    for spec in dataclasses.fields(config):
        assert f"{spec.name}: {spec.metadata['help']}" in config.__doc__


@pytest.mark.parametrize("config", [lora.LoraConfig, TrainConfig, Sampling, InferenceConfig, Recipe])
def test_every_setting_refuses_another_type(config: Any) -> None:
    for spec in dataclasses.fields(config):
        with pytest.raises(ConfigError, match=rf"(?s)1 setting of .* invalid:\s+{spec.name} is .*, expected "):
            config(**{spec.name: object()})


@pytest.mark.parametrize(
    ("config", "values", "faults"),
    [
        (
            TrainConfig,
            {"seed": 1.0, "lr": True},
            ["seed is 1.0, expected a whole number", "lr is True, expected a"],
        ),
        (TrainConfig, {"lr": float("nan"), "beta1": 1.0}, ["lr is nan, expected a number above 0", "beta1 is 1.0"]),
        (
            TrainConfig,
            {"lora_alpha": 0, "rank": 0},
            ["lora_alpha is 0, expected a number", "rank is 0, expected"],
        ),
        (TrainConfig, {"enable_lora": "1,0,1"}, ["c_attn=1,0,1; or just 1,0,1 if target_modules is a list"]),
        (TrainConfig, {"enable_lora": "qkv=1,2"}, ["enable_lora is 'qkv=1,2', expected a 1 or 0 for each block"]),
        (TrainConfig, {"schedule": "linaer"}, ["expected 'linear' or 'cosine' or 'constant'. Did you mean 'linear'?"]),
        (Sampling, {"top_p": 0, "min_p": 2.0}, ["top_p is 0, expected a number above 0 and at most 1", "min_p is"]),
        (
            Sampling,
            {"max_new_tokens": "5", "stop": [""]},
            ["max_new_tokens is '5', expected a whole num", "non-empty strings"],
        ),
        (
            InferenceConfig,
            {"samples": 0, "adapter": ()},
            ["samples is 0, expected a whole number", "adapter is"],
        ),
        (Recipe, {"published": {"all": {"BLEU": "high"}}}, ["published['all']['BLEU'] is 'high', expected a number"]),
    ],
)
def test_all_faults_are_listed_with_what_was_expected(config: Any, values: dict[str, Any], faults: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        config(**values)
    assert all(fault in str(refused.value) for fault in faults), str(refused.value)


def test_a_path_object_is_as_good_as_text(tmp_path: Path) -> None:
    config = TrainConfig(output_dir=tmp_path, train_data=[tmp_path / "a.txt"])  # type: ignore[arg-type,list-item]
    assert (config.output_dir, config.train_data) == (str(tmp_path), [str(tmp_path / "a.txt")])


# Target modules and blocks.


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--target_modules", "self_attn.q_proj,mlp.down_proj"], ["self_attn.q_proj", "mlp.down_proj"]),
        (["--target_modules", "self_attn.q_proj", "mlp.down_proj"], ["self_attn.q_proj", "mlp.down_proj"]),
        (["--target_modules", "layers.1.self_attn.q_proj"], ["layers.1.self_attn.q_proj"]),
        (["--target_modules", r".*\.(q|v)_proj"], [r".*\.(q|v)_proj"]),
        (["--config", "run.toml"], ["self_attn.q_proj", "mlp.down_proj"]),
    ],
)
def test_dotted_names_are_targets(
    flags: list[str], expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text('target_modules = "self_attn.q_proj, mlp.down_proj"\n', encoding="utf-8")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes))
    report = lora.inject(model, parsed(TrainConfig, *flags).lora_config())
    assert list(report.patterns) == expected
    adapted = {name for name, module in model.named_modules() if isinstance(module, lora.LoRALayer)}
    assert adapted == {name for name in adapted if re.search("q_proj|v_proj|down_proj", name)} != set()
    assert all(report.patterns.values())


def test_one_grammar_for_blocks() -> None:
    flags = ["--target_modules", "qkv,c_attn", "--enable_lora"]
    for text in ("qkv=1,0,1;c_attn=1,1,0", " qkv = true, 0, 1; c_attn=1,1,0;"):
        blocks = parsed(TrainConfig, *flags, text).lora_config().enable_lora
        assert blocks == {"qkv": (True, False, True), "c_attn": (True, True, False)}
    blocks = parsed(TrainConfig, *flags, "1,0,1").lora_config().enable_lora
    assert blocks == dict.fromkeys(("qkv", "c_attn"), (True, False, True))
