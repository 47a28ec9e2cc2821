"""BLEU (Papineni et al. 2002) as the E2E NLG challenge's scorer computes it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from .sacre import words_13a
from .score import References, Score, check, signature

__all__ = ["best_counts", "bleu", "ngrams"]

_MOST = 4  # the length of the longest n-grams


def bleu(references: References, hypotheses: Sequence[str]) -> Score:
    """Corpus BLEU-4 with the closest reference length, ignoring case, on mteval-v13a tokens.

    It is what sacrebleu calls ``case:lc|tok:13a|smooth:none``, and differs only for very short hypotheses: an empty one
    counts as one empty token, the number of n-grams is length - n + 1 even where that is negative, and a precision of
    zero is replaced by a tiny number.

    Args:
        references: the references of each hypothesis.
        hypotheses: the texts to score.

    Returns:
        The score, from 0 to 1.

    Raises:
        DataError: as for `check`.

    >>> bleu([["The Mill serves tea by the river."]], ["The Mill serves coffee by the river."]).value.__round__(4)
    0.5
    """
    check(references, hypotheses)
    hits, totals = [0] * _MOST, [0] * _MOST
    hypothesis_length = reference_length = 0
    for texts, hypothesis in zip(references, hypotheses, strict=True):
        words, ideals = words_13a(hypothesis), [words_13a(text) for text in texts]
        for n in range(1, _MOST + 1):
            hits[n - 1] += (ngrams(words, n) & best_counts(ideals, n)).total()
            totals[n - 1] += len(words) - n + 1
        hypothesis_length += len(words)
        reference_length += min((len(ideal) for ideal in ideals), key=lambda length: (abs(length - len(words)), length))
    precisions = [max(hit, 1e-15) / max(total, 1e-9) for hit, total in zip(hits, totals, strict=True)]
    brevity = min(1.0, math.exp(1 - reference_length / hypothesis_length))
    value = brevity * math.exp(sum(map(math.log, precisions)) / _MOST)
    made = signature(references, case="lc", eff="no", tok="13a", smooth="none", like="e2e-metrics")
    return Score("BLEU", value, made)


def ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    """Counts the n-grams of a text.

    >>> ngrams(["a", "b", "a", "b"], 2).most_common(1)
    [(('a', 'b'), 2)]
    """
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))


def best_counts(texts: Sequence[Sequence[str]], n: int) -> Counter[tuple[str, ...]]:
    """Returns, for each n-gram, its largest count in any one of the texts."""
    counts: Counter[tuple[str, ...]] = Counter()
    for words in texts:
        counts |= ngrams(words, n)
    return counts
