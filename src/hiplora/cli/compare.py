"""`hiplora compare`: LoRA and HiP-LoRA side by side on one's own data."""

from pathlib import Path

import typer

from hiplora.cli.common import JSON_OPTION, OVERWRITE_OPTION, emit_json, print_frame


def command(
    model: str = typer.Argument(..., help="Base model: a folder, a hub name, or smollm2-135m."),
    data: Path = typer.Argument(
        ..., help="Training rows: .jsonl, .json, .gz or .parquet, in any of the usual formats."
    ),
    out: Path = typer.Option(..., "--out", help="Output folder: new, or of an interrupted run of the same."),
    steps: int = typer.Option(200, "--steps", help="Optimizer steps of each method."),
    lr: float = typer.Option(2e-4, "--lr", help="Learning rate of all methods."),
    batch_size: int = typer.Option(8, "--batch-size", help="Rows per step."),
    max_length: int = typer.Option(512, "--max-length", help="Tokens per row; longer responses are cut."),
    rank: int = typer.Option(16, "--rank", help="Rank r of all methods."),
    principal_rank: int = typer.Option(32, "--principal-rank", help="Protected directions k (HiP-LoRA)."),
    drift_text: Path | None = typer.Option(
        None, "--drift-text", help="Text file to measure drift on; else prose and code of Python's own."
    ),
    heldout_fraction: float = typer.Option(
        0.1, "--heldout-fraction", help="Share of the rows kept back for the in-domain loss, 256 at most."
    ),
    seed: int = typer.Option(42, "--seed", help="Seed of all trainings."),
    overwrite: bool = OVERWRITE_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """Train LoRA and HiP-LoRA on your data with the same budget, and show what each learned and what it disturbed.

    Four methods: LoRA on the attention projections, LoRA on the MLPs, HiP-LoRA (on the MLPs, its default), and HiP-LoRA
    as in the paper. Same rows in the same order, same steps, rank and learning rate. Measured: loss on held-out rows
    before and after, drift from the base model on other text, answers to held-out prompts. The folder gets
    results.json, report.html and all adapters.

    After an interruption, the same command continues. A folder with a finished run, or with one of other
    settings, needs --overwrite, which starts again.

    Example:

        hiplora compare smollm2-135m my-data.jsonl --out runs/compare --steps 100
    """
    from hiplora.compare import CompareSettings, compare, summary

    settings = CompareSettings(
        steps=steps,
        lr=lr,
        batch_size=batch_size,
        max_length=max_length,
        rank=rank,
        principal_rank=principal_rank,
        drift_text=str(drift_text) if drift_text else None,
        heldout_fraction=heldout_fraction,
        seed=seed,
    )
    results = compare(model, data, out, settings, overwrite=overwrite)
    if as_json:
        emit_json(results)
        return
    print_frame(results["title"], summary(results))
    for note in results["notes"]:
        typer.echo(note)
    typer.echo(f"\nReport: {out / 'report.html'}")
