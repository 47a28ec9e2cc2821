"""The forward pass of a text classifier: the engine's linear layers and, for decoders, packed rows.

A decoder classifies a text by the logits of its last token, which sees all others.  So texts are packed into one row as
in language modelling, and the head runs only on their last states.  An encoder's tokens see each other in both
directions, and its head may pool them in any way, so texts are padded and the model's own forward runs.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from .forward import Forward
from .limits import table_rows, text_config
from .placement import overriding

__all__ = ["ClassifierForward"]


class ClassifierForward(Forward):
    """One text classifier's forward pass.

    Attributes:
        pad: the padding token; None: the model does not define one.
        splits: whether the head applied to a text's last hidden state gives the model's own logits, and no token sees
            later ones; texts can then be packed.
    """

    def __init__(self, model: nn.Module) -> None:
        config = text_config(model)
        rows, self.pad = table_rows(model) or 8, getattr(config, "pad_token_id", None)
        self._ids = [number for number in range(rows) if number != self.pad][1:6]  # not padding
        self._takes = frozenset(inspect.signature(type(model).forward).parameters)
        super().__init__(model, compiles=False)

    def classes(self, ids: Tensor, mask: Tensor | None = None, kinds: Tensor | None = None) -> Tensor:
        """Returns the logits (B, C) of texts.

        Args:
            ids: (B, T) token ids.
            mask: (B, T) 1 for tokens, 0 for padding.
            kinds: (B, T) token types: which of two texts each token belongs to.

        Raises:
            UnsupportedModelError: the model returns no logits (B, C).
        """
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if kinds is not None and "token_type_ids" in self._takes:
            inputs["token_type_ids"] = kinds
        if "use_cache" in self._takes:
            inputs["use_cache"] = False
        return self._checked(self.model(**inputs))

    def head(self, states: Tensor) -> Tensor:
        """Returns the model's logits (R, C) for the last hidden states (R, D) of texts."""
        self._states = states[:, None]
        try:
            ids = torch.full((len(states), 1), self._ids[0], device=self.device)
            return self._checked(self.model(input_ids=ids, use_cache=False))
        finally:
            self._states = None

    def _checked(self, output: Any) -> Tensor:
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} returns {type(output).__name__}, expected an object whose logits have "
                "shape (texts, classes)"
            )
        return logits

    def _probe(self) -> bool:
        """Tests whether texts can be packed, and finds the groups of linear layers along the way."""
        ids = torch.tensor([self._ids], device=self.device)
        with self._linears.finding_groups() as recorders, overriding(recorders):
            whole = self.classes(ids)
        if self._body is None or self.path == "plain" or "use_cache" not in self._takes:
            return False
        size = float(whole.float().abs().max())
        with overriding({self._body: self._body_or_states}):
            try:
                hidden = self.hidden(ids)
                fewer = self.hidden(ids[:, :-1])
                apart = self.head(hidden[:, -1])
            except Exception:  # its forward accesses parts of the body, or takes other inputs
                return False
        scale = float(hidden.float().std())
        is_causal = torch.allclose(hidden[:, :-1].float(), fewer.float(), rtol=1e-2, atol=1e-2 * scale)
        return is_causal and torch.allclose(apart, whole, rtol=1e-3, atol=1e-3 * size)
