"""What all metrics share: the score with its signature, and checks of the input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ...errors import DataError, list_faults

__all__ = ["References", "Score", "check", "signature"]

References = Sequence[Sequence[str]]
"""The references of each hypothesis: at least one, in varying number."""

_VERSION = "1"  # version of the scores' definitions; raise it when a change alters a number


@dataclass(frozen=True)
class Score:
    """A score and how it was computed.

    Attributes:
        name: as the official scorers print it.
        value: on the scale of the program that defines the metric (named in ``signature``).
        signature: everything that affects the number, in sacrebleu's format.
        instances: the score of each hypothesis, for metrics that have one.
        higher_is_better: False for error rates.
    """

    name: str
    value: float
    signature: str
    instances: tuple[float, ...] = field(default=(), repr=False)
    higher_is_better: bool = True

    def __str__(self) -> str:
        return f"{self.name}|{self.signature} = {self.value:.4f}"


def signature(references: References, **facts: str) -> str:
    """Returns a description of how a score was computed, in sacrebleu's format: ``nrefs:1|case:lc|...``.

    >>> signature([["a"], ["b", "c"]], case="lc")
    'nrefs:var|case:lc|version:1'
    """
    counts = {len(texts) for texts in references}
    facts = {"nrefs": str(counts.pop()) if len(counts) == 1 else "var", **facts, "version": _VERSION}
    return "|".join(f"{name}:{fact}" for name, fact in facts.items())


def check(references: References, hypotheses: Sequence[str]) -> None:
    """Checks that there is something to score.

    Raises:
        DataError: there are no hypotheses, all are empty, their number differs from that of the groups of references,
            or one has no reference.

    >>> check([["a"]], ["a", "b"])
    Traceback (most recent call last):
        ...
    loralib.errors.DataError: 2 hypotheses, but references for 1. Give one hypothesis per group of references.
    """
    if len(references) != len(hypotheses):
        raise DataError(
            f"{len(hypotheses)} hypotheses, but references for {len(references)}. Give one hypothesis per group of "
            "references."
        )
    if not any(hypothesis.strip() for hypothesis in hypotheses):
        number = f"all {len(hypotheses)} hypotheses are empty" if hypotheses else "there are no hypotheses"
        raise DataError(f"{number}, so nothing can be scored. Check how they were written.")
    faults = [f"hypothesis {number} has no reference" for number, texts in enumerate(references, 1) if not texts]
    if faults:
        raise DataError(list_faults("a reference is missing", faults, "Give each hypothesis at least one reference."))
