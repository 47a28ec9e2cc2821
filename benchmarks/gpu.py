"""Training speed and memory on a GPU, compared with PEFT with transformers' Trainer, and Unsloth: a process each.

python benchmarks/gpu.py                  all shapes and methods; results go to docs/results/gpu.json, by card
python benchmarks/gpu.py --shapes llama-1b --ways ours,peft --steps 20
python benchmarks/gpu.py --smoke          tiny shapes on any device, to check that everything runs; no results

The shapes are GPT-2 medium, Llama 1B and Llama 8B, with random weights; r = 16 on all linear layers; 4,096 tokens per
step, once as examples as long as the model allows (at most 4,096), once as short ones.  All tokens are trained.  PEFT
trains as its users would: bf16, FlashAttention if installed and otherwise SDPA, examples in one row without padding
(DataCollatorWithFlattening), fused AdamW.  "ours" uses the defaults; "ours, not compiled" is --compile off.

A step covers what the trainer waits for: forward, backward, clipping, AdamW.  Times are medians after `--warmup` steps.
FLOPs are 4 per weight of a product and token (LoRA computes no gradients of the base), 6 for those of factors, plus
those of causal attention; the card's peak is a product of bf16 matrices of 8,192 x 8,192, measured here.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import queue
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if multiprocessing.current_process().name == "unsloth":
    import unsloth as _  # noqa: F401 - before transformers, which it patches

import torch
import transformers
from machine import machine
from torch import nn

import loralib as lora
from loralib.console import say
from loralib.data import TokenExample

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results" / "gpu.json"
RANK, TOKENS = 16, 4096
_LLAMA_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True}
_LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "tie_word_embeddings": False}
_LLAMA = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192}
_NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
SHAPES: dict[str, Callable[[], Any]] = {
    "gpt2-medium": lambda: transformers.GPT2Config(n_embd=1024, n_layer=24, n_head=16, **_NO_DROPOUT),
    "llama-1b": lambda: transformers.LlamaConfig(**_LLAMA, **_LLAMA_1B),
    "llama-8b": lambda: transformers.LlamaConfig(**_LLAMA, **_LLAMA_8B),
}
_TINY = {"vocab_size": 97, "bos_token_id": 0, "eos_token_id": 1}
TINY: dict[str, Callable[[], Any]] = {
    "gpt2-tiny": lambda: transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, **_TINY, **_NO_DROPOUT),
    "llama-tiny": lambda: transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **_TINY
    ),
}
WAYS = ("ours", "ours, not compiled", "peft", "unsloth")


# What is trained.


def base(config: Any, **options: Any) -> nn.Module:
    """Creates a model of this shape with random weights in bf16, on its target device."""
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, **options)


def steps_of(kind: str, config: Any, tokens: int, steps: int) -> list[list[TokenExample]]:
    """The examples of each step, `tokens` in total: as long as the model allows, or of 64 to 512 tokens each."""
    draw = random.Random(0)
    longest = min(tokens, config.max_position_embeddings)
    result = []
    for _ in range(steps):
        left, examples = tokens, []
        while left:
            size = longest if kind == "long" else draw.randint(min(64, left), min(512, left))
            size = left if left - size < 2 else size
            ids = tuple(draw.randrange(3, config.vocab_size) for _ in range(size))
            examples.append(TokenExample(ids, (False, *[True] * (size - 1))))
            left -= size
        result.append(examples)
    return result


def flops_per_token(model: nn.Module, steps: Sequence[Sequence[TokenExample]]) -> float:
    """FLOPs of forward and backward: the frozen base, rank-16 factors on its linear layers, and attention."""
    config: Any = model.config
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    products = sum(m.weight.numel() for m in linears)
    factors = sum(RANK * sum(m.weight.shape) for m in linears if m.weight.shape[0] != config.vocab_size)
    lengths = [len(example) for step in steps for example in step]
    seen = sum(length * length / 2 for length in lengths) / sum(lengths)  # keys of a token, on average
    attention = 12 * config.num_hidden_layers * config.hidden_size * seen  # scores and values, and 2 gradients of each
    return 4 * products + 6 * factors + attention


# The methods.


def ours(config: Any, steps: list[list[TokenExample]], compiles: str) -> list[float]:
    model = base(config)
    with tempfile.TemporaryDirectory() as directory:
        settings = lora.TrainConfig(
            output_dir=directory,
            rank=RANK,
            batch_size=len(steps[0]),
            max_steps=len(steps),
            shuffle=False,
            seq_len=max(len(example) for step in steps for example in step),
            compile=compiles,
        )
        lora.train(model, [example for step in steps for example in step], settings, verbose=False)
        lines = (Path(directory) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line["step_s"] for line in map(json.loads, lines) if line["event"] == "train"]


def by_trainer(model: nn.Module, steps: list[list[TokenExample]]) -> list[float]:
    """Trains with transformers' Trainer, with the examples of a step in one row."""
    seconds: list[float] = []

    class Clock(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            _wait()
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            _wait()
            seconds.append(time.perf_counter() - self.start)

    with tempfile.TemporaryDirectory() as directory:
        settings = transformers.TrainingArguments(
            directory,
            per_device_train_batch_size=len(steps[0]),
            max_steps=len(steps),
            bf16=True,
            optim="adamw_torch_fused",
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
            train_sampling_strategy="sequential",
            use_cpu=not torch.cuda.is_available(),
        )
        data = [{"input_ids": list(example.ids)} for step in steps for example in step]
        trainer = transformers.Trainer(
            model,
            settings,
            train_dataset=data,
            data_collator=transformers.DataCollatorWithFlattening(),
            callbacks=[Clock()],
        )
        trainer.train()
    return seconds


def peft(config: Any, steps: list[list[TokenExample]]) -> list[float]:
    import peft

    flash = torch.cuda.is_available() and find_spec("flash_attn") is not None
    model = base(config, attn_implementation="flash_attention_2" if flash else "sdpa")
    gpt2 = config.model_type == "gpt2"
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", fan_in_fan_out=gpt2
    )
    return by_trainer(peft.get_peft_model(model, settings), steps)


def unsloth(config: Any, steps: list[list[TokenExample]]) -> list[float]:
    """Trains with Unsloth as in its notebooks: it reads a model from a directory, and patches transformers' Trainer."""
    from unsloth import FastLanguageModel

    with tempfile.TemporaryDirectory() as directory:
        base(config).save_pretrained(directory)
        model, _ = FastLanguageModel.from_pretrained(directory, dtype=torch.bfloat16, load_in_4bit=False)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=2 * RANK, target_modules=names, use_gradient_checkpointing=False
    )
    return by_trainer(FastLanguageModel.for_training(model), steps)


# Measurements.


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def gemm_rate(size: int, rounds: int = 10) -> float:
    """The highest rate of a product of bf16 matrices, in FLOP/s."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(rounds):
        _wait()
        start = time.perf_counter()
        a @ b
        _wait()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _peak_memory() -> float:
    """Peak of allocated memory in GiB: on the GPU, or otherwise of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import psutil

    return float(psutil.Process().memory_info().rss) / 2**30


def measure(way: str, shape: str, kind: str, tokens: int, count: int, answer: Any) -> None:
    """Runs one method in its own process, and puts its times, memory and FLOPs per token into a queue."""
    try:
        config = {**SHAPES, **TINY}[shape]()
        steps = steps_of(kind, config, tokens, count)
        if kind == "short":  # batches of one size
            size = min(map(len, steps))
            steps = [step[:size] for step in steps]
        ways: dict[str, Callable[..., list[float]]] = {"peft": peft, "unsloth": unsloth}
        seconds = ways[way](config, steps) if way in ways else ours(config, steps, "auto" if way == "ours" else "off")
        with torch.device("meta"):
            flops = flops_per_token(transformers.AutoModelForCausalLM.from_config(config), steps)
        answer.put((seconds, [sum(map(len, step)) for step in steps], _peak_memory(), flops))
    except Exception as error:
        answer.put(f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else ''}")


def row(way: str, shape: str, kind: str, settings: argparse.Namespace, peak: float) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    count = settings.warmup + settings.steps
    worker = context.Process(target=measure, args=(way, shape, kind, settings.tokens, count, answer), name=way)
    worker.start()
    found: Any = None
    while found is None:
        try:
            found = answer.get(timeout=1)
        except queue.Empty:
            if not worker.is_alive():
                found = f"its process ended with code {worker.exitcode}"
    worker.join()
    if isinstance(found, str):
        return {"shape": shape, "examples": kind, "way": way, "failed": found}
    seconds, tokens, memory, flops = found
    rates = [n / s for n, s in zip(tokens[settings.warmup :], seconds[settings.warmup :], strict=True)]
    rate = statistics.median(rates)
    return {
        "shape": shape,
        "examples": kind,
        "way": way,
        "tokens_per_second": round(rate, 1),
        "peak_memory_gib": round(memory, 2),
        "tflops": round(rate * flops / 1e12, 3),
        "share_of_gemm_peak": round(rate * flops / peak, 3),
        "first_step_s": round(seconds[0], 2),
    }


def main() -> int:
    about, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default=",".join(SHAPES), help="comma list (default: all)")
    parser.add_argument("--ways", default=",".join(way for way in WAYS if "," not in way), help="comma list")
    parser.add_argument("--steps", type=int, default=20, help="steps that count")
    parser.add_argument("--warmup", type=int, default=10, help="steps before them, in which kernels are compiled")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens of a step")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes and few steps, on a CPU as well; no results")
    settings = parser.parse_args()
    if torch.cuda.is_available():
        say(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}")
    else:
        say("There is no GPU here: nothing that follows is a result, or says anything about GPUs.")
        if not settings.smoke:
            say("Use --smoke to see whether the benchmark runs.")
            return 2
    shapes = settings.shapes.split(",")
    if settings.smoke:
        shapes, settings.steps, settings.warmup, settings.tokens = list(TINY), 2, 1, 256
    ways = [*settings.ways.split(",")]
    if "ours" in ways:
        ways.insert(ways.index("ours") + 1, "ours, not compiled")
    peak = gemm_rate(256 if settings.smoke else 8192)
    say(f"Products of bf16 matrices reach {peak / 1e12:.3g} TFLOP/s.")
    rows = []
    for shape in shapes:
        for kind in ("long", "short"):
            for way in ways:
                if way == "unsloth" and (find_spec("unsloth") is None or shape.startswith("gpt2")):
                    continue
                rows.append(row(way, shape, kind, settings, peak))
                say(json.dumps(rows[-1]))
    if not settings.smoke:
        card = torch.cuda.get_device_name()
        results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        facts = {"machine": machine("transformers", "peft"), "gemm_tflops": peak / 1e12, "command": sys.argv}
        results[card] = {**facts, "results": rows}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 1 if settings.smoke and any("failed" in each for each in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
