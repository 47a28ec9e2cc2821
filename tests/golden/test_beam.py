"""Beam search finds what Microsoft's decoder finds, token for token, whatever is searched together."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from loralib.generation import Hypothesis, beam_search

pytestmark = pytest.mark.golden

TOLERANCE = 1e-5  # of scores: Microsoft's are sums of float32, and so are ours, in another order


class Reference:
    """The folder's model, prompts and cases."""

    def __init__(self, folder: Path) -> None:
        def read(name: str) -> Any:
            return json.loads((folder / name).read_text(encoding="utf-8"))

        config = transformers.GPT2Config(**{**read("config.json"), "pad_token_id": 0})
        self.model = transformers.GPT2LMHeadModel(config).eval()
        loaded = self.model.transformer.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
        assert not loaded.unexpected_keys
        assert not loaded.missing_keys
        self.logits = load_file(folder / "logits_check.safetensors")
        texts = read("prompts.json")
        self.max_new_tokens = texts["eval_len"]
        self.prompts = [ids[-texts["max_context"] :] for ids in texts["prompts"]]  # the paper's decoder keeps the end
        self.cases = read("results.json")
        assert self.prompts
        assert self.cases

    def search(self, case: dict[str, Any], numbers: list[int], **together: int) -> list[Hypothesis]:
        asked = case["settings"]
        return beam_search(
            self.model,
            [self.prompts[number] for number in numbers],
            num_beams=asked["beam"],
            max_new_tokens=self.max_new_tokens,
            length_penalty=asked["length_penalty"],
            no_repeat_ngram_size=asked["no_repeat_ngram_size"],
            repetition_penalty=asked["repetition_penalty"],
            min_length=asked["min_length"],
            eos_token_id=asked["eos_token_id"],
            **together,
        )

    def faults(self, case: dict[str, Any], numbers: list[int], **together: int) -> list[str]:
        """Searches prompts in one batch; returns what differs from the reference."""
        expected = {result["prompt"]: result for result in case["results"]}
        found = []
        for number, ours in zip(numbers, self.search(case, numbers, **together), strict=True):
            theirs = expected[number]
            ids = theirs["predict"][: theirs["length"]]
            same = list(ours.ids) == ids and ours.ended == theirs["ended_with_eos"]
            if not theirs["same_in_f64"]:  # a tie but for rounding: the score tells
                same = True
            if not same or abs(ours.score - theirs["score"]) > TOLERANCE * max(1, abs(theirs["score"])):
                found.append(f"{case['settings']['name']}, prompt {number}: {ours}, expected {ids}, {theirs['score']}")
        return found


@pytest.fixture(scope="module")
def reference(golden_dir: Path) -> Reference:
    return Reference(golden_dir / "beam")


def test_model_is_the_reference(reference: Reference) -> None:
    with torch.no_grad():
        logits = reference.model(reference.logits["input_ids"]).logits
    torch.testing.assert_close(logits, reference.logits["logits"], rtol=1e-4, atol=1e-4)


def test_all_prompts_together(reference: Reference) -> None:
    every = list(range(len(reference.prompts)))
    assert [fault for case in reference.cases for fault in reference.faults(case, every, max_branches=10_000)] == []


def test_four_prompts_at_a_time(reference: Reference) -> None:
    every = range(len(reference.prompts))
    faults = []
    for place, case in enumerate(reference.cases):
        for start in list(every)[place % 2 * 4 :: 8]:  # every other four of each case
            faults += reference.faults(case, list(every)[start : start + 4])
    assert faults == []


def test_one_prompt_at_a_time(reference: Reference) -> None:
    every = range(len(reference.prompts))
    faults = []
    for place, case in enumerate(reference.cases):
        for number in every[place % 8 :: 8]:
            faults += reference.faults(case, [number])
    assert faults == []


def test_prompts_that_join_while_others_are_searched(reference: Reference) -> None:
    mixed = sorted(range(len(reference.prompts)), key=lambda number: number * 7 % 5)
    faults = []
    for case in reference.cases[::2]:
        faults += reference.faults(case, mixed, max_branches=3 * case["settings"]["beam"] + 1)
    assert faults == []
