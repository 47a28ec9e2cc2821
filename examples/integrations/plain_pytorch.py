"""LoRA in a training loop of your own: inject, give the optimiser what requires a gradient, save.

python examples/integrations/plain_pytorch.py [MODEL] [OUTPUT_DIR]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import loralib as lora
from loralib.data import load_examples

DATA = Path(__file__).resolve().parents[1] / "NLG" / "data" / "e2e" / "train.txt"


def main(base: str = "smollm2-135m", output_dir: str = "plain_model", steps: int = 20) -> list[float]:
    """Trains for some steps; returns their losses."""
    model, tokenizer = lora.load_base(base)
    print(lora.inject(model, lora.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")))
    examples = load_examples(DATA, tokenizer, seq_len=64, max_samples=4 * steps).examples
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    losses = []
    for step in range(steps):
        batch = examples[4 * step : 4 * step + 4]
        padding = [max(map(len, batch)) - len(e) for e in batch]
        rows = list(zip(batch, padding, strict=True))
        ids = torch.tensor([e.ids + (tokenizer.pad_token_id,) * pad for e, pad in rows], device=model.device)
        mask = torch.tensor([(1,) * len(e) + (0,) * pad for e, pad in rows], device=model.device)
        trained = torch.tensor([e.trained + (False,) * pad for e, pad in rows], device=model.device)
        labels = ids.masked_fill(~trained, -100)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step + 1}: loss {losses[-1]:.3f}")
    lora.save_adapter(model, output_dir)
    print(f"adapter saved in {output_dir}")
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:])
