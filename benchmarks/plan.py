"""The memory that `loralib plan` predicts, compared with what training actually uses.

python benchmarks/plan.py                        writes benchmarks/plan.json
python benchmarks/plan.py --shapes smollm2       only some shapes; writes nothing

Each run is a separate process that trains on random tokens for three updates and saves; the models have random
weights.  The plan is made from the model's config only.  Peaks are those of resident memory beyond what Python uses
when it starts.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from memory_use import resident

RESULTS = Path(__file__).with_suffix(".json")
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 49152, "tie_word_embeddings": True}
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2": LLAMA | {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "max_position_embeddings": 8192,
    },
    "gpt2": {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "resid_pdrop": 0.0, "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "llama-0.4b": LLAMA | {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "num_key_value_heads": 8, "max_position_embeddings": 8192,
    },
}  # fmt: skip
# (examples, tokens per example, whether activations are recomputed)
STEPS = {
    "smollm2": [(1, 64, 0), (4, 256, 0), (8, 512, 0), (8, 512, 1)],
    "gpt2": [(1, 64, 0), (4, 256, 0), (8, 512, 0), (8, 512, 1)],
    "llama-0.4b": [(1, 256, 0), (4, 256, 0), (4, 512, 0), (4, 512, 1)],
}


def measure(directory: str, batch: int, length: int, checkpointing: bool) -> dict[str, float]:
    """Trains in this process, which has not imported anything yet."""
    start = resident("VmRSS")
    import transformers

    import loralib as lora
    from loralib.bases import pick_device, pick_dtype
    from loralib.data import TokenExample

    config = transformers.AutoConfig.from_pretrained(directory)
    dtype = pick_dtype(None, pick_device("cpu"))  # the same as in the plan
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    rng, trained = random.Random(0), (False,) * (length // 2) + (True,) * (length - length // 2)
    data = [TokenExample(tuple(rng.randrange(1000) for _ in range(length)), trained) for _ in range(batch * 3)]
    settings = lora.TrainConfig(
        output_dir=f"{directory}/run", batch_size=batch, seq_len=length, max_steps=3, valid_fraction=0, lr=1e-4,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    lora.train(model, data, settings, verbose=False)
    return {"peak": resident("VmHWM") - start}


def compare(shape: str, batch: int, length: int, checkpointing: bool) -> dict[str, Any]:
    flags = ["--batch_size", str(batch), "--seq_len", str(length)]
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "config.json").write_text(json.dumps(SHAPES[shape]), encoding="utf-8")
        plan = json.loads(output("-m", "loralib", "plan", "--model", directory, "--json", *flags))
        way = plan["choices"][1 if checkpointing else 0]
        of = [directory, str(batch), str(length), str(int(checkpointing))]
        peak = json.loads(output(__file__, "--of", *of).splitlines()[-1])["peak"]
    off = way["total"] / peak - 1
    what = f"{shape} {batch} x {length}{' checkpointing' if checkpointing else ''}"
    print(f"{what:32} planned {way['total'] / 2**20:5.0f} MB, measured {peak / 2**20:5.0f} MB: {off:+.1%}", flush=True)
    return {
        "shape": shape, "batch_size": batch, "seq_len": length, "gradient_checkpointing": bool(checkpointing),
        "planned": way, "peak": peak, "off": round(off, 4),
    }  # fmt: skip


def output(*words: str) -> str:
    done = subprocess.run([sys.executable, *words], stdout=subprocess.PIPE, text=True, encoding="utf-8", check=True)
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES)
    parser.add_argument("--of", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.of:
        directory, *numbers = args.of
        batch, length, checkpointing = map(int, numbers)
        print(json.dumps(measure(directory, batch, length, bool(checkpointing))))
        return
    results = [compare(shape, *step) for shape in args.shapes or SHAPES for step in STEPS[shape]]
    largest = max(abs(each["off"]) for each in results)
    print(f"off by {largest:.1%} at most")
    if not args.shapes:
        from machine import machine  # imports PyTorch, which `measure` must not have done yet

        facts = {"machine": machine("transformers"), "shapes": SHAPES, "results": results, "off_at_most": largest}
        RESULTS.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
