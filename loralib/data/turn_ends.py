"""How a chat template begins and ends an answer: whether examples are chats, and which token ends a turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from ..errors import DataError
from .chats import ChatTemplate
from .examples import Example, Turn
from .tokens import TokenExample, tokenize

__all__ = ["are_chats", "turn_ends"]

_QUESTION: Final = "question"
_ASKED: Final = Example(messages=(Turn("user", _QUESTION),), source="the tokenizer")
_ANSWERED: Final = Example(messages=(*_ASKED.messages, Turn("assistant", "answer")), source="the tokenizer")
_LOOKED_AT: Final = 8


def are_chats(examples: Sequence[TokenExample], tokenizer: Any) -> bool:
    """Returns whether examples are chats in the format of a tokenizer's template, judging by how their answers begin.

    Args:
        examples: only the first few are checked.
        tokenizer: the tokenizer that produced them.
    """
    template = ChatTemplate(tokenizer)
    if not template.is_there or not examples:
        return False
    try:
        begin = template.prompt(_ASKED).rpartition(_QUESTION)[2].strip()
    except DataError:
        return False
    texts = []
    for example in examples[:_LOOKED_AT]:
        start = example.trained.index(True) if True in example.trained else 0
        # If every token is trained, an answer may begin anywhere.
        texts.append(str(tokenizer.decode(list(example.ids[:start] if start > 1 else example.ids))))
    return bool(begin) and all(begin in text for text in texts)


def turn_ends(tokenizer: Any) -> list[int]:
    """Returns the token with which a tokenizer's chat template ends an answer; nothing if there is no template."""
    try:
        ended = tokenize(_ANSWERED, tokenizer)
    except DataError:  # no template, or one that does not accept this chat
        return []
    return [ended.ids[-1]] if ended.trained[-1] else []
