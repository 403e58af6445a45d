"""`hiplora export`: an adapter as plain LoRA, exactly, or merged into a standalone model."""

from pathlib import Path
from typing import Any, Literal

from typer import Option

from hiplora.cli.common import ADAPTER, BASE, DEVICE, OUT, OVERWRITE, PUSH, Group, Shown, next_step, scaling, try_step
from hiplora.errors import ConfigError


def command(
    adapter: Path = ADAPTER,
    to: Literal["lora", "dense"] = Option(..., help="A plain LoRA adapter, or a standalone model."),
    out: Path = OUT,
    overwrite: bool = OVERWRITE,
    pad_rank: int | None = Option(None, min=1, help="Fill every module up to this rank (lora)."),
    prefix: str = Option(
        "", help="What stands for the leading “model” in module names (lora): model.language_model, …"
    ),
    dtype: Literal["float32", "bfloat16", "float16"] | None = Option(
        None, help="Of the written tensors; default float32 (lora), the base model's (dense)."
    ),
    base: str | None = BASE,
    scaling: Any = Group(scaling),
    logits: bool = Option(
        True,
        help="Compare logits too, if the base model is a local folder (or --base names one) and fits into memory.",
    ),
    device: str = Option("auto", help=f"{DEVICE.help} With --to dense, only the search of --tolerance runs there."),
    push: str | None = PUSH,
) -> Shown:
    """Export an adapter to a format that other software loads, and verify the result.

    A plain LoRA adapter is exact, of rank r, or r + k with the paper's gains. What vLLM or llama.cpp's
    converter would reject is listed. A dense export is the base model with the adapter merged in.

    Example:

        hiplora export runs/medicine --to lora --out runs/medicine-lora
    """
    from hiplora.adapters import open_update, push_to_hub, save_as_lora, save_dense, server_findings
    from hiplora.adapters.output import vllm_rank
    from hiplora.evaluation.updates import choose_scale

    if to == "dense" and (pad_rank or prefix):
        raise ConfigError("--pad-rank, --prefix: only with --to lora; leave them out or export to lora")
    update = open_update(adapter, out, overwrite, base=base)
    scale, search = choose_scale(update, **scaling, device=device)
    options: dict[str, Any] = {"scale": scale, "overwrite": overwrite, "check_logits": logits}
    options["details"] = {"scale": scale, "scale_search": search}
    findings: list[tuple[str, str, str]] = []
    if to == "dense":
        record = save_dense(update, out, dtype=dtype, **options)
    else:
        options |= {"pad_rank": pad_rank, "prefix": prefix, "device": device}
        record = save_as_lora(update, out, dtype=dtype or "float32", **options)
        findings = server_findings(update.renamed(prefix) if prefix else update, pad_rank)
    if push is not None:
        push_to_hub(out, push)
    yield record | {"preflight": findings}
    if findings:
        yield "Before you serve it", ("Server", "Problem", "Remedy"), findings
    yield report_table(record, "Export")
    if prefix:
        rank = vllm_rank(record["rank"]) or record["rank"]
        serve = ("--enable-lora", "--max-lora-rank", rank, "--lora-modules", f"tuned={out}")
        yield next_step("vllm", "serve", update.base, *serve)
    else:
        yield try_step(out, update, to == "dense")


def report_table(report: dict[str, Any], title: str) -> tuple[str, tuple[str, ...], list[tuple[str, Any]]]:
    """Return an export's record as a table."""
    worst, logits = report["largest_difference"], report["logit_difference"]
    rows = [
        ("Written to", report["path"]),
        *([("Rank", report["rank"])] if report["rank"] else []),
        *([("Scale", f"{report['scale']:g}")] if report.get("scale", 1) != 1 else []),
        ("Modules", len(report["modules"])),
        ("Largest difference of a module", f"{worst['relative']:.1e}  ({worst['module']})"),
        ("Largest difference of a logit", report["note"] if logits is None else f"{logits:.1e}"),
        *([("Embeddings and output head", "untied")] if report.get("untied") else []),
    ]
    return f"{title}: {report['to']}, {report['dtype']} (differences are relative)", ("", "Result"), rows
