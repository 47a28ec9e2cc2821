"""Chats through templates of several shapes: what is trained is what generation would have to write, and no more.

The truth is written by hand: each shape has its template, and a function that writes the same in Python.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from loralib.data import Example, encode, prompt_ids
from loralib.data.examples import Turn
from loralib.errors import DataError

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|header|>", "<|/header|>", "<|eot_id|>", "<|end|>"]
SPECIAL += ["<|user|>", "<|assistant|>", "<|system|>", "<start_of_turn>", "<end_of_turn>", "<pad>", "[INST]", "[/INST]"]


def make_tokenizer(template: str | None, eos: str = "</s>") -> Any:
    """One token per byte, besides the special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({token: i for i, token in enumerate([*SPECIAL, *letters])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    rest = [token for token in SPECIAL if token not in ("<s>", eos)]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token=eos, additional_special_tokens=rest
    )
    tokenizer.add_tokens(["<tool_call>", "</tool_call>", "<think>", "</think>"])  # known, but not special
    tokenizer.chat_template = template
    return tokenizer


def rows_of(example: Example, tokenizer: Any) -> list[tuple[str, list[str]]]:
    """The text of each row, and its trained pieces."""
    rows = []
    for row in encode([example], tokenizer, None).examples:
        pieces: list[list[int]] = []
        for position, (token, trained) in enumerate(zip(row.ids, row.trained, strict=True)):
            if trained and not row.trained[position - 1]:
                pieces.append([])
            if trained:
                pieces[-1].append(token)
        rows.append((tokenizer.decode(row.ids), [tokenizer.decode(piece) for piece in pieces]))
    return rows


def chat(*contents: str, system: str = "") -> Example:
    """A question, an answer, and so on."""
    turns = [("system", system)] * bool(system)
    turns += [(("user", "assistant")[n % 2], content) for n, content in enumerate(contents)]
    return Example(messages=tuple(turns), source="a.jsonl:1")  # type: ignore[arg-type]


class Shape(NamedTuple):
    """A template, how it writes the turns before an answer and begins it, and how it ends an answer."""

    template: str
    before: Callable[[list[Turn]], str]
    end: str
    together: bool  # whether all answers of a chat are trained in one row
    eos: str = "</s>"
    begin: str = ""  # what the template puts before an answer that generation has to write


def chatml(turns: list[Turn]) -> str:
    text = "".join(f"<|im_start|>{turn.role}\n{turn.content}<|im_end|>\n" for turn in turns)
    return text + "<|im_start|>assistant\n"


def headers(turns: list[Turn]) -> str:
    text = "".join(f"<|header|>{turn.role}<|/header|>\n\n{turn.content.strip()}<|eot_id|>" for turn in turns)
    return f"<s>{text}<|header|>assistant<|/header|>\n\n"


def brackets(turns: list[Turn]) -> str:
    return "<s>" + "".join(
        f" {turn.content}</s>" if turn.role == "assistant" else f"[INST] {turn.content} [/INST]" for turn in turns
    )


def gemma(turns: list[Turn]) -> str:
    names = {"assistant": "model"}
    text = "".join(
        f"<start_of_turn>{names.get(turn.role, turn.role)}\n{turn.content.strip()}<end_of_turn>\n" for turn in turns
    )
    return f"<s>{text}<start_of_turn>model\n"


def tagged(turns: list[Turn]) -> str:
    return "".join(f"<|{turn.role}|>\n{turn.content}<|end|>\n" for turn in turns) + "<|assistant|>\n"


def bare(turns: list[Turn]) -> str:
    return "".join(f"{turn.role}: {turn.content}\n" for turn in turns) + "assistant: "


SHAPES = {
    "chatml": Shape(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        chatml,
        "<|im_end|>",
        True,
        eos="<|im_end|>",
    ),
    "headers": Shape(
        "{{ bos_token }}{% for m in messages %}<|header|>{{ m.role }}<|/header|>\n\n{{ m.content | trim }}<|eot_id|>"
        "{% endfor %}{% if add_generation_prompt %}<|header|>assistant<|/header|>\n\n{% endif %}",
        headers,
        "<|eot_id|>",
        True,
    ),
    "brackets": Shape(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
        "{% elif m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}{{ raise_exception('no ' + m.role) }}"
        "{% endif %}{% endfor %}",
        brackets,
        "</s>",
        True,
        begin=" ",
    ),
    "gemma": Shape(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
        "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        gemma,
        "<end_of_turn>",
        True,
    ),
    "tagged": Shape(  # ends the whole text with the tokenizer's own end token, but a turn with another one
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        tagged,
        "<|end|>",
        True,
    ),
    "bare": Shape(  # has no end token of its own
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        bare,
        "</s>",
        False,
    ),
}
# Writes thoughts, empty ones too, but only of answers after the last question.
THINKING = """{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- if tools -%}<|im_start|>system
Tools: {{ tools | tojson }}<|im_end|>
{% endif -%}
{%- for m in messages -%}
<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}
{% set thought = m.reasoning_content or '' -%}
{%- set said = m.content -%}
{%- if m.role == 'assistant' and '</think>' in said -%}
{%- set thought = said.split('</think>')[0].split('<think>')[-1].strip() -%}
{%- set said = said.split('</think>')[-1].lstrip() -%}
{%- endif -%}
{%- if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or thought) -%}<think>
{{ thought }}
</think>

{% endif -%}
{{ said }}
{%- for call in m.tool_calls or [] %}
<tool_call>
{{ call.function | tojson }}
</tool_call>
{%- endfor %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    "contents", [("Hi", "Ho"), ("Hi", "Ho", "Why?", "t"), ("a", "assistant", "a", "", "user", "Hi")]
)
def test_the_trained_text_is_what_generation_would_have_to_write(name: str, contents: tuple[str, ...]) -> None:
    shape = SHAPES[name]
    tokenizer = make_tokenizer(shape.template, shape.eos)
    example = chat(*contents)
    answers = [index for index, turn in enumerate(example.messages) if turn.role == "assistant"]
    expected = [shape.begin + example.messages[index].content + shape.end for index in answers]
    heads = [shape.before(list(example.messages[:index])) for index in answers]
    rows = rows_of(example, tokenizer)
    if shape.together:
        assert rows == [(heads[-1] + expected[-1], expected)]
    else:
        assert rows == [(head + answer, [answer]) for head, answer in zip(heads, expected, strict=True)]
    assert tokenizer.decode(prompt_ids(example, tokenizer)) == heads[-1]
    (joint,) = encode([chat("Hi", "Ho")], tokenizer, None, "jlm").examples
    assert joint.trained == (False, *[True] * (len(joint) - 1))


@pytest.mark.parametrize("name", ["chatml", "headers", "tagged", "bare"])
def test_a_system_prompt_is_seen_and_not_trained(name: str) -> None:
    shape = SHAPES[name]
    ((text, trained),) = rows_of(chat("Hi", "Ho", system="Be."), make_tokenizer(shape.template, shape.eos))
    assert text == shape.before([Turn("system", "Be."), Turn("user", "Hi")]) + "Ho" + shape.end
    assert trained == ["Ho" + shape.end]


@pytest.mark.parametrize("name", ["brackets", "gemma"])
def test_a_template_without_system_prompts_refuses_by_row(name: str) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:1: the model's chat template rejects these messages: no system"):
        encode([chat("Hi", "Ho", system="Be.")], make_tokenizer(SHAPES[name].template), None)


def test_thoughts_are_trained_where_generation_writes_them() -> None:
    tokenizer = make_tokenizer(THINKING, "<|im_end|>")
    turns = (
        Turn("user", "1+1"),
        Turn("assistant", "2", True, {"reasoning_content": "easy"}),
        Turn("user", "2+2"),
        Turn("assistant", "<think>hm</think>4"),
        Turn("user", "?"),
        Turn("assistant", "!"),
    )
    rows = rows_of(Example(messages=turns, source="a:1"), tokenizer)
    assert [trained for _, trained in rows] == [
        ["<think>\neasy\n</think>\n\n2<|im_end|>"],
        ["<think>\nhm\n</think>\n\n4<|im_end|>"],
        ["<think>\n\n</think>\n\n!<|im_end|>"],
    ]
    assert rows[2][0].startswith(
        chatml([Turn("user", "1+1"), Turn("assistant", "2"), Turn("user", "2+2")]) + "4<|im_end|>"
    )
    whole = encode([Example(messages=turns, source="a:1")], tokenizer, None)
    shorter = whole.limited(max(whole.lengths) - 1)
    assert shorter.dropped == {"answer of a chat longer than seq_len": 1}
    assert shorter.summary().startswith("1 of 1 examples in 2 rows")
    (joint,) = encode([Example(messages=turns, source="a:1")], tokenizer, None, "jlm").examples
    assert tokenizer.decode(joint.ids) == rows[2][0]
    plain = make_tokenizer(SHAPES["chatml"].template, "<|im_end|>")
    with pytest.raises(
        DataError, match="a:1: the model's chat template does not include 'reasoning_content' of turn 2"
    ):
        rows_of(Example(messages=turns, source="a:1"), plain)


CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "Huế"}}}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
CALLS = (
    Turn("user", "Weather?"),
    Turn("assistant", "", True, {"tool_calls": [CALL]}),
    Turn("tool", '{"rain": "yes"}', True, {"tool_call_id": "1"}),
    Turn("assistant", "Rain."),
)


def test_tool_calls_are_trained_and_tools_and_results_are_seen() -> None:
    tokenizer = make_tokenizer(THINKING, "<|im_end|>")
    rows = rows_of(Example(messages=CALLS, fields={"tools": TOOLS}, source="a:1"), tokenizer)
    call = f"<tool_call>\n{json.dumps(CALL['function'], ensure_ascii=False)}\n</tool_call><|im_end|>"
    (first, (asked,)), (second, (told,)) = rows
    assert asked == f"<think>\n\n</think>\n\n{call}"
    assert told == "<think>\n\n</think>\n\nRain.<|im_end|>"
    seen = f"<|im_start|>system\nTools: {json.dumps(TOOLS)}<|im_end|>\n"
    assert first.startswith(seen)
    assert second.startswith(seen)
    assert f"\n{call}\n<|im_start|>user\n" + '{"rain": "yes"}<|im_end|>' in second


def test_arguments_go_as_text_to_a_template_that_takes_text() -> None:
    calls = "{% for c in m.tool_calls or [] %}{{ c.function.name + c.function.arguments }}{% endfor %}"
    template = SHAPES["chatml"].template.replace("{{ m.content }}", "{{ m.content }}" + calls)
    ((_, (asked, _)),) = rows_of(Example(messages=CALLS, source="a:1"), make_tokenizer(template, "<|im_end|>"))
    assert asked == 'look{"at": "Huế"}<|im_end|>'


def test_what_a_template_does_not_write_is_refused() -> None:
    tokenizer = make_tokenizer(SHAPES["chatml"].template, "<|im_end|>")
    with pytest.raises(DataError, match=r"a:1: .* does not include 'tool_calls' of turn 2, so it would be left out"):
        encode([Example(messages=CALLS, source="a:1")], tokenizer, None)
    seen = (*CALLS[:1], CALLS[1]._replace(trained=False), *CALLS[2:])
    with pytest.raises(DataError, match="does not include 'tool_calls' of turn 2"):
        encode([Example(messages=seen, source="a:1")], tokenizer, None)
    with pytest.raises(DataError, match="does not include 'tools'"):
        encode([Example(messages=chat("Hi", "Ho").messages, fields={"tools": TOOLS}, source="a:1")], tokenizer, None)
    for name in ("context", "images", "documents"):
        talk = (Turn("user", "Hi", True, {name: ["x"]}), Turn("assistant", "Ho"))
        with pytest.raises(DataError, match=f"does not include '{name}' of turn 1"):
            encode([Example(messages=talk, source="a:1")], tokenizer, None)
    deaf = SHAPES["chatml"].template.replace("in messages", "in messages if m.role != 'tool'")
    with pytest.raises(DataError, match=r"omits or rewrites turn 2 \(tool\)"):
        encode([Example(messages=(CALLS[0], CALLS[2], CALLS[3]), source="a:1")], make_tokenizer(deaf), None)


def test_a_result_that_the_template_quotes_is_there() -> None:
    quoted = "{{ m.content | tojson if m.role == 'tool' else m.content }}"
    quotes = SHAPES["chatml"].template.replace("{{ m.content }}", quoted)
    messages = (CALLS[0], CALLS[2], CALLS[3])
    ((text, _),) = rows_of(Example(messages=messages, source="a:1"), make_tokenizer(quotes, "<|im_end|>"))
    assert r'"{\"rain\": \"yes\"}"' in text


def test_only_the_chosen_answers_are_trained() -> None:
    tokenizer = make_tokenizer(SHAPES["chatml"].template, "<|im_end|>")
    turns = [turn._replace(trained=turn.content != "no") for turn in chat("a", "no", "b", "yes", "c", "no").messages]
    ((text, trained),) = rows_of(Example(messages=tuple(turns), source="a:1"), tokenizer)
    assert trained == ["yes<|im_end|>"]
    assert text.endswith("yes<|im_end|>")


def test_turns_of_one_role_in_a_row() -> None:
    tokenizer = make_tokenizer(SHAPES["chatml"].template, "<|im_end|>")
    turns = (("user", "a"), ("user", "b"), ("assistant", "c"), ("assistant", "d"))
    ((text, trained),) = rows_of(Example(messages=turns, source="a:1"), tokenizer)  # type: ignore[arg-type]
    assert trained == ["c<|im_end|>", "d<|im_end|>"]
    assert text == chatml([Turn(*turn) for turn in turns[:3]]) + "d<|im_end|>"


def test_a_model_without_a_template_is_told_ways_that_work(tmp_path: Any) -> None:
    tokenizer = make_tokenizer(None)
    with pytest.raises(
        DataError,
        match=r"a\.jsonl:1: .*no chat template.*--chat_template FILE.* chat_template\.jinja in the model's directory",
    ):
        encode([chat("Hi", "Ho")], tokenizer, None)
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(SHAPES["headers"].template, encoding="utf-8")
    ((_, trained),) = rows_of(chat("Hi", "Ho"), AutoTokenizer.from_pretrained(tmp_path))
    assert trained == ["Ho<|eot_id|>"]


def test_a_prompt_is_a_chat_up_to_its_last_answer() -> None:
    tokenizer = make_tokenizer(THINKING, "<|im_end|>")
    example = chat("Hi", "Ho", "And?", "Hu")
    expected = chatml(list(example.messages[:3]))
    assert tokenizer.decode(prompt_ids(example, tokenizer)) == expected
    with pytest.raises(DataError, match="nothing to answer"):
        prompt_ids(Example(messages=(("assistant", "Ho"),)), tokenizer)  # type: ignore[arg-type]


@pytest.mark.parametrize("system", ["s", "Tell me something about it."])
def test_a_turn_that_is_left_out_is_missed_although_others_say_the_same(system: str) -> None:
    deaf = SHAPES["chatml"].template.replace("for m in messages", "for m in messages if m['role'] != 'system'")
    example = chat("Tell me something about it.", "yes", system=system)
    with pytest.raises(DataError, match=r"omits or rewrites turn 1 \(system\)"):
        encode([example], make_tokenizer(deaf), None)
    assert len(encode([example], make_tokenizer(SHAPES["chatml"].template), None)) == 1
