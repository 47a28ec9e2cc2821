"""Serve a base model and any number of adapters over OpenAI's HTTP API, with a page for people.

loralib serve --adapter restaurants=lora_model
loralib serve --model ./my-model --adapters ./adapters --port 8080
"""

from __future__ import annotations

import argparse

from ..serve.settings import ServeConfig
from . import add_fields, from_args


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for every setting of a server."""
    add_fields(parser, ServeConfig)


def run(args: argparse.Namespace) -> None:
    """Serves until it is interrupted."""
    config = from_args(ServeConfig, args)
    import uvicorn

    from ..serve.app import create_app
    from ..serve.server import start

    server = start(config)
    try:
        uvicorn.run(create_app(server), host=config.host, port=config.port)
    finally:
        server.close()
