"""Tells what an adapter is, what it does to its base model, and what is wrong with it.

`inspect_adapter` looks at the adapter alone; `verify` applies it to its base model and compares the result with the
merged and the exported model.  Norms and singular values are computed from the factors, without forming the update.
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

from .adapter import BASE, Adapter, apply_adapter, compare_base, expand_blocks
from .combine import Update, depends_on_base, faults_of, located_faults, updates_in
from .console import count, size, table
from .data import prompt_ids
from .delta import effective_rank, scaling_of
from .engine.limits import input_limit
from .errors import AdapterError, ConfigError, LoraError, MissingDependencyError, TargetError
from .files import write_whole
from .formats import export, make_portable, merge_into, read_adapter, vllm
from .formats.merged import logit_difference, prompt_logits
from .formats.peft import load_faults
from .formats.portable import TARGETS
from .generation import generate
from .injection import injection_of, merge, remove, unmerge

__all__ = ["CheckResult", "Inspection", "ModuleSummary", "inspect_adapter", "plot", "verify"]

_MAX_FAULTS = 20  # maximum number of faults listed individually


@dataclass(frozen=True)
class CheckResult:
    """The result of one check.

    Attributes:
        level: "ok", "warning" (works, with a limitation) or "fault" (does not work as it should).
        text: the finding.
        fix: what to do about it.
    """

    level: str
    text: str
    fix: str = ""

    def __str__(self) -> str:
        mark = {"ok": "  ok     ", "warning": "  WARNING", "fault": "  WRONG  "}[self.level]
        return f"{mark}  {self.text}" + (f"\n           -> {self.fix}" if self.fix else "")


@dataclass(frozen=True)
class ModuleSummary:
    """What an adapter does to one module.

    Attributes:
        name: its dotted name.
        shape: shape of the update, (out, in).
        r: rank of the factors.
        scaling: scaling factor of the update.
        norm: Frobenius norm of the update.
        singular_values: singular values of the update, in descending order.
        effective_rank: see `loralib.delta.effective_rank`.
    """

    name: str
    shape: tuple[int, int]
    r: int
    scaling: float
    norm: float
    singular_values: tuple[float, ...]
    effective_rank: float

    @property
    def kind(self) -> str:
        """The part of the name that is the same in all layers, such as self_attn.q_proj."""
        of_all_experts = re.sub(r"\[\d+\]$", "", self.name)
        return re.split(r"\.\d+\.", of_all_experts, maxsplit=1)[-1]

    @property
    def layer(self) -> int | None:
        """The number of the layer that contains the module."""
        number = re.search(r"\.(\d+)\.", self.name)
        return int(number[1]) if number else None


@dataclass(frozen=True)
class Inspection:
    """A description of an adapter; ``print`` it.

    Attributes:
        adapter: the adapter.
        modules: its modules that have valid factors.
        uses: for each tool, whether and how the adapter can be used there.
        checks: what is wrong with it, as far as this can be told without the base model.
    """

    adapter: Adapter
    modules: tuple[ModuleSummary, ...]
    uses: Mapping[str, str]
    checks: tuple[CheckResult, ...]

    def __str__(self) -> str:
        config, tensors = self.adapter.config, self.adapter.tensors
        dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
        targets = config.target_modules
        kinds = [
            name for name in ("use_rslora", "use_dora", "lora_bias", "trainable_token_indices") if getattr(config, name)
        ]
        kinds += [f"init_lora_weights={config.init_lora_weights!r}"] if config.init_lora_weights is not True else []
        kinds += ["fused blocks"] if config.enable_lora else []
        facts = [
            ("base model", config.base_model_name_or_path or "unknown"),
            ("base fingerprint", self.adapter.metadata.get(BASE, "none: any base with these shapes is accepted")),
            ("r", _with_exceptions(config.r, config.rank_pattern)),
            ("lora_alpha", _with_exceptions(config.lora_alpha, config.alpha_pattern)),
            ("target_modules", targets if isinstance(targets, str) else ", ".join(targets or ())),
            *([("target_parameters", ", ".join(config.target_parameters))] if config.target_parameters else []),
            ("kind", ", ".join(kinds) or "plain LoRA"),
            ("adapted modules", count(len(self.adapter.modules))),
            ("parameters", count(sum(tensor.numel() for tensor in tensors.values()))),
            ("size", f"{size(self.adapter.nbytes)} ({', '.join(f'{n} {kind}' for kind, n in dtypes.items())})"),
        ]
        known = re.compile(r".*\.(lora_[^.]+|lora_B\.bias|token_adapter\.[^.]+)")
        trained = [name for name in tensors if not known.fullmatch(name)]
        facts += [("trained in full", ", ".join(trained[:4]) + (" ..." if len(trained) > 4 else ""))] if trained else []
        parts = [table(facts)]
        if self.modules:
            parts += ["What it learned, by kind of module:", self._by_kind()]
        uses = [(TARGETS[target], verdict) for target, verdict in self.uses.items()]
        parts += ["Where it can be used:", table(uses)]
        parts += ["\n".join(str(check) for check in self.checks)] if self.checks else []
        return "\n\n".join(parts)

    def by_layer(self) -> str:
        """Returns a table of all modules by layer."""
        rows = [
            (v.name, v.r, f"{v.scaling:g}", f"{v.norm:.4g}", f"{max(v.singular_values, default=0):.4g}", _ranks([v]))
            for v in self.modules
        ]
        return table(rows, ("module", "r", "scaling", "norm", "largest singular value", "effective rank"))

    def _by_kind(self) -> str:
        kinds: dict[str, list[ModuleSummary]] = {}
        for module in self.modules:
            kinds.setdefault(module.kind, []).append(module)
        rows = []
        for kind, modules in kinds.items():
            largest = max(modules, key=lambda module: module.norm)
            where = "" if largest.layer is None else f" (layer {largest.layer})"
            mean = sum(module.norm for module in modules) / len(modules)
            layers = len({module.name.rpartition("[")[0] or module.name for module in modules})
            count_of_them = layers if layers == len(modules) else f"{layers} x {len(modules) // layers} experts"
            rows.append((kind, count_of_them, f"{mean:.4g}", f"{largest.norm:.4g}{where}", _ranks(modules)))
        return table(rows, ("module", "layers", "mean norm", "largest norm", "effective rank"))


def inspect_adapter(adapter: Adapter) -> Inspection:
    """Describes an adapter without its base model.

    Args:
        adapter: any adapter, even a damaged one.

    Returns:
        The description; `Inspection.checks` says what is wrong.
    """
    faults = faults_of(adapter)
    again = "copy the adapter again from its source, or train it again"
    checks = [CheckResult("fault", fault, again) for fault in faults[:_MAX_FAULTS]]
    if len(faults) > _MAX_FAULTS:
        checks.append(CheckResult("fault", f"and {len(faults) - _MAX_FAULTS:,} more faults of this kind", again))
    modules = _summaries(adapter, bool(faults))
    checks += _check_learned(modules) + _check_scaling(adapter)
    return Inspection(adapter, modules, _uses(adapter), tuple(checks))


def plot(inspection: Inspection, path: str | os.PathLike[str]) -> None:
    """Draws a heat map of the updates' norms, with a row per kind of module and a column per layer.

    Args:
        inspection: result of `inspect_adapter`.
        path: the PNG file to write.

    Raises:
        AdapterError: there is nothing to draw.
        MissingDependencyError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("drawing needs matplotlib: pip install matplotlib") from error
    if not inspection.modules:
        raise AdapterError("the adapter has no valid factors to draw")
    modules = inspection.modules
    kinds = list(dict.fromkeys(module.kind for module in modules))
    numbers = sorted({-1 if module.layer is None else module.layer for module in modules})  # -1: outside of all layers
    grid = torch.full((len(kinds), len(numbers)), torch.nan)
    for module in modules:
        column = numbers.index(-1 if module.layer is None else module.layer)
        grid[kinds.index(module.kind), column] = module.norm
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
) -> list[CheckResult]:
    """Applies an adapter to its base model and runs all checks.

    Args:
        model: the base model, preferably in fp32; it is left unchanged.
        tokenizer: its tokenizer.
        adapter: any adapter.
        prompts: texts like those that the adapter was trained on; only as much of each as the model takes is used.
        initial: see `loralib.formats.portable.make_portable`.
        max_new_tokens: length in tokens after which a continuation counts as not ending.

    Returns:
        The results in the order of the checks.
    """
    if injection_of(model) is not None:
        raise TargetError("verify needs the plain base model; call remove(model) first")
    if not prompts:
        raise ConfigError("verify needs at least one prompt")
    checks = list(inspect_adapter(adapter).checks)
    if faults_of(adapter):
        return checks
    checks.append(_check_base(model, adapter))
    rows = [prompt_ids(prompt, tokenizer)[: input_limit(model, tokenizer)] for prompt in prompts]
    inputs = [torch.tensor(ids) for ids in rows]
    before = prompt_logits(model, inputs)
    scale = max(1.0, *(float(logits.abs().max()) for logits in before))
    bound = scale * (1e-4 if next(model.parameters()).dtype == torch.float32 else 0.05)
    try:
        with _adapted(model, adapter, initial) as adapted:
            after = prompt_logits(adapted, inputs)
            checks.append(_check_effect(logit_difference(after, before)[0]))
            if adapted is model:
                merge(model)
                gap = logit_difference(prompt_logits(model, inputs), after)[0]
                checks.append(_check_difference("merged", gap, bound))
                unmerge(model)
            if hasattr(model, "generate"):
                checks.append(_check_ends(adapted, tokenizer, rows, max_new_tokens))
    except LoraError as error:
        return [*checks, CheckResult("fault", str(error))]
    checks += [_check_export(model, adapter, target, inputs, after, bound, initial) for target in TARGETS]
    return checks


# The adapter alone.


def _summaries(adapter: Adapter, faulty: bool) -> tuple[ModuleSummary, ...]:
    """Returns a summary of the low-rank part of each module with valid factors."""
    if adapter.config.enable_lora and faulty:  # in this case fused blocks cannot be expanded
        return ()
    broken = {place for place, _ in located_faults(adapter)}
    broken |= {name.rpartition(".")[0] for name in broken}
    plain = expand_blocks(adapter)
    summaries = []
    for name in plain.modules:
        if name not in broken:
            summaries += [_summary(*named) for named in updates_in(plain, name).items()]
    return tuple(summaries)


def _summary(name: str, update: Update) -> ModuleSummary:
    S = update.svd()[1]
    norm, values = float(S.norm()), tuple(S.tolist())
    return ModuleSummary(name, update.shape, update.r, update.scaling, norm, values, effective_rank(S))


def _check_learned(modules: Sequence[ModuleSummary]) -> list[CheckResult]:
    zero = [module.name for module in modules if module.norm == 0]
    if modules and len(zero) == len(modules):
        fix = "train it again: the learning rate may have been 0, or no gradient reached the adapter"
        return [CheckResult("fault", "nothing was learned: every update is zero", fix)]
    if zero:
        names = ", ".join(zero[:4]) + (" ..." if len(zero) > 4 else "")
        fix = "they were not used in training (or were added by a conversion); leave them out to save memory"
        return [CheckResult("warning", f"{len(zero)} of {len(modules)} modules learned nothing: {names}", fix)]
    return []


def _check_scaling(adapter: Adapter) -> list[CheckResult]:
    """Warns if another tool would compute a different update."""
    config = adapter.config
    checks = []
    fix = "loralib convert --target llamacpp (or vllm, mlx, peft) moves the scaling into B"
    if config.use_rslora:
        right, wrong = scaling_of(config.r, config.lora_alpha, True), scaling_of(config.r, config.lora_alpha)
        text = f"use_rslora: llama.cpp's own converter would scale by {wrong:.4g} instead of {right:.4g}"
        checks.append(CheckResult("warning", text, fix))
    if config.alpha_pattern:
        text = f"alpha_pattern: llama.cpp's own converter and older vLLMs use lora_alpha {config.lora_alpha:g} for all"
        checks.append(CheckResult("warning", text, fix))
    if config.changes_base:
        text = (
            f"init_lora_weights {config.init_lora_weights!r}: tools that do not repeat this initialisation would add "
            "the adapter to the wrong base weights"
        )
        checks.append(CheckResult("warning", text, "loralib convert --target peft --model MODEL makes it plain LoRA"))
    return checks


def _uses(adapter: Adapter) -> dict[str, str]:
    """Returns whether and how each tool can use the adapter."""
    config = adapter.config
    full_training = [name for name in ("modules_to_save", "bias") if getattr(config, name) not in (None, (), "none")]
    head_loads = bool(config.modules_to_save) and not (
        vllm.head_faults(config, None) or vllm.tensor_faults(adapter.tensors)
    )
    special = "DoRA" if config.use_dora else str(config.init_lora_weights) if config.changes_base else ""
    uses = {"peft": "yes, as it is" if not config.enable_lora else "yes, once saved as a PEFT directory"}
    if faults := load_faults(adapter.target_modules, adapter.metadata):
        uses["peft"] = f"no: {faults[0]}, or merge the adapter (loralib merge)"
    for target in ("vllm", "llamacpp", "mlx"):
        convert = f"after loralib convert --target {target} --model MODEL"
        if full_training and not (target == "vllm" and head_loads):
            uses[target] = f"no: {' and '.join(full_training)} are not loaded by it; merge the adapter (loralib merge)"
        elif config.lora_bias or config.trainable_token_indices:
            what = "lora_bias" if config.lora_bias else "trainable_token_indices"
            uses[target] = f"no: {what} is not loaded by it; merge the adapter (loralib merge)"
        elif adapter.expert_weights and target != "vllm":
            uses[target] = "no: adapters of experts cannot be written for it; merge the adapter (loralib merge)"
        elif special:
            uses[target] = f"{convert} ({special} becomes plain LoRA)"
        elif target == "vllm" and not (config.alpha_pattern or config.enable_lora or adapter.expert_weights):
            uses[target] = "yes, as it is"
        else:
            uses[target] = convert
        if target == "vllm" and head_loads:
            uses[target] += ", on a base that has a head of the same size"
    return uses


def _with_exceptions(value: float, pattern: Mapping[str, float]) -> str:
    others = ", ".join(f"{key}: {other:g}" for key, other in list(pattern.items())[:4])
    return f"{value:g}" + (f" ({others}{' ...' if len(pattern) > 4 else ''})" if pattern else "")


def _ranks(modules: Sequence[ModuleSummary]) -> str:
    mean = sum(module.effective_rank for module in modules) / len(modules)
    return f"{mean:.1f} of {max(module.r for module in modules)}"


# The adapter on its base model.


def _check_base(model: nn.Module, adapter: Adapter) -> CheckResult:
    found = compare_base(model, adapter)
    name = adapter.config.base_model_name_or_path
    fix = f"load the base it was trained on{f' ({name})' if name else ''}"
    if found == "unknown":
        return CheckResult("warning", "the adapter does not record which base it was trained on: not checked", fix)
    if found in ("shapes", "rows"):
        return CheckResult(
            "fault", f"wrong base: {type(model).__name__} has different parameters than the adapter's base", fix
        )
    if found == "values":
        return CheckResult("fault", "wrong base: the parameters have the same shapes but different values", fix)
    if found == "copy":
        return CheckResult(
            "warning", "the adapter was trained on a copy of this base; one of the two is in 4 bits", fix
        )
    return CheckResult("ok", "this is the base that the adapter was trained on")


@contextmanager
def _adapted(model: nn.Module, adapter: Adapter, initial: Adapter | None = None) -> Iterator[nn.Module]:
    """Yields the model with the adapter applied; or a merged copy, if layers cannot compute this adapter."""
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


def _check_effect(change: float) -> CheckResult:
    if change == 0:
        fix = "train it, or check that target_modules names layers that the model uses"
        return CheckResult("fault", "the adapter changes no logit on these prompts", fix)
    return CheckResult("ok", f"the adapter moves logits by up to {change:.3g}")


def _check_export(
    model: nn.Module,
    adapter: Adapter,
    target: str,
    inputs: Sequence[Tensor],
    expected: Sequence[Tensor],
    bound: float,
    initial: Adapter | None,
) -> CheckResult:
    title = TARGETS[target]
    try:
        portable = make_portable(adapter, target, model, initial=initial)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "adapter.gguf" if target == "llamacpp" else Path(folder)
            export(portable, target, path, model)
            back = read_adapter(path, model=model)
        with _adapted(model, back) as adapted:
            logits = prompt_logits(adapted, inputs)
    except LoraError as error:
        return CheckResult("warning", f"cannot be used in {title}: {error}")
    gap = logit_difference(logits, expected)[0]
    return _check_difference(f"exported for {title}", gap, bound + portable.error * gap)


def _check_ends(model: nn.Module, tokenizer: Any, rows: Sequence[Sequence[int]], max_new_tokens: int) -> CheckResult:
    if getattr(tokenizer, "eos_token_id", None) is None:
        fix = "give the tokenizer an end token (eos_token) that training and generation both use"
        return CheckResult("fault", "the tokenizer has no end token: no text can ever end", fix)
    results = generate(model, tokenizer, rows, max_new_tokens=max_new_tokens)
    ended = sum(result.finish_reason == "stop" for result in results)
    text = f"{ended} of {len(results)} continuations end on their own within {max_new_tokens} tokens"
    if ended:
        return CheckResult("ok", text)
    fix = (
        "end token missing: if texts should end, train on completions that end with it, and check with `loralib data "
        "preview` that --seq_len does not cut it off; or give prompts like those in the training data"
    )
    return CheckResult("warning", text, fix)


def _check_difference(what: str, gap: float, bound: float) -> CheckResult:
    text = f"{what}: logits differ by {gap:.2g} from base plus adapter"
    if gap <= bound:
        return CheckResult("ok", text)
    return CheckResult(
        "fault", f"{text}, expected at most {bound:.2g}", "use the adapter unmerged, and please report this"
    )
