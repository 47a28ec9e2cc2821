"""What examples/NLG/run_inference.py shows of an adapter: statistics, predictions, texts, merging, switching."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import Adapter, ApplyReport, apply_adapter
from ..bases import base_of, load_base, refuse_classifier, tokenizer_for, trained_on_chats
from ..bases.device import DTYPES
from ..console import counted, duration, parameter_table, say, table
from ..data import draw, group_by_prompt, prompt_ids, read_examples
from ..data.examples import Example, chat_of
from ..engine.forward import device_of, plain_logits
from ..engine.limits import input_limit
from ..errors import ConfigError, LoraError
from ..formats import read_adapter
from ..generation import generate
from ..generation.text import end_with_turns
from ..injection import disabled, merge, unmerge
from ..nlg.metrics.slots import parse_meaning, slot_error_rate
from ..settings import check, setting, settings_class

__all__ = ["InferenceConfig", "run_inference"]


@settings_class
@dataclass(frozen=True)
class InferenceConfig:
    """The settings of run_inference.py: which adapters to load, and what to generate with them."""

    adapter: str | Sequence[str] = setting(
        "lora_model",
        "directory of the adapter; give several to see switching between adapters",
        "inference",
        several="files",
        rule=bool,
        expected="the directories of one or more adapters",
    )
    model: str | None = setting(None, "base model (default: the one named in the adapter)", "inference")
    prompt: str | None = setting(None, "generate text for this prompt instead of the test data", "inference")
    test_data: str | None = setting(None, "E2E file with meaning representations to turn into text", "inference")
    samples: int = setting(3, "number of meaning representations to turn into text", "inference", at_least=1)
    max_new_tokens: int = setting(60, "maximum number of tokens to generate per text", "inference", at_least=1)
    no_merge: bool = setting(False, "skip merging", "inference")
    seed: int = setting(0, "random seed for choosing meaning representations", "inference")
    dtype: str = setting("fp32", "fp32 shows that merging changes nothing; bf16 rounds", "inference", DTYPES)
    device: str | None = setting(None, "cpu, cuda, mps, ...; default: the fastest available", "inference")

    def __post_init__(self) -> None:
        check(self, "inference")


def run_inference(config: InferenceConfig) -> None:
    """Loads adapters and demonstrates on the console what they do.

    Raises:
        LoraError: a directory holds no adapter, or the adapter does not fit the base.
    """
    directories = [config.adapter] if isinstance(config.adapter, str) else list(config.adapter)
    adapters = {directory: read_adapter(directory) for directory in directories}
    for directory, adapter in adapters.items():
        refuse_classifier(adapter, directory)
    first = adapters[directories[0]]
    examples = _examples(config)
    name = base_of(first, config.model)
    say(f"Loading {name} ...")
    model, tokenizer = load_base(name, dtype=config.dtype, device=config.device)
    say(f"Adapter {directories[0]}: {_apply_all(model, adapters)}")
    model.eval()
    prompts = [_prompt(directories[0], example) for example in examples]
    if any(prompt.messages for prompt in prompts):
        say("The adapter was trained on chats: each prompt is treated as a user's turn")
    base_tokenizer, tokenizer = tokenizer, _tokenizer_for(directories[0], model, tokenizer)
    _show_statistics(model, tokenizer, first, examples)
    ids = [prompt_ids(prompt, tokenizer) for prompt in prompts]
    if hasattr(model, "generate"):
        adapted = _show_texts(model, tokenizer, examples, ids, config)
    else:
        adapted = []
        say("\nThis network sees one token at a time, without attention: it predicts tokens but cannot write text.")
    if not config.no_merge:
        _show_merging(model, tokenizer, examples, ids, adapted, config)
    if len(adapters) > 1:
        _show_switching(model, base_tokenizer, adapters, examples[0], config)


def _apply_all(model: nn.Module, adapters: dict[str, Adapter]) -> ApplyReport:
    """Applies every adapter, the first one last, so that any that does not fit is refused before output starts."""
    for directory, adapter in reversed(adapters.items()):
        try:
            report = apply_adapter(model, adapter)
        except LoraError as error:
            raise type(error)(f"{directory}: {error}") from error
    return report


def _examples(config: InferenceConfig) -> list[Example]:
    if config.prompt is not None:
        return [Example.of(config.prompt if config.prompt.endswith("\n") else config.prompt + "\n", "")]
    if config.test_data is None:
        raise ConfigError("there is nothing to generate from: give --prompt TEXT or --test_data FILE")
    return draw(group_by_prompt(read_examples(config.test_data)), config.samples, config.seed, lambda e: e.prompt)


def _show_statistics(model: nn.Module, tokenizer: Any, adapter: Adapter, examples: Sequence[Example]) -> None:
    settings = adapter.config
    say()
    say(parameter_table(model.parameters()))
    say()
    rows = [
        ("rank r", settings.r),
        ("lora_alpha", f"{settings.lora_alpha:g}"),
        ("adapted modules", len(adapter.modules)),
        ("tensors", len(adapter.tensors)),
        ("base model", settings.base_model_name_or_path or "unknown"),
    ]
    say(table(rows, ("adapter", "")))
    ids = _batch(model, tokenizer, examples)
    with torch.no_grad():
        logits = plain_logits(model, ids.to(device_of(model)))
    predicted = logits[0, :10].argmax(-1).tolist()
    say()
    say(f"input  {list(ids.shape)}")
    say(f"logits {list(logits.shape)}")
    say(f"first ten predicted tokens: {predicted}")
    say(f"  as text: {tokenizer.decode(predicted)!r}")


def _show_texts(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    prompts: Sequence[Sequence[int]],
    config: InferenceConfig,
) -> list[str]:
    """Prints the continuations by the base and by the adapted model; returns the latter."""
    with disabled(model):
        base = generate(model, tokenizer, prompts, max_new_tokens=config.max_new_tokens)
    adapted = generate(model, tokenizer, prompts, max_new_tokens=config.max_new_tokens)
    for example, before, after in zip(examples, base, adapted, strict=True):
        say()
        say(example.prompt.strip())
        _say_text("base", before.text)
        _say_text("adapted", after.text)
        if any(example.references):
            _say_text("reference", example.references[0])
    say()
    ended = [sum(result.finish_reason == "stop" for result in results) for results in (base, adapted)]
    say(
        f"Stopped on their own within {config.max_new_tokens} tokens: "
        f"base {ended[0]}, adapted {ended[1]}, of {len(examples)}"
    )
    meanings = [example.prompt for example in examples]
    if all(parse_meaning(meaning) for meaning in meanings):
        left_out = [slot_error_rate(meanings, [result.text for result in results]) for results in (base, adapted)]
        errors = f"base {left_out[0].errors}, adapted {left_out[1].errors}, of {left_out[0].slots}"
        say(f"Values of the meaning representations left out: {errors}")
    return [result.text for result in adapted]


def _show_merging(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    prompts: Sequence[Sequence[int]],
    adapted: Sequence[str],
    config: InferenceConfig,
) -> None:
    ids = _batch(model, tokenizer, examples)
    with torch.no_grad():
        apart = plain_logits(model, ids.to(device_of(model))).float()
        started = time.perf_counter()
        merge(model)
        took = time.perf_counter() - started
        merged = plain_logits(model, ids.to(device_of(model))).float()
    largest = float(apart.abs().max())
    difference = float((apart - merged).abs().max())
    # Allows for the rounding error of a few hundred additions, relative to the largest logit.
    eps = max(torch.finfo(parameter.dtype).eps for parameter in model.parameters() if parameter.is_floating_point())
    tolerance = (256 if eps == torch.finfo(torch.float32).eps else 16) * eps * largest
    verdict = "they agree" if difference <= tolerance else "THEY DIFFER: report this"
    say()
    say(f"Merged W + scaling * B A into every layer in {duration(took)}.")
    say(f"Logits, merged vs. unmerged: largest difference {difference:.2g}, tolerance {tolerance:.2g}: {verdict}.")
    if adapted:
        texts = [result.text for result in generate(model, tokenizer, prompts, max_new_tokens=config.max_new_tokens)]
        same = sum(a == b for a, b in zip(adapted, texts, strict=True))
        say(f"The merged model writes the same text for {same} of {counted(len(texts), 'prompt')}:")
        _say_text("merged", texts[0])
    unmerge(model)


def _show_switching(
    model: nn.Module, tokenizer: Any, adapters: dict[str, Adapter], example: Example, config: InferenceConfig
) -> None:
    say()
    say(f"Switching between {len(adapters)} adapters on one base; the prompt is {example.prompt.strip()!r}")
    for directory, adapter in adapters.items():
        started = time.perf_counter()
        apply_adapter(model, adapter)
        took = time.perf_counter() - started
        own = _tokenizer_for(directory, model, tokenizer)
        ids = [prompt_ids(_prompt(directory, example), own)]
        text = generate(model, own, ids, max_new_tokens=config.max_new_tokens)[0].text
        _say_text(f"{Path(directory).name} ({duration(took)})", text)


def _prompt(directory: str, example: Example) -> Example:
    """Wraps the prompt as a user turn of a chat if the adapter was trained on chats."""
    return chat_of(Example.of(example.prompt, "")) if trained_on_chats(directory) else example


def _tokenizer_for(directory: str, model: nn.Module, tokenizer: Any) -> Any:
    """Returns the tokenizer an adapter was trained with; if it was trained on chats, makes texts end where turns do."""
    own = tokenizer_for(directory, model, tokenizer)
    if trained_on_chats(directory):
        end_with_turns(model, own)
    return own


def _batch(model: nn.Module, tokenizer: Any, examples: Sequence[Example], rows: int = 2) -> Tensor:
    """Returns token ids (rows, 32 or the model's limit): the examples' texts joined, repeated or cut to that shape."""
    width = min(32, input_limit(model, tokenizer) or 32)
    ids = [
        token for example in examples for token in prompt_ids(example.prompt + " ".join(example.references), tokenizer)
    ]
    return torch.tensor((ids * (rows * width))[: rows * width]).view(rows, width)


def _say_text(label: str, text: str) -> None:
    first, *more = textwrap.wrap(" ".join(text.split()) or "(nothing)", width=96)
    say(f"  {label:<10} {first}")
    for line in more:
        say(f"  {'':<10} {line}")
