"""Training data: from files to examples, to token ids with a loss mask, to packed rows."""

from __future__ import annotations

from .class_tokens import ClassRow, encode_classes, load_classes
from .classes import CLASSES, Labels
from .readers import (
    CLASSIFY,
    FORMATS,
    PREFERENCES,
    Example,
    Source,
    draw,
    group_by_prompt,
    parse_source,
    read_examples,
    read_sources,
)
from .tokens import (
    OBJECTIVES,
    Dropped,
    Encoded,
    PreferencePair,
    TokenExample,
    encode,
    length_at,
    length_report,
    load_examples,
    prompt_ids,
    token_texts,
    tokenize,
)

__all__ = [
    "CLASSES",
    "CLASSIFY",
    "FORMATS",
    "OBJECTIVES",
    "PREFERENCES",
    "ClassRow",
    "Dropped",
    "Encoded",
    "Example",
    "Labels",
    "PreferencePair",
    "Source",
    "TokenExample",
    "draw",
    "encode",
    "encode_classes",
    "group_by_prompt",
    "length_at",
    "length_report",
    "load_classes",
    "load_examples",
    "parse_source",
    "prompt_ids",
    "read_examples",
    "read_sources",
    "token_texts",
    "tokenize",
]
