"""Show what a trained adapter does: load it, generate text with and without it, merge it, switch to another.

python examples/NLG/run_inference.py
python examples/NLG/run_inference.py --prompt "name : The Olive Yard | food : Greek | area : old harbour"
python examples/NLG/run_inference.py --adapter lora_model other_model --no_merge
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from loralib.cli import add_fields, from_args, run_command

DEFAULTS = {"test_data": str(Path(__file__).resolve().parent / "data" / "e2e" / "test.txt")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for every setting."""
    from loralib.cli._inference import InferenceConfig

    add_fields(parser, InferenceConfig, DEFAULTS)


def run(args: argparse.Namespace) -> None:
    """Shows what the adapters do."""
    from loralib.cli._inference import InferenceConfig, run_inference

    run_inference(from_args(InferenceConfig, args, DEFAULTS))


if __name__ == "__main__":
    sys.exit(run_command(sys.modules[__name__], Path(__file__).name, sys.argv[1:]))
