"""LoraConfig: PEFT's fields, defaults and matching rules; every wrong value is named."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import peft
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists

from loralib import LoraConfig
from loralib.config import first_match, matches
from loralib.errors import AdapterError, ConfigError


def test_shared_fields_have_pefts_defaults() -> None:
    theirs = peft.LoraConfig()
    ours = LoraConfig()
    own = {"enable_lora"}
    for spec in dataclasses.fields(LoraConfig):
        if spec.name not in own:
            assert getattr(ours, spec.name) == getattr(theirs, spec.name), spec.name
        assert spec.metadata["help"]


def test_written_settings_are_known_to_old_versions_of_peft() -> None:
    """What adapter_config.json always holds was known to PEFT 0.5; newer keys appear only when they say something."""
    old = """alpha_pattern auto_mapping base_model_name_or_path bias fan_in_fan_out inference_mode init_lora_weights
    layers_pattern layers_to_transform lora_alpha lora_dropout modules_to_save peft_type r rank_pattern revision
    target_modules task_type""".split()
    plain = LoraConfig(r=4, lora_alpha=16.0, target_modules={"b", "a"}, alpha_pattern={"a": 8.0}).to_dict()
    assert plain.keys() <= set(old)
    assert json.loads(json.dumps(plain)) == plain
    assert plain["target_modules"] == ["a", "b"]
    assert repr(plain["lora_alpha"]) == "16"
    assert repr(plain["alpha_pattern"]) == "{'a': 8}"
    newer = LoraConfig(target_modules=["a"], use_rslora=True, exclude_modules=["b"]).to_dict()
    assert newer.keys() - plain.keys() == {"use_rslora", "exclude_modules"}


full = LoraConfig(
    r=4,
    lora_alpha=32,
    target_modules=["q_proj"],
    lora_dropout=0.1,
    bias="all",
    use_rslora=True,
    modules_to_save=["head"],
    exclude_modules=["x"],
    layers_to_transform=[0, 2],
    layers_pattern="layers",
    rank_pattern={"q_proj": 2},
    alpha_pattern={"q_proj": 3.5},
    task_type="CAUSAL_LM",
    base_model_name_or_path="gpt2",
)


def test_settings_survive_their_file_and_peft_reads_them() -> None:
    written = json.loads(json.dumps(full.to_dict()))
    assert LoraConfig.from_dict(written) == full
    theirs = peft.LoraConfig(**{key: value for key, value in written.items() if key != "peft_type"})
    assert theirs.r == 4
    assert theirs.layers_to_transform == [0, 2]
    assert LoraConfig.from_dict(theirs.to_dict()) == full
    assert LoraConfig.from_dict(peft.LoraConfig(target_modules=["a"]).to_dict()) == LoraConfig(target_modules=["a"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_qalora", True),
        ("layer_replication", [[0, 2]]),
        ("alora_invocation_tokens", [5]),
        ("use_bdlora", {"nblocks": 2}),
        ("kasa_config", {"beta": 1}),
        ("arrow_config", {"top_k": 2}),
        ("something_of_tomorrow", 3),
    ],
)
def test_what_would_change_the_result_is_refused(key: str, value: Any) -> None:
    with pytest.raises(AdapterError, match=key):
        LoraConfig.from_dict({"peft_type": "LORA", "target_modules": ["a"], key: value})


@pytest.mark.parametrize(
    ("values", "merges"),
    [
        ({"use_bdlora": {"nblocks": 2}}, True),
        ({"kasa_config": {"beta": 1}}, True),
        ({"ensure_weight_tying": True, "modules_to_save": ["embed_tokens"]}, True),
        ({"ensure_weight_tying": True, "target_modules": r".*(q_proj|lm_head)"}, False),
        ({"layer_replication": [[0, 2], [1, 3]]}, False),
        ({"alora_invocation_tokens": [5]}, False),
        ({"use_qalora": True, "use_bdlora": {"nblocks": 2}}, False),
    ],
)
def test_pefts_merge_is_recommended_only_where_it_is_right(values: dict[str, Any], merges: bool) -> None:
    with pytest.raises(AdapterError) as refused:
        LoraConfig.from_dict({"target_modules": ["q_proj"], **values})
    assert ("merge_and_unload" in str(refused.value)) is merges
    assert "Did you mean" not in str(refused.value)


def test_weight_tying_that_ties_nothing_is_accepted() -> None:
    values = {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}
    assert LoraConfig.from_dict({**values, "ensure_weight_tying": True}) == LoraConfig.from_dict(values)


def test_other_kinds_and_misspelt_keys_are_refused_together() -> None:
    with pytest.raises(AdapterError, match="'LOHA', expected 'LORA'"):
        LoraConfig.from_dict({"peft_type": "LOHA"})
    with pytest.raises(AdapterError) as refused:
        LoraConfig.from_dict({"lora_dropuot": 0.1, "use_qalora": True})
    assert "Did you mean 'lora_dropout'?" in str(refused.value)
    assert "use_qalora" in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("r", value) for value in (0, -1, 2.5, True, "8", None)],
        *[("lora_alpha", value) for value in (0, float("nan"), float("inf"), "16", None)],
        *[("lora_dropout", value) for value in (-0.1, 1.0, "0.1", float("nan"))],
        *[("bias", value) for value in ("some", None, 1)],
        *[("target_modules", value) for value in ([], [""], [1], 3, "q_proj(", {"a": 1})],
        *[("exclude_modules", value) for value in ([1], "(", 2)],
        *[("modules_to_save", value) for value in ("lm_head", [1])],
        *[("layers_to_transform", value) for value in ("1", [1.5], [True])],
        *[("layers_pattern", value) for value in (5, "h", "(")],
        *[("rank_pattern", value) for value in ({"a": 0}, {"a": 1.5}, {"(": 1}, {"": 1}, [1], {1: 2})],
        *[("alpha_pattern", value) for value in ({"a": 0}, {"a": "1"}, 3)],
        *[("enable_lora", value) for value in ({"a": []}, {"a": [False]}, {"a": [1]}, {"a": True}, [True])],
        *[("use_rslora", value) for value in ("yes", 1)],
        *[("init_lora_weights", value) for value in (None, 3)],
        *[("task_type", value) for value in (3,)],
    ],
)
def test_values_that_cannot_be_are_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=re.escape(name)) as refused:
        LoraConfig(**{name: value})
    assert isinstance(refused.value, ValueError)


def test_all_faults_are_reported_together() -> None:
    with pytest.raises(ConfigError) as refused:
        LoraConfig(r=0, lora_alpha=0, lora_dropout=2, bias="b", rank_pattern={"a": -1})
    message = str(refused.value)
    assert message.startswith("5 settings")
    assert all(
        name in message for name in ("r is 0", "lora_alpha is 0", "lora_dropout is 2", "bias is 'b'", "['a'] is -1")
    )


def test_empty_lists_mean_unused_as_in_peft() -> None:
    config = LoraConfig(target_modules=["a"], layers_to_transform=[], exclude_modules=[], modules_to_save=[])
    assert config == LoraConfig(target_modules=["a"])


def test_a_config_is_a_value() -> None:
    given_names = ["a"]
    config = LoraConfig(target_modules=given_names)
    given_names.append("b")
    assert config.target_modules == ("a",)
    assert config.replace(r=3).r == 3
    assert config.r == 8
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 4  # type: ignore[misc]


# Matching, side by side with PEFT.

NAMES = [
    "c_attn",
    "attn.c_attn",
    "h.0.attn.c_attn",
    "m.h.10.mlp.c_proj",
    "m.layers.1.experts.0.up",
    "c_attn2",
    "x.c_attn",
]


@pytest.mark.parametrize("target", [["c_attn"], ["attn.c_attn", "up"], r".*\.c_(attn|proj)", "c_attn", ["0.up"]])
@pytest.mark.parametrize("exclude", [None, ["h.0.attn.c_attn"], r".*mlp.*"])
def test_names_match_as_in_peft(target: Any, exclude: Any) -> None:
    theirs = peft.LoraConfig(target_modules=target, exclude_modules=exclude)
    for name in NAMES:
        ours = matches(target, name) is not None and matches(exclude, name) is None
        found = check_target_module_exists(theirs, name)
        assert ours == (bool(found) and type(found).__name__ != "_ExcludedModule"), name


@given(st.lists(st.sampled_from(["a", "b", "a.b", "^a", "b.a", "c|a", "[ab]"]), max_size=4, unique=True), st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_pattern_keys_match_as_in_peft(keys: list[str], data: st.DataObject) -> None:
    from peft.utils.other import get_pattern_key

    name = ".".join(data.draw(st.lists(st.sampled_from(["a", "b", "c", "ab"]), min_size=1, max_size=3)))
    found = first_match(dict.fromkeys(keys), name)
    assert get_pattern_key(keys, name) == (name if found is None else found)


def test_settings_of_a_module() -> None:
    config = LoraConfig(
        r=4, lora_alpha=8, rank_pattern={"q": 2, "v": 16}, alpha_pattern={"0.q": 1}, enable_lora={"qkv": [True, False]}
    )
    assert [config.rank_of(name) for name in ("m.0.q", "m.v", "m.k")] == [2, 16, 4]
    assert [config.alpha_of(name) for name in ("m.0.q", "m.1.q")] == [1, 8]
    assert config.blocks_of("m.qkv") == (True, False)
    assert config.blocks_of("m.q") is None
