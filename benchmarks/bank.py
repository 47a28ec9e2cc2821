"""What it costs to mix adapters in one batch: SmolLM2 with up to 64 adapters of r = 16 on all linears, beside PEFT.

python benchmarks/bank.py     ten minutes on two cores; writes benchmarks/bank.json

A step is one token of every row, greedy, with 64 tokens before it.  Ours and PEFT take their steps in turn; minima, and
medians of the ratios of neighbours.  PEFT mixes by `adapter_names`, with the key-value cache of transformers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from machine import machine

import loralib as lora
from loralib.console import say, table
from loralib.generation.decoder import make_decoder

HERE = Path(__file__).resolve().parent
ROWS, ADAPTERS, R, BEFORE = 16, 8, 16, 64


def base() -> Any:
    return lora.load_base("smollm2-135m", dtype="bf16")[0]


def adapters(count: int) -> dict[str, lora.Adapter]:
    """Adapters of random values."""
    model, values = base(), {}
    for number in range(count):
        torch.manual_seed(number)
        lora.inject(model, lora.LoraConfig(r=R, lora_alpha=R, target_modules="all-linear"))
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.02)
        values[f"a{number}"] = lora.adapter_of(model)
        lora.remove(model)
    return values


def our_steps(bank: lora.Bank, names: list[str | None]) -> Callable[[], float]:
    """Returns what takes one step of these rows and tells its seconds."""
    decoder = make_decoder(bank)
    groups = [decoder.open(list(range(100 + row, 100 + row + BEFORE)), name) for row, name in enumerate(names)]
    decoder.step()

    def step() -> float:
        for group in groups:
            group.grow([0], [500])
        start = time.perf_counter()
        decoder.step()
        return time.perf_counter() - start

    return step


def peft_steps(model: Any, names: list[str]) -> Callable[[], float]:
    """The same of PEFT: a step from the same 64 tokens, the cache cut back after it."""
    ids = torch.tensor([list(range(100 + row, 100 + row + BEFORE)) for row in range(len(names))])
    more = {} if len(set(names)) == 1 else {"adapter_names": names}
    if len(set(names)) == 1:
        model.set_adapter(names[0])
    cache = transformers.DynamicCache()
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **more)

    def step() -> float:
        if len(set(names)) == 1:
            model.set_adapter(names[0])
        with torch.no_grad():
            start = time.perf_counter()
            model(input_ids=torch.full((len(names), 1), 500), past_key_values=cache, use_cache=True, **more)
            seconds = time.perf_counter() - start
        cache.crop(BEFORE - cache.get_seq_length())  # a negative number takes tokens off
        return seconds

    return step


def peft_model(values: dict[str, lora.Adapter]) -> Any:
    config = peft.LoraConfig(r=R, lora_alpha=R, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base(), config, adapter_name="a0")
    for name in list(values)[1:ADAPTERS]:
        model.add_adapter(name, config)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


def loads_and_switches(bank: lora.Bank, values: dict[str, lora.Adapter]) -> dict[str, Any]:
    """Seconds of each load, and of choosing another adapter for the next sequence."""
    seconds = []
    for name, value in values.items():
        start = time.perf_counter()
        bank.load(name, value)
        seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
    for number in range(1000):
        bank.release(bank.acquire(f"a{number % len(values)}"))
    return {"load_s": seconds, "switch_s": (time.perf_counter() - start) / 1000}


def main() -> None:
    """Measures and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    values = adapters(64)
    bank = lora.Bank(base())
    figures = loads_and_switches(bank, values)
    mixed = [f"a{row % ADAPTERS}" for row in range(ROWS)]
    them = peft_model(values)
    steps = {
        "base": our_steps(bank, [None] * ROWS),
        "one adapter": our_steps(bank, ["a0"] * ROWS),
        "8 adapters": our_steps(bank, list(mixed)),
        "base, 1 row": our_steps(bank, [None]),
        "one adapter, 1 row": our_steps(bank, ["a0"]),
        "PEFT, one adapter": peft_steps(them, ["a0"] * ROWS),
        "PEFT, 8 adapters": peft_steps(them, mixed),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 5):
        for name, step in steps.items():
            taken = step()
            if number >= 5:  # weights are prepacked by then
                seconds[name].append(taken)
    pairs = {
        "one adapter / base": ("one adapter", "base"),
        "one adapter / base, 1 row": ("one adapter, 1 row", "base, 1 row"),
        "8 adapters / one adapter": ("8 adapters", "one adapter"),
        "PEFT: 8 adapters / one adapter": ("PEFT, 8 adapters", "PEFT, one adapter"),
        "PEFT / ours, 8 adapters": ("PEFT, 8 adapters", "8 adapters"),
    }
    ratios = {
        name: {
            "minima": min(seconds[a]) / min(seconds[b]),
            "median": statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True)),
        }
        for name, (a, b) in pairs.items()
    }
    say(
        table([(name, f"{min(each) * 1e3:.1f} ms") for name, each in seconds.items()], ("a step of 16 rows", "fastest"))
    )
    say(
        table(
            [(name, f"{r['minima']:.2f}", f"{r['median']:.2f}") for name, r in ratios.items()], ("", "minima", "median")
        )
    )
    first, last = (min(part) * 1e3 for part in (figures["load_s"][:8], figures["load_s"][-8:]))
    say(f"load: {first:.0f} ms at first, {last:.0f} ms with 64; a switch: {figures['switch_s'] * 1e6:.1f} us")
    report = {"machine": machine("transformers", "peft"), "seconds": seconds, "ratios": ratios, **figures}
    Path(__file__).with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
