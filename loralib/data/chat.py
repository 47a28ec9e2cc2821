"""Renders chats with the model's own template, split into segments that are trained and segments that are not."""

from __future__ import annotations

from typing import Any, Final

from ..errors import DataError
from .readers import Example

__all__ = ["render_chat"]

_MARK: Final = "\ue000\ue001\ue000"  # private-use characters, which ordinary text does not contain


def render_chat(example: Example, tokenizer: Any) -> tuple[tuple[str, bool], ...]:
    """Renders a chat with the model's own template; assistant turns are trained, with their end token.

    A template does not say where an answer begins and ends.  To find out, the chat is rendered twice more for each
    answer: up to it, as generation begins an answer, and whole with a mark in its place.  The turn is what lies between
    the end of the first rendering and what follows the mark, with all that the template adds to it.

    Args:
        example: a chat.
        tokenizer: the model's tokenizer, with a chat template.

    Returns:
        Segments as in `Example`: text, and whether it is trained.

    Raises:
        DataError: the tokenizer has no chat template, or the template omits or rewrites a turn.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{example.source}: the model's tokenizer has no chat template, so 'messages' cannot be rendered as text. "
            "Choose an instruct model, or give prompt and completion."
        )
    turns = [{"role": role, "content": content} for role, content in example.messages]
    answers = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    turns = turns[: answers[-1] + 1]  # what follows the last answer is not trained

    def render(turns: list[dict[str, str]], begin_answer: bool = False) -> str:
        try:
            return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=begin_answer))
        except Exception as error:  # templates are programs that raise errors of their own, jinja2's among them
            raise DataError(f"{example.source}: the model's chat template rejects these messages: {error}") from None

    whole = render(turns)
    letters = _without_blanks(whole)
    for number, turn in enumerate(turns, 1):
        if turn["role"] in ("system", "user") and _without_blanks(turn["content"]) not in letters:
            raise DataError(f"{example.source}: {_OMITTED.format(number, turn['role'])}")
    spans = []
    for index in answers:
        marked = render([*turns[:index], {**turns[index], "content": _MARK}, *turns[index + 1 :]])
        before, _, after = marked.partition(_MARK)
        # Templates cannot begin an answer to nothing: where the assistant speaks first, its turn starts the text.
        head = render(turns[:index], begin_answer=True) if index else before
        start, end = len(head), len(whole) - len(after)
        if not whole.startswith(head):
            reason = _OTHER_START if whole.startswith(render(turns[:index])) else _REWRITTEN
            raise DataError(f"{example.source}: {reason.format(index + 1)}")
        answer = _without_blanks(turns[index]["content"])
        if not whole.endswith(after) or answer not in _without_blanks(whole[start:end]):
            raise DataError(f"{example.source}: {_OMITTED.format(index + 1, 'assistant')}")
        spans.append((start, end))
    return _segments(whole, spans, tokenizer, example.source)


_OMITTED: Final = (
    "the model's chat template omits or rewrites turn {0} ({1}). Remove the turn, or give prompt and completion."
)
_REWRITTEN: Final = (
    "the model's chat template rewrites what comes before turn {0} once the chat goes on, so the text to train on "
    "cannot be located. Give each answer as an example of its own."
)
_OTHER_START: Final = (
    "the model's chat template does not begin turn {0} as it begins an answer in generation, so the model would learn "
    "something other than what it is asked for later. Give prompt and completion instead."
)


def _segments(whole: str, spans: list[tuple[int, int]], tokenizer: Any, source: str) -> tuple[tuple[str, bool], ...]:
    """Cuts the text at the answers, each with the end token that follows it; the last answer always gets one."""
    end_token = _end_token(whole[spans[-1][1] :], tokenizer)
    if not end_token and not tokenizer.eos_token:
        raise DataError(f"{source}: neither the chat template nor the tokenizer has an end token. Set eos_token.")
    segments: list[tuple[str, bool]] = []
    position = 0
    for start, end in spans:
        end += max(_length_of(token, whole[end:]) for token in (end_token, tokenizer.eos_token))
        segments += [(whole[position:start], False), (whole[start:end], True)]
        position = end
    if not end_token:
        segments[-1] = (segments[-1][0] + tokenizer.eos_token, True)
    return tuple(segments)


def _end_token(rest: str, tokenizer: Any) -> str:
    """Returns the special token that the template puts right after an answer, or ""."""
    special = {str(token) for token in (*tokenizer.all_special_tokens, *tokenizer.get_added_vocab())}
    special -= {tokenizer.bos_token} - {tokenizer.eos_token}  # a start token belongs to the next turn
    return max((token for token in special if _length_of(token, rest)), key=len, default="")


def _length_of(token: str | None, rest: str) -> int:
    """Returns how many characters the token and the blanks before it take at the start of ``rest``, else 0."""
    blanks = len(rest) - len(rest.lstrip())
    return blanks + len(token) if token and rest.startswith(token, blanks) else 0


def _without_blanks(text: str) -> str:
    """Removes blanks and line ends, which templates trim."""
    return "".join(text.split())
