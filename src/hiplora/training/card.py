"""The model card of a trained adapter: what it is, how it was made, how to use it. It names no path of this machine."""

from pathlib import Path

import yaml

from hiplora.training.recipe import TrainRecipe
from hiplora.training.result import TrainResult

CARD = """---
base_model: {base}
library_name: peft
tags: [peft, {method.name}, hiplora]
---

# {method.title} adapter for {base}

{method.summary} Trained with hiplora.

| | |
|---|---:|
{results}

## Loading

```python
{register}from hiplora.models import load
from peft import PeftModel

base, tokenizer = load("{base}")
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```

{loading}

## Recipe

```yaml
{recipe}```

`metrics.jsonl` has a row for every logged step, `provenance.json` the versions, the machine and the hashes of the data.
"""
OWN_FORMAT = """As a plain LoRA adapter that stock PEFT, vLLM and others load, with the same outputs:

```
hiplora export path/to/this/folder --to lora --out adapter-as-lora
```"""


def model_card(recipe: TrainRecipe, result: TrainResult) -> str:
    """Return the card: method, results, how to load and export, recipe; of a path only its last part."""
    method = recipe.method
    values = recipe.values()
    for block in (values, values["data"], values["method"], values["train"]):
        for key, value in block.items():
            if isinstance(value, str) and Path(value).is_absolute():
                block[key] = Path(value).name
    return CARD.format(
        base=values["model"],
        method=method,
        results="\n".join(f"| {name} | {value} |" for name, value in result_rows(result)),
        register="" if method.kind else "import hiplora  # teaches PEFT the method\n",
        loading=f"This is {method.kind}; stock PEFT loads it without hiplora." if method.kind else OWN_FORMAT,
        recipe=yaml.safe_dump(values, sort_keys=False, allow_unicode=True),
    )


def result_rows(result: TrainResult) -> list[tuple[str, str]]:
    """Return the numbers of a run as names and texts."""
    rows = [("steps", f"{result.steps:,}"), ("training loss at the end", f"{result.final_loss:.4f}")]
    if result.held_out:
        rows.append(("held-out loss", f"{result.held_out['before']:.4f} → {result.held_out['after']:.4f}"))
    return [
        *rows,
        ("tokens", f"{result.tokens:,}"),
        ("tokens per second", f"{result.tokens_per_second:,.0f}"),
        ("seconds", f"{result.seconds:,.1f}"),
        ("trainable parameters", f"{result.trainable_parameters:,}"),
        ("peak memory", f"{result.peak_memory_bytes / 2**20:,.0f} MiB"),
    ]
