"""loralib verify: requests to servers of five kinds, and the verdicts on their answers."""

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
    """A tokenizer of 64 tokens, each a word; 1 is the start token."""

    bos_token_id = 1

    def __len__(self) -> int:
        return V

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return "".join(f"<t{number}>" for number in ids)

    def encode(self, text: str, **_: Any) -> list[int]:
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
    steps, past, ids = [], None, list(ids)
    for _ in range(count):
        with torch.no_grad():
            made = model(torch.tensor([ids]), past_key_values=past, use_cache=True)
        past, scores = made.past_key_values, made.logits[0, -1].float().log_softmax(-1)
        ids = [int(scores.argmax())]
        steps.append((ids[0], scores))
    return steps


def top(scores: torch.Tensor, count: int) -> list[tuple[int, float]]:
    values, tokens = scores.topk(count)
    return list(zip(tokens.tolist(), values.tolist(), strict=True))


# A server by the documentation of each kind.  It answers from one model with the adapter and one without.

Answer = Callable[[str, Any], Any]  # path and body -> answer; None: there is no such path
MODELS = {"data": [{"id": "base", "parent": None}, {"id": "mine", "parent": "base"}]}
FOUND = {  # what tells the kinds apart
    "SGLang": {"/get_model_info": {"model_path": "base", "is_generation": True}},
    "Ollama": {
        "/api/version": {"version": "0.12.11"},
        "/api/tags": {"models": [{"name": "mine:latest"}, {"name": "base:latest"}]},
    },
}
KINDS = ("echo", "prompt_logprobs", "generated", "SGLang", "Ollama")


def fake(kind: str, adapted: Any, read: Callable[[list[int]], list[int]] = list) -> Answer:
    """A fake server of a kind; `read` maps a prompt's tokens to those that the model sees."""
    base = tiny_llama()

    def answer(path: str, body: Any) -> Any:
        if body is None:
            return FOUND.get(kind, {"/v1/models": MODELS}).get(path)
        name = body.get("lora_path") if kind == "SGLang" else body["model"]
        model = adapted if name == "mine" else base
        sent = body["input_ids"] if kind == "SGLang" else body["prompt"]
        return SHAPES[kind](model, read(Letters().encode(sent) if isinstance(sent, str) else sent), body)

    return answer


def own(model: Any, ids: Sequence[int]) -> list[float | None]:
    """The log-probabilities of a prompt's own tokens; the first has none."""
    scores = logprobs(model, ids)
    return [None, *(float(scores[at - 1, ids[at]]) for at in range(1, len(ids)))]


def choice(ids: Sequence[int], **facts: Any) -> dict[str, Any]:
    return {"choices": [{"text": "", **facts}], "usage": {"prompt_tokens": len(ids)}}


def echoed(model: Any, ids: list[int], body: Any) -> Any:
    """OpenAI's completions with `echo`, as in vLLM; it must generate a token."""
    if body["max_tokens"] == 0:
        return 400, {"error": {"message": "max_tokens must be at least 1", "type": "BadRequestError"}}
    [(token, scores)] = greedy(model, ids, 1)
    tokens = [f"token_id:{each}" for each in [*ids, token]]
    own_scores = [*own(model, ids), float(scores[token])]
    return choice(ids, logprobs={"tokens": tokens, "token_logprobs": own_scores, "top_logprobs": None})


def of_prompt(model: Any, ids: list[int], body: Any) -> Any:
    """vLLM's own field, from a server that ignores `echo`."""
    generated = {"tokens": ["x"], "token_logprobs": [-1.0]}
    if "prompt_logprobs" not in body:
        return choice(ids, logprobs=generated)
    entries = [
        score and {str(token): {"logprob": score, "rank": 1, "decoded_token": "x"}}
        for token, score in zip(ids, own(model, ids), strict=True)
    ]
    return choice(ids, logprobs=generated, prompt_logprobs=entries, prompt_token_ids=ids)


def generated(model: Any, ids: list[int], body: Any) -> Any:
    """A server that reports only the log-probabilities of generated tokens."""
    if body.get("echo") or "prompt_logprobs" in body:
        return 400, {"error": {"message": "not supported"}}
    steps = greedy(model, ids, body["max_tokens"])
    tops = [{f"<t{token}>": value for token, value in top(scores, 5)} for _, scores in steps]
    tokens, scores = [f"<t{token}>" for token, _ in steps], [float(scores[token]) for token, scores in steps]
    return choice(ids, logprobs={"tokens": tokens, "token_logprobs": scores, "top_logprobs": tops})


def sglang(model: Any, ids: list[int], body: Any) -> Any:
    """SGLang's /generate."""
    entries = [[score, token, None] for token, score in zip(ids, own(model, ids), strict=True)]
    return {"text": "", "meta_info": {"input_token_logprobs": entries, "output_token_logprobs": []}}


def ollama(model: Any, ids: list[int], body: Any) -> Any:
    """Ollama's /api/generate; it reports the number of tokens, but not their ids."""
    entries = [
        {
            "token": f"<t{token}>",
            "logprob": float(scores[token]),
            "top_logprobs": [{"token": f"<t{each}>", "logprob": value} for each, value in top(scores, 5)],
        }
        for token, scores in greedy(model, ids, body["options"]["num_predict"])
    ]
    return {"response": "", "done": True, "prompt_eval_count": len(ids), "logprobs": entries}


SHAPES = dict(zip(KINDS, (echoed, of_prompt, generated, sglang, ollama), strict=True))


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


def permuted(order: str) -> Any:
    """A model whose adapter has the rows of q and k in llama.cpp's order, or in an unknown one."""
    model = with_adapter(ADAPTER)
    for layer in model.model.layers:
        for linear, heads in ((layer.self_attn.q_proj, 4), (layer.self_attn.k_proj, 2)):
            B = linear.lora_B.data
            split = (heads, 2, -1) if order == "gguf" else (heads, B.shape[0] // heads // 2, 2)
            linear.lora_B.data = B.unflatten(0, split).transpose(1, 2).reshape(B.shape)
    return model


def with_adapter(adapter: Any, scale: float = 1.0, keep: Callable[[str], bool] = lambda name: True) -> Any:
    model = tiny_llama()
    lora.apply_adapter(model, adapter, allow_base_mismatch=True)
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            module.scaling *= scale * keep(name)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_server_is_asked_in_its_way(kind: str) -> None:
    with serving(fake(kind, with_adapter(ADAPTER))) as address:
        right = judged(address)
    assert (right.kind, right.exit_code) == ("right", 0)
    assert right.positions >= 150
    assert max(right.from_adapter, right.base_error or 0) < 1e-4 < 0.1 < right.from_base
    with serving(fake(kind, with_adapter(ADAPTER, 0.25))) as address:
        wrong = judged(address)
    assert (wrong.kind, wrong.exit_code) == ("scaled", 1)
    assert wrong.scale == pytest.approx(0.25, rel=0.03)
    assert "0.25 of what it should be" in wrong.text


@pytest.mark.parametrize(
    ("served", "kind", "said"),
    [
        (lambda: tiny_llama(), "none", "has no effect"),
        (lambda: with_adapter(ADAPTER, 4), "scaled", "scaling is 4 of"),
        (lambda: with_adapter(ADAPTER, -1), "scaled", "scaling is -1 of what it should be, as if it were subtracted"),
        (lambda: with_adapter(ADAPTER, 2), "scaled", "as if it were applied twice or as if its scaling were applied"),
        (lambda: with_adapter(ADAPTER, 0.5), "scaled", "as if lora_alpha / r were left out"),
        (lambda: with_adapter(drawn(2)), "other", "a different adapter has this name"),
        (lambda: permuted("gguf"), "partly", "its q and k rows are in the wrong order (lora_B was twice permuted"),
        (
            lambda: permuted("transformers"),
            "partly",
            "its q and k rows are in the wrong order (lora_B was not permuted",
        ),
        (lambda: with_adapter(ADAPTER, keep=lambda n: "attn" in n), "partly", "only its part in the attention"),
        (
            lambda: with_adapter(ADAPTER, keep=lambda n: "q_proj" not in n),
            "partly",
            "everything except its part in q_proj",
        ),
    ],
    ids=["none", "4 times", "-1", "twice", "alpha", "another", "permuted", "unpermuted", "attention", "without q"],
)
def test_what_explains_the_answers_is_found(served: Callable[[], Any], kind: str, said: str) -> None:
    with serving(fake("echo", served())) as address:
        verdict = judged(address)
    assert (verdict.kind, verdict.exit_code) == (kind, 1)
    assert said in verdict.text


def test_an_ignored_alpha_pattern_is_named() -> None:
    adapter = drawn(1, alpha_pattern={"mlp.*": 2.0, "self_attn.v_proj": 32.0})
    wrong = with_adapter(adapter)
    for module in wrong.modules():
        if hasattr(module, "lora_A"):
            module.scaling = 2.0
    with serving(fake("echo", wrong)) as address:
        verdict = judged(address, adapter=adapter)
    assert verdict.kind == "partly"
    assert "alpha_pattern" in verdict.text


def test_ignored_rslora_is_named() -> None:
    adapter = drawn(1, use_rslora=True, r=16, lora_alpha=4)
    with serving(fake("echo", with_adapter(adapter, 1 / 4))) as address:
        assert "use_rslora were ignored" in judged(address, adapter=adapter).text
    with serving(fake("echo", with_adapter(drawn(1), 2))) as address:
        assert "as if it were rsLoRA" in judged(address).text
    ranks = drawn(1, use_rslora=True, r=16, lora_alpha=4, rank_pattern={"mlp.*": 4})
    wrong = with_adapter(ranks)
    for module in wrong.modules():
        if hasattr(module, "lora_A"):
            module.scaling *= module.r**-0.5
    with serving(fake("echo", wrong)) as address:
        verdict = judged(address, adapter=ranks)
    assert (verdict.kind, verdict.text) == ("partly", "works differently: its use_rslora is ignored")


@pytest.mark.parametrize(
    ("times", "said"), [(1, "or the name is wrong"), (2, "is then added once more")], ids=["once", "twice"]
)
def test_a_base_with_the_adapter_in_it_is_found(times: int, said: str) -> None:
    once, more = fake("echo", with_adapter(ADAPTER)), fake("echo", with_adapter(ADAPTER, times))
    with serving(
        lambda path, body: (more if body and body["model"] == "mine" else once)(
            path, body and {**body, "model": "mine"}
        )
    ) as address:
        verdict = judged(address)
    assert verdict.kind == "merged"
    assert said in verdict.text


def quantised(model: Any, levels: int = 48) -> Any:
    """A model whose base weights have few values, as on a server that quantises."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" not in name and weight.ndim == 2:
                step = weight.abs().amax(1, keepdim=True) * 2 / levels
                weight.copy_((weight / step).round() * step)
    return model


@pytest.mark.parametrize(("scale", "kind"), [(1.0, "right"), (0.6, "scaled"), (0.0, "none")])
def test_a_quantised_base_hides_no_wrong_scale(scale: float, kind: str) -> None:
    mine, base = fake("echo", quantised(with_adapter(ADAPTER, scale))), fake("echo", quantised(tiny_llama()))
    as_mine = {"model": "mine"}
    with serving(
        lambda path, body: (mine if body and body["model"] == "mine" else base)(path, body and {**body, **as_mine})
    ) as address:
        verdict = judged(address)
    assert verdict.base_error is not None
    assert 0.1 * verdict.effect < 3 * verdict.base_error < verdict.effect
    assert verdict.kind == kind


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("read", [lambda ids: [1, *ids], lambda ids: [7, 8, *ids, 9]], ids=["BOS", "a template"])
def test_a_server_that_reads_other_tokens_is_not_judged(kind: str, read: Callable[[list[int]], list[int]]) -> None:
    said = r"read .*tokenises differently, adds a token such as BOS"
    with serving(fake(kind, tiny_llama(), read)) as address, pytest.raises(UnreachableServerError, match=said):
        judged(address)


def test_a_prompt_for_a_server_that_adds_bos_itself_is_sent_without() -> None:
    sent = []

    def answer(path: str, body: Any) -> Any:
        sent.extend([body["prompt"]] if body else [])
        return adding(path, body)

    adding = fake("Ollama", with_adapter(ADAPTER), lambda ids: [1, *ids])
    with serving(answer) as address:
        server = connect(address, Vocabulary(Letters()), model="mine", timeout=20)
        [observed] = server.ask([[1, *ROWS[0]]], adapted=True)
    assert [text.startswith("<t1>") for text in sent] == [True, False]
    assert observed.ids[:5] == (1, *ROWS[0][:4])
    with Reference.of(tiny_llama(), ADAPTER) as reference:
        assert judge(reference, [observed], None).kind == "right"


def test_another_base_is_found() -> None:
    other = tiny_llama()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.3)
    answer = fake("echo", other)
    with serving(lambda path, body: answer(path, body and {**body, "model": "mine"})) as address:
        assert judged(address).kind == "base"


def test_an_adapter_that_changes_too_little_cannot_be_told() -> None:
    adapter = drawn(1, std=1e-4)
    with serving(fake("echo", with_adapter(adapter))) as address:
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
            "no usable log-probabilities",
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
    with serving(fake("echo", tiny_llama())) as address:
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


def test_llama_cpp_s_server_is_judged(
    tmp_path: Path, load_file: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = load_file(ROOT / "tests" / "test_clients.py")
    base = tiny_llama()
    clients.write_base("llama", base, tmp_path / "base.gguf")
    export(make_portable(ADAPTER, "llamacpp", base), "llamacpp", tmp_path / "mine.gguf", base)
    file, wrong = tmp_path / "mine.gguf", tmp_path / "wrong.gguf"
    with monkeypatch.context() as patch:  # rows of q and k as transformers has them
        patch.setattr("loralib.formats.gguf.reorder_rows", lambda B, heads, to_gguf: B)
        export(make_portable(ADAPTER, "llamacpp", base), "llamacpp", wrong, base)
    for adapters, kind, said in (
        (((file, 1.0),), "right", "as it should"),
        (((file, 0.25),), "scaled", "0.25"),
        (((wrong, 1.0),), "partly", "its q and k rows are in the wrong order (lora_B was not permuted for llama.cpp)"),
        ((), "none", "no effect"),
    ):
        with llama_cpp(tmp_path / "base.gguf", *adapters) as address:
            verdict = judged(address, model=adapters[0][0].stem if adapters else None)
        assert verdict.kind == kind, verdict
        assert said in verdict.text


@pytest.fixture(scope="module")
def own_server(
    tmp_path_factory: pytest.TempPathFactory, load_file: Callable[[Path], Any]
) -> Iterator[tuple[str, Path]]:
    """Our own server with the adapter `mine`, and the directory of its base and adapters."""
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
    assert "Works as it should." in shown
    assert "base from base" in shown
    # Another adapter of the same base, where `mine` is what the server has.
    assert main([*command[:3], str(folder / "other"), *command[4:], "--model", "mine"]) == 1
    assert "a different adapter" in capsys.readouterr().out
    assert main([*command, "--model", "base", "--base_model", "base"]) == 1
    assert "Has no effect" in capsys.readouterr().out
