"""LoRA in a Lightning module: inject in the constructor, save when training ends.

python examples/integrations/lightning_module.py [MODEL] [OUTPUT_DIR]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader

import loralib as lora
from loralib.data import TokenExample, load_examples
from loralib.training.step import make_step

DATA = Path(__file__).resolve().parents[1] / "NLG" / "data" / "e2e" / "train.txt"


class LoraModule(lightning.LightningModule):
    """Trains an adapter with loralib's packed step inside Lightning's loop."""

    def __init__(self, model: Any, examples: list[TokenExample], output_dir: str) -> None:
        super().__init__()
        self.automatic_optimization = False  # the step makes loss and gradient in one pass
        self.model, self.examples, self.output_dir = model, examples, output_dir
        print(lora.inject(model, lora.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")))
        self.step = make_step(model)
        self.losses: list[float] = []

    def training_step(self, numbers: list[int], batch_idx: int) -> None:
        """Computes the gradient of a batch, given by the numbers of its examples, and applies it."""
        batch = [self.examples[number] for number in numbers]
        optimizer = self.optimizers()
        optimizer.zero_grad()
        done = self.step.forward_backward(batch, loss_scale=1 / sum(sum(example.trained) for example in batch))
        optimizer.step()
        self.losses.append(done.loss_sum / done.trained_tokens)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Gives the optimiser what requires a gradient: the adapter."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)

    def on_train_end(self) -> None:
        """Saves the adapter."""
        lora.save_adapter(self.model, self.output_dir)
        print(f"adapter saved in {self.output_dir}")


def main(base: str = "smollm2-135m", output_dir: str = "lightning_model", steps: int = 20) -> list[float]:
    """Trains for some steps; returns their losses."""
    model, tokenizer = lora.load_base(base)
    examples = load_examples(DATA, tokenizer, seq_len=64, max_samples=4 * steps).examples
    module = LoraModule(model, examples, output_dir)
    trainer = lightning.Trainer(
        max_steps=steps, logger=False, enable_checkpointing=False, enable_model_summary=False, accelerator="cpu"
    )
    trainer.fit(module, DataLoader(range(len(examples)), batch_size=4, collate_fn=list))  # type: ignore[arg-type]
    return module.losses


if __name__ == "__main__":
    main(*sys.argv[1:])
