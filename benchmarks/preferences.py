"""Training on preferences: our steps compared with TRL's, in the configurations that are fastest on a CPU.

python benchmarks/preferences.py [--rounds 3] [--sizes 2 4] [--objectives dpo orpo]

SmolLM2-135M in bf16, LoRA r=16 on all linear layers (in TRL by PEFT), AdamW.  Reference log-probabilities are
precomputed on both sides.  TRL runs without gradient checkpointing (its default, which is slower), once with weights
and arithmetic in bf16 and once under autocast (its default); its batches come from its own collator and contain pairs
of similar lengths, so that there is little padding.  Three kinds of pairs of random tokens (only lengths affect speed):

- "dialogue": answers to multi-turn conversations, about as long as in Anthropic's helpfulness data, for which the
  Llama 2 paper (arXiv:2307.09288, table 6) counts 251 tokens per example and 88 per answer;
- "chat": single questions and longer answers (median 120 and 150 tokens);
- "short": prompts of about 40 and answers of about 25 tokens, as in E2E.

Methods run their steps in turn, on the same pairs; minima and medians of ratios.  The products of the base's weights
with the rows that a packed step computes are measured in the same run: no step can take less.  Writes to
benchmarks/preferences.json, where results of other kinds are kept.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import machine
from operators import in_turn
from products import seconds_of_products

import loralib as lora
from loralib.allocator import keep_freed_memory
from loralib.console import say, table
from loralib.data import PreferencePair, TokenExample
from loralib.data.packing import pack
from loralib.training.memory import freeze_objects
from loralib.training.preferences import PREFERENCE_STEPS
from loralib.training.step import make_step

HERE = Path(__file__).resolve().parent
LENGTHS = {
    "dialogue": ((163, 0.6, 512), (88, 0.6, 512)),
    "chat": ((120, 0.6, 512), (150, 0.6, 512)),
    "short": ((40, 0.2, 80), (25, 0.3, 60)),
}
WAYS = ("bf16", "autocast")
RATE = 1e-5


def pairs_of(kind: str, count: int) -> list[PreferencePair]:
    """Returns pairs of random tokens with log-normal lengths: (median, sigma, maximum)."""
    rng = random.Random(0)

    def some(median: int, sigma: float, most: int) -> tuple[int, ...]:
        length = max(2, min(most, round(median * rng.lognormvariate(0, sigma))))
        return tuple(rng.randrange(10, 40000) for _ in range(length))

    pairs = []
    for _ in range(count):
        prompt = some(*LENGTHS[kind][0])
        answers = [some(*LENGTHS[kind][1]) for _ in range(2)]
        rows = [TokenExample(prompt + a, (False,) * len(prompt) + (True,) * len(a)) for a in answers]
        pairs.append(
            PreferencePair(rows[0].ids, rows[0].trained, rows[1], (-1.5 * len(answers[0]), -1.5 * len(answers[1])))
        )
    return pairs


def base() -> tuple[Any, Any]:
    """The default base in bf16, and its tokenizer."""
    return lora.load_base(dtype="bf16", device="cpu")


def ours(objective: str) -> Callable[[Sequence[PreferencePair]], float]:
    """Returns a function that runs our step, including its update."""
    model = base()[0]
    torch.manual_seed(0)
    lora.inject(model, lora.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    step = make_step(model, kind=partial(PREFERENCE_STEPS[objective], beta=0.1))
    assert step.packing
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    model.train()

    def run(pairs: Sequence[PreferencePair]) -> float:
        stats = step.forward_backward(pairs, loss_scale=step.scales([pairs])[0])
        optimizer.step()
        optimizer.zero_grad()
        return float(stats.objective)

    return run


def theirs(objective: str, way: str) -> Callable[[Sequence[PreferencePair]], float]:
    """Returns a function that runs a step of TRL's trainer, including its update, on batches from its collator."""
    from datasets import Dataset
    from peft import LoraConfig

    if objective == "dpo":
        from trl import DPOConfig as Config
        from trl import DPOTrainer as Trainer
    else:
        from trl.experimental.orpo import ORPOConfig as Config
        from trl.experimental.orpo import ORPOTrainer as Trainer
    model, tokenizer = base()
    options: dict[str, Any] = {"max_length": None} if objective == "dpo" else {"max_length": 4096}
    arguments = Config(
        output_dir=tempfile.mkdtemp(), beta=0.1, learning_rate=RATE, bf16=way == "autocast", use_cpu=True,
        gradient_checkpointing=False, report_to=[], **options,
    )  # fmt: skip
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    rows = [{"prompt": "a", "chosen": " b", "rejected": " c"}]
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=adapter,
    )
    trainer.precompute_ref_logps = True
    optimizer = torch.optim.AdamW([p for p in trainer.model.parameters() if p.requires_grad], lr=RATE)
    trainer.model.train()

    def run(pairs: Sequence[PreferencePair]) -> float:
        batch = trainer.data_collator([as_trl(pair, objective) for pair in pairs])
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return run


def as_trl(pair: PreferencePair, objective: str) -> dict[str, Any]:
    """Converts a pair to the input of TRL's collators."""
    start = len(pair.prompt)
    if objective == "dpo":
        assert pair.reference is not None
        return {
            "prompt_ids": list(pair.prompt),
            "chosen_ids": list(pair.ids[start:]),
            "rejected_ids": list(pair.rejected.ids[start:]),
            "ref_chosen_logps": pair.reference[0],
            "ref_rejected_logps": pair.reference[1],
        }
    result: dict[str, Any] = {"prompt_input_ids": list(pair.prompt), "prompt_attention_mask": [1] * start}
    for name, row in zip(("chosen", "rejected"), pair.rows, strict=True):
        result[f"{name}_input_ids"] = list(row.ids)
        result[f"{name}_attention_mask"] = [1] * len(row)
        result[f"{name}_labels"] = [-100] * start + list(row.ids[start:])
    return result


def measure(objective: str, kind: str, sizes: Sequence[int], rounds: int) -> dict[str, Any]:
    """Measures the seconds per step of each method at each batch size."""
    runs = {"ours": ours(objective), **{f"trl {way}": theirs(objective, way) for way in WAYS}}
    found: dict[str, Any] = {}
    for size in sizes:
        pairs = sorted(pairs_of(kind, 2 * size), key=lambda pair: pair.longest)
        batches = [pairs[start : start + size] for start in range(0, len(pairs), size)]

        def over(run: Callable[..., float], each: Sequence[Sequence[PreferencePair]]) -> float:
            return sum(run(batch) for batch in each)

        ways: dict[str, Callable[[], Any]] = {name: partial(over, run, batches) for name, run in runs.items()}
        times = in_turn(ways, rounds)
        for each in times.values():
            each["seconds"] /= len(batches)
            each["pairs_per_second"] = size / each["seconds"]
        tokens = sum(sum(map(len, pair.rows)) for pair in pairs) / len(batches)
        products = floor(objective, batches)
        found[str(size)] = {"tokens_per_step": tokens, "seconds_of_the_base_products": products, "ways": times}
        cells = [
            [name, *(f"{t[key]:.3f}" for key in ("seconds", "pairs_per_second", "ratio", "median_ratio"))]
            for name, t in times.items()
        ]
        header = [f"{objective}, {kind}, {size} pairs", "seconds a step", "pairs/s", "ratio", "median"]
        say(table(cells, header=header))
        say(f"the base's products: {products:.3f} s a step")
        say()
    return found


def floor(objective: str, batches: Sequence[Sequence[PreferencePair]]) -> float:
    """Returns the mean seconds of the base's products in a step, for the rows that a packed step computes."""
    model, total = base()[0], 0.0
    for batch in batches:
        rows = [row for pair in batch for row in pair.rows]
        predictions = sum(sum(row.trained) for row in rows)
        if objective == "orpo":  # also learns the chosen texts' prompts
            predictions += sum(len(pair.prompt) - 1 for pair in batch)
        total += seconds_of_products(model, pack(rows).processed_tokens, predictions)
    return total / len(batches)


def summary(found: dict[str, Any]) -> dict[str, float]:
    """How many times faster ours is: than TRL's fastest method at each size, and with each at its own best size."""
    result = {}
    best = {"ours": 0.0, "trl": 0.0}
    for size, each in found.items():
        ours_rate = each["ways"]["ours"]["pairs_per_second"]
        trl_rate = max(t["pairs_per_second"] for name, t in each["ways"].items() if name != "ours")
        result[size] = round(ours_rate / trl_rate, 3)
        best = {"ours": max(best["ours"], ours_rate), "trl": max(best["trl"], trl_rate)}
    return {**result, "best of each": round(best["ours"] / best["trl"], 3)}


def main() -> None:
    """Measures and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--objectives", nargs="+", default=["dpo", "orpo"])
    parser.add_argument("--kinds", nargs="+", default=list(LENGTHS))
    parser.add_argument("--output", type=Path, default=HERE / "preferences.json")
    args = parser.parse_args()
    known = json.loads(args.output.read_text(encoding="utf-8")) if args.output.exists() else {}
    report: dict[str, Any] = known | {"machine": machine("transformers", "peft", "trl"), "rounds": args.rounds}
    with keep_freed_memory(), freeze_objects():
        for objective in args.objectives:
            for kind in args.kinds:
                found = measure(objective, kind, args.sizes, args.rounds)
                report[f"{objective}, {kind}"] = {"faster": summary(found), "sizes": found}
                say(f"{objective}, {kind}: {report[f'{objective}, {kind}']['faster']}")
                args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
