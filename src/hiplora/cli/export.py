"""`hiplora export`: an adapter as plain LoRA, exactly, or merged into a standalone model."""

import contextlib
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from hiplora.cli.common import JSON_OPTION, OVERWRITE_OPTION, emit_json, print_table, progress

if TYPE_CHECKING:
    from hiplora.adapters import ExportReport, Finding


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
    adapter: Path = typer.Argument(..., help="Adapter folder: HiP-LoRA, Proj-LoRA, LoRA or AdaLoRA."),
    to: Target = typer.Option(..., "--to", help="lora: a plain LoRA adapter; dense: a standalone model."),
    out: Path = typer.Option(..., "--out", help="Output folder; it must not exist yet."),
    overwrite: bool = OVERWRITE_OPTION,
    pad_rank: int | None = typer.Option(
        None, "--pad-rank", min=1, help="Fill every module up to this rank (lora)."
    ),
    dtype: Dtype | None = typer.Option(
        None, "--dtype", help="Of the written tensors; else float32 (lora), the base model's (dense)."
    ),
    base: str | None = typer.Option(
        None, "--base", help="Base model, if not the one that the adapter names."
    ),
    strict: bool = typer.Option(
        False, "--strict", help="Fail on whatever a server would reject or misread (lora)."
    ),
    max_shard_size: str | None = typer.Option(
        None, "--max-shard-size", help="Largest size of a file of weights, as 500MB; else 5GB (dense)."
    ),
    logits: bool = typer.Option(True, help="Compare logits too, if the base model is here and fits."),
    as_json: bool = JSON_OPTION,
) -> None:
    """Export an adapter to what other software loads, and check that it is the same.

    A plain LoRA adapter has rank r + k and is exact; what vLLM or llama.cpp's converter would reject is said before
    it is written. A dense export is the base model with the adapter merged in; it is read and written tensor by tensor.

    Example:

        hiplora export runs/medicine --to lora --out runs/medicine-lora
    """
    from hiplora.errors import ConfigError

    only = {
        Target.lora: {"--pad-rank": pad_rank is not None, "--strict": strict},
        Target.dense: {"--max-shard-size": max_shard_size is not None},
    }
    for target, options in only.items():
        for name, given in options.items():
            if given and to is not target:
                raise ConfigError(
                    f"{name}: only with --to {target.value}; leave it out or export to {target.value}"
                )
    if to is Target.dense:
        number = dtype.value if dtype else None
        _dense(adapter, out, base, number, overwrite, as_json, max_shard_size or "5GB", logits)
        return
    _lora(adapter, out, base, dtype or Dtype.float32, overwrite, as_json, pad_rank, strict, logits)


def _lora(
    adapter: Path,
    out: Path,
    base: str | None,
    dtype: Dtype,
    overwrite: bool,
    as_json: bool,
    pad_rank: int | None,
    strict: bool,
    logits: bool,
) -> None:
    from hiplora.adapters import base_facts, read_update, save_as_lora, server_findings
    from hiplora.errors import AdapterError
    from hiplora.files import check_output_dir

    check_output_dir(out, overwrite)
    with _status("exporting"):
        update = read_update(adapter, base)
        findings = server_findings(update, pad_rank, base_facts(update))
        blocking = [finding for finding in findings if finding.blocks]
        if strict and blocking:
            raise AdapterError(
                "; ".join(f"{found.server}: {found.problem} ({found.remedy})" for found in blocking)
                + ": nothing was written; leave out --strict to export anyway"
            )
        report = save_as_lora(
            update,
            out,
            pad_rank=pad_rank,
            base=base,
            dtype=dtype.value,
            overwrite=overwrite,
            check_logits=logits,
        )
    if as_json:
        emit_json(report.to_json() | {"preflight": [finding.to_json() for finding in findings]})
    else:
        _print_lora(report, findings)


def _print_lora(report: "ExportReport", findings: "list[Finding]") -> None:
    if findings:
        wants = [
            (f.server, "rejects it" if f.blocks else "takes it if", f.problem, f.remedy) for f in findings
        ]
        print_table("Before you serve it", ("Server", "", "What", "Remedy"), wants)
    module, difference = report.worst
    rows: list[tuple[str, Any]] = [
        ("Written to", report.path),
        ("Rank", max(report.ranks.values())),
        ("Modules", len(report.modules)),
        ("Largest difference of a module's update", f"{_number(difference)}  ({module})"),
        ("Largest difference of a logit", report.note if report.logits is None else _number(report.logits)),
    ]
    print_table(f"Plain LoRA, {report.dtype} (differences are relative)", ("", "Result"), rows)


def _dense(
    adapter: Path,
    out: Path,
    base: str | None,
    dtype: str | None,
    overwrite: bool,
    as_json: bool,
    max_shard_size: str,
    logits: bool,
) -> None:
    from hiplora.adapters import save_dense

    report = save_dense(
        adapter,
        out,
        base,
        dtype,
        overwrite=overwrite,
        max_shard_size=max_shard_size,
        check_logits=logits,
        wrap=lambda names: progress(names, "writing tensors"),
    )
    if as_json:
        emit_json(report.to_json())
        return
    module, difference = report.worst
    rows: list[tuple[str, Any]] = [
        ("Written to", report.path),
        ("Files of weights", len(report.files)),
        ("Modules merged", report.modules),
        ("Largest difference of a weight", f"{_number(difference)}  ({module})"),
        (
            "Largest difference of a logit",
            "not compared" if report.logits is None else _number(report.logits),
        ),
        ("Embeddings and output head", "untied" if report.untied else "as in the base model"),
    ]
    print_table(f"Standalone model, {report.dtype} (differences are relative)", ("", "Result"), rows)
    if report.note:
        typer.echo(f"Note: {report.note}")


def _number(difference: float) -> str:
    return f"{difference:.1e}" if difference else "0"


@contextlib.contextmanager
def _status(what: str) -> Iterator[None]:
    """Show a spinner on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield
