"""CIDEr-D (Vedantam, Zitnick and Parikh 2015) as COCO's and E2E's scorers compute it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from .bleu import ngrams
from .ptb import ptb_instances
from .score import References, Score, check, signature

__all__ = ["cider"]

_MOST = 4  # the length of the longest n-grams
_SIGMA = 6.0  # of the Gaussian penalty on differences in length

Ngram = tuple[str, ...]


def cider(references: References, hypotheses: Sequence[str]) -> Score:
    """The similarity of hypotheses to their references in TF-IDF weighted n-grams (section 6, CIDEr-D).

    For each n from 1 to 4: the cosine of the clipped hypothesis weights and the reference weights, times a Gaussian of
    the difference in length (counted in bigrams). The score is 10 times the mean over n and references, averaged over
    hypotheses. An n-gram's IDF is log(hypotheses / hypotheses with it in a reference) within the texts scored, so the
    score depends on the whole file; for a single hypothesis it is 0.

    Args:
        references: the references of each hypothesis.
        hypotheses: the texts to score.

    Returns:
        The score, from 0 to 10, with that of each hypothesis.

    Raises:
        DataError: as for `check`.

    >>> texts = ["a pub by the river", "the mill serves tea", "no kids here please"]
    >>> cider([[text] for text in texts], texts).value.__round__(4)
    10.0
    """
    check(references, hypotheses)
    instances = ptb_instances(references, hypotheses)
    frequency = Counter(
        ngram for _, texts in instances for ngram in set().union(*(_all_ngrams(_words(text)) for text in texts))
    )

    def vector(words: Sequence[str]) -> _Vector:
        weights: list[dict[Ngram, float]] = [{} for _ in range(_MOST)]
        for ngram, count in _all_ngrams(words).items():
            weights[len(ngram) - 1][ngram] = count * (math.log(len(instances)) - math.log(max(1, frequency[ngram])))
        norms = [math.sqrt(sum(weight**2 for weight in group.values())) for group in weights]
        return _Vector(weights, norms, max(0, len(words) - 1))

    scores = []
    for hypothesis, texts in instances:
        candidate = vector(_words(hypothesis))
        likeness = [_likeness(candidate, vector(_words(text))) for text in texts]
        scores.append(10 * sum(likeness) / len(likeness))
    made = signature(references, case="lc", tok="ptb-3.4.1", ngram="4", sigma="6", idf="refs", like="coco-caption")
    return Score("CIDEr", sum(scores) / len(scores), made, tuple(scores))


class _Vector(NamedTuple):
    weights: list[dict[Ngram, float]]  # one dictionary for each n
    norms: list[float]
    bigrams: int


def _likeness(candidate: _Vector, ideal: _Vector) -> float:
    total = 0.0
    for n in range(_MOST):
        weights = ideal.weights[n]
        clipped = (min(weight, weights.get(ngram, 0.0)) * weights.get(ngram, 0.0)
                   for ngram, weight in candidate.weights[n].items())  # fmt: skip
        total += sum(clipped) / (candidate.norms[n] * ideal.norms[n] or 1.0)
    return total / _MOST * math.exp(-((candidate.bigrams - ideal.bigrams) ** 2) / (2 * _SIGMA**2))


def _words(words: Sequence[str]) -> list[str]:
    """Splits at no-break spaces too; only for CIDEr do the scorers split tokens at every kind of space."""
    return " ".join(words).split()


def _all_ngrams(words: Sequence[str]) -> Counter[Ngram]:
    counts: Counter[Ngram] = Counter()
    for n in range(1, _MOST + 1):
        counts.update(ngrams(words, n))
    return counts
