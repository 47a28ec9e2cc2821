"""Everything to reproduce the LoRA paper's tables: metrics, published data sets and the pipeline.

Importing this package lets `loralib.data.read_examples` read DART, WebNLG and the E2E challenge's CSV.
"""

from __future__ import annotations

from . import published

__all__ = ["published"]
