"""`hiplora train`: fine-tune an adapter from a recipe."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from hiplora.cli.common import JSON_OPTION, OVERWRITE_OPTION, emit_json, print_table
from hiplora.errors import ConfigError

if TYPE_CHECKING:
    from hiplora.recipes import TrainRecipe
    from hiplora.training.result import TrainResult


def command(
    recipe: Path = typer.Argument(
        help="YAML file that says what to train (docs/training.md lists every field)."
    ),
    settings: list[str] = typer.Option(
        [],
        "--set",
        metavar="KEY=VALUE",
        help="Put a value over the recipe's, as train.lr=1e-4; may be repeated.",
    ),
    out: Path | None = typer.Option(None, "--out", help="Output folder; the recipe's `out`, if not given."),
    resume: bool = typer.Option(
        False,
        "--resume",
        help="Carry on an unfinished run in the output folder; a finished one is left as it is.",
    ),
    overwrite: bool = OVERWRITE_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """Fine-tune an adapter (HiP-LoRA, LoRA, PiSSA, MiLoRA, CorDA, LoRA-Null …) on your data.

    The recipe and the data are checked to the last row before the model is loaded. A run that was stopped, by
    Ctrl-C, a crash or a full disk, carries on from its last checkpoint when the same command is given again.

    Example:
      hiplora train examples/quick.yaml --set train.lr=1e-4 --out runs/quick
    """
    from hiplora.recipes import load_recipe

    loaded = load_recipe(recipe, settings)
    where = out or (Path(loaded.out) if loaded.out else None)
    if where is None:
        raise ConfigError("no output folder: pass --out DIR, or write `out:` into the recipe")
    if resume and overwrite:
        raise ConfigError("--resume carries a run on, --overwrite starts it anew; pass one of them")
    result = _train(loaded, where, resume, overwrite)
    if as_json:
        emit_json({"out": str(result.adapter), **result.summary()})
        return
    print_table(f"{loaded.method.name} adapter in {result.adapter}", ["", "value"], _rows(result))


def _train(recipe: "TrainRecipe", out: Path, resume: bool, overwrite: bool) -> "TrainResult":
    """Train under a progress bar; on Ctrl-C say how to carry on."""
    from hiplora.training import train
    from hiplora.training.progress import TrainingBar

    try:
        with TrainingBar("train") as bar:
            return train(
                recipe,
                out,
                resume=resume,
                overwrite=overwrite,
                on_step=bar,
                on_phase=bar.phase,
                on_note=bar.note,
            )
    except KeyboardInterrupt:
        again = "the same command again, without --overwrite," if overwrite else "the same command again"
        typer.echo(f"stopped; give {again} to carry on from the last checkpoint in {out}", err=True)
        raise


def _rows(result: "TrainResult") -> list[tuple[str, str]]:
    rows = [
        ("steps", f"{result.steps:,}"),
        ("training loss at the end", f"{result.final_loss:.4f}"),
    ]
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
