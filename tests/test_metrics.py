"""Scores of text: values computed by hand, equality with sacrebleu, edge cases, and errors."""

from __future__ import annotations

import importlib.util
import math
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st

from loralib.errors import DataError, LoraError, MissingDependencyError
from loralib.nlg.metrics import SCORES, Score
from loralib.nlg.metrics.bleu import bleu
from loralib.nlg.metrics.cider import cider
from loralib.nlg.metrics.meteor import meteor
from loralib.nlg.metrics.nist import nist
from loralib.nlg.metrics.rouge import lcs_length, rouge_l
from loralib.nlg.metrics.sacre import chrf, ter, words_13a

OTHERS = [name for name in SCORES if name != "METEOR"]

words = st.sampled_from("the mill is a cheap pub by river , . near £20-25 it's café 5-star".split())
texts = st.lists(words, min_size=4, max_size=9).map(" ".join)
corpora = st.lists(st.tuples(st.lists(texts, min_size=1, max_size=3), texts), min_size=1, max_size=4)


def transposed(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    most = max(map(len, references))
    return [[group[i] if i < len(group) else None for group in references] for i in range(most)]


@settings(deadline=None)
@given(corpora)
def test_bleu_is_sacrebleus_where_every_text_is_long_enough(corpus: list[tuple[list[str], str]]) -> None:
    # One text that is right, so that no precision is zero.
    references = [*(group for group, _ in corpus), ["the mill is a pub"]]
    hypotheses = [*(text for _, text in corpus), "the mill is a pub"]
    theirs = sacrebleu.BLEU(lowercase=True, smooth_method="none", force=True)
    expected = theirs.corpus_score(hypotheses, transposed(references)).score / 100
    assert bleu(references, hypotheses).value == pytest.approx(expected, rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(corpora)
def test_ter_and_chrf_are_sacrebleus(corpus: list[tuple[list[str], str]]) -> None:
    references, hypotheses = [group for group, _ in corpus], [text for _, text in corpus]
    for ours, theirs in ((ter, sacrebleu.TER()), (chrf, sacrebleu.CHRF())):
        score = ours(references, hypotheses)
        assert score.value == pytest.approx(theirs.corpus_score(hypotheses, transposed(references)).score, rel=1e-12)
        assert score.signature == str(theirs.get_signature())


def test_ter_counts_a_shift_as_one_edit() -> None:
    assert ter([["by the river a pub"]], ["a pub by the river"]).value == pytest.approx(100 / 5)


def test_nist_by_hand() -> None:
    # The references have 6 words: a and b twice, c and d once; "a b" twice, longer ones once.
    references, hypothesis = [["a b c d", "a b"]], ["a b c d"]
    one = (math.log2(6 / 2) * 2 + math.log2(6 / 1) * 2) / 4
    two = (math.log2(2 / 2) + math.log2(2 / 1) + math.log2(1 / 1)) / 3
    three = (math.log2(2 / 1) + math.log2(1 / 1)) / 2
    assert nist(references, hypothesis).value == pytest.approx(one + two + three)  # longer than their average of 3


def test_nist_penalises_two_thirds_of_the_length_by_half() -> None:
    whole = nist([["a b c"], ["d e f"]], ["a b c", "d e f"]).value
    part = nist([["a b c"], ["d e f"]], ["a b", "d e"]).value
    assert whole == pytest.approx(math.log2(6))
    assert part == pytest.approx(math.log2(6) / 2)


def test_rouge_takes_the_best_precision_and_the_best_recall() -> None:
    # Precision 2/2 with the second reference's words, recall 1/1 with the first.
    assert rouge_l([["pub", "cheap pub here and there"]], ["cheap pub"]).value == pytest.approx(1)
    precision, recall = 2 / 4, 2 / 5
    value = (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
    assert rouge_l([["a b c d e"]], ["a x b y"]).value == pytest.approx(value)


@settings(deadline=None)
@given(st.lists(st.sampled_from("abcd"), max_size=70), st.lists(st.sampled_from("abcd"), max_size=70))
def test_the_longest_common_subsequence_is_the_tables(first: list[str], second: list[str]) -> None:
    row = [0] * (len(second) + 1)
    for one in first:
        previous = row
        row = [0]
        for j, two in enumerate(second):
            row.append(previous[j] + 1 if one == two else max(previous[j + 1], row[j]))
    assert lcs_length(first, second) == row[-1]


def test_cider_weighs_words_by_how_rare_they_are() -> None:
    references = [["the red mill"], ["the blue mill"], ["the old pub"]]
    rare = cider(references, ["red", "the blue mill", "the old pub"]).instances[0]
    common = cider(references, ["the", "the blue mill", "the old pub"]).instances[0]
    assert common == 0
    # Unigrams only: the cosine is what "red" has of the reference's norm; two bigrams are missing.
    red, mill = math.log(3), math.log(3 / 2)
    assert rare == pytest.approx(10 / 4 * red / math.hypot(red, mill) * math.exp(-(2**2) / (2 * 6**2)))


def test_cider_of_a_single_text_is_zero() -> None:
    assert cider([["a pub"]], ["a pub"]).value == 0


@settings(deadline=None)
@given(corpora)
def test_nothing_beats_a_reference(corpus: list[tuple[list[str], str]]) -> None:
    references, hypotheses = [group for group, _ in corpus], [text for _, text in corpus]
    perfect = [group[0] for group in references]
    for score in (bleu, rouge_l, chrf):
        best = score(references, perfect).value
        assert best == pytest.approx(100 if score is chrf else 1)
        assert score(references, hypotheses).value <= best + 1e-12


def test_an_empty_text_is_scored_as_one_empty_word() -> None:
    assert words_13a("") == ("",)
    references, hypotheses = [["a pub by the river"], ["it is cheap and good"]], ["", "it is cheap and good"]
    # Words: 5 of 5 + 1; longer n-grams: all of those in the second text, less 0, 1 and 2 that the empty word is short.
    precisions = [5 / 6, 4 / (4 + 0), 3 / (3 - 1), 2 / 1e-9]  # none is left of 2 - 2
    value = math.exp(1 - 10 / 6) * math.prod(precisions) ** 0.25
    assert bleu(references, hypotheses).value == pytest.approx(value)
    assert rouge_l(references, hypotheses).instances == (0.0, pytest.approx(1))
    assert cider(references, hypotheses).instances[0] == 0


@pytest.mark.parametrize("name", OTHERS)
def test_every_score_says_how_it_was_made(name: str) -> None:
    score = SCORES[name]([["a pub"], ["a mill", "the mill"]], ["a pub", "one mill"])
    assert score.name == name
    assert "nrefs:var" in score.signature
    assert "version:" in score.signature
    assert str(score) == f"{name}|{score.signature} = {score.value:.4f}"
    assert "nrefs:1|" in SCORES[name]([["a pub"]], ["a pub"]).signature + "|"


@pytest.mark.parametrize("name", list(SCORES))
@pytest.mark.parametrize(
    ("references", "hypotheses", "message"),
    [
        ([["a"]], ["a", "b"], "2 hypotheses, but references for 1"),
        ([["a"], []], ["a", "b"], "hypothesis 2 has no reference"),
        ([["a"], ["b"]], ["", " "], "all 2 hypotheses are empty"),
        ([], [], "there are no hypotheses"),
    ],
)
def test_what_cannot_be_scored(name: str, references: Any, hypotheses: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        SCORES[name](references, hypotheses)


def test_meteor_without_java(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "meteor").mkdir()
    (tmp_path / "meteor" / "meteor-1.5.jar").write_bytes(b"")
    spec = importlib.util.spec_from_loader("pycocoevalcap", None, is_package=True)
    assert spec is not None
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"no program `java`"):
        meteor([["a"]], ["a"])


def test_meteor_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        MissingDependencyError, match=r"pip install 'loralib\[meteor\]'.*pycocoevalcap is not installed"
    ):
        meteor([["a"]], ["a"])


def test_meteor_that_stops_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: sys.executable)  # which knows no -jar
    monkeypatch.setattr("loralib.nlg.metrics.meteor._jar", lambda: tmp_path)
    with pytest.raises(LoraError, match=r"the program stopped: \w+"):
        meteor([["a"]], ["a"])


def test_scores_without_sacrebleu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'loralib\[eval\]'"):
        chrf([["a"]], ["a"])
    assert rouge_l([["a"]], ["a"]) == Score("ROUGE_L", 1.0, rouge_l([["a"]], ["a"]).signature, (1.0,))
