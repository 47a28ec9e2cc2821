"""NIST (Doddington 2002) as the E2E NLG challenge's scorer computes it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from .bleu import best_counts, ngrams
from .sacre import words_13a
from .score import References, Score, check, signature

__all__ = ["nist"]

_MOST = 5  # the length of the longest n-grams
_BETA = -math.log(0.5) / math.log(1.5) ** 2  # hypotheses of 2/3 of the references' length score half


def nist(references: References, hypotheses: Sequence[str]) -> Score:
    """Corpus NIST-5: n-gram matches weighted by information in the references (Doddington 2002, equations 2 and 3).

    An n-gram's information is log2(occurrences of its first n-1 words / its own occurrences) in all references. Case is
    ignored, tokens are mteval-v13a's, and the length of hypotheses is compared with the average length of their
    references. As in `bleu`, the number of n-grams can be negative.

    Args:
        references: the references of each hypothesis.
        hypotheses: the texts to score.

    Returns:
        The score, from 0 upwards.

    Raises:
        DataError: as for `check`.

    >>> nist([["a b c d e f"]], ["a b c d e f"]).value.__round__(4)  # log2(6) for words, 0 for what must follow
    2.585
    """
    check(references, hypotheses)
    occurrences: Counter[tuple[str, ...]] = Counter()
    hits: list[Counter[tuple[str, ...]]] = [Counter() for _ in range(_MOST)]
    totals = [0] * _MOST
    average_length = 0.0
    for texts, hypothesis in zip(references, hypotheses, strict=True):
        words, ideals = words_13a(hypothesis), [words_13a(text) for text in texts]
        for n in range(1, _MOST + 1):
            hits[n - 1] += ngrams(words, n) & best_counts(ideals, n)
            totals[n - 1] += len(words) - n + 1
            for ideal in ideals:
                occurrences.update(ngrams(ideal, n))
        length = sum(map(len, ideals))
        occurrences[()] += length
        average_length += length / len(ideals)

    def information(ngram: tuple[str, ...]) -> float:
        return math.log2(occurrences[ngram[:-1]] / occurrences[ngram])

    gains = (sum(information(ngram) * count for ngram, count in counts.items()) for counts in hits)
    gain = sum(gain / (total or 1) for gain, total in zip(gains, totals, strict=True))
    ratio = min(1.0, totals[0] / average_length)
    value = gain * math.exp(-_BETA * math.log(ratio) ** 2)
    made = signature(references, case="lc", tok="13a", ngram="5", like="e2e-metrics")
    return Score("NIST", value, made)
