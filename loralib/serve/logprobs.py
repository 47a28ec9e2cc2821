"""Log-probabilities in the shapes of OpenAI's two endpoints, and what single tokens are called there."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Final

from ..generation.sampling import TokenLogprob

__all__ = ["Names", "chat_logprobs", "completion_logprobs"]

_LEAST: Final = -9999.0  # JSON has no infinity; OpenAI's API gives this one


@functools.cache
def _bytes_of_letters() -> dict[str, int]:
    """Which letter byte-level vocabularies write for which byte: printable ones for themselves, others from 256 on."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + number): byte for number, byte in enumerate(others)}


class Names:
    """What the tokens of a tokenizer are called.

    Args:
        tokenizer: of transformers.
        by_id: call token 7 ``token_id:7``, so that none is confused with another.
    """

    def __init__(self, tokenizer: Any, by_id: bool = False) -> None:
        self._tokenizer, self._by_id = tokenizer, by_id

    def bytes(self, token: int) -> bytes:
        """Returns the bytes that a token stands for; a part of a character is no text."""
        text = self.text([token])
        if "\ufffd" in text:
            letters = str(self._tokenizer.convert_ids_to_tokens(token))
            if letters.startswith("<0x") and len(letters) == 6:
                return bytes([int(letters[3:5], 16)])
            known = _bytes_of_letters()
            if all(letter in known for letter in letters):
                return bytes(known[letter] for letter in letters)
        return text.encode("utf-8", "replace")

    def name(self, token: int) -> str:
        """Returns what an answer calls a token."""
        if self._by_id:
            return f"token_id:{token}"
        value = self.bytes(token)
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in value)

    def text(self, ids: Sequence[int]) -> str:
        """Returns the text of tokens, special ones included."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def completion_logprobs(
    names: Names, prompt: Sequence[int], scores: Sequence[TokenLogprob | None], offset: int, with_top: bool
) -> tuple[dict[str, Any], int]:
    """Returns log-probabilities as /v1/completions has them, and where the next token begins.

    Args:
        names: what tokens are called.
        prompt: the prompt's tokens, where its own are among the scores.
        scores: of each token; None of the very first.
        offset: where the first one begins in the text.
        with_top: whether alternatives are asked for.
    """
    tokens = [prompt[at] if score is None else score.token for at, score in enumerate(scores)]
    starts, held = [], b""
    for token in tokens:
        starts.append(offset)
        held += names.bytes(token)
        whole = held.decode("utf-8", "ignore")  # a character counts where its last byte is
        if whole or len(held) >= 4:
            offset, held = offset + max(len(whole), 1), b""
    top = [
        # The token itself is always among them, as in OpenAI's answers.
        None if score is None else {names.name(id): _finite(p) for id, p in (*score.top, (score.token, score.logprob))}
        for score in scores
    ]
    return {
        "tokens": [names.name(token) for token in tokens],
        "token_logprobs": [None if score is None else _finite(score.logprob) for score in scores],
        "top_logprobs": top if with_top else None,
        "text_offset": starts,
    }, offset


def chat_logprobs(names: Names, scores: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Returns log-probabilities as /v1/chat/completions has them."""

    def entry(token: int, value: float) -> dict[str, Any]:
        return {"token": names.name(token), "logprob": _finite(value), "bytes": list(names.bytes(token))}

    content = [
        {**entry(score.token, score.logprob), "top_logprobs": [entry(*pair) for pair in score.top]} for score in scores
    ]
    return {"content": content, "refusal": None}


def _finite(value: float) -> float:
    return max(value, _LEAST)
