"""Models that are not causal, and inputs that a model does not support, are refused before anything is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from loralib import LoraConfig, TrainConfig, inject, train
from loralib.cli import main
from loralib.data.tokens import TokenExample
from loralib.engine.causal import require_causal
from loralib.engine.limits import last_position, require_ids_in_table
from loralib.errors import DataError, UnsupportedModelError
from loralib.generation import beam_search, generate

SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
SEQ2SEQ = {
    "vocab_size": 40,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
}
ENCODERS = ("Bert", "Roberta", "Electra", "XLMRoberta", "Ernie", "MegatronBert", "Data2VecText", "RemBert")


def build(config: Any, kind: Any = transformers.AutoModelForCausalLM) -> Any:
    torch.manual_seed(0)
    return kind.from_config(config).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_with_a_head_for_language_is_not_causal(name: str, dtype: torch.dtype) -> None:
    """At initial weights and in bf16, the influence of later tokens is smaller than rounding errors."""
    model = build(getattr(transformers, f"{name}Config")(**SMALL)).to(dtype)
    with pytest.raises(UnsupportedModelError, match=r"not causal.*inject"):
        require_causal(model)


def test_the_way_out_of_an_encoder_works() -> None:
    require_causal(build(transformers.BertConfig(**SMALL, is_decoder=True)))
    model = build(transformers.BertConfig(**SMALL), transformers.AutoModelForMaskedLM)
    inject(model, LoraConfig(target_modules=["query"]))
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "config",
    [transformers.BartConfig(**SEQ2SEQ), transformers.PegasusConfig(**SEQ2SEQ)],
    ids=["bart", "pegasus"],
)
@pytest.mark.parametrize("kind", [transformers.AutoModelForCausalLM, transformers.AutoModelForSeq2SeqLM])
def test_sequence_to_sequence_models_are_refused_whole_and_by_half(config: Any, kind: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="sequence-to-sequence"):
        require_causal(build(config, kind))


def test_everything_that_takes_a_causal_model_refuses_others(tmp_path: Path) -> None:
    t5 = transformers.T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    examples = [TokenExample((3, 4, 5), (False, True, True))] * 4
    for model in (build(t5, transformers.AutoModelForSeq2SeqLM), build(transformers.BertConfig(**SMALL))):
        before = list(model.state_dict())
        for call in (
            lambda model=model: train(model, examples, TrainConfig(output_dir=str(tmp_path / "o")), verbose=False),
            lambda model=model: generate(model, None, [[3, 4]]),
            lambda model=model: beam_search(model, [[3, 4]]),
        ):
            with pytest.raises(UnsupportedModelError, match="your own loop"):
                call()
        assert list(model.state_dict()) == before  # no adapter was left in it
    assert not (tmp_path / "o").exists()


def test_a_directory_with_a_sequence_to_sequence_model_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    t5 = transformers.T5Config(
        vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    build(t5, transformers.AutoModelForSeq2SeqLM).save_pretrained(tmp_path)
    assert main(["generate", "Hi", "--model", str(tmp_path)]) == 2
    assert "sequence-to-sequence model" in capsys.readouterr().err
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    inject(model, LoraConfig(target_modules=["q"]))
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [
        transformers.LlamaConfig(**SMALL, initializer_range=1e-4),
        transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4),
        transformers.MambaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, state_size=4),
        transformers.OPTConfig(vocab_size=40, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4),
        transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=8),
    ],
    ids=lambda config: config.model_type,
)
@pytest.mark.filterwarnings("ignore")
def test_causal_models_pass(config: Any, dtype: torch.dtype) -> None:
    require_causal(build(config).to(dtype))


def test_rounding_is_not_taken_for_sight() -> None:
    """If rounding depends on all tokens, as with experts, logits of earlier tokens vary, but no gradients."""

    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(40, 8), nn.Linear(8, 40)

        def get_input_embeddings(self) -> nn.Module:
            return self.table

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            hidden = self.table(ids)
            noise = 0.01 * torch.sin(1e4 * hidden.detach().sum(1, keepdim=True))
            return self.head(hidden + noise)

    require_causal(Rounded())


def test_a_module_without_embeddings_is_tried_too() -> None:
    class Smooth(nn.Module):
        def __init__(self, causal: bool) -> None:
            super().__init__()
            self.mix, self.causal = nn.Parameter(torch.randn(40, 40)), causal

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            hot = nn.functional.one_hot(ids, 40).float() @ self.mix
            return hot.cumsum(1) if self.causal else hot + hot.mean(1, keepdim=True)

    require_causal(Smooth(causal=True))
    with pytest.raises(UnsupportedModelError, match="not causal"):
        require_causal(Smooth(causal=False))


# --- ids and positions ---------------------------------------------------------------------------------------------


def test_ids_beyond_the_embedding_are_named() -> None:
    model = build(transformers.LlamaConfig(**SMALL))
    require_ids_in_table(model, [[0, 39]])
    with pytest.raises(DataError, match=r"ids 0 to 39(?s:.)*prompt 2 has 40(?s:.)*prompt 3 has -1, 41, 42 and 1 more"):
        require_ids_in_table(model, [[1], [40, 2, 40], [41, 42, 43, -1]])
    for call in (
        lambda: generate(model, None, [[3], [3, 40]]),
        lambda: beam_search(model, [[3], [3, 40]]),
    ):
        with pytest.raises(DataError, match="prompt 2 has 40"):
            call()


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=4, n_positions=32), 32),
        (
            transformers.OPTConfig(
                vocab_size=40, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4,
                max_position_embeddings=32, word_embed_proj_dim=32,
            ),
            32,
        ),
        (transformers.GPTJConfig(vocab_size=40, n_embd=32, n_layer=1, n_head=2, n_positions=32, rotary_dim=8), 32),
        (transformers.LlamaConfig(**{**SMALL, "max_position_embeddings": 32}), None),
        (transformers.BertConfig(**{**SMALL, "max_position_embeddings": 32}, is_decoder=True), 32),
        (transformers.RobertaConfig(**{**SMALL, "max_position_embeddings": 34}, is_decoder=True, pad_token_id=1), 32),
    ],
    ids=lambda value: getattr(value, "model_type", value),
)  # fmt: skip
def test_positions_end_where_the_model_does(config: Any, limit: int | None) -> None:
    model = build(config)
    assert last_position(model) == limit
    longest = torch.full((1, limit or 40), 3)
    model(longest)
    if limit is not None:
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, limit + 1), 3))
        with pytest.raises(DataError, match="prompt 1 has 33 tokens, but the model's context has 32"):
            generate(model, None, [[3] * 33])
