"""Peak memory of a process while it reads a base model of 1.5 billion parameters, entirely or one shard of it.

python benchmarks/loading.py             writes benchmarks/loading.json

The model has a Llama's shape and random weights; its files, of 2.9 GB, are written to a temporary directory.  Peaks are
those of resident memory beyond what the process uses after all imports.  They include memory-mapped files, although the
system can reclaim such pages when it needs them; "private" excludes them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from memory_use import resident

SHAPE = {
    "vocab_size": 49152, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
}  # fmt: skip
RANKS = 4
RESULTS = Path(__file__).with_suffix(".json")


def write_model(directory: str) -> None:
    import torch
    import transformers

    from loralib.bases import load_tokenizer

    config = transformers.LlamaConfig(**SHAPE)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory, max_shard_size="1GB")
    load_tokenizer("smollm2-135m").save_pretrained(directory)


def measure(directory: str, dtype: str) -> dict[str, Any]:
    """Loads the model in this process, or a shard of it under torchrun, and returns peaks and sizes."""
    import torch
    import torch.distributed.tensor
    from accelerate import init_empty_weights  # noqa: F401
    from torch.distributed.fsdp import fully_shard  # noqa: F401

    from loralib.bases import load_base, load_tokenizer
    from loralib.wrapping import decoder_blocks

    mesh = None
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
        size = torch.distributed.get_world_size()
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (size,))
    load_tokenizer(directory)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak
    before, private = resident("VmRSS"), resident("RssAnon")
    peaks, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peaks.append(resident("RssAnon") - private)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model, _ = load_base(directory, dtype=dtype, device="cpu", mesh=mesh)
    done.set()
    watcher.join()
    own = [p.to_local() if mesh is not None else p for p in model.parameters()]
    figures = {
        "weights": sum(p.nbytes for p in own),
        "layer": sum(p.numel() * p.element_size() for p in decoder_blocks(model)[0].parameters()),
        "peak": resident("VmHWM") - before,
        "peak_private": max(peaks),
    }
    if mesh is not None:
        gathered: list[Any] = [None] * mesh.size()
        torch.distributed.all_gather_object(gathered, figures)
        figures = max(gathered, key=lambda each: each["peak"] / each["weights"])
        torch.distributed.destroy_process_group()
    return figures


def run(directory: str, dtype: str, ranks: int) -> dict[str, Any]:
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    command = [*start, __file__, "--of", directory, "--dtype", dtype]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, encoding="utf-8", check=True)
    figures = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    times = figures["peak"] / figures["weights"]
    print(f"{ranks} processes, {dtype}: peak {times:.2f} times a process's weights", flush=True)
    return {"processes": ranks, "dtype": dtype, **figures, "peak_over_weights": round(times, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="bf16", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.of:
        figures = measure(args.of, args.dtype)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(figures))
        return
    with tempfile.TemporaryDirectory() as directory:
        write_model(directory)
        runs = [
            run(directory, dtype, ranks)
            for ranks, dtype in ((RANKS, "bf16"), (RANKS, "fp32"), (1, "bf16"), (1, "fp32"))
        ]
    from machine import machine

    share = runs[0]
    limit = 1.25 * share["weights"] + share["layer"]
    facts = {
        "machine": machine("transformers"),
        "shape": SHAPE,
        "results": runs,
        "peak_over_limit": share["peak"] / limit,
    }
    RESULTS.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
