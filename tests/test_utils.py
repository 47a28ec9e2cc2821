"""Microsoft's two helper functions (their exact key lists are compared in golden/test_layers.py)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import loralib as lora
from loralib.errors import BiasModeError, ConfigError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = lora.MergedLinear(4, 12, r=2, enable_lora=[True, False, True])
        self.plain = nn.Linear(4, 4)
        self.off = lora.Linear(4, 4, r=0)
        self.norm = nn.LayerNorm(4)
        self.register_buffer("bias", torch.ones(4, 4).tril())  # GPT-2's causal mask

    @staticmethod
    def trainable(model: nn.Module) -> set[str]:
        return {name for name, p in model.named_parameters() if p.requires_grad}


FACTORS = {"attn.lora_A", "attn.lora_B"}


def test_only_lora_trains() -> None:
    model = Block()
    lora.mark_only_lora_as_trainable(model)
    assert Block.trainable(model) == FACTORS
    lora.mark_only_lora_as_trainable(model, bias="lora_only")
    assert Block.trainable(model) == FACTORS | {"attn.bias", "off.bias"}  # r = 0 counts here, as in 0.1.2
    lora.mark_only_lora_as_trainable(model, bias="all")
    assert Block.trainable(model) == FACTORS | {"attn.bias", "off.bias", "plain.bias", "norm.bias"}
    lora.mark_only_lora_as_trainable(model)
    assert Block.trainable(model) == FACTORS


def test_the_state_dict_holds_the_adapter_and_no_mask_buffers() -> None:
    """With bias="all", loralib 0.1.2 also saves every buffer called bias."""
    model = Block()
    assert set(lora.lora_state_dict(model)) == FACTORS
    assert set(lora.lora_state_dict(model, bias="lora_only")) == FACTORS | {"attn.bias"}
    everything = lora.lora_state_dict(model, bias="all")
    assert set(everything) == FACTORS | {"attn.bias", "off.bias", "plain.bias", "norm.bias"}
    assert "bias" in model.state_dict()


def test_the_state_dict_round_trips_in_eval_mode() -> None:
    torch.manual_seed(0)
    model, fresh, x = Block(), Block(), torch.randn(2, 4)
    fresh.load_state_dict(model.state_dict())
    nn.init.normal_(model.attn.lora_B)
    y = model.attn(x)
    model.eval()
    state = lora.lora_state_dict(model)
    missing = fresh.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    torch.testing.assert_close(fresh.eval().attn(x), y)
    assert torch.equal(fresh.attn.base_weight, model.attn.base_weight)


@pytest.mark.parametrize("function", [lora.mark_only_lora_as_trainable, lora.lora_state_dict])
def test_unknown_bias_modes_change_nothing(function: object) -> None:
    model = Block()
    before = Block.trainable(model)
    with pytest.raises(BiasModeError, match="bias is 'sum', expected 'none', 'all' or 'lora_only'") as refused:
        function(model, bias="sum")  # type: ignore[operator]
    assert isinstance(refused.value, (NotImplementedError, ConfigError))
    assert Block.trainable(model) == before
