"""`hiplora protect`: a trained adapter, projected off the directions of the inputs that its layers really get."""

from pathlib import Path
from typing import Any, Literal

import typer

from hiplora.cli.common import (
    JSON_OPTION,
    OUT_OPTION,
    OVERWRITE_OPTION,
    SCALE_OPTION,
    TOLERANCE_OPTION,
    emit_json,
    print_table,
)


def command(
    adapter: Path = typer.Argument(..., help="Adapter folder: HiP-LoRA, LoRA, AdaLoRA or OSF."),
    out: Path = OUT_OPTION,
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
    mask: Literal["inputs", "joint"] = typer.Option(
        "inputs",
        "--mask",
        help="inputs: directions of the layers' inputs; joint: pairs of input and output directions, which costs less "
        "of the adapter for the same drift (to second order), and four times its rank.",
    ),
    projection: Literal["hard", "soft"] = typer.Option(
        "hard",
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
    scale: float | None = SCALE_OPTION,
    tolerance: float | None = TOLERANCE_OPTION,
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
    from hiplora.protect import protect_adapter
    from hiplora.spectral import parse_rank

    record = protect_adapter(
        adapter,
        out,
        principal_rank=parse_rank(principal_rank),
        mask=mask,
        projection=projection,
        strength=strength,
        text=text,
        tokens=tokens,
        seed=seed,
        data=data,
        drift_text=drift_text,
        scale=scale,
        tolerance=tolerance,
        base=base,
        overwrite=overwrite,
    )
    if as_json:
        emit_json(record)
        return
    _print(record)
    typer.echo(f"written to {out}: plain LoRA of rank {record['export']['rank']}")


def _print(record: dict[str, Any]) -> None:
    calibration, loss = record["calibration"], record["loss"]
    source = "text sampled from the model" if calibration["source"] == "self" else calibration["source"]
    rows: list[tuple[str, ...]] = [("‖ΔW‖² of the update", "", "100 %", f"{record['norm_share']:.1%}")]
    drift = record["drift"]
    for text, found in drift["before"].items():
        rows.append((f"drift on {text} (KL, nats)", "0", f"{found['kl']:.3g}", f"{drift['after'][text]['kl']:.3g}"))
    if loss:
        cells = [f"{loss[state]:.4f}" for state in ("base", "before", "after")]
        rows.append((f"loss on {loss['file']} ({loss['rows']} rows)", *cells))
    title = (
        f"{record['adapter']} (mask {record['mask']}, {record['projection']}, strength {record['strength']:g}, "
        f"scale {record['scale']:g}; measured on {calibration['tokens']:,} tokens, {source})"
    )
    print_table(title, ("", "base model", "before", "after"), rows)
    for note in record["notes"]:
        typer.echo(f"note: {note}")
