"""`hiplora train` and `hiplora init`: fine-tune an adapter from a recipe or without one, and write a recipe."""

import json
import logging
import os
from pathlib import Path

import typer
from typer import Argument, Option

from hiplora.cli.common import OVERWRITE, Shown, next_step, told_to_repeat
from hiplora.errors import ConfigError


def command(
    recipe: Path | None = Argument(
        None, help="YAML file that says what to train (docs/reference/recipes.md lists every field)."
    ),
    model: str | None = Option(None, help="Base model, instead of the recipe's."),
    data: str | None = Option(
        None, help="File with training rows, or a hub data set (owner/name), instead of the recipe's."
    ),
    method: str | None = Option(None, help="Method, instead of the recipe's or hiplora."),
    lr: float | None = Option(None, help="Learning rate, instead of the recipe's or 2e-4."),
    epochs: float | None = Option(None, help="Passes over the data, instead of the recipe's or 3."),
    set: list[str] = Option(
        [], metavar="KEY=VALUE", help="Override a value of the recipe, for example train.lr=1e-4; may be repeated."
    ),
    out: Path | None = Option(None, help="Output folder; the recipe's `out`, if not given."),
    preview: int | None = Option(None, min=1, help="Show so many rows as they are learned, and train nothing."),
    dry_run: bool = Option(False, "--dry-run", help="The same with one row."),
    resume: bool = Option(
        False, "--resume", help="Continue an unfinished run in the output folder; leave a finished one as it is."
    ),
    overwrite: bool = OVERWRITE,
) -> Shown:
    """Fine-tune an adapter (HiP-LoRA, LoRA, PiSSA, MiLoRA, CorDA, LoRA-Null …) on your data.

    The recipe and the data are checked to the last row before the model is loaded. A stopped run continues from
    its last checkpoint when the same command is repeated. `torchrun` and `accelerate launch` train on several
    devices, which share the recipe's gradient accumulation.

    Example:

        hiplora train --model smollm2-135m --data examples/data/ferry.jsonl --lr 1e-3 --out runs/quick
    """
    from hiplora.training import load_recipe, train
    from hiplora.training.result import result_rows
    from hiplora.training.sequences import preview as previewed

    options = {"model": model, "data": data, "method": method, "train.lr": lr, "train.epochs": epochs}
    overrides = [f"{key}={json.dumps(value)}" for key, value in options.items() if value is not None]
    if epochs is not None:
        overrides.append("train.steps=")
    if recipe is None and (model is None or data is None):
        raise ConfigError("name a recipe, or give --model and --data; `hiplora init` writes a recipe")
    loaded = load_recipe(recipe, [*overrides, *set])
    if preview or dry_run:
        yield from previewed(loaded, preview or 1)
        return
    folder = out or loaded.out
    if folder is None:
        raise ConfigError("no output folder: pass --out DIR, or write `out:` into the recipe")
    if resume and overwrite:
        raise ConfigError("--resume carries a run on, --overwrite starts it anew; pass one of them")
    log, to_stderr = logging.getLogger("hiplora"), logging.StreamHandler()
    log.setLevel(logging.INFO)
    log.addHandler(to_stderr)
    try:
        with told_to_repeat(folder):
            result = train(loaded, folder, resume=resume, overwrite=overwrite)
    finally:
        log.removeHandler(to_stderr)
    yield {"schema": 1, "kind": "training", "out": str(result.adapter), **result.summary()}
    yield f"{loaded.method.title} adapter in {result.adapter}", ["", "value"], result_rows(result)
    if not loaded.method.kind:
        lora = ("--to", "lora", "--out", f"{folder}-lora")
        yield next_step("hiplora", "export", folder, *lora, why="a plain LoRA, which loads without hiplora")
    raw = [] if result.data["encoding"].get("conversations") else ["--raw"]  # as it was trained
    prompt = ("--adapter", folder, "--prompt", "TEXT", *raw)
    yield next_step("hiplora", "generate", loaded.model, *prompt, why="beside the base model's answer")


def init(
    out: Path = Option(Path("recipe.yaml"), help="Recipe to write; it must not exist yet."),
    model: str = Option("smollm2-135m", help="Base model."),
    data: str = Option("rows.jsonl", help="File with training rows."),
    overwrite: bool = OVERWRITE,
) -> None:
    """Write a training recipe with comments, to edit and to give to `hiplora train`.

    Example:

        hiplora init --model smollm2-135m --data rows.jsonl --out recipe.yaml
    """
    from hiplora.files import check_output_file, write_atomic
    from hiplora.training.reading import commented

    def from_its_folder(name: str) -> str:
        is_relative_path = Path(name).exists() and not Path(name).is_absolute()
        return os.path.relpath(name, out.parent) if is_relative_path else name

    write_atomic(check_output_file(out, overwrite), commented(from_its_folder(model), from_its_folder(data)))
    typer.echo(next_step("hiplora", "train", out, "--dry-run", why="shows what is learned; then with --out DIR"))
