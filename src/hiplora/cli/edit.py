"""`hiplora edit`: change facts that a model states, and see what else changed."""

from pathlib import Path
from typing import Any, Literal

import typer

from hiplora.cli.common import DEVICE_OPTION, JSON_OPTION, OUT_OPTION, OVERWRITE_OPTION, emit_json, print_frame
from hiplora.errors import ConfigError, first_problem

EDITS_HELP = (
    "What to edit: builtin, or a file: JSON lines in hiplora's format, CounterFact or zsRE (docs/howto/edit.md)."
)
METHOD_HELP = (
    "A method of the recipes, trained on the edits (hiplora, lora, pissa, milora, corda, lora_null, …), or alphaedit, "
    "which computes its update."
)
MODE_HELP = (
    "batch: all edits together, or separate batches on the bare model; sequential: batch after batch into one adapter; "
    "single: each edit alone, undone before the next."
)
CATEGORY_HELP = "Only edits of one category: Entity/Attribute, Relation/Fact, Temporal/Numeric."


def command(
    model: str = typer.Argument(..., help="Model folder, hub name, or smollm2-135m."),
    edits: str = typer.Argument(..., help=EDITS_HELP),
    out: Path = OUT_OPTION,
    method: str = typer.Option("hiplora", "--method", help=METHOD_HELP),
    settings: list[str] = typer.Option(
        [], "--set", metavar="KEY=VALUE", help="A setting of the method, such as r=8; may be repeated."
    ),
    mode: Literal["batch", "sequential", "single"] = typer.Option("batch", "--mode", help=MODE_HELP),
    limit: int | None = typer.Option(
        None, "--limit", min=1, help="Number of edits to take from the start. Default: all."
    ),
    category: str | None = typer.Option(None, "--category", help=CATEGORY_HELP),
    edits_per_batch: int | None = typer.Option(
        None, "--edits-per-batch", min=1, help="Edits in a batch. Default: all."
    ),
    sample: int | None = typer.Option(
        None, "--sample", min=1, help="In mode single: number of edits to draw, by --seed."
    ),
    steps: int | None = typer.Option(
        None, "--steps", min=1, help="Training steps of each batch. Default: 500, or 20 in mode single."
    ),
    lr: float | None = typer.Option(None, "--lr", help="Learning rate. Default: 2e-4, or 2e-3 in mode single."),
    batch_size: int | None = typer.Option(None, "--batch-size", min=1, help="Edits in a training step: 16."),
    locality: int = typer.Option(
        500, "--locality", min=0, help="Unrelated questions to ask before and after every stage; 0 asks none."
    ),
    seed: int = typer.Option(42, "--seed", min=0, help="Seed of the adapter and of the order of the edits."),
    device: str = DEVICE_OPTION,
    overwrite: bool = OVERWRITE_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """Edit facts that a model states, and measure the effect on them and on everything else.

    For each edit: whether the new answer is now likelier than the old one, and generated; the same on a paraphrase; and
    whether questions near it keep their answers. On unrelated questions: accuracy, unchanged answers and likelihood
    against the bare model's, which are taken before the first edit. The folder gets edit.json, with every edit's
    values, and the adapter.

    Example:

        hiplora edit smollm2-135m builtin --limit 100 --method lora --out runs/edit
    """
    from pydantic import ValidationError

    from hiplora.editing.job import EditJob, edit, summary_tables
    from hiplora.models import quiet_transformers
    from hiplora.training.reading import put_over

    method_settings: dict[str, Any] = {}
    for text in settings:
        put_over(method_settings, text)
    try:
        job = EditJob(
            model=model,
            edits=edits,
            method=method,
            method_settings=method_settings,
            mode=mode,
            limit=limit,
            category=category,  # type: ignore[arg-type]  # pydantic checks it
            edits_per_batch=edits_per_batch,
            sample=sample,
            steps=steps,
            lr=lr,
            rows=batch_size,
            questions=locality,
            seed=seed,
            device=device,
        )
    except ValidationError as error:
        raise ConfigError(f"--{first_problem(error)}") from None
    with quiet_transformers(always=False):
        record = edit(job, out, overwrite=overwrite)
    if as_json:
        shown = {key: record[key] for key in ("method", "mode", "edits", "adapters", "summary")}
        emit_json({"out": str(out), **shown})
        return
    typer.echo(f"{record['edits']} edits by {method}, {mode}")
    for title, table in summary_tables(record["summary"]).items():
        print_frame(title, table)
    typer.echo(f"Written to {out}: {', '.join([*record['adapters'], 'edit.json'])}")
    for name in record["adapters"][:1]:
        typer.echo(f'Ask it: hiplora generate {model} --adapter {out / name} --prompt "…"')
