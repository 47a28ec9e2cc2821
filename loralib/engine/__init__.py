"""The engine: owns a model's forward pass, i.e. the faster or modified computations and how they are installed."""
