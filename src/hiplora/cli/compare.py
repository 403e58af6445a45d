"""`hiplora compare`: what LoRA and HiP-LoRA do to a model on your data."""

from pathlib import Path

from typer import Argument, Option

from hiplora.cli.common import DRIFT_TEXT, MODEL, OVERWRITE, Shown, names, tell, told_to_repeat


def command(
    model: str = MODEL,
    data: Path = Argument(..., help="Training rows: JSON lines, JSON, parquet or CSV, as for hiplora train."),
    out: Path = Option(..., help="Output folder: new, or of an interrupted run of the same."),
    methods: str | None = Option(
        None,
        help="Methods, joined by commas: lora (all linear layers), lora-mlp, lora-attention, hiplora, hiplora-paper. "
        "Default: lora,lora-mlp,hiplora, or over a mixture of experts lora-attention,hiplora.",
    ),
    steps: int = Option(40, help="Optimizer steps of each method."),
    lr: float = Option(1e-3, help="Learning rate of all methods."),
    batch_size: int = Option(4, help="Rows per step."),
    max_length: int = Option(512, help="Tokens per row; longer responses are cut."),
    rank: int = Option(16, help="Rank r of all methods."),
    principal_rank: int = Option(32, help="Protected directions k (HiP-LoRA)."),
    prompts: Path | None = Option(
        None, help="Text file with a prompt a line, for the answers side by side; else eight built-in ones."
    ),
    drift_text: Path | None = DRIFT_TEXT,
    heldout_fraction: float = Option(
        0.15, help="Share of the rows kept back for the in-domain loss, 48 rows at most."
    ),
    seed: int = Option(42, help="Seed of all trainings."),
    overwrite: bool = OVERWRITE,
) -> Shown:
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
    texts = {"prompts": prompts and str(prompts), "drift_text": drift_text and str(drift_text)}
    options = locals() | texts | {"methods": None if methods is None else tuple(names(methods))}
    from hiplora.compare import CompareSettings, compare
    from hiplora.compare_report import details, headline, next_steps, summary

    settings = CompareSettings(**{name: options[name] for name in CompareSettings.__dataclass_fields__})
    with told_to_repeat(out):
        results = compare(model, data, out, settings, overwrite=overwrite, tell=tell)
    yield results
    yield f"Drift at held-out loss {results['equal']['loss']:.3f}, which all reach", summary(results)
    yield headline(results)
    yield from filter(None, [details(results), *results["notes"]])
    yield f"\nReport: {out / 'report.html'}, with the models' own answers side by side"
    yield next_steps(results, out)
