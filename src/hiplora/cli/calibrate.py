"""`hiplora calibrate`: measure the inputs and output gradients of a model's layers before anything is trained."""

from enum import Enum

import typer

from hiplora.cli.common import DEVICE_OPTION, JSON_OPTION, emit_json, print_frame
from hiplora.cli.factorize import TARGETS_HELP, parse_targets


class Sides(str, Enum):
    """Which sides of a layer are protected."""

    both = "both"
    input = "input"
    output = "output"


def command(
    model: str = typer.Argument(..., help="Model folder, hub name, smollm2-135m or gemma3-270m."),
    text: str | None = typer.Option(
        None,
        "--text",
        help="What to calibrate on: a text file, training data, or a data set on the hub (owner/name or "
        "owner/name:config); else text that the model writes itself: one half begun by random tokens, one half "
        "conversations in the tokenizer's chat template, or questions and answers where it has none.",
    ),
    tokens: int = typer.Option(
        10_000,
        "--tokens",
        min=2,
        help="Tokens to sample, or to read of the text; twice as many as a layer has inputs, or more.",
    ),
    target_modules: str | None = typer.Option(None, "--target-modules", help=TARGETS_HELP.format("MLP")),
    sides: Sides = typer.Option(
        Sides.both, "--sides", help="What is protected: the layers' inputs, their outputs, or both."
    ),
    rank: str = typer.Option(
        "32", "--rank", help="Protected directions per weight: k, a fraction in (0, 1), or energy:0.95."
    ),
    batch_size: int = typer.Option(8, "--batch-size", min=1, help="Rows of 256 tokens in one pass."),
    seed: int = typer.Option(0, "--seed", min=0, help="Seed of the sampling."),
    device: str = DEVICE_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """Measure the activation basis of a model's layers, and show how much of their inputs' energy k directions hold.

    Training with `basis: activation` reads these measurements from the cache. They are stored as they are finished:
    after an interruption, run the same command again to continue.

    Example:

        hiplora calibrate smollm2-135m --rank 32
    """
    import pandas as pd

    from hiplora.models import load, pick_device
    from hiplora.provenance import provenance
    from hiplora.spectral import parse_rank
    from hiplora.tuner import HipLoraConfig, calibrate

    device = pick_device(device)
    modules = parse_targets(target_modules)
    config = HipLoraConfig(target_modules=modules, principal_rank=parse_rank(rank), basis_sides=sides.value)
    loaded, tokenizer = load(model)
    loaded = loaded.to(device)
    if text is None:
        found = calibrate(loaded, config, tokens=tokens, batch_size=batch_size, seed=seed, tokenizer=tokenizer)
    else:
        from hiplora.data.texts import calibration_rows, describe_source

        rows = calibration_rows(tokenizer, text, tokens)
        found = calibrate(loaded, config, rows=rows, source=describe_source(text), batch_size=batch_size)
    record = {"model": model, **found.as_dict(), "provenance": provenance()}
    if as_json:
        emit_json(record)
        return
    df = pd.DataFrame(record["layers"]).rename(columns={"k": "protected", "effective_rank": "effective rank"})
    df["Modules"] = df["name"].str.rpartition(".")[2]
    df["inputs"] = [shape[1] for shape in df["shape"]]
    df["% of the energy"] = 100 * df["energy"]
    columns = ["inputs", "effective rank", "protected", "% of the energy"]
    groups = df.groupby("Modules", sort=False)
    table = pd.concat([groups.size().rename("layers"), groups[columns].median().round().astype(int)], axis=1)
    source = "text written by the model" if found.source == "self" else found.source
    title = f"{model}: calibrated on {found.tokens:,} tokens, {source} (medians over layers)"
    print_frame(title, table.reset_index())
    typer.echo(f"{found.seconds:.1f} s; factors take {found.bytes / 1e6:.1f} MB")
