"""What is taken from sacrebleu: mteval-v13a tokens, TER and chrF."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import zip_longest
from typing import Any

from ...errors import MissingDependencyError
from .score import References, Score, check

__all__ = ["chrf", "ter", "words_13a"]


def ter(references: References, hypotheses: Sequence[str]) -> Score:
    """Translation edit rate (Snover et al. 2006): edits and shifts to the nearest reference, divided by average length.

    Args:
        references: the references of each hypothesis.
        hypotheses: the texts to score.

    Returns:
        sacrebleu's TER with its defaults (case ignored, words split only at spaces), in percent: lower is better.

    Raises:
        DataError: as for `check`.
        MissingDependencyError: sacrebleu is not installed.

    >>> ter([["a b c d"], ["x y", "a b"]], ["a b c e", "a b"]).value.__round__(1)
    16.7
    """
    check(references, hypotheses)
    metric = _sacrebleu().TER()
    edits, length = 0, 0.0
    for texts, hypothesis in zip(references, hypotheses, strict=True):
        fewest = min(_edits(metric, hypothesis, texts))
        edits += fewest
        length += sum(len(text.split()) for text in texts) / len(texts)
    value = 100 * edits / length if length else 100.0 * (edits > 0)
    counts = {len(texts) for texts in references}
    metric.num_refs = counts.pop() if len(counts) == 1 else -1  # for the signature, as in sacrebleu's own corpus_score
    return Score("TER", value, str(metric.get_signature()), higher_is_better=False)


def _edits(metric: Any, hypothesis: str, texts: Sequence[str]) -> Iterator[int]:
    """Yields the number of edits to each reference, except those that cannot be nearer than an earlier one.

    A word that only one of two texts has costs at least one edit, whatever the order. This lower bound skips about two
    references in three, and sacrebleu is slow.
    """
    words = Counter(hypothesis.lower().split())

    def least(text: str) -> int:
        ideal = Counter(text.lower().split())
        return max((words - ideal).total(), (ideal - words).total())

    fewest: int | None = None
    for text in sorted(set(texts), key=least):
        if fewest is None or least(text) < fewest:
            edits = int(metric.sentence_score(hypothesis, [text]).num_edits)
            fewest = edits if fewest is None else min(fewest, edits)
            yield edits


def chrf(references: References, hypotheses: Sequence[str]) -> Score:
    """Character n-gram F-score (Popović 2015): n up to 6, recall twice as important as precision.

    Args:
        references: the references of each hypothesis; the best one counts.
        hypotheses: the texts to score.

    Returns:
        sacrebleu's chrF2 with its defaults, in percent.

    Raises:
        DataError: as for `check`.
        MissingDependencyError: sacrebleu is not installed.

    >>> chrf([["a river bank"]], ["a river bank"]).value
    100.0
    """
    check(references, hypotheses)
    metric = _sacrebleu().CHRF()
    value = metric.corpus_score(list(hypotheses), _lines(references)).score
    return Score("chrF", value, str(metric.get_signature()))


@lru_cache(maxsize=65536)
def words_13a(text: str) -> tuple[str, ...]:
    """Splits a text as mteval-v13a does, in lower case; an empty text gives one empty word, as in E2E's scorer.

    >>> words_13a("It's £20-25, isn't it?")
    ("it's", '£20', '-', '25', ',', "isn't", 'it', '?')
    """
    return tuple(_tokenizer()(text).lower().split(" "))


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    _sacrebleu()
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()  # type: ignore[no-untyped-call]


def _lines(references: References) -> list[list[str | None]]:
    """Returns all first references, all second ones, and so on; None where a hypothesis has fewer."""
    return [list(line) for line in zip_longest(*references)]


def _sacrebleu() -> Any:
    try:
        import sacrebleu.metrics
    except ImportError as error:
        raise MissingDependencyError("BLEU, NIST, TER and chrF need sacrebleu: pip install 'loralib[eval]'") from error
    return sacrebleu.metrics
