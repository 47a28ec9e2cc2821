"""From tokens to text, piece by piece, and where a text ends according to a model and its tokenizer.

Pieces contain only whole characters, and no part of what turns out to be a stop text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..data.turn_ends import turn_ends
from ..engine.limits import context_length, require_ids_in_table
from ..errors import DataError, list_faults

__all__ = ["TextStream", "check_prompts", "end_tokens", "end_with_turns", "new_tokens"]


class TextStream:
    r"""Converts the tokens of one request to text as they come.

    Joined together, the pieces equal the tokenizer's output for all tokens at once, up to the first stop text.

    Args:
        tokenizer: a tokenizer of transformers, or anything with its ``decode``.
        stop: texts that end the stream.

    Attributes:
        stopped: whether a stop text was generated.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._start = 0  # earlier tokens are no longer needed; a space at a word's start depends on the previous token
        self._read = 0  # earlier tokens have been converted to text
        self._held = ""  # text that may be the start of a stop text
        self.stopped = False

    def add(self, token: int) -> str:
        """Adds one token; returns the text that is final by now, which may be empty."""
        self._ids.append(token)
        before = self._decode(self._ids[self._start : self._read])
        after = self._decode(self._ids[self._start :])
        if after.endswith("\ufffd") and len(self._ids) - self._read < 8:  # the last character is incomplete
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._release(after[len(before) :])

    def finish(self) -> str:
        """Returns the text that was held back, at the end of the stream."""
        if self.stopped:
            return ""
        before = self._decode(self._ids[self._start : self._read])
        rest = self._release(self._decode(self._ids[self._start :])[len(before) :])
        held, self._held = self._held, ""
        return rest + held

    def _release(self, text: str) -> str:
        text = self._held + text
        found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _overlap(text: str, stop: str) -> int:
    """Returns the number of characters at the end of the text that are the start of the stop text.

    >>> _overlap("Hello\\n#", "\\n##")
    2
    """
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


def end_tokens(model: nn.Module, tokenizer: Any = None) -> list[int]:
    """Returns the tokens that end a text, according to the tokenizer and to the model's own settings."""
    found: list[int | None] = []
    for owner in (tokenizer, getattr(model, "generation_config", None), getattr(model, "config", None)):
        value = getattr(owner, "eos_token_id", None)
        found += value if isinstance(value, list) else [value]
    return sorted({int(token) for token in found if token is not None})


def end_with_turns(model: Any, tokenizer: Any) -> None:
    """Makes generation also end where the tokenizer's chat template ends a turn."""
    settings = getattr(model, "generation_config", None)
    more = [token for token in turn_ends(tokenizer) if token not in end_tokens(model, tokenizer)]
    if settings is not None and more:
        settings.eos_token_id = end_tokens(model) + more


def new_tokens(model: nn.Module, prompt: Sequence[int], wanted: int) -> int:
    """Returns how many tokens can follow a prompt: `wanted`, or fewer if the model's context does not suffice."""
    limit = context_length(model)
    # The last token needs no position, because it is never fed to the model.
    return wanted if limit is None else min(wanted, limit + 1 - len(prompt))


def check_prompts(model: nn.Module, prompts: Sequence[Sequence[int]]) -> None:
    """Refuses prompts that the model cannot continue.

    Raises:
        DataError: some have no tokens, more than the model's context, or ids that its embedding lacks; all are listed.
    """
    limit = context_length(model)
    faults = []
    for number, ids in enumerate(prompts, 1):
        if not ids:
            faults.append(f"prompt {number} has no tokens")
        elif limit is not None and len(ids) > limit:
            faults.append(f"prompt {number} has {len(ids):,} tokens, but the model's context has {limit:,}")
    if faults:
        raise DataError(list_faults("the model cannot continue these prompts", faults, "Shorten or remove them."))
    require_ids_in_table(model, prompts)
