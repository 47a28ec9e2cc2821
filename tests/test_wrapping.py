"""Models inside wrappers: the model itself is adapted, saved and loaded, under its own names, or it is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel

import loralib as lora
from loralib.errors import AdapterError, LoraError, MergeError, TargetError, UnsupportedModelError

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.arange(5)[None]
CONFIG = lora.LoraConfig(r=2, lora_alpha=8, target_modules=["up"], modules_to_save=["head"])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(5, 8)
        self.blocks = nn.Sequential(*(nn.Sequential() for _ in range(2)))
        for block in self.blocks:
            block.add_module("up", nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(self.blocks(self.table(ids)))
        return y


def trained() -> Any:
    model = Net()
    lora.inject(model, CONFIG)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter)
    return model


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def part(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[Any], nn.Module]:
    """Wraps one block of the model."""

    def wrapped(model: Any) -> nn.Module:
        model.blocks[0] = wrap(model.blocks[0])
        return model  # type: ignore[no-any-return]

    return wrapped


WRAPPERS: dict[str, Callable[[Any], nn.Module]] = {
    "torch.compile": compiled,
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "twice": lambda model: compiled(nn.DataParallel(model)),
    "a compiled block": part(compiled),
    "a checkpointed block": part(checkpoint_wrapper),
    "a block in DataParallel": part(nn.DataParallel),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_what_a_wrapped_model_saves_is_the_models(name: str, tmp_path: Path) -> None:
    model = trained()
    want, names = model(IDS), list(lora.adapter_of(model).tensors)
    wrapped = WRAPPERS[name](model)
    assert list(lora.save_adapter(wrapped, tmp_path).tensors) == names
    fresh = Net()
    assert lora.load_adapter(fresh, tmp_path).base == "checked"
    assert torch.equal(fresh(IDS), want)


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_model_is_adapted_merged_and_given_back(name: str, tmp_path: Path) -> None:
    lora.save_adapter(trained(), tmp_path)
    want, base = trained()(IDS), Net()(IDS)
    wrapped = WRAPPERS[name](Net())
    assert torch.equal(wrapped(IDS), base)
    assert lora.load_adapter(wrapped, tmp_path).base == "checked"
    assert torch.equal(wrapped(IDS), want)
    lora.merge(wrapped)
    torch.testing.assert_close(wrapped(IDS), want)
    lora.unmerge(wrapped)
    with lora.disabled(wrapped):
        assert torch.equal(wrapped(IDS), base)
    assert set(lora.lora_state_dict(wrapped)) == {n for n in lora.adapter_of(wrapped).tensors if "lora_" in n}
    lora.remove(wrapped)
    assert torch.equal(wrapped(IDS), base)
    assert lora.inject(wrapped, CONFIG).targets == ("blocks.0.up", "blocks.1.up")


def test_a_part_that_is_called_module_is_no_wrapper(tmp_path: Path) -> None:
    def model() -> Any:
        return nn.ModuleDict({"module": Net(), "other": nn.Linear(8, 8)})

    ours = model()
    assert len(lora.inject(ours, lora.LoraConfig(r=2, target_modules=["up", "other"])).targets) == 3
    assert "module.blocks.0.up.lora_A" in lora.save_adapter(ours, tmp_path).tensors
    assert lora.load_adapter(model(), tmp_path).base == "checked"


class Owner(nn.Module):
    """A user's own module around a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model


def replaced(model: nn.Module) -> None:
    lora.apply_adapter(model, lora.adapter_of(trained()))


@pytest.mark.parametrize("call", [lora.adapter_of, lora.remove, replaced])
def test_a_model_of_which_a_part_is_adapted_names_that_part(call: Callable[[nn.Module], Any]) -> None:
    with pytest.raises(TargetError, match=r"its part 'inner' \(Net\) does.* pass model.get_submodule\('inner'\)"):
        call(Owner(trained()))


def test_switching_off_reaches_the_adapted_part() -> None:
    owner, base = Owner(trained()), Net()(IDS)
    with lora.disabled(owner):
        assert torch.equal(owner.inner(IDS), base)


def test_modules_wrapped_later_by_something_unknown_are_named() -> None:
    model = trained()
    model.blocks[1].up = nn.Sequential(model.blocks[1].up)
    for call in (lora.adapter_of, lora.remove):
        with pytest.raises(TargetError, match=r"1 of 2 adapted modules.*: blocks.1.up is now a Sequential of torch"):
            call(model)
    model.blocks[1].up = model.blocks[1].up[0]
    lora.remove(model)


# What is no longer a parameter, and what trains besides.


def pruned(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", amount=0.5)  # type: ignore[no-untyped-call]


def factor_pruned(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "lora_A", amount=0.5)  # type: ignore[no-untyped-call]


def parametrized(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer, "weight", nn.Identity())


def weight_normed(layer: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(layer)


CHANGES: list[Callable[[nn.Module], None]] = [pruned, factor_pruned, parametrized, weight_normed]


@pytest.mark.parametrize("change", CHANGES)
def test_weights_computed_after_injection_are_refused_by_name(change: Callable[[nn.Module], None]) -> None:
    model = trained()
    change(model.blocks[0].up)
    for call in (lora.adapter_of, replaced):
        with pytest.raises(LoraError, match=r"blocks.0.up.*computed since inject\(\)"):
            call(model)


def test_pruning_made_permanent_is_saved_with_the_pruned_base() -> None:
    model = trained()
    prune.l1_unstructured(model.blocks[0].up, "weight", amount=0.5)  # type: ignore[no-untyped-call]
    prune.remove(model.blocks[0].up, "weight")  # type: ignore[no-untyped-call]
    with pytest.raises(LoraError, match="different values"):
        lora.apply_adapter(Net(), lora.adapter_of(model))


def test_what_trains_besides_the_adapter_is_not_left_out_silently() -> None:
    model = trained()
    model.table.requires_grad_(True)
    with pytest.raises(AdapterError, match=r"are trained in addition to the adapter(.|\n)*table\.weight"):
        lora.adapter_of(model)
    model.table.requires_grad_(False)
    lora.adapter_of(model)


# Several processes.


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=(tmp_path / "store").resolve().as_uri(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def fsdp1(model: Any) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def fsdp2(model: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model.blocks[0])
    return fully_shard(model)


@pytest.mark.parametrize("shard", [fsdp1, fsdp2])
def test_a_sharded_model_saves_and_the_rest_is_refused(
    shard: Callable[[Any], Any], one_process: None, tmp_path: Path
) -> None:
    want, model = trained()(IDS), shard(trained())
    with torch.no_grad():
        assert torch.equal(model(IDS), want)
    adapter = lora.save_adapter(model, tmp_path)
    fresh = Net()
    assert lora.load_adapter(fresh, tmp_path).base == "checked"
    assert torch.equal(fresh(IDS), want)
    with pytest.raises(MergeError, match="spread over processes"):
        lora.merge(model)
    calls: list[Callable[[Any], Any]] = [lora.remove, lambda m: lora.apply_adapter(m, adapter)]
    for call in calls:
        with pytest.raises(TargetError, match="spread over processes"):
            call(model)
    with pytest.raises(TargetError, match="cannot be switched off"), lora.disabled(model):
        pass
    with torch.no_grad():
        assert torch.equal(model(IDS), want)
    with pytest.raises(TargetError, match=r"inside FullyShardedDataParallel|inject first, then shard"):
        lora.inject(shard(Net()), CONFIG)


def test_ddp_saves_and_takes_no_later_adapter(one_process: None, tmp_path: Path) -> None:
    model = nn.parallel.DistributedDataParallel(trained())
    lora.save_adapter(model, tmp_path)
    assert lora.load_adapter(model, tmp_path).base == "checked"  # the same layers with other values
    with pytest.raises(TargetError, match="inside DistributedDataParallel, which would not synchronise"):
        lora.load_adapter(nn.parallel.DistributedDataParallel(Net()), tmp_path)
    with pytest.raises(TargetError, match=r"inside DistributedDataParallel, which train\(\) does not"):
        lora.train(model, [], lora.TrainConfig())


def test_an_attention_that_reads_as_a_sum_cannot_be_sharded(one_process: None) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    def adapted() -> Any:
        model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
        lora.inject(model, lora.LoraConfig(r=2, target_modules=["attention"]))
        return model

    with pytest.raises(UnsupportedModelError, match="adapted MultiheadAttention reads as base"):
        FullyShardedDataParallel(adapted(), use_orig_params=True, device_id=torch.device("cpu"))
    model, x = adapted(), torch.randn(3, 1, 8)
    fully_shard(model.attention)
    with pytest.raises(UnsupportedModelError, match="spread over processes"):
        model.attention(x, x, x)
