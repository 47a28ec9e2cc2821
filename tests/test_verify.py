"""loralib verify: what servers of five kinds are asked, and what their answers are judged to be."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
import xllamacpp
from transformers import LlamaConfig, LlamaForCausalLM

import loralib as lora
from loralib.cli import main
from loralib.errors import ConfigError, UnreachableServerError
from loralib.formats import export, make_portable
from loralib.verify import Reference, Verdict, Vocabulary, connect, judge

ROOT = Path(__file__).resolve().parent.parent
V = 64


class Letters:
    """A tokenizer of 64 tokens, each a word."""

    def __len__(self) -> int:
        return V

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return "".join(f"<t{number}>" for number in ids)

    def encode(self, text: str) -> list[int]:
        return [int(part[2:]) for part in text.split(">") if part]


torch.manual_seed(3)
ROWS = torch.randint(3, V, (5, 40)).tolist()


def tiny_llama() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.2, tie_word_embeddings=False)).eval()


def drawn(seed: int, std: float = 0.15, **settings: Any) -> Any:
    model = tiny_llama()
    lora.inject(model, lora.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **settings}))
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=std)
    return lora.adapter_of(model)


ADAPTER = drawn(1)


def logprobs(model: Any, ids: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([list(ids)])).logits[0].float().log_softmax(-1)


def greedy(model: Any, ids: Sequence[int], count: int) -> list[tuple[int, torch.Tensor]]:
    ids, steps = list(ids), []
    for _ in range(count):
        scores = logprobs(model, ids)[-1]
        steps.append((int(scores.argmax()), scores))
        ids.append(steps[-1][0])
    return steps


def top(scores: torch.Tensor, count: int) -> list[tuple[int, float]]:
    values, tokens = scores.topk(count)
    return list(zip(tokens.tolist(), values.tolist(), strict=True))


# Servers by their documentation.  Each answers from one model with the adapter and one without.

Answer = Callable[[str, Any], Any]  # path and body -> answer; None: there is no such path


def models_of(adapted: Any) -> Callable[[Any], Any]:
    base = tiny_llama()
    return lambda name: adapted if name == "mine" else base


def echo_server(adapted: Any, **_: Any) -> Answer:
    """OpenAI's completions with `echo`, as in vLLM; it must generate a token."""
    pick = models_of(adapted)

    def answer(path: str, body: Any) -> Any:
        if path == "/v1/models":
            return {"data": [{"id": "base", "parent": None}, {"id": "mine", "parent": "base"}]}
        if path != "/v1/completions":
            return None
        if body["max_tokens"] == 0:
            return 400, {"error": {"message": "max_tokens must be at least 1", "type": "BadRequestError"}}
        ids = body["prompt"]
        scores = logprobs(pick(body["model"]), ids)
        own = [None, *(float(scores[at - 1, ids[at]]) for at in range(1, len(ids))), float(scores[-1].max())]
        tokens = [f"token_id:{token}" for token in [*ids, int(scores[-1].argmax())]]
        return {"choices": [{"logprobs": {"tokens": tokens, "token_logprobs": own, "top_logprobs": None}}]}

    return answer


def prompt_logprobs_server(adapted: Any, **_: Any) -> Answer:
    """vLLM's own field, from a server that ignores `echo`."""
    pick = models_of(adapted)

    def answer(path: str, body: Any) -> Any:
        if path == "/v1/models":
            return {"data": [{"id": "base", "parent": None}, {"id": "mine", "parent": "base"}]}
        if path != "/v1/completions":
            return None
        ids = body["prompt"]
        scores = logprobs(pick(body["model"]), ids)
        choice: dict[str, Any] = {"text": "", "logprobs": {"tokens": ["x"], "token_logprobs": [-1.0]}}
        if "prompt_logprobs" in body:
            entries = [
                {str(ids[at]): {"logprob": float(scores[at - 1, ids[at]]), "rank": 1, "decoded_token": "x"}}
                for at in range(1, len(ids))
            ]
            choice["prompt_logprobs"] = [None, *entries]
        return {"choices": [choice]}

    return answer


def generated_server(adapted: Any, **_: Any) -> Answer:
    """A server that tells nothing of prompts: log-probabilities of what it generates alone."""
    pick = models_of(adapted)

    def answer(path: str, body: Any) -> Any:
        if path == "/v1/models":
            return {"data": [{"id": "base"}, {"id": "mine", "parent": "base"}]}
        if path != "/v1/completions":
            return None
        if body.get("echo") or "prompt_logprobs" in body:
            return 400, {"error": {"message": "not supported"}}
        steps = greedy(pick(body["model"]), body["prompt"], body["max_tokens"])
        tops = [{f"<t{token}>": value for token, value in top(scores, 5)} for _, scores in steps]
        tokens = [f"<t{token}>" for token, _ in steps]
        own = [float(scores[token]) for token, scores in steps]
        return {"choices": [{"logprobs": {"tokens": tokens, "token_logprobs": own, "top_logprobs": tops}}]}

    return answer


def sglang_server(adapted: Any, **_: Any) -> Answer:
    """SGLang's /generate."""
    pick = models_of(adapted)

    def answer(path: str, body: Any) -> Any:
        if path == "/get_model_info":
            return {"model_path": "base", "is_generation": True}
        if path != "/generate":
            return None
        ids = body["input_ids"]
        scores = logprobs(pick(body.get("lora_path")), ids)
        own = [[None, ids[0], None], *([float(scores[at - 1, ids[at]]), ids[at], None] for at in range(1, len(ids)))]
        return {"text": "", "meta_info": {"input_token_logprobs": own, "output_token_logprobs": []}}

    return answer


def ollama_server(adapted: Any, **_: Any) -> Answer:
    """Ollama's /api/generate; it has no numbers of tokens."""
    pick = models_of(adapted)

    def answer(path: str, body: Any) -> Any:
        if path == "/api/version":
            return {"version": "0.12.11"}
        if path == "/api/tags":
            return {"models": [{"name": "mine:latest"}, {"name": "base:latest"}]}
        if path != "/api/generate":
            return None
        steps = greedy(pick(body["model"]), Letters().encode(body["prompt"]), body["options"]["num_predict"])
        entries = [
            {
                "token": f"<t{token}>",
                "logprob": float(scores[token]),
                "top_logprobs": [{"token": f"<t{t}>", "logprob": value} for t, value in top(scores, 5)],
            }
            for token, scores in steps
        ]
        return {"response": "", "done": True, "logprobs": entries}

    return answer


SERVERS = {
    "echo": echo_server,
    "prompt_logprobs": prompt_logprobs_server,
    "generated": generated_server,
    "SGLang": sglang_server,
    "Ollama": ollama_server,
}


@contextmanager
def serving(answer: Answer) -> Iterator[str]:
    """Serves answers on a free port, and yields the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(answer(self.path, None))

        def do_POST(self) -> None:
            self.reply(answer(self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))

        def reply(self, value: Any) -> None:
            status, body = value if isinstance(value, tuple) else (404, {}) if value is None else (200, value)
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def judged(
    address: str, model: str | None = "mine", base_model: str | None = "base", adapter: Any = ADAPTER
) -> Verdict:
    server = connect(address, Vocabulary(Letters()), model=model, base_model=base_model, timeout=20)
    adapted = server.ask(ROWS, adapted=True)
    base = server.ask(ROWS, adapted=False) if server.base else None
    with Reference.of(tiny_llama(), adapter) as reference:
        return judge(reference, adapted, base)


def with_adapter(adapter: Any, scale: float = 1.0, keep: Callable[[str], bool] = lambda name: True) -> Any:
    model = tiny_llama()
    lora.apply_adapter(model, adapter, allow_base_mismatch=True)
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            module.scaling *= scale * keep(name)
    return model


@pytest.mark.parametrize("kind", SERVERS)
def test_every_kind_of_server_is_asked_in_its_way(kind: str) -> None:
    with serving(SERVERS[kind](with_adapter(ADAPTER))) as address:
        right = judged(address)
    assert (right.kind, right.exit_code) == ("right", 0)
    assert right.positions >= 150
    assert max(right.from_adapter, right.base_error or 0) < 1e-4 < 0.1 < right.from_base
    with serving(SERVERS[kind](with_adapter(ADAPTER, 0.25))) as address:
        wrong = judged(address)
    assert (wrong.kind, wrong.exit_code) == ("scaled", 1)
    assert wrong.scale == pytest.approx(0.25, rel=0.03)
    assert "0.25 of what it should be" in wrong.text


@pytest.mark.parametrize(
    ("served", "kind", "said"),
    [
        (lambda: tiny_llama(), "none", "has no effect"),
        (lambda: with_adapter(ADAPTER, 4), "scaled", "scaling is 4 of"),
        (lambda: with_adapter(ADAPTER, -1), "scaled", "scaling is -1 of"),
        (lambda: with_adapter(drawn(2)), "other", "another adapter"),
        (lambda: with_adapter(ADAPTER, keep=lambda n: "attn" in n), "partly", "only its part in the attention"),
        (lambda: with_adapter(ADAPTER, keep=lambda n: "q_proj" not in n), "partly", "all but its part in q_proj"),
    ],
    ids=["none", "4 times", "subtracted", "another", "attention", "without q"],
)
def test_what_explains_the_answers_is_found(served: Callable[[], Any], kind: str, said: str) -> None:
    with serving(echo_server(served())) as address:
        verdict = judged(address)
    assert (verdict.kind, verdict.exit_code) == (kind, 1)
    assert said in verdict.text


def test_an_ignored_alpha_pattern_is_named() -> None:
    adapter = drawn(1, alpha_pattern={"mlp.*": 2.0, "self_attn.v_proj": 32.0})
    wrong = with_adapter(adapter)
    for module in wrong.modules():
        if hasattr(module, "lora_A"):
            module.scaling = 2.0
    with serving(echo_server(wrong)) as address:
        verdict = judged(address, adapter=adapter)
    assert verdict.kind == "partly"
    assert "alpha_pattern" in verdict.text


def test_a_base_with_the_adapter_in_it_is_found() -> None:
    answer = echo_server(with_adapter(ADAPTER))
    with serving(lambda path, body: answer(path, body and {**body, "model": "mine"})) as address:
        assert judged(address).kind == "merged"


def test_another_base_is_found() -> None:
    other = tiny_llama()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.3)
    answer = echo_server(other)
    with serving(lambda path, body: answer(path, body and {**body, "model": "mine"})) as address:
        assert judged(address).kind == "base"


def test_an_adapter_that_changes_too_little_cannot_be_told() -> None:
    adapter = drawn(1, std=1e-4)
    with serving(echo_server(with_adapter(adapter))) as address:
        verdict = judged(address, adapter=adapter)
    assert (verdict.kind, verdict.exit_code) == ("unclear", 2)


# What cannot be asked.


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda path, body: None, "404"),
        (lambda path, body: b"<html>hello</html>", "other than JSON"),
        (lambda path, body: {"data": 3} if path == "/v1/models" else None, "lists no models"),
        (lambda path, body: (401, {"error": {"message": "no key"}}), "no key Give --api_key"),
        (lambda path, body: (302, {}), "302"),
        (
            lambda path, body: {"data": [{"id": "base"}, {"id": "mine"}]} if path == "/v1/models" else
            {"choices": [{}]} if path == "/v1/completions" else None,
            "no log-probabilities that can be used",
        ),
    ],
    ids=["no paths", "a web page", "no list", "a key", "a redirect", "no scores"],
)  # fmt: skip
def test_what_is_no_such_server_is_said(answer: Answer, said: str) -> None:
    with serving(answer) as address, pytest.raises(UnreachableServerError) as caught:
        judged(address)
    assert said in str(caught.value)


def test_a_server_that_is_not_there_is_said() -> None:
    with serving(lambda path, body: None) as address:
        pass
    with pytest.raises(UnreachableServerError, match=r"cannot be reached.*Is the server running"):
        connect(address, Vocabulary(Letters()))


@pytest.mark.parametrize("url", ["file:///etc/passwd", "http://", "http://host:port", "ftp://a"])
def test_what_is_no_address_is_said(url: str) -> None:
    with pytest.raises(ConfigError, match="the address is"):
        connect(url, Vocabulary(Letters()))


def test_names_that_a_server_does_not_have_are_said_with_those_it_has() -> None:
    with serving(echo_server(tiny_llama())) as address:
        with pytest.raises(ConfigError, match=r"no such model.*mine.*It has: base, mine"):
            judged(address, model="mime")
        server = connect(f"{address}/v1/", Vocabulary(Letters()))
    assert (server.adapter, server.base) == ("mine", "base")  # the only one with a parent


# Real servers.


@contextmanager
def llama_cpp(base: Path, *adapters: tuple[Path, float]) -> Iterator[str]:
    settings = xllamacpp.CommonParams()
    settings.model.path = str(base)
    settings.n_ctx, settings.n_parallel, settings.warmup, settings.verbosity = 128, 1, False, -1
    settings.fit_params = False
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.no_extra_bufts = True
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(path), scale) for path, scale in adapters]
    settings.port = 0
    server = xllamacpp.Server(settings)
    yield server.listening_address
    del server


def test_llama_cpp_s_server_is_judged(tmp_path: Path, load_file: Callable[[Path], Any]) -> None:
    clients = load_file(ROOT / "tests" / "test_clients.py")
    base = tiny_llama()
    clients.write_base("llama", base, tmp_path / "base.gguf")
    export(make_portable(ADAPTER, "llamacpp", base), "llamacpp", tmp_path / "mine.gguf", base)
    file = tmp_path / "mine.gguf"
    for adapters, kind in (((file, 1.0),), "right"), (((file, 0.25),), "scaled"), ((), "none"):
        with llama_cpp(tmp_path / "base.gguf", *adapters) as address:
            verdict = judged(address, model="mine" if adapters else None)
        assert verdict.kind == kind, verdict


@pytest.fixture(scope="module")
def own_server(
    tmp_path_factory: pytest.TempPathFactory, load_file: Callable[[Path], Any]
) -> Iterator[tuple[str, Path]]:
    """Our own server with the adapter `mine`, and where its base and adapters are."""
    from loralib.serve.app import create_app
    from loralib.serve.server import start
    from loralib.serve.settings import ServeConfig

    folder = tmp_path_factory.mktemp("served")
    made = load_file(ROOT / "tests" / "test_serve.py")
    base = made.tiny_base(folder / "base")
    mine = made.tiny_adapter(base, folder / "mine", seed=1)
    made.tiny_adapter(base, folder / "other", seed=2)
    served = start(
        ServeConfig(
            model=str(base), adapter=[f"mine={mine}"], dtype="fp32", api_key=["secret"], state_dir=str(folder / "state")
        )
    )
    server = uvicorn.Server(uvicorn.Config(create_app(served), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        thread.join(0.01)
        assert thread.is_alive()
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", folder
    finally:
        server.should_exit = True
        thread.join()
        served.close()


def test_our_own_server_is_judged_by_the_command(
    own_server: tuple[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, folder = own_server
    command = ["verify", address, "--adapter", str(folder / "mine"), "--reference", str(folder / "base")]
    assert main(command) == 2
    assert "LORALIB_API_KEY" in capsys.readouterr().err
    monkeypatch.setenv("LORALIB_API_KEY", "secret")
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "Acts as it should." in shown
    assert "base from base" in shown
    # Another adapter of the same base, where `mine` is what the server has.
    assert main([*command[:3], str(folder / "other"), *command[4:], "--model", "mine"]) == 1
    assert "another adapter" in capsys.readouterr().out
    assert main([*command, "--model", "base", "--base_model", "base"]) == 1
    assert "Has no effect" in capsys.readouterr().out
