"""What an adapter is, what it does to its base, and what is wrong with it, in plain words.

`inspect_adapter` looks at the adapter alone; `verify` puts it on its base and compares adapter, merged and exported
model.  Norms and singular values come from the thin factors: the whole update is never formed.
"""

from __future__ import annotations

import copy
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import BASE, Adapter, apply_adapter, expand_blocks
from .combine import Update, depends_on_base, factors, faults_of, located_faults
from .console import count, size, table
from .data import prompt_ids
from .delta import effective_rank, scaling_of
from .errors import AdapterError, ConfigError, LoraError, MissingDependencyError, TargetError
from .files import write_whole
from .formats import export, make_portable, merge_into, read_adapter
from .formats.portable import TARGETS
from .generation import generate
from .injection import fingerprint, injection_of, merge, remove, unmerge

__all__ = ["Finding", "Inspection", "LayerView", "inspect_adapter", "plot", "verify"]

_MOST_FAULTS = 20  # spelled out


@dataclass(frozen=True)
class Finding:
    """One thing that was checked.

    Attributes:
        level: "ok", "warning" (works, but know this) or "fault" (does not do what it should).
        text: what was found.
        fix: what to do about it.
    """

    level: str
    text: str
    fix: str = ""

    def __str__(self) -> str:
        mark = {"ok": "  ok     ", "warning": "  WARNING", "fault": "  WRONG  "}[self.level]
        return f"{mark}  {self.text}" + (f"\n           -> {self.fix}" if self.fix else "")


@dataclass(frozen=True)
class LayerView:
    """What an adapter does to one module.

    Attributes:
        name: its dotted name.
        shape: size of the update, (out, in).
        r: rank of the factors.
        scaling: factor of the update.
        norm: Frobenius norm of the update.
        singular_values: of the update, in falling order.
        effective_rank: see `loralib.delta.effective_rank`.
    """

    name: str
    shape: tuple[int, int]
    r: int
    scaling: float
    norm: float
    singular_values: tuple[float, ...]
    effective_rank: float


@dataclass(frozen=True)
class Inspection:
    """What an adapter is; ``print`` it.

    Attributes:
        adapter: the adapter.
        layers: its modules with sound factors.
        uses: for each of `loralib.formats.portable.TARGETS`, whether and how the adapter can be used there.
        findings: what is wrong with it, as far as it tells by itself.
    """

    adapter: Adapter
    layers: tuple[LayerView, ...]
    uses: Mapping[str, str]
    findings: tuple[Finding, ...]

    def __str__(self) -> str:
        config, tensors = self.adapter.config, self.adapter.tensors
        dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
        targets = config.target_modules
        kinds = [name for name in ("use_rslora", "use_dora", "lora_bias") if getattr(config, name)]
        kinds += [f"init_lora_weights={config.init_lora_weights!r}"] if config.init_lora_weights is not True else []
        kinds += ["fused blocks"] if config.enable_lora else []
        facts = [
            ("base model", config.base_model_name_or_path or "not named"),
            ("base fingerprint", self.adapter.metadata.get(BASE, "none: any base of these shapes is taken")),
            ("r", _listed(config.r, config.rank_pattern)),
            ("lora_alpha", _listed(config.lora_alpha, config.alpha_pattern)),
            ("target_modules", targets if isinstance(targets, str) else ", ".join(targets or ())),
            ("kind", ", ".join(kinds) or "plain LoRA"),
            ("adapted modules", count(len(self.adapter.modules))),
            ("parameters", count(sum(tensor.numel() for tensor in tensors.values()))),
            ("size", f"{size(self.adapter.nbytes)} ({', '.join(f'{n} {kind}' for kind, n in dtypes.items())})"),
        ]
        trained = [name for name in tensors if not name.rpartition(".")[2].startswith("lora_")]
        facts += [("trained in full", ", ".join(trained[:4]) + (" ..." if len(trained) > 4 else ""))] if trained else []
        parts = [table(facts)]
        if self.layers:
            parts += ["What it learned, by kind of module:", self._by_kind()]
        uses = [(TARGETS[target].title, verdict) for target, verdict in self.uses.items()]
        parts += ["Where it can be used:", table(uses)]
        parts += ["\n".join(str(finding) for finding in self.findings)] if self.findings else []
        return "\n\n".join(parts)

    def by_layer(self) -> str:
        """Returns a table of all modules."""
        rows = [
            (v.name, v.r, f"{v.scaling:g}", f"{v.norm:.4g}", f"{max(v.singular_values, default=0):.4g}", _ranks([v]))
            for v in self.layers
        ]
        return table(rows, ("module", "r", "scaling", "norm", "largest singular value", "effective rank"))

    def _by_kind(self) -> str:
        kinds: dict[str, list[LayerView]] = {}
        for view in self.layers:
            kinds.setdefault(_place(view.name)[0], []).append(view)
        rows = []
        for kind, views in kinds.items():
            norms = [view.norm for view in views]
            largest = max(views, key=lambda view: view.norm)
            where = f"{max(norms):.4g} (layer {_place(largest.name)[1]})" if _place(largest.name)[1] is not None else ""
            rows.append(
                (kind, len(views), f"{sum(norms) / len(norms):.4g}", where or f"{max(norms):.4g}", _ranks(views))
            )
        return table(rows, ("module", "layers", "mean norm", "largest norm", "effective rank"))


def inspect_adapter(adapter: Adapter) -> Inspection:
    """Describes an adapter by itself.

    Args:
        adapter: of any kind, also a damaged one.

    Returns:
        What it is; `Inspection.findings` names what is wrong.
    """
    faults = faults_of(adapter)
    again = "copy the adapter again from its source, or train it again"
    findings = [Finding("fault", fault, again) for fault in faults[:_MOST_FAULTS]]
    if len(faults) > _MOST_FAULTS:
        findings.append(Finding("fault", f"and {len(faults) - _MOST_FAULTS:,} more faults of this kind", again))
    broken = {place for place, _ in located_faults(adapter)}
    broken |= {name.rpartition(".")[0] for name in broken}
    layers = (
        ()
        if adapter.config.enable_lora and faults
        else tuple(_view(name, update) for name, update in _updates(adapter, broken).items())
    )
    findings += _learned(layers)
    findings += _scalings(adapter)
    return Inspection(adapter, layers, _uses(adapter), tuple(findings))


def plot(inspection: Inspection, path: str | os.PathLike[str]) -> None:
    """Draws the norms of all updates as a heat map: a row a kind of module, a column a layer.

    Args:
        inspection: of an adapter.
        path: the PNG file.

    Raises:
        AdapterError: there is nothing to draw.
        MissingDependencyError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("drawing needs matplotlib: pip install matplotlib") from error
    if not inspection.layers:
        raise AdapterError("the adapter has no sound factors to draw")
    places = {view.name: _place(view.name) for view in inspection.layers}
    kinds = list(dict.fromkeys(kind for kind, _ in places.values()))
    numbers = sorted({-1 if number is None else number for _, number in places.values()})
    grid = torch.full((len(kinds), len(numbers)), torch.nan)
    for view in inspection.layers:
        kind, number = places[view.name]
        grid[kinds.index(kind), numbers.index(-1 if number is None else number)] = view.norm
    figure = Figure(figsize=(2.5 + 0.35 * max(len(numbers), 8), 1.4 + 0.4 * len(kinds)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(grid.numpy(), aspect="auto", cmap="viridis", vmin=0)
    axes.set_yticks(range(len(kinds)), kinds)
    step = 1 + len(numbers) // 40  # more labels would overlap
    labels = ["" if number < 0 else str(number) for number in numbers[::step]]
    axes.set_xticks(range(0, len(numbers), step), labels)
    axes.set_xlabel("layer")
    axes.set_title("norm of the learned update")
    figure.colorbar(image)
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def verify(
    model: nn.Module,
    tokenizer: Any,
    adapter: Adapter,
    prompts: Sequence[str],
    *,
    initial: Adapter | None = None,
    max_new_tokens: int = 64,
) -> list[Finding]:
    """Puts an adapter on its base and runs every check there is.

    Args:
        model: the base, best in fp32; it is given back as it was.
        tokenizer: its tokenizer.
        adapter: of any kind.
        prompts: texts like those the adapter was trained on.
        initial: see `loralib.formats.portable.make_portable`.
        max_new_tokens: how far continuations may go until they are said not to end.

    Returns:
        What was found, in the order of the checks.
    """
    if injection_of(model) is not None:
        raise TargetError("verify needs the plain base model; remove(model) first")
    if not prompts:
        raise ConfigError("verify needs at least one prompt")
    findings = list(inspect_adapter(adapter).findings)
    if any(finding.level == "fault" for finding in findings) and faults_of(adapter):
        return findings
    findings.append(_check_base(model, adapter))
    inputs = [torch.tensor(prompt_ids(prompt, tokenizer)) for prompt in prompts]
    before = _logits(model, inputs)
    scale = max(1.0, *(float(logits.abs().max()) for logits in before))
    bound = scale * (1e-4 if next(model.parameters()).dtype == torch.float32 else 0.05)
    try:
        with _adapted(model, adapter, initial) as adapted:
            after = _logits(adapted, inputs)
            findings.append(_check_effect(_gap(after, before)))
            if adapted is model:
                merge(model)
                findings.append(_compare("merged", _logits(model, inputs), after, bound))
                unmerge(model)
            if hasattr(model, "generate"):
                findings.append(_check_ends(adapted, tokenizer, prompts, max_new_tokens))
    except LoraError as error:
        return [*findings, Finding("fault", str(error))]
    findings += [_check_export(model, adapter, target, inputs, after, bound, initial) for target in TARGETS]
    return findings


# Looking at tensors.


def _updates(adapter: Adapter, broken: set[str]) -> dict[str, Update]:
    """Returns the low-rank part of each sound module, whatever else the adapter does."""
    plain = expand_blocks(adapter)
    updates = {}
    for name in plain.modules:
        if name not in broken:
            A, B = factors(plain, name)
            config = plain.config
            scaling = scaling_of(config.rank_of(name), config.alpha_of(name), config.use_rslora)
            updates[name] = Update(A.flatten(1), B.flatten(1), scaling)
    return updates


def _view(name: str, update: Update) -> LayerView:
    S = update.svd()[1]
    return LayerView(
        name, update.shape, update.r, update.scaling, float(S.norm()), tuple(S.tolist()), effective_rank(S)
    )


def _learned(layers: Sequence[LayerView]) -> list[Finding]:
    still = [view.name for view in layers if view.norm == 0]
    if layers and len(still) == len(layers):
        fix = "train it: the learning rate may have been 0, or no gradient reached the adapter"
        return [Finding("fault", "nothing was learned: every update is zero", fix)]
    if still:
        names = ", ".join(still[:4]) + (" ..." if len(still) > 4 else "")
        fix = "they took no part in training (or are padding of a conversion); leave them out to save memory"
        return [Finding("warning", f"{len(still)} of {len(layers)} modules learned nothing: {names}", fix)]
    return []


def _scalings(adapter: Adapter) -> list[Finding]:
    """Says where another tool would scale the update wrongly."""
    config = adapter.config
    findings = []
    fix = "loralib convert --target llamacpp (or vllm, mlx, peft) puts the scaling into B"
    if config.use_rslora:
        right, wrong = scaling_of(config.r, config.lora_alpha, True), scaling_of(config.r, config.lora_alpha)
        text = f"use_rslora: llama.cpp's own converter would scale by {wrong:.4g} instead of {right:.4g}"
        findings.append(Finding("warning", text, fix))
    if config.alpha_pattern:
        text = f"alpha_pattern: llama.cpp's own converter and older vLLMs take lora_alpha {config.lora_alpha:g} for all"
        findings.append(Finding("warning", text, fix))
    if config.changes_base:
        text = (
            f"init_lora_weights {config.init_lora_weights!r}: tools that do not compute the start again would add the "
            "adapter to the wrong base weights"
        )
        findings.append(Finding("warning", text, "loralib convert --target peft --base MODEL makes it plain LoRA"))
    return findings


def _uses(adapter: Adapter) -> dict[str, str]:
    config = adapter.config
    in_full = [name for name in ("modules_to_save", "bias") if getattr(config, name) not in (None, (), "none")]
    special = "DoRA" if config.use_dora else str(config.init_lora_weights) if config.changes_base else ""
    uses = {"peft": "yes, as it is" if not config.enable_lora else "yes, once saved as a PEFT directory"}
    for target in ("vllm", "llamacpp", "mlx"):
        convert = f"after loralib convert --target {target} --base MODEL"
        if in_full:
            uses[target] = f"no: {' and '.join(in_full)} are not loaded there; merge it (loralib merge)"
        elif config.lora_bias:
            uses[target] = "no: lora_bias is not loaded there"
        elif special:
            uses[target] = f"{convert} ({special} becomes plain LoRA)"
        elif target == "vllm" and not config.alpha_pattern and not config.enable_lora:
            uses[target] = "yes, as it is"
        else:
            uses[target] = convert
    return uses


def _listed(value: float, pattern: Mapping[str, float]) -> str:
    others = ", ".join(f"{key}: {other:g}" for key, other in list(pattern.items())[:4])
    return f"{value:g}" + (f" ({others}{' ...' if len(pattern) > 4 else ''})" if pattern else "")


def _ranks(views: Sequence[LayerView]) -> str:
    mean = sum(view.effective_rank for view in views) / len(views)
    return f"{mean:.1f} of {max(view.r for view in views)}"


def _place(name: str) -> tuple[str, int | None]:
    """Splits a name into what is the same in all layers, and the layer's number."""
    found = re.search(r"\.(\d+)\.", name)
    return (name[found.end() :], int(found[1])) if found else (name, None)


# Checks on the base.


def _check_base(model: nn.Module, adapter: Adapter) -> Finding:
    theirs, ours = adapter.metadata.get(BASE), fingerprint(model)
    named = adapter.config.base_model_name_or_path
    fix = f"load the base it was trained on{f' ({named})' if named else ''}"
    if theirs is None:
        return Finding("warning", "the adapter does not say which base it was trained on: not checked", fix)
    if theirs.partition(":")[0] != ours.partition(":")[0]:
        return Finding("fault", f"wrong base: {type(model).__name__} has other parameters than its base", fix)
    if theirs != ours:
        return Finding("fault", "wrong base: the parameters have the same shapes and other values", fix)
    return Finding("ok", "this is the base that the adapter was trained on")


@contextmanager
def _adapted(model: nn.Module, adapter: Adapter, initial: Adapter | None = None) -> Iterator[nn.Module]:
    """Yields the model with the adapter on it; or a merged copy, where layers cannot compute the adapter."""
    if depends_on_base(adapter):
        merged = copy.deepcopy(model)
        merge_into(merged, adapter, initial=initial, allow_base_mismatch=True)
        yield merged
        return
    apply_adapter(model, adapter, allow_base_mismatch=True)
    try:
        yield model
    finally:
        remove(model)


def _check_effect(moved: float) -> Finding:
    if moved == 0:
        fix = "train it, or check that target_modules name layers that the model runs"
        return Finding("fault", "the adapter changes no logit on these prompts", fix)
    return Finding("ok", f"the adapter moves logits by up to {moved:.3g}")


def _check_export(
    model: nn.Module,
    adapter: Adapter,
    target: str,
    inputs: Sequence[Tensor],
    expected: Sequence[Tensor],
    bound: float,
    initial: Adapter | None,
) -> Finding:
    title = TARGETS[target].title
    try:
        portable = make_portable(adapter, target, model, initial=initial)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "adapter.gguf" if target == "llamacpp" else Path(folder)
            export(portable, target, path, model)
            back = read_adapter(path, model=model)
        with _adapted(model, back) as adapted:
            logits = _logits(adapted, inputs)
    except LoraError as error:
        return Finding("warning", f"cannot be used in {title}: {error}")
    return _compare(f"exported for {title}", logits, expected, bound + portable.error * _gap(expected, logits))


def _check_ends(model: nn.Module, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int) -> Finding:
    if getattr(tokenizer, "eos_token_id", None) is None:
        fix = "give the tokenizer an end token (eos_token) that training and generation both use"
        return Finding("fault", "the tokenizer has no end token: nothing can ever end", fix)
    rows = [prompt_ids(prompt, tokenizer) for prompt in prompts]
    results = generate(model, tokenizer, rows, max_new_tokens=max_new_tokens)
    ended = sum(result.finish_reason == "stop" for result in results)
    text = f"{ended} of {len(results)} continuations end by themselves within {max_new_tokens} tokens"
    if ended:
        return Finding("ok", text)
    fix = (
        "end token missing: if texts should end, train on completions with the end token behind them, and see with "
        "`loralib data preview` that --seq_len does not drop them; or give prompts like those of the training data"
    )
    return Finding("warning", text, fix)


def _compare(what: str, ours: Sequence[Tensor], expected: Sequence[Tensor], bound: float) -> Finding:
    gap = _gap(ours, expected)
    text = f"{what}: logits differ by {gap:.2g} from base plus adapter"
    if gap <= bound:
        return Finding("ok", text)
    return Finding("fault", f"{text}, expected at most {bound:.2g}", "use the adapter unmerged, and report this")


def _logits(model: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    device = next(model.parameters()).device
    with torch.no_grad():
        found = [model(ids[None].to(device)) for ids in inputs]
    return [getattr(output, "logits", output)[0].float().cpu() for output in found]


def _gap(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
