"""An injected model trains in other people's loops: the examples run, learn, and save adapters that load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

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
