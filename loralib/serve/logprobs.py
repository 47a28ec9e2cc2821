"""Log-probabilities in the formats of OpenAI's two endpoints, and the names of single tokens in them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Final

from ..generation.sampling import TokenLogprob

__all__ = ["Names", "chat_logprobs", "completion_logprobs"]

_LEAST: Final = -9999.0  # JSON has no infinity; OpenAI's API uses this value instead


@functools.cache
def _bytes_of_letters() -> dict[str, int]:
    """Maps the letters of byte-level vocabularies to bytes: printable ones to themselves, from 256 on to the rest."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + number): byte for number, byte in enumerate(others)}


class Names:
    """Names for the tokens of a tokenizer.

    Args:
        tokenizer: a tokenizer of transformers.
        by_id: whether to call token 7 ``token_id:7``, so that all names are distinct.
    """

    def __init__(self, tokenizer: Any, by_id: bool = False) -> None:
        self._tokenizer, self._by_id = tokenizer, by_id

    def bytes(self, token: int) -> bytes:
        """Returns the bytes of a token, which may be only a part of a character."""
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
        """Returns the name of a token in a response."""
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
    """Returns log-probabilities in the format of /v1/completions, and the offset of the next token.

    Args:
        names: names of tokens.
        prompt: the prompt's tokens, if the scores include them.
        scores: one per token; None for the very first.
        offset: position of the first token in the text.
        with_top: whether to include alternatives.
    """
    tokens = [prompt[at] if score is None else score.token for at, score in enumerate(scores)]
    starts, held = [], b""
    for token in tokens:
        starts.append(offset)
        held += names.bytes(token)
        whole = held.decode("utf-8", "ignore")  # a character counts for the token with its last byte
        if whole or len(held) >= 4:
            offset, held = offset + max(len(whole), 1), b""
    top = [
        # The token itself is always included, as in OpenAI's responses.
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
    """Returns log-probabilities in the format of /v1/chat/completions."""

    def entry(token: int, value: float) -> dict[str, Any]:
        return {"token": names.name(token), "logprob": _finite(value), "bytes": list(names.bytes(token))}

    content = [
        {**entry(score.token, score.logprob), "top_logprobs": [entry(*pair) for pair in score.top]} for score in scores
    ]
    return {"content": content, "refusal": None}


def _finite(value: float) -> float:
    return max(value, _LEAST)
