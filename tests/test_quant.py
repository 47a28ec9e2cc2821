"""Frozen weights in 8 and 4 bits: QLoRA's numbers, bitsandbytes' layout, and training that really learns."""

import copy
import itertools
import json
import pickle
import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import loralib as lora
from loralib.bases import load_adapted
from loralib.bases.quant import (
    Int8Weight,
    QuantizedWeight,
    make_dense,
    quantize,
    quantize_model,
    round_model,
)
from loralib.bases.quantized_reading import take_over
from loralib.cli import main
from loralib.data import TokenExample
from loralib.delta import dense
from loralib.engine.kernels import compiled
from loralib.errors import BaseMismatchError, BaseModelError, ConfigError, TargetError, UnsupportedModelError
from loralib.injection import adapted_layers, fingerprint, quantization_of
from loralib.training.step import make_step

KINDS = ("int8", "nf4")
WITH_TABLES = (*KINDS, "int8+tables", "nf4+tables")


def llama(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
    )
    return LlamaForCausalLM(config).bfloat16().eval()


def gpt2(seed=0):
    torch.manual_seed(seed)
    config = GPT2Config(n_embd=128, n_layer=2, n_head=4, vocab_size=96, n_positions=64, bos_token_id=1, eos_token_id=1)
    return GPT2LMHeadModel(config).bfloat16().eval()


def quantized(make, kind):
    model = make()
    quantize_model(model, kind)
    return model


def dense_copy(model):
    """The same values in ordinary tensors."""
    model = copy.deepcopy(model)
    make_dense(model)
    return model


def adapted(model, **settings):
    torch.manual_seed(1)
    lora.inject(model, lora.LoraConfig(**{"r": 4, "target_modules": "all-linear"} | settings))
    with torch.no_grad():
        for _, layer in adapted_layers(model):
            layer.lora_B.normal_(std=0.02)
    return model


def examples(count=4):
    generator = torch.Generator().manual_seed(2)
    rows = torch.randint(0, 96, (count, 12), generator=generator).tolist()
    return [TokenExample(tuple(row), (False,) * 4 + (True,) * 8) for row in rows]


def test_int8_is_within_half_a_step_of_each_weight():
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    steps = weight.abs().amax(1, keepdim=True) / 127
    assert ((quantize(weight, "int8").dense() - weight).abs() <= steps * 0.5001).all()


def test_nf4_is_the_nearest_level_times_the_largest_of_64():
    weight = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    held = quantize(weight, "nf4")
    blocks, absmax = weight.view(-1, 64), held.absmax()
    # Double quantisation: the absmax are 8-bit numbers, off by a hundredth at most.
    assert torch.allclose(absmax, blocks.abs().amax(1), rtol=0.02)
    levels = (held.dense().view(-1, 64) / absmax[:, None]).mul(1e5).round().unique() / 1e5
    assert len(levels) == 16
    assert torch.allclose(torch.tensor([-1.0, -0.69619, 0.0, 0.07958, 1.0]), levels[[0, 1, 7, 8, 15]])
    nearest = (levels - (blocks / blocks.abs().amax(1, keepdim=True))[..., None]).abs().argmin(-1)
    assert torch.allclose(levels[nearest] * absmax[:, None], held.dense().view(-1, 64), atol=1e-4)


def test_a_weight_takes_the_bits_that_it_should():
    weight = torch.zeros(512, 1024, dtype=torch.bfloat16)
    assert quantize(weight, "int8").stored_bytes == weight.numel() + 4 * 512
    assert quantize(weight, "nf4").stored_bytes * 8 / weight.numel() == pytest.approx(4.127, abs=0.001)
    for kind, (rows, columns) in itertools.product(KINDS, [(512, 1024), (3, 43), (1, 1)]):
        held = quantize(torch.zeros(rows, columns), kind)
        assert type(held).bytes_of(rows, columns) == held.stored_bytes


def test_nf4_lies_in_memory_as_in_bitsandbytes():
    bitsandbytes = pytest.importorskip("bitsandbytes.functional")
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        weight = (torch.randn(512, 1024, generator=generator) * 0.02).to(dtype)
        codes, state = bitsandbytes.quantize_4bit(weight, quant_type="nf4", compress_statistics=True, blocksize=64)
        ours = quantize(weight, "nf4")
        assert torch.equal(ours.codes, codes.view(-1))
        assert torch.equal(ours.absmax_scales, state.state2.absmax)
        assert torch.equal(ours.offset, state.offset)
        # On a CPU it takes the next best code where an absmax lies within 1e-4 of the middle between two.
        assert (ours.absmax_codes != state.absmax).float().mean() < 0.01
        ours.absmax_codes = state.absmax
        assert torch.equal(ours.dense(), bitsandbytes.dequantize_4bit(codes, state))


@given(st.integers(1, 5), st.integers(1, 130), st.sampled_from(KINDS), st.booleans())
def test_any_shape_turned_or_not_keeps_its_shape_and_is_near(rows, columns, kind, turned):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns))
    given = weight.T if turned else weight
    held = quantize(given, kind, turned=turned)
    assert held.shape == given.shape == held.dense().shape
    assert torch.equal(held.T.dense(), held.dense().T)
    assert (held.dense() - given).norm() <= (0.02 if kind == "int8" else 0.2) * given.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_large_numbers_are_kept(kind):
    weight = torch.zeros(2, 64)
    assert torch.equal(quantize(weight, kind).dense(), weight)
    weight[0, 3] = 1e30
    assert quantize(weight, kind).dense()[0, 3] == pytest.approx(1e30, rel=0.02)


def test_a_kind_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match="quantize is True"):
        quantize(torch.zeros(2, 2), True)
    with pytest.raises(
        ConfigError, match=r"quantize is 'nf5', expected 'int8', 'nf4', 'int8\+tables' or 'nf4\+tables'.*nf4"
    ):
        quantize(torch.zeros(2, 2), "nf5")
    with pytest.raises(ConfigError, match="quantize is 'int4'"):
        lora.load_base("no-such-model", quantize="int4")


@pytest.mark.parametrize(("word", "ours"), [("--load_in_4bit", "nf4"), ("--load-in-8bit", "int8")])
def test_the_flags_of_other_trainers_are_known(word, ours, capsys):
    with pytest.raises(SystemExit):
        main(["train", word])
    assert f"Here it is --quantize {ours}" in capsys.readouterr().err


def test_shards_of_a_quantised_base_are_refused_with_the_way_out():
    with pytest.raises(ConfigError, match=r"quantize is 'nf4' and shard is on(.|\n)*Leave out shard"):
        lora.TrainConfig(train_data="a.txt", quantize="nf4", shard=True)


# As a tensor.


@pytest.mark.parametrize("kind", KINDS)
def test_a_linear_computes_with_the_dense_weight_and_passes_its_gradient_on(kind):
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 32), torch.randn(3, 64, requires_grad=True)
    linear.weight = nn.Parameter(quantize(linear.weight, kind), requires_grad=False)
    linear(x).square().sum().backward()
    expected = x.detach().clone().requires_grad_()
    nn.functional.linear(expected, linear.weight.dense(), linear.bias).square().sum().backward()
    assert torch.equal(x.grad, expected.grad)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_independent_and_equal(copied):
    linear = nn.Linear(64, 32)
    linear.weight = nn.Parameter(quantize(linear.weight, "nf4"), requires_grad=False)
    other = copied(linear)
    assert isinstance(other.weight, nn.Parameter)
    assert isinstance(other.weight, QuantizedWeight)
    assert torch.equal(other.weight.dense(), linear.weight.dense())
    other.weight.codes.zero_()
    assert not torch.equal(other.weight.dense(), linear.weight.dense())


@pytest.mark.parametrize("kind", ["int8+tables", "nf4+tables"])
def test_tables_in_8_bits_look_up_and_multiply_the_dense_numbers(kind):
    model = quantized(llama, kind)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert type(table.weight) is type(head.weight) is Int8Weight
    assert table.weight is not head.weight
    ids = torch.tensor([[0, 5, 95], [7, 7, 1]])
    assert torch.equal(table(ids), nn.functional.embedding(ids, table.weight.dense()))
    x = torch.randn(3, 128, requires_grad=True, dtype=torch.bfloat16)
    assert torch.equal(head(x), nn.functional.linear(x, head.weight.dense()))
    model.resize_token_embeddings(100, mean_resizing=False)
    assert torch.equal(model.get_input_embeddings().weight[:96], table.weight.dense())  # an ordinary one again


def test_another_dtype_keeps_the_codes():
    linear = nn.Linear(64, 32)
    linear.weight = nn.Parameter(quantize(linear.weight, "int8"), requires_grad=False)
    codes = linear.weight.codes
    linear.bfloat16()
    assert linear.weight.dense().dtype == linear(torch.ones(1, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert torch.equal(linear.weight.codes, codes)


def test_a_write_that_would_be_lost_is_refused():
    weight = quantize(torch.ones(2, 64), "nf4")
    for write in (lambda: weight.mul_(2), lambda: weight.copy_(torch.zeros(2, 64)), lambda: weight.zero_()):
        with pytest.raises(UnsupportedModelError, match="a weight in nf4 cannot be modified"):
            write()


# In training and generation.


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("kind", WITH_TABLES)
def test_training_is_that_on_the_dense_numbers_bit_for_bit(make, kind, both_ways):
    held = quantized(make, kind)
    models = [adapted(held), adapted(dense_copy(quantized(make, kind)))]
    losses, gradients = [], []
    for model in models:
        losses.append(make_step(model).forward_backward(examples(), loss_scale=1 / 32).loss_sum)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert torch.equal(*losses)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0
        assert torch.equal(gradient, gradients[1][name])


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize(
    "variant", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"lora_bias": True}]
)
def test_variants_train_and_merge_on_codes_as_on_the_dense_numbers(make, variant):
    held = quantized(make, "nf4")
    ids, results = torch.tensor([[1, 2, 3]]), []
    for model in (held, dense_copy(quantized(make, "nf4"))):
        torch.manual_seed(1)
        lora.inject(model, lora.LoraConfig(r=4, target_modules="all-linear", **variant))
        loss = make_step(model).forward_backward(examples(), loss_scale=1 / 32).loss_sum
        results.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > 1
    for ours, theirs in zip(*results, strict=True):  # DoRA's norms are summed in the order in which weights lie
        torch.testing.assert_close(ours, theirs, rtol=0.01, atol=1e-4)
    with torch.no_grad():
        before = held.eval()(ids).logits
        lora.merge(held)
        assert torch.allclose(held(ids).logits, before, atol=0.05)
        lora.unmerge(held)
        assert torch.equal(held(ids).logits, before)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    ],
)
def test_tables_in_8_bits_are_adapted_as_the_dense_numbers(settings):
    results = []
    for model in (quantized(llama, "nf4+tables"), dense_copy(quantized(llama, "nf4+tables"))):
        torch.manual_seed(1)
        lora.inject(model, lora.LoraConfig(r=4, **settings))
        loss = make_step(model).forward_backward(examples(), loss_scale=1 / 32).loss_sum
        results.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > 1
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=1e-3)


def test_dora_sees_that_another_weight_took_the_place_of_codes():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(64, 8)})
    model["a"].weight = nn.Parameter(quantize(model["a"].weight, "nf4"), requires_grad=False)
    lora.inject(model, lora.LoraConfig(r=2, target_modules=["a"], use_dora=True))
    layer = model["a"].eval()
    first = layer.output_scale()
    layer.weight = nn.Parameter(quantize(layer.weight.dense() * 2, "nf4"), requires_grad=False)
    assert torch.allclose(layer.output_scale(), first / 2, rtol=1e-3)


@pytest.mark.bf16_units
def test_kernels_multiply_the_codes_themselves():
    kernels = compiled()
    if kernels is None:
        pytest.skip("no compiled kernels")
    generator = torch.Generator().manual_seed(0)
    for out, width in [(64, 64), (96, 128), (192, 4160), (64, 8192)]:
        for kind in KINDS:
            weight = quantize((torch.randn(out, width, generator=generator) * 0.02).bfloat16(), kind)
            if not kernels.accept_weight(weight):
                pytest.skip("this processor has no units for pairs of bf16")
            for side, size in ((weight, width), (weight.T, out)):
                for rows in (1, 7):
                    x = torch.randn(rows, size, generator=generator).bfloat16()
                    assert torch.equal(kernels.product(x, side), kernels.product(x, side.dense()))


@pytest.mark.parametrize("kind", KINDS)
def test_evaluations_between_steps_change_nothing(kind):
    """On CPUs, bitsandbytes repacks a weight at its first evaluation, after which nothing below it gets a gradient."""
    models = [adapted(quantized(llama, kind)) for _ in range(2)]
    ids = torch.tensor([[1, 2, 3, 4]])
    for model, evaluates in zip(models, (True, False), strict=True):
        step, optimizer = make_step(model), torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            if evaluates:
                with torch.no_grad():
                    model.eval()(ids)
                step.loss(examples())
                model.train()
            step.forward_backward(examples(), loss_scale=1 / 32)
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        if ours.requires_grad:
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", WITH_TABLES)
def test_generation_is_that_of_the_dense_numbers(kind, both_ways, smollm2):
    models = [adapted(quantized(llama, kind)), adapted(dense_copy(quantized(llama, kind)))]
    rows = [lora.generate(model.eval(), smollm2[1], [[5, 6, 7], [8]], max_new_tokens=8) for model in models]
    assert [row.ids for row in rows[0]] == [row.ids for row in rows[1]]


def test_rows_choose_their_adapter_on_codes_as_on_the_dense_numbers(smollm2, both_ways):
    trained = lora.adapter_of(adapted(quantized(llama, "nf4")))
    value = lora.Adapter(trained.config, trained.tensors)  # without its base's fingerprint, which the copy has not
    found = []
    for model in (quantized(llama, "nf4"), dense_copy(quantized(llama, "nf4"))):
        bank = lora.Bank(model)
        bank.load("a", value)
        rows = lora.generate(bank, smollm2[1], [[5, 6, 7], [5, 6, 7]], max_new_tokens=8, adapters=["a", None])
        found.append([row.ids for row in rows])
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]


# Adapters.


@pytest.mark.parametrize("kind", KINDS)
def test_merging_adds_to_the_dense_weight_and_unmerging_puts_the_codes_back(kind):
    model = adapted(quantized(llama, kind))
    _, layer = adapted_layers(model)[0]
    held, ids = layer.weight, torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before = model(ids).logits
        lora.merge(model)
        assert torch.equal(layer.weight, (held.dense().float() + layer.delta_weight()).bfloat16())
        assert torch.allclose(model(ids).logits, before, atol=0.05)
        lora.unmerge(model)
        assert layer.weight is held
        assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("kind", WITH_TABLES)
def test_an_adapter_knows_its_base_in_any_bits_and_no_other(kind, tmp_path):
    model = adapted(quantized(llama, kind))
    assert fingerprint(model) == fingerprint(llama())
    lora.save_adapter(model, tmp_path)
    assert "base model checked)" in str(lora.load_adapter(quantized(llama, kind), tmp_path))
    assert "in a different precision than in training" in str(lora.load_adapter(llama(), tmp_path))
    with pytest.raises(BaseMismatchError, match="same shapes but different values"):
        lora.load_adapter(llama(seed=1), tmp_path)


def test_training_a_quantised_weight_itself_is_refused():
    with pytest.raises(TargetError, match=r"cannot be trained themselves(.|\n)*down_proj.weight is stored in nf4"):
        lora.inject(quantized(llama, "nf4"), lora.LoraConfig(target_modules=["q_proj"], modules_to_save=["down_proj"]))


# Reading, merging, and the command line.


@pytest.fixture(scope="module")
def base(tmp_path_factory, smollm2):
    """A tiny base in a directory, with the default base's tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=len(smollm2[1]),
        tie_word_embeddings=True,
    )
    directory = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).bfloat16().save_pretrained(directory)
    smollm2[1].save_pretrained(directory)
    return directory


@pytest.mark.parametrize("kind", WITH_TABLES)
def test_a_base_is_quantised_while_it_is_read(base, kind):
    model, _ = lora.load_base(base, dtype="bf16", device="cpu", quantize=kind)
    whole, _ = lora.load_base(base, dtype="bf16", device="cpu")
    expected = fingerprint(whole)
    quantize_model(whole, kind)
    assert fingerprint(model) == expected
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model.config, "quantization_config")
    for (name, ours), (other, theirs) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
        assert (name, type(ours)) == (other, type(theirs))
        assert torch.equal(dense(ours), dense(theirs))
    table = model.get_input_embeddings().weight
    assert isinstance(table, Int8Weight) == kind.endswith("+tables")
    assert model.get_output_embeddings().weight is table  # the head is tied to it


@pytest.mark.parametrize("make", [llama, gpt2])
def test_bases_that_bitsandbytes_quantised_keep_their_numbers(make, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    ids = torch.tensor([[1, 2, 3, 4]])
    make().save_pretrained(tmp_path)
    for settings, said in [
        (nf4, "kept as they are"),
        ({"load_in_8bit": True}, "kept as they are"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "of another kind dequantised"),
    ]:
        config = BitsAndBytesConfig(**settings)
        for dtype in (torch.float32, torch.bfloat16):
            model, theirs = (
                AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, quantization_config=config)
                for _ in range(2)
            )
            assert said in take_over(model, "base", "bitsandbytes", dtype)
            assert {parameter.dtype for parameter in model.parameters()} == {dtype}
            with torch.no_grad():
                assert torch.allclose(model.eval()(ids).logits, theirs.dequantize().eval()(ids).logits, atol=0.01)
        adapted(model)
        assert make_step(model).forward_backward(examples(), loss_scale=1 / 32).loss_sum > 0


@pytest.fixture(scope="module")
def by_bitsandbytes(base, tmp_path_factory):
    """The same base as bitsandbytes saves it in NF4, with bnb_4bit_quant_storage as for FSDP."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = BitsAndBytesConfig(**nf4, bnb_4bit_quant_storage=torch.bfloat16)
    directory = tmp_path_factory.mktemp("by_bitsandbytes")
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=config).save_pretrained(
        directory
    )
    AutoTokenizer.from_pretrained(base).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bases_in_files_of_bitsandbytes_have_the_dtype_that_was_asked_for(by_bitsandbytes, dtype, capsys):
    from transformers import AutoModelForCausalLM

    model, _ = lora.load_base(by_bitsandbytes, dtype=dtype, device="cpu")
    assert "by bitsandbytes: 7 weights kept as they are" in capsys.readouterr().err
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    theirs = AutoModelForCausalLM.from_pretrained(by_bitsandbytes, dtype=dtype).dequantize()
    for (name, ours), other in zip(model.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(dense(ours).bfloat16(), other.bfloat16()), name


def test_bases_of_other_tools_may_be_brought_into_other_bits(by_bitsandbytes, capsys):
    model, _ = lora.load_base(by_bitsandbytes, dtype="bf16", device="cpu", quantize="int8")
    assert "7 weights converted to int8" in capsys.readouterr().err
    values, _ = lora.load_base(by_bitsandbytes, dtype="bf16", device="cpu")
    make_dense(values)
    quantize_model(values, "int8")
    for ours, theirs in zip(model.parameters(), values.parameters(), strict=True):
        assert type(ours) is type(theirs)
        assert torch.equal(dense(ours), dense(theirs))


def test_bases_of_bitsandbytes_are_merged_into_and_written(by_bitsandbytes, tmp_path, capsys):
    model, _ = lora.load_base(by_bitsandbytes, dtype="bf16", device="cpu")
    lora.save_adapter(adapted(model), tmp_path / "adapter")
    assert main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged"), "--dtype", "fp32"]) == 0
    said = capsys.readouterr().out
    assert "explained by rounding" in said
    assert "--quantize" not in said  # these are the weights of the training already
    merged, _ = lora.load_base(tmp_path / "merged", dtype="fp32", device="cpu")
    lora.merge(model)
    for name, ours in merged.named_parameters():
        assert torch.allclose(ours, model.get_parameter(name).float(), atol=1e-2), name
    assert main(["export-base", str(tmp_path / "base"), "--model", str(by_bitsandbytes)]) == 0


def test_a_config_that_wrongly_says_quantised_does_no_harm(base, tmp_path):
    """As merge_and_unload of PEFT may leave it behind."""
    pytest.importorskip("bitsandbytes")
    whole, tokenizer = lora.load_base(base, dtype="bf16", device="cpu")
    whole.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    claim(tmp_path, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    model, _ = lora.load_base(tmp_path, dtype="bf16", device="cpu")
    for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def claim(directory, quantization):
    settings = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(settings | {"quantization_config": quantization}))


@pytest.mark.parametrize("kind", [None, "int8"])
def test_bases_in_fp8_have_the_numbers_of_their_blocks(kind, smollm2, tmp_path, capsys):
    """transformers dequantises them while it reads them where there is no GPU, and says nothing."""
    model = llama().float()
    model.resize_token_embeddings(len(smollm2[1]))
    model.save_pretrained(tmp_path)
    smollm2[1].save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for name in [name for name in state if "_proj" in name]:
        blocks = state[name].unflatten(0, (-1, 64)).unflatten(2, (-1, 64))
        scales = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        model.get_parameter(name).data = (codes.float() * scales[:, None, :, None]).reshape(state[name].shape)
        state |= {name: codes.reshape(state[name].shape), f"{name}_scale_inv": scales}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    claim(tmp_path, {"quant_method": "fp8", "weight_block_size": [64, 64]})
    read, _ = lora.load_base(tmp_path, dtype="fp32", device="cpu", quantize=kind)
    said = "14 weights converted to int8" if kind else "its weights are now dense"
    assert f"was quantised by fp8: {said}" in capsys.readouterr().err
    if kind:
        quantize_model(model, kind)
    for ours, theirs in zip(read.parameters(), model.parameters(), strict=True):
        assert (type(ours), ours.dtype) == (type(theirs), torch.float32)
        assert torch.allclose(dense(ours), dense(theirs), atol=1e-3)


def test_bases_that_cannot_be_read_name_their_method(base, tmp_path):
    whole, tokenizer = lora.load_base(base, dtype="bf16", device="cpu")
    whole.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state = {name.replace("weight", "qweight") if "_proj" in name else name: value for name, value in state.items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    claim(tmp_path, {"quant_method": "exl2"})
    with pytest.raises(BaseModelError, match=r"'exl2'(.|\n)*Use the model that it was made from, with --quantize nf4"):
        lora.load_base(tmp_path)


def test_weights_that_have_the_bits_already_are_kept(by_bitsandbytes):
    """Rounding them once more would change a few."""
    read, _ = lora.load_base(by_bitsandbytes, dtype="bf16", device="cpu")
    again, _ = lora.load_base(by_bitsandbytes, dtype="bf16", device="cpu", quantize="nf4")
    assert quantization_of(read) == quantization_of(again) == "nf4"
    for ours, theirs in zip(again.parameters(), read.parameters(), strict=True):
        assert torch.equal(dense(ours), dense(theirs))


@pytest.mark.parametrize("kind", WITH_TABLES)
def test_the_form_of_a_base_is_named_as_it_was_asked_for(kind):
    assert quantization_of(quantized(llama, kind)) == kind


def test_heads_of_classifiers_are_not_quantised():
    """They are trained in full."""
    settings = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = RobertaForSequenceClassification(RobertaConfig(vocab_size=96, **settings))
    assert quantize_model(model, "nf4") == 6
    assert not any(isinstance(parameter, QuantizedWeight) for parameter in model.classifier.parameters())


class OfAnotherMethod(nn.Linear):
    """What transformers returns for a base that is quantised in an unknown way."""

    def __init__(self, can: bool) -> None:
        super().__init__(2, 2)
        self.can, self.is_quantized, self.config = can, True, SimpleNamespace(_is_quantized=True)

    def dequantize(self) -> None:
        if not self.can:
            raise NotImplementedError("no way back")


def test_bases_of_other_methods_become_dense_or_are_refused_by_name():
    said = take_over(OfAnotherMethod(can=True), "base", "hqq", torch.float32)
    assert "quantised by hqq: its weights are now dense" in said
    with pytest.raises(BaseModelError, match=r"base was quantised by hqq, and transformers cannot.*no way back"):
        take_over(OfAnotherMethod(can=False), "base", "hqq", torch.float32)


def test_the_error_of_rounding_is_that_of_the_weights():
    assert 0.003 < round_model(llama(), "int8").total < 0.015
    assert 0.08 < round_model(llama(), "nf4").total < 0.11
    model = llama()
    round_model(model, "nf4")
    assert fingerprint(model) == fingerprint(llama())
    model = llama()
    round_model(model, "nf4+tables")
    assert torch.equal(model.lm_head.weight, quantized(llama, "nf4+tables").lm_head.weight.dense())
    assert fingerprint(model) == fingerprint(llama())


def test_a_single_weight_that_bits_cannot_hold_is_named_and_not_merged(base, tmp_path, capsys):
    """Among all weights together, its error hardly shows."""
    model, tokenizer = lora.load_base(base, dtype="fp32", device="cpu")
    lora.save_adapter(adapted(model, target_modules=["up_proj"]), tmp_path / "adapter")
    whole, _ = lora.load_base(base, dtype="fp32", device="cpu")
    weight = whole.model.layers[0].self_attn.k_proj.weight.data
    weight.fill_(1e-3)[:, 0] = 1  # an outlier in each output
    weight *= 1e-42  # no longer a multiple of what fp32 has
    whole.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rounding = round_model(whole, "int8")
    assert rounding.where == "model.layers.0.self_attn.k_proj.weight"
    assert rounding.total < 0.015 < 0.5 < rounding.most
    given = ["merge", str(tmp_path / "adapter"), str(tmp_path / "merged"), "--model", str(tmp_path / "base")]
    assert main([*given, "--quantize", "int8", "--allow_base_mismatch"]) == 2
    assert f"{rounding.where} is off by {rounding.most:.2%} of its norm in int8" in capsys.readouterr().err
    assert not (tmp_path / "merged" / "config.json").exists()


def test_merging_into_rounded_weights_says_how_far_off_they_are(base, tmp_path, capsys):
    data = tmp_path / "train.txt"
    data.write_text("name[A]||A is a place.\nname[B]||B is a pub.\n", encoding="utf-8")
    given = ["--train_data", str(data), "--model", str(base), "--dtype", "bf16", "--device", "cpu", "--lr", "0.01"]
    out = str(tmp_path / "run")
    given += ["--max_steps", "4", "--valid_fraction", "0", "--output_dir", out]
    assert main(["train", *given, "--quantize", "nf4"]) == 0
    assert 'quantize="nf4")' in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert main(["merge", out, str(tmp_path / "merged"), "--quantize", "nf4"]) == 0
    said = capsys.readouterr().out
    error = float(re.search(r"have their nf4 values, off by ([\d.]+)% of the weights' norm", said).group(1))
    assert 8 < error < 11
    merged, _ = lora.load_base(tmp_path / "merged", dtype="bf16", device="cpu")
    held, _ = load_adapted(out, model=str(base), dtype="bf16", device="cpu", quantize="nf4", merged=True)
    assert "precision" not in capsys.readouterr().err
    load_adapted(out, model=str(base), dtype="bf16", device="cpu")
    assert "in a different precision than in training" in capsys.readouterr().err
    theirs = dict(held.named_parameters())
    for name, ours in merged.named_parameters():
        assert torch.allclose(ours.float(), dense(theirs[name]).float(), atol=1e-2), name
    assert main(["merge", out, str(tmp_path / "again")]) == 0
    assert "--quantize nf4 merges into exactly those weights" in capsys.readouterr().out
    assert main(["merge", out, str(tmp_path / "again"), "--requantize"]) == 2
    assert "rounding would undo it" in capsys.readouterr().err
