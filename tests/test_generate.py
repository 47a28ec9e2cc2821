"""Generation: every way of computing it gives what the model alone would, token by token."""

import copy
import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from loralib.config import LoraConfig
from loralib.engine.causal import require_causal
from loralib.engine.frozen_linear import prepacked_overrides
from loralib.engine.placement import Hold, overriding
from loralib.errors import ConfigError, DataError
from loralib.generation import Generator, Sampling, TextChunk, beam_search, decoder, generate, stream
from loralib.generation.decoder import CachedDecoder, PlainDecoder, make_decoder
from loralib.generation.sampling import banned_tokens, choose, penalize
from loralib.generation.text import TextStream
from loralib.injection import adapted_layers, inject, merge, unmerge

VOCABULARY = 61
END = 1
WINDOW = 6

_SPECIAL = {"bos_token_id": 0, "eos_token_id": END, "pad_token_id": 2}
_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,  # heads of 16, which the compiled kernels take
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **_SPECIAL,
}
_WINDOWED = {**_LLAMA, "head_dim": 32, "sliding_window": WINDOW}
_SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **_SPECIAL}
MODELS = {
    "gpt2": transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=3, n_head=4, n_positions=64, **_SPECIAL),
    "llama": transformers.LlamaConfig(**_LLAMA),
    "qwen2": transformers.Qwen2Config(**_LLAMA, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "mistral": transformers.MistralConfig(**_LLAMA, sliding_window=WINDOW),
    "gemma2": transformers.Gemma2Config(**_WINDOWED, attn_logit_softcapping=4.0, final_logit_softcapping=3.0),
    "gemma3": transformers.Gemma3TextConfig(
        **_WINDOWED, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    "gpt_neox": transformers.GPTNeoXConfig(**_SMALL, intermediate_size=48, max_position_embeddings=64),
}
# They do not ask transformers' attention interface, so nothing is cached.
PLAIN_MODELS = {
    "bloom": transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, **_SPECIAL),
    "mamba": transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, **_SPECIAL),
}
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16, 17], [18, 19], [20, 21, 22, 23]]


def make(config: Any) -> Any:
    """A small model whose next tokens are neither certain nor equally likely."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(std=0.3)
    model.generation_config.eos_token_id = END
    return model.eval()


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return make(MODELS[request.param])


@pytest.fixture(scope="module")
def llama() -> Any:
    return make(MODELS["llama"])


class Letters:
    """A tokenizer with one token per letter; a space is the end token."""

    eos_token_id = END
    bos_token_id = None

    def __call__(self, text: Any, add_special_tokens: bool = True) -> dict[str, Any]:
        rows = [text] if isinstance(text, str) else text
        ids = [[ord(letter) - 60 for letter in row] for row in rows]
        return {"input_ids": ids[0] if isinstance(text, str) else ids}

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(chr(token + 60) for token in ids)


LETTERS = Letters()


def alone(model: Any, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding in its simplest form."""
    ids: list[int] = []
    while len(ids) < count:
        with torch.no_grad():
            token = int(model(torch.tensor([prompt + ids])).logits[0, -1].argmax())
        ids.append(token)
        if token == END:
            break
    return ids


# --- the model's side ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("both_ways")
def test_greedy_is_the_likeliest_token_each_time(model: Any) -> None:
    assert isinstance(make_decoder(model), CachedDecoder)
    for prompt, result in zip(PROMPTS, generate(model, LETTERS, PROMPTS, max_new_tokens=20), strict=True):
        expected = alone(model, prompt, 20)
        assert list(result.ids) == [token for token in expected if token != END]
        assert result.finish_reason == ("stop" if END in expected else "length")
        assert result.prompt_tokens == len(prompt)


@pytest.mark.usefixtures("both_ways")
def test_tree_of_branches_has_the_logits_of_its_paths(model: Any) -> None:
    """Texts begin and end at different times, branches split and end, and columns are moved to free places."""
    cached, plain = CachedDecoder(model), PlainDecoder(model)
    generator = torch.Generator().manual_seed(0)

    def some(high: int, count: int) -> list[int]:
        return torch.randint(high, (count,), generator=generator).tolist()

    pairs: list[tuple[Any, Any]] = []
    for step in range(30):
        if step % 4 == 0:
            prompt = some(VOCABULARY, 1 + step % 7)
            pairs.append((cached.open(prompt), plain.open(prompt)))
        ours, theirs = cached.step(), plain.step()
        for one, other in pairs:
            torch.testing.assert_close(ours[one.rows], theirs[other.rows], rtol=1e-4, atol=1e-4)
        if len(pairs) > 3:
            gone = pairs.pop(some(len(pairs), 1)[0])
            cached.close(gone[0])
            plain.close(gone[1])
        for one, other in pairs:
            count = some(6, 1)[0] + 1
            parents, tokens = some(one.rows.stop - one.rows.start, count), some(VOCABULARY, count)
            one.grow(parents, tokens)
            other.grow(parents, tokens)


@pytest.mark.usefixtures("both_ways")
def test_parts_of_prompts_and_shared_beginnings_change_no_logits(model: Any) -> None:
    """Prompts are computed in chunks, some after others with the same prefix; all their logits are right."""
    decoder = CachedDecoder(model, max_tokens=16 * 40, reuse=True, max_prompt_tokens=9)
    generator = torch.Generator().manual_seed(1)
    same = torch.randint(VOCABULARY, (40,), generator=generator).tolist()
    known = []
    for length, tail in ((40, 3), (33, 5), (20, 1), (40, 12), (0, 30)):
        prompt = same[:length] + torch.randint(VOCABULARY, (tail,), generator=generator).tolist()
        group = decoder.admit(prompt, limit=5)
        assert group is not None
        known.append(group.known)
        logits = decoder.step()
        while not group.length:
            logits = decoder.step()
        for token in (5, 6, 7):
            with torch.no_grad():
                expected = model(torch.tensor([prompt])).logits[0, -1]
            assert (logits[group.rows][0] - expected).abs().max() <= 1e-5 * expected.abs().max()
            prompt.append(token)
            group.grow([0], [token])
            logits = decoder.step()
        decoder.close(group)
    assert known == [0, 32, 16, 32, 0]
    decoder.close_all()
    assert decoder.used_tokens == 0


def test_nothing_is_padded_and_a_prompt_is_computed_once(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in tokens that the model sees, and in columns of the cache."""
    seen: list[int] = []
    columns: list[int] = []
    slots: list[int] = []
    step = CachedDecoder.step

    def counted(self: CachedDecoder) -> torch.Tensor:
        logits = step(self)
        columns.append(self._columns)
        slots.append(self._cache.slots)
        return logits

    monkeypatch.setattr(CachedDecoder, "step", counted)
    make_decoder(llama)  # whose check is not counted
    columns.clear()
    slots.clear()
    hook = llama.get_input_embeddings().register_forward_hook(lambda _, args, out: seen.append(args[0].numel()))
    beam_search(llama, PROMPTS, num_beams=4, max_new_tokens=5, eos_token_id=[])
    generate(llama, LETTERS, PROMPTS, max_new_tokens=5, min_new_tokens=5)
    hook.remove()
    prompts = sum(map(len, PROMPTS))
    assert seen == [prompts, *[4 * len(PROMPTS)] * 4, prompts, *[len(PROMPTS)] * 4]
    assert max(slots) <= 16 * (1 + 3 * len(PROMPTS))  # a page of 16 that is nobody's, and up to 3 for each
    assert max(columns) == 32  # prompts and what follows them have up to 13 tokens, and 4 beams' branches 9 + 16


@pytest.mark.usefixtures("both_ways")
def test_half_precision_stays_close(model: Any) -> None:
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert isinstance(make_decoder(half), CachedDecoder)


@pytest.mark.parametrize("name", PLAIN_MODELS)
@pytest.mark.filterwarnings("ignore")
def test_models_without_the_interface_work_too(name: str) -> None:
    model = make(PLAIN_MODELS[name])
    assert isinstance(make_decoder(model), PlainDecoder)
    for prompt, result in zip(PROMPTS, generate(model, LETTERS, PROMPTS, max_new_tokens=6), strict=True):
        assert list(result.ids) == [token for token in alone(model, prompt, 6) if token != END]


def test_model_that_computes_other_logits_with_a_cache_gets_none(llama: Any) -> None:
    class Odd(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            if "layout" in kwargs:
                output.logits = output.logits.roll(1, -1)
            return output

    model = copy.deepcopy(llama)
    model.__class__ = Odd
    assert isinstance(make_decoder(model), PlainDecoder)


@pytest.mark.parametrize(("steps", "kind"), [(1, CachedDecoder), (3, PlainDecoder)])
def test_rounding_in_one_step_of_the_trial_costs_no_cache(
    llama: Any, monkeypatch: pytest.MonkeyPatch, steps: int, kind: type
) -> None:
    """In bf16 and with some adapters, two tokens may deviate this much, but never all tokens of the trial."""
    left, step = iter(range(steps)), CachedDecoder.step

    def rounded(self: CachedDecoder) -> torch.Tensor:
        logits = step(self)
        noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)) * logits.float().std() * 0.15
        return logits if next(left, None) is None else logits + noise

    monkeypatch.setattr(CachedDecoder, "step", rounded)
    assert type(make_decoder(copy.deepcopy(llama).to(torch.bfloat16))) is kind


def test_prepacked_weights_compute_the_same_and_notice_a_merge(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are prepacked from the first step on; without bf16 units they are not, and results are the same."""
    model = copy.deepcopy(llama).to(torch.bfloat16)
    inject(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    plain = [module.__dict__.copy() for module in model.modules()]
    overrides = prepacked_overrides(model.modules())
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    with torch.no_grad(), Hold(model, overrides, "inference"), overriding(overrides):
        assert not overrides or "forward" in layer.__dict__
        got = layer(x)
        for _, adapted in adapted_layers(model):  # merge(model) refuses a model in use
            adapted.merge()
        merged = layer(x)
        head = model.lm_head(x)
    assert [module.__dict__.keys() - {"_unmerged"} for module in model.modules()] == [own.keys() for own in plain]
    torch.testing.assert_close(head, model.lm_head(x), rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(merged, layer(x), rtol=2**-7, atol=2**-7)
    unmerge(model)
    torch.testing.assert_close(got, layer(x), rtol=2**-7, atol=2**-7)
    monkeypatch.setattr(decoder, "_PREPACK_AFTER", 0)
    assert isinstance(make_decoder(model), CachedDecoder)
    assert len(generate(model, LETTERS, PROMPTS, max_new_tokens=12)) == len(PROMPTS)


def test_prepacked_weights_notice_another_bias() -> None:
    layer, x = nn.Linear(8, 8).bfloat16().requires_grad_(False), torch.ones(1, 8, dtype=torch.bfloat16)
    overrides = prepacked_overrides([layer])
    with torch.no_grad(), Hold(layer, overrides, "inference"), overriding(overrides):
        layer.bias = nn.Parameter(torch.ones(8, dtype=torch.bfloat16), requires_grad=False)
        got = layer(x)
    torch.testing.assert_close(got, layer(x), rtol=2**-7, atol=2**-7)


def test_adapted_model_merged_or_not(llama: Any) -> None:
    model = copy.deepcopy(llama)
    inject(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.5))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    model.train()  # dropout must not reach generation
    expected = [alone(copy.deepcopy(model).eval(), prompt, 12) for prompt in PROMPTS]
    results = [list(result.ids) for result in generate(model, LETTERS, PROMPTS, max_new_tokens=12)]
    assert results == [[token for token in ids if token != END] for ids in expected]
    assert results != [list(result.ids) for result in generate(llama, LETTERS, PROMPTS, max_new_tokens=12)]
    assert all(module.training for module in model.modules())
    assert model.config._attn_implementation == "eager"
    merge(model)
    assert results == [list(result.ids) for result in generate(model, LETTERS, PROMPTS, max_new_tokens=12)]


def test_a_generator_notices_that_its_model_was_trained_between_two_requests(llama: Any) -> None:
    """With any optimiser, because not every one updates version counters."""
    model = copy.deepcopy(llama)
    inject(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    generator = Generator(model, LETTERS)

    def written() -> list[TextChunk]:
        generator.add(PROMPTS[0], Sampling(temperature=0.0, max_new_tokens=12))
        chunks = []
        while len(generator):
            chunks += generator.step()
        return chunks

    before = [token for chunk in written() for token in chunk.ids]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
    after = [token for chunk in written() for token in chunk.ids]
    expected = [token for token in alone(model, PROMPTS[0], 12) if token != END]
    assert after == expected != before


# --- the stream ----------------------------------------------------------------------------------------------------


def test_drawn_tokens_depend_on_the_request_alone(llama: Any) -> None:
    own = Sampling(max_new_tokens=15, temperature=1.0, top_p=0.95, seed=7)
    [expected] = [result.ids for result in generate(llama, LETTERS, [PROMPTS[2]], own)]
    generator = Generator(llama, LETTERS, max_requests=3)
    for number, prompt in enumerate(PROMPTS[:2] + PROMPTS[3:]):
        generator.add(prompt, Sampling(max_new_tokens=5 + number, temperature=0.5 * number, seed=number))
    chunks: list[TextChunk] = generator.step()
    wanted = generator.add(PROMPTS[2], own)
    while len(generator):
        chunks += generator.step()
    assert tuple(token for chunk in chunks if chunk.request == wanted for token in chunk.ids) == expected
    other = generate(llama, LETTERS, [PROMPTS[2]], own, seed=8)
    assert other[0].ids != expected
    twice = generate(llama, LETTERS, [PROMPTS[2], PROMPTS[2]], own)
    assert twice[0].ids == expected
    assert twice[1].ids == other[0].ids  # prompt i gets seed + i


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_seed_gives_the_same_text_in_batches_of_any_size(llama: Any, size: int) -> None:
    own = Sampling(max_new_tokens=15, temperature=1.0, top_k=20, top_p=0.95, repetition_penalty=1.2, seed=3)
    whole = [result.ids for result in generate(llama, LETTERS, PROMPTS, own)]
    parts = [
        result.ids
        for at in range(0, len(PROMPTS), size)
        for result in generate(llama, LETTERS, PROMPTS[at : at + size], own, seed=own.seed + at)
    ]
    assert parts == whole


def test_cancelled_request_sends_no_more_and_disturbs_nobody(llama: Any) -> None:
    expected = [result.ids for result in generate(llama, LETTERS, PROMPTS, max_new_tokens=9)]
    generator = Generator(llama, LETTERS)
    for prompt in PROMPTS:
        generator.add(prompt, Sampling(max_new_tokens=9))
    chunks = generator.step()
    generator.cancel(1)
    while len(generator):
        chunks += generator.step()
    joined = [tuple(token for chunk in chunks if chunk.request == number for token in chunk.ids) for number in range(5)]
    assert joined == [expected[0], expected[1][:1], *expected[2:]]


def test_pieces_join_to_the_result_and_end_once(llama: Any) -> None:
    sampling = Sampling(max_new_tokens=12, temperature=1.0, stop="Z")
    chunks = list(stream(llama, LETTERS, PROMPTS, sampling))
    for number, result in enumerate(generate(llama, LETTERS, PROMPTS, sampling)):
        own = [chunk for chunk in chunks if chunk.request == number]
        assert "".join(chunk.text for chunk in own) == result.text
        assert [chunk.finish_reason for chunk in own] == [None] * (len(own) - 1) + [result.finish_reason]
        assert "Z" not in result.text


def test_penalty_ban_and_minimum_hold_for_generated_tokens(llama: Any) -> None:
    for result in generate(llama, LETTERS, PROMPTS, max_new_tokens=40, no_repeat_ngram_size=2):
        pairs = list(itertools.pairwise(result.ids))
        assert len(pairs) == len(set(pairs))
    for result in generate(llama, LETTERS, PROMPTS, max_new_tokens=20, repetition_penalty=1e6):
        assert len(result.ids) == len(set(result.ids))
    free = generate(llama, LETTERS, PROMPTS, max_new_tokens=30)
    held = generate(llama, LETTERS, PROMPTS, max_new_tokens=30, min_new_tokens=25)
    assert min(len(result.ids) for result in free) < 25 <= min(len(result.ids) for result in held)


def test_a_prompt_may_fill_the_context_and_no_more(llama: Any) -> None:
    [result] = generate(llama, LETTERS, [[5] * 64], max_new_tokens=5, min_new_tokens=5)
    assert (len(result.ids), result.finish_reason) == (1, "length")
    [result] = generate(llama, LETTERS, [[5] * 62], max_new_tokens=5, min_new_tokens=5)
    assert (len(result.ids), result.finish_reason) == (3, "length")
    with pytest.raises(DataError, match=r"(?s)prompt 2 has 65 tokens.* has 64.*prompt 3 has no tokens"):
        generate(llama, LETTERS, [[5], [5] * 65, []])
    with pytest.raises(DataError, match="prompt 1 has 65 tokens"):
        beam_search(llama, [[5] * 65])
    [found] = beam_search(llama, [[5] * 62], num_beams=3, eos_token_id=[])
    assert len(found.ids) == 3


def test_no_prompts_give_no_results(llama: Any) -> None:
    assert generate(llama, LETTERS, []) == []
    assert beam_search(llama, []) == []
    assert list(stream(llama, LETTERS, [])) == []


def test_wrong_settings_are_named_all_at_once(llama: Any) -> None:
    with pytest.raises(ConfigError, match=r"(?s)stop is \('',\).*temperature is -1.*top_p is 0"):
        generate(llama, LETTERS, ["HELLO"], temperature=-1, top_p=0, stop="")
    with pytest.raises(ConfigError, match=r"temprature.* Did you mean 'temperature'"):
        generate(llama, LETTERS, ["HELLO"], temprature=1)
    with pytest.raises(ConfigError, match=r"min_new_tokens is 9, expected at most max_new_tokens, which is 5"):
        Sampling(min_new_tokens=9, max_new_tokens=5)
    with pytest.raises(ConfigError, match=r"(?s)temperature has no effect in beam search.*stop has no effect"):
        Sampling(num_beams=3, temperature=1, stop="x")
    with pytest.raises(ConfigError, match="num_beams is 0"):
        beam_search(llama, PROMPTS, num_beams=0)
    with pytest.raises(DataError, match="expected a list"):
        generate(llama, LETTERS, "HELLO")
    with pytest.raises(ConfigError, match="2 entries for 5 prompts"):
        list(stream(llama, LETTERS, PROMPTS, [Sampling(), Sampling()]))
    with pytest.raises(ConfigError, match="beam search cannot stream"):
        Generator(llama, LETTERS).add("HELLO", Sampling(num_beams=2))


def test_a_bias_is_checked_against_the_token_table_where_there_is_one(llama: Any) -> None:
    with pytest.raises(ConfigError, match="logit_bias has the token ids 61, but this model's end at 60"):
        generate(llama, LETTERS, ["HELLO"], logit_bias={VOCABULARY: 1})
    [found] = generate(Fixed({}), LETTERS, [[2]], logit_bias={3: 100}, max_new_tokens=2)  # which has no table
    assert found.ids == (3, 3)


# --- the choice of a token -----------------------------------------------------------------------------------------


def brute_force_ban(tokens: list[int], size: int) -> set[int]:
    grams = {tuple(tokens[at : at + size]) for at in range(len(tokens) - size + 1)}
    return {token for token in range(4) if (*tokens[len(tokens) - size + 1 :], token) in grams}


@given(st.lists(st.integers(0, 3), max_size=12), st.integers(1, 4))
def test_banned_tokens_are_those_that_would_repeat(tokens: list[int], size: int) -> None:
    expected = brute_force_ban(tokens, size) if len(tokens) >= size - 1 else set()
    assert set(banned_tokens(tokens, size)) == expected


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.floats(0.3, 3),
    st.sampled_from([0, 1, 3, 400]),
    st.sampled_from([1.0, 0.95, 0.5, 0.05]),
    st.sampled_from([0.0, 0.02, 0.4, 1.0]),
)
def test_draws_follow_the_distribution_that_is_left(
    seed: int, heat: float, top_k: int, top_p: float, min_p: float
) -> None:
    """Compared with transformers' warpers: uniform numbers must fall to tokens in proportion to what these leave."""
    logits = torch.randn(1, 1000, generator=torch.Generator().manual_seed(seed)) * 4
    left = TemperatureLogitsWarper(heat)(None, logits)
    for wanted, warper in (
        (top_k, lambda: TopKLogitsWarper(top_k)),
        (top_p < 1, lambda: TopPLogitsWarper(top_p)),
        (min_p, lambda: MinPLogitsWarper(min_p)),
    ):
        left = warper()(None, left) if wanted else left
    expected = torch.softmax(left[0].double(), -1)
    own = Sampling(temperature=heat, top_k=top_k, top_p=top_p, min_p=min_p)
    steps = 400
    drawn = choose(logits.expand(steps, -1), [own] * steps, [(step + 0.5) / steps for step in range(steps)])
    counts = torch.bincount(torch.tensor(drawn), minlength=1000) / steps
    assert ((counts - expected).abs() <= 1.01 / steps).all()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(0, 7), max_size=12),
    st.sampled_from([1.0, 0.7, 1.3, 5.0]),
    st.sampled_from([0, 1, 2, 3]),
    st.sampled_from([0, 3, 20]),
)
def test_penalty_ban_and_minimum_are_those_of_transformers(
    seed: int, tokens: list[int], penalty: float, size: int, minimum: int
) -> None:
    """Its processors see the generated tokens alone here; through its `generate` they would see the prompt's too."""
    logits = torch.randn(8, generator=torch.Generator().manual_seed(seed)) * 3
    row, expected = torch.tensor([tokens], dtype=torch.long), logits[None].clone()
    for wanted, processor in (
        (penalty != 1, lambda: RepetitionPenaltyLogitsProcessor(penalty)),
        (size, lambda: NoRepeatNGramLogitsProcessor(size)),
        (minimum, lambda: MinNewTokensLengthLogitsProcessor(0, minimum, [END, 2], device="cpu")),
    ):
        expected = processor()(row, expected) if wanted else expected
    own = Sampling(repetition_penalty=penalty, no_repeat_ngram_size=size, min_new_tokens=minimum)
    penalize(logits, tokens, [END, 2], own)
    assert torch.equal(logits, expected[0])


@pytest.mark.parametrize("own", [Sampling(temperature=1.0), Sampling(temperature=1.0, top_p=0.9, top_k=1500)])
def test_rounding_hardly_changes_what_is_drawn(own: Sampling) -> None:
    """Rounding changes the order of nearly equal tokens, which must not matter."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 2000, generator=generator) / 50
    rounded = logits + 1e-5 * torch.randn(1, 2000, generator=generator)
    uniforms = [(step + 0.5) / 300 for step in range(300)]
    first, second = (choose(each.expand(300, -1), [own] * 300, uniforms) for each in (logits, rounded))
    assert sum(a == b for a, b in zip(first, second, strict=True)) >= 298


def test_choice_at_the_ends_of_the_unit_interval() -> None:
    logits = torch.tensor([[0.0, -math.inf, 1.0, -math.inf]])
    for own in (Sampling(temperature=1.0), Sampling(temperature=1.0, top_k=3), Sampling(temperature=1.0, top_p=0.99)):
        for uniform in (0.0, 1 - 2**-53):
            assert choose(logits, [own], [uniform])[0] in (0, 2)


# --- text ----------------------------------------------------------------------------------------------------------


class Bytes:
    """A tokenizer of bytes: characters may take several tokens."""

    def decode(self, ids: Any, **_: Any) -> str:
        return bytes(ids).decode("utf-8", "replace")


@given(st.text(max_size=12), st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_streamed_text_is_the_text_up_to_the_first_stop(text: str, stops: list[str]) -> None:
    stream_of_text = TextStream(Bytes(), stops)
    chunks = []
    for token in text.encode("utf-8"):
        chunks.append(stream_of_text.add(token))
        if stream_of_text.stopped:
            break
    chunks.append(stream_of_text.finish())
    ends = [text.find(stop) for stop in stops if stop in text]
    # Of two stops the one that is complete first counts.
    if ends:
        done = min(text.find(stop) + len(stop) for stop in stops if stop in text)
        cut = min(place for place in ends if place <= done)
        assert stream_of_text.stopped
        assert "".join(chunks) in {text[:place] for place in ends if place <= cut or place < done}
    else:
        assert "".join(chunks) == text


def test_real_tokenizer_streams_what_it_decodes(smollm2: Any) -> None:
    _, tokenizer = smollm2
    text = "Héllo 语 wörld 🎉🎉, don't  stop . now\n\n end"
    stream_of_text = TextStream(tokenizer)
    chunks = [stream_of_text.add(token) for token in tokenizer(text)["input_ids"]]
    assert "".join(chunks) + stream_of_text.finish() == text
    assert all("\ufffd" not in chunk for chunk in chunks)


# --- beam search ---------------------------------------------------------------------------------------------------


class Table(nn.Module):
    """A model without any structure: each text has its own random logits."""

    def __init__(self, seed: int, vocabulary: int, spread: float) -> None:
        super().__init__()
        self.seed, self.vocabulary, self.spread = seed, vocabulary, spread
        self.anchor = nn.Parameter(torch.zeros(()))

    def logits_of(self, ids: tuple[int, ...]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(hash((self.seed, ids)) % 2**31)
        return torch.randn(self.vocabulary, generator=generator) * self.spread

    def forward(self, ids: torch.Tensor) -> Any:
        rows = [[self.logits_of(tuple(row[: at + 1])) for at in range(len(row))] for row in ids.tolist()]
        return SimpleNamespace(logits=torch.stack([torch.stack(row) for row in rows]))


def paper_search(model: Table, prompt: list[int], beams: int, limit: int, power: float, minimum: int) -> Any:
    """The decoder of the paper's code: no shortcuts, and no early stopping."""
    live: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    best: tuple[float, tuple[int, ...]] = (-math.inf, ())
    for length in range(1, limit + 1):
        options = []
        for total, ids in live:
            logits = model.logits_of((*prompt, *ids)).clone()
            if length - 1 < minimum:
                logits[END] = -math.inf
            gains = torch.log_softmax(logits, -1)
            options += [(float(torch.tensor(total) + gain), (*ids, token)) for token, gain in enumerate(gains)]
        options = sorted(options, key=lambda each: -each[0])[:beams]
        ended = [each for each in options if each[1][-1] == END]
        live = [each for each in options if each[1][-1] != END]
        for total, ids in ended + (live if length == limit else []):
            score = float(torch.tensor(total) / length**power)
            if score > best[0]:
                best = score, ids
    return best


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    beams=st.integers(1, 5),
    limit=st.integers(1, 7),
    power=st.sampled_from([-1.5, -0.3, 0.0, 0.5, 0.8, 1.0, 2.0]),
    minimum=st.integers(0, 4),
    spread=st.sampled_from([0.3, 1.5, 4.0]),
)
def test_leaving_out_what_cannot_win_changes_nothing(
    seed: int, beams: int, limit: int, power: float, minimum: int, spread: float
) -> None:
    model = Table(seed, 6, spread)
    prompts = [[2], [3, 4], [5, 2, 3]]
    minimum = min(minimum, limit)
    found = beam_search(
        model,
        prompts,
        num_beams=beams,
        max_new_tokens=limit,
        length_penalty=power,
        min_length=minimum,
        eos_token_id=END,
        max_branches=2 * beams,
    )
    for prompt, ours in zip(prompts, found, strict=True):
        score, ids = paper_search(model, prompt, beams, limit, power, minimum)
        assert ours.ids == ids
        assert ours.score == pytest.approx(score, rel=1e-5)
        assert ours.ended == (ids[-1] == END)


def test_wide_search_finds_the_best_of_all_texts() -> None:
    model = Table(5, 4, 1.0)
    limit, power = 4, 0.7
    best = (-math.inf, ())
    for length in range(1, limit + 1):
        for ids in itertools.product(range(4), repeat=length):
            if END in ids[:-1] or (ids[-1] != END and length < limit):
                continue
            total = sum(float(torch.log_softmax(model.logits_of((2, *ids[:at])), -1)[ids[at]]) for at in range(length))
            best = max(best, (total / length**power, ids))
    [found] = beam_search(
        model, [[2]], num_beams=4**limit, max_new_tokens=limit, length_penalty=power, eos_token_id=END, max_branches=1
    )
    assert found.ids == best[1]
    assert found.score == pytest.approx(best[0], rel=1e-5)


class Fixed(nn.Module):
    """A model with given probabilities that counts the rows it computes."""

    def __init__(self, probabilities: dict[tuple[int, ...], list[float]]) -> None:
        super().__init__()
        self.probabilities = probabilities
        self.anchor = nn.Parameter(torch.zeros(()))
        self.computed: list[tuple[int, ...]] = []
        require_causal(self)  # so that its trial is not counted
        self.computed.clear()

    def forward(self, ids: torch.Tensor) -> Any:
        logits = torch.zeros(*ids.shape, 4)
        for row, values in enumerate(ids.tolist()):
            self.computed.append(tuple(values))
            for at in range(len(values)):
                logits[row, at] = torch.tensor(self.probabilities.get(tuple(values[: at + 1]), [1.0] * 4)).log()
        return SimpleNamespace(logits=logits)


def test_older_hypothesis_wins_a_tie_and_the_search_ends_there() -> None:
    # [3] goes on to an end with certainty, so both score log(1/2) without a length penalty.
    model = Fixed({(2,): [0, 0.5, 0, 0.5], (2, 3): [0, 1, 0, 0]})
    [found] = beam_search(model, [[2]], num_beams=2, max_new_tokens=50, length_penalty=0.0, eos_token_id=END)
    assert found.ids == (END,)
    assert found.ended
    assert model.computed == [(2,)]  # (2, 3) cannot win any more
    # With one, the longer is better.
    [found] = beam_search(model, [[2]], num_beams=2, max_new_tokens=2, length_penalty=1.0, eos_token_id=END)
    assert found.ids == (3, END)
    assert found.score == pytest.approx(math.log(0.5) / 2)


def test_search_stops_as_soon_as_no_beam_can_win() -> None:
    """Counted in rows that the model computes: the search for every prompt ends when its own bound says so."""
    model = Fixed({(2,): [0.05, 0.9, 0.0, 0.05]})
    [found] = beam_search(model, [[2]], num_beams=3, max_new_tokens=9, length_penalty=0.0, eos_token_id=END)
    assert found.ids == (END,)
    assert len(model.computed) == 1
    # Below 0 the penalty favours short texts even more.
    [found] = beam_search(model, [[2]], num_beams=3, max_new_tokens=9, length_penalty=-1.0, eos_token_id=END)
    assert len(model.computed) == 2
    # log(0.9) is beaten by log(0.05) / 9 ** 2: with that power, it has to go on.
    beam_search(model, [[2]], num_beams=3, max_new_tokens=9, length_penalty=2.0, eos_token_id=END)
    assert len(model.computed) > 3


def test_prompt_after_which_nothing_is_possible_has_no_continuation() -> None:
    model = Fixed({(2,): [0, 1, 0, 0]})
    found = beam_search(model, [[2], [3]], num_beams=2, max_new_tokens=3, min_length=2, eos_token_id=END)
    assert (found[0].ids, found[0].score, found[0].ended) == ((), -math.inf, False)
    assert len(found[1].ids) == 3


@pytest.mark.usefixtures("both_ways")
def test_beam_search_through_generate(model: Any) -> None:
    found = beam_search(model, PROMPTS, num_beams=4, max_new_tokens=10, length_penalty=0.8)
    results = generate(model, LETTERS, PROMPTS, num_beams=4, max_new_tokens=10, length_penalty=0.8)
    for result, hypothesis in zip(results, found, strict=True):
        assert result.ids == tuple(token for token in hypothesis.ids if token != END)
        assert result.score == hypothesis.score
        assert result.finish_reason == ("stop" if hypothesis.ended else "length")
        assert result.text == LETTERS.decode(result.ids)
    tensor = torch.tensor([PROMPTS[0], PROMPTS[0]])
    assert beam_search(model, tensor, num_beams=4, max_new_tokens=10, length_penalty=0.8)[1].ids == found[0].ids


def test_one_beam_is_greedy(llama: Any) -> None:
    found = beam_search(llama, PROMPTS, num_beams=1, max_new_tokens=8)
    assert [list(hypothesis.ids) for hypothesis in found] == [alone(llama, prompt, 8) for prompt in PROMPTS]


def test_prompts_of_other_kinds_are_refused_and_never_taken_for_texts() -> None:
    model, tokenizer = make(MODELS["llama"]), SimpleNamespace(eos_token_id=END)
    encoding = transformers.BatchEncoding({"input_ids": [[5, 6]], "attention_mask": [[1, 1]]})
    with pytest.raises(DataError, match=r"pass its \['input_ids'\]"):
        generate(model, tokenizer, encoding, max_new_tokens=2)
    turn = {"role": "user", "content": "Hi"}
    for prompts in ([turn], [[turn]]):
        with pytest.raises(DataError, match="prompts are chats, expected texts or token ids:\n  prompt 1"):
            generate(model, tokenizer, prompts, max_new_tokens=2)  # type: ignore[arg-type]
