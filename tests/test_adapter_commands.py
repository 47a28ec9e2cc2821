"""loralib inspect, convert, merge and combine, as they are typed."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import loralib as lora
from loralib.cli import main
from loralib.config import LoraConfig
from loralib.files import hold_directory
from loralib.formats import modelfile

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 1,
}


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model(torch.tensor([[5, 9, 20, 33]])).logits[0].float()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small base model with a tokenizer, in a directory."""
    path = tmp_path_factory.mktemp("base")
    words = ["<unk>", "<end>", "<pad>", *(chr(number) for number in range(32, 127))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=len(words), tie_word_embeddings=True, **SIZES)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapted(base: Path) -> Any:
    model, _ = lora.load_base(base, dtype="fp32", device="cpu")
    lora.inject(model, LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", use_rslora=True))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


@pytest.fixture(scope="module")
def adapter(adapted: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("adapter")
    lora.save_adapter(adapted, path)
    return str(path)


def run(*words: object) -> int:
    try:
        return main([str(word) for word in words])
    except SystemExit as stopped:  # of argparse
        return int(stopped.code or 0)


def fresh(base: Path) -> Any:
    return lora.load_base(base, dtype="fp32", device="cpu")[0]


def test_inspect(adapter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", adapter, "--layers", "--plot", tmp_path / "norms.png") == 0
    shown = capsys.readouterr().out
    assert "use_rslora" in shown
    assert "model.layers.1.mlp.down_proj" in shown
    assert (tmp_path / "norms.png").stat().st_size > 1000


def test_inspect_verify(adapter: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", adapter, "--verify", base, "--prompt", "one two") == 0
    shown = capsys.readouterr().out
    assert "All checks passed." in shown
    assert "this is the base that the adapter was trained on" in shown
    model = fresh(base)
    lora.inject(model, LoraConfig(r=2, target_modules=["q_proj"]))
    lora.save_adapter(model, tmp_path)
    assert run("inspect", tmp_path, "--verify", base) == 1
    assert "nothing was learned" in capsys.readouterr().out


@pytest.mark.parametrize("target", ["peft", "vllm", "llamacpp", "mlx"])
def test_convert(target: str, adapter: str, adapted: Any, base: Path, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / ("a.gguf" if target == "llamacpp" else "out")
    assert run("convert", adapter, path, "--target", target, "--model", base) == 0
    assert "read back and compared: exact" in capsys.readouterr().out
    lora.load_adapter(model := fresh(base), path)
    torch.testing.assert_close(logits(model), logits(adapted), rtol=0, atol=1e-5)
    # And back to PEFT's form.
    assert run("convert", path, "-o", tmp_path / "back", "--base", base) == 0  # other spellings of the same
    lora.load_adapter(model, tmp_path / "back")
    torch.testing.assert_close(logits(model), logits(adapted), rtol=0, atol=1e-5)


@pytest.mark.parametrize("target", ["llamacpp", "mlx"])
def test_what_another_tool_trained_writes_text(
    target: str, adapter: str, base: Path, tmp_path: Path, capsys: Any
) -> None:
    path = tmp_path / ("a.gguf" if target == "llamacpp" else "out")
    assert run("convert", adapter, path, "--target", target, "--model", base) == 0
    capsys.readouterr()
    texts = []
    for given in (adapter, path):
        assert run("generate", "one two", "--adapter", given, "--model", base, "--dtype", "fp32") == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert run("generate", "one two", "--model", base, "--dtype", "fp32") == 0
    assert capsys.readouterr().out != texts[0]
    output = tmp_path / "texts.jsonl"
    assert run("generate", "one two", "--adapter", path, "--model", base, "--dtype", "fp32", "--output", output) == 0
    assert texts[0].strip("\n") in output.read_text(encoding="utf-8")
    assert run("chat", "--plain", "--adapter", path) == 2
    assert "does not name its base model; give --model" in capsys.readouterr().err


def test_convert_without_the_base_where_it_is_not_needed(adapter: str, tmp_path: Path, capsys: Any) -> None:
    assert run("convert", adapter, tmp_path / "a", "--target", "vllm", "--rank", 2, "--dtype", "bf16") == 0
    shown = capsys.readouterr().out
    assert "Loading" not in shown
    assert "base model was not checked for layers that share weights (give --model MODEL" in shown
    assert "off by" in shown
    assert "rounding to bf16" in shown
    config = lora.read_adapter(tmp_path / "a").config
    assert (config.r, config.lora_alpha, config.use_rslora) == (2, 2, False)


def test_convert_microsoft_checkpoints(tmp_path: Path, capsys: Any) -> None:
    """The GPT-2 form nested and with a prefix, the NLU form flat with a trained classifier."""
    tensors = {
        "transformer.h.0.attn.c_attn.lora_A": torch.randn(8, 6),
        "transformer.h.0.attn.c_attn.lora_B": torch.randn(12, 4),
    }
    torch.save({"model_state_dict": {f"module.{name}": t for name, t in tensors.items()}}, tmp_path / "gpt2.bin")
    how = ("--trained_rank", 4, "--lora_alpha", 32, "--target_modules", "c_attn", "--enable_lora", "1,0,1")
    assert run("convert", tmp_path / "gpt2.bin", tmp_path / "gpt2", *how) == 0
    again = ("--lora_dim", 4, "--lora-alpha", 32, "--target_modules", "c_attn,", "--enable_lora", "c_attn=1,0,1")
    assert run("convert", tmp_path / "gpt2.bin", tmp_path / "again", *again) == 0
    first, second = (lora.read_adapter(tmp_path / name) for name in ("gpt2", "again"))
    assert first.config == second.config
    assert all(torch.equal(first.tensors[name], tensor) for name, tensor in second.tensors.items())
    wide = lora.read_adapter(tmp_path / "gpt2").tensors["transformer.h.0.attn.c_attn.lora_B"]
    narrow = tensors["transformer.h.0.attn.c_attn.lora_B"]
    torch.testing.assert_close(wide[:6, :4], 8 * narrow[:6])
    torch.testing.assert_close(wide[12:, 4:], 8 * narrow[6:])
    assert not wide[6:12].any()
    nlu = {
        "roberta.encoder.layer.0.attention.self.query.lora_A": torch.randn(2, 6),
        "roberta.encoder.layer.0.attention.self.query.lora_B": torch.randn(6, 2),
        "classifier.dense.weight": torch.randn(6, 6),
        "classifier.out_proj.bias": torch.randn(3),
    }
    torch.save(nlu, tmp_path / "nlu.bin")
    how = ("--trained_rank", 2, "--lora_alpha", 2, "--target_modules", "query", "--modules_to_save", "classifier")
    assert run("convert", tmp_path / "nlu.bin", tmp_path / "nlu", *how) == 0
    back = lora.read_adapter(tmp_path / "nlu")
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in nlu.items())
    assert list(back.config.modules_to_save or ()) == ["classifier"]
    assert run("convert", tmp_path / "nlu", tmp_path / "again.bin", "--target", "microsoft") == 0
    again = torch.load(tmp_path / "again.bin", weights_only=True)
    assert all(torch.equal(again[name], tensor) for name, tensor in nlu.items())
    capsys.readouterr()
    assert run("convert", tmp_path / "nlu", tmp_path / "no", "--target", "vllm") == 2
    assert "classifier.dense.weight: of the modules trained in full, vLLM loads only" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_the_rank_that_a_checkpoint_was_trained_with_and_that_of_the_result(tmp_path: Path, capsys: Any) -> None:
    path, how = tmp_path / "ours.bin", ("--lora_alpha", 4, "--target_modules", "q")
    torch.save({"q.lora_A": torch.randn(4, 8), "q.lora_B": torch.randn(8, 4)}, path)
    assert run("inspect", path, "--rank", 4, *how) == run("inspect", path, "--trained_rank", 4, *how) == 0
    for words in (("convert", path, tmp_path / "a"), ("combine", path, "-o", tmp_path / "b")):
        assert run(*words, "--trained_rank", 4, *how, "--rank", 2) == 0
        assert lora.read_adapter(words[-1]).config.r == 2
        assert run(*words, "--rank", 4, *how) == 2
        assert "ours.bin does not store its settings, so it also needs --trained_rank" in capsys.readouterr().err
    # An adapter that stores its settings may stand beside one that does not.
    assert run("combine", path, tmp_path / "a", "-o", tmp_path / "c", "--trained_rank", 4, *how) == 0
    assert lora.read_adapter(tmp_path / "c").config.r == 6


def test_merge(adapter: str, adapted: Any, base: Path, tmp_path: Path, capsys: Any) -> None:
    assert run("merge", adapter, tmp_path / "m", "--dtype", "fp32", "--max_shard_size", "10KB") == 0
    shown = capsys.readouterr().out
    assert "explained by rounding" in shown
    assert "identical, bit for bit" in shown
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    torch.testing.assert_close(logits(fresh(tmp_path / "m")), logits(adapted), rtol=0, atol=1e-5)


def test_a_model_of_few_positions_is_checked_with_short_prompts(base: Path, tmp_path: Path, capsys: Any) -> None:
    small = tmp_path / "small"
    config = transformers.GPT2Config(vocab_size=98, n_embd=16, n_layer=1, n_head=2, n_positions=16, eos_token_id=1)
    transformers.GPT2LMHeadModel(config).save_pretrained(small)
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(small)
    model = fresh(small)
    lora.inject(model, LoraConfig(r=2, target_modules=["c_attn"]))
    torch.nn.init.ones_(model.transformer.h[0].attn.c_attn.lora_B)
    lora.save_adapter(model, tmp_path / "adapter")
    assert run("merge", tmp_path / "adapter", tmp_path / "merged", "--model", small) == 0
    assert run("inspect", tmp_path / "adapter", "--verify", small) == 0
    assert "All checks passed" in capsys.readouterr().out


def test_merge_writes_the_tokenizer_that_the_adapter_was_trained_with(
    adapter: str, base: Path, tmp_path: Path, capsys: Any
) -> None:
    shutil.copytree(adapter, tmp_path / "a")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.eos_token = "~"
    tokenizer.save_pretrained(tmp_path / "a")
    assert run("merge", tmp_path / "a", tmp_path / "m") == 0
    assert "tokenizer and chat template of the adapter" in capsys.readouterr().out
    written = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    assert (written.eos_token, written.chat_template) == ("~", tokenizer.chat_template)
    assert fresh(tmp_path / "m").generation_config.eos_token_id == [written.eos_token_id, 1]


@pytest.mark.filterwarnings("default")  # PEFT's
def test_tokens_that_were_added_go_into_the_merged_model(base: Path, tmp_path: Path, capsys: Any) -> None:
    import peft

    theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start>", "<stop>"]})
    theirs.resize_token_embeddings(len(tokenizer))
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        theirs.get_input_embeddings().weight.mul_(1.1)
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1)
    theirs.eval().save_pretrained(tmp_path / "a", save_embedding_layers=True)
    tokenizer.save_pretrained(tmp_path / "a")
    assert run("merge", tmp_path / "a", tmp_path / "m", "--model", base, "--dtype", "fp32") == 0
    assert "rows, as in the adapter" in capsys.readouterr().err
    X = torch.tensor([[5, 9, len(tokenizer) - 1, len(tokenizer) - 2]])
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(X).logits, theirs(X).logits, rtol=0, atol=1e-5)
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "m")) == merged.config.vocab_size


def test_nothing_is_written_over_what_it_was_made_from(adapter: str, base: Path, tmp_path: Path, capsys: Any) -> None:
    before = {path: path.read_bytes() for place in (Path(adapter), base) for path in place.iterdir()}
    assert run("merge", adapter, base, "--model", base) == 2
    assert "is the base model itself" in capsys.readouterr().err
    assert run("merge", adapter, adapter, "--model", base) == 2
    assert "is an input of this command and would be overwritten" in capsys.readouterr().err
    alias = tmp_path / "alias"
    alias.symlink_to(adapter, target_is_directory=True)
    for target in ("peft", "mlx", "vllm"):
        for output in (adapter, alias, f"{adapter}/."):
            assert run("convert", adapter, output, "--target", target, "--model", base) == 2
            assert "is an input of this command and would be overwritten" in capsys.readouterr().err
    assert run("combine", adapter, adapter, "-o", alias) == 2
    assert "is an input of this command and would be overwritten" in capsys.readouterr().err
    assert run("convert", f"{adapter}/adapter_config.json", adapter) == 2
    assert "is part of the adapter in" in capsys.readouterr().err
    assert run("convert", adapter, f"{adapter}/adapter_model.safetensors", "--target", "microsoft") == 2
    assert "is part of the adapter in" in capsys.readouterr().err
    assert run("convert", adapter, base) == 2
    assert "from_pretrained would load model and adapter together" in capsys.readouterr().err
    assert {path: path.read_bytes() for place in (Path(adapter), base) for path in place.iterdir()} == before


def test_another_formats_settings_are_not_overwritten(adapter: str, base: Path, tmp_path: Path, capsys: Any) -> None:
    assert run("convert", adapter, tmp_path / "a", "--target", "mlx", "--model", base) == 0
    assert run("convert", adapter, tmp_path / "a", "--target", "peft") == 2
    assert "contains an adapter in another format" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_loaded(
    adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr("loralib.cli._adapters.load_base", never)
    monkeypatch.setattr("loralib.cli._adapters.read_adapter", never)
    (tmp_path / "file").write_text("x", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    for words, expected in (
        (("merge", adapter, tmp_path / "file"), "there is a file where a directory is needed"),
        (("merge", adapter, tmp_path / "file" / "below"), "there is a file where a directory is needed"),
        (("convert", adapter, tmp_path / "file"), "there is a file where a directory is needed"),
        (
            ("convert", adapter, tmp_path / "folder", "--target", "llamacpp"),
            "is a directory, expected the name of a file",
        ),
        (("combine", adapter, "-o", tmp_path / "file"), "there is a file where a directory is needed"),
        (("convert", adapter, tmp_path / ("x" * 300)), "of"),
    ):
        assert run(*words) == 2, words
        assert expected in capsys.readouterr().err
    with hold_directory(tmp_path / "busy"):
        assert run("merge", adapter, tmp_path / "busy") == 2
        assert "is in use by another run" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_combine(adapter: str, adapted: Any, base: Path, tmp_path: Path, capsys: Any) -> None:
    half = ("-o", tmp_path / "half", "--weights", "0.25,0.25")
    assert run("combine", adapter, adapter, *half) == 0
    assert "rank 8" in capsys.readouterr().out
    assert run("combine", tmp_path / "half", tmp_path / "half", "-o", tmp_path / "whole", "--rank", 4) == 0
    lora.load_adapter(model := fresh(base), tmp_path / "whole")
    torch.testing.assert_close(logits(model), logits(adapted), rtol=0, atol=1e-4)
    assert run("combine", adapter, tmp_path / "half", "-o", tmp_path / "rest", "--subtract", "--rank", 4) == 0
    assert run("combine", tmp_path / "rest", tmp_path / "half", "-o", tmp_path / "sum") == 0
    lora.load_adapter(model, tmp_path / "sum")
    torch.testing.assert_close(logits(model), logits(adapted), rtol=0, atol=1e-4)
    assert run("combine", adapter, "-o", tmp_path / "small", "--energy", 0.8) == 0
    assert "of the squared norm kept" in capsys.readouterr().out
    assert run("combine", adapter, adapter, "-o", tmp_path / "t", "--method", "ties", "--density", 0.5) == 0
    assert run("combine", adapter, tmp_path / "half", "-o", tmp_path / "i", "--interpolate", 0.5) == 0
    assert "changes nothing" not in capsys.readouterr().out
    assert run("combine", adapter, adapter, "-o", tmp_path / "zero", "--weights", "1,-1") == 0
    assert "note: the result changes nothing" in capsys.readouterr().out


MISTAKES: list[tuple[tuple[str, ...], str]] = [
    (("inspect", "nowhere"), "nowhere does not exist"),
    (("convert", "nowhere", "out"), "nowhere does not exist"),
    (("convert", "ADAPTER", "out", "--rank", "0"), "--rank is 0"),
    (("convert", "ADAPTER", "out", "--target", "mlx", "--model", "nowhere/at/all"), "nowhere/at/all"),
    (("inspect", "FILE", "--lora_alpha", "4"), "x.bin does not store its settings, so it also needs --trained_rank"),
    (("inspect", "nowhere", "--lora_alpha", "4"), "nowhere does not exist"),
    *(
        ((*command, "--rank", "7", "--enable_lora", "q=1,0"), f"own settings; leave out {needless}")
        for command, needless in (
            (("inspect", "ADAPTER"), "--trained_rank, --enable_lora"),
            (("merge", "ADAPTER", "out"), "--trained_rank, --enable_lora"),
            (("convert", "ADAPTER", "out"), "--enable_lora"),
            (("combine", "ADAPTER", "ADAPTER", "-o", "out"), "--enable_lora"),
        )
    ),
    (("convert", "ADAPTER", ""), "the output is ''"),
    (("merge", "ADAPTER", " "), "the output is ' '"),
    (("merge", "ADAPTER"), "required: OUTPUT"),
    (("merge", "ADAPTER", "out", "-o", "other"), "'other' is a second output"),
    (("combine", "ADAPTER", "-o", ""), "the output is ''"),
    (("combine", "ADAPTER", "-o", "out", "--energy", "2"), "energy is 2"),
    (("combine", "ADAPTER", "ADAPTER", "-o", "out", "--method", "ties"), "density is None"),
    (("combine", "ADAPTER", "-o", "out", "--subtract"), "need exactly two adapters"),
    (("combine", "ADAPTER", "ADAPTER", "-o", "out", "--energy", "0.5"), "resizes a single adapter"),
    (("combine", "ADAPTER", "ADAPTER", "-o", "out", "--weights", "1"), "2 adapters and 1 weights"),
    (("combine", "ADAPTER", "ADAPTER", "-o", "out", "--weights", "1,x"), "'1,x' was given, expected numbers"),
    (("convert", "FILE", "out"), "--trained_rank, --lora_alpha, --target_modules"),
    (("convert", "FILE", "out", "--lora_dim", "4"), "so it also needs --lora_alpha, --target_modules"),
    (
        ("convert", "FILE", "o", "--lora_dim", "4", "--lora_alpha", "4", "--target_modules", "q", "--enable_lora", "2"),
        "expected a 1 or 0 for each block of each projection",
    ),
]


@pytest.mark.parametrize(("words", "expected"), MISTAKES)
def test_mistakes_get_one_message(
    words: tuple[str, ...], expected: str, adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"q.lora_A": torch.ones(4, 2), "q.lora_B": torch.ones(2, 4)}, "x.bin")
    assert run(*({"ADAPTER": adapter, "FILE": "x.bin"}.get(word, word) for word in words)) == 2
    told = capsys.readouterr().err
    assert expected in told
    assert "Traceback" not in told
    assert [path.name for path in tmp_path.iterdir()] == ["x.bin"]


@pytest.mark.parametrize("command", ["inspect", "convert", "merge", "combine", "export-base"])
def test_help_teaches(command: str, capsys: Any) -> None:
    assert run(command, "--help") == 0
    shown = capsys.readouterr().out
    assert f"loralib {command}" in shown
    assert "--model" in shown
    assert "--base" not in shown  # the second spelling
    assert "--requantize" not in shown  # which is refused


def test_export_base(base: Path, adapter: str, tmp_path: Path, capsys: Any) -> None:
    assert run("export_base", tmp_path / "b", "--model", base, "--dtype", "fp32") == 0  # with _ or - as in flags
    assert "identical, bit for bit" in capsys.readouterr().out
    X = torch.tensor([[5, 9, 20, 33]])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b").eval()
    with torch.no_grad():
        assert torch.equal(theirs(X).logits, fresh(base)(X).logits)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "b").eos_token == "<end>"
    for output, expected in (
        (base, "is an input of this command and would be overwritten"),
        (adapter, "contains an adapter"),
    ):
        assert run("export-base", output, "--model", base) == 2
        assert expected in capsys.readouterr().err


def test_the_default_base_is_exported_with_what_it_is(tmp_path: Path, capsys: Any) -> None:
    assert run("export-base", tmp_path / "b") == 0
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in (tmp_path / "b" / "README.md").read_text(encoding="utf-8")
    ours, _ = lora.load_base("smollm2-135m", dtype="bf16", device="cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.bfloat16)
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())


# The lines that use a result.


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("vllm", "vllm serve BASE --enable-lora --max-lora-rank 8 --lora-modules out=OUT"),
        ("mlx", "mlx_lm.generate --model BASE --adapter-path OUT --prompt TEXT"),
        ("llamacpp", "llama-cli -m BASE.gguf --lora OUT"),
        ("peft", "model = peft.PeftModel.from_pretrained(model, 'OUT')"),
    ],
)
def test_convert_says_how_to_use_the_result(
    target: str, expected: str, adapter: str, base: Path, tmp_path: Path, capsys: Any
) -> None:
    out = str(tmp_path / "out")
    assert run("convert", adapter, out, "--target", target, "--model", base) == 0
    shown = capsys.readouterr().out
    assert expected.replace("OUT", out).replace("BASE", str(base) if target != "llamacpp" else "BASE") in shown
    assert ("FROM ./BASE.gguf" in shown) == (target == "llamacpp")


def test_a_modelfile_has_the_template_as_ollama_writes_it(smollm2: tuple[Any, Any]) -> None:
    """The Modelfile's template renders like the model's own; replacements imitate Ollama's loop over messages."""
    tokenizer = smollm2[1]
    text = modelfile("lora.gguf", tokenizer)
    template = text.partition('TEMPLATE """')[2].partition('"""')[0]
    system = text.partition('SYSTEM """')[2].partition('"""')[0]
    loop = template.partition("{{ range .Messages }}")[2].partition("{{ end }}")[0]
    talk = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "So?"},
    ]
    turns = [{"role": "system", "content": system}, *talk]
    filled = [loop.replace("{{ .Role }}", each["role"]).replace("{{ .Content }}", each["content"]) for each in turns]
    ours = "".join(filled) + template.partition("{{ end }}")[2]
    assert ours == tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert 'PARAMETER stop "<|im_end|>"' in text
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
    assert "TEMPLATE" not in modelfile("lora.gguf", other)
