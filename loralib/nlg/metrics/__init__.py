"""Scores of generated text, each from raw texts alone and with a signature that says how it was made.

    from loralib.nlg.metrics import bleu

    print(bleu(references=[["a pub by the river", "a riverside pub"]], hypotheses=["a pub by the river"]))

Every metric takes, for each hypothesis, its references, and the hypotheses; `SCORES` lists them by the names that the
official scorers print.  The slot error rate takes meaning representations in place of references.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from .bleu import bleu
from .cider import cider
from .meteor import meteor
from .nist import nist
from .rouge import rouge_l
from .sacre import chrf, ter
from .score import References, Score
from .slots import SlotErrors, missing_slots, slot_error_rate

__all__ = [
    "SCORES",
    "References",
    "Score",
    "SlotErrors",
    "bleu",
    "chrf",
    "cider",
    "meteor",
    "missing_slots",
    "nist",
    "rouge_l",
    "slot_error_rate",
    "ter",
]

SCORES: Final[dict[str, Callable[[References, Sequence[str]], Score]]] = {
    "BLEU": bleu,
    "NIST": nist,
    "METEOR": meteor,
    "ROUGE_L": rouge_l,
    "CIDEr": cider,
    "TER": ter,
    "chrF": chrf,
}
