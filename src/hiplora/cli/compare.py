"""`hiplora compare`: what LoRA and HiP-LoRA do to a model on one's own data."""

from pathlib import Path

import typer

from hiplora.cli.common import JSON_OPTION, OVERWRITE_OPTION, emit_json, print_frame, tell


def command(
    model: str = typer.Argument(..., help="Base model: a folder, a hub name, or smollm2-135m."),
    data: Path = typer.Argument(
        ..., help="Training rows: .jsonl, .json, .gz or .parquet, in any of the usual formats."
    ),
    out: Path = typer.Option(..., "--out", help="Output folder: new, or of an interrupted run of the same."),
    methods: str = typer.Option(
        "lora,lora-mlp,hiplora",
        "--methods",
        help="Methods, joined by commas: lora (all linear layers), lora-mlp, lora-attention, hiplora, hiplora-paper.",
    ),
    steps: int = typer.Option(40, "--steps", help="Optimizer steps of each method."),
    lr: float | None = typer.Option(None, "--lr", help="Learning rate of all methods; else each its own."),
    batch_size: int = typer.Option(4, "--batch-size", help="Rows per step."),
    max_length: int = typer.Option(512, "--max-length", help="Tokens per row; longer responses are cut."),
    rank: int = typer.Option(16, "--rank", help="Rank r of all methods."),
    principal_rank: int = typer.Option(32, "--principal-rank", help="Protected directions k (HiP-LoRA)."),
    prompts: Path | None = typer.Option(
        None,
        "--prompts",
        help="Text file with a prompt a line, for the answers side by side; else eight built-in ones.",
    ),
    drift_text: Path | None = typer.Option(
        None, "--drift-text", help="Text file to measure drift on; else prose and code of Python's own."
    ),
    heldout_fraction: float = typer.Option(
        0.15, "--heldout-fraction", help="Share of the rows kept back for the in-domain loss, 64 at most."
    ),
    seed: int = typer.Option(42, "--seed", help="Seed of all trainings."),
    overwrite: bool = OVERWRITE_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """Train LoRA and HiP-LoRA on your data, and show what each does to the rest of the model at equal learning.

    Each method adapts the modules that it is recommended for and trains on the same rows in the same order. Measured at
    marks along the training, and with the finished adapter scaled down: loss on held-out rows, and drift from the base
    model on other text. The table reads drift at the lowest held-out loss that all reach. The report adds the model's
    own answers to questions that have nothing to do with your data, and to some held-out prompts. The folder gets
    results.json, report.html and all adapters.

    After an interruption, the same command continues. A folder with a finished run, or with one of other
    settings, needs --overwrite, which starts again.

    Example:

        hiplora compare smollm2-135m my-data.jsonl --out runs/compare --steps 100
    """
    from hiplora.compare import CompareSettings, compare, headline, next_steps, summary

    settings = CompareSettings(
        methods=tuple(name.strip() for name in methods.split(",") if name.strip()),
        steps=steps,
        lr=lr,
        batch_size=batch_size,
        max_length=max_length,
        rank=rank,
        principal_rank=principal_rank,
        prompts=str(prompts) if prompts else None,
        drift_text=str(drift_text) if drift_text else None,
        heldout_fraction=heldout_fraction,
        seed=seed,
    )
    results = compare(model, data, out, settings, overwrite=overwrite, tell=tell)
    if as_json:
        emit_json(results)
        return
    print_frame(f"Drift at held-out loss {results['equal']['loss']:.3f}, which all reach", summary(results))
    typer.echo(headline(results))
    for note in results["notes"]:
        typer.echo(note)
    typer.echo(f"\nReport: {out / 'report.html'}, with the models' own answers side by side")
    typer.echo(next_steps(results, out))
