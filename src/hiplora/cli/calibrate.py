"""`hiplora calibrate`: measure the inputs and output gradients of a model's layers before anything is trained."""

from typing import Literal

from typer import Option

from hiplora.cli.common import CALIBRATION_TEXT, DEVICE, MLP_TARGETS, MODEL, Shown, targets, train_step


def command(
    model: str = MODEL,
    text: str | None = CALIBRATION_TEXT,
    tokens: int = Option(
        10_000, min=2, help="Tokens to sample, or to read of the text; twice as many as a layer has inputs, or more."
    ),
    target_modules: str | None = MLP_TARGETS,
    sides: Literal["both", "input", "output"] = Option(
        "both", help="What is protected: the layers' inputs, their outputs, or both."
    ),
    rank: str = Option("32", help="Protected directions per weight: k, a fraction in (0, 1), or energy:0.95."),
    batch_size: int = Option(8, min=1, help="Rows of 256 tokens in one pass."),
    device: str = DEVICE,
) -> Shown:
    """Measure the activation basis of a model's layers, and show how much of their inputs' energy k directions hold.

    Without --text, the model writes the text: one half begun by random tokens, one half conversations in the
    tokenizer's chat template, or questions and answers where it has none. Training with `basis: activation` reads these
    measurements from the cache. They are stored as they are finished: after an interruption, run the same command again
    to continue.

    Example:

        hiplora calibrate smollm2-135m --rank 32
    """
    import pandas as pd

    from hiplora.data.texts import calibration_rows, describe_source
    from hiplora.devices import machine_dtype, pick_device, torch_dtype
    from hiplora.models import load
    from hiplora.provenance import provenance
    from hiplora.spectral import parse_rank
    from hiplora.tuner import HipLoraConfig, calibrate

    device = pick_device(device)
    modules = targets(target_modules)
    config = HipLoraConfig(target_modules=modules, principal_rank=parse_rank(rank), basis_sides=sides)
    loaded, tokenizer = load(model, torch_dtype(machine_dtype()))  # as training loads it: other values, other factors
    if text is None:
        source = {"tokens": tokens, "tokenizer": tokenizer}
    else:
        source = {"rows": calibration_rows(tokenizer, text, tokens, loaded), "source": describe_source(text)}
    measured = calibrate(loaded.to(device), config, batch_size=batch_size, **source)
    record = {"schema": 1, "kind": "calibration", "model": model, **measured.as_dict(), "provenance": provenance()}
    yield record
    df = pd.DataFrame(record["layers"]).rename(columns={"k": "protected", "effective_rank": "effective rank"})
    df["Modules"] = df["name"].str.rpartition(".")[2]
    df["inputs"] = [shape[1] for shape in df["shape"]]
    df["% of the energy"] = 100 * df["energy"]
    columns = ["inputs", "effective rank", "protected", "% of the energy"]
    groups = df.groupby("Modules", sort=False)
    table = pd.concat([groups.size().rename("layers"), groups[columns].median().round().astype(int)], axis=1)
    origin = "text written by the model" if measured.source == "self" else measured.source
    yield f"{model}: calibrated on {measured.tokens:,} tokens, {origin} (medians over layers)", table.reset_index()
    yield f"{measured.seconds:.1f} s; factors take {measured.bytes / 1e6:.1f} MB"
    method = {"target_modules": modules, "basis_sides": sides, "calibration_text": text, "calibration_tokens": tokens}
    yield train_step(model, principal_rank=parse_rank(rank), **method)
