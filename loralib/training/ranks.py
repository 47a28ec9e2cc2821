"""The processes that train together; the only file that deals with them.

torchrun starts one command several times, and gives each process its number, the rank, in environment variables.  The
rest of the package goes through `Ranks`, whose methods are trivial for a single process.

Rank 0 prints and writes files.  What it does or decides alone is shared with the others by `on_first_rank`; actions
that may fail on a single rank are run by `on_all_ranks`.  A rank that fails elsewhere publishes its error and closes
its connections: ranks that wait for it then fail with the same error immediately instead of after a timeout.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any, Final, TypeVar, cast

import torch
from torch import Tensor

from .. import errors
from ..console import muted
from ..errors import ConfigError, LoraError, TrainingError, first_line, list_faults

__all__ = ["ALONE", "Ranks", "joined", "launched"]

_T = TypeVar("_T")

_TIMEOUT: Final = timedelta(minutes=30)  # for one rank waiting for another, for example during a download
_PATIENCE: Final = timedelta(seconds=10)  # how long a failing rank waits for rank 0 to report the error
_TELLING: Final = 5.0  # seconds to report a lost process before obeying SIGTERM
_NEEDED: Final = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Ranks:
    """A single process: rank 0 of 1.  `_ProcessGroup` implements several.

    Attributes:
        rank: the number of this process, from 0.
        size: number of processes.
        local_size: number of processes on this machine.
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes files."""
        return self.rank == 0

    def device(self, name: str | None) -> str | None:
        """Returns the device for this process, given the one in the settings."""
        return name

    def mesh(self, device: str) -> Any:
        """Returns all ranks as a one-dimensional DeviceMesh, over which FSDP2 shards weights."""
        raise ConfigError(
            "shard spreads the base model over several processes, but there is only one: start it with `torchrun "
            "--nproc_per_node N -m loralib train --shard ...`, or leave out --shard"
        )

    def sum(self, numbers: Tensor) -> Tensor:
        """Returns the sums of some numbers over all ranks."""
        return numbers

    def sum_gradients(self, parameters: Sequence[Tensor], numbers: Tensor) -> Tensor:
        """Sums the gradients of parameters over all ranks, and returns the sums of some numbers (k,).

        Everything goes into one buffer, which is reduced at once.  A parameter without a gradient on any rank stays
        without one.
        """
        return numbers

    def max(self, number: int) -> int:
        """Returns the maximum of a number over all ranks."""
        return number

    def gather(self, value: _T) -> list[_T]:
        """Returns the values of all ranks, in rank order, on every rank."""
        return [value]

    def on_first_rank(self, action: Callable[[], _T]) -> _T:
        """Runs an action on rank 0 only, and returns its result on all ranks; if it fails, all raise its error."""
        return action()

    def on_all_ranks(self, action: Callable[[], _T]) -> _T:
        """Runs an action on every rank; if it fails on some, all raise an error that says where."""
        return action()

    def in_turn(self, action: Callable[[], _T]) -> _T:
        """Runs an action, such as a download, on the first rank of each machine, and then on the others there."""
        return action()

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Wraps passes during which a sharded model waits for other ranks by itself."""
        yield

    def seed(self, seed: int, update: int) -> None:
        """Seeds each rank's random numbers for an update, for dropout masks.

        The seed is derived from the run's seed, the update and the rank, so a resume needs no stored state.  A single
        process keeps its generator's state.
        """

    def require_same(self, facts: Mapping[str, Any]) -> None:
        """Checks that facts about what is trained, and how, agree on all ranks.

        Raises:
            ConfigError: some differ; all are named, with their ranks.
        """


ALONE: Final = Ranks()


class _ProcessGroup(Ranks):
    """The ranks of PyTorch's default process group."""

    def __init__(self, store: Any) -> None:
        dist = torch.distributed
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.store, self._has_lost = store, False
        # A group that someone else created for GPUs only cannot transfer CPU tensors.
        self._cpu = dist.new_group(backend="gloo", timeout=_TIMEOUT) if dist.get_backend() == "nccl" else None

    def device(self, name: str | None) -> str | None:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if name is None:
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cuda":
            if local >= torch.cuda.device_count():
                raise ConfigError(
                    f"this machine has more processes than GPUs ({torch.cuda.device_count()}): start as many "
                    "processes as there are GPUs (--nproc_per_node gpu), or use --device cpu"
                )
            torch.cuda.set_device(local)
            return f"cuda:{local}"
        if name.startswith("cuda:"):
            raise ConfigError(f"device is {name!r}, which {self.size} processes cannot share for training; use cuda")
        return name

    def mesh(self, device: str) -> Any:
        kind = torch.device(device).type
        return torch.distributed.device_mesh.init_device_mesh(kind, (self.size,))

    def sum(self, numbers: Tensor) -> Tensor:
        numbers = numbers.clone()
        with self._explained():
            torch.distributed.all_reduce(numbers, group=self._cpu if numbers.device.type == "cpu" else None)
        return numbers

    def sum_gradients(self, parameters: Sequence[Tensor], numbers: Tensor) -> Tensor:
        # [ numbers | a flag for each gradient that exists | all gradients, concatenated ]
        counts = [parameter.numel() for parameter in parameters]
        wide = torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
        flat = torch.zeros(len(numbers) + len(parameters) + sum(counts), dtype=wide, device=parameters[0].device)
        sums, there, gradients = flat.split([len(numbers), len(parameters), sum(counts)])
        parts = [part.view(p.shape) for part, p in zip(gradients.split(counts), parameters, strict=True)]
        mine = [(part, p.grad) for part, p in zip(parts, parameters, strict=True) if p.grad is not None]
        sums.copy_(numbers)
        there.copy_(torch.tensor([float(parameter.grad is not None) for parameter in parameters]))
        if mine:
            torch._foreach_copy_([part for part, _ in mine], [gradient for _, gradient in mine])
        with self._explained():
            torch.distributed.all_reduce(flat, group=self._cpu if flat.device.type == "cpu" else None)
        for parameter, part, ranks in zip(parameters, parts, there.tolist(), strict=True):
            parameter.grad = part.to(parameter.dtype) if ranks else None
        return cast(Tensor, sums)

    def max(self, number: int) -> int:
        tensor = torch.tensor([number])
        with self._explained():
            torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX, group=self._cpu)
        return int(tensor)

    def gather(self, value: _T) -> list[_T]:
        values: list[Any] = [None] * self.size
        with self._explained():
            torch.distributed.all_gather_object(values, value, group=self._cpu)
        return values

    def on_first_rank(self, action: Callable[[], _T]) -> _T:
        outcome: list[Any] = [None, None]
        if self.is_first:
            outcome = list(_outcome(action))
        with self._explained():
            torch.distributed.broadcast_object_list(outcome, 0, group=self._cpu)
        result, fault = outcome
        if fault is not None:
            raise _unpacked(fault)
        return cast(_T, result)

    def on_all_ranks(self, action: Callable[[], _T]) -> _T:
        result, fault = _outcome(action)
        faults = self.gather(fault)
        if not any(faults):
            return cast(_T, result)
        kinds = {json.dumps(each) for each in faults if each}
        chosen = next(each for each in faults if each)
        if len(kinds) > 1 or not faults[0]:
            texts = [f"rank {rank}: {each[1]}" for rank, each in enumerate(faults) if each]
            chosen = (chosen[0], "\n".join(texts[:8] + ["..."] * (len(texts) > 8)), chosen[2])
        raise _unpacked(chosen)

    def in_turn(self, action: Callable[[], _T]) -> _T:
        leads = os.environ.get("LOCAL_RANK", str(self.rank)) == "0"
        ahead = self.on_all_ranks(action if leads else lambda: None)
        return cast(_T, self.on_all_ranks((lambda: ahead) if leads else action))

    def seed(self, seed: int, update: int) -> None:
        digest = hashlib.sha256(f"{seed} {update} {self.rank}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def require_same(self, facts: Mapping[str, Any]) -> None:
        theirs = self.gather(dict(facts))
        faults = []
        for name in dict.fromkeys(name for each in theirs for name in each):
            others = [n for n in range(1, self.size) if theirs[n].get(name) != theirs[0].get(name)]
            if others:
                where = f"rank{'s' * (len(others) > 1)} {', '.join(map(str, others[:8]))}{', ...' * (len(others) > 8)}"
                here, there = theirs[0].get(name, "absent"), theirs[others[0]].get(name, "absent")
                faults.append(f"{name}: {here!r} on rank 0, {there!r} on {where}")
        if faults:
            fix = "Start all processes with the same command, the same files and the same environment."
            raise ConfigError(list_faults("the processes of this run do not agree", faults, fix))

    @contextmanager
    def computing(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, LoraError) or not _is_of_a_connection(error):
                raise
            raise self.blame(error) from error

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns the failure of a collective operation into the error of the rank that caused it."""
        try:
            yield
        except RuntimeError as error:  # raised by PyTorch when a connection is closed or a peer does not answer
            raise self.blame(error) from error

    def blame(self, error: BaseException) -> LoraError:
        """Returns the error that another rank published before it exited; or one saying that a rank vanished."""
        with contextlib.suppress(Exception):
            if self.store.check(["failed"]):
                return _unpacked(json.loads(self.store.get("failed")))
        lost = TrainingError(
            f"another process of this run has died or can no longer be reached ({first_line(error)}). The last "
            "checkpoint is intact: run the same command with --resume to continue."
        )
        self._has_lost = True
        _take_time_to_tell()
        with contextlib.suppress(Exception):  # only the first to notice reports it
            lost.is_told_elsewhere = self.store.add("lost", 1) > 1
        return lost

    def leave(self, error: BaseException | None) -> None:
        """Leaves the group.  After an error, gives rank 0 time to report it before the launcher kills it."""
        atexit.register(self._end)
        if error is not None and not getattr(error, "is_told_elsewhere", False):
            with contextlib.suppress(Exception):
                self.store.set("failed", json.dumps(_packed(error, self.rank)))
        with contextlib.suppress(Exception):
            torch.distributed.destroy_process_group()
        if isinstance(error, LoraError) and not self.is_first and not self._has_lost:
            error.is_told_elsewhere = self._first_ends()

    def _first_ends(self) -> bool:
        """Waits until rank 0 has exited; returns whether it did in time."""
        try:
            self.store.wait(["first ended"], _PATIENCE)
        except torch.distributed.DistNetworkError:
            return True  # without torchrun, rank 0 hosts the store, which disappears with it
        except Exception:
            return False
        return True

    def _end(self) -> None:
        """Runs at the very end of the process, as a launcher sends SIGTERM to the others once one has exited."""
        with contextlib.suppress(Exception):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if self.is_first:
                self.store.set("first ended", "1")


def _is_of_a_connection(error: RuntimeError) -> bool:
    """Whether an error comes from the process group, not the computation; gloo's errors have no class of their own."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def _take_time_to_tell() -> None:
    """Delays SIGTERM, which a launcher sends to all others once one process is gone, to leave time for a report."""

    def end_soon(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        timer = threading.Timer(_TELLING, os.kill, (os.getpid(), number))
        timer.daemon = True
        timer.start()

    with contextlib.suppress(ValueError):  # signals can only be handled in the main thread
        signal.signal(signal.SIGTERM, end_soon)


# Errors in transit between processes: class name, message, exit code.


def _outcome(action: Callable[[], Any]) -> tuple[Any, Any]:
    try:
        return action(), None
    except LoraError as error:
        return None, _packed(error)


def _packed(error: BaseException, rank: int = 0) -> tuple[str, str, int]:
    text = str(error) if isinstance(error, LoraError) else f"{type(error).__name__}: {first_line(error)}"
    return type(error).__name__, f"rank {rank}: {text}" if rank else text, int(getattr(error, "exit_code", 2))


def _unpacked(packed: Sequence[Any]) -> LoraError:
    name, text, code = packed
    kind: Any = getattr(errors, name, TrainingError)
    if kind is errors.InterruptedRunError:
        return errors.InterruptedRunError(text, code - 128)
    result: LoraError = kind(text) if isinstance(kind, type) and issubclass(kind, LoraError) else TrainingError(text)
    return result


# Joining the group.

_JOINED: Final[list[Ranks]] = []  # groups joined by this process; the last one is current


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    size = os.environ.get("WORLD_SIZE", "1")
    return size.isdecimal() and int(size) > 1


@contextmanager
def joined() -> Iterator[Ranks]:
    """Joins the other processes that torchrun, or a similar launcher, started along with this one, if there are any.

    Inside another `joined`, or if the program has already created a process group, that group is used and kept.
    Meanwhile, only rank 0 prints.

    Raises:
        ConfigError: the environment variables are incomplete, or PyTorch lacks a backend.
    """
    if _JOINED:
        yield _JOINED[-1]
        return
    available = torch.distributed.is_available()
    if available and torch.distributed.is_initialized():
        with _current(_ProcessGroup(_default_store()) if torch.distributed.get_world_size() > 1 else ALONE) as ranks:
            yield ranks
        return
    if not launched():
        yield ALONE
        return
    group = _start_group()
    with _current(group):
        try:
            yield group
        except BaseException as error:
            group.leave(error)
            raise
        group.leave(None)


@contextmanager
def _current(ranks: Ranks) -> Iterator[Ranks]:
    _JOINED.append(ranks)
    try:
        with contextlib.nullcontext() if ranks.is_first else muted():
            yield ranks
    finally:
        _JOINED.remove(ranks)


def _start_group() -> _ProcessGroup:
    dist: Any = torch.distributed
    if missing := [name for name in _NEEDED if name not in os.environ]:
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, so {' and '.join(missing)} must be set too: start the "
            "processes with torchrun, or set all of RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
        )
    if not dist.is_available() or not dist.is_gloo_available():
        raise ConfigError(
            "this build of PyTorch cannot train in several processes, because it lacks gloo. Use one process."
        )
    if torch.cuda.is_available() and not dist.is_nccl_available():
        raise ConfigError(
            "this build of PyTorch lacks NCCL, which processes on GPUs need to communicate: install one that has it "
            "(on Linux), use one process, or hide the GPUs (CUDA_VISIBLE_DEVICES=) and use --device cpu"
        )
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=_TIMEOUT))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ConfigError(
            f"the other processes of this run cannot be reached at {where}: {first_line(error)}"
        ) from error
    return _ProcessGroup(dist.PrefixStore("loralib", store))


def _default_store() -> Any:
    """Returns the store of a group that someone else created; None if PyTorch no longer exposes it."""
    dist: Any = torch.distributed
    with contextlib.suppress(Exception):
        return dist.PrefixStore("loralib", dist.distributed_c10d._get_default_store())
    return None
