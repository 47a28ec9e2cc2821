"""Training: `TrainConfig` and `train`.  What they need is imported when they are used."""

from __future__ import annotations

from .config import TrainConfig
from .loop import TrainResult, train

__all__ = ["TrainConfig", "TrainResult", "train"]
