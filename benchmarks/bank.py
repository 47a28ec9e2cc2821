"""The cost of mixing adapters in a batch: SmolLM2 with up to 64 adapters of r = 16, compared with PEFT and llama.cpp.

python benchmarks/bank.py              twenty minutes on two cores; writes benchmarks/bank.json
python benchmarks/bank.py --rounds 1 --steps 5      a trial run of two minutes

A step generates one token for every row, greedily, after 64 tokens; adapters are on all linear layers.  All methods run
in turn in each round; the figures are minima, and medians of ratios of adjacent runs.  PEFT mixes adapters by
`adapter_names`, with transformers' key-value cache.  llama.cpp's server receives 16 requests at once, each with its own
adapter in `lora`; it loads adapters only when it starts, and requests with different ones wait for each other.  Its
step is the time for 33 tokens of every row minus that for one token, divided by 32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import llama_cpp
import peft
import torch
import transformers
from machine import machine

import loralib as lora
from loralib.console import say, table
from loralib.generation.decoder import make_decoder

HERE = Path(__file__).resolve().parent
ROWS, ADAPTERS, R, BEFORE = 16, 8, 16, 64
PAIRS = {
    "one adapter / base": ("one adapter", "base"),
    "one adapter / base, 1 row": ("one adapter, 1 row", "base, 1 row"),
    "8 adapters / one adapter": ("8 adapters", "one adapter"),
    "PEFT: 8 adapters / one adapter": ("PEFT, 8 adapters", "PEFT, one adapter"),
    "PEFT / ours, 8 adapters": ("PEFT, 8 adapters", "8 adapters"),
    "llama.cpp: one adapter / base": ("llama.cpp, one adapter", "llama.cpp, base"),
    "llama.cpp: 8 adapters / one adapter": ("llama.cpp, 8 adapters", "llama.cpp, one adapter"),
    "llama.cpp / ours, base": ("llama.cpp, base", "base"),
    "llama.cpp / ours, 8 adapters": ("llama.cpp, 8 adapters", "8 adapters"),
}


def base() -> Any:
    return lora.load_base("smollm2-135m", dtype="bf16")[0]


def adapters(count: int) -> dict[str, lora.Adapter]:
    """Creates adapters of random values."""
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
    """Returns a function that runs one step for these rows and returns its duration in seconds."""
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
    """The same for PEFT: each step starts from the same 64 tokens, after which the cache is cropped again."""
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
        cache.crop(BEFORE - cache.get_seq_length())  # a negative number removes tokens from the end
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


def llama_cpp_steps(address: str, adapters: Sequence[int | None]) -> Callable[[], float]:
    """The same for llama.cpp's server: a row is a request."""

    def ask(row: int, count: int) -> None:
        scales = [{"id": number, "scale": float(number == adapters[row])} for number in range(ADAPTERS)]
        prompt = list(range(100 + row, 100 + row + BEFORE))
        asked = {"prompt": prompt, "n_predict": count, "temperature": 0, "ignore_eos": True, "lora": scales}
        request = urllib.request.Request(f"{address}/completion", json.dumps(asked).encode(), {"Connection": "close"})
        with urllib.request.urlopen(request) as answer:
            assert json.load(answer)["tokens_predicted"] == count

    def seconds(count: int) -> float:
        with ThreadPoolExecutor(len(adapters)) as pool:
            start = time.perf_counter()
            list(pool.map(lambda row: ask(row, count), range(len(adapters))))
            return time.perf_counter() - start

    return lambda: (seconds(33) - seconds(1)) / 32


def loads_and_switches(bank: lora.Bank, values: dict[str, lora.Adapter]) -> dict[str, Any]:
    """Measures the seconds of each load, and of switching the adapter for the next sequence."""
    seconds = []
    for name, value in values.items():
        start = time.perf_counter()
        bank.load(name, value)
        seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
    for number in range(1000):
        bank.release(bank.acquire(f"a{number % len(values)}"))
    return {"load_s": seconds, "switch_s": (time.perf_counter() - start) / 1000}


def all_steps(bank: lora.Bank, values: dict[str, lora.Adapter], address: str) -> dict[str, Callable[[], float]]:
    """Returns a function for each method that runs one step."""
    mixed = [f"a{row % ADAPTERS}" for row in range(ROWS)]
    them = peft_model(values)
    return {
        "base": our_steps(bank, [None] * ROWS),
        "one adapter": our_steps(bank, ["a0"] * ROWS),
        "8 adapters": our_steps(bank, list(mixed)),
        "base, 1 row": our_steps(bank, [None]),
        "one adapter, 1 row": our_steps(bank, ["a0"]),
        "PEFT, one adapter": peft_steps(them, ["a0"] * ROWS),
        "PEFT, 8 adapters": peft_steps(them, mixed),
        "llama.cpp, base": llama_cpp_steps(address, [None] * ROWS),
        "llama.cpp, one adapter": llama_cpp_steps(address, [0] * ROWS),
        "llama.cpp, 8 adapters": llama_cpp_steps(address, [row % ADAPTERS for row in range(ROWS)]),
    }


def measure(steps: dict[str, Callable[[], float]], rounds: int, count: int) -> dict[str, list[float]]:
    """Runs steps in turn: in each round `count` per method, but one for llama.cpp, which is already a mean of 32."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    ours = [name for name in steps if not name.startswith("llama.cpp")]
    for name in ours * 5:  # weights are prepacked after that
        steps[name]()
    for _ in range(rounds):
        for _ in range(count):
            for name in ours:
                seconds[name].append(steps[name]())
        for name in steps.keys() - set(ours):
            seconds[name].append(steps[name]())
    return seconds


def ratio(first: list[float], second: list[float]) -> dict[str, float]:
    """Returns how many times longer one method takes, in its best run and in the median of adjacent runs."""
    count = min(len(first), len(second))
    near = [statistics.median(part) for part in (first, second)] if len(first) != len(second) else None
    median = near[0] / near[1] if near else statistics.median(first[at] / second[at] for at in range(count))
    return {"minima": min(first) / min(second), "median": median}


def main() -> None:
    """Measures and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="steps of each way in a round (default 8)")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    values = adapters(64)
    bank = lora.Bank(base())
    figures = loads_and_switches(bank, values)
    with tempfile.TemporaryDirectory() as directory:
        llama_cpp.write(Path(directory), {f"a{number}": values[f"a{number}"] for number in range(ADAPTERS)})
        with llama_cpp.serving(Path(directory), ROWS) as address:
            seconds = measure(all_steps(bank, values, address), args.rounds, args.steps)
    ratios = {name: ratio(seconds[a], seconds[b]) for name, (a, b) in PAIRS.items()}
    fastest = [(name, f"{min(each) * 1e3:.1f} ms") for name, each in seconds.items()]
    say(table(fastest, ("a step of 16 rows", "fastest")))
    shown = [(name, f"{each['minima']:.2f}", f"{each['median']:.2f}") for name, each in ratios.items()]
    say(table(shown, ("", "minima", "median")))
    first, last = (min(part) * 1e3 for part in (figures["load_s"][:8], figures["load_s"][-8:]))
    say(f"load: {first:.0f} ms at first, {last:.0f} ms with 64; a switch: {figures['switch_s'] * 1e6:.1f} us")
    report = {"machine": machine("transformers", "peft", "xllamacpp"), "seconds": seconds, "ratios": ratios, **figures}
    args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
