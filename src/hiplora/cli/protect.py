"""`hiplora protect`: a trained adapter, projected off the directions of the inputs that its layers really get."""

from enum import Enum
from pathlib import Path
from typing import Any

import typer

from hiplora.cli.common import JSON_OPTION, OVERWRITE_OPTION, emit_json, print_table


class Projection(str, Enum):
    """How an update is projected."""

    hard = "hard"
    soft = "soft"


def command(
    adapter: Path = typer.Argument(..., help="Adapter folder: HiP-LoRA, LoRA, AdaLoRA or OSF."),
    out: Path = typer.Option(..., "--out", help="Output folder; it must not exist yet."),
    strength: float = typer.Option(
        1.0,
        "--strength",
        min=0.0,
        max=1.0,
        help="How much of these directions to remove: 0 nothing, 1 everything.",
    ),
    principal_rank: str = typer.Option(
        "32",
        "--principal-rank",
        help="Directions per layer: a number, a fraction of its width in (0, 1), or energy:0.95.",
    ),
    projection: Projection = typer.Option(
        Projection.hard,
        "--projection",
        help="hard: the first k fully; soft: each direction by its strength.",
    ),
    base: str | None = typer.Option(None, "--base", help="Base model, if not the one that the adapter names."),
    text: str | None = typer.Option(
        None,
        "--text",
        help="What the layers' inputs are measured on: a text file, training data, or a data set on the hub "
        "(owner/name or owner/name:config); else text sampled from the base model itself.",
    ),
    tokens: int = typer.Option(10_000, "--tokens", min=2, help="Tokens to sample, or to read of the text."),
    seed: int = typer.Option(0, "--seed", min=0, help="Seed of the sampling."),
    data: Path | None = typer.Option(
        None, "--data", help="Rows of the adapter's task that it was not trained on, to show what this costs."
    ),
    drift_text: Path | None = typer.Option(
        None, "--drift-text", help="Text to measure drift on; else prose and code of Python's own."
    ),
    overwrite: bool = OVERWRITE_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """Remove from a trained adapter what disturbs the base model most, without training.

    Measures the inputs of the adapter's layers, on text that the base model writes itself or on yours, and projects
    the adapter off their strongest directions. Writes a plain LoRA adapter, and reports the drift from the base
    model before and after; with --data, also the loss of base model, adapter and result on the adapter's task.

    Example:

        hiplora protect runs/medicine --out runs/medicine-protected --data medicine.jsonl
    """
    from hiplora.protect import ProtectSettings, protect_adapter
    from hiplora.spectral import parse_rank

    settings = ProtectSettings(
        principal_rank=parse_rank(principal_rank),
        projection=projection.value,
        strength=strength,
        text=text,
        tokens=tokens,
        seed=seed,
        data=data,
        drift_text=drift_text,
    )
    record = protect_adapter(adapter, out, settings, base=base, overwrite=overwrite)
    if as_json:
        emit_json(record)
        return
    _print(record)
    typer.echo(f"written to {out}: plain LoRA of rank {record['export']['rank']}")


def _print(record: dict[str, Any]) -> None:
    calibration, summary, loss = record["calibration"], record["summary"], record["loss"]
    source = "text sampled from the model" if calibration["source"] == "self" else calibration["source"]
    rows: list[tuple[str, ...]] = [
        ("‖ΔW‖² of the update", "", "100 %", f"{summary['norm_share']:.3%}"),
        ("its output energy on the text", "", "100 %", f"{summary['energy_share']:.3%}"),
    ]
    drift = record["drift"]
    for text, found in drift["before"].items():
        rows.append((f"drift on {text} (KL, nats)", "0", f"{found['kl']:.4f}", f"{drift['after'][text]['kl']:.4f}"))
    if loss:
        cells = [f"{loss[state]:.4f}" for state in ("base", "before", "after")]
        rows.append((f"loss on {loss['file']} ({loss['rows']} rows)", *cells))
    title = (
        f"{record['adapter']} ({record['projection']}, strength {record['strength']:g}; inputs of "
        f"{len(record['modules'])} modules measured on {calibration['tokens']:,} tokens, {source})"
    )
    print_table(title, ("", "base model", "before", "after"), rows)
    for note in record["notes"]:
        typer.echo(f"note: {note}")
