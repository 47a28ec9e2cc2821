"""Does a server compute an adapter as it should?  Asked over HTTP, and compared with what is computed here."""

from __future__ import annotations

from .asking import Asker, Vocabulary, connect
from .judging import Observed, Reference, Verdict, judge

__all__ = ["Asker", "Observed", "Reference", "Verdict", "Vocabulary", "connect", "judge"]
