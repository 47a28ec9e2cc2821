"""Generation: sampling and beam search for any causal language model, adapted or not."""

from __future__ import annotations

from .beam import Hypothesis, beam_search
from .sampling import Sampling, TokenLogprob
from .streaming import Generation, Generator, TextChunk, generate, stream

__all__ = [
    "Generation",
    "Generator",
    "Hypothesis",
    "Sampling",
    "TextChunk",
    "TokenLogprob",
    "beam_search",
    "generate",
    "stream",
]
