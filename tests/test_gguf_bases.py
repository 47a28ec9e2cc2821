"""Base models in GGUF files: values equal the file's, and known blocks are kept in memory unchanged."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import loralib as lora
from loralib.bases import load_empty, load_tokenizer, loading
from loralib.bases.quant import Q4Weight, Q8Weight, QuantizedWeight, linears_of
from loralib.cli import main
from loralib.delta import dense
from loralib.engine.kernels import compiled
from loralib.errors import BaseModelError
from loralib.injection import fingerprint

KINDS = gguf.GGMLQuantizationType
V = 300
SIZES = {"vocab_size": V, "hidden_size": 256, "num_hidden_layers": 1, "bos_token_id": 0, "eos_token_id": 1}
GROUPED = {**SIZES, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def made(kind: str, **settings):
    torch.manual_seed(0)
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**SIZES, n_head=4)).eval()
    config, cls = (LlamaConfig, LlamaForCausalLM) if kind == "llama" else (Qwen2Config, Qwen2ForCausalLM)
    return cls(config(**{**GROUPED, "max_position_embeddings": 64, "tie_word_embeddings": True} | settings)).eval()


def write(model, path: Path, kind: KINDS, extra=(), note=lambda writer: None, **fields) -> Path:
    """Writes a model as llama.cpp's converter does: matrices in blocks of one type, all else in fp32."""
    config = model.config
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_vocab_size(V)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(2)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_rope_dimension_count(config.hidden_size // 4)
    add_tokenizer(writer)
    for key, value in fields.items():
        writer.add_uint32(key.replace("_", "."), value)
    note(writer)
    for name, tensor in [*tensors_of(model), *extra]:
        in_blocks = tensor.ndim == 2 and not name.startswith(("token_embd", "position_embd"))
        of = kind if in_blocks else KINDS.F32
        writer.add_tensor(name, blocks_of(tensor, of), raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer) -> None:
    letters = [chr(33 + number) for number in range(90)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["<s>", "</s>", "<|endoftext|>", *letters, *(f"a{number}" for number in range(V - 93))])
    writer.add_token_types([3] * 3 + [1] * (V - 3))
    writer.add_token_merges(["a 0"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def tensors_of(model):
    architecture = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[model.config.model_type]
    names = gguf.get_tensor_name_map(architecture, 1)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        leaf = name.split(".")[-2]
        if leaf in ("c_attn", "c_proj", "c_fc") and tensor.dim() == 2:
            tensor = tensor.T
        if leaf in ("q_proj", "k_proj") and model.config.model_type == "llama":  # rows 2i and 2i + 1 turn together
            heads = 4 if leaf == "q_proj" else 2
            tensor = tensor[torch.arange(len(tensor)).view(heads, 2, -1).transpose(1, 2).flatten()]
        yield names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.float().contiguous().numpy()


def blocks_of(values: np.ndarray, kind: KINDS) -> np.ndarray:
    if kind != KINDS.Q4_K:
        return gguf.quants.quantize(values, kind)
    # The package does not write Q4_K: any bytes do, if the two fp16 that a block begins with are small.
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 256, (values.size // 256, 144), dtype=np.uint8)
    blocks[:, :4] = generator.uniform(1e-4, 1e-3, (len(blocks), 2)).astype(np.float16).view(np.uint8)
    return blocks.reshape(values.shape[0], -1)


def theirs(path: Path, dtype):
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype).eval()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_a_file_gives_the_model_that_it_was_made_from(architecture, tmp_path):
    model = made(architecture)
    read, tokenizer = lora.load_base(write(model, tmp_path / "a.gguf", KINDS.F32), dtype="fp32", device="cpu")
    with torch.no_grad():
        assert torch.allclose(read(IDS).logits, model(IDS).logits, atol=1e-5)
    assert type(read) is type(model)
    assert (tokenizer.bos_token, tokenizer.eos_token, len(tokenizer)) == ("<s>", "</s>", V)


@pytest.mark.parametrize(
    ("kind", "held", "bits"),
    [(KINDS.Q8_0, Q8Weight, 8.5), (KINDS.Q4_0, Q4Weight, 5), (KINDS.Q4_1, Q4Weight, 5), (KINDS.Q4_K, Q4Weight, 4.625)],
)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_known_blocks_are_kept_and_stand_for_the_same_numbers(architecture, kind, held, bits, tmp_path, capsys):
    path = write(made(architecture), tmp_path / "a.gguf", kind)
    model, _ = lora.load_base(path, dtype="bf16", device="cpu")
    linears = list(linears_of(model))
    assert f"{len(linears)} linear layers kept in the file's blocks ({kind.name})" in capsys.readouterr().err
    assert {type(linear.weight) for linear in linears} == {held}
    assert sum(linear.weight.stored_bytes for linear in linears) * 8 == bits * sum(
        linear.weight.numel() for linear in linears
    )
    expected = theirs(path, torch.bfloat16)
    for ours, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(dense(ours), other)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected(IDS).logits)
    assert fingerprint(model) == fingerprint(expected)


@pytest.mark.parametrize("kind", [KINDS.Q8_0, KINDS.Q4_0, KINDS.Q4_1, KINDS.Q4_K])
def test_blocks_are_multiplied_as_they_are(kind, tmp_path):
    kernels = compiled()
    model, _ = lora.load_base(write(made("llama"), tmp_path / "a.gguf", kind), dtype="bf16", device="cpu")
    weight = model.model.layers[0].mlp.up_proj.weight
    if kernels is None or not kernels.accept_weight(weight):
        pytest.skip("no compiled kernels for pairs of bf16 here")
    for side in (weight, weight.T):
        x = torch.randn(7, side.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
        assert torch.equal(kernels.product(x, side), kernels.product(x, side.dense()))


def test_other_blocks_become_dense_and_that_is_said(tmp_path, capsys):
    path = write(made("qwen2"), tmp_path / "a.gguf", KINDS.Q5_0)
    model, _ = lora.load_base(path, dtype="bf16", device="cpu")
    assert "7 linear layers dequantised (Q5_0)" in capsys.readouterr().err
    assert not any(isinstance(parameter, QuantizedWeight) for parameter in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, theirs(path, torch.bfloat16)(IDS).logits)


def test_a_file_may_be_brought_into_other_bits(tmp_path):
    model, _ = lora.load_base(write(made("llama"), tmp_path / "a.gguf", KINDS.Q8_0), quantize="nf4", device="cpu")
    assert {type(linear.weight).__name__ for linear in linears_of(model)} == {"NF4Weight"}


def test_the_scaling_of_llama_3_is_not_lost(tmp_path):
    """transformers reads neither the factors that llama.cpp stores nor their origin, so its logits differ."""
    model = made("llama", rope_parameters=LLAMA_3, max_position_embeddings=131072)
    plain = made("llama", rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    factors = (plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq).numpy()
    path = write(model, tmp_path / "a.gguf", KINDS.F32, extra=[("rope_freqs.weight", factors)])
    read, _ = lora.load_base(path, dtype="fp32", device="cpu")
    assert read.config.rope_parameters == LLAMA_3
    with torch.no_grad():
        assert torch.allclose(read(IDS).logits, model(IDS).logits, atol=1e-5)
    path = write(model, tmp_path / "a.gguf", KINDS.F32, extra=[("rope_freqs.weight", factors**2)])
    with pytest.raises(BaseModelError, match=r"scales its rotary embedding \(rope_freqs.weight\)"):
        lora.load_base(path)


@pytest.mark.parametrize(
    ("architecture", "kind", "fields"),
    [
        ("llama", "linear", {"llama.rope.scaling.factor": 4.0}),
        ("llama", "linear", {"llama.rope.scale_linear": 4.0}),
        ("qwen2", "yarn", {"qwen2.rope.scaling.factor": 4.0}),
    ],
)
def test_other_scalings_of_positions_are_not_lost(architecture, kind, fields, tmp_path):
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    rope |= {"original_max_position_embeddings": 16} if kind == "yarn" else {}
    model = made(architecture, rope_parameters=rope)

    def note(writer):
        for key, value in fields.items():
            writer.add_float32(key, value)
        if "scaling" in str(fields):
            writer.add_string(f"{architecture}.rope.scaling.type", kind)
            writer.add_uint32(f"{architecture}.rope.scaling.original_context_length", 16)

    path = write(model, tmp_path / "model.gguf", KINDS.F32, note=note)
    read, _ = lora.load_base(path, dtype="fp32", device="cpu")
    with torch.no_grad():
        assert torch.allclose(read(IDS).logits, model(IDS).logits, atol=1e-4)


def test_a_scaling_that_is_not_known_is_refused(tmp_path):
    def note(writer):
        writer.add_string("llama.rope.scaling.type", "longrope")
        writer.add_float32("llama.rope.scaling.factor", 4.0)

    path = write(made("llama"), tmp_path / "model.gguf", KINDS.F32, note=note)
    with pytest.raises(BaseModelError, match=r"scales its rotary embedding \(longrope"):
        lora.load_base(path, device="cpu")


def test_an_adapter_is_trained_on_a_file_saved_and_merged(tmp_path, capsys):
    path, run, merged = write(made("llama"), tmp_path / "a.gguf", KINDS.Q8_0), tmp_path / "run", tmp_path / "merged"
    data = tmp_path / "train.txt"
    data.write_text("abc||cba\nbcd||dcb\n", encoding="utf-8")
    given = ["--train_data", str(data), "--model", str(path), "--dtype", "bf16", "--device", "cpu", "--lr", "0.01"]
    given += ["--max_steps", "3", "--valid_fraction", "0", "--output_dir", str(run)]
    assert main(["train", *given]) == 0
    assert main(["generate", "abc", "--adapter", str(run), "--max_new_tokens", "3"]) == 0
    assert main(["merge", str(run), str(merged)]) == 0
    capsys.readouterr()
    model, _ = lora.load_base(merged, dtype="bf16", device="cpu")
    base, _ = lora.load_base(path, dtype="fp32", device="cpu")
    assert "base model checked)" in str(lora.load_adapter(base, run))
    lora.merge(base)
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits.float(), base(IDS).logits, atol=0.1)
    # On the dense numbers of the same file it is the same base.
    assert "base model checked)" in str(lora.load_adapter(theirs(path, torch.bfloat16), run))


def test_a_file_becomes_a_directory_for_other_tools(tmp_path):
    path = write(made("llama"), tmp_path / "a.gguf", KINDS.Q4_0)
    assert main(["export-base", str(tmp_path / "out"), "--model", str(path)]) == 0
    with torch.no_grad():
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).eval()
        assert torch.equal(exported(IDS).logits, theirs(path, torch.bfloat16)(IDS).logits)


def test_what_needs_no_weights_reads_none(tmp_path):
    path = write(made("llama"), tmp_path / "a.gguf", KINDS.Q8_0)
    assert load_empty(path).config.hidden_size == 256
    assert load_tokenizer(path).model_max_length == 64
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(BaseModelError, match="the tokenizer of"):  # one beside the file comes first
        load_tokenizer(path)


def test_files_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    path = write(made("llama"), tmp_path / "a.gguf", KINDS.Q8_0)
    whole = path.read_bytes()
    for size in (0, 3, 200, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(BaseModelError, match=r"a\.gguf cannot be read as a GGUF file.*copy it again"):
            lora.load_base(path)
    (tmp_path / "b.gguf").write_bytes(
        whole.replace(
            b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0llama",
            b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0nonet",
        )
    )
    with pytest.raises(
        BaseModelError, match=r"b\.gguf cannot be read: transformers reports for its 'nonet' model.*nonet"
    ):
        lora.load_base(tmp_path / "b.gguf")
    path = write(made("llama"), tmp_path / "c.gguf", KINDS.F32, split_count=2)
    with pytest.raises(BaseModelError, match=r"c\.gguf is one part of a model.*llama-gguf-split --merge"):
        lora.load_base(path)
    with pytest.raises(
        BaseModelError, match=r"contains GGUF files. Choose one: --model .*a\.gguf, or b\.gguf, c\.gguf"
    ):
        lora.load_base(tmp_path)


def test_a_file_of_a_repository_is_fetched_by_its_name(tmp_path, monkeypatch):
    path, asked = write(made("llama"), tmp_path / "a.gguf", KINDS.Q8_0), []

    def fetch(name, choose, cached, **_):
        asked.append((name, choose(["README.md", "a.gguf", "b.gguf"]), cached))
        return path.parent

    monkeypatch.setattr(loading, "fetch", fetch)
    model, _ = lora.load_base("org/name/a.gguf@v1", device="cpu")
    assert model.name_or_path == "org/name/a.gguf@v1"
    assert set(map(str, asked)) == {"('org/name@v1', ['a.gguf'], ['a.gguf'])"}
    with pytest.raises(BaseModelError, match=r"org/name has no c\.gguf; its GGUF files are a\.gguf, b\.gguf"):
        lora.load_base("org/name/c.gguf")
    with pytest.raises(
        BaseModelError, match=r"org/name contains GGUF files\. Choose one, such as --model org/name/a\.gguf"
    ):
        loading._needed_files(["README.md", "a.gguf"], name="org/name")


def test_types_that_nobody_knows_are_named(tmp_path):
    path = write(made("llama"), tmp_path / "a.gguf", KINDS.Q8_0)
    at = path.read_bytes().index(b"blk.0.ffn_up.weight") + len("blk.0.ffn_up.weight") + 4 + 2 * 8
    damaged = bytearray(path.read_bytes())
    damaged[at] = 99
    path.write_bytes(damaged)
    with pytest.raises(BaseModelError, match=r"blk\.0\.ffn_up\.weight: unknown tensor type 99"):
        lora.load_base(path)
