"""Classification metrics, computed from sums (confusion counts or moments) that add up over batches and processes.

Definitions follow GLUE and scikit-learn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

__all__ = ["METRICS", "class_figures", "confusion", "moments", "number_figures", "spearman"]

METRICS = ("accuracy", "f1", "macro_f1", "matthews", "pearson")  # for all of them, higher is better


def confusion(labels: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Returns a flattened confusion matrix (C * C,), with a row per true class.

    Args:
        labels: (B,) true classes.
        predicted: (B,) predicted classes.
        classes: C.
    """
    return F.one_hot(labels * classes + predicted, classes * classes).sum(0)


def class_figures(counts: Sequence[float], classes: int) -> dict[str, float]:
    """Returns accuracy, F1 and the Matthews correlation coefficient from counts of `confusion`.

    With two classes, f1 is that of the second one, as in GLUE; macro_f1 averages over all classes that occur.

    >>> {name: round(value, 3) for name, value in class_figures([3, 1, 2, 4], 2).items()}
    {'accuracy': 0.7, 'f1': 0.727, 'macro_f1': 0.697, 'matthews': 0.408}
    """
    total, hits = sum(counts), [counts[k * classes + k] for k in range(classes)]
    true = [sum(counts[k * classes : (k + 1) * classes]) for k in range(classes)]  # number of texts of each class
    taken = [sum(counts[k::classes]) for k in range(classes)]  # number of texts predicted as each class
    each = {k: 2 * hits[k] / (true[k] + taken[k]) for k in range(classes) if true[k] + taken[k]}
    figures = {"accuracy": sum(hits) / max(1.0, total)}
    if classes == 2:
        figures["f1"] = each.get(1, 0.0)
    figures["macro_f1"] = sum(each.values()) / max(1, len(each))
    # Gorodkin 2004, equation 8; for two classes it equals the correlation of prediction and truth (Matthews 1975).
    covariance = sum(hits) * total - sum(p * t for p, t in zip(taken, true, strict=True))
    spread = (total**2 - sum(p * p for p in taken)) * (total**2 - sum(t * t for t in true))
    figures["matthews"] = covariance / math.sqrt(spread) if spread > 0 else 0.0
    return figures


def moments(labels: Tensor, predicted: Tensor) -> Tensor:
    """Returns the sums (5,) from which `number_figures` computes a correlation: x, y, x x, y y, x y."""
    x, y = labels.double(), predicted.double()
    return (x.sum() * 0).new_tensor([float(each.sum()) for each in (x, y, x * x, y * y, x * y)])


def number_figures(sums: Sequence[float], count: float) -> dict[str, float]:
    """Returns Pearson's correlation from sums of `moments` over `count` texts; 0 if either side is constant."""
    x, y, xx, yy, xy = (each / max(1.0, count) for each in sums)
    spread = max(0.0, xx - x * x) * max(0.0, yy - y * y)
    return {"pearson": (xy - x * y) / math.sqrt(spread) if spread > 1e-24 else 0.0}


def spearman(labels: Sequence[float], predicted: Sequence[float]) -> float:
    """Returns Spearman's correlation: Pearson's correlation of the ranks, with ties sharing their mean rank.

    >>> spearman([1.0, 2.0, 3.0, 4.0], [0.1, 0.5, 0.4, 0.9])
    0.8
    """
    x, y = _ranks(labels), _ranks(predicted)
    sums = [sum(x), sum(y), sum(a * a for a in x), sum(b * b for b in y), sum(a * b for a, b in zip(x, y, strict=True))]
    return round(number_figures(sums, len(x))["pearson"], 12)


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks, start = [0.0] * len(values), 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for place in range(start, end):
            ranks[order[place]] = (start + end + 1) / 2
        start = end
    return ranks
