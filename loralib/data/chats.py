"""Renders chats as text with the model's own chat template, and marks which answers are trained.

A template does not tell where an answer begins and ends.  It begins where the template ends when asked to start an
answer to the previous turns, as in generation; it ends with the end token.  If later turns change how a template writes
earlier ones (by stripping thoughts, or ending them differently), each answer becomes a separate text, just as
generation sees it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from ..errors import DataError
from .examples import Example, Turn
from .fields import MATTERS

__all__ = ["ChatTemplate", "Segments"]

Segments = tuple[tuple[str, bool], ...]

_MARK: Final = "\ue000\ue001\ue000"  # private-use characters, which do not occur in ordinary text

_TELLING: Final = 12  # minimum length for a match to be conclusive; shorter strings may occur by chance

# Fields of turns that would be lost if the template did not write them.  Templates deliberately omit thoughts before an
# answer that is only read, not trained, as in generation.
_THOUGHTS: Final = frozenset("reasoning_content reasoning thinking thought thoughts".split())
_MATTER: Final = MATTERS


class ChatTemplate:
    """A tokenizer's chat template."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.is_there = bool(getattr(tokenizer, "chat_template", None))
        self._ends: tuple[str, ...] | None = None

    def rows(self, example: Example) -> list[Segments]:
        """Renders a chat as segments; each trained answer includes its end token.

        Returns:
            One text that trains all answers, or one per answer if the template rewrites earlier turns.

        Raises:
            DataError: there is no template, or it omits or rewrites a turn or a field.
        """
        turns = self._checked(example)
        answers = [index for index, turn in enumerate(turns) if turn.role == "assistant" and turn.trained]
        turns = turns[: answers[-1] + 1]  # nothing after the last trained answer matters
        texts = [self._answer(example, turns, index) for index in answers]
        whole = "".join(texts[-1])
        self._refuse_omitted(example, turns, whole)
        if not all(whole.startswith(head + answer) for head, answer in texts):
            return [((head, False), (answer, True)) for head, answer in texts]
        segments: list[tuple[str, bool]] = []
        position = 0
        for head, answer in texts:
            segments += [(whole[position : len(head)], False), (answer, True)]
            position = len(head) + len(answer)
        return [tuple(segments)]

    def prompt(self, example: Example) -> str:
        """Renders the turns before a chat's last answer, and the template's beginning of that answer."""
        turns = self._checked(example)[: example.last_answer]
        if not turns:
            raise DataError(f"{example.source}: there is no turn before the answer, so there is nothing to answer.")
        text = self._render(example, turns, begin=True)
        self._refuse_omitted(example, turns, text)
        return text

    def _checked(self, example: Example) -> tuple[Turn, ...]:
        if not self.is_there:
            raise DataError(f"{example.source}: {_NO_TEMPLATE}")
        return example.messages

    def _render(self, example: Example, turns: Sequence[Turn], begin: bool = False) -> str:
        def rendered(arguments_as_text: bool) -> str:
            rows = [_as_dict(turn, arguments_as_text) for turn in turns]
            return str(
                self.tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=begin, **example.fields)
            )

        try:
            try:
                return rendered(arguments_as_text=False)
            except TypeError:  # the template concatenates the arguments of tool calls to its text
                return rendered(arguments_as_text=True)
        except Exception as error:  # templates are programs that raise errors of any type, including jinja2's
            raise DataError(f"{example.source}: the model's chat template rejects these messages: {error}") from None

    def _answer(self, example: Example, turns: Sequence[Turn], index: int) -> tuple[str, str]:
        """Returns the text before an answer, as in generation, and the answer with its end token."""
        turn, text = turns[index], self._render(example, turns[: index + 1])
        if index:
            head = self._render(example, turns[:index], begin=True)
        else:  # templates cannot start an answer to no turns: find where the content of a first turn begins
            marked = self._render(example, [turn._replace(content=_MARK)])
            head = marked.partition(_MARK)[0] if _MARK in marked else text
        if not text.startswith(head):
            reason = _OTHER_START if text.startswith(self._render(example, turns[:index])) else _REWRITTEN
            raise DataError(f"{example.source}: {reason.format(index + 1)}")
        answer = text[len(head) :]
        if _without_blanks(turn.content) not in _without_blanks(answer):
            raise DataError(f"{example.source}: {_OMITTED.format(index + 1, 'assistant')}")
        for name in _MATTER & turn.fields.keys():
            if self._is_same(text, example, [*turns[:index], _without(turn, name)]):
                raise DataError(f"{example.source}: {_LOST.format(f'{name!r} of turn {index + 1}')}")
        return head, self._ended(answer, turn.content, example.source)

    def _is_same(self, text: str, example: Example, turns: Sequence[Turn]) -> bool:
        """Whether turns without a field render to the same text, which means that the template does not write it."""
        try:
            return self._render(example, turns) == text
        except DataError:  # the template requires the field
            return False

    def _ended(self, answer: str, content: str, source: str) -> str:
        """Cuts an answer after its end token, or appends one to its content if the template writes none."""
        end = len(answer)
        rest = end  # start of the whitespace and end tokens scanned so far, from the right
        found = False
        while True:
            stripped = answer[:rest].rstrip()
            token = max((token for token in self._end_tokens() if stripped.endswith(token)), key=len, default="")
            if not token:
                break
            if not found or len(stripped) < rest:  # adjacent end tokens end the answer together
                end = len(stripped)
            found, rest = True, len(stripped) - len(token)
        if found:
            return answer[:end]
        if not self.tokenizer.eos_token:
            raise DataError(
                f"{source}: neither the chat template nor the tokenizer has an end token. Set tokenizer.eos_token."
            )
        after = answer.rfind(content) + len(content)
        said = answer.rstrip() if answer[after:].strip() or not content else answer[:after]
        return said + str(self.tokenizer.eos_token)

    def _end_tokens(self) -> tuple[str, ...]:
        """Returns the special tokens, and those that chat models end turns with although they are not special."""
        if self._ends is None:
            added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
            special = {str(token) for token in self.tokenizer.all_special_tokens}
            special |= {str(token) for token in added if token.special or str(token).strip("<|>") in _TURN_ENDS}
            special -= {self.tokenizer.bos_token} - {self.tokenizer.eos_token}  # a start token does not end anything
            self._ends = tuple(sorted(special))
        return self._ends

    def _refuse_omitted(self, example: Example, turns: Sequence[Turn], text: str) -> None:
        """Refuses a chat if its text lacks a turn or a field."""
        letters = _without_blanks(text)
        faults = []
        for index, turn in enumerate(turns):
            if turn.role != "assistant" and self._is_omitted(example, turns, index, letters):
                faults.append(_OMITTED.format(index + 1, turn.role))
            if turn.role == "assistant" and turn.trained:
                continue  # checked by `_answer`
            for name in (_MATTER - _THOUGHTS) & turn.fields.keys():
                changed = [*turns[:index], _without(turn, name), *turns[index + 1 :]]
                if self._is_same(self._render(example, turns), example, changed):
                    faults.append(_LOST.format(f"{name!r} of turn {index + 1}"))
        for name in {"tools", "documents"} & example.fields.keys():
            rest = replace(example, fields={key: value for key, value in example.fields.items() if key != name})
            if self._is_same(self._render(example, turns), rest, turns):
                faults.append(_LOST.format(repr(name)))
        if faults:
            raise DataError(f"{example.source}: {' '.join(faults)}")

    def _is_omitted(self, example: Example, turns: Sequence[Turn], index: int, letters: str) -> bool:
        """Whether a text, given without whitespace, lacks the content of a turn."""
        turn = turns[index]
        said = _without_blanks(turn.content)
        found, needed = letters.count(said), sum(_without_blanks(other.content).count(said) for other in turns)
        if said and found >= needed and len(said) >= _TELLING:
            return False
        if turn.role != "tool" and said not in letters:
            return True  # does not apply to tool results, which templates may quote
        return bool(said) and _MARK not in self._render(
            example, [*turns[:index], turn._replace(content=_MARK), *turns[index + 1 :]]
        )


def _as_dict(turn: Turn, arguments_as_text: bool) -> dict[str, Any]:
    """Returns a turn in the form that templates take, with arguments of tool calls as objects or as JSON text."""
    row = {"role": turn.role, "content": turn.content, **turn.fields}
    if arguments_as_text and "tool_calls" in row:
        row["tool_calls"] = [{**call, "function": _with_text(call["function"])} for call in row["tool_calls"]]
    return row


def _with_text(function: Mapping[str, Any]) -> dict[str, Any]:
    return {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}


def _without(turn: Turn, name: str) -> Turn:
    rest: Mapping[str, Any] = {key: value for key, value in turn.fields.items() if key != name}
    return turn._replace(fields=rest)


def _without_blanks(text: str) -> str:
    """Removes whitespace, which templates trim."""
    return "".join(text.split())


_TURN_ENDS: Final = ("im_end", "end", "eot_id", "end_of_turn", "eot", "endoftext", "return", "call")
_NO_TEMPLATE: Final = (
    "the model's tokenizer has no chat template, so a chat cannot be written as text. Choose an instruct model, give "
    "prompt and completion, or supply a template: --chat_template FILE for training, chat_template.jinja in the "
    "model's directory for all commands."
)
_OMITTED: Final = (
    "the model's chat template omits or rewrites turn {0} ({1}). Remove the turn, or give prompt and completion."
)
_LOST: Final = (
    "the model's chat template does not include {0}, so it would be left out of training. Remove it, or put it into "
    "the content in the form that the model should write."
)
_REWRITTEN: Final = (
    "the model's chat template rewrites the text before turn {0} once that turn is added, so the text to train on "
    "cannot be located. Give prompt and completion."
)
_OTHER_START: Final = (
    "the model's chat template begins turn {0} differently from an answer in generation, so the model would be "
    "trained on something other than what it is asked for later. Give prompt and completion instead."
)
