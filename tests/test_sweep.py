"""Many runs trained together: each has the same losses as alone, and none affects the others."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import loralib as lora
from loralib import errors
from loralib.cli import main, parser_of
from loralib.data import PreferencePair, TokenExample
from loralib.engine.adapted_linears import GroupProducts
from loralib.engine.row_linears import why_not_shared
from loralib.injection import adapted_layers, eva_start_for
from loralib.training import many, run_directory, start, trainer
from loralib.training.report import read_metrics
from loralib.training.run_directory import checkpoint_files
from loralib.training.shared_step import SharedStep
from loralib.training.sweep_job import SWEPT, configs_of

VOCABULARY = 48
COMMON: dict[str, Any] = {"batch_size": 4, "max_steps": 7, "eval_steps": 3, "save_steps": 2, "keep_checkpoints": 1}
# Different ranks, scalings, rates, orders of the data, optimisers, schedules and modules.
RUNS = [
    lora.TrainConfig(**COMMON, rank=8, lr=1e-3, seed=1),
    lora.TrainConfig(**COMMON, rank=4, lr=3e-3, lora_alpha=4, seed=2, target_modules="q_proj,v_proj", weight_decay=0.1),
    lora.TrainConfig(**COMMON, rank=2, lr=1e-2, seed=1, use_rslora=True, loraplus_lr_ratio=1, schedule="cosine"),
    lora.TrainConfig(**COMMON | {"batch_size": 2, "grad_accum": 2}, rank=3, lr=1e-2, arithmetic="paper"),
]


@pytest.fixture(autouse=True, scope="module")
def quick_runs() -> Iterator[None]:
    """Skips what takes most of a tiny run's time and matters to few of these tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_directory, "plot_losses", lambda *_: False)
        for module in (trainer, many):
            patch.setattr(module, "freeze_objects", nullcontext)
        yield
    torch.set_num_threads(before)


def tiny_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.3, **sizes))


def examples(count: int, seed: int) -> list[TokenExample]:
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        length = rng.randrange(5, 14)
        ids = tuple(rng.randrange(VOCABULARY) for _ in range(length))
        rows.append(TokenExample(ids, (False,) * 3 + (True,) * (length - 3)))
    return rows


def sweep(directory: Path, configs: Any, model: Any = None, **options: Any) -> Any:
    options = {"valid_data": examples(5, seed=1), "verbose": False} | options
    model = tiny_model() if model is None else model
    return lora.train_many(model, examples(18, seed=0), configs, output_dir=str(directory), **options)


def alone(directory: Path, config: lora.TrainConfig) -> Any:
    config = config.replace(output_dir=str(directory))
    return lora.train(tiny_model(), examples(18, seed=0), config, valid_data=examples(5, seed=1), verbose=False)


def adapters(result: Any) -> dict[str, bytes]:
    return {run.name: (run.path / "adapter_model.safetensors").read_bytes() for run in result.runs if not run.dropped}


@pytest.mark.parametrize("engine", ["full", "torch", "off"])
def test_every_run_has_the_losses_it_has_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    monkeypatch.setenv("LORALIB_ENGINE", engine)
    result = sweep(tmp_path / "together", RUNS)
    for number, (config, run) in enumerate(zip(RUNS, result.runs, strict=True)):
        by_itself = alone(tmp_path / f"alone-{number}", config)
        assert run.result.losses == pytest.approx(by_itself.losses, abs=1e-5)
        assert run.result.train_losses == pytest.approx(by_itself.train_losses, abs=1e-5)
        ours, theirs = torch.tensor(run.result.valid_losses), torch.tensor(by_itself.valid_losses)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
        ours, theirs = (lora.read_adapter(path).tensors for path in (run.path, by_itself.output_dir))
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[key], theirs[key], atol=1e-4) for key in ours)


def test_gradients_of_a_shared_pass_are_those_of_each_run_and_reach_it_alone(both_ways: None) -> None:
    """In bf16, sums are rounded in another order; the third run is not in this pass."""
    base = tiny_model().to(torch.bfloat16)
    twins = [many.twin_of(base) for _ in range(3)]
    for number, twin in enumerate(twins):
        torch.manual_seed(number)
        lora.inject(twin, lora.LoraConfig(r=2 + 2 * number, target_modules="all-linear"))
        for _, layer in adapted_layers(twin):
            nn.init.normal_(layer.lora_B, std=0.1)
    options = {"packing": True, "share_prompts": True, "label_smoothing": 0.0, "chunk_tokens": 256, "compiles": False}
    batches = [examples(3, seed=5), examples(4, seed=6)]
    done = SharedStep(base, twins, **options).in_one_pass([(n, batch, 0.1) for n, batch in enumerate(batches)])
    assert all(p.grad is None for p in twins[2].parameters())
    assert all(p.grad is None for p in base.parameters())
    for twin, batch, stats in zip(twins, batches, done, strict=False):
        together = {name: p.grad.clone() for name, p in twin.named_parameters() if p.grad is not None}
        twin.zero_grad()
        own = trainer.make_step(twin).forward_backward(batch, loss_scale=0.1)
        assert float(stats.loss_sum) == pytest.approx(float(own.loss_sum), rel=1e-2)
        for name, p in twin.named_parameters():
            if p.requires_grad:
                assert (together[name] - p.grad).norm() < 0.05 * p.grad.norm()


def test_linears_that_read_the_same_input_are_one_product_for_all_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v, then o, gate and up, and down, in each of two blocks; also where a run adapts only some of them."""
    calls: list[tuple[int, int]] = []

    def counted(products: GroupProducts, x: Any, dropped: Any, numbers: tuple[int, ...]) -> Any:
        calls.append((len(numbers), len(products.runs)))
        return outputs(products, x, dropped, numbers)

    outputs = GroupProducts.outputs
    monkeypatch.setattr(GroupProducts, "outputs", counted)
    base = tiny_model()
    twins = [many.twin_of(base) for _ in range(2)]
    for twin, modules in zip(twins, ("all-linear", ["q_proj", "v_proj", "up_proj"]), strict=True):
        lora.inject(twin, lora.LoraConfig(r=2, target_modules=modules))
    step = SharedStep(
        base, twins, packing=True, share_prompts=True, label_smoothing=0.0, chunk_tokens=256, compiles=False
    )
    step.in_one_pass([(0, examples(2, seed=5), 0.1), (1, examples(3, seed=6), 0.1)])
    assert calls == [(3, 2), (1, 2), (2, 2), (1, 2)] * 2


def test_runs_of_eva_share_what_they_start_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decomposition depends on the data and the rank, not on rates and seeds."""
    made: list[int] = []

    def counted(model: nn.Module, config: lora.LoraConfig, batches: Any) -> Any:
        made.append(config.r)
        return eva_start_for(model, config, batches)

    monkeypatch.setattr(start, "eva_start_for", counted)
    settings = [{"rank": 2, "lr": 3e-3}, {"rank": 2, "lr": 1e-3, "seed": 5}, {"rank": 3, "lr": 3e-3}]
    configs = [lora.TrainConfig(**COMMON, init_lora_weights="eva", **each) for each in settings]
    result = sweep(tmp_path / "together", configs)
    assert made == [2, 3]
    for number, (config, run) in enumerate(zip(configs, result.runs, strict=True)):
        by_itself = alone(tmp_path / f"alone-{number}", config)
        assert run.result.losses == pytest.approx(by_itself.losses, abs=1e-5)


def test_the_base_is_validated_once_for_all_runs_that_start_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first update, adapters whose B is zero compute the same as the base; afterwards, losses differ."""
    validated: list[int] = []
    evaluate_all = SharedStep.evaluate_all

    def counted(step: SharedStep, wanted: Any, stop: Any) -> Any:
        validated.append(len(wanted))
        return evaluate_all(step, wanted, stop)

    monkeypatch.setattr(SharedStep, "evaluate_all", counted)
    result = sweep(tmp_path, RUNS[:3])
    assert validated == [1, 3, 3, 3]  # updates 0, 3, 6 and 7
    assert len({run.result.valid_losses[0] for run in result.runs}) == 1
    assert len({run.result.valid_losses[-1] for run in result.runs}) == 3


def test_the_model_is_afterwards_what_it_was(tmp_path: Path) -> None:
    model = tiny_model()
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    sweep(tmp_path / "sweep", RUNS[:2], model)
    assert not adapted_layers(model)
    assert all(torch.equal(p, before[n][0]) and p.requires_grad == before[n][1] for n, p in model.named_parameters())


def test_the_best_adapter_is_set_apart_and_can_be_loaded(tmp_path: Path) -> None:
    result = sweep(tmp_path / "sweep", RUNS[:3])
    assert result.best.loss == min(run.loss for run in result.runs)
    best = tmp_path / "sweep" / "best"
    assert (best / "adapter_model.safetensors").read_bytes() == (
        result.best.path / "best" / "adapter_model.safetensors"
    ).read_bytes()
    lora.load_adapter(tiny_model(), best)
    assert (tmp_path / "sweep" / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    record = json.loads((tmp_path / "sweep" / "sweep.json").read_text(encoding="utf-8"))
    assert [run["state"] for run in record["runs"]] == ["finished"] * 3


VARIANTS: list[dict[str, Any]] = [
    {"use_dora": True}, {"init_lora_weights": "pissa"}, {"lora_bias": True, "use_rslora": True}, {"lora_dropout": 0.3},
    {"init_lora_weights": "olora", "lora_dropout": 0.1, "target_modules": "q_proj,k_proj,down_proj"},
    {},
]  # fmt: skip


@pytest.mark.parametrize("engine", ["full", "torch", "off"])
def test_variants_and_dropout_share_passes_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], engine: str
) -> None:
    """Each run draws the dropout masks that it draws by itself, or, if batches are padded, trains by itself."""
    monkeypatch.setenv("LORALIB_ENGINE", engine)
    configs = [lora.TrainConfig(**COMMON, rank=2, lr=1e-2, seed=seed, **each) for seed, each in enumerate(VARIANTS)]
    result = sweep(tmp_path / "together", configs, verbose=True)
    assert capsys.readouterr().out.count("trains on its own: dropout") == (2 if engine == "off" else 0)
    for number, (config, run) in enumerate(zip(configs, result.runs, strict=True)):
        by_itself = alone(tmp_path / f"alone-{number}", config)
        assert run.result.losses == pytest.approx(by_itself.losses, abs=1e-5), config
        assert dict(run.result.valid_losses) == pytest.approx(dict(by_itself.valid_losses), abs=1e-5)


def test_runs_that_cannot_share_follow_one_after_the_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = {**COMMON, "rank": 2, "lr": 1e-2}
    configs = [lora.TrainConfig(**common), lora.TrainConfig(**common, trainable_token_indices=[3, 5])]
    result = sweep(tmp_path / "sweep", configs, verbose=True)
    by_itself = alone(tmp_path / "alone", configs[1])
    assert result.runs[1].result.losses == by_itself.losses
    assert "trains on its own: rows of an embedding or head are trained" in capsys.readouterr().out


def test_what_cannot_share_a_pass_is_seen_in_the_model() -> None:
    model = tiny_model()
    lora.inject(model, lora.LoraConfig(r=2, target_modules=["q_proj"], bias="all"))
    assert "trained" in why_not_shared(model) or why_not_shared(model) == ""  # Llama has no biases
    model = tiny_model()
    lora.inject(model, lora.LoraConfig(r=2, target_modules=["lm_head"]))
    assert "head" in why_not_shared(model)


def test_a_run_that_diverges_is_dropped_and_the_others_do_not_notice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configs = [RUNS[0], RUNS[0].replace(lr=1e30)]
    result = sweep(tmp_path / "sweep", configs, verbose=True)
    assert "after" in result.runs[1].dropped or "became" in result.runs[1].dropped
    assert "Dropped lr-1e+30" in capsys.readouterr().out
    by_itself = alone(tmp_path / "alone", configs[0])
    assert result.runs[0].result.losses == pytest.approx(by_itself.losses, abs=1e-5)
    assert result.best.name == "lr-0.001"


def test_a_run_whose_loss_explodes_is_dropped_within_a_few_updates(tmp_path: Path) -> None:
    """The base continues its data well, so that a much too high rate makes it worse, though the loss stays finite."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)  # it repeats the last token
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.01)
            layer.mlp.down_proj.weight.mul_(0.01)
    data = [TokenExample((number,) * 8, (False,) + (True,) * 7) for number in range(VOCABULARY)]

    def run(name: str, **changes: Any) -> Any:
        config = RUNS[0].replace(**{"max_steps": 20, "eval_steps": 20} | changes)
        options = {"output_dir": str(tmp_path / name), "verbose": False}
        return lora.train_many(model, data, [config, config.replace(lr=30.0)], valid_data=data[:5], **options).runs

    good, bad = run("at-the-end")
    assert "the training loss exploded" in bad.dropped
    assert len(list(read_metrics(bad.path / "metrics.jsonl"))) < 15
    assert not good.dropped
    good, bad = run("often", eval_steps=2)
    assert "the validation loss exploded" in bad.dropped
    assert not good.dropped


def test_a_validation_that_is_not_a_number_is_that_of_one_run(tmp_path: Path) -> None:
    configs = [RUNS[0].replace(eval_steps=1), RUNS[0].replace(eval_steps=1, lr=1e30)]
    good, bad = sweep(tmp_path / "sweep", configs).runs
    assert "validation loss" in bad.dropped
    by_itself = alone(tmp_path / "alone", configs[0])
    torch.testing.assert_close(
        torch.tensor(good.result.valid_losses), torch.tensor(by_itself.valid_losses), rtol=1e-5, atol=0
    )


def test_runs_that_read_the_same_examples_read_them_once_with_the_limit_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The memory that earlier runs take would lower the limit of later ones, so that they could leave out examples."""
    limits = iter([(20, "memory"), (8, "memory")])
    monkeypatch.setattr(trainer, "length_limit", lambda *_: next(limits))
    result = sweep(tmp_path / "sweep", [RUNS[0], RUNS[0].replace(lr=3e-3)], verbose=True)
    assert capsys.readouterr().out.count("Sequence length") == 1
    first, second = (run.result.valid_losses[0] for run in result.runs)
    assert first == second


def test_settings_that_no_run_could_have_are_refused_before_any_has_trained(tmp_path: Path) -> None:
    configs = [RUNS[0], RUNS[0].replace(rank=5000, init_lora_weights="pissa"), RUNS[0].replace(target_modules="nosuch")]
    with pytest.raises(errors.ConfigError) as told:
        sweep(tmp_path / "sweep", configs)
    assert "rank-5000" in str(told.value)
    assert "nosuch" in str(told.value)
    assert not list(tmp_path.rglob("metrics.jsonl"))


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_runs_that_learn_from_preferences_train_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str
) -> None:
    pairs = [
        PreferencePair((3, 5, n), (False, False, True), TokenExample((3, 5, n + 9), (False, False, True)))
        for n in range(6, 14)
    ]
    configs = [
        lora.TrainConfig(objective=objective, rank=2, lr=lr, max_steps=2, warmup_steps=0, seed=seed)
        for seed, lr in enumerate((1e-3, 3e-3))
    ]
    computed, compute = [], trainer.reference_of
    monkeypatch.setattr(trainer, "reference_of", lambda *a, **k: computed.append(1) or compute(*a, **k))
    result = lora.train_many(tiny_model(), pairs, configs, output_dir=str(tmp_path / "sweep"), verbose=False)
    assert len(computed) == (objective == "dpo"), "the reference is that of the base, so all runs share it"
    assert not list(tmp_path.rglob("reference*"))
    for config, run in zip(configs, result.runs, strict=True):
        lora.train(tiny_model(), pairs, config.replace(output_dir=str(tmp_path / run.name)), verbose=False)
        assert adapters(result)[run.name] == (tmp_path / run.name / "adapter_model.safetensors").read_bytes()


def test_what_becomes_of_the_data_is_told_once_by_runs_that_train_one_by_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configs = rates(1e-3, 3e-3, use_dora=True, seq_len=9)
    sweep(tmp_path, configs, verbose=True, valid_data=None)
    assert capsys.readouterr().out.count("longer than seq_len)") == 1


def test_rates_that_differ_in_late_digits_have_names_of_their_own() -> None:
    assert many.run_names(rates(1.2345678e-4, 1.2345679e-4)) == ["lr-0.00012345678", "lr-0.00012345679"]


def test_a_sweep_of_which_nothing_is_left_fails(tmp_path: Path) -> None:
    with pytest.raises(errors.TrainingError, match="no run finished"):
        sweep(tmp_path / "sweep", [RUNS[0].replace(lr=1e30), RUNS[0].replace(lr=1e31)])


class _KilledError(BaseException):
    """Simulates SIGKILL: nothing is saved or cleaned up, except by `finally`."""


@pytest.mark.parametrize("moment", [2, 6, 11])
def test_a_killed_sweep_resumes_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """At any moment: here, it dies while writing a checkpoint, and other runs have later ones."""
    drops = RUNS[0].replace(lora_dropout=0.2, use_dora=True)
    configs = [*RUNS[:3], drops, RUNS[0].replace(lr=1e30)]  # one of them is dropped on the way
    whole = adapters(sweep(tmp_path / "whole", configs))
    write, writes = run_directory.save_checkpoint, 0

    def dying(*args: Any) -> Any:
        nonlocal writes
        writes += 1
        if writes == moment:
            raise _KilledError
        return write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(run_directory, "save_checkpoint", dying)
        with pytest.raises(_KilledError):
            sweep(tmp_path / "killed", configs)
    resumed = sweep(tmp_path / "killed", [config.replace(resume=True) for config in configs])
    assert adapters(resumed) == whole
    metrics = [
        [(e["event"], e["step"], e["loss"]) for e in read_metrics(path)]
        for run in resumed.runs if not run.dropped
        for path in (run.path / "metrics.jsonl", tmp_path / "whole" / run.name / "metrics.jsonl")
    ]  # fmt: skip
    assert metrics[::2] == metrics[1::2]


def test_a_signal_saves_all_runs_at_one_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = adapters(sweep(tmp_path / "whole", RUNS[:2]))
    update, updates = trainer.Trainer._update, 0

    def signalled(self: Any, batches: Any) -> Any:
        nonlocal updates
        updates += 1
        if updates == 9:
            signal.raise_signal(signal.SIGTERM)
        return update(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_update", signalled)
        with pytest.raises(errors.InterruptedRunError, match="--resume"):
            sweep(tmp_path / "stopped", RUNS[:2])
    steps = [checkpoint_files(path)[-1].name for path in (tmp_path / "stopped").glob("*/checkpoints")]
    assert len(steps) == 2
    assert len(set(steps)) == 1
    resumed = sweep(tmp_path / "stopped", [config.replace(resume=True) for config in RUNS[:2]])
    assert adapters(resumed) == whole


SHORT = lora.TrainConfig(rank=2, max_steps=1, batch_size=4, warmup_steps=0)


def rates(*rates: float, **settings: Any) -> list[lora.TrainConfig]:
    return [SHORT.replace(lr=lr, **settings) for lr in rates]


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("again", [(1e-3, 3e-3), (3e-3, 1e-2)])
def test_a_second_sweep_in_a_directory_moves_the_first_aside_as_a_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], again: tuple[float, ...]
) -> None:
    sweep(tmp_path, rates(1e-3, 3e-3))
    first = files(tmp_path)
    result = sweep(tmp_path, rates(*again), verbose=True)
    assert f"moved to {tmp_path / 'previous-1'}" in capsys.readouterr().out
    assert files(tmp_path / "previous-1") == first
    assert {path.name for path in tmp_path.iterdir()} == {
        *(run.name for run in result.runs), "best", "sweep.json", "sweep.png", "previous-1",
    }  # fmt: skip


def test_overwrite_discards_all_of_an_earlier_sweep_but_not_what_the_user_added(tmp_path: Path) -> None:
    sweep(tmp_path, rates(1e-3, 3e-3, keep_checkpoints=1))
    (tmp_path / "lr-0.001" / "notes.txt").write_text("a good one")
    (tmp_path / "lr-0.001" / "tensorboard").mkdir()  # as --report_to tensorboard leaves it
    (tmp_path / "lr-0.001" / "tensorboard" / "events").write_text("curves")
    result = sweep(tmp_path, rates(1e-2, overwrite=True))
    assert {path.name for path in tmp_path.iterdir()} == {"run", "best", "sweep.json", "sweep.png", "lr-0.001"}
    assert [path.name for path in (tmp_path / "lr-0.001").iterdir()] == ["notes.txt"]
    weights = [(place / "adapter_model.safetensors").read_bytes() for place in (result.best.path, tmp_path / "best")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("values", "message"),
    [({"resume": True}, "a sweep with different runs"), ({}, "stopped after 0 of its 2 runs.*--resume")],
)
def test_an_unfinished_sweep_is_not_lost_to_one_with_other_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], message: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "finish", lambda _: (_ for _ in ()).throw(_KilledError))
        with pytest.raises(_KilledError):
            sweep(tmp_path, rates(1e-3, 3e-3))
    before = files(tmp_path)
    with pytest.raises(errors.LoraError, match=message):
        sweep(tmp_path, rates(3e-3, 1e-2, **values))
    assert files(tmp_path) == before


def test_a_run_that_was_dropped_is_not_taken_for_another_with_its_number(tmp_path: Path) -> None:
    """Names that would be too long are numbers, which are the same whatever is tried."""
    long = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]}
    configs = [SHORT.replace(lr=1e-3, **long), SHORT.replace(lr=1e30, max_steps=2, rank=3)]
    assert [run.dropped != "" for run in sweep(tmp_path, configs).runs] == [False, True]
    with pytest.raises(errors.ConfigError, match="different runs"):
        sweep(tmp_path, [each.replace(resume=True) for each in (configs[0], configs[1].replace(lr=1e-3, seed=1))])


def test_a_sweep_and_a_single_run_do_not_share_a_directory(tmp_path: Path) -> None:
    """Each would write over the other's `best`."""
    sweep(tmp_path / "sweep", rates(1e-3))
    with pytest.raises(errors.ConfigError, match="contains a sweep: choose another --output_dir"):
        alone(tmp_path / "sweep", SHORT)
    alone(tmp_path / "run", SHORT)
    with pytest.raises(errors.ConfigError, match="contains a run of `loralib train`"):
        sweep(tmp_path / "run", rates(1e-3, overwrite=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([{}, {}], "more than once"),
        ([{"lr": 1e-3}, {"lr": 1e-3}], "more than once"),
        ([{"seq_len": 8}, {"seq_len": 9}], "seq_len: 8 and 9"),
        ([], "no runs"),
        ([{"bias": "all", "modules_to_save": "lm_head"}, {"rank": 3}], "bias: 'all'\n.*modules_to_save: 'lm_head'"),
    ],
)
def test_runs_that_make_no_sweep_are_refused(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(errors.ConfigError, match=message):
        sweep(tmp_path / "sweep", [RUNS[0].replace(**each) for each in changes])


def test_a_value_that_is_listed_twice_is_named() -> None:
    with pytest.raises(errors.ConfigError, match=r"lr lists 0\.001 more than once"):
        configs_of({"lr": [1e-3, 1e-4, 0.001]})


def test_more_runs_than_memory_are_refused_with_the_number_that_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(many, "free_on", lambda _: 450_000.0)
    with pytest.raises(errors.ConfigError, match=r"3 runs need more memory .* sweeps of at most 1"):
        sweep(tmp_path / "sweep", [RUNS[0].replace(seed=seed) for seed in range(3)])


def test_lists_make_a_run_of_each_combination() -> None:
    configs = configs_of({"lr": [1e-4, 3e-4], "rank": 8, "target_modules": ("all-linear", ["q_proj"])})
    assert [(config.lr, config.target_modules) for config in configs] == [
        (1e-4, "all-linear"), (1e-4, ["q_proj"]), (3e-4, "all-linear"), (3e-4, ["q_proj"]),
    ]  # fmt: skip
    with pytest.raises(errors.ConfigError, match="rank is 0"):
        configs_of({"rank": [0, 8]})


def test_the_command_takes_lists_from_flags_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, config = tmp_path / "train.txt", tmp_path / "sweep.toml"
    data.write_text("".join(f"name : {n}||It is {n}.\n" for n in range(12)), encoding="utf-8")
    config.write_text(
        'model = "scratch"\nhidden_dim = 32\nnum_layers = 1\nlr = [1e-3, 1e-2]\nmax_steps = 2\n', encoding="utf-8"
    )
    command = ["sweep", "--config", str(config), "--train_data", str(data), "--output_dir", str(tmp_path / "sweep")]
    assert main([*command, "--rank", "2", "4", "--use_rslora", "true,false", "--valid_fraction", "0"]) == 0
    assert len(list((tmp_path / "sweep").glob("*rank-*/adapter_config.json"))) == 8
    assert "8 runs: 8 trained together" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--rank", "0,x"])
    assert "'0,x' was given, expected whole numbers separated by commas" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--target_modules", "c_attn", "c_proj"])
    assert "'c_attn c_proj' was given, expected one word" in capsys.readouterr().err
    assert main([*command, "--rank=-1,0"]) == 2
    assert "rank is -1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--no_correct_bias"], {"correct_bias": [False]}),
        (["--correct_bias", "--use_dora", "true", "false"], {"correct_bias": [True], "use_dora": [True, False]}),
        (["--lr", "1e-4", "auto,2e-4"], {"lr": [1e-4, None, 2e-4]}),
        (["--target_modules", "all-linear;q_proj,v_proj"], {"target_modules": ("all-linear", ["q_proj", "v_proj"])}),
    ],
)
def test_flags_list_values(flags: list[str], expected: dict[str, Any]) -> None:
    args = parser_of("sweep").parse_args(flags)
    assert {name: value for name, value in vars(args).items() if name in SWEPT and value is not None} == expected
