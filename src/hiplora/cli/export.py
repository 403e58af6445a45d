"""`hiplora export`: an adapter as plain LoRA, exactly, or merged into a standalone model."""

from enum import Enum
from pathlib import Path
from typing import Any

import typer

from hiplora.cli.common import JSON_OPTION, OVERWRITE_OPTION, emit_json, print_table


class Target(str, Enum):
    """What to export to."""

    lora = "lora"
    dense = "dense"


class Dtype(str, Enum):
    """Number format of the written tensors."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def command(
    adapter: Path = typer.Argument(..., help="Adapter folder: HiP-LoRA, LoRA, AdaLoRA or OSF."),
    to: Target = typer.Option(..., "--to", help="lora: a plain LoRA adapter; dense: a standalone model."),
    out: Path = typer.Option(..., "--out", help="Output folder; it must not exist yet."),
    overwrite: bool = OVERWRITE_OPTION,
    pad_rank: int | None = typer.Option(None, "--pad-rank", min=1, help="Fill every module up to this rank (lora)."),
    dtype: Dtype | None = typer.Option(
        None, "--dtype", help="Of the written tensors; default float32 (lora), the base model's (dense)."
    ),
    base: str | None = typer.Option(None, "--base", help="Base model, instead of the adapter's own."),
    logits: bool = typer.Option(True, help="Compare logits too, if the base model is available and fits into memory."),
    as_json: bool = JSON_OPTION,
) -> None:
    """Export an adapter to a format that other software loads, and verify the result.

    A plain LoRA adapter has rank r + k and is exact; what vLLM or llama.cpp's converter would reject is listed. A
    dense export is the base model with the adapter merged in.

    Example:

        hiplora export runs/medicine --to lora --out runs/medicine-lora
    """
    from hiplora.adapters import read_update, save_as_lora, save_dense, server_findings
    from hiplora.errors import ConfigError

    if to is Target.dense and pad_rank:
        raise ConfigError("--pad-rank: only with --to lora; leave it out or export to lora")
    number, findings = dtype.value if dtype else None, []
    if to is Target.dense:
        report = save_dense(adapter, out, base, number, overwrite=overwrite, check_logits=logits)
    else:
        report = save_as_lora(
            adapter,
            out,
            pad_rank=pad_rank,
            base=base,
            dtype=number or "float32",
            overwrite=overwrite,
            check_logits=logits,
        )
        findings = server_findings(read_update(adapter, base), pad_rank)
    if as_json:
        emit_json(report.to_json() | {"preflight": findings})
        return
    if findings:
        print_table("Before you serve it", ("Server", "Problem", "Remedy"), findings)
    print_report(report.to_json())


def print_report(report: dict[str, Any], title: str = "Export") -> None:
    """Print an export's record."""
    worst, logits = report["largest_difference"], report["logit_difference"]
    rows = [
        ("Written to", report["path"]),
        *([("Rank", report["rank"])] if report["rank"] else []),
        ("Modules", len(report["modules"])),
        ("Largest difference of a module", f"{worst['relative']:.1e}  ({worst['module']})"),
        ("Largest difference of a logit", report["note"] if logits is None else f"{logits:.1e}"),
    ]
    if report.get("untied"):
        rows.append(("Embeddings and output head", "untied"))
    print_table(f"{title}: {report['to']}, {report['dtype']} (differences are relative)", ("", "Result"), rows)
