"""Generation: sampling and beam search for any causal language model, adapted or not."""

from __future__ import annotations

from .sampling import Sampling
from .stream import Generation, Piece, generate, stream

__all__ = ["Generation", "Piece", "Sampling", "generate", "stream"]
