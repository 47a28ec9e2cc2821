"""What a run decides on its own: maximum example length, validation split, learning rate and warm-up."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any, cast

from torch import nn

from ..bases.classifiers import class_names
from ..console import count, counted, size
from ..data import (
    CLASSIFY,
    PREFERENCES,
    ClassRow,
    Encoded,
    Labels,
    PreferencePair,
    Source,
    TokenExample,
    draw,
    length_at,
    load_classes,
    load_examples,
    read_sources,
)
from ..data.examples import Example
from ..engine.forward import device_of
from ..engine.limits import context_length, last_position, require_ids_in_table, text_config
from ..errors import ConfigError, DataError
from .config import TrainConfig
from .learning_rate import automatic_learning_rate
from .memory import memory_estimate
from .ranks import ALONE, Ranks
from .record import data_record

__all__ = [
    "Data",
    "Plan",
    "automatic_settings",
    "examples_at_once",
    "how_to_read",
    "is_tokens",
    "length_limit",
    "make_plan",
    "split_off",
    "updates_per_epoch",
]

Data = Any  # anything that `read_sources` accepts, or TokenExample values

_VALIDATE = 0.05  # default share of the examples for validation
_TOO_FEW = 100  # with fewer examples than this, a validation share would be too small to be meaningful
_WARM_UP, _LONGEST_WARM_UP = 0.05, 100  # share of the updates; maximum number of updates
_WINDOW = 1024  # window size in tokens for plain text: longer windows cost memory and teach little more
_ROOM = 0.8  # share of the free memory that a step may use


@dataclass(frozen=True)
class Plan:
    """What a run trains and validates on, and its settings.

    Attributes:
        config: the settings, with every value chosen.
        train, valid: token examples.
        data: description of the data for the run's record (see `data_record`).
        encoded: all training data, including what was left out and why.
    """

    config: TrainConfig
    train: list[TokenExample]
    valid: list[TokenExample]
    data: list[dict[str, Any]]
    encoded: Encoded


def make_plan(
    model: nn.Module,
    data: Data,
    valid_data: Data | None,
    tokenizer: Any,
    config: TrainConfig,
    say: Callable[[str], None],
    limit: tuple[int | None, str] | None = None,
) -> Plan:
    """Turns data into token examples, and chooses the settings that were left to the program.

    Args:
        model: the model to train; it is not changed.
        data: anything that `loralib.train` accepts.
        valid_data: the same; None: part of `data` is split off.
        tokenizer: for files and text.
        config: the settings as given.
        say: called with a line about each decision.
        limit: result of `length_limit`, if several processes have agreed on one.

    Raises:
        ConfigError: the data are text and there is no tokenizer.
        DataError: there are no data, or they have the wrong type, or the model cannot process them.
    """
    longest, why = limit or length_limit(model, config)
    labels = Labels(class_names(model)) if config.task == CLASSIFY else None
    encoded = _encoded(data, tokenizer, config, longest, config.max_train_samples, "training", labels)
    _tell(encoded, "training", model, config, longest, why, say)
    train, valid = encoded.examples, list[TokenExample]()
    facts = data_record("training", _paths(data, config.train_data), train, encoded.given)
    if valid_data is not None:
        apart = _encoded(valid_data, tokenizer, config, longest, config.max_valid_samples, "validation", labels)
        _tell(apart, "validation", model, config, longest, why, say)
        valid = apart.examples
        facts += data_record("validation", _paths(valid_data, config.valid_data), valid, apart.given)
    else:
        train, valid, share = _split(encoded, config, say)
        config = config.replace(valid_fraction=share)
        facts[0] |= {"examples": len(train)}
        facts += data_record("validation", [], valid, encoded.given) if valid else []
    for rows, kind in ((train, "training example"), (valid, "validation example")):
        require_ids_in_table(model, (row.ids for example in rows for row in example.rows), kind)
    if config.seq_len is None:
        config = config.replace(seq_len=max(2, *(example.longest for example in (*train, *valid))))
    return Plan(automatic_settings(model, config, train, say), train, valid, facts, encoded)


def automatic_settings(
    model: nn.Module, config: TrainConfig, examples: Sequence[TokenExample], say: Callable[[str], None] = lambda _: None
) -> TrainConfig:
    """Chooses learning rate and warm-up if they were not given; `examples` are those of one epoch."""
    if config.lr is None:
        lr, reason = automatic_learning_rate(
            sum(parameter.numel() for parameter in model.parameters()),
            getattr(text_config(model), "hidden_size", None),
            config.alpha,
            config.batch_size * config.grad_accum * sum(row.trained_tokens for row in examples) / len(examples),
            config.loraplus_lr_ratio,
            config.objective,
        )
        b = "" if config.loraplus_lr_ratio == 1 else f", {config.loraplus_lr_ratio:g} times that for B"
        say(f"Learning rate: {lr:g}{b} ({reason}); --lr changes it")
        config = config.replace(lr=lr)
    if config.warmup_steps is None:
        updates = config.max_steps or config.num_epochs * updates_per_epoch(config, len(examples))
        config = config.replace(warmup_steps=min(_LONGEST_WARM_UP, round(_WARM_UP * updates)))
    return config


def updates_per_epoch(config: TrainConfig, examples: int) -> int:
    """Returns the number of updates in an epoch of this many examples."""
    return math.ceil(math.ceil(examples / config.batch_size) / config.grad_accum)


def _paths(data: Any, given: Any) -> list[str | Path]:
    """Returns the paths in the data argument, or those given originally, if the data have already been read."""
    items: Any = [data] if isinstance(data, (str, Path)) else data if isinstance(data, Sequence) else []
    if any(isinstance(item, Source) for item in items):
        items = [given] if isinstance(given, str) else given or []
    return [item for item in items if isinstance(item, (str, Path))]


# The maximum length of examples.


def length_limit(model: nn.Module, config: TrainConfig, ranks: Ranks = ALONE) -> tuple[int | None, str]:
    """Returns the maximum number of tokens per example, and what sets it; the rank with the least memory counts."""
    last = last_position(model)
    if config.seq_len is not None:
        if last is not None and config.seq_len > last:
            raise ConfigError(
                f"seq_len is {count(config.seq_len)}, but the model has only {count(last)} positions: lower --seq_len "
                f"to at most {count(last)}, or leave it out"
            )
        return config.seq_len, "seq_len"
    context = context_length(model)
    if context is not None and last is not None:
        context = min(context, last)
    fits = _fits_in_memory(model, config, ranks)
    if fits is not None and (context is None or fits < context):
        return fits, f"memory, with {counted(config.batch_size, 'example')} per step"
    return context, "the model's context"


def _fits_in_memory(model: nn.Module, config: TrainConfig, ranks: Ranks) -> int | None:
    """Returns the longest examples for which a step fits in free memory; None if that is unknown."""
    fixed, free = memory_estimate(model, 0, config.gradient_checkpointing, planned=True)
    if not all(ranks.gather(free is not None)) or free is None:
        return None
    if device_of(model).type == "cpu":
        free /= ranks.local_size
    free = min(ranks.gather(free))
    examples = examples_at_once(config, ranks) * (2 if config.objective in PREFERENCES else 1)
    many = 1 << 16  # enough for the cost per token to be constant
    per_token = (memory_estimate(model, many, config.gradient_checkpointing, planned=True)[0] - fixed) / many
    tokens = (_ROOM * free - fixed) / per_token if per_token else 0
    return max(64, int(tokens / examples) // 64 * 64)  # a lower limit would only hide that nothing fits


def _tell(
    encoded: Encoded,
    kind: str,
    model: nn.Module,
    config: TrainConfig,
    limit: int | None,
    why: str,
    say: Callable[[str], None],
) -> None:
    for note in encoded.notes:
        say(note)
    say(f"Loaded {encoded.summary(kind)}")
    if kind == "training" and config.seq_len is None and encoded.lengths:
        if encoded.seq_len is not None and encoded.seq_len != limit:
            limit, why = encoded.seq_len, "plain text is cut into windows"
        longest = max(encoded.lengths)
        bound = "" if limit is None else f"; the limit is {count(limit)} ({why})"
        if limit is None or longest <= limit:
            say(f"Sequence length: up to {count(longest)} tokens (the longest example){bound}")
        else:
            say(f"Sequence length: {count(limit)} tokens ({why}); the longest example has {count(longest)}")
    if encoded.length_warning:
        needed, free = memory_estimate(
            model, config.batch_size * length_at(encoded.lengths, 99), config.gradient_checkpointing, planned=True
        )
        there = f" ({size(free)} free now)" if free is not None else ""
        fix = "" if why == "seq_len" else " Lower --batch_size and raise --grad_accum, or add --gradient_checkpointing."
        if why == "the model's context":
            fix = " The model cannot take more: shorten the examples, or choose another model."
        say(f"WARNING: {encoded.length_warning} That takes about {size(needed)} per step{there}.{fix}")


def examples_at_once(config: TrainConfig, ranks: Ranks) -> int:
    """Returns how many examples go through the model at once on each rank."""
    return min(config.batch_size, math.ceil(config.batch_size * config.grad_accum / ranks.size))


# The data.


def _encoded(
    data: Any,
    tokenizer: Any,
    config: TrainConfig,
    limit: int | None,
    max_samples: int,
    kind: str,
    labels: Labels | None = None,
) -> Encoded:
    """Turns any data that `loralib.train` accepts into token examples, at most `max_samples` of them; 0: all."""
    if is_tokens(data):
        wants = (
            ClassRow if config.task == CLASSIFY else PreferencePair if config.objective in PREFERENCES else TokenExample
        )
        if any(type(item) is not wants for item in data):
            found = " and ".join(sorted({type(item).__name__ for item in data}))
            raise DataError(f"{kind} data contains {found}, expected {wants.__name__} for objective {config.objective}")
        return _limited_tokens(data, limit, max_samples, config.seed, kind)
    sources = read_sources(data, **how_to_read(config), name=f"{kind} data")
    if tokenizer is None:
        raise ConfigError(f"{kind} data is text, which needs a tokenizer: pass tokenizer=")
    if labels is not None:
        most, draws = getattr(tokenizer, "model_max_length", None), max_samples or None
        if isinstance(most, int) and most < 1 << 30:  # 10^30 means that the tokenizer does not know
            limit = min(limit or most, most)
        return load_classes(sources, tokenizer, limit=limit, labels=labels, max_samples=draws, seed=config.seed)
    if config.seq_len is None and all(example.is_plain for source in sources for example in source.examples):
        limit = min(limit or _WINDOW, _WINDOW)
    return load_examples(
        sources,
        tokenizer,
        **how_to_read(config),
        seq_len=limit,
        max_samples=max_samples or None,
        seed=config.seed,
    )


def is_tokens(data: Any) -> bool:
    """Whether data are token examples, which need no reading or tokenizing."""
    return isinstance(data, Sequence) and bool(data) and all(isinstance(item, TokenExample) for item in data)


def how_to_read(config: TrainConfig) -> dict[str, Any]:
    """Returns the arguments for `read_sources` from a run's settings."""
    names = {"format": config.data_format, "columns": config.columns, "as_chat": config.as_chat}
    return {**names, "objective": CLASSIFY if config.task == CLASSIFY else config.objective}


def _limited_tokens(data: Sequence[TokenExample], limit: int | None, max_samples: int, seed: int, kind: str) -> Encoded:
    texts = [Example.of("", "", f"{kind} example {number}") for number in range(1, len(data) + 1)]
    whole = Encoded(list(data), texts, [], [row.longest for row in data], len(data))
    encoded = whole.limited(limit)
    if not encoded.examples:
        raise DataError(
            f"no {kind} example is left ({encoded.drop_note}): the shortest has {min(whole.lengths):,} tokens"
        )
    pairs = draw(
        list(zip(encoded.examples, encoded.texts, strict=True)), max_samples or None, seed, lambda p: _start(p[0])
    )
    return Encoded(
        [row for row, _ in pairs], [text for _, text in pairs], encoded.out, whole.lengths, len(data), encoded.seq_len
    )


# Validation data.


def _split(
    encoded: Encoded, config: TrainConfig, say: Callable[[str], None]
) -> tuple[list[TokenExample], list[TokenExample], float]:
    """Splits off validation data; also returns the intended share."""
    rows = encoded.examples
    share = config.valid_fraction
    if share is None:
        share = _VALIDATE if len(rows) >= _TOO_FEW else 0.0
    wanted = round(share * len(rows))
    if config.max_valid_samples:
        wanted = min(wanted, config.max_valid_samples)
    if not wanted:
        if config.valid_fraction is None:
            say("Validation: none, since there are so few examples; give --valid_data or --valid_fraction to have some")
        return rows, [], share
    keys = [_group(text, row) for text, row in zip(encoded.texts, rows, strict=True)]
    train, valid = split_off(rows, keys, wanted, config.seed)
    if config.task == CLASSIFY:  # moves back all examples of labels that the training data would otherwise lack
        learned = {row.label for row in cast("list[ClassRow]", train)}
        rare = [not isinstance(row.label, float) and row.label not in learned for row in cast("list[ClassRow]", valid)]
        train = [*train, *compress(valid, rare)]
        valid = [row for row, is_rare in zip(valid, rare, strict=True) if not is_rare]
    if not valid:
        say("Validation: none, since too many examples share a prompt to hold some out; give --valid_data to have some")
        return rows, [], 0.0
    say(
        f"Validation: {count(len(valid))} of the {count(len(rows))} examples, none of whose prompts occur in training "
        "(--valid_fraction 0 trains on all)"
    )
    return train, valid, share


def split_off(
    rows: Sequence[TokenExample], keys: Sequence[Hashable], wanted: int, seed: int
) -> tuple[list[TokenExample], list[TokenExample]]:
    """Draws about `wanted` rows; rows with equal keys stay together, and not all rows are drawn.

    >>> rows = [TokenExample((number,), (False,)) for number in range(6)]
    >>> train, valid = split_off(rows, "aabbcc", 2, seed=0)
    >>> len(train), [row.ids[0] // 2 for row in valid]
    (4, [1, 1])
    """
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        groups[key].append(index)
    order = list(groups.values())
    random.Random(f"validation {seed}").shuffle(order)
    chosen: set[int] = set()
    for group in order:
        if len(chosen) + len(group) <= wanted:
            chosen.update(group)
    apart = [row for index, row in enumerate(rows) if index in chosen]
    return [row for index, row in enumerate(rows) if index not in chosen], apart


def _group(text: Example, row: TokenExample) -> Hashable:
    """Returns what both sides of a split must not share: a chat's turns before its first answer, a prompt, a text."""
    if text.messages:
        first = next((n for n, turn in enumerate(text.messages) if turn.role == "assistant"), 0)
        return tuple((turn.role, turn.content) for turn in text.messages[: max(1, first)])
    return text.prompt or _start(row)


def _start(row: TokenExample) -> tuple[int, ...]:
    """Returns the tokens before the first trained one; if the row is trained from its start, all tokens."""
    return row.prompt if len(row.prompt) > 1 else row.ids
