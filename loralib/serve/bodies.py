"""The common base of request bodies: unknown fields, fields of another type, and broken text are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, ModelWrapValidatorHandler, model_validator

from ..data.lines import is_text
from .state import RequestError

__all__ = ["WHOLE", "Body"]


class Body(BaseModel):
    """The JSON body of a request."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="wrap")
    @classmethod
    def _refuse_broken_text(cls, values: Any, check: ModelWrapValidatorHandler[Any]) -> Any:
        """Refuses broken text anywhere in a body, before its parts are read or named in a message."""
        for name, value in values.items() if isinstance(values, Mapping) else ():
            if not _is_text_throughout([name, value]):
                raise RequestError(
                    f"{name[:80]!r} contains half of a surrogate pair, which is no character; send whole characters",
                    400,
                    "invalid_request",
                    name if is_text(name) else None,
                )
        return check(values)


def _is_text_throughout(value: object) -> bool:
    """Whether every string in a JSON value is text; JSON can be too deep for recursion."""
    pending = [value]
    while pending:
        part = pending.pop()
        if isinstance(part, Mapping):
            pending += [*part, *part.values()]
        elif isinstance(part, list):
            pending += part
        elif isinstance(part, str) and not is_text(part):
            return False
    return True


def _whole(value: Any) -> Any:
    """Converts 5.0 to 5, because JSON has only one type of number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE: Final = BeforeValidator(_whole)
