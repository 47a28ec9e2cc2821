"""Chats written with the model's own template, split into what is trained and what is not."""

from __future__ import annotations

from typing import Any

from ..errors import DataError
from .readers import Example

__all__ = ["render_chat"]


def render_chat(example: Example, tokenizer: Any) -> tuple[tuple[str, bool], ...]:
    """Writes a chat with the model's own template; assistant turns are trained, with their end token.

    Raises:
        DataError: the tokenizer has no chat template, or the template leaves out or rewrites a turn.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{example.source}: the model's tokenizer has no chat template, so 'messages' cannot be written as text. "
            "Choose an instruct model, or give prompt and completion."
        )
    turns = [{"role": role, "content": content} for role, content in example.messages]
    last = max(index for index, turn in enumerate(turns) if turn["role"] == "assistant")
    turns = turns[: last + 1]  # nothing after the last answer is trained or needed
    try:
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        heads = {
            index: tokenizer.apply_chat_template(turns[:index], tokenize=False, add_generation_prompt=True)
            for index, turn in enumerate(turns)
            if turn["role"] == "assistant"
        }
    except Exception as error:  # templates are programs and raise their own errors, jinja2's among them
        raise DataError(f"{example.source}: the model's chat template refuses these messages: {error}") from None
    segments: list[tuple[str, bool]] = []
    done = 0
    for index, head in heads.items():
        start = len(head)
        content = turns[index]["content"]
        if content not in whole[start:]:
            content = content.strip()  # many templates do that
        end = whole.find(content, start)
        if not whole.startswith(head) or end < 0 or start < done:
            raise DataError(
                f"{example.source}: the model's chat template rewrites turn {index + 1}, so what to train cannot be "
                "told apart. Give each answer as an example of its own."
            )
        end += len(content)
        end += _end_token_length(whole[end:], tokenizer)
        segments += [(whole[done:start], False), (whole[start:end], True)]
        done = end
    text, _ = segments[-1]
    if not _end_token_length(text[text.rfind(content) + len(content) :], tokenizer):
        segments[-1] = (text + tokenizer.eos_token, True)
    return tuple(segments)


def _end_token_length(rest: str, tokenizer: Any) -> int:
    """How many characters of ``rest`` the end-of-turn token takes, blanks before it included; 0 if there is none."""
    blanks = len(rest) - len(rest.lstrip())
    special = {str(token) for token in (*tokenizer.all_special_tokens, *tokenizer.get_added_vocab())}
    special -= {tokenizer.bos_token} - {tokenizer.eos_token}  # a start token belongs to what comes next
    lengths = [len(token) for token in special if rest.startswith(token, blanks)]
    return blanks + max(lengths) if lengths else 0
