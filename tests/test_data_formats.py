"""One set of examples in every format that people have it in; fields, columns, and files that are broken."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loralib.data import Example, Source, encode, load_examples, read_examples, read_sources
from loralib.data.examples import Turn
from loralib.data.fields import parse_columns
from loralib.data.readers import guess_format, read_prompts
from loralib.errors import DataError, MissingDependencyError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

PAIRS = [("Where is it?", "By the river\u2028bank."), ('Who, exactly; "they"?', "Họ."), ("2+2=", "4\n5")]
RECORDS = [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS]


def jsonl(records: list[dict[str, Any]]) -> bytes:
    return "\n".join(json.dumps(record, ensure_ascii=False) for record in records).encode()


def parquet(records: list[dict[str, Any]]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records), out)
    return out.getvalue()


def arrow(records: list[dict[str, Any]], new: Callable[..., Any] = pa.ipc.new_file) -> bytes:
    table, out = pa.Table.from_pylist(records), io.BytesIO()
    with new(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue()


def delimited(records: list[dict[str, Any]], mark: str) -> bytes:
    rows = [list(records[0]), *(record.values() for record in records)]
    return "\r\n".join(mark.join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows).encode()


FILES = {
    "a.jsonl": jsonl(RECORDS),
    "a.ndjson": b"\xef\xbb\xbf" + jsonl(RECORDS).replace(b"\n", b"\r\n"),
    "a.json": json.dumps(RECORDS, indent=1).encode(),
    "lines.json": jsonl(RECORDS),
    "lines.txt": jsonl(RECORDS),
    "a.csv": delimited(RECORDS, ","),
    "semicolons.csv": delimited(RECORDS, ";"),
    "a.tsv": delimited(RECORDS, "\t"),
    "a.parquet": parquet(RECORDS),
    "a.arrow": arrow(RECORDS),
    "stream.arrow": arrow(RECORDS, pa.ipc.new_stream),
    "of-another-name.jsonl": parquet(RECORDS),
    "a.jsonl.gz": gzip.compress(jsonl(RECORDS)),
    "a.csv.gz": gzip.compress(delimited(RECORDS, ",")),
    "a.parquet.gz": gzip.compress(parquet(RECORDS)),
    "unpacked.jsonl.gz": jsonl(RECORDS),
}


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def one(tmp_path: Path, record: Any, **how: Any) -> Example:
    (example,) = read_examples(write(tmp_path / "a.jsonl", json.dumps(record)), **how)
    return example


def turns(example: Example) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in example.messages]


def refused(tmp_path: Path, name: str, content: bytes | str, **how: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_sources(write(tmp_path / name, content), **how)
    return str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_every_file_format_gives_the_same_examples(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, FILES[name])
    (source,) = read_sources(str(path))
    assert [(example.prompt, example.completion) for example in source.examples] == PAIRS
    assert source.notes == (f"{path}: prompt and completion, 3 examples",)
    assert all(example.source.startswith(str(path)) for example in source.examples)


def test_every_value_in_python_gives_the_same_examples() -> None:
    datasets, pandas = pytest.importorskip("datasets"), pytest.importorskip("pandas")
    dataset = datasets.Dataset.from_list(RECORDS)
    values = [
        RECORDS,
        tuple(RECORDS),
        dataset,
        datasets.DatasetDict(train=dataset, test=dataset.select([0])),
        pandas.DataFrame(RECORDS),
        pa.Table.from_pylist(RECORDS),
        [Example.of(*pair) for pair in PAIRS],
        [Source([Example.of(*pair) for pair in PAIRS])],
    ]
    for value in values:
        (source,) = read_sources(value)
        assert [(example.prompt, example.completion) for example in source.examples] == PAIRS
    assert len(read_sources([dataset, RECORDS])) == 2
    with pytest.raises(DataError, match=r"splits 'test', but no 'train'. Give one of them: data\['test'\]"):
        read_sources(datasets.DatasetDict(test=dataset))
    with pytest.raises(DataError, match="stream of examples"):
        read_sources(dataset.to_iterable_dataset())
    frame = pandas.DataFrame([{"prompt": "a", "completion": "b", "system": None}, {"prompt": None, "completion": "b"}])
    with pytest.raises(DataError, match=r"data\[1\]: prompt is null"):
        read_sources(frame)


@pytest.mark.parametrize("value", [5, {"prompt": ["a"]}, [5], [RECORDS[0], 5], []])
def test_values_that_are_no_data(value: Any) -> None:
    with pytest.raises(DataError, match=r"^the data .*list of dicts"):
        read_sources(value, name="the data")


def test_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(*names: str) -> Any:
        asked.append(names)
        if names[0] != "owner/chats":
            raise FileNotFoundError("no such data set")
        dataset = datasets.Dataset.from_list(RECORDS)
        return datasets.DatasetDict(train=dataset, test=dataset.select([0]))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load)
    (source,) = read_sources("owner/chats:0.5")
    assert (len(source.examples), source.weight) == (3, 0.5)
    assert source.notes == ("owner/chats: prompt and completion, 3 examples",)
    assert len(read_examples("owner/chats/small@test")) == 1
    assert asked == [("owner/chats",), ("owner/chats", "small")]
    with pytest.raises(DataError, match=r"has the splits train, test, not 'tset'. Did you mean 'test'"):
        read_examples("owner/chats@tset")
    with pytest.raises(DataError, match="neither a local file nor a data set that the hub provides: no such data set"):
        read_examples("owner/other")
    (tmp_path / "owner").mkdir()
    with pytest.raises(DataError, match="does not exist"):
        read_examples("owner/chats")


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=r"a\.parquet needs pyarrow: pip install 'loralib\[data\]'"):
        read_examples(write(tmp_path / "a.parquet", FILES["a.parquet"]))
    with pytest.raises(MissingDependencyError, match=r"owner/name is not a local file.*loralib\[data\]"):
        read_examples("owner/name")


def test_a_folder_of_texts(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    write(tmp_path / "b.txt", "Once\nupon a time.")
    write(tmp_path / "more" / "a.md", "# A page")
    write(tmp_path / "picture.png", b"\x89PNG")
    (source,) = read_sources(tmp_path)
    assert [example.completion for example in source.examples] == ["Once\nupon a time.", "# A page"]
    assert source.notes[0].endswith("a folder of plain texts, 2 files")
    assert source.notes[1].endswith("left out, since they are not texts (.txt, .md): 1 files")
    write(tmp_path / "train.txt", "a||b\n")
    with pytest.raises(DataError, match=r"train\.txt in it has a line with `\|\|`"):
        read_sources(tmp_path)
    (tmp_path / "none").mkdir()
    write(tmp_path / "none" / "a.parquet", b"x")
    with pytest.raises(DataError, match=r"a directory without texts .*: it has a\.parquet. Name a file in it"):
        read_sources(tmp_path / "none")


# --- forms of records ------------------------------------------------------------------------------------------------


def test_alpaca_becomes_its_published_prompt(tmp_path: Path) -> None:
    records = [
        {"instruction": "Add.", "input": "1+1", "output": "2", "text": "rendered", "id": 3},
        {"instruction": "Say hi.", "input": "", "output": "Hi!"},
        {"instruction": "Say hi.", "output": "Hi!"},
    ]
    path = write(tmp_path / "a.json", json.dumps(records))
    (source,) = read_sources(path)
    with_input, without, bare = source.examples
    assert with_input.prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1+1\n\n"
        "### Response:\n"
    )
    assert without.prompt == bare.prompt
    assert without.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay hi.\n\n### Response:\n"
    )
    assert [example.completion for example in source.examples] == ["2", "Hi!", "Hi!"]
    assert source.notes == (
        f"{path}: Alpaca (instruction, input, output) (2) and Alpaca (instruction, output) (1), 3 examples",
        f"{path}: left out, since it is not part of the text: text (in 1 of 3), id (in 1 of 3)",
    )
    chats = read_examples(path, as_chat=True)
    assert turns(chats[0]) == [("user", "Add.\n1+1"), ("assistant", "2")]
    more = {**records[1], "system": "Be brief.", "history": [["Hello", "Hey"]]}
    assert turns(one(tmp_path, more, as_chat=True)) == [
        ("system", "Be brief."),
        ("user", "Hello"),
        ("assistant", "Hey"),
        ("user", "Say hi."),
        ("assistant", "Hi!"),
    ]


@pytest.mark.parametrize(
    ("record", "prompt", "completion"),
    [
        ({"prompt": "Q? ", "response": "A."}, "Q? ", "A."),
        ({"prompt": "Q?", "response": "A."}, "Q?\n", "A."),
        ({"question": "Q?", "answer": "A."}, "Q?\n", "A."),
        ({"query": "Q?", "answer": "A."}, "Q?\n", "A."),
        ({"input": "Q?", "output": "A."}, "Q?\n", "A."),
        ({"context": " name : A", "completion": " It. "}, "name : A\n", "It."),
    ],
)
def test_pairs_by_other_names(tmp_path: Path, record: dict[str, str], prompt: str, completion: str) -> None:
    example = one(tmp_path, record)
    assert (example.prompt, example.completion) == (prompt, completion)
    first, second = record.values()
    assert turns(one(tmp_path, record, as_chat=True)) == [("user", first.strip()), ("assistant", second.strip())]


def test_chats_by_other_names(tmp_path: Path) -> None:
    told = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]
    expected = [("user", "Hi"), ("assistant", "Hello!")]
    assert turns(one(tmp_path, {"conversations": told})) == expected
    assert turns(one(tmp_path, {"conversations": told, "system": "Be."})) == [("system", "Be."), *expected]
    assert turns(one(tmp_path, {"conversations": json.dumps(told)})) == expected  # as tables hold lists
    parts = [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}]
    assert turns(one(tmp_path, {"messages": [*parts, {"role": "assistant", "content": "Hello!"}]})) == expected
    first = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}, {"role": "user", "content": "C"}]
    given = {"prompt": first, "completion": [{"role": "assistant", "content": "D"}]}
    assert [turn[:3] for turn in one(tmp_path, given).messages if turn.role == "assistant"] == [
        ("assistant", "B", False),
        ("assistant", "D", True),
    ]
    weights = [{"role": "assistant", "content": str(weight), "weight": weight} for weight in (0, 1)]
    assert [turn.trained for turn in one(tmp_path, {"messages": weights}).messages] == [False, True]
    called = [
        {"from": "human", "value": "Weather?"},
        {"from": "function_call", "value": '{"name": "look", "arguments": {"at": "Hue"}}'},
        {"from": "observation", "value": "rain"},
        {"from": "gpt", "value": "Rain."},
    ]
    example = one(tmp_path, {"conversations": called, "tools": '[{"name": "look", "parameters": {}}]'})
    assert [turn.role for turn in example.messages] == ["user", "assistant", "tool", "assistant"]
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "Hue"}}}
    assert example.messages[1].fields == {"tool_calls": [call]}
    assert example.fields == {"tools": [{"type": "function", "function": {"name": "look", "parameters": {}}}]}
    openai = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "1", "function": {"name": "look", "arguments": '{"at": "Hue"}'}}],
    }
    (turn,) = one(tmp_path, {"messages": [openai]}).messages
    assert turn == Turn("assistant", "", True, {"tool_calls": [{**call, "id": "1"}]})


CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
PAIR = {"prompt": "Hi", "completion": "Hello"}


@pytest.mark.parametrize(
    ("record", "field"),
    [
        *(({**PAIR, name: "kept?"}, name) for name in "system input context question history documents".split()),
        *(({**PAIR, name: ["kept?"]}, name) for name in "tools images documents history".split()),
        *(({**PAIR, name: "kept?"}, name) for name in "reasoning_content thinking rejected".split()),
        *(({**CHAT, name: "kept?"}, name) for name in "input context rejected question".split()),
        ({**PAIR, "weight": 0.5}, "weight"),
        ({"prompt": "Add 1", "input": "1", "completion": "2"}, "input"),
        ({**PAIR, "label": False}, "label"),
        ({"question": "Q", "context": "kept?", "answer": "A"}, "context"),
    ],
)
def test_what_the_model_should_see_is_not_left_out_in_silence(tmp_path: Path, record: Any, field: str) -> None:
    path = write(tmp_path / "a.jsonl", "\n".join([json.dumps({**PAIR, "id": 1}), json.dumps(record)]))
    with pytest.raises(DataError) as caught:
        read_examples(path)
    message = str(caught.value)
    assert f"{field!r} in 1 of 2 records (the first: {path}:2)" in message
    columns = message.rpartition("--columns ")[2]
    assert columns == f"{field}="
    assert len(read_examples(path, columns=columns)) == 2  # the advice works


def test_what_the_model_should_see_can_be_put_into_the_prompt(tmp_path: Path) -> None:
    record = {"context": "A pub.", "question": "What?", "answer": "A."}
    message = refused(tmp_path, "a.jsonl", json.dumps(record))
    advice = message.partition("--columns '")[2].partition("'")[0]
    assert one(tmp_path, record, columns=advice).prompt == "A pub.\nWhat?\n"


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": CHAT["messages"][:1], "chosen": CHAT["messages"][1:], "rejected": CHAT["messages"][1:]},
        {"prompt": "Hi", "chosen": CHAT["messages"], "rejected": CHAT["messages"]},
        {"chosen": CHAT["messages"], "rejected": CHAT["messages"]},
    ],
)
def test_preference_data_can_be_trained_on_by_the_advice(tmp_path: Path, record: Any) -> None:
    message = refused(tmp_path, "a.jsonl", json.dumps(record))
    assert one(tmp_path, record, columns=message.partition("--columns ")[2].split()[0]).completion in ("b", "Hello")


def test_fields_of_turns_are_named(tmp_path: Path) -> None:
    turn = {"role": "user", "content": "Hi", "mood": "good", "name": None}
    (source,) = read_sources([{"messages": [turn, CHAT["messages"][1]]}, CHAT])
    assert source.notes[1:] == ("data: left out of turns unless the chat template includes it: mood (in 1 of 2)",)


def test_turns_after_the_last_answer_are_counted(tmp_path: Path) -> None:
    thanks = {"messages": [*CHAT["messages"], {"role": "user", "content": "Thanks!"}]}
    (source,) = read_sources([thanks, CHAT])
    assert source.notes[1:] == ("data: left out, since no trained answer follows them: the last turns in 1 of 2 chats",)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('{"prompt": "Hi", "completion": "a", "completion": "b"}\n{"prompt": "Hi", "completion": "c"}\n', ":1: "),
        ('[\n {"prompt": "Hi", "completion": "a", "completion": "b"}\n]\n', ": "),
    ],
)
def test_a_key_that_comes_twice_is_refused_since_one_value_would_be_lost(tmp_path: Path, text: str, where: str) -> None:
    assert f"a.jsonl{where}an object has the key 'completion' 2 times" in refused(tmp_path, "a.jsonl", text)


def test_other_fields_are_named_and_said_twice_is_said(tmp_path: Path) -> None:
    records = [{**CHAT, "prompt": "Hi", "id": 1, "source": "x"}, {**CHAT, "id": 2, "source": None, "tools": []}]
    path = write(tmp_path / "a.jsonl", jsonl(records))
    (source,) = read_sources(path)
    assert source.notes[1] == (
        f"{path}: left out, since it is not part of the text: prompt (in 1 of 2), id (in 2 of 2), source (in 1 of 2)"
    )


@pytest.mark.parametrize(
    ("turn", "words"),
    [
        ({"content": [{"type": "image", "url": "x"}]}, r"content\[0\] is of type 'image', expected text"),
        ({"content": 5}, "content is a number"),
        ({"content": "x", "weight": 0.5}, "weight is 0.5, expected true or false"),
        ({"role": "user", "content": "x", "train": True}, "only the assistant's turns are trained on"),
        ({"content": "", "tool_calls": "no json"}, "not valid JSON"),
        ({"role": "function_call"}, "content is missing"),
    ],
)
def test_turns_that_cannot_be_trained(tmp_path: Path, turn: Any, words: str) -> None:
    record = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", **turn}]}
    with pytest.raises(DataError, match=rf"a\.jsonl:1: .*{words}"):
        one(tmp_path, record)


# --- columns ---------------------------------------------------------------------------------------------------------


def test_columns_name_fields(tmp_path: Path) -> None:
    record = {"frage": "Wo?", "antwort": "Da.", "titel": "Ort", "system": "x"}
    given = "prompt={titel}: {frage}\\n, completion=antwort, system="
    for columns in (
        given,
        parse_columns(given),
        {"prompt": "{titel}: {frage}\n", "completion": "antwort", "system": None},
    ):
        example = one(tmp_path, record, columns=columns)
        assert (example.prompt, example.completion) == ("Ort: Wo?\n", "Da.")
    talk = {"dialog": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert turns(one(tmp_path, talk, columns={"messages": "dialog"})) == [("user", "a"), ("assistant", "b")]
    path = write(tmp_path / "a.csv", "Q,A\nx,y\n")
    assert read_examples(path, columns="prompt=Q,completion=A")[0].completion == "y"
    assert read_sources([{"Q": "x", "A": "y"}], columns="prompt=Q,completion=A")[0].examples[0].prompt == "x"
    assert read_prompts(path, columns="prompt=Q,A=")[0].prompt == "x"


def test_columns_that_name_nothing(tmp_path: Path) -> None:
    record = json.dumps({"question": "x", "answer": "y"})
    message = refused(tmp_path, "a.jsonl", record, columns="prompt=qestion,completion=answer,tools=")
    assert "prompt=qestion: no record has 'qestion'. Did you mean 'question'?" in message
    assert "tools=: no record has 'tools'" in message
    assert "The columns are 'question', 'answer'" in message
    assert "'promt' is not one of" in refused(tmp_path, "a.jsonl", record, columns={"promt": "question"})
    assert "'question' has no `=`" in refused(tmp_path, "a.jsonl", record, columns="question")
    assert "has no columns" in refused(tmp_path, "a.txt", "a||b", columns="prompt=a")
    path = write(tmp_path / "b.jsonl", "\n".join([json.dumps({"q": "x", "a": "y"}), json.dumps({"a": "y"})]))
    with pytest.raises(DataError, match=r"b\.jsonl:2: "):
        read_examples(path, columns="prompt=q,completion=a")


def test_as_chat(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "name : A||It is A.\n")
    assert turns(read_examples(path, as_chat=True)[0]) == [("user", "name : A"), ("assistant", "It is A.")]
    assert turns(read_sources([Example.of("a\n", "b")], as_chat=True)[0].examples[0]) == [
        ("user", "a"),
        ("assistant", "b"),
    ]
    with pytest.raises(DataError, match="no prompt and completion that as_chat could turn into a chat"):
        one(tmp_path, {"text": "x"}, as_chat=True)
    assert turns(read_prompts(write(tmp_path / "p.jsonl", '{"prompt": "x"}'), as_chat=True)[0]) == [("user", "x")]


# --- broken files ----------------------------------------------------------------------------------------------------

BROKEN: dict[str, tuple[bytes | str, str]] = {
    "cut.parquet": (FILES["a.parquet"][:-20], "is a broken Parquet file"),
    "cut.arrow": (FILES["a.arrow"][:200], "is a broken Arrow file"),
    "text.parquet": ("hello", "is not a Parquet file: it begins with b'hello'"),
    "null.parquet": (parquet([PAIR, {"prompt": None, "completion": "x"}]), "null.parquet[1]: prompt is null"),
    "number.parquet": (parquet([{"prompt": 1, "completion": "x"}]), "number.parquet[0]: prompt is a number"),
    "cut.jsonl.gz": (FILES["a.jsonl.gz"][:-10], "is a broken gzip archive"),
    "bomb.jsonl.gz": (gzip.compress(bytes(2**28 + 2), 1), "unpacks to more than 200 times its size"),
    "sheet.csv": (b"PK\x03\x04rest", "is a ZIP archive"),
    "ragged.csv": ("prompt,completion\na,b\na,b,c\na\n", "ragged.csv:3: 3 fields, expected 2 (prompt, completion)"),
    "quote.csv": ('prompt,completion\na,b\n"c,d\ne,f\n', "quote.csv:3: not a row of CSV: a quote is not closed"),
    "twice.csv": ("prompt,prompt\na,b\n", "twice.csv:1: 'prompt' is the name of two columns"),
    "nameless.csv": ("prompt,\na,b\n", "nameless.csv:1: column 2 has no name"),
    "index.csv": (",prompt,completion\nx,a,b\n", "index.csv:1: column 1 has no name"),
    "wrapped.json": (
        '{"data": [{"prompt": "a", "completion": "b"}]}',
        "'data' contains a list of records: give a file with",
    ),
    "missing.csv": ("prompt,other\na,b\n", "missing.csv:2: found 'prompt', 'other'"),
    "rowless.csv": ("prompt,completion\n", "contains no examples"),
    "empty.csv": ("\n", "is empty, expected rows below a header row"),
    "utf16.csv": ("prompt,completion\na,b".encode("utf-16"), "is UTF-16"),
    "latin.csv": ("prompt,completion\na,caf\xe9".encode("latin-1"), "latin.csv:2: byte 0xe9"),
    "binary.jsonl": (b"\x00\xff\xfe\x00", "is a binary file"),
    "cut.json": (FILES["a.json"][:-40], "the file is cut off"),
    "one-line.json": (json.dumps(RECORDS)[:-20], "the file is cut off"),
    "comma.json": ('[\n{"text": "a"},\n{"text" "a"}\n]', "comma.json:3: not JSON"),
    "trailing.json": ('[\n{"text": "a"},\n]', "Fix it; expected one JSON object per line"),
    "none.json": ("[]", "contains no examples"),
    "number.json": ("5", "number.json:1: found a number, expected an object"),
    "half.jsonl": ('{"text": "a"}\n{"text": "\\ud83d"}', "half.jsonl:2: text is text with half of a character"),
    "keyless.jsonl": ('{"prompt": "a"}', "'prompt' has no completion, response, output or answer"),
    "preference.jsonl": ('{"prompt": "a", "chosen": "b", "rejected": "c"}', "--columns completion=chosen,rejected="),
    "answers.jsonl": ('{"prompt": "a", "answer": "b", "response": "c"}', "found 'response' and 'answer', expected one"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_by_file_and_row(tmp_path: Path, name: str) -> None:
    content, words = BROKEN[name]
    message = refused(tmp_path, name, content)
    assert words in message
    assert name in message
    assert ("iconv" in message) == (name == "latin.csv")


def test_pandas_writes_its_row_numbers_into_a_column_without_a_name(tmp_path: Path) -> None:
    (source,) = read_sources(write(tmp_path / "a.csv", ",prompt,completion\n0,a,b\n1,c,d\n"))
    assert len(source.examples) == 2
    assert source.notes[1].endswith("row number (in 2 of 2)")


def test_a_very_long_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", jsonl([{"text": "x" * 30_000_000}, {"text": "y"}]))
    assert [len(example.completion) for example in read_examples(path)] == [30_000_000, 1]
    path = write(tmp_path / "a.csv", "text\n" + "x" * 3_000_000 + "\n")
    assert len(read_examples(path)[0].completion) == 3_000_000


def test_what_the_e2e_format_is_called(tmp_path: Path) -> None:
    assert guess_format(write(tmp_path / "a.csv", "mr,ref\na,b\n")) == "e2e"
    assert guess_format(write(tmp_path / "b.csv", "prompt,completion\na,b\n")) == "csv"
    assert guess_format(write(tmp_path / "c.txt", '{"a"||b\n')) == "e2e"


# --- how many, and how long ------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer with one token per character."""

    bos_token_id, eos_token_id = None, 0

    def __call__(self, text: str | list[str], **_: Any) -> dict[str, Any]:
        rows = [[ord(char) for char in row] for row in ([text] if isinstance(text, str) else text)]
        return {"input_ids": rows[0] if isinstance(text, str) else rows}

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def test_a_limit_may_be_chosen_once_all_lengths_are_known() -> None:
    examples = [Example.of("ab", "c" * n) for n in (1, 5, 50)] + [Example.of("a", " ")]
    seen: list[int] = []

    def choose(lengths: Any) -> int:
        seen.extend(lengths)
        return 10

    encoded = load_examples(examples, Letters(), seq_len=choose)
    assert seen == encoded.lengths == [4, 8, 53]
    assert encoded.seq_len == 10
    assert encoded.summary() == ("2 of 4 examples (dropped 2 examples: 1 empty completion, 1 longer than seq_len)")
    assert [(item.reason, item.tokens) for item in encoded.out] == [
        ("empty completion", 0),
        ("longer than seq_len", 53),
    ]
    assert "1 of 3 examples (33 %) are longer than 10 tokens" in encoded.length_warning
    assert encoded.length_warning.endswith("seq_len 53 keeps 99 % of them.")
    assert load_examples(examples, Letters(), seq_len=None).length_warning == ""
    assert load_examples(examples, Letters(), seq_len=None, max_samples=2).summary() == (
        "2 of 4 examples (dropped 1 example: 1 empty completion; 1 not drawn)"
    )


def test_nothing_to_train_on_shows_the_first_example() -> None:
    examples = [Example.of("A question", "An answer", "a.jsonl:1"), Example.of("B", " ", "a.jsonl:2")]
    with pytest.raises(DataError) as caught:
        encode(examples, Letters(), 5)
    message = str(caught.value)
    assert "no example of a.jsonl is left (dropped 2 examples: 1 empty completion, 1 longer than seq_len)" in message
    assert "The first is a.jsonl:1 (longer than seq_len, 20 tokens):" in message
    assert "not trained: 'A question'" in message
    assert "\n  trained: 'An answer" in message
    with pytest.raises(DataError, match=r"(?s)a.jsonl:2 \(empty completion\).*not trained: 'B'.*trained: ' '"):
        encode(examples[1:], Letters(), 5)
