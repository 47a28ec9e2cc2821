"""What all metrics share: the score with its signature, and checks of what is scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ...errors import DataError, list_faults

__all__ = ["References", "Score", "check", "signature"]

References = Sequence[Sequence[str]]
"""For each hypothesis its references: one or more, not always equally many."""

_VERSION = "1"  # of the scores' definitions: raised when a number changes


@dataclass(frozen=True)
class Score:
    """A score and how it was made.

    Attributes:
        name: as the official scorers print it.
        value: in the scale of the program that defines it (``signature`` names it).
        signature: everything that changes the number, in sacrebleu's form.
        instances: the score of each hypothesis, for metrics that are made of them.
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
    """Says how a score was made, in sacrebleu's form: ``nrefs:1|case:lc|...``.

    >>> signature([["a"], ["b", "c"]], case="lc")
    'nrefs:var|case:lc|version:1'
    """
    counts = {len(texts) for texts in references}
    facts = {"nrefs": str(counts.pop()) if len(counts) == 1 else "var", **facts, "version": _VERSION}
    return "|".join(f"{name}:{fact}" for name, fact in facts.items())


def check(references: References, hypotheses: Sequence[str]) -> None:
    """Makes sure that there is something to score.

    Raises:
        DataError: no hypotheses, hypotheses that are all empty, other numbers of references and hypotheses,
            or hypotheses without a reference.

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
