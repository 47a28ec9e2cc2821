"""Server speed: SmolLM2 with 8 adapters of r = 16 on all linear layers, 1 to 64 clients, compared with llama.cpp.

python benchmarks/serve.py               ten minutes on two cores; writes benchmarks/serve.json and docs/img/serve.png
python benchmarks/serve.py --rounds 1 --alone     without llama.cpp

Each client sends its next request as soon as it has its answer: a prompt of 64 random tokens, 32 greedy tokens
streamed, adapters in turn.  Both servers run in separate processes and compute in bf16; llama.cpp gets the same base
and adapters as GGUF, all at its start, and each request names its own adapter.  It has 16 slots, where requests with
different adapters do not share a batch.  Both are measured in turn; the figures are medians of the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import llama_cpp
import matplotlib
from bank import ADAPTERS, R, adapters
from machine import machine

from loralib.console import say, table
from loralib.formats.peft import write_peft

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
PROMPT, NEW, PLACES = 64, 32, 16
CLIENTS = (1, 4, 16, 64)


def make(root: Path, *, with_gguf: bool) -> None:
    """Writes adapters of random values and, for llama.cpp, these and the base as GGUF, in bf16."""
    values = adapters(ADAPTERS)
    for name, adapter in values.items():
        write_peft(adapter, root / "adapters" / name)
    if with_gguf:
        llama_cpp.write(root, values)


def body_for(engine: str, number: int) -> tuple[str, dict[str, Any]]:
    dice = random.Random(number)
    prompt = [dice.randrange(1000, 40000) for _ in range(PROMPT)]
    adapter = number % ADAPTERS
    if engine == "loralib":
        asked = {"model": f"a{adapter}", "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
        return "/v1/completions", {**asked, "prompt": prompt, "stream": True}
    loras = [{"id": n, "scale": 1.0 if n == adapter else 0.0} for n in range(ADAPTERS)]
    asked = {"n_predict": NEW, "temperature": 0, "ignore_eos": True, "lora": loras}
    return "/completion", {**asked, "prompt": prompt, "stream": True}


async def measure(engine: str, url: str, clients: int, first: int) -> dict[str, float]:
    """Runs this many clients, at least three requests each; returns tokens per second and times to first token."""
    count = max(6, 3 * clients if clients < 64 else 2 * clients)
    numbers = iter(range(first, first + count))
    firsts: list[float] = []
    # A connection per request: llama.cpp's server closes one after a stream, without announcing it.
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as http:

        async def client() -> None:
            for number in numbers:
                path, body = body_for(engine, number)
                began = time.perf_counter()
                async with http.stream("POST", path, json=body) as reply:
                    reply.raise_for_status()
                    seen = False
                    async for line in reply.aiter_lines():
                        if line.startswith("data: {") and not seen:
                            firsts.append(time.perf_counter() - began)
                            seen = True

        began = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
    seconds = time.perf_counter() - began
    return {"tokens_per_second": count * NEW / seconds, "first_token_s": statistics.median(firsts)}


def plot(figures: dict[str, dict[str, dict[str, float]]]) -> None:
    """Plots both figures against the number of clients."""
    _, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, name, words in zip(
        axes, ("tokens_per_second", "first_token_s"), ("tokens a second", "seconds to the first token"), strict=True
    ):
        for engine, by_clients in figures.items():
            axis.plot(list(by_clients), [row[name] for row in by_clients.values()], marker="o", label=engine)
        axis.set(xlabel="clients, over 8 adapters", ylabel=words, ylim=(0, None))
        axis.legend()
    plt.savefig(HERE.parent / "docs" / "img" / "serve.png", dpi=110)


def main() -> None:
    """Measures both servers in turn and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--alone", action="store_true", help="do not measure llama.cpp's server")
    args = parser.parse_args()
    rounds: dict[str, dict[int, list[dict[str, float]]]] = {"loralib": {}}
    if not args.alone:
        rounds["llama.cpp"] = {}
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        make(root, with_gguf=not args.alone)
        ours = [
            "-m",
            "loralib",
            "serve",
            "--model",
            "smollm2-135m",
            "--adapters",
            str(root / "adapters"),
            "--dtype",
            "bf16",
        ]
        ours += ["--port", "0", "--no_page", "--state_dir", str(root / "state"), "--max_jobs", "0"]
        with contextlib.ExitStack() as stack:
            urls = {"loralib": stack.enter_context(llama_cpp.started(ours, r"API\s+(http\S+)/v1"))}
            if not args.alone:
                urls["llama.cpp"] = stack.enter_context(llama_cpp.serving(root, PLACES))
            for engine, url in urls.items():
                asyncio.run(measure(engine, url, 2, 10**6))  # warms up
            for number in range(args.rounds):
                for clients in CLIENTS:
                    for engine, url in urls.items():
                        result = asyncio.run(measure(engine, url, clients, 1000 * number + 200 * clients))
                        rounds[engine].setdefault(clients, []).append(result)
                        say(engine, clients, result)
    figures = {
        engine: {
            str(clients): {name: round(statistics.median(r[name] for r in results), 3) for name in results[0]}
            for clients, results in by_clients.items()
        }
        for engine, by_clients in rounds.items()
    }
    rows = [
        (clients, *(f"{figures[engine][str(clients)][name]:.2f}" for engine in figures for name in
                    ("tokens_per_second", "first_token_s")))
        for clients in CLIENTS
    ]  # fmt: skip
    heads = [f"{engine} {what}" for engine in figures for what in ("tokens/s", "first token s")]
    say(table(rows, ("clients", *heads)))
    gain = figures["loralib"]["16"]["tokens_per_second"] / figures["loralib"]["1"]["tokens_per_second"]
    say(f"16 clients over 8 adapters: {gain:.2f} times the throughput of one at a time")
    result = {
        "machine": machine("xllamacpp", "uvicorn", "fastapi"),
        "adapters": ADAPTERS, "r": R, "prompt_tokens": PROMPT, "new_tokens": NEW, "rounds": args.rounds,
        "llama_cpp": "not run" if args.alone else "measured in turn with loralib",
        "figures": figures, "gain_16_clients": round(gain, 2),
    }  # fmt: skip
    (HERE / "serve.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    plot(figures)


if __name__ == "__main__":
    main()
