"""The LoRA paper's laboratory: metrics, published data and the reproduction of its tables."""
