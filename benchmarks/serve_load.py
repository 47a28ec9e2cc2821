"""A server under load: thousands of requests, many at once, while adapters come and go.

python benchmarks/serve_load.py                  some minutes on two cores; a tiny model of random values, in fp32
python benchmarks/serve_load.py --requests 500

Every reply is compared with what the same seed gives offline.  One that differs must part from it where hardly
anything decides: where the two best tokens are within 1e-4, or the random number is that near to the next token.
Adapters of other names are loaded, scaled and unloaded all the while, some of them in the middle of texts.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import queue
import random
import socket
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import torch
import transformers
import uvicorn
from machine import machine

import loralib as lora
from loralib.bases import load_tokenizer
from loralib.console import say
from loralib.generation import Sampling
from loralib.generation.sampling import choose
from loralib.serve.app import create_app
from loralib.serve.server import Server, start
from loralib.serve.settings import ServeConfig

HERE = Path(__file__).resolve().parent
ADAPTERS, AT_ONCE, TIE = 16, 64, 1e-4
WORDS = "The old mill by the river serves fresh bread and soup every morning to people who walk along the bank".split()


def make(root: Path) -> None:
    """Writes a tiny base and adapters of random values."""
    tokenizer = load_tokenizer()
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    config = transformers.LlamaConfig(**sizes, **heads, **ends, initializer_range=0.2)
    model = transformers.LlamaForCausalLM(config)
    model.lm_head.weight.data *= 5  # likely tokens and unlikely ones, as trained models have them
    model.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    model, _ = lora.load_base(str(root / "base"), dtype="fp32")
    for number in range(ADAPTERS + 2):
        torch.manual_seed(number)
        lora.inject(model, lora.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(std=0.2)
        lora.save_adapter(model, root / "shelf" / f"a{number}")
        lora.remove(model)


def request_of(number: int) -> dict[str, Any]:
    """One of all kinds of requests, the same for a number each time."""
    dice = random.Random(number)
    prompt = " ".join(dice.choices(WORDS, k=dice.choice((1, 4, 12, 40))))
    if dice.random() < 0.3:  # what many begin with
        prompt = " ".join(WORDS * 2) + " " + prompt
    model = dice.choice(["base", *(f"a{n}" for n in range(ADAPTERS))])
    temperature = dice.choice((0.0, 0.7, 1.0))
    return {
        "model": model, "prompt": prompt, "max_tokens": dice.choice((1, 8, 24)), "seed": number,
        "temperature": temperature, "top_p": dice.choice((1.0, 0.9)) if temperature else 1.0,
    }  # fmt: skip


def sampling_of(asked: dict[str, Any]) -> Sampling:
    return Sampling(
        max_new_tokens=asked["max_tokens"], seed=asked["seed"], temperature=asked["temperature"], top_p=asked["top_p"]
    )


async def ask_all(url: str, count: int, memory: list[float]) -> tuple[dict[int, str], collections.Counter[str]]:
    """Sends all requests, so many at once; some are streamed, and some clients go away in the middle."""
    replies: dict[int, str] = {}
    outcomes: collections.Counter[str] = collections.Counter()
    numbers = iter(range(count))
    process = psutil.Process()
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=20, timeout=300) as client:

        async def work() -> None:
            for number in numbers:
                asked = request_of(number)
                try:
                    if number % 3:
                        reply = await client.completions.create(**asked)
                        replies[number] = reply.choices[0].text
                    else:
                        text = ""
                        async with await client.completions.create(**asked, stream=True) as stream:
                            async for chunk in stream:
                                text += chunk.choices[0].text
                                if number % 51 == 0:
                                    break
                            else:
                                replies[number] = text
                    outcomes["answered" if number in replies else "left by its client"] += 1
                except openai.APIError as error:
                    outcomes[f"{type(error).__name__}: {error}"[:200]] += 1
                if number % 250 == 0:
                    memory.append(process.memory_info().rss / 1e6)

        await asyncio.gather(*(work() for _ in range(AT_ONCE)))
    return replies, outcomes


def come_and_go(url: str, done: threading.Event, outcomes: collections.Counter[str]) -> None:
    """Loads, uses, scales and unloads adapters, some while a text is generated with them."""
    with httpx.Client(base_url=url, timeout=300) as http:
        number = 0
        while not done.wait(0.02):
            name = f"guest{number % 3}"
            made = http.post("/v1/adapters", json={"name": name, "path": f"a{ADAPTERS + number % 2}"})
            outcomes[f"load {made.status_code}"] += 1
            body = {"model": name, "prompt": "The", "max_tokens": 30, "stream": True}
            with http.stream("POST", "/v1/completions", json=body) as stream:
                lines = stream.iter_lines()
                next(lines, "")
                outcomes[f"scale {http.patch(f'/v1/adapters/{name}', json={'scale': 0.5}).status_code}"] += 1
                outcomes[f"unload {http.delete(f'/v1/adapters/{name}').status_code}"] += 1
                text = [line for line in lines if line]
            outcomes["guest's text ends" if text and text[-1] == "data: [DONE]" else "guest's text broke off"] += 1
            number += 1


def compare(server: Server, replies: dict[int, str]) -> dict[str, int]:
    """Counts replies that are what their seed gives offline, and those that part from it at a tie."""
    counts = {"equal": 0, "parted at a tie": 0, "different": 0}
    for number, text in sorted(replies.items()):
        asked = request_of(number)
        adapter = None if asked["model"] == "base" else asked["model"]
        own = sampling_of(asked)
        [alone] = lora.generate(server.bank, server.tokenizer, [asked["prompt"]], own, adapters=[adapter])
        if alone.text == text:
            counts["equal"] += 1
        elif parts_at_a_tie(server, asked, adapter, alone.ids, text):
            counts["parted at a tie"] += 1
        else:
            counts["different"] += 1
            say(f"request {number} {asked}: {text!r}, offline {alone.text!r}")
    return counts


def parts_at_a_tie(server: Server, asked: dict[str, Any], adapter: str | None, ids: tuple[int, ...], text: str) -> bool:
    """Tells whether a text parts from the offline one where hardly anything decides.

    That is where the two best tokens are as likely, or where the random number lies on the border between two tokens.
    """
    common = 0
    while common < len(ids) and text.startswith(server.decode(ids[: common + 1])):
        common += 1
    prompt = [*server.tokenizer(asked["prompt"])["input_ids"], *ids[:common]]
    everything = Sampling(max_new_tokens=1, logprobs=len(server.tokenizer))
    arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
    server.service.submit(prompt, everything, adapter, listener=arrived.put)
    [score] = arrived.get().logprobs
    logits = torch.full((1, len(server.tokenizer)), float("-inf"))
    for token, value in score.top:
        logits[0, token] = value
    if asked["temperature"] == 0:
        return score.top[0][1] - score.top[1][1] < TIE
    dice = random.Random(asked["seed"])
    uniform = [dice.random() for _ in range(common + 1)][-1]
    near = {
        choose(logits, [replace(sampling_of(asked), top_p=min(1.0, asked["top_p"] + cut))], [uniform + by])[0]
        for by in (-TIE, 0, TIE)
        for cut in (-TIE, 0, TIE)
    }
    return any(text.startswith(server.decode([*ids[:common], token])) for token in near - {*ids[common : common + 1]})


def main() -> None:
    """Runs the load and writes what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=5000)
    count = parser.parse_args().requests
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        make(root)
        config = ServeConfig(
            model=str(root / "base"), adapters=str(root / "shelf"), dtype="fp32", page=False, max_jobs=0,
            state_dir=str(root / "state"), cache_tokens=16384,
        )  # fmt: skip
        server = start(config)
        listener = socket.create_server(("127.0.0.1", 0))
        web = uvicorn.Server(uvicorn.Config(create_app(server), http="h11", log_level="error", access_log=False))
        thread = threading.Thread(target=web.run, kwargs={"sockets": [listener]})
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        done, guests, memory = threading.Event(), collections.Counter[str](), list[float]()
        visitor = threading.Thread(target=come_and_go, args=(url, done, guests))
        while not web.started:
            time.sleep(0.01)
        visitor.start()
        began = time.perf_counter()
        replies, outcomes = asyncio.run(ask_all(url, count, memory))
        seconds = time.perf_counter() - began
        done.set()
        visitor.join()
        counts = compare(server, replies)
        stats = server.service.stats()
        web.should_exit = True
        thread.join()
        server.close()
    after = memory[len(memory) // 5 :]
    result = {
        "machine": machine("openai", "fastapi", "uvicorn"),
        "requests": count,
        "at_once": AT_ONCE,
        "adapters": ADAPTERS,
        "seconds": round(seconds, 1),
        "outcomes": dict(outcomes),
        "guests": dict(guests),
        "replies": counts,
        "memory_mb": [round(value) for value in memory],
        "memory_growth_mb": round(after[-1] - after[0]) if after else 0,
        "reused_tokens": stats.reused_tokens,
        "prompt_tokens": stats.prompt_tokens,
    }
    say(json.dumps({name: value for name, value in result.items() if name != "machine"}, indent=2))
    (HERE / "serve_load.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    good = set(outcomes) <= {"answered", "left by its client"} and not counts["different"]
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
