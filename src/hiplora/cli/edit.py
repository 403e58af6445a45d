"""`hiplora edit`: change facts that a model states, and see what else changed."""

from enum import Enum
from pathlib import Path
from typing import Any

import typer

from hiplora.cli.common import JSON_OPTION, OVERWRITE_OPTION, emit_json, print_table
from hiplora.errors import ConfigError

EDITS_HELP = (
    "What to edit: builtin, a file of JSON lines in the project's own form, or one of CounterFact or zsRE "
    "(docs/editing.md)."
)
METHOD_HELP = (
    "A method of the recipes (hiplora, lora, pissa, milora, corda, lora_null, proj_lora), trained on the edits; or "
    "alphaedit, which computes its update."
)
MODE_HELP = (
    "batch: all edits together, or batches apart from each other; sequential: batch after batch into one adapter; "
    "single: each edit alone, taken back before the next."
)


class Mode(str, Enum):
    """How edits are put together."""

    batch = "batch"
    sequential = "sequential"
    single = "single"


def command(
    model: str = typer.Argument(..., help="Model folder, hub name, or smollm2-135m."),
    edits: str = typer.Argument(..., help=EDITS_HELP),
    out: Path = typer.Option(..., "--out", help="Output folder; it must not exist yet."),
    method: str = typer.Option("hiplora", "--method", help=METHOD_HELP),
    settings: list[str] = typer.Option(
        [], "--set", metavar="KEY=VALUE", help="A setting of the method, as r=8; may be repeated."
    ),
    mode: Mode = typer.Option(Mode.batch, "--mode", help=MODE_HELP),
    limit: int | None = typer.Option(
        None, "--limit", min=1, help="The first so many edits; all, if not given."
    ),
    category: str | None = typer.Option(
        None,
        "--category",
        help="The edits of one category alone: Entity/Attribute, Relation/Fact, Temporal/Numeric.",
    ),
    edits_per_batch: int | None = typer.Option(
        None, "--edits-per-batch", min=1, help="Edits of a batch; all, if not given."
    ),
    sample: int | None = typer.Option(
        None, "--sample", min=1, help="In the mode single: draw so many of the edits, by --seed."
    ),
    steps: int | None = typer.Option(
        None, "--steps", min=1, help="Training steps of each batch: 500, or 20 in the mode single."
    ),
    lr: float | None = typer.Option(None, "--lr", help="Learning rate: 2e-4, or 2e-3 in the mode single."),
    batch_size: int | None = typer.Option(None, "--batch-size", min=1, help="Edits of a training step: 16."),
    locality: int = typer.Option(
        500,
        "--locality",
        min=0,
        help="Unrelated questions that are asked before and after every stage; 0 is none.",
    ),
    seed: int = typer.Option(
        42, "--seed", min=0, help="Seed of the adapter's start and the order of the edits."
    ),
    device: str = typer.Option("cpu", "--device", help="Where to compute: cpu, cuda, …"),
    overwrite: bool = OVERWRITE_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """Change facts that a model states, and measure what became of them and of everything else.

    For each edit: whether the new answer is now likelier than the old one, and written; the same on a paraphrase; and
    whether questions near it keep their answers. On unrelated questions: accuracy, unchanged answers and likelihood
    against the bare model's, which are taken before the first edit. The folder gets edit.json, with every edit's
    values, and the adapter.

    Example:

        hiplora edit smollm2-135m builtin --limit 100 --method lora --out runs/edit
    """
    import warnings

    from hiplora.cli.factorize import check_device
    from hiplora.models import quiet_transformers
    from hiplora.study.edit import EditJob, edit
    from hiplora.training.progress import TrainingBar

    check_device(device)
    job = EditJob(
        model=model,
        edits=edits,
        method=method,
        method_settings=dict(_setting(text) for text in settings),
        mode=mode.value,
        limit=limit,
        category=category,
        edits_per_batch=edits_per_batch,
        sample=sample,
        steps=steps,
        lr=lr,
        rows=batch_size,
        questions=locality,
        seed=seed,
        device=device,
    )
    with quiet_transformers(always=False), warnings.catch_warnings(), TrainingBar("edit") as bar:
        warnings.simplefilter("ignore", FutureWarning)  # the libraries' notes to each other

        def staged(stage: Any, stages: int) -> None:
            if stages > 1:
                bar.phase(f"stage {stage.number} of {stages} measured")

        record = edit(job, out, overwrite=overwrite, on_stage=staged, on_step=bar)
    if as_json:
        emit_json(
            {
                "out": str(out),
                **{key: record[key] for key in ("method", "mode", "edits", "adapters", "summary")},
            }
        )
        return
    _print(record)
    typer.echo(f"\nWritten: {out}")


def _setting(text: str) -> tuple[str, Any]:
    import yaml

    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise ConfigError(f"--set {text}: expected KEY=VALUE, as r=8")
    try:
        return name.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(
            f"--set {text}: {value!r} cannot be read as YAML; quote it, as name='a, b'"
        ) from None


def _print(record: dict[str, Any]) -> None:
    """Print the shares by category, after editing and before, and the locality."""
    summary = record["summary"]
    measures = [
        ("success", "success"),
        ("new answer preferred", "preferred"),
        ("new answer written", "exact"),
        ("success on the paraphrase", "paraphrase_success"),
        ("questions near it kept", "neighbours_kept"),
    ]
    groups = list(summary["after"])
    rows: list[tuple[str, ...]] = [("edits", *(f"{summary['after'][name]['edits']}" for name in groups))]
    for title, key in measures:
        if key in summary["after"]["all"]:
            rows.append((title, *(_change(summary, name, key) for name in groups)))
    count = record["edits"]["count"]
    print_table(
        f"{count} edits by {record['method']}, {record['mode']}; per cent, before → after",
        ("", *groups),
        rows,
    )
    if "locality" in summary:
        found = summary["locality"]
        typer.echo(
            f"{found['questions']:.0f} unrelated questions: accuracy {found['accuracy_before']:.1f} % → "
            f"{found['accuracy']:.1f} % ({found['accuracy_change']:+.1f} points), {found['unchanged']:.1f} % of the "
            f"answers unchanged, log-probability of the true answers {found['log_prob_change']:+.3f} nats, of the "
            f"edits' new answers {found['edited_log_prob_change']:+.3f} nats"
        )


def _change(summary: dict[str, Any], group: str, key: str) -> str:
    before, after = (summary[when].get(group, {}).get(key) for when in ("before", "after"))
    return "" if after is None else f"{before:.1f} → {after:.1f}"
