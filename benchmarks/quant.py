"""Frozen weights in 8 and 4 bits: time, memory and learning, compared with bf16 and with PEFT with bitsandbytes.

python benchmarks/quant.py steps     a training step at several lengths: SmolLM2, and Llama shapes with random weights
python benchmarks/quant.py fits      a complete 7B Llama shape in NF4, in one process: its peak memory
python benchmarks/quant.py learns    the loss on E2E after an epoch, 3 seeds, and PEFT's with bitsandbytes: an hour
python benchmarks/quant.py peaks     peak memory of a process that reads the base and takes three steps

Each writes its part of benchmarks/quant.json.  Methods run their steps in turn; minima, and medians of ratios.  For the
larger shapes, only two layers are timed, together with their full embedding and head.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import train as bench
import transformers
from machine import machine
from memory_use import peak_bytes
from operators import in_turn
from torch import nn

import loralib as lora
from loralib.allocator import keep_freed_memory
from loralib.bases.quant import Int8Weight, NF4Weight, is_quantized_table, linears_of
from loralib.console import say, size, table
from loralib.data import TokenExample
from loralib.delta import stored_bytes
from loralib.training.memory import freeze_objects
from loralib.training.objective import evaluate_loss
from loralib.training.step import make_step

HERE = Path(__file__).resolve().parent
KINDS = (None, "int8", "nf4", "int8+tables", "nf4+tables")
LENGTHS = (256, 512)
WAYS = tuple(kind or "bf16" for kind in KINDS)
# PEFT with bitsandbytes' NF4, and whether it is evaluated halfway, after which its layers are repacked.
PEERS = {"peft": False, "peft evaluated": True}
SHAPES: dict[str, dict[str, int]] = {
    "1.5b": {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_hidden_layers": 27},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 32},
}


def shape(name: str, layers: int | None = None) -> transformers.LlamaConfig:
    """The config of a Llama of that size, or of some of its layers."""
    sizes = SHAPES[name] | ({} if layers is None else {"num_hidden_layers": layers})
    return transformers.LlamaConfig(vocab_size=32000, **sizes)


def random_model(config: transformers.LlamaConfig, kind: str | None) -> Any:
    """Creates random weights, each quantised at once, so that the model is never in memory in 16 bits."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).bfloat16()
    for linear in linears_of(model):
        linear.weight = nn.Parameter(random_weight(linear.weight.shape, kind), requires_grad=False)
    for module in model.modules():
        if kind is not None and is_quantized_table(module, model, kind):
            module.weight = nn.Parameter(random_weight(module.weight.shape, "int8"), requires_grad=False)
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                value = torch.ones if parameter.dim() == 1 else lambda s, dtype: torch.randn(s, dtype=dtype) * 0.02
                module._parameters[name] = nn.Parameter(value(parameter.shape, dtype=torch.bfloat16), False)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


def random_weight(size: torch.Size, kind: str | None) -> torch.Tensor:
    if kind is None:
        return torch.randn(size, dtype=torch.bfloat16) * 0.02
    count, kind = size.numel(), kind.removesuffix("+tables")
    if kind == "int8":
        parts = {"codes": torch.randint(-127, 128, size, dtype=torch.int8), "scales": torch.full(size[:1], 4e-4)}
        return Int8Weight(parts, size, torch.bfloat16, False, torch.zeros(64))
    parts = {
        "codes": torch.randint(0, 256, (count // 2,), dtype=torch.uint8),
        "absmax_codes": torch.randint(0, 256, (count // 64,), dtype=torch.uint8),
        "absmax_scales": torch.full((-(-count // 64 // 256),), 0.01),
        "offset": torch.tensor(0.05),
    }
    return NF4Weight(parts, size, torch.bfloat16, False, torch.zeros(64))


def adapted(model: Any) -> Any:
    torch.manual_seed(0)
    lora.inject(model, lora.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    return model


def step_of(model: Any, tokens: int) -> Callable[[], Any]:
    """Returns a function that runs a step on this many tokens, in examples of 64 with the second half trained."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 30000, (tokens // 64, 64), generator=generator).tolist()
    batch = [TokenExample(tuple(row), (False,) * 32 + (True,) * 32) for row in rows]
    step = make_step(model)
    return lambda: step.forward_backward(batch, loss_scale=1 / (tokens // 2))


def base_bytes(model: Any) -> tuple[int, int]:
    """Bytes of the base, and of those linear layers in it that quantisation would affect."""
    linears = sum(stored_bytes(linear.weight) for linear in linears_of(model))
    return sum(map(stored_bytes, {id(p): p for p in model.parameters()}.values())), linears


def other_layers(name: str, model: Any) -> int:
    """Bytes of the layers of a larger shape beyond the two that are timed."""
    if name not in SHAPES:
        return 0
    of_two = sum(map(stored_bytes, model.model.layers.parameters()))
    return of_two * (SHAPES[name]["num_hidden_layers"] - 2) // 2


def steps(rounds: int) -> dict[str, Any]:
    """Measures step times and sizes."""
    found: dict[str, Any] = {}
    for name in ("smollm2", *SHAPES):
        sizes: dict[str, Any] = {}
        ways: dict[str, dict[int, Callable[[], Any]]] = {}
        for kind in KINDS:
            if name == "smollm2":
                model = lora.load_base(dtype="bf16", quantize=kind)[0]
            else:
                model = random_model(shape(name, 2), kind)
            whole, linears = base_bytes(model)
            sizes[kind or "bf16"] = {"base_bytes": whole + other_layers(name, model), "linears_bytes": linears}
            adapted(model)
            ways[kind or "bf16"] = {tokens: step_of(model, tokens) for tokens in LENGTHS}
        times = {}
        for tokens in LENGTHS:
            times[str(tokens)] = in_turn({kind: of[tokens] for kind, of in ways.items()}, rounds)
            rows = [
                [kind, f"{t['seconds']:.3f} s", f"{t['ratio']:.3f}", f"{t['median_ratio']:.3f}"]
                for kind, t in times[str(tokens)].items()
            ]
            say(table(rows, header=[f"{name}, {tokens} tokens", "", "", "median"]))
        base = sizes["bf16"]["base_bytes"]
        shares = [[kind, f"{of['base_bytes'] / base:.3f}"] for kind, of in sizes.items()]
        say(table(shares, header=[f"{name}, whole base", ""]))
        found[name] = {"sizes": sizes, "times": times}
        del ways
        gc.collect()
    return found


def fits() -> dict[str, Any]:
    """Takes two steps of the complete 7B shape in NF4, with AdamW, in this process."""
    model = adapted(random_model(shape("7b"), "nf4"))
    run = step_of(model, 256)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        run()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    peak = peak_bytes()
    found = {"peak_bytes": peak, "base_bytes": base_bytes(model)[0], "step_s": seconds}
    say(f"7B in NF4, 256 tokens a step: peak {peak / 1e9:.2f} GB, {seconds[-1]:.1f} s a step")
    return found


def run(way: str, updates: int, seed: int, examples: int) -> dict[str, Any]:
    """Trains one run, in a single-threaded process."""
    words = [sys.executable, __file__, "one", "--ways", way, "--updates", str(updates), "--seed", str(seed)]
    words += ["--examples", str(examples)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, check=True, capture_output=True, encoding="utf-8", env=environment)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def learns(ways: Sequence[str], updates: int, seeds: int) -> dict[str, Any]:
    """Returns validation losses on E2E after this many updates of 8 examples."""
    found: dict[str, Any] = {"updates": updates, "ways": {}}
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # one run per core: faster than runs in turn on all cores
        counts = {way: 1 if way in PEERS else seeds for way in ways}
        runs = {way: [pool.submit(run, way, updates, n, 200) for n in range(counts[way])] for way in ways}
        for way, futures in runs.items():
            results = [future.result() for future in futures]
            found["ways"][way] = {name: [each[name] for each in results] for name in ("loss_before", "loss", "step_s")}
            say(f"{way}: {found['ways'][way]}")
    return with_ratios(found)


def with_ratios(found: dict[str, Any]) -> dict[str, Any]:
    """Adds the mean loss of each method divided by that of bf16 with the same seeds."""
    losses = {way: of["loss"] for way, of in found["ways"].items()}
    if "bf16" not in losses:
        return found
    bf16 = losses["bf16"]
    ratios = {way: statistics.mean(of) / statistics.mean(bf16[: len(of)]) for way, of in losses.items()}
    say(table([[way, f"{ratio:.4f}"] for way, ratio in ratios.items()], header=["loss", ""]))
    return found | {"loss_beside_bf16": ratios}


def peaks(ways: Sequence[str]) -> dict[str, int]:
    """Returns the peak memory of a process that reads the base and takes three steps of 8 examples."""
    found = {way: run(way, 3, 0, 8)["peak_bytes"] for way in ways}
    say(table([[way, size(peak)] for way, peak in found.items()], header=["peak memory", ""]))
    return found


def one(way: str, updates: int, seed: int, examples: int) -> dict[str, float | None]:
    """Trains one run: validation loss before and after, the fastest step, peak memory."""
    train, valid = bench.e2e("train"), bench.e2e("valid")[:examples]
    batches = bench.batches(train, 8, bench.SIBLINGS, seed)[:updates]
    torch.manual_seed(seed)
    if way in PEERS:
        model = peft_model()
        half = updates // 2 if PEERS[way] else None
        step, loss_of = functools.partial(peft_step, model), functools.partial(peft_loss, model)
    else:
        kind = None if way == "bf16" else way
        model = lora.load_base(dtype="bf16", quantize=kind)[0]
        lora.inject(model, lora.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
        ours, half = make_step(model), None
        step, loss_of = functools.partial(our_step, ours), functools.partial(evaluate_loss, ours, model)
    # With bitsandbytes, the initial loss is not measured, because an evaluation would repack its layers.
    before = None if way in PEERS else loss_of(valid)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4, weight_decay=0)
    seconds = []
    for number, batch in enumerate(batches):
        if number == half:
            loss_of(valid[:8])
        start = time.perf_counter()
        step(batch)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return {"loss_before": before, "loss": loss_of(valid), "step_s": min(seconds), "peak_bytes": peak_bytes()}


def our_step(step: Any, batch: Sequence[TokenExample]) -> None:
    step.forward_backward(batch, loss_scale=1 / sum(sum(example.trained) for example in batch))


def peft_model() -> Any:
    """PEFT over bitsandbytes' NF4, as in its guide."""
    import peft

    with tempfile.TemporaryDirectory() as directory:
        lora.load_base(dtype="bf16")[0].save_pretrained(directory)
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.bfloat16, quantization_config=config
        )
    settings = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, settings).train()


def peft_step(model: Any, batch: Sequence[TokenExample]) -> None:
    padded(model, batch).backward()  # type: ignore[no-untyped-call]


def padded(model: Any, batch: Sequence[TokenExample]) -> torch.Tensor:
    """The loss of a padded batch, as transformers computes it."""
    width = max(map(len, batch))
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    labels = torch.full((len(batch), width), -100)
    mask = torch.zeros(len(batch), width, dtype=torch.long)
    for row, example in enumerate(batch):
        ids[row, : len(example)] = torch.tensor(example.ids)
        mask[row, : len(example)] = 1
        for place, trained in enumerate(example.trained):
            if trained:
                labels[row, place] = example.ids[place]
    return model(input_ids=ids, attention_mask=mask, labels=labels).loss  # type: ignore[no-any-return]


@torch.no_grad()
def peft_loss(model: Any, examples: Sequence[TokenExample]) -> float:
    model.eval()
    total = count = 0.0
    for start in range(0, len(examples), 8):
        batch = examples[start : start + 8]
        trained = sum(sum(example.trained) for example in batch)
        total, count = total + float(padded(model, batch)) * trained, count + trained
    model.train()
    return total / count


def main() -> None:
    """Measures the requested parts and writes them to the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("steps", "fits", "learns", "peaks", "one"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--updates", type=int, default=249, help="of 8 examples; an epoch has 249")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", default=[*WAYS, *PEERS], choices=[*WAYS, *PEERS])
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--examples", type=int, default=200, help=argparse.SUPPRESS)
    args = parser.parse_args()
    with keep_freed_memory(), freeze_objects():
        if args.what == "one":
            say(json.dumps(one(args.ways[0], args.updates, args.seed, args.examples)))
            return
        if args.what == "steps":
            found = steps(args.rounds)
        elif args.what == "fits":
            found = fits()
        elif args.what == "peaks":
            found = peaks(args.ways)
        else:
            found = learns(args.ways, args.updates, args.seeds)
    path = HERE / "quant.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    libraries = ["transformers", *(["peft", "bitsandbytes"] if args.what in ("learns", "peaks") else [])]
    known[args.what] = {"machine": machine(*libraries), **found}
    path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
