"""The E2E challenge's official scorer: its words, its scores of whole files and of single texts."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from loralib.nlg.evaluation import read_texts
from loralib.nlg.metrics import SCORES
from loralib.nlg.metrics.meteor import meteor
from loralib.nlg.metrics.ptb import ptb_instances

pytestmark = pytest.mark.golden

EXACT = 1e-6  # of max(1, |value|)


class Case(NamedTuple):
    name: str
    references: tuple[tuple[str, ...], ...]
    hypotheses: tuple[str, ...]
    instances: list[dict[str, Any]]
    scores: dict[str, float]


@pytest.fixture(scope="module")
def cases(golden_dir: Path) -> list[Case]:
    folder = golden_dir / "metrics"
    found = []
    for name, scores in json.loads((folder / "scores.json").read_text(encoding="utf-8")).items():
        texts = read_texts(folder / f"{name}.ref.txt", folder / f"{name}.hyp.txt")
        lines = (folder / f"{name}.instances.jsonl").read_text(encoding="utf-8").split("\n")
        instances = [json.loads(line) for line in lines if line]
        found.append(Case(name, texts.references, texts.hypotheses, instances, scores))
    assert found
    return found


def near(value: float) -> Any:
    return pytest.approx(value, abs=EXACT * max(1, abs(value)))


def test_words(cases: list[Case]) -> None:
    for case in cases:
        ours = ptb_instances(case.references, case.hypotheses)
        assert len(ours) == len(case.instances) == case.scores["n_instances"], case.name
        for number, ((hypothesis, references), theirs) in enumerate(zip(ours, case.instances, strict=True)):
            where = f"{case.name}, instance {number}"
            assert " ".join(hypothesis) == theirs["ptb_hyp"], where
            assert [" ".join(text) for text in references] == theirs["ptb_refs"], where


@pytest.mark.parametrize("name", ["BLEU", "NIST", "ROUGE_L", "CIDEr"])
def test_scores(cases: list[Case], name: str) -> None:
    for case in cases:
        score = SCORES[name](case.references, case.hypotheses)
        assert score.value == near(case.scores[name]), case.name
        for number, (value, theirs) in enumerate(zip(score.instances, case.instances, strict=bool(score.instances))):
            assert value == near(theirs[name]), f"{case.name}, instance {number}"


@pytest.mark.skipif(
    not (shutil.which("java") and importlib.util.find_spec("pycocoevalcap")), reason="METEOR needs Java and its jar"
)
def test_meteor(cases: list[Case]) -> None:
    # Starting the program takes longest: one run for every text, and one for a whole file.
    every = meteor(
        [texts for case in cases for texts in case.references], [text for case in cases for text in case.hypotheses]
    )
    theirs = [instance["METEOR"] for case in cases for instance in case.instances]
    assert list(every.instances) == [near(value) for value in theirs]
    case = min(cases, key=lambda case: len(case.hypotheses))
    assert meteor(case.references, case.hypotheses).value == near(case.scores["METEOR"]), case.name
