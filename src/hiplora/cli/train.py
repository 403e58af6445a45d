"""`hiplora train`: fine-tune an adapter from a recipe, or without one."""

import json
import logging
import os
from pathlib import Path

import typer

from hiplora.cli.common import JSON_OPTION, OVERWRITE_OPTION, emit_json, print_table
from hiplora.errors import ConfigError


def command(
    recipe: Path | None = typer.Argument(
        None, help="YAML file that says what to train (docs/reference/recipes.md lists every field)."
    ),
    model: str | None = typer.Option(None, "--model", help="Base model, instead of the recipe's."),
    data: str | None = typer.Option(None, "--data", help="File with training rows, instead of the recipe's."),
    method: str | None = typer.Option(None, "--method", help="Method, instead of the recipe's or hiplora."),
    lr: float | None = typer.Option(None, "--lr", help="Learning rate, instead of the recipe's or 2e-4."),
    epochs: float | None = typer.Option(None, "--epochs", help="Passes over the data, instead of the recipe's or 3."),
    settings: list[str] = typer.Option(
        [],
        "--set",
        metavar="KEY=VALUE",
        help="Override a value of the recipe, for example train.lr=1e-4; may be repeated.",
    ),
    out: Path | None = typer.Option(None, "--out", help="Output folder; the recipe's `out`, if not given."),
    preview: int = typer.Option(0, "--preview", help="Show so many rows as they are learned, and train nothing."),
    dry_run: bool = typer.Option(False, "--dry-run", help="The same with one row."),
    resume: bool = typer.Option(
        False, "--resume", help="Continue an unfinished run in the output folder; leave a finished one as it is."
    ),
    overwrite: bool = OVERWRITE_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
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

    given = {"model": model, "data": data, "method": method, "train.lr": lr, "train.epochs": epochs}
    words = [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
    if epochs is not None:
        words.append("train.steps=")
    if recipe is None and (model is None or data is None):
        raise ConfigError("name a recipe, or give --model and --data; `hiplora init` writes a recipe")
    loaded = load_recipe(recipe, [*words, *settings])
    if preview or dry_run:
        typer.echo(previewed(loaded, preview or 1))
        return
    where = out or (Path(loaded.out) if loaded.out else None)
    if where is None:
        raise ConfigError("no output folder: pass --out DIR, or write `out:` into the recipe")
    if resume and overwrite:
        raise ConfigError("--resume carries a run on, --overwrite starts it anew; pass one of them")
    log = logging.getLogger("hiplora.training")
    log.setLevel(logging.INFO)
    shown = logging.StreamHandler()
    log.addHandler(shown)
    try:
        result = train(loaded, where, resume=resume, overwrite=overwrite)
    except KeyboardInterrupt as stop:
        again = "without --overwrite " if overwrite else ""
        said = str(stop) or "stopped"
        typer.echo(f"{said}; repeat the command {again}to carry on from the last checkpoint in {where}", err=True)
        raise
    finally:
        log.removeHandler(shown)
    if int(os.environ.get("RANK", "0")) > 0:
        return
    if as_json:
        emit_json({"out": str(result.adapter), **result.summary()})
        return
    print_table(f"{loaded.method.title} adapter in {result.adapter}", ["", "value"], result_rows(result))
    if not loaded.method.kind:
        typer.echo(f"next: hiplora export {where} --to lora --out {where}-lora   (for vLLM, llama.cpp and stock PEFT)")
