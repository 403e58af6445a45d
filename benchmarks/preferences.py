"""Fine-tuning, then DPO from the saved folder, on the real model with both presets: where DPO's loss begins.

    python -m benchmarks.preferences --out docs/results/tried/preferences.json

DPO compares the adapter with a frozen copy of itself, so its first loss is ln 2 = 0.6931; 0.676 was measured where the
copy was the bare base model instead.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import hiplora
from hiplora.files import write_atomic
from hiplora.models import load

PLACES = ("Lummen", "Ostra", "Vik", "Harnes", "Mora", "Tavik", "Skagen", "Brenna")
SETTINGS = {"per_device_train_batch_size": 4, "logging_steps": 1, "report_to": "none", "bf16": False}
SETTINGS |= {"save_strategy": "no", "disable_tqdm": True}


def said(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def measured(preset: str, folder: Path) -> dict[str, Any]:
    """Return the losses of both trainings, and how far the result leaks out of the complement."""
    asked = [said("user", f"When does the ferry to {place} leave?") for place in PLACES]
    good, bad = said("assistant", "At ten, from pier two."), said("assistant", "Ferries leave when they leave.")
    torch.manual_seed(0)
    model, tokenizer = load("smollm2-135m")
    tuned = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(folder / "run"), learning_rate=1e-3, max_steps=12, **SETTINGS),
        train_dataset=Dataset.from_list([{"prompt": prompt, "completion": good} for prompt in asked]),
        processing_class=tokenizer,
        peft_config=hiplora.HipLoraConfig(preset=preset, task_type="CAUSAL_LM"),
    )
    first = losses(tuned)
    tuned.save_model(str(folder / "sft"))
    preferring = DPOTrainer(
        model=peft.PeftModel.from_pretrained(load("smollm2-135m")[0], folder / "sft", is_trainable=True),
        args=DPOConfig(output_dir=str(folder / "run"), learning_rate=2e-4, beta=0.1, max_steps=6, **SETTINGS),
        train_dataset=Dataset.from_list([{"prompt": prompt, "chosen": good, "rejected": bad} for prompt in asked]),
        processing_class=tokenizer,
    )
    second = losses(preferring)
    from_ln2, leak = second[0] - math.log(2), hiplora.max_leak(preferring.model)
    return {"preset": preset, "sft": first, "dpo": second, "dpo_begins_from_ln2": from_ln2, "max_leak": leak}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    found = []
    for preset in ("function-aware", "paper"):
        with tempfile.TemporaryDirectory() as folder:
            found.append(measured(preset, Path(folder)))
    write_atomic(out, json.dumps(found, indent=1) + "\n")
