"""Work out what fits in memory, before anything is loaded, and which command to run.

loralib plan --model gpt2 --batch_size 8 --seq_len 512
loralib plan --model meta-llama/Llama-3.1-8B --gpus 8 --gpu_memory 80
loralib plan --model ./my-model --gpus 1 --gpu_memory 24 --serve --requests 64 --context 4096

Only the model's config.json is needed.  Without --gpus, the plan is for this machine's memory.  The exit code is 0 if
something fits, and 1 if nothing does.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from ..bases import load_empty
from ..budget import Budget, serving_budget, traffic, training_budget
from ..config import LoraConfig
from ..console import count, counted, say, size, table
from ..engine.limits import context_length
from ..files import free_memory
from ..injection import adapted_layers, inject
from ..settings import check, setting, settings_class
from ..training import TrainConfig
from ..wrapping import decoder_blocks
from . import add_fields, from_args

_ROOM: Final = 0.9  # share of the memory to plan with; the estimates can be off by several percent
_LENGTH: Final = 1024  # default number of tokens of an example
_GB: Final = 2**30


def _as_in_training(name: str) -> Any:
    """Returns a copy of the `loralib train` setting of that name, with the same flag, check and default."""
    (spec,) = [spec for spec in dataclasses.fields(TrainConfig) if spec.name == name]
    return dataclasses.field(default=spec.default, metadata=spec.metadata)


_MACHINES, _SERVING = "machines", "serving"


@settings_class
@dataclass(frozen=True)
class PlanConfig:
    """The settings of a plan.

    Raises:
        ConfigError: one or more settings are invalid; the message lists all of them.
    """

    model: str = _as_in_training("model")
    dtype: str = _as_in_training("dtype")
    quantize: str = _as_in_training("quantize")
    gpus: int | None = setting(
        None, "GPUs per machine; none: use the CPU", _MACHINES, at_least=1, at_most=64, common=True
    )
    gpu_memory: float | None = setting(
        None,
        "memory of each GPU in GB; default: that of this machine's GPU",
        _MACHINES,
        above=0,
        at_most=2048,
        common=True,
    )
    nodes: int = setting(1, "machines", _MACHINES, at_least=1, at_most=100_000)
    batch_size: int = _as_in_training("batch_size")
    seq_len: int | None = _as_in_training("seq_len")
    rank: int = _as_in_training("rank")
    target_modules: str | Sequence[str] = _as_in_training("target_modules")
    gradient_checkpointing: bool = _as_in_training("gradient_checkpointing")
    serve: bool = setting(False, "plan for `loralib serve` instead of training", _SERVING)
    requests: int = setting(8, "number of requests answered at the same time", _SERVING, at_least=1, at_most=1_000_000)
    context: int = setting(
        4096, "tokens per request, prompt and answer together", _SERVING, at_least=1, at_most=100_000_000
    )

    def __post_init__(self) -> None:
        check(self, "the plan", self._faults)

    def _faults(self) -> list[str]:
        faults = []
        if self.gpus is None:
            faults += [
                f"{name} is {value:g}, but no GPUs are planned for: give --gpus N"
                for name, value in {"gpu_memory": self.gpu_memory, "nodes": self.nodes}.items()
                if value not in (None, 1)
            ]
        elif self.gpu_memory is None and not torch.cuda.is_available():
            faults.append(
                "gpus is given without gpu_memory, and this machine has no GPU to read it from: give --gpu_memory GB"
            )
        if self.serve and self.nodes > 1:
            faults.append(f"nodes is {self.nodes}, but `loralib serve` runs in one process: leave out --nodes")
        return faults

    @property
    def processes(self) -> int:
        """The number of processes that take part in training."""
        return (self.gpus or 1) * self.nodes


@dataclass(frozen=True)
class Choice:
    """One way to train or serve.

    Attributes:
        name: a short description.
        flags: command-line flags that choose it, in addition to those the user gave.
        budget: memory needed by each process.
        room: bytes of memory available to each process, None if unknown.
        sent: bytes that each process sends to others per update.
    """

    name: str
    flags: tuple[str, ...]
    budget: Budget
    room: float | None
    sent: float = 0.0

    @property
    def fits(self) -> bool:
        """Whether it fits with a margin; True if the available memory is unknown."""
        return self.room is None or self.budget.total <= _ROOM * self.room


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for every setting of a plan."""
    add_fields(parser, PlanConfig)
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Prints the plan; returns 1 if nothing fits."""
    config = from_args(PlanConfig, args)
    model: Any = load_empty(config.model, dtype=None if config.dtype == "auto" and not config.gpus else _dtype(config))
    parameters = sum(p.numel() for p in model.parameters())
    if not config.serve:
        inject(model, LoraConfig(r=config.rank, target_modules=config.target_modules))
    choices = _serving(model, config) if config.serve else _training(model, config)
    best = next((choice for choice in choices if choice.fits), None)
    command = None if best is None else _command(config, best)
    if args.json:
        say(json.dumps(_facts(config, parameters, choices, best, command), indent=2))
    else:
        say(_text(model, config, parameters, choices, best, command))
    return 0 if best is not None else 1


def _dtype(config: PlanConfig) -> str:
    """Returns the dtype of the frozen weights; "auto" means bf16, as on GPUs."""
    return "bf16" if config.dtype == "auto" else config.dtype


def _room(config: PlanConfig) -> float | None:
    if config.gpus is None:
        return free_memory()
    if config.gpu_memory is None:
        return float(torch.cuda.mem_get_info()[1])
    return config.gpu_memory * _GB


# The possible ways.


def _training(model: torch.nn.Module, config: PlanConfig) -> list[Choice]:
    """Returns the ways to train, each with the largest micro-batch found to fit by halving.

    The first costs nothing extra; checkpointing takes a third more time; the cost of sharding depends on the network.
    """
    room, processes = _room(config), config.processes
    examples = math.ceil(config.batch_size / processes)
    choices = []
    for sharded in (False, True) if processes > 1 else (False,):
        for checkpointing in (True,) if config.gradient_checkpointing else (False, True):
            at_once = examples
            while True:
                choice = _way(model, config, at_once, sharded, checkpointing, room)
                if choice.fits or at_once == 1:
                    break
                at_once = math.ceil(at_once / 2)
            choices.append(choice)
    return choices


def _way(
    model: torch.nn.Module, config: PlanConfig, at_once: int, sharded: bool, checkpointing: bool, room: float | None
) -> Choice:
    """Returns a way to train with `at_once` examples at a time on each process."""
    budget = training_budget(
        model,
        at_once * _length(model, config),
        checkpointing=checkpointing,
        processes=config.processes,
        sharded=sharded,
        quantize=config.quantize,
        device="cpu" if config.gpus is None else "cuda",
    )
    # The examples of an update are divided among the processes, and each handles its share batch_size at a time.
    share = math.ceil(config.batch_size / config.processes)
    batch = config.batch_size if at_once >= share else at_once
    steps = math.ceil(config.batch_size / batch)
    flags = [*(["--shard"] if sharded else []), *(["--gradient_checkpointing"] if checkpointing else [])]
    if batch != TrainConfig.batch_size:
        flags += ["--batch_size", str(batch)]
    if steps > 1:
        flags += ["--grad_accum", str(steps)]
    name = "sharded" if sharded else "data parallel" if config.processes > 1 else "one process"
    sent = sum(traffic(model, config.processes, sharded=sharded, batches=math.ceil(share / at_once)).values())
    return Choice(name + (", checkpointing" if checkpointing else ""), tuple(flags), budget, room, sent)


def _length(model: torch.nn.Module, config: PlanConfig) -> int:
    return config.seq_len or min(_LENGTH, context_length(model) or _LENGTH)


def _serving(model: torch.nn.Module, config: PlanConfig) -> list[Choice]:
    """Returns the only way to serve: the server is one process."""
    budget = serving_budget(model, config.requests, config.context, quantize=config.quantize)
    return [Choice("one process", (), budget, _room(config))]


# The output.


def _command(config: PlanConfig, choice: Choice) -> str:
    """Returns the command line for a choice."""
    words = ["--model", config.model]
    for name in ("dtype", "quantize"):
        if getattr(config, name) not in ("auto", "none"):
            words += [f"--{name}", getattr(config, name)]
    if config.serve:
        return " ".join(["loralib serve", *words, "--cache_tokens", str(config.requests * config.context)])
    words += ["--train_data", "train.jsonl", *choice.flags]
    for name in ("seq_len", "rank", "target_modules"):
        value = getattr(config, name)
        if value != getattr(TrainConfig, name):
            words += [f"--{name}", ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)]
    if config.processes == 1:
        return " ".join(["loralib train", *words])
    where = f"--nnodes {config.nodes} --rdzv_backend c10d --rdzv_endpoint FIRST_NODE:29500 " if config.nodes > 1 else ""
    return " ".join([f"torchrun {where}--nproc_per_node {config.gpus} -m loralib train", *words])


def _facts(
    config: PlanConfig, parameters: int, choices: Sequence[Choice], best: Choice | None, command: str | None
) -> dict[str, Any]:
    """Returns the figures for --json; all sizes are bytes per process."""
    return {
        "model": config.model,
        "parameters": parameters,
        "processes": 1 if config.serve else config.processes,
        "choices": [
            {
                "name": each.name,
                **each.budget.rows(),
                "total": each.budget.total,
                "memory": each.room,
                "fits": each.fits,
            }
            for each in choices
        ],
        "choice": None if best is None else best.name,
        "command": command,
    }


_TITLES: Final = {
    "weights": "frozen weights",
    "gathered": "gathered weights",
    "copies": "prepacked copies",
    "adapter": "adapter",
    "gradients": "its gradients",
    "optimizer": "its optimiser",
    "activations": "activations",
    "head": "logits",
    "cache": "keys and values",
    "program": "the program",
}


def _what(model: Any, config: PlanConfig) -> str:
    """Returns a sentence that says what is planned."""
    if config.serve:
        return f"Serving {counted(config.requests, 'request')} at once, with {count(config.context)} tokens each."
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    where = "GPU" if config.gpus else "machine"
    text = (
        f"Training {count(trained)} parameters in {counted(len(adapted_layers(model)), 'module')}, "
        f"{counted(config.batch_size, 'example')} of {count(_length(model, config))} tokens per step"
    )
    if config.processes > 1:
        text += f", on {counted(config.processes, where)}"
        if config.batch_size < config.processes:
            text += f" ({count(config.processes - config.batch_size)} of them get no examples: raise --batch_size)"
    return f"{text}."


def _advice(config: PlanConfig) -> str:
    """Returns advice on how to need less memory."""
    if config.serve:
        return "Lower --requests or --context, or use a GPU with more memory."
    fixes = ["lower --seq_len"] if config.seq_len is None or config.seq_len > 256 else []
    fixes += ["add --quantize nf4"] if config.quantize == "none" else []
    fixes += ["use more --gpus or --nodes, across which the weights are sharded"]
    return f"What would help: {', '.join(fixes)}."


def _text(
    model: Any, config: PlanConfig, parameters: int, choices: Sequence[Choice], best: Choice | None, command: str | None
) -> str:
    """Returns the plan as text."""
    rows = [
        [title, *(size(each.budget.rows()[name]) for each in choices)]
        for name, title in _TITLES.items()
        if any(each.budget.rows()[name] for each in choices)
    ]
    rows.append(["all", *(size(each.budget.total) for each in choices)])
    if (room := choices[0].room) is not None:
        rows.append(["memory", *(size(room) for _ in choices)])
        rows.append(["fits", *("yes" if each.fits else "no" for each in choices)])
    if any(each.sent for each in choices):
        rows.append(["sent per update", *(size(each.sent) for each in choices)])
    lines = [
        f"{config.model}: {parameters / 1e9:.2f} billion parameters in {counted(len(decoder_blocks(model)), 'block')}",
        _what(model, config),
        "",
        table(rows, ["per process", *(each.name for each in choices)]),
        "",
    ]
    if best is None:
        lines.append(f"Nothing fits. {_advice(config)}")
    else:
        lines += [f"Run{' on each machine' if config.nodes > 1 and not config.serve else ''}:", f"  {command}"]
    return "\n".join(lines)
