"""A run on a user's own data: automatic settings, what is recorded, and starting from an adapter."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import loralib as lora
from loralib import errors
from loralib.cli import main
from loralib.data import TokenExample
from loralib.formats import read_adapter
from loralib.injection import adapted_layers
from loralib.settings import read_toml
from loralib.training import plan, run_directory
from loralib.training.job import run_job
from loralib.training.learning_rate import automatic_learning_rate

VOCABULARY = 23


def tiny_model(positions: int = 64) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": positions}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=1, **sizes))


def row(prompt: int, length: int = 8) -> TokenExample:
    """A prompt of two tokens, and an answer."""
    ids = (3 + prompt % 20, 3 + prompt // 20, *[3 + place % 5 for place in range(length - 2)])
    return TokenExample(ids, (False, False, *[True] * (length - 2)))


def settings(tmp_path: Path, **changes: Any) -> lora.TrainConfig:
    return lora.TrainConfig(**{"output_dir": str(tmp_path / "run"), "rank": 2, "max_steps": 2, "lr": 1e-2, **changes})


def train(config: lora.TrainConfig, rows: Any = None, model: Any = None, **more: Any) -> Any:
    return lora.train(model or tiny_model(), rows or [row(number) for number in range(8)], config, **more)


# What it chooses.


def test_validation_data_are_split_off_with_prompts_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row(number // 4) for number in range(200)]
    result = train(settings(tmp_path), rows)
    assert "Validation: 8 of the 200 examples" in capsys.readouterr().out, "5 % in whole prompts of four"
    assert len(result.valid_losses) == 2
    whole = plan.make_plan(tiny_model(), rows, None, None, settings(tmp_path, valid_fraction=0.25), lambda _: None)
    starts = [{one.ids[:2] for one in part} for part in (whole.train, whole.valid)]
    assert (len(whole.valid), starts[0] & starts[1]) == (48, set())
    none = plan.make_plan(tiny_model(), rows, None, None, settings(tmp_path, valid_fraction=0), lambda _: None)
    assert (len(none.train), none.valid) == (200, [])


def test_examples_may_be_as_long_as_the_model_allows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*(row(number) for number in range(8)), row(9, 40), row(10, 70)]
    train(settings(tmp_path), rows)
    told = capsys.readouterr().out
    assert "Loaded 9 of 10 training examples (dropped 1 example: 1 longer than seq_len)" in told
    assert "Sequence length: 64 tokens (the model's context); the longest example has 70" in told
    assert "WARNING: 1 of 10 examples (10 %) are longer than 64 tokens" in told
    with pytest.raises(errors.ConfigError, match=r"only 64 positions: lower --seq_len to at most 64"):
        train(settings(tmp_path, seq_len=65), rows)


def test_plain_text_is_cut_into_windows(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base)
    config.max_position_embeddings = 4096
    config.save_pretrained(base)
    Path("a.txt").write_text("word " * 500, encoding="utf-8")
    more = ["--train_data", "a.txt", "--data_format", "text", "--batch_size", "1", "--max_steps", "1"]
    assert main([*command(base), *more]) == 0, capsys.readouterr().err
    assert "Sequence length: 1,024 tokens (plain text is cut into windows)" in capsys.readouterr().out


def test_memory_bounds_the_length_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def estimate(model: Any, tokens: int, *_: Any, **__: Any) -> tuple[float, float]:
        return 1000.0 * tokens, 8 * 70 * 1000 / 0.8

    monkeypatch.setattr(plan, "memory_estimate", estimate)
    told: list[str] = []
    rows = [row(number) for number in range(8)] + [row(9, 80)]
    made = plan.make_plan(tiny_model(128), rows, None, None, settings(tmp_path), told.append)
    assert made.config.seq_len == 8
    assert any(line.startswith("Sequence length: 64 tokens (memory, with 8 examples per step)") for line in told)


def test_ids_that_the_embedding_lacks_are_refused_before_anything_is_computed(tmp_path: Path) -> None:
    model = tiny_model()
    with pytest.raises(errors.DataError, match=r"training example 1 has 99"):
        train(settings(tmp_path), [TokenExample((3, 99, 4), (False, True, True))] * 8, model)
    assert not adapted_layers(model)
    assert not (tmp_path / "run").exists(), "nothing was written"


def test_the_learning_rate_is_chosen_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(settings(tmp_path, lr="auto", batch_size=4))
    said = capsys.readouterr().out
    tokens = float(re.search(r"([\d,]+) trained tokens per update", said).group(1))  # type: ignore[union-attr]
    rate, reason = automatic_learning_rate(0, 16, 4.0, tokens)
    assert f"Learning rate: {rate:g}, 4 times that for B ({reason})" in said
    assert read_toml(tmp_path / "run" / "run.toml", "run.toml")["lr"] == rate
    assert "does not state it" in automatic_learning_rate(10_000, None, 4.0, 4)[1]


def test_factors_that_were_cast_train_in_fp32(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model()
    lora.inject(model, lora.LoraConfig(r=2, target_modules="all-linear"))
    model.bfloat16()
    train(settings(tmp_path), model=model)
    assert "had been cast to bfloat16" in capsys.readouterr().out
    kinds = {tensor.dtype for _, layer in adapted_layers(model) for tensor in layer.trained_tensors().values()}
    assert kinds == {torch.float32}


def test_a_misspelt_setting_is_told_what_it_may_mean() -> None:
    with pytest.raises(
        errors.ConfigError, match=r"TrainConfig does not have these settings:\n  num_epoch. Did you mean 'num_ep"
    ):
        lora.TrainConfig(num_epoch=3)  # type: ignore[call-arg]
    with pytest.raises(errors.ConfigError, match=r"lora_alhpa. Did you mean 'lora_alpha'"):
        lora.LoraConfig(lora_alhpa=3)  # type: ignore[call-arg]
    with pytest.raises(errors.ConfigError, match=r"lr is 'fast', expected a number above 0, or auto"):
        lora.TrainConfig(lr="fast")  # type: ignore[arg-type]


# What it leaves.


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A directory with a tiny model, and data beside it; the current directory."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = ["<pad>", "<s>", "</s>", *map(chr, range(33, 127)), "\u0120", "\u010a"]
    tokens = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(letters), max_position_embeddings=64, **sizes))
    model.save_pretrained(tmp_path / "base")
    PreTrainedTokenizerFast(
        tokenizer_object=tokens, eos_token="</s>", bos_token="<s>", pad_token="<pad>"
    ).save_pretrained(tmp_path / "base")
    lines = [json.dumps({"prompt": f"q{number} ", "completion": "abc"}) for number in range(8)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return str(tmp_path / "base")


def command(base: str, *more: str) -> list[str]:
    return ["train", "--model", base, "--train_data", "t.jsonl", "--max_steps", "2", "--rank", "2", *more]


def test_run_toml_repeats_the_run(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(base, "--output_dir", "one", "--lr", "0.01")) == 0
    assert "data files" in (tmp_path / "one" / "README.md").read_text(encoding="utf-8")
    record = read_toml(tmp_path / "one" / "run.toml", "run.toml")["record"]
    assert record["given"]["lr"] == 0.01
    assert record["data"][1]["sha256"]
    assert record["result"]["step"] == 2
    assert {"python", "torch", "transformers", "loralib"} <= record["versions"].keys()
    assert main(["train", "--config", "one/run.toml", "--output_dir", "two"]) == 0, capsys.readouterr().err
    adapters = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two")]
    assert adapters[0] == adapters[1]


def test_an_earlier_run_is_moved_aside(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(base, "--output_dir", "run")) == 0
    before = (tmp_path / "run" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "run" / "notes.txt").write_text("mine", encoding="utf-8")
    assert main(command(base, "--output_dir", "run", "--seed", "1")) == 0
    assert "moved to" in capsys.readouterr().out
    kept = tmp_path / "run" / "previous-1"
    assert (kept / "adapter_model.safetensors").read_bytes() == before
    assert read_adapter(kept).tensors, "it is an adapter there"
    assert (tmp_path / "run" / "notes.txt").exists()
    assert main(command(base, "--output_dir", "run", "--overwrite")) == 0
    assert not (tmp_path / "run" / "previous-2").exists()


def test_training_goes_on_from_an_adapter(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(base, "--output_dir", "first")) == 0
    again = [
        "train",
        "--from_adapter",
        "first",
        "--train_data",
        "t.jsonl",
        "--max_steps",
        "2",
        "--output_dir",
        "second",
    ]
    assert main(again) == 0, capsys.readouterr().err
    told = capsys.readouterr().out
    assert "Continuing from first" in told
    assert f"Loading {base} ..." in told
    assert read_adapter(tmp_path / "second").config.r == 2
    assert main([*again, "--rank", "8"]) == 2
    assert "rank is 8, the adapter has 2" in capsys.readouterr().err
    with pytest.raises(errors.AdapterError, match="none of the modules that it adapts"):
        train(settings(tmp_path, from_adapter=str(tmp_path / "first")))


def test_an_output_in_the_way_is_refused_before_the_base_is_loaded(base: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert main(command("no-such-base", "--output_dir", "file/run")) == 2
    assert main(command(str(tmp_path / "missing"), "--output_dir", "new/run")) == 2
    assert not (tmp_path / "new").exists()


def test_a_picture_that_fails_costs_no_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> bool:
        raise ValueError("no fonts")

    monkeypatch.setattr(run_directory, "plot_losses", fail)
    result = train(settings(tmp_path))
    assert (result.output_dir / "adapter_model.safetensors").exists()
    assert "could not be drawn: no fonts" in capsys.readouterr().out


# The terminal.


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals of this kind")
def test_ctrl_c_in_the_demo_waits_for_what_it_started(tmp_path: Path) -> None:
    scripts = Path(__file__).resolve().parent.parent / "scripts"
    # What was started in the background, as the tests may be, ignores Ctrl+C unless it says otherwise.
    child = "import signal, time; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    child += "try:\n    print('up', flush=True); time.sleep(60)\nexcept KeyboardInterrupt:\n    "
    child += "time.sleep(1); print('saved', flush=True); raise SystemExit(130)"
    program = f"import sys; sys.path.insert(0, {str(scripts)!r}); import environment; "
    program += f"sys.exit(environment._call([sys.executable, '-c', {child!r}]))"
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=20)[0] == "saved\n"
    assert process.returncode == 130


def test_faults_of_both_files_are_listed_at_once(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completion": 3}\n', encoding="utf-8")
    (tmp_path / "valid.jsonl").write_text('{"prompt": 4, "completion": "b"}\n', encoding="utf-8")
    files = {"train_data": str(tmp_path / "train.jsonl"), "valid_data": str(tmp_path / "valid.jsonl")}
    with pytest.raises(lora.LoraError, match=r"train.jsonl(.|\n)*valid.jsonl"):
        run_job(lora.TrainConfig(**files, output_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_names_of_modules_that_cannot_be_read_are_told_with_other_settings() -> None:
    with pytest.raises(lora.LoraError, match=r"rank is -1(.|\n)*'q_proj\(', which is not a valid regular expression"):
        lora.TrainConfig(rank=-1, target_modules="q_proj(")
