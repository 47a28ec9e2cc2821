"""A server under load: thousands of requests, many at once, while adapters are loaded and unloaded.

python benchmarks/serve_load.py                  some minutes on two cores; a tiny model of random values, in fp32
python benchmarks/serve_load.py --requests 500

Every reply is compared with the offline result for the same seed.  A difference is only accepted in a near-tie: if the
two most likely tokens are within 1e-4, or the random number is that close to selecting the server's token.  This is
decided by a plain forward of the model with its adapter, so that nothing cached by the server is involved.  Meanwhile,
adapters of other names are loaded, scaled and unloaded, some of them while texts are being generated, and training jobs
run one after the other in their own processes.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
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
from loralib.generation import Generator, Sampling
from loralib.generation.sampling import choose
from loralib.serve.app import create_app
from loralib.serve.server import Server, start
from loralib.serve.settings import ServeConfig

HERE = Path(__file__).resolve().parent
ADAPTERS, AT_ONCE, TIES = 16, 64, (1e-6, 1e-5, 1e-4)
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
    model.lm_head.weight.data *= 5  # some likely tokens and some unlikely ones, as in trained models
    model.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    model, _ = lora.load_base(str(root / "base"), dtype="fp32")
    for number in range(ADAPTERS + 2):
        torch.manual_seed(number)
        lora.inject(model, lora.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(std=0.2)
        lora.save_adapter(model, root / "adapters" / f"a{number}")
        lora.remove(model)


def request_of(number: int) -> dict[str, Any]:
    """Returns a request of any kind, always the same for a given number."""
    dice = random.Random(number)
    prompt = " ".join(dice.choices(WORDS, k=dice.choice((1, 4, 12, 40))))
    if dice.random() < 0.3:  # a prefix shared by many
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
    """Sends all requests, this many at once; some are streamed, and some clients disconnect midway."""
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
                if not outcomes.total() % 500:
                    memory.append(process.memory_info().rss / 1e6)

        await asyncio.gather(*(work() for _ in range(AT_ONCE)))
    return replies, outcomes


def come_and_go(url: str, done: threading.Event, outcomes: collections.Counter[str]) -> None:
    """Loads, uses, scales and unloads adapters, sometimes while a text is generated with them."""
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


def train(url: str, done: threading.Event, outcomes: collections.Counter[str]) -> None:
    """Trains adapters, one job after the other; the last one is cancelled."""
    rows = [json.dumps({"prompt": f"Number {n} is", "completion": f"{n * n} when squared"}) for n in range(40)]
    settings = {"rank": 4, "batch_size": 4, "num_epochs": 30, "dtype": "fp32", "valid_fraction": 0.2}
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=300) as client:
        file = client.files.create(file=("data.jsonl", "\n".join(rows).encode()), purpose="fine-tune").id
        while not done.is_set():
            body = {"loralib": settings}
            job = client.fine_tuning.jobs.create(model="base", training_file=file, extra_body=body)
            while job.status not in ("succeeded", "failed", "cancelled"):
                if done.wait(0.5):
                    client.fine_tuning.jobs.cancel(job.id)
                    outcomes["cancelled at the end"] += 1
                    return
                job = client.fine_tuning.jobs.retrieve(job.id)
            outcomes[job.status] += 1


def compare(server: Server, root: Path, replies: dict[int, str]) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Counts replies that equal the offline result for their seed, and describes the others."""
    model, _ = lora.load_base(str(root / "base"), dtype="fp32")
    counts, parted = {"equal": 0, "parted at a tie": 0, "different": 0}, []
    offline = Generator(server.bank, server.tokenizer)  # caches nothing of earlier texts
    numbers, chunks = {}, collections.defaultdict(list)
    for number in replies:
        asked = request_of(number)
        adapter = None if asked["model"] == "base" else asked["model"]
        numbers[number] = offline.add(asked["prompt"], sampling_of(asked), adapter)
    while len(offline):
        for chunk in offline.step():
            chunks[chunk.request].append(chunk)
    for number, text in sorted(replies.items()):
        asked, own = request_of(number), chunks[numbers[number]]
        adapter = None if asked["model"] == "base" else asked["model"]
        ids, alone = tuple(token for chunk in own for token in chunk.ids), "".join(chunk.text for chunk in own)
        if alone == text:
            counts["equal"] += 1
            continue
        if adapter:
            lora.load_adapter(model, root / "adapters" / adapter)
        at, within = parting(server, model, asked, ids, text)
        if adapter:
            lora.remove(model)
        counts["different" if within is None else "parted at a tie"] += 1
        parted.append({"request": number, "after_tokens": at, "border_within": within})
        say(f"request {number} {asked}: {text!r}, offline {alone!r}: {parted[-1]}")
    return counts, parted


def parting(
    server: Server, model: torch.nn.Module, asked: dict[str, Any], ids: tuple[int, ...], text: str
) -> tuple[int, float | None]:
    """Finds where a text deviates from the offline one, and how close its token was to being chosen there.

    This is the difference in log-probability to the most likely token or, when sampling, the change of the random
    number, or of the truncation threshold, that would select it.  None: further away than any tie.
    """

    def begins(tokens: tuple[int, ...]) -> bool:
        if tokens[-1] == server.tokenizer.eos_token_id:
            return text == server.decode(tokens[:-1])
        return text.startswith(server.decode(tokens).rstrip("\ufffd"))  # an incomplete character

    common = 0
    while common < len(ids) and begins(ids[: common + 1]):
        common += 1
    while common and server.decode(ids[:common]).endswith("\ufffd"):
        common -= 1  # the difference may be a complete character against an incomplete one
    prompt = [*server.tokenizer(asked["prompt"])["input_ids"], *ids[:common]]
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[:, -1].float()
    dice = random.Random(asked["seed"])
    uniform = [dice.random() for _ in range(common + 1)][-1]
    for tie in TIES:
        if asked["temperature"] == 0:
            near = (logits[0] > logits.max() - tie).nonzero()[:, 0].tolist()
        else:
            ends = [
                choose(logits, [replace(sampling_of(asked), top_p=min(1.0, asked["top_p"] + cut))], [uniform + by])[0]
                for by in (-tie, tie)
                for cut in (-tie, tie)
            ]
            near = list(range(min(ends), max(ends) + 1))  # sampled in order of ids: those between are as near
        if any(begins((*ids[:common], token)) for token in near if token != (*ids, -1)[common]):
            return common, tie
    return common, None


def main() -> None:
    """Runs the load and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=5000)
    count = parser.parse_args().requests
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        make(root)
        config = ServeConfig(
            model=str(root / "base"), adapters=str(root / "adapters"), dtype="fp32", page=False, max_jobs=1,
            state_dir=str(root / "state"), cache_tokens=16384,
        )  # fmt: skip
        server = start(config)
        listener = socket.create_server(("127.0.0.1", 0))
        web = uvicorn.Server(uvicorn.Config(create_app(server), http="h11", log_level="error", access_log=False))
        thread = threading.Thread(target=web.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        done, guests, jobs = threading.Event(), collections.Counter[str](), collections.Counter[str]()
        memory: list[float] = []
        others = [threading.Thread(target=come_and_go, args=(url, done, guests))]
        others.append(threading.Thread(target=train, args=(url, done, jobs)))
        while not web.started:
            time.sleep(0.01)
        for other in others:
            other.start()
        began = time.perf_counter()
        replies, outcomes = asyncio.run(ask_all(url, count, memory))
        seconds = time.perf_counter() - began
        done.set()
        for other in others:
            other.join()
        stats = server.service.stats()
        counts, parted = compare(server, root, replies)
        loop = web.servers[0].get_loop()
        web.should_exit = True
        thread.join(timeout=60)
        hanging = [str(task) for task in asyncio.all_tasks(loop)] if thread.is_alive() else []
        if not hanging:
            server.close()
    after = memory[1:]  # without the first figure, taken after a thousand requests if there are as many
    result = {
        "machine": machine("openai", "fastapi", "uvicorn"),
        "requests": count,
        "at_once": AT_ONCE,
        "adapters": ADAPTERS,
        "seconds": round(seconds, 1),
        "outcomes": dict(outcomes),
        "guests": dict(guests),
        "training_jobs": dict(jobs),
        "tasks_that_hung_at_the_end": hanging,
        "replies": counts,
        "parted": parted,
        "memory_mb_each_500": [round(value) for value in memory],
        "memory_growth_mb_after_1000": round(after[-1] - after[0]) if after else None,
        "reused_tokens": stats.reused_tokens,
        "prompt_tokens": stats.prompt_tokens,
    }
    say(json.dumps({name: value for name, value in result.items() if name != "machine"}, indent=2))
    (HERE / "serve_load.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    good = set(outcomes) <= {"answered", "left by its client"} and not counts["different"] and not hanging
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
