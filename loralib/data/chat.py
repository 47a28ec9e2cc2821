"""Chats written with the model's own template, split into what is trained and what is not."""

from __future__ import annotations

from typing import Any, Final

from ..errors import DataError
from .readers import Example

__all__ = ["render_chat"]

_MARK: Final = "\ue000\ue001\ue000"  # characters for private use: no text has them


def render_chat(example: Example, tokenizer: Any) -> tuple[tuple[str, bool], ...]:
    """Writes a chat with the model's own template; assistant turns are trained, with their end token.

    A template says nowhere what is an answer.  It is found by writing the chat again: up to the answer, as generation
    begins it, and whole with a mark in the answer's place.  What stands between the beginning of the first and what
    follows the mark is the turn, with all that the template adds to it.

    Raises:
        DataError: the tokenizer has no chat template, or the template leaves out or rewrites a turn.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{example.source}: the model's tokenizer has no chat template, so 'messages' cannot be written as text. "
            "Choose an instruct model, or give prompt and completion."
        )
    turns = [{"role": role, "content": content} for role, content in example.messages]
    answers = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    turns = turns[: answers[-1] + 1]  # nothing after the last answer is trained or needed

    def write(turns: list[dict[str, str]], begin_answer: bool = False) -> str:
        try:
            return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=begin_answer))
        except Exception as error:  # templates are programs and raise their own errors, jinja2's among them
            raise DataError(f"{example.source}: the model's chat template refuses these messages: {error}") from None

    whole = write(turns)
    written = _squeezed(whole)
    for number, turn in enumerate(turns, 1):
        if turn["role"] in ("system", "user") and _squeezed(turn["content"]) not in written:
            raise DataError(f"{example.source}: {_LEFT_OUT.format(number, turn['role'])}")
    spans = []
    for index in answers:
        marked = write([*turns[:index], {**turns[index], "content": _MARK}, *turns[index + 1 :]])
        before, _, after = marked.partition(_MARK)
        # No template begins an answer to nothing; a chat that the assistant opens is taken as it is written.
        head = write(turns[:index], begin_answer=True) if index else before
        start, end = len(head), len(whole) - len(after)
        if not whole.startswith(head):
            why = _BEGUN_OTHERWISE if whole.startswith(write(turns[:index])) else _REWRITTEN
            raise DataError(f"{example.source}: {why.format(index + 1)}")
        if not whole.endswith(after) or _squeezed(turns[index]["content"]) not in _squeezed(whole[start:end]):
            raise DataError(f"{example.source}: {_LEFT_OUT.format(index + 1, 'assistant')}")
        spans.append((start, end))
    return _segments(whole, spans, tokenizer, example.source)


_LEFT_OUT: Final = (
    "the model's chat template leaves out or rewrites turn {0} ({1}). Leave the turn out, or give prompt and "
    "completion."
)
_REWRITTEN: Final = (
    "the model's chat template rewrites what comes before turn {0} once the chat goes on, so what to train cannot be "
    "told apart. Give each answer as an example of its own."
)
_BEGUN_OTHERWISE: Final = (
    "the model's chat template begins turn {0} otherwise than it does in generation, so what is learned would not be "
    "what is asked for later. Give prompt and completion instead."
)


def _segments(whole: str, spans: list[tuple[int, int]], tokenizer: Any, source: str) -> tuple[tuple[str, bool], ...]:
    """Cuts the text at the answers, each with the end token that follows it; the last one always has one."""
    last = _end_token(whole[spans[-1][1] :], tokenizer)
    if not last and not tokenizer.eos_token:
        raise DataError(f"{source}: neither the chat template nor the tokenizer has an end token. Set eos_token.")
    segments: list[tuple[str, bool]] = []
    done = 0
    for start, end in spans:
        end += max(_length_of(token, whole[end:]) for token in (last, tokenizer.eos_token))
        segments += [(whole[done:start], False), (whole[start:end], True)]
        done = end
    if not last:
        segments[-1] = (segments[-1][0] + tokenizer.eos_token, True)
    return tuple(segments)


def _end_token(rest: str, tokenizer: Any) -> str:
    """The token that the template ends an answer with: the first special one after the last answer, or ""."""
    special = {str(token) for token in (*tokenizer.all_special_tokens, *tokenizer.get_added_vocab())}
    special -= {tokenizer.bos_token} - {tokenizer.eos_token}  # a start token belongs to what comes next
    return max((token for token in special if _length_of(token, rest)), key=len, default="")


def _length_of(token: str | None, rest: str) -> int:
    """How many characters of ``rest`` the token takes, blanks before it included; 0 if it does not come first."""
    blanks = len(rest) - len(rest.lstrip())
    return blanks + len(token) if token and rest.startswith(token, blanks) else 0


def _squeezed(text: str) -> str:
    """Without blanks and line ends, which templates trim."""
    return "".join(text.split())
