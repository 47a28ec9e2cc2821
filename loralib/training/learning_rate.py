"""The default learning rate, from the model's width, the adapter's scaling and the batch size."""

from __future__ import annotations

import math

__all__ = ["automatic_learning_rate"]

_RATE, _WIDTH, _RATIO, _ALPHA = 1.7e-4, 576, 4.0, 32.0  # measured on SmolLM2-135M: docs/results/learning-rates.md
_MOST_TOKENS = 90  # beyond this many tokens per update, a higher rate did not help


def automatic_learning_rate(
    parameters: int,
    hidden_size: int | None,
    alpha: float,
    trained_tokens: float,
    loraplus_lr_ratio: float = _RATIO,
    objective: str = "clm",
) -> tuple[float, str]:
    """Chooses the peak learning rate of A; B learns `loraplus_lr_ratio` times faster.

        lr = 1.7e-4 * sqrt(min(T, 90)) * (576 / width)^0.78 * min(2, 32 / alpha) * sqrt(4 / ratio)

    Gradient noise falls with the square root of the number T of tokens averaged, and Adam's best rate rises with it
    until noise is no longer the limit.  The exponent for the width comes from published sweeps over Llama shapes. The
    rank r itself does not matter: r directions with scaling lora_alpha / r add up to lora_alpha.

    Args:
        parameters: number of parameters of the base model.
        hidden_size: width of the model; None: unknown, and estimated from the number of parameters.
        alpha: lora_alpha.
        trained_tokens: T, the average number of trained tokens per update.
        loraplus_lr_ratio: learning rate of B divided by that of A.
        objective: "dpo" gets a tenth of the rate, as in published recipes (Tulu 3 uses a tenth, Zephyr less).

    Returns:
        The rate, rounded to two digits, and the reason in words.

    >>> automatic_learning_rate(135_000_000, 576, 32.0, 90)
    (0.0016, 'width 576, lora_alpha 32, 90 trained tokens per update')
    >>> automatic_learning_rate(135_000_000, None, 32.0, 90)[1].partition(";")[0]
    'assuming a width of 877, estimated from 135,000,000 parameters, since the model does not state it'
    """
    width = hidden_size or max(1, round((5 * parameters) ** (1 / 3)))  # 12 * layers * width^2, for usual shapes
    rate = _RATE * math.sqrt(min(max(1, trained_tokens), _MOST_TOKENS)) * (_WIDTH / width) ** 0.78
    rate *= min(2.0, _ALPHA / abs(alpha)) * math.sqrt(_RATIO / loraplus_lr_ratio)
    if objective == "dpo":
        rate /= 10
    seen = f"width {width:,},"
    if hidden_size is None:
        seen = (
            f"assuming a width of {width:,}, estimated from {parameters:,} parameters, since the model does not state "
            "it;"
        )
    reason = f"{seen} lora_alpha {alpha:g}, {trained_tokens:,.0f} trained tokens per update"
    return float(f"{rate:.2g}"), reason + (", divided by ten for dpo" if objective == "dpo" else "")
