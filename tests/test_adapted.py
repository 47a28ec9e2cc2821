"""An adapter and the tokenizer it was trained with: template and end token travel, prompts become turns, turns end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import loralib as lora
from loralib.bases import load_adapted, save_tokenizer, trained_on_chats
from loralib.bases.adapted import with_chat_template
from loralib.cli import main
from loralib.data import Example, TokenExample, encode
from loralib.data.records import Turn
from loralib.data.turn_ends import are_chats, turn_ends
from loralib.errors import ConfigError, OutputError
from loralib.generation.text import end_tokens, end_with_turns

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %}"
    " {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
CHAT = Example(messages=(Turn("user", "Hi there"), Turn("assistant", "Hello")))


def make_tokenizer(template: str | None = None, **settings: Any) -> Any:
    letters = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", *map(chr, range(33, 127)), "\u0120", "\u010a"]
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"eos_token": "</s>", "bos_token": "<s>", "pad_token": "<pad>", **settings}
    special["additional_special_tokens"] = ["<|im_start|>", "<|im_end|>"]
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    made.chat_template = template
    return made


def make_model(rows: int) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=rows, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    tokenizer = make_tokenizer()
    make_model(len(tokenizer)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def trained(base: Path, output: Path, data: list[Example], template: str | None, **settings: Any) -> Path:
    model, _ = lora.load_base(str(base), dtype="fp32", device="cpu")
    config = lora.TrainConfig(output_dir=str(output), max_steps=1, warmup_steps=0, batch_size=2, rank=2, **settings)
    lora.train(model, data, config, tokenizer=make_tokenizer(template), valid_data=data, verbose=False)
    return output


@pytest.mark.parametrize("template", [CHATML, INST])
def test_chats_are_told_from_other_text_by_how_answers_begin(template: str) -> None:
    tokenizer = make_tokenizer(template)
    chats = encode([CHAT, CHAT], tokenizer, 100).examples
    text = encode([Example.of("Hi there", "Hello")], tokenizer, 100).examples
    assert are_chats(chats, tokenizer)
    assert are_chats(encode([CHAT], tokenizer, 100, "jlm").examples, tokenizer)
    assert not are_chats(text, tokenizer)
    assert not are_chats([*chats, *text], tokenizer)
    assert not are_chats(chats, make_tokenizer())
    assert not are_chats([], tokenizer)
    assert not are_chats([TokenExample((5, 6), (False, False))], tokenizer)


def test_a_template_file_may_have_a_byte_order_mark_but_not_be_empty(tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(CHATML, encoding="utf-8-sig")
    assert with_chat_template(make_tokenizer(), file).chat_template == CHATML
    for nothing in ("", "{% set x = 1 %}\n"):
        file.write_text(nothing, encoding="utf-8")
        with pytest.raises(ConfigError, match=r"chat\.jinja writes nothing for a chat"):
            with_chat_template(make_tokenizer(), file)


def test_a_turn_ends_as_the_template_ends_it() -> None:
    assert turn_ends(make_tokenizer(CHATML)) == [4]
    assert turn_ends(make_tokenizer(INST)) == [2]
    assert turn_ends(make_tokenizer()) == []
    model = make_model(101)
    end_with_turns(model, make_tokenizer(CHATML))
    assert end_tokens(model) == [2, 4]
    end_with_turns(model, make_tokenizer(CHATML))
    assert model.generation_config.eos_token_id == [2, 4]


def test_template_and_end_token_of_training_are_those_of_use(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = trained(base, tmp_path / "chats", [CHAT] * 4, CHATML, eval_steps=1)
    assert trained_on_chats(adapter)
    assert trained_on_chats(adapter / "best")
    assert trained_on_chats(base) is None
    _, tokenizer = load_adapted(str(adapter), model=str(base), device="cpu")
    assert tokenizer.chat_template == CHATML
    assert "differs from the base's in: chat template\n" in capsys.readouterr().err
    assert main(["generate", "Hi", "--model", str(base), "--adapter", str(adapter), "--max_new_tokens", "6"]) == 0
    out, err = capsys.readouterr()
    assert "each prompt is treated as a user's turn (--raw" in err
    model, tokenizer = load_adapted(str(adapter), model=str(base), device="cpu")
    turn = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    end_with_turns(model, tokenizer)
    asked, raw = (
        lora.generate(model, tokenizer, [tokenizer(text, add_special_tokens=False)["input_ids"]], max_new_tokens=6)
        for text in (turn, "Hi")
    )
    assert out == asked[0].text + "\n"
    common = ["--model", str(base), "--adapter", str(adapter), "--max_new_tokens", "6"]
    capsys.readouterr()
    assert main(["generate", "Hi", "--raw", *common]) == 0
    out, err = capsys.readouterr()
    assert out == raw[0].text + "\n"
    assert "trained on chats, but prompts are continued as they are" in err


def test_an_adapter_trained_on_text_continues_prompts(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = trained(base, tmp_path / "text", [Example.of("Hi", " you")] * 4, CHATML)
    assert trained_on_chats(adapter) is False
    assert main(["generate", "Hi", "--model", str(base), "--adapter", str(adapter), "--max_new_tokens", "2"]) == 0
    assert "turn" not in capsys.readouterr().err
    texts = tmp_path / "texts.jsonl"
    common = ["--model", str(base), "--adapter", str(adapter), "--max_new_tokens", "2", "-o", str(texts)]
    assert main(["generate", "Hi", "--as_chat", *common]) == 0
    assert main(["generate", "Hi", *common]) == 2  # texts made with another template
    assert "as_chat" in capsys.readouterr().err


def test_an_answer_ends_with_its_turn(base: Path) -> None:
    """Also where the tokenizer's end token is another."""
    model, _ = lora.load_base(str(base), dtype="fp32", device="cpu")
    tokenizer = make_tokenizer(CHATML)
    end_with_turns(model, tokenizer)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[4] = model.model(torch.tensor([[5]])).last_hidden_state[0, -1]
    [answer] = lora.generate(model, tokenizer, [[5]], max_new_tokens=4)
    assert (answer.ids, answer.finish_reason) == ((), "stop")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("in_full", [["embed_tokens", "lm_head"], None], ids=["trained", "carried"])
def test_another_tools_adapter_with_more_tokens_resizes_the_table(
    base: Path, tmp_path: Path, in_full: list[str] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    tokenizer = make_tokenizer(CHATML)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>", "<|done|>"]})
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=in_full)
    theirs = peft.get_peft_model(model, settings).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    tokenizer.save_pretrained(tmp_path)
    ours, own = load_adapted(str(tmp_path), model=str(base), dtype="fp32", device="cpu")
    assert len(own) == len(tokenizer)
    said = "".join(capsys.readouterr())
    assert f"have {len(tokenizer)} rows, as in the adapter, instead of {len(tokenizer) - 2}, as in the base" in said
    ids = torch.tensor([[5, 6, len(tokenizer) - 1]])
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)


def test_a_disk_that_is_full_is_named_where_a_tokenizer_is_saved(tmp_path: Path, monkeypatch: Any) -> None:
    """The tokenizers library raises an Exception of no further kind."""
    tokenizer = make_tokenizer()

    def full(*_: Any, **__: Any) -> None:
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(tokenizer, "save_pretrained", full)
    with pytest.raises(OutputError, match="the disk is full"):
        save_tokenizer(tokenizer, tmp_path)


def test_a_tokenizer_is_saved_with_what_it_was_used_for(tmp_path: Path) -> None:
    save_tokenizer(object(), tmp_path)
    assert not list(tmp_path.iterdir())
    save_tokenizer(make_tokenizer(CHATML), tmp_path, chats=True)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again.chat_template == CHATML
    assert again("Hi")["input_ids"] == make_tokenizer()("Hi")["input_ids"]
    assert "chats" in json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8")).values()
