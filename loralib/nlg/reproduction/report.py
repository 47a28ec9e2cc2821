"""The report of a reproduction: Markdown, JSON and pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ...console import duration
from ...files import write_json, write_text, write_whole
from ...training.report import plot_losses
from ..metrics import SCORES

__all__ = ["PICTURES", "markdown", "plot_scores", "write_report"]

PICTURES: Final = ("loss.png", "scores.png")

_TITLES: Final = {"e2e": "E2E", "dart": "DART", "webnlg": "WebNLG"}
_NAMES: Final = {"ROUGE_L": "ROUGE-L", "SER": "slot errors"}
# Scores from 0 to 1, which papers print times 100.
_SHARES: Final = ("BLEU", "METEOR", "ROUGE_L", "SER")
_LOWER: Final = ("TER", "SER")
_PARTS: Final = ("all", "seen", "unseen")
# The minimum extent of the axes of these scores; for the others it is 100.
_WHOLE: Final = {"NIST": 10.0, "CIDEr": 3.0}


def write_report(directory: Path, facts: Mapping[str, Any]) -> None:
    """Writes report.json, the pictures, and report.md last.

    Args:
        directory: receives the files; already contains ``adapter/metrics.jsonl``.
        facts: the results of the stages.
    """
    title = f"{_TITLES[facts['dataset']]} with {facts['model']}"
    write_json(directory / "report.json", facts)
    drawn = plot_losses(directory / "adapter" / "metrics.jsonl", directory / "loss.png", title)
    drawn = plot_scores(facts["scores"], facts["recipe"]["published"], directory / "scores.png", title) and drawn
    write_text(directory / "report.md", markdown(facts, drawn))


def markdown(facts: Mapping[str, Any], pictures: bool) -> str:
    """Returns the report as Markdown.

    Args:
        facts: as for `write_report`.
        pictures: whether the pictures were drawn.
    """
    recipe = facts["recipe"]
    parts = [f"# {_TITLES[facts['dataset']]} with {facts['model']}\n", _summary(facts)]
    parts.append(f"## Scores\n\n{_score_table(facts['scores'], recipe['published'])}\n")
    if recipe["published"]:
        parts.append(f"Published: {recipe['source']}. {recipe['note']}".rstrip() + "\n")
    parts += [f"{_name(name)} was left out: {reason}\n" for name, reason in facts["scores"].get("skipped", {}).items()]
    if pictures:
        parts.append("![Scores](scores.png)\n")
    parts.append(_perplexity_table(facts["perplexity"]))
    parts.append(f"## Training\n\n{_training(facts['training'])}\n")
    if pictures:
        parts.append("![Loss over the updates](loss.png)\n")
    parts.append("## Examples\n\n" + "\n".join(_example(example) for example in facts["examples"]))
    parts.append("## How\n\n" + "\n".join(_how(facts)))
    return "\n".join(parts)


def _summary(facts: Mapping[str, Any]) -> str:
    data, training, decoding = facts["data"], facts["training"], facts["decoding"]
    return (
        f"Trained for {training['updates']:,} updates on {training['examples']:,} texts, decoded "
        f"{decoding['texts']:,} inputs once each ({decoding['ended']:,} ended by themselves), scored against "
        f"{data['references']:,} references. Recipe: {facts['recipe']['name']}.\n"
    )


def _score_table(scores: Mapping[str, Any], published: Mapping[str, Mapping[str, float]]) -> str:
    subsets = {"all": scores, **scores.get("subsets", {})}
    columns = [(part, kind) for part in _PARTS if part in subsets for kind in ("ours", "published")]
    columns = [(part, kind) for part, kind in columns if kind == "ours" or part in published]
    header = ["metric", *(kind if len(subsets) == 1 else f"{part}, {kind}" for part, kind in columns), "better"]
    rows = []
    for name in [*SCORES, "SER"]:
        if scores.get(name) is None and not any(name in figures for figures in published.values()):
            continue
        cells = [
            _figure(name, subsets[part].get(name) if kind == "ours" else published[part].get(name))
            for part, kind in columns
        ]
        rows.append([_name(name), *cells, "lower" if name in _LOWER else "higher"])
    return _table(header, rows)


def _perplexity_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        [label, *(f"{found[who][name]:.4g}" for who in ("base", "adapted"))]
        for name, label in (("PPL", "per token"), ("PPL_word", "per word"))
    ]
    table = _table(["perplexity of the references", "base", "adapted"], rows)
    return f"{table}\n\nSignature: `{found['adapted']['signature']}`\n"


def _training(training: Mapping[str, Any]) -> str:
    losses = training["valid_losses"]
    text = f"{training['updates']:,} updates in {duration(training['seconds'])}."
    if losses:
        text += f" Validation loss {losses[0][1]:.4f} before, {losses[-1][1]:.4f} after."
    if training["dropped"]:
        left = ", ".join(f"{number:,} {reason}" for reason, number in training["dropped"].items())
        text += f" Left out: {left}."
    return f"{text} Batches were padded: {training['note']}." if training["note"] else text


def _example(example: Mapping[str, str]) -> str:
    rows = [[who, _cell(example[who]) or "(nothing)"] for who in ("base", "adapted", "reference")]
    return f"`{example['input']}`\n\n{_table(['who', 'text'], rows)}\n"


def _how(facts: Mapping[str, Any]) -> Iterator[str]:
    recipe, machine = facts["recipe"], facts["machine"]
    settings = {"form": recipe["form"]}
    if recipe["max_inputs"]:
        settings["max_inputs"] = recipe["max_inputs"]
    for part in ("train", "decode"):  # with the prefixes that --set uses: both parts have a seed
        settings |= {f"{part}.{name}": value for name, value in recipe[part].items()}
    yield _table(["setting", "value"], [[f"`{name}`", _cell(str(value))] for name, value in settings.items()])
    yield ""
    yield "All others are the defaults; report.json has every one."
    yield ""
    yield _table(
        ["stage", "time"],
        [[name, duration(facts["seconds"][name])] for name in facts["seconds"]]
        + [["all", duration(sum(facts["seconds"].values()))]],
    )
    yield ""
    yield f"On {machine['system']}, {machine['cores']} cores, {machine['threads']} threads, PyTorch {machine['torch']}."
    yield ""
    signatures = facts["scores"]["signatures"].items()
    yield _table(["metric", "signature"], [[_name(name), f"`{_cell(signature)}`"] for name, signature in signatures])
    yield ""
    yield "The same scores: `loralib evaluate test.jsonl texts.txt`"
    yield ""


def plot_scores(
    scores: Mapping[str, Any], published: Mapping[str, Mapping[str, float]], picture: Path, title: str
) -> bool:
    """Draws a small plot for each score, comparing ours with the published one.

    Args:
        scores: as returned by `Evaluation.as_json`.
        published: published scores, by subset and metric.
        picture: the PNG to write.
        title: the heading of the picture.

    Returns:
        Whether a picture was drawn: False if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    names = [name for name in [*SCORES, "SER"] if scores.get(name) is not None]
    subsets = {"all": scores, **scores.get("subsets", {})}
    parts = [part for part in _PARTS if part in subsets]
    figure = Figure(
        figsize=(1.1 + 1.25 * len(names) * (1 + 0.35 * (len(parts) - 1)), 3.2), dpi=120, layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for plot, name in zip(axes, names, strict=True):
        for place, part in enumerate(parts):
            ours, theirs = subsets[part].get(name), published.get(part, {}).get(name)
            both = theirs is not None
            for offset, value, color, label in (
                (-0.2 if both else 0.0, ours, "#2171b5", "ours"),
                (0.2, theirs, "#fdae6b", "published"),
            ):
                if value is not None:
                    bars = plot.bar(place + offset, _scaled(name, value), width=0.38, color=color, label=label)
                    plot.bar_label(bars, labels=[_figure(name, value)], fontsize=7, padding=1)
        plot.set_title(f"{_name(name)} ({'lower' if name in _LOWER else 'higher'})", fontsize=8)
        plot.set_xticks(range(len(parts)), parts if len(parts) > 1 else [""], fontsize=8)
        plot.set_yticks([])
        plot.margins(x=0.3)
        plot.set_ylim(0, max(_WHOLE.get(name, 100.0), plot.get_ylim()[1]) * 1.1)
        plot.spines[["top", "right", "left"]].set_visible(False)
    figure.suptitle(f"{title} (higher, lower: what is better)", fontsize=10)
    handles = {label: handle for plot in axes for handle, label in zip(*plot.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    write_whole(picture, lambda temporary: figure.savefig(temporary, format="png", metadata={"Software": None}))
    return True


def _name(name: str) -> str:
    return _NAMES.get(name, name)


def _scaled(name: str, value: float) -> float:
    return 100 * value if name in _SHARES else value


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{_scaled(name, value):.2f}" if name in ("NIST", "CIDEr") else f"{_scaled(name, value):.1f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
