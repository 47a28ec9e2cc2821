"""Metrics for generated text, each computed from raw text and reported with a signature that says how.

    from loralib.nlg.metrics import SCORES

    print(SCORES["BLEU"](references=[["a pub by the river", "a riverside pub"]], hypotheses=["a pub by the river"]))

Every metric takes the references of each hypothesis, and the hypotheses. `SCORES` maps the names that the official
scorers print to the metrics. The slot error rate takes meaning representations in place of references.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from . import bleu, cider, meteor, nist, rouge, sacre
from .score import References, Score
from .slots import SlotErrors, missing_slots, slot_error_rate

__all__ = [
    "SCORES",
    "References",
    "Score",
    "SlotErrors",
    "missing_slots",
    "slot_error_rate",
]

SCORES: Final[dict[str, Callable[[References, Sequence[str]], Score]]] = {
    "BLEU": bleu.bleu,
    "NIST": nist.nist,
    "METEOR": meteor.meteor,
    "ROUGE_L": rouge.rouge_l,
    "CIDEr": cider.cider,
    "TER": sacre.ter,
    "chrF": sacre.chrf,
}
