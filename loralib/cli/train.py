"""Train a LoRA adapter: the base model stays frozen, and only two thin matrices per layer are trained.

loralib train --train_data train.txt --valid_data valid.txt
loralib train --train_data chat.jsonl --model ./my-model --rank 8 --num_epochs 3
loralib train --config run.toml --resume
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

from ..files import hold_file
from ..training import TrainConfig
from ..training.job import run_job
from . import add_fields, from_args

JOINS_RANKS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for every setting of training."""
    add_fields(parser, TrainConfig)
    parser.add_argument(
        "--stop_with_stdin",
        action="store_true",
        help="for programs that start runs: save and stop, as on SIGTERM, when standard input closes, as it does when "
        "that program exits; and wait if an earlier run in output_dir is still saving",
    )


def run(args: argparse.Namespace) -> None:
    """Trains and saves the adapter."""
    config = from_args(TrainConfig, args)
    with _in_turn(config.output_dir) if args.stop_with_stdin else contextlib.nullcontext():
        run_job(config)


@contextlib.contextmanager
def _in_turn(output_dir: str) -> Iterator[None]:
    """Ends the run when standard input ends; first waits until an earlier run in the directory has finished."""
    threading.Thread(target=_stop_at_end_of_input, name="loralib-stop", daemon=True).start()
    with hold_file(output_dir, "--output_dir", wait=True):
        yield


def _stop_at_end_of_input() -> None:
    """Waits for the end of standard input, then signals this process with SIGTERM.

    Does not use `sys.stdin`: a thread blocked reading it holds a lock that the interpreter needs at exit.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):  # without standard input, this counts as its end
        while os.read(sys.stdin.fileno(), 1 << 12):
            pass
    signal.raise_signal(signal.SIGTERM)
