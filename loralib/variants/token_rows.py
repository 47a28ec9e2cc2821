"""Training and storing only selected rows of token tables (PEFT's `trainable_token_indices`).

An embedding looks up a trained row where there is one; a head computes the corresponding logits with it.  A head tied
to the embedding shares the embedding's rows, as it shares the weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import Parameter

from ..delta import dense
from ..layers import LoRALayer

__all__ = ["ROWS", "TokenRowsEmbedding", "TokenRowsHead", "share_rows"]

ROWS = "token_adapter.trainable_tokens_delta"  # PEFT's name, although it stores the rows' values


class _TokenRows(LoRALayer):
    """Base class of tables with trained rows.

    Attributes:
        lora_token_rows: the rows' values (k, d).
        lora_token_indices: the rows' indices (k,).
        tied: whether the rows belong to another layer, which saves them.
    """

    lora_token_rows: Parameter
    lora_token_indices: Tensor
    token_indices: tuple[int, ...] = ()
    tied: bool = False
    fixed_names = ("lora_token_indices",)
    may_rest = True  # tokens that do not occur in a batch get no gradient

    def tensor_shapes(self, r: int) -> dict[str, tuple[int, ...]]:
        return {"lora_token_rows": (len(self.token_indices), self._base_shape[1])}

    def tensor_keys(self) -> dict[str, str]:
        return {} if self.tied else {"lora_token_rows": ROWS}

    def to_adapter(self) -> dict[str, Tensor]:
        return {} if self.tied else super().to_adapter()

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        weight = dense(self.base_weight)
        indices = torch.tensor(self.token_indices, device=weight.device)
        self.register_buffer("lora_token_indices", indices)
        self.lora_token_rows.copy_(weight[indices])

    def factors(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("trained rows of an embedding or head are not a low-rank update")

    def as_stored(self, matrix: Tensor) -> Tensor:
        return matrix

    def delta_weight(self) -> Tensor:
        weight, rows = dense(self.base_weight), self.lora_token_rows
        delta = torch.zeros(weight.shape, dtype=rows.dtype, device=weight.device)
        return delta.index_copy(0, self.lora_token_indices, rows - weight[self.lora_token_indices].to(rows.dtype))

    def is_as_base(self, values: Mapping[str, Tensor]) -> bool:
        rows = values["lora_token_rows"]
        return torch.equal(rows, dense(self.base_weight)[self.lora_token_indices].to(rows.dtype))


class TokenRowsEmbedding(_TokenRows):
    """An embedding in which trained rows replace its own."""

    def forward(self, x: Tensor) -> Tensor:
        y = cast(Tensor, super().forward(x))
        if not self._active:
            return y
        indices = self.lora_token_indices
        order = indices.argsort()
        places = order[torch.searchsorted(indices, x, sorter=order).clamp(max=len(indices) - 1)]
        rows = F.embedding(places, self.lora_token_rows).to(y.dtype)
        scale: Any = getattr(self, "embed_scale", None)  # a tensor in Gemma, a number in BART
        rows = rows if scale is None else rows * torch.as_tensor(scale, dtype=y.dtype, device=y.device)
        return torch.where((indices[places] == x)[..., None], rows, y)


class TokenRowsHead(_TokenRows):
    """A head that computes the logits of some tokens with trained rows."""

    def forward(self, x: Tensor) -> Tensor:
        y = cast(Tensor, super().forward(x))
        if not self._active:
            return y
        bias: Any = self._parameters.get("bias")
        indices = self.lora_token_indices
        logits = F.linear(x, self.lora_token_rows.to(x.dtype), None if bias is None else bias[indices])
        return y.index_copy(-1, indices, logits.to(y.dtype))


def share_rows(layers: Sequence[nn.Module]) -> None:
    """Makes tied tables train the rows of the table that saves them."""
    tables = [layer for layer in layers if isinstance(layer, _TokenRows)]
    owners = {id(table.base_weight): table for table in tables if not table.tied}
    for table in tables:
        if table.tied:
            table.lora_token_rows = owners[id(table.base_weight)].lora_token_rows
