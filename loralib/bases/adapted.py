"""Loads a base model with an adapter applied in one call, including the tokenizer that the adapter was trained with."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from torch import nn

from ..adapter import Adapter, apply_adapter
from ..console import say
from ..errors import AdapterError, BaseModelError, ConfigError, LoraError, list_faults
from ..files import write_errors, write_text
from ..formats import is_read_with_base, locate_adapter, read_adapter, with_present_names
from ..injection import merge
from .loading import DEFAULT_BASE, load_adapters_tokenizer, load_base, resize_tables_for

__all__ = [
    "TASK",
    "apply_and_tell",
    "base_of",
    "common_base",
    "is_classifier",
    "load_adapted",
    "refuse_classifier",
    "save_tokenizer",
    "tokenizer_for",
    "trained_on_chats",
    "with_chat_template",
]

TASK: Final = "SEQ_CLS"  # PEFT's name for the task of a classifier
# Key in tokenizer_config.json, next to the chat template: what kind of data the adapter was trained on.
_TRAINED_ON: Final = "loralib_trained_on"


def base_of(adapter: Adapter | None, name: str | None = None) -> str:
    """Returns the name of the base model to load: `name` if given, else the adapter's, else the default."""
    return name or (adapter.config.base_model_name_or_path if adapter is not None else None) or DEFAULT_BASE


def common_base(adapters: Iterable[tuple[str, str | Path]], name: str | None = None) -> str:
    """Returns the base model for several adapters: `name` if given, else the one that they name, else the default.

    Unreadable adapters are ignored here; the error is reported when they are loaded.

    Args:
        adapters: name and location of each adapter.
        name: the base given by the user.

    Raises:
        ConfigError: the adapters name different bases.
    """
    if name is not None:
        return name
    bases: dict[str, list[str]] = {}
    for called, source in adapters:
        base = _base_named_by(source)
        if base is not None:
            bases.setdefault(base, []).append(called)
    if len(bases) > 1:
        faults = [f"{base}: {', '.join(names)}" for base, names in sorted(bases.items())]
        raise ConfigError(
            list_faults("the adapters were trained on different bases", faults, "Choose one with --model.")
        )
    return next(iter(bases), DEFAULT_BASE)


def _base_named_by(source: str | Path) -> str | None:
    with contextlib.suppress(OSError, ValueError, AttributeError, LoraError):
        if not is_read_with_base(source):
            text = (Path(locate_adapter(source)) / "adapter_config.json").read_text(encoding="utf-8-sig")
            return json.loads(text).get("base_model_name_or_path") or None
    return None


def load_adapted(
    adapter: str | None = None,
    *,
    model: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    quantize: str | None = None,
    merged: bool = False,
) -> tuple[nn.Module, Any]:
    """Loads a base model and its tokenizer, and applies an adapter.

    Args:
        adapter: a PEFT or MLX directory, or a GGUF LoRA file; None: load only the base model.
        model: the base model; default: the one named by the adapter (GGUF and MLX name none), else the default base.
        dtype: dtype of the base model, see `load_base`.
        device: see `load_base`.
        quantize: see `load_base`.
        merged: whether to merge the adapter into the weights.

    Returns:
        The model in eval mode, and its tokenizer: the one saved with the adapter, if there is one.

    Raises:
        AdapterError: there is no adapter at that path, or it does not fit the base.
        BaseModelError: there is no such model, or the adapter does not name it.
        ConfigError: dtype or device is not available.
    """
    value = None if adapter is None or is_read_with_base(adapter) else read_adapter(adapter)
    if adapter is not None and value is None and model is None:
        raise BaseModelError(f"{adapter} does not name its base model; give --model MODEL (model=... in Python)")
    if value is not None:
        refuse_classifier(value, adapter)
    base, tokenizer = load_base(base_of(value, model), dtype=dtype, device=device, quantize=quantize)
    if adapter is not None:
        value = read_adapter(adapter, model=base) if value is None else with_present_names(value, base)
        apply_and_tell(adapter, value, base)
        if merged:
            merge(base)
        tokenizer = tokenizer_for(adapter, base, tokenizer)
    return base.eval(), tokenizer


def apply_and_tell(name: str, adapter: Adapter, base: nn.Module) -> None:
    """Applies an adapter, and says so if the base is not quantised as it was in training."""
    resize_tables_for(adapter, base)
    report = apply_adapter(base, adapter)
    if report.base in ("quantized", "copy"):
        say(f"note: {name}: {report}", file=sys.stderr)


def is_classifier(adapter: Adapter) -> bool:
    """Whether an adapter belongs to a text classifier."""
    return adapter.config.task_type == TASK


def refuse_classifier(adapter: Adapter, name: object) -> None:
    """Refuses a classifier's adapter where a model is to write texts.

    Raises:
        AdapterError: it is one; the message says what to use instead.
    """
    if is_classifier(adapter):
        raise AdapterError(
            f"{name} is a classifier, which labels texts and does not write any: use `loralib predict` "
            "(loralib.load_adapted_classifier and loralib.predict in Python)"
        )


def tokenizer_for(adapter: str, base: nn.Module, tokenizer: Any) -> Any:
    """Returns the tokenizer saved with an adapter, or the base's if there is none; prints how they differ."""
    own = load_adapters_tokenizer(adapter, base)
    if own is None:
        return tokenizer
    names = {"chat template": "chat_template", "end token": "eos_token", "start token": "bos_token"}
    other = [what for what, name in names.items() if getattr(own, name, None) != getattr(tokenizer, name, None)]
    other += ["vocabulary"] if len(own) != len(tokenizer) else []
    if other:
        say(
            f"Using the tokenizer saved with {adapter}; it differs from the base's in: {', '.join(other)}",
            file=sys.stderr,
        )
    return own


def with_chat_template(tokenizer: Any, file: str | Path) -> Any:
    """Returns a copy of a tokenizer that uses the chat template in a file.

    Raises:
        ConfigError: the file cannot be read, or the template fails on a chat.
    """
    if not hasattr(tokenizer, "apply_chat_template"):
        raise ConfigError(f"chat_template is {str(file)!r}, which needs a transformers tokenizer")
    own, chat = copy.copy(tokenizer), [{"role": "user", "content": "Hi"}]
    try:
        own.chat_template = Path(file).expanduser().read_text(encoding="utf-8-sig")  # a mark would start every chat
        written = own.chat_template and own.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat_template {file} cannot be read: {error}") from error
    except Exception as error:  # Jinja's errors, and the template's own
        raise ConfigError(f"--chat_template {file} cannot format a chat: {error}") from error
    if not written.strip():
        raise ConfigError(f"--chat_template {file} writes nothing for a chat, expected a template in Jinja's language")
    return own


def save_tokenizer(tokenizer: Any, directory: str | os.PathLike[str], *, chats: bool = False) -> None:
    """Saves a tokenizer beside an adapter, to preserve the chat template and the end token used in training.

    Args:
        tokenizer: a tokenizer of transformers; others are not saved.
        directory: the adapter's directory.
        chats: whether the adapter was trained on chats written with the tokenizer's template.

    Raises:
        OutputError: it cannot be written, for instance because the disk is full.
    """
    if not hasattr(tokenizer, "save_pretrained"):
        return
    path = Path(directory)
    with write_errors(path):
        tokenizer.save_pretrained(path)
        file = path / "tokenizer_config.json"
        settings = json.loads(file.read_text(encoding="utf-8"))
        settings[_TRAINED_ON] = "chats" if chats else "text"
        write_text(file, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def trained_on_chats(adapter: str | os.PathLike[str]) -> bool | None:
    """Returns whether an adapter was trained on chats, or None if this was not recorded."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        settings = json.loads((locate_adapter(adapter) / "tokenizer_config.json").read_text(encoding="utf-8"))
        return {"chats": True, "text": False}.get(settings.get(_TRAINED_ON))
    return None
