"""loralib serve: OpenAI's client against a real server with a tiny model, and what is refused."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import math
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import transformers
from serving import CONTEXT, TEMPLATE, FakeProcess, Running, tiny_adapter, tiny_base, upload

import loralib as lora
from loralib.bases import load_tokenizer, trained_on_chats
from loralib.cli import main
from loralib.cli.serve import open_port
from loralib.generation import Sampling
from loralib.generation.service import RequestHandle
from loralib.serve import adapter_store, supervisor
from loralib.serve import running as serve_running
from loralib.serve.requests import ChatRequest, CompletionRequest
from loralib.serve.running import Run
from loralib.serve.server import start
from loralib.serve.settings import ServeConfig
from loralib.serve.text import chat_prompt

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two adapters that are loaded at the start, and one that is not."""
    root = tmp_path_factory.mktemp("serve")
    base = tiny_base(root / "base")
    tiny_adapter(base, root / "adapters" / "calm", 1)
    tiny_adapter(base, root / "adapters" / "bold", 2)
    tiny_adapter(base, root / "later", 3)
    return root


@pytest.fixture(scope="module")
def running(places: Path) -> Iterator[Running]:
    config = ServeConfig(
        model=str(places / "base"), adapters=str(places / "adapters"), dtype="fp32", max_tokens=200,
        state_dir=str(places / "state"), max_jobs=0, max_body_mb=0.2, max_requests=8, max_waiting=4,
    )  # fmt: skip
    running = Running(config)
    yield running
    running.close()


@pytest.fixture(scope="module")
def client(running: Running) -> openai.OpenAI:
    return running.client()


@pytest.fixture
def post(running: Running) -> Any:
    with httpx.Client(base_url=running.url) as http:
        yield lambda path, body, **headers: http.post(path, json=body, headers=headers)


PROMPT = "The capital of France is"
ASKED = [{"role": "user", "content": "Hi"}]


def offline(running: Running, prompt: str | list[int], adapter: str | None, **settings: Any) -> Any:
    """What the library generates without a server."""
    bank = running.server.bank
    return running.server.service.call(
        lambda: lora.generate(bank, running.server.tokenizer, [prompt], adapters=[adapter], **settings)[0]
    )


# --- what the official client gets ------------------------------------------------------------------------------------


def test_models_are_the_base_and_its_adapters(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["base", "bold", "calm"]
    assert client.models.retrieve("calm").owned_by == "loralib"
    with pytest.raises(openai.NotFoundError, match="Did you mean 'calm'"):
        client.models.retrieve("clam")


@pytest.mark.parametrize("model", ["base", "calm", "bold"])
def test_a_completion_is_what_its_seed_gives_offline(client: openai.OpenAI, running: Running, model: str) -> None:
    reply = client.completions.create(model=model, prompt=PROMPT, max_tokens=12, temperature=0.8, seed=7)
    adapter = None if model == "base" else model
    expected = offline(running, PROMPT, adapter, max_new_tokens=12, temperature=0.8, seed=7)
    assert reply.choices[0].text == expected.text
    assert reply.choices[0].finish_reason == expected.finish_reason
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (expected.prompt_tokens, len(expected.ids))
    assert reply.model == model


def test_a_stream_is_the_whole_answer_in_chunks(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "calm", "prompt": PROMPT, "max_tokens": 12, "temperature": 0.8, "seed": 7, "n": 2}
    whole = client.completions.create(**asked)
    texts = {0: "", 1: ""}
    last = None
    for chunk in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        last = chunk
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert [choice.text for choice in whole.choices] == [texts[0], texts[1]]
    assert texts[0] != texts[1]
    assert last is not None
    assert not last.choices
    assert last.usage is not None
    assert whole.usage is not None
    assert last.usage.total_tokens == whole.usage.total_tokens


def test_a_chat_goes_through_the_template_and_streams(client: openai.OpenAI, running: Running) -> None:
    messages: Any = [{"role": "system", "content": "Be short."}, {"role": "user", "content": [
        {"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}]  # fmt: skip
    asked: dict[str, Any] = {"model": "bold", "messages": messages, "max_completion_tokens": 10, "seed": 3}
    reply = client.chat.completions.create(**asked)
    text = "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ids = running.server.tokenizer(text, add_special_tokens=False)["input_ids"]
    expected = offline(running, ids, "bold", max_new_tokens=10, temperature=1.0, seed=3)
    assert reply.choices[0].message.content == expected.text
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.text
    assert chunks[-1].choices[0].finish_reason == expected.finish_reason


def test_prompts_may_be_texts_or_ids(client: openai.OpenAI, running: Running) -> None:
    ids = running.server.tokenizer(PROMPT)["input_ids"]
    texts = [
        [choice.text for choice in client.completions.create(model="calm", prompt=p, temperature=0).choices]
        for p in (PROMPT, [PROMPT, "Once"], ids, [ids, ids[:2]])
    ]
    assert texts[0][0] == texts[1][0] == texts[2][0] == texts[3][0]
    assert [len(each) for each in texts] == [1, 2, 1, 2]


def test_without_a_seed_texts_differ(client: openai.OpenAI) -> None:
    texts = {client.completions.create(model="base", prompt=PROMPT, max_tokens=20).choices[0].text for _ in range(3)}
    assert len(texts) == 3


def test_a_stop_ends_a_text_and_is_left_out(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "calm", "prompt": PROMPT, "max_tokens": 30, "seed": 5}
    text = client.completions.create(**asked).choices[0].text
    stop = text[10:14]
    reply = client.completions.create(**asked, stop=[stop, "never there"])
    assert reply.choices[0].text == text[: text.find(stop)]
    assert reply.choices[0].finish_reason == "stop"


def test_a_token_may_end_a_text(client: openai.OpenAI, running: Running) -> None:
    ids = offline(running, PROMPT, "calm", max_new_tokens=8, temperature=1.0, seed=5).ids
    reply = client.completions.create(
        model="calm", prompt=PROMPT, max_tokens=8, seed=5, extra_body={"stop_token_ids": [ids[4]]}
    )
    first = ids.index(ids[4])
    assert reply.choices[0].text == running.server.decode(ids[:first])
    assert reply.choices[0].finish_reason == "stop"


def test_biases_and_penalties_act(client: openai.OpenAI, running: Running) -> None:
    token = running.server.tokenizer(" the", add_special_tokens=False)["input_ids"][0]
    asked: dict[str, Any] = {"model": "base", "prompt": PROMPT, "max_tokens": 4, "temperature": 0}
    forced = client.completions.create(**asked, logit_bias={str(token): 3}).choices[0].text
    assert forced == " the" * 4
    varied = client.completions.create(**asked, logit_bias={str(token): 3}, frequency_penalty=2)
    assert varied.choices[0].text.count(" the") < 4


def test_log_probabilities_of_completions(client: openai.OpenAI, running: Running) -> None:
    reply = client.completions.create(model="calm", prompt=PROMPT, max_tokens=5, seed=1, logprobs=3, echo=True)
    choice = reply.choices[0]
    scores = choice.logprobs
    assert scores is not None
    assert scores.tokens
    assert scores.token_logprobs
    assert scores.top_logprobs
    assert scores.text_offset
    assert choice.text.startswith(PROMPT)
    assert "".join(scores.tokens) == choice.text
    assert scores.token_logprobs[0] is None
    for token, offset in zip(scores.tokens, scores.text_offset, strict=True):
        assert choice.text[offset:].startswith(token)
    said = offline(running, PROMPT, "calm", max_new_tokens=5, temperature=1.0, seed=1).ids
    ids = [*running.server.tokenizer(PROMPT)["input_ids"], *said]
    expected = torch.log_softmax(reference(running, "calm", ids), -1)
    for at in range(1, len(ids)):
        assert math.isclose(scores.token_logprobs[at], float(expected[at - 1, ids[at]]), abs_tol=1e-4)
        assert 3 <= len(scores.top_logprobs[at]) <= 4


def reference(running: Running, adapter: str, ids: list[int]) -> torch.Tensor:
    model, _ = lora.load_base(running.server.config.model, dtype="fp32")
    lora.load_adapter(model, running.server.adapters.get(adapter).source)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def test_a_prompt_is_scored_without_a_new_token(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="calm", prompt=PROMPT, max_tokens=0, logprobs=0, echo=True)
    assert reply.choices[0].text == PROMPT
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 0
    assert reply.choices[0].logprobs is not None
    assert len(reply.choices[0].logprobs.token_logprobs or []) == reply.usage.prompt_tokens


def test_streamed_scores_are_the_whole_ones(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "calm", "prompt": PROMPT, "max_tokens": 6, "seed": 1, "logprobs": 2, "echo": True}
    whole = client.completions.create(**asked).choices[0].logprobs
    parts = [chunk.choices[0].logprobs for chunk in client.completions.create(**asked, stream=True) if chunk.choices]
    assert whole is not None
    for name in ("tokens", "token_logprobs", "text_offset"):
        joined = [value for part in parts if part for value in getattr(part, name)]
        assert joined == pytest.approx(getattr(whole, name)) if name != "tokens" else joined == whole.tokens


def test_log_probabilities_of_chats(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="calm", messages=ASKED, max_tokens=5, seed=1, logprobs=True, top_logprobs=2
    )
    scores = reply.choices[0].logprobs
    assert scores is not None
    assert scores.content is not None
    assert b"".join(bytes(entry.bytes or []) for entry in scores.content).decode("utf-8", "ignore")
    assert all(len(entry.top_logprobs) == 2 for entry in scores.content)
    assert all(entry.top_logprobs[0].logprob >= entry.logprob - 1e-6 for entry in scores.content)


def test_answers_follow_a_json_schema(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"],
              "additionalProperties": False}  # fmt: skip
    reply = client.chat.completions.create(
        model="calm", messages=ASKED, max_tokens=60, seed=1,
        response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
    )  # fmt: skip
    assert isinstance(json.loads(reply.choices[0].message.content or "")["ok"], bool)


def test_a_repeated_beginning_is_reused(client: openai.OpenAI) -> None:
    prompt = "a b c d e f g h " * 10
    usages = [
        client.completions.create(model="bold", prompt=prompt + end, max_tokens=1).usage for end in ("one", "two")
    ]
    assert usages[1] is not None
    assert usages[1].prompt_tokens_details is not None
    assert (usages[1].prompt_tokens_details.cached_tokens or 0) > 32


def test_many_asynchronous_clients_at_once(running: Running) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=5) as client:
            replies = await asyncio.gather(
                *(
                    client.completions.create(
                        model=("calm", "bold", "base")[n % 3], prompt=PROMPT, seed=n, max_tokens=6
                    )
                    for n in range(12)
                )
            )
        return [reply.choices[0].text for reply in replies]

    texts = asyncio.run(ask())
    for number, text in enumerate(texts):
        adapter = ("calm", "bold", None)[number % 3]
        assert text == offline(running, PROMPT, adapter, max_new_tokens=6, temperature=1.0, seed=number).text


# --- what is refused --------------------------------------------------------------------------------------------------

COMPLETION = {"model": "calm", "prompt": "Hi", "max_tokens": 2}
CHAT = {"model": "calm", "messages": ASKED, "max_tokens": 2}
WRONG = {
    "unknown model": ("completions", {"model": "clam"}, 404, "model", "Did you mean 'calm'"),
    "no prompt": ("completions", {"prompt": ...}, 400, "prompt", "missing"),
    "wrong type": ("completions", {"temperature": "hot"}, 400, "temperature", "valid number"),
    "out of range": ("completions", {"top_p": 2}, 400, "top_p", "less than or equal to 1"),
    "not finite": ("completions", {"temperature": 1e999}, 400, "temperature", "finite"),
    "too many tokens": ("completions", {"max_tokens": 201}, 400, "max_tokens", "allows at most 200"),
    "no tokens": ("chat/completions", {"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
    "too many texts": ("completions", {"n": 33}, 400, "n", "--max_choices"),
    "too long": ("completions", {"prompt": "word " * 400}, 400, None, "context"),
    "empty ids": ("completions", {"prompt": []}, 400, "prompt", "at least 1"),
    "ids that do not exist": ("completions", {"prompt": [10**8]}, 400, None, "100000000"),
    "half a character": ("completions", {"prompt": ["whole", "\ud800"]}, 400, "prompt", "half of a surrogate pair"),
    "half a stop": ("completions", {"stop": "\ud800"}, 400, "stop", "send whole characters"),
    "half a name": ("completions", {"\ud800": 1}, 400, None, r"'\ud800' contains half"),
    "half a message": ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "text",
                       "text": "\udfff"}]}]}, 400, "messages", "half of a surrogate pair"),
    "unknown field": ("completions", {"temprature": 1}, 400, "temprature", "Did you mean 'temperature'"),
    "suffix": ("completions", {"suffix": "x"}, 400, "suffix", "does not fill gaps"),
    "best_of": ("completions", {"best_of": 2}, 400, "best_of", "not supported"),
    "empty stop": ("completions", {"stop": ""}, 400, "stop", "at least 1"),
    "bias without id": ("completions", {"logit_bias": {"the": 1}}, 400, "logit_bias", "pattern"),
    "bias of no token": ("completions", {"logit_bias": {"99999999": 1}}, 400, None, "99999999"),
    "options without a stream": ("completions", {"stream_options": {"include_usage": True}}, 400, "stream_options", ""),
    "tools": ("chat/completions", {"tools": [{"type": "function"}]}, 400, "tools", "does not call tools"),
    "no messages": ("chat/completions", {"messages": []}, 400, "messages", "at least 1"),
    "an image": ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400,
                 "messages", "image_url"),
    "a role": ("chat/completions", {"messages": [{"role": "judge", "content": "x"}]}, 400, "messages", "no such role"),
    "alternatives alone": ("chat/completions", {"top_logprobs": 2}, 400, "top_logprobs", "logprobs is not true"),
    "no schema": ("chat/completions", {"response_format": {"type": "json_schema"}}, 400, "response_format", "schema"),
    "two limits": ("chat/completions", {"max_tokens": 2, "max_completion_tokens": 3}, 400, "max_tokens", "differ"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_requests_name_what_is_wrong(post: Any, case: str) -> None:
    path, change, status, param, words = WRONG[case]
    whole = {**(CHAT if "chat" in path else COMPLETION), **change}
    body = json.dumps({name: value for name, value in whole.items() if value is not ...})
    reply = httpx_post(post, f"/v1/{path}", body)
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert words in error["message"]


def httpx_post(post: Any, path: str, body: str | bytes, **headers: str) -> httpx.Response:
    http = post.__closure__[0].cell_contents
    return http.post(path, content=body, headers={"content-type": "application/json", **headers})


@pytest.mark.parametrize("body", ["{", "[1, 2]", '"text"', "null", "\xff", "[" * 100_000])
def test_what_is_not_a_json_object(post: Any, body: str) -> None:
    reply = httpx_post(post, "/v1/completions", body.encode("latin-1"))
    assert reply.status_code == 400
    assert reply.json()["error"]["type"] == "invalid_request_error"


def test_addresses_and_methods_that_do_not_exist(running: Running) -> None:
    for method, path, status in (("GET", "/v1/nothing", 404), ("PUT", "/v1/models", 405), ("GET", "/docs", 404)):
        reply = httpx.request(method, running.url + path)
        assert reply.status_code == status
        assert reply.json()["error"]["message"]


def test_bodies_that_are_too_large(running: Running, post: Any) -> None:
    assert post("/v1/completions", {**COMPLETION, "prompt": "a" * 300_000}).status_code == 413

    def pieces() -> Iterator[bytes]:
        yield from (b"a" * 65536 for _ in range(8))

    reply = httpx.post(f"{running.url}/v1/completions", content=pieces(), headers={"content-type": "application/json"})
    assert reply.status_code == 413
    assert "larger than 0.2 MB" in reply.json()["error"]["message"]


def test_forms_are_not_json(post: Any) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        reply = httpx_post(post, "/v1/completions", json.dumps(COMPLETION), **{"content-type": kind})
        assert reply.status_code == 415


def test_pages_of_other_sites_are_refused(post: Any, running: Running) -> None:
    for origin in ("https://evil.example", "null", f"http://localhost:{running.port + 1}"):
        reply = post("/v1/completions", COMPLETION, origin=origin)
        assert reply.status_code == 403
        assert "access-control-allow-origin" not in reply.headers
    assert post("/v1/completions", COMPLETION, **{"sec-fetch-site": "cross-site"}).status_code == 403
    assert post("/v1/completions", COMPLETION, origin=running.url).status_code == 200
    assert post("/v1/completions", COMPLETION, host="rebound.example").status_code == 421


def test_an_error_of_ours_shows_no_traceback(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(running.server.service, "submit", fail)
    reply = httpx.post(f"{running.url}/v1/completions", json=COMPLETION)
    assert reply.status_code == 500
    assert reply.json()["error"]["type"] == "server_error"
    assert "secret" not in reply.text


def test_too_many_waiting_requests_are_told_to_come_again(running: Running) -> None:
    with hold(running), httpx.Client(base_url=running.url, timeout=None) as http:
        reply = http.post("/v1/completions", json={**COMPLETION, "n": 20})
    assert reply.status_code == 429
    assert int(reply.headers["retry-after"]) > 0
    assert reply.json()["error"]["type"] == "rate_limit_error"


class hold:
    """Blocks the model's thread, so that nothing is generated meanwhile."""

    def __init__(self, running: Running) -> None:
        self._service, self._go = running.server.service, threading.Event()

    def __enter__(self) -> None:
        begun = threading.Event()

        def block() -> None:
            begun.set()
            self._go.wait(30)

        self._thread = threading.Thread(target=lambda: self._service.call(block))
        self._thread.start()
        begun.wait(30)

    def __exit__(self, *_: object) -> None:
        self._go.set()
        self._thread.join()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_its_request(running: Running, stream: bool) -> None:
    service = running.server.service
    cancelled = threading.Event()
    cancel = service.cancel
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(service, "cancel", lambda handle: (cancel(handle), cancelled.set()))
        body = json.dumps({**COMPLETION, "max_tokens": 200, "stream": stream, "ignore_eos": True}).encode()
        with hold(running):
            with connected(running, body, "/v1/completions"):
                while not service.stats().waiting:
                    cancelled.wait(0.01)
            assert cancelled.wait(20)
    assert service.stats().running == 0


def test_a_reader_that_stops_reading_fills_no_memory(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unread chunks are queued up to a limit; then its texts end, and it is told why if it continues to read."""
    monkeypatch.setattr(serve_running, "_MOST_UNREAD", 64)
    ended = threading.Event()
    cancel = running.server.service.cancel
    monkeypatch.setattr(running.server.service, "cancel", lambda handle: (cancel(handle), ended.set()))
    asked = {**COMPLETION, "max_tokens": 200, "stream": True, "ignore_eos": True, "n": 4, "logprobs": 20}
    with connected(running, json.dumps(asked).encode(), "/v1/completions", buffer=4096) as raw:
        assert ended.wait(60)
        text = b""
        while piece := raw.recv(1 << 16):
            text += piece
            if b"[DONE]" in text:
                break
    assert b"read_too_slowly" in text
    assert text.count(b"data: ") < 4 * 200
    assert running.server.service.stats().running == 0


@contextlib.contextmanager
def connected(
    running: Running,
    body: bytes,
    path: str,
    *,
    buffer: int = 0,
    more: int = 0,
    kind: str = "application/json",
    key: str = "",
) -> Iterator[socket.socket]:
    """Sends a request over its own socket; `more`: bytes that are announced, but not sent."""
    listener, before = running.socket, running.socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    with socket.socket() as raw:
        if buffer:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        raw.settimeout(60)
        raw.connect(("127.0.0.1", running.port))
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nAuthorization: Bearer {key}\r\n"
        raw.sendall(head.encode() + b"Content-Length: %d\r\n\r\n%s" % (len(body) + more, body))
        yield raw
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, before // 2)


def test_an_upload_that_breaks_off_leaves_nothing(running: Running) -> None:
    files = running.server.state_dir / "files"
    form = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n' + b"y" * 100_000
    with connected(running, form, "/v1/files", more=1000, kind="multipart/form-data; boundary=x"):
        while not list(files.iterdir()):
            threading.Event().wait(0.01)
    while list(files.iterdir()):
        threading.Event().wait(0.01)
    assert httpx.get(f"{running.url}/v1/files").json()["data"] == []


def test_a_slow_reader_stalls_nobody(running: Running, client: openai.OpenAI) -> None:
    body = json.dumps({**COMPLETION, "max_tokens": 200, "stream": True, "ignore_eos": True, "n": 8}).encode()
    with connected(running, body, "/v1/completions", buffer=1024):
        assert client.completions.create(model="bold", prompt="Hi", max_tokens=3).usage is not None


# --- adapters ---------------------------------------------------------------------------------------------------------


def test_adapters_come_change_and_go(running: Running, places: Path, post: Any, client: openai.OpenAI) -> None:
    tiny_adapter(places / "base", places / "adapters" / "new", 9)
    with httpx.Client(base_url=running.url) as http:
        assert http.get("/v1/adapters").json()["unused"] == ["new"]
        made = post("/v1/adapters", {"name": "fresh", "path": "new", "scale": 0.5})
        assert made.status_code == 201, made.text
        told = made.json()
        assert (told["rank"], told["targets"], told["scale"], told["source"]) == (4, ["c_attn", "c_proj"], 0.5, "new")
        assert post("/v1/adapters", {"name": "fresh", "path": "new"}).status_code == 409
        assert post("/v1/adapters", {"name": "base", "path": "new"}).status_code == 409
        texts = []
        for scale in (1.0, 0.0):
            assert http.patch("/v1/adapters/fresh", json={"scale": scale}).json()["scale"] == scale
            reply = client.completions.create(model="fresh", prompt=PROMPT, seed=1, max_tokens=8)
            texts.append(reply.choices[0].text)
        plain = client.completions.create(model="base", prompt=PROMPT, seed=1, max_tokens=8).choices[0].text
        assert texts[0] != texts[1] == plain
        assert http.delete("/v1/adapters/fresh").json()["deleted"]
        assert http.get("/v1/adapters/fresh").status_code == 404
        assert http.delete("/v1/adapters/fresh").status_code == 404


def test_a_text_ends_with_the_adapter_that_it_began_with(running: Running, places: Path, post: Any) -> None:
    tiny_adapter(places / "base", places / "adapters" / "brief", 11)
    tiny_adapter(places / "base", places / "adapters" / "second", 12)
    assert post("/v1/adapters", {"name": "brief"}).status_code == 201
    expected = offline(running, "Hi", "brief", max_new_tokens=100, min_new_tokens=100, temperature=1.0, seed=2).text
    body = {**COMPLETION, "model": "brief", "max_tokens": 100, "ignore_eos": True, "seed": 2, "stream": True}
    text, unloaded = "", False
    with httpx.stream("POST", f"{running.url}/v1/completions", json=body) as stream:
        for line in stream.iter_lines():
            if not unloaded:
                assert post("/v1/adapters", {"name": "second"}).status_code == 201
                assert httpx.delete(f"{running.url}/v1/adapters/brief").status_code == 200
                unloaded = True
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
    assert text == expected
    assert post("/v1/completions", {**COMPLETION, "model": "brief"}).status_code == 404


def test_one_name_is_loaded_by_one_request_at_a_time(
    running: Running, places: Path, post: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_adapter(places / "base", places / "adapters" / "twin", 13)
    reads, go = threading.Event(), threading.Event()
    read = adapter_store.read_adapter

    def slow(*args: Any, **settings: Any) -> Any:
        reads.set()
        assert go.wait(60)
        return read(*args, **settings)

    monkeypatch.setattr(adapter_store, "read_adapter", slow)
    replies: list[httpx.Response] = []
    first = threading.Thread(target=lambda: replies.append(post("/v1/adapters", {"name": "twin"})))
    first.start()
    assert reads.wait(60)
    try:
        reply = httpx.post(f"{running.url}/v1/adapters", json={"name": "twin"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (409, "name_taken")
        assert httpx.delete(f"{running.url}/v1/adapters/twin").status_code == 404
    finally:
        go.set()
        first.join()
    assert [reply.status_code for reply in replies] == [201]
    assert httpx.delete(f"{running.url}/v1/adapters/twin").status_code == 200


OUTSIDE = [
    "..",
    "../later",
    "new/../../later",
    "/etc",
    "C:\\x",
    "\\\\host\\share",
    "a\\..\\..\\later",
    "\0",
    " ",
    "link",
]


@pytest.mark.parametrize("path", OUTSIDE)
def test_paths_out_of_the_directory_are_refused(running: Running, places: Path, post: Any, path: str) -> None:
    link = places / "adapters" / "link"
    if path == "link" and not link.is_symlink():
        link.symlink_to(places / "later")
    reply = post("/v1/adapters", {"name": "x", "path": path})
    assert reply.status_code == 403, reply.text
    assert reply.json()["error"]["code"] == "outside_adapters"
    assert "x" not in running.server.adapters


def test_a_file_that_links_out_is_refused(places: Path, post: Any) -> None:
    inner = places / "adapters" / "linked"
    inner.mkdir(exist_ok=True)
    (inner / "adapter_config.json").symlink_to(places / "later" / "adapter_config.json")
    assert post("/v1/adapters", {"name": "x", "path": "linked"}).status_code == 403


def test_adapters_that_would_not_work_are_refused_in_words(places: Path, post: Any) -> None:
    other = places / "other"
    torch.manual_seed(5)
    config = transformers.GPT2Config(vocab_size=49152, n_embd=32, n_layer=1, n_head=2, n_positions=CONTEXT)
    transformers.GPT2LMHeadModel(config).save_pretrained(other)
    load_tokenizer().save_pretrained(other)
    tiny_adapter(other, places / "adapters" / "foreign", 1)
    tiny_adapter(places / "base", places / "adapters" / "void", 1, std=0.0)
    broken = tiny_adapter(places / "base", places / "adapters" / "broken", 1) / "adapter_model.safetensors"
    broken.write_bytes(broken.read_bytes()[:100])
    for name, words in (("foreign", "16"), ("void", "changes no logit"), ("broken", "adapter_model.safetensors")):
        reply = post("/v1/adapters", {"name": name})
        assert reply.status_code in (400, 422), reply.text
        assert words in reply.json()["error"]["message"]
        assert str(places) not in reply.text
    assert post("/v1/adapters", {"name": "nwe"}).status_code == 404


# --- keys, limits, and starting ---------------------------------------------------------------------------------------


def test_keys_origins_and_time(places: Path, tmp_path: Path) -> None:
    config = ServeConfig(
        model=str(places / "base"), dtype="fp32", page=False, state_dir=str(tmp_path), max_jobs=0, max_seconds=0.5,
        api_key=["k1", "k2"], allow_origin=["https://own.example"], max_tokens=100,
    )  # fmt: skip
    running = Running(config)
    try:
        asked = {"model": "base", "prompt": "Hi", "max_tokens": 2}
        url = f"{running.url}/v1/completions"
        for headers, status in (
            ({}, 401),
            ({"authorization": "Bearer k3"}, 401),
            ({"authorization": "k1"}, 401),
            ({"authorization": "Bearer k2"}, 200),
            ({"authorization": "Bearer k1", "origin": "https://own.example"}, 200),
            ({"authorization": "Bearer k1", "origin": "https://other.example"}, 403),
        ):
            reply = httpx.post(url, json=asked, headers=headers)
            assert reply.status_code == status, headers
        preflight = {"origin": "https://own.example", "access-control-request-method": "POST"}
        assert httpx.options(url, headers=preflight).headers["access-control-allow-origin"] == "https://own.example"
        assert httpx.get(f"{running.url}/health").json() == {"status": "ok"}
        assert httpx.get(f"{running.url}/metrics").status_code == 401
        key = {"authorization": "Bearer k1"}
        with hold(running):
            reply = httpx.post(url, json=asked, headers=key, timeout=30)
            assert (reply.status_code, reply.json()["error"]["code"]) == (504, "timeout")
            reply = httpx.post(url, json={**asked, "stream": True}, headers=key, timeout=30)
            assert '"timeout"' in reply.text
            assert reply.text.endswith("data: [DONE]\n\n")
        for path, kind in (("completions", "application/json"), ("files", "multipart/form-data; boundary=x")):
            with connected(running, b"--", f"/v1/{path}", more=10, kind=kind, key="k1") as raw:
                reply = b"".join(iter(lambda: raw.recv(4096), b""))
            assert reply.startswith(b"HTTP/1.1 408"), reply
            assert b"did not arrive in time" in reply
        figures = httpx.get(f"{running.url}/metrics", headers=key).text
        assert 'loralib_requests_total{route="/v1/completions",status="200"} 3.0' in figures
        assert "loralib_time_to_first_token_seconds_bucket" in figures
    finally:
        running.close()


def test_all_faults_show_at_the_start(places: Path, tmp_path: Path) -> None:
    base = str(places / "base")
    tiny_adapter(places / "base", tmp_path / "all" / "void", 1, std=0.0)
    broken = tiny_adapter(places / "base", tmp_path / "all" / "sub" / "broken", 1) / "adapter_model.safetensors"
    broken.write_bytes(b"x")
    with pytest.raises(lora.LoraError, match=r"(?s)sub/broken.*void.*changes no logit"):
        start(ServeConfig(adapters=str(tmp_path / "all"), dtype="fp32", state_dir=str(tmp_path / "state")))
    with pytest.raises(lora.LoraError, match="not a directory"):
        start(ServeConfig(model=base, adapters=str(tmp_path / "none")))
    with pytest.raises(lora.LoraError, match=r"(?s)port.*adapter is 'x'.*allow_origin is '\*'"):
        ServeConfig(port=-1, adapter="x", allow_origin="*")


def test_a_base_without_a_template(places: Path, tmp_path: Path) -> None:
    bare = tiny_base(tmp_path / "bare")
    tokenizer = transformers.AutoTokenizer.from_pretrained(bare)
    tokenizer.chat_template = None
    for file in bare.glob("chat_template*"):
        file.unlink()
    tokenizer.save_pretrained(bare)
    config: dict[str, Any] = {"model": str(bare), "dtype": "fp32", "page": False, "max_jobs": 0}
    running = Running(ServeConfig(**config, state_dir=str(tmp_path / "one")))
    try:
        reply = httpx.post(f"{running.url}/v1/chat/completions", json={**CHAT, "model": "bare"})
        assert reply.status_code == 400
        assert "--chat_template" in reply.json()["error"]["message"]
    finally:
        running.close()
    (tmp_path / "chat.jinja").write_text(TEMPLATE, encoding="utf-8")
    running = Running(
        ServeConfig(**config, state_dir=str(tmp_path / "two"), chat_template=str(tmp_path / "chat.jinja"))
    )
    try:
        assert httpx.post(f"{running.url}/v1/chat/completions", json={**CHAT, "model": "bare"}).status_code == 200
    finally:
        running.close()


def test_small_packets_are_sent_at_once() -> None:
    """Otherwise, each answer on a kept-alive connection, and each token of a stream, is delayed by 40 ms."""
    with open_port("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()[:2]):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_the_command_serves_until_it_is_told_to_end(places: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loralib", "serve", "--model", str(places / "base"), "--dtype", "fp32", "--port",
               "0", "--state_dir", str(tmp_path), "--adapter", f"calm={places / 'adapters' / 'calm'}", "--no_page",
               "--max_jobs", "0"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if line.startswith("Ctrl-C"):
                break
        url = re.search(r"http://localhost:\d+/v1", said)
        assert url is not None, said
        assert "1 adapter: calm" in said
        asked = {"model": "calm", "prompt": "Hi", "max_tokens": 100, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url[0]}/completions", json=asked) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.terminate()  # the text that is under way still ends
            rest = [line for line in lines if line]
        assert len(rest) > 50
        assert rest[-1] == "data: [DONE]"
        assert process.wait(30) == 0


def test_a_job_on_chats_trains_with_the_server_s_template(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base has no template, so the job must use the server's."""
    base = shutil.copytree(places / "base", tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    (tmp_path / "own.jinja").write_text(TEMPLATE, encoding="utf-8")
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
    monkeypatch.setattr(supervisor, "TrainingProcess", FakeProcess)
    FakeProcess.made = []
    server = start(
        ServeConfig(str(base), chat_template=str(tmp_path / "own.jinja"), dtype="fp32", state_dir=str(tmp_path / "s"))
    )
    try:
        file = upload(server.jobs.files, "chats.jsonl", (json.dumps(chat) + "\n").encode() * 4)
        job = server.jobs.create(file.id, {"dtype": "fp32", "max_steps": 2, "lr": 0.1})
        while not FakeProcess.made and server.jobs.get(job.id).error is None:
            server.jobs.wait(job.id, 0.1)
        assert server.jobs.get(job.id).error is None
        assert main(["train", "--config", str(job.directory / "job.toml")]) == 0
        FakeProcess.made[0].end(0)
        assert server.jobs.wait(job.id, 60).status == "succeeded"
        assert (job.run / "chat_template.jinja").read_text(encoding="utf-8") == TEMPLATE
        assert trained_on_chats(job.run)
        assert server.adapters.get(job.adapter_name).chats
        assert chat_prompt(server, chat["messages"][:1], job.adapter_name)
    finally:
        server.close()


@pytest.mark.parametrize(
    ("path", "allowed"),
    [("/v1/files", "GET, POST"), ("/v1/files/file-1", "DELETE, GET"), ("/v1/adapters/a/b", "DELETE, GET, PATCH"),
     ("/v1/models", "GET"), ("/openapi.json", "GET, HEAD"), ("/", "GET"), ("/page/main.js", "GET, HEAD"),
     ("/page-api/adapters/load", "POST")],
)  # fmt: skip
def test_a_wrong_method_is_told_all_the_right_ones(running: Running, path: str, allowed: str) -> None:
    for method in ("OPTIONS", "PUT"):
        reply = httpx.request(method, running.url + path)
        assert (reply.status_code, reply.headers["allow"]) == (405, allowed)


def test_little_memory_for_adapters_and_little_time_to_end(
    places: Path, tmp_path: Path, running: Running, client: openai.OpenAI
) -> None:
    """Adapters take turns in memory, with the same answers; a text that is not done in time ends with an error."""
    config = ServeConfig(
        str(places / "base"), adapter=[f"{name}={places / 'adapters' / name}" for name in ("calm", "bold")],
        dtype="fp32", page=False, state_dir=str(tmp_path), max_jobs=0,
        adapter_memory_mb=running.server.adapters.describe("calm")["bytes"] * 1.5 / 1e6,
    )  # fmt: skip
    small = Running(config)
    try:
        asked: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 5, "seed": 1}
        for model in ("calm", "bold", "calm", "base", "bold"):
            reply = small.client().completions.create(model=model, **asked)
            assert reply.choices[0].text == client.completions.create(model=model, **asked).choices[0].text
            told = httpx.get(f"{small.url}/v1/adapters").json()["data"]
            assert [each["id"] for each in told if each["in_memory"]] == [model if model != "base" else "calm"]
        assert httpx.get(f"{small.url}/health").status_code == 200
        body = {**COMPLETION, "model": "base", "max_tokens": 240, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{small.url}/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            with hold(small):  # the grace period is over before the next token
                ending = threading.Thread(target=small.server.service.close, args=(0.0,))
                ending.start()
            ending.join()
            rest = [line for line in lines if line]
        assert "shutting_down" in rest[-2]
        assert rest[-1] == "data: [DONE]"
        reply = httpx.get(f"{small.url}/health")  # the model's thread has ended, though nobody told the server
        assert reply.status_code == 503
        assert "thread" in reply.json()["status"]
    finally:
        small.close()


# --- what the guide says ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guide", ["docs/serving.md", "docs/vi/serving.md"])
def test_the_guide_s_examples_work(
    guide: str, running: Running, places: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / guide).read_text(encoding="utf-8")
    [python] = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    exec(python.replace("localhost:8000", f"localhost:{running.port}"), {})
    assert "'calm'" in capfd.readouterr().out
    if not (places / "adapters" / "new").exists():
        tiny_adapter(places / "base", places / "adapters" / "new", 9)
    block = next(
        block for block in re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE) if "curl" in block
    )
    for line in block.splitlines():
        words = shlex.split(line.replace("localhost:8000", f"localhost:{running.port}"))
        method = words[words.index("-X") + 1] if "-X" in words else "POST" if "-d" in words else "GET"
        data = words[words.index("-d") + 1] if "-d" in words else None
        url = next(word for word in words if word.startswith("localhost"))
        reply = httpx.request(method, f"http://{url}", content=data, headers={"content-type": "application/json"})
        assert reply.is_success, line


@pytest.mark.parametrize("guide", ["docs/serving.md", "docs/vi/serving.md"])
def test_the_guide_names_flags_and_fields_that_exist(guide: str) -> None:
    text = (ROOT / guide).read_text(encoding="utf-8").split("## Beyond")[0].split("## Vượt")[0]
    flags = {name.removeprefix("--") for name in re.findall(r"`(--[a-z_]+)", text)}
    assert flags <= {field.name for field in dataclasses.fields(ServeConfig)}
    rows = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`([a-z_]+)[.`]", row)}
    fields = {*CompletionRequest.model_fields, *ChatRequest.model_fields}
    assert named <= fields
    without_effect = {"user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key",
                      "prompt_cache_retention", "parallel_tool_calls"}  # fmt: skip
    missing = fields - named - without_effect - {"model", "messages", "return_tokens_as_token_ids"}
    assert not missing
    assert all(f"`{name}`" in text for name in without_effect)


def test_a_request_that_is_cancelled_waits_for_no_more_chunks() -> None:
    class Silent:
        """A service that accepts requests and never responds."""

        def submit(self, *_: Any, **__: Any) -> RequestHandle:
            return RequestHandle(0, 1)

        def cancel(self, handle: RequestHandle) -> None:
            pass

    async def ask() -> list[Any]:
        silent: Any = Silent()
        about: Any = {"client": "", "ends": frozenset(), "decode": str, "seconds": 600.0, "metrics": None}
        run = Run(silent, [[1]], [Sampling()], None, **about)
        run.submit()

        async def collected() -> list[Any]:
            return [chunk async for chunk in run.chunks()]

        waiting = asyncio.ensure_future(collected())
        await asyncio.sleep(0)  # it waits for a chunk now
        run.cancel()
        return await asyncio.wait_for(waiting, 10)

    assert asyncio.run(ask()) == []
