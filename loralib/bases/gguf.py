"""Base models in GGUF files, llama.cpp's format.

transformers reads config, tokenizer and dequantised weights.  The result is then compared with the file's blocks: if
their format is supported and they represent exactly the same numbers, a linear layer keeps the blocks instead of its
dense weight.  This avoids a second implementation of name and order translation.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import io
import mmap
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from ..console import counted
from ..errors import BaseModelError, FormatError, MissingDependencyError, first_line
from ..formats.gguf import GGUFTensor, gguf_header, reorder_rows
from ..injection import samples_of
from ..layers import is_conv1d
from .quant import GGUF_BLOCK, Q4Weight, Q8Weight, QuantizedWeight, linears_of, pack_nibbles

__all__ = ["check_file", "from_pretrained_args", "keep_blocks", "read_dense", "read_tokenizer"]

_Stored = dict[str, tuple[GGUFTensor, memoryview]]

_SPLIT = re.compile(r"-\d{5}-of-\d{5}$")


def from_pretrained_args(path: Path) -> tuple[str, dict[str, Any]]:
    """Returns arguments of transformers' ``from_pretrained`` that locate a model: a directory, or a GGUF file."""
    return (str(path.parent), {"gguf_file": path.name}) if path.is_file() else (str(path), {})


def check_file(path: Path) -> dict[str, Any]:
    """Checks a GGUF file's header before passing it to libraries that trust it, and returns its fields.

    Raises:
        BaseModelError: it is damaged, or contains no model or only part of one.
        MissingDependencyError: the packages that read such files are not installed.
    """
    _check_packages()
    fields, _ = _opened(path)
    if fields.get("general.type", "model") != "model" or "general.architecture" not in fields:
        what = fields.get("general.type", "no architecture")
        raise BaseModelError(f"{path} is a GGUF file, but not a model: it contains {what}. Give the model's own file.")
    if fields.get("split.count", 0) or _SPLIT.search(path.stem):
        raise BaseModelError(
            f"{path} is one part of a model. Join the parts first: llama-gguf-split --merge {path.name} whole.gguf"
        )
    return fields


def read_dense(path: Path, dtype: torch.dtype) -> Any:
    """Reads a causal language model from a GGUF file, with dense weights.

    Raises:
        BaseModelError: the file is damaged, or transformers cannot read such a model.
        MissingDependencyError: the packages that read such files are not installed.
    """
    import transformers

    fields = check_file(path)
    where, options = from_pretrained_args(path)
    causal: Any = transformers.AutoModelForCausalLM
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # hides the reader's progress bar, which ignores settings
            model, info = causal.from_pretrained(
                where, **options, dtype=dtype, local_files_only=True, output_loading_info=True
            )
    except Exception as error:
        raise BaseModelError(
            f"{path} cannot be read: transformers reports for its {fields['general.architecture']!r} model: "
            f"{first_line(error)}. Use a model in safetensors files."
        ) from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:4])
        raise BaseModelError(f"{path} lacks tensors of {type(model).__name__}, such as {missing}; use another file.")
    # A model read from a GGUF file counts as quantised, which would prevent saving it.
    model.hf_quantizer = None
    model.is_quantized = False
    for name in ("quantization_config", "_model_name_or_path"):  # some releases of transformers 5 do not set them
        model.config.__dict__.pop(name, None)
    _scale_rotation(model, path)
    return model


def _scale_rotation(model: Any, path: Path) -> None:
    """Adds the scaling of the rotary embedding, which transformers does not read from the file.

    llama.cpp stores the parameters of linear and YaRN scaling, but for Llama 3 the factors computed from them.
    """
    fields, stored = _opened(path)
    found = {name: data for name, (_, data) in stored.items() if name.startswith(("rope_freqs.", "rope_factors_"))}
    scaling, factors = _scaling_in(fields), None
    if found:
        factors = torch.frombuffer(bytearray(found.get("rope_freqs.weight", b"\0\0\0\0")), dtype=torch.float32)
        scaling = {"rope_type": "llama3", "factor": float(factors.max()), **_LLAMA_3}
    rope = dict(getattr(model.config, "rope_parameters", None) or {})
    part = rope.get("full_attention", rope)  # in models with windows, the other layers are not scaled
    if scaling is None or part.get("rope_type", "default") != "default":  # transformers read it after all
        return
    rope |= {"full_attention": part | scaling} if part is not rope else scaling
    plain = [(name, module) for name, module in model.named_modules() if _frequencies(module)]
    model.config.rope_parameters = rope
    for name, module in plain:
        try:
            scaled = type(module)(model.config)
        except Exception as error:
            raise _not_scaled(path, f"{scaling['rope_type']}: {first_line(error)}") from error
        if factors is not None and not torch.allclose(scaled.inv_freq * factors, module.inv_freq, rtol=1e-3):
            raise _not_scaled(path, ", ".join(found))
        if factors is None and all(map(torch.equal, _frequencies(scaled), _frequencies(module))):
            raise _not_scaled(path, scaling["rope_type"])
        model.set_submodule(name, scaled)
    if not plain:
        raise _not_scaled(path, scaling["rope_type"])


def _scaling_in(fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the scaling of the rotary embedding in a file's fields, by transformers' names; None if there is none."""
    begin = f"{fields['general.architecture']}."
    factor = fields.get(f"{begin}rope.scaling.factor", fields.get(f"{begin}rope.scale_linear", 1.0))
    kind = fields.get(f"{begin}rope.scaling.type", "linear")
    if kind == "none" or factor in (0.0, 1.0):
        return None
    length = fields.get(f"{begin}rope.scaling.original_context_length", fields.get(f"{begin}context_length"))
    return {"rope_type": kind, "factor": factor} | ({} if kind == "linear" else {_ORIGINAL: length})


def _frequencies(module: nn.Module) -> list[Tensor]:
    return [held for name, held in module._buffers.items() if name.endswith("inv_freq") and held is not None]


def _not_scaled(path: Path, what: str) -> BaseModelError:
    return BaseModelError(
        f"{path} scales its rotary embedding ({what}), which transformers does not read from such files. Use the model "
        "in safetensors files."
    )


def read_tokenizer(path: Path) -> tuple[Any, str]:
    """Reads the tokenizer of a GGUF file.

    Returns:
        The tokenizer, and a note for the user, or "".

    Raises:
        BaseModelError: the file is damaged, or transformers cannot read such a tokenizer.
    """
    import transformers

    fields = check_file(path)
    where, options = from_pretrained_args(path)
    try:
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(where, **options, local_files_only=True)
    except Exception as error:
        raise BaseModelError(
            f"the tokenizer in {path} cannot be read: {first_line(error)}. Put the model's tokenizer.json and "
            "tokenizer_config.json next to the file; they take precedence."
        ) from error
    for name, key in _SPECIAL_TOKENS.items():  # transformers before 5.18 ignores the file's own
        if isinstance(number := fields.get(f"tokenizer.ggml.{key}_token_id"), int):
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(number))
    if fields.get("tokenizer.ggml.pre") == "smollm":
        _split_as_smollm(tokenizer)
    length = fields.get(f"{fields['general.architecture']}.context_length")
    tokenizer.model_max_length = length if isinstance(length, int) else tokenizer.model_max_length
    return tokenizer, _note_on_splitting(fields, path)


def _split_as_smollm(tokenizer: Any) -> None:
    """Turns the tokenizer that transformers reads from the GGUF file into SmolLM2's own."""
    from tokenizers import decoders, pre_tokenizers

    # The file only names its pre-tokenizer ("smollm"), and transformers falls back to GPT-2's. SmolLM2 splits off every
    # digit first, which matters for runs of spaces before a number.
    splits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    # Releases before 5.18 treat it like Llama's tokenizer, and confuse its start and end tokens.
    tokenizer.backend_tokenizer.normalizer, tokenizer.backend_tokenizer.decoder = None, decoders.ByteLevel()
    tokenizer.clean_up_tokenization_spaces = False


def _note_on_splitting(fields: Mapping[str, Any], path: Path) -> str:
    rule = fields.get("tokenizer.ggml.pre")
    known = {"smollm", "gpt-2", "gpt2"}
    with contextlib.suppress(ImportError):
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

        known |= set(GGUF_PRE_TOKENIZER_SPLITS)
    if fields.get("tokenizer.ggml.model") != "gpt2" or rule in known:
        return ""
    return (
        f"{path.name} names a rule for splitting texts ({rule}) that this version of transformers does not know: some "
        "texts may be tokenized differently than in the model's training. To be safe, put its tokenizer.json next to "
        "the file."
    )


def keep_blocks(model: nn.Module, path: Path) -> str:
    """Replaces dense weights of linear layers with the file's blocks, if their format is supported.

    Args:
        model: result of `read_dense`.
        path: the same file.

    Returns:
        A summary for the user.
    """
    import gguf

    kept, dense = Counter[str](), Counter[str]()
    fields, stored = _opened(path)
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    architecture, config = numbers.get(fields["general.architecture"]), cast(Any, model).config
    table = None if architecture is None else gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    names = {id(module): name for name, module in model.named_modules()}
    for linear in linears_of(model):
        place = None if table is None else stored.get(f"{table.get_name(names[id(linear)])}.weight")
        weight = None if place is None else _in_blocks(linear, place, _orders(config))
        kind = "others" if place is None else gguf.GGMLQuantizationType(place[0].kind).name
        (dense if weight is None else kept)[kind] += 1
        if weight is not None:
            linear.weight = nn.Parameter(weight, requires_grad=False)
    return _told(kept, dense)


def _told(kept: Mapping[str, int], dense: Mapping[str, int]) -> str:
    said = [
        f"{counted(sum(kinds.values()), 'linear layer')} {how} ({', '.join(sorted(kinds))})"
        for kinds, how in ((kept, "kept in the file's blocks"), (dense, "dequantised"))
        if kinds
    ]
    return "; ".join(said)


def _orders(config: Any) -> list[int]:
    """Returns head counts for which llama.cpp may have permuted the rows of q and k; 0 stands for no permutation."""
    heads = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    return [0, *sorted({number for number in heads if isinstance(number, int)})]


def _in_blocks(linear: Any, place: tuple[GGUFTensor, memoryview], orders: list[int]) -> QuantizedWeight | None:
    """Returns a linear layer's weight as the file's blocks; None if they are not supported, or have other values."""
    turned = is_conv1d(linear)
    weight = linear.weight.detach()
    rows = weight.T if turned else weight
    known = _BLOCKS.get(place[0].kind)
    if known is None or place[0].shape != tuple(rows.shape):
        return None
    cls, parts = known(place[1], *rows.shape)
    for heads in orders:
        if heads and rows.shape[0] % (2 * heads):
            continue
        ordered = {name: _ordered(part, rows.shape[0], heads) for name, part in parts.items()}
        held = cls(ordered, rows.shape, weight.dtype, turned, samples_of(weight).clone())
        if torch.equal(held.rows(weight.dtype), rows):
            return held
    return None


def _ordered(part: Tensor, rows: int, heads: int) -> Tensor:
    """Restores the row order that transformers uses, for one part of a weight."""
    return reorder_rows(part.view(rows, -1), heads, to_gguf=False).contiguous().view(part.shape) if len(part) else part


_SPECIAL_TOKENS: Final = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_ORIGINAL: Final = "original_max_position_embeddings"
# The other parameters of this scaling, which are the same in all such models.
_LLAMA_3: Final = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, _ORIGINAL: 8192}

# Parsers for the contents of blocks, by ggml's type number.

_Parts = tuple[type[QuantizedWeight], Mapping[str, Tensor]]


def _q8_0(blocks: Tensor, out: int, width: int) -> _Parts:
    """34 bytes per block: the scale, and 32 codes."""
    scales = _halves(blocks[:, :2]).view(out, width // GGUF_BLOCK)
    return Q8Weight, {"codes": blocks[:, 2:].contiguous().view(torch.int8).view(out, width), "scales": scales}


def _q4_0(blocks: Tensor, out: int, width: int) -> _Parts:
    """18 bytes per block: the scale, and 16 bytes of codes, where 8 represents zero."""
    scales = _halves(blocks[:, :2])
    return _q4(blocks[:, 2:], scales, -8 * scales)


def _q4_1(blocks: Tensor, out: int, width: int) -> _Parts:
    """20 bytes per block: scale and minimum, and 16 bytes of codes."""
    return _q4(blocks[:, 4:], _halves(blocks[:, :2]), _halves(blocks[:, 2:4]))


def _q4_k(blocks: Tensor, out: int, width: int) -> _Parts:
    """144 bytes for 256 numbers: scale, minimum, 6 bits of each for 8 blocks of 32, and the codes, in pairs of blocks.

    The 12 bytes of 6-bit numbers are: scales of four blocks with the upper bits of the other four's, minima likewise,
    and the lower bits of the other four's scales and minima.
    """
    first, second, lower = blocks[:, 4:16].view(-1, 3, 4).unbind(1)
    scales = torch.cat([first & 63, lower & 15 | first >> 2 & 48], 1)
    minima = torch.cat([second & 63, lower >> 4 | second >> 2 & 48], 1)
    codes = blocks[:, 16:].reshape(-1, GGUF_BLOCK)
    pairs = torch.stack((codes & 15, codes >> 4), 1).view(-1, GGUF_BLOCK)
    parts = {"codes": pack_nibbles(pairs), "scales": _halves(blocks[:, :2]), "minima": -_halves(blocks[:, 2:4])}
    return Q4Weight, parts | {"scale_codes": scales.reshape(-1), "minimum_codes": minima.reshape(-1)}


def _q4(codes: Tensor, scales: Tensor, minima: Tensor) -> _Parts:
    """Codes of which each byte holds one from the first and one from the second half of a block."""
    ones = torch.empty(0, dtype=torch.uint8)
    parts = {"scales": scales, "minima": minima, "scale_codes": ones, "minimum_codes": ones.clone()}
    return Q4Weight, {"codes": pack_nibbles(torch.cat((codes & 15, codes >> 4), 1))} | parts


def _halves(two_bytes: Tensor) -> Tensor:
    return two_bytes.contiguous().view(torch.float16).view(-1)


def _of_bytes(size: int, parse: Callable[[Tensor, int, int], _Parts], data: memoryview, out: int, width: int) -> _Parts:
    return parse(torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, size), out, width)  # copies the data


_BLOCKS: Final[Mapping[int, Callable[[memoryview, int, int], _Parts]]] = {
    2: functools.partial(_of_bytes, 18, _q4_0),
    3: functools.partial(_of_bytes, 20, _q4_1),
    8: functools.partial(_of_bytes, 34, _q8_0),
    12: functools.partial(_of_bytes, 144, _q4_k),
}


# The file.


def _opened(path: Path) -> tuple[dict[str, Any], _Stored]:
    """Returns the fields of a file, and location and bytes of its tensors by name; does not read the whole file."""
    try:
        with path.open("rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))  # closed with its last reference
        fields, stored = gguf_header(data)
    except (FormatError, ValueError) as error:  # empty files cannot be mapped
        raise BaseModelError(
            f"{path} cannot be read as a GGUF file: {first_line(error)}. It is truncated, damaged or not a GGUF file; "
            "copy it again from its source."
        ) from error
    except OSError as error:
        raise BaseModelError(f"{path} cannot be read: {error.strerror or error}") from error
    return fields, {name: (place, data[place.begin : place.end]) for name, place in stored.items()}


def _check_packages() -> None:
    try:
        import gguf  # transformers uses it to read the file
    except ImportError as error:
        raise _missing("gguf") from error
    # On Python 3.10, early releases of transformers 5 look for gguf.__version__, which does not exist.
    vars(gguf).setdefault("__version__", importlib.metadata.version("gguf"))
    if importlib.util.find_spec("accelerate") is None:  # otherwise transformers reports it only after starting to read
        raise _missing("accelerate")


def _missing(package: str) -> MissingDependencyError:
    return MissingDependencyError(f"loading a base model needs {package}: pip install 'loralib[train]'")
