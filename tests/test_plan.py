"""`loralib plan`: memory estimates match what a step keeps, and proposed commands exist."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import loralib as lora
from loralib.budget import _kept_per_token, cache_per_token, require_room, traffic, training_budget
from loralib.cli import main, parser_of
from loralib.data import TokenExample
from loralib.engine.placement import engine_mode
from loralib.errors import BaseModelError
from loralib.injection import adapted_layers
from loralib.training.ranks import joined
from loralib.training.step import make_step
from loralib.wrapping import decoder_blocks

ROOT = Path(__file__).resolve().parent.parent
LLAMA_8B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "tie_word_embeddings": False,
}  # fmt: skip
GB = 2**30


@pytest.fixture
def llama(tmp_path: Path) -> str:
    """A directory with a config.json and nothing else."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B), encoding="utf-8")
    return str(tmp_path)


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs the command with --json."""

    def run(*words: str) -> Any:
        code = main(["plan", *words, "--json"])
        facts = json.loads(capsys.readouterr().out)
        assert code == (0 if facts["command"] else 1)
        return facts

    return run


def test_weights_and_adapter_are_counted(llama: str, plan: Callable[..., Any]) -> None:
    facts = plan("--model", llama, "--gpus", "8", "--gpu_memory", "80", "--rank", "16")
    assert facts["parameters"] == 8_030_261_248
    alone, _, spread, _ = facts["choices"]
    trained = 16 * 32 * (4 * 4096 + (4096 + 1024) * 2 + 4096 * 2 + 3 * (4096 + 14336) - 4096 * 2)
    assert alone["weights"] == 2 * 8_030_261_248
    assert spread["weights"] == alone["weights"] / 8
    assert alone["optimizer"] == alone["adapter"] == alone["gradients"] == 8 * trained
    block = 2 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096)
    assert spread["gathered"] == 2 * block + 2 * (2 * 128256 * 4096 + 4096)


@pytest.mark.parametrize(
    ("quantize", "extra"), [("nf4", 0), ("int8", 4 * 32 * (2 * 4096 + 2 * 1024 + 2 * 14336 + 4096))]
)
def test_quantised_linears_have_their_bits(llama: str, plan: Callable[..., Any], quantize: str, extra: int) -> None:
    words = ["--model", llama, "--gpus", "1", "--gpu_memory", "24", "--quantize", quantize]
    linears = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    rest = 2 * (8_030_261_248 - linears)
    # NF4 in blocks of 64 with a scale of 8 bits each, and an fp32 scale of every 256 of these (arXiv:2305.14314).
    bits = {"int8": 8.0, "nf4": 4 + 8 / 64 + 32 / (64 * 256)}
    assert plan(*words)["choices"][0]["weights"] == pytest.approx(linears * bits[quantize] / 8 + rest + extra)
    assert bits["nf4"] == pytest.approx(4.127, abs=1e-3)


def test_quantised_tables_have_a_byte_a_number_and_a_scale_a_row(llama: str, plan: Callable[..., Any]) -> None:
    words = ["--model", llama, "--gpus", "1", "--gpu_memory", "24", "--quantize"]
    before, after = (plan(*words, kind)["choices"][0]["weights"] for kind in ("nf4", "nf4+tables"))
    assert before - after == 2 * 128256 * (4096 - 4)


def test_keys_and_values_are_counted(llama: str, plan: Callable[..., Any]) -> None:
    words = ["--model", llama, "--gpus", "1", "--gpu_memory", "40", "--serve", "--requests", "32"]
    facts = plan(*words, "--context", "4096")
    (way,) = facts["choices"]
    assert way["cache"] == 32 * 4096 * 32 * 2 * 8 * 128 * 2 == 16 * GB
    assert facts["command"].endswith(f"--cache_tokens {32 * 4096}")
    assert plan(*words, "--context", "8192")["command"] is None


COMMANDS = {
    "enough memory": (["--gpus", "8", "--gpu_memory", "80", "--batch_size", "64"], ["torchrun", "--batch_size 64"]),
    "several machines": (
        ["--gpus", "8", "--nodes", "4", "--gpu_memory", "80"],
        ["torchrun --nnodes 4 --rdzv_backend c10d", "--nproc_per_node 8"],
    ),
    "activations do not fit": (
        ["--gpus", "1", "--gpu_memory", "24", "--batch_size", "64", "--seq_len", "2048"],
        ["loralib train", "--gradient_checkpointing", "--grad_accum", "--seq_len 2048"],
    ),
    "weights do not fit": (["--gpus", "8", "--gpu_memory", "12"], ["--shard"]),
    "other settings": (
        ["--gpus", "1", "--gpu_memory", "80", "--rank", "4", "--target_modules", "q_proj", "v_proj"],
        ["--rank 4", "--target_modules q_proj,v_proj"],
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_is_one(name: str, llama: str, plan: Callable[..., Any]) -> None:
    words, parts = COMMANDS[name]
    command = plan("--model", llama, *words)["command"]
    assert all(part in command for part in parts), command
    flags = shlex.split(command)
    args: Any = parser_of("train").parse(flags[flags.index("train") + 1 :])  # type: ignore[attr-defined]
    assert args.model == llama
    total = (args.batch_size or 8) * (args.grad_accum or 1)
    assert total >= int(words[words.index("--batch_size") + 1]) if "--batch_size" in words else 8


def test_nothing_fits(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", llama, "--gpus", "1", "--gpu_memory", "8"]) == 1
    out = capsys.readouterr().out
    assert "Nothing fits. What would help: " in out
    assert "add --quantize nf4" in out


def test_the_default_base_is_planned_for_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--batch_size", "2", "--seq_len", "64"]) == 0
    out = capsys.readouterr().out
    assert "0.13 billion parameters in 30 blocks" in out
    assert out.rstrip().endswith(
        "loralib train --model smollm2-135m --train_data train.jsonl --batch_size 2 --seq_len 64"
    )


def test_all_faults_are_told_at_once(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--gpu_memory", "80", "--nodes", "2", "--rank", "0", "--requests", "0", "--serve"]
    assert main(["plan", "--model", llama, *words]) == 2
    err = capsys.readouterr().err
    for part in (
        "gpu_memory is 80, but no GPUs are planned for",
        "nodes is 2, but no GPUs are planned for",
        "rank is 0",
        "requests is 0",
    ):
        assert part in err or part.startswith(("gpu_memory", "nodes")), err
    assert main(["plan", "--model", "./nowhere"]) == 2
    assert "there is no local directory './nowhere'" in capsys.readouterr().err


# What a step keeps.

FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"num_key_value_heads": 2},
    "Qwen3": {"num_key_value_heads": 2, "head_dim": 32},
    "GPT2": {},
}


def small(kind: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    import transformers

    sizes = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3, "num_attention_heads": 4}
    if kind == "GPT2":
        sizes = {"n_embd": 128, "n_layer": 3, "n_head": 4, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    config = getattr(transformers, f"{kind}Config")(**(sizes | {"vocab_size": 64, "pad_token_id": 0} | FAMILIES[kind]))
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


@pytest.mark.bf16_units
@pytest.mark.parametrize("targets", ["all-linear", "attention alone"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_step_keeps_what_the_budget_says(kind: str, targets: str) -> None:
    from loralib.engine.kernels import loaded

    if engine_mode() == "off" or loaded() is None:
        pytest.skip("without the kernels PyTorch's own operators keep more")
    model, attention = small(kind), ["c_attn"] if kind == "GPT2" else ["q_proj", "v_proj"]
    lora.inject(model, lora.LoraConfig(r=4, target_modules=targets if targets == "all-linear" else attention))
    examples = [TokenExample(tuple(range(1, 60)), (True,) * 59)] * 4
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    model.train()
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        make_step(model, share_prompts=False) as step,
    ):
        tokens = step.forward_backward(examples, loss_scale=1.0).processed_tokens
    measured = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own) / tokens
    layers = {layer for _, layer in adapted_layers(model)}
    assert sum(_kept_per_token(b, layers, False) for b in decoder_blocks(model)) == pytest.approx(measured, rel=0.08)


def test_recomputing_keeps_a_row_of_each_block() -> None:
    model = small("Llama")
    lora.inject(model, lora.LoraConfig(r=4, target_modules="all-linear"))
    kept, again = (training_budget(model, 10**6, checkpointing=each) for each in (False, True))
    assert again.activations < kept.activations / 2
    assert again.rows() | {"activations": 0} == kept.rows() | {"activations": 0}


def test_what_has_no_room_is_refused_before_it_is_loaded() -> None:
    model = small("Llama")
    require_room(model, "mine", 4, None)
    with pytest.raises(BaseModelError, match=r"each of 4 processes needs .* of mine .* `loralib plan --model mine"):
        require_room(model, "mine", 4, 1000.0)


def test_the_cache_has_keys_and_values_of_all_layers() -> None:
    assert cache_per_token(small("Qwen3")) == 3 * 2 * 2 * 32 * 2
    assert cache_per_token(small("GPT2")) == 3 * 2 * 128 * 2


# What processes send.


@pytest.mark.distributed
@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")
@pytest.mark.parametrize(("size", "sharded"), [(2, False), (2, True), (4, True)])
def test_processes_send_what_the_formula_says(
    size: int, sharded: bool, load_file: Callable[[Path], ModuleType], tmp_path: Path
) -> None:
    """In a ring: a fraction (N - 1) / N of what is gathered, twice that of what is reduced; tensors are counted."""
    start = load_file(Path(__file__).with_name("test_ranks.py")).together

    def count(rank: int) -> tuple[int, int]:
        counts = {"reduced": 0, "gathered": 0}
        dist: Any = torch.distributed
        gathering = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
        reduce, gather = dist.all_reduce, getattr(dist, gathering)

        def all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            counts["reduced"] += tensor.nbytes
            return reduce(tensor, *args, **kwargs)

        def all_gather(*args: Any, **kwargs: Any) -> Any:
            counts["gathered"] += max(t.nbytes for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor))
            return gather(*args, **kwargs)

        results = []
        examples = [TokenExample(tuple(range(1, 20 + n)), (True,) * (19 + n)) for n in range(8)]
        with joined():
            for steps in (1, 3):  # what comes at the start and the end is the same
                counts.update(reduced=0, gathered=0)
                dist.all_reduce = all_reduce
                setattr(dist, gathering, all_gather)
                config = lora.TrainConfig(
                    output_dir=str(tmp_path / f"{size}-{sharded}-{steps}"), rank=4, lr=1e-3, batch_size=8,
                    max_steps=steps, num_epochs=9, valid_fraction=0, shard=sharded, warmup_steps=0,
                )  # fmt: skip
                lora.train(small("Llama", torch.float32), examples, config, verbose=False)
                dist.all_reduce = reduce
                setattr(dist, gathering, gather)
                results.append((counts["reduced"], counts["gathered"]))
        return (results[1][0] - results[0][0]) // 2, (results[1][1] - results[0][1]) // 2

    counted = start(size, count)
    assert not [each for each in counted if isinstance(each, BaseException)], counted
    model = small("Llama", torch.float32)
    lora.inject(model, lora.LoraConfig(r=4, target_modules="all-linear"))
    told, sent = traffic(model, size, sharded=sharded), (size - 1) / size
    for reduced, gathered in counted:
        assert reduced == pytest.approx(told["reduced"] / (2 * sent), rel=0.01)  # and a few numbers more
        assert gathered == pytest.approx(told["gathered"] / sent, rel=0.01)


# What was measured, and what is expected.


def test_the_benchmark_agrees() -> None:
    facts = json.loads((ROOT / "benchmarks" / "plan.json").read_text(encoding="utf-8"))
    assert facts["off_at_most"] == max(abs(run["off"]) for run in facts["results"])
    assert facts["off_at_most"] <= 0.15
    loading = json.loads((ROOT / "benchmarks" / "loading.json").read_text(encoding="utf-8"))
    share = loading["results"][0]
    assert share["processes"] == 4
    assert share["peak"] <= 1.25 * share["weights"] + share["layer"]


def test_the_table_of_many_gpus_is_the_scripts(
    load_file: Callable[[Path], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = load_file(ROOT / "benchmarks" / "scaling.py").rows()
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert "\n".join("| " + " | ".join(row) + " |" for row in rows) in text
