"""run_training.py and run_inference.py: what they print, write and refuse."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import loralib as lora
from loralib.bases import load_tokenizer, save_tokenizer
from loralib.cli import main, run_command
from loralib.console import printable

ROOT = Path(__file__).resolve().parent.parent
NLG = ROOT / "examples" / "NLG"
TINY = ["--model", "scratch", "--hidden_dim", "32", "--num_layers", "1", "--max_train_samples", "8"]
TINY += ["--max_valid_samples", "4", "--lora_dim", "2"]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    load_file: Callable[[Path], ModuleType],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    """Runs a script or a command in an empty directory; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(name: str, *argv: str) -> tuple[int, str, str]:
        try:
            script = NLG / f"{name}.py"
            code = run_command(load_file(script), script.name, argv) if script.exists() else main([name, *argv])
        except SystemExit as stop:
            code = int(stop.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


@pytest.fixture(scope="module")
def tiny_adapter(load_file: Callable[[Path], ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the tiny scratch model, trained by the script."""
    directory = tmp_path_factory.mktemp("trained") / "lora_model"
    script = load_file(NLG / "run_training.py")
    assert run_command(script, "run_training.py", [*TINY, "--output_dir", str(directory)]) == 0
    return directory


# What it does.


def test_the_flags_of_the_guide_and_their_defaults(load_file: Callable[[Path], ModuleType]) -> None:
    config = lora.TrainConfig(**load_file(NLG / "run_training.py").DEFAULTS)
    assert (config.num_epochs, config.batch_size, config.rank, config.lr, config.seq_len) == (2, 4, 16, 1e-4, 64)
    assert (config.max_train_samples, config.max_valid_samples, config.output_dir) == (100, 64, "lora_model")
    assert (config.alpha, config.target_modules, config.model) == (32, "all-linear", "smollm2-135m")


def test_a_run_on_ones_own_data_has_defaults_for_it() -> None:
    config = lora.TrainConfig()
    assert (config.max_train_samples, config.seq_len, config.lr, config.valid_fraction) == (0, None, None, None)
    assert config == lora.TrainConfig(seq_len="auto", lr="auto", warmup_steps="auto")  # type: ignore[arg-type]


def test_training_tells_what_a_learner_wants_to_see(run: Run, tmp_path: Path) -> None:
    code, out, err = run("run_training", *TINY)
    assert code == 0, err
    for line in (
        r"Loaded 8 of [\d,]+ training examples",
        r"Loaded 4 of [\d,]+ validation examples",
        r"Total +[\d,]+ +100.00%",
        r"Trainable +[\d,]+ +\d+\.\d\d%",
        r"Frozen +[\d,]+ +\d+\.\d\d%",
        r"Before training: validation loss \d+\.\d{4} \(the base model\)",
        r"Epoch 2: average training loss \d+\.\d{4}, validation loss \d+\.\d{4}",
        r"Adapter: .*adapter_model.safetensors \(\d",
        r"can hardly learn",
    ):
        assert re.search(line, out + err), line
    assert (tmp_path / "lora_model" / "adapter_config.json").exists(), "output_dir is relative to where it is started"


def test_inference_shows_statistics_predictions_texts_and_merging(run: Run, tiny_adapter: Path) -> None:
    code, out, err = run("run_inference", "--adapter", str(tiny_adapter), "--max_new_tokens", "8", "--samples", "2")
    assert code == 0, err
    for line in (
        r"of \d+ tensors applied \(base model checked\)",
        r"Total +[\d,]+",
        r"input +\[2, 32\]",
        r"logits +\[2, 32, 50257\]",
        r"first ten predicted tokens: \[(\d+, ){9}\d+\]",
        r"  base  ",
        r"  adapted  ",
        r"  reference  ",
        r"they agree\.",
        r"writes the same text for 2 of 2 prompts",
    ):
        assert re.search(line, out), line


def test_several_adapters_show_switching(run: Run, tiny_adapter: Path) -> None:
    code, out, _ = run(
        "run_inference", "--adapter", str(tiny_adapter), str(tiny_adapter / "best"), "--prompt", "name : X",
        "--max_new_tokens", "4", "--no_merge",
    )  # fmt: skip
    assert code == 0
    assert "Switching between 2 adapters" in out
    assert re.search(r"best \(\d+(\.\d)? m?s\)", out)
    assert "Merged" not in out


def test_chats_are_shown_with_the_template_they_were_trained_with(run: Run, tmp_path: Path) -> None:
    tokenizer = load_tokenizer()
    settings = {"vocab_size": len(tokenizer), "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 96}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**settings))
    model.save_pretrained("base")
    tokenizer.save_pretrained("base")
    lora.inject(model, lora.LoraConfig(r=2, target_modules="all-linear", base_model_name_or_path="base"))
    lora.save_adapter(model, "adapter")
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}!"
    save_tokenizer(tokenizer, "adapter", chats=True)
    flags = ("--adapter", "adapter", "--max_new_tokens", "4")
    _, texts, err = run("generate", "--dtype", "fp32", *flags, "Hello there")
    assert "user's turn" in err
    code, out, err = run("run_inference", *flags, "--prompt", "Hello there", "--no_merge")
    assert code == 0, err
    assert "user's turn" in out
    assert "chat template" in err
    assert f"  {'adapted':<10} {' '.join(texts.split())}" in out


def test_the_historical_demo_network(run: Run, tmp_path: Path) -> None:
    code, out, err = run(
        "run_training", "--model", "run-demo", "--max_train_samples", "4", "--max_valid_samples", "2",
        "--num_epochs", "1", "--output_dir", "demo",
    )  # fmt: skip
    assert code == 0, err
    assert re.search(r"Total +87,752,033", out)
    assert re.search(r"Trainable +1,062,160 +1\.21%", out)
    assert re.search(r"Frozen +86,689,873 +98\.79%", out)
    assert re.search(r"pytorch_model.bin \(4.0[56] MB\)", out)  # torch 2.6 writes less around the tensors
    code, out, err = run("run_inference", "--adapter", "demo")
    assert code == 0, err
    assert re.search(r"input +\[2, 32\]\nlogits +\[2, 32, 50257\]", out)
    assert re.search(r"predicted tokens: \[(\d+, ){9}\d+\]", out)


def test_running_again_replaces_our_files_and_leaves_others(run: Run, tmp_path: Path) -> None:
    assert run("run_training", *TINY)[0] == 0
    ours = tmp_path / "lora_model" / "adapter_model.safetensors"
    before = ours.read_bytes()
    card = tmp_path / "lora_model" / "README.md"
    assert "LoRA adapter for scratch" in card.read_text(encoding="utf-8")
    for foreign in ("notes.txt", "README.md"):  # the directory may be a project, with a README of its own
        (tmp_path / "lora_model" / foreign).write_text("mine", encoding="utf-8")
    assert run("run_training", *TINY, "--seed", "1")[0] == 0
    assert ours.read_bytes() != before
    assert (tmp_path / "lora_model" / "notes.txt").read_text(encoding="utf-8") == card.read_text("utf-8") == "mine"
    assert not [path for path in (tmp_path / "lora_model").iterdir() if path.suffix == ".tmp"]


class Full(io.StringIO):
    """A stdout that accepts a few lines and then fails, like a pipe without a reader or a file on a full disk."""

    def __init__(self, error: type[OSError], most: int) -> None:
        super().__init__()
        self.error, self.most = error, most

    def write(self, text: str) -> int:
        self.most -= 1
        if self.most < 0:
            raise self.error(errno.ENOSPC, "No space left on device")
        return super().write(text)


@pytest.mark.parametrize("error", [BrokenPipeError, OSError])
def test_training_does_not_end_because_nobody_reads_what_it_prints(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[OSError]
) -> None:
    monkeypatch.setattr(sys, "stdout", Full(error, 5))
    code = main(["train", *TINY, "--train_data", str(NLG / "data" / "e2e" / "train.txt")])
    assert code == 0
    assert (tmp_path / "lora_model" / "adapter_config.json").exists()


@pytest.mark.parametrize(("error", "code", "told"), [(BrokenPipeError, 0, ""), (OSError, 2, "No space left on device")])
def test_output_that_cannot_be_printed_is_no_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: type[OSError], code: int, told: str
) -> None:
    monkeypatch.setattr(sys, "stdout", Full(error, 1))
    assert main(["data", "preview", str(NLG / "data" / "e2e" / "train.txt"), "--model", "scratch"]) == code
    assert told in capsys.readouterr().err


def test_the_exit_code_stays_where_nothing_can_be_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Full(OSError, 0))
    assert main(["inspect", "nowhere"]) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_run_whose_terminal_is_closed_saves_itself(tmp_path: Path) -> None:
    import pty

    argv = [*TINY, "--train_data", str(NLG / "data" / "e2e" / "train.txt"), "--max_steps", "100000"]
    child, terminal = pty.fork()
    if not child:  # a fork computes on one thread, having none of its parent's
        try:
            torch.set_num_threads(1)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
            os.chdir(tmp_path)
            sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, mode) for number, mode in enumerate("rww"))
            os._exit(main(["train", *argv]))
        finally:
            os._exit(1)  # never back into pytest
    shown = b""
    while b"loss " not in shown:  # of the progress bar
        shown += os.read(terminal, 4096)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 129, shown.decode()
    assert list((tmp_path / "lora_model" / "checkpoints").iterdir())


def test_a_toml_file_gives_settings_and_flags_win(run: Run, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(
        'model = "scratch"\nhidden_dim = 32\nnum_layers = 1\nlora_dim = 3\n', encoding="utf-8"
    )
    code, out, err = run(
        "run_training", "--config", "run.toml", "--max_train_samples", "4", "--num_epochs", "1", "--lora-dim", "2"
    )
    assert code == 0, err
    assert "r=2, lora_alpha=4" in out
    (tmp_path / "bad.toml").write_text("lora_rank = 3\n", encoding="utf-8")
    refused(run("run_training", "--config", "bad.toml"), "--config bad.toml", "lora_rank is not a setting")


def test_values_of_another_kind_in_a_toml_file(run: Run, tmp_path: Path) -> None:
    """Otherwise, a text in place of a boolean would count as true."""
    (tmp_path / "bad.toml").write_text(
        'packing = "no"\nseed = 1.5\nlr = true\nmodel = 3\noutput_dir = ["here"]\nenable_lora = 3\ntrain_data = [1]\n',
        encoding="utf-8",
    )
    lines = [
        "packing is 'no', expected true or false",
        "seed is 1.5, expected a whole number",
        "lr is True, expected a number",
        "model is 3, expected a string",
        "output_dir is ['here'], expected the name of a directory",
        "enable_lora is 3, expected a string or a table of lists of booleans or whole numbers",
        "train_data is [1], expected a string or a list of strings",
    ]
    refused(run("run_training", "--config", "bad.toml"), *lines)
    (tmp_path / "good.toml").write_text(
        'lr = 1\ntarget_modules = ["c_attn"]\nenable_lora = {c_attn = [true, false, true]}\npacking = false\n',
        encoding="utf-8",
    )
    code, out, err = run("run_training", *TINY, "--num_epochs", "1", "--config", "good.toml")
    assert code == 0, err
    assert "LoRA on c_attn (1 module)" in out


ALL_LETTERS = "name : Phở Hà Nội | price : £20 → 25 | rating : ★★★ 语言 🎉"


def test_what_is_redirected_never_crashes(tiny_adapter: Path, tmp_path: Path) -> None:
    """Even if Python uses a code page that lacks some characters of the text."""
    done = subprocess.run(
        [
            sys.executable, str(NLG / "run_inference.py"), "--adapter", str(tiny_adapter), "--max_new_tokens", "4",
            "--prompt", ALL_LETTERS,
        ],
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(NLG.parents[1])},
        cwd=tmp_path,
        capture_output=True,
        timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode("ascii", "replace")
    assert b"logits" in done.stdout


class Console(io.TextIOWrapper):
    """A console in a code page."""

    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding=encoding)

    def isatty(self) -> bool:
        return True

    def text(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)  # type: ignore[attr-defined]


@pytest.mark.parametrize("encoding", ["cp1252", "cp1258", "ascii"])
def test_consoles_that_are_not_utf8_never_crash(
    encoding: str, run: Run, tiny_adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, err = Console(encoding), Console(encoding)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    code, _, _ = run("run_inference", "--adapter", str(tiny_adapter), "--max_new_tokens", "4", "--prompt", ALL_LETTERS)
    assert code == 0, err.text()
    assert "logits" in out.text()
    assert printable(ALL_LETTERS, encoding) in out.text()


# What it refuses: one message, exit code 2, no traceback, nothing half-written.


def refused(result: tuple[int, str, str], *parts: str) -> None:
    code, _, err = result
    assert code == 2, err
    assert "Traceback" not in err
    for part in parts:
        assert part in err, (part, err)


def test_bad_training_files(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "lines.txt").write_text("name : A||A is a pub .\nno bars here\n\nnor here\n", encoding="utf-8")
    (tmp_path / "bytes.txt").write_bytes("name : Café||Café .\n".encode("latin-1"))
    refused(run("run_training", *TINY, "--train_data", "missing.txt"), "missing.txt")
    refused(run("run_training", *TINY, "--train_data", "empty.txt"), "empty.txt", "empty")
    refused(run("run_training", *TINY, "--train_data", "lines.txt"), "lines.txt", "2", "4", "||")
    refused(run("run_training", *TINY, "--train_data", "bytes.txt"), "bytes.txt", "UTF-8")
    assert not (tmp_path / "lora_model").exists()


@pytest.mark.parametrize("value", ["0", "-3"])
def test_a_rank_below_one(run: Run, tmp_path: Path, value: str) -> None:
    refused(run("run_training", *TINY[:-2], "--lora_dim", value), f"rank is {value}", "at least 1")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", ["-1", str(2**63)])
def test_a_seed_that_no_generator_takes(run: Run, value: str) -> None:
    refused(run("run_training", *TINY, "--seed", value), f"seed is {value}", "of at least 0 and below")


def test_an_output_directory_that_cannot_be_written(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    refused(run("run_training", *TINY, "--output_dir", "file"), "cannot write", "file")
    refused(run("run_training", *TINY, "--output_dir", "file/below"), "cannot write")
    refused(run("run_training", *TINY, "--output_dir", "a\0b"), "cannot be the name of a directory")
    refused(run("run_training", *TINY, "--output_dir", ""), "output_dir is '', expected the name of a directory")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_sizes_with_a_pretrained_model(run: Run) -> None:
    refused(run("run_training", "--hidden_dim", "64"), "hidden_dim", "pretrained")


def test_wrong_flags_and_commands_are_told_what_they_may_have_meant(run: Run) -> None:
    refused(run("run_training", "--lora_dmi", "8", "--batchsize", "3"), "--lora_dim", "--batch_size")
    refused(run("tarin"), "Did you mean 'train'?")
    refused(run("run_training", "--lr", "fast"), "--lr", "'fast'", "expected a number")
    refused(run("run_training", "--dtype", "bf61"), "--dtype", "auto, fp32", "Did you mean 'bf16'?")
    refused(run("data", "prewiev", "x.txt"), "preview, convert", "Did you mean 'preview'?")


def test_a_value_that_looks_like_a_flag_stays_as_it_is(run: Run, tiny_adapter: Path) -> None:
    adapter = ("--adapter", str(tiny_adapter), "--max_new_tokens", "1", "--no-merge")
    code, out, err = run("run_inference", *adapter, "--prompt", "-- a well-known place --")
    assert code == 0, err
    assert "-- a well-known place --" in out


def test_what_the_declared_tool_could_not_compute_is_refused_before_training(run: Run, tmp_path: Path) -> None:
    tied_head = ("--target_modules", "wte,c_attn", "--target", "llamacpp")
    refused(run("run_training", *TINY, *tied_head), "llama.cpp would apply this adapter incorrectly", "wte")
    assert not (tmp_path / "lora_model").exists()
    assert run("run_training", *TINY, "--target", "llamacpp", "--num_epochs", "1")[0] == 0


def test_directories_that_hold_no_adapter(run: Run, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    refused(run("run_inference", "--adapter", "nothing"), "nothing", "contains no adapter", "adapter_config.json")
    refused(run("run_inference", "--adapter", "nowhere"), "does not exist")
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    refused(run("run_inference", "--adapter", "notes.txt"), "notes.txt is not an adapter; expected a directory")
    refused(run("run_inference", "--adapter", ""), "expected the directories of one or more adapters")


def test_a_checkpoint_that_does_not_say_its_settings(run: Run, tiny_adapter: Path) -> None:
    result = run("run_inference", "--adapter", str(tiny_adapter / "pytorch_model.bin"))
    refused(result, "contains no settings", "`loralib convert` with --trained_rank")


def test_an_adapter_for_another_base(run: Run, tiny_adapter: Path) -> None:
    refused(run("run_inference", "--adapter", str(tiny_adapter), "--model", "run-demo"))


def test_one_of_several_adapters_for_another_base(run: Run, tiny_adapter: Path, tmp_path: Path) -> None:
    """The error is raised before anything is shown of the first one."""
    model, _ = lora.load_base("scratch", hidden_dim=32, num_layers=1, seed=1, dtype="fp32")
    lora.inject(model, lora.LoraConfig(r=2, target_modules=["c_attn"]))
    lora.save_adapter(model, tmp_path / "other")
    result = run("run_inference", "--adapter", str(tiny_adapter), "other", "--prompt", "name : X")
    refused(result, "other: the adapter was trained on a base model with the same shapes but different values")
    assert [line.partition(" ")[0] for line in result[1].splitlines()] == ["Loading"]


def test_test_data_is_looked_for_before_the_base_is_loaded(run: Run, tiny_adapter: Path) -> None:
    result = run("run_inference", "--adapter", str(tiny_adapter), "--test_data", "none.txt")
    refused(result, "none.txt")
    assert result[1] == ""


def copied(adapter: Path, directory: Path) -> Path:
    directory.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (directory / name).write_bytes((adapter / name).read_bytes())
    return directory


def test_a_truncated_file(run: Run, tiny_adapter: Path, tmp_path: Path) -> None:
    weights = copied(tiny_adapter, tmp_path / "cut") / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(run("run_inference", "--adapter", "cut"), "adapter_model.safetensors", "truncated")


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("broken_into",)


def test_a_hostile_pickle_runs_nothing(run: Run, tiny_adapter: Path, tmp_path: Path) -> None:
    directory = copied(tiny_adapter, tmp_path / "hostile")
    (directory / "adapter_model.safetensors").unlink()
    torch.save({"a.lora_A": Hostile()}, directory / "adapter_model.bin", pickle_module=pickle)
    result = run("run_inference", "--adapter", "hostile")
    words = ("would run as code when loaded (", "mkdir). Ask for a safetensors file.")
    refused(result, "adapter_model.bin was not loaded", *words)
    assert not (tmp_path / "broken_into").exists()


def test_a_hub_that_cannot_be_reached(run: Run) -> None:
    refused(run("run_training", "--model", "nobody/nothing-here", "--max_train_samples", "4"), "nobody/nothing-here")


def test_debug_shows_the_traceback(run: Run) -> None:
    with pytest.raises(lora.LoraError):
        run("run_inference", "--adapter", "nowhere", "--debug")


# It really learns: the default base, the default flags, and no package but those that it pins.


@pytest.fixture(scope="module")
def default_run(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The demo, with fewer updates, as it runs where nothing is installed but its pins: what it said and what it left.

    Both tests need a whole run on the default base, of which there is one.
    """
    # Where test.py converted the base a moment ago, it did so in the same way.
    cache = os.environ.get("LORALIB_CONVERTED_ALONE", str(tmp_path_factory.mktemp("cache")))
    training = f"{NLG / 'run_training.py'}|--max_steps|12|--max_valid_samples|24"
    inference = f"{NLG / 'run_inference.py'}|--samples|5|--max_new_tokens|32|--no_merge"
    merging = f"{NLG / 'run_inference.py'}|--samples|1|--max_new_tokens|2"
    directory = tmp_path_factory.mktemp("default")
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "alone.py", training, inference, merging],
        env={**os.environ, "LORALIB_CACHE": cache, "PYTHONPATH": str(ROOT)},
        cwd=directory,
        capture_output=True,
        encoding="utf-8",
    )
    return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr, adapter=directory / "lora_model")


def test_the_demo_needs_no_package_beyond_its_pins(default_run: SimpleNamespace) -> None:
    """The test environment has more packages, which hid that accelerate was missing to convert the base."""
    assert default_run.code == 0, default_run.err
    told = "once" in default_run.err
    assert told or "LORALIB_CONVERTED_ALONE" in os.environ, "the base was not converted anew"
    assert "The merged model writes the same text for 1 of 1 prompt" in default_run.out


def test_the_default_run_learns(default_run: SimpleNamespace) -> None:
    """After 12 updates the loss is lower and texts end by themselves; benchmarks/learns.py has the whole claim."""
    assert default_run.code == 0, default_run.err
    lines = (default_run.adapter / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    valid = [event["loss"] for event in map(json.loads, lines) if event["event"] == "valid"]
    assert valid[-1] <= 0.65 * valid[0]
    ended = re.search(r"base (\d+), adapted (\d+), of 5", default_run.out)
    assert ended is not None
    assert int(ended[2]) >= 4
