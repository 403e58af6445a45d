"""The model card of a trained adapter: what it is, how it was made, how to use it. It names no path of this machine."""

from pathlib import Path
from typing import Any

import yaml

from hiplora.training.recipe import TrainRecipe
from hiplora.training.result import TrainResult

CARD = """---
{head}---

# {title} adapter for {base}

{what} Trained with hiplora.

## Results

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

## Data

{data}

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
    """Return the card: method, results, how to load and export, data, recipe."""
    method, base = recipe.method, _public(recipe.model)
    tags = ["peft", method.name, "hiplora"]
    return CARD.format(
        head=yaml.safe_dump({"base_model": base, "library_name": "peft", "tags": tags}),
        title=method.title,
        base=base,
        what=method.describe(),
        results="\n".join(f"| {name} | {value} |" for name, value in result_rows(result)),
        register="" if method.kind else "import hiplora  # teaches PEFT the method\n",
        loading=f"This is {method.kind}; stock PEFT loads it without hiplora." if method.kind else OWN_FORMAT,
        data="\n".join(_data(result)),
        recipe=yaml.safe_dump(_public_recipe(recipe), sort_keys=False, allow_unicode=True),
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


def _data(result: TrainResult) -> list[str]:
    lines = []
    for use, source in result.data["sources"].items():
        name = source.get("file") or source.get("hub")
        digest = f", sha256 `{source['sha256']}`" if "sha256" in source else ""
        lines.append(f"- {use.replace('_', '-')}: {name}, {source['rows']:,} rows{digest}")
    counts = result.data["encoding"]
    lines.append(
        f"- {counts['sequences']:,} sequences, {counts['tokens']:,} tokens, {counts['learned_tokens']:,} learned"
    )
    return [*lines, *(f"- {warning}" for warning in result.warnings)]


def _public(name: str) -> str:
    """Return a model's name, or the last part of a folder's path."""
    return Path(name).name if Path(name).is_absolute() else name


def _public_recipe(recipe: TrainRecipe) -> dict[str, Any]:
    """Return the recipe without paths of this machine and without fields that are not set."""
    values = recipe.values()
    values["model"] = _public(recipe.model)
    for block in ("data", "method", "train"):
        values[block] = {
            key: _public(value) if isinstance(value, str) else value
            for key, value in values[block].items()
            if value not in (None, {})
        }
    return values
