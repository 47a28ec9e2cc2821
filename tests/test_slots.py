"""Slot errors: generated texts contain all their values, texts of other meanings do not, and negation counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from loralib.nlg.metrics.slots import missing_slots, slot_error_rate

SAMPLE = Path(__file__).resolve().parent.parent / "examples" / "NLG" / "data" / "e2e"


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_every_text_of_the_sample_says_its_meaning_and_no_other(split: str) -> None:
    lines = (SAMPLE / f"{split}.txt").read_text(encoding="utf-8").splitlines()
    meanings, texts = zip(*(line.split("||") for line in lines), strict=True)
    assert slot_error_rate(meanings, texts).errors == 0
    others = texts[len(texts) // 2 :] + texts[: len(texts) // 2]
    assert slot_error_rate(meanings, others).value > 0.5
    assert slot_error_rate(meanings, [""] * len(texts)).value == 1


@pytest.mark.parametrize(
    ("value", "text", "said"),
    [
        ("yes", "a family - friendly pub", True),
        ("yes", "Children are welcome.", True),
        ("yes", "It is not family friendly.", False),
        ("yes", "an adults-only pub", False),
        ("yes", "a family-friendly pub not far from the mill", True),
        ("no", "not a family-friendly place", True),
        ("no", "Children are not welcome.", True),
        ("no", "It is family friendly.", False),
    ],
)
def test_family_friendly(value: str, text: str, said: bool) -> None:
    assert (not missing_slots(f"family friendly : {value}", text)) == said


@pytest.mark.parametrize(
    ("slot", "value", "text", "said"),
    [
        ("price", "high", "an inexpensive pub", False),
        ("price", "high", "an expensive pub", True),
        ("price", "£ 20 - 25", "meals for £20-25", True),
        ("price", "£ 20 - 25", "between £ 20 and £ 25", True),
        ("price", "£ 20 - 25", "for £30", False),
        ("price", "less than £ 20", "under £20", True),
        ("customer rating", "5 out of 5", "a five star pub", True),
        ("customer rating", "5 out of 5", "rated 1 out of 5", False),
        ("customer rating", "low", "poorly rated by guests", True),
        ("customer rating", "low", "highly rated, with low prices", False),
        ("name", "The Mill", "The Millhouse is a pub", False),
        ("near", "Café Rouge", "next to Café Rouge.", True),
    ],
)
def test_phrases(slot: str, value: str, text: str, said: bool) -> None:
    assert (not missing_slots(f"{slot} : {value}", text)) == said
