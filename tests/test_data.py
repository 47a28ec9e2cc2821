"""Files become examples, examples become token ids with the right ones trained, and what does not fit is counted."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import loralib.nlg  # noqa: F401  reads published data
from loralib.data import (
    Example,
    TokenExample,
    draw,
    encode,
    group_by_prompt,
    load_examples,
    parse_source,
    prompt_ids,
    read_examples,
    read_sources,
    tokenize,
)
from loralib.data.examples import Turn
from loralib.data.readers import _READERS
from loralib.errors import ConfigError, DataError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Llama 2's: a start token for every exchange, blanks around, the end token right after the answer.
BRACKETS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}[INST] {{ m['content'] | trim }} [/INST]"
    "{% else %} {{ m['content'] | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
BARE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# As Qwen 3's: empty thoughts before the answers that follow the last question, and no others.
THINKS = (
    "{% set ns = namespace(last=0) %}{% for m in messages if m['role'] == 'user' %}{% set ns.last = m %}{% endfor %}"
    "{% set ns.after = false %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if ns.after and m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n"
    "{% if m == ns.last and (loop.last or loop.nextitem == messages[-1]) %}{% set ns.after = true %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As those that ask for thoughts in generation alone.
BEGINS = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
DEAF = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
ENDLESS = CHATML.replace("<|im_end|>", "")
REWRITES = "{% for m in messages %}{{ loop.revindex }}{{ m['content'] }}<|im_end|>{% endfor %}"


def make_tokenizer(*, starts: bool = False, template: str | None = None) -> Any:
    """One token per byte, so that lengths are obvious; 'starts' adds a start token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({token: i for i, token in enumerate([*special, *letters])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    if starts:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="<|endoftext|>", additional_special_tokens=special[1:3]
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


def trained_text(example: TokenExample, tokenizer: Any) -> str:
    ids = [token for token, on in zip(example.ids, example.trained, strict=True) if on]
    return str(tokenizer.decode(ids))


# --- readers -------------------------------------------------------------------------------------------------------


def test_e2e_lines(tmp_path: Path) -> None:
    # Windows line ends, a byte-order mark, blank lines, and characters that str.splitlines would break lines at.
    path = write(tmp_path / "a.txt", "\ufeffname : A||One\u2028two .\r\n\r\nname : A || Three. \rname : B||Four\x85.")
    examples = read_examples(path)
    assert [e.segments for e in examples] == [
        (("name : A\n", False), ("One\u2028two .", True)),
        (("name : A\n", False), ("Three.", True)),
        (("name : B\n", False), ("Four\x85.", True)),
    ]
    assert examples[0].references == examples[1].references == ("One\u2028two .", "Three.")
    assert examples[2].references == ("Four\x85.",)
    assert [e.source for e in examples] == [f"{path}:1", f"{path}:3", f"{path}:4"]


def test_jsonl_forms(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}], "id": 7}
    records = [
        {"prompt": "2+2=", "completion": " 4\n"},
        {"context": " name : A ", "completion": " It is A. "},
        {"text": "only text"},
        chat,
    ]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    verbatim, meaning, text, talk = read_examples(path)
    assert (verbatim.prompt, verbatim.completion) == ("2+2=", " 4\n")
    assert (meaning.prompt, meaning.completion) == ("name : A\n", "It is A.")
    assert text.segments == (("only text", True),)
    assert talk.messages == (Turn("user", "Hi"), Turn("assistant", "Ho"))
    assert (talk.prompt, talk.completion) == ("Hi", "Ho")


def test_published_sets(tmp_path: Path) -> None:
    dart = [{"tripleset": [["A", "IS In", "B"], ["B", "HAS", "C"]], "annotations": [{"text": " A is in B. "}]}]
    (example,) = read_examples(write(tmp_path / "d.json", json.dumps(dart)))
    assert (example.prompt, example.completion) == ("A : is in : B | B : has : C\n", "A is in B.")
    entry = {
        "category": "Food",
        "modifiedtripleset": [{"subject": "A", "property": "isIn", "object": "B"}],
        "lexicalisations": [{"comment": "good", "lex": "A is in B."}, {"comment": "toFix", "lex": "x"}],
    }
    (example,) = read_examples(write(tmp_path / "w.json", json.dumps({"entries": [{"1": entry}]}, indent=1)))
    assert (example.prompt, example.completion) == ("A : isIn : B\n", "A is in B.")
    xml = (
        '<benchmark><entries><entry category="Food"><originaltripleset><otriple>x</otriple></originaltripleset>'
        "<modifiedtripleset><mtriple>A | isIn | B &amp; C</mtriple></modifiedtripleset>"
        '<lex comment="good">A is in B.</lex><lex comment="bad">x</lex></entry></entries></benchmark>'
    )
    (example,) = read_examples(write(tmp_path / "w.xml", xml))
    assert (example.prompt, example.completion) == ("A : isIn : B & C\n", "A is in B.")
    csv = 'mr,ref\r\n"name[The Mill], priceRange[£20-25], familyFriendly[no]","A ""mill"", yes."\r\n'
    (example,) = read_examples(write(tmp_path / "e.csv", csv))
    assert example.prompt == "name : The Mill | price : £20-25 | family friendly : no\n"
    assert example.completion == 'A "mill", yes.'
    assert read_examples(tmp_path / "e.csv", "text")[0].completion.startswith("mr,ref")


def test_plain_text_must_be_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "Once upon\na time.\n")
    with pytest.raises(DataError, match="choose the format 'text'"):
        read_examples(path)
    assert read_examples(path, "text")[0].segments == (("Once upon\na time.", True),)


def test_all_faulty_lines_are_told_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "x||y\nno bars\nx||y||z\n\nalso none\n")
    with pytest.raises(DataError) as caught:
        read_examples(path)
    message = str(caught.value)
    assert f"{path}:2: no `||` in 'no bars'" in message
    assert f"{path}:3: 2 `||` in 'x||y||z'" in message
    assert f"{path}:5" in message
    assert "meaning representation||text" in message
    assert "3 lines do not match" in message


def test_faulty_json_lines_are_told_at_once(tmp_path: Path) -> None:
    lines = [
        '{"prompt": "a", "completion": "b"}',
        "{bad",
        "[1]",
        '{"promt": "a", "completion": "b"}',
        '{"prompt": 1, "completion": "b"}',
        '{"messages": []}',
        '{"messages": [{"role": "user", "content": "x"}]}',
        '{"messages": [{"role": "assistant", "content": null}]}',
        "[" * 100_000,
        '{"prompt": "a", "completion": "\\ud800"}',
        '{"messages": [{"role": "Assistant", "content": "x"}]}',
        '{"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}]}',
        '{"messages": [{"role": "assistant", "content": "x", "weight": 0}]}',
        '{"prompt": ' + "1" * 10_000 + "}",
    ]
    path = write(tmp_path / "a.jsonl", "\n".join(lines))
    with pytest.raises(DataError) as caught:
        read_examples(path)
    message = str(caught.value)
    assert all(f"{path}:{number}: " in message for number in range(2, 15))
    assert f"{path}:1: " not in message
    assert "Did you mean 'prompt'?" in message
    assert "messages[0].content is null" in message
    assert "completion is text with half of a character" in message
    assert "messages[0].role is 'Assistant'. Did you mean 'assistant'?" in message
    assert "a.jsonl:12: messages[0].content: a tool call is \"{'id': 1}\", expected an object with 'name'" in message
    assert "a.jsonl:13: 'messages' has no turn with role 'assistant' to train on" in message


def test_a_json_file_may_be_one_list(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", '\ufeff[\n {"prompt": "a", "completion": "b"},\n {"text": "c"}\n]\n')
    assert [(e.completion, e.source) for e in read_examples(path)] == [("b", f"{path}[0]"), ("c", f"{path}[1]")]
    with pytest.raises(DataError, match=r"(?s)\[1\]: found a number.*\[2\]: found 'promt'.*Did you mean 'prompt'"):
        read_examples(write(path, '[{"text": "a"}, 1, {"promt": "b"}]'))
    lines = write(tmp_path / "b.json", '{"text": "a"}\n{"text": "b"}\n')
    assert [e.source for e in read_examples(lines)] == [f"{lines}:1", f"{lines}:2"]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    write(tmp_path / "train.txt", "a||b")
    with pytest.raises(DataError, match=r"does not exist.*Did you mean 'train.txt'"):
        read_examples(tmp_path / "trian.txt")
    with pytest.raises(DataError, match="nor does the directory"):
        read_examples(tmp_path / "none" / "train.txt")
    with pytest.raises(DataError, match="is a directory"):
        read_examples(tmp_path)
    for content in ("", "  \n\n"):
        with pytest.raises(DataError, match=r"is empty, expected lines of the form `meaning representation\|\|text`"):
            read_examples(write(tmp_path / "empty.txt", content))
    with pytest.raises(DataError, match=r"unknown data format 'e2'.*Did you mean 'e2e'"):
        read_examples(tmp_path / "train.txt", "e2")


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"a||caf\xe9\nb||good \xc3\xa9\n\xff||c\n")
    with pytest.raises(DataError) as caught:
        read_examples(path)
    message = str(caught.value)
    assert f"{path}:1: byte 0xe9 at offset 6" in message
    assert f"{path}:3: byte 0xff at offset 19" in message
    assert f"{path}:2" not in message
    with pytest.raises(DataError, match="UTF-16"):
        read_examples(write(tmp_path / "b.txt", "a||b".encode("utf-16")))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"tripleset": [["a", "b"]], "annotations": []}, {"annotations": []}]', "2 of 2 differ"),
        ("a.json", '{"entries": [{"1": {"category": "x"}}]}', "'modifiedtripleset' is missing"),
        ("a.json", '{"entries": 3}', "list 'entries'"),
        ("a.json", "[" * 100_000, "does not match"),
        ("a.json", '[{"tripleset": [["a", "b", "c"]], "annotations": [{"text": "\\udc00"}]}]', "1 of 1 differ"),
        ("a.json", '[{"tripleset": [["a", "b", "c"]], "annotations": [{"text": 3}]}]', "1 of 1 differ"),
        ("a.xml", '<!DOCTYPE e [<!ENTITY a "aaaa">]><e>&a;</e>', "defines XML entities"),
        ("a.json", '{"a": 1,\n', "not JSON"),
        ("a.xml", "<entry", "is not XML"),
        (
            "a.xml",
            '<e><entry category="x"><modifiedtripleset><mtriple>a</mtriple></modifiedtripleset></entry></e>',
            "1 of 1",
        ),
        ("a.csv", "a,b\n1,2\n", "a.csv:2: found 'a', 'b', expected prompt and completion"),
        ("a.csv", "mr,ref\nname The Mill,x\n", "a.csv:2: 'name The Mill'"),
    ],
)
def test_published_files_of_another_form(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read_examples(write(tmp_path / name, content))
    assert message in str(caught.value)


def test_published_files_are_read_once_nlg_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("e2e.csv", "dart", "webnlg"):
        monkeypatch.delitem(_READERS, key)
    for name, content in (("a.json", '[{"annotations": []}]'), ("a.xml", "<entries/>"), ("a.csv", "mr,ref\na,b\n")):
        with pytest.raises(DataError, match=f"{name}: .*Add `import loralib.nlg`"):
            read_examples(write(tmp_path / name, content))


def test_group_by_prompt_keeps_order_and_all_references() -> None:
    rows = [Example.of("b", "1"), Example.of("a", "2"), Example.of("b", "3")]
    assert [(e.prompt, e.references) for e in group_by_prompt(rows)] == [("b", ("1", "3")), ("a", ("2",))]


# --- drawing and mixing --------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(keys=st.lists(st.integers(0, 8), min_size=1, max_size=40), count=st.integers(1, 45), seed=st.integers(0, 5))
def test_draw_spreads_over_keys(keys: list[int], count: int, seed: int) -> None:
    items = list(enumerate(keys))
    drawn = draw(items, count, seed, lambda item: item[1])
    assert len(set(drawn)) == len(drawn) == min(count, len(items))
    assert drawn == draw(items, count, seed, lambda item: item[1])
    taken, there = Counter(key for _, key in drawn), Counter(keys)
    # Nobody has a second one while another has none left to give: counts differ by one unless a key ran out.
    for key in there:
        assert taken[key] >= min(there[key], max(taken.values()) - 1)


def test_draw_depends_on_the_seed() -> None:
    items = list(range(100))
    assert draw(items, 10, 1, lambda item: item) != draw(items, 10, 2, lambda item: item)
    assert draw(items, None, 1, lambda item: item) == items


def test_samples_are_drawn_after_dropping(tmp_path: Path, tokenizer: Any) -> None:
    long = "x" * 100
    lines = [f"m{i}||{long}\nm{i}||ok {i}\nm{i}||fine {i}\n" for i in range(20)]
    encoded = load_examples(write(tmp_path / "a.txt", "".join(lines)), tokenizer, seq_len=40, max_samples=20, seed=3)
    assert len({text.prompt for text in encoded.texts}) == len(encoded) == 20
    assert encoded.dropped == {"longer than seq_len": 20}


def test_weights_mix_files(tmp_path: Path, tokenizer: Any) -> None:
    for name in "ab":
        write(tmp_path / f"{name}.txt", "".join(f"{name}{i}||text {i}\n" for i in range(10)))

    def count(*sources: str, most: int | None = None) -> dict[str, int]:
        encoded = load_examples([str(tmp_path / s) for s in sources], tokenizer, seq_len=40, max_samples=most)
        return dict(Counter(text.prompt[0] for text in encoded.texts))

    assert count("a.txt", "b.txt") == {"a": 10, "b": 10}
    assert count("a.txt:2", "b.txt:0.5") == {"a": 20, "b": 5}
    assert count("a.txt:1.5") == {"a": 15}
    assert count("a.txt:3", "b.txt", most=8) == {"a": 6, "b": 2}
    assert count("a.txt", most=4) == {"a": 4}
    read = read_sources([str(tmp_path / "a.txt:2")])
    assert len(load_examples(read, tokenizer, seq_len=40)) == 20


def test_sources_and_their_weights(tmp_path: Path) -> None:
    colon = write(tmp_path / "a:2", "x||y") if Path("/").drive == "" else None  # Windows has no such names
    if colon is not None:
        assert parse_source(str(colon)) == (colon, 1.0)
    assert parse_source(r"C:\data\train.txt") == (Path(r"C:\data\train.txt"), 1.0)
    assert parse_source(r"C:\data\train.txt:0.25") == (Path(r"C:\data\train.txt"), 0.25)
    for wrong in ("0", "-1", "inf", "nan"):
        with pytest.raises(DataError, match="not a positive number"):
            parse_source(f"train.txt:{wrong}")
    with pytest.raises(DataError, match="no data given"):
        read_sources([])


# --- tokens --------------------------------------------------------------------------------------------------------


def test_completion_and_end_token_are_trained(tokenizer: Any) -> None:
    example = tokenize(Example.of("ab\n", "cd"), tokenizer)
    end = tokenizer.eos_token_id
    assert example.ids == (*tokenizer("ab\n").input_ids, *tokenizer("cd").input_ids, end)
    assert example.trained == (False, False, False, True, True, True)
    joint = tokenize(Example.of("ab\n", "cd"), tokenizer, "jlm")
    assert joint.ids == example.ids
    assert joint.trained == (False, True, True, True, True, True)


def test_prompts_are_the_same_in_training_and_generation() -> None:
    plain, starting = make_tokenizer(), make_tokenizer(starts=True)
    for tokenizer in (plain, starting):
        for prompt in ("name : A\n", ""):
            ids = prompt_ids(prompt, tokenizer)
            example = tokenize(Example.of(prompt, "x"), tokenizer)
            assert list(example.ids[: len(ids)]) == ids
            assert example.trained == (False,) * len(ids) + (True, True)
    assert prompt_ids("a", starting)[0] == starting.bos_token_id
    assert prompt_ids("", plain) == [plain.eos_token_id]


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.tuples(st.text(max_size=12), st.text(max_size=12)), min_size=1, max_size=8),
    seq_len=st.integers(2, 30),
    objective=st.sampled_from(["clm", "jlm"]),
)
def test_encoding_keeps_examples_whole(rows: list[tuple[str, str]], seq_len: int, objective: str) -> None:
    tokenizer = make_tokenizer()
    examples = [Example.of(prompt, completion) for prompt, completion in rows]
    whole = [tokenize(example, tokenizer, objective) for example in examples]
    good = [(e, t) for e, t in zip(examples, whole, strict=True) if e.completion.strip() and len(t) <= seq_len]
    if not good:
        with pytest.raises(DataError, match="no example"):
            encode(examples, tokenizer, seq_len, objective)
        return
    encoded = encode(examples, tokenizer, seq_len, objective)
    assert list(zip(encoded.texts, encoded.examples, strict=True)) == good
    assert sum(encoded.dropped.values()) == len(rows) - len(good)
    for example in encoded.examples:
        assert example.ids[-1] == tokenizer.eos_token_id
        assert example.trained[-1]
        assert not example.trained[0]
        assert len(example.ids) == len(example.trained)


def test_drops_are_counted_by_reason(tokenizer: Any) -> None:
    examples = [Example.of("a", "b"), Example.of("a", " "), Example.of("a", "b" * 50), Example.of("a", "b" * 60)]
    encoded = encode(examples, tokenizer, 10)
    assert len(encoded) == 1
    assert encoded.dropped == {"empty completion": 1, "longer than seq_len": 2}
    assert encoded.drop_note == "dropped 3 examples: 1 empty completion, 2 longer than seq_len"
    with pytest.raises(DataError, match="shortest has 52 tokens: raise seq_len"):
        encode(examples[1:], tokenizer, 10)


@settings(deadline=None, max_examples=60)
@given(length=st.integers(1, 60), seq_len=st.integers(2, 20), starts=st.booleans())
def test_windows_train_each_token_of_a_text_once(length: int, seq_len: int, starts: bool) -> None:
    tokenizer = make_tokenizer(starts=starts)
    text = "".join(chr(ord("a") + i % 26) for i in range(length))
    example = Example(((text, True),))
    whole = tokenize(example, tokenizer)
    windows = encode([example], tokenizer, seq_len).examples
    assert all(2 <= len(window) <= seq_len for window in windows)
    trained = [token for w in windows for token, on in zip(w.ids, w.trained, strict=True) if on]
    assert trained == list(whole.ids[1:])
    assert trained[-1] == tokenizer.eos_token_id


def test_impossible_settings(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"objective is 'clmm'.*Did you mean 'clm'"):
        encode([Example.of("a", "b")], tokenizer, 10, "clmm")
    with pytest.raises(ConfigError, match="seq_len is 1"):
        encode([Example.of("a", "b")], tokenizer, 1)
    with pytest.raises(ConfigError, match="max_samples is 0"):
        load_examples("x", tokenizer, seq_len=10, max_samples=0)
    endless = make_tokenizer()
    endless.eos_token = None
    with pytest.raises(DataError, match="no end token"):
        encode([Example.of("a", "b")], endless, 10)


# --- chats ---------------------------------------------------------------------------------------------------------

TALK = Example(
    messages=(
        ("system", "Be kind."),
        ("user", "Hello you"),
        ("assistant", "Hello"),
        ("user", "Hello?"),
        ("assistant", " you "),
        ("user", "never answered"),
    ),
    source="a.jsonl:1",
)


def test_chat_trains_answers_with_their_end_token() -> None:
    tokenizer = make_tokenizer(template=CHATML)
    example = tokenize(TALK, tokenizer)
    assert trained_text(example, tokenizer) == "Hello<|im_end|> you <|im_end|>"
    whole = tokenizer.decode(example.ids)
    assert whole.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello you<|im_end|>\n")
    assert whole.endswith("<|im_start|>assistant\n you <|im_end|>")
    everything = tokenize(TALK, tokenizer, "jlm")
    assert everything.ids == example.ids
    assert everything.trained == (False,) + (True,) * (len(example) - 1)


def test_chat_with_another_template() -> None:
    tokenizer = make_tokenizer(template=BRACKETS, starts=True)
    talk = Example(messages=tuple(turn for turn in TALK.messages if turn[0] != "system"))
    example = tokenize(talk, tokenizer)
    assert trained_text(example, tokenizer) == " Hello <|endoftext|> you <|endoftext|>"
    assert example.ids[0] == tokenizer.bos_token_id != example.ids[1]


def rows_of(example: Example, tokenizer: Any) -> list[tuple[str, str]]:
    """The text of each row of an example, and its trained parts."""
    encoded = encode([example], tokenizer, None)
    return [(tokenizer.decode(row.ids), trained_text(row, tokenizer)) for row in encoded.examples]


def test_chat_without_end_token_gets_one_after_each_answer() -> None:
    tokenizer = make_tokenizer(template=BARE)
    (first, second) = rows_of(TALK, tokenizer)
    assert first == (
        "system: Be kind.\nuser: Hello you\nassistant: Hello<|endoftext|>",
        "Hello<|endoftext|>",
    )
    assert second[0].startswith("system: Be kind.\nuser: Hello you\nassistant: Hello\nuser: Hello?\nassistant:  you ")
    assert second[1] == " you <|endoftext|>"


def test_chats_that_cannot_be_written() -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:1: the model's tokenizer has no chat template"):
        tokenize(TALK, make_tokenizer())
    with pytest.raises(DataError, match="rewrites the text before turn 3"):
        tokenize(TALK, make_tokenizer(template=REWRITES))
    with pytest.raises(DataError, match=r"omits or rewrites turn 1 \(system\)"):
        tokenize(TALK, make_tokenizer(template=DEAF))
    with pytest.raises(DataError, match="begins turn 3 differently from an answer in generation"):
        tokenize(TALK, make_tokenizer(template=BEGINS))
    with pytest.raises(DataError, match=r"omits or rewrites turn 3 \(assistant\)"):
        tokenize(
            TALK,
            make_tokenizer(
                template=CHATML.replace("m['content']", "m['content'] | replace('Hello', 'x')", 1).replace(
                    "m['content'] |", "m['content'] if m['role'] != 'assistant' else m['content'] |"
                )
            ),
        )
    unending = make_tokenizer(template=BARE)
    unending.eos_token = None
    with pytest.raises(DataError, match="neither the chat template nor the tokenizer has an end token"):
        tokenize(TALK, unending)


def test_all_chats_that_cannot_be_written_are_told_at_once() -> None:
    talks = [Example(messages=(("system", "x"), ("user", "a"), ("assistant", "b")), source=f"a:{n}") for n in (1, 2)]
    with pytest.raises(DataError, match=r"(?s)2 chats cannot be trained on:.*a:1: .*a:2: .*"):
        encode(talks, make_tokenizer(template=DEAF), 100)
    with pytest.raises(DataError, match=r"^a:1: [^\n]*no chat template[^\n]*$"):
        encode(talks, make_tokenizer(), 100)


def chat(*contents: str) -> Example:
    """A question, an answer, and so on."""
    roles = ("user", "assistant")
    return Example(messages=tuple((roles[n % 2], content) for n, content in enumerate(contents)), source="a.jsonl:1")


def test_an_answer_that_stands_in_the_template_s_own_words_is_found() -> None:
    """A short answer, such as "t" or "", also occurs in "<think>"."""
    tokenizer = make_tokenizer(template=CHATML)
    example = tokenize(chat("Hi", "", "assistant", "assistant"), tokenizer)
    assert trained_text(example, tokenizer) == "<|im_end|>assistant<|im_end|>"


def test_answers_are_rows_of_their_own_where_the_template_rewrites_earlier_ones() -> None:
    """Each is trained as it would be generated: with the empty thoughts that the template removes in later turns."""
    tokenizer = make_tokenizer(template=THINKS)
    first, second = rows_of(chat("Hi", "t", "Hi?", "k"), tokenizer)
    assert first[1] == "<think>\n\n</think>\n\nt<|im_end|>"
    assert second[1] == "<think>\n\n</think>\n\nk<|im_end|>"
    assert "t<|im_end|>" in second[0]
    assert second[0].count("<think>") == 1
    with pytest.raises(DataError, match="needs 2 rows"):
        tokenize(chat("Hi", "t", "Hi?", "k"), tokenizer)


def test_what_begins_the_next_turn_ends_no_answer() -> None:
    tokenizer = make_tokenizer(template=ENDLESS)
    trained = [row[1] for row in rows_of(chat("Hi", "Ho", "Hi", "Hu"), tokenizer)]
    assert trained == ["Ho<|endoftext|>", "Hu<|endoftext|>"]


def test_a_chat_that_the_assistant_opens() -> None:
    tokenizer = make_tokenizer(template=CHATML)
    example = tokenize(Example(messages=(("assistant", "Yes?"), ("user", "Hi"), ("assistant", "Ho"))), tokenizer)
    assert trained_text(example, tokenizer) == "Yes?<|im_end|>Ho<|im_end|>"
    assert tokenizer.decode(example.ids).startswith("<|im_start|>assistant\nYes?")


def test_chats_without_an_answer_are_dropped(tokenizer: Any) -> None:
    encoded = encode([chat("Hi", " "), chat("Hi", "Ho")], make_tokenizer(template=CHATML), 100)
    assert (len(encoded), encoded.dropped) == (1, {"empty completion": 1})


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_pieces_have_the_ids_that_they_have_in_their_place(scheme: str) -> None:
    """Tokenizers like Llama 2's add a space before any text; an answer within its chat has none."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<s>", "</s>", "<unk>", *"▁\n:?[]", *"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"]
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, [], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    core.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = CHATML.replace("<|im_start|>", "[").replace("<|im_end|>", "</s>")
    talk = chat("Hello you", "Ho", "And", "Hu Ha")
    example = tokenize(talk, tokenizer)
    turns = [{"role": role, "content": content} for role, content, *_ in talk.messages]
    whole = tokenizer.apply_chat_template(turns, tokenize=False).rstrip("\n")
    assert list(example.ids) == tokenizer(whole, add_special_tokens=False)["input_ids"]
    trained = [token for token, on in zip(example.ids, example.trained, strict=True) if on]
    assert tokenizer.convert_ids_to_tokens(trained) == [*"Ho", "</s>", *"Hu▁Ha", "</s>"]
    plain = tokenize(Example.of("A:", "Be"), tokenizer)
    assert tokenizer.convert_ids_to_tokens(list(plain.ids)) == [*"▁A:Be", "</s>"]
    assert list(plain.ids[:3]) == prompt_ids("A:", tokenizer)
    with pytest.raises(DataError, match="rejects these messages: no system"):
        tokenize(TALK, make_tokenizer(template="{{ raise_exception('no system') }}"))


@pytest.mark.parametrize("starts", [False, True])
def test_start_and_end_tokens_that_the_data_write_out_are_not_doubled(starts: bool) -> None:
    tokenizer = make_tokenizer(starts=starts)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    written = tokenize(Example.of(f"{bos}Q: ", f"A{eos}"), tokenizer)
    assert tokenizer.decode(list(written.ids)) == f"{bos}Q: A{eos}"
    assert prompt_ids(f"{bos}Q: ", tokenizer) == list(written.ids[: written.trained.index(True)])
    if starts:
        assert written == tokenize(Example.of("Q: ", "A"), tokenizer)
