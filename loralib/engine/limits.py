"""A model's limits: the token ids of its embedding, and the number of tokens at once."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Final

from torch import nn

from ..errors import DataError, list_faults
from ..wrapping import input_table

__all__ = ["context_length", "input_limit", "last_position", "require_ids_in_table", "table_rows"]

# Names of tables that are computed or learned for a fixed number of positions: indices beyond their end always fail.
_POSITIONS = re.compile(r"(^|[._])(wpe|position_embeddings?|embed_positions|positions_embed|pos_emb\w*)$")


def text_config(model: nn.Module) -> Any:
    """Returns the config of the language model (for a multimodal model, that of its text part)."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def context_length(model: nn.Module) -> int | None:
    """Returns a model's context length in tokens, or None if its config does not state it."""
    length = _configured(model)
    if length is None:
        return None
    known = _LENGTHS.get(model)
    if known is None or known[0] != length:  # searching for tables takes as long as a small generation step
        known = _LENGTHS[model] = (length, last_position(model) or length)
    return known[1]


_LENGTHS: Final[weakref.WeakKeyDictionary[nn.Module, tuple[int, int]]] = weakref.WeakKeyDictionary()


def last_position(model: nn.Module) -> int | None:
    """Returns the number of tokens beyond which a model fails, or None if there is no such limit.

    Learned positions end with their table.  Rotary positions work beyond the context length, though not well.
    """
    length = _configured(model)
    if length is None:
        return None
    tables = [m for name, m in model.named_modules() if isinstance(m, nn.Embedding) and _POSITIONS.search(name)]
    computed = any(_POSITIONS.search(name) for name, _ in model.named_buffers())
    if not (tables or computed or hasattr(text_config(model), "max_seq_len")):
        return None
    # RoBERTa starts counting after its padding token, within a table of this many rows.
    padding = tables[0].padding_idx if tables and tables[0].num_embeddings == length else None
    return length if padding is None else length - padding - 1


def input_limit(model: nn.Module, tokenizer: Any) -> int | None:
    """Returns the most tokens that a model takes at once, as it or its tokenizer states; None if neither does."""
    limits = [context_length(model), getattr(tokenizer, "model_max_length", None)]
    return min((limit for limit in limits if limit is not None and limit < 1 << 30), default=None)


def _configured(model: nn.Module) -> int | None:
    config = text_config(model)
    values = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def table_rows(model: nn.Module) -> int | None:
    """Returns the number of rows of the token embedding, or None if unknown."""
    table = input_table(model)
    rows = getattr(table, "num_embeddings", None)
    if rows is None:
        weight = getattr(table, "weight", None)
        rows = weight.shape[0] if weight is not None and weight.dim() == 2 else None
    return int(rows) if rows is not None else None


def require_ids_in_table(model: nn.Module, rows: Iterable[Sequence[int]], kind: str = "prompt") -> None:
    """Rejects token ids that the model's embedding does not have.

    Args:
        model: the model.
        rows: token ids.
        kind: what a row is called in the message.

    Raises:
        DataError: some rows have such ids; lists all of them.
    """
    size = table_rows(model)
    if size is None:
        return
    faults = []
    for number, ids in enumerate(rows, 1):
        wrong = sorted({token for token in ids if not 0 <= token < size})
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            faults.append(f"{kind} {number} has {', '.join(map(str, wrong[:3]))}{more}")
    if faults:
        raise DataError(
            list_faults(
                f"these token ids are not in the model's embedding, which has ids 0 to {size - 1:,}",
                faults,
                "Use the tokenizer that came with the model; if tokens were added to it, call "
                "model.resize_token_embeddings(len(tokenizer)) before the adapter is put in.",
            )
        )
