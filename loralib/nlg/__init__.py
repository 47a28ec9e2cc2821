"""The LoRA paper's laboratory: metrics, published data and the reproduction of its tables.

Importing this package lets `loralib.data.read_examples` read DART, WebNLG and the E2E challenge's CSV.
"""

from __future__ import annotations

from . import published

__all__ = ["published"]
