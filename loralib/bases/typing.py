"""What type checkers see of a base model; none of it is imported at runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    _Transformers: Any = object

    class LanguageModel(nn.Module, _Transformers):  # type: ignore[misc]  # a base of type Any is meant
        """A model of transformers: a module with ``config``, ``generate`` and everything else its architecture has.

        transformers' own classes would reject much that works, such as calling ``generate`` on a `PreTrainedModel`, and
        checking them takes half a minute.
        """

        def __getattr__(self, name: str) -> Any: ...
