"""`hiplora train`: fine-tune an adapter from a recipe."""

import os
from pathlib import Path

import typer

from hiplora.cli.common import JSON_OPTION, OVERWRITE_OPTION, emit_json, print_table
from hiplora.errors import ConfigError


def command(
    recipe: Path = typer.Argument(
        help="YAML file that says what to train (docs/reference/recipes.md lists every field)."
    ),
    settings: list[str] = typer.Option(
        [],
        "--set",
        metavar="KEY=VALUE",
        help="Override a value of the recipe, for example train.lr=1e-4; may be repeated.",
    ),
    out: Path | None = typer.Option(None, "--out", help="Output folder; the recipe's `out`, if not given."),
    resume: bool = typer.Option(
        False,
        "--resume",
        help="Continue an unfinished run in the output folder; leave a finished one as it is.",
    ),
    overwrite: bool = OVERWRITE_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """Fine-tune an adapter (HiP-LoRA, LoRA, PiSSA, MiLoRA, CorDA, LoRA-Null …) on your data.

    The recipe and the data are checked to the last row before the model is loaded. A stopped run continues from
    its last checkpoint when the same command is repeated. `torchrun` and `accelerate launch` train on several
    devices, which share the recipe's gradient accumulation.

    Example:
      hiplora train examples/quick.yaml --set train.lr=1e-4 --out runs/quick
    """
    from hiplora.training import load_recipe, train
    from hiplora.training.result import result_rows

    loaded = load_recipe(recipe, settings)
    where = out or (Path(loaded.out) if loaded.out else None)
    if where is None:
        raise ConfigError("no output folder: pass --out DIR, or write `out:` into the recipe")
    if resume and overwrite:
        raise ConfigError("--resume carries a run on, --overwrite starts it anew; pass one of them")
    try:
        result = train(loaded, where, resume=resume, overwrite=overwrite)
    except KeyboardInterrupt:
        again = "without --overwrite " if overwrite else ""
        typer.echo(f"stopped; repeat the command {again}to carry on from the last checkpoint in {where}", err=True)
        raise
    if int(os.environ.get("RANK", "0")) > 0:
        return
    if as_json:
        emit_json({"out": str(result.adapter), **result.summary()})
        return
    print_table(f"{loaded.method.title} adapter in {result.adapter}", ["", "value"], result_rows(result))
