"""The service: each request has the same result as alone, even if others join, leave, fail or share its prefix."""

from __future__ import annotations

import functools
import json
import os
import queue
import random
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import loralib as lora
from loralib.engine.bank import Bank
from loralib.engine.threads import release_threads
from loralib.errors import AdapterError, BusyServerError, ConfigError, DataError
from loralib.generation import Generator, Sampling, TextChunk, TokenLogprob, generate
from loralib.generation.decoder import CachedDecoder
from loralib.generation.pages import PAGE, Node, Pages, SequencePages, pages_of
from loralib.generation.queueing import FairQueue
from loralib.generation.service import Service, default_cache_tokens

END = 256
VOCABULARY = 257


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte, and an end token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def bank() -> Bank:
    """A small model whose next tokens are neither certain nor equally likely, and two adapters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
        model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, eos_token_id=END, bos_token_id=None)).eval()
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.data.normal_(std=0.25)
        values = {}
        for name, rank in (("first", 4), ("second", 7)):
            lora.inject(model, lora.LoraConfig(r=rank, lora_alpha=8, target_modules="all-linear"))
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data.normal_(std=0.2)
            values[name] = lora.adapter_of(model)
            lora.remove(model)
    result = lora.Bank(model)
    for name, value in values.items():
        result.load(name, value)
    return result


@pytest.fixture
def service(bank: Bank) -> Iterator[Service]:
    service = Service(bank, TOKENIZER, cache_tokens=4096)
    yield service
    service.close()
    assert not any(thread.name == "loralib-service" for thread in threading.enumerate())


def text(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(length)]


def alone(model: Any, prompt: list[int], own: Sampling, adapter: str | None = None) -> tuple[int, ...]:
    return generate(model, TOKENIZER, [prompt], own, adapters=[adapter])[0].ids


def finish(generator: Generator) -> dict[int, list[TextChunk]]:
    chunks: dict[int, list[TextChunk]] = {}
    while len(generator):
        for chunk in generator.step():
            chunks.setdefault(chunk.request, []).append(chunk)
    return chunks


def ids_of(chunks: list[TextChunk]) -> tuple[int, ...]:
    return tuple(token for chunk in chunks for token in chunk.ids)


# --- each request is what it would be alone ------------------------------------------------------------------------

SETTINGS = st.builds(
    Sampling,
    max_new_tokens=st.integers(1, 12),
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([1.0, 0.9]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, -0.5]),
    logit_bias=st.sampled_from([{}, {}, {5: 3.0, 77: -100.0}]),
    logprobs=st.sampled_from([None, 0, 3]),
    prompt_logprobs=st.sampled_from([False, False, True]),
    seed=st.integers(0, 3),
)
# Prompts that begin alike, by any number of tokens.
PROMPTS = st.builds(
    lambda same, kind, own, length: text(kind, 70)[:same] + text(own, length),
    st.integers(0, 70), st.integers(0, 1), st.integers(10, 14), st.integers(1, 30),
)  # fmt: skip
REQUESTS = st.lists(
    st.tuples(PROMPTS, SETTINGS, st.sampled_from([None, "first", "second"]), st.sampled_from("abc")),
    min_size=1, max_size=10,
)  # fmt: skip


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    mode=st.sampled_from(["full", "full", "torch", "off"]),
    requests=REQUESTS,
    reuse=st.booleans(),
    part=st.sampled_from([7, 64]),
    room=st.sampled_from([160, 512]),
    most=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_each_request_is_what_it_would_be_alone(
    bank: Bank, mode: str, requests: Any, reuse: bool, part: int, room: int, most: int, seed: int
) -> None:
    """They join and are cancelled at any time, with a small cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORALIB_ENGINE", mode)
        rng = random.Random(seed)
        generator = Generator(
            bank, TOKENIZER, max_requests=most, max_prompt_tokens=part, cache_tokens=room, reuse=reuse
        )
        waiting, begun, cancelled, chunks = list(requests), {}, set(), {}
        while waiting or len(generator):
            while waiting and rng.random() < 0.5:
                prompt, own, adapter, client = request = waiting.pop(0)
                begun[generator.add(prompt, own, adapter, client=client)] = request
            if begun and rng.random() < 0.08:
                number = rng.choice(list(begun))
                generator.cancel(number)
                cancelled.add(number)
            for chunk in generator.step():
                chunks.setdefault(chunk.request, []).append(chunk)
            assert mode == "off" or generator.used_tokens <= room
        for number, (prompt, own, adapter, _) in begun.items():
            expected, got = alone(bank, prompt, own, adapter), ids_of(chunks.get(number, []))
            assert got == (expected[: len(got)] if number in cancelled else expected)
        if mode != "off" and not reuse:
            assert generator.used_tokens == 0


def test_many_threads_ask_at_once(bank: Bank) -> None:
    service = Service(bank, TOKENIZER, max_requests=6, cache_tokens=1024)
    wrong: list[Any] = []

    def ask(number: int) -> None:
        rng = random.Random(number)
        for _ in range(4):
            prompt = text(0, 40) + text(rng.randrange(3), 1 + rng.randrange(20))
            own = Sampling(max_new_tokens=1 + rng.randrange(8), temperature=rng.choice([0, 1]), seed=rng.randrange(9))
            adapter = rng.choice([None, "first", "second"])
            got = ids_of(list(service.stream(prompt, own, adapter, client=str(number % 3))))
            expected = service.call(functools.partial(alone, bank, prompt, own, adapter))
            wrong.extend([(prompt, own, adapter, got)] * (got != expected))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = service.stats()
    service.close()
    assert not wrong
    assert (stats.running, stats.waiting) == (0, 0)
    assert stats.used_tokens <= 1024
    assert stats.reused_tokens > stats.prompt_tokens / 4


# --- what is reused ------------------------------------------------------------------------------------------------


def reused(generator: Generator, prompt: list[int], adapter: str | None = None, count: int = 4) -> int | None:
    """Returns how many tokens of a prompt were reused, after checking the result."""
    number = generator.add(prompt, Sampling(max_new_tokens=count), adapter)
    chunks = finish(generator)[number]
    assert ids_of(chunks) == alone(generator._given, prompt, Sampling(max_new_tokens=count), adapter)
    assert all(chunk.cached_tokens is None for chunk in chunks[1:])
    return chunks[0].cached_tokens


@pytest.fixture
def generator(bank: Bank) -> Generator:
    return Generator(bank, TOKENIZER, cache_tokens=1024, reuse=True)


def test_prompts_and_answers_are_reused_up_to_the_page(generator: Generator, bank: Bank) -> None:
    prompt = text(0, 40)
    assert [reused(generator, prompt), reused(generator, prompt), reused(generator, prompt[:33])] == [0, 32, 32]
    assert reused(generator, prompt[:32]) == 16  # the last token has to be computed: its logits are wanted
    assert reused(generator, text(1, 40)) == 0
    answer = alone(bank, prompt, Sampling(max_new_tokens=40))
    reused(generator, prompt, count=40)
    assert reused(generator, [*prompt, *answer, 5, 6]) == 16 * ((39 + len(answer)) // 16)


def test_only_the_same_adapter_at_the_same_scale_reuses(generator: Generator, bank: Bank) -> None:
    prompt = text(0, 40)
    assert [reused(generator, prompt, name) for name in (None, "first", "second", "first")] == [0, 0, 0, 32]
    try:
        bank.set_scale("first", 0.5)
        assert [reused(generator, prompt, "first"), reused(generator, prompt, "second")] == [0, 32]
        number = generator.add(text(3, 40), Sampling(max_new_tokens=30, min_new_tokens=30), "first")
        chunks = generator.step()
        bank.set_scale("first", 1.0)  # for a while
        chunks += generator.step()
        bank.set_scale("first", 0.5)
        chunks += finish(generator)[number]
        # Its prompt was computed at this scale, and not all of its answer.
        assert reused(generator, [*text(3, 40), *ids_of(chunks)], "first") == 32
    finally:
        bank.set_scale("first", 1.0)
    assert reused(generator, prompt, "first") == 32  # as before


def test_a_replaced_adapter_reuses_nothing(generator: Generator, bank: Bank) -> None:
    prompt = text(0, 40)
    lora.inject(bank.model, lora.LoraConfig(r=2, lora_alpha=8, target_modules="all-linear"))
    with torch.no_grad():
        for parameter in bank.model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    value = lora.adapter_of(bank.model)
    lora.remove(bank.model)
    bank.load("third", value)
    try:
        assert [reused(generator, prompt, "third"), reused(generator, prompt, "third")] == [0, 32]
        bank.load("third", value, replace=True)
        assert reused(generator, prompt, "third") == 0
    finally:
        bank.unload("third")


def test_other_weights_of_the_base_reuse_nothing(bank: Bank, generator: Generator) -> None:
    prompt, norm = text(0, 40), bank.model.model.norm
    reused(generator, prompt)
    kept = norm.weight.detach().clone()
    with torch.no_grad():
        norm.weight.mul_(1.5)
    assert reused(generator, prompt) == 0
    norm.weight = nn.Parameter(kept)
    assert [reused(generator, prompt), reused(generator, prompt)] == [0, 32]


def test_a_model_that_holds_an_adapter_reuses_nothing(bank: Bank) -> None:
    lora.inject(bank.model, lora.LoraConfig(r=2, target_modules="all-linear"))
    try:
        generator = Generator(bank.model, TOKENIZER, cache_tokens=1024, reuse=True)
        assert [reused(generator, text(0, 40)), reused(generator, text(0, 40))] == [0, 0]
    finally:
        lora.remove(bank.model)


def test_the_least_recently_used_goes_first(bank: Bank) -> None:
    generator = Generator(bank, TOKENIZER, cache_tokens=160, reuse=True)
    first, second, third = (text(number, 48) for number in range(3))
    for prompt in (first, second, first, third):  # ten pages: three for each text and one to write on
        reused(generator, prompt, count=1)
    reused(generator, text(9, 40), count=16)
    assert reused(generator, first, count=1) == 32
    assert reused(generator, second, count=1) == 0


def test_completions_of_one_prompt_compute_it_once(bank: Bank, generator: Generator) -> None:
    seen: list[int] = []
    hook = bank.model.get_input_embeddings().register_forward_hook(lambda _, args, out: seen.append(args[0].numel()))
    prompt = text(0, 100)
    for seed in range(5):
        generator.add(prompt, Sampling(max_new_tokens=1, temperature=1, seed=seed))
    chunks = finish(generator)
    hook.remove()
    assert seen == [100, 4 * (100 - 96)]
    assert [chunks[number][0].cached_tokens for number in range(5)] == [0, 96, 96, 96, 96]
    assert generator.counts.reused_tokens == 4 * 96


def test_a_long_prompt_stalls_nobody(bank: Bank) -> None:
    generator = Generator(bank, TOKENIZER, max_prompt_tokens=32)
    short = generator.add(text(0, 10), Sampling(max_new_tokens=12, min_new_tokens=12))
    generator.step()
    long = generator.add(text(1, 150), Sampling(max_new_tokens=3))
    rounds = [[chunk.request for chunk in generator.step()] for _ in range(5)]
    assert rounds == [[short]] * 4 + [[short, long]]
    assert ids_of(finish(generator)[long])[-1:] == alone(bank, text(1, 150), Sampling(max_new_tokens=3))[-1:]


# --- pages ---------------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.integers(6, 20))
def test_pages_are_owned_once_and_never_more_than_there_are(seed: int, budget: int) -> None:
    rng, pages, root = random.Random(seed), Pages(budget), Node()
    open_: list[tuple[SequencePages, list[int], int]] = []

    def tree(node: Node) -> list[Node]:
        return [each for child in node.children.values() for each in (child, *tree(child))]

    for _ in range(60):
        if rng.random() < 0.5:
            tokens = [rng.randrange(2)] * rng.randrange(1, 60) + [rng.randrange(3)] * rng.randrange(1, 30)
            total = len(tokens) + rng.randrange(40)
            sequence = pages.reserve(tokens, total, root)
            if sequence is not None:
                assert len(sequence.nodes) * PAGE < len(tokens)
                pages.extend(sequence, pages_of(total))
                assert len(sequence.pages) == pages_of(total)
                if rng.random() < 0.7:
                    pages.share(sequence, tokens)
                open_.append((sequence, tokens, total))
            else:
                assert open_ or pages_of(total) > budget  # what fits at all fits when nothing else is there
        elif open_:
            sequence, tokens, total = open_.pop(rng.randrange(len(open_)))
            pages.share(sequence, tokens + [7] * (total - len(tokens)) if rng.random() < 0.5 else [])
            pages.release(sequence)
        kept = tree(root)
        own = [page for sequence, *_ in open_ for page in set(sequence.pages) - {node.page for node in sequence.nodes}]
        owned = [node.page for node in kept] + own
        assert len(owned) == len(set(owned))
        assert 0 not in owned
        assert not set(owned) & set(pages._free)
        assert pages.used <= budget
        assert pages.count <= budget + 1
        assert sum(node.users > 0 for node in kept) == pages._locked
        assert {node for node in kept if not node.users} == set(pages._idle)
    for sequence, *_ in open_:
        pages.release(sequence)
    pages.clear()
    assert pages.used == 0
    assert sorted(pages._free) == list(range(1, pages.count))


# --- who is next ---------------------------------------------------------------------------------------------------


def test_clients_take_turns(bank: Bank) -> None:
    generator = Generator(bank, TOKENIZER, max_requests=1)
    greedy = [generator.add(text(number, 3), Sampling(max_new_tokens=1), client="greedy") for number in range(20)]
    modest = generator.add(text(30, 3), Sampling(max_new_tokens=1), client="modest")
    order = [chunk.request for _ in range(21) for chunk in generator.step()]
    assert order == [greedy[0], modest, *greedy[1:]]


def test_a_large_request_is_overtaken_so_often_and_no_more(bank: Bank) -> None:
    """It needs the whole cache, while small ones would always fit."""
    generator = Generator(bank, TOKENIZER, cache_tokens=96, reuse=True)
    small = Sampling(max_new_tokens=8, min_new_tokens=8)
    for number in range(2):
        generator.add(text(number, 8), small, client="small")
    generator.step()
    large = generator.add(text(50, 90), Sampling(max_new_tokens=2), client="large")
    order: list[int] = []
    for number in range(200):
        generator.add(text(number, 8), small, client=f"small {number % 7}")
        order += [chunk.request for chunk in generator.step() if chunk.finish_reason is not None]
        if large in order:
            break
    assert large in order
    assert order.index(large) <= 20


def test_nobody_waits_behind_one_that_does_not_fit_yet() -> None:
    line: FairQueue[int] = FairQueue()
    for client, item in (("large", 100), ("a", 1), ("b", 2), ("a", 3)):
        line.push(client, item)
    assert [line.pop(lambda item: item < 100) for _ in range(4)] == [1, 2, 3, None]
    assert list(line) == [100]
    line.remove(100)
    assert len(line) == 0


# --- what a service refuses, forgets and survives ------------------------------------------------------------------


class Held:
    """A request whose service is blocked between two steps until it is released."""

    def __init__(self, service: Service) -> None:
        self.go, held = threading.Event(), threading.Event()

        def wait() -> None:
            held.set()
            self.go.wait(30)

        self.thread = threading.Thread(target=service.call, args=(wait,))
        self.thread.start()
        held.wait(30)

    def release(self) -> None:
        self.go.set()
        self.thread.join()


def ask(service: Service, prompt: list[int], own: Sampling, adapter: str | None = None, **more: Any) -> Any:
    got: queue.SimpleQueue[Any] = queue.SimpleQueue()
    return service.submit(prompt, own, adapter, listener=got.put, **more), got


def rest(got: Any) -> list[Any]:
    """All chunks up to the last one, or to an error."""
    chunks = []
    while not chunks or not (isinstance(chunks[-1], BaseException) or chunks[-1].finish_reason):
        chunks.append(got.get(timeout=30))
    return chunks


LONG = Sampling(max_new_tokens=400, min_new_tokens=400)


def test_what_can_never_fit_is_refused_with_numbers(bank: Bank) -> None:
    service = Service(bank, TOKENIZER, cache_tokens=64)
    listener: Callable[[Any], None] = print
    with pytest.raises(DataError, match=r"prompt has 60 tokens and up to 10 may follow, but there is room for 64"):
        service.submit(text(0, 60), Sampling(max_new_tokens=10), listener=listener)
    with pytest.raises(AdapterError, match=r"frist\. Did you mean 'first'"):
        service.submit(text(0, 6), Sampling(), "frist", listener=listener)
    with pytest.raises(ConfigError, match="logit_bias has the token ids 999, but this model's end at 256"):
        service.submit(text(0, 6), Sampling(logit_bias={999: 1}), listener=listener)
    assert len(ids_of(list(service.stream(text(0, 60), Sampling(max_new_tokens=5, min_new_tokens=5))))) == 5
    service.close()


def test_too_many_are_refused_and_others_go_on(bank: Bank) -> None:
    service = Service(bank, TOKENIZER, max_requests=1, max_waiting=2)
    held = Held(service)
    asked = [ask(service, text(number, 4), Sampling(max_new_tokens=3)) for number in range(3)]
    with pytest.raises(BusyServerError, match="3 requests are already running or waiting, and at most 2"):
        ask(service, text(9, 4), Sampling())
    assert (service.stats().waiting, service.stats().running) == (3, 0)
    held.release()
    for number, (_, got) in enumerate(asked):
        assert ids_of(rest(got)) == alone_later(service, bank, text(number, 4), Sampling(max_new_tokens=3))
    service.close()


def alone_later(service: Service, bank: Bank, prompt: list[int], own: Sampling) -> tuple[int, ...]:
    return service.call(lambda: alone(bank, prompt, own))


def test_cancelled_while_it_waits_runs_or_has_ended(service: Service, bank: Bank) -> None:
    held = Held(service)
    (first, got), (second, other) = ask(service, text(0, 4), LONG), ask(service, text(1, 4), Sampling(max_new_tokens=2))
    service.cancel(first)
    service.cancel(first)
    held.release()
    assert ids_of(rest(other)) == alone_later(service, bank, text(1, 4), Sampling(max_new_tokens=2))
    assert got.empty()
    service.cancel(second)
    running, got = ask(service, text(2, 4), LONG)
    got.get(timeout=30)
    service.cancel(running)
    service.call(lambda: None)
    before = got.qsize()
    list(service.stream(text(3, 4), Sampling(max_new_tokens=3)))
    assert got.qsize() == before
    assert service.stats().running == service.stats().waiting == 0


def test_a_listener_that_raises_ends_its_request_alone(service: Service, bank: Bank) -> None:
    called: list[Any] = []

    def broken(chunk: Any) -> None:
        called.append(chunk)
        raise ValueError("a bug")

    service.submit(text(0, 4), LONG, listener=broken)
    own = Sampling(max_new_tokens=6)
    assert ids_of(list(service.stream(text(1, 4), own))) == alone_later(service, bank, text(1, 4), own)
    assert len(called) == 1
    assert service.stats().running == 0


def test_an_error_in_one_request_ends_that_one_alone(service: Service, bank: Bank) -> None:
    """A token that comes twice is banned, and after 256 tokens all are."""
    held = Held(service)
    _, bad = ask(service, text(0, 4), Sampling(max_new_tokens=300, min_new_tokens=300, no_repeat_ngram_size=1))
    own = Sampling(max_new_tokens=270, min_new_tokens=270)
    _, good = ask(service, text(1, 4), own, "first")
    held.release()
    chunks = rest(bad)
    assert len(chunks) == 257
    assert isinstance(chunks[-1], ConfigError)
    assert "no token is left to choose after 256 tokens: the settings ban all of them" in str(chunks[-1])
    assert ids_of(rest(good)) == service.call(lambda: alone(bank, text(1, 4), own, "first"))


def test_an_error_in_a_step_ends_those_in_the_batch_and_no_others(
    service: Service, bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = CachedDecoder.step
    failing = threading.Event()

    def once(self: Any) -> Any:
        if failing.is_set():
            failing.clear()
            raise RuntimeError("out of memory")
        return step(self)

    monkeypatch.setattr(CachedDecoder, "step", once)
    _, got = ask(service, text(0, 40), LONG)
    got.get(timeout=30)
    failing.set()
    assert str(rest(got)[-1]) == "out of memory"
    own = Sampling(max_new_tokens=6)
    assert ids_of(list(service.stream(text(0, 40), own))) == alone_later(service, bank, text(0, 40), own)
    assert service.stats().running == 0


def test_logits_that_are_no_numbers_end_a_request(bank: Bank, service: Service) -> None:
    table = bank.model.get_input_embeddings().weight
    kept = table[7].detach().clone()
    with torch.no_grad():
        table[7] = float("nan")
    try:
        held = Held(service)
        (_, bad), (_, good) = ask(service, [5, 7, 8], LONG), ask(service, [5, 6], Sampling(max_new_tokens=1))
        held.release()
        assert "logits that are not numbers after 3 tokens" in str(rest(bad)[-1])
        rest(good)
    finally:
        with torch.no_grad():
            table[7] = kept
    own = Sampling(max_new_tokens=9)
    assert ids_of(list(service.stream([5, 7, 8], own))) == alone_later(service, bank, [5, 7, 8], own)


def test_closing_lets_requests_finish_and_ends_the_others(bank: Bank) -> None:
    service = Service(bank, TOKENIZER)
    _, got = ask(service, text(0, 4), Sampling(max_new_tokens=5))
    service.close(finish_within=30)
    assert ids_of(rest(got)) == alone(bank, text(0, 4), Sampling(max_new_tokens=5))
    service = Service(bank, TOKENIZER, max_requests=1)
    (_, runs), (_, waits) = ask(service, text(0, 4), LONG), ask(service, text(1, 4), LONG)
    runs.get(timeout=30)
    service.close()
    service.close()
    for got in (runs, waits):
        assert isinstance(rest(got)[-1], BusyServerError)
    for late in (lambda: ask(service, text(0, 4), LONG), lambda: service.call(lambda: 1)):
        with pytest.raises(BusyServerError, match="shutting down"):
            late()
    lora.inject(
        bank.model, lora.LoraConfig(r=2, target_modules=["q_proj"])
    )  # nothing of the service is left in the model's place
    lora.remove(bank.model)


def test_a_call_may_call_and_its_errors_come_back(service: Service) -> None:
    assert service.call(lambda: service.call(lambda: 5)) == 5
    with pytest.raises(ZeroDivisionError):
        service.call(lambda: 1 // 0)


def test_the_default_room_holds_one_text_at_least_and_no_more_than_all(bank: Bank) -> None:
    assert 512 <= default_cache_tokens(bank.model, 1) <= 512 + PAGE
    assert default_cache_tokens(bank.model, 10) <= 5120


# --- log-probabilities ---------------------------------------------------------------------------------------------


def scores(model: nn.Module, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)


def check(found: TokenLogprob, expected: torch.Tensor, token: int, count: int) -> None:
    assert found.token == token
    assert found.logprob == pytest.approx(float(expected[token]), abs=1e-5)
    best = expected.topk(count)
    assert [token for token, _ in found.top] == best.indices.tolist()
    assert [value for _, value in found.top] == pytest.approx(best.values.tolist(), abs=1e-5)


@pytest.mark.parametrize("mode", ["full", "off"])
def test_log_probabilities_are_the_model_s_own(bank: Bank, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regardless of penalties and temperature, and even if the prompt is computed in chunks."""
    monkeypatch.setenv("LORALIB_ENGINE", mode)
    prompt = text(0, 300)
    own = Sampling(max_new_tokens=6, temperature=0.5, frequency_penalty=1, logprobs=3, prompt_logprobs=True)
    [result] = generate(bank, TOKENIZER, [prompt], own)
    expected = scores(bank.model, [*prompt, *result.ids])
    assert len(result.logprobs) == len(result.ids)
    for at, (token, found) in enumerate(zip(result.ids, result.logprobs, strict=True), len(prompt)):
        check(found, expected[at - 1], token, 3)
    assert result.prompt_logprobs is not None
    assert result.prompt_logprobs[0] is None
    assert len(result.prompt_logprobs) == len(prompt)
    for at, found in enumerate(result.prompt_logprobs[1:], 1):
        assert found is not None
        check(found, expected[at - 1], prompt[at], 3)


def test_a_prompt_may_be_scored_alone(bank: Bank, generator: Generator) -> None:
    prompt = text(0, 40)
    reused(generator, prompt, "first")
    number = generator.add(prompt, Sampling(max_new_tokens=0, prompt_logprobs=True), "first")
    other = generator.add(prompt, Sampling(max_new_tokens=3), "first")
    chunks = finish(generator)
    [chunk] = chunks[number]
    assert (chunk.ids, chunk.text, chunk.finish_reason, chunk.cached_tokens) == ((), "", "length", 0)
    assert chunk.prompt_logprobs is not None
    [result] = generate(bank, TOKENIZER, [prompt], adapters=["first"], max_new_tokens=0, prompt_logprobs=True)
    for one, two in zip(chunk.prompt_logprobs[1:], result.prompt_logprobs[1:], strict=True):
        assert one.logprob == pytest.approx(two.logprob, abs=1e-5)
    assert ids_of(chunks[other]) == alone(bank, prompt, Sampling(max_new_tokens=3), "first")
    with pytest.raises(ConfigError, match="max_new_tokens is 0, expected at least 1"):
        Sampling(max_new_tokens=0)


# --- penalties and bias --------------------------------------------------------------------------------------------


def test_penalties_and_bias_are_openai_s(bank: Bank) -> None:
    prompt = text(0, 5)
    own = Sampling(max_new_tokens=40, min_new_tokens=40, presence_penalty=0.7, frequency_penalty=0.4, logit_bias={9: 2})
    ids: list[int] = []
    while len(ids) < 40:
        logits = scores(bank.model, [*prompt, *ids])[-1]
        for token in set(ids):
            logits[token] -= 0.7 + 0.4 * ids.count(token)
        logits[9] += 2
        logits[END] = -torch.inf
        ids.append(int(logits.argmax()))
    assert list(alone(bank, prompt, own)) == ids
    assert alone(bank, prompt, Sampling(max_new_tokens=5, logit_bias={65: 100})) == (65,) * 5


# --- JSON ----------------------------------------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "legs": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["kind", "legs"],
    "additionalProperties": False,
}


def test_texts_follow_a_schema(bank: Bank) -> None:
    pytest.importorskip("llguidance")
    own = Sampling(max_new_tokens=200, temperature=1, json_schema=json.dumps(SCHEMA), presence_penalty=0.5, logprobs=0)
    for result in generate(bank, TOKENIZER, [text(number, 5) for number in range(6)], own):
        value = json.loads(result.text)
        assert value["kind"] in ("cat", "dog")
        assert 0 <= value["legs"] <= 99
        assert result.finish_reason == "stop"
        assert len(result.logprobs) == len(result.ids)
    # A text that is cut is the beginning of one; a stop ends it too; any object follows "{}".
    [cut] = generate(bank, TOKENIZER, [text(0, 5)], max_new_tokens=4, json_schema=json.dumps(SCHEMA))
    assert (cut.text[0], cut.finish_reason) == ("{", "length")
    [stopped] = generate(bank, TOKENIZER, [text(0, 5)], max_new_tokens=90, json_schema=json.dumps(SCHEMA), stop=":")
    assert (":" in stopped.text, stopped.finish_reason) == (False, "stop")
    [anything] = generate(bank, TOKENIZER, [text(0, 5)], max_new_tokens=9, json_schema="{}")
    assert anything.text.startswith("{")


@pytest.mark.parametrize(
    ("schema", "fault"),
    [
        ('{"type": "nonsense"}', "Invalid type: nonsense"),
        ('{"not": {"type": "string"}}', "Unimplemented keys"),
        ('{"$ref": "#/nowhere"}', "does not exist"),
        ("[1]", "expected a JSON object"),
        ("{", "expected a JSON schema, as text"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused(service: Service, schema: str, fault: str) -> None:
    pytest.importorskip("llguidance")
    with pytest.raises(ConfigError, match=fault):
        ask(service, text(0, 3), Sampling(json_schema=schema))


def test_a_schema_needs_a_tokenizer_that_can_be_read(bank: Bank) -> None:
    pytest.importorskip("llguidance")

    class Letters:
        eos_token_id = END

        def decode(self, ids: Any, **_: Any) -> str:
            return " ".join(map(str, ids))

    with pytest.raises(ConfigError, match="needs a tokenizer from the tokenizers library, but this is a Letters"):
        generate(bank, Letters(), [[1, 2]], json_schema="{}")


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for a process' threads")
def test_waiting_threads_of_a_computation_end_and_begin_again() -> None:
    """Otherwise, those of the thread that loaded the model would slow down the service's thread at each operator."""

    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    release_threads()
    before, at_start = torch.get_num_threads(), threads()
    torch.set_num_threads(2)
    try:
        x = torch.ones(2_000_000)
        once = (x + x).sum()
        if threads() == at_start:
            pytest.skip("PyTorch computes here without threads of OpenMP")
        release_threads()
        assert threads() == at_start
        assert (x + x).sum() == once
        assert threads() > at_start
    finally:
        torch.set_num_threads(before)
        release_threads()
