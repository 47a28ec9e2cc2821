"""The learning rate of a run whose user gave none: by the model's width and the examples of an update."""

from __future__ import annotations

import math

from ..console import counted

__all__ = ["automatic_learning_rate"]

_RATE, _WIDTH, _EXAMPLES, _RATIO = 2e-4, 576, 8, 16.0  # where the rule starts from: SmolLM2-135M


def automatic_learning_rate(
    parameters: int,
    hidden_size: int | None,
    rank: int,
    alpha: float,
    examples_per_update: int,
    loraplus_lr_ratio: float = _RATIO,
) -> tuple[float, str]:
    """Chooses the peak learning rate of A; B learns `loraplus_lr_ratio` times faster.

    Wider models take smaller rates, and updates of more examples larger ones, as the square root of their number.  The
    rate hardly depends on the rank where lora_alpha is in proportion to it.

    Args:
        parameters: of the base model.
        hidden_size: width of the model; None: unknown, and estimated from the parameters.
        rank: of the adapter.
        alpha: its lora_alpha.
        examples_per_update: examples of a step times the steps of an update.
        loraplus_lr_ratio: learning rate of B divided by that of A.

    Returns:
        The rate, rounded to two digits, and the reason in words.

    >>> automatic_learning_rate(135_000_000, 576, 16, 32.0, 8)
    (0.0002, 'width 576, 8 examples an update')
    >>> automatic_learning_rate(135_000_000, None, 16, 32.0, 8)[1]
    'taking a width of 877, since the model does not say it, from 135,000,000 parameters; 8 examples an update'
    """
    width = hidden_size or max(1, round((5 * parameters) ** (1 / 3)))  # 12 * layers * width^2, in the usual shapes
    rate = _RATE * (_WIDTH / width) ** 0.78 * math.sqrt(examples_per_update / _EXAMPLES)
    rate *= math.sqrt(_RATIO / loraplus_lr_ratio)
    seen = f"width {width:,},"
    if hidden_size is None:
        seen = f"taking a width of {width:,}, since the model does not say it, from {parameters:,} parameters;"
    return float(f"{rate:.2g}"), f"{seen} {counted(examples_per_update, 'example')} an update"
