"""Bases packed by GPTQ and AWQ: values are the same, and stay in 4 bits."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import loralib as lora
from loralib.bases.quant import Int8Weight, NF4Weight, Q4Weight, linears_of
from loralib.data import TokenExample
from loralib.delta import dense
from loralib.engine.kernels import compiled
from loralib.errors import BaseModelError
from loralib.training.step import make_step

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
OUTPUTS_OF_AWQ = (0, 2, 4, 6, 1, 3, 5, 7)


def packed(codes: torch.Tensor, bits: int, places=None) -> torch.Tensor:
    """Puts the codes (n, m) of neighbours in a row into numbers of 32 bits, the first one lowest."""
    each = 32 // bits
    fields = codes.long().unflatten(1, (-1, each))
    fields = fields if places is None else fields[..., list(places)]
    return (fields << torch.arange(0, 32, bits)).sum(-1).to(torch.int32)


def quantized(weight: torch.Tensor, size: int, bits: int, order: torch.Tensor):
    """Rounds a weight (out, in) to codes, with a zero and a scale for each group of inputs; and their values."""
    groups, top = order.max() + 1, 2**bits - 1
    low, high = (
        torch.stack([getattr(weight[:, order == group], of)(1).values for group in range(groups)], 1)
        for of in ("min", "max")
    )
    scales = ((high - low) / top).half()
    zeros = (-low / scales.float()).round().clamp(1, top)  # GPTQ's first format stores one less
    codes = (weight / scales.float()[:, order] + zeros[:, order]).round().clamp(0, top)
    return codes, zeros, scales, (codes - zeros[:, order]) * scales.float()[:, order]


def tensors_of(method: str, form: str, weight: torch.Tensor, size: int, bits: int, order: torch.Tensor):
    codes, zeros, scales, stands_for = quantized(weight, size, bits, order)
    if method == "gptq":
        stored = {"qweight": packed(codes, bits).T, "qzeros": packed((zeros - int(form == "gptq")).T, bits)}
        stored["g_idx"] = order.int()
    else:
        stored = {"qweight": packed(codes.T, 4, OUTPUTS_OF_AWQ), "qzeros": packed(zeros.T, 4, OUTPUTS_OF_AWQ)}
    stored["scales"] = scales.T
    return {name: tensor.contiguous() for name, tensor in stored.items()}, stands_for


def write(directory, method="gptq", form="gptq", bits=4, act_order=False, size=64, tokenizer=None, changes=()):
    """Writes a small base in one of these formats; returns a dense model with the same values."""
    torch.manual_seed(0)
    widths = {"hidden_size": 2 * size, "intermediate_size": 4 * size}
    config = LlamaConfig(**widths, num_hidden_layers=1, num_attention_heads=2, vocab_size=len(tokenizer))
    model = LlamaForCausalLM(config).half().eval()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    state = load_file(directory / "model.safetensors")
    for name, linear in model.model.layers.named_modules():
        if isinstance(linear, torch.nn.Linear):
            order = torch.arange(linear.in_features) // size
            order = order[torch.randperm(len(order))] if act_order else order
            stored, stands_for = tensors_of(method, form, linear.weight.data.float(), size, bits, order)
            state.pop(f"model.layers.{name}.weight")
            state |= {f"model.layers.{name}.{part}": tensor for part, tensor in stored.items()}
            linear.weight.data = stands_for
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((directory / "config.json").read_text())
    packing = {"quant_method": method, "bits": bits, "group_size": size}
    packing |= {"checkpoint_format": form} if method == "gptq" else {"version": form}
    settings["quantization_config"] = packing | dict(changes)
    (directory / "config.json").write_text(json.dumps(settings))
    return model.bfloat16()


@pytest.mark.parametrize(
    ("method", "form", "bits", "act_order", "size", "said"),
    [
        ("gptq", "gptq", 4, False, 64, "GPTQ: 7 weights kept in 4 bits"),
        ("gptq", "gptq_v2", 4, False, 64, "GPTQ: 7 weights kept in 4 bits"),
        ("gptq", "gptq", 4, False, 96, "GPTQ: 7 weights kept in 4 bits"),
        ("gptq", "gptq", 4, True, 64, "GPTQ: 7 weights dequantised"),
        ("gptq", "gptq", 8, False, 64, "GPTQ: 7 weights dequantised"),
        ("awq", "gemm", 4, False, 64, "AWQ: 7 weights kept in 4 bits"),
    ],
)
def test_packed_numbers_are_those_that_were_packed(
    method, form, bits, act_order, size, said, tmp_path, smollm2, capsys
):
    expected = write(tmp_path, method, form, bits, act_order, size, tokenizer=smollm2[1])
    model, _ = lora.load_base(tmp_path, dtype="bf16", device="cpu")
    assert said in capsys.readouterr().err
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(dense(ours), theirs)
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, expected(IDS).logits, atol=0.05)
    assert not hasattr(model.config, "quantization_config")
    kept = [linear.weight for linear in linears_of(model) if isinstance(linear.weight, Q4Weight)]
    for weight in kept:
        # A zero for each 32, and a scale and a minimum for as many as share them: a power of two times 32.
        assert weight.stored_bytes * 8 == weight.numel() * (4 + 8 / 32 + 2 * 16 / (64 if size == 64 else 32))
        if (kernels := compiled()) is not None and kernels.accept_weight(weight):
            x = torch.randn(3, weight.shape[1]).bfloat16()
            assert torch.equal(kernels.product(x, weight), kernels.product(x, weight.dense()))


@pytest.mark.parametrize(("kind", "held"), [(None, Q4Weight), ("int8", Int8Weight)])
def test_layers_that_store_inputs_first_are_packed_with_outputs_first(kind, held, tmp_path, smollm2):
    """GPT-2's; the output projection is square, so that its shape would not show the mistake."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=len(smollm2[1]))).half().eval()
    model.save_pretrained(tmp_path)
    smollm2[1].save_pretrained(tmp_path)
    state, order = load_file(tmp_path / "model.safetensors"), torch.arange(64) // 32
    module, layer = "transformer.h.0.attn.c_proj", model.transformer.h[0].attn.c_proj
    stored, stands_for = tensors_of("gptq", "gptq", layer.weight.data.T.float(), 32, 4, order)
    del state[f"{module}.weight"]
    save_file(state | {f"{module}.{part}": tensor for part, tensor in stored.items()}, tmp_path / "model.safetensors")
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    read, _ = lora.load_base(tmp_path, dtype="fp32", device="cpu", quantize=kind)
    ours = read.get_submodule(module).weight
    assert isinstance(ours, held)
    assert torch.allclose(dense(ours), stands_for.T, atol=1e-3)
    layer.weight.data = stands_for.T.half()
    with torch.no_grad():
        assert torch.allclose(read(IDS).logits, model.float()(IDS).logits, atol=1e-3 if kind is None else 0.05)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_experts_that_are_packed_one_by_one_are_stacked(method, tmp_path, smollm2, capsys):
    """Their names are not those of modules; nothing may be left of what stands in for weights while they are read."""
    torch.manual_seed(0)
    settings = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings |= {"num_key_value_heads": 2, "num_local_experts": 2, "vocab_size": len(smollm2[1])}
    model = MixtralForCausalLM(MixtralConfig(**settings)).half()
    model.save_pretrained(tmp_path)
    state, order = load_file(tmp_path / "model.safetensors"), torch.arange(64) // 32
    values = dict(state)
    for name in [name for name in state if re.search(r"\.w[123]\.|_proj\.", name)]:
        form = "gptq" if method == "gptq" else "gemm"
        stored, values[name] = tensors_of(method, form, state.pop(name).float(), 32, 4, order)
        state |= {f"{name.removesuffix('.weight')}.{part}": tensor for part, tensor in stored.items()}
    for directory, tensors in ((tmp_path, state), (tmp_path / "values", values)):
        model.config.save_pretrained(directory)
        smollm2[1].save_pretrained(directory)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    expected, _ = lora.load_base(tmp_path / "values", dtype="fp32", device="cpu")
    read, _ = lora.load_base(tmp_path, dtype="fp32", device="cpu")
    assert "4 weights kept in 4 bits, 6 weights dequantised" in capsys.readouterr().err
    for ours, theirs in zip(read.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(dense(ours), theirs, atol=1e-3)
    read, _ = lora.load_base(tmp_path, dtype="fp32", device="cpu", quantize="nf4")
    assert sum(isinstance(weight, NF4Weight) for weight in read.parameters()) == 6  # experts are two stacks


def test_old_files_of_autogptq_keep_their_settings_elsewhere(tmp_path, smollm2):
    expected = write(tmp_path, tokenizer=smollm2[1])
    settings = json.loads((tmp_path / "config.json").read_text())
    packing = settings.pop("quantization_config")
    del packing["quant_method"], packing["checkpoint_format"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "quantize_config.json").write_text(json.dumps(packing))
    model, _ = lora.load_base(tmp_path, dtype="bf16", device="cpu")
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(dense(ours), theirs)


def test_an_adapter_learns_on_packed_weights(tmp_path, smollm2):
    write(tmp_path, "awq", "gemm", tokenizer=smollm2[1])
    model, _ = lora.load_base(tmp_path, dtype="bf16", device="cpu")
    lora.inject(model, lora.LoraConfig(r=4, target_modules="all-linear"))
    batch = [TokenExample((5, 6, 7, 8), (False, True, True, True))]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        losses.append(float(make_step(model).forward_backward(batch, loss_scale=1 / 3).loss_sum))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]


def test_packed_numbers_may_be_brought_into_other_bits(tmp_path, smollm2):
    write(tmp_path, tokenizer=smollm2[1])
    model, _ = lora.load_base(tmp_path, device="cpu", quantize="nf4")
    assert {type(linear.weight) for linear in linears_of(model)} == {NF4Weight}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bits": 3}, "was quantised by gptq to 3 bits as 'gptq', which loralib does not read"),
        ({"quant_method": "awq", "version": "gemv"}, "by awq to 4 bits as 'gemv', which loralib does not read"),
        ({"bits": 8}, "do not match each other"),
    ],
)
def test_what_is_packed_otherwise_is_refused_with_the_way_out(changes, said, tmp_path, smollm2):
    write(tmp_path, tokenizer=smollm2[1], changes=changes)
    with pytest.raises(BaseModelError, match=f"{said}(.|\n)*Use the model that it was made from, with --quantize nf4"):
        lora.load_base(tmp_path)


def test_a_missing_part_is_named(tmp_path, smollm2):
    write(tmp_path, tokenizer=smollm2[1])
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.0.mlp.up_proj.scales"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=r"model.layers.0.mlp.up_proj: its packed tensors.*scales"):
        lora.load_base(tmp_path)
