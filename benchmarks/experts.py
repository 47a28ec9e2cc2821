"""Memory and time of training an adapter for each expert, beside the frozen model's own forward and backward pass.

python benchmarks/experts.py                     writes benchmarks/experts.json
python benchmarks/experts.py --ways loralib      some ways only; writes nothing

Each run is a process of its own: a Qwen3-MoE shape with random weights, in fp32, three steps on random tokens.  Frozen
is the model without an adapter, with a gradient for its embeddings alone.  The peak is that of resident memory above
what Python had when its libraries were there: weights, adapter, gradients, optimiser and activations.
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


def measure(way: str, tokens: int, steps: int) -> dict[str, float]:
    """Trains in this process, which has imported nothing yet."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.of:
        print(json.dumps(measure(args.of, args.tokens[0], args.steps)))
        return
    results = []
    for tokens in args.tokens:
        rows = {}
        for way in args.ways or WAYS:
            words = [sys.executable, __file__, "--of", way, "--tokens", str(tokens), "--steps", str(args.steps)]
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True, encoding="utf-8", check=True)
            rows[way] = json.loads(done.stdout.splitlines()[-1])
            frozen = rows.get("frozen", rows[way])
            against = {"peak": rows[way]["peak"] / frozen["peak"], "time": rows[way]["step_s"] / frozen["step_s"]}
            results.append({"way": way, "tokens": tokens, **rows[way], "of_frozen": against})
            print(
                f"{tokens:5} tokens  {way:8} peak {rows[way]['peak'] / 2**20:6.0f} MB ({against['peak']:.2f} times "
                f"frozen's), step {rows[way]['step_s']:.2f} s ({against['time']:.2f} times)",
                flush=True,
            )
    if not args.ways:
        from machine import machine  # which imports PyTorch: `measure` begins without

        facts = {"machine": machine("transformers", "peft"), "shape": SHAPE, "r": R, "results": results}
        RESULTS.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
