"""The forward pass of one classifier of texts: the engine's linears under it, and packed rows where it is a decoder.

A decoder's logits for a text are those of its last token, which sees all others: so texts lie in one packed row as in
language modelling, and the head runs on their last states alone.  An encoder's tokens see one another in both
directions, and its head may pool them in any way: texts are padded, and the model's own forward is what runs.
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
    """One classifier's forward pass.

    Attributes:
        pad: the token that stands where a text has ended; None: the model names none.
        splits: whether the head on a text's last hidden state gives the model's own logits, and no token sees later
            ones: then texts can be packed.
    """

    def __init__(self, model: nn.Module) -> None:
        config = text_config(model)
        rows, self.pad = table_rows(model) or 8, getattr(config, "pad_token_id", None)
        self._ids = [number for number in range(rows) if number != self.pad][1:6]  # which are no padding
        self._takes = frozenset(inspect.signature(type(model).forward).parameters)
        super().__init__(model, compiles=False)

    def classes(self, ids: Tensor, mask: Tensor | None = None, kinds: Tensor | None = None) -> Tensor:
        """Returns the logits (B, C) of texts.

        Args:
            ids: (B, T) token ids.
            mask: (B, T) 1 where a token is, 0 where padding is.
            kinds: (B, T) which of two texts a token belongs to.

        Raises:
            UnsupportedModelError: the model returns something else.
        """
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if kinds is not None and "token_type_ids" in self._takes:
            inputs["token_type_ids"] = kinds
        if "use_cache" in self._takes:
            inputs["use_cache"] = False
        return self._checked(self.model(**inputs))

    def head(self, states: Tensor) -> Tensor:
        """Returns the logits (R, C) that the model makes of the last hidden states (R, D) of texts."""
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
        """Tries whether texts can be packed; meanwhile, linears that go together are found."""
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
            except Exception:  # its forward reaches into the body, or takes other inputs
                return False
        scale = float(hidden.float().std())
        is_causal = torch.allclose(hidden[:, :-1].float(), fewer.float(), rtol=1e-2, atol=1e-2 * scale)
        return is_causal and torch.allclose(apart, whole, rtol=1e-3, atol=1e-3 * size)
