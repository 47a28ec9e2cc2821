"""Serve a base model and any number of adapters over OpenAI's HTTP API, with a web page.

loralib serve --adapter restaurants=lora_model
loralib serve --model ./my-model --adapters ./adapters --port 8080

Clients choose an adapter as the model of a request.  Ctrl-C lets running requests finish, then stops the server.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..console import counted, say, table
from ..errors import ConfigError, MissingDependencyError
from ..serve.settings import ServeConfig
from ._flags import add_fields, from_args

if TYPE_CHECKING:
    from ..serve.server import Server

_LONGEST_HEADERS = 1 << 16  # bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for every setting of a server."""
    add_fields(parser, ServeConfig)


def run(args: argparse.Namespace) -> None:
    """Serves until interrupted."""
    config = from_args(ServeConfig, args)
    try:
        from ..serve.app import create_app
        from ..serve.security import is_loopback
        from ..serve.server import start
    except ImportError as error:
        raise MissingDependencyError(f"loralib serve needs {error.name}: pip install 'loralib[serve]'") from error
    with _listening(config) as listener:  # before loading the model, so that a port in use shows at once
        if not is_loopback(config.host) and not config.api_key:
            say(
                f"warning: {config.host} is reachable from other machines, and anyone can use this server: "
                "it has no --api_key",
                file=sys.stderr,
            )
        server = start(config)
        try:
            say(_greeting(server, listener.getsockname()[1]))
            _serve(create_app(server), server, listener)
        finally:
            server.close()
    say("The server has stopped.")


@contextlib.contextmanager
def _listening(config: ServeConfig) -> Iterator[socket.socket]:
    """Opens the port.

    Raises:
        ConfigError: the port is in use, or the address does not belong to this machine.
    """
    try:
        listener = open_port(config.host, config.port)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on port {config.port} of {config.host}: {error.strerror or error}. Choose another --port, "
            "or stop the program that uses it."
        ) from error
    with listener:
        yield listener


def open_port(host: str, port: int) -> socket.socket:
    """Returns a listening socket whose connections send without delay (TCP_NODELAY).

    Otherwise a second small packet (a body after its headers, the next token) waits until the client acknowledges the
    first, which takes 40 ms. asyncio sets the option only on sockets that were created with a protocol number.

    Raises:
        OSError: the port is in use, or the address does not belong to this machine.
    """
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    listener = socket.create_server((host.strip("[]"), port), family=family, backlog=2048)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # its connections inherit this
    return listener


def _serve(app: Any, server: Server, listener: socket.socket) -> None:
    import uvicorn

    config = server.config

    class Uvicorn(uvicorn.Server):
        """Exits with 0 when told to end, and closes the model's thread."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """Handles termination signals; uvicorn would afterwards raise the signal again and die from it."""
            if threading.current_thread() is not threading.main_thread():
                yield
                return
            names = ("SIGINT", "SIGTERM", "SIGBREAK")
            before = {
                number: signal.signal(number, self.handle_exit)
                for number in (getattr(signal, name, None) for name in names)
                if number is not None
            }
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            """Lets running requests finish."""
            server.is_closing = True
            ending = threading.Thread(target=server.service.close, args=(config.grace_seconds,), daemon=True)
            ending.start()
            await super().shutdown(sockets)

    settings = uvicorn.Config(
        app,
        http="h11",  # it limits the size of headers
        h11_max_incomplete_event_size=_LONGEST_HEADERS,
        log_level="warning",
        access_log=False,
        server_header=False,
        # Connections beyond running and waiting requests belong to page views, or to an attack.
        limit_concurrency=2 * (config.max_requests + config.max_waiting) + 256,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(config.grace_seconds) + 5,
    )
    Uvicorn(settings).run(sockets=[listener])


def _greeting(server: Server, port: int) -> str:
    """Returns the message that says what is served where, and how to send a request."""
    config = server.config
    host = "localhost" if config.host in ("127.0.0.1", "0.0.0.0", "::", "::1") else config.host
    address = f"http://{host}:{port}"
    names = server.adapters.names
    listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    rows = [
        ("Base", server.name),
        ("Adapters", f"{counted(len(names), 'adapter')}: {listed}" if names else "none"),
        ("API", f"{address}/v1"),
        ("Figures", f"{address}/metrics"),
    ]
    if config.page:
        rows.append(("Page", address))
    body = json.dumps({"model": names[0] if names else server.name, "prompt": "Hello", "max_tokens": 20})
    key = ' -H "Authorization: Bearer $KEY"' if config.api_key else ""
    example = f"curl {address}/v1/completions -H 'Content-Type: application/json'{key} -d '{body}'"
    return f"{table(rows)}\n\n{example}\n\nCtrl-C stops the server."
