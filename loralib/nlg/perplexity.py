"""Perplexity: how well a model, adapted or not, foretells texts that people wrote."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..data import Example, encode
from ..errors import ConfigError
from ..generation.limits import context_length
from ..training.step import evaluate_loss, make_step
from .metrics import Score

__all__ = ["Perplexity", "perplexity"]

_VERSION = "1"  # raised when a number changes
_NO_LIMIT = 2**31


@dataclass(frozen=True)
class Perplexity:
    """What a model loses on texts.

    Attributes:
        loss: average over the tokens, in nats.
        tokens: how many, end tokens included.
        words: how many, as blanks separate them.
        texts: how many.
        dropped: texts that are longer than the model's context, or empty.
        signature: how it was made.
    """

    loss: float
    tokens: int
    words: int
    texts: int
    dropped: int
    signature: str

    @property
    def per_token(self) -> float:
        """``exp`` of the loss a token: comparable between models with the same tokenizer."""
        return math.exp(min(self.loss, 700.0))

    @property
    def per_word(self) -> float:
        """``exp`` of the loss a word: comparable between models with other tokenizers too."""
        return math.exp(min(self.loss * self.tokens / self.words, 700.0)) if self.words else math.inf

    @property
    def scores(self) -> dict[str, Score]:
        """Both as scores, lower is better."""
        values = {"PPL": ("token", self.per_token), "PPL_word": ("word", self.per_word)}
        return {
            name: Score(name, value, f"per:{unit}|{self.signature}", higher_is_better=False)
            for name, (unit, value) in values.items()
        }


def perplexity(model: nn.Module, tokenizer: Any, examples: Sequence[Example]) -> Perplexity:
    """Measures the loss of completions, each after its prompt, with the end token that follows it.

    Args:
        model: a causal language model, adapted or not.
        tokenizer: its tokenizer.
        examples: what to measure on; each text counts, also several of one prompt.

    Raises:
        ConfigError: the loss is no number in the dtype that the model is in.
        DataError: no text is left.
    """
    encoded = encode(examples, tokenizer, context_length(model) or _NO_LIMIT)
    loss = evaluate_loss(make_step(model), model, encoded.examples)
    if not math.isfinite(loss):
        raise ConfigError(f"the loss on these texts is {loss}: the model's numbers overflow. Load it with dtype fp32.")
    tokens = sum(sum(example.trained) for example in encoded.examples)
    texts = {id(example): example for example in encoded.texts}.values()  # plain text comes in several windows
    words = sum(
        len(
            (
                text.messages[-1][1] if text.messages else "".join(part for part, trained in text.segments if trained)
            ).split()
        )
        for text in texts
    )
    signature = f"given:prompt|end:counted|words:blanks|log:e|version:{_VERSION}"
    return Perplexity(loss, tokens, words, len(texts), sum(encoded.dropped.values()), signature)
