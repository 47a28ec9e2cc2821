"""Several processes train like one: the same losses, the same adapter, and all end together.

Ranks are forked from the test, with gloo between them and one thread each; what a launcher tells its processes by
environment variables is set here.  A few whole commands, at the end, are started by torchrun itself.
"""

from __future__ import annotations

import io
import itertools
import json
import multiprocessing
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

import loralib as lora
from loralib import errors
from loralib.bases import sharded
from loralib.cli import main
from loralib.data import TokenExample
from loralib.formats import read_adapter
from loralib.training import ranks as ranks_module
from loralib.training import run_directory, trainer
from loralib.training.objective import evaluate_loss
from loralib.training.ranks import ALONE, joined
from loralib.training.report import read_metrics
from loralib.training.run_directory import last_checkpoint
from loralib.training.shares import deal, shares
from loralib.training.step import make_step

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked, with threads that are not started")
ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 29


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Forked processes lack their parent's threads; plots and garbage collection would take time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_directory, "plot_losses", lambda *_: False)
        patch.setattr(trainer, "freeze_objects", nullcontext)
        yield
    torch.set_num_threads(before)


def tiny_model(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"vocab_size": VOCABULARY, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**({"initializer_range": 0.3} | sizes | changes)))


def some_examples(count: int = 40, seed: int = 0) -> list[TokenExample]:
    """Examples of many lengths; several share a prompt."""
    rng = random.Random(seed)
    prompts = [tuple(rng.randrange(VOCABULARY) for _ in range(rng.randrange(2, 9))) for _ in range(count // 3 + 1)]
    result = []
    for _ in range(count):
        prompt, answer = rng.choice(prompts), [rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 12))]
        result.append(TokenExample((*prompt, *answer), (False,) * len(prompt) + (True,) * len(answer)))
    return result


def settings(output: Path, **changes: Any) -> lora.TrainConfig:
    values: dict[str, Any] = {
        "output_dir": str(output), "rank": 4, "lr": 1e-3, "batch_size": 8, "max_steps": 20, "warmup_steps": 0,
        "keep_checkpoints": 2, "eval_steps": 7,
    }  # fmt: skip
    return lora.TrainConfig(**(values | changes))


def train(config: lora.TrainConfig, model: Any = None, **given: Any) -> Any:
    data = {"data": some_examples(), "valid_data": some_examples(11, seed=1)} | given
    return lora.train(tiny_model() if model is None else model, config=config, verbose=False, **data)


def together(size: int, action: Callable[[int], Any]) -> list[Any]:
    """Runs an action in several connected processes; returns their results, or the errors they raised."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    pipes, children = [], []
    for rank in range(size):
        here, there = context.Pipe(duplex=False)
        environment = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        child = context.Process(target=_one, args=(there, rank, action, environment))
        child.start()
        there.close()
        pipes.append(here)
        children.append(child)
    results = []
    for child, pipe in zip(children, pipes, strict=True):
        try:
            results.append(pickle.loads(pipe.recv()))
        except EOFError:  # it was killed
            child.join()
            results.append(child.exitcode)
    for child in children:
        child.join()
    return results


def _one(pipe: Any, rank: int, action: Callable[[int], Any], environment: dict[str, Any]) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)  # a fork would wait forever for the threads that the test's process had
    try:
        result = action(rank)
    except errors.LoraError as error:
        result = error
    except BaseException:
        result = AssertionError(traceback.format_exc())
    if isinstance(result, errors.InterruptedRunError):  # which needs its number to be made again
        result = (str(result), result.exit_code)
    pipe.send(pickle.dumps(result))


def all_alike(results: list[Any]) -> Any:
    """Checks that all ranks returned the same, and returns it."""
    for result in results:
        if isinstance(result, BaseException):
            raise result
    assert all(result == results[0] for result in results)
    return results[0]


def is_close(mine: Path, theirs: Path, tolerance: float = 1e-5) -> bool:
    """Whether two directories contain the same adapter, except for rounding."""
    (a, b) = (read_adapter(each) for each in (mine, theirs))
    names = [(each / "adapter_config.json").read_text() for each in (mine, theirs)]
    assert list(a.tensors) == list(b.tensors)
    assert names[0] == names[1]
    return all(torch.allclose(a.tensors[n], b.tensors[n], rtol=0, atol=tolerance) for n in a.tensors)


def losses(directory: Path) -> list[float]:
    """Every loss in metrics.jsonl, of updates and validations."""
    return [event["loss"] for event in read_metrics(directory / "metrics.jsonl")]


# The same run.

FEW: dict[str, Any] = {"max_steps": 5, "eval_steps": 0}
WAYS: dict[str, dict[str, Any]] = {
    "packed and shared": {},
    "padded": {"packing": False},
    "accumulated": {"batch_size": 3, "grad_accum": 3, "max_siblings": 2, **FEW},
    "the paper's arithmetic": {"arithmetic": "paper", "batch_size": 3, "grad_accum": 3, "share_prompts": False, **FEW},
    "recomputed": {"gradient_checkpointing": True, **FEW},
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Results of runs in a single process."""
    folder, done = tmp_path_factory.mktemp("alone"), dict[str, Path]()

    def run(way: str) -> Path:
        if way not in done:
            done[way] = train(settings(folder / way.replace(" ", "-"), **WAYS[way])).output_dir
        return done[way]

    return run


@pytest.mark.parametrize(("size", "shard"), [(2, False), (2, True), (4, False), (4, True)])
def test_losses_and_adapter_are_those_of_one_process(
    size: int, shard: bool, alone: Callable[[str], Path], tmp_path: Path
) -> None:
    ways = WAYS if size == 2 else {"packed and shared": {}}

    def runs(rank: int) -> list[list[float]]:
        with joined():
            return [train(settings(tmp_path / way, shard=shard, **changes)).losses for way, changes in ways.items()]

    all_alike(together(size, runs))
    for way in ways:
        assert losses(tmp_path / way) == pytest.approx(losses(alone(way)), abs=1e-5), way
        assert is_close(tmp_path / way, alone(way)), way
        assert is_close(tmp_path / way / "best", alone(way) / "best"), way


def test_a_base_is_spread_and_its_adapter_is_not(tmp_path: Path) -> None:
    def run(rank: int) -> Any:
        model = tiny_model()
        whole = sum(p.numel() for p in model.parameters())
        with joined():
            train(settings(tmp_path, shard=True, max_steps=1), model)
            held = {name: p.to_local() if hasattr(p, "to_local") else p for name, p in model.named_parameters()}
            return whole, {name: p.numel() for name, p in held.items()}

    results = together(2, run)
    for whole, held in results:
        base = sum(count for name, count in held.items() if "lora_" not in name)
        assert 0.45 * whole < base < 0.55 * whole
    assert {n: c for n, c in results[0][1].items() if "lora_" in n} == {
        n: c for n, c in results[1][1].items() if "lora_" in n
    }
    assert lora.load_adapter(tiny_model(), tmp_path).base == "checked"


def test_a_rank_may_have_nothing_to_do(tmp_path: Path) -> None:
    few = some_examples(2)
    want = train(settings(tmp_path / "alone", max_steps=3), data=few, valid_data=few[:1])

    def runs(rank: int) -> list[float]:
        with joined():
            for shard in (False, True):
                config = settings(tmp_path / str(shard), max_steps=3, shard=shard)
                train(config, data=few, valid_data=few[:1])
            return []

    all_alike(together(3, runs))
    for shard in (False, True):
        assert losses(tmp_path / str(shard)) == pytest.approx(losses(want.output_dir), abs=1e-5)
        assert is_close(tmp_path / str(shard), want.output_dir)


def test_masks_of_dropout_differ_between_ranks_and_come_back(tmp_path: Path) -> None:
    def runs(rank: int) -> list[list[float]]:
        with joined() as ranks:
            drawn = []
            for _ in range(2):
                ranks.seed(3, 7)
                drawn.append(torch.rand(4).tolist())
            twice = [train(settings(tmp_path / n, lora_dropout=0.3, max_steps=4)).losses for n in "ab"]
            return [*twice, *drawn]

    first, second = together(2, runs)
    assert first[0] == first[1] == second[0]
    assert first[2] == first[3] != second[2]


def test_a_group_that_a_program_has_made_is_used_and_left(tmp_path: Path, alone: Callable[[str], Path]) -> None:
    def run(rank: int) -> bool:
        torch.distributed.init_process_group("gloo")
        train(settings(tmp_path))
        return torch.distributed.is_initialized()

    assert all_alike(together(2, run))
    assert losses(tmp_path) == pytest.approx(losses(alone("packed and shared")), abs=1e-5)


# Shares.


def test_shares_have_about_as_many_tokens_and_keep_siblings_together() -> None:
    examples = some_examples(200)
    parts = shares(examples, 7, share_prompts=False)
    assert sorted(number for part in parts for number in part) == list(range(200))
    tokens = [sum(len(examples[number]) for number in part) for part in parts]
    assert max(tokens) - min(tokens) <= max(map(len, examples))
    alike = [TokenExample((prompt,) * 20 + (n,), (False,) * 20 + (True,)) for n in range(4) for prompt in range(6)]
    for part in shares(alike, 3, share_prompts=True):
        assert len({alike[number].ids[0] for number in part}) == 2, "two prompts a part, with all of their answers"
    assert [len(part) for part in shares(alike[:1], 3, share_prompts=True)] == [1, 0, 0]


def test_one_prompt_is_computed_on_several_ranks_where_that_is_sooner() -> None:
    answers = [TokenExample((1, 2, *[n] * 50), (False,) * 2 + (True,) * 50) for n in range(8)]
    assert sorted(map(len, shares(answers, 4, share_prompts=True))) == [2, 2, 2, 2]


def test_dealt_costs_are_about_equal() -> None:
    parts = deal([5, 4, 3, 3, 3], 2)
    assert sorted(number for part in parts for number in part) == [0, 1, 2, 3, 4]
    assert sorted(sum([5, 4, 3, 3, 3][number] for number in part) for part in parts) == [8, 10]


# Measuring.


def test_ranks_measure_a_part_of_the_examples_each() -> None:
    examples = some_examples(23)
    model = tiny_model()
    want = evaluate_loss(make_step(model), model, examples)

    def run(rank: int) -> tuple[float, int]:
        seen: list[int] = []
        model = tiny_model()
        step = make_step(model)
        model.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
        with joined() as ranks:
            return evaluate_loss(step, model, examples, max_tokens=40, ranks=ranks), len(seen)

    results = together(2, run)
    assert [loss for loss, _ in results] == pytest.approx([want] * 2, rel=1e-6)
    assert all(passes for _, passes in results)


# Going on.


def test_a_run_goes_on_with_other_ranks_and_from_spread_to_whole(alone: Callable[[str], Path], tmp_path: Path) -> None:
    """5 updates on 2 ranks, 5 on 4 with the base spread, 5 on 1, 5 on 2 with the base spread."""
    at = {"end": 5}

    def part(rank: int, **changes: Any) -> Any:
        model, updates = tiny_model(), []

        def ask(*_: Any) -> None:
            updates.append(1)

        config = settings(tmp_path, save_steps=1, resume=True, **changes)
        with joined() as ranks, pytest.MonkeyPatch.context() as patch:
            save = trainer.Trainer.save

            def stopping(self: Any, finished: bool = False) -> None:
                save(self, finished)
                if self.progress.step == at["end"] and not finished and self.progress.step < 20:
                    raise errors.TrainingError(f"enough on {ranks.size}")

            patch.setattr(trainer.Trainer, "save", stopping)
            return train(config, model)

    for size, shard in ((2, False), (4, True), (1, False)):
        result = together(size, lambda rank, shard=shard: part(rank, shard=shard))
        assert [str(each) for each in result] == [f"enough on {size}"] * size
        at["end"] += 5
    all_alike([each.steps for each in together(2, lambda rank: part(rank, shard=True))])
    assert losses(tmp_path) == pytest.approx(losses(alone("packed and shared")), abs=1e-5)
    assert is_close(tmp_path, alone("packed and shared"))


# One end for all.


def at_pass(model: Any, number: int, action: Callable[[], object]) -> None:
    """Runs an action in the middle of the model's pass with this number."""
    passes = itertools.count(1)
    model.model.layers[1].mlp.register_forward_hook(lambda *_: action() and None if next(passes) == number else None)


def test_a_signal_to_one_rank_ends_all_with_a_checkpoint(tmp_path: Path) -> None:
    def run(rank: int) -> Any:
        model = tiny_model()
        if rank == 1:
            at_pass(model, 12, lambda: signal.raise_signal(signal.SIGTERM))
        return train(settings(tmp_path, eval_steps=0), model)

    (first, code), second = together(2, run)
    assert (first, code) == second
    assert code == 143
    assert "SIGTERM: stopped after update" in first
    last = last_checkpoint(tmp_path / "checkpoints")
    assert last is not None
    assert f"update {last[0].progress.step} " in first


def test_ranks_stop_early_together(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"lr": 1.0, "eval_steps": 1, "early_stopping": 2, "schedule": "constant"}
    want = train(settings(tmp_path / "alone", **changes)).steps

    def run(rank: int) -> int:
        steps: int = train(settings(tmp_path / "two", **changes)).steps
        return steps

    assert want < 20
    assert all_alike(together(2, run)) == want


def test_a_loss_that_is_not_a_number_on_one_rank_ends_all(tmp_path: Path) -> None:
    def run(rank: int) -> Any:
        model = tiny_model()
        if rank == 1:
            calls: list[int] = []

            def hook(module: nn.Module, given: Any, output: Any) -> Any:
                calls.append(1)
                return output * float("nan") if len(calls) > 14 else None

            model.model.layers[1].mlp.register_forward_hook(hook)
        return train(settings(tmp_path, eval_steps=0, valid_fraction=0), model, valid_data=None)

    for error in together(2, run):
        assert isinstance(error, errors.TrainingError)
        assert "the training loss became nan at update" in str(error)


def test_a_rank_that_is_killed_ends_the_run_and_resuming_goes_on(alone: Callable[[str], Path], tmp_path: Path) -> None:
    def run(rank: int) -> Any:
        model = tiny_model()
        if rank == 1:
            at_pass(model, 12, lambda: os.kill(os.getpid(), signal.SIGKILL))
        return train(settings(tmp_path, save_steps=1), model)

    survivor, killed = together(2, run)
    assert killed == -signal.SIGKILL
    assert isinstance(survivor, errors.TrainingError)
    assert "another process of this run has died" in str(survivor)
    assert "--resume" in str(survivor)
    all_alike([each.steps for each in together(2, lambda rank: train(settings(tmp_path, resume=True, save_steps=1)))])
    assert losses(tmp_path) == pytest.approx(losses(alone("packed and shared")), abs=1e-5)
    assert is_close(tmp_path, alone("packed and shared"))


def test_a_rank_that_is_gone_is_told_from_a_fault_of_the_model() -> None:
    """A sharded model waits for the other ranks by itself, in the middle of a pass."""

    def run(rank: int) -> Any:
        with joined() as ranks:
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            with pytest.raises(RuntimeError, match="must match") as fault, ranks.computing():
                torch.ones(2) + torch.ones(3)
            assert not isinstance(fault.value, errors.LoraError)
            with ranks.computing():
                torch.distributed.all_reduce(torch.ones(1))

    survivor, _ = together(2, run)
    assert isinstance(survivor, errors.TrainingError)
    assert "another process of this run has died" in str(survivor)


def test_who_finds_a_rank_gone_tells_of_it_before_obeying_its_launcher() -> None:
    """In one of twenty kills, the launcher's SIGTERM used to end it first, without a message."""
    handler = signal.getsignal(signal.SIGTERM)
    group = ranks_module._ProcessGroup.__new__(ranks_module._ProcessGroup)
    try:
        with trainer.stop_on_signal():
            assert "has died" in str(group.blame(RuntimeError("Connection closed by peer")))
        signal.raise_signal(signal.SIGTERM)  # ends a process that does not expect it
        (timer,) = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
        assert (timer.daemon, timer.function) == (True, os.kill)  # it does end, a little later
        assert timer.interval > 1
        timer.cancel()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_an_error_of_one_rank_is_the_error_of_all(tmp_path: Path) -> None:
    def run(rank: int) -> Any:
        model = tiny_model()

        def hook(*_: Any) -> None:
            if rank == 1 and model.training:
                raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

        model.model.layers[1].mlp.register_forward_hook(hook)
        return train(settings(tmp_path), model)

    first, second = together(2, run)
    assert str(first).startswith("rank 1: memory ran out")
    assert str(second).startswith("memory ran out")


# Bad input.


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("data", ["training data: '", "on rank 0, '", "on rank 1"]),
        ("settings", ["lr: 0.001 on rank 0, 0.004 on rank 1", "lora_alpha: None on rank 0, 3 on rank 1"]),
        ("versions", ["version of torch: ", "'1.0' on rank 1"]),
        ("base", ["base model: '"]),
        ("directory", ["is not the same directory on rank 1 as on rank 0", "all machines share"]),
    ],
)
def test_ranks_that_do_not_agree_are_told_apart(fault: str, words: list[str], tmp_path: Path) -> None:
    def run(rank: int) -> Any:
        wrong, changes, given, model = rank == 1, {}, {}, tiny_model()
        with pytest.MonkeyPatch.context() as patch:
            if fault == "data" and wrong:
                given = {"data": some_examples(seed=5)}
            if fault == "settings" and wrong:
                changes = {"lr": 4e-3, "lora_alpha": 3}
            if fault == "versions" and wrong:
                from loralib.training import record

                patch.setattr(record, "versions", lambda: {"torch": "1.0"})
            if fault == "base" and wrong:
                model.model.embed_tokens.weight.data[0] += 1
            if fault == "directory" and wrong:
                exists = Path.exists
                patch.setattr(Path, "exists", lambda self: not self.name.startswith(".ranks") and exists(self))
            return train(settings(tmp_path / "run", **changes), model, **given)

    results = together(2, run)
    for error in results:
        assert isinstance(error, errors.ConfigError), error
        for word in words:
            assert word in str(error)
    assert not (tmp_path / "run").exists(), "nothing was written"


def test_an_unfinished_run_needs_resume_whatever_the_number_of_processes(tmp_path: Path) -> None:
    def stop(*_: Any) -> None:
        signal.raise_signal(signal.SIGTERM)

    def run(rank: int, first: bool) -> Any:
        model = tiny_model()
        if first:
            model.model.layers[1].mlp.register_forward_hook(stop)
        return train(settings(tmp_path), model)

    together(2, lambda rank: run(rank, True))
    for error in together(3, lambda rank: run(rank, False)):
        assert isinstance(error, errors.TrainingError)
        assert "contains a run of 2 processes that stopped after 0 updates. Add --resume" in str(error)


def test_what_shard_cannot_do_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigError, match="torchrun --nproc_per_node N -m loralib train --shard"):
        train(settings(tmp_path, shard=True))

    def run(rank: int) -> Any:
        model = tiny_model(attention_bias=True)
        with joined() as ranks:
            sharded.shard(model, ranks.mesh("cpu"))  # as it is loaded
            return train(settings(tmp_path, shard=True, bias="all"), model)

    for error in together(2, run):
        assert "these trained tensors are spread over processes" in str(error)
        assert "q_proj.bias" in str(error)


def test_shard_in_fp16_is_refused(tmp_path: Path) -> None:
    for error in together(2, lambda rank: train(settings(tmp_path, shard=True), tiny_model().half())):
        assert "shard is on and dtype is fp16" in str(error)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "2"}, "RANK and MASTER_ADDR and MASTER_PORT"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT must be set"),
    ],
)
def test_half_of_a_launcher_is_an_error(
    environment: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(errors.ConfigError, match=words):
        train(settings(tmp_path))


@pytest.mark.parametrize("lacking", ["gloo", "nccl"])
def test_a_build_without_a_backend_says_so(lacking: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, f"is_{lacking}_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: lacking == "nccl")
    with pytest.raises(errors.ConfigError, match="(?i)" + lacking):
        train(settings(tmp_path))


def test_one_process_is_the_case_of_one_rank() -> None:
    assert ALONE.is_first
    assert ALONE.gather(3) == [3]
    assert ALONE.on_first_rank(lambda: 4) == ALONE.on_all_ranks(lambda: 4) == ALONE.in_turn(lambda: 4) == 4
    assert ALONE.max(5) == 5
    assert torch.equal(ALONE.sum(torch.ones(2)), torch.ones(2))
    assert json.dumps(ALONE.device("cpu")) == '"cpu"'
    assert not ranks_module.launched()


# Whole commands.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer, and data of two fields."""
    from loralib.bases.loading import load_tokenizer

    folder = tmp_path_factory.mktemp("ranks")
    tokenizer = load_tokenizer("smollm2-135m")
    tiny_model(vocab_size=len(tokenizer), tie_word_embeddings=True).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": f"Say {n % 5} times {n}", "completion": f" {n}" * (n % 5 + 1)} for n in range(40)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def on(folder: Path, *words: str) -> list[str]:
    return [*words, "--model", str(folder / "model"), "--dtype", "fp32", "--device", "cpu"]


def training(folder: Path, output: Path, *words: str) -> list[str]:
    data = ["--train_data", str(folder / "data.jsonl"), "--valid_fraction", "0", "--output_dir", str(output)]
    return on(folder, "train", *data, "--rank", "4", *words)


def spoken(words: list[str], size: int) -> list[tuple[int, str, str]]:
    """Runs a command in several processes; returns the exit code, stdout and stderr of each."""

    def run(rank: int) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            try:
                code = main(words)
            except SystemExit as end:
                code = int(str(end.code))
        return code, out.getvalue(), err.getvalue()

    return together(size, run)


def test_texts_of_two_processes_are_those_of_one(folder: Path, tmp_path: Path) -> None:
    words = on(folder, "generate", "--input", str(folder / "data.jsonl"), "--batch", "3", "--max_new_tokens", "4")
    words += ["--temperature", "1", "--output"]
    assert main([*words, str(tmp_path / "one.jsonl")]) == 0
    whole = (tmp_path / "one.jsonl").read_text(encoding="utf-8")
    (tmp_path / "two.jsonl").write_text(whole[: len(whole) // 3], encoding="utf-8")
    first, second = spoken([*words, str(tmp_path / "two.jsonl")], 2)
    assert (first[0], second) == (0, (0, "", ""))
    assert first[1].count("40 texts in") == 1
    assert (tmp_path / "two.jsonl").read_text(encoding="utf-8") == whole


def test_perplexity_of_two_processes_is_that_of_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = on(folder, "evaluate", str(folder / "data.jsonl"), "--perplexity", "--json")
    capsys.readouterr()
    assert main(words) == 0
    want = json.loads(capsys.readouterr().out)
    first, second = spoken(words, 2)
    assert second == (0, "", "")
    got = json.loads(first[1])
    rounded = {"loss", "PPL", "PPL_word"}
    assert all(got[name] == pytest.approx(want[name], rel=1e-6) for name in rounded)
    assert {n: v for n, v in got.items() if n not in rounded} == {n: v for n, v in want.items() if n not in rounded}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "--sharded"], "unknown arguments"),
        (["train", "--device", "cuda", "--train_data", "DATA"], "start as many processes as there are GPUs"),
        (["train", "--device", "cuda:1", "--train_data", "DATA"], "which 2 processes cannot share"),
        (["train", "--train_data", "nowhere.txt"], "nowhere.txt"),
        (["inspect", "."], "loralib inspect: this command runs in a single process, but 2 were started"),
    ],
)
def test_a_users_mistake_is_told_once_and_ends_all_with_2(
    words: list[str], said: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = spoken([str(folder / "data.jsonl") if word == "DATA" else word for word in words], 2)
    assert (first[0], second[0]) == (2, 2)
    assert said in first[2]
    assert second[1:] == ("", "")


def torchrun(words: list[str], program: tuple[str, ...] = ("-m", "loralib")) -> subprocess.Popen[str]:
    """Starts `torchrun --nproc_per_node 2 -m loralib ...`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", *program]
    return subprocess.Popen(
        [*launcher, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def updates(folder: Path) -> int:
    log = folder / "metrics.jsonl"
    return sum(event["event"] == "train" for event in read_metrics(log)) if log.exists() else 0


def test_torchrun_ends_when_a_rank_is_killed_and_resume_gives_what_one_process_does(
    folder: Path, tmp_path: Path, warm_command: Callable[..., Any]
) -> None:
    flags = ("--save_steps", "1", "--max_steps", "16", "--lr", "0.001")
    assert main(training(folder, tmp_path / "one", *flags)) == 0
    words = training(folder, tmp_path / "two", *flags, "--shard")
    process = torchrun(words)
    try:
        while updates(tmp_path / "two") < 2:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        children = psutil.Process(process.pid).children()
        next(child for child in children if child.environ().get("RANK") == "1").kill()
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    ours = [line for line in err.splitlines() if line.startswith("loralib train:")]
    assert len(ours) == 1, err
    assert "another process of this run has died" in ours[0]
    assert "--resume" in ours[0]
    last = last_checkpoint(tmp_path / "two" / "checkpoints")
    assert last is not None
    assert updates(tmp_path / "two") - last[0].progress.step <= 1, "no more is lost than since the last checkpoint"

    command, _ = warm_command()  # ranks that have imported everything
    process = torchrun([*words, "--resume"], ("--no-python", *command))
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert out.count("Done: ") == 1, "only the first rank speaks"
    assert is_close(tmp_path / "two", tmp_path / "one")
    files = [{path.name for path in (tmp_path / place).iterdir()} for place in ("one", "two")]
    assert files[0] == files[1] - {"loss.png"}, "which is not drawn in this process"


def test_torchrun_shows_a_users_mistake_once(folder: Path, tmp_path: Path) -> None:
    process = torchrun([*training(folder, tmp_path / "run"), "--model", "./nowhere"])
    _, err = process.communicate(timeout=240)
    ours = [line for line in err.splitlines() if line.startswith("loralib train:")]
    assert len(ours) == 1, err
    assert "there is no local directory './nowhere'" in ours[0]
    assert err.count("exitcode  : 2") == 2, "both ranks end with 2"
    assert not (tmp_path / "run").exists()
