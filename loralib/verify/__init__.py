"""Checks whether a server computes an adapter correctly, by comparing its log-probabilities with ones computed here."""

from __future__ import annotations

from .asking import ServerClient, Vocabulary, connect
from .judging import Reference, ServerLogprobs, Verdict, judge

__all__ = ["Reference", "ServerClient", "ServerLogprobs", "Verdict", "Vocabulary", "connect", "judge"]
