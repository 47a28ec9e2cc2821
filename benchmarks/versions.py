"""Compares two checkouts of loralib: python benchmarks/versions.py OLD_CHECKOUT [--rounds 3]; ten minutes.

Each case runs in one process per checkout, in turn, using public functions that both have: training steps of
SmolLM2-135M and of GPT-2's shape (8 E2E examples; `step_s` of metrics.jsonl), beam search and greedy generation, peak
memory of training with 8 sequences of 512 tokens, and the time of `import loralib`.  Machines are shared, so minima and
medians of ratios count.  Writes benchmarks/versions.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memory_use import peak_bytes

HERE = Path(__file__).resolve().parent
DATA = HERE.parent / "examples" / "NLG" / "data" / "e2e"
CASES = ("train smollm2", "train gpt2", "beam search", "greedy", "import", "memory")


def training(name: str) -> Callable[[], float]:
    """Returns a function that runs four updates of 8 examples and returns the time of the fastest."""
    import torch
    import transformers

    import loralib as lora
    from loralib.data import encode, read_examples

    model, tokenizer = lora.load_base("smollm2-135m", dtype="bf16", device="cpu")
    examples = encode(read_examples(str(DATA / "train.txt"))[:32], tokenizer, 128, "clm").examples
    if name == "gpt2":
        torch.manual_seed(0)
        config = transformers.GPT2Config(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
        model = transformers.GPT2LMHeadModel(config).to(torch.bfloat16)

    def run() -> float:
        lora.inject(model, lora.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
        with tempfile.TemporaryDirectory() as directory:
            config = lora.TrainConfig(output_dir=directory, batch_size=8, max_steps=4, lr=1e-4, warmup_steps=0)
            lora.train(model, examples, config, verbose=False)
            lines = Path(directory, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        lora.remove(model)
        return min(event["step_s"] for event in map(json.loads, lines) if event["event"] == "train")

    return run


def generation(num_beams: int) -> Callable[[], float]:
    """Returns a function that continues a few prompts and returns the time taken."""
    import torch

    import loralib as lora
    from loralib.data import prompt_ids, read_examples

    model, tokenizer = lora.load_base("smollm2-135m", dtype="bf16", device="cpu")
    lora.inject(model, lora.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.01, generator=draw)
    texts = dict.fromkeys(example.prompt for example in read_examples(str(DATA / "test.txt")))
    prompts = [prompt_ids(text, tokenizer) for text in list(texts)[:8]]

    def run() -> float:
        started = time.perf_counter()
        if num_beams > 1:
            lora.beam_search(model, prompts, num_beams=num_beams, max_new_tokens=24, eos_token_id=[])
        else:
            lora.generate(model, tokenizer, prompts, max_new_tokens=32, min_new_tokens=32)
        return time.perf_counter() - started

    return run


def importing() -> float:
    """Returns the seconds of `import loralib` in a new interpreter, excluding `import torch`."""
    code = "import torch, time; t = time.perf_counter(); import loralib; print(time.perf_counter() - t)"
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, encoding="utf-8").stdout)


def memory() -> float:
    """Returns the peak GiB of this process after two updates on 8 sequences of 512 tokens, half of each trained."""
    import loralib as lora
    from loralib.data import TokenExample

    model, _ = lora.load_base("smollm2-135m", dtype="bf16", device="cpu")
    flags = tuple(place >= 256 for place in range(512))
    rows = [tuple((7 * number + 13 * place) % 49152 for place in range(512)) for number in range(16)]
    lora.inject(model, lora.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    with tempfile.TemporaryDirectory() as directory:
        config = lora.TrainConfig(output_dir=directory, batch_size=8, max_steps=2, lr=1e-4, warmup_steps=0)
        lora.train(model, [TokenExample(row, flags) for row in rows], config, verbose=False)
    return peak_bytes() / 2**30


def serve(case: str) -> None:
    """Runs a case for each input line, and prints its figure."""
    import torch

    torch.set_num_threads(2)
    kind, _, name = case.partition(" ")
    makers: dict[str, Callable[[], Callable[[], float]]] = {
        "train": lambda: training(name),
        "beam": lambda: generation(10),
        "greedy": lambda: generation(1),
        "import": lambda: importing,
        "memory": lambda: memory,
    }
    run = makers[kind]()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(f"figure {run()}", flush=True)


def start(checkout: Path, case: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--serve", case]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", env=environment, cwd=checkout
    )
    read(process, "ready")
    return process


def read(process: subprocess.Popen[str], word: str) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(word):
            return line.removeprefix(word).strip()
    raise RuntimeError(f"the process ended before it said {word!r}")


def ask(process: subprocess.Popen[str]) -> float:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    return float(read(process, "figure"))


def compare(old: Path, case: str, rounds: int) -> dict[str, Any]:
    """Runs a case in three pairs of processes, because memory placement makes a difference of a few per cent."""
    checkouts = {"before": old, "after": HERE.parent}
    figures: dict[str, list[float]] = {name: [] for name in checkouts}
    for pair in range(3):
        names = list(checkouts) if pair % 2 else list(checkouts)[::-1]
        processes = {name: start(checkouts[name], case) for name in names}
        try:
            for number in range(1 if case == "memory" else rounds + 1):
                for name in names if number % 2 else names[::-1]:
                    figure = ask(processes[name])
                    if number or case == "memory":  # the first round warms up
                        figures[name].append(figure)
        finally:
            for process in processes.values():
                process.kill()
    ratios = [after / before for before, after in zip(figures["before"], figures["after"], strict=True)]
    return {
        "case": case,
        "before": min(figures["before"]),
        "after": min(figures["after"]),
        "ratio": min(figures["after"]) / min(figures["before"]),
        "median_of_ratios": statistics.median(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", nargs="?", type=Path, help="a checkout of another version")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
        return
    if arguments.old is None:
        parser.error("give the checkout to compare with")
    from machine import machine

    kept = HERE / "versions.json"  # rows that are not measured again are kept
    rows = (
        {row["case"]: row for row in json.loads(kept.read_text(encoding="utf-8"))["results"]} if kept.exists() else {}
    )
    for case in arguments.cases:
        rows[case] = compare(arguments.old.resolve(), case, arguments.rounds)
        print(json.dumps(rows[case]), flush=True)
        content = {"machine": machine(), "unit": "seconds; GiB for memory", "results": list(rows.values())}
        kept.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
