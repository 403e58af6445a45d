"""The measurements of a training run, read back from its folder, and the model card made from them."""

import json
import os
import resource
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hiplora.data.examples import Example
from hiplora.errors import HipLoraError, first_line
from hiplora.models import hub_name

if TYPE_CHECKING:
    from hiplora.training.recipe import TrainRecipe

PROVENANCE_FILE = "provenance.json"
METRICS_FILE = "metrics.jsonl"
CARD = """---
{front}---

# {method.title} adapter for {base}

{method.summary} Trained with hiplora.

| | |
|---|---:|
{results}

## Loading

```python
{register}from hiplora.models import load
from peft import PeftModel

base, tokenizer = load({quoted})
model = PeftModel.from_pretrained(base, "path/to/this/folder")
{prompt}
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=200)[0]))
```

Ask as it was trained: {wording}.

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

Row = dict[str, Any]


@dataclass(frozen=True)
class TrainResult:
    """A finished run: where the adapter is, and what was measured.

    `metrics` are the rows of metrics.jsonl; `seconds` is training alone, over all sessions; `peak_memory_bytes` as
    `peak_bytes`; `held_out` the loss per learned token `before` and `after`; `drift` that from the base by text.
    """

    adapter: Path
    metrics: list[Row]
    steps: int
    tokens: int
    seconds: float
    trainable_parameters: int
    peak_memory_bytes: int
    held_out: dict[str, float] | None
    data: dict[str, Any]
    warnings: list[str]
    drift: dict[str, dict[str, float]] | None = None

    @property
    def tokens_per_second(self) -> float:
        """Mean speed over the run."""
        return self.tokens / max(self.seconds, 1e-9)

    @property
    def final_loss(self) -> float:
        """The loss of the last logged row."""
        return next(row["loss"] for row in reversed(self.metrics) if "loss" in row)

    def summary(self) -> dict[str, Any]:
        """Return the numbers as JSON values, without the folder and the rows."""
        values = {name: value for name, value in vars(self).items() if name not in ("adapter", "metrics")}
        return {**values, "tokens_per_second": self.tokens_per_second, "final_loss": self.final_loss}

    @classmethod
    def read(cls, folder: Path) -> "TrainResult":
        """Read the result of a finished run from its folder."""
        try:
            file = PROVENANCE_FILE
            text = (folder / file).read_text(encoding="utf-8")
            stored = {**json.loads(text)["result"], "adapter": folder, "metrics": []}
            result = cls(**{item.name: stored[item.name] for item in fields(cls) if item.name in stored})
            file = METRICS_FILE
            result.metrics.extend(read_metrics(folder))
            if not any("loss" in row for row in result.metrics):
                raise ValueError("no loss in it")
            return result
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            what = f"{folder / file}: is missing or damaged ({first_line(error)})"
            raise HipLoraError(f"{what}; put it back, or pass --overwrite to train again") from error


def read_metrics(folder: str | os.PathLike) -> list[Row]:
    """Read the rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(folder) / METRICS_FILE).read_text(encoding="utf-8").splitlines()]


def result_rows(result: TrainResult) -> list[tuple[str, str]]:
    """Return the numbers of a run as names and texts."""
    rows = [("steps", f"{result.steps:,}"), ("training loss at the end", f"{result.final_loss:.4f}")]
    if result.held_out:
        rows.append(("held-out loss", f"{result.held_out['before']:.4f} → {result.held_out['after']:.4f}"))
    for text, drift in (result.drift or {}).items():
        changed = f"{drift['greedy_changed']:.1%} of the next tokens changed"
        rows.append((f"drift from the base on {text}", f"KL {drift['kl']:.2g} nats per token, {changed}"))
    return [
        *rows,
        ("tokens", f"{result.tokens:,}"),
        ("tokens per second", f"{result.tokens_per_second:,.0f}"),
        ("seconds", f"{result.seconds:,.1f}"),
        ("trainable parameters", f"{result.trainable_parameters:,}"),
        ("peak memory", f"{result.peak_memory_bytes / 2**20:,.0f} MiB"),
    ]


def model_card(recipe: "TrainRecipe", result: TrainResult, example: Example) -> str:
    """Return the card, with the prompt of a training row as the example of use; of a path it has only the last part."""
    method, values = recipe.method, _without_folders(recipe.values())
    wording = "with prompts worded like this one" if example.prompt else "it continues plain text"
    prompt = f'inputs = tokenizer({example.prompt or "…"!r}, return_tensors="pt")'
    if example.messages:
        wording = "through the tokenizer's chat template"
        chat = '[{"role": "user", "content": "…"}], add_generation_prompt=True, return_tensors="pt", return_dict=True'
        prompt = f"inputs = tokenizer.apply_chat_template({chat})"
    front: dict[str, Any] = {"base_model": hub_name(values["model"]), "library_name": "peft"}
    front["tags"] = [*dict.fromkeys(("peft", method.name, "hiplora"))]
    return CARD.format(
        base=values["model"],
        quoted=json.dumps(values["model"], ensure_ascii=False),
        front=yaml.safe_dump(front, sort_keys=False, allow_unicode=True),
        prompt=prompt,
        wording=wording,
        method=method,
        results="\n".join(f"| {name} | {value} |" for name, value in result_rows(result)),
        register="" if method.kind else "import hiplora  # teaches PEFT the method\n",
        loading=f"This is {method.kind}; stock PEFT loads it without hiplora." if method.kind else OWN_FORMAT,
        recipe=yaml.safe_dump(values, sort_keys=False, allow_unicode=True),
    )


def _without_folders(value: Any) -> Any:
    """Return a recipe's values with only the last part of each absolute path: the rest reveals the user's machine."""
    if isinstance(value, dict):
        return {_without_folders(key): _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def peak_bytes() -> int:
    """Return the peak memory: allocated bytes on CUDA since its last reset, else resident bytes of this process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
