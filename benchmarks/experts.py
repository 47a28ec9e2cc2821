"""Memory and time of training an adapter for each expert, compared with the frozen model's forward and backward pass.

python benchmarks/experts.py                     writes benchmarks/experts.json
python benchmarks/experts.py --ways loralib      only some methods; writes nothing
python benchmarks/experts.py --bits              a base in bf16, int8 and nf4: two layers of Qwen3-30B-A3B's shape

Each run is a separate process: a model of Qwen3-MoE's shape with random weights, in fp32, three steps on random tokens.
"Frozen" is the model without an adapter, with a gradient for its embeddings only.  The peak is that of resident memory
beyond what Python used after importing its libraries: weights, adapter, gradients, optimiser and activations.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from memory_use import resident

RESULTS = Path(__file__).with_suffix(".json")
SHAPE = {
    "vocab_size": 8192, "hidden_size": 768, "intermediate_size": 1536, "moe_intermediate_size": 384,
    "num_experts": 32, "num_experts_per_tok": 4, "num_hidden_layers": 6, "num_attention_heads": 12,
    "num_key_value_heads": 4, "head_dim": 64,
}  # fmt: skip
WAYS = ("frozen", "loralib", "peft")
ATTENTION, EXPERTS = ["q_proj", "k_proj", "v_proj", "o_proj"], ["experts.gate_up_proj", "experts.down_proj"]
R = 8
BITS = ("bf16", "int8", "nf4")
QWEN3_30B = {
    "vocab_size": 8192, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 2, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128,
}  # fmt: skip


def measure(way: str, tokens: int, steps: int) -> dict[str, float]:
    """Trains in this process, which has not imported anything yet."""
    import peft
    import torch
    import transformers

    import loralib as lora

    start = resident("VmRSS")
    torch.manual_seed(0)
    model: Any = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SHAPE))
    if way == "frozen":
        model.requires_grad_(False)
    elif way == "loralib":
        lora.inject(model, lora.LoraConfig(r=R, target_modules=ATTENTION, target_parameters=EXPERTS))
    else:
        model = peft.get_peft_model(model, peft.LoraConfig(r=R, target_modules=ATTENTION, target_parameters=EXPERTS))
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained) if trained else None
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        ids = torch.randint(0, SHAPE["vocab_size"], (1, tokens))
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_(way == "frozen")
        model(inputs_embeds=embeddings, labels=ids).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        times.append(time.perf_counter() - began)
    weights = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    return {
        "peak": resident("VmHWM") - start, "weights": weights, "adapter": sum(p.nbytes for p in trained),
        "step_s": min(times),
    }  # fmt: skip


def measure_bits(way: str, tokens: int, steps: int) -> dict[str, float]:
    """Trains on a base in bf16, or quantised, as `loralib train` does; the peak is that of the steps only."""
    import torch
    import transformers

    import loralib as lora
    from loralib.allocator import keep_freed_memory
    from loralib.bases.quant import quantize_model
    from loralib.data import TokenExample
    from loralib.delta import stored_bytes
    from loralib.training.step import make_step

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model: Any = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**QWEN3_30B))
    torch.set_default_dtype(torch.float32)
    if way != "bf16":
        quantize_model(model, way)
    weights = sum(map(stored_bytes, model.parameters()))
    lora.inject(model, lora.LoraConfig(r=R, target_modules="all-linear"))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    rows = torch.randint(0, QWEN3_30B["vocab_size"], (tokens // 64, 64)).tolist()
    batch = [TokenExample(tuple(row), (False,) * 32 + (True,) * 32) for row in rows]
    step = make_step(model.train())
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak
    times = []
    with keep_freed_memory(), step:
        for _ in range(steps):
            began = time.perf_counter()
            step.forward_backward(batch, loss_scale=2 / tokens)
            optimizer.step()
            optimizer.zero_grad()
            times.append(time.perf_counter() - began)
    return {
        "peak": resident("VmHWM"), "weights": weights, "adapter": sum(p.nbytes for p in trained), "step_s": min(times),
    }  # fmt: skip


def in_bits(tokens: list[int], steps: int) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    for count in tokens:
        rows = {}
        for way in BITS:
            rows[way] = in_process(way, count, steps)
            of_bf16 = {name: rows[way][name] / rows["bf16"][name] for name in ("weights", "peak", "step_s")}
            results.append({"way": way, "tokens": count, **rows[way], "of_bf16": of_bf16})
            print(
                f"{count:5} tokens  {way:4} base {rows[way]['weights'] / 2**20:6.0f} MB ({of_bf16['weights']:.3f} "
                f"times bf16's), peak {rows[way]['peak'] / 2**20:6.0f} MB ({of_bf16['peak']:.2f} times), step "
                f"{rows[way]['step_s']:.2f} s ({of_bf16['step_s']:.2f} times)",
                flush=True,
            )
    return results


def in_process(way: str, tokens: int, steps: int) -> dict[str, float]:
    words = [sys.executable, __file__, "--of", way, "--tokens", str(tokens), "--steps", str(steps)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, encoding="utf-8", check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def write(results: dict[str, Any]) -> None:
    from machine import machine  # imports PyTorch, which `measure` must not have done yet

    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    facts = {**known, "machine": machine("transformers", "peft"), **results}
    RESULTS.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--bits", action="store_true", help="compare a base in bf16, int8 and nf4")
    parser.add_argument("--of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.of:
        of = measure_bits if args.of in BITS else measure
        print(json.dumps(of(args.of, args.tokens[0], args.steps)))
        return
    if args.bits:
        write({"shape_in_bits": QWEN3_30B, "in_bits": in_bits(args.tokens, args.steps)})
        return
    results = []
    for tokens in args.tokens:
        rows = {}
        for way in args.ways or WAYS:
            rows[way] = in_process(way, tokens, args.steps)
            frozen = rows.get("frozen", rows[way])
            against = {"peak": rows[way]["peak"] / frozen["peak"], "time": rows[way]["step_s"] / frozen["step_s"]}
            results.append({"way": way, "tokens": tokens, **rows[way], "of_frozen": against})
            print(
                f"{tokens:5} tokens  {way:8} peak {rows[way]['peak'] / 2**20:6.0f} MB ({against['peak']:.2f} times "
                f"frozen's), step {rows[way]['step_s']:.2f} s ({against['time']:.2f} times)",
                flush=True,
            )
    if not args.ways:
        write({"shape": SHAPE, "r": R, "results": results})


if __name__ == "__main__":
    main()
