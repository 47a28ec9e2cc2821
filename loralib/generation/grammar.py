"""Constrained generation with JSON schemas: which tokens may come next (llguidance tracks the grammar's state).

Schemas with keywords that llguidance does not support (``not``, ``uniqueItems``, look-around in a ``pattern`` and a few
more) are refused, never ignored.  A text that is cut at its token limit is only a prefix of one that follows the
schema.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from ..errors import ConfigError, MissingDependencyError, first_line

__all__ = ["Constraint", "Grammars"]

# Without a limit, a small model may generate whitespace forever.
_BLANKS: Final = r"[ \t\n]{1,32}"


class Constraint:
    """The grammar's state for one text."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    @property
    def finished(self) -> bool:
        """Whether the text can only end here."""
        return bool(self._matcher.is_stopped())

    def mask(self, logits: Tensor) -> None:
        """Bans all tokens that must not come next, in one row of logits (V,), in place."""
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        allowed = ((bits[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten().bool()[: len(logits)].clone()
        beyond = len(logits) - len(allowed)  # rows of the embedding that have no token in the tokenizer
        banned = torch.nn.functional.pad(~allowed, (0, beyond), value=True)
        logits.masked_fill_(banned.to(logits.device), float("-inf"))

    def accept(self, token: int) -> None:
        """Advances by the token that was chosen.

        Raises:
            ConfigError: the grammar cannot continue.
        """
        if not self._matcher.consume_token(token):
            raise ConfigError(
                f"json_schema is too complex to follow: {first_line(Exception(self._matcher.get_error()))}"
            )


class Grammars:
    """Creates constraints for the texts of one tokenizer.

    Args:
        tokenizer: a tokenizer of transformers that is backed by the tokenizers library.
        ends: the tokens that end a text.
    """

    def __init__(self, tokenizer: Any, ends: Sequence[int]) -> None:
        self._tokenizer, self._ends = tokenizer, ends
        self._made: Any = None

    def follow(self, schema: str) -> Constraint:
        """Returns the state for a text that has to follow a JSON schema; "{}" allows any JSON object.

        Raises:
            ConfigError: the schema is invalid, or uses something unsupported; or the tokenizer is of another kind.
            MissingDependencyError: llguidance is not installed.
        """
        try:
            from llguidance import LLMatcher
        except ImportError as error:
            raise MissingDependencyError("json_schema needs llguidance: pip install 'loralib[serve]'") from error
        parsed = json.loads(schema)
        if not isinstance(parsed, dict):
            raise ConfigError(f"json_schema is {schema[:60]}, expected a JSON object that describes the text")
        try:
            source = json.dumps(parsed or {"type": "object"})
            grammar = LLMatcher.grammar_from_json_schema(source, overrides={"whitespace_pattern": _BLANKS})
            failed, said = LLMatcher.validate_grammar_with_warnings(grammar, self._of_tokens())
        except ValueError as error:
            failed, said = True, [str(error)]
        if failed:
            raise ConfigError(f"json_schema cannot be followed: {' '.join('; '.join(said).split())[:300]}")
        return Constraint(LLMatcher(self._of_tokens(), grammar, log_level=0))

    def _of_tokens(self) -> Any:
        """Returns the tokenizer in llguidance's form, which takes half a second to create, once."""
        if self._made is None:
            from llguidance import LLTokenizer

            backend = getattr(self._tokenizer, "backend_tokenizer", None)
            if backend is None:
                raise ConfigError(
                    "json_schema needs a tokenizer from the tokenizers library, but this is a "
                    f"{type(self._tokenizer).__name__}"
                )
            about = json.loads(backend.to_str())
            about["truncation"] = about["padding"] = None  # a grammar does not care about truncation and padding
            count = max(backend.get_vocab().values()) + 1
            self._made = LLTokenizer(
                json.dumps(about), n_vocab=count, eos_token=sorted(e for e in self._ends if e < count)
            )
        return self._made
