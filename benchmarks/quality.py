"""Quality on E2E: adapters trained by PEFT and by us, with equal settings and steps, decoded and scored identically.

python benchmarks/train.py loss --keep RUNS     trains them
python benchmarks/quality.py RUNS               about five minutes on two cores

RUNS contains seed0, seed1, ... with PEFT directories in peft/ and ours/, and train_loss.json with losses over time.
Each adapter writes one text for each meaning representation of the test file, using the same beam search.  Writes
benchmarks/quality.json, and docs/results/e2e-smollm2.md with its plot.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from machine import machine

import loralib as lora
from loralib.console import duration, say, table
from loralib.data import draw, group_by_prompt, read_examples
from loralib.data.readers import Example
from loralib.generation import Sampling
from loralib.nlg.evaluation import Texts, evaluate
from loralib.nlg.reproduction.decode import decode, one_line

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
GOLDENS = Path(os.environ.get("LORALIB_GOLDENS") or ROOT.parent / "shared" / "goldens")
SAMPLE = ROOT / "examples" / "NLG" / "data" / "e2e" / "test.txt"  # ours, so it may be printed, unlike E2E's texts
WHO = {"peft": "PEFT", "ours": "loralib"}
# The LoRA paper's decoding settings for E2E (arXiv:2106.09685, table 11).
DECODING = Sampling(num_beams=10, no_repeat_ngram_size=4, length_penalty=0.9, max_new_tokens=64)
SHARES = ("BLEU", "METEOR", "ROUGE_L", "SER")  # printed times 100
COLORS = {"peft": "#d94801", "ours": "#2171b5"}


def texts_of(model: Any, tokenizer: Any, prompts: Sequence[str], decoding: Sampling = DECODING) -> list[str]:
    found = dict(decode(model, tokenizer, prompts, decoding, "lines"))
    return [one_line(found[number].text, "lines") for number in range(len(prompts))]


def score(inputs: Sequence[Example], texts: Sequence[str]) -> dict[str, Any]:
    """Returns all scores of one adapter's texts, including SER."""
    meanings = tuple(example.prompt.strip() for example in inputs)
    references = tuple(tuple(text.strip() for text in example.references) for example in inputs)
    return evaluate(Texts(references, tuple(texts), meanings)).as_json()


def spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def summary(scores: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Mean and standard deviation of each score over seeds; no worse: better, or overlapping ranges."""
    first = scores["ours"][0]
    lower = {"TER", "SER"}
    rows: dict[str, dict[str, Any]] = {}
    for name in first["signatures"]:
        row: dict[str, Any] = {"better": "lower" if name in lower else "higher"}
        for who in WHO:
            values = [each[name] for each in scores[who]]
            row[who] = {"mean": statistics.fmean(values), "spread": spread(values), "values": values}
        gain = row["ours"]["mean"] - row["peft"]["mean"]
        row["no_worse"] = (-gain if name in lower else gain) >= -sum(row[who]["spread"] for who in WHO)
        rows[name] = row
    return rows


def time_shares(training: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Training times by seed: for the same steps, and until our validation loss reaches PEFT's."""
    rows = []
    for run in training["results"]:
        to_goal = run.get("ours_to_goal_s")
        rows.append(
            {
                "seed": run["seed"],
                "peft_s": run["peft_s"],
                "ours_s": run["ours_s"],
                "share": run["ours_s"] / run["peft_s"],
                "ours_to_goal_s": to_goal,
                "share_to_goal": None if to_goal is None else to_goal / run["peft_s"],
            }
        )
    return rows


def measure(runs: Path, data: Path, model_name: str, prompts_at_most: int | None) -> dict[str, Any]:
    seeds = sorted(path for path in runs.glob("seed*") if path.is_dir())
    missing = [path / who for path in seeds for who in WHO if not (path / who / "adapter_config.json").is_file()]
    if not seeds or missing or not (runs / "train_loss.json").is_file():
        lacking = ", ".join(map(str, missing)) or "seed directories, or train_loss.json"
        sys.exit(f"{runs} lacks {lacking}. Make them with: python benchmarks/train.py loss --keep {runs}")
    training = json.loads((runs / "train_loss.json").read_text(encoding="utf-8"))
    inputs = group_by_prompt(read_examples(data))[:prompts_at_most]
    shown = draw(group_by_prompt(read_examples(SAMPLE)), 3, 0, lambda example: example.prompt)
    prompts = [example.prompt for example in inputs]
    examples = [{"input": each.prompt.strip(), "reference": each.references[0]} for each in shown]
    model, tokenizer = lora.load_base(model_name)
    started = time.perf_counter()
    for example, text in zip(examples, texts_of(model, tokenizer, [each.prompt for each in shown]), strict=True):
        example["base"] = text
    scores: dict[str, list[dict[str, Any]]] = {who: [] for who in WHO}
    decode_s: dict[str, list[float]] = {who: [] for who in WHO}
    for place in seeds:
        for who in WHO:
            lora.load_adapter(model, place / who)
            began = time.perf_counter()
            texts = texts_of(model, tokenizer, prompts)
            decode_s[who].append(round(time.perf_counter() - began, 2))
            scores[who].append(score(inputs, texts))
            figures = ", ".join(f"{name} {scores[who][-1][name]:.4f}" for name in ("BLEU", "ROUGE_L", "CIDEr", "SER"))
            say(f"{place.name} {WHO[who]}: {figures} ({decode_s[who][-1]:.0f} s)")
            if place == seeds[0]:
                for example, text in zip(
                    examples, texts_of(model, tokenizer, [each.prompt for each in shown]), strict=True
                ):
                    example[who] = text
            lora.remove(model)
    return {
        "model": model_name,
        "inputs": len(inputs),
        "references": sum(len(example.references) for example in inputs),
        "seeds": [place.name for place in seeds],
        "decoding": {"num_beams": 10, "no_repeat_ngram_size": 4, "length_penalty": 0.9, "max_new_tokens": 64},
        "summary": summary(scores),
        "signatures": scores["ours"][0]["signatures"],
        "skipped": scores["ours"][0].get("skipped", {}),
        "times": time_shares(training),
        "decode_s": decode_s,
        "seconds": round(time.perf_counter() - started, 1),
        "training": {key: training.get(key) for key in ("machine", "settings", "results")},
        "examples": examples,
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
    }


def plot(training: Mapping[str, Any], picture: Path) -> None:
    """Plots validation loss against training time, one line per seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, run in enumerate(training["results"]):
        for who, label in WHO.items():
            points = [(seconds, loss) for _, seconds, loss in run["curves"][who]]
            axes.plot(
                *zip(*points, strict=True), color=COLORS[who], marker="o", markersize=2.5, linewidth=1.5, alpha=0.8,
                label=None if number else f"{label}, {len(training['results'])} seeds",
            )  # fmt: skip
    goal = statistics.fmean(run["goal"] for run in training["results"])
    axes.axhline(goal, color="#888888", linewidth=1, linestyle="--", label=f"PEFT at its end: {goal:.3f}")
    everything = [loss for run in training["results"] for who in WHO for _, _, loss in run["curves"][who]]
    if max(everything) > 1.5 * goal:  # the base's loss would compress the rest of the plot
        axes.set_ylim(min(everything) - 0.05, min(max(everything), 1.6 * goal))
    axes.set(xlabel="training time (s), validation not counted", ylabel="validation loss (nats a token)")
    axes.set_title("E2E, SmolLM2-135M: loss over time")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, format="png", metadata={"Software": None})


def figure_of(name: str, value: Mapping[str, Any]) -> str:
    times = 100 if name in SHARES else 1
    digits = 2 if name in ("NIST", "CIDEr", *SHARES) else 1
    return f"{times * value['mean']:.{digits}f} ± {times * value['spread']:.{digits}f}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in row)} |" for row in cells)


def document(found: Mapping[str, Any], command: str, picture: str) -> str:
    """Returns the page in docs/results."""
    names = {"ROUGE_L": "ROUGE-L", "SER": "slot errors"}
    times = found["times"]
    share = statistics.fmean(row["share"] for row in times)
    to_goal = [row["share_to_goal"] for row in times if row["share_to_goal"] is not None]
    worse = [names.get(name, name) for name, row in found["summary"].items() if not row["no_worse"]]
    verdict = (
        f"These scores are worse than PEFT's by more than the spread over seeds: {', '.join(worse)}."
        if worse
        else "No score is worse than PEFT's by more than the spread over seeds."
    )
    reached = (
        f" Reaching PEFT's final validation loss took {statistics.fmean(to_goal):.0%} of its time"
        + (f" ({len(to_goal)} of {len(times)} seeds reached it)." if len(to_goal) < len(times) else ".")
        if to_goal
        else ""
    )
    batches = {row["batch"] for row in found["training"]["results"] or () if "batch" in row}
    settings = {**(found["training"]["settings"] or {}), **({"batch": batches.pop()} if len(batches) == 1 else {})}
    about = found["training"]["machine"] or {}
    count = f" --examples {settings['examples']}" if settings.get("examples") else ""
    parts = [
        "# E2E with SmolLM2-135M, compared with PEFT\n",
        f"Both tools train the same base on the same texts with the same settings, steps and seeds "
        f"({len(found['seeds'])}). {verdict} Our training took {share:.0%} of PEFT's time.{reached}\n",
        f"```\npython benchmarks/train.py loss{count} --data DIR --keep RUNS\n{command}\n```\n",
        "DIR has the E2E challenge's train.txt, valid.txt and test.txt, with one `meaning representation||text` per "
        "line.\n",
        "## Scores\n",
        f"{found['inputs']} unseen meaning representations, one text each, {found['references']} references; mean and "
        'standard deviation over seeds. "No worse" means that ours is better, or that the two ranges overlap.\n',
        markdown_table(
            ("metric", "PEFT", "loralib", "better", "no worse"),
            [
                (names.get(name, name), figure_of(name, row["peft"]), figure_of(name, row["ours"]), row["better"],
                 "yes" if row["no_worse"] else "no")
                for name, row in found["summary"].items()
            ],
        ) + "\n",
        *(f"{name} was left out: {reason}\n" for name, reason in found["skipped"].items()),
        "Both decode by beam search: "
        + ", ".join(f"`{name}` {value:g}" for name, value in found["decoding"].items())
        + ", with the same code.\n",
        "## Training time\n",
        markdown_table(
            ("seed", "PEFT", "loralib, same steps", "share", "loralib to PEFT's loss", "share"),
            [
                (str(row["seed"]), f"{row['peft_s']:.0f} s", f"{row['ours_s']:.0f} s", f"{row['share']:.0%}",
                 *(("not reached", "") if row["ours_to_goal_s"] is None
                   else (f"{row['ours_to_goal_s']:.0f} s", f"{row['share_to_goal']:.0%}")))
                for row in times
            ],
        ) + "\n",
        f"![Validation loss over time]({picture})\n",
        "## Examples\n",
        "Meaning representations from this repository's own sample, and the texts of the first seed's adapters.\n",
        *(
            f"`{each['input']}`\n\n"
            + markdown_table(
                ("who", "text"),
                [(label, " ".join(each[key].split()) or "(nothing)")
                 for key, label in (("base", "base"), *WHO.items(), ("reference", "reference"))],
            ) + "\n"
            for each in found["examples"]
        ),
        "## Setup\n",
        markdown_table(("setting", "value"), [(name, plain(value)) for name, value in settings.items()]) + "\n"
        if settings else "",
        markdown_table(
            ("machine", "training", "decoding"),
            [(key, plain(about.get(key, "")), plain(found["machine"].get(key, "")))
             for key in [*about, *(key for key in found["machine"] if key not in about)]],
        ) + "\n",
        f"Training took {duration(sum(row['peft_s'] for row in times))} (PEFT) and "
        f"{duration(sum(row['ours_s'] for row in times))} (loralib) in total, decoding and scoring "
        f"{duration(found['seconds'])}. Made on {found['date']}.\n",
        markdown_table(
            ("metric", "signature"),
            [(names.get(name, name), f"`{made}`") for name, made in found["signatures"].items()],
        ) + "\n",
    ]  # fmt: skip
    return "\n".join(part for part in parts if part)


def plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="what benchmarks/train.py loss --keep wrote")
    parser.add_argument("--data", type=Path, default=GOLDENS / "data" / "e2e" / "test.txt", help="E2E test file")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--inputs", type=int, help="decode fewer meaning representations (to try things out)")
    parser.add_argument("--json", type=Path, default=HERE / "quality.json", help="where the figures go")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "results", help="where the page and picture go")
    args = parser.parse_args()
    found = measure(args.runs, args.data, args.model, args.inputs)
    args.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    picture = args.docs / "e2e-smollm2.png"
    plot(found["training"], picture)
    extra = ["--inputs", str(args.inputs)] if args.inputs else []
    command = shlex.join(["python", "benchmarks/quality.py", "RUNS", *extra])
    (args.docs / "e2e-smollm2.md").write_text(document(found, command, picture.name), encoding="utf-8")
    rows = [
        (name, *(figure_of(name, row[who]) for who in WHO), row["better"], "yes" if row["no_worse"] else "NO")
        for name, row in found["summary"].items()
    ]
    say(table(rows, ("metric", "PEFT", "loralib", "better", "no worse")))
    shares = [row["share"] for row in found["times"]]
    say(f"training time: {statistics.fmean(shares):.0%} of PEFT's; all this took {duration(found['seconds'])}")


if __name__ == "__main__":
    main()
