"""Checks whether a server computes an adapter correctly, by comparing its log-probabilities with ones computed here."""

from __future__ import annotations

from .asking import Asker, Vocabulary, connect
from .judging import Observed, Reference, Verdict, judge

__all__ = ["Asker", "Observed", "Reference", "Verdict", "Vocabulary", "connect", "judge"]
