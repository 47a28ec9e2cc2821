"""Injected models train in other training loops: the examples run, learn, and save adapters that can be loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import loralib as lora

EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "integrations"


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory: pytest.TempPathFactory, smollm2: tuple[Any, Any]) -> str:
    """A small model in a directory, with the default base's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = smollm2[1]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.2, eos_token_id=2, bos_token_id=1, **sizes)
    directory = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.mark.filterwarnings("default")  # what other people's trainers warn of is theirs
@pytest.mark.parametrize("name", ["plain_pytorch", "transformers_trainer", "lightning_module"])
def test_example(name: str, load_file: Callable[[Path], ModuleType], tiny_base: str, tmp_path: Path) -> None:
    if name == "lightning_module":
        pytest.importorskip("lightning", reason="the extra package is installed by scripts/test.py")
    losses = load_file(EXAMPLES / f"{name}.py").main(tiny_base, str(tmp_path / "adapter"))
    assert len(losses) == 20
    assert sum(losses[-5:]) < sum(losses[:5])
    model, _ = lora.load_base(tiny_base)
    assert "applied" in str(lora.load_adapter(model, tmp_path / "adapter"))


def test_trainer_checkpoints_are_adapters(tiny_base: str, tmp_path: Path) -> None:
    model, _ = lora.load_base(tiny_base)
    lora.inject(model, lora.LoraConfig(r=2, target_modules="all-linear"))
    model.save_pretrained(tmp_path / "checkpoint", state_dict=model.state_dict())
    assert sorted(path.name for path in (tmp_path / "checkpoint").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


# transformers' own Trainer, which reads its checkpoints back.

STEPS = 6


def small(**more: Any) -> Any:
    """A fresh injected model; the same each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, eos_token_id=2, bos_token_id=1, **sizes))
    lora.inject(model, lora.LoraConfig(r=2, lora_alpha=16, target_modules=["q_proj", "v_proj"], **more))
    return model


def rows(count: int = 12) -> list[dict[str, Tensor]]:
    ids = torch.randint(3, 32, (count, 8), generator=torch.Generator().manual_seed(9))
    return [{"input_ids": each, "labels": each} for each in ids]


def trainer(model: Any, directory: Path, steps: int = STEPS, **more: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    settings = {"per_device_train_batch_size": 2, "learning_rate": 3e-2, "lr_scheduler_type": "constant", "seed": 1}
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1}
    args = TrainingArguments(str(directory), max_steps=steps, save_steps=2, **settings, **quiet, **more)
    return Trainer(model=model, args=args, train_dataset=rows(), eval_dataset=rows(4))


def trained_tensors(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


EXTRA: list[dict[str, Any]] = [{}, {"modules_to_save": ["lm_head"]}]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("more", EXTRA, ids=["factors", "and a head"])
def test_a_resumed_trainer_ends_where_an_uninterrupted_one_does(more: dict[str, Any], tmp_path: Path) -> None:
    whole, first, resumed = small(**more), small(**more), small(**more)
    trainer(whole, tmp_path / "whole").train()
    trainer(first, tmp_path / "halves", steps=4).train()
    trainer(resumed, tmp_path / "halves").train(resume_from_checkpoint=True)
    ours = trained_tensors(resumed)
    assert all(torch.equal(tensor, ours[name]) for name, tensor in trained_tensors(whole).items())
    fresh = small(**more)
    lora.remove(fresh)
    lora.load_adapter(fresh, tmp_path / "halves" / f"checkpoint-{STEPS}")
    X = rows(2)[0]["input_ids"][None]
    assert torch.equal(fresh.eval()(X).logits, whole.eval()(X).logits)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("more", EXTRA, ids=["factors", "and a head"])
def test_the_best_model_is_in_the_model_at_the_end(more: dict[str, Any], tmp_path: Path) -> None:
    model = small(**more)
    run = trainer(
        model,
        tmp_path,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=2,
        metric_for_best_model="loss",
        greater_is_better=True,  # so that the first checkpoint wins, from which the model has moved on
    )
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-2")
    assert run.evaluate()["eval_loss"] == pytest.approx(run.state.best_metric, abs=1e-6)
    saved = lora.read_adapter(run.state.best_model_checkpoint)
    now = lora.adapter_of(model)
    assert all(torch.equal(tensor, now.tensors[name]) for name, tensor in saved.tensors.items())


@pytest.mark.filterwarnings("default")
def test_what_a_trainer_saves_is_loaded_by_from_pretrained(tiny_base: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, _ = lora.load_base(tiny_base, dtype="fp32", device="cpu")
    lora.inject(model, lora.LoraConfig(r=2, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    trainer(model, tmp_path, steps=2).train()
    X = rows(2)[0]["input_ids"][None]
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2").eval()
    assert torch.allclose(other(X).logits, model.eval()(X).logits, atol=1e-5)


@pytest.mark.filterwarnings("default")
def test_trls_trainer_takes_an_injected_model(tiny_base: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    from datasets import Dataset

    model, tokenizer = lora.load_base(tiny_base, dtype="fp32", device="cpu")
    lora.inject(model, lora.LoraConfig(r=2, lora_alpha=16, target_modules="all-linear"))
    settings = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "report_to": "none", "use_cpu": True}
    args = trl.SFTConfig(
        str(tmp_path),
        per_device_train_batch_size=2,
        disable_tqdm=True,
        logging_steps=1,
        max_length=16,
        bf16=False,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        gradient_checkpointing=False,
        **settings,
    )
    data = Dataset.from_list([{"text": f"number {number} is {number + 1} less one"} for number in range(8)])
    run = trl.SFTTrainer(model=model, args=args, train_dataset=data, eval_dataset=data, processing_class=tokenizer)
    run.train()
    assert run.evaluate()["eval_loss"] == pytest.approx(run.state.best_metric, abs=1e-5)
    base, _ = lora.load_base(tiny_base, dtype="fp32", device="cpu")
    assert "base model checked" in str(lora.load_adapter(base, tmp_path / "checkpoint-4"))


def test_accelerate_saves_and_restores_an_injected_model(tmp_path: Path) -> None:
    from accelerate import Accelerator

    model = small(modules_to_save=["lm_head"])
    accelerator = Accelerator(cpu=True)
    wrapped, optimizer = accelerator.prepare(
        model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    )
    batch = {key: value[None] for key, value in rows(1)[0].items()}

    def step() -> None:
        accelerator.backward(wrapped(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()

    step()
    accelerator.save_state(str(tmp_path / "state"))
    step()
    after = trained_tensors(model)
    accelerator.load_state(str(tmp_path / "state"))
    step()
    assert all(torch.equal(tensor, after[name]) for name, tensor in trained_tensors(model).items())
    lora.save_adapter(accelerator.unwrap_model(wrapped), tmp_path / "adapter")
    fresh = small()
    lora.remove(fresh)
    lora.load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(fresh(**batch).loss, model(**batch).loss)
