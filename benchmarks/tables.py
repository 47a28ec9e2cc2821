"""The benchmarks' results as tables for the docs; scripts/write_docs.py inserts them."""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["TABLES", "in_place"]

HERE = Path(__file__).resolve().parent
Rows = Iterable[tuple[str, ...]]
MODELS = {"smollm2": "SmolLM2-135M", "gpt2": "GPT-2 124M"}
DATA = {"e2e": "E2E", "mixed": "32 to 1,024 tokens"}


def results(name: str) -> dict[str, Any]:
    """Returns a benchmark's results; empty if it has not been run."""
    path = HERE / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def in_place(path: Path, rows: Iterable[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    """Returns the rows of a benchmark's file, where new rows replace those with equal values of `names`."""
    before = json.loads(path.read_text(encoding="utf-8"))["results"] if path.is_file() else []
    return list({tuple(row[name] for name in names): row for row in (*before, *rows)}.values())


def speed(name: str = "train_speed") -> Rows:
    """Training steps: one row for each of our methods."""
    rows = results(name).get("results", ())
    also = ("times Unsloth",) if any("unsloth" in row["times"] for row in rows) else ()
    peft = ("times PEFT as it comes", "times best-tuned PEFT")
    yield "model", "examples", "batch", "way", "a step", *peft, *also, "GEMM rate"
    for row in rows:
        best = row["best_tuned"]
        yield (
            MODELS[row["model"]],
            DATA[row["data"]],
            str(row["batch"]),
            row["way"],
            f"{row['step_s'][row['way']]:.2f} s",
            times(row["times"]["peft fp32"]) if "peft fp32" in row["times"] else "not run",
            f"{times(row['times'][best])}, {best.removeprefix('peft ')}",
            *(times(row["times"]["unsloth"]) if "unsloth" in row["times"] else "not run" for _ in also),
            f"{row['share_of_gemm_rate']:.0%} of {row['gemm_flops'] / 1e9:.0f} GFLOP/s",
        )


def times(ratio: tuple[float, float]) -> str:
    """Formats the ratio of the fastest rounds, and the median over rounds."""
    return f"{ratio[0]:.2f} ({ratio[1]:.2f})"


def time_to_loss() -> Rows:
    """Wall time until PEFT's final validation loss is reached: two rows per seed, and the means."""
    yield "batch", "seed", "PEFT's loss", "its time", "ours", "loss after as many steps", "time", "time to PEFT's loss"
    ways = {"ours": "as it comes", "siblings": "4 siblings"}
    for rows in (results("train_loss").get("results", ()), results("train_loss_32").get("results", ())):
        for row in rows:
            for way, name in ways.items():
                reached = row[f"{way}_to_goal_s"]
                yield (
                    str(row["batch"]),
                    str(row["seed"]),
                    f"{row['goal']:.4f}",
                    f"{row['peft_s']:.0f} s",
                    name,
                    f"{row[f'{way}_loss']:.4f}",
                    f"{row[f'{way}_s']:.0f} s: {row[f'{way}_s'] / row['peft_s']:.0%}",
                    f"{reached:.0f} s: {reached / row['peft_s']:.0%}" if reached else "not reached in two epochs",
                )
        for way, name in ways.items() if len(rows) > 1 else ():
            shares = [row[f"{way}_to_goal_s"] / row["peft_s"] for row in rows if row[f"{way}_to_goal_s"]]
            mean = {key: statistics.mean(row[key] for row in rows) for key in ("goal", "peft_s", f"{way}_loss")}
            yield (
                str(rows[0]["batch"]),
                "mean",
                f"{mean['goal']:.4f}",
                f"{mean['peft_s']:.0f} s",
                name,
                f"{mean[f'{way}_loss']:.4f}",
                f"{statistics.mean(row[f'{way}_s'] / row['peft_s'] for row in rows):.0%}",
                f"{statistics.mean(shares):.0%}" if len(shares) == len(rows) else "",
            )


def memory() -> Rows:
    """Peak memory of a training process."""
    rows = results("train_memory").get("results", ())
    also = ("unsloth",) if any("unsloth" in row["peak_bytes"] for row in rows) else ()
    peft = ("PEFT with a bf16 base", "PEFT with autocast", "PEFT as it comes")
    yield "model", "ours", *peft, *("Unsloth" for _ in also), "of best-tuned PEFT"
    for row in rows:
        peaks = (row["peak_bytes"].get(way) for way in ("ours", "peft bf16", "peft autocast", "peft fp32", *also))
        yield (
            MODELS[row["model"]],
            *(f"{peak / 2**30:.2f} GiB" if peak else "not run" for peak in peaks),
            f"{row['share_of_best_tuned']:.0%}",
        )


def comparison() -> Rows:
    """The README's figures: SmolLM2 trained with default settings, compared with the best of each peer."""
    steps = {
        (row["data"], row["batch"]): row
        for row in results("train_speed").get("results", ())
        if row["model"] == "smollm2" and row["way"] == "ours"
    }
    with_unsloth = any("unsloth" in row["times"] for row in steps.values())
    yield "SmolLM2-135M, two CPU cores", "loralib", "PEFT", *(["Unsloth, compiled"] if with_unsloth else [])
    for (data, batch), row in steps.items():
        peers = [row["best_tuned"], *(["unsloth"] if with_unsloth else [])]
        cells = [f"{row['times'][peer][0]:.1f} times as long" if peer in row["times"] else "" for peer in peers]
        yield f"a step of {batch} examples, {DATA[data]}", f"{row['step_s']['ours']:.2f} s", *cells
    for row in results("train_memory").get("results", ()):
        if row["model"] == "smollm2":
            peak = row["peak_bytes"]
            best = min(peak["peft bf16"], peak["peft autocast"])
            also = [f"{peak['unsloth'] / 2**30:.1f} GiB" if "unsloth" in peak else ""] if with_unsloth else []
            cells = [f"{peak['ours'] / 2**30:.1f} GiB", f"{best / 2**30:.1f} GiB", *also]
            yield "peak memory at 8 sequences of 512 tokens", *cells


def breakdown() -> Rows:
    """Where a training step's time goes."""
    yield "kind of operator", "a step", "share"
    found = results("breakdown")
    for kind, seconds in found.get("seconds", {}).items():
        yield kind, f"{1000 * seconds:.0f} ms", f"{seconds / found['profiled_step_s']:.0%}"


def generation() -> Rows:
    """Decoding compared with transformers' generate."""
    yield "case", "ours", "transformers on merged PEFT", "its way", "times (median)", "BLEU", "score", "same texts"
    for row in results("generate").get("results", ()):
        timed = ("", "", row["peer"], "not timed")
        if "times" in row:
            ratio = times((row["times"], row["median_times"]))
            timed = (f"{row['ours_s']:.2f} s", f"{row['peer_s']:.2f} s", row["peer"], ratio)
        both = [
            f"{row[what]['ours']:.{digits}f} / {row[what]['peer']:.{digits}f}" if what in row else ""
            for what, digits in (("bleu", 1), ("mean_score", 4))
        ]
        same = f"{row['same_texts']} of {row['prompts']}" if "same_texts" in row else ""
        yield row["case"], *timed, *both, same


def serving() -> Rows:
    """Server speed compared with llama.cpp's, by number of clients."""
    found = results("serve").get("figures", {})
    yield "clients", *(f"{engine}, {what}" for engine in found for what in ("tokens/s", "first token"))
    for clients in next(iter(found.values()), {}):
        rows = [by_clients[clients] for by_clients in found.values()]
        cells = [(f"{row['tokens_per_second']:.0f}", f"{row['first_token_s']:.2f} s") for row in rows]
        yield clients, *(cell for pair in cells for cell in pair)


def processes() -> Rows:
    """Two single-threaded processes compared with one with two threads, on the same two cores."""
    yield "examples a step", "one process, two threads", "two processes, a thread each", "ratio"
    for batch, row in results("ranks").get("scaling", {}).get("batch_sizes", {}).items():
        one, two = row["one_process_two_threads"], row["two_processes_one_thread"]
        ratio = (row["ratio_of_best"], two["median"] / one["median"])
        yield batch, f"{one['best']:.0f} tokens/s", f"{two['best']:.0f} tokens/s", times(ratio)


def with_best_rate(runs: Iterable[dict[str, Any]], rank: int) -> list[dict[str, Any]]:
    """Returns a variant's runs at a rank and the learning rate at which its first seed has the lowest loss."""
    here = [run for run in runs if run["rank"] == rank and run["loss"] is not None]
    best = min((run for run in here if run["seed"] == 0), key=lambda run: run["loss"])
    return [run for run in here if run["lr"] == best["lr"]]


def study() -> Rows:
    """Variants of LoRA by rank, each at its best learning rate: means over seeds, and standard deviations."""
    yield "variant", "rank", "lr", "loss", "BLEU", "ROUGE-L", "CIDEr", "SER", "adapter"
    digits = {"BLEU": 1, "ROUGE_L": 1, "CIDEr": 2, "SER": 1}
    for variant, runs in results("study").get("runs", {}).items():
        for rank in sorted({run["rank"] for run in runs}):
            best = with_best_rate(runs, rank)
            scores = {name: [run["scores"][name] * (1 if name == "CIDEr" else 100) for run in best] for name in digits}
            yield (
                variant, str(rank), f"{best[0]['lr']:.2g}", mean([run["loss"] for run in best], 4),
                *(mean(scores[name], places) for name, places in digits.items()),
                f"{best[0]['adapter_bytes'] / 1e6:.1f} MB",
            )  # fmt: skip


def mean(values: list[float], digits: int) -> str:
    """Formats a mean and the standard deviation."""
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def variants() -> Rows:
    """A step of each variant on E2E, and its process's memory, compared with plain LoRA."""
    yield "variant", "a step", "of LoRA's", "peak memory", "of LoRA's"
    found = results("variants").get("E2E", {})
    seconds, peaks = found.get("step_s", {}), found.get("peak_bytes", {})
    for name in seconds:
        beside = (f"{of[name] / of['plain']:.2f}" for of in (seconds, peaks))
        yield name, f"{seconds[name]:.3f} s", next(beside), f"{peaks[name] / 1e9:.2f} GB", next(beside)


TABLES = {
    "speed": speed,
    "speed on another processor": functools.partial(speed, "train_speed_zen5"),
    "time to loss": time_to_loss,
    "memory": memory,
    "comparison": comparison,
    "breakdown": breakdown,
    "generation": generation,
    "serving": serving,
    "processes": processes,
    "study": study,
    "variants": variants,
}
