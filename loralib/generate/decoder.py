"""The model's side of generation: rows of tokens in, logits of the next token out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Decoder"]


class Decoder:
    """Computes next-token logits without a cache: right for any causal model, and slow."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @torch.no_grad()
    def logits(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Returns the logits (R, V) of the token after each row; shorter rows are padded behind, where no one looks."""
        width = max(map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)
        device = next(self.model.parameters()).device
        output: Any = self.model(ids.to(device))
        last = torch.tensor([len(row) - 1 for row in rows], device=device)
        logits: Tensor = output.logits[torch.arange(len(rows), device=device), last]
        return logits
