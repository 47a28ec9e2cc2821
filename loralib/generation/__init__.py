"""Generation: sampling and beam search for any causal language model, adapted or not."""

from __future__ import annotations

from .beam import Hypothesis, beam_search
from .sampling import Sampling, TokenLogprob
from .streaming import Generation, Generator, Piece, generate, stream

__all__ = [
    "Generation",
    "Generator",
    "Hypothesis",
    "Piece",
    "Sampling",
    "TokenLogprob",
    "beam_search",
    "generate",
    "stream",
]
