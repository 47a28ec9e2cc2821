"""What a training job would do, shown before it starts: how its data are read, what it needs, how long it takes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import nn

from ..budget import BYTES_PER_TRAINED, training_budget
from ..data import TokenExample, token_texts
from ..files import free_memory
from ..targets import match_modules
from ..training import TrainConfig
from ..training.plan import Plan, make_plan, updates_per_epoch
from ..wrapping import output_head

__all__ = ["ExamplePreview", "Preview", "machine_speed", "make_preview"]

_OF_MATRIX_SPEED = (
    0.5  # training reaches this share of the speed of plain matrix products: at best 0.66, less with small steps
)
_FLOPS = 4  # per parameter and token: forward, and the gradient of the inputs; frozen weights need no gradients


@dataclass(frozen=True)
class ExamplePreview:
    """One example as the model will see it.

    Attributes:
        source: its location, such as ``train.jsonl:3``.
        tokens, trained: its number of tokens, and how many of them are trained.
        pieces: its tokens in order, each with whether it is trained.
    """

    source: str
    tokens: int
    trained: int
    pieces: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class Preview:
    """What a training job would do.

    Attributes:
        notes: lines on how the data are read, and what was decided.
        given: number of examples in the data.
        used: number of examples that are trained on.
        valid: number of examples for validation.
        dropped: number of examples left out, by reason.
        left_out: the first of those: location, reason, and number of tokens (0: not counted).
        examples: the first examples that are trained on.
        config: the settings, including those that were chosen automatically.
        steps: number of updates.
        trained_parameters: number of parameters of the adapter.
        memory, free: bytes that the job's process needs, and that are free now; None: unknown.
        seconds: estimated duration.
        measured: whether the estimate is based on earlier jobs here, instead of the speed of plain matrix products.
    """

    notes: tuple[str, ...]
    given: int
    used: int
    valid: int
    dropped: dict[str, int]
    left_out: tuple[tuple[str, str, int], ...]
    examples: tuple[ExamplePreview, ...]
    config: TrainConfig
    steps: int
    trained_parameters: int
    memory: float
    free: float | None
    seconds: float
    measured: bool


def make_preview(
    config: TrainConfig,
    model: nn.Module,
    tokenizer: Any,
    *,
    public: Callable[[str], str] = str,
    speed: float | None = None,
    count: int = 5,
) -> Preview:
    """Plans a run like the trainer, and estimates its cost.

    Args:
        config: the run's settings, including its data.
        model: its base, which is not changed.
        tokenizer: the base's tokenizer.
        public: makes a text suitable for clients.
        speed: tokens per second in earlier runs on this base; None: there were none.
        count: number of examples to show.

    Raises:
        LoraError: the run would not start, for this reason.
    """
    notes: list[str] = []
    plan = make_plan(model, config.train_data, config.valid_data, tokenizer, config, notes.append)
    encoded = plan.encoded
    trained = trained_parameters(model, plan.config)
    memory, free = _memory(model, plan, trained)
    steps, tokens = _length(plan)
    seconds = tokens / speed if speed else tokens * _FLOPS * _matrix_parameters(model) / machine_speed(model)
    texts = zip(encoded.examples, encoded.texts, strict=True)
    return Preview(
        notes=tuple(public(note) for note in notes),
        given=encoded.given,
        used=len(plan.train),
        valid=len(plan.valid),
        dropped=encoded.dropped,
        left_out=tuple((public(item.example.source), item.reason, item.tokens) for item in encoded.out[:count]),
        examples=tuple(
            ExamplePreview(public(text.source), len(example), example.trained_tokens, pieces_of(example, tokenizer))
            for (example, text), _ in zip(texts, range(count), strict=False)
        ),
        config=plan.config,
        steps=steps,
        trained_parameters=trained,
        memory=memory,
        free=free,
        seconds=seconds,
        measured=speed is not None,
    )


def trained_parameters(model: nn.Module, config: TrainConfig) -> int:
    """Returns the number of parameters that an adapter would have, without biases.

    Raises:
        TargetError: the adapter does not fit the model.
    """
    targets = match_modules(model, config.lora_config())
    return sum(math.prod(shape) for target in targets for shape in target.shapes().values())


def pieces_of(example: TokenExample, tokenizer: Any) -> tuple[tuple[str, bool], ...]:
    """Returns the tokens of an example in order, each with whether it is trained; for a pair, both answers."""
    first, *others = example.rows
    pieces = _pieces(first.ids, first.trained, tokenizer)
    for row in others:
        start = len(row.prompt)
        pieces += (("\n\n(rejected) ", False), *_pieces(row.ids[start:], row.trained[start:], tokenizer))
    return pieces


def _pieces(ids: Sequence[int], trained: Sequence[bool], tokenizer: Any) -> tuple[tuple[str, bool], ...]:
    return tuple(
        (text, flag)
        for flag, run in groupby(zip(ids, trained, strict=True), key=lambda pair: pair[1])
        for text in token_texts([token for token, _ in run], tokenizer, keep="\n")
    )


def _length(plan: Plan) -> tuple[int, float]:
    """Returns a run's number of updates, and of tokens to compute; tokens for validation count half."""
    config = plan.config
    per_epoch = updates_per_epoch(config, len(plan.train))
    steps = config.max_steps or config.num_epochs * per_epoch
    validations = 1 + math.ceil(steps / (config.eval_steps or per_epoch))
    return steps, steps / per_epoch * sum(map(len, plan.train)) + validations * sum(map(len, plan.valid)) / 2


def _memory(model: nn.Module, plan: Plan, trained: int) -> tuple[float, float | None]:
    """Returns the memory needed by a separate process: a copy of the base, the adapter with its optimiser, a step."""
    tokens = max(map(len, plan.train)) * plan.config.batch_size
    budget = training_budget(model, tokens, checkpointing=plan.config.gradient_checkpointing, adapted=True)
    return budget.total + BYTES_PER_TRAINED * trained, free_memory()


def _matrix_parameters(model: nn.Module) -> int:
    """Returns the number of parameters used in matrix products: all except embeddings that are only looked up."""
    head = output_head(model)
    tables = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    looked_up = sum(w.numel() for key, w in tables.items() if head is None or key != id(getattr(head, "weight", None)))
    return sum(parameter.numel() for parameter in model.parameters()) - looked_up


def machine_speed(model: nn.Module, rows: int = 256, width: int = 1024) -> float:
    """Roughly estimates the operations per second that training will reach with weights like the model's."""
    like = next(model.parameters())
    x = torch.ones(rows, width, dtype=like.dtype, device=like.device)
    weight = torch.ones(width, width, dtype=like.dtype, device=like.device)
    best = math.inf
    with torch.no_grad():
        for _ in range(4):
            started = time.perf_counter()
            product = x @ weight
            product[0, 0].item()  # waits for devices that compute asynchronously
            best = min(best, time.perf_counter() - started)
    return _OF_MATRIX_SPEED * 2 * rows * width * width / best
