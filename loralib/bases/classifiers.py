"""Text classifiers: a base model's body with a head that has one logit per label, and its tokenizer.

A head that the base lacks is new, with random weights.  It is trained in full and saved with the adapter, as is
anything else in the model that is new (`new_modules`); otherwise the adapter could not be loaded again.
"""

from __future__ import annotations

import json
import os
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..adapter import LABELS, Adapter
from ..allocator import keep_freed_memory
from ..console import say
from ..errors import AdapterError, BaseModelError, ConfigError, first_line, list_faults
from ..formats import is_read_with_base, read_adapter, with_present_names
from ..targets import HEADS
from .adapted import TASK, apply_and_tell, base_of, is_classifier, tokenizer_for
from .device import pick_device, pick_dtype
from .loading import (
    DEFAULT_BASE,
    check_vocabulary,
    import_transformers,
    load_tokenizer,
    model_directory,
    quiet_reading,
    refuse_pointers,
    refuse_sizes,
    tokenizer_in,
)
from .made_up import build_base, is_made_up
from .quant import chosen_kind, quantize_model
from .quantized_reading import finish_reading, method_of, quantizing, stored_quantization, take_over, way_out

__all__ = [
    "class_names",
    "labels_in",
    "load_adapted_classifier",
    "load_classifier",
    "load_classifier_for",
    "name_classes",
    "new_modules",
    "own_classes",
]

_HEADS: Final = HEADS[TASK]
_NEW: Final[weakref.WeakKeyDictionary[nn.Module, tuple[str, ...]]] = weakref.WeakKeyDictionary()


def load_classifier(
    name: str | os.PathLike[str] = DEFAULT_BASE,
    labels: Sequence[str] | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    quantize: str | None = None,
    seed: int = 0,
    hidden_dim: int | None = None,
    num_layers: int | None = None,
    replaces_head: bool = False,
) -> tuple[Any, Any]:
    """Loads a text classifier as one of transformers' models (AutoModelForSequenceClassification).

    Args:
        name: see `load_base`; also encoders such as BERT, RoBERTa, DeBERTa and ModernBERT, and "scratch-encoder".
        labels: class names; empty: the model predicts a number; None: the checkpoint's own classes.
        dtype: dtype of the weights, except for the head, which is fp32 because it is trained in full.
        device: see `load_base`.
        quantize: see `load_base`.
        seed: random seed for a new head, and for the weights of made-up bases.
        hidden_dim: see `load_base`.
        num_layers: see `load_base`.
        replaces_head: whether an adapter brings its own head, so that the checkpoint's may have another size.

    Returns:
        The model in eval mode, and its tokenizer.

    Raises:
        BaseModelError: there is no such model, it cannot be read, or it has no classification variant.
        ConfigError: dtype or device is not available.
    """
    name, device, quantize = os.fspath(name), pick_device(device), chosen_kind(quantize)
    settings = {} if labels is None else _settings(labels)
    new = list[str]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if is_made_up(name):
            model = _made_up(name, settings, dtype, device, seed, hidden_dim, num_layers)
            tokenizer, name = load_tokenizer(DEFAULT_BASE), model.config.name_or_path
            if quantize is not None:
                quantize_model(model, quantize)
        else:
            refuse_sizes(name, hidden_dim=hidden_dim, num_layers=num_layers)
            path, name = model_directory(name)
            model, new = _read(str(path), name, settings, pick_dtype(dtype, device), quantize, replaces_head)
            tokenizer = tokenizer_in(path, name, needs_end=False)
            check_vocabulary(model, tokenizer, name)
    model.config.name_or_path = model.name_or_path = tokenizer.name_or_path = name
    _finish(model, tokenizer, new)
    return model.to(device).eval(), tokenizer


def load_classifier_for(adapter: Adapter, name: str | os.PathLike[str], **options: Any) -> tuple[Any, Any]:
    """Loads the base of a classifier's adapter; a head that the adapter replaces may have other labels.

    Args:
        adapter: the adapter.
        name: its base.
        options: see `load_classifier`.
    """
    brings_head = any(tensor.partition(".")[0] in _HEADS for tensor in adapter.tensors)
    return load_classifier(name, labels_in(adapter), replaces_head=brings_head, **options)


def _finish(model: Any, tokenizer: Any, new: Sequence[str]) -> None:
    """Prepares a model for its task after reading; `new` lists its tensors that the base does not have."""
    for config in (model.config, model.config.get_text_config()):
        config.pad_token_id = tokenizer.pad_token_id  # lets decoders find the last token of a text
    _NEW[model] = _owners(model, new)
    for part, module in model.named_modules():
        if part in _NEW[model] or part in _HEADS:
            _keep_in_fp32(module)


def load_adapted_classifier(adapter: str, model: str | None = None, **options: Any) -> tuple[nn.Module, Any]:
    """Loads the base model of a classifier's adapter, with the adapter applied, and the tokenizer.

    Args:
        adapter: a PEFT directory.
        model: the base; default: the one named by the adapter.
        options: see `load_classifier`.

    Raises:
        AdapterError: it is not a classifier, or does not fit the base.
        BaseModelError: there is no such model.
    """
    value = None if is_read_with_base(adapter) else read_adapter(adapter)
    if value is None or not is_classifier(value):
        task = value.config.task_type if value is not None else None
        raise AdapterError(
            f"{adapter} is not a classifier (its task_type is {task!r}, expected {TASK!r}). `loralib train --task "
            "classify` trains one; for an adapter that writes text, use `loralib generate`."
        )
    base, tokenizer = load_classifier_for(value, base_of(value, model), **options)
    value = with_present_names(value, base)
    apply_and_tell(adapter, value, base)
    return base.eval(), tokenizer_for(adapter, base, tokenizer)


def labels_in(adapter: Adapter) -> tuple[str, ...]:
    """Returns the classes of a classifier's adapter: their names if stored, else as many as its head has outputs."""
    if LABELS in adapter.metadata:
        return tuple(json.loads(adapter.metadata[LABELS]))
    heads = [tensor for name, tensor in adapter.tensors.items() if name in _LAST]
    if not heads:
        raise AdapterError(
            f"the adapter has no head ({', '.join(_LAST)}), so its classes are unknown. Save it with the head in "
            f"modules_to_save (PEFT does so with task_type {TASK!r})."
        )
    count = heads[0].shape[0]
    return tuple(f"LABEL_{number}" for number in range(count)) if count > 1 else ()


_LAST: Final = ("score.weight", "classifier.weight", "classifier.out_proj.weight")


def class_names(model: nn.Module) -> tuple[str, ...]:
    """Returns a model's class names, in the order of its logits; empty if it predicts a number.

    Raises:
        ConfigError: it is not a text classifier, or predicts several things at once.
    """
    config: Any = getattr(model, "config", None)
    if not type(model).__name__.endswith("ForSequenceClassification") or not hasattr(config, "id2label"):
        raise ConfigError(
            f"{type(model).__name__} is not a text classifier. Load it with loralib.load_classifier, or transformers' "
            "AutoModelForSequenceClassification."
        )
    return _classes_of(config, type(model).__name__)


def _classes_of(config: Any, name: str) -> tuple[str, ...]:
    """Returns the class names in a config, in the order of the logits; empty if a number is predicted.

    Raises:
        ConfigError: its head predicts several things at once.
    """
    names = tuple(str(config.id2label[number]) for number in sorted(config.id2label))
    if len(names) == 1:
        return ()
    if config.problem_type in ("multi_label_classification", "regression"):
        several = "several labels" if config.problem_type != "regression" else "several numbers"
        raise ConfigError(
            f"the head of {name} predicts {several} for each text (its problem_type is {config.problem_type!r}), "
            "expected one. Use a model without a head, or one with a head for single labels."
        )
    return names


def name_classes(model: nn.Module, labels: Sequence[str]) -> None:
    """Stores a model's class names in its config."""
    config: Any = model.config
    for key, value in _settings(labels).items():
        if key != "num_labels":
            setattr(config, key, value)


def own_classes(name: str) -> tuple[str, ...] | None:
    """Returns the classes of a checkpoint with a classification head, without loading it; None if it has no head.

    Raises:
        ConfigError: its head predicts several things at once.
    """
    if is_made_up(name):
        return None
    path, _ = model_directory(name)
    try:
        config = import_transformers().AutoConfig.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )
    except Exception:  # loading the model will report the error
        return None
    if not any(str(each).endswith("ForSequenceClassification") for each in config.architectures or ()):
        return None
    return _classes_of(config, name)


def new_modules(model: nn.Module) -> tuple[str, ...]:
    """Returns the modules with random weights, because the base has none for them; they belong in modules_to_save."""
    return _NEW.get(model, ())


def _settings(labels: Sequence[str]) -> dict[str, Any]:
    if not labels:
        return {"num_labels": 1, "problem_type": "regression"}
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
        "problem_type": "single_label_classification",
    }


def _made_up(name: str, settings: dict[str, Any], dtype: Any, device: torch.device, seed: int, *sizes: Any) -> Any:
    """Builds a classifier on the body of a made-up base, with the same weights as in the language model."""
    base = build_base(name, dtype, device, seed, *sizes)
    classes = import_transformers().AutoModelForSequenceClassification
    if type(base.config) not in classes._model_mapping:
        raise BaseModelError(f"{name} cannot be used for classification. Use scratch-encoder, or a pretrained --model.")
    config = base.config.__class__.from_dict({**base.config.to_dict(), **settings})
    config.name_or_path = base.config.name_or_path
    model = classes.from_config(config)
    body = base.base_model_prefix
    getattr(model, body).load_state_dict(getattr(base, body).state_dict())
    return model.to(base.dtype)


def _read(
    path: str, name: str, settings: dict[str, Any], dtype: torch.dtype, quantize: str | None, replaces_head: bool
) -> tuple[Any, list[str]]:
    """Reads a model and returns it with the names of its tensors that the checkpoint lacks, or has in another size."""
    own = stored_quantization(Path(path))
    fewer_bits = {} if quantize is None or own is not None else quantizing(quantize, dtype)
    try:
        with quiet_reading(), keep_freed_memory(lean=True):
            model, info = import_transformers().AutoModelForSequenceClassification.from_pretrained(
                path,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                weights_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below
                **settings,
                **fewer_bits,
            )
    except Exception as error:
        refuse_pointers(Path(path), name)
        kinds = (
            "Choose a model that transformers supports as one (AutoModelForSequenceClassification): BERT, RoBERTa, "
            "DeBERTa, ModernBERT, GPT-2, Llama, Qwen."
        )
        advice = kinds if own is None else way_out(own)
        raise BaseModelError(
            f"{name!r} cannot be loaded as a text classifier: {first_line(error)}. {advice}"
        ) from error
    others = {key: sizes for key, *sizes in info["mismatched_keys"]}
    body = f"{model.base_model_prefix}."
    if faults := [
        f"{key}: {tuple(there)} in the checkpoint, {tuple(wanted)} wanted"
        for key, (there, wanted) in sorted(others.items())
        if key.startswith(body) or not replaces_head
    ]:
        fix = "Give as many labels as the head has outputs, or the model without a head."
        raise BaseModelError(list_faults(f"{name!r} has tensors of other sizes", faults, fix))
    new = sorted({*info["missing_keys"], *others})
    lost = [key for key in new if key.startswith(body) and "pooler" not in key]
    if lost:
        heading = f"{len(lost)} of {type(model).__name__}'s tensors are missing from the weights of {name!r}"
        raise BaseModelError(list_faults(heading, lost, "Download the model again, or use a complete one."))
    if fewer_bits:
        finish_reading(model)
    elif own is not None:
        say(f"note: {take_over(model, name, method_of(own), dtype, quantize)}", file=sys.stderr)
    return model, new


def _owners(model: Any, keys: Sequence[str]) -> tuple[str, ...]:
    """Returns the modules that hold these tensors: direct children of the model, or modules within its body."""
    body = model.base_model_prefix
    owners = dict[str, None]()
    for key in keys:
        first, _, _ = key.partition(".")
        owners[key.rpartition(".")[0] if first == body else first] = None
    return tuple(owners)


def _keep_in_fp32(module: nn.Module) -> None:
    """Keeps a trained module in fp32 when the body has a narrower dtype, and casts its inputs to match."""
    module.float()
    for part in module.modules():
        if any(parameter is not None for parameter in part._parameters.values()):
            part.register_forward_pre_hook(_in_own_dtype)


def _in_own_dtype(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = next(parameter.dtype for parameter in module._parameters.values() if parameter is not None)
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
