"""loralib chat: turns with the model's template, a history that fits its context, and every way to leave."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import loralib as lora
from loralib.bases.loading import load_tokenizer
from loralib.cli import main
from loralib.cli.chat import Conversation
from loralib.generation import Generator, Sampling

CONTEXT = 96
GREEDY = Sampling(max_new_tokens=8)


def save(directory: Path, template: bool) -> Path:
    tokenizer = load_tokenizer()
    size = {"vocab_size": len(tokenizer), "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": CONTEXT}
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**size)).save_pretrained(directory)
    if not template:
        tokenizer.chat_template = None
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("tiny"), template=True)


@pytest.fixture(scope="module")
def parts(tiny: Path) -> tuple[Any, Any]:
    return lora.load_base(str(tiny), dtype="fp32")


def chat(lines: str, monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    return main(["chat", "--max_new_tokens", "6", "--temperature", "0", "--dtype", "fp32", *flags])


def test_each_piped_line_gets_the_answer_to_the_whole_talk(
    parts: Any, tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chat("Hi\n\nAnd?\n", monkeypatch, "--model", str(tiny), "--system", "Be short.") == 0
    model, tokenizer = parts
    turns: list[dict[str, str]] = [{"role": "system", "content": "Be short."}]
    expected = ""
    for question in ("Hi", "And?"):
        turns.append({"role": "user", "content": question})
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = lora.generate(model, tokenizer, [ids], max_new_tokens=6)[0].text
        turns.append({"role": "assistant", "content": answer})
        expected += answer + "\n"
    assert capsys.readouterr().out == expected


def test_commands(tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        chat("/retry\nHi\n/reset\nHi\n/retry\n/help\n/rset\n/exit\nnever read\n", monkeypatch, "--model", str(tiny))
        == 0
    )
    out, err = capsys.readouterr()
    first, again, *others = out.splitlines()
    assert first == again == others[0]
    assert len(others) == 1
    for words in ("nothing has been asked yet", "(new conversation)", "/exit    leave", "Did you mean '/reset'"):
        assert words in err


def test_an_adapter_answers(
    parts: Any, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = lora.load_base(str(tiny), dtype="fp32")
    lora.inject(model, lora.LoraConfig(r=2, target_modules=["c_attn"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=50, generator=torch.Generator().manual_seed(1))
    lora.save_adapter(model, tmp_path / "adapter")
    assert chat("Hi\n", monkeypatch, "--model", str(tiny)) == 0
    base = capsys.readouterr().out
    assert chat("Hi\n", monkeypatch, "--model", str(tiny), "--adapter", str(tmp_path / "adapter")) == 0
    assert capsys.readouterr().out != base


def test_the_oldest_turns_are_forgotten_where_the_context_ends(parts: Any, capsys: pytest.CaptureFixture[str]) -> None:
    talk = Conversation(*parts, GREEDY, system="Be kind.")
    for number in range(9):
        talk.answer(f"Question number {number}, please?")
        assert len(talk._ids(talk.turns)) <= CONTEXT + 8
    assert len(talk.turns) < 18
    assert talk.turns[-2]["content"] == "Question number 8, please?"
    assert talk._ids(talk.turns)[:3] == Conversation(*parts, GREEDY, system="Be kind.")._ids([])[:3]
    assert f"turns were dropped: the model's context has {CONTEXT} tokens" in capsys.readouterr().err


def test_a_turn_longer_than_the_context_is_left_out(parts: Any, capsys: pytest.CaptureFixture[str]) -> None:
    talk = Conversation(*parts, GREEDY)
    talk.answer("Hi")
    before = list(talk.turns)
    talk.answer("word " * 200)
    assert "It was ignored" in capsys.readouterr().err
    assert talk.turns == before


def test_ctrl_c_stops_the_answer_and_not_the_talk(
    parts: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = Conversation(*parts, GREEDY)
    step, steps = Generator.step, iter(range(3))

    def interrupted(self: Generator) -> Any:
        if next(steps) == 2:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Generator, "step", interrupted)
        talk.answer("Hi")
    assert capsys.readouterr().out.endswith(" ...\n")
    assert [turn["role"] for turn in talk.turns] == ["user", "assistant"]
    talk.answer("And?")
    assert len(talk.turns) == 4


def test_ctrl_c_at_the_prompt_and_the_end_of_a_terminals_input(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    answers = iter([KeyboardInterrupt, "Hi", EOFError])

    def typed(prompt: str = "") -> str:
        answer = next(answers)
        if isinstance(answer, str):
            return answer
        raise answer

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", typed)
    assert main(["chat", "--model", str(tiny), "--max_new_tokens", "3"]) == 0
    out, err = capsys.readouterr()
    assert out.strip()
    assert "(/exit quits)" in err


def test_a_console_without_unicode_and_input_that_is_none(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", output)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\nHi\n"), encoding="utf-8"))
    assert main(["chat", "--model", str(tiny), "--max_new_tokens", "20", "--temperature", "5", "--top_p", "1"]) == 0
    output.flush()
    assert output.buffer.getvalue().count(b"\n") >= 2  # type: ignore[attr-defined]
    assert sys.stdout is output


def test_a_model_without_a_template(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = save(tmp_path / "plain", template=False)
    assert chat("Hi\n", monkeypatch, "--model", str(directory)) == 2
    assert "no chat template" in capsys.readouterr().err
    assert chat("Hi\nAnd?\n", monkeypatch, "--model", str(directory), "--plain") == 0
    assert capsys.readouterr().out.count("\n") >= 2
    model, tokenizer = lora.load_base(str(directory), dtype="fp32")
    talk = Conversation(model, tokenizer, GREEDY, system="Be kind.", plain=True)
    talk.turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    ids = talk._ids([*talk.turns, {"role": "user", "content": "And?"}])
    assert tokenizer.decode(ids) == "Be kind.\nUser: Hi\nAssistant: Hello.\nUser: And?\nAssistant:"


def test_a_beam_search_is_refused(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--model", str(tiny), "--num_beams", "3", "--temperature", "0", "--top_p", "1"]) == 2
    assert "chat prints text as it is generated, which beam search cannot do" in capsys.readouterr().err
