"""AdaLoRA adapters that were really trained and pruned for a few steps."""

import peft
import torch

from tests.unit.adapters.samples import base_model


def adalora(base_dir, seed=0, **changes):
    """A PEFT model whose AdaLoRA adapter was pruned from rank 6 to 3 on average, unevenly."""
    settings = {
        "init_r": 6,
        "target_r": 3,
        "tinit": 1,
        "tfinal": 2,
        "deltaT": 1,
        "total_step": 8,
        "lora_alpha": 9,
    }
    settings |= {"target_modules": ["q_proj", "v_proj", "down_proj"]}
    torch.manual_seed(seed)
    model = peft.get_peft_model(base_model(base_dir), peft.AdaLoraConfig(**settings | changes))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    for step in range(8):
        batch = torch.randint(0, model.config.vocab_size, (2, 16))
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return model.eval()
