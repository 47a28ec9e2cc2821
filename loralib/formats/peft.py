"""PEFT's adapter directory: adapter_config.json and adapter_model.safetensors.

Tensors are named ``base_model.model.`` + module path + ``.lora_A.weight`` and so on; names of embedding factors and
trained biases lack ``.weight``.  The out_proj of nn.MultiheadAttention is found under ``base_layer``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..adapter import BLOCKS, MODEL_TYPE, Adapter, adapter_of, expand_blocks, narrow_blocks, without_expressions
from ..config import HUB_NAMES, LoraConfig, matches
from ..errors import AdapterError, FormatError, list_faults
from ..hub import is_hub_id
from ..injection import adapted_layers
from ..layers import LoRALinear
from ..wrapping import named_modules, named_parameters, unwrapped, writes_files
from . import experts
from .tensors import (
    CONFIG_FILE,
    MAX_SETTINGS,
    PEFT_FILE,
    PEFT_PICKLE,
    parse_json,
    read_bytes,
    read_pickle,
    read_safetensors,
    write_directory,
)

__all__ = ["load_faults", "read_peft", "save_adapter", "target_names", "task_type_of", "write_peft"]

_PREFIX = "base_model.model."
# Name components added by compilation, sharding or DDP when an adapter was saved; they are not modules of the base.
_WRAPPERS = re.compile(
    r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|^module\.(?=base_model\.)"
)
# The base's tensors that are replaced by modules_to_save.
_REPLACED = re.compile(r"\.original_module\.")
_ADAPTER_NAME = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)\.default(?=\.|$)")
_DIFFUSERS = "pytorch_lora_weights.safetensors"
_BASE_NAME = "loralib.base_name"  # metadata: our name of a base, if the settings name its original, for other tools


def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> Adapter:
    """Saves a model's adapter as a PEFT directory, which PEFT, vLLM and transformers can load.

    Args:
        model: adapted by `loralib.inject`, or built from loralib's layers.  Under FSDP, every process must call this,
            and rank 0 writes.
        directory: created if needed; an adapter in it is replaced, other files are left alone.

    Returns:
        What was saved.

    Raises:
        TargetError: the model holds no adapter.
        OutputError: the directory cannot be written.
    """
    adapter, model = adapter_of(model), unwrapped(model)
    if absent := [name for name, tensor in adapter.tensors.items() if tensor.is_meta]:
        fix = "Load the model without offloading, or save before its layers are offloaded."
        raise AdapterError(list_faults("these tensors are on the meta device and have no values", absent, fix))
    name = adapter.config.base_model_name_or_path or getattr(model, "name_or_path", None) or None
    # A path in the Hub's cache is meaningless on another machine.
    if cached := re.search(r"[\\/]models--([^\\/]+)[\\/]snapshots[\\/]", name or ""):
        name = cached[1].replace("--", "/")
    config = adapter.config.targeting(target_names(adapter, model)).replace(
        target_parameters=experts.parameter_names(adapter, list(named_parameters(model))),
        base_model_name_or_path=name,
        # Tells readers that Conv1D stores its weight as (in, out).
        fan_in_fan_out=any(isinstance(m, LoRALinear) and m.fan_in_fan_out for _, m in adapted_layers(model)),
        task_type=adapter.config.task_type or task_type_of(model),
    )
    adapter = Adapter(config, adapter.tensors, adapter.metadata)
    if writes_files(model):
        write_peft(adapter, directory)
    return adapter


def read_peft(directory: str | os.PathLike[str]) -> Adapter:
    """Reads a PEFT adapter directory.

    Args:
        directory: contains adapter_config.json and adapter_model.safetensors (or an older adapter_model.bin).

    Raises:
        AdapterError: the directory contains no LoRA adapter, or one with features that loralib would lose.
        FormatError: a file is corrupt.
    """
    directory = Path(directory)
    missing = [name for name in (CONFIG_FILE, PEFT_FILE) if not (directory / name).is_file()]
    if CONFIG_FILE in missing or (missing and not (directory / PEFT_PICKLE).is_file()):
        fault = "does not exist" if not directory.exists() else f"contains no adapter: {' and '.join(missing)} missing"
        if (directory / _DIFFUSERS).is_file():
            fault = f"contains an adapter in diffusers' format, for images ({_DIFFUSERS}), which loralib does not read"
        # PEFT writes adapters that have names into folders of these names.
        below = sorted(str(path.parent) for path in directory.glob(f"*/{CONFIG_FILE}"))
        fix = "Give the directory that training or save_adapter() wrote"
        fix += f"; in it there are adapters in {', '.join(below[:4])}." if below else "."
        raise AdapterError(f"{directory} {fault}. {fix}")
    settings = read_bytes(directory / CONFIG_FILE, parse_json, max_size=MAX_SETTINGS)
    if not isinstance(settings, dict):
        raise FormatError(
            f"{directory / CONFIG_FILE} contains {type(settings).__name__}, expected an object with settings"
        )
    config = LoraConfig.from_dict(settings)
    name, revision = config.base_model_name_or_path or "", settings.get("revision")
    if isinstance(revision, str) and revision and "@" not in name and is_hub_id(versioned := f"{name}@{revision}"):
        config = config.replace(base_model_name_or_path=versioned)
    metadata: dict[str, str] = {}
    if PEFT_FILE in missing:
        tensors = read_pickle(directory / PEFT_PICKLE)
        if not isinstance(tensors, Mapping) or not all(isinstance(t, Tensor) for t in tensors.values()):
            raise FormatError(f"{directory / PEFT_PICKLE} does not contain a mapping from names to tensors")
    else:
        tensors, metadata = read_safetensors(directory / PEFT_FILE)
    metadata.pop("format", None)
    if config.base_model_name_or_path == HUB_NAMES.get(ours := metadata.pop(_BASE_NAME, ""), 0):
        config = config.replace(base_model_name_or_path=ours)
    adapter = without_expressions(Adapter(config, _with_our_names(tensors, config, directory), metadata))
    if BLOCKS in metadata:
        try:
            blocks = parse_json(metadata[BLOCKS])
        except FormatError as error:
            raise FormatError(f"{directory / PEFT_FILE}: metadata {BLOCKS!r} contains {error}") from error
        others = ("lora_embedding_A", "lora_experts_A")
        fused = [name for name in adapter.modules if not any(f"{name}.{key}" in adapter.tensors for key in others)]
        lone = [name for name in fused if not {f"{name}.lora_A", f"{name}.lora_B"} <= set(adapter.tensors)]
        if lone:
            raise FormatError(list_faults(f"{directory}: factors are missing for", lone, "Copy the adapter again."))
        return narrow_blocks(adapter, blocks)
    return adapter


def write_peft(adapter: Adapter, directory: str | os.PathLike[str]) -> None:
    """Writes a PEFT adapter directory: first the tensors, then the config; other files are left alone.

    Args:
        adapter: its fused blocks are written as plain low-rank updates, which every reader understands.
        directory: created if needed.
    """
    plain = expand_blocks(adapter)
    apart = experts.of_experts(plain)
    tensors = {_to_peft(name, plain.tensors): tensor for name, tensor in plain.tensors.items() if name not in apart}
    tensors |= {f"{_PREFIX}{name}": tensor for name, tensor in experts.to_peft(plain).items()}
    config = plain.config
    if parameters := plain.expert_weights:  # PEFT supports no dropout for them
        config = config.replace(lora_dropout=0.0, target_parameters=config.target_parameters or parameters)
    settings, metadata = config.to_dict(), dict(plain.metadata)
    name = plain.config.base_model_name_or_path or ""
    if "@" in name and is_hub_id(name):
        settings["base_model_name_or_path"], _, settings["revision"] = name.rpartition("@")
    if name in HUB_NAMES:
        settings["base_model_name_or_path"], metadata[_BASE_NAME] = HUB_NAMES[name], name
    write_directory(directory, PEFT_FILE, tensors, metadata, settings)


# Kinds of models in which PEFT 0.21 takes dense layers for experts, because these had such names in older transformers
# versions; and kinds in which it refuses modules of a mixer.  Laguna's shared experts get a name that no module has.
_MIXTURES = frozenset(
    """afmoe beam cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5_moe exaone_moe flex_olmo glm4_moe
    glm4_moe_lite glm4v_moe glm_moe_dsa hunyuan_v1_moe longcat_flash mellum olmoe qwen3_moe qwen3_next qwen3_omni_moe
    qwen3_omni_moe_text qwen3_omni_moe_thinker solar_open""".split()
)
_MAMBA = frozenset("falcon_h1 falcon_mamba mamba mamba2 nemotron_h".split())


def load_faults(modules: Iterable[str], metadata: Mapping[str, str]) -> list[str]:
    """Returns why PEFT 0.21 does not load an adapter correctly, with a way out.

    Args:
        modules: the names of the adapted modules.
        metadata: that of the adapter, which tells the kind of its base; if it does not, no fault is found.

    >>> load_faults(["layers.0.mixer.out_proj", "layers.0.mixer.in_proj"], {"loralib.model_type": "mamba2"})
    ['PEFT 0.21 refuses these modules in models of type mamba2; train without them: exclude_modules mixer.out_proj']
    """
    kind = metadata.get(MODEL_TYPE, "")
    leaves, why = set[str](), ""
    if kind in _MIXTURES:
        leaves, why = {"gate_proj", "up_proj", "down_proj"}, "takes these modules for experts"
    elif kind in _MAMBA:
        leaves, why = {"conv1d", "out_proj"}, "refuses these modules"
    elif kind == "laguna":
        leaves, why = {"gate_proj", "up_proj", "down_proj"}, "leaves out these modules"
        modules = [name for name in modules if ".shared_experts." in name]
    parts = [name.split(".") for name in modules]
    endings = dict.fromkeys(".".join(name[-2:]) for name in parts if name[-1] in leaves)
    way = f"train without them: exclude_modules {','.join(endings)}"
    return [f"PEFT 0.21 {why} in models of type {kind}; {way}"] if endings else []


def target_names(adapter: Adapter, model: nn.Module | None) -> list[str] | str:
    """Returns target_modules that select exactly the adapted modules in every reader.

    Readers disagree on 'all-linear' and regular expressions, so names are listed, or their endings if these suffice. A
    list cannot tell "0" from "block.0", however; if only one of them is adapted, the result is an expression.
    """
    chosen = list(adapter.target_modules)
    if model is None:
        return chosen
    names = list(named_modules(model))
    short = list[str]()
    for ending in dict.fromkeys(name.rpartition(".")[2] for name in chosen):
        fitting = {name for name in names if name == ending or name.endswith(f".{ending}")}
        mine = [name for name in chosen if name.rpartition(".")[2] == ending]
        short += [ending] if fitting <= set(mine) else mine
    if {name for name in names if matches(short, name)} == set(chosen):
        return short
    return "|".join(re.escape(name) for name in chosen)


def task_type_of(model: nn.Module | None) -> str | None:
    """Returns PEFT's name for a model's task, which PEFT's Auto classes need to load an adapter."""
    return "CAUSAL_LM" if type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")) else None


def _with_our_names(tensors: Mapping[str, Tensor], config: LoraConfig, directory: Path) -> dict[str, Tensor]:
    """Returns a file's tensors under our names, sorted by the file's names.

    If PEFT saves a model's token tables although modules_to_save includes them, the file contains the trained table
    twice, as well as the base's own, which the trained one replaces.
    """
    named = dict[str, Tensor]()
    if config.target_parameters:
        named, tensors = experts.from_peft(_shortened(tensors, directory), config)
    for name in sorted(tensors):  # files have no order of their own
        if _REPLACED.search(name):
            continue
        ours, tensor = _from_peft(name), tensors[name]
        if ours in named and not torch.equal(named[ours], tensor):
            raise FormatError(_TWICE.format(directory))
        named[ours] = tensor
    return named


_TWICE = "{} contains a tensor under both an old and a new name; copy the adapter again"


def _shortened(tensors: Mapping[str, Tensor], directory: Path) -> dict[str, Tensor]:
    """Returns a file's tensors without the name components added by older versions of PEFT and by wrappers."""
    named = {_ADAPTER_NAME.sub(r".\1", _WRAPPERS.sub("", name).removeprefix(_PREFIX)): t for name, t in tensors.items()}
    if len(named) < len(tensors):
        raise FormatError(_TWICE.format(directory))
    return named


def _from_peft(name: str) -> str:
    """Converts PEFT's name for a tensor to ours."""
    name = _WRAPPERS.sub("", name)
    name = re.sub(r"(\.base_layer)+\.", ".", name.removeprefix(_PREFIX))
    name = re.sub(r"\.modules_to_save(\.default)?\.(?=[^.]+$)", ".", name)
    # Older files include the adapter's name; newer ones do not.
    name = _ADAPTER_NAME.sub(r".\1", name)
    return re.sub(r"\.(lora_[AB]|lora_magnitude_vector)\.weight$", r".\1", name)


def _to_peft(name: str, tensors: Mapping[str, Tensor]) -> str:
    """Converts our name for a tensor to PEFT's."""
    module, _, leaf = name.rpartition(".")
    if leaf in ("bias", "weight") and {f"{module}.lora_A", f"{module}.lora_embedding_A"} & tensors.keys():
        leaf = f"base_layer.{leaf}"  # PEFT wraps adapted modules
    parent = module.removesuffix(".out_proj")
    if parent != module and f"{parent}.lora_A" in tensors:  # nn.MultiheadAttention
        module = f"{parent}.base_layer.out_proj"
    return f"{_PREFIX}{module}.{leaf}" + (".weight" if leaf in ("lora_A", "lora_B") else "")
