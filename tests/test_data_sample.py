"""The sample of examples/NLG is what its generator writes, says what its meaning representations say, and fits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from loralib.data import Example, encode, group_by_prompt, read_examples

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "examples" / "NLG" / "data" / "e2e"
SPLITS = {"train": 400, "valid": 60, "test": 60}


@pytest.fixture(scope="module")
def generator(load_file: Callable[[Path], ModuleType]) -> ModuleType:
    return load_file(ROOT / "scripts" / "make_e2e_sample.py")


@pytest.fixture(scope="module")
def examples() -> dict[str, list[Example]]:
    return {split: read_examples(SAMPLE / f"{split}.txt") for split in SPLITS}


def meaning_of(example: Example) -> dict[str, str]:
    return dict(part.split(" : ") for part in example.prompt.strip().split(" | "))


def test_the_committed_files_are_what_the_generator_writes(generator: ModuleType) -> None:
    made = generator.make()
    assert set(made) == set(SPLITS)
    for split, text in made.items():
        assert (SAMPLE / f"{split}.txt").read_bytes() == text.encode("utf-8")


def test_another_seed_gives_other_data(generator: ModuleType) -> None:
    other = generator.make(seed=generator.SEED + 1)["valid"]
    assert other.encode("utf-8") != (SAMPLE / "valid.txt").read_bytes()


def test_counts_and_disjoint_splits(examples: dict[str, list[Example]]) -> None:
    groups = {split: group_by_prompt(rows) for split, rows in examples.items()}
    assert {split: len(group) for split, group in groups.items()} == SPLITS
    prompts = [example.prompt for group in groups.values() for example in group]
    assert len(set(prompts)) == sum(SPLITS.values())
    for group in groups.values():
        for example in group:
            assert 4 <= len(set(example.references)) == len(example.references) <= 6


def test_valid_and_test_have_unseen_names(examples: dict[str, list[Example]]) -> None:
    names = {split: {meaning_of(example)["name"] for example in rows} for split, rows in examples.items()}
    for split in ("valid", "test"):
        assert 4 <= len(names[split] - names["train"]) < len(names[split])
    assert len(names["train"]) > 40


def test_every_text_says_its_meaning_and_nothing_else(
    generator: ModuleType, examples: dict[str, list[Example]]
) -> None:
    said = 0
    for rows in examples.values():
        for example in rows:
            meaning = meaning_of(example)
            assert generator.faults(meaning, example.completion) == []
            said += len(meaning)
            # Plain English typography: a capital, one final stop, no doubled or stray blanks.
            assert example.completion[0].isupper() or example.completion[0].isdigit()
            assert example.completion.endswith(".")
            assert not any(wrong in example.completion for wrong in ("  ", " .", " ,", "..", ",,", " a a", " an u"))
    assert said > 5000


def test_faults_find_what_is_left_out_or_wrong(generator: ModuleType) -> None:
    meaning = {"name": "The Old Ferry", "Type": "pub", "price": "cheap", "family friendly": "no"}
    assert generator.faults(meaning, "The Old Ferry is a cheap, adults-only pub.") == []
    assert generator.faults(meaning, "The Old Ferry is a cheap pub.") == ["family friendly : no is not said"]
    wrong = generator.faults(meaning, "The Old Ferry is a cheap, family-friendly pub on the riverside.")
    assert wrong == ["family friendly : no is not said", "area : riverside is said", "family friendly : yes is said"]


def test_texts_of_a_meaning_differ_in_how_they_begin(examples: dict[str, list[Example]]) -> None:
    groups = group_by_prompt(examples["train"])
    varied = [len({text.split()[0] for text in e.references}) > 1 for e in groups]
    assert sum(varied) >= 0.8 * len(varied)


def fitting_share(rows: list[Example], tokenizer: Any) -> float:
    return len(encode(rows, tokenizer, 64)) / len(rows)


def test_examples_fit_into_64_tokens(examples: dict[str, list[Example]]) -> None:
    from loralib.bases.loading import load_tokenizer

    tokenizer = load_tokenizer("smollm2-135m")
    for rows in examples.values():
        assert fitting_share(rows, tokenizer) >= 0.95


@pytest.mark.golden
def test_examples_fit_into_64_tokens_of_gpt2(examples: dict[str, list[Example]], golden_dir: Path) -> None:
    from loralib.nlg.convert import load_bpe

    bpe = load_bpe(golden_dir / "gpt2_bpe")
    for rows in examples.values():
        lengths = [len(bpe.encode(row.prompt).ids) + len(bpe.encode(row.completion).ids) + 1 for row in rows]
        assert sum(length <= 64 for length in lengths) >= 0.95 * len(rows)
