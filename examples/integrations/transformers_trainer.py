"""LoRA with transformers' Trainer: an injected model is an ordinary model, and its checkpoints are adapters.

python examples/integrations/transformers_trainer.py [MODEL] [OUTPUT_DIR]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

import loralib as lora
from loralib.data import load_examples

DATA = Path(__file__).resolve().parents[1] / "NLG" / "data" / "e2e" / "train.txt"


def main(base: str = "smollm2-135m", output_dir: str = "trainer_model", steps: int = 20) -> list[float]:
    """Trains for some steps; returns their losses."""
    model, tokenizer = lora.load_base(base)
    print(lora.inject(model, lora.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")))
    rows = [
        {
            "input_ids": list(e.ids),
            "labels": [token if on else -100 for token, on in zip(e.ids, e.trained, strict=True)],
        }
        for e in load_examples(DATA, tokenizer, seq_len=64, max_samples=4 * steps).examples
    ]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=output_dir,
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            logging_steps=1,
            save_steps=steps,
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=False,
        ),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.train()
    lora.save_adapter(model, output_dir)
    print(f"adapter saved in {output_dir}")
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main(*sys.argv[1:])
