"""Generation compared with transformers' `generate` on a PEFT model: both in one process, in turn, on the same prompts.

python benchmarks/generate.py                     beam 10, greedy, first token of 1,000; half an hour
python benchmarks/generate.py --cases greedy      only this case; results of the others are kept
python benchmarks/generate.py --cases texts       beams with the peer's default stopping, which is slower: no times
python benchmarks/generate.py --clock cpu --threads 1     processor time, if the machine is shared

Results go to benchmarks/generate.json.  SmolLM2-135M gets an adapter trained on E2E for a minute, so that texts end by
themselves.  The peer uses its fastest settings on a CPU: a bf16 base, a merged adapter, prompts sorted by length, and
the fastest of several batch sizes here, chosen in a separate round.  Its beam search stops early, which is faster than
its default but finds worse texts.  Both sides' texts are scored by one fp32 model.  Machines are shared, so the figures
are minima, and medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import json
import operator
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from machine import machine
from tables import in_place
from torch import nn

import loralib as lora
from loralib.bases import load_adapted
from loralib.console import say, table
from loralib.data import group_by_prompt, prompt_ids, read_examples
from loralib.nlg.metrics.bleu import bleu

HERE = Path(__file__).resolve().parent
DATA = HERE.parent / "examples" / "NLG" / "data" / "e2e"
SEED = 0
BEAMS = 10
MAX_NEW_TOKENS = 64
CASES = ["beam", "greedy", "first", "texts"]
TRIED = 32  # number of prompts on which the peer's beam search settings are chosen
LONG_PROMPT = 1000

Ids = Sequence[int]
# What is timed: continues all prompts, and returns the tokens of each, including the end token.
Contender = Callable[[Sequence[Ids]], list[list[int]]]


# The contenders.


def train_adapter(directory: str, steps: int) -> None:
    """Trains an adapter long enough for its texts to end by themselves."""
    config = lora.TrainConfig(
        max_train_samples=8 * steps,
        max_steps=steps,
        batch_size=8,
        seq_len=128,
        lr=5e-4,
        warmup_steps=0,
        valid_fraction=0.0,
        seed=SEED,
        output_dir=directory,
    )
    model, tokenizer = lora.load_base("smollm2-135m")
    lora.inject(model, lora.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    lora.train(model, DATA / "train.txt", config, tokenizer=tokenizer)


def peers(directory: str) -> nn.Module:
    base, _ = lora.load_base("smollm2-135m", dtype="bf16")
    return peft.PeftModel.from_pretrained(base, directory).merge_and_unload().eval()


def in_batches(model: Any, prompts: Sequence[Ids], size: int, ends: Sequence[int], **settings: Any) -> list[list[int]]:
    """transformers' `generate` as it is best used: batches of prompts of similar lengths, padded on the left."""
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    found: list[list[int]] = [[] for _ in prompts]
    for at in range(0, len(order), size):
        numbers = order[at : at + size]
        width = max(len(prompts[number]) for number in numbers)
        ids = torch.full((len(numbers), width), ends[0])
        mask = torch.zeros_like(ids)
        for row, number in enumerate(numbers):
            ids[row, width - len(prompts[number]) :] = torch.tensor(prompts[number])
            mask[row, width - len(prompts[number]) :] = 1
        with torch.inference_mode():
            rows = model.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=ends[0], **settings)
        for number, row in zip(numbers, rows[:, width:].tolist(), strict=True):
            stop = next((place for place, token in enumerate(row) if token in ends), len(row) - 1)
            found[number] = row[: stop + 1]
    return found


# Comparisons other than time.


def mean_score(model: nn.Module, prompts: Sequence[Ids], found: Sequence[Ids]) -> float:
    """The mean over prompts of the sum of log-probabilities / length, the score that both searches maximise."""
    scores = []
    for prompt, ids in zip(prompts, found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].double()
        gains = torch.log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None])
        scores.append(float(gains.mean()))
    return statistics.mean(scores)


# Measurements.


def rounds_of(
    contenders: dict[str, Contender], prompts: Sequence[Ids], rounds: int, clock: Callable[[], float]
) -> tuple[dict[str, list[float]], dict[str, list[list[int]]]]:
    """Returns the seconds of every round, and what was generated in the last one."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    found: dict[str, list[list[int]]] = {}
    for _ in range(rounds):
        for name, contender in contenders.items():
            start = clock()
            found[name] = contender(prompts)
            seconds[name].append(clock() - start)
    return seconds, found


def compare(
    ours: Contender,
    ways: dict[str, Contender],
    prompts: Sequence[Ids],
    rounds: int,
    clock: Callable[[], float],
    tried: int | None = None,
) -> tuple[dict[str, Any], dict[str, list[list[int]]]]:
    """Finds the peer's fastest settings on the first prompts, then alternates with it on all of them.

    Returns:
        The times, and what both generated.
    """
    ours(prompts[:tried])  # warms up
    trials, _ = rounds_of(ways, prompts[:tried], 1, clock)
    best = min(trials, key=lambda way: trials[way][0])
    seconds, found = rounds_of({"ours": ours, "peer": ways[best]}, prompts, rounds, clock)
    row = {
        "peer": best,
        "peer_ways_s": {way: times[0] for way, times in trials.items()},
        "ours_s": min(seconds["ours"]),
        "peer_s": min(seconds["peer"]),
        "times": min(seconds["peer"]) / min(seconds["ours"]),
        "median_times": statistics.median(b / a for a, b in zip(seconds["ours"], seconds["peer"], strict=True)),
        "rounds_s": seconds,
    }
    return row, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES[:3], choices=CASES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", nargs="+", type=int, default=[16, 32], help="the peer's batch sizes (beam)")
    parser.add_argument("--prompts", type=int, help="so many of the 520 prompts, for a look")
    parser.add_argument("--adapter", help="an adapter to use, instead of training one")
    parser.add_argument("--steps", type=int, default=50, help="updates of the adapter's training")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--threads", type=int, help="of PyTorch; default: its own choice")
    parser.add_argument("--out", type=Path, default=HERE / "generate.json", help="where the results go")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if args.threads:
        torch.set_num_threads(args.threads)
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    with tempfile.TemporaryDirectory() as temporary:
        directory = args.adapter or temporary
        if not args.adapter:
            train_adapter(directory, args.steps)
        results = [run(case, directory, args, clock) for case in args.cases]
    results = in_place(args.out, results, "case")
    say()
    say(table([summary(row) for row in results], ["case", "ours", "peer", "times", "median", "BLEU", "mean score"]))
    say("\nBLEU and mean score: ours / peer's")
    about = machine("transformers", "peft") | {"seed": SEED}
    report = {"machine": about, "clock": args.clock, "results": results}
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def run(case: str, directory: str, args: argparse.Namespace, clock: Callable[[], float]) -> dict[str, Any]:
    model, tokenizer = load_adapted(directory, dtype="bf16", merged=True)
    other = peers(directory)
    # Most were not trained on; and two searches with the same model are compared, not what it learned.
    lines = [example for split in ("test", "valid", "train") for example in read_examples(DATA / f"{split}.txt")]
    examples = group_by_prompt(lines)[: args.prompts]
    prompts = [prompt_ids(example.prompt, tokenizer) for example in examples]
    ends = [int(tokenizer.eos_token_id)]

    def peer(size: int, **settings: Any) -> Contender:
        return lambda these: in_batches(other, these, size, ends, **settings)

    if case == "first":
        text = "\n".join(example.completion for example in read_examples(DATA / "train.txt")[:100])
        prompts = [prompt_ids(text, tokenizer)[:LONG_PROMPT]]
        row, found = compare(
            lambda these: [list(text.ids) for text in lora.generate(model, tokenizer, these, max_new_tokens=1)],
            {"batch 1": peer(1, max_new_tokens=1)},
            prompts,
            3 * args.rounds,
            clock,
        )
        return {"case": "first token", **row, "same_token": found["ours"] == found["peer"]}
    if case == "greedy":
        row, found = compare(
            lambda these: [
                [*text.ids, *(ends if text.finish_reason == "stop" else [])]
                for text in lora.generate(model, tokenizer, these, max_new_tokens=MAX_NEW_TOKENS)
            ],
            {f"batch {size}": peer(size, max_new_tokens=MAX_NEW_TOKENS) for size in (32, 64)},
            prompts,
            args.rounds,
            clock,
        )
    else:
        searching = {"max_new_tokens": MAX_NEW_TOKENS, "num_beams": BEAMS}

        def ours(these: Sequence[Ids]) -> list[list[int]]:
            return [list(text.ids) for text in lora.beam_search(model, these, eos_token_id=ends, **searching)]

        if case == "texts":
            # Its default continues while a better beam is possible, as ours does.
            found = {"ours": ours(prompts), "peer": peer(args.batches[0], early_stopping=False, **searching)(prompts)}
            row = {"peer": "its default, not stopping early"}
        else:
            row, found = compare(
                ours,
                {
                    f"batch {size}, stopping early": peer(size, early_stopping=True, **searching)
                    for size in args.batches
                },
                prompts,
                max(1, args.rounds - 1),
                clock,
                tried=TRIED,
            )
    judge, _ = load_adapted(directory, dtype="fp32")
    texts = {side: [tokenizer.decode(ids, skip_special_tokens=True) for ids in of] for side, of in found.items()}
    row |= {
        "prompts": len(prompts),
        "same_texts": sum(map(operator.eq, found["ours"], found["peer"])),
        "tokens": {side: sum(map(len, of)) for side, of in found.items()},
        "bleu": {side: 100 * bleu([e.references for e in examples], of).value for side, of in texts.items()},
        "mean_score": {side: mean_score(judge, prompts, of) for side, of in found.items()},
    }
    names = {"beam": f"beam {BEAMS}", "texts": f"beam {BEAMS}, texts only"}
    return {"case": names.get(case, case), **row}


def summary(row: dict[str, Any]) -> list[str]:
    both = [f"{row[what]['ours']:.{digits}f} / {row[what]['peer']:.{digits}f}" if what in row else ""
            for what, digits in (("bleu", 2), ("mean_score", 4))]  # fmt: skip
    times = ["", row["peer"], "", ""]
    if "times" in row:
        times = [
            f"{row['ours_s']:.2f} s",
            f"{row['peer_s']:.2f} s ({row['peer']})",
            *map("{:.2f}".format, (row["times"], row["median_times"])),
        ]
    return [row["case"], *times, *both]


if __name__ == "__main__":
    main()
