"""Recipes from files and command lines: YAML, overrides, defaults, and everything that is wrong with them at once.

Nothing here imports torch.
"""

import difflib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from hiplora.data.examples import DataSettings
from hiplora.data.rows import check_rows, is_hub_name, read_rows
from hiplora.errors import ConfigError, DataError
from hiplora.files import parse_yaml
from hiplora.training.adapt import start_problem
from hiplora.training.baselines import METHODS
from hiplora.training.recipe import DEFAULTS, TrainRecipe, TrainSettings, expand_short_forms

# The recipe's names → those of PEFT, transformers, TRL and axolotl.
NAMES_ELSEWHERE = {
    "model": "base_model model_name_or_path model_id base_model_name_or_path",
    "data": "datasets dataset dataset_name train_file",
    "data.held_out_fraction": "val_set_size test_size",
    "data.learn_prompt": "train_on_inputs",
    "out": "output_dir",
    "method": "adapter peft_type",
    "method.r": "rank lora_r lora_rank",
    "method.lora_alpha": "alpha",
    "method.lora_dropout": "dropout",
    "method.target_modules": "lora_target_modules lora_target_linear",
    "train.lr": "learning_rate",
    "train.epochs": "num_train_epochs num_epochs",
    "train.steps": "max_steps num_steps",
    "train.batch_size": "per_device_train_batch_size micro_batch_size",
    "train.gradient_accumulation": "gradient_accumulation_steps",
    "train.max_length": "max_seq_length max_seq_len sequence_len cutoff_len",
    "train.packing": "sample_packing",
    "train.lr_scheduler": "lr_scheduler_type",
    "train.warmup_ratio": "warmup_steps",
    "train.save_every": "save_steps",
    "train.log_every": "logging_steps",
    "train.eval_every": "eval_steps",
    "train.patience": "early_stopping_patience",
    "train.dtype": "bf16 fp16 torch_dtype",
    "train.load_in_4bit": "load_in_8bit load_in quantization quantization_bit quantization_config use_4bit qlora",
    "train.push_to_hub": "hub_model_id",
}
# Paths, and texts that may also be data sets on the hub; relative to the recipe's folder.
PATHS = (("", "out"), ("data", "path"), ("data", "held_out"), ("train", "start_from"))
TEXTS = (("method", "calibration_text"), ("train", "kl_text"))


def load_recipe(path: str | os.PathLike | None, overrides: Sequence[str] = ()) -> TrainRecipe:
    """Read a training recipe from YAML, put `overrides` (`train.lr=1e-4`) over it, and check all of it.

    Relative paths in the file are relative to the file, those in overrides to the current folder; `path` None is a
    recipe of overrides alone. Data files are read to the end, so that a malformed row is found before a model is
    loaded. Missing fields are as in `DEFAULTS`, or with `preset: paper` as in the paper. ConfigError lists all problems
    at once.
    """
    value: dict[str, Any] = {}
    if path is not None:
        value = absolute_paths(expand_short_forms(read_yaml(Path(path))), Path(path).resolve().parent)
    for override in overrides:
        value = expand_short_forms(value)  # `data=rows.jsonl`, then `data.limit=5`
        put_over(value, override)
    value = absolute_paths(expand_short_forms(value), Path.cwd())  # those of the file are absolute already
    method = value.get("method")
    if not isinstance(method, dict) or method.get("preset") != "paper":
        for block, defaults in DEFAULTS.items():
            fields = value.get(block, {})
            if isinstance(fields, dict):
                no_epochs = {"epochs": None} if "epochs" in defaults and fields.get("steps") is not None else {}
                value[block] = {**defaults, **no_epochs, **fields}
    problems = [problem] if (problem := model_problem(value.get("model"))) else []
    try:
        recipe = TrainRecipe.model_validate(value)
        problems += _file_problems(recipe)
    except ValidationError as error:
        problems += described(error, TrainRecipe)
    if problems:
        raise refusal(path or "recipe", problems)
    return recipe


def model_problem(model: Any) -> str | None:
    """Return what is wrong with a model's folder; a name on the hub is trusted until it is loaded."""
    if not isinstance(model, str) or not _is_path(model):
        return None
    if not Path(model).is_dir():
        return f"model: no such folder: {model}; check the path, or give a name on the hub (owner/name)"
    if not (Path(model) / "config.json").is_file():
        return f"model: {model} has no config.json; name a folder that `save_pretrained` wrote"
    return None


def _file_problems(recipe: TrainRecipe) -> list[str]:
    """Return what is wrong with the files that a recipe names."""
    problems = []
    bad: list[str] | None = [] if recipe.data.skip_bad_rows else None
    formats = dict.fromkeys(("data.path", "data.held_out"), recipe.data.format)
    for name, source in recipe.inputs().items():
        if source is None:
            continue
        if name.startswith("data."):
            try:
                check_rows(read_rows(Path(source), bad), formats.get(name, "auto"), source, bad)
            except (DataError, OSError) as error:
                problems.append(f"{name}: {error}")
        elif name.endswith("_text") and not Path(source).is_file() and not is_hub_name(source):
            problems.append(f"{name}: no such file: {source}; correct the path")
    return [*problems, *filter(None, [start_problem(recipe)])]


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~", os.sep)) or os.path.isdir(name) or name.count("/") > 1


def absolute_paths(value: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Make a recipe's paths absolute; a model and a text may be names on the hub instead."""

    def absolute(path: str) -> str:
        return os.path.normpath(folder / Path(path).expanduser())

    value = {key: dict(block) if isinstance(block, dict) else block for key, block in value.items()}
    for loc in (("", "model"), *PATHS, *TEXTS):
        block: Any = value.get(loc[0]) if loc[0] else value
        path = block.get(loc[1]) if isinstance(block, dict) else None
        if not isinstance(path, str) or not path:
            continue
        on_the_hub = not _is_path(path) if loc[1] == "model" else is_hub_name(path)
        if loc in PATHS or not on_the_hub or os.path.exists(absolute(path)):
            block[loc[1]] = absolute(path)
    data = value.get("data")
    if isinstance(data, dict) and isinstance(data.get("mix"), dict):
        data["mix"] = {absolute(str(path)): weight for path, weight in data["mix"].items()}
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; ConfigError if the file is missing, unreadable or no mapping."""
    try:
        value = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such recipe; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a mapping (`model: …`), found {type(value).__name__}")
    return value or {}


def put_over(value: dict[str, Any], override: str, example: str = "train.lr=1e-4") -> None:
    """Put one `a.b=value`, the value in YAML, over a recipe; ConfigError if it is malformed, or `a` is no block."""
    key, equals, raw = override.partition("=")
    *parents, last = key.strip().split(".")
    if not equals or not all((*parents, last)):
        raise ConfigError(f"--set {override}: expected key=value, for example --set {example}")
    for part in parents:
        if value.get(part) is None:
            value[part] = {}
        value = value[part]
        if not isinstance(value, dict):
            raise ConfigError(f"--set {override}: {part} is not a block but {value!r}")
    try:
        value[last] = parse_yaml(raw)
    except ValueError:
        raise ConfigError(f"--set {override}: the value is not valid YAML; quote it") from None


def refusal(path: str | os.PathLike, problems: Sequence[str]) -> ConfigError:
    """Return the error that lists all problems of the recipe at `path`."""
    count = f"{len(problems)} problems" if len(problems) > 1 else "1 problem"
    lines = ["  " + text.replace("\n", "\n    ") for text in problems]
    return ConfigError("\n".join([f"{path}: {count}", *lines]))


def described(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """Return a line for everything that pydantic found in a recipe of the model `root`."""
    schema = root.model_json_schema()
    known = {name for block in (schema, *schema["$defs"].values()) for name in block.get("properties", ())}
    problems: dict[str, str] = {}
    for details in error.errors():
        # Without pydantic's labels of union members: method names, `int`, `list[str]`.
        pairs = zip((None, *details["loc"]), details["loc"], strict=False)
        loc = [str(part) for before, part in pairs if not (before == "method" and part in METHODS)]
        loc = [part for part in loc if not re.fullmatch(r"(int|float|str|bool|constrained-.*|.*\[.*)", part)]
        name, field = ".".join(loc), loc[-1] if loc else ""
        message = _message(details, field, "method" in loc, known - {field})
        problems.setdefault(name, f"{name}: {message}" if name else message)
    return list(problems.values())


def _message(details: Any, name: str, in_method: bool, known: Iterable[str]) -> str:
    kind, value = details["type"], details.get("input")
    if kind == "extra_forbidden":
        owners = [title for title, method in METHODS.items() if name in method.model_fields]
        if in_method and owners:
            return f"not a field of this method but of {', '.join(owners)}; remove it or change method.name"
        blocks = {"data": DataSettings.model_fields, "train": TrainSettings.model_fields}
        similar = [f"{block}.{name}" for block, fields in blocks.items() if name in fields]
        similar = similar or [ours for ours, theirs in NAMES_ELSEWHERE.items() if name in theirs.split()]
        similar = similar or difflib.get_close_matches(name, [*known], n=1)
        return f"unknown field; did you mean `{similar[0]}`?" if similar else "unknown field; remove it"
    if kind == "union_tag_invalid":
        method = str(value.get("name") if isinstance(value, dict) else value)
        similar = difflib.get_close_matches(method, METHODS, n=1)
        suggestion = f"; did you mean `{similar[0]}`?" if similar else ""
        return f"unknown method {method!r}; expected one of {', '.join(METHODS)}{suggestion}"
    if kind == "value_error":
        return str(details["ctx"]["error"])
    if kind == "missing":
        return f"is missing; add `{name}:`"
    return f"{details['msg'].replace('Input should', 'should', 1)}, found {value!r}"


def commented(model: str, data: str) -> str:
    """Return a recipe in YAML of the fields that matter most, each with its meaning."""
    method = METHODS["hiplora"]
    blocks: dict[str, tuple[type[BaseModel], dict[str, Any]]] = {
        "data": (DataSettings, {"path": data, "held_out_fraction": 0.1}),
        "method": (method, {"name": "hiplora", "r": 16, "lora_alpha": 32, "principal_rank": 32}),
        "train": (TrainSettings, {"lr": 2e-4, "batch_size": 4, **DEFAULTS["train"]}),
    }
    lines = [f"model: {json.dumps(model, ensure_ascii=False)}  # {TrainRecipe.model_fields['model'].description}"]
    for block, (fields, values) in blocks.items():
        lines += ["", f"{block}:"]
        for name, value in values.items():
            meaning = " ".join((fields.model_fields[name].description or "").split()).partition(". ")[0]
            lines.append(f"  {name}: {json.dumps(value)}  # {meaning}")
    return "\n".join(lines) + "\n"
