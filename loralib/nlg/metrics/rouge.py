"""ROUGE-L (Lin 2004) as COCO's and E2E's scorers compute it."""

from __future__ import annotations

from collections.abc import Sequence

from .ptb import ptb_instances
from .score import References, Score, check, signature

__all__ = ["lcs_length", "rouge_l"]

_BETA = 1.2  # weight of recall relative to precision


def rouge_l(references: References, hypotheses: Sequence[str]) -> Score:
    """The mean over hypotheses of the F-score of the longest common subsequence with the references.

    Precision and recall are each the best over all references, possibly from different ones. An empty text counts as
    one word that equals only that of another empty text.

    Args:
        references: the references of each hypothesis.
        hypotheses: the texts to score.

    Returns:
        The score, from 0 to 1, with that of each hypothesis.

    Raises:
        DataError: as for `check`.

    >>> rouge_l([["a family-friendly pub by the river"]], ["a pub by the river"]).value.__round__(4)  # P 1, R 5/6
    0.8944
    """
    check(references, hypotheses)
    scores = []
    for hypothesis, texts in ptb_instances(references, hypotheses):
        words = hypothesis or ("",)
        ideals = [text or ("",) for text in texts]
        common = [lcs_length(words, ideal) for ideal in ideals]
        precision = max(length / len(words) for length in common)
        recall = max(length / len(ideal) for length, ideal in zip(common, ideals, strict=True))
        weighted = recall + _BETA**2 * precision
        scores.append((1 + _BETA**2) * precision * recall / weighted if weighted else 0.0)
    made = signature(references, case="lc", tok="ptb-3.4.1", beta=str(_BETA), like="coco-caption")
    return Score("ROUGE_L", sum(scores) / len(scores), made, tuple(scores))


def lcs_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Returns the length of the longest common subsequence, with a table row held in an integer's bits (Hyyrö 2004).

    >>> lcs_length("a b c d".split(), "a c x d".split())
    3
    """
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    full = (1 << len(first)) - 1
    row = full  # each zero bit marks an increment along the row
    for word in second:
        matches = row & places.get(word, 0)
        row = (row + matches | row - matches) & full
    return (full ^ row).bit_count()
