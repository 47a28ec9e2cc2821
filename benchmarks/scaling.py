"""Expected scaling to many GPUs, derived from a step's computation and communication: tables of docs/scaling.md.

python benchmarks/scaling.py

Nothing here was measured on GPUs.  The assumptions:

- a GPU computes 400 TFLOP/s in bf16, which NeMo AutoModel publishes for such training on an H100;
- a token costs 4 FLOPs per weight of the base's linear layers: a forward product, and one for its input's gradient;
- each GPU in a machine of eight sends 300 GB/s, and 40 GB/s to other machines (NVLink; 400 Gb/s at 80 %);
- each message in a ring takes another 10 microseconds;
- gradients are summed after the backward pass; gathering weights overlaps with computation.
"""

from __future__ import annotations

from typing import Any

import torch

import loralib as lora
from loralib.budget import traffic, training_budget

FLOPS, INSIDE, BETWEEN, LATENCY = 400e12, 300e9, 40e9, 10e-6
PER_MACHINE, GPUS = 8, (8, 64, 512)
TOKENS = 8192  # per step on each GPU
SHAPES: dict[str, dict[str, Any]] = {
    "Llama 8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "Llama 70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}


def model_of(shape: str) -> Any:
    """Builds a model without weights, with an adapter of r = 16 on all linear layers."""
    import transformers

    config = transformers.LlamaConfig(**SHAPES[shape], vocab_size=128256, num_key_value_heads=8)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    lora.inject(model, lora.LoraConfig(r=16, target_modules="all-linear"))
    return model


def seconds(model: Any, gpus: int, sharded: bool) -> float:
    """Returns the time of a step."""
    linears = sum(p.numel() for p in model.parameters() if not p.requires_grad and p.dim() == 2)
    linears -= model.get_input_embeddings().weight.numel()
    compute = 4 * linears * TOKENS / FLOPS
    sent = traffic(model, gpus, sharded=sharded)
    bandwidth = INSIDE if gpus <= PER_MACHINE else BETWEEN
    reduce = sent["reduced"] / bandwidth + 2 * (gpus - 1) * LATENCY
    blocks = 2 * len(model.model.layers) + 1
    gather = sent["gathered"] / bandwidth + (blocks * (gpus - 1) * LATENCY if sharded else 0)
    return max(compute, gather) + reduce


def rows() -> list[list[str]]:
    """Returns the table: memory per GPU, total tokens per second, and the fraction of ideal scaling."""
    table = []
    for shape in SHAPES:
        model = model_of(shape)
        linears = sum(p.numel() for p in model.parameters() if not p.requires_grad and p.dim() == 2)
        linears -= model.get_input_embeddings().weight.numel()
        alone = 4 * linears * TOKENS / FLOPS
        for sharded in (False, True):
            for gpus in GPUS:
                budget = training_budget(
                    model, TOKENS, checkpointing=True, processes=gpus, sharded=sharded, device="cuda"
                )
                took = seconds(model, gpus, sharded)
                name = f"{shape}, {'sharded' if sharded else 'data parallel'}"
                sent = sum(traffic(model, gpus, sharded=sharded).values())
                table.append(
                    [name, str(gpus), f"{budget.total / 2**30:.0f} GB", f"{sent / 1e9:.2f} GB",
                     f"{gpus * TOKENS / took:,.0f}", f"{alone / took:.0%}"]
                )  # fmt: skip
    return table


def main() -> None:
    for row in rows():
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
