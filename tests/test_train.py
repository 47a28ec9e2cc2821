"""The training loop: it learns, reports if it does not, and loses nothing."""

from __future__ import annotations

import ast
import copy
import dataclasses
import errno
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

import loralib as lora
from loralib import errors
from loralib.data import Example, TokenExample
from loralib.data.packing import epoch_order
from loralib.engine.frozen_linear import can_prepack
from loralib.formats.tensors import read_safetensors, write_safetensors
from loralib.injection import adapted_layers
from loralib.training import report, run_directory, trainer
from loralib.training.memory import memory_estimate
from loralib.training.objective import StepStats
from loralib.training.optim import lr_factor, make_optimizer, parameter_groups
from loralib.training.report import plot_losses, read_metrics
from loralib.training.run_directory import Progress, checkpoint_files, last_checkpoint, save_checkpoint
from loralib.training.step import Step, make_step

VOCABULARY = 23


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Sets the number of threads; forked processes, which lack their parent's threads, need one."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def quick_runs() -> Iterator[None]:
    """Skips what takes most of a tiny run's time and matters to few of these tests.

    These are plots, garbage collection of all other tests' objects, and waiting for other threads.
    """
    with threads(1), pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_directory, "plot_losses", lambda *_: False)
        patch.setattr(trainer, "freeze_objects", nullcontext)
        yield


@pytest.fixture
def plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots loss curves after all."""
    monkeypatch.setattr(run_directory, "plot_losses", plot_losses)


def tiny_model(dropout: float = 0.0) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=64, initializer_range=0.3, **sizes)
    )


def copying_examples(count: int = 24, seed: int = 0) -> list[TokenExample]:
    """Prompts of three tokens whose completion repeats them: learnable, and several share a prompt."""
    rng = random.Random(seed)
    prompts = [tuple(rng.randrange(3, VOCABULARY) for _ in range(3)) for _ in range(count // 3)]
    examples = []
    for prompt in prompts:
        for extra in range(3):
            completion = (*prompt, 3 + extra, 1)
            examples.append(TokenExample((*prompt, 2, *completion), (False,) * 4 + (True,) * 5))
    return examples


def settings(tmp_path: Path, **changes: Any) -> lora.TrainConfig:
    values: dict[str, Any] = {
        "output_dir": str(tmp_path / "run"), "lora_dim": 4, "lr": 5e-3, "batch_size": 6, "num_epochs": 3,
        "warmup_steps": 0, "keep_checkpoints": 2,
    }  # fmt: skip
    return lora.TrainConfig(**(values | changes))


def train(config: lora.TrainConfig, model: Any = None, **kwargs: Any) -> Any:
    model = tiny_model() if model is None else model
    return lora.train(
        model, copying_examples(), config, valid_data=copying_examples(6, seed=1), verbose=False, **kwargs
    )


# Learning.


@pytest.mark.usefixtures("plots")
def test_training_learns_and_leaves_everything_a_user_needs(tmp_path: Path) -> None:
    model = tiny_model()
    frozen = {name: p.clone() for name, p in model.named_parameters()}
    # In a uniform order: so few examples of a made-up task generalise by no other.
    result = train(settings(tmp_path, num_epochs=12, max_siblings=1), model)
    assert result.valid_losses[-1][1] < 0.8 * result.valid_losses[0][1]
    assert result.train_losses[-1] < 0.5 * result.train_losses[0]
    for name, p in model.named_parameters():
        assert name not in frozen or torch.equal(p, frozen[name]), f"{name} is frozen and changed"
    names = {path.name for path in result.output_dir.iterdir()}
    assert names == {
        "adapter_config.json", "adapter_model.safetensors", "pytorch_model.bin", "metrics.jsonl", "loss.png",
        "README.md", "checkpoints", "best", "run.toml",
    }  # fmt: skip
    fresh = tiny_model()
    print(lora.load_adapter(fresh, result.output_dir))
    ids = torch.tensor([copying_examples()[0].ids])
    assert torch.equal(fresh.eval()(ids).logits, model.eval()(ids).logits)
    flat = torch.load(result.output_dir / "pytorch_model.bin", weights_only=True)
    assert flat.keys() == lora.lora_state_dict(model).keys()


def test_metrics_have_one_line_an_event_with_the_promised_fields(tmp_path: Path) -> None:
    result = train(settings(tmp_path))
    events = list(read_metrics(result.output_dir / "metrics.jsonl"))
    trained = [event for event in events if event["event"] == "train"]
    assert [event["step"] for event in trained] == list(range(1, 13))
    fields = ["event", "step", "epoch", "loss", "lr", "examples", "tokens", "trained_tokens", "step_s"]
    assert all(list(event) == fields for event in events)
    assert trained[-1]["examples"] == 72
    assert trained[-1]["trained_tokens"] == 72 * 5
    assert [e["step"] for e in events if e["event"] == "valid"] == [0, 4, 8, 12]


def test_the_loss_does_not_depend_on_how_an_update_is_split(tmp_path: Path) -> None:
    """Examples of different lengths: averaging over batches would weigh them differently."""
    examples = [TokenExample(e.ids[:n], e.trained[:n]) for e, n in zip(copying_examples(), (6, 9) * 12, strict=True)]
    runs = []
    for number, (batch_size, accumulation) in enumerate([(8, 1), (2, 4)]):
        config = settings(tmp_path / str(number), batch_size=batch_size, grad_accum=accumulation, shuffle=False)
        model = tiny_model()
        result = lora.train(model, examples, config, verbose=False)
        runs.append((result.losses, [p.detach() for p in model.parameters() if p.requires_grad]))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-5)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(runs[0][1], runs[1][1], strict=True))


def test_same_seed_same_bits_and_another_seed_others(tmp_path: Path) -> None:
    written = []
    for number, seed in enumerate((0, 0, 1)):
        config = settings(tmp_path / str(number), seed=seed, lora_dropout=0.1, num_epochs=1)
        with threads(2):
            written.append((train(config).output_dir / "adapter_model.safetensors").read_bytes())
    assert written[0] == written[1] != written[2]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_runs_in_two_threads_give_the_bits_of_one_after_the_other(tmp_path: Path, dropout: float) -> None:
    """Both draw from the one global random generator: for the adapter's first values, and for dropout."""

    def outcome(place: str, seed: int, model: Any) -> dict[str, Any]:
        config = settings(tmp_path / place / str(seed), seed=seed, lora_dropout=dropout, num_epochs=2)
        return kept(train(config, model).output_dir)

    models = [tiny_model() for _ in range(4)]
    alone = [outcome("alone", seed, models[seed]) for seed in range(2)]
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(outcome, "together", seed, models[2 + seed]) for seed in range(2)]
    assert [run.result() for run in runs] == alone


def test_an_update_waits_for_the_device_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each item(), float() or bool() of a tensor is a wait; one tolist() for loss and norm is not counted on a CPU."""

    class CountReads(TorchDispatchMode):
        reads = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.reads += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    mode, counts = CountReads(), []
    update, forward_backward = trainer.Trainer._update, Step.forward_backward

    def counted(self: Any, batches: Any) -> Iterator[Any]:
        mode.reads = 0
        with mode:
            yield from update(self, batches)
        counts.append(mode.reads)

    def on_device(self: Any, batch: Any, **kwargs: Any) -> StepStats:
        reads = mode.reads  # the step's own are its own matter
        stats = forward_backward(self, batch, **kwargs)
        mode.reads = reads
        return stats

    plain = train(settings(tmp_path / "plain", num_epochs=1, grad_accum=2)).losses
    monkeypatch.setattr(trainer.Trainer, "_update", counted)
    monkeypatch.setattr(Step, "forward_backward", on_device)
    assert train(settings(tmp_path / "counted", num_epochs=1, grad_accum=2)).losses == plain
    assert counts[0] > 0, "the check that gradients reach every layer, once a run"
    assert counts[1:] == [0] * (len(plain) - 1)


def test_gradient_checkpointing_gives_the_same_losses_and_computes_twice(tmp_path: Path) -> None:
    losses, calls = [], []
    for number, checkpointing in enumerate((False, True)):
        model = tiny_model()
        counted: list[bool] = []
        norm = model.model.layers[0].input_layernorm  # the second pass ends where nothing more is needed
        norm.register_forward_hook(lambda *_, seen=counted: seen.append(torch.is_grad_enabled()))
        config = settings(tmp_path / str(number), gradient_checkpointing=checkpointing, lora_dropout=0.1, num_epochs=1)
        losses.append(train(config, model).losses)
        calls.append(sum(counted))
        left = [name for name, module in model.named_modules() if getattr(module, "gradient_checkpointing", False)]
        assert not left, "the model is given back as it was"
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert calls == [4, 8]


def test_no_gradient_is_computed_below_the_first_adapted_layer(tmp_path: Path) -> None:
    model = tiny_model()
    wanted: dict[str, set[bool]] = {"embedding": set(), "first": set(), "second": set()}

    def remember(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if torch.is_grad_enabled():
                wanted[name].add((output if isinstance(output, torch.Tensor) else output[0]).requires_grad)

        return hook

    model.model.embed_tokens.register_forward_hook(remember("embedding"))
    for name, layer in zip(("first", "second"), model.model.layers, strict=True):
        layer.register_forward_hook(remember(name))
    train(settings(tmp_path, target_modules=r".*layers\.1\..*_proj"), model)
    assert wanted == {"embedding": {False}, "first": {False}, "second": {True}}


def test_validation_losses_are_not_smoothed(tmp_path: Path) -> None:
    plain = train(settings(tmp_path / "a", num_epochs=1))
    smoothed = train(settings(tmp_path / "b", num_epochs=1, label_smoothing=0.2))
    assert smoothed.valid_losses[0] == plain.valid_losses[0]
    assert smoothed.losses[0] != pytest.approx(plain.losses[0], rel=1e-5)  # of one model on one batch


def test_what_a_run_ends_with_is_validated(tmp_path: Path) -> None:
    """--max_steps may end it within an epoch, or between two validations."""
    result = train(settings(tmp_path / "a", max_steps=6))
    assert [step for step, _ in result.valid_losses] == [0, 4, 6]
    again = train(settings(tmp_path / "a", max_steps=6, resume=True))
    assert (again.valid_losses, again.train_losses) == (result.valid_losses, result.train_losses)
    assert [step for step, _ in train(settings(tmp_path / "b", max_steps=5, eval_steps=3)).valid_losses] == [0, 3, 5]


def test_validation_takes_no_more_tokens_at_once_than_it_may() -> None:
    from loralib.training.objective import evaluate_loss

    model, examples = tiny_model(), copying_examples()
    step, sizes = make_step(model), []
    whole = evaluate_loss(step, model, examples)
    measure = step.loss
    step.loss = lambda batch: sizes.append(sum(map(len, batch))) or measure(batch)  # type: ignore[method-assign]
    assert evaluate_loss(step, model, examples, max_tokens=30) == pytest.approx(whole, rel=1e-6)
    assert max(sizes) <= 30
    assert sum(sizes) == sum(map(len, examples))


def test_data_of_another_kind_is_refused_and_what_is_dropped_is_said(
    tmp_path: Path, smollm2: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(tmp_path, num_epochs=1, seq_len=64)
    with pytest.raises(errors.DataError, match="training data contains TokenExample and dict, expected Example"):
        lora.train(tiny_model(), [copying_examples()[0], {"prompt": "a", "completion": "b"}], config)  # type: ignore[list-item]
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(smollm2[1]), **sizes))
    texts = [Example.of("name : X\n", "X it is."), Example.of("name : Y\n", "Y " * 100)]
    lora.train(model, texts, config, tokenizer=smollm2[1])
    assert "Loaded 1 of 2 training examples (dropped 1 example: 1 longer than seq_len)" in capsys.readouterr().out


def test_plain_text_trains_where_it_is_asked_for(tmp_path: Path, smollm2: Any) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(smollm2[1]), **sizes))
    text = tmp_path / "a.txt"
    text.write_text("Once upon a time\n" * 20, encoding="utf-8")
    config = settings(tmp_path, num_epochs=1, seq_len=16)
    with pytest.raises(errors.DataError, match="--data_format text"):
        lora.train(model, text, config, tokenizer=smollm2[1], verbose=False)
    result = lora.train(model, text, config.replace(data_format="text"), tokenizer=smollm2[1], verbose=False)
    events = list(read_metrics(result.output_dir / "metrics.jsonl"))
    assert events[-1]["trained_tokens"] == 99  # the last line end is none; nothing comes before the first token


def test_a_run_says_what_it_trains_and_where_the_result_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model()
    for number, first_line in enumerate(
        (
            "LoRA on all-linear (14 modules): r=4, lora_alpha=8",
            "The network already has an adapter; --rank and --target_modules do not apply.",
        )
    ):
        lora.train(model, copying_examples(), settings(tmp_path / str(number), num_epochs=1))
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "Loaded 24 of 24 training examples"
        starts = [
            first_line,
            "parameters",
            "Total",
            "Trainable",
            "Frozen",
            "Memory",
            "Epoch 1",
            "Done: 4 updates",
            "Adapter: ",
        ]
        places = [next(place for place, line in enumerate(lines) if line.startswith(start)) for start in starts]
        assert places == sorted(places)


def test_what_the_declared_tool_could_not_compute_is_refused_before_anything_changes(tmp_path: Path) -> None:
    model = tiny_model()
    model.lm_head.weight = model.model.embed_tokens.weight
    model.config.tie_word_embeddings = True
    config = settings(tmp_path, target_modules="embed_tokens,q_proj", target="llamacpp")
    with pytest.raises(errors.AdapterError, match=r"(?s)llama.cpp would apply this adapter incorrectly.*embed_tokens"):
        train(config, model)
    assert not any("lora_" in name for name, _ in model.named_parameters())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("asked", ["early_stopping", "eval_steps"])
def test_validations_without_validation_data_are_refused(tmp_path: Path, asked: str) -> None:
    with pytest.raises(errors.ConfigError, match=f"{asked} is 2, but there is no validation data"):
        lora.train(tiny_model(), copying_examples(), settings(tmp_path, **{asked: 2}))


def test_each_epoch_is_told_where_it_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = settings(tmp_path, eval_steps=6, num_epochs=2)
    lora.train(tiny_model(), copying_examples(), config, valid_data=copying_examples(6, seed=1))
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if re.match("Epoch|Update", line)]
    patterns = [r"Epoch 1: average training loss [\d.]+$", "Update 6: validation loss", "Epoch 2: .*, validation loss"]
    assert len(lines) == 3, out
    assert all(re.match(pattern, line) for pattern, line in zip(patterns, lines, strict=True)), out


def test_the_memory_estimate_counts_what_frozen_and_adapted_linears_keep() -> None:
    model = tiny_model()
    lora.inject(model, lora.LoraConfig(r=4, target_modules=["down_proj"]))
    empty, full = (memory_estimate(model, tokens, False)[0] for tokens in (0, 1000))
    # per layer: two norms, attention and its result read 16 numbers, q, k and v give 16, the gate and its up projection
    # 32, down reads 32 and A makes 4 of them; all in fp32, with a fifth of holes
    assert full - empty == pytest.approx(1000 * 2 * 4 * (2 * 16 + 16 + 3 * 16 + 2 * 32 + 32 + 4) * 1.2)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    assert empty == 4 * frozen + 20 * trained + 256 * VOCABULARY * 8
    model.bfloat16()
    if can_prepack(model.lm_head.weight):  # every linear twice more, the head too
        linears = sum(m.weight.nbytes for m in model.modules() if isinstance(m, nn.Linear))
        assert make_step(model).prepacked_bytes == 2 * linears
        assert memory_estimate(model, 0, False)[0] == empty - 2 * frozen + 2 * linears


def test_logs_get_a_line_now_and_then(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "_SILENCE", 0.0)
    lora.train(tiny_model(), copying_examples(), settings(tmp_path, num_epochs=1))
    assert re.search(r"Update 2 of 4: loss \d\.\d{3}, [\d,]+ tokens/s, .* left", capsys.readouterr().out)


def test_a_plain_module_trains_too(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(ids))

    result = train(settings(tmp_path, target_modules="head"), Net())
    assert "padded" not in result.note
    assert result.note
    assert result.train_losses[-1] < result.train_losses[0]


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
def test_what_could_not_be_saved_is_refused_before_it_trains(tmp_path: Path) -> None:
    import peft

    unfrozen, pruned, peft_model = tiny_model(), tiny_model(), tiny_model()
    for model in (unfrozen, pruned):
        lora.inject(model, lora.LoraConfig(r=2, target_modules=["q_proj"]))
    unfrozen.model.norm.weight.requires_grad_()
    prune.random_unstructured(pruned.model.layers[0].self_attn.q_proj, "weight", 0.5)
    peft_model = peft.get_peft_model(peft_model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for model, reason in (
        (unfrozen, r"(?s)trained in addition.*model.norm.weight"),
        (pruned, r"model.layers.0.self_attn.q_proj: weight is computed since inject\(\)"),
        (peft_model, "holds an adapter of PEFT"),
    ):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(errors.LoraError, match=reason):
            train(settings(tmp_path), model)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(errors.TargetError, match="holds an adapter of PEFT"):
        lora.train_many(peft_model, copying_examples(), [settings(tmp_path)], output_dir=str(tmp_path / "sweep"))


def test_early_stopping_stops_and_keeps_the_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = settings(tmp_path, num_epochs=40, eval_steps=1, early_stopping=2, lr=0.05)
    result = train(config)
    losses = [loss for _, loss in result.valid_losses[1:]]
    assert result.steps < 160
    assert min(losses) < min(losses[-2:])
    model = tiny_model()
    lora.load_adapter(model, result.output_dir / "best")
    again = lora.train(
        model, copying_examples(), config.replace(output_dir=str(tmp_path / "again"), max_steps=1),
        valid_data=copying_examples(6, seed=1), verbose=False,
    )  # fmt: skip
    assert again.valid_losses[0][1] == pytest.approx(min(losses), rel=1e-5)
    assert "Stopped early" not in capsys.readouterr().out
    lora.train(
        tiny_model(), copying_examples(), config.replace(overwrite=True), valid_data=copying_examples(6, seed=1)
    )  # fmt: skip
    told = f"Stopped early, after update {result.steps} of 160: the last 2 validations were no better"
    out = capsys.readouterr().out
    assert told in out
    assert f"The best adapter is the one from update {result.best[0]} " in out
    assert result.best == min(((step, loss) for step, loss in result.valid_losses if step), key=lambda pair: pair[1])
    assert f"{min(losses):.4f} after update {result.best[0]}: the adapter in `best`" in (
        result.output_dir / "README.md"
    ).read_text(encoding="utf-8")


def test_the_card_says_any_base_s_name_rightly(tmp_path: Path) -> None:
    """The name may be a path: on Windows with backslashes, and anywhere with a colon or a #."""
    model = tiny_model()
    model.name_or_path = name = r"C:\new models: #1"
    card = (train(settings(tmp_path, num_epochs=1), model).output_dir / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^base_model: (.*)$", card, re.MULTILINE)
    assert json.loads(line) == name  # YAML reads JSON
    (call,) = re.findall(r"load_base\((.*)\)", card)
    assert ast.literal_eval(call) == name


def test_the_best_adapter_of_an_earlier_run_does_not_stay_beside_another(tmp_path: Path) -> None:
    config = settings(tmp_path, num_epochs=1)
    assert (train(config).output_dir / "best" / "adapter_config.json").exists()
    result = lora.train(tiny_model(), copying_examples(), config, verbose=False)
    assert result.best is None
    assert not (result.output_dir / "best").exists()


def test_only_an_untrained_adapter_is_called_the_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model()
    for number, told in enumerate(("(the base model)", "of the loss before training")):
        config = settings(tmp_path / str(number), num_epochs=1)
        lora.train(model, copying_examples(), config, valid_data=copying_examples(6, seed=1))
        out = capsys.readouterr().out
        assert told in out
    assert "the base" not in out


# Learning nothing is an error.


class Detached(nn.Module):
    """A network in which no gradient reaches the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.first, self.unused, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, VOCABULARY)
        self.detach = True

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        embedded = self.embed(ids)
        hidden = self.first(embedded)
        return self.head(embedded + hidden * 0 if self.detach else hidden)


def test_a_layer_whose_gradient_is_zero_is_an_error_before_anything_changes(tmp_path: Path) -> None:
    model = Detached()
    with pytest.raises(errors.NothingLearnedError, match=r"(?s)1 of 2 adapted layers.*first: its gradient is zero"):
        train(settings(tmp_path, target_modules="first,head", warmup_steps=3), model)
    assert not (tmp_path / "run" / "adapter_config.json").exists()


def test_layers_that_never_ran_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Detached()
    model.detach = False
    lora.train(model, copying_examples(), settings(tmp_path, target_modules="first,unused,head"))
    printed = capsys.readouterr().out
    assert "1 of 3 adapted layers never ran" in printed
    assert "unused" in printed


def test_adapted_layers_none_of_which_ran_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(errors.NothingLearnedError, match=r"(?s)1 of 1 adapted layer .*unused: never ran"):
        train(settings(tmp_path, target_modules="unused"), Detached())


def test_an_adapter_that_ends_as_it_began_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        errors.NothingLearnedError, match=r"none of the adapter's \d+ tensors in \d+ updates?.*Raise --lr"
    ):
        train(settings(tmp_path, lr=1e-30, loraplus_lr_ratio=1.0))
    assert not (tmp_path / "run" / "adapter_config.json").exists()


def test_a_loss_that_is_not_finite_stops_the_run_with_advice(tmp_path: Path) -> None:
    config = settings(tmp_path, num_epochs=2, save_steps=1)
    model = tiny_model()
    lora.inject(model, config.lora_config())

    def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output if len(checkpoint_files(tmp_path / "run" / "checkpoints")) < 2 else output * math.nan

    model.model.layers[0].mlp.register_forward_hook(hook)
    with pytest.raises(errors.TrainingError, match=r"became nan at update \d+.*is intact.*Lower --lr"):
        lora.train(model, copying_examples(), config, verbose=False)
    assert last_checkpoint(tmp_path / "run" / "checkpoints") is not None


def test_an_exploding_loss_stops_the_run(tmp_path: Path) -> None:
    config = settings(tmp_path, num_epochs=40, lr=30.0, max_grad_norm=0.0, target_modules="head")
    with pytest.raises(errors.TrainingError, match=r"exploded.*Lower --lr"):
        train(config, Detached())


@pytest.mark.parametrize(
    ("validations", "losses", "guessing", "fault"),
    [
        ([], [0.1, *[3.0] * 30], 11.0, ""),  # the first batch was easy
        ([2.5], [0.1] * 5 + [3.0] * 30, 11.0, ""),  # so were all of the first, but the data as a whole are not
        ([2.5, 9.0], [2.4, 1.0, *[0.1] * 30], 11.0, ""),  # learned by heart
        ([0.7, 2.6], [0.7, 0.6, 0.4, 0.4], math.inf, ""),  # a classifier that has become too sure of itself
        ([], [2.4] * 5 + [7.0] * 8, 11.0, "training loss exploded: 6.08 over the last 10 updates"),
        ([], [2.4, *[59.0] * 9], 11.0, "training loss exploded"),  # at once, so that no loss but the first is usual
        ([2.5, 59.0], [2.4, 30.0], 11.0, "validation loss exploded: 59, and 2.5 before training"),
        ([], [11.0] * 30, 11.0, ""),  # a model made at random
    ],
)
def test_a_run_diverges_if_it_gets_worse_than_its_base(
    validations: list[float], losses: list[float], guessing: float, fault: str
) -> None:
    progress = Progress(valid_losses=[[float(step), loss] for step, loss in enumerate(validations)])
    faults = []
    for loss in losses:
        progress.add_loss(loss)
        faults.append(progress.why_diverged(guessing))
    assert fault in faults[-1]
    assert not any(faults[:-1])
    assert bool(faults[-1]) == bool(fault)


def saved_parameters(directory: Path) -> list[torch.Tensor]:
    found = last_checkpoint(directory / "checkpoints")
    assert found is not None
    return list(found[0].parameters.values())


def test_a_gradient_that_is_not_finite_is_not_applied(tmp_path: Path) -> None:
    """The loss may still be finite; one update later, every weight would be NaN, also in a checkpoint."""
    config = settings(tmp_path, save_steps=1, max_grad_norm=0.0)
    model = tiny_model()
    lora.inject(model, config.lora_config())
    calls: list[int] = []

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return gradient if len(calls) < 4 else gradient * math.nan

    model.model.layers[0].mlp.up_proj.lora_B.register_hook(spoil)
    with pytest.raises(errors.TrainingError, match=r"gradient became nan at update 4.*from update 3 is intact"):
        lora.train(model, copying_examples(), config, verbose=False)
    assert all(bool(p.isfinite().all()) for p in saved_parameters(tmp_path / "run"))
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize(
    ("spoilt", "told"), [(1, "before training: the base model itself"), (3, "after update 4. .*best")]
)
def test_a_validation_loss_that_is_not_finite_stops_the_run(tmp_path: Path, spoilt: int, told: str) -> None:
    model = tiny_model()
    seen: list[int] = []

    def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if not module.training and output.shape[1] > 30:  # more than the check at the start takes
            seen.append(1)
        return output * math.nan if not module.training and len(seen) == spoilt else output

    model.model.layers[0].mlp.register_forward_hook(hook)
    with pytest.raises(errors.TrainingError, match=rf"validation loss is nan {told}"):
        lora.train(
            model, copying_examples(), settings(tmp_path, eval_steps=2), valid_data=copying_examples(15), verbose=False
        )


def test_a_disabled_adapter_is_not_trained(tmp_path: Path) -> None:
    model = tiny_model()
    lora.inject(model, lora.LoraConfig(r=2, target_modules="all-linear"))
    with lora.disabled(model), pytest.raises(errors.TargetError, match="the adapter is disabled"):
        train(settings(tmp_path), model)


def test_memory_that_runs_out_is_a_message(tmp_path: Path) -> None:
    config = settings(tmp_path, save_steps=1)
    model = tiny_model()
    model.model.layers[0].mlp.register_forward_hook(
        lambda *_: torch.empty(2**60) if len(checkpoint_files(tmp_path / "run" / "checkpoints")) == 2 else None
    )
    with pytest.raises(
        errors.TrainingError, match=r"memory ran out. The checkpoint from update 2 is intact.*batch_size"
    ):
        train(config, model)


# Nothing is lost.


def kept(directory: Path) -> dict[str, Any]:
    """What must not depend on interruptions: adapter, order and losses of all events."""
    events = [{k: v for k, v in e.items() if k != "step_s"} for e in read_metrics(directory / "metrics.jsonl")]
    return {
        "adapter": (directory / "adapter_model.safetensors").read_bytes(),
        "best": (directory / "best" / "adapter_model.safetensors").read_bytes(),
        "config": (directory / "adapter_config.json").read_bytes(),
        "events": events,
    }


KILLED = {"num_epochs": 4, "save_steps": 2, "eval_steps": 3, "lora_dropout": 0.1, "grad_accum": 2}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], float]:
    """The results of an uninterrupted run, and its duration in seconds."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    train(settings(directory / "warm-up", **KILLED))
    started = time.perf_counter()
    result = train(settings(directory, **KILLED))
    return kept(result.output_dir), time.perf_counter() - started


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
@pytest.mark.parametrize("seed", range(6))
def test_a_killed_run_goes_on_to_the_same_bytes(
    tmp_path: Path, seed: int, uninterrupted: tuple[dict[str, Any], float]
) -> None:
    """The run is killed at random moments, until it finishes."""
    expected, seconds = uninterrupted
    config = settings(tmp_path, **KILLED)
    rng = random.Random(seed)
    for attempt in range(25):
        child = os.fork()
        if child == 0:  # the child process: run, and leave without pytest's teardown
            try:
                unfinished = bool(checkpoint_files(Path(config.output_dir) / "checkpoints"))
                train(config.replace(resume=unfinished))
                os._exit(0)
            except BaseException:
                os._exit(1)
        until = time.monotonic() + (rng.uniform(0, seconds) if attempt < 20 else 60)
        done, status = os.waitpid(child, os.WNOHANG)
        while not done and time.monotonic() < until:
            time.sleep(0.01)
            done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0
            break
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    else:
        pytest.fail("the run never got through")
    assert kept(Path(config.output_dir)) == expected


no_hangup = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no such signal")


@contextmanager
def hangup(handler: Any) -> Iterator[None]:
    """Sets the handling of SIGHUP: by default it ends a process; under nohup, as tests may run, it is ignored."""
    before = signal.signal(signal.SIGHUP, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), pytest.param("SIGHUP", 129, marks=no_hangup)]
)
def test_a_signal_finishes_the_step_saves_and_says_how_to_resume(tmp_path: Path, name: str, code: int) -> None:
    whole = train(settings(tmp_path / "whole")).output_dir
    config = settings(tmp_path / "stopped")
    model = tiny_model()
    calls = []

    def hook(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 12:
            for _ in range(1 if name == "SIGINT" else 2):  # a shell, or what runs a container, passes it on
                signal.raise_signal(getattr(signal, name))

    model.model.layers[1].mlp.register_forward_hook(hook)
    told = pytest.raises(errors.InterruptedRunError, match=rf"{name}: stopped after update .* --resume")
    with hangup(signal.SIG_DFL) if name == "SIGHUP" else nullcontext(), told as caught:
        train(config, model)
    assert caught.value.exit_code == code
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "the handlers are given back"
    train(config.replace(resume=True))
    assert kept(Path(config.output_dir)) == kept(whole)


@no_hangup
def test_a_run_under_nohup_outlives_its_terminal(tmp_path: Path) -> None:
    model = tiny_model()
    model.model.layers[1].mlp.register_forward_hook(lambda *_: signal.raise_signal(signal.SIGHUP))
    with hangup(signal.SIG_IGN):
        assert train(settings(tmp_path, num_epochs=1), model).steps == 4


def test_ctrl_break_on_windows_asks_as_sigterm_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another signal replaces it on systems that lack it."""
    stand_in = getattr(signal, "SIGBREAK", None) or signal.SIGUSR1
    monkeypatch.setattr(signal, "SIGBREAK", stand_in, raising=False)
    model = tiny_model()
    once = iter([stand_in])

    def hook(*_: Any) -> None:
        for number in once:
            signal.raise_signal(number)

    model.model.layers[1].mlp.register_forward_hook(hook)
    with pytest.raises(errors.InterruptedRunError, match="--resume") as caught:
        lora.train(model, copying_examples(), settings(tmp_path), verbose=False)
    assert caught.value.exit_code == 143
    assert last_checkpoint(tmp_path / "run" / "checkpoints") is not None


def test_an_unfinished_run_is_not_buried_by_mistake(tmp_path: Path) -> None:
    config = settings(tmp_path, num_epochs=2, save_steps=1)
    train(config)
    train(config)  # a finished run is replaced
    directory = Path(config.output_dir) / "checkpoints"
    unfinished = checkpoint_files(directory)
    for path in unfinished[1:]:
        path.unlink()
    with pytest.raises(errors.TrainingError, match=r"contains a run that stopped after 7 updates. Add --resume"):
        train(config)
    with pytest.raises(errors.TrainingError, match=r"(?s)different settings.*lr: 0.005 then, 0.01 now"):
        train(config.replace(resume=True, lr=0.01))
    assert train(config.replace(overwrite=True)).steps == 8


def test_the_same_flags_start_a_run_and_end_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A restarted container always passes --resume: before there are any files, and after the end."""
    config = settings(tmp_path, resume=True, num_epochs=1, keep_checkpoints=0)
    first = train(config)
    assert (first.steps, (tmp_path / "run" / "checkpoints").exists()) == (4, False)
    whole, model = kept(first.output_dir), tiny_model()
    again = lora.train(model, copying_examples(), config, valid_data=copying_examples(6, seed=1))
    assert "is finished: 4 updates" in capsys.readouterr().out
    assert (again.steps, again.losses, again.best) == (4, [], first.best)
    assert kept(first.output_dir) == whole
    assert adapted_layers(model), "the model has its adapter all the same"
    with pytest.raises(errors.TrainingError, match=r"(?s)different settings.*lr: 0.005 then, 0.01 now"):
        train(config.replace(lr=0.01))


@pytest.mark.parametrize("keep", [0, 2])
def test_a_finished_run_goes_on_with_more_epochs_only_if_it_is_the_same_run(tmp_path: Path, keep: int) -> None:
    config = settings(tmp_path, num_epochs=1, keep_checkpoints=keep)
    train(config)
    with pytest.raises(errors.TrainingError, match=r"(?s)num_epochs: 1 then, 2 now.*--from_adapter DIR"):
        train(config.replace(resume=True, num_epochs=2))


def test_a_run_at_a_constant_rate_goes_on_with_more_epochs_to_the_same_bytes(tmp_path: Path) -> None:
    config = settings(tmp_path, num_epochs=2, schedule="constant")
    whole = kept(train(config).output_dir)["adapter"]
    shorter = config.replace(output_dir=str(tmp_path / "longer"), num_epochs=1)
    train(shorter)
    longer = shorter.replace(num_epochs=2, resume=True)
    assert kept(train(longer).output_dir)["adapter"] == whole
    train(longer.replace(overwrite=True, resume=False, keep_checkpoints=0, num_epochs=1))
    with pytest.raises(errors.TrainingError, match="num_epochs: 1 then, 2 now"):  # what it would go on from is gone
        train(longer)


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(tmp_path, num_epochs=2, save_steps=1, keep_checkpoints=3)
    whole = kept(train(config).output_dir)
    files = checkpoint_files(Path(config.output_dir) / "checkpoints")
    assert len(files) == 3
    content = bytearray(files[-1].read_bytes())
    content[-5] ^= 1
    files[-1].write_bytes({"cut": content[:1000], "flipped": content, "emptied": b""}[damage])
    valid = copying_examples(6, seed=1)
    lora.train(tiny_model(), copying_examples(), config.replace(resume=True), valid_data=valid)
    assert re.search(r"WARNING: .*step-00000008.*; falling back to step-00000007", capsys.readouterr().out)
    assert kept(Path(config.output_dir)) == whole


def test_where_no_checkpoint_can_be_read_overwrite_helps(tmp_path: Path) -> None:
    config = settings(tmp_path, num_epochs=2)
    train(config)
    files = checkpoint_files(Path(config.output_dir) / "checkpoints")
    for path in files:
        path.write_bytes(b"x" * 100)
    for changes in ({}, {"resume": True}):
        with pytest.raises(
            errors.FormatError, match=rf"(?s)no checkpoint .*{files[1].name}.*{files[0].name}.*overwrite"
        ):
            train(config.replace(**changes))
    assert train(config.replace(overwrite=True)).steps == 8


def test_a_checkpoint_without_a_checksum_is_called_what_it_is(tmp_path: Path) -> None:
    config = settings(tmp_path, keep_checkpoints=1)
    (last,) = checkpoint_files(train(config).output_dir / "checkpoints")
    tensors, about = read_safetensors(last)
    write_safetensors(last, tensors, {"loralib.checkpoint": about["loralib.checkpoint"]})
    with pytest.raises(errors.FormatError, match="written without a checksum by an early loralib"):
        train(config.replace(resume=True))


def test_a_run_from_before_a_setting_was_renamed_resumes(tmp_path: Path) -> None:
    config = settings(tmp_path, num_epochs=1, keep_checkpoints=1)
    whole = kept(train(config).output_dir)
    directory = Path(config.output_dir) / "checkpoints"
    last = last_checkpoint(directory)
    assert last is not None
    old = {{"rank": "lora_dim"}.get(name, name): value for name, value in last[0].settings.items()}
    assert "lora_dim" in old
    save_checkpoint(directory, dataclasses.replace(last[0], settings=old), keep=1)
    assert kept(train(config.replace(resume=True)).output_dir) == whole


def test_a_new_checkpoint_outlasts_later_ones_that_could_not_be_read(tmp_path: Path) -> None:
    """With --keep_checkpoints 1, the one just written would be removed first."""
    config = settings(tmp_path, num_epochs=1, save_steps=1, keep_checkpoints=1)
    train(config)
    directory = Path(config.output_dir) / "checkpoints"
    (last,) = checkpoint_files(directory)
    found = last_checkpoint(directory)
    assert found is not None
    found[0].progress.step = 2
    last.write_bytes(b"damaged")
    save_checkpoint(directory, found[0], keep=1)
    assert [path.name for path in checkpoint_files(directory)] == ["step-00000002.safetensors"]


def test_another_base_or_adapter_is_not_gone_on_with(tmp_path: Path) -> None:
    config = settings(tmp_path, num_epochs=1)
    train(config)
    other = tiny_model()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.neg_()
    with pytest.raises(errors.TrainingError, match=r"base model: 'float32 .* then, 'float32 .* now"):
        train(config.replace(resume=True), other)
    with pytest.raises(errors.TrainingError, match=r"base model: 'float32 .* then, 'bfloat16 .* now"):
        train(config.replace(resume=True), tiny_model().bfloat16())
    other = tiny_model()
    lora.inject(other, lora.LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(
        errors.TrainingError, match=r"(?s)a different adapter.*q_proj.lora_A: \(4, 16\) then, \(2, 16\) now"
    ):
        train(config.replace(resume=True), other)
    with pytest.raises(errors.TrainingError, match="validation data: "):
        lora.train(tiny_model(), copying_examples(), config.replace(resume=True), valid_data=copying_examples(9))


def test_what_killed_writes_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    config = settings(tmp_path, num_epochs=1)
    run = train(config).output_dir
    left = [
        run / ".adapter_model.safetensors.abc.tmp",
        run / "checkpoints" / ".step-00000004.safetensors.x1.tmp",
        run / "best" / ".adapter_config.json.y.tmp",
    ]
    mine = [run / ".notes.tmp", run / "checkpoints" / "step-x.tmp"]
    for path in left + mine:
        path.write_bytes(b"")
    train(config)
    assert [path.exists() for path in left + mine] == [False] * 3 + [True] * 2


def test_a_log_that_was_cut_is_gone_on_with_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = settings(tmp_path, num_epochs=2)
    train(config)
    log = Path(config.output_dir) / "metrics.jsonl"
    log.write_bytes(log.read_bytes()[:-40])
    lora.train(
        tiny_model(), copying_examples(), config.replace(resume=True), valid_data=copying_examples(6, seed=1)
    )  # fmt: skip
    assert "is missing lines of the resumed run" in capsys.readouterr().out
    assert [event["step"] for event in read_metrics(log)] == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8]


def test_a_signal_does_not_wait_for_the_validation(tmp_path: Path) -> None:
    """The resumed run catches up on it, with the same results."""
    values: dict[str, Any] = {"eval_steps": 2, "save_steps": 3, "lora_dropout": 0.1}
    valid = copying_examples(24, seed=1)
    whole = settings(tmp_path / "whole", **values)
    lora.train(tiny_model(), copying_examples(), whole, valid_data=valid, verbose=False)
    config = settings(tmp_path / "stopped", **values)
    for stopped in range(3):
        model = tiny_model()
        seen: list[int] = []

        def hook(module: nn.Module, *_: Any, after: int = stopped, seen: list[int] = seen) -> None:
            """Called in the first, second and third validation of this process."""
            log = tmp_path / "stopped" / "run" / "metrics.jsonl"
            if not module.training and log.exists() and not seen:
                if sum(event["event"] == "valid" for event in read_metrics(log)) == after:
                    seen.append(1)
                    signal.raise_signal(signal.SIGTERM)

        model.model.layers[0].register_forward_hook(hook)
        with pytest.raises(errors.InterruptedRunError):
            lora.train(
                model, copying_examples(), config.replace(resume=stopped > 0), valid_data=valid, verbose=False
            )  # fmt: skip
    result = lora.train(
        tiny_model(), copying_examples(), config.replace(resume=True), valid_data=valid, verbose=False
    )  # fmt: skip
    assert [step for step, _ in result.valid_losses] == [0, 2, 4, 6, 8, 10, 12]
    assert kept(result.output_dir) == kept(Path(whole.output_dir))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for half a run."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if (
        mount is None
        or subprocess.run([mount, "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], check=False).returncode
    ):
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("room", [4096, 60_000, 110_000])
def test_a_full_disk_is_a_message_and_the_run_goes_on_when_there_is_space(small_disk: Path, room: int) -> None:
    config = settings(small_disk, save_steps=1, keep_checkpoints=2)
    whole = kept(train(settings(small_disk.parent / "elsewhere", save_steps=1)).output_dir)
    filler = small_disk / "filler"
    model = tiny_model()
    once: list[int] = []

    def fill(*_: Any) -> None:
        if not once and len(checkpoint_files(small_disk / "run" / "checkpoints")) == 2:
            once.append(1)
            filler.write_bytes(b"x" * max(0, shutil.disk_usage(small_disk).free - room))

    model.model.layers[0].register_forward_hook(fill)
    with pytest.raises(errors.OutputError, match=r"cannot write .*(the disk is full|No space left)"):
        train(config, model)
    filler.unlink()
    found = last_checkpoint(small_disk / "run" / "checkpoints")
    assert found is not None
    assert found[0].progress.step >= 2
    assert not list(small_disk.rglob("*.tmp"))
    train(config.replace(resume=True))
    assert kept(Path(config.output_dir)) == whole


def test_two_runs_do_not_share_a_directory(tmp_path: Path) -> None:
    from loralib.files import hold_directory

    with hold_directory(tmp_path / "run"), pytest.raises(errors.OutputError, match="in use by another run"):
        train(settings(tmp_path))


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine", encoding="utf-8")
    train(settings(tmp_path))
    train(settings(tmp_path))
    assert (tmp_path / "run" / "notes.txt").read_text(encoding="utf-8") == "mine"


# Schedules and optimisers.


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_standard_schedules_rise_peak_and_fall_without_wasting_an_update(schedule: str) -> None:
    config = lora.TrainConfig(schedule=schedule, warmup_steps=5)
    factors = [lr_factor(config, step, 20) for step in range(20)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5] == 1.0
    assert min(factors) > 0
    assert all(a >= b for a, b in itertools.pairwise(factors[5:]))
    if schedule != "constant":
        assert factors[-1] < 0.1


def test_loraplus_gives_b_its_own_rate_but_not_an_embedding_s() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4))
    lora.inject(model, lora.LoraConfig(r=2, target_modules=["0", "1"]))
    groups = parameter_groups(model, lora.TrainConfig(lr=1e-3, loraplus_lr_ratio=8.0))
    rates = {id(p): group["peak"] for group in groups for p in group["params"]}
    assert rates[id(model[1].lora_B)] == 8e-3
    assert rates[id(model[1].lora_A)] == rates[id(model[0].lora_A)] == rates[id(model[0].lora_B)] == 1e-3


def test_paper_adamw_is_torch_s_where_they_agree() -> None:
    """With eps near 0 and no decay, the order of eps and bias correction does not matter."""
    start = torch.randn(5, generator=torch.Generator().manual_seed(0))
    ends = []
    for arithmetic in ("paper", "standard"):
        parameter = nn.Parameter(start.clone())
        config = lora.TrainConfig(arithmetic=arithmetic, adam_eps=1e-20, lr=1e-2)
        optimizer = make_optimizer([{"params": [parameter], "peak": 1e-2}], config)
        for step in range(10):
            parameter.grad = torch.sin(start * (step + 1))
            optimizer.step()
        ends.append(parameter.detach())
    assert torch.allclose(ends[0], ends[1], rtol=1e-5)


def test_modules_are_left_out_of_all_linear_by_name_or_expression(tmp_path: Path) -> None:
    for exclude, names in {"first": ["unused", "head"], ".*(st|sed)": ["head"]}.items():
        config = settings(tmp_path, target_modules="all-linear,head", exclude_modules=exclude)
        assert list(lora.inject(Detached(), config.lora_config()).targets) == names


def test_every_bad_setting_is_named_at_once() -> None:
    with pytest.raises(errors.ConfigError) as caught:
        lora.TrainConfig(lora_dim=0, lr=-1.0, schedule="square", num_epochs=0, batch_size=0)
    for name in ("rank is 0", "lr is -1.0", "schedule is 'square'", "both 0", "batch_size is 0", "5 settings"):
        assert name in str(caught.value)


# Order.


def test_an_epoch_holds_every_example_once_and_keeps_siblings_together() -> None:
    examples = copying_examples(60)
    order = epoch_order(examples, 6, seed=3, epoch=0, max_siblings=3)
    assert sorted(index for batch in order for index in batch) == list(range(60))
    prompts = [len({examples[index].ids[:4] for index in batch}) for batch in order]
    assert min(prompts) >= 2, "several prompts in every step"
    assert sum(prompts) / len(prompts) < 3.5
    assert order != epoch_order(examples, 6, seed=3, epoch=1, max_siblings=3)
    uniform = epoch_order(examples, 6, seed=3, epoch=0)
    assert sum(len({examples[i].ids[:4] for i in batch}) for batch in uniform) / len(uniform) > 4.5


def test_metrics_lines_are_json(tmp_path: Path) -> None:
    result = train(settings(tmp_path))
    for line in (result.output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        assert isinstance(json.loads(line), dict)


@pytest.mark.filterwarnings("default")  # tensorboard's own
def test_tensorboard_gets_each_loss_once(tmp_path: Path) -> None:
    """Even after a resume, and after another run in the same directory."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = settings(tmp_path, report_to="tensorboard", num_epochs=2)
    result = train(config)
    checkpoint_files(result.output_dir / "checkpoints")[-1].unlink()
    train(config.replace(resume=True))
    for _ in range(2):
        events = EventAccumulator(str(result.output_dir / "tensorboard")).Reload()
        scalars = events.Scalars("train/loss")
        assert [scalar.step for scalar in scalars] == list(range(1, 9))
        assert [scalar.value for scalar in scalars] == pytest.approx(result.losses, rel=1e-6)
        assert [scalar.step for scalar in events.Scalars("valid/loss")] == [0, 4, 8]
        assert len(events.Scalars("train/lr")) == 8
        train(config)


@pytest.mark.filterwarnings("default")  # tensorboard's own
@pytest.mark.parametrize("method", ["add_scalar", "flush"])
def test_a_disk_that_is_full_for_tensorboard_is_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SummaryWriter, method, full)
    with pytest.raises(errors.OutputError, match=r"cannot write .*No space left.*--resume"):
        train(settings(tmp_path, report_to="tensorboard"))


@pytest.mark.usefixtures("plots")
def test_the_picture_takes_any_name_and_one_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn: list[Any] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: drawn.append(self) or save(self, *a, **k))
    model = tiny_model()
    model.name_or_path = r"/models/$\frac$/a_b$"
    directory = train(settings(tmp_path, max_steps=1), model).output_dir
    assert (directory / "loss.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = drawn[0].axes
    assert axes.get_title() == f"LoRA on {model.name_or_path}, r=4"
    assert all(tick == int(tick) for tick in axes.get_xticks())
    assert [line.get_marker() for line in axes.get_lines()] == [".", "None", "o"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_on_a_gpu_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    """Dropout draws from the GPU's own generator, whose state is kept too."""
    values: dict[str, Any] = {"lora_dropout": 0.1, "num_epochs": 2, "save_steps": 3}
    whole = train(settings(tmp_path / "whole", **values), tiny_model().cuda())
    assert whole.train_losses[-1] < whole.train_losses[0]
    config = settings(tmp_path / "stopped", **values)
    stopped = train(config, tiny_model().cuda()).output_dir
    checkpoint_files(stopped / "checkpoints")[-1].unlink()
    torch.cuda.manual_seed(1)
    train(config.replace(resume=True), tiny_model().cuda())
    assert kept(stopped) == kept(whole.output_dir)
