"""The common base of request bodies: unknown fields, or fields of another type, are refused."""

from __future__ import annotations

from typing import Any, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict

__all__ = ["WHOLE", "Body"]


class Body(BaseModel):
    """The JSON body of a request."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _whole(value: Any) -> Any:
    """Converts 5.0 to 5, because JSON has only one type of number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE: Final = BeforeValidator(_whole)
