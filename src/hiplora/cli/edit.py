"""`hiplora edit`: change facts that a model states, and see what else changed."""

from pathlib import Path
from typing import Any, Literal

from typer import Argument, Option

from hiplora.cli.common import DEVICE, MODEL, OUT, OVERWRITE, Group, Shown, checked, next_step

EDITS_HELP = (
    "What to edit: builtin, or a file: JSON lines in hiplora's format, CounterFact or zsRE (docs/howto/edit.md)."
)
METHOD_HELP = (
    "A method of the recipes, trained on the edits (hiplora, lora, pissa, milora, corda, lora_null, …); or alphaedit, "
    "which computes its update; or crispedit, which trains a few weights off the directions that other text needs."
)
MODE_HELP = (
    "batch: all edits together, or separate batches on the bare model; sequential: batch after batch into one adapter; "
    "single: each edit alone, undone before the next."
)


def job(
    model: str = MODEL,
    edits: str = Argument(..., help=EDITS_HELP),
    method: str = Option("hiplora", help=METHOD_HELP),
    method_settings: list[str] = Option(
        [], "--set", metavar="KEY=VALUE", help="A setting of the method, such as r=8; may be repeated."
    ),
    mode: Literal["batch", "sequential", "single"] = Option("batch", help=MODE_HELP),
    limit: int | None = Option(None, min=1, help="Number of edits to take from the start. Default: all."),
    category: str | None = Option(
        None, help="Only edits of one category: Entity/Attribute, Relation/Fact, Temporal/Numeric."
    ),
    edits_per_batch: int | None = Option(None, min=1, help="Edits in a batch. Default: all."),
    sample: int | None = Option(None, min=1, help="In mode single: number of edits to draw, by --seed."),
    steps: int | None = Option(None, min=1, help="Training steps of each batch. Default: 500, or 20 in mode single."),
    lr: float | None = Option(None, help="Learning rate. Default: 2e-4, or 2e-3 in mode single."),
    rows: int | None = Option(None, "--batch-size", min=1, help="Edits in a training step: 16."),
    questions: int = Option(
        500, "--locality", min=0, help="Unrelated questions to ask before and after every stage; 0 asks none."
    ),
    seed: int = Option(42, min=0, help="Seed of the adapter and of the order of the edits."),
    device: str = DEVICE,
) -> Any:
    """What to edit and how."""
    options: dict[str, Any] = locals() | {"method_settings": {}}
    from hiplora.editing.job import EditJob
    from hiplora.training.reading import put_over

    for text in method_settings:
        put_over(options["method_settings"], text, "r=8")
    return checked(EditJob, **options)


def command(job: Any = Group(job), out: Path = OUT, overwrite: bool = OVERWRITE) -> Shown:
    """Edit facts that a model states, and measure the effect on them and on everything else.

    For each edit: whether the new answer is now likelier than the old one, and generated; the same on a paraphrase; and
    whether questions near it keep their answers. On unrelated questions: accuracy, unchanged answers and likelihood
    against the bare model's, which are taken before the first edit. The folder gets edit.json, with every edit's
    values, a report and the adapter.

    Example:

        hiplora edit smollm2-135m builtin --limit 100 --method lora --out runs/edit
    """
    from hiplora.editing.job import edit
    from hiplora.editing.report import summary_tables
    from hiplora.models import quiet_transformers

    with quiet_transformers(always=False):
        record = edit(job, out, overwrite=overwrite)
    shown = ("schema", "kind", "method", "mode", "edits", "adapters", "summary", "verdict")
    yield {"out": str(out), **{key: record[key] for key in shown}}
    yield f"{record['edits']} edits by {job.method}, {job.mode}"
    yield from summary_tables(record["summary"]).items()
    yield record["verdict"]
    yield f"Written to {out}: {', '.join([*record['adapters'], 'edit.json', 'report.html'])}"
    for name in record["adapters"][:1]:
        yield next_step("hiplora", "generate", job.model, "--adapter", out / name, "--prompt", "…", why="ask it")
    if not record["adapters"]:
        yield next_step(
            "hiplora", "edit", job.model, job.edits, "--method", job.method, "--out", "DIR", why="keep the edits"
        )
