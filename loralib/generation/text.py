"""Tokens to text, piece by piece: whole characters only, and never a part of a text that turns out to be a stop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["TextStream"]


class TextStream:
    r"""Turns the tokens of one request into text as they come.

    Pieces joined are what the tokenizer makes of all tokens at once, up to the first stop text.

    Args:
        tokenizer: of transformers, or anything with its ``decode``.
        stop: texts that end the stream.

    Attributes:
        stopped: a stop text has come.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._start = 0  # tokens before it are needed no more: blanks at a word's start depend on the token before it
        self._read = 0  # tokens before it have become text
        self._held = ""  # text that may be the beginning of a stop
        self.stopped = False

    def add(self, token: int) -> str:
        """Takes one token; returns the text that is certain by now, which may be empty."""
        self._ids.append(token)
        before = self._decode(self._ids[self._start : self._read])
        after = self._decode(self._ids[self._start :])
        if after.endswith("\ufffd") and len(self._ids) - self._read < 8:  # bytes of a character yet to come
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._release(after[len(before) :])

    def finish(self) -> str:
        """Returns what was held back; nothing comes after it."""
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
    """How many characters at the end of the text are a beginning of the stop.

    >>> _overlap("Hello\\n#", "\\n##")
    2
    """
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
