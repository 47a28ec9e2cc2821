"""Many adapters on one base: every row computes as if its adapter were alone."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import loralib as lora
from loralib.adapter import Adapter
from loralib.engine.placement import Hold, overriding
from loralib.errors import AdapterError
from loralib.generation import Generator, Sampling


class Letters:
    eos_token_id, bos_token_id, pad_token_id, chat_template = 2, 1, 0, None

    def decode(self, ids, **_):
        return " ".join(map(str, ids))


def llama(**settings):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, "eos_token_id": 2, "bos_token_id": 1, **settings})).eval()


def adapter(model, seed, **settings) -> Adapter:
    torch.manual_seed(seed)
    lora.inject(model, lora.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **settings}))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.2)
    value = lora.adapter_of(model)
    lora.remove(model)
    return value


ADAPTERS = {
    "plain": {},
    "wide": {"r": 12, "lora_alpha": 3, "use_rslora": True},
    "few": {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 2}},
    "table": {"target_modules": ["embed_tokens", "v_proj"]},
    "head": {"target_modules": ["lm_head", "up_proj"]},
}
PROMPTS = [list(range(3 + number, 3 + number + length)) for number, length in enumerate((5, 30, 1, 18, 9, 40, 3))]
NAMES = ["plain", "wide", None, "few", "plain", "table", "head"]


@pytest.fixture
def bank():
    model = llama()
    values = {name: adapter(model, seed, **more) for seed, (name, more) in enumerate(ADAPTERS.items())}
    bank = lora.Bank(model)
    for name, value in values.items():
        bank.load(name, value)
    return bank, values


def alone(model, value, prompt, **settings):
    if value is None:
        return lora.generate(model, Letters(), [prompt], **settings)[0]
    lora.apply_adapter(model, value)
    try:
        return lora.generate(model, Letters(), [prompt], **settings)[0]
    finally:
        lora.remove(model)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}])
@pytest.mark.parametrize("mode", ["full", "torch", "off"])
def test_each_row_generates_as_with_its_adapter_alone(bank, settings, mode, monkeypatch):
    monkeypatch.setenv("LORALIB_ENGINE", mode)
    bank, values = bank
    together = lora.generate(bank, Letters(), PROMPTS, adapters=NAMES, max_new_tokens=12, **settings)
    for prompt, name, result in zip(PROMPTS, NAMES, together, strict=True):
        expected = alone(bank.model, values.get(name), prompt, max_new_tokens=12, **settings)
        assert result.ids == expected.ids, name


def logits_of(model, overrides, ids):
    with torch.no_grad(), Hold(model, list(overrides), "inference"), overriding(overrides):
        return model(ids).logits


def test_rows_equal_their_adapters_alone_to_rounding(bank):
    bank, values = bank
    ids = torch.tensor([[5, 9, 11, 30, 7, 8, 40, 41]])
    for name, value in values.items():
        with_bank = logits_of(bank.model, bank.overrides([(bank.acquire(name), 8)], [(bank.acquire(name), 8)], {}), ids)
        lora.apply_adapter(bank.model, value)
        assert torch.allclose(with_bank, bank.model(ids).logits, atol=1e-5, rtol=1e-5)
        lora.remove(bank.model)


@pytest.mark.parametrize("mode", ["full", "torch"])
def test_each_row_of_a_mixed_batch_equals_its_adapter_alone(bank, mode, monkeypatch):
    monkeypatch.setenv("LORALIB_ENGINE", mode)  # with the kernel and without
    bank, values = bank
    names = ["plain", None, "wide", "few", "table", "head", "plain"]
    torch.manual_seed(5)
    ids = torch.randint(3, 60, (len(names), 9))
    rows = [(bank.acquire(name), 9) for name in names]
    together = logits_of(bank.model, bank.overrides(rows, rows, {}), ids)
    for row, name in enumerate(names):
        if name is not None:
            lora.apply_adapter(bank.model, values[name])
        assert torch.allclose(together[row], bank.model(ids[row : row + 1]).logits[0], atol=1e-5, rtol=1e-5), name
        if name is not None:
            lora.remove(bank.model)


def test_bf16_is_no_further_from_fp32_than_the_adapter_alone():
    # Of one draw the ratio of the two errors lies anywhere between 0.5 and 1.5, so that many are added up.
    wide, half = llama(), llama().bfloat16()
    ids = torch.arange(3, 11)[None].repeat(8, 1)
    mixed_error = alone_error = 0.0
    for draw in range(12):
        values = {
            name: adapter(wide, 8 * draw + seed, target_modules="all-linear") for seed, name in enumerate("abcdefgh")
        }
        bank = lora.Bank(half)
        exact, apart = [], []
        for name, value in values.items():
            bank.load(name, value, allow_base_mismatch=True)
            for model, results in ((wide, exact), (half, apart)):
                lora.apply_adapter(model, value, allow_base_mismatch=True)
                results.append(model(ids[:1]).logits.float().detach())
                lora.remove(model)
        rows = [(bank.acquire(name), 8) for name in values]
        together = logits_of(half, bank.overrides(rows, rows, {}), ids).float()
        mixed_error += float((together - torch.cat(exact)).square().mean())
        alone_error += float((torch.cat(apart) - torch.cat(exact)).square().mean())
    assert mixed_error <= 1.05 * alone_error


def test_a_scale_is_a_factor_of_the_update(bank):
    bank, values = bank
    base = lora.generate(bank.model, Letters(), PROMPTS[:1], max_new_tokens=8)
    bank.set_scale("plain", 0.0)
    assert lora.generate(bank, Letters(), PROMPTS[:1], adapters=["plain"], max_new_tokens=8) == base
    bank.set_scale("plain", 0.5)
    config = values["plain"].config
    half = Adapter(config.replace(lora_alpha=config.lora_alpha / 2), values["plain"].tensors)
    expected = alone(bank.model, half, PROMPTS[0], max_new_tokens=8)
    assert lora.generate(bank, Letters(), PROMPTS[:1], adapters=["plain"], max_new_tokens=8) == [expected]


def test_running_sequences_keep_the_adapter_they_began_with(bank):
    bank, values = bank
    generator = Generator(bank, Letters())
    generator.add(PROMPTS[0], Sampling(max_new_tokens=6), "plain")
    chunks = generator.step()
    bank.load("plain", values["wide"], replace=True)
    generator.add(PROMPTS[0], Sampling(max_new_tokens=6), "plain")
    chunks += generator.step()
    bank.unload("plain")
    while len(generator):
        chunks += generator.step()
    texts = [tuple(token for chunk in chunks if chunk.request == number for token in chunk.ids) for number in (0, 1)]
    assert texts == [alone(bank.model, values[name], PROMPTS[0], max_new_tokens=6).ids for name in ("plain", "wide")]


def test_the_least_recently_used_waits_on_disk_and_comes_back():
    model = llama()
    values = {name: adapter(model, seed) for seed, name in enumerate("abcd")}
    size = values["a"].nbytes
    bank = lora.Bank(model, max_bytes=2 * size)
    for name, value in values.items():
        bank.load(name, value, pin=name == "a")
        assert bank.nbytes <= 2 * size
    for name in ("b", "c", "b", "d", "a"):
        expected = alone(model, values[name], PROMPTS[0], max_new_tokens=5)
        assert lora.generate(bank, Letters(), PROMPTS[:1], adapters=[name], max_new_tokens=5) == [expected]
        assert bank.nbytes <= 2 * size
        assert bank.describe("a").in_memory  # pinned
        assert bank.describe(name).in_memory
        assert sum(bank.describe(each).in_memory for each in "abcd") == 2
    # All that one batch needs is in memory, whatever the budget.
    together = lora.generate(bank, Letters(), [PROMPTS[0]] * 4, adapters=list("abcd"), max_new_tokens=5)
    assert together == [alone(model, values[name], PROMPTS[0], max_new_tokens=5) for name in "abcd"]
    assert bank.nbytes <= 2 * size
    # A generator that is forgotten gives back what it used.
    generator = Generator(bank, Letters())
    for name in "abcd":
        generator.add(PROMPTS[0], adapter=name)
    generator.step()
    assert bank.nbytes == 4 * size
    del generator
    assert bank.nbytes <= 2 * size


def work(action):
    """How many functions of Python and operators of PyTorch an action calls."""
    calls = []
    sys.setprofile(lambda frame, event, _: calls.append(event))
    try:
        action()
    finally:
        sys.setprofile(None)
    return len(calls)


@pytest.mark.parametrize("all_in_memory", [True, False])
def test_loads_replacements_and_unloads_are_the_same_work_however_many_there_are(all_in_memory):
    model = llama()
    one, two = adapter(model, 1), adapter(model, 2)
    bank = lora.Bank(model, max_bytes=None if all_in_memory else 2 * one.nbytes)

    def taken():
        return {
            "load": work(lambda: bank.load("new", one)),
            "switch": work(lambda: bank.release(bank.acquire("new"))),
            "replace": work(lambda: bank.load("new", two, replace=True)),
            "describe": work(lambda: bank.describe("new")),
            "unload": work(lambda: bank.unload("new")),
        }

    for number in range(3):
        bank.load(f"a{number}", one)
    taken()  # what waits for the room has been written then
    few = taken()
    for number in range(3, 24):
        bank.load(f"a{number}", one)
    assert len(bank) == 24
    taken()
    assert taken() == pytest.approx(few, rel=0.02)  # a dictionary that grows moves a name or two


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight: trained in full"),
        ({"bias": "all"}, "trained in full"),
    ],
)
def test_more_than_low_rank_updates_are_refused_by_name(settings, words):
    model = llama(attention_bias=True)
    value = adapter(model, 0, target_modules=["q_proj"], **settings)
    with pytest.raises(lora.LoraError, match=words):
        lora.Bank(model).load("a", value)


def test_variants_that_are_no_plain_deltas_are_refused_by_name():
    model = llama()
    dora = adapter(model, 0, target_modules=["q_proj"], use_dora=True)
    with pytest.raises(lora.LoraError, match=r"(?s)DoRA.*loralib convert"):
        lora.Bank(model).load("dora", dora)


def test_an_adapter_without_effect_is_refused():
    model = llama()
    lora.inject(model, lora.LoraConfig(r=2, target_modules=["q_proj"]))
    untrained = lora.adapter_of(model)
    lora.remove(model)
    bank = lora.Bank(model)
    with pytest.raises(lora.LoraError, match="changes no logit"):
        bank.load("nothing", untrained)
    assert bank.names == ()


def test_an_adapter_of_another_base_is_refused():
    value = adapter(llama(), 0)
    torch.manual_seed(1)
    other = llama()
    torch.nn.init.normal_(other.model.layers[0].mlp.up_proj.weight)
    with pytest.raises(lora.LoraError, match="different values"):
        lora.Bank(other).load("a", value)


def test_names_are_checked_before_anything_is_generated(bank):
    bank, values = bank
    with pytest.raises(lora.LoraError, match=r"(?s)wid.*Did you mean 'wide'.*nobody"):
        lora.generate(bank, Letters(), PROMPTS[:2], adapters=["wid", "nobody"])
    with pytest.raises(lora.LoraError, match="one per prompt"):
        lora.generate(bank, Letters(), PROMPTS[:2], adapters=["wide"])
    with pytest.raises(lora.LoraError, match="need a bank"):
        lora.generate(bank.model, Letters(), PROMPTS[:1], adapters=["wide"])
    with pytest.raises(lora.LoraError, match="already"):
        bank.load("wide", values["wide"])
    with pytest.raises(lora.LoraError, match="no such"):
        bank.unload("nobody")


def test_an_adapted_model_is_refused():
    model = llama()
    lora.inject(model, lora.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(lora.LoraError, match="plain base"):
        lora.Bank(model)


def test_gpt2_with_fused_blocks():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()
    values = {
        "qv": adapter(model, 1, target_modules=["c_attn"], enable_lora={"c_attn": [True, False, True]}),
        "all": adapter(model, 2),
    }
    bank = lora.Bank(model)
    for name, value in values.items():
        bank.load(name, value)
    names = ["qv", None, "all"]
    together = lora.generate(bank, Letters(), PROMPTS[:3], adapters=names, max_new_tokens=6)
    assert together == [
        alone(model, values.get(name), prompt, max_new_tokens=6) for name, prompt in zip(names, PROMPTS, strict=False)
    ]


def test_a_name_with_a_scale_is_the_adapter_at_that_scale_for_one_row_alone(bank):
    bank, _ = bank
    prompt, names = PROMPTS[1], ["wide@0", "wide@0.5", "wide", "wide@-2.5", None]
    mixed = lora.generate(bank, Letters(), [prompt] * len(names), adapters=names)
    assert mixed[0].ids == mixed[-1].ids
    for name, result in zip(names[1:4], mixed[1:4], strict=True):
        bank.set_scale("wide", float(name.partition("@")[2] or 1))
        assert lora.generate(bank, Letters(), [prompt], adapters=["wide"])[0].ids == result.ids
        bank.set_scale("wide", 1.0)
    assert len({result.ids for result in mixed}) > 2
    assert bank.describe("wide").users == 0


def test_names_that_have_an_at_sign_themselves_come_first(bank):
    bank, values = bank
    bank.load("plain@2", values["few"])
    few, same = lora.generate(bank, Letters(), [PROMPTS[1]] * 2, adapters=["few", "plain@2"])
    assert few.ids == same.ids
    for unknown in ("nobody@1", "plain@", "plain@two", "plain@1e9", "plain@nan"):
        with pytest.raises(AdapterError, match="no such adapters"):
            lora.generate(bank, Letters(), [PROMPTS[1]], adapters=[unknown])
    with pytest.raises(AdapterError, match="no such adapters"):
        bank.unload("plain@0.5")


def test_loads_and_unloads_in_other_threads_change_no_text(bank):
    bank, values = bank
    settings = Sampling(max_new_tokens=12, min_new_tokens=12, temperature=0)

    def texts():
        return [text.ids for text in lora.generate(bank, Letters(), PROMPTS, settings, adapters=NAMES)]

    quiet = texts()
    ended, faults = threading.Event(), []

    def churn(number):
        try:
            while not ended.is_set():
                bank.load(f"extra{number}", values["wide"])
                bank.set_scale(f"extra{number}", 0.5)
                bank.load(f"extra{number}", values["few"], replace=True)
                bank.unload(f"extra{number}")
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=churn, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(6):
            assert texts() == quiet
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert not faults


def test_one_pass_has_one_scale(bank):
    # A pass whose scale is set while it runs ends with the one that it began with.
    bank, _ = bank
    slot = bank.acquire("plain")
    ids = torch.tensor([[5, 9, 33]])
    seen = []
    with torch.no_grad(), Hold(bank.model, bank.modules, "inference"):
        for change in (False, True):
            overrides = dict(bank.overrides([(slot, 3)], [(slot, 3)], {}))
            if change:
                bank.set_scale("plain", 7.0)
            with overriding(overrides):
                seen.append(bank.model(ids).logits)
    assert torch.equal(*seen)


def test_a_bank_tells_what_it_holds(bank):
    bank, values = bank
    told = bank.describe("few")
    assert (told.name, told.scale, told.pinned, told.users, told.in_memory) == ("few", 1.0, False, 0, True)
    assert (told.ranks, told.target_modules) == ((2, 4), ("down_proj", "q_proj"))
    assert told.nbytes == values["few"].nbytes
    with pytest.raises(lora.errors.AdapterError, match=r"fev.*Did you mean"):
        bank.describe("fev")
