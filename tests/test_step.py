"""Every way of computing a step gives the loss and the gradients of the plain padded one."""

import functools
import re

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from loralib.config import LoraConfig
from loralib.data.tokens import TokenExample
from loralib.errors import ConfigError, UnsupportedModelError
from loralib.injection import inject
from loralib.training.step import make_step

VOCABULARY = 61
WINDOW = 6

_SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,  # heads of 16, which the compiled kernels take
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **_SPECIAL,
}
_GEMMA = {**_LLAMA, "head_dim": 16, "query_pre_attn_scalar": 12, "sliding_window": WINDOW}


def gpt2():
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=3, n_head=4, n_positions=64, **_SPECIAL)
    return transformers.GPT2LMHeadModel(config)


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_LLAMA, tie_word_embeddings=True))


def qwen2():
    config = transformers.Qwen2Config(**_LLAMA, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)
    return transformers.Qwen2ForCausalLM(config)


def mistral():
    return transformers.MistralForCausalLM(transformers.MistralConfig(**_LLAMA, head_dim=32, sliding_window=WINDOW))


def gemma2():
    settings = {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 3.0}
    # By itself transformers 5.0 takes sdpa, which leaves the soft-capping of attention out.
    config = transformers.Gemma2Config(**_GEMMA, **settings, attn_implementation="eager")
    return transformers.Gemma2ForCausalLM(config)


def gemma3():
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**_GEMMA, layer_types=kinds))


def granite():
    config = transformers.GraniteConfig(**_LLAMA, logits_scaling=3.0, attention_multiplier=0.3)
    return transformers.GraniteForCausalLM(config)


SHAPES = {f.__name__: f for f in (gpt2, llama, qwen2, mistral, gemma2, gemma3, granite)}


def built(make, lora=True, **settings):
    """A model whose weights are large enough that a leak between examples, or a wrong position, shows."""
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    if lora:
        inject(model, LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", **settings))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


@pytest.fixture(scope="module", params=SHAPES)
def model(request):
    return built(SHAPES[request.param])


def plain_step(model, batch, scale, label_smoothing=0.0):
    """The step in its simplest form: padded to the longest example, all logits, PyTorch's loss."""
    width = max(len(example.ids) for example in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    targets = torch.full_like(ids, -100)
    for row, example in enumerate(batch):
        count = len(example.ids)
        ids[row, :count] = torch.tensor(example.ids)
        mask[row, :count] = 1
        targets[row, :count] = torch.where(torch.tensor(example.trained), torch.tensor(example.ids), -100)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].flatten(0, 1)
    loss = F.cross_entropy(logits, targets[:, 1:].flatten(), reduction="sum", label_smoothing=label_smoothing)
    (loss * scale).backward()
    return loss.item()


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_step(model, batch, step, label_smoothing=0.0):
    scale = 1 / max(1, sum(sum(example.trained) for example in batch))
    expected = plain_step(model, batch, scale, label_smoothing)
    reference = gradients(model)
    stats = step.forward_backward(batch, loss_scale=scale)
    made = gradients(model)
    assert stats.loss_sum == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert stats.trained_tokens == sum(sum(example.trained) for example in batch)
    assert stats.tokens == sum(len(example.ids) for example in batch)
    assert made.keys() == reference.keys()
    for name, gradient in reference.items():
        assert (made[name] - gradient).abs().max() <= 1e-5 * max(1.0, gradient.abs().max()), name
    assert step.loss(batch).loss_sum == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert not gradients(model)
    return stats


def example(ids, prompt):
    """An example whose tokens from `prompt` on are trained."""
    return TokenExample(tuple(ids), tuple(place >= max(1, prompt) for place in range(len(ids))))


@st.composite
def batches(draw, longest=3 * WINDOW):
    """Prompts with several completions, lengths past the sliding window; clm or jlm; perhaps an example twice."""
    token = st.integers(3, VOCABULARY - 1)
    prompts = draw(st.lists(st.lists(token, min_size=1, max_size=longest), min_size=1, max_size=3))
    jlm = draw(st.booleans())
    batch = []
    for _ in range(draw(st.integers(1, 5))):
        prompt = draw(st.sampled_from(prompts))
        completion = draw(st.lists(token, min_size=1, max_size=longest))
        batch.append(example(prompt + completion, 0 if jlm else len(prompt)))
    return batch + draw(st.sampled_from([[], batch[:1]]))


# Building a model is slow and steps leave nothing behind in it, so one model serves all examples.
several = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture
def step_of(model):
    """Creates each kind of step once, because it tests itself first; a run also uses a single one."""
    return functools.cache(functools.partial(make_step, model))


@pytest.mark.usefixtures("both_ways")
@several
@given(batch=batches(), share=st.booleans(), smoothing=st.sampled_from([0.0, 0.1]), chunk=st.sampled_from([1, 7, 256]))
def test_a_packed_step_is_the_padded_step(model, step_of, batch, share, smoothing, chunk):
    step = step_of(share_prompts=share, label_smoothing=smoothing, chunk_tokens=chunk)
    assert step.packing, step.note
    assert_same_step(model, batch, step, smoothing)


@several
@given(batch=batches())
def test_our_padded_step_is_the_padded_step(model, step_of, batch):
    assert_same_step(model, batch, step_of(packing=False))


def random_batch(seed, lengths):
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(3, VOCABULARY, (5,), generator=generator).tolist()
    return [example(prompt + torch.randint(3, VOCABULARY, (n,), generator=generator).tolist(), 5) for n in lengths]


def test_values_may_be_narrower_than_keys():
    """DeepSeek-V3: 128 and 192 wide."""
    sizes = {name: _LLAMA[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8}
    widths = {"qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
    dense = {"first_k_dense_replace": 99}
    model = built(lambda: transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(**sizes, **heads, **widths, **dense)
    ))  # fmt: skip
    step = make_step(model)
    assert step.packing, step.note
    assert_same_step(model, random_batch(0, [50, 3, 58, 40]), step)


@pytest.mark.usefixtures("both_ways")
def test_rows_of_several_tiles(model):
    batch = random_batch(0, [50, 3, 58, 40, 21, 1, 33]) + random_batch(1, [50, 58, 58, 7])
    assert_same_step(model, batch, make_step(model))


def test_sharing_computes_a_prompt_once():
    model = built(llama)
    batch = random_batch(0, [6, 6, 6])
    shared = make_step(model).forward_backward(batch, loss_scale=1.0)
    packed = make_step(model, share_prompts=False).forward_backward(batch, loss_scale=1.0)
    # 5 tokens of prompt and 6 of completion each; the last token of an example is only predicted, never computed
    assert (shared.processed_tokens, packed.processed_tokens) == (5 + 3 * 5, 3 * (5 + 5))


@pytest.mark.parametrize("share", [True, False])
def test_parameters_of_the_head_get_their_gradients(share):
    model = built(llama, modules_to_save=["norm"])
    for parameter in model.lm_head.parameters():  # tied: the embedding trains with it
        parameter.requires_grad_(True)
    stats = assert_same_step(model, random_batch(0, [9, 4, 12]), make_step(model, share_prompts=share, chunk_tokens=5))
    assert stats.processed_tokens > 0


def test_a_frozen_body_under_a_trained_head():
    model = built(gemma2, lora=False)
    model.requires_grad_(False)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    assert_same_step(model, random_batch(0, [9, 4, 12]), make_step(model, chunk_tokens=5))


def test_an_adapted_head():
    model = built(llama, lora=False)
    inject(model, LoraConfig(r=2, target_modules=["lm_head", "q_proj"]))
    nn.init.normal_(model.lm_head.lora_B)
    assert_same_step(model, random_batch(0, [9, 4, 12]), make_step(model, chunk_tokens=5))


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("make", [gpt2, gemma3])
def test_gradient_checkpointing(make):
    model = built(make)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    step = make_step(model)
    assert step.packing, step.note
    assert_same_step(model, random_batch(0, [9, 4, 12]), step)


def test_accumulation_does_not_depend_on_the_split():
    model = built(llama)
    batch = random_batch(0, [9, 4, 12, 6])
    step = make_step(model)
    step.forward_backward(batch, loss_scale=0.01)
    whole = gradients(model)
    for part in (batch[:1], batch[1:3], batch[3:]):
        step.forward_backward(part, loss_scale=0.01)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-6)


def test_a_batch_without_trained_tokens_does_nothing():
    model = built(llama)
    batch = [TokenExample((3, 4, 5), (False, False, False))]
    for packing in (True, False):
        stats = make_step(model, packing=packing).forward_backward(batch, loss_scale=1.0)
        assert (stats.loss_sum, stats.trained_tokens, stats.tokens) == (0.0, 0, 3)
    assert not gradients(model)


# Models that cannot be packed.


def bloom():  # distances come from a bias, not from positions
    return transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, **_SPECIAL)
    )


def gpt_neo():  # computes its local attention by itself
    config = transformers.GPTNeoConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=WINDOW,
        max_position_embeddings=64,
        **_SPECIAL,
    )
    return transformers.GPTNeoForCausalLM(config)


class ForgetsPositions(transformers.LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "position_ids": None}), with_kwargs=True
        )


def forgets_positions():
    return ForgetsPositions(transformers.LlamaConfig(**_LLAMA))


class Leaks(transformers.LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.norm.register_forward_hook(lambda module, args, out: out + 0.01 * out.cumsum(1))


def opt():  # its forward reaches into the body
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        dropout=0.0,
        **_SPECIAL,
    )
    return transformers.OPTForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (bloom, "change by .* when another example changes"),
        (gpt_neo, "change by .* when another example changes"),
        (forgets_positions, "differs by .* from its loss on its own"),
        (opt, "not built like transformers' causal language models"),
    ],
)
def test_a_model_that_cannot_be_packed_is_padded_and_says_so(make, reason):
    model = built(make)
    step = make_step(model)
    assert not step.packing
    assert not step.share_prompts
    assert re.search(reason, step.note)
    assert_same_step(model, random_batch(0, [9, 4, 12]), step)


def test_a_leak_between_examples_is_found():
    step = make_step(built(lambda: Leaks(transformers.LlamaConfig(**_LLAMA))))
    assert not step.packing
    assert "when another example changes" in step.note


class Recurrent(nn.Module):
    """An unusual model with a recurrent memory of all previous tokens."""

    def __init__(self, wrap):
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 16)
        self.memory = nn.GRU(16, 16, batch_first=True)
        self.head = nn.Linear(16, VOCABULARY)
        self.wrap = wrap

    def forward(self, input_ids, **ignored):
        logits = self.head(self.memory(self.table(input_ids))[0])
        return transformers.modeling_outputs.CausalLMOutput(logits=logits) if self.wrap else logits


@pytest.mark.parametrize("wrap", [True, False])
def test_any_module_that_returns_logits_trains_padded(wrap):
    torch.manual_seed(0)
    model = Recurrent(wrap=True)
    step = make_step(model)
    assert not step.packing
    assert "Recurrent is not built like" in step.note
    model.wrap = wrap
    batch = random_batch(0, [9, 4, 12])
    step.forward_backward(batch, loss_scale=0.1)
    made = gradients(model)
    model.wrap = True
    plain_step(model, batch, 0.1)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(made[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_module_without_logits_is_refused():
    with pytest.raises(UnsupportedModelError, match="the model returns Tensor, expected logits of shape"):
        make_step(nn.Sequential(nn.Embedding(VOCABULARY, 4), nn.Flatten()))


def test_the_models_own_attention_is_back_after_a_step():
    model = built(llama)
    before = model.config._attn_implementation
    make_step(model).forward_backward(random_batch(0, [3]), loss_scale=1.0)
    assert model.config._attn_implementation == before
    assert model.training


@pytest.mark.parametrize("wrong", [{"label_smoothing": 1.0}, {"chunk_tokens": 0}])
def test_settings_out_of_range(wrong):
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} is .*, expected"):
        make_step(built(llama), **wrong)


def test_the_models_own_activation_is_back_after_a_step():
    model = built(gpt2)
    before = [dict(module.__dict__) for module in model.modules()]
    make_step(model).forward_backward(random_batch(0, [3]), loss_scale=1.0)
    assert [module.__dict__.keys() for module in model.modules()] == [old.keys() for old in before]
    gelu = model.transformer.h[0].mlp.act
    x = torch.linspace(-8, 8, 1001)
    torch.testing.assert_close(gelu(x), F.gelu(x, approximate="tanh"), rtol=1e-6, atol=1e-6)


def test_a_step_of_gpt2_shapes_saves_no_parts_of_the_activation():
    """The eight operators of the tanh GELU would store several tensors of the MLP's width for the backward pass."""
    model, kept = built(gpt2), []
    width = model.config.n_embd * 4
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape[-1] == width) or t, lambda t: t):
        make_step(model).forward_backward(random_batch(0, [9, 4]), loss_scale=1.0)
    # per layer: GELU's input, and its output, which the next linear's low-rank path needs
    assert sum(kept) <= 4 * model.config.n_layer
