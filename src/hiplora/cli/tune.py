"""`hiplora tune`: settings of HiP-LoRA that learn most within a limit of drift."""

from pathlib import Path

from typer import Argument, Option

from hiplora.cli.common import DRIFT_TEXT, OVERWRITE, Shown, next_step, numbers, tell, told_to_repeat


def command(
    data: Path = Argument(..., help="Training rows: JSON lines, JSON, parquet or CSV, as for hiplora train."),
    model: str = Option("smollm2-135m", help="Base model: a folder, a hub name, smollm2-135m or gemma3-270m."),
    max_drift: float = Option(
        0.01, help="Largest drift on the worst text, in nats per token; 0.01 changes 4 % of them."
    ),
    out: Path = Option(..., help="Output folder: new, or of an interrupted run of the same."),
    rates: str = Option("5e-4,1e-3,2e-3", help="Learning rates to try, joined by commas."),
    ranks: str = Option("16", help="Ranks r to try, joined by commas, each with every rate."),
    steps: int = Option(40, help="Optimizer steps of each training."),
    batch_size: int = Option(4, help="Rows per step."),
    max_length: int = Option(512, help="Tokens per row; longer responses are cut."),
    drift_text: Path | None = DRIFT_TEXT,
    seed: int = Option(42, help="Seed of all trainings."),
    overwrite: bool = OVERWRITE,
) -> Shown:
    """Find the learning rate, rank, number of steps and scale at which HiP-LoRA learns most within a limit of drift.

    Every rate is trained with every rank. Held-out loss and drift are measured at marks along each training and with
    the finished adapter scaled down. What learned most within the limit becomes recipe.yaml, for hiplora train. The
    folder gets tune.json, recipe.yaml and all adapters.

    After an interruption, the same command continues. A folder with a finished run, or with one of other
    settings, needs --overwrite, which starts again.

    Example:

        hiplora tune my-data.jsonl --model smollm2-135m --max-drift 0.01 --out runs/tune
    """
    lists = {"rates": tuple(numbers("--rates", rates, float)), "ranks": tuple(numbers("--ranks", ranks, int))}
    options = locals() | {"drift_text": drift_text and str(drift_text), **lists}
    from hiplora.tune import TuneSettings, summary, tune

    settings = TuneSettings(**{name: options[name] for name in TuneSettings.__dataclass_fields__})
    with told_to_repeat(out):
        results = tune(model, data, out, settings, overwrite=overwrite, tell=tell)
    yield results
    yield f"Within {max_drift:g} nats per token of {model}, on the worst text", summary(results)
    yield f"The base model's held-out loss is {results['base']['held_out_loss']:.3f}."
    if (chosen := results["chosen"]) is None:
        yield "No setting learned anything within the limit: allow more drift (--max-drift), or try lower --rates."
        return
    best, recipe = results["runs"][chosen]["best"], out / "recipe.yaml"
    if best.get("scale", 1.0) != 1.0:
        scale = ("--scale", best["scale"], "--to", "lora", "--out", f"{out}-lora")
        yield next_step("hiplora", "export", out / "adapters" / chosen, *scale, why=f"{recipe} trains it again")
    else:
        yield next_step("hiplora", "train", recipe, "--out", f"{out}-trained")
