"""Mixtures of experts, whose weights transformers holds as one tensor: an adapter for each expert, as PEFT has it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import loralib as lora
from loralib.adapter import Adapter, adapter_of
from loralib.budget import training_budget
from loralib.combine import combine, resize
from loralib.data import TokenExample
from loralib.engine.bank import Bank
from loralib.errors import AdapterError, FormatError, TargetError
from loralib.formats import check_portable, export, make_portable, merge_into
from loralib.formats.peft import _MIXTURES
from loralib.inspection import inspect_adapter
from loralib.training import run_directory
from loralib.training.step import make_step
from loralib.variants.experts import experts_forward

hf = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

# PEFT uses what transformers is about to rename; and says of parameters' keys in rank_pattern, which it follows, that
# they match no module.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match"),
]

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
FAMILIES: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**SIZES, num_local_experts=4)),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=8)),
    # Transposed weights, interleaved gates, biases.
    "gpt_oss": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(
            **SIZES,
            num_local_experts=4,
            num_experts_per_tok=2,
            head_dim=8,
            layer_types=["full_attention"] * 2,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        )
    ),
    # A dense first layer, a shared expert, groups of experts.
    "deepseek_v3": lambda: hf.DeepseekV3ForCausalLM(
        hf.DeepseekV3Config(
            **SIZES,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=12,
            n_group=1,
            topk_group=1,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=8,
            first_k_dense_replace=1,
        )
    ),
}
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
IDS = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(5))


def model_of(family: str = "mixtral") -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FAMILIES[family]()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def filled(model: Any, seed: int = 1) -> Any:
    """Fills an adapter with values, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def adapted(family: str = "mixtral", **settings: Any) -> Any:
    model = model_of(family)
    lora.inject(model, lora.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **settings}))
    return filled(model)


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    return model(ids).logits


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


# What an adapter of experts computes.


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_adapts_each_expert_and_all_of_it_can_be_undone(family: str) -> None:
    model = model_of(family)
    base = logits(model)
    report = lora.inject(model, lora.LoraConfig(r=4, target_modules="all-linear"))
    assert any(name.endswith("mlp.experts") for name in report.targets)
    experts = model.get_submodule(next(name for name in report.targets if name.endswith("mlp.experts")))
    shapes = {name: tuple(tensor.shape) for name, tensor in experts.trained_tensors().items()}
    assert (shapes["lora_A_gate_up_proj"], shapes["lora_B_gate_up_proj"]) == ((4, 4, 16), (4, 24, 4))
    assert (shapes["lora_A_down_proj"], shapes["lora_B_down_proj"]) == ((4, 4, 12), (4, 16, 4))
    assert_close(logits(model), base)  # B is zero
    filled(model)
    trained = logits(model)
    assert not torch.allclose(trained, base, atol=1e-3)
    lora.merge(model)
    assert_close(logits(model), trained)
    lora.unmerge(model)
    assert torch.equal(logits(model), trained)
    with lora.disabled(model):
        assert torch.equal(logits(model), base)
    lora.remove(model)
    assert torch.equal(logits(model), base)


def test_unmerging_is_bit_exact_in_half_precision() -> None:
    model = adapted().bfloat16()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lora.merge(model)
    merged = model.model.layers[0].mlp.experts.down_proj
    assert not torch.equal(merged, before["model.layers.0.mlp.experts.down_proj"])
    # A state dict holds the base's weights, merged or not.
    assert torch.equal(model.state_dict()["model.layers.0.mlp.experts.down_proj"], merged) is False
    lora.unmerge(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_implementation_of_transformers_gives_the_same(implementation: str) -> None:
    model = adapted("gpt_oss")
    ours = logits(model)
    lora.merge(model)
    model.set_experts_implementation(implementation)
    assert_close(logits(model), ours)


@pytest.mark.parametrize(
    ("family", "name", "config"),
    [
        ("nemotron_h", "NemotronHExperts", "NemotronHConfig"),  # without a gate
        ("aria", "AriaExperts", "AriaTextConfig"),  # transposed, without biases
        ("muse_spark", "MuseSparkExperts", "MuseSparkTextConfig"),  # a norm after each expert
        ("deepseek_v4", "DeepseekV4Experts", "DeepseekV4Config"),  # clamped
    ],
)
def test_other_layouts_compute_as_when_merged(family: str, name: str, config: str) -> None:
    sizes = {"hidden_size": 16, "moe_hidden_size": 16, "intermediate_size": 12, "moe_intermediate_size": 12}
    counts = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4)
    settings = getattr(pytest.importorskip(f"transformers.models.{family}.configuration_{family}"), config)()
    for key, value in (sizes | counts | {"_experts_implementation": "eager", "moe_latent_size": None}).items():
        if hasattr(settings, key):
            setattr(settings, key, value)
    experts = getattr(pytest.importorskip(f"transformers.models.{family}.modeling_{family}"), name)
    with torch.device("meta"):  # where `loralib plan` looks at a model
        empty = nn.ModuleDict({"experts": experts(settings)})
    assert lora.inject(empty, lora.LoraConfig(r=4, target_modules="all-linear")).targets == ("experts",)
    layer = experts(settings)
    model = nn.ModuleDict({"experts": layer})
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    lora.inject(model, lora.LoraConfig(r=4, target_modules="all-linear"))
    filled(model)
    routed = torch.randn(5, 16), torch.tensor([[0, 3], [3, 1], [1, 0], [0, 1], [3, 0]]), torch.rand(5, 2)
    with torch.no_grad():
        ours = layer(*routed)
        lora.merge(model)
        torch.testing.assert_close(layer(*routed), ours, rtol=1e-4, atol=1e-4)


class NoLargeTensor(TorchDispatchMode):
    """Fails if anything computes a tensor with this many numbers; views of existing tensors do not count."""

    def __init__(self, numbers: int, model: nn.Module) -> None:
        super().__init__()
        self.numbers, self.known = numbers, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                assert tensor.numel() < self.numbers, f"{func} makes {tuple(tensor.shape)}"
        return result


@pytest.mark.parametrize("family", FAMILIES)
def test_training_never_forms_the_update_of_all_experts(family: str) -> None:
    experts = adapted(family, r=2, target_modules=None, target_parameters=BOTH).train().model.layers[1].mlp.experts
    x, index = torch.randn(3, 16, requires_grad=True), torch.tensor([[0, 2], [2, 1], [3, 2]])
    with NoLargeTensor(experts.down_proj.numel(), experts):
        experts(x, index, torch.rand(3, 2)).sum().backward()
    assert experts.lora_B_down_proj.grad.any()


def test_experts_without_tokens_get_no_gradient_and_others_do_not_notice() -> None:
    experts = adapted().model.layers[0].mlp.experts
    x, index = torch.randn(3, 16), torch.tensor([[0, 2], [2, 0], [0, 2]])
    experts(x, index, torch.rand(3, 2)).sum().backward()
    moved = experts.lora_A_gate_up_proj.grad.flatten(1).any(1)
    assert moved.tolist() == [True, False, True, False]


def test_experts_of_other_processes_add_nothing() -> None:
    """Expert parallelism marks what other processes compute with the number past the last expert."""
    experts = adapted().model.layers[0].mlp.experts
    x, weights = torch.randn(3, 16), torch.tensor([[0.3, 0.0], [0.2, 0.0], [0.5, 0.0]])
    alone = experts_forward(experts, x, torch.tensor([[0], [1], [2]]), weights[:, :1])
    assert_close(experts_forward(experts, x, torch.tensor([[0, 4], [1, 4], [2, 4]]), weights), alone)


# PEFT, in both directions.


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_what_is_saved(family: str, tmp_path: Path) -> None:
    targets = {"target_modules": ["o_proj"], "target_parameters": BOTH, "rank_pattern": {"down_proj": 2}}
    model = adapted(family, **targets)
    lora.save_adapter(model, tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert settings["target_modules"] == ["o_proj"]
    assert settings["target_parameters"] == BOTH
    theirs = peft.PeftModel.from_pretrained(model_of(family), tmp_path).eval()
    assert_close(logits(theirs), logits(model))
    again = model_of(family)
    lora.load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("parameters", [BOTH, BOTH[:1], ["down_proj"]])
def test_what_peft_saves_is_read(family: str, parameters: list[str], tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=[], target_parameters=parameters, rank_pattern={r".*_proj": 3}
    )
    theirs = filled(peft.get_peft_model(model_of(family), config)).eval()
    theirs.save_pretrained(tmp_path)
    model = model_of(family)
    report = lora.load_adapter(model, tmp_path)
    assert_close(logits(model), logits(theirs))
    # The same from PEFT's own config, by hand.
    assert set(report.inject.targets) == set(lora.inject(model_of(family), lora.LoraConfig.of(config)).targets)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_and_training_steps_are_pefts(family: str, tmp_path: Path) -> None:
    ours = adapted(family, target_modules=["o_proj"], target_parameters=BOTH)
    lora.save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(model_of(family), tmp_path, is_trainable=True)
    places = []
    for model in (ours, theirs):
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        gradients = []
        for step in range(3):
            optimizer.zero_grad()
            model(IDS.roll(step, 1), labels=IDS.roll(step, 1)).loss.backward()
            gradients.append(sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None))
            optimizer.step()
        model.eval()
        places.append((torch.stack(gradients), logits(model)))
    torch.testing.assert_close(places[0][0], places[1][0], rtol=1e-5, atol=1e-7)
    assert_close(places[0][1], places[1][1])


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_what_peft_adapts_by_all_linear_has_the_router_too(family: str, tmp_path: Path) -> None:
    theirs = filled(peft.get_peft_model(model_of(family), peft.LoraConfig(r=4, target_modules="all-linear"))).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model, base = model_of(family), logits(model_of(family))
    lora.load_adapter(model, tmp_path / "theirs")
    assert_close(logits(model), logits(theirs))
    assert "model.layers.1.mlp.gate" in adapter_of(model).modules
    lora.save_adapter(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(model_of(family), tmp_path / "ours").eval()
    assert_close(logits(again), logits(theirs))
    plain = model_of(family)
    merge_into(plain, adapter_of(model))
    assert_close(logits(plain), logits(theirs))
    lora.remove(model)
    assert torch.equal(logits(model), base)


def test_biases_of_experts_are_where_peft_has_them(tmp_path: Path) -> None:
    model = adapted("gpt_oss", target_modules=["o_proj"], target_parameters=BOTH, bias="all")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    lora.save_adapter(model, tmp_path)
    assert_close(logits(peft.PeftModel.from_pretrained(model_of("gpt_oss"), tmp_path).eval()), logits(model))
    again = model_of("gpt_oss")
    lora.load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_factors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    lora.save_adapter(adapted(target_modules=None, target_parameters=BOTH), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight"
    save_file(tensors | {key: tensors[key][:-1].clone()}, tmp_path / "adapter_model.safetensors")
    message = r"gate_up_proj: A \(15, 16\) and B \(24, 16\) are not factors of experts of rank 4"
    with pytest.raises(FormatError, match=message):
        lora.load_adapter(model_of(), tmp_path)
    del tensors[key]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(FormatError, match=r"mlp.experts: factors for gate_up_proj and down_proj are incomplete"):
        lora.load_adapter(model_of(), tmp_path)


def test_what_peft_does_not_read_of_its_own_models(tmp_path: Path) -> None:
    """PEFT mistakes gate_proj of DeepSeek's dense layers and shared experts for that of older transformers' experts."""
    adapter = lora.save_adapter(adapted("deepseek_v3"), tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(model_of("deepseek_v3"), tmp_path)
    verdict = inspect_adapter(adapter).uses["peft"]
    assert verdict.startswith("no: PEFT 0.21 takes these modules for experts in models of type deepseek_v3")
    for model in (None, model_of("deepseek_v3")):
        with pytest.raises(AdapterError, match="takes these modules for experts"):
            make_portable(adapter, "peft", model)
    with pytest.raises(AdapterError, match="takes these modules for experts"):
        check_portable(lora.LoraConfig(target_modules="all-linear"), model_of("deepseek_v3"), "peft")
    exclude = verdict.partition("exclude_modules ")[2].partition(", or")[0].split(",")
    model = adapted("deepseek_v3", exclude_modules=exclude)
    assert inspect_adapter(lora.save_adapter(model, tmp_path)).uses["peft"] == "yes, as it is"
    assert_close(logits(peft.PeftModel.from_pretrained(model_of("deepseek_v3"), tmp_path).eval()), logits(model))


def test_shared_experts_that_peft_renames_are_left_out_of_what_it_loads(tmp_path: Path) -> None:
    sizes = {**SIZES, **EXPERTS, "head_dim": 8, "shared_expert_intermediate_size": 12}
    model = hf.LagunaForCausalLM(hf.LagunaConfig(**sizes))
    config = lora.LoraConfig(r=2, target_modules=["q_proj", "shared_experts.down_proj"])
    lora.inject(model, config)
    verdict = inspect_adapter(lora.save_adapter(model, tmp_path)).uses["peft"]
    lora.remove(model)
    with pytest.warns(UserWarning, match="Found missing adapter keys"):
        peft.PeftModel.from_pretrained(model, tmp_path)
    assert "leaves out these modules in models of type laguna" in verdict
    assert "exclude_modules shared_experts.down_proj" in verdict


def test_the_models_of_which_peft_renames_modules() -> None:
    from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN

    kinds = {kind for kind, pattern in _MODEL_TO_CONVERSION_PATTERN.items() if pattern == "qwen2_moe"}
    assert {kind for kind in kinds if kind.islower()} == _MIXTURES


# vLLM's layout: a module for each expert and projection, by the names in checkpoints.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("parameters", [BOTH, BOTH[1:]])
def test_the_export_for_vllm_is_the_same_adapter(family: str, parameters: list[str], tmp_path: Path) -> None:
    model = adapted(family, target_modules=["o_proj"], target_parameters=parameters, use_rslora=True)
    portable = make_portable(adapter_of(model), "vllm", model_of(family))
    export(portable, "vllm", tmp_path)
    names = {name.partition("layers.1.")[2] for name in portable.adapter.modules}
    expected = {
        "mixtral": [f"block_sparse_moe.experts.{e}.{w}" for e in range(4) for w in ("w1", "w2", "w3")],
        "gpt_oss": BOTH_OF_LAYER,  # which vLLM reads in PEFT's layout
    }.get(family, [f"mlp.experts.{e}.{w}_proj" for e in range(4) for w in ("gate", "up", "down")])
    assert {name for name in names if "experts" in name} == set(expected)
    for load in (lora.load_adapter, lambda model, path: peft.PeftModel.from_pretrained(model, path)):
        other = model_of(family)
        load(other, tmp_path)
        assert_close(logits(other.eval()), logits(model))


BOTH_OF_LAYER = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def test_vllm_needs_the_base_and_others_refuse_by_name() -> None:
    adapter = adapter_of(adapted(target_modules=None, target_parameters=BOTH))
    with pytest.raises(
        AdapterError, match="vLLM identifies adapters of experts by their names in checkpoints; give the b"
    ):
        make_portable(adapter, "vllm")
    with pytest.raises(AdapterError, match="adapters of experts and routers cannot be written for MLX"):
        make_portable(adapter, "mlx", model_of())
    with pytest.raises(AdapterError, match=r"gate_up_proj: a weight of experts"):
        Bank(model_of()).load("one", adapter)


# Training.

ROWS = [[3, 4, 5, 6, 7, 8, 9], [3, 4, 5, 20, 21], [11, 12, 13, 14, 15, 16]]


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_have_the_gradients_of_each_row_alone(family: str) -> None:
    ours, alone = adapted(family).train(), adapted(family).train()
    batch = [TokenExample(tuple(row), tuple(at >= 3 for at in range(len(row)))) for row in ROWS]
    make_step(ours).forward_backward(batch, loss_scale=1.0)
    for row in map(torch.tensor, ROWS):
        loss = nn.functional.cross_entropy(alone(row[None]).logits[0, 2:-1], row[3:], reduction="sum")
        loss.backward()
    for (name, parameter), other in zip(ours.named_parameters(), alone.parameters(), strict=True):
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_a_run_that_was_killed_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_directory, "plot_losses", lambda *_: False)
    config = lora.TrainConfig(
        output_dir=str(tmp_path), rank=2, lr=0.01, num_epochs=1, batch_size=6, save_steps=2, keep_checkpoints=9,
        target_modules="q_proj", target_parameters="experts.gate_up_proj,experts.down_proj", lora_dropout=0.1,
    )  # fmt: skip
    rows = torch.randint(3, 32, (24, 3), generator=torch.Generator().manual_seed(0)).tolist()
    examples = [TokenExample((*row, 2, *row, 1), (False,) * 4 + (True,) * 4) for row in rows]
    model = model_of()
    lora.train(model, examples, config, verbose=False)
    whole = lora.read_adapter(tmp_path)
    assert any(name.endswith("lora_experts_B") for name in whole.tensors)
    for path in (tmp_path / "checkpoints").iterdir():
        if "00000002" not in path.name:
            path.unlink()
    lora.train(model_of(), examples, config.replace(resume=True), verbose=False)
    resumed = lora.read_adapter(tmp_path)
    assert all(torch.equal(tensor, resumed.tensors[name]) for name, tensor in whole.tensors.items())
    assert "experts.gate_up_proj" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_the_plan_counts_what_experts_keep() -> None:
    tokens = 64
    plain, model = model_of(), adapted(target_modules=None, target_parameters=BOTH)
    without, with_them = (training_budget(each, tokens).activations for each in (plain, model))
    # Two layers, two experts of each token, fp32: inputs (16), hidden (12), and A's 2 x 4 outputs.
    assert with_them - without == pytest.approx(2 * 2 * 4 * tokens * (16 + 12 + 8) * 1.1, rel=0.1)
    assert training_budget(model, tokens).gradients == 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_merging_into_a_base_checks_every_expert() -> None:
    model, base = adapted("gpt_oss"), model_of("gpt_oss")
    merge_into(base, adapter_of(model))
    assert_close(logits(base), logits(model))


# The adapter as a value.


def test_combining_and_resizing_treat_each_expert_as_a_module() -> None:
    adapters = [adapter_of(adapted()), adapter_of(filled(adapted(), seed=2))]
    name = "model.layers.1.mlp.experts.gate_up_proj"
    deltas = [two_times_BA(adapter, name) for adapter in adapters]
    both = combine(adapters, [1.0, -0.5], "cat").adapter
    torch.testing.assert_close(
        both.tensors[f"{name}.lora_experts_B"] @ both.tensors[f"{name}.lora_experts_A"], deltas[0] - 0.5 * deltas[1]
    )
    narrow = resize(adapters[0], 2).adapter
    U, S, Vh = torch.linalg.svd(deltas[0])
    best = (U[..., :2] * S[:, None, :2]) @ Vh[:, :2]
    torch.testing.assert_close(
        narrow.tensors[f"{name}.lora_experts_B"] @ narrow.tensors[f"{name}.lora_experts_A"], best, rtol=0, atol=1e-5
    )


def two_times_BA(adapter: Adapter, name: str) -> Tensor:
    return 2 * adapter.tensors[f"{name}.lora_experts_B"] @ adapter.tensors[f"{name}.lora_experts_A"]


def test_inspect_says_which_experts_learned_nothing() -> None:
    model = adapted()
    with torch.no_grad():
        model.model.layers[1].mlp.experts.lora_B_down_proj[3] = 0
    text = str(inspect_adapter(adapter_of(model)))
    assert "mlp.experts.gate_up_proj" in text
    assert "1 of 24 modules learned nothing: model.layers.1.mlp.experts.down_proj[3]" in text


# What cannot be.


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"target_parameters": ["experts.gate_proj"]},
         r"target_parameters \['experts.gate_proj'\] match nothing. The experts of this model: experts.gate_up_proj, "
         "experts.down_proj"),
        ({"target_parameters": ["layers.7.mlp.experts.down_proj"]}, "match nothing"),
        ({"target_parameters": ["q_proj.weight"]}, "not an expert weight; name the module that holds it in target_mod"),
        ({"target_parameters": ["gate.weight"], "lora_dropout": 0.1}, "lora_dropout 0.1 cannot act inside a router"),
        ({"target_parameters": BOTH, "r": 13},
         r"r is 13 for down_proj, but .* only 16 x 12.*rank_pattern={'down_proj': 12}"),
        ({"target_parameters": BOTH, "use_dora": True}, "use_dora does not support the experts of a mixture"),
        ({"target_parameters": BOTH, "lora_bias": True}, "lora_bias does not support the experts"),
        ({"target_parameters": BOTH, "init_lora_weights": "pissa"}, "'pissa' does not support the experts"),
        ({"target_parameters": BOTH, "init_lora_weights": "eva"}, "'eva' does not support the experts"),
        ({"target_parameters": BOTH, "enable_lora": {"gate_up_proj": [True, False]}}, "enable_lora is for linear"),
        ({"target_parameters": BOTH, "modules_to_save": ["mlp"]}, "which modules_to_save trains in full"),
        ({"target_modules": ["experts"]}, r"target_parameters=\['experts.gate_up_proj', 'experts.down_proj'\]"),
        ({"target_modules": ["gate_up_proj"]}, "'gate_up_proj' is a parameter, not a module: name it in target_param"),
    ],
)  # fmt: skip
def test_what_is_not_possible_is_said_before_anything_is_changed(settings: dict[str, Any], fault: str) -> None:
    model = model_of()
    with pytest.raises(TargetError, match=fault):
        lora.inject(model, lora.LoraConfig(**settings))
    assert not any("lora_" in name for name, _ in model.named_parameters())


def test_all_faults_are_told_at_once() -> None:
    config = lora.LoraConfig(r=14, target_modules=["q_prj"], target_parameters=["experts.down_proj", "experts.up"])
    with pytest.raises(TargetError) as refused:
        lora.inject(model_of(), config)
    assert all(text in str(refused.value) for text in ("q_prj", "experts.up", "r is 14"))


def test_experts_left_out_on_purpose() -> None:
    model = model_of()
    report = lora.inject(model, lora.LoraConfig(target_modules="all-linear", exclude_modules=["experts"]))
    assert {name.rpartition(".")[2] for name in report.targets} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_an_architecture_that_computes_otherwise_is_refused_by_name() -> None:
    config = hf.Llama4TextConfig(
        **SIZES, num_local_experts=2, num_experts_per_tok=1, head_dim=8, intermediate_size_mlp=12
    )
    model = hf.Llama4ForCausalLM(config)
    message = r"Llama4TextExperts computes its experts in its own way.* set exclude_modules to experts,"
    with pytest.raises(TargetError, match=message):
        lora.inject(model, lora.LoraConfig(target_modules="all-linear"))
    report = lora.inject(model, lora.LoraConfig(target_modules="all-linear", exclude_modules=["experts"]))
    assert not any("router" in name for name in report.targets)
    [note] = report.notes
    assert "'all-linear' leaves out 2 modules (model.layers.0.feed_forward.router): Llama4Router is a router" in note


def test_the_way_to_leave_out_experts_has_their_own_names() -> None:
    model = hf.JetMoeForCausalLM(hf.JetMoeConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, kv_channels=8))
    with pytest.raises(TargetError, match=r"8 modules .* set exclude_modules to input_linear,output_linear,"):
        lora.inject(model, lora.LoraConfig(r=2, target_modules="all-linear"))
    exclude = ["input_linear", "output_linear"]
    assert lora.inject(model, lora.LoraConfig(r=2, target_modules="all-linear", exclude_modules=exclude)).targets


def test_a_router_that_is_a_linear_class_of_its_own_is_left_out() -> None:
    model = hf.PhimoeForCausalLM(hf.PhimoeConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2))
    report = lora.inject(model, lora.LoraConfig(r=2, target_modules="all-linear"))
    assert {name.rpartition(".")[2] for name in report.targets} == {"q_proj", "k_proj", "v_proj", "o_proj", "experts"}
    assert "PhimoeTopKRouter is a router" in report.notes[0]
