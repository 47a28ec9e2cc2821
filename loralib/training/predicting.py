"""Predicts labels and probabilities with a trained classifier, and measures them against known labels."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..bases.classifiers import class_names
from ..console import say
from ..data import Example, Labels, encode_classes
from ..engine.limits import input_limit
from ..errors import ConfigError
from ..modes import evaluating
from .class_metrics import class_figures, confusion, moments, number_figures, spearman
from .classification import ClassificationStep

__all__ = ["Prediction", "metrics_of", "predict"]


@dataclass(frozen=True)
class Prediction:
    """A classifier's prediction for one text.

    Attributes:
        label: the most probable label; for regression, the predicted number.
        probabilities: probability of each label, in the model's order; empty for regression.
    """

    label: str | float
    probabilities: Mapping[str, float] = field(default_factory=dict)


def predict(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str | tuple[str, str] | Example],
    *,
    batch_size: int = 16,
) -> list[Prediction]:
    """Classifies texts.

    Args:
        model: a text classifier, with or without an adapter: from `loralib.load_classifier`, or transformers'
            AutoModelForSequenceClassification.
        tokenizer: the model's tokenizer.
        texts: each a text, a pair of texts, or an `Example`; those longer than the model's context are truncated, and
            a note says how many.
        batch_size: how many texts to compute at once.  They are grouped by length, so their order does not matter.

    Returns:
        One prediction per text, in the same order.

    Raises:
        ConfigError: the model is not a text classifier, or batch_size is below 1.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}, expected at least 1")
    labels = Labels(class_names(model))
    limit = input_limit(model, tokenizer)
    encoded = encode_classes([_example(text) for text in texts], tokenizer, limit, Labels())
    for note in encoded.notes:
        say(f"note: {note}", file=sys.stderr)
    rows = encoded.examples
    step = ClassificationStep(model, labels)
    order = sorted(range(len(rows)), key=lambda number: (len(rows[number]), number))
    results: list[Prediction] = [Prediction("")] * len(rows)
    with evaluating(model.modules()), step._forward.hold_model("inference"):
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            for number, logits in zip(numbers, step.logits([rows[number] for number in numbers]), strict=True):
                results[number] = _prediction(logits, labels)
    return results


def metrics_of(model: nn.Module, examples: Sequence[Example], results: Sequence[Prediction]) -> dict[str, float]:
    """Returns the metrics of predictions if all examples have labels, as defined by GLUE and scikit-learn.

    Raises:
        DataError: the model does not know a label.
    """
    labels = Labels(class_names(model))
    labels.check(examples, "given", " that the model does not have")
    wanted = [labels.number(example.label) for example in examples if example.label is not None]
    if labels.are_numbers:
        found = [float(result.label) for result in results]
        sums = moments(torch.tensor(wanted), torch.tensor(found)).tolist()
        off = [(a - b) ** 2 for a, b in zip(wanted, found, strict=True)]
        rank = spearman([float(each) for each in wanted], found)
        return {**number_figures(sums, len(wanted)), "spearman": rank, "mse": sum(off) / len(off)}
    taken = torch.tensor([labels.names.index(str(result.label)) for result in results])
    counts = confusion(torch.tensor(wanted, dtype=torch.long), taken, len(labels.names))
    return class_figures(counts.tolist(), len(labels.names))


def _example(text: str | tuple[str, str] | Example) -> Example:
    if isinstance(text, Example):
        return Example(text.segments, (), text.source, text_pair=text.text_pair)
    first, second = (text, None) if isinstance(text, str) else text
    return Example(((first, False),), (), repr(first[:40]), text_pair=second)


def _prediction(logits: torch.Tensor, labels: Labels) -> Prediction:
    if labels.are_numbers:
        return Prediction(float(logits[0]))
    shares = logits.double().softmax(-1).tolist()
    return Prediction(labels.names[int(logits.argmax())], dict(zip(labels.names, shares, strict=True)))
