"""The training loop against the LoRA paper's own code: losses and factors of every run in the reference data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loralib as lora
from loralib.data import TokenExample
from loralib.training.report import read_metrics

pytestmark = pytest.mark.golden


def base_model(folder: Path) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
    model = GPT2LMHeadModel(config).eval()
    weights = load_file(folder / "base.safetensors")
    missing, unexpected = model.transformer.load_state_dict(
        {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}, strict=False
    )
    assert not unexpected
    assert not [name for name in missing if not name.endswith("attn.bias")]
    model.tie_weights()
    return model


def examples_of(folder: Path, objective: str) -> list[TokenExample]:
    """Undoes the reference's padding: the same tokens and the same mask, example by example."""
    batches = load_file(folder / "batches.safetensors")
    mask = batches["mask_jlm" if objective == "jlm" else "mask"].flatten(0, 1)
    examples = []
    for inputs, targets, trained in zip(
        batches["input"].flatten(0, 1), batches["target"].flatten(0, 1), mask, strict=True
    ):
        length = int(trained.nonzero().max()) + 1
        ids = (*inputs[:length].tolist(), int(targets[length - 1]))
        examples.append(TokenExample(ids, (False, *(bool(on) for on in trained[:length]))))
    return examples


def paper_config(run: dict[str, Any], output_dir: Path) -> lora.TrainConfig:
    return lora.TrainConfig(
        arithmetic="paper",
        lr=run["lr"],
        loraplus_lr_ratio=1.0,
        weight_decay=run["weight_decay"],
        correct_bias=run["correct_bias"],
        adam_eps=run["adam_eps"],
        beta1=run["beta1"],
        beta2=run["beta2"],
        schedule=run["scheduler"],
        warmup_steps=run["warmup_step"],
        max_steps=run["max_step"] // run["grad_acc"],
        max_grad_norm=run["clip"],
        grad_accum=run["grad_acc"],
        objective=run["obj"],
        label_smoothing=run["label_smooth"],
        lora_dim=run["lora_r"],
        lora_alpha=run["lora_alpha"],
        target_modules="c_attn",
        enable_lora={"c_attn": run["enable_lora"]},
        batch_size=run["batch_size"],
        shuffle=False,
        valid_fraction=0.0,
        output_dir=str(output_dir),
    )


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_every_run_of_the_paper_s_code(golden_dir: Path, tmp_path: Path, packing: bool) -> None:
    folder = golden_dir / "train"
    start = load_file(folder / "lora_init.safetensors")
    for run in json.loads((folder / "runs.json").read_text(encoding="utf-8")):
        config = paper_config(run, tmp_path / run["name"]).replace(packing=packing)
        model = base_model(folder)
        lora.inject(model, config.lora_config())
        factors = {name.removeprefix("transformer."): p for name, p in model.named_parameters() if "lora_" in name}
        assert factors.keys() == start.keys()
        with torch.no_grad():
            for name, parameter in factors.items():
                parameter.copy_(start[name])
        result = lora.train(model, examples_of(folder, run["obj"]), config, verbose=False)

        per_update = torch.tensor(run["loss_f64"]).view(-1, run["grad_acc"]).mean(1)
        assert torch.allclose(torch.tensor(result.losses, dtype=torch.float64), per_update.double(), rtol=1e-4, atol=0)
        rates = run["lr_used"][run["grad_acc"] - 1 :: run["grad_acc"]]
        logged = [e["lr"] for e in read_metrics(result.output_dir / "metrics.jsonl") if e["event"] == "train"]
        assert logged == pytest.approx(rates, rel=1e-9, abs=1e-12)

        final = load_file(folder / f"{run['name']}.safetensors")
        for name, parameter in factors.items():
            truth = final[f"{name}.f64"]
            assert (parameter.detach() - truth).norm() <= 1e-3 * truth.norm(), (run["name"], name)
        with torch.no_grad():
            logits = model(final["fixed_input"]).logits
        assert (logits - final["logits_final_f64"]).abs().max() <= 1e-3 * final["logits_final_f64"].abs().max()
