"""`Example`: one training example as text, or as turns of a chat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, NamedTuple

__all__ = ["Example", "Turn", "chat_of", "meaning_prompt"]


class Turn(NamedTuple):
    """One turn of a chat.

    Attributes:
        role: "system", "user", "assistant", "tool", or another role that the chat template supports.
        content: its text.
        trained: whether this answer is trained; ignored for other roles.
        fields: further fields for the chat template: ``tool_calls``, ``reasoning_content``, ...
    """

    role: str
    content: str
    trained: bool = True
    fields: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Example:
    """One training example as text.

    Attributes:
        segments: pieces of text in order, each with a flag telling whether the model is trained to write it. A prompt
            and its completion are ``((prompt, False), (completion, True))``; plain text is ``((text, True),)``.
        references: all completions in the file for this prompt, in file order (empty for a chat).
        source: ``file:line``, for error messages.
        messages: the turns of a chat; pairs of role and content are converted to `Turn`. The model's chat template
            creates the segments during tokenization, so a chat has none of its own.
        fields: further inputs of the chat template: ``tools``, ``documents``.
        rejected: in preference data, the same prompt with the rejected answer; else None.
        label: for classification, the class, or the number to predict; else None.
        text_pair: for a pair of texts, the second one, which is also the last of `segments`.

    >>> Example.of("name : The Wharf", "It is The Wharf.").completion
    'It is The Wharf.'
    """

    segments: tuple[tuple[str, bool], ...] = ()
    references: tuple[str, ...] = ()
    source: str = ""
    messages: tuple[Turn, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)
    rejected: Example | None = None
    label: str | float | None = None
    text_pair: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "messages", tuple(Turn(*turn) for turn in self.messages))

    @classmethod
    def of(cls, prompt: str, completion: str, source: str = "") -> Example:
        """Returns an example that trains ``completion`` after ``prompt``."""
        return cls(((prompt, False), (completion, True)), (completion,), source)

    @property
    def is_plain(self) -> bool:
        """Whether this is plain text: one segment, without a prompt."""
        return not self.messages and len(self.segments) == 1

    @property
    def prompt(self) -> str:
        """The text before the first trained segment (for a chat: the turns before its last answer)."""
        if self.messages:
            return "\n".join(turn.content for turn in self.messages[: self.last_answer])
        return "".join(text for text, _ in takewhile(lambda segment: not segment[1], self.segments))

    @property
    def completion(self) -> str:
        """The last trained segment (for a chat: its last answer)."""
        if self.messages:
            return "".join(turn.content for turn in self.messages[self.last_answer :][:1])
        return next((text for text, trained in reversed(self.segments) if trained), "")

    @property
    def trained_texts(self) -> list[str]:
        """All texts that the model is trained to write, without what a chat template adds around them."""
        answers = [turn.content for turn in self.messages if turn.role == "assistant" and turn.trained]
        return answers + [text for text, trained in self.segments if trained]

    @property
    def last_answer(self) -> int:
        """The index of a chat's last trained answer; the number of turns if there is none."""
        answers = [index for index, turn in enumerate(self.messages) if turn.role == "assistant" and turn.trained]
        return answers[-1] if answers else len(self.messages)


def chat_of(example: Example) -> Example:
    """Turns a prompt and its completion into a chat.

    >>> [turn[:2] for turn in chat_of(Example.of("Hi\\n", "Hello")).messages]
    [('user', 'Hi'), ('assistant', 'Hello')]
    """
    turns = (Turn("user", example.prompt.strip()), Turn("assistant", example.completion.strip()))
    rejected = None if example.rejected is None else chat_of(example.rejected)
    return Example((), (), example.source, turns if example.completion else turns[:1], rejected=rejected)


def meaning_prompt(meaning: str) -> str:
    r"""Returns the prompt for a meaning representation: its text and a line break.

    >>> meaning_prompt(" name : The Mill ")
    'name : The Mill\n'
    """
    return meaning.strip() + "\n"
