"""Whether a model is causal: only then is predicting the next token a task, and not reading it off.

BERT and its kind have a head for language too, and `AutoModelForCausalLM` makes one of any of them.  Trained to predict
the next token, such a model reads it where it stands, and its loss looks splendid.
"""

from __future__ import annotations

import random
import weakref
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..errors import LoraError, UnsupportedModelError, first_line
from ..wrapping import input_table
from .forward import device_of, plain_logits
from .limits import last_position, table_rows
from .placement import Hold, evaluating

__all__ = ["require_causal"]

_CAUSAL: Final[weakref.WeakSet[nn.Module]] = weakref.WeakSet()
# Tokens that are tried, of which the second half changes.
_TOKENS: Final = 16
_OWN_LOOP: Final = (
    "`inject` and `save_adapter` accept it nevertheless: train it in your own loop, or with transformers' Trainer, "
    "with the loss that it is made for"
)
# Modules by which a decoder reads an encoder that is not there.
_CROSS_ATTENTION: Final = ("encoder_attn", "crossattention", "EncDecAttention")


def require_causal(model: nn.Module) -> None:
    """Refuses a model that sees later tokens, by trying it: once for each model.

    Args:
        model: maps ids (B, T) to logits (B, T, V), or to an object that holds these.

    Raises:
        UnsupportedModelError: it is a sequence-to-sequence model, or one that sees later tokens, or cannot be called
            with token ids alone.
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
    """Compares the logits before a change with those without it; bit for bit, and where that differs, by gradients.

    Products of other shapes round in other ways, for example where experts get other numbers of tokens.  No gradient
    flows back from a token to a later one all the same, in any dtype; while what a small random encoder sees of later
    tokens may be no more than rounding in bf16.
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
    """Returns the gradient (T, D) of the first half's logits in the embedded tokens, or None where it cannot be had."""
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
            # Not their sum, which norms and softmaxes may keep constant.
            total = (logits * torch.linspace(-1, 1, logits.numel(), device=logits.device).view_as(logits)).sum()
            [gradient] = torch.autograd.grad(total, embedded)
    except Exception:  # no way back: kernels without a backward pass, tables that are used in other ways
        return None
    finally:
        hook.remove()
    gradient = gradient.reshape(len(ids), -1) if gradient.numel() % len(ids) == 0 else gradient.new_zeros(1, 1)
    usable = len(gradient) == len(ids) and bool(gradient.isfinite().all()) and bool(gradient[:half].any())
    return gradient if usable else None


def _logits(model: nn.Module, ids: list[int]) -> Tensor:
    """Returns the logits (T, V) of one row."""
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
