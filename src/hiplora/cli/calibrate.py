"""`hiplora calibrate`: measure what a model's layers are fed, before anything is trained."""

from enum import Enum
from typing import TYPE_CHECKING, Any

import typer

from hiplora.cli.common import JSON_OPTION, emit_json, print_table

if TYPE_CHECKING:
    from hiplora.tuner import Calibration


class Sides(str, Enum):
    """Which sides of a layer are protected."""

    both = "both"
    input = "input"
    output = "output"


def command(
    model: str = typer.Argument(..., help="Model folder, hub name, or smollm2-135m."),
    text: str | None = typer.Option(
        None,
        "--text",
        help="What to calibrate on: a text file, training data, or a data set on the hub (owner/name or "
        "owner/name:config); else text sampled from the model itself.",
    ),
    tokens: int = typer.Option(10_000, "--tokens", min=2, help="Tokens to sample, or to read of the text."),
    target_modules: str | None = typer.Option(
        None,
        "--target-modules",
        help="Module names with commas between, a regular expression, or all-linear; else what recipes adapt, the "
        "MLP projections.",
    ),
    sides: Sides = typer.Option(
        Sides.both, "--sides", help="What is protected: the layers' inputs, their outputs, or both."
    ),
    rank: str = typer.Option(
        "32", "--rank", help="Protected directions per weight: k, a fraction in (0, 1), or energy:0.95."
    ),
    batch_size: int = typer.Option(8, "--batch-size", min=1, help="Rows of 256 tokens in one pass."),
    seed: int = typer.Option(0, "--seed", min=0, help="Seed of the sampling."),
    device: str = typer.Option("cpu", "--device", help="Where to compute: cpu, cuda, …"),
    as_json: bool = JSON_OPTION,
) -> None:
    """Measure what the layers of a model are fed and which of their outputs matter, and show what k directions hold.

    Training with `basis: activation` reads from the store what this measures. Sampled text and each group of
    layers are kept as they are finished: after an interruption, run it again and it goes on where it stopped.

    Example:

        hiplora calibrate smollm2-135m --rank 32
    """
    import hiplora.models
    from hiplora.cli.factorize import check_device, parse_targets
    from hiplora.models import quiet_transformers
    from hiplora.spectral import parse_rank
    from hiplora.training.memory import peak_bytes
    from hiplora.tuner import HipLoraConfig, calibrate

    check_device(device)
    config = HipLoraConfig(
        target_modules=parse_targets(target_modules),
        principal_rank=parse_rank(rank),
        basis="activation",
        basis_sides=sides.value,
    )
    with quiet_transformers(always=False):
        loaded, tokenizer = hiplora.models.load(model)
    loaded = loaded.to(device)
    if text is None:
        found = calibrate(loaded, config, tokens=tokens, batch_size=batch_size, seed=seed)
    else:
        from hiplora.data.texts import calibration_rows, describe_source

        rows = calibration_rows(tokenizer, text, tokens)
        found = calibrate(loaded, config, rows=rows, source=describe_source(text), batch_size=batch_size)
    record = _record(model, found, peak_bytes())
    emit_json(record) if as_json else _print(record)


def _record(model: str, found: "Calibration", peak: int | None) -> dict[str, Any]:
    from hiplora.provenance import provenance

    return {"model": model, **found.as_dict(), "peak_memory_bytes": peak, "provenance": provenance()}


def _print(record: dict[str, Any]) -> None:
    rows = []
    kinds = dict.fromkeys(layer["name"].rpartition(".")[2] for layer in record["layers"])
    for kind in kinds:
        layers = [layer for layer in record["layers"] if layer["name"].rpartition(".")[2] == kind]
        rows.append(
            (
                kind,
                len(layers),
                ", ".join(sorted({str(layer["shape"][1]) for layer in layers})),
                _span([layer["effective_rank"] for layer in layers], "{:.0f}"),
                _span([layer["k"] for layer in layers], "{:.0f}"),
                _span([100 * layer["energy"] for layer in layers], "{:.0f} %"),
            )
        )
    source = "text sampled from the model" if record["source"] == "self" else record["source"]
    columns = ("Modules", "layers", "inputs", "effective rank", "protected", "of the energy")
    print_table(f"{record['model']}: calibrated on {record['tokens']:,} tokens, {source}", columns, rows)
    memory = (
        f", {record['peak_memory_bytes'] / 2**30:.2f} GiB at the peak" if record["peak_memory_bytes"] else ""
    )
    typer.echo(f"{record['seconds']:.1f} s{memory}; factors take {record['factor_bytes'] / 1e6:.1f} MB")


def _span(values: list[float], form: str) -> str:
    """Return the median of some values, and their range."""
    import statistics

    middle, low, high = (form.format(v) for v in (statistics.median(values), min(values), max(values)))
    return middle if low == high else f"{middle} ({low} – {high})"
