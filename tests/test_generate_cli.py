"""loralib generate: sources of prompts, streamed text, and files that are resumed after a kill."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import loralib as lora
from loralib.bases.loading import load_tokenizer
from loralib.cli import main
from loralib.files import hold_file

TINY = ["--model", "scratch-32x1-seed0", "--max_new_tokens", "4"]
E2E = Path(__file__).resolve().parent.parent / "examples" / "NLG" / "data" / "e2e" / "test.txt"


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a small model with the default base's tokenizer."""
    directory = tmp_path_factory.mktemp("tiny")
    tokenizer = load_tokenizer()
    size = {"vocab_size": len(tokenizer), "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 96}
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**size)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def test_prompts_on_the_command_line_and_from_standard_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["generate", "Once upon", *TINY]) == 0
    first = capsys.readouterr().out
    assert first.strip()
    monkeypatch.setattr("sys.stdin", io.StringIO("\nOnce upon\n"))
    assert main(["generate", *TINY]) == 0
    assert capsys.readouterr().out == first


def test_input_that_is_no_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    assert main(["generate", *TINY]) == 2
    assert "standard input is not UTF-8 text: invalid continuation byte at byte 3." in capsys.readouterr().err


def test_only_line_feeds_separate_prompts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text from the web or a PDF contains other separators; Windows uses another code page and a byte-order mark."""
    lines = ["first\u2028part\x85of\x0bone\x0cprompt\x1c\x1d\x1e\u2029.", "Tiếng Việt"]
    piped = io.BytesIO("\ufeff{}\r\n\r\n{}".format(*lines).encode())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(piped, encoding="cp1252"))
    assert main(["generate", *TINY, "--output", str(tmp_path / "texts.jsonl")]) == 0
    assert [text["prompt"] for text in lines_of(tmp_path / "texts.jsonl")] == lines


@pytest.mark.parametrize("watched", [True, False], ids=["terminal", "pipe"])
def test_several_prompts_are_printed_in_order_and_drawn_with_seeds_of_their_own(
    watched: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = ["--temperature", "1", *TINY]
    texts = []
    for seed in ("5", "6"):
        assert main(["generate", "Once upon", *drawn, "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: watched, raising=False)
    assert main(["generate", "Once upon", "Once upon", *drawn, "--seed", "5"]) == 0
    assert capsys.readouterr().out == "\n".join(texts)
    assert texts[0] != texts[1]


@pytest.mark.parametrize("choice", [[], ["--temperature", "1.0", "--seed", "3"]], ids=["greedy", "sampled"])
def test_a_run_over_a_file_goes_on_where_it_was_killed(tmp_path: Path, choice: list[str]) -> None:
    source = tmp_path / "meanings.txt"
    source.write_text("".join(E2E.read_text(encoding="utf-8").splitlines(keepends=True)[:30]), encoding="utf-8")
    command = ["generate", "--input", str(source), "--batch", "3", *TINY, *choice]
    assert main([*command, "--output", str(tmp_path / "whole.jsonl")]) == 0
    whole = (tmp_path / "whole.jsonl").read_bytes()
    assert len({line["prompt"] for line in lines_of(tmp_path / "whole.jsonl")}) == whole.count(b"\n") > 4
    for cut in (1, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.jsonl").write_bytes(whole[:cut])
        assert main([*command, "--output", str(tmp_path / "cut.jsonl")]) == 0
        assert lines_of(tmp_path / "cut.jsonl") == lines_of(tmp_path / "whole.jsonl")


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_process_that_is_killed_leaves_whole_lines_and_the_next_one_goes_on(tmp_path: Path, tiny: Path) -> None:
    output = tmp_path / "texts.jsonl"
    rest = [
        "--input",
        str(E2E),
        "--batch",
        "1",
        "--model",
        str(tiny),
        "--max_new_tokens",
        "24",
        "--output",
        str(output),
    ]
    process = subprocess.Popen([sys.executable, "-m", "loralib", "generate", *rest], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 240
        while not (output.exists() and output.read_bytes().count(b"\n") >= 3):
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    before = output.read_bytes()
    assert main(["generate", *rest]) == 0
    assert output.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    prompts = [line["prompt"] for line in lines_of(output)]
    meanings = {line.split("||")[0] + "\n" for line in E2E.read_text(encoding="utf-8").splitlines()}
    assert before.count(b"\n") < len(prompts) == len(set(prompts)) == len(meanings)


def test_a_run_with_other_settings_does_not_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "texts.jsonl"
    command = ["generate", "Once", "upon", *TINY, "--output", str(output)]
    assert main(command) == 0
    whole = output.read_bytes()
    for content in (whole, whole[:-5]):
        output.write_bytes(content)
        assert main([*command, "--top_k", "3", "--temperature", "0.5"]) == 2
        error = capsys.readouterr().err
        assert "temperature: the default there, 0.5 now" in error
        assert "top_k: the default there, 3 now" in error
        assert output.read_bytes() == content
    assert main([*command, "--batch", "1"]) == 0
    assert output.read_bytes() == whole


def test_an_adapter_that_was_trained_again_is_another_setting(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = lora.load_base(str(tiny), dtype="fp32")
    lora.inject(model, lora.LoraConfig(r=2, target_modules=["c_attn"]))
    lora.save_adapter(model, tmp_path / "adapter")
    output = tmp_path / "texts.jsonl"
    command = ["generate", "Once", "upon", "--model", str(tiny), "--adapter", str(tmp_path / "adapter")]
    command += ["--max_new_tokens", "2", "--output", str(output)]
    assert main(command) == 0
    whole = output.read_bytes()
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).add_(1.0)
    lora.save_adapter(model, tmp_path / "adapter")
    capsys.readouterr()
    assert main(command) == 2
    assert "adapter: " in capsys.readouterr().err
    assert output.read_bytes() == whole


def test_triples_of_dart_and_webnlg(tmp_path: Path, tiny: Path) -> None:
    triple = {"subject": "Wharf", "property": "area", "object": "harbour"}
    text = {"lex": "It is there.", "comment": "good"}
    entry = {"category": "Food", "modifiedtripleset": [triple], "lexicalisations": [text]}
    files = {
        "dart": [{"tripleset": [["Wharf", "AREA", "harbour"]], "annotations": [{"source": "x", "text": "There."}]}],
        "webnlg": {"entries": [{"1": entry}]},
    }
    for name, content in files.items():
        source, output = tmp_path / f"{name}.json", tmp_path / f"{name}.jsonl"
        source.write_text(json.dumps(content), encoding="utf-8")
        command = ["generate", "--input", str(source), "--format", name, "--model", str(tiny), "--num_beams", "2"]
        assert main([*command, "--max_new_tokens", "3", "--output", str(output)]) == 0
        [line] = lines_of(output)
        assert "Wharf : area : harbour" in line["prompt"]
        assert line["made_with"] == {"model": str(tiny), "max_new_tokens": 3, "num_beams": 2}


def test_texts_of_a_base_in_other_bits_are_other_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "texts.jsonl"
    command = ["generate", "x", "y", *TINY, "--max_new_tokens", "2", "--output", str(output)]
    assert main([*command, "--quantize", "int8"]) == 0
    assert lines_of(output)[0]["made_with"]["quantize"] == "int8"
    output.write_text(output.read_text(encoding="utf-8").partition("\n")[0] + "\n", encoding="utf-8")
    assert main(command) == 2
    assert "other settings" in capsys.readouterr().err


def test_a_run_with_a_bias_on_tokens_is_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "texts.jsonl"
    command = ["generate", *TINY, "--max_new_tokens", "2", "--output", str(output), "--logit_bias"]
    assert main([*command, "5=100", "x", "y"]) == 0  # the prompts may stand behind it
    whole = output.read_bytes()
    output.write_bytes(whole.splitlines(keepends=True)[0])  # a run that was killed after its first text
    assert main([*command, "5=100", "x", "y"]) == 0
    assert output.read_bytes() == whole
    assert main([*command, "6=100", "x", "y"]) == 2
    assert "logit_bias" in capsys.readouterr().err


def messages(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def text_for_chat(tmp_path: Path, model: Path, turns: list[tuple[str, str]]) -> str:
    """What the command writes for a file with one chat."""
    chat, output = tmp_path / "chat.jsonl", tmp_path / "texts.jsonl"
    chat.write_text(json.dumps({"messages": messages(turns)}) + "\n", encoding="utf-8")
    rest = ["--model", str(model), "--dtype", "fp32", "--max_new_tokens", "6"]
    assert main(["generate", "--input", str(chat), *rest, "--output", str(output)]) == 0
    return str(lines_of(output)[0]["text"])


def test_a_chat_is_continued_where_its_last_answer_began(tmp_path: Path, tiny: Path) -> None:
    turns = [("user", "Hi"), ("assistant", "Hello."), ("user", "Where is it?"), ("assistant", "There.")]
    text = text_for_chat(tmp_path, tiny, turns)
    model, tokenizer = lora.load_base(str(tiny), dtype="fp32")
    asked = [{"role": role, "content": content} for role, content in turns[:-1]]
    text_before = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text_before, add_special_tokens=False)["input_ids"]
    [expected] = lora.generate(model, tokenizer, [ids], max_new_tokens=6)
    assert text == expected.text


def test_what_it_refuses(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = lora.load_base("scratch-32x1-seed0", dtype="fp32")
    lora.inject(model, lora.LoraConfig(r=2, target_modules=["c_attn"]))
    lora.save_adapter(model, tmp_path / "adapter")
    (tmp_path / "notes.jsonl").write_text("mine\n", encoding="utf-8")
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}', encoding="utf-8")
    (tmp_path / "text.jsonl").write_text('{"text": "Once upon a time"}\n', encoding="utf-8")
    (tmp_path / "long.jsonl").write_text(
        "".join(json.dumps({"prompt": "word " * n, "completion": "x"}) + "\n" for n in (1, 2, 500)), encoding="utf-8"
    )
    output = ["--output", str(tmp_path / "out.jsonl")]
    for command, words in (
        (["x", *TINY, "--output", str(tmp_path / "notes.jsonl")], "not written by this command"),
        (["x", *TINY, "--output", str(tmp_path / "data.jsonl")], "not written by this command"),
        (["x", *TINY, "--output", str(tmp_path)], "cannot continue"),
        (["x", *TINY, "--output", str(tmp_path / "notes.jsonl" / "out.jsonl")], "cannot"),
        (["--input", str(tmp_path / "none.txt"), *TINY, *output], "none.txt"),
        (["--input", str(tmp_path / "text.jsonl"), *TINY, *output], "text.jsonl:1 has no prompt"),
        (["--input", str(tmp_path / "long.jsonl"), "--model", str(tiny), "--batch", "1", *output], "prompt 3 has 50"),
        (["x", "--adapter", str(tmp_path), *TINY, *output], "contains no adapter"),
        (["x", "--adapter", str(tmp_path / "adapter"), "--model", str(tiny), *output], "c_attn"),
        (["x", *TINY, "--temperature", "-1", *output], "temperature"),
        (["x", *TINY, "--merge", *output], "--merge needs an adapter"),
        (["x", "", *TINY, *output], "prompt 2 is empty"),
        (["x " * 2000, *TINY, *output], "tokens"),
    ):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        assert main(["generate", *command]) == 2, command
        error = capsys.readouterr().err
        assert words in error, command
        assert "Traceback" not in error
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_two_runs_do_not_write_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "texts.jsonl"
    with hold_file(output, "--output"):
        assert main(["generate", "x", *TINY, "--output", str(output)]) == 2
    assert "texts.jsonl is in use by another run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_help_shows_no_default_where_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "(default 128)" in told
    assert "(default ())" not in told


def test_a_file_may_hold_nothing_but_prompts(tmp_path: Path) -> None:
    files = {
        "lines.txt": "Once upon a time\n\nname : The Wharf | area : harbour \n",
        "lines.jsonl": '{"prompt": "Once upon a time"}\n{"context": "name : The Wharf | area : harbour"}\n',
        "list.json": '[{"prompt": "Once upon a time"},\n {"context": "name : The Wharf | area : harbour"}]\n',
    }
    texts = []
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
        output = tmp_path / f"{name}.out"
        assert main(["generate", "--input", str(tmp_path / name), *TINY, "--output", str(output)]) == 0
        texts.append([(line["prompt"], line["text"]) for line in lines_of(output)])
    assert texts[0] == texts[1] == texts[2]
    assert [prompt for prompt, _ in texts[0]] == ["Once upon a time", "name : The Wharf | area : harbour\n"]


def test_a_chat_that_ends_with_a_question_gets_its_answer(tmp_path: Path, tiny: Path) -> None:
    turns = [("user", "Hi"), ("assistant", "Hello."), ("user", "Where is it?")]
    text = text_for_chat(tmp_path, tiny, turns)
    model, tokenizer = lora.load_base(str(tiny), dtype="fp32")
    prompt = tokenizer.apply_chat_template(messages(turns), tokenize=False, add_generation_prompt=True)
    [expected] = lora.generate(model, tokenizer, [tokenizer(prompt)["input_ids"]], max_new_tokens=6)
    assert text == expected.text


def test_several_stop_texts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "Once upon", *TINY]) == 0
    whole = capsys.readouterr().out
    assert main(["generate", "--stop", whole.strip()[-4:], "--stop", "not in it", "Once upon", *TINY]) == 0
    stopped = capsys.readouterr().out
    assert stopped != whole
    assert whole.startswith(stopped.rstrip("\n"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": 3}\n', "a.jsonl:2: prompt is a number"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "\\ud800"}\n', "lone surrogate"),
        ("a.jsonl", '{"prompt": "a"}\n{"promt": "b"}\n', "Did you mean 'prompt'?"),
        ("a.jsonl", '{"prompt": "a"}\nb\n', "a.jsonl:2: not JSON"),
        ("a.jsonl", '{"prompt": 3}\nb\n', "with prompt or messages, but 2 lines do not match"),
        ("a.json", '[{"prompt": "a"}, {"prompt": 3}]', "a.json[1]: prompt is a number"),
        ("a.jsonl", "\n", "is empty, expected one JSON object per line"),
        ("a.jsonl", '{"prompt": " "}\n', "a.jsonl:1 has no prompt"),
        ("a.txt", "name : A||It is A.\nname : B\n", "a.txt:2: no `||`"),
    ],
)
def test_files_that_hold_other_things(
    name: str, content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    output = tmp_path / "texts.jsonl"
    assert main(["generate", "--input", str(tmp_path / name), *TINY, "--output", str(output)]) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_a_prompt_that_is_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "caf\udce9", *TINY]) == 2  # what Python makes of a byte that is no UTF-8
    assert "prompt 1 is not text in the encoding" in capsys.readouterr().err


@pytest.fixture
def two(tmp_path: Path, tiny: Path) -> dict[str, Path]:
    """Two adapters of the tiny base, as directories."""
    directories = {}
    for seed, name in enumerate(("calm", "bold")):
        model, _ = lora.load_base(str(tiny), dtype="fp32")
        lora.inject(model, lora.LoraConfig(r=2, target_modules="all-linear"))
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(std=0.5)
        lora.save_adapter(model, tmp_path / name)
        directories[name] = tmp_path / name
    return directories


def named(two: dict[str, Path], tiny: Path, *rest: str) -> list[str]:
    adapters = [word for name, path in two.items() for word in ("--adapter", f"{name}={path}")]
    return [*adapters, "--model", str(tiny), "--dtype", "fp32", "--max_new_tokens", "4", "--temperature", "0", *rest]


def alone(tiny: Path, prompt: str, adapter: Path | None, capsys: pytest.CaptureFixture[str]) -> str:
    own = [] if adapter is None else ["--adapter", str(adapter)]
    capsys.readouterr()
    assert main(["generate", prompt, *own, *named({}, tiny)]) == 0
    return capsys.readouterr().out


def test_adapters_by_name_stand_side_by_side(
    tiny: Path, two: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    expected = [f"[{name}] {alone(tiny, 'Once upon', path, capsys)}" for name, path in two.items()]
    assert main(["generate", "Once upon", *named(two, tiny)]) == 0
    assert capsys.readouterr().out == "\n".join(expected)


def test_a_column_names_each_prompt_s_adapter_and_a_killed_run_goes_on(
    tmp_path: Path, tiny: Path, two: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    records = [("Once", "bold"), ("Once", "calm"), ("The", ""), ("A", "base"), ("Once", "bold")]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"prompt": p, "style": s}) + "\n" for p, s in records), encoding="utf-8")
    rest = ["--input", str(source), "--adapter_column", "style", "--output", str(output), "--batch", "2"]
    assert main(["generate", *named(two, tiny), *rest]) == 0
    lines = lines_of(output)
    assert [(line["prompt"], line["adapter"]) for line in lines] == [
        ("Once", "bold"), ("Once", "calm"), ("The", None), ("A", None)]  # fmt: skip
    for line in lines:
        assert f"{line['text']}\n" == alone(tiny, line["prompt"], two.get(line["adapter"] or ""), capsys)
    whole = output.read_bytes()
    output.write_bytes(whole[: len(whole) // 2])
    assert main(["generate", *named(two, tiny), *rest]) == 0
    assert output.read_bytes() == whole
    swapped = {"calm": two["bold"], "bold": two["calm"]}
    assert main(["generate", *named(swapped, tiny), *rest]) == 2
    assert "other settings" in capsys.readouterr().err


def test_what_it_refuses_of_adapters_by_name(
    tmp_path: Path, tiny: Path, two: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "Once", "style": "blod"}\n', encoding="utf-8")
    column = ["--input", str(source), "--adapter_column"]
    cases = [
        (["x", *named(two, tiny), "--adapter", "plain"], "plain: expected NAME=ADAPTER"),
        (["x", *named(two, tiny), "--adapter", f"calm={two['bold']}"], "calm: used twice"),
        (["x", *named(two, tiny), "--adapter", f"base={two['bold']}"], "base: not a valid name"),
        (["x", *named(two, tiny), "--merge"], "--merge takes a single adapter"),
        (["x", *named(two, tiny), "--adapter_column", "style"], "--adapter_column needs --input"),
        ([*named(two, tiny), *column, "style"], "blod. Did you mean 'bold'?"),
        ([*named(two, tiny), *column, "stile"], "no record of"),
    ]
    for words, said in cases:
        assert main(["generate", *words]) == 2
        assert said in capsys.readouterr().err, words
