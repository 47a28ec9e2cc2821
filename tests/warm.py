"""Processes of loralib that start quickly: forked from one that has already imported everything.

A test that watches a server start several of them waits for three seconds of imports each time.  What they do stays the
same: each is a process of its own, with its own files, which can be killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def warm_processes(directory: Path) -> Iterator[Callable[..., tuple[list[str], dict[str, str]]]]:
    """Yields a replacement for `loralib_command`; that function itself if the system cannot fork."""
    if not hasattr(os, "fork"):
        from loralib.serve.process import loralib_command

        yield loralib_command
        return
    address = str(directory / "warm")
    with subprocess.Popen([sys.executable, __file__, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as origin:
        assert origin.stdin is not None
        assert origin.stdout is not None
        assert origin.stdout.readline() == b"ready\n"

        def command(*words: str) -> tuple[list[str], dict[str, str]]:
            return [sys.executable, "-I", "-S", __file__, address, *words], dict(os.environ)

        yield command
        origin.stdin.close()


def origin(address: str) -> None:
    """Imports what commands need, and forks for each requested one, until its standard input ends."""
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401
    import torch
    import transformers.models.gpt2.modeling_gpt2  # noqa: F401

    import loralib.cli
    import loralib.cli.convert
    import loralib.cli.merge
    import loralib.cli.train
    import loralib.training  # noqa: F401
    from loralib.bases import load_base

    torch.set_num_threads(1)  # threads of its own would not be there in a fork
    load_base("scratch-32x1-seed0", dtype="fp32")  # for what is imported on the way
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        os.write(1, b"ready\n")
        while listener in select.select([listener, sys.stdin], [], [])[0]:
            connection, _ = listener.accept()
            if not os.fork():
                listener.close()
                become(connection)
            connection.close()


def become(connection: socket.socket) -> None:
    """Runs one command as `python -m loralib` would."""
    message, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    words, where, environment = json.loads(message)
    os.chdir(where)
    os.environ.update(environment)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # Whoever kills the process that was started means this one.
    threading.Thread(target=lambda: connection.recv(1) or os.kill(os.getpid(), signal.SIGKILL), daemon=True).start()
    sys.argv = ["loralib", *words]
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, mode, encoding="utf-8") for number, mode in enumerate("rww"))
    try:
        runpy.run_module("loralib", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    connection.sendall(bytes([code]))
    os._exit(code)


def client(address: str, words: list[str]) -> int:
    """Passes its files to a forked process, and exits with the same status."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        message = json.dumps([words, os.getcwd(), dict(os.environ)]).encode()
        socket.send_fds(connection, [message], [0, 1, 2])
        os.close(0)  # the other holds it
        return (connection.recv(1) or b"\1")[0]


if __name__ == "__main__":
    _, place, *rest = sys.argv
    if rest:
        sys.exit(client(place, rest))
    origin(place)
    os._exit(0)  # it takes a second to take down all that was imported
