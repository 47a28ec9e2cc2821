"""Base models created on the spot with random weights; the only file that defines scratch and the others.

Each has a width, a number of blocks and a seed. `build_base` builds the one that a name stands for; a name such as
``scratch-64x1-seed5`` includes all three, so that an adapter's config can identify its base exactly.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..console import say
from ..errors import ConfigError, list_faults
from ..layers import Embedding, Linear
from ..utils import mark_only_lora_as_trainable
from .device import pick_dtype

__all__ = ["MADE_UP_BASES", "RunDemo", "build_base", "is_made_up"]

VOCABULARY = 50257  # size of GPT-2's vocabulary; the tokenizer may use fewer tokens
HIDDEN_DIM, NUM_LAYERS, SEED = 768, 2, 0  # defaults, unless given by the user or the name


def is_made_up(name: str) -> bool:
    """Tells whether a name is that of a made-up base, with or without sizes.

    >>> is_made_up("scratch"), is_made_up("scratch-64x1-seed5"), is_made_up("gpt2")
    (True, True, False)
    """
    return _parse(name)[0] in MADE_UP_BASES


def build_base(
    name: str,
    dtype: str | torch.dtype | None,
    device: torch.device,
    seed: int,
    hidden_dim: int | None,
    num_layers: int | None,
) -> Any:
    """Builds a made-up base; its ``config.name_or_path`` includes sizes and seed if they are not the defaults.

    Args:
        name: name of the base, with or without sizes.
        dtype: dtype of all weights except LoRA's own, which stay in fp32; None or "auto": the base's default.
        device: device for choosing the default dtype; the model is built on the CPU.
        seed: random seed for the weights; ignored if the name contains one.
        hidden_dim: width of the model; default: 768.
        num_layers: number of blocks; default: 2.

    Raises:
        ConfigError: a size or the seed is out of range, or contradicts the name.
    """
    kind, sizes = _parse(name)
    if sizes is not None:
        if hidden_dim not in (None, sizes[0]) or num_layers not in (None, sizes[1]):
            raise ConfigError(
                f"hidden_dim={hidden_dim} and num_layers={num_layers} contradict {name!r}. Leave them out, or choose "
                f"--model {kind} with your own sizes."
            )
        hidden_dim, num_layers, seed = sizes
    hidden_dim = HIDDEN_DIM if hidden_dim is None else hidden_dim
    num_layers = NUM_LAYERS if num_layers is None else num_layers
    faults = [
        f"{key} is {value}, expected a whole number of at least 1"
        for key, value in {"hidden_dim": hidden_dim, "num_layers": num_layers}.items()
        if value < 1
    ]
    if not 0 <= seed < 2**63:
        faults.append(f"seed is {seed}, expected a whole number of at least 0 and below 2**63")
    if faults:
        raise ConfigError(list_faults(f"{kind} cannot be built", faults))
    build, default_dtype = MADE_UP_BASES[kind]
    with torch.random.fork_rng(devices=[]):  # preserves the caller's random state
        torch.manual_seed(seed)
        model: Any = build(hidden_dim, num_layers)
    weight_dtype = pick_dtype(default_dtype if dtype in (None, "auto") else dtype, device)
    for key, parameter in model.named_parameters():
        if "lora_" not in key:
            parameter.data = parameter.data.to(weight_dtype)
    is_default = (hidden_dim, num_layers, seed) == (HIDDEN_DIM, NUM_LAYERS, SEED)
    model.config.name_or_path = kind if is_default else f"{kind}-{hidden_dim}x{num_layers}-seed{seed}"
    return model


def _parse(name: str) -> tuple[str, tuple[int, int, int] | None]:
    """Splits a name into the base's plain name and (hidden_dim, num_layers, seed).

    >>> _parse("run-demo-64x1-seed5")
    ('run-demo', (64, 1, 5))
    """
    match = re.fullmatch(r"(.+)-(\d+)x(\d+)-seed(\d+)", name)
    return (match[1], (int(match[2]), int(match[3]), int(match[4]))) if match else (name, None)


def build_scratch(hidden_dim: int, num_layers: int) -> Any:
    """Builds a GPT-2 without dropout; its heads are 64 wide, or as close to that as the width allows."""
    import transformers

    divisors = [n for n in range(1, hidden_dim + 1) if hidden_dim % n == 0]
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=hidden_dim,
        n_layer=num_layers,
        n_head=min(divisors, key=lambda n: abs(n - hidden_dim / 64)),
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    say(
        f"note: 'scratch' is a GPT-2 with random weights (hidden_dim {hidden_dim}, num_layers {num_layers}). LoRA "
        "builds on what a model already knows; a random frozen model knows nothing and can hardly learn. Use it only "
        "to try things out.",
        file=sys.stderr,
    )
    return transformers.GPT2LMHeadModel(config)


def build_encoder(hidden_dim: int, num_layers: int) -> Any:
    """Builds a ModernBERT without dropout, whose classifier uses the mean over a text's tokens."""
    import transformers

    divisors = [n for n in range(1, hidden_dim + 1) if hidden_dim % n == 0 and hidden_dim // n % 2 == 0]
    if not divisors:
        raise ConfigError(f"hidden_dim is {hidden_dim}, expected an even number for scratch-encoder")
    config = transformers.ModernBertConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden_dim,
        intermediate_size=2 * hidden_dim,
        num_hidden_layers=num_layers,
        num_attention_heads=min(divisors, key=lambda n: abs(n - hidden_dim / 64)),
        classifier_pooling="mean",
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        cls_token_id=None,
        sep_token_id=None,
    )
    say(
        f"note: 'scratch-encoder' is a ModernBERT with random weights (hidden_dim {hidden_dim}, num_layers "
        f"{num_layers}). It can learn which words go with which label, but knows no words to begin with. Use it only "
        "to try things out.",
        file=sys.stderr,
    )
    return transformers.ModernBertForMaskedLM(config)


class RunDemo(nn.Module):
    """A LoRA embedding, blocks of two LoRA linear layers (width, 4 * width, width) with biases, and an untied head.

    There is no attention: each token is predicted from the previous one alone.  By default it has 87,752,033
    parameters, of which 1,062,160 are trained (1.21 %).

    Args:
        hidden_dim: the width.
        num_layers: number of blocks.
        freeze: whether to train only LoRA's own parameters; otherwise biases and head are trained too, which
            Microsoft's layers leave trainable by default.
    """

    def __init__(self, hidden_dim: int = 768, num_layers: int = 2, freeze: bool = True) -> None:
        super().__init__()
        settings: dict[str, Any] = {"r": 16, "lora_alpha": 32, "merge_weights": False}
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
        """Computes the logits of the next token; accepts, but ignores, other arguments of transformers' models.

        Args:
            input_ids: (B, T).
            logits_to_keep: number of last positions to compute (0: all), or indices of positions (n,).

        Returns:
            An object whose ``logits`` are (B, T, 50257), or (B, n, 50257) if n positions are kept.
        """
        x = self.embedding(input_ids)
        for block in self.blocks:
            layers = cast(nn.ModuleDict, block)
            x = x + layers["down_proj"](F.gelu(layers["up_proj"](x)))
        positions = slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return SimpleNamespace(logits=self.head(x[:, positions]))

    def get_input_embeddings(self) -> nn.Module:
        """Returns the embedding, like transformers' models."""
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        """Returns the head, like transformers' models."""
        return self.head


# name -> (function that builds it from hidden_dim and num_layers, default dtype of its weights or None: see
# `pick_dtype`). The model has a `config` like those in transformers.
MADE_UP_BASES: dict[str, tuple[Callable[[int, int], nn.Module], str | None]] = {
    "scratch": (build_scratch, None),
    "scratch-encoder": (build_encoder, None),
    "run-demo": (RunDemo, "fp32"),
}
