"""Trains several runs together: `loralib.train_many` and ``loralib sweep``.

Runs that train linear layers share one base and its passes (`shared_step.py`): each run is a `Trainer`
that yields requests, and one pass answers all of them.  Other kinds of runs follow, one after the other.  Each has an
ordinary run directory.  Runs that share passes save after the same updates, so that an interrupted sweep resumes from a
state that all of them have: with the same passes, and so with bit-identical results.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from ..allocator import keep_freed_memory
from ..budget import free_on
from ..console import counted, size
from ..data import CLASSIFY, PREFERENCES
from ..engine.causal import require_causal
from ..engine.forward import device_of
from ..engine.half import computes_in_half
from ..engine.placement import require_free
from ..engine.rope import rope_limit
from ..engine.row_linears import why_not_shared
from ..errors import ConfigError, InterruptedRunError, LoraError, TrainingError, first_line, list_faults
from ..files import hold_directory, remove_file, write_whole
from ..injection import adapted_layers, adapted_model, refuse_peft
from ..modes import keeping_modes
from ..wrapping import is_spread
from .config import TrainConfig
from .memory import explain_out_of_memory, freeze_objects, gradient_checkpointing
from .plan import Data, Plan, automatic_settings, make_plan
from .preferences import PREFERENCE_STEPS
from .ranks import ALONE, joined
from .record import run_record
from .report import Reporter, plot_runs
from .run_directory import RunDirectory, checkpoint_files, hold_run, updates_of
from .shared_step import RunBatch, SharedStep
from .start import EvaStarts
from .step import Step, make_step
from .sweep_directory import BEST, PLOT_FILE, clear_for_sweep, runs_to_resume
from .sweep_record import Outcome, SweepResult, differing_settings, sweep_table, write_record_of
from .trainer import (
    ONE_RUN_AT_A_TIME,
    Gradient,
    Pause,
    Request,
    Response,
    StopRequest,
    Trainer,
    TrainResult,
    Validation,
    adapt,
    check_fit,
    finished,
    gradient_norm,
    plan_for,
    run_in,
    stop_on_signal,
)

__all__ = ["run_names", "train_all"]

# Settings that must be the same for all runs of a sweep: those of data and model, of how a pass is computed, and those
# that change what the loss measures, by which the best run is chosen.
SAME: Final = frozenset(
    "model train_data valid_data valid_fraction data_format columns as_chat chat_template output_dir max_train_samples "
    "max_valid_samples seq_len task objective beta dtype quantize device hidden_dim num_layers packing share_prompts "
    "label_smoothing shard compile gradient_checkpointing resume overwrite report_to".split()
)
_BYTES: Final = 28  # per trained number: itself, its start, gradient, Adam's two moments, and two casts with gradients
_ROOM: Final = 0.8  # the share of free memory that adapters may take
_LONGEST: Final = 80  # maximum length of a directory name; sweep.json maps numbered runs to their settings


def run_names(configs: Sequence[TrainConfig]) -> list[str]:
    """Returns a name for each run, built from the settings that differ; also used for its directory.

    Raises:
        ConfigError: two runs are identical, or settings differ that all runs must share.

    >>> run_names([TrainConfig(lr=1e-4, rank=8), TrainConfig(lr=3e-4, rank=8)])
    ['lr-0.0001', 'lr-0.0003']
    """
    if not configs:
        raise ConfigError("no runs are given, expected at least one TrainConfig")
    values = [config.to_dict() for config in configs]
    differ = [name for name in values[0] if any(each[name] != values[0][name] for each in values)]
    faults = [
        f"{name}: {' and '.join(sorted({repr(each[name]) for each in values}))}" for name in differ if name in SAME
    ]
    if faults:
        raise ConfigError(
            list_faults(
                "these settings differ, but all runs of a sweep must share them",
                faults,
                "Run a separate sweep for each value.",
            )
        )
    faults = list(dict.fromkeys(fault for config in configs for fault in _trains_the_base(config)))
    if faults:
        fix = "Train such runs one by one, with `loralib train`."
        raise ConfigError(list_faults("a sweep cannot train the base model, which all its runs share", faults, fix))
    names = ["_".join(f"{name}-{_shown(each[name])}" for name in differ) or "run" for each in values]
    if max(map(len, names)) > _LONGEST and len(set(names)) == len(names):
        return [f"run-{number}" for number in range(1, len(names) + 1)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(list_faults("these runs occur more than once", twice, "List each value only once."))
    return names


def _trains_the_base(config: TrainConfig) -> list[str]:
    """Returns the settings with which a run would train weights of the base, which the other runs share."""
    settings = {
        "bias": config.bias != "none",
        "modules_to_save": bool(config.modules_to_save),
        "task": config.task == CLASSIFY,
    }
    return [f"{name}: {getattr(config, name)!r}" for name, does in settings.items() if does]


def _shown(value: Any) -> str:
    if value is None:
        return "auto"
    text = _short(value) if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)
    if isinstance(value, (list, tuple)):
        text = "+".join(map(str, value))
    return re.sub(r"[^\w.+-]+", "-", text).strip("-.") or "none"


def _short(value: float) -> str:
    """Returns a number as text, in all its digits only if it needs them.

    >>> _short(1.0), _short(0.00012345678)
    ('1', '0.00012345678')
    """
    text = f"{value:g}"
    return text if float(text) == value else repr(value)


def train_all(
    model: nn.Module,
    data: Data,
    configs: Sequence[TrainConfig],
    tokenizer: Any,
    valid_data: Data | None,
    output_dir: str,
    verbose: bool,
) -> SweepResult:
    """Trains all runs; see `loralib.train_many`."""
    with joined() as ranks:
        if ranks.size > 1:
            raise ConfigError("a sweep runs in a single process, but several were started: run it without torchrun")
    names = run_names(configs)
    model = adapted_model(model)
    refuse_peft(model)
    if adapted_layers(model):
        raise ConfigError(
            "the model already has an adapter, but a sweep gives each run its own: call lora.remove(model) first"
        )
    if is_spread(model) or configs[0].shard:
        raise ConfigError("shard is on, but a sweep keeps the whole base in one process: leave it out")
    with hold_directory(output_dir) as path, ExitStack() as stack:
        sweep = _Sweep(path, model, data, tokenizer, valid_data, Reporter(verbose))
        sweep.add(names, configs, stack)
        return sweep.train()


@dataclass(eq=False)
class _SweepRun:
    """One run of a sweep."""

    name: str
    config: TrainConfig
    directory: RunDirectory
    result: TrainResult | None = None
    dropped: str = ""
    last_loss: float | None = None
    why_alone: str = ""

    @property
    def is_done(self) -> bool:
        return self.result is not None or bool(self.dropped)


class _Sweep:
    """All runs of a sweep, from the contents of their directories to the best run's adapter."""

    def __init__(
        self, path: Path, model: nn.Module, data: Data, tokenizer: Any, valid_data: Data | None, reporter: Reporter
    ) -> None:
        self.path, self.model, self.reporter = path, model, reporter
        self._given = (data, tokenizer, valid_data)
        self._plans: dict[Any, Plan] = {}
        self._reference = path / "reference.safetensors"
        self.runs: list[_SweepRun] = []

    def add(self, names: Sequence[str], configs: Sequence[TrainConfig], stack: ExitStack) -> None:
        """Opens the directory of each run; runs finished or dropped before the sweep was resumed are not repeated."""
        self._check(names, configs)
        known = dict[str, dict[str, Any]]()
        if configs[0].resume:
            known = runs_to_resume(self.path, dict(zip(names, differing_settings(configs), strict=True)))
        else:
            clear_for_sweep(self.path, names, configs[0], self.reporter.say)
        for name, config in zip(names, configs, strict=True):
            config = config.replace(output_dir=str(self.path / name))
            run = _SweepRun(name, config, stack.enter_context(hold_run(config, ALONE)))
            run.dropped = known.get(name, {}).get("dropped", "")
            run.last_loss = known.get(name, {}).get("loss")
            run.directory.look()
            if not run.dropped and (ended := run.directory.finished_run()) is not None:
                run.result = finished(run.directory, ended, Reporter(False))
            self.runs.append(run)

    def train(self) -> SweepResult:
        """Trains the remaining runs, and reports the best run."""
        left, why_all = [run for run in self.runs if not run.is_done], _why_apart(self.model)
        for run in left:
            run.why_alone = _why_alone(run.config) or why_all
        together, apart = [run for run in left if not run.why_alone], [run for run in left if run.why_alone]
        self._tell(together, apart)
        self.write()
        if together:
            apart += self._train_together(together)
        for run in apart:
            self._train_alone(run)
        remove_file(self._reference)
        return self._result()

    def _check(self, names: Sequence[str], configs: Sequence[TrainConfig]) -> None:
        """Refuses settings that do not fit the model, before any run has trained."""
        faults = []
        for name, config in zip(names, configs, strict=True):
            try:
                check_fit(self.model, config)
            except LoraError as error:
                faults.append(f"{name}: {error}")
        if faults:
            raise ConfigError(list_faults("these runs cannot be trained", faults, "Leave their values out."))

    def _tell(self, together: Sequence[_SweepRun], apart: Sequence[_SweepRun]) -> None:
        say = self.reporter.say
        say(f"{counted(len(self.runs), 'run')}: {len(together)} trained together, {len(apart)} one by one")
        for run in apart:
            say(f"  {run.name} trains on its own: {run.why_alone}")

    def write(self) -> list[Outcome]:
        """Writes the current outcome of each run to disk, and returns the outcomes."""
        outcomes = [
            Outcome.of(run.name, settings, run.directory.path, run.result, run.dropped, run.last_loss)
            for run, settings in zip(self.runs, differing_settings([each.config for each in self.runs]), strict=True)
        ]
        write_record_of(self.path, outcomes)
        return outcomes

    def _train_alone(self, run: _SweepRun) -> None:
        data, tokenizer, valid_data = self._given
        self.reporter.say(f"Training {run.name} ...")
        twin, silent = twin_of(self.model), Reporter(False)
        run.directory.reference = self._reference
        frozen = {name: p.requires_grad for name, p in self.model.named_parameters()}
        try:
            run.result = run_in(
                run.directory, twin, data, run.config, tokenizer, valid_data, silent, ALONE, self._planned
            )
        except InterruptedRunError:
            raise
        except TrainingError as error:
            self.drop(run, error)
        finally:
            for name, p in self.model.named_parameters():
                p.requires_grad_(frozen[name])
        self.write()

    def drop(self, run: _SweepRun, error: Exception) -> None:
        """Drops a run, and prints why."""
        run.dropped = first_line(error).partition(". ")[0]
        self.reporter.say(f"Dropped {run.name}: {run.dropped}. The other runs continue.")

    def _plan(self, run: _SweepRun) -> Plan:
        data, tokenizer, valid_data = self._given
        return plan_for(
            run.directory, self.model, data, run.config, tokenizer, valid_data, Reporter(False), ALONE, self._planned
        )

    def _planned(
        self,
        model: nn.Module,
        data: Data,
        valid: Data | None,
        tokenizer: Any,
        config: TrainConfig,
        say: Any,
        limit: Any,
    ) -> Plan:
        """Plans a run; examples are read only once for runs that use the same ones.

        Their limit is that of the first such run, since later ones find less memory free.
        """
        key = (config.seed, config.seq_len, config.batch_size)
        if key not in self._plans:
            self._plans[key] = make_plan(model, data, valid, tokenizer, config, self.reporter.say, limit)
        plan = self._plans[key]
        read = {"seq_len": plan.config.seq_len, "valid_fraction": plan.config.valid_fraction}
        chosen = automatic_settings(model, config.replace(**read), plan.train, lambda _: None)
        return dataclasses.replace(plan, config=chosen)

    def _train_together(self, runs: list[_SweepRun]) -> list[_SweepRun]:
        """Trains runs in shared passes; returns those that turned out to need their own passes."""
        given = {run: run.config for run in runs}
        plans = {run: self._plan(run) for run in runs}
        frozen = {name: p.requires_grad for name, p in self.model.named_parameters()}
        with ONE_RUN_AT_A_TIME, stop_on_signal() as stop, ExitStack() as stack:
            require_free(self.model, "training")
            require_causal(self.model)
            try:
                twins, apart = self._twins(plans)
                if twins:
                    config = runs[0].config
                    stack.enter_context(keeping_modes(self.model))
                    stack.enter_context(keep_freed_memory(lean=config.gradient_checkpointing))
                    stack.enter_context(freeze_objects())
                    stack.enter_context(
                        gradient_checkpointing(self.model) if config.gradient_checkpointing else nullcontext()
                    )
                    stack.enter_context(explain_out_of_memory(lambda: "Put fewer runs into one sweep."))
                    _SharedPasses(self, twins, plans, given, stop).train()
            finally:
                for name, p in self.model.named_parameters():
                    p.requires_grad_(frozen[name])
        return apart

    def _twins(self, plans: Mapping[_SweepRun, Plan]) -> tuple[dict[_SweepRun, nn.Module], list[_SweepRun]]:
        twins: dict[_SweepRun, nn.Module] = {}
        apart, needed, eva_starts = [], 0, EvaStarts()
        free = free_on(device_of(self.model))
        for run, plan in plans.items():
            twin = twin_of(self.model)
            adapt(twin, plan, Reporter(False), eva_starts)
            if why := why_not_shared(twin) or (plan.config.lora_dropout and self._why_not_dropped):
                run.why_alone = why
                self.reporter.say(f"  {run.name} trains on its own: {why}")
                apart.append(run)
                continue
            needed += _BYTES * sum(p.numel() for p in twin.parameters() if p.requires_grad)
            if free is not None and needed > _ROOM * free:
                raise ConfigError(
                    f"{counted(len(plans), 'run')} need more memory than is free: the adapters of the first "
                    f"{len(twins) + 1} take about {size(needed)} with their optimisers, but only {size(free)} is "
                    f"free. Split the runs into sweeps of at most {max(1, len(twins))}"
                )
            twins[run] = twin
        return twins, apart

    @functools.cached_property
    def _why_not_dropped(self) -> str:
        """Why a run cannot draw its own dropout masks in a shared pass, or ""."""
        packing = make_step(self.model, packing=self.runs[0].config.packing, compiles=False).packing
        return "" if packing else "dropout draws a number for each token of its batches, which are padded here"

    def _result(self) -> SweepResult:
        outcomes = self.write()
        ranked = sorted(
            (each for each in outcomes if each.loss is not None and not each.dropped), key=lambda o: o.loss or 0.0
        )
        best = ranked[0] if ranked else None
        unit = PREFERENCE_STEPS.get(self.runs[0].config.objective, Step).unit
        try:
            plot_runs([(each.name, each.path / "metrics.jsonl") for each in outcomes], self.path / PLOT_FILE, unit)
        except Exception as error:  # a failed plot of any kind must not abort the sweep
            self.reporter.say(f"WARNING: {self.path / PLOT_FILE} could not be drawn: {first_line(error)}")
        if best is not None:
            _copy_adapter(best.adapter, self.path / BEST)
        result = SweepResult(self.path, outcomes, best)
        self.reporter.say()
        self.reporter.say(sweep_table(result))
        if best is None:
            raise TrainingError(
                list_faults("no run finished", [f"{o.name}: {o.dropped}" for o in outcomes], "Lower --lr.")
            )
        self.reporter.say(f"Best: {best.name} (loss {best.loss:.4f}); its adapter: {self.path / 'best'}")
        return result


def _copy_adapter(source: Path, target: Path) -> None:
    """Copies an adapter with its files; the config comes last, because it marks a complete adapter."""
    files = [each for each in source.iterdir() if each.is_file() and not each.name.startswith(".")]
    leave = {"metrics.jsonl", "loss.png", "README.md", "run.toml", "pytorch_model.bin"}
    for file in sorted(files, key=lambda each: each.name == "adapter_config.json"):
        if file.name not in leave:
            write_whole(target / file.name, functools.partial(shutil.copyfile, file))


def twin_of(model: nn.Module) -> nn.Module:
    """Returns a copy of a model with its own modules, but the same parameters and buffers.

    >>> model = nn.Linear(2, 2)
    >>> twin = twin_of(model)
    >>> twin is model, twin.weight is model.weight
    (False, True)
    """
    shared: dict[int, Any] = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    shared |= {id(module.__dict__["config"]): module.__dict__["config"] for module in model.modules()
               if "config" in module.__dict__}  # fmt: skip
    return copy.deepcopy(model, shared)


def _why_alone(config: TrainConfig) -> str:
    """Returns why a run with these settings cannot share passes, or "" if it can."""
    reasons = {
        "rows of an embedding or head are trained": config.trainable_token_indices is not None,
        "recomputed activations would need the same dropout": config.lora_dropout > 0 and config.gradient_checkpointing,
        f"its objective is {config.objective}": config.objective in PREFERENCES,
    }
    return next((why for why, holds in reasons.items() if holds), "")


def _why_apart(model: nn.Module) -> str:
    """Returns why runs on this base cannot share passes, or "" if they can."""
    config = getattr(model, "config", None)
    drops = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    if drops or getattr(config, "attention_dropout", None):
        return "the base has dropout, which draws random numbers"
    if computes_in_half(model):
        return "in fp16 each pass has its own loss scale"
    if rope_limit(model) is not None:
        return "positions depend on the longest row in a pass"
    return ""


@dataclass(eq=False)
class _Member:
    """A run that takes part in shared passes."""

    number: int
    run: _SweepRun
    trainer: Trainer
    requests: Any
    request: Request | None = None
    spent: float = field(default=0.0)


class _SharedPasses:
    """Answers the requests of several runs with shared passes; `Trainer` defines the requests."""

    def __init__(
        self,
        sweep: _Sweep,
        twins: Mapping[_SweepRun, nn.Module],
        plans: Mapping[_SweepRun, Plan],
        given: Mapping[_SweepRun, TrainConfig],
        stop: StopRequest,
    ) -> None:
        config = next(iter(plans.values())).config
        self.sweep, self.stop = sweep, stop
        self.step: SharedStep = make_step(  # type: ignore[assignment]
            sweep.model,
            kind=lambda model, **options: SharedStep(model, list(twins.values()), **options),
            packing=config.packing,
            share_prompts=config.share_prompts,
            label_smoothing=config.label_smoothing,
            compiles=False,
        )
        _agree_where_to_resume([run.directory for run in twins])
        self.members: list[_Member] = []
        for number, (run, twin) in enumerate(twins.items()):
            record = run_record(twin, given[run], plans[run].data)
            trainer = Trainer(twin, plans[run], record, run.directory, Reporter(False), stop, ALONE, self.step)
            self.members.append(_Member(number, run, trainer, trainer.requests()))
            self.step.random[number].set_state(torch.get_rng_state())  # set by the trainer
        self._has_lost = False

    def train(self) -> None:
        """Trains all runs to the end."""
        reporter = self.sweep.reporter
        if self.step.note:
            reporter.say(f"Batches are padded: {self.step.note}.")
        self.sweep.model.train()
        try:
            for member in self.members:
                member.trainer.begin()
            reporter.start_bar(
                max(m.trainer.progress.step for m in self.members), max(m.trainer.total for m in self.members)
            )
            with self.step:
                for member in list(self.members):
                    self._send(member, None)
                while self.members:
                    self._round()
        finally:
            reporter.close_bar()
            for member in self.members:
                member.trainer.metrics.close()

    def _round(self) -> None:
        """Answers the requests of one kind; updates wait until all runs are ready for theirs."""
        for kind, answer in ((Validation, self._validate), (Pause, self._pause), (Gradient, self._update)):
            wanting = [member for member in self.members if isinstance(member.request, kind)]
            if wanting:
                answer(wanting)
                return

    def _send(self, member: _Member, answer: Any) -> None:
        """Resumes a run until its next request; a run that diverges leaves."""
        try:
            member.request = member.requests.send(answer)
        except StopIteration:
            self._leave(member)
            self._finish(member)
        except TrainingError as error:
            self._leave(member)
            losses = member.trainer.losses
            member.run.last_loss = losses[-1] if losses else None
            self.sweep.drop(member.run, error)
            self._has_lost = True
            member.trainer.metrics.close()

    def _leave(self, member: _Member) -> None:
        self.members.remove(member)

    def _set_random(self, member: _Member) -> None:
        """Gives PyTorch's generator, which checkpoints hold, the state of a run's own."""
        torch.set_rng_state(self.step.random[member.number].get_state())

    def _finish(self, member: _Member) -> None:
        self._set_random(member)
        try:
            member.run.result = member.trainer.finish()
        except TrainingError as error:  # the run learned nothing
            self.sweep.drop(member.run, error)
        finally:
            member.trainer.metrics.close()
        self.sweep.write()

    def _pause(self, pausing: Sequence[_Member]) -> None:
        requests = [member.request for member in pausing if isinstance(member.request, Pause)]
        if self.stop or self._has_lost or any(request.is_due or request.is_over for request in requests):
            for member in self.members:  # all at the same update, and before any of them ends
                self._set_random(member)
                member.trainer.save()
        if self._has_lost:
            self._has_lost = False
            self.sweep.write()
        if self.stop:
            done = max(member.trainer.progress.step for member in self.members)
            raise self.stop.error(
                f"stopped after update {done} and saved. Run the same command with --resume to continue."
            )
        for member in pausing:
            self._send(member, None)

    def _validate(self, wanting: Sequence[_Member]) -> None:
        started = time.perf_counter()
        same: dict[Any, list[_Member]] = {}
        for member in wanting:
            same.setdefault(_what_it_validates(member), []).append(member)
        requests = [(members[0].number, cast(Validation, members[0].request)) for members in same.values()]
        wanted = [(number, request.examples, request.max_tokens) for number, request in requests]
        figures = self._evaluated(wanted)
        if figures is not None and len(wanted) > 1 and not all(math.isfinite(each["loss"]) for each in figures):
            # As in `_update`: what is not finite in one run could have reached another.
            apart = [self._evaluated([each]) for each in wanted]
            figures = None if None in apart else [each[0] for each in apart if each is not None]
        share = (time.perf_counter() - started) / len(wanting)
        for at, members in enumerate(same.values()):
            for member in members:
                self._send(member, Response(None if figures is None else dict(figures[at]), share))
        if figures is not None and self.members:
            self.sweep.reporter.say(_validations(self.members))

    def _evaluated(self, wanted: Sequence[tuple[int, Any, int]]) -> list[dict[str, float]] | None:
        return self.step.unsmoothed().evaluate_all(wanted, lambda: bool(self.stop))  # type: ignore[attr-defined,no-any-return]

    def _update(self, wanting: Sequence[_Member]) -> None:
        started = time.perf_counter()
        random = [generator.get_state() for generator in self.step.random]
        done = self._gradients(wanting)
        norms = {member: gradient_norm(member.trainer.parameters.values()) for member in wanting}
        if len(wanting) > 1 and not all(_is_finite(done[member], norms[member]) for member in wanting):
            # Infinities in one run could reach another through a product with 0, so each run is recomputed on its own.
            for member in wanting:
                member.trainer.optimizer.zero_grad(set_to_none=True)
            for generator, state in zip(self.step.random, random, strict=True):
                generator.set_state(state)
            done = {member: self._gradients([member])[member] for member in wanting}
            norms = {}
        seconds = time.perf_counter() - started
        tokens = {member: sum(stats.tokens for stats in done[member]) for member in wanting}
        for member in wanting:
            share = seconds * tokens[member] / max(1, sum(tokens.values()))
            self._send(member, Response(done[member], share, norms.get(member)))
        self._show(seconds, sum(tokens.values()))

    def _gradients(self, wanting: Sequence[_Member]) -> dict[_Member, list[Any]]:
        batches = {m: m.request.batches for m in wanting if isinstance(m.request, Gradient)}
        done: dict[_Member, list[Any]] = {member: [] for member in wanting}
        for turn in range(max(map(len, batches.values()))):
            here = [member for member in wanting if turn < len(batches[member])]
            parts: list[RunBatch] = [(member.number, *batches[member][turn]) for member in here]
            for member, stats in zip(here, self.step.in_passes(parts), strict=True):
                done[member].append(stats)
        return done

    def _show(self, seconds: float, tokens: int) -> None:
        if not self.members:
            return
        most = max(self.members, key=lambda member: member.trainer.progress.step).trainer
        lowest = min(member.trainer.losses[-1] for member in self.members if member.trainer.losses)
        left = (most.total - most.progress.step) * seconds
        self.sweep.reporter.update(most.progress.step, most.total, lowest, {}, tokens / seconds, left)


def _is_finite(done: Sequence[Any], norm: Tensor) -> bool:
    return math.isfinite(float(torch.stack([stats.objective for stats in done]).sum()) + float(norm))


def _what_it_validates(member: _Member) -> Any:
    """Returns a key for what a run validates: before the first update, all adapters without effect share one."""
    request, trainer = cast(Validation, member.request), member.trainer
    apart = None if trainer.from_base and not trainer.progress.step else member.number
    return apart, request.max_tokens, tuple(map(id, request.examples))


def _validations(members: Sequence[_Member]) -> str:
    ranked = sorted(members, key=lambda m: m.trainer.progress.valid_losses[-1][1])
    step = max(m.trainer.progress.step for m in members)
    best = ", ".join(f"{m.run.name} {m.trainer.progress.valid_losses[-1][1]:.4f}" for m in ranked[:4])
    return f"Update {step}: validation losses {best}{', ...' if len(ranked) > 4 else ''}"


def _agree_where_to_resume(directories: Sequence[RunDirectory]) -> None:
    """Makes all runs resume at the last update for which all of them have a checkpoint."""
    if not directories[0].config.resume:
        return
    known = [{updates_of(path) for path in checkpoint_files(each.checkpoints)} for each in directories]
    last = max(set.intersection(*known), default=-1)
    for directory in directories:
        directory.resume_at = last
