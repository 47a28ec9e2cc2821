"""The engine replaces forwards only during its own passes, and restores them afterwards."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import loralib as lora
from loralib.data.tokens import TokenExample
from loralib.engine.attention import interface_name
from loralib.engine.placement import Hold, engine_mode, overriding, own_forward
from loralib.errors import BusyModelError, ConfigError
from loralib.generation import Generator, Sampling
from loralib.injection import adapted_layers
from loralib.modes import evaluating
from loralib.training.objective import evaluate_loss
from loralib.training.step import make_step

VOCABULARY = 64
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}


class Letters:
    """A tokenizer with one token per number."""

    eos_token_id = 0

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(chr(97 + token % 26) for token in ids)


def llama(seed: int = 0, dtype: torch.dtype = torch.float32, config: Any = None) -> Any:
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config or transformers.LlamaConfig(**SIZES)).to(dtype).eval()


def adapted(seed: int = 0, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    model = llama(seed, dtype)
    lora.inject(model, lora.LoraConfig(**{"r": 4, "target_modules": "all-linear"} | settings))
    with torch.no_grad():
        for _, layer in adapted_layers(model):
            layer.lora_B.normal_(std=0.1, generator=torch.Generator().manual_seed(seed))
    return model


def examples(seed: int, count: int = 4) -> list[TokenExample]:
    draw = torch.Generator().manual_seed(seed)
    rows = [torch.randint(1, VOCABULARY, (9,), generator=draw).tolist() for _ in range(count)]
    return [TokenExample(tuple(row), (False,) * 4 + (True,) * 5) for row in rows]


PROMPTS = [[5, 6, 7], [9], [3, 4, 5, 6, 7, 8], [11, 12]]


def written(model: Any, count: int = 16, num_beams: int = 1) -> list[tuple[int, ...]]:
    sampling = Sampling(max_new_tokens=count, min_new_tokens=count, num_beams=num_beams)
    return [result.ids for result in lora.generate(model, Letters(), PROMPTS, sampling)]


def places(model: nn.Module) -> list[dict[str, Any]]:
    """The contents of each module's __dict__, except tensors."""
    return [{name: value for name, value in m.__dict__.items() if name[0] != "_"} for m in model.modules()]


def together(*jobs: Callable[[], Any]) -> list[Any]:
    """Runs jobs in threads that start at the same time; returns their results, or raises their first error."""
    results: list[Any] = [None] * len(jobs)
    errors: list[BaseException] = []
    start = threading.Barrier(len(jobs))

    def work(number: int) -> None:
        try:
            start.wait(30)
            results[number] = jobs[number]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    if errors:
        raise errors[0]
    return results


# Threads, and a model that the library never touches.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_models_generate_in_two_threads_beside_a_bystander(dtype: torch.dtype) -> None:
    one, two, bystander = adapted(1, dtype), adapted(2, dtype), llama(3, dtype)
    ids = torch.tensor([PROMPTS[2]])
    file = vars(transformers.models.llama.modeling_llama)
    names_before = dict(file)
    expected = [written(one), written(two)]
    before = bystander(ids).logits
    seen: list[torch.Tensor] = []

    def look() -> None:
        for _ in range(40):
            seen.append(bystander(ids).logits)

    for _ in range(3):
        with torch.no_grad():
            results = together(lambda: written(one), lambda: written(two), look)
        assert results[:2] == expected
    assert all(torch.equal(logits, before) for logits in seen)
    assert torch.equal(bystander(ids).logits, before)
    assert file.keys() == names_before.keys()
    assert all(file[name] is value for name, value in names_before.items())


@pytest.mark.parametrize("num_beams", [1, 3])
def test_two_generators_on_one_model(num_beams: int) -> None:
    model = adapted(dtype=torch.bfloat16).train()  # dropout stays off until the last one is done
    before = places(model)
    expected = written(model, 24, num_beams)
    for _ in range(3):
        assert together(*[lambda: written(model, 24, num_beams)] * 3) == [expected] * 3
    assert places(model) == before
    assert all(module.training for module in model.modules())


def test_generating_while_another_model_trains(tmp_path: Any) -> None:
    writer = adapted(1, torch.bfloat16)
    expected = written(writer)

    def trained(name: str) -> Any:
        model = llama(2, torch.bfloat16)
        config = lora.TrainConfig(output_dir=str(tmp_path / name), max_steps=6, batch_size=2, lora_dropout=0.1)
        lora.train(model, examples(1, 8), config, verbose=False)
        return lora.adapter_of(model).tensors

    alone = trained("alone")
    beside, *texts = together(lambda: trained("beside"), lambda: [written(writer) for _ in range(4)])
    assert texts == [[expected] * 4]
    assert all(torch.equal(beside[name], tensor) for name, tensor in alone.items())


def test_a_model_cannot_generate_while_it_is_trained_nor_the_other_way_round() -> None:
    model = adapted()
    step = make_step(model)
    with step:
        with pytest.raises(BusyModelError, match="LlamaForCausalLM is already being trained"):
            written(model)
        with pytest.raises(BusyModelError, match="already being trained and cannot be used for inference"):
            make_step(model)
        step.loss(examples(0))  # its own measuring is part of the run
    generator = Generator(model, Letters())
    generator.add([5, 6, 7])
    generator.step()
    with pytest.raises(BusyModelError, match=r"already generating or being evaluated.*close or finish a Generator"):
        step.forward_backward(examples(0), loss_scale=1.0)
    generator.close()
    assert step.forward_backward(examples(0), loss_scale=1.0).trained_tokens == 20


def test_a_model_keeps_its_adapter_while_it_generates() -> None:
    config, model = lora.LoraConfig(r=4, target_modules="all-linear"), llama()
    other = lora.adapter_of(adapted())
    changes: list[Callable[[Any], Any]] = [
        lambda model: lora.inject(model, config),
        lora.merge,
        lora.unmerge,
        lora.remove,
    ]
    for change in (*changes, lambda model: lora.apply_adapter(model, other)):
        generator = Generator(model, Letters())
        generator.add([5, 6, 7])
        generator.step()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(BusyModelError, match=r"cannot be changed meanwhile\. Wait for that to end"):
            change(model)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        generator.close()
        change(model)


def test_a_generator_that_is_forgotten_gives_the_model_back() -> None:
    model = adapted()
    before = places(model)
    generator = Generator(model, Letters())
    generator.add([5, 6, 7])
    generator.step()
    assert places(model) != before
    del generator
    gc.collect()
    assert places(model) == before
    make_step(model).forward_backward(examples(0), loss_scale=1.0)


# What is in a model's place, and for how long.


def test_a_users_own_forward_is_the_models_own_while_a_generator_is_at_work() -> None:
    """Bit for bit, mask and attention included, also with padding."""
    model = adapted(dtype=torch.bfloat16)
    ids, mask = torch.tensor([PROMPTS[2], [1] * 6]), torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    with torch.no_grad():
        before = model(ids, attention_mask=mask).logits
        generator = Generator(model, Letters())
        generator.add([5, 6, 7])
        generator.step()
        assert "forward" in model.model.layers[0].mlp.__dict__
        assert torch.equal(model(ids, attention_mask=mask).logits, before)
        assert torch.equal(model.generate(ids[:1], max_new_tokens=3), model.generate(ids[:1], max_new_tokens=3))
        generator.close()
    assert "forward" not in model.model.layers[0].mlp.__dict__


def test_two_models_that_share_a_config() -> None:
    config = transformers.LlamaConfig(**SIZES)
    one, two = llama(1, config=config), llama(2, config=config)
    generator = Generator(one, Letters())
    generator.add([5, 6, 7])
    generator.step()
    assert two.config._attn_implementation == config._attn_implementation == "sdpa"
    one.config.use_cache = False  # what a user sets meanwhile stays
    generator.close()
    assert one.model.config is config
    assert config.use_cache is False


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_meanwhile_is_an_ordinary_model(duplicate: Callable[[Any], Any]) -> None:
    model, ids = adapted(), torch.tensor([PROMPTS[2]])
    generator = Generator(model, Letters())
    generator.add([5, 6, 7])
    generator.step()
    twin = duplicate(model)
    generator.close()
    del generator, model
    gc.collect()
    assert type(twin.config) is transformers.LlamaConfig
    assert twin.config._attn_implementation == "sdpa"
    torch.testing.assert_close(twin(ids).logits, adapted()(ids).logits)
    assert len(written(twin)) == len(PROMPTS)


@pytest.mark.parametrize("where", ["in a layer", "in the head", "in the backward pass"])
def test_whatever_is_raised_everything_is_taken_back(where: str) -> None:
    model = adapted().train()
    before, step = places(model), make_step(model)
    module = model.lm_head if where == "in the head" else model.model.layers[1].mlp

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    if where == "in the backward pass":
        module.register_full_backward_hook(fail)
    else:
        module.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt), step:
        step.forward_backward(examples(0), loss_scale=1.0)
    assert places(model) == before
    assert all(child.training for child in model.modules())


def test_holds_nest_and_overlap() -> None:
    layer = nn.Linear(2, 2)
    x, double = torch.ones(1, 2), {layer: lambda x: 2 * own_forward(layer, x)}
    own = layer(x)
    first, second = Hold(layer, [layer], "inference"), Hold(layer, [layer], "inference")
    with overriding(double):
        assert torch.equal(layer(x), 2 * own)
        with overriding({}):
            assert torch.equal(layer(x), own)
        first.release()
        first.release()  # does nothing
        assert torch.equal(layer(x), 2 * own)
    assert torch.equal(layer(x), own)
    second.release()
    assert "forward" not in layer.__dict__


def test_a_forward_of_somebody_elses_stays() -> None:
    layer = nn.Linear(2, 2)
    layer.forward = theirs = lambda x: x  # type: ignore[method-assign]
    with Hold(layer, [layer], "inference"), overriding({layer: lambda x: None}):
        assert layer(1) == 1
    assert layer.__dict__["forward"] is theirs
    del layer.forward
    with Hold(layer, [layer], "inference"):
        layer.forward = theirs  # put over ours meanwhile
    assert layer.__dict__["forward"] is theirs


def test_each_module_is_in_its_own_mode_after_generating_training_a_sweep_and_eva(tmp_path: Path) -> None:
    model, config = llama().train(), lora.TrainConfig(max_steps=1, rank=2, warmup_steps=0)
    model.model.layers[0].eval()

    def modes() -> list[bool]:
        return [module.training for module in model.modules()]

    before = modes()
    written(model, 1)
    assert modes() == before
    lora.train(model, examples(0), config.replace(output_dir=str(tmp_path / "run")), verbose=False)
    assert modes() == before
    lora.remove(model)
    lora.train_many(model, examples(0), [config], output_dir=str(tmp_path / "sweep"), verbose=False)
    assert modes() == before
    eva = lora.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="eva")
    lora.inject(model, eva, [{"input_ids": torch.arange(1, 60).view(1, -1)}])
    assert modes() == before


def test_evaluating_ends_with_the_last_one() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    with evaluating(model.modules()):
        with evaluating(model.modules()):
            assert not model[0].training
        assert not model[0].training
    assert [module.training for module in model.modules()] == [True, True, False]


# Gradients through autograd.


@pytest.fixture(params=["full", "torch"])
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    from loralib.engine.kernels import compiled

    monkeypatch.setenv("LORALIB_ENGINE", request.param)
    compiled.cache_clear()
    yield request.param
    compiled.cache_clear()


def reference(model: Any, batch: list[TokenExample]) -> dict[str, torch.Tensor]:
    """The gradient of the mean loss, as PyTorch computes it on a padded batch."""
    ids = torch.tensor([example.ids for example in batch])
    trained = torch.tensor([example.trained for example in batch])
    twin = copy.deepcopy(model)
    losses = nn.functional.cross_entropy(twin(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    (losses * trained[:, 1:].flatten()).sum().backward()
    return {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}


def test_hooks_on_gradient_accumulation_fire(mode: str) -> None:
    """For each trained parameter, once a backward pass, as DDP's reducer and optimisers in the backward pass need."""
    model = adapted()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    fired: dict[str, int] = dict.fromkeys(trained, 0)
    nodes = []

    def count(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            fired[name] += 1

        return hook

    for name, parameter in trained.items():
        node = parameter.view_as(parameter).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
        node.register_hook(count(name))
        nodes.append(node)  # else it is made anew
    later: list[str] = []
    for name, parameter in trained.items():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: later.append(name))
    step = make_step(model)
    for passes in (1, 2):
        step.forward_backward(examples(0), loss_scale=1.0)
        assert set(fired.values()) == {passes}
    assert sorted(later) == sorted([*trained, *trained])


def test_gradients_are_pytorchs_and_accumulate(mode: str) -> None:
    model, batch = adapted(), examples(0)
    expected = reference(model, batch)
    step = make_step(model)
    with step, torch.autograd.set_detect_anomaly(True):
        for part in (batch[:1], batch[1:]):
            step.forward_backward(part, loss_scale=1.0)
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_a_frozen_factor_gets_no_gradient_and_a_tensor_hook_changes_one(mode: str) -> None:
    model, batch = adapted(), examples(0)
    layer = model.model.layers[0].self_attn.q_proj
    layer.lora_A.requires_grad_(False)
    layer.lora_B.register_hook(lambda gradient: 2 * gradient)
    expected = reference(model, batch)
    make_step(model).forward_backward(batch, loss_scale=1.0)
    assert layer.lora_A.grad is None
    expected_B = 2 * expected["model.layers.0.self_attn.q_proj.lora_B"]  # the copy for reference has no hook
    torch.testing.assert_close(layer.lora_B.grad, expected_B, rtol=1e-4, atol=1e-5)


@pytest.mark.distributed
def test_ddp_synchronises_gradients(tmp_path: Any) -> None:
    """One process is enough: if DDP's reducer missed a gradient, it would raise at the next pass."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0,
                                         world_size=1)  # fmt: skip
    try:
        model, batch = adapted(target_modules=["q_proj", "lm_head"]), examples(0)
        step = make_step(model, chunk_tokens=4)
        scales: list[float] = []

        def hook(state: Any, bucket):  # type: ignore[no-untyped-def]
            scales.append(float(bucket.buffer().abs().sum()))
            future: Any = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        ddp = nn.parallel.DistributedDataParallel(model)
        ddp.register_comm_hook(None, hook)
        for _ in range(2):
            ddp.reducer.prepare_for_backward([])
            step.forward_backward(batch, loss_scale=1.0)
            total = sum(float(p.grad.abs().sum()) for p in model.parameters() if p.grad is not None)
            assert sum(scales) == pytest.approx(total, rel=1e-5)
            scales.clear()
            model.zero_grad()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("mode", ["full", "torch"], indirect=True)
def test_an_adapted_head_takes_part_in_the_one_backward_pass(mode: str) -> None:
    """The head runs in chunks, but each parameter's gradient is accumulated once per step."""
    model, batch = adapted(target_modules=["q_proj", "lm_head"]), examples(0)
    expected = reference(model, batch)
    later: list[str] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: later.append(name))
    make_step(model, chunk_tokens=4).forward_backward(batch, loss_scale=1.0)
    assert sorted(later) == sorted(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-5, msg=name)


# What reads the name of its attention, and what changes after it was looked at.


def falcon() -> Any:
    torch.manual_seed(0)
    config = transformers.FalconConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, eos_token_id=0, alibi=False
    )
    return transformers.FalconForCausalLM(config).eval()


def test_a_model_that_asks_for_the_name_of_its_attention_is_padded_and_right() -> None:
    model, batch = falcon(), examples(0)
    ids, trained = torch.tensor([e.ids for e in batch]), torch.tensor([e.trained for e in batch])
    with torch.no_grad():
        losses = nn.functional.cross_entropy(
            model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        step = make_step(model)
        with step:
            assert not step.packing
            assert torch.equal(model(ids).logits, model(ids).logits)
            loss = float(step.loss(batch).loss_sum)
    assert loss == pytest.approx(float((losses * trained[:, 1:].flatten()).sum()), rel=1e-5)


def test_a_config_is_never_changed() -> None:
    """Even while a generator is running, or a model is created from it."""
    model = adapted()
    generator = Generator(model, Letters())
    generator.add([5, 6, 7])
    generator.step()
    assert model.config._attn_implementation == "sdpa"
    twin = transformers.LlamaForCausalLM(model.config)
    generator.close()
    assert model.config._attn_implementation == twin.config._attn_implementation == "sdpa"


def test_an_activation_that_is_replaced_or_hooked_later() -> None:
    model = llama()
    written(model)
    mlp, calls = model.model.layers[0].mlp, []
    mlp.act_fn.register_forward_hook(lambda *_: calls.append(1))
    written(model, 2)
    assert calls
    mlp.act_fn = nn.GELU()
    step, batch = make_step(model), examples(0)
    with torch.no_grad():
        ids = torch.tensor([e.ids for e in batch])
        losses = nn.functional.cross_entropy(
            model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
    trained = torch.tensor([e.trained for e in batch])[:, 1:].flatten()
    assert float(step.loss(batch).loss_sum) == pytest.approx(float((losses * trained).sum()), rel=1e-5)


def test_weights_may_change_between_two_generations_of_one_generator() -> None:
    model = llama(dtype=torch.bfloat16)
    generator = Generator(model, Letters())

    def go() -> list[int]:
        number = generator.add([5, 6, 7], Sampling(max_new_tokens=12, min_new_tokens=12))
        tokens: list[int] = []
        while len(generator):
            tokens += [token for chunk in generator.step() if chunk.request == number for token in chunk.ids]
        return tokens

    go()
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data.neg_()  # which no version counter notices
    assert go() == list(lora.generate(model, Letters(), [[5, 6, 7]], max_new_tokens=12, min_new_tokens=12)[0].ids)


def test_a_model_is_freed_after_generating_even_if_a_hook_of_its_own_knows_it() -> None:
    model = llama()
    model.model.layers[0].mlp.register_forward_hook(lambda *_, own=model: None)
    gone = weakref.ref(model)
    written(model, 2)
    del model
    gc.collect()
    assert gone() is None


def test_a_hook_may_generate_with_another_model() -> None:
    one, two = llama(1), llama(2)
    one.model.layers[0].register_forward_hook(lambda *_: written(two, 1) and None)
    thread = threading.Thread(target=lambda: written(one, 1), daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()


def test_an_interrupted_first_generation_leaves_the_model_free() -> None:
    model = adapted()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt) as kept:  # as a notebook keeps it, with its frames
        written(model)
    hook.remove()
    make_step(model).forward_backward(examples(0), loss_scale=1.0)
    assert kept.value is not None


def test_one_step_in_two_threads() -> None:
    model = adapted()
    step = make_step(model)
    batches = [examples(seed) for seed in range(8)]
    expected = [float(step.loss(batch).loss_sum) for batch in batches]

    def losses() -> list[float]:
        return [float(step.loss(batch).loss_sum) for batch in batches]

    for _ in range(3):
        assert together(losses, losses) == [expected, expected]


def test_a_compiled_model_generates_as_the_model_inside() -> None:
    model = adapted()
    assert written(torch.compile(model, backend="eager")) == written(model)


def test_holding_a_model_makes_one_class_and_one_view_per_config() -> None:
    model = adapted()
    held = [Hold(model, [], "inference", interface_name) for _ in range(3)]
    configs = {id(module.__dict__["config"]) for module in model.modules() if "config" in module.__dict__}
    kinds = {type(module.__dict__["config"]) for module in model.modules() if "config" in module.__dict__}
    for hold in held:
        hold.release()
    assert (len(configs), len(kinds)) == (1, 1)


def test_training_a_busy_model_is_refused_before_anything_is_done_to_it(tmp_path: Any) -> None:
    model = adapted().eval()
    lora.merge(model)
    before = places(model)
    with Hold(model, [], "inference"), pytest.raises(BusyModelError, match="generating or being evaluated"):
        lora.train(model, examples(0), lora.TrainConfig(output_dir=str(tmp_path / "x"), max_steps=1), verbose=False)
    assert places(model) == before
    assert all(layer.merged for _, layer in adapted_layers(model))


# Off.


def test_engine_off_computes_the_same_and_places_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = adapted(), examples(0)
    expected = [written(model, 6), evaluate_loss(make_step(model), model, batch)]
    before = places(model)
    monkeypatch.setenv("LORALIB_ENGINE", "off")
    step = make_step(model)
    assert "LORALIB_ENGINE" in step.note
    with step:
        assert places(model) == before
    assert written(model, 6) == expected[0]
    assert evaluate_loss(step, model, batch) == pytest.approx(expected[1], rel=1e-5)
    monkeypatch.setenv("LORALIB_ENGINE", "of")
    with pytest.raises(ConfigError, match="LORALIB_ENGINE is 'of', expected full, torch, off"):
        engine_mode()
