"""The model card of a trained adapter: what it is, how it came to be, how to use it."""

from pathlib import Path
from typing import Any

import yaml

from hiplora.recipes import TrainRecipe
from hiplora.recipes.methods import Targeted
from hiplora.training.result import TrainResult
from hiplora.training.run import recipe_values

_DIRECTIONS = {
    "weight": "the base weights' leading singular directions",
    "activation": "the directions that the base model's layers are fed and its predictions depend on most",
}
_DIFFERENCE = (
    "saved as the plain LoRA (of twice the rank) that brings the untouched base model to the trained one."
)
METHODS = {
    "hiplora": ("HiP-LoRA", ""),  # what it is follows from its settings
    "proj_lora": ("Proj-LoRA", ""),
    "lora": ("LoRA", "A plain low-rank update."),
    "adalora": (
        "AdaLoRA",
        "A low-rank update whose rank was cut, module by module, where it mattered least.",
    ),
    "pissa": ("PiSSA", f"Trained from the principal part of the base weights; {_DIFFERENCE}"),
    "milora": ("MiLoRA", f"Trained from the minor part of the base weights; {_DIFFERENCE}"),
    "corda": (
        "CorDA",
        "Trained from the part of the base weights that the model's own inputs use least (CorDA's "
        f"knowledge-preserved mode); {_DIFFERENCE}",
    ),
    "lora_null": (
        "LoRA-Null",
        "Trained from the part of the base weights in the directions in which the model's own inputs have least "
        f"energy; {_DIFFERENCE}",
    ),
    "osf": (
        "OSF",
        "The leading singular directions of each weight are kept and all others were trained: far more parameters "
        "than a low-rank update has.",
    ),
    "split_lora": (
        "Split-LoRA",
        "A plain low-rank update. Below a cut it is the average of what several clients trained on shards of the data.",
    ),
}
OWN_FORMAT = ("hiplora", "proj_lora")


def _what(method: Targeted) -> str:
    directions = _DIRECTIONS[getattr(method, "basis", "weight")]
    if not getattr(method, "residual_projection", True):
        update = "a low-rank update that is free to change those directions too"
        alone = f"Its low-rank update is free to change {directions} (an ablation)."
    elif getattr(method, "projection", "hard") == "soft":
        update = "a low-rank update that changes those directions the less, the more energy they have"
        alone = f"Its low-rank update changes {directions} the less, the more energy they have."
    else:
        update = "a low-rank update in the complement of those directions"
        alone = f"Its low-rank update stays in the complement of {directions}."
    if getattr(method, "principal_channel", False):
        return f"It learns one gain for each of {directions}, at a price, and {update}."
    return alone


def model_card(recipe: TrainRecipe, result: TrainResult) -> str:
    """Write the card: method, results, how to load, how to export, data, recipe. No path of this machine is in it."""
    title, what = METHODS[recipe.method.name]
    what = what or _what(recipe.method)
    base = _public(recipe.model)
    head = yaml.safe_dump(
        {"base_model": base, "library_name": "peft", "tags": ["peft", recipe.method.name, "hiplora"]}
    )
    sections = [
        f"---\n{head}---\n\n# {title} adapter for {base}\n\n{what} Trained with hiplora.",
        f"## Results\n\n{_results(result)}",
        f"## Loading\n\n{_loading(recipe, base)}",
        f"## Data\n\n{_data(result)}",
        f"## Recipe\n\n```yaml\n{yaml.safe_dump(_public_recipe(recipe), sort_keys=False, allow_unicode=True)}```",
        "`metrics.jsonl` has a row for every logged step, `provenance.json` the versions, the machine and the hashes "
        "of the data.",
    ]
    return "\n\n".join(sections) + "\n"


def _results(result: TrainResult) -> str:
    rows = [
        ("steps", f"{result.steps:,}"),
        ("tokens read", f"{result.tokens:,}"),
        ("training loss at the end", f"{result.final_loss:.4f}"),
    ]
    if result.held_out:
        rows.append(("held-out loss before", f"{result.held_out['before']:.4f}"))
        rows.append(("held-out loss after", f"{result.held_out['after']:.4f}"))
    rows += [
        ("trainable parameters", f"{result.trainable_parameters:,}"),
        ("training time", f"{result.seconds:,.1f} s"),
        ("tokens per second", f"{result.tokens_per_second:,.0f}"),
        ("peak memory", f"{result.peak_memory_bytes / 2**20:,.0f} MiB"),
    ]
    return "| | |\n|---|---:|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows)


def _loading(recipe: TrainRecipe, base: str) -> str:
    own = recipe.method.name in OWN_FORMAT
    register = "import hiplora  # teaches PEFT the method\n" if own else ""
    text = (
        f"```python\n{register}from hiplora.models import load\nfrom peft import PeftModel\n\n"
        f'base, tokenizer = load("{base}")\nmodel = PeftModel.from_pretrained(base, "path/to/this/folder")\n```'
    )
    if own:
        return text + (
            "\n\nAs a plain LoRA adapter that stock PEFT, vLLM and others load, with the same outputs:\n\n"
            "```\nhiplora export path/to/this/folder --to lora --out adapter-as-lora\n```"
        )
    kind = {"adalora": "an AdaLoRA adapter", "osf": "an OSF adapter"}.get(
        recipe.method.name, "a plain LoRA adapter"
    )
    return text + f"\n\nThis is {kind}; stock PEFT loads it without hiplora."


def _data(result: TrainResult) -> str:
    lines = []
    for use, source in result.data["sources"].items():
        name = source.get("file") or source.get("hub")
        digest = f", sha256 `{source['sha256']}`" if "sha256" in source else ""
        lines.append(f"- {use.replace('_', '-')}: {name}, {source['rows']:,} rows{digest}")
    counts = result.data["encoding"]
    lines.append(
        f"- {counts['sequences']:,} sequences, {counts['tokens']:,} tokens, {counts['learned_tokens']:,} of "
        "them learned"
    )
    return "\n".join(lines + [f"- {warning}" for warning in result.warnings])


def _public(name: str) -> str:
    """A model's name; of a folder on this machine only its last part."""
    return Path(name).name if Path(name).is_absolute() else name


def _public_recipe(recipe: TrainRecipe) -> dict[str, Any]:
    """The recipe as a reader wants it: no paths of this machine, nothing that is not set."""
    values = recipe_values(recipe)
    values["model"] = _public(recipe.model)
    for block in ("data", "method", "train"):
        values[block] = {key: value for key, value in values[block].items() if value not in (None, {})}
    for block, key in (("data", "path"), ("data", "held_out"), ("train", "start_from"), ("train", "kl_text")):
        if key in values[block]:
            values[block][key] = Path(values[block][key]).name
    if "calibration_text" in values["method"]:
        values["method"]["calibration_text"] = _public(values["method"]["calibration_text"])
    return values
