"""`hiplora export`: an adapter as plain LoRA, exactly, or merged into a standalone model."""

from pathlib import Path
from typing import Any, Literal

import typer

from hiplora.cli.common import (
    DATA_OPTION,
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
    to: Literal["lora", "dense"] = typer.Option(..., "--to", help="A plain LoRA adapter, or a standalone model."),
    out: Path = OUT_OPTION,
    overwrite: bool = OVERWRITE_OPTION,
    pad_rank: int | None = typer.Option(None, "--pad-rank", min=1, help="Fill every module up to this rank (lora)."),
    prefix: str = typer.Option(
        "", "--prefix", help="What stands for the leading “model” in module names (lora): model.language_model, …"
    ),
    dtype: Literal["float32", "bfloat16", "float16"] | None = typer.Option(
        None, "--dtype", help="Of the written tensors; default float32 (lora), the base model's (dense)."
    ),
    base: str | None = typer.Option(None, "--base", help="Base model, instead of the adapter's own."),
    scale: float | None = SCALE_OPTION,
    tolerance: float | None = TOLERANCE_OPTION,
    data: Path | None = DATA_OPTION,
    logits: bool = typer.Option(True, help="Compare logits too, if the base model is available and fits into memory."),
    as_json: bool = JSON_OPTION,
) -> None:
    """Export an adapter to a format that other software loads, and verify the result.

    A plain LoRA adapter has rank r + k and is exact; what vLLM or llama.cpp's converter would reject is listed. A
    dense export is the base model with the adapter merged in.

    Example:

        hiplora export runs/medicine --to lora --out runs/medicine-lora
    """
    from hiplora.adapters import open_update, save_as_lora, save_dense, server_findings
    from hiplora.errors import ConfigError
    from hiplora.evaluation.updates import choose_scale

    if to == "dense" and (pad_rank or prefix):
        raise ConfigError("--pad-rank, --prefix: only with --to lora; leave them out or export to lora")
    update = open_update(adapter, out, overwrite, base=base)
    factor, search = choose_scale(update, scale, tolerance, data)
    how: dict[str, Any] = {"scale": factor, "overwrite": overwrite, "check_logits": logits}
    how["details"] = {"scale": factor, "scale_search": search}
    findings: list[tuple[str, str, str]] = []
    if to == "dense":
        record = save_dense(update, out, dtype=dtype, **how)
    else:
        record = save_as_lora(update, out, pad_rank=pad_rank, prefix=prefix, dtype=dtype or "float32", **how)
        findings = server_findings(update.renamed(prefix) if prefix else update, pad_rank)
    if as_json:
        emit_json(record | {"preflight": findings})
        return
    if findings:
        print_table("Before you serve it", ("Server", "Problem", "Remedy"), findings)
    print_report(record)


def print_report(report: dict[str, Any], title: str = "Export") -> None:
    """Print an export's record."""
    worst, logits = report["largest_difference"], report["logit_difference"]
    rows = [
        ("Written to", report["path"]),
        *([("Rank", report["rank"])] if report["rank"] else []),
        *([("Scale", f"{report['scale']:g}")] if report.get("scale", 1) != 1 else []),
        ("Modules", len(report["modules"])),
        ("Largest difference of a module", f"{worst['relative']:.1e}  ({worst['module']})"),
        ("Largest difference of a logit", report["note"] if logits is None else f"{logits:.1e}"),
    ]
    if report.get("untied"):
        rows.append(("Embeddings and output head", "untied"))
    print_table(f"{title}: {report['to']}, {report['dtype']} (differences are relative)", ("", "Result"), rows)
