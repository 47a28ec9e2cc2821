"""Preference training: losses equal TRL's, rows of several tools are read, and runs learn to rank."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_data_chats import make_tokenizer

import loralib as lora
from loralib import errors
from loralib.cli import main
from loralib.data import Example, PreferencePair, TokenExample, encode, load_examples, read_sources
from loralib.training import run_directory, trainer
from loralib.training.plan import make_plan
from loralib.training.preferences import PREFERENCE_STEPS, dpo_losses, log_odds_ratio, reference_of
from loralib.training.report import plot_losses, read_metrics
from loralib.training.step import make_step

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROWS = [
    {"prompt": "How many legs?", "chosen": " Eight.", "rejected": " It depends."},
    {"prompt": "What colour?", "chosen": " Blue.", "rejected": " No."},
    {"prompt": "How many legs?", "chosen": " 8", "rejected": " nine"},
    {"prompt": "Say a", "chosen": " aaa", "rejected": " b"},
]
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(autouse=True)
def quick_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(trainer, "freeze_objects", nullcontext)
    monkeypatch.setattr(run_directory, "plot_losses", lambda *_: False)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A token for each byte; TRL also starts a text with the start token where the tokenizer does not."""
    made = make_tokenizer(TEMPLATE, eos="<|im_end|>")
    made.bos_token, made.pad_token = None, "<pad>"
    return made


def turns(*contents: str, first: str = "user") -> list[dict[str, str]]:
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[number % 2], "content": content} for number, content in enumerate(contents)]


def as_chat(row: dict[str, str]) -> dict[str, Any]:
    answers = {name: turns(row[name].strip(), first="assistant") for name in ("chosen", "rejected")}
    return {"prompt": turns(row["prompt"]), **answers}


def tiny_model(vocabulary: int, **changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **(sizes | changes)))


def adapted(vocabulary: int, targets: list[str] = TARGETS, std: float = 0.1, **changes: Any) -> Any:
    """A tiny model with an adapter that changes what it computes."""
    model = tiny_model(vocabulary, **changes)
    lora.inject(model, lora.LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    torch.manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=std)
    return model


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def with_reference(step: Any, model: Any, pairs: list[Any]) -> list[PreferencePair]:
    with lora.disabled(model):
        known = reference_of(step, model, pairs)
    return [dataclasses.replace(pair, reference=tuple(row)) for pair, row in zip(pairs, known.tolist(), strict=True)]


def ours(objective: str, model: Any, pairs: list[Any], packing: bool = True, **options: Any) -> tuple[float, Any]:
    """The loss of pairs, and the step; gradients are in the model."""
    kind = partial(PREFERENCE_STEPS[objective], beta=0.3)
    step = make_step(model, packing=packing, kind=kind, **options)
    assert step.packing is packing
    pairs = with_reference(step, model, pairs) if objective == "dpo" else pairs
    stats = step.forward_backward(pairs, loss_scale=step.scales([pairs])[0])
    assert step.figures(stats.sums.tolist())["loss"] == pytest.approx(float(stats.objective), rel=1e-5)
    return float(stats.objective), step


# --- the losses ------------------------------------------------------------------------------------------------------


def trl_s(objective: str, rows: list[dict[str, Any]], tokenizer: Any, output: Path) -> tuple[float, Any]:
    """The loss of TRL's trainer on one batch of its own making, and its model with gradients."""
    pytest.importorskip("trl")
    from datasets import Dataset
    from peft import LoraConfig

    if objective == "dpo":
        from trl import DPOConfig as Config
        from trl import DPOTrainer as Trainer
    else:
        from trl.experimental.orpo import ORPOConfig as Config
        from trl.experimental.orpo import ORPOTrainer as Trainer
    args = Config(
        output_dir=str(output), beta=0.3, per_device_train_batch_size=len(rows), report_to=[], use_cpu=True, bf16=False
    )
    adapter = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM")
    data = Dataset.from_list(rows)
    base = tiny_model(len(tokenizer))
    made = Trainer(model=base, args=args, train_dataset=data, processing_class=tokenizer, peft_config=adapter)
    theirs = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): parameter
        for name, parameter in made.model.named_parameters()
        if "lora_" in name
    }
    with torch.no_grad():
        for name, parameter in adapted(len(tokenizer)).named_parameters():
            if "lora_" in name:
                theirs[name].copy_(parameter)
    made.model.eval()
    (batch,) = made.get_train_dataloader()
    loss = made.compute_loss(made.model, batch)
    loss.backward()
    return float(loss), {name: parameter.grad for name, parameter in theirs.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["text", "chat"])
@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_losses_and_gradients_are_those_of_trl(objective: str, form: str, tokenizer: Any, tmp_path: Path) -> None:
    rows = ROWS if form == "text" else [as_chat(row) for row in ROWS]
    their_loss, theirs = trl_s(objective, rows, tokenizer, tmp_path)
    model = adapted(len(tokenizer))
    pairs = load_examples(rows, tokenizer, seq_len=None, objective=objective).examples
    loss, _ = ours(objective, model, pairs)
    assert loss == pytest.approx(their_loss, rel=1e-5)
    mine = gradients(model)
    assert mine.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert torch.allclose(mine[name], gradient, rtol=1e-5, atol=1e-5), name


@pytest.mark.filterwarnings("ignore")
def test_conservative_dpo_is_a_mean_of_both_ways_round(tokenizer: Any, tmp_path: Path) -> None:
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in ROWS]
    found = [trl_s("dpo", rows, tokenizer, tmp_path) for rows in (ROWS, swapped)]
    model = adapted(len(tokenizer))
    pairs = load_examples(ROWS, tokenizer, seq_len=None, objective="dpo").examples
    loss, step = ours("dpo", model, pairs, label_smoothing=0.2)
    assert loss == pytest.approx(0.8 * found[0][0] + 0.2 * found[1][0], rel=1e-5)
    for name, gradient in gradients(model).items():
        assert torch.allclose(gradient, 0.8 * found[0][1][name] + 0.2 * found[1][1][name], rtol=1e-5, atol=1e-5)
    plain = step.unsmoothed().loss(with_reference(step, model, pairs))
    assert float(plain.loss_sum) / len(pairs) == pytest.approx(found[0][0], rel=1e-5), "validation is not smoothed"


def test_formulas() -> None:
    margins = torch.tensor([-3.0, 0.0, 40.0])
    expected = [math.log1p(math.exp(3)), math.log(2), 0.0]
    assert dpo_losses(margins).tolist() == pytest.approx(expected, abs=1e-6)
    # The odds of 0.9 are 9, those of 0.2 are 1/4.
    p = torch.tensor([0.9, 0.5]).log(), torch.tensor([0.2, 0.5]).log()
    assert log_odds_ratio(*p).tolist() == pytest.approx([math.log(36), 0.0], abs=1e-6)
    # Without cancellation near p = 1, and finite where p rounds to it.
    sure = torch.tensor([-1e-6, 0.0], requires_grad=True)
    ratio = log_odds_ratio(sure, torch.full((2,), math.log(0.5)))
    assert float(ratio[0]) == pytest.approx(-math.log(1e-6), rel=1e-4)
    ratio.sum().backward()
    assert ratio.isfinite().all()
    assert sure.grad is not None
    assert sure.grad.isfinite().all()
    assert float(sure.grad[0]) == pytest.approx(1e6, rel=1e-3)


def some_pairs(seed: int = 0, vocabulary: int = 53) -> list[PreferencePair]:
    """Pairs of many lengths; two share a prompt, and two of these share an answer."""
    generator = torch.Generator().manual_seed(seed)

    def some(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(vocabulary, (count,), generator=generator).tolist())

    def pair(prompt: tuple[int, ...], *answers: tuple[int, ...]) -> PreferencePair:
        rows = [TokenExample(prompt + a, (False,) * len(prompt) + (True,) * len(a)) for a in answers]
        return PreferencePair(rows[0].ids, rows[0].trained, rows[1])

    prompts, answer = [some(5), some(9), some(1)], some(4)
    rest = [pair(prompts[1], some(3), some(3)), pair(prompts[2], some(7), some(1))]
    return [pair(prompts[0], answer, some(6)), pair(prompts[0], some(2), answer), *rest]


@pytest.mark.parametrize("targets", [["q_proj", "up_proj"], ["q_proj", "lm_head"]], ids=["body", "trained head"])
@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_a_packed_row_with_shared_prompts_is_exact(objective: str, targets: list[str]) -> None:
    found = []
    for packing in (True, False):
        model = adapted(53, targets)
        loss, _ = ours(objective, model, some_pairs(), packing=packing)
        found.append((loss, gradients(model)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for name, gradient in found[1][1].items():
        assert torch.allclose(found[0][1][name], gradient, rtol=1e-4, atol=1e-5), name


def test_a_prompt_is_computed_once_for_both_answers() -> None:
    model = adapted(53)
    pair = some_pairs()[2]
    step = make_step(model, kind=partial(PREFERENCE_STEPS["orpo"], beta=0.1))
    stats = step.loss([pair])
    assert (len(pair), stats.tokens) == (9 + 3 + 3, 2 * (9 + 3))
    assert stats.processed_tokens == 9 + 2 + 2, "the prompt, and each answer's tokens that something follows"


def test_two_halves_of_an_update_add_up_to_the_whole() -> None:
    """The two parts of ORPO's loss are averages over different counts, both taken over the whole update."""
    found = []
    for batches in ([some_pairs()], [some_pairs()[:1], some_pairs()[1:]]):
        model = adapted(53)
        step = make_step(model, kind=partial(PREFERENCE_STEPS["orpo"], beta=0.3))
        scales = step.scales(batches)
        losses = [step.forward_backward(b, loss_scale=s).objective for b, s in zip(batches, scales, strict=True)]
        found.append((float(sum(losses)), gradients(model)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert all(torch.allclose(found[0][1][name], found[1][1][name], atol=1e-5) for name in found[0][1])


def test_in_fp16_gradients_are_scaled_on_their_way(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for dtype in (torch.float32, torch.float16):
        model = adapted(53).to(dtype)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
        ours("dpo", model, some_pairs())
        found.append(gradients(model))
    for name, gradient in found[0].items():
        assert float((found[1][name] - gradient).norm()) < 0.05 * float(gradient.norm()), name


# --- the rows --------------------------------------------------------------------------------------------------------

PAIR = ("Question?", "Yes.", "No.")
SAID = {"role": "user", "content": "Question?"}
TEXT = {"prompt": "Question?", "chosen": " Yes.", "rejected": " No."}
CHAT = {
    "prompt": turns("Question?"),
    "chosen": turns("Yes.", first="assistant"),
    "rejected": turns("No.", first="assistant"),
}
OPENAI = {
    "input": {"messages": turns("Question?"), "tools": [], "parallel_tool_calls": True},
    "preferred_output": turns("Yes.", first="assistant"),
    "non_preferred_output": turns("No.", first="assistant"),
}
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "prompt, chosen and rejected": (TEXT, {}),
    "question, chosen and rejected": ({"question": "Question?", "chosen": "Yes.", "rejected": "No."}, {}),
    "as a chat": ({**TEXT, "system": "Be brief."}, {"as_chat": True}),
    "TRL's turns": (CHAT, {}),
    "a text and turns": ({**CHAT, "prompt": "Question?"}, {}),
    "whole conversations": ({"chosen": turns("Question?", "Yes."), "rejected": turns("Question?", "No.")}, {}),
    "and what was asked": (
        {
            "prompt": "Question?",
            "chosen": turns("Question?", "Yes."),
            "rejected": turns("Question?", "No."),
            "score": 3,
        },
        {},
    ),
    "and the chosen one again": (
        {"chosen": (said := turns("Question?", "Yes.")), "rejected": turns("Question?", "No."), "messages": said},
        {},
    ),
    "texts that begin alike": ({"chosen": "Question?\n\nA: Yes.", "rejected": "Question?\n\nA: No."}, {}),
    "OpenAI's": (OPENAI, {}),
    "ShareGPT's": (
        {
            "conversations": [{"from": "human", "value": "Question?"}],
            "chosen": {"from": "gpt", "value": "Yes."},
            "rejected": {"from": "gpt", "value": "No."},
        },
        {},
    ),
    "and a list of one turn": (
        {
            "conversations": [{"from": "human", "value": "Question?"}],
            "chosen": [{"from": "gpt", "value": "Yes."}],
            "rejected": [{"from": "gpt", "value": "No."}],
        },
        {},
    ),
    "a text and ShareGPT's turns": (
        {
            "prompt": "Question?",
            "chosen": [{"from": "gpt", "value": "Yes."}],
            "rejected": [{"from": "gpt", "value": "No."}],
        },
        {},
    ),
    "a prompt that the texts repeat": (
        {"prompt": "Question?", "chosen": "Question? Yes.", "rejected": "Question? No."},
        {},
    ),
    "turns that the conversations repeat": (
        {
            "prompt": [{"role": "system", "content": "Be brief."}, *turns("Question?")],
            "chosen": turns("Question?", "Yes."),
            "rejected": turns("Question?", "No."),
        },
        {},
    ),
    "other columns": (
        {"q": "Question?", "good": "Yes.", "bad": "No."},
        {"columns": "prompt=q,chosen=good,rejected=bad"},
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_rows_of_several_tools_are_recognised(name: str, tokenizer: Any, tmp_path: Path) -> None:
    row, how = FORMS[name]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    (source,) = read_sources(str(path), objective="dpo", **how)
    assert source.notes[0].startswith(f"{path}: preferences (")
    (pair,) = encode(source.examples, tokenizer, None, "dpo").examples
    texts = [tokenizer.decode([t for t, on in zip(each.ids, each.trained, strict=True) if on]) for each in pair.rows]
    assert [text.strip() for text in texts] == [f"{answer}<|im_end|>" for answer in PAIR[1:]]
    prompts = {tokenizer.decode(each.prompt) for each in pair.rows}
    assert len(prompts) == 1
    assert prompts.pop().count("Question?") == 1
    assert pair.shared == len(pair.prompt) > 0


def test_tables_hold_turns_as_json(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    cells = [json.dumps(CHAT[name]).replace('"', '""') for name in CHAT]
    path.write_text(",".join(CHAT) + "\n" + ",".join(f'"{cell}"' for cell in cells) + "\n", encoding="utf-8")
    (example,) = read_sources(str(path), objective="orpo")[0].examples
    assert (example.prompt, example.completion) == PAIR[:2]
    assert example.rejected is not None
    assert example.rejected.completion == PAIR[2]


def test_turns_that_both_conversations_have_are_not_learned(tokenizer: Any) -> None:
    row = {"chosen": turns("One?", "1", "Two?", "2"), "rejected": turns("One?", "1", "Two?", "3")}
    (pair,) = load_examples([row], tokenizer, seq_len=None, objective="dpo").examples
    assert [sum(each.trained) for each in pair.rows] == [2, 2], "a digit and the end token"


def test_rows_that_cannot_be_learned_from_are_all_named(tmp_path: Path) -> None:
    rows = [
        TEXT,
        {**TEXT, "rejected": " Yes. "},
        {**TEXT, "chosen": ""},
        {"prompt": "Question?", "chosen": "Yes."},
        {**TEXT, "rejected": turns("No.", first="assistant")},
        {"chosen": "Yes.", "rejected": "No."},
        {"chosen": turns("Question?", "Yes."), "rejected": turns("Question?")},
        {**CHAT, "rejected": CHAT["chosen"]},
        {**TEXT, "chosen": 5, "rejected": 6},
        {**FORMS["and what was asked"][0], "prompt": "Something else?"},
        {**TEXT, "rejected": None},
        {**CHAT, "chosen": [{**CHAT["chosen"][0], "weight": 0}]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(errors.DataError) as caught:
        read_sources(str(path), objective="dpo")
    words = [
        "identical, so there is nothing to prefer", "chosen has no answer", "found 'prompt', 'chosen', expected",
        "chosen is text, and rejected is a list", "do not have the same beginning",
        "rejected: 'messages' has no turn with role", "identical, so", "chosen is a number",
        "the prompt does not occur in it: 'Something else?'", "rejected is null, expected text",
        "chosen: the answer has no turn with role 'assistant' to train on: all have weight 0",
    ]  # fmt: skip
    lines = str(caught.value).splitlines()
    for number, word in enumerate(words, 2):
        (line,) = [line for line in lines if f"rows.jsonl:{number}:" in line]
        assert word in line, line


def test_a_fault_of_both_answers_is_told_once(tokenizer: Any) -> None:
    (source,) = read_sources([{**CHAT, "tools": [{"name": "add"}]}], objective="dpo")
    with pytest.raises(errors.DataError) as caught:
        encode(source.examples, tokenizer, None, "dpo")
    assert str(caught.value).count("tools") == 1


def test_data_for_another_objective_are_refused_with_the_fix(tokenizer: Any) -> None:
    with pytest.raises(errors.DataError, match=r"--objective dpo \(or orpo\) learns from both answers"):
        read_sources([TEXT])
    with pytest.raises(errors.DataError, match="found 'prompt', 'completion', expected prompt, chosen and rejected"):
        read_sources([{"prompt": "a", "completion": "b"}], objective="dpo")
    one = Example.of("a", "b", "here:1")
    with pytest.raises(errors.DataError, match=r"1 of 1 examples \(the first: here:1\) have no rejected answer"):
        read_sources([one], objective="orpo")
    with pytest.raises(errors.DataError, match=r"would learn only the chosen one\. Train with --objective dpo"):
        read_sources([dataclasses.replace(one, rejected=Example.of("a", "c"))])
    with pytest.raises(errors.DataError, match="have no rejected answer, unlike the first"):
        read_sources([dataclasses.replace(one, rejected=Example.of("a", "c")), one], objective=None)
    for data, objective in ((some_pairs(), "clm"), ([some_pairs()[0].rows[0]], "dpo")):
        with pytest.raises(errors.DataError, match=rf"expected \w+ for objective {objective}"):
            make_plan(tiny_model(53), data, None, None, lora.TrainConfig(objective=objective), lambda _: None)
    same = [dataclasses.replace(Example.of("a", "b", f"x:{n}"), rejected=Example.of("a", "b")) for n in (1, 2)]
    with pytest.raises(errors.DataError, match=r"(?s)x:1: chosen and rejected have the same tokens.*x:2"):
        encode(same, tokenizer, None, "dpo")


def test_settings_that_contradict_an_objective_are_named_together() -> None:
    with pytest.raises(errors.ConfigError) as caught:
        lora.TrainConfig(objective="dpo", label_smoothing=0.5, arithmetic="paper", beta=0.0)
    for words in (
        "expected less than 0.5 with dpo",
        "arithmetic is 'paper', which does not support dpo",
        "beta is 0.0",
    ):
        assert words in str(caught.value)
    with pytest.raises(errors.ConfigError, match=r"label_smoothing is 0\.1, which orpo does not use"):
        lora.TrainConfig(objective="orpo", label_smoothing=0.1)
    with pytest.raises(errors.ConfigError, match=r"beta is 0\.2, which clm does not use"):
        lora.TrainConfig(beta=0.2)


def test_a_preview_shows_both_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(TEXT) + "\n", encoding="utf-8")
    assert main(["data", "preview", str(path), "--color", "never"]) == 0
    shown = capsys.readouterr().out
    assert "preferences (prompt, chosen and rejected), 1 example" in shown
    assert "\nchosen: Question·?[ Yes·.·<|im_end|>]\nrejected: Question·?[ No·.·<|im_end|>]\n" in shown


# --- runs ------------------------------------------------------------------------------------------------------------


def numbers(count: int = 24, seed: int = 0) -> list[PreferencePair]:
    """Answers of small numbers are preferred to answers of large ones."""
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for _ in range(count):
        ranges = ((3, 23), (3, 13), (13, 23))
        prompt, *answers = (torch.randint(*each, (4,), generator=generator).tolist() for each in ranges)
        rows = [TokenExample((*prompt, 2, *a, 1), (False,) * 5 + (True,) * 5) for a in answers]
        pairs.append(PreferencePair(rows[0].ids, rows[0].trained, rows[1]))
    return pairs


def settings(output: Path, **changes: Any) -> lora.TrainConfig:
    values: dict[str, Any] = {
        "output_dir": str(output), "objective": "dpo", "rank": 4, "lr": 5e-3, "batch_size": 8, "num_epochs": 6,
        "warmup_steps": 0, "keep_checkpoints": 2,
    }  # fmt: skip
    return lora.TrainConfig(**(values | changes))


def train(config: lora.TrainConfig, model: Any = None, **given: Any) -> Any:
    data = {"data": numbers(), "valid_data": numbers(8, seed=1)} | given
    return lora.train(tiny_model(23) if model is None else model, config=config, **({"verbose": False} | data))


def events(output: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_metrics(output / "metrics.jsonl") if event["event"] == kind]


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_a_run_learns_to_rank_answers(objective: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    panels: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_directory, "plot_losses", lambda *given: panels.append(given[3:]) or plot_losses(*given))
        config = settings(tmp_path, objective=objective, beta={"dpo": 0.1, "orpo": 1.0}[objective], lr=1e-2)
        train(config, data=numbers(64), verbose=True)
    first, last = events(tmp_path, "valid")[0], events(tmp_path, "valid")[-1]
    assert last["loss"] < first["loss"]
    assert last["accuracy"] > 0.8
    assert last["margin"] > first["margin"]
    assert last["margin"] == pytest.approx(last["chosen_reward"] - last["rejected_reward"], abs=1e-6)
    if objective == "dpo":
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-4), "the adapter starts as the reference"
        assert first["accuracy"] == pytest.approx(0.5, abs=0.5)
    else:
        assert last["loss"] == pytest.approx(last["nll"] + last["odds_ratio_loss"], rel=1e-6)
    assert {"accuracy", "margin"} <= events(tmp_path, "train")[-1].keys()
    assert f", accuracy {last['accuracy']:.3f}, margin {last['margin']:.3f}\n" in capsys.readouterr().out
    assert panels == [("pair", ("accuracy", "margin"))]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


class StoppedError(Exception):
    """Ends a run prematurely."""


@pytest.mark.parametrize("keeps", [True, False], ids=["read again", "computed again"])
def test_a_resumed_run_ends_with_the_same_bytes(keeps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(tmp_path / "whole", save_steps=4, lora_dropout=0.1, grad_accum=2, batch_size=4, early_stopping=9)
    train(config)
    computed: list[int] = []
    compute, update = trainer.reference_of, trainer.Trainer._update
    monkeypatch.setattr(trainer, "reference_of", lambda *a, **k: computed.append(1) or compute(*a, **k))

    def stopping(self: Any, batches: Any) -> Any:
        if self.progress.step == 6:
            raise StoppedError
        return update(self, batches)

    config = config.replace(output_dir=str(tmp_path / "halves"))
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_update", stopping)
        with pytest.raises(StoppedError):
            train(config)
    kept = tmp_path / "halves" / "checkpoints" / "reference.safetensors"
    assert kept.exists()
    if not keeps:
        kept.unlink()
    train(config.replace(resume=True))
    assert len(computed) == (1 if keeps else 2)
    for name in ("adapter_model.safetensors", "best/adapter_model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "halves" / name).read_bytes()
    assert losses(tmp_path / "whole") == losses(tmp_path / "halves")


def losses(output: Path) -> list[tuple[float, ...]]:
    found = list(read_metrics(output / "metrics.jsonl"))
    return [(event["loss"], event["accuracy"], event["margin"]) for event in found]


def test_a_signal_ends_a_run_that_computes_its_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = trainer.reference_of

    def interrupted(*given: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return compute(*given, **options)

    monkeypatch.setattr(trainer, "reference_of", interrupted)
    with pytest.raises(errors.InterruptedRunError, match="SIGTERM: stopped before the first update"):
        train(settings(tmp_path))
    monkeypatch.setattr(trainer, "reference_of", compute)
    train(settings(tmp_path, max_steps=1))


def test_a_finished_run_leaves_no_reference_behind(tmp_path: Path) -> None:
    train(settings(tmp_path, max_steps=2, keep_checkpoints=0))
    assert not (tmp_path / "checkpoints").exists()


def test_the_reference_of_a_run_that_trains_on_is_what_it_starts_from(tmp_path: Path) -> None:
    train(settings(tmp_path / "first"))
    config = settings(tmp_path / "second", from_adapter=str(tmp_path / "first"), max_steps=2)
    train(config)
    first = events(tmp_path / "second", "valid")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert first["margin"] == pytest.approx(0, abs=1e-3)


def test_accumulated_updates_are_those_of_a_large_batch(tmp_path: Path) -> None:
    for objective in ("dpo", "orpo"):
        for name, sizes in (("once", {"batch_size": 8}), ("parts", {"batch_size": 2, "grad_accum": 4})):
            train(settings(tmp_path / name, objective=objective, num_epochs=1, overwrite=True, **sizes))
        for a, b in zip(losses(tmp_path / "once"), losses(tmp_path / "parts"), strict=True):
            assert a == pytest.approx(b, abs=1e-4)


@pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked")
@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_ranks_are_one_run(objective: str, tmp_path: Path) -> None:
    from test_ranks import all_alike, is_close, together

    config = settings(tmp_path / "alone", objective=objective, num_epochs=2, batch_size=6)
    train(config)
    all_alike(together(3, lambda rank: len(train(config.replace(output_dir=str(tmp_path / "several"))).losses)))
    assert is_close(tmp_path / "several", tmp_path / "alone", 1e-4)
    for a, b in zip(losses(tmp_path / "alone"), losses(tmp_path / "several"), strict=True):
        assert a == pytest.approx(b, abs=1e-4)
