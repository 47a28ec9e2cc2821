"""No adapter silently has no effect: where code bypasses a module's forward, that is handled or refused."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import loralib as lora
from loralib.errors import MergeError, TargetError
from loralib.injection import adapted_layers
from loralib.layers import LoRAEmbedding

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 40,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IDS = torch.tensor([[5, 9, 3, 17, 8, 30, 4, 4]])


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def text(cls: type[Any], config: type[Any], **more: Any) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    sizes = {key: value for key, value in SIZES.items() if key not in more.pop("without", ())}
    model = cls(config(**{**sizes, **more}))
    return model, lambda m: m(IDS).logits


def gpt2() -> Any:
    config = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "vocab_size": 40}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**config, bos_token_id=1, eos_token_id=2)), lambda m: m(IDS).logits


def bart() -> Any:
    sizes = {f"{side}_{size}": n for side in ("encoder", "decoder") for size, n in BART.items()}
    config = hf.BartConfig(vocab_size=40, d_model=16, scale_embedding=True, max_position_embeddings=32, **sizes)
    return hf.BartForConditionalGeneration(config), lambda m: m(input_ids=IDS, decoder_input_ids=IDS).logits


BART = {"layers": 1, "attention_heads": 2, "ffn_dim": 24}


def t5() -> Any:
    config = hf.T5Config(
        d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=40, decoder_start_token_id=0
    )
    return hf.T5ForConditionalGeneration(config), lambda m: m(input_ids=IDS, decoder_input_ids=IDS).logits


def conv_net() -> Any:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c1, self.c2, self.c3 = nn.Conv1d(3, 4, 3, padding=1), nn.Conv2d(4, 4, (3, 2)), nn.Conv3d(1, 2, 2)
            self.out = nn.Linear(2 * 3 * 3 * 4, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.c1(x).tanh().view(1, 4, 6, 6)
            x = self.c2(x).tanh()  # (1, 4, 4, 5)
            return self.out(self.c3(x[:, None]).flatten(1))

    x = noise(1, 3, 36)
    return Net(), lambda m: m(x)


def encoder(**options: Any) -> Any:
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, **options)
    x = noise(2, 6, 16)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not options.get("norm_first")), lambda m: m(x)


def padded_encoder() -> Any:
    """With a padding mask the fast path turns the batch into a nested tensor."""
    model, _ = encoder(dropout=0.0)
    x = noise(2, 6, 16)
    mask = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])

    def forward(m: nn.Module) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The PyTorch API of nested tensors is in prototype", UserWarning)
            return m(x, src_key_padding_mask=mask)[:, :4]

    return model, forward


def decoder() -> Any:
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 24, batch_first=True), 1)
    x = noise(2, 6, 16)
    return model, lambda m: m(x, x.flip(1))


def attention() -> Any:
    x = noise(2, 6, 16)
    return nn.ModuleDict({"attn": nn.MultiheadAttention(16, 2, batch_first=True)}), lambda m: m["attn"](x, x, x)[0]


LINEAR = "all-linear"
MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "gpt2": (gpt2, r".*(c_attn|c_proj|c_fc|wte|wpe|lm_head)"),
    "llama": (lambda: text(hf.LlamaForCausalLM, hf.LlamaConfig), r".*(_proj|embed_tokens|lm_head)"),
    "qwen2": (lambda: text(hf.Qwen2ForCausalLM, hf.Qwen2Config, without=["head_dim"]), LINEAR),
    "mistral": (lambda: text(hf.MistralForCausalLM, hf.MistralConfig), LINEAR),
    "gemma2": (
        lambda: text(hf.Gemma2ForCausalLM, hf.Gemma2Config, num_hidden_layers=2),
        r".*(q_proj|embed_tokens)",
    ),
    "gemma3": (
        lambda: text(hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, num_hidden_layers=2),
        r".*(down_proj|embed_tokens)",
    ),
    "opt": (
        lambda: text(hf.OPTForCausalLM, hf.OPTConfig, ffn_dim=24, word_embed_proj_dim=16, without=["head_dim"]),
        r".*(_proj|fc1|fc2|embed_tokens)",
    ),
    "bart": (bart, r".*(q_proj|fc2|coder.embed_tokens)"),
    "t5": (t5, r".*(\.[qvo]|wi|wo|embed_tokens)"),
    "albert": (
        lambda: text(hf.AlbertForMaskedLM, hf.AlbertConfig, embedding_size=12, without=["head_dim"]),
        r".*(query|ffn_output|word_embeddings)",
    ),
    "conv net": (conv_net, "c1|c2|c3|out"),
    "encoder": (encoder, LINEAR),
    "encoder, norm first": (lambda: encoder(norm_first=True, activation="gelu"), LINEAR),
    "encoder, padded": (padded_encoder, LINEAR),
    "decoder": (decoder, LINEAR),
    "attention": (attention, "attn"),
}


def run(model: nn.Module, forward: Callable[[nn.Module], Tensor], mode: str) -> Tensor:
    """One forward pass in train, eval or no_grad mode, with the same dropout masks each time."""
    torch.manual_seed(3)
    model.train(mode == "train")
    with torch.set_grad_enabled(mode != "no_grad"):
        return forward(model).detach().clone()


MODES = ("train", "eval", "no_grad")


@pytest.mark.parametrize("name", MODELS)
def test_every_adapted_layer_acts_in_every_mode(name: str) -> None:
    make, target = MODELS[name]
    torch.manual_seed(0)
    model, forward = make()
    for parameter in model.parameters():  # so that no weight starts at zero and hides a path
        nn.init.normal_(parameter, std=0.2) if parameter.dim() > 1 else None
    model.double()
    before = {mode: run(model, forward, mode) for mode in MODES}
    report = lora.inject(model, lora.LoraConfig(r=2, lora_alpha=4, target_modules=target))
    layers = adapted_layers(model)
    assert len(layers) == len(report.targets)
    for mode in MODES:
        torch.testing.assert_close(run(model, forward, mode), before[mode])  # a new adapter has no effect
    for path, layer in layers:
        start = layer.lora_A if isinstance(layer, LoRAEmbedding) else layer.lora_B
        nn.init.normal_(start)
        for mode in MODES:
            change = (run(model, forward, mode) - before[mode]).abs().max()
            assert change > 1e-9, f"{path} has no effect in {mode}"
        nn.init.zeros_(start)
    # Not only some effect, but the right one: that of the merged weights.
    for _, layer in layers:
        nn.init.normal_(layer.lora_A, std=0.2)
        nn.init.normal_(layer.lora_B, std=0.2)
    unmerged = {mode: run(model, forward, mode) for mode in MODES}
    lora.merge(model)
    for mode in MODES:
        torch.testing.assert_close(run(model, forward, mode), unmerged[mode])
    with lora.disabled(model):
        for mode in MODES:
            torch.testing.assert_close(run(model, forward, mode), before[mode], rtol=0, atol=1e-12)
    lora.remove(model)
    for mode in MODES:
        assert torch.equal(run(model, forward, mode), before[mode])


def test_gradients_reach_every_layer_of_the_fast_path_models() -> None:
    """With gradients on, and in eval mode too, where a frozen base would invite the fast path."""
    for make in (encoder, padded_encoder, decoder, attention):
        model, forward = make()
        lora.inject(model.double(), lora.LoraConfig(r=2, target_modules="all-linear"))
        for _, layer in adapted_layers(model):
            nn.init.normal_(layer.lora_B)
        for training in (True, False):
            model.train(training).zero_grad()
            forward(model).square().sum().backward()
            for path, layer in adapted_layers(model):
                assert layer.lora_A.grad.abs().sum() > 0, path
                assert layer.lora_B.grad.abs().sum() > 0, path


# What comes on top of an adapter.


def test_pruning_on_top_of_an_adapter_cannot_be_merged_but_undone() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), noise(2, 4).float()
    before = model(x)
    lora.inject(model, lora.LoraConfig(r=2, target_modules=["0"]))
    prune.l1_unstructured(model[0], "weight", 0.5)
    with pytest.raises(MergeError, match="its weight is computed"):
        lora.merge(model)
    prune.remove(model[0], "weight")
    lora.merge(model)
    lora.unmerge(model)
    lora.remove(model)
    assert type(model[0]) is nn.Linear
    assert not torch.equal(model(x), before), "what pruning removed stays away"


def test_a_parametrization_on_top_of_an_adapter_comes_off_first() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), noise(2, 4).float()
    before = model(x)
    lora.inject(model, lora.LoraConfig(r=2, target_modules=["0"]))
    parametrizations.orthogonal(model[0])
    with pytest.raises(MergeError, match="its weight is computed"):
        lora.merge(model)
    with pytest.raises(TargetError, match=r"0: .* changed the class since inject"):
        lora.remove(model)
    nn.utils.parametrize.remove_parametrizations(model[0], "weight", leave_parametrized=False)
    lora.remove(model)
    assert type(model[0]) is nn.Linear
    assert model(x).shape == before.shape


# accelerate's hooks, which replace an instance's forward.


def net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))


def adapt(model: nn.Module, *targets: str) -> None:
    lora.inject(model, lora.LoraConfig(r=2, target_modules=list(targets or ("0",))))


@pytest.mark.parametrize(
    "hook", [ModelHook, functools.partial(AlignDevicesHook, "cpu"), lambda: SequentialHook(ModelHook())]
)
def test_hooks_of_accelerate_before_injection(hook: Callable[[], ModelHook]) -> None:
    model, x = net(), torch.randn(2, 4)
    before = model(x)
    add_hook_to_module(model[0], hook())
    adapt(model)
    nn.init.normal_(model[0].lora_B)
    adapted = model(x)
    assert not torch.allclose(adapted, before)
    assert torch.equal(copy.deepcopy(model)(x), adapted)
    lora.merge(model)
    torch.testing.assert_close(model(x), adapted)
    lora.remove(model)
    assert torch.equal(model(x), before)
    remove_hook_from_module(model[0])
    assert torch.equal(model(x), before)


def test_hooks_of_accelerate_may_come_and_go_around_an_adapter() -> None:
    model, x = net(), torch.randn(2, 4)
    before = model(x)
    add_hook_to_module(model[0], ModelHook())
    adapt(model)
    nn.init.normal_(model[0].lora_B)
    adapted = model(x)
    remove_hook_from_module(model[0])  # leaves a bound forward on the instance
    assert torch.equal(model(x), adapted)
    lora.remove(model)
    assert torch.equal(model(x), before)
    adapt(model)  # that leftover does not keep an adapter off
    nn.init.normal_(model[0].lora_B)
    assert not torch.allclose(model(x), before)
    add_hook_to_module(model[0], ModelHook())  # after injection
    lora.remove(model)
    assert torch.equal(model(x), before)


def test_dispatched_models_are_adapted() -> None:
    from accelerate import dispatch_model

    model, x = net(), torch.randn(2, 4)
    before = model(x)
    dispatch_model(model, {"0": "cpu", "1": "cpu", "2": "cpu"}, main_device="cpu", force_hooks=True)
    adapt(model, "0", "2")
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.lora_B)
        assert not torch.allclose(model(x), before)
        nn.init.zeros_(layer.lora_B)


def test_offloaded_weights_are_refused() -> None:
    from accelerate import cpu_offload

    model = net()
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(TargetError, match="0: its weight is offloaded by accelerate"):
        adapt(model)


# What cannot be handled is refused, and the model stays as it is.


class OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class OwnTable(nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class OwnAttention(nn.MultiheadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class OwnConv(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def replaced() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


def replaced_then_hooked() -> nn.Module:
    layer = replaced()
    return add_hook_to_module(layer, ModelHook())


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(layer)


def int8() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    return layer


class Packed(Tensor):
    """A tensor subclass, like those of quantisation libraries."""


def subclassed() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.randn(4, 4).as_subclass(Packed), requires_grad=False)
    return layer


def quantised_attention() -> nn.Module:
    attention = nn.MultiheadAttention(4, 2)
    attention.out_proj.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    return attention


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a replaced forward": (replaced, "its forward was replaced on the instance"),
    "a hooked replaced forward": (replaced_then_hooked, "its forward was replaced on the instance"),
    "a parametrized weight": (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), "parametrize"),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Conv2d(2, 2, 3)), "parametrize"),
    "old weight norm": (lambda: old_weight_norm(nn.Linear(4, 4)), "computed by a hook"),
    "old weight norm of a convolution": (lambda: old_weight_norm(nn.Conv1d(2, 2, 3)), "computed by a hook"),
    "pruning": (lambda: prune.random_unstructured(nn.Linear(4, 4), "weight", 0.5), "computed by a hook"),
    "int8": (int8, r"quantised or of a special type \(Tensor of torch.int8\)"),
    "a tensor subclass": (subclassed, r"quantised or of a special type \(Packed of torch.float32\)"),
    "a quantised out_proj": (quantised_attention, "0.out_proj: its weight is quantised"),
    "a lazy layer": (lambda: nn.LazyLinear(4), "run the model once"),
    "a linear of its own": (lambda: OwnForward(4, 4), "OwnForward has its own forward"),
    "a table of its own": (lambda: OwnTable(4, 4), "OwnTable has its own forward"),
    "an attention of its own": (lambda: OwnAttention(4, 2), "OwnAttention has its own forward"),
    "a convolution of its own": (lambda: OwnConv(2, 2, 3), "OwnConv has its own forward"),
    "groups": (lambda: nn.Conv2d(4, 4, 3, groups=2), "a convolution with 2 groups"),
    "kdim": (lambda: nn.MultiheadAttention(4, 2, kdim=3), "kdim or vdim"),
    "another kind": (lambda: nn.LSTM(4, 4), "LSTM cannot be adapted"),
    "a transposed convolution": (lambda: nn.ConvTranspose1d(2, 2, 3), "ConvTranspose1d cannot be adapted"),
    "a container": (
        lambda: nn.Sequential(nn.Linear(4, 4)),
        "Sequential cannot be adapted .* target what is inside it: 0",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    make, message = REFUSED[what]
    model = nn.ModuleDict({"good": nn.Linear(4, 4), "bad": make()})
    if what == "a quantised out_proj":
        message = message.replace("0.", "bad.")
    kinds = [type(module) for module in model.modules()]
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(TargetError, match=message):
        adapt(model, "good", "bad")
    assert [type(module) for module in model.modules()] == kinds
    assert [name for name, _ in model.named_parameters()] == names
    assert model["good"].weight.requires_grad


def test_dropout_inside_attention_is_refused() -> None:
    model, _ = attention()
    with pytest.raises(TargetError, match=r"lora_dropout 0\.1 cannot act inside nn\.MultiheadAttention"):
        lora.inject(model, lora.LoraConfig(target_modules=["attn"], lora_dropout=0.1))


def jamba() -> Any:
    """A Mamba mixer, then an attention."""
    more = {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "use_mamba_kernels": False}
    return text(hf.JambaForCausalLM, hf.JambaConfig, num_hidden_layers=2, num_experts=2, **more, without=["head_dim"])


def test_dt_proj_of_mamba_is_left_out_and_said_so() -> None:
    model, _ = jamba()
    report = lora.inject(model, lora.LoraConfig(r=2, target_modules="all-linear"))
    assert "model.layers.0.mamba.x_proj" in report.targets
    assert "model.layers.0.mamba.dt_proj" not in report.targets
    assert "leaves out 1 module (model.layers.0.mamba.dt_proj): Mamba reads this weight" in report.notes[0]
    lora.remove(model)
    with pytest.raises(TargetError, match=r"mamba.dt_proj: Mamba reads this weight without calling .* leave it out"):
        adapt(model, "dt_proj")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_an_adapter_of_dt_proj_from_elsewhere_computes_what_it_computes_merged(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base, logits = jamba()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["dt_proj"]))
    nn.init.normal_(theirs.base_model.model.model.layers[0].mamba.dt_proj.lora_B["default"].weight)
    theirs.save_pretrained(tmp_path)
    model = copy.deepcopy(base).eval()
    lora.load_adapter(model, tmp_path)
    assert not torch.equal(logits(model), logits(base.eval()))
    torch.testing.assert_close(logits(model), logits(theirs.merge_and_unload().eval()))


@pytest.mark.parametrize("make", [t5, bart])
def test_tables_that_only_hold_a_weight_are_refused(make: Callable[[], Any]) -> None:
    """T5 and BART look rows up in the embed_tokens of encoder and decoder; `shared` itself never runs."""
    with pytest.raises(TargetError, match=r"shared: it only holds the weight .* target \['embed_tokens'\] instead"):
        adapt(make()[0], "shared")


def test_out_proj_of_attention_alone_is_refused_with_the_way_out() -> None:
    model, _ = encoder()
    with pytest.raises(TargetError, match="target 'self_attn'"):
        adapt(model, "out_proj")
