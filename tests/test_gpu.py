"""What GPUs get, computed on the CPU: the same losses and gradients as the CPU's own way, which `test_step.py` checks.

flex_attention refuses to be trained through on a CPU, although PyTorch has the formulas of its backward pass.  Where
a test lifts that, the path is the GPU's but for the compiler: blocks are traced and run as they are.
"""

import os
import subprocess
import sys
import threading
from itertools import pairwise

import pytest
import torch
import transformers
from torch import nn
from torch.nn.attention import flex_attention
from torch.nn.attention.flex_attention import create_block_mask
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

import loralib as lora
from loralib.bases.device import _is_fast_in_bf16, pick_dtype
from loralib.config import LoraConfig
from loralib.data.packing import extended, pack
from loralib.data.tokens import TokenExample
from loralib.engine import compiled, forward, loss
from loralib.engine.attention import AttentionSettings, PackedLayout
from loralib.engine.device_linears import DeviceLinears
from loralib.engine.flex import BLOCK, FlexLayout, bucket
from loralib.engine.liger import has_liger
from loralib.engine.placement import Hold, overriding
from loralib.errors import ConfigError
from loralib.injection import inject
from loralib.training.memory import gradient_checkpointing
from loralib.training.step import make_step

# In eager mode flex_attention says that it is slow, and PyTorch looks at what it warns of.
pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated"),
]

VOCABULARY, WINDOW = 61, 6
_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_SOFTCAPS = {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 3.0, "attn_implementation": "eager"}
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 12, "sliding_window": WINDOW}


def gpt2():
    special = {"bos_token_id": 0, "eos_token_id": 1}
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=512, **special)
    return transformers.GPT2LMHeadModel(config)


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_LLAMA))


def gemma2():  # soft-capped scores, and every second layer with a sliding window
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**_LLAMA, **_GEMMA, **_SOFTCAPS))


def adapted(make, **settings):
    torch.manual_seed(0)
    model = make()
    inject(model, LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.1) if "lora_B" in name else parameter.add_(torch.randn_like(parameter) * 0.15)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def batch_of(seed=0, prompts=2, completions=3, longest=40):
    """Prompts with several completions each, past sliding windows."""
    draw = torch.Generator().manual_seed(seed)

    def some():
        count = int(torch.randint(2, longest, (), generator=draw))
        return tuple(torch.randint(3, VOCABULARY, (count,), generator=draw).tolist())

    examples = []
    for _ in range(prompts):
        prompt = some()
        for _ in range(completions):
            ids = prompt + some()
            examples.append(TokenExample(ids, tuple(place >= len(prompt) for place in range(len(ids)))))
    return examples


def packed_row(seed):
    """Such a batch as one row, padded to a bucket, and its number of tokens."""
    row = pack(batch_of(seed, prompts=3, longest=90))
    return extended(row, bucket(row.processed_tokens)), row.processed_tokens


def computed(step, model, batch):
    """The loss of a batch, and the gradients of the factors."""
    model.zero_grad()
    total = step.forward_backward(batch, loss_scale=0.01).loss_sum
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(made, expected):
    torch.testing.assert_close(made[0], expected[0], rtol=1e-5, atol=1e-5)
    assert made[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(made[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.fixture(autouse=True)
def nothing_compiled():
    """Discards compiled code between tests."""
    torch.compiler.reset()


@pytest.fixture
def on_gpu(monkeypatch):
    """Uses the GPU's code paths for models on the CPU, without compiling at first."""

    def choose(way):
        monkeypatch.setattr(forward, "path_of", lambda model: "gpu")
        monkeypatch.setattr(loss, "in_blocks", lambda logits: False)
        if "flex" in way:
            monkeypatch.setattr(forward, "has_flex", lambda device: True)
            monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
        if "compiled" in way:
            monkeypatch.setattr(forward, "may_compile", lambda device: True)
            monkeypatch.setattr(compiled, "_BACKEND", "eager")

    return choose


# Attention.


@pytest.mark.parametrize("window", [None, 40, 300])
@pytest.mark.parametrize("seed", range(3))
def test_block_masks_are_those_that_pytorch_makes_of_all_pairs(seed, window):
    row, _ = packed_row(seed)
    layout = FlexLayout(row.ends, row.positions[0], "cpu", flex=True)
    ours, dense = layout.block_mask(window), layout.dense_mask(window)
    tokens = len(row.ends)
    theirs = create_block_mask(ours.mask_mod, None, None, tokens, tokens, device="cpu", BLOCK_SIZE=BLOCK)
    blocks = dense.view(tokens // BLOCK, BLOCK, tokens // BLOCK, BLOCK).transpose(1, 2)
    ours_seen, theirs_seen = ours.to_dense()[0, 0].bool(), theirs.to_dense()[0, 0].bool()
    assert torch.equal(theirs_seen, blocks.any(-1).any(-1))  # what "seen" means
    if window is None:
        assert torch.equal(ours_seen, theirs_seen)
        assert torch.equal(ours.full_kv_num_blocks, theirs.full_kv_num_blocks)
    assert not (theirs_seen & ~ours_seen).any()  # no block is left out that holds a pair
    for query, count in enumerate(ours.full_kv_num_blocks[0, 0].tolist()):
        assert all(blocks[query, key].all() for key in ours.full_kv_indices[0, 0, query, :count].tolist())


@pytest.mark.parametrize(
    "settings",
    [
        AttentionSettings(0.25),
        AttentionSettings(0.25, window=40),
        AttentionSettings(0.25, softcap=2.0),
        AttentionSettings(0.25, softcap=2.0, window=40),
    ],
)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_flex_attention_computes_what_our_attention_does(settings, kv_heads):
    row, real = packed_row(0)
    tokens = len(row.ends)
    torch.manual_seed(0)
    q, k, v = (torch.randn(tokens, heads, 16) for heads in (4, kv_heads, kv_heads))
    ours = PackedLayout(row.ends[:real], row.positions[0][:real]).attend(0, q[:real], k[:real], v[:real], settings)
    with torch.no_grad():
        for flex in (True, False):
            y = FlexLayout(row.ends, row.positions[0], "cpu", flex=flex).attend(0, q, k, v, settings)
            torch.testing.assert_close(y[:real], ours, rtol=1e-5, atol=1e-5)


# The whole step.


@pytest.mark.parametrize(
    ("make", "way"),
    [(gpt2, "dense"), (gpt2, "compiled"), (llama, "flex"), (gemma2, "dense"), (gemma2, "flex"), (gemma2, "compiled")],
)
def test_losses_and_gradients_are_those_of_the_cpus_way(make, way, on_gpu):
    model, batch = adapted(make), batch_of()
    expected = computed(make_step(model), model, batch)
    on_gpu(way)
    step = make_step(model)
    assert step.packing, step.note
    with step:
        assert_same(computed(step, model, batch), expected)
        assert step.loss(batch).loss_sum == pytest.approx(expected[0].item(), rel=1e-5)
    assert not [module for module in model.modules() if {"forward"} & module.__dict__.keys()]


class Reads(TorchDispatchMode):
    """Records where the program waits for values of "device" tensors: parameters, and what is computed from them."""

    _ASK = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "_unique2", "masked_select", "unique_dim")

    def __init__(self, model):
        super().__init__()
        self.found, self._there = [], WeakIdKeyDictionary(dict.fromkeys(model.parameters()))

    def is_there(self, tensor):
        return tensor in self._there

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        result = function(*args, **(kwargs or {}))
        if any(map(self.is_there, given)):
            if function.overloadpacket.__name__ in self._ASK:
                self.found.append(function.overloadpacket.__name__)
            for made in tree_leaves(result):
                if isinstance(made, torch.Tensor):
                    self._there[made] = None
        return result


@pytest.fixture
def reads(monkeypatch):
    """Records reads of a model's values; reads that are no operator are watched by name."""

    def begin(model):
        mode = Reads(model)
        for name in ("tolist", "cpu", "numpy"):
            plain = getattr(torch.Tensor, name)

            def noted(tensor, *args, _plain=plain, _name=name, **kwargs):
                if mode.is_there(tensor):
                    mode.found.append(_name)
                return _plain(tensor, *args, **kwargs)

            monkeypatch.setattr(torch.Tensor, name, noted)
        return mode

    return begin


def test_what_counts_as_a_read(reads):
    layer = nn.Linear(2, 2)
    with reads(layer) as mode:
        y = layer(torch.ones(2))
        assert not mode.found
        y.sum().item(), bool(y[0] > 0), y.tolist(), y.detach().cpu(), y.nonzero(), torch.ones(1).item()
    assert mode.found == ["_local_scalar_dense", "_local_scalar_dense", "tolist", "cpu", "nonzero"]


@pytest.mark.parametrize("way", ["dense", "flex"])
def test_an_update_asks_the_device_once(way, on_gpu, reads, tmp_path):
    on_gpu(way)
    model = adapted(llama)
    config = lora.TrainConfig(output_dir=str(tmp_path), max_steps=4, batch_size=2, grad_accum=2, shuffle=False)
    mode = reads(model)
    updates = []
    hook = register_optimizer_step_post_hook(lambda *_: updates.append(len(mode.found)))
    try:
        with mode:
            lora.train(model, batch_of(prompts=5, completions=4), config, verbose=False)  # of one epoch
    finally:
        hook.remove()
    assert len(updates) == 4
    between = [mode.found[start:end] for start, end in pairwise(updates[1:])]
    assert between == [["tolist"], ["tolist"]]  # the first update checks gradients as well


def test_the_lengths_of_ten_steps_are_compiled_once_and_once_as_a_variable(on_gpu, monkeypatch):
    on_gpu("compiled")
    graphs = []

    def backend(graph, inputs):
        graphs.append(len(updates))
        return graph.forward

    monkeypatch.setattr(compiled, "_BACKEND", backend)
    model, updates = adapted(llama), []
    step = make_step(model)
    with step:
        for seed in range(10):
            batch = batch_of(seed, prompts=1 + seed % 5, longest=60 + 15 * seed)
            updates.append(step.forward_backward(batch, loss_scale=0.01).processed_tokens)
    assert len(set(updates)) >= 5
    changes = [number for number, length in enumerate(updates) if length != updates[0]]
    assert graphs == [0, changes[0]]  # all layers share what is compiled


@pytest.mark.parametrize("way", ["dense", "compiled"])
def test_checkpointed_blocks_run_again_in_autograds_own_thread(way, on_gpu, monkeypatch):
    """A GPU's backward pass does not run in the thread that started it."""
    model, batch = adapted(llama), batch_of()
    expected = computed(make_step(model), model, batch)
    on_gpu(way)
    plain = torch.Tensor.backward

    def elsewhere(tensor, *args, **kwargs):
        failures = []

        def run():
            try:
                plain(tensor, *args, **kwargs)
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        if failures:
            raise failures[0]

    step = make_step(model)
    monkeypatch.setattr(torch.Tensor, "backward", elsewhere)
    with gradient_checkpointing(model), step:
        assert_same(computed(step, model, batch), expected)


def test_where_the_compiler_fails_training_goes_on(on_gpu, monkeypatch):
    model, batch = adapted(llama), batch_of()
    expected = computed(make_step(model), model, batch)
    on_gpu("compiled")

    def broken(graph, inputs):
        raise OSError("no ptxas")

    monkeypatch.setattr(compiled, "_BACKEND", broken)
    step = make_step(model)
    with step:
        with pytest.warns(UserWarning, match="torch.compile fails on LlamaDecoderLayer.*no ptxas"):
            computed(step, model, batch)
        assert_same(computed(step, model, batch), expected)


# LoRA's linears.


class Net(nn.Module):
    """q, k and v read the same input, and the last layer reads their outputs."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(8, 6), nn.Linear(8, 4, bias=False), nn.Linear(8, 6), nn.Linear(6, 9)

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.o(torch.tanh(q) * v) + k.sum(-1, keepdim=True)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lora_dropout": 0.4},
        {"rank_pattern": {"k": 2}, "alpha_pattern": {"v": 5}},
        {"enable_lora": {"q": [True, False]}},
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"lora_bias": True},
    ],
)
def test_joint_products_have_the_gradients_of_each_layer_alone(settings):
    torch.manual_seed(0)
    net = Net().double()
    inject(net, LoraConfig(r=3, lora_alpha=6, target_modules=["q", "k", "v", "o"], **settings))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
    x = torch.randn(2, 5, 8, dtype=torch.double, requires_grad=True)

    def run():
        torch.manual_seed(1)
        x.grad = None
        net.zero_grad()
        y = net(x)
        y.square().sum().backward()
        return [y.detach(), x.grad, *(p.grad for p in net.parameters() if p.requires_grad)]

    expected = run()
    linears = DeviceLinears(list(net.modules()))
    with Hold(net, linears.modules, "training"):
        with linears.finding_groups() as recorders, overriding(recorders):
            net(x)
        with linears.ready() as overrides, overriding(overrides):
            made = run()
    assert [len(group.layers) for group in linears._groups] == [3, 1]
    for ours, theirs in zip(made, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_an_output_that_nothing_depends_on_has_no_gradient():
    torch.manual_seed(0)
    net = Net()
    inject(net, LoraConfig(r=3, target_modules=["q", "k", "v", "o"]))
    x = torch.randn(5, 8)
    linears = DeviceLinears(list(net.modules()))
    with Hold(net, linears.modules, "training"):
        with linears.finding_groups() as recorders, overriding(recorders):
            net(x)
        with linears.ready() as overrides, overriding(overrides):
            q, k, _ = net.q(x), net.k(x), net.v(x)
            (q.sum() + k.sum()).backward()
    assert net.v.lora_A.grad is None
    assert net.v.lora_B.grad is None
    torch.testing.assert_close(net.q.lora_B.grad, (2 * x @ net.q.lora_A.T).sum(0).expand(6, 3) * net.q.scaling / 2)


# Liger.

LIGER = """
import torch
from torch import nn
from loralib.engine.liger import LigerLoss
from loralib.engine.loss import Predictions, head_loss
torch.manual_seed(0)
head = nn.Linear(16, 19, bias=False).requires_grad_(False)
rows, targets = torch.tensor([0, 0, 1, 2]), torch.tensor([3, 5, 5, 0])
predictions = Predictions.of(rows, targets, torch.tensor([1.0, 2.0, 1.0, 3.0]), 3, torch.device("cpu"))
found = []
for way in ("ours", "liger"):
    states = torch.randn(3, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
    options = {"gradient_scale": 0.5, "label_smoothing": 0.1}
    if way == "liger":
        loss = LigerLoss(head)(states, predictions, 7, **options)
    else:
        loss = head_loss(head, states, predictions, **options)
    loss.objective.backward()
    found.append((loss.total, states.grad))
torch.testing.assert_close(found[0], found[1])
"""


@pytest.mark.skipif(not has_liger(), reason="liger-kernel is not installed")
def test_ligers_loss_is_ours():
    """By Triton's interpreter, on the CPU."""
    subprocess.run([sys.executable, "-c", LIGER], env={**os.environ, "TRITON_INTERPRET": "1"}, check=True)


# The settings.


def test_compiling_is_refused_where_it_is_not_possible(on_gpu):
    model = adapted(llama)
    with pytest.raises(ConfigError, match="compile is on, but the model is on cpu, expected cuda"):
        make_step(model, compiles=True)
    on_gpu("compiled")
    with pytest.raises(ConfigError, match="batches are padded: packing is off"):
        make_step(model, compiles=True, packing=False)
    assert make_step(model, compiles=True).compiles
    assert not make_step(model, compiles=False).compiles


@pytest.mark.parametrize("fast", [True, False])
def test_a_gpus_base_is_in_bf16_and_the_factors_in_fp32(fast, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: fast)
    _is_fast_in_bf16.cache_clear()
    dtype = pick_dtype("auto", torch.device("cuda"))
    assert dtype == (torch.bfloat16 if fast else torch.float32)
    model = llama().to(dtype)
    _is_fast_in_bf16.cache_clear()
    inject(model, LoraConfig(r=2, target_modules="all-linear"))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


# What is placed where.


def placed(model):
    return {name: sorted({"forward", "config"} & module.__dict__.keys()) for name, module in model.named_modules()}


@pytest.mark.parametrize("device", ["meta", "xla", "hpu"])
def test_on_other_devices_nothing_is_placed(device, monkeypatch):
    model = adapted(llama)
    before = placed(model)
    if device == "meta":
        model.to("meta")
    else:
        monkeypatch.setattr(forward, "device_of", lambda model: torch.device(device))
    found = forward.Forward(model)
    with found.hold_model("training"), found.overriding():
        assert placed(model) == before
        assert type(model.config) is transformers.LlamaConfig
    assert not found.has_layouts
    assert not found.splits


@pytest.mark.parametrize("device", ["cuda", "mps", "xpu"])
def test_on_a_gpu_nothing_is_placed_that_was_made_for_cpus(device, monkeypatch):
    monkeypatch.setattr(forward, "device_of", lambda model: torch.device(device))
    monkeypatch.setattr(forward.Forward, "_probe", lambda self: True)  # nothing can be computed there
    for name in ("operator_overrides", "TrainingLinears", "PackedLayout"):
        monkeypatch.setattr(forward, name, lambda *args: pytest.fail("made for CPUs"))
    model = llama()
    inject(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    found = forward.Forward(model)
    assert found.path == "gpu"
    with found.hold_model("training"):
        forwards = [name for name, kinds in placed(model).items() if "forward" in kinds]
    layers = [f"model.layers.{number}.self_attn.{name}" for number in range(2) for name in ("q_proj", "v_proj")]
    assert forwards == ["model", *layers]
    monkeypatch.setattr(forward, "may_compile", lambda device: True)
    with forward.Forward(model).hold_model("training"):
        forwards = [name for name, kinds in placed(model).items() if "forward" in kinds]
    assert forwards == ["model", *(f"model.layers.{number}" for number in range(2))]


# On a GPU.  Nobody has run these yet.

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize("compiles", [True, False])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_gpu_computes_what_the_cpu_does(make, compiles):
    model, batch = adapted(make), batch_of()
    total, expected = computed(make_step(model), model, batch)
    model.cuda()
    step = make_step(model, compiles=compiles and forward.may_compile(torch.device("cuda")))
    assert step.packing, step.note
    with step:
        made = computed(step, model, batch)
    torch.testing.assert_close(made[0].cpu(), total, rtol=1e-3, atol=1e-3)
    for name, gradient in expected.items():
        torch.testing.assert_close(made[1][name].cpu(), gradient, rtol=1e-2, atol=1e-3, msg=name)


@pytest.mark.gpu
@no_gpu
@pytest.mark.skipif(has_liger(), reason="liger-kernel waits for the device by itself")
def test_a_step_on_a_gpu_does_not_wait_and_compiles_nothing_after_two_lengths():
    model = adapted(llama).cuda()
    step = make_step(model)
    with step:
        for seed in (0, 1):
            step.forward_backward(batch_of(seed, prompts=1 + 4 * seed), loss_scale=0.01)
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch._dynamo.config.patch(error_on_recompile=True):
                for seed in range(2, 8):
                    step.forward_backward(batch_of(seed, prompts=seed), loss_scale=0.01)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@no_gpu
def test_logits_are_never_whole_on_a_gpu():
    config = transformers.LlamaConfig(**{**_LLAMA, "vocab_size": 60_000, "max_position_embeddings": 8192})
    model = transformers.LlamaForCausalLM(config).cuda()
    inject(model, LoraConfig(r=2, target_modules="all-linear"))
    batch = [TokenExample(tuple(range(3, 8000)), (False, *[True] * 7996))]
    step = make_step(model)
    with step:
        step.forward_backward(batch, loss_scale=0.01)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step.forward_backward(batch, loss_scale=0.01)
    assert torch.cuda.max_memory_allocated() - before < 7997 * 60_000 * 4
