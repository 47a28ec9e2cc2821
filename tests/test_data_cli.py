"""``loralib data``: what it shows, what it writes, and that it writes nothing when something is wrong."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loralib.cli import data as command
from loralib.cli import run_command
from loralib.data import load_examples
from loralib.errors import DataError, OutputError
from loralib.nlg import fetch as e2e
from loralib.nlg.convert import PredictedIds, decode_predictions, load_bpe
from loralib.nlg.published import Row
from loralib.training import TrainConfig

LETTERS = {"a": 0, "b": 1, "c": 2, "Ġ": 3, "ab": 4, "Ċ": 5, "<|endoftext|>": 6, "Ã": 7, "©": 8, "!": 9}


class Letters:
    """A tokenizer with one token per character."""

    bos_token_id = None
    eos_token_id = 0

    def __call__(self, text: str | list[str], **_: Any) -> dict[str, Any]:
        rows = [[ord(char) for char in row] for row in ([text] if isinstance(text, str) else text)]
        return {"input_ids": rows[0] if isinstance(text, str) else rows}

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(token) if token else "<end>" for token in ids)


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loralib.bases.load_tokenizer", lambda name: Letters())


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    folder = tmp_path / "vocabulary"
    folder.mkdir()
    (folder / "encoder.json").write_text(json.dumps(LETTERS), encoding="utf-8")
    (folder / "vocab.bpe").write_text("#version: 0.2\na b\n", encoding="utf-8")
    return folder


def run(*arguments: object) -> int:
    return run_command(command, "loralib data", [str(argument) for argument in arguments])


# --- preview -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("letters")
def test_preview_brackets_what_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("ab||cd\nab||a text of many letters\nab||\nab||ef\n", encoding="utf-8")
    assert run("preview", path, "--seq_len", 10, "--count", 1) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{path}: E2E (meaning representation||text), 4 examples\n\n")
    assert f"1. {path}:1: 6 tokens, 3 trained\na·b·\\n[c·d·<end>]\n" in shown
    assert f"dropped {path}:3: empty completion\n" in shown
    assert "2. " not in shown
    assert "\x1b" not in shown
    lines = {line.rsplit(None, 1)[0].strip(): line.rsplit(None, 1)[1] for line in shown.splitlines()[-10:-2]}
    assert lines == {
        "examples": "2",
        "of all in the data": "4",
        "different prompts": "1",
        "tokens": "12",
        "trained tokens": "6",
        "tokens of the longest": "6",
        "dropped: longer than seq_len": "1",
        "dropped: empty completion": "1",
    }


@pytest.mark.usefixtures("letters")
@pytest.mark.parametrize(
    ("flags", "tty", "no_color", "coloured"),
    [
        ([], True, None, True),
        ([], True, "", True),  # no-color.org: only a value that is not empty counts
        ([], True, "1", False),
        ([], False, None, False),
        (["--color", "always"], False, "1", True),
        (["--color", "never"], True, None, False),
    ],
)
def test_preview_colours_only_where_wanted(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    tty: bool,
    no_color: str | None,
    coloured: bool,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color is not None:
        monkeypatch.setenv("NO_COLOR", no_color)
    (tmp_path / "a.txt").write_text("a||b", encoding="utf-8")
    monkeypatch.setattr("sys.stdout.isatty", lambda: tty)
    assert run("preview", tmp_path / "a.txt", *flags) == 0
    shown = capsys.readouterr().out
    assert ("\x1b[2ma·\\n\x1b[0m\x1b[1;32mb·<end>\x1b[0m\n" in shown) == coloured
    assert ("a·\\n[b·<end>]\n" in shown) == (not coloured)


@pytest.mark.usefixtures("letters")
def test_preview_shows_characters_whole_and_lets_none_act_on_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], smollm2: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"prompt": "a\t", "completion": "\x1b[2J\r😀\u202e"}), encoding="utf-8"
    )
    monkeypatch.setattr("loralib.bases.load_tokenizer", lambda name: smollm2[1])
    assert run("preview", tmp_path / "a.jsonl") == 0
    shown = capsys.readouterr().out.split("\n")[3].replace("·", "")
    assert shown == "a\\t[\\x1b[2J\\r😀\\u202e<|im_end|>]"


@pytest.mark.usefixtures("letters")
@pytest.mark.parametrize("flag", ["--data_format", "--format"])
def test_preview_draws_and_reads_as_training_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    (tmp_path / "a.txt").write_text("plain\ntext", encoding="utf-8")
    assert run("preview", tmp_path / "a.txt", flag, "text") == 0
    assert "p[l·a·i·n·\\n·t·e·x·t·<end>]" in capsys.readouterr().out
    (tmp_path / "b.txt").write_text("".join(f"{i}||x\n" for i in range(40)), encoding="utf-8")
    assert run("preview", tmp_path / "b.txt", "--max_samples", "3") == 0
    config = TrainConfig()
    drawn = load_examples(tmp_path / "b.txt", Letters(), seq_len=config.seq_len, max_samples=3, seed=config.seed)
    shown = [line.split(" ")[1] for line in capsys.readouterr().out.split("\n") if "tokens, " in line]
    assert shown == [f"{text.source}:" for text in drawn.texts]
    assert run("preview", tmp_path / "b.txt", "--max_samples", "0", "--count", "0") == 0
    assert capsys.readouterr().out.split("\n\n")[1].split()[:2] == ["examples", "40"]


@pytest.mark.usefixtures("letters")
def test_preview_of_several_weighted_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text("".join(f"{i}||x\n" for i in range(4)), encoding="utf-8")
    assert run("preview", f"{tmp_path / 'one.txt'}:2", f"{tmp_path / 'two.txt'}:0.5", "--count", 0) == 0
    assert capsys.readouterr().out.split("\n\n")[1].split()[:2] == ["examples", "10"]


def test_mistakes_exit_with_2_before_a_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loralib.bases.load_tokenizer", lambda name: pytest.fail("too early"))
    (tmp_path / "a.txt").write_text("no bars", encoding="utf-8")
    assert run("preview", tmp_path / "a.txt") == 2
    assert "a.txt:1: no `||` in 'no bars'" in capsys.readouterr().err
    assert run("preview", tmp_path / "b.txt") == 2
    assert "does not exist" in capsys.readouterr().err
    assert run("convert", tmp_path / "a.txt", tmp_path / "out.jsonl", "--add_bos") == 2
    assert "give --vocab" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


# --- convert and decode --------------------------------------------------------------------------------------------


def test_convert_writes_text_or_ids(tmp_path: Path, vocabulary: Path) -> None:
    (tmp_path / "a.txt").write_text("ab||  ca \n", encoding="utf-8")
    assert run("convert", tmp_path / "a.txt", tmp_path / "a.jsonl") == 0
    assert (tmp_path / "a.jsonl").read_bytes() == b'{"context": "ab", "completion": "  ca"}\n'
    for source in ("a.txt", "a.jsonl"):  # published or formatted
        assert run("convert", tmp_path / source, tmp_path / "b", "--vocab", vocabulary, "--add_bos", "--add-eos") == 0
        assert (tmp_path / "b").read_bytes() == b'{"context": [4, 6], "completion": [3, 3, 3, 2, 0, 6]}\n'


def test_convert_takes_published_data_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.csv").write_text("question,answer\na,b\n", encoding="utf-8")
    assert run("convert", tmp_path / "a.csv", tmp_path / "a.jsonl") == 2
    assert "a.csv is csv, expected E2E, DART, WebNLG" in capsys.readouterr().err


@pytest.mark.usefixtures("letters")
def test_preview_maps_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.csv"
    path.write_text("frage;antwort;id\nWo?;Da.;1\n", encoding="utf-8")
    assert run("preview", path, "--columns", "prompt=frage,completion=antwort") == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{path}: prompt and completion, 1 example\n{path}: left out, ")
    assert "W·o·?[D·a·.·<end>]" in shown
    assert run("preview", path) == 2
    assert "found 'frage', 'antwort', 'id', expected prompt and completion" in capsys.readouterr().err


def test_what_is_read_is_not_written_over(
    tmp_path: Path, vocabulary: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = Path("a.txt")
    source.write_text("ab||ca\n", encoding="utf-8")
    assert run("convert", source, tmp_path / "a.txt") == 2
    assert "is also an input of this command and would be overwritten" in capsys.readouterr().err
    decode = ["decode", "--vocab", vocabulary, "--sample_file", "s", "--input_file", "reference0"]
    assert run(*decode, "--output_pred_file", "p", "--output_ref_file", "p") == 2
    assert "p is also another output of this command" in capsys.readouterr().err
    assert run(*decode, "--output_pred_file", "p", "--output_ref_file", ".", "--ref_type", "dart") == 2
    assert "reference0 is also an input of this command" in capsys.readouterr().err
    assert source.read_text(encoding="utf-8") == "ab||ca\n"
    assert not Path("p").exists()


def test_end_of_text_in_a_text_is_text(vocabulary: Path) -> None:
    # A row must not be able to end itself: only --add_eos writes the token.
    bpe = load_bpe(vocabulary)
    assert LETTERS["<|endoftext|>"] not in bpe.encode("ab<|endoftext|>a").ids


def test_decode(tmp_path: Path, vocabulary: Path) -> None:
    rows = [("y", "First Ref,ok", True), ("x", "other", False), ("y", " Second\n\ncut ", True)]
    lines = [json.dumps({"context": c, "completion": t, "cate": seen}) for c, t, seen in rows]
    (tmp_path / "in.jsonl").write_text("\n".join(lines), encoding="utf-8")
    written = {1: [0, 6, 1], 0: [9], 2: [3, 4, 7, 5, 0, 5, 5, 2]}  # the later prediction for "y" counts
    samples = [json.dumps({"id": i, "predict": ids}) for i, ids in written.items()]
    (tmp_path / "s.jsonl").write_text("\n".join(samples), encoding="utf-8")
    paths = ["--vocab", vocabulary, "--sample_file", tmp_path / "s.jsonl", "--input_file", tmp_path / "in.jsonl"]
    outputs = ["--output_pred_file", tmp_path / "p.txt", "--output_ref_file", tmp_path / "r"]
    assert run("decode", *paths, *outputs) == 0
    assert (tmp_path / "p.txt").read_text(encoding="utf-8") == "ab\ufffd\na\na\n"  # half a character; a line end stays
    assert (tmp_path / "r").read_text(encoding="utf-8") == "First Ref,ok\nSecond\n\nother\n\n"
    (tmp_path / "r").unlink()
    more = ["--ref_type", "webnlg", "--ref_num", 3, "--lower", "--tokenize", "--filter", "seen"]
    assert run("decode", *paths, *outputs, *more) == 0
    columns = [(tmp_path / "r" / f"reference{i}").read_text(encoding="utf-8") for i in range(3)]
    assert columns == ["first ref , ok\n", "second\n", "first ref , ok\n"]
    assert (tmp_path / "p.txt").read_text(encoding="utf-8") == "ab \ufffd a\n"


def test_predictions_that_do_not_belong(tmp_path: Path, vocabulary: Path) -> None:
    bpe = load_bpe(vocabulary)
    rows = [Row("a", "x"), Row("b", "y")]
    with pytest.raises(DataError) as caught:
        decode_predictions(rows, [PredictedIds(0, [1]), PredictedIds(2, [1]), PredictedIds(1, [99])], bpe)
    assert "id 2: the input only has rows 0 to 1" in str(caught.value)
    assert "id 1: token 99" in str(caught.value)
    with pytest.raises(DataError, match="no prediction for these contexts:\n  'b'"):
        decode_predictions(rows, [PredictedIds(0, [1])], bpe)
    with pytest.raises(DataError, match="needs rows with 'cate'"):
        decode_predictions(rows, [PredictedIds(0, [1]), PredictedIds(1, [1])], bpe, filter="seen")


@pytest.mark.parametrize(
    "line", ['{"id": true, "predict": [1]}', '{"id": 1, "predict": [-1]}', "[1]", "{", '{"id": 1}']
)
def test_sample_files_of_another_form(
    tmp_path: Path, vocabulary: Path, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_text('{"context": "a", "completion": "b"}', encoding="utf-8")
    (tmp_path / "s.jsonl").write_text(line, encoding="utf-8")
    paths = ["--vocab", vocabulary, "--sample_file", tmp_path / "s.jsonl", "--input_file", tmp_path / "in.jsonl"]
    assert run("decode", *paths, "--output_pred_file", tmp_path / "p", "--output_ref_file", tmp_path / "r") == 2
    assert "s.jsonl:1: " in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


def test_vocabularies_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither vocab\.json and merges\.txt nor"):
        load_bpe(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    (tmp_path / "vocab.json").write_text("{broken", encoding="utf-8")
    with pytest.raises(DataError, match="are not a BPE vocabulary"):
        load_bpe(tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": 0}', encoding="utf-8")
    with pytest.raises(DataError, match="has no token"):
        load_bpe(tmp_path)


# --- e2e -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small stand-in for the published files, and the checksums to go with it."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    files = {}
    for split, file in e2e._FILES.items():
        raw = f'mr,ref\r\n"name[{split}], eatType[pub]","A\n pub £."\r\n'.encode()
        (folder / file.name).write_bytes(raw)
        files[split] = file._replace(sha256=hashlib.sha256(raw).hexdigest(), size=len(raw), rows=1)
    monkeypatch.setattr(e2e, "_FILES", files)
    return folder


@pytest.fixture
def web(mirror: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(mirror))

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_e2e_is_fetched_checked_and_converted(tmp_path: Path, web: str, mirror: Path) -> None:
    for source in (web, str(mirror)):
        out = tmp_path / "out"
        assert run("e2e", out, "--source", source, "--overwrite") == 0
        assert sorted(path.name for path in out.iterdir()) == ["SOURCE.txt", "test.txt", "train.txt", "valid.txt"]
        assert (out / "valid.txt").read_text(encoding="utf-8") == "name : valid.txt | Type : pub||A pub £.\n"
        assert "CC" not in (out / "train.txt").read_text(encoding="utf-8")
        assert "ShareAlike 4.0" in (out / "SOURCE.txt").read_text(encoding="utf-8")


def test_e2e_with_another_checksum_writes_nothing(tmp_path: Path, mirror: Path) -> None:
    raw = (mirror / "testset_w_refs.csv").read_bytes()
    (mirror / "testset_w_refs.csv").write_bytes(raw.replace(b"pub", b"bar"))
    with pytest.raises(DataError, match=r"testset_w_refs\.csv has SHA-256 \w+, expected \w+"):
        e2e.fetch_e2e(tmp_path / "out", source=str(mirror))
    assert not (tmp_path / "out").exists()


def test_e2e_overwrites_only_when_told(tmp_path: Path, mirror: Path) -> None:
    (tmp_path / "valid.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match="--overwrite"):
        e2e.fetch_e2e(tmp_path, source=str(mirror))
    assert (tmp_path / "valid.txt").read_text(encoding="utf-8") == "mine"
    assert not (tmp_path / "train.txt").exists()


@pytest.mark.parametrize("source", ["http://127.0.0.1:9/none", "http://[bad", "no/such/directory"])
def test_e2e_without_a_network(tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str) -> None:
    assert run("e2e", tmp_path / "out", "--source", source) == 2
    message = capsys.readouterr().err
    assert "trainset.csv" in message
    assert "--source" in message
    assert not (tmp_path / "out").exists()
