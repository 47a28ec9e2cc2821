"""Classifying texts: against transformers' own loss, PEFT's adapters and the metrics' definitions."""

from __future__ import annotations

import copy
import json
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import loralib as lora
from loralib.bases.classifiers import (
    class_names,
    labels_in,
    load_adapted_classifier,
    load_classifier,
    new_modules,
)
from loralib.bases.loading import load_tokenizer
from loralib.cli import main, run_command
from loralib.data import ClassRow, Labels, encode_classes, read_sources
from loralib.errors import AdapterError, BaseModelError, ConfigError
from loralib.formats import read_adapter
from loralib.training import TrainConfig
from loralib.training.class_metrics import class_figures, confusion, moments, number_figures, spearman
from loralib.training.classification import ClassificationStep
from loralib.training.predicting import metrics_of, predict

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SIZES: dict[str, Any] = {
    "vocab_size": 80, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
GPT2: dict[str, Any] = {"vocab_size": 80, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "pad_token_id": 0}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
C = transformers
# A config for each shape, and which of its modules are adapted.
SHAPES: dict[str, tuple[Any, Any]] = {
    "bert": (lambda: C.BertConfig(**SIZES, **NO_DROPOUT), ["query", "value"]),
    "roberta": (lambda: C.RobertaConfig(**{**SIZES, "pad_token_id": 1}, **NO_DROPOUT), ["query", "value"]),
    "deberta": (
        lambda: C.DebertaV2Config(**SIZES, **NO_DROPOUT, relative_attention=True, pos_att_type=["c2p", "p2c"]),
        ["query_proj", "value_proj"],
    ),
    "modernbert": (lambda: C.ModernBertConfig(**SIZES, local_attention=8), ["Wqkv", "Wo"]),
    "distilbert": (
        lambda: C.DistilBertConfig(
            vocab_size=80, dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=64,
            dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0,
        ),
        ["q_lin", "v_lin"],
    ),
    "gpt2": (lambda: C.GPT2Config(**GPT2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), ["c_attn"]),
    "llama": (lambda: C.LlamaConfig(**SIZES, num_key_value_heads=2), ["q_proj", "v_proj", "down_proj"]),
}  # fmt: skip
DECODERS = ("gpt2", "llama")


def classifier(shape: str, labels: int = 3, seed: int = 0) -> Any:
    """A tiny classifier with random weights."""
    torch.manual_seed(seed)
    config = SHAPES[shape][0]()
    config.num_labels = labels
    if labels == 1:
        config.problem_type = "regression"
    model = C.AutoModelForSequenceClassification.from_config(config)
    for parameter in model.parameters():  # initial weights are so small that all logits are alike
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def rows(count: int, labels: int = 3, seed: int = 0) -> list[ClassRow]:
    """Random texts of several lengths, some with the same beginning."""
    rng = random.Random(seed)
    start = [rng.randrange(5, 80) for _ in range(4)]
    made = []
    for number in range(count):
        ids = [*start[: rng.choice((0, 4))], *(rng.randrange(5, 80) for _ in range(rng.randrange(2, 12)))]
        label = rng.randrange(labels) if labels > 1 else rng.uniform(0, 5)
        made.append(ClassRow(tuple(ids), (False,) * len(ids), label))
        assert number >= 0
    return made


def padded(batch: Sequence[ClassRow], pad: int) -> dict[str, Tensor]:
    """The same texts as transformers takes them."""
    longest = max(map(len, batch))
    return {
        "input_ids": torch.tensor([[*row.ids, *[pad] * (longest - len(row))] for row in batch]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in batch]),
        "labels": torch.tensor([row.label for row in batch]),
    }


@pytest.fixture(scope="module")
def words() -> Any:
    """A tokenizer of whole words, without an end token, as encoders have them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    known = "[PAD] [UNK] [CLS] [SEP] the a film meal room book was is so very today"
    known += " good great fine bad poor awful"
    vocabulary = {word: number for number, word in enumerate(known.split())}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return C.BertTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def reviews(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows whose label depends on one word."""
    rng = random.Random(seed)
    kinds = {"good": ["good", "great", "fine"], "bad": ["bad", "poor", "awful"]}
    made = []
    for _ in range(count):
        label = rng.choice(list(kinds))
        thing, word = rng.choice(["film", "meal", "room", "book"]), rng.choice(kinds[label])
        made.append({"text": f"the {thing} was {rng.choice(['so', 'very'])} {word} today", "label": label})
    return made


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, words: Any) -> str:
    """A directory with a tiny BERT that has no head, and its tokenizer."""
    path = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    C.BertModel(C.BertConfig(**{**SIZES, "initializer_range": 0.1})).save_pretrained(path)
    words.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reviews")
    for name, count, seed in (("train", 64, 1), ("valid", 32, 2)):
        lines = "".join(json.dumps(row) + "\n" for row in reviews(count, seed))
        (path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(base: str, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a trained classifier."""
    out = tmp_path_factory.mktemp("run")
    assert main(["train", *flags(base, data, out)]) == 0
    return out


def flags(base: str, data: Path, out: Path, **more: Any) -> list[str]:
    settings = {
        "task": "classify", "train_data": data / "train.jsonl", "valid_data": data / "valid.jsonl", "model": base,
        "output_dir": out, "rank": 4, "num_epochs": 4, "lr": 5e-3, "dtype": "fp32", **more,
    }  # fmt: skip
    return [part for name, value in settings.items() for part in (f"--{name}", str(value)) if value is not None]


# --- the loss, its gradients and the updates, against transformers and PEFT -------------------------------------------


@pytest.mark.parametrize("labels", [3, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_three_updates_are_those_of_peft_and_transformers_own_loss(shape: str, labels: int) -> None:
    config = {"r": 4, "lora_alpha": 8, "target_modules": SHAPES[shape][1], "task_type": "SEQ_CLS"}
    ours, theirs = classifier(shape, labels), classifier(shape, labels)
    lora.inject(ours, lora.LoraConfig(**config))
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(**config, fan_in_fan_out=shape == "gpt2"))
    # The same start for both; B is not zero, so that A has a gradient.
    torch.manual_seed(1)
    pairs = matching(ours, wrapped)
    for mine, other in pairs.values():
        if mine.dim() == 2 and mine.shape == other.shape:
            mine.data.copy_(0.2 * torch.randn_like(mine))
        other.data.copy_(mine.data)
    names = tuple(f"LABEL_{number}" for number in range(labels)) if labels > 1 else ()
    step = ClassificationStep(ours, Labels(names))
    assert step.packing == (shape in DECODERS), step.note
    optimizers = [torch.optim.AdamW([pair[which] for pair in pairs.values()], lr=1e-2) for which in (0, 1)]
    ours.train()
    wrapped.train()
    for number in range(3):
        batch = rows(9, labels, seed=number)
        parts = [batch[:4], batch[4:]]
        for optimizer in optimizers:
            optimizer.zero_grad()
        with step:
            stats = [
                step.forward_backward(part, loss_scale=scale)
                for part, scale in zip(parts, step.scales(parts), strict=True)
            ]
        loss = wrapped(**padded(batch, ours.config.pad_token_id)).loss
        loss.backward()
        assert float(sum(each.objective.detach() for each in stats)) == pytest.approx(float(loss.detach()), rel=1e-5)
        for name, (mine, other) in pairs.items():
            assert mine.grad is not None, name
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-5, msg=name)
        for optimizer in optimizers:
            optimizer.step()


def matching(ours: nn.Module, theirs: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Pairs of trained parameters by PEFT's names."""

    def plain(name: str) -> str:
        name = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
        return name.replace(".default.weight", "").replace(".base_layer", "")

    mine = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    others = {plain(name): p for name, p in theirs.named_parameters() if p.requires_grad}
    assert mine.keys() == others.keys()
    return {name: (mine[name], others[name]) for name in mine}


@pytest.mark.parametrize("shape", DECODERS)
def test_packed_texts_have_the_models_own_logits(shape: str) -> None:
    model, batch = classifier(shape), rows(9)
    step = ClassificationStep(model, Labels(class_names(model)))
    assert step.packing
    assert step.share_prompts
    inputs = padded(batch, 0)
    del inputs["labels"]
    torch.testing.assert_close(step.logits(batch), model(**inputs).logits, rtol=1e-4, atol=1e-5)
    stats = step.loss(batch)
    assert stats.processed_tokens < stats.tokens  # beginnings that texts share are there once


def test_a_text_ends_before_its_padding_tokens_as_in_transformers() -> None:
    """Some tokenizers end a text with the token that they pad with."""
    model, batch = classifier("llama"), rows(5)
    model.config.pad_token_id = 3
    ended = [ClassRow((*row.ids, 3), (False,) * (len(row) + 1), row.label) for row in batch]
    step = ClassificationStep(model, Labels(class_names(model)))
    inputs = padded(ended, 3)
    del inputs["labels"]
    assert step.packing
    torch.testing.assert_close(step.logits(ended), model(**inputs).logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(step.logits(ended), step.logits(batch))


@pytest.mark.parametrize(
    "config",
    [
        C.XLNetConfig(vocab_size=80, d_model=32, n_layer=1, n_head=4, d_inner=48, pad_token_id=0),
        C.FNetConfig(vocab_size=80, hidden_size=32, intermediate_size=48, num_hidden_layers=1, pad_token_id=0),
    ],
)
def test_a_model_that_sees_padding_gets_none(config: Any) -> None:
    """XLNet's texts end where its rows do, and FNet takes no mask: each text counts by itself."""
    torch.manual_seed(0)
    model = C.AutoModelForSequenceClassification.from_config(config).eval()
    batch = rows(9, labels=2)
    single = torch.cat([model(input_ids=torch.tensor([row.ids])).logits for row in batch])
    step = ClassificationStep(model, Labels(class_names(model)))
    torch.testing.assert_close(step.logits(batch), single, rtol=1e-4, atol=1e-5)
    assert sorted(len(row) for part in step.passes(batch) for row in part) == sorted(map(len, batch))


def test_texts_of_like_length_go_together_and_come_back_in_order() -> None:
    model = classifier("bert")
    batch = [ClassRow(tuple(range(5, 5 + length)), (False,) * length, 0) for length in [30, 3, 28, 4, 30, 3, 29, 4]]
    step = ClassificationStep(model, Labels(class_names(model)))
    alone = torch.cat([step.logits([row]) for row in batch])
    torch.testing.assert_close(step.logits(batch), alone, rtol=1e-4, atol=1e-5)
    assert step.loss(batch).processed_tokens < 1.1 * sum(map(len, batch))


# --- metrics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 4])
def test_metrics_of_classes_are_scikit_learns(classes: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = random.Random(classes)
    true = [rng.randrange(classes) for _ in range(200)]
    taken = [label if rng.random() < 0.6 else rng.randrange(classes) for label in true]
    figures = class_figures(confusion(torch.tensor(true), torch.tensor(taken), classes).tolist(), classes)
    assert figures["accuracy"] == pytest.approx(metrics.accuracy_score(true, taken))
    assert figures["macro_f1"] == pytest.approx(metrics.f1_score(true, taken, average="macro"))
    assert figures["matthews"] == pytest.approx(metrics.matthews_corrcoef(true, taken))
    if classes == 2:
        assert figures["f1"] == pytest.approx(metrics.f1_score(true, taken))


def test_metrics_of_two_classes_by_their_formulas() -> None:
    tn, fp, fn, tp = 30, 12, 5, 53
    figures = class_figures([tn, fp, fn, tp], 2)
    positive, negative = 2 * tp / (2 * tp + fp + fn), 2 * tn / (2 * tn + fp + fn)
    root = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    expected = {"accuracy": 0.83, "f1": positive, "macro_f1": (positive + negative) / 2}
    assert figures == pytest.approx({**expected, "matthews": (tp * tn - fp * fn) / root})
    # A class that never occurs does not count, and without variation there is no correlation.
    assert class_figures([4, 0, 0, 0], 2) == {"accuracy": 1.0, "f1": 0.0, "macro_f1": 1.0, "matthews": 0.0}


def test_correlations_are_pytorchs_and_those_of_ranks() -> None:
    torch.manual_seed(0)
    x = torch.rand(50).round(decimals=1) * 5
    y = x + torch.randn(50)
    pearson = float(torch.corrcoef(torch.stack([x, y]).double())[0, 1])
    assert number_figures(moments(x, y).tolist(), 50)["pearson"] == pytest.approx(pearson)
    by_hand = [sum(float(b < a) + float(b == a) / 2 for b in x) for a in x]  # mid-ranks, up to a constant
    ranks = torch.tensor([by_hand, [float((y < b).sum()) for b in y]])
    assert spearman(x.tolist(), y.tolist()) == pytest.approx(float(torch.corrcoef(ranks)[0, 1]))


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_tells_its_figures(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [event for event in events if event["event"] == "valid"][-1]
    assert last["accuracy"] > 0.9
    assert {"f1", "macro_f1", "matthews"} <= last.keys()
    config = json.loads((run / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    # The tiny BERT was saved without a head; its pooler is there, so that the classifier alone is new.
    assert set(config["modules_to_save"]) == {"classifier"}
    assert labels_in(read_adapter(run)) == ("bad", "good")


def test_what_a_checkpoint_lacks_trains_and_is_saved_with_the_adapter(tmp_path: Path, words: Any) -> None:
    C.DebertaV2Model(SHAPES["deberta"][0]()).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    first, _ = load_classifier(tmp_path, ["a", "b"], dtype="fp32", seed=1)
    assert new_modules(first) == ("classifier", "pooler")  # DeBERTa's pooler is part of the head
    lora.train(
        first,
        [{"text": "good film", "label": "a"}, {"text": "bad film", "label": "b"}] * 4,
        TrainConfig(task="classify", output_dir=str(tmp_path / "out"), rank=2, num_epochs=2, lr=1e-2),
        tokenizer=words,
        verbose=False,
    )
    other, tokenizer = load_adapted_classifier(str(tmp_path / "out"), str(tmp_path), dtype="fp32", seed=2)
    texts = ["good film", "very bad meal"]
    assert predict(other, tokenizer, texts) == predict(first.eval(), words, texts)


def test_the_best_adapter_is_that_of_the_metric(base: str, data: Path, tmp_path: Path) -> None:
    assert main(["train", *flags(base, data, tmp_path, best_metric="accuracy", num_epochs=2)]) == 0
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    scores = [event["accuracy"] for event in events if event["event"] == "valid"]
    best, tokenizer = load_adapted_classifier(str(tmp_path / "best"), dtype="fp32")
    (source,) = read_sources(str(data / "valid.jsonl"), objective="classify")
    found = metrics_of(best, source.examples, predict(best, tokenizer, source.examples))
    assert found["accuracy"] == max(scores[1:])


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(
    run: Path, base: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loralib.training.trainer import Trainer

    validate, seen = Trainer._validate, list[int]()

    def dies(self: Any) -> Any:
        seen.append(self.progress.step)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return validate(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_validate", dies)
        assert main(["train", *flags(base, data, tmp_path)]) == 130
    assert main(["train", *flags(base, data, tmp_path), "--resume"]) == 0
    for name in ("adapter_model.safetensors", "pytorch_model.bin"):
        assert (tmp_path / name).read_bytes() == (run / name).read_bytes()


def test_several_accumulated_steps_are_one_large_step() -> None:
    ours = classifier("llama")
    lora.inject(ours, lora.LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"))
    step, batch = ClassificationStep(ours, Labels(class_names(ours))), rows(8)
    gradients = []
    for parts in ([batch], [batch[:3], batch[3:]]):
        ours.zero_grad()
        for part, scale in zip(parts, step.scales(parts), strict=True):
            step.forward_backward(part, loss_scale=scale)
        gradients.append(ours.score.weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_the_head_is_trained_in_fp32_on_a_base_in_bf16(base: str) -> None:
    model, _ = load_classifier(base, ["a", "b"], dtype="bf16")
    assert model.bert.encoder.layer[0].attention.self.query.weight.dtype == torch.bfloat16
    assert model.classifier.weight.dtype == torch.float32
    assert model(torch.tensor([[2, 5, 3]])).logits.dtype == torch.float32


def test_numbers_are_predicted_where_labels_are_numbers(base: str, tmp_path: Path) -> None:
    scores = {"great": 1.5, "good": 0.5, "poor": -0.5, "awful": -1.5}
    things = ("film", "meal", "room", "book")
    table = [{"text": f"the {t} was {w}", "label": s} for t in things for w, s in scores.items()]
    model, tokenizer = load_classifier(base, [], dtype="fp32")
    config = TrainConfig(
        task="classify", output_dir=str(tmp_path), rank=4, num_epochs=20, lr=2e-3, best_metric="pearson"
    )
    result = lora.train(model, table, config, tokenizer=tokenizer, valid_data=table, verbose=False)
    assert result.best is not None
    again, tokenizer = load_adapted_classifier(str(tmp_path), dtype="fp32")
    (source,) = read_sources(table, objective="classify")
    found = metrics_of(again, source.examples, predict(again, tokenizer, source.examples))
    assert found["pearson"] > 0.7  # untrained, there is none
    assert found["spearman"] > 0.6


# --- PEFT, and Microsoft's checkpoints --------------------------------------------------------------------------------


def test_peft_loads_what_a_run_saves(run: Path, base: str) -> None:
    model, tokenizer = load_adapted_classifier(str(run), dtype="fp32")
    theirs = peft.AutoPeftModelForSequenceClassification.from_pretrained(run, num_labels=2).eval()
    inputs = tokenizer(["the film was good", "a very bad book"], return_tensors="pt")
    torch.testing.assert_close(model(**inputs).logits, theirs(**inputs).logits, rtol=1e-5, atol=1e-6)


def test_peft_adapters_load_here(base: str, tmp_path: Path, words: Any) -> None:
    torch.manual_seed(3)
    plain = C.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False)
    theirs = peft.get_peft_model(plain, config).eval()
    theirs.save_pretrained(tmp_path)
    ours, tokenizer = load_adapted_classifier(str(tmp_path), dtype="fp32")
    inputs = tokenizer(["the film was good", "a very bad book"], return_tensors="pt")
    torch.testing.assert_close(ours(**inputs).logits, theirs(**inputs).logits, rtol=1e-5, atol=1e-6)
    assert class_names(ours) == ("LABEL_0", "LABEL_1", "LABEL_2")


def test_microsofts_nlu_checkpoints_load_into_a_roberta(tmp_path: Path) -> None:
    model = classifier("roberta")
    attention = [f"roberta.encoder.layer.{n}.attention.self.{part}" for n in range(2) for part in ("query", "value")]
    torch.manual_seed(4)
    # The released files are flat: factors under the model's own names, and the classifier that was trained with them.
    state = {f"{name}.lora_A": torch.randn(8, 32) for name in attention}
    state |= {f"{name}.lora_B": torch.randn(32, 8) for name in attention}
    state |= {f"classifier.{name}": torch.randn_like(p) for name, p in model.classifier.named_parameters()}
    torch.save(state, tmp_path / "roberta_mnli_lora.bin")
    expected = copy.deepcopy(model)
    expected.load_state_dict({name: t for name, t in state.items() if name.startswith("classifier")}, strict=False)
    for name in attention:
        expected.get_submodule(name).weight.data += 2.0 * state[f"{name}.lora_B"] @ state[f"{name}.lora_A"]
    config = lora.LoraConfig(
        r=8, lora_alpha=16, target_modules=["query", "value"], modules_to_save=["classifier"], task_type="SEQ_CLS"
    )
    lora.load_adapter(model, tmp_path / "roberta_mnli_lora.bin", config=config)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-4)
    lora.save_adapter(model, tmp_path / "peft")  # and from there to everyone
    theirs = peft.PeftModel.from_pretrained(classifier("roberta"), str(tmp_path / "peft")).eval()
    torch.testing.assert_close(theirs(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-4)


# --- predict and merge ------------------------------------------------------------------------------------------------


def test_predict_gives_labels_probabilities_and_metrics(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "labels.jsonl"
    assert main(["predict", "--adapter", str(run), "--input", str(data / "valid.jsonl"), "--output", str(out)]) == 0
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 32
    assert all(sum(line["probabilities"].values()) == pytest.approx(1, abs=1e-5) for line in lines)
    share = sum(line["label"] == line["expected"] for line in lines) / 32
    assert f"accuracy {share:.4f}" in capsys.readouterr().out
    (tmp_path / "texts.txt").write_text("the film was great\n\nthe room was awful\n", encoding="utf-8")
    assert main(["predict", "--adapter", str(run), "--data", str(tmp_path / "texts.txt"), "--json"]) == 0
    texts = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
    assert texts == ["the film was great", "the room was awful"]
    assert main(["predict", "--adapter", str(run), "the meal was so good"]) == 0
    assert "the meal was so good" in capsys.readouterr().out


def test_glues_test_data_are_classified_although_they_have_no_labels(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "test.jsonl", [{"sentence": "the film was great", "label": -1, "idx": 0}])
    assert main(["predict", "--adapter", str(run), "--input", str(data), "--json"]) == 0
    out = capsys.readouterr().out
    assert "expected" not in out
    assert "labelled" not in out


def test_an_adapter_with_its_own_head_fits_a_base_whose_head_is_larger(
    base: str, tmp_path: Path, words: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """PEFT's users load such a base with ignore_mismatched_sizes, for instance one trained on three labels."""
    torch.manual_seed(0)
    model = C.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    adapted.save_pretrained(tmp_path / "adapter")
    three = C.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    three.save_pretrained(tmp_path / "three")
    words.save_pretrained(tmp_path / "three")
    ours, _ = load_adapted_classifier(str(tmp_path / "adapter"), str(tmp_path / "three"), dtype="fp32")
    ids = words("the film was great", return_tensors="pt")
    torch.testing.assert_close(ours(**ids).logits, adapted.eval()(**ids).logits)
    with pytest.raises(BaseModelError, match=r"classifier\.bias: \(3,\) in the checkpoint, \(2,\) wanted"):
        load_classifier(str(tmp_path / "three"), ["bad", "good"])


def test_predict_tells_of_texts_that_it_truncates(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--adapter", str(run), "good " * 99, "bad"]) == 0
    assert "note: 1 of 2 texts are longer than 64 tokens and are truncated" in capsys.readouterr().err


def test_batches_of_any_size_give_the_same_predictions(run: Path, data: Path) -> None:
    model, tokenizer = load_adapted_classifier(str(run), dtype="fp32")
    texts = ["good", "the film was very very very bad today", "a great book", "so poor"]
    alone = [predict(model, tokenizer, [text])[0] for text in texts]
    for size in (2, 16):
        for one, many in zip(alone, predict(model, tokenizer, texts, batch_size=size), strict=True):
            assert one.label == many.label
            assert many.probabilities == pytest.approx(one.probabilities, abs=1e-5)


def test_merge_takes_the_head_along(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merged = tmp_path / "merged"
    assert main(["merge", str(run), str(merged), "--dtype", "fp32"]) == 0
    plain = C.AutoModelForSequenceClassification.from_pretrained(merged)
    assert plain.config.id2label == {0: "bad", 1: "good"}
    model, tokenizer = load_adapted_classifier(str(run), dtype="fp32")
    inputs = tokenizer(["the film was good"], return_tensors="pt")
    torch.testing.assert_close(plain(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-5)
    capsys.readouterr()
    assert main(["predict", "--model", str(merged), "the film was good"]) == 0
    assert "good" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("target", "line"),
    [
        ("peft", "AutoModelForSequenceClassification.from_pretrained('BASE', num_labels=2)"),
        ("vllm", "vllm serve BASE --runner pooling --convert classify --enable-lora"),
    ],
)
def test_convert_says_how_to_use_a_classifier(
    target: str, line: str, run: Path, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(run), str(tmp_path / "out"), "--target", target]) == 0
    assert line.replace("BASE", base) in capsys.readouterr().out


def test_the_example_learns_without_a_pretrained_model(
    tmp_path: Path, load_file: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Path(__file__).resolve().parent.parent / "examples" / "NLU" / "run_training.py"
    module = load_file(script)
    argv = ["--model", "scratch-encoder", "--hidden_dim", "64", "--num_epochs", "6", "--output_dir", str(tmp_path)]
    assert run_command(module, "run_training.py", argv) == 0
    accuracy = re.search(r"36 test messages: accuracy (\S+),", capsys.readouterr().out)
    assert accuracy is not None
    assert float(accuracy[1]) > 0.5  # guessing gets a third


# --- texts and tokens -------------------------------------------------------------------------------------------------


def test_two_texts_are_put_together_as_the_tokenizer_does_it(words: Any) -> None:
    (source,) = read_sources([{"text": "good film", "text_pair": "bad film", "label": 1}], objective="classify")
    (row,) = encode_classes(source.examples, words, None, Labels(("0", "1"))).examples
    made = words("good film", "bad film")
    assert list(row.ids) == made["input_ids"]
    assert list(row.kinds) == made["token_type_ids"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("names", [("sentence1", "sentence2"), ("premise", "hypothesis"), ("sentence",)])
def test_the_names_of_glue_and_snli_are_known(names: tuple[str, ...]) -> None:
    row = {**dict(zip(names, ("It rains.", "It is wet."), strict=False)), "label": 1, "idx": 7}
    (source,) = read_sources([row], objective="classify")
    example = source.examples[0]
    assert (example.segments[0][0], example.text_pair) == ("It rains.", "It is wet." if len(names) == 2 else None)
    assert f"{', '.join(names)} and label" in source.notes[0]
    assert not any(name in note for name in names for note in source.notes[1:])


def test_a_decoder_gets_two_texts_with_a_line_break_between() -> None:
    tokenizer = load_tokenizer("smollm2-135m")
    (source,) = read_sources([{"text": "It rains.", "text_pair": "It is wet.", "label": 1}], objective="classify")
    (row,) = encode_classes(source.examples, tokenizer, None, Labels(("0", "1"))).examples
    assert tokenizer.decode(row.ids) == "It rains.\nIt is wet."


def test_long_texts_are_cut_and_that_is_said(words: Any) -> None:
    (source,) = read_sources([{"text": "good " * 30, "label": 1}], objective="classify")
    encoded = encode_classes(source.examples, words, 8, Labels(("0", "1")))
    assert [len(row) for row in encoded.examples] == [8]
    assert "1 of 1 texts are longer than 8 tokens and are truncated" in encoded.notes


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["b", "a"], ("a", "b")),
        ([10, 2, 1], ("1", "2", "10")),
        (["10", "2"], ("2", "10")),  # as tables have them
        ([True, False], ("false", "true")),
        ([0.0, 1.0], ("0", "1")),
        (["1.0", "0.0", "1"], ("0", "1")),  # as pandas writes a column with gaps
        ([0.5, 1], ()),
        (["0.5", "1"], ()),
    ],
)
def test_what_labels_are_is_told_by_their_values(labels: list[Any], names: tuple[str, ...]) -> None:
    (source,) = read_sources([{"text": "x", "label": label} for label in labels], objective="classify")
    assert Labels.of(source.examples).names == names


def test_numbers_are_the_same_label_however_a_file_writes_them() -> None:
    labels = Labels(("1", "2", "10"))
    assert [labels.number(label) for label in (10, 10.0, "10", "10.0")] == [2] * 4


def test_columns_and_tables_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("review\tstars\nfine\t1\nbad\t0\n", encoding="utf-8")
    (source,) = read_sources(str(tmp_path / "a.tsv"), columns="text=review,label=stars", objective="classify")
    assert [(example.prompt, example.label) for example in source.examples] == [("fine", "1"), ("bad", "0")]


# --- bad input --------------------------------------------------------------------------------------------------------


def told(argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Runs a command that fails, and returns what it prints."""
    assert main(argv) == 2
    return capsys.readouterr().err


def test_contradicting_settings_are_listed_together() -> None:
    with pytest.raises(ConfigError) as error:
        TrainConfig(task="classify", objective="dpo", shard=True, data_format="e2e", target="vllm")
    text = str(error.value)
    assert all(name in text for name in ("objective", "shard", "data_format", "target"))
    with pytest.raises(ConfigError, match="best_metric"):
        TrainConfig(best_metric="accuracy")


def write(path: Path, table: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in table), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("train", "valid", "parts"),
    [
        ([{"text": "a", "stars": 1}], None, ["'stars'", "--columns label=FIELD"]),
        ([{"text": " ", "label": 1}, {"text": "a", "label": [1]}], None, ["text is empty", "only one label"]),
        (
            [{"premise": "a", "hypothesis": "b", "label": label} for label in (0, 1, 2, -1)],
            None,
            ["1 of 4 training examples have the label -1", "t.jsonl:4", "'no label'"],
        ),
        ([{"text": "a", "label": 1}] * 2, None, ["all 2 training examples have the label '1'"]),
        ([{"text": "a", "label": 0.5}, {"text": "b", "label": "good"}], None, ["different kinds", "0.5", "'good'"]),
        (
            [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}],
            [{"text": "c", "label": "z"}, {"text": "c", "label": "w"}],
            ["no label 'z'", "no label 'w'", "The labels are x, y"],
        ),
    ],
)
def test_labels_that_are_of_no_use_are_refused_before_a_model_is_loaded(
    train: Any, valid: Any, parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["train", "--task", "classify", "--train_data", str(write(tmp_path / "t.jsonl", train))]
    argv += ["--output_dir", str(tmp_path / "out")]
    if valid is not None:
        argv += ["--valid_data", str(write(tmp_path / "v.jsonl", valid))]
    text = told(argv, capsys)
    assert all(part in text for part in parts), text
    assert "Loading" not in text


def test_more_labels_than_the_checkpoints_head_has_are_refused(
    run: Path, tmp_path: Path, words: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    classifier("bert", 2).save_pretrained(tmp_path / "two")
    words.save_pretrained(tmp_path / "two")
    table = [{"text": "a", "label": label} for label in ("x", "y", "z")]
    argv = ["train", "--task", "classify", "--model", str(tmp_path / "two"), "--output_dir", str(tmp_path / "out")]
    text = told([*argv, "--train_data", str(write(tmp_path / "t.jsonl", table))], capsys)
    assert "has 2 labels" in text
    assert "without a head" in text


@pytest.mark.parametrize("kind", ["multi_label_classification", "regression"])
def test_a_head_that_predicts_several_things_at_once_is_refused(
    kind: str, tmp_path: Path, words: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model = classifier("bert", 3)
    model.config.problem_type = kind
    model.save_pretrained(tmp_path / "several")
    words.save_pretrained(tmp_path / "several")
    several = "several labels" if kind.startswith("multi") else "several numbers"
    assert several in told(["predict", "--model", str(tmp_path / "several"), "good"], capsys)
    data = write(tmp_path / "t.jsonl", [{"text": label, "label": label} for label in ("x", "y", "z")])
    argv = ["train", "--task", "classify", "--model", str(tmp_path / "several"), "--train_data", str(data)]
    assert several in told([*argv, "--output_dir", str(tmp_path / "out")], capsys)
    with pytest.raises(ConfigError, match=several):
        predict(model, words, ["good"])


def test_numbers_are_not_smoothed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "t.jsonl", [{"text": "a", "label": 0.5}, {"text": "b", "label": 1}])
    argv = ["train", "--task", "classify", "--train_data", str(data), "--label_smoothing", "0.1"]
    assert "label_smoothing is 0.1, but the labels are numbers" in told(
        [*argv, "--output_dir", str(tmp_path / "out")], capsys
    )


def test_an_adapter_with_other_labels_leads_to_a_new_head(
    run: Path, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = [{"text": "a", "label": label} for label in ("x", "y")]
    argv = ["train", "--task", "classify", "--from_adapter", str(run), "--output_dir", str(tmp_path / "out")]
    text = told([*argv, "--train_data", str(write(tmp_path / "t.jsonl", table))], capsys)
    assert "Leave out --from_adapter to make a new head" in text


def test_predict_refuses_what_is_no_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = C.LlamaForCausalLM(C.LlamaConfig(**SIZES))
    lora.inject(model, lora.LoraConfig(r=2, target_modules=["q_proj"]))
    lora.save_adapter(model, tmp_path)
    assert "not a classifier" in told(["predict", "--adapter", str(tmp_path), "a text"], capsys)
    text = told(["predict", "--batch_size", "0"], capsys)
    assert "no classifier given" in text
    assert "no text given" in text


def test_a_classifier_writes_no_texts(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "loralib predict" in told(["generate", "--adapter", str(run), "a text"], capsys)
    assert "loralib predict" in told(["verify", "http://localhost:1", "--adapter", str(run)], capsys)
    written = C.GPT2LMHeadModel(C.GPT2Config(**GPT2))
    with pytest.raises(AdapterError, match="'it' is a classifier, which labels texts"):
        lora.Bank(written).load("it", run)


def test_models_without_a_form_for_classification_are_refused() -> None:
    with pytest.raises(BaseModelError, match="cannot be used for classification"):
        load_classifier("run-demo", ["a", "b"])
    with pytest.raises(ConfigError, match="not a text classifier"):
        class_names(C.LlamaForCausalLM(C.LlamaConfig(**SIZES)))


def test_a_missing_padding_token_is_taken_from_the_tokenizer(tmp_path: Path, words: Any) -> None:
    model = classifier("gpt2", 2)
    model.config.pad_token_id = None  # GPT-2's own config has none, and then refuses batches
    config = TrainConfig(task="classify", output_dir=str(tmp_path), rank=2, num_epochs=1, max_steps=2, lr=1e-2)
    table = [{"text": "good film", "label": "a"}, {"text": "bad film today", "label": "b"}] * 2
    with pytest.raises(ConfigError, match="pad_token_id"):
        lora.train(copy.deepcopy(model), table, config, verbose=False)
    lora.train(model, table, config, tokenizer=words, verbose=False)
    assert model.config.pad_token_id == words.pad_token_id
