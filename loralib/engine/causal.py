"""Checks whether a model is causal: otherwise it could read off the next token instead of predicting it.

BERT-like models also have a language modelling head, and `AutoModelForCausalLM` accepts any of them.  Trained to
predict the next token, such a model simply copies it from its input, with a deceptively low loss.
"""

from __future__ import annotations

import random
import weakref
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..errors import LoraError, UnsupportedModelError, first_line
from ..modes import evaluating
from ..wrapping import input_table
from .forward import device_of, plain_logits
from .limits import last_position, table_rows
from .placement import Hold

__all__ = ["require_causal"]

_CAUSAL: Final[weakref.WeakSet[nn.Module]] = weakref.WeakSet()
# Number of tokens in the trial, the second half of which is changed.
_TOKENS: Final = 16
_OWN_LOOP: Final = (
    "`inject` and `save_adapter` accept it nevertheless: train it in your own loop, or with transformers' Trainer, "
    "with the loss that it is made for"
)
# Modules through which a decoder attends to an encoder, which is missing here.
_CROSS_ATTENTION: Final = ("encoder_attn", "crossattention", "EncDecAttention")


def require_causal(model: nn.Module) -> None:
    """Rejects a model that sees later tokens, as determined by a trial run, once per model.

    Args:
        model: maps ids (B, T) to logits (B, T, V), or to an object that holds them.

    Raises:
        UnsupportedModelError: it is a sequence-to-sequence model, sees later tokens, or cannot be called with token ids
            alone.
        BusyModelError: it is being trained elsewhere.
    """
    if model in _CAUSAL:
        return
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name} is a sequence-to-sequence model, which reads one text and writes another; loralib's training and "
            f"generation are for causal language models. {_OWN_LOOP} (its `labels` argument), and write texts with "
            "its own `model.generate`."
        )
    if any(path.endswith(_CROSS_ATTENTION) for path, _ in model.named_modules()):
        raise UnsupportedModelError(
            f"{name} is the decoder of a sequence-to-sequence model, and the encoder that it attends to is missing. "
            f"Choose a causal language model; or load the whole model (AutoModelForSeq2SeqLM). {_OWN_LOOP} (its "
            "`labels` argument)."
        )
    with Hold(model, (), "inference"), evaluating(model.modules()):
        sees = _sees_later_tokens(model)
    if sees:
        decoder = " A BERT that is meant as a decoder needs is_decoder=True in its config when it is loaded."
        raise UnsupportedModelError(
            f"{name} is not causal: its logits for a token change when later tokens change, so it would see what it "
            f"is asked to predict. Choose a causal language model. {_OWN_LOOP}, such as that for masked tokens or "
            "classes." + (decoder if hasattr(getattr(model, "config", None), "is_decoder") else "")
        )
    _CAUSAL.add(model)


def _sees_later_tokens(model: nn.Module) -> bool:
    """Whether changing later tokens changes earlier logits, bit for bit; if it does, decides by gradients.

    Products of different shapes round differently, for example when experts receive different numbers of tokens.  But
    in a causal model no gradient flows from a token's logits to a later token, in any dtype.  Conversely, the effect of
    later tokens in a small random encoder may be no larger than bf16 rounding errors.
    """
    length = max(2, min(_TOKENS, last_position(model) or _TOKENS))
    half = length // 2
    rng = random.Random(0)
    rows = table_rows(model) or _vocabulary(model)
    ids = [rng.randrange(rows) for _ in range(length)]
    other = [*ids[:half], *((token + 1 + rng.randrange(max(1, rows - 1))) % rows for token in ids[half:])]
    with torch.no_grad():
        before, after = (_logits(model, row)[:half].float().nan_to_num() for row in (ids, other))
    moved = (after - before).abs().max()
    if moved == 0:
        return False
    through = _gradient(model, ids, half)
    if through is not None:
        return bool(through[half:].any())
    eps = torch.finfo(next(model.parameters()).dtype).eps
    return not float(moved) <= max(1e-4, 16 * eps) * float(before.std())


def _gradient(model: nn.Module, ids: list[int], half: int) -> Tensor | None:
    """Returns the gradient (T, D) of the first half's logits in the embedded tokens; None if it is unavailable."""
    table = input_table(model)
    if table is None:
        return None
    embedded: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    hook = table.register_forward_hook(keep)
    try:
        with torch.enable_grad():
            logits = _logits(model, ids)[:half].float()
            # Not their plain sum, which norms and softmaxes may keep constant.
            total = (logits * torch.linspace(-1, 1, logits.numel(), device=logits.device).view_as(logits)).sum()
            [gradient] = torch.autograd.grad(total, embedded)
    except Exception:  # not differentiable: kernels without a backward pass, or embeddings used in unusual ways
        return None
    finally:
        hook.remove()
    gradient = gradient.reshape(len(ids), -1) if gradient.numel() % len(ids) == 0 else gradient.new_zeros(1, 1)
    usable = len(gradient) == len(ids) and bool(gradient.isfinite().all()) and bool(gradient[:half].any())
    return gradient if usable else None


def _logits(model: nn.Module, ids: list[int]) -> Tensor:
    """Returns the logits (T, V) of one sequence."""
    try:
        return plain_logits(model, torch.tensor([ids], device=device_of(model)))[0]
    except (LoraError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be called with token ids alone ({type(error).__name__}: "
            f"{first_line(error)}); training and generation need that. {_OWN_LOOP}."
        ) from error


def _vocabulary(model: nn.Module) -> int:
    return int(_logits(model, [0]).shape[-1])
