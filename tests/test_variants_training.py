"""Variants of LoRA train as in PEFT, merge exactly, and can be removed without a trace; files: test_peft_interop."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import loralib as lora
from loralib.data import TokenExample
from loralib.delta import delta_weight, dora_norms, dora_weight, row_squares, scale_outputs
from loralib.injection import adapted_layers
from loralib.training import run_directory
from loralib.training.run_directory import checkpoint_files
from loralib.training.step import make_step

IDS = torch.tensor([[5, 9, 3, 17, 8, 30], [1, 1, 2, 39, 0, 7]])


def gpt2() -> Any:
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 40}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).eval()


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = hf.LlamaConfig(**sizes, vocab_size=40, max_position_embeddings=32, attention_bias=True)
    model = hf.LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def convolutions() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(40, 4), nn.Conv1d(6, 5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(10, 3))


DORA = {"use_dora": True}
CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "plain": (llama, {"target_modules": ["q_proj", "down_proj"]}),
    "rslora": (gpt2, {"target_modules": ["c_attn"], "use_rslora": True}),
    "dora": (llama, {"target_modules": ["q_proj", "v_proj", "down_proj"], **DORA}),
    "dora on Conv1D": (gpt2, {"target_modules": ["c_attn", "c_proj"], **DORA}),
    "dora and trained biases": (gpt2, {"target_modules": ["c_attn", "c_fc"], "bias": "lora_only", **DORA}),
    "dora, rslora, all linear": (llama, {"target_modules": "all-linear", "use_rslora": True, **DORA}),
    "pissa": (llama, {"target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": "pissa"}),
    "pissa on Conv1D, rslora": (gpt2, {"target_modules": ["c_attn"], "init_lora_weights": "pissa", "use_rslora": True}),
    "olora": (llama, {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": "olora"}),
    "bias of B": (llama, {"target_modules": ["q_proj", "down_proj"], "lora_bias": True}),
    "bias of B on Conv1D": (gpt2, {"target_modules": ["c_attn"], "lora_bias": True}),
    "token rows": (llama, {"target_modules": ["q_proj"], "trainable_token_indices": [30, 5, 9]}),
    "token rows, tied head": (gpt2, {"target_modules": ["c_attn"], "trainable_token_indices": [2, 39, 1]}),
    "token rows of two tables": (
        llama,
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 9], "lm_head": [7]}},
    ),
    "dora on an embedding and a convolution": (convolutions, {"target_modules": ["0", "1", "4"], **DORA}),
}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return outputs(model)


def outputs(model: nn.Module) -> Tensor:
    y = model(IDS)
    return y.logits if hasattr(y, "logits") else y  # type: ignore[no-any-return]


def in_peft(base: nn.Module, **settings: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*tied|.*fan_in_fan_out|.*target modules.*|.*lora_bias", UserWarning)
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=8, **settings)).eval()


def stir(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def train(model: nn.Module, kind: type[torch.optim.Optimizer], lr: float) -> None:
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=lr)  # type: ignore[call-arg]
    for _ in range(3):
        optimizer.zero_grad()
        outputs(model).log_softmax(-1)[..., 1].sum().neg().backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("optimizer", "lr"), [(torch.optim.SGD, 0.05), (torch.optim.AdamW, 0.02)], ids=["SGD", "AdamW"]
)
@pytest.mark.parametrize("name", CASES)
def test_three_steps_are_those_of_peft(name: str, optimizer: Any, lr: float, tmp_path: Any) -> None:
    make, settings = CASES[name]
    theirs = in_peft(make(), **settings)
    stir(theirs)  # in the same order of parameters as ours
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers`|Could not|Adapter 'default'", UserWarning)
        theirs.save_pretrained(str(tmp_path))  # type: ignore[operator]
    ours = make()
    base = logits(ours)
    lora.load_adapter(ours, tmp_path)
    before = logits(ours)
    assert (before - logits(theirs)).abs().max() <= 1e-5
    train(ours, optimizer, lr)
    train(theirs, optimizer, lr)
    assert (logits(ours) - before).abs().max() > 2e-4
    assert (before - base).abs().max() > 1e-3
    assert (logits(ours) - logits(theirs)).abs().max() <= 1e-5


@pytest.mark.parametrize("name", CASES)
def test_it_starts_as_the_base_merges_exactly_and_goes_without_a_trace(name: str) -> None:
    make, settings = CASES[name]
    model = make()
    base, state, own = logits(model), copy.deepcopy(model.state_dict()), [sorted(vars(m)) for m in model.modules()]
    lora.inject(model, lora.LoraConfig(r=2, lora_alpha=8, **settings))
    torch.testing.assert_close(logits(model), base)
    stir(model)
    adapted = logits(model)
    assert (adapted - base).abs().max() > 1e-3
    assert torch.equal(logits(copy.deepcopy(model)), adapted)
    lora.merge(model)
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-5)
    lora.unmerge(model)
    assert torch.equal(logits(model), adapted)
    with lora.disabled(model):
        assert torch.equal(logits(model), base)
    lora.remove(model)
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
    assert [sorted(vars(m)) for m in model.modules()] == own


# Runs.


TINY: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa_niter_2"},
    "olora": {"init_lora_weights": "olora", "use_rslora": True},
    "eva": {"init_lora_weights": "eva"},
    "bias of B": {"lora_bias": True},
    "token rows": {"trainable_token_indices": "5,9", "target_modules": "q_proj"},
}


def examples() -> list[TokenExample]:
    """Prompts whose completion repeats them."""
    prompts = torch.randint(3, 40, (24, 3), generator=torch.Generator().manual_seed(0)).tolist()
    return [TokenExample((*prompt, 2, *prompt, 1), (False,) * 4 + (True,) * 4) for prompt in prompts]


@pytest.mark.parametrize("variant", TINY)
def test_a_run_that_was_killed_goes_on_to_the_same_bits(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_directory, "plot_losses", lambda *_: False)
    config = lora.TrainConfig(
        output_dir=str(tmp_path),
        rank=2,
        lr=0.01,
        num_epochs=1,
        batch_size=6,
        save_steps=2,
        keep_checkpoints=9,
        **TINY[variant],
    )
    model = llama()
    base = logits(model)
    lora.train(model, examples(), config, verbose=False)
    whole = lora.read_adapter(tmp_path)
    later = [path for path in checkpoint_files(tmp_path / "checkpoints") if "00000002" not in path.name]
    assert later
    for path in later:
        path.unlink()
    lora.train(llama(), examples(), config.replace(resume=True), verbose=False)
    resumed = lora.read_adapter(tmp_path)
    assert all(torch.equal(tensor, resumed.tensors[name]) for name, tensor in whole.tensors.items())
    assert resumed.config == whole.config
    loaded = llama()
    assert lora.load_adapter(loaded, tmp_path).base == "checked"
    torch.testing.assert_close(logits(loaded), logits(model))
    assert (logits(loaded) - base).abs().max() > 1e-3


def test_a_start_and_an_adapter_to_train_on_from_contradict_each_other() -> None:
    with pytest.raises(lora.LoraError, match="init_lora_weights 'pissa' starts a new adapter"):
        lora.TrainConfig(init_lora_weights="pissa", from_adapter="there")
    with pytest.raises(lora.LoraError, match=r"(?s)use_dora and lora_bias.*lora_bias and bias 'all'"):
        lora.TrainConfig(use_dora=True, lora_bias=True, bias="all")
    with pytest.raises(lora.LoraError, match="expected default, pissa"):
        lora.TrainConfig(init_lora_weights="piza")


def test_a_variant_that_the_model_s_own_adapter_is_not_is_refused(tmp_path: Path) -> None:
    model = llama()
    lora.inject(model, lora.LoraConfig(r=2, target_modules=["q_proj"]))
    config = lora.TrainConfig(output_dir=str(tmp_path), use_dora=True, lr=0.01, trainable_token_indices="3")
    with pytest.raises(lora.LoraError, match=r"(?s)already has an adapter.*use_dora is True.*trainable_token_indices"):
        lora.train(model, examples(), config, verbose=False)


# EVA.


def test_eva_starts_as_in_peft() -> None:
    """The same directions up to their sign, the same ranks and scalings; those of an exact decomposition."""
    batches = [torch.randint(0, 40, (16, 20), generator=torch.Generator().manual_seed(n)) for n in range(3)]
    settings: dict[str, Any] = {"target_modules": ["q_proj", "k_proj", "down_proj"], "init_lora_weights": "eva"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        eva = peft.EvaConfig(rho=2.0, tau=0.99)
        theirs: Any = peft.get_peft_model(llama(), peft.LoraConfig(r=2, lora_alpha=8, **settings, eva_config=eva))
        peft.initialize_lora_eva_weights(theirs, [{"input_ids": ids} for ids in batches], show_progress_bar=False)
    ours = llama()
    config = lora.LoraConfig(r=2, lora_alpha=8, **settings, eva_config={"rho": 2.0, "tau": 0.99})
    lora.inject(ours, config, [{"input_ids": ids} for ids in batches])
    layers = dict(adapted_layers(ours))
    modules = {
        name.removeprefix("base_model.model."): module
        for name, module in theirs.named_modules()
        if hasattr(module, "lora_A") and "default" in module.lora_A
    }
    assert layers.keys() == modules.keys()
    for name, module in modules.items():
        A, layer = module.lora_A["default"].weight, layers[name]
        assert layer.r == len(A)
        assert layer.scaling == pytest.approx(module.scaling["default"])
        assert not layer.lora_B.any()
        # The same space: each of their directions lies in ours.
        assert (A @ layer.lora_A.T).norm(dim=1).min() > 0.98


def test_eva_of_another_layer_than_a_linear_one_is_refused() -> None:
    config = lora.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], init_lora_weights="eva")
    with pytest.raises(lora.LoraError, match=r"linear layers alone(.|\n)*embed_tokens is of class Embedding"):
        lora.inject(llama(), config, [torch.ones(4, 8, dtype=torch.long)])


def test_eva_takes_no_padding_and_tells_when_data_is_too_little() -> None:
    ids = torch.randint(0, 40, (4, 8), generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(ids, (0, 3), value=1)
    mask = (torch.arange(11) < 8).long().expand(4, 11)
    config = lora.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="eva", eva_config={"rho": 1})
    plain, masked = llama(), llama()
    lora.inject(plain, config, [ids])
    lora.inject(masked, config, [{"input_ids": padded, "attention_mask": mask}])
    for (_, one), (_, other) in zip(adapted_layers(plain), adapted_layers(masked), strict=True):
        torch.testing.assert_close((one.lora_A @ other.lora_A.T).abs(), torch.eye(2), atol=1e-4, rtol=0)
    with pytest.raises(lora.LoraError, match="fewer inputs than r"):
        lora.inject(llama(), config, [ids[:1, :1]])
    with pytest.raises(lora.LoraError, match="batches are only for init_lora_weights 'eva'"):
        lora.inject(llama(), lora.LoraConfig(target_modules=["q_proj"]), [ids])


# DoRA.


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-3)])
def test_the_norm_of_the_sum_needs_no_matrix_of_its_size(dtype: torch.dtype, error: float) -> None:
    generator = torch.Generator().manual_seed(0)
    W, A, B = (torch.randn(*size, generator=generator) for size in ((40, 30), (4, 30), (40, 4)))
    W = W.to(dtype)
    plain = (W.double() + 0.5 * B.double() @ A.double()).norm(dim=1)
    torch.testing.assert_close(dora_norms(W, row_squares(W), A, B, 0.5).double(), plain, rtol=error, atol=0)


def test_a_row_of_zeros_stays_one() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    nn.init.zeros_(model[0].weight)
    lora.inject(model, lora.LoraConfig(r=2, target_modules=["0"], use_dora=True))
    model(torch.ones(1, 6)).sum().backward()
    assert all(torch.isfinite(tensor.grad).all() for tensor in model.parameters() if tensor.grad is not None)
    assert torch.isfinite(
        dora_weight(torch.zeros(2, 3), delta_weight(torch.ones(1, 3), torch.zeros(2, 1), 1), torch.ones(2))
    ).all()


def test_a_scale_near_1_is_not_rounded_to_bf16() -> None:
    y, scale = torch.full((1, 2), 256.0, dtype=torch.bfloat16), torch.tensor([1.003, 1.0045])
    assert scale_outputs(y, scale).tolist() == [[256.0, 258.0]]  # bf16's neighbours of 1 are 0.996 and 1.008


def test_norms_follow_what_is_loaded_and_cast() -> None:
    model = llama()
    lora.inject(model, lora.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    stir(model)
    with torch.inference_mode():
        model(IDS)
    other = copy.deepcopy(model)
    stir(other)
    expected = logits(other)
    model.load_state_dict(other.state_dict())
    assert torch.equal(logits(model), expected)
    outputs(model).sum().backward()  # also after a pass in inference_mode
    layer = adapted_layers(model)[0][1]
    with torch.no_grad():
        layer.lora_B.mul_(2)
    assert not torch.equal(logits(model), expected)


@pytest.mark.parametrize("rank", [1, 2])
def test_dora_in_bf16_is_that_of_pytorchs_operators(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with an odd rank, which the kernels for linear layers with LoRA do not support."""

    def gradients(engine: str) -> list[Tensor]:
        monkeypatch.setenv("LORALIB_ENGINE", engine)
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_hidden_layers": 2}
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, vocab_size=40)).bfloat16()
        lora.inject(model, lora.LoraConfig(r=rank, target_modules="all-linear", **DORA))
        step = make_step(model.train())
        step.forward_backward([TokenExample(tuple(range(5, 25)), (False,) + (True,) * 19)], loss_scale=1 / 19)
        return [cast(Tensor, p.grad) for p in model.parameters() if p.requires_grad]

    for ours, theirs in zip(gradients("full"), gradients("off"), strict=True):
        assert float((ours - theirs).norm()) <= 0.02 * float(theirs.norm())
