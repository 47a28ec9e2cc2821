# /// script
# requires-python = ">=3.10"
# dependencies = ["loralib[train]"]
#
# [tool.uv.sources]
# loralib = { path = "../.." }
# ///
"""Train with nothing installed but uv, which reads above what is needed: PEP 723.

uv run examples/cluster/uv_train.py --train_data mine.jsonl --output_dir mine

All flags are those of `loralib train`.
"""

from __future__ import annotations

import sys

from loralib.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["train", *sys.argv[1:]]))
