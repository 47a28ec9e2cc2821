"""Labels and probabilities from a trained classifier, and how good they are where the right ones are known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..bases.classifiers import class_names
from ..data import Example, Labels, encode_classes
from ..engine.limits import context_length
from ..engine.placement import evaluating
from ..errors import ConfigError
from .class_metrics import class_figures, confusion, moments, number_figures, spearman
from .classification import ClassificationStep

__all__ = ["Prediction", "metrics_of", "predict"]


@dataclass(frozen=True)
class Prediction:
    """What a classifier makes of a text.

    Attributes:
        label: the most probable label; where it predicts numbers, the number.
        probabilities: of each label, in the model's order; empty where it predicts numbers.
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
        model: a classifier of texts, with or without an adapter: from `loralib.load_classifier`, or transformers'
            AutoModelForSequenceClassification.
        tokenizer: the model's.
        texts: each a text, or two, or an `Example`; those of more tokens than the model takes are cut.
        batch_size: how many are computed at once.  Texts of like length go together, so the order is of no matter.

    Returns:
        A prediction for each, in their order.

    Raises:
        ConfigError: the model is no classifier of texts, or batch_size is below 1.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}, expected at least 1")
    labels = Labels(class_names(model))
    rows = encode_classes([_example(text) for text in texts], tokenizer, _limit(model, tokenizer), Labels()).examples
    step = ClassificationStep(model, labels)
    order = sorted(range(len(rows)), key=lambda number: (len(rows[number]), number))
    results: list[Prediction] = [Prediction("")] * len(rows)
    with evaluating(model.modules()), step._forward.held("inference"):
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            for number, logits in zip(numbers, step.logits([rows[number] for number in numbers]), strict=True):
                results[number] = _prediction(logits, labels)
    return results


def metrics_of(model: nn.Module, examples: Sequence[Example], results: Sequence[Prediction]) -> dict[str, float]:
    """Returns how good predictions are, where all examples have labels: as GLUE and scikit-learn define it.

    Raises:
        DataError: a label is none of the model's.
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


def _limit(model: nn.Module, tokenizer: Any) -> int | None:
    limits = [context_length(model), getattr(tokenizer, "model_max_length", None)]
    return min((limit for limit in limits if limit is not None and limit < 1 << 30), default=None)


def _prediction(logits: torch.Tensor, labels: Labels) -> Prediction:
    if labels.are_numbers:
        return Prediction(float(logits[0]))
    shares = logits.double().softmax(-1).tolist()
    return Prediction(labels.names[int(logits.argmax())], dict(zip(labels.names, shares, strict=True)))
