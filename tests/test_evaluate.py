"""Scoring files: layouts of references, WebNLG's seen and unseen categories, slot errors, and error messages."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loralib.cli import main
from loralib.errors import ConfigError, DataError, MissingDependencyError
from loralib.nlg.evaluation import Texts, evaluate, metric_names, read_texts

REFERENCES = (("a pub by the river", "a riverside pub"), ("it is cheap",), ("the café has 5 stars", "a good café"))
HYPOTHESES = ("a pub by the river", "it is not cheap", "a café with 5 stars")
QUICK = ["BLEU", "ROUGE_L"]

Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("utf-8"))
        return path

    return write


@pytest.fixture
def hypothesis(write: Write) -> Path:
    return write("texts.txt", "\n".join(HYPOTHESES) + "\n")


def webnlg(categories: list[str]) -> str:
    entries = []
    for number, (category, texts) in enumerate(zip(categories, REFERENCES, strict=True), 1):
        triple = {"subject": f"S{number}", "property": "is", "object": "O"}
        lexicalisations = [{"lex": text, "comment": "good"} for text in texts]
        entries.append(
            {str(number): {"category": category, "modifiedtripleset": [triple], "lexicalisations": lexicalisations}}
        )
    return json.dumps({"entries": entries})


# --- layouts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("tail", ["", "\n", "\n\n"])
def test_groups(write: Write, hypothesis: Path, end: str, tail: str) -> None:
    text = "\n\n".join("\n".join(texts) for texts in REFERENCES) + tail
    reference = write("references.txt", text.replace("\n", end))
    assert read_texts(reference, hypothesis) == Texts(REFERENCES, HYPOTHESES)


def test_a_file_without_blank_lines_has_one_reference_each(write: Write, hypothesis: Path) -> None:
    reference = write("references.txt", "one\ntwo\nthree\n")
    assert read_texts(reference, hypothesis).references == (("one",), ("two",), ("three",))
    assert read_texts(reference, write("one.txt", "text\n")).references == (("one", "two", "three"),)


def test_groups_end_lines_where_the_official_scorer_does(write: Write) -> None:
    texts = read_texts(write("references.txt", "one\u2028two\n"), write("texts.txt", "1\x852\n"))
    assert texts == Texts((("one",), ("two",)), ("1", "2"))


@pytest.mark.parametrize("names", ["reference{}", "reference{}.txt", "all-notdelex-reference{}.lex", "references{}"])
def test_directory(write: Write, hypothesis: Path, names: str) -> None:
    for number in range(2):
        lines = [texts[number] if number < len(texts) else "" for texts in REFERENCES]
        path = write(f"refs/{names.format(number)}", "\n".join(lines) + "\n")
    write("refs/README", "no references")
    assert read_texts(path.parent, hypothesis) == Texts(REFERENCES, HYPOTHESES)
    start = path.parent / names.partition("{")[0]
    assert read_texts(start, hypothesis) == Texts(REFERENCES, HYPOTHESES)


def test_files_of_a_directory_are_taken_by_number(write: Write) -> None:
    for number in range(11):
        write(f"refs/reference{number}", f"text {number}\n")
    found = read_texts(write("refs/reference0", "text 0\n").parent, write("texts.txt", "text\n"))
    assert found.references == (tuple(f"text {number}" for number in range(11)),)


def test_e2e_data(write: Write, hypothesis: Path) -> None:
    meanings = ("name : A | near : B", "name : C", "name : D | food : Thai")
    rows = [f"{meaning}||{text}" for meaning, texts in zip(meanings, REFERENCES, strict=True) for text in texts]
    expected = Texts(REFERENCES, HYPOTHESES, meanings)
    assert read_texts(write("test.txt", "\n".join(rows)), hypothesis) == expected
    # Rows of one input need not stand together.
    rows.append(rows.pop(1))
    assert read_texts(write("test.txt", "\n".join(rows)), hypothesis) == expected


def test_webnlg_data_knows_what_was_seen(write: Write, hypothesis: Path) -> None:
    reference = write("test.json", webnlg(["Airport", "Artist", "Food"]))
    assert read_texts(reference, hypothesis) == Texts(REFERENCES, HYPOTHESES, (), (True, False, True))


def test_dart_and_converted_data(write: Write, hypothesis: Path) -> None:
    entries = [
        {"tripleset": [[f"S{number}", "IS", "O"]], "annotations": [{"text": text} for text in texts]}
        for number, texts in enumerate(REFERENCES)
    ]
    assert read_texts(write("dev.json", json.dumps(entries)), hypothesis) == Texts(REFERENCES, HYPOTHESES)
    rows = [
        json.dumps({"context": f"S{number} : is : O", "completion": text, "cate": number > 0})
        for number, texts in enumerate(REFERENCES)
        for text in texts
    ]
    texts = read_texts(write("dev.jsonl", "\n".join(rows)), hypothesis)
    assert texts == Texts(REFERENCES, HYPOTHESES, (), (False, True, True))


def test_a_source_tells_inputs_that_references_do_not(write: Write, hypothesis: Path) -> None:
    reference = write("references.txt", "\n\n".join("\n".join(texts) for texts in REFERENCES))
    source = write("test.json", webnlg(["Airport", "Artist", "Food"]))
    assert read_texts(reference, hypothesis, source=source).seen == (True, False, True)


# --- scores ------------------------------------------------------------------------------------------------------


def test_seen_and_unseen_are_scored_beside_all() -> None:
    texts = Texts(REFERENCES, HYPOTHESES, (), (True, False, True))
    done = evaluate(texts, QUICK)
    assert {name: part.hypotheses for name, part in done.subsets.items()} == {"seen": 2, "unseen": 1}
    alone = evaluate(Texts(REFERENCES[1:2], HYPOTHESES[1:2]), QUICK)
    assert done.subsets["unseen"].scores == alone.scores == evaluate(texts.subset("unseen"), QUICK).scores
    assert not evaluate(texts.subset("seen"), QUICK).subsets


def test_slot_errors_are_counted_where_meanings_are_known() -> None:
    texts = Texts(REFERENCES[:1], HYPOTHESES[:1], ("name : The Mill | area : riverside",))
    assert evaluate(texts, ["SER"]).scores["SER"].value == 0.5
    with pytest.raises(DataError, match="slot errors need meaning representations"):
        evaluate(Texts(REFERENCES[:1], HYPOTHESES[:1]), ["SER"])


def test_a_score_that_cannot_be_made_is_left_out_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> Any:
        raise MissingDependencyError("METEOR needs Java")

    monkeypatch.setitem(evaluate.__globals__["SCORES"], "METEOR", missing)
    texts = Texts(REFERENCES, HYPOTHESES)
    done = evaluate(texts)
    assert done.skipped == {"METEOR": "METEOR needs Java"}
    assert done.as_json()["METEOR"] is None
    assert list(done.scores) == ["BLEU", "NIST", "ROUGE_L", "CIDEr", "TER", "chrF"]
    with pytest.raises(MissingDependencyError):
        evaluate(texts, ["METEOR"])


def test_metric_names() -> None:
    assert metric_names(["cider", "ROUGE-L", "Bleu", "bleu"]) == ["CIDEr", "ROUGE_L", "BLEU"]
    with pytest.raises(ConfigError, match=r"(?s)'blue'\. Did you mean 'bleu'.*'xyz'"):
        metric_names(["blue", "xyz"])


# --- the command -------------------------------------------------------------------------------------------------


def test_json(write: Write, hypothesis: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference = write("test.json", webnlg(["Airport", "Artist", "Food"]))
    assert main(["evaluate", str(reference), str(hypothesis), "--json", "--metrics", *QUICK]) == 0
    value = json.loads(capsys.readouterr().out)
    scores = evaluate(Texts(REFERENCES, HYPOTHESES), QUICK).scores
    assert {name: value[name] for name in QUICK} == {name: score.value for name, score in scores.items()}
    assert value["signatures"] == {name: score.signature for name, score in scores.items()}
    assert value["subsets"].keys() == {"seen", "unseen"}


def test_table(write: Write, hypothesis: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference = write("test.json", webnlg(["Airport", "Artist", "Food"]))
    assert main(["evaluate", str(reference), str(hypothesis), "--metrics", *QUICK]) == 0
    out = capsys.readouterr().out
    assert "3 texts (2 seen, 1 unseen)" in out
    score = evaluate(Texts(REFERENCES, HYPOTHESES), QUICK).scores["BLEU"]
    assert f"{score.value:.4f}" in out
    assert score.signature in out


def test_empty_texts_are_scored_and_said(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    reference, texts = write("references.txt", "a b\n\nc d\n\ne f\n"), write("texts.txt", "a b\n\ne f\n")
    assert main(["evaluate", str(reference), str(texts), "--json", "--metrics", "ROUGE_L"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["ROUGE_L"] == pytest.approx(2 / 3)
    assert "1 of 3 texts are empty (line 2)" in captured.err


@pytest.mark.parametrize(
    "records",
    [
        [{"prompt": "x", "text": text} for text in HYPOTHESES],
        [{"id": number, "text": text} for number, text in reversed(list(enumerate(HYPOTHESES)))],
    ],
)
@pytest.mark.parametrize("layout", ["groups", "directory"])
def test_what_loralib_generate_wrote(write: Write, records: list[dict[str, Any]], layout: str) -> None:
    records[1]["text"] = "it is\n\nnot cheap "  # one text is one line for the scorers
    lines = "".join(json.dumps(record) + "\n" for record in records)
    if layout == "groups":
        reference = write("references.txt", "\n\n".join("\n".join(texts) for texts in REFERENCES))
    else:
        write("refs/reference0", "".join(f"{texts[0]}\n" for texts in REFERENCES))
        reference = write("refs/reference1", "".join(f"{texts[-1]}\n" for texts in REFERENCES)).parent
    assert read_texts(reference, write("texts.jsonl", lines + "\n")).hypotheses == HYPOTHESES


def test_json_lines_that_hold_no_texts(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    texts = write("texts.jsonl", '{"text": "x"}\n{"text": 3}\n[]\nx\n')
    assert main(["evaluate", str(write("references.txt", "a\nb\n")), str(texts)]) == 2
    error = capsys.readouterr().err
    assert "with 'text', but 3 lines do not match" in error
    assert "texts.jsonl:3: '[]'" in error


@pytest.mark.parametrize(
    ("reference", "texts", "flags", "message"),
    [
        ("a\n\nb\n", "x\n", [], "references for 2 inputs, but"),
        ("a\nb\n\nc\n", "x\ny\nz\n", [], "one per reference: write one text per input"),
        ("a\n\nb\n", "x\ny\n\n", [], "Blank lines at the end: 1; each one counts as a text"),
        ("a\n\n\nb\n", "x\ny\nz\n", [], "references.txt:3: a blank line where a reference was expected"),
        ("a\n\nb\n", "\n\n", [], "texts.txt is empty"),
        ("", "x\n", [], "references.txt is empty"),
        ("a\n", "x\n", ["--layout", "directory"], "contains no files reference0, reference1"),
        ("a\n", "x\n", ["--layout", "data"], "no `||`"),
        ("a\n", "x\n", ["--subset", "seen"], "cannot tell which inputs are seen"),
        ("a\n", "x\n", ["--metrics", "bluu"], "Did you mean 'bleu'?"),
        ("a\n", "x\n", ["--source", "none.txt"], "none.txt does not exist"),
    ],
)
def test_mistakes_give_one_message(
    write: Write, capsys: pytest.CaptureFixture[str], reference: str, texts: str, flags: list[str], message: str
) -> None:
    paths = [str(write("references.txt", reference)), str(write("texts.txt", texts))]
    assert main(["evaluate", *paths, *flags]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert not captured.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--layout", "grops"],
            "'grops' was given, expected one of auto, groups, directory, data. Did you mean 'groups'?",
        ),
        (["--subset", "seem"], "'seem' was given, expected one of all, seen, unseen. Did you mean 'seen'"),
    ],
)
def test_choices_are_checked_before_files_are_read(
    capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", "nowhere.txt", "nowhere.txt", *flags])
    assert message in capsys.readouterr().err


def test_directories_that_do_not_fit(write: Write, hypothesis: Path) -> None:
    folder = write("refs/reference0", "a\nb\nc\n").parent
    write("refs/reference1", "a\nb\n")
    with pytest.raises(DataError, match="differ in length"):
        read_texts(folder, hypothesis)
    write("refs/reference1", "a\n\nc\n")
    write("refs/reference0", "a\n\nc\n")
    with pytest.raises(DataError, match="line 2: blank in every file"):
        read_texts(folder, hypothesis)
    write("refs/seen-reference0", "a\nb\nc\n")
    with pytest.raises(DataError, match="two files number 0"):
        read_texts(folder, hypothesis)
    with pytest.raises(DataError, match="contains no files reference0"):
        read_texts(write("other/x.txt", "a").parent, hypothesis)


def test_a_source_of_other_size(write: Write, hypothesis: Path) -> None:
    reference = write("references.txt", "a\n\nb\n\nc\n")
    source = write("test.txt", "name : A||a\nname : B||b\n")
    with pytest.raises(DataError, match=r"2 inputs, but .* has 3 texts"):
        read_texts(reference, hypothesis, source=source)


# --- perplexity of a model ---------------------------------------------------------------------------------------

TINY = ["--perplexity", "--model", "scratch-32x1-seed0", "--dtype", "fp32", "--device", "cpu"]
ROWS = "name : A | food : Thai||A serves Thai food.\nname : A | food : Thai||Thai food at A.\nname : B||B is a pub.\n"


def test_perplexity_is_the_models_own_loss(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from loralib.bases.loading import load_base

    assert main(["evaluate", str(write("test.txt", ROWS)), *TINY, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    model, tokenizer = load_base("scratch-32x1-seed0", dtype="fp32", device="cpu")
    loss, tokens, words = 0.0, 0, 0
    for row in ROWS.splitlines():
        meaning, text = row.split("||")
        prompt, completion = (tokenizer(part)["input_ids"] for part in (f"{meaning}\n", text))
        completion.append(tokenizer.eos_token_id)
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].detach()
        loss += float(torch.nn.functional.cross_entropy(logits, torch.tensor(completion), reduction="sum"))
        tokens, words = tokens + len(completion), words + len(text.split())
    assert (found["texts"], found["tokens"], found["words"], found["dropped"]) == (3, tokens, words, 0)
    assert found["loss"] == pytest.approx(loss / tokens, rel=1e-5)
    assert found["PPL"] == pytest.approx(math.exp(loss / tokens), rel=1e-4)
    assert found["PPL_word"] == pytest.approx(math.exp(loss / words), rel=1e-4)
    assert found["signatures"] == {
        "PPL": "per:token|given:prompt|end:counted|words:blanks|log:e|version:1",
        "PPL_word": "per:word|given:prompt|end:counted|words:blanks|log:e|version:1",
    }


def test_texts_and_a_model_are_scored_together(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(write("test.txt", ROWS)), str(write("texts.txt", "A serves Thai food.\nB is a pub.\n"))]
    assert main(["evaluate", *paths, "--metrics", "BLEU", "SER", *TINY]) == 0
    out = capsys.readouterr().out
    for words in ("2 texts", "BLEU", "SER", "3 texts, ", "PPL_word"):
        assert words in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "there is nothing to score: give HYP, a file with one text per line, or use --perplexity"),
        (["texts.txt", "--adapter", "x", "--model", "y"], "--model needs --perplexity\n  --adapter needs --perplexity"),
        (
            ["texts.txt", "--dtype", "bf16", "--quantize", "nf4"],
            "--dtype needs --perplexity\n  --quantize needs",
        ),
        ([*TINY, "--subset", "seen", "--metrics", "BLEU"], "--subset needs HYP\n  --metrics needs HYP"),
        ([*TINY, "--adapter", "nowhere"], "nowhere"),
        ([*TINY, "--format", "dart"], "not JSON"),
    ],
)
def test_what_perplexity_refuses(
    write: Write, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main(["evaluate", str(write("test.txt", ROWS)), *flags]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert not captured.out


def test_a_model_whose_numbers_overflow_has_no_perplexity() -> None:
    import torch

    from loralib.bases.loading import load_base
    from loralib.data import Example
    from loralib.nlg.perplexity import perplexity

    model, tokenizer = load_base("scratch-32x1-seed0", dtype="fp32", device="cpu")
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(math.inf)
    with pytest.raises(ConfigError, match=r"the dtype overflows\. Load the model with dtype fp32"):
        perplexity(model, tokenizer, [Example.of("name : A\n", "A is a pub.")])
