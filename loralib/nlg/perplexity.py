"""Perplexity: how well a model predicts human-written text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..data import Example, encode
from ..engine.limits import context_length, require_ids_in_table
from ..errors import ConfigError
from ..training.objective import evaluate_loss
from ..training.ranks import ALONE, Ranks
from ..training.step import make_step
from .metrics import Score

__all__ = ["Perplexity", "perplexity"]

_VERSION = "1"  # raise it when a change alters a number
_NO_LIMIT = 2**31


@dataclass(frozen=True)
class Perplexity:
    """A model's loss on texts.

    Attributes:
        loss: average loss per token, in nats.
        tokens: number of tokens, end tokens included.
        words: number of words, separated by whitespace.
        texts: number of texts.
        dropped: number of texts that are empty or longer than the model's context.
        signature: how the numbers were computed.
    """

    loss: float
    tokens: int
    words: int
    texts: int
    dropped: int
    signature: str

    @property
    def per_token(self) -> float:
        """``exp`` of the loss per token, for comparing models with the same tokenizer."""
        return math.exp(min(self.loss, 700.0))

    @property
    def per_word(self) -> float:
        """``exp`` of the loss per word, for comparing models with different tokenizers."""
        return math.exp(min(self.loss * self.tokens / self.words, 700.0)) if self.words else math.inf

    @property
    def scores(self) -> dict[str, Score]:
        """Returns both as scores; lower is better."""
        values = {"PPL": ("token", self.per_token), "PPL_word": ("word", self.per_word)}
        return {
            name: Score(name, value, f"per:{unit}|{self.signature}", higher_is_better=False)
            for name, (unit, value) in values.items()
        }


def perplexity(model: nn.Module, tokenizer: Any, examples: Sequence[Example], ranks: Ranks = ALONE) -> Perplexity:
    """Measures the loss on completions, each given its prompt, including the end token.

    Args:
        model: a causal language model, adapted or not.
        tokenizer: its tokenizer.
        examples: the texts; each one counts, even if several have the same prompt.
        ranks: the processes that share the work.

    Raises:
        ConfigError: the loss is not finite in the model's dtype.
        DataError: no text fits the model's context, or the tokenizer belongs to another model.
        UnsupportedModelError: the model is not causal.
    """
    encoded = encode(examples, tokenizer, context_length(model) or _NO_LIMIT)
    require_ids_in_table(model, [example.ids for example in encoded.examples], "text")
    loss = evaluate_loss(make_step(model), model, encoded.examples, ranks=ranks)
    if not math.isfinite(loss):
        raise ConfigError(f"the loss on these texts is {loss}: the dtype overflows. Load the model with dtype fp32.")
    tokens = sum(sum(example.trained) for example in encoded.examples)
    texts = {id(example): example for example in encoded.texts}.values()  # plain text may span several windows
    words = sum(len(answer.split()) for text in texts for answer in text.trained_texts)
    signature = f"given:prompt|end:counted|words:blanks|log:e|version:{_VERSION}"
    return Perplexity(loss, tokens, words, len(texts), sum(encoded.dropped.values()), signature)
