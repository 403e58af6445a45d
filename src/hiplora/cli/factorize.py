"""`hiplora factorize`: compute and store the spectral factors of a model before anything is trained."""

import re
import time
from dataclasses import asdict
from enum import Enum

import typer

from hiplora.cli.common import DEVICE_OPTION, JSON_OPTION, emit_json, print_frame, progress
from hiplora.errors import ConfigError


class Dtype(str, Enum):
    """Number format in which a model is loaded for training."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


TARGETS_HELP = (
    "Module names separated by commas, a regular expression, or all-linear; else the {} projections."
)


def command(
    model: str = typer.Argument(..., help="Model folder, hub name, or smollm2-135m."),
    target_modules: str | None = typer.Option(
        None, "--target-modules", help=TARGETS_HELP.format("attention")
    ),
    rank: int = typer.Option(32, "--rank", min=1, help="Principal rank k: singular triplets per weight."),
    tolerance: float = typer.Option(
        1e-4, "--tolerance", help="Largest accepted residual, as a share of the largest singular value."
    ),
    dtype: Dtype | None = typer.Option(
        None, "--dtype", help="Dtype that the model will be trained in, if not the checkpoint's."
    ),
    device: str = DEVICE_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """Factor the weights of a model once, ahead of training with the weight basis (preset paper).

    Reads one weight at a time, so it needs little memory whatever the model. Stored factors are verified and kept:
    after an interruption, run the same command again to continue.

    Example:

        hiplora factorize smollm2-135m --rank 32
    """
    import pandas as pd
    import torch

    from hiplora.models import quiet_transformers
    from hiplora.provenance import provenance
    from hiplora.spectral import FactorStore
    from hiplora.tuner import HipLoraConfig
    from hiplora.tuner.factorize import Checkpoint, factorize

    start = time.perf_counter()
    modules = parse_targets(target_modules)
    config = HipLoraConfig(
        preset="paper", target_modules=modules, principal_rank=rank, svd_tolerance=tolerance
    )
    check_device(device)
    store = FactorStore(must_write=True)
    with quiet_transformers(always=False):
        checkpoint = Checkpoint(model)
        targets = checkpoint.targets(config)
    number = getattr(torch, dtype.value) if dtype else None
    steps = factorize(checkpoint, targets, store, tol=tolerance, dtype=number, device=device)
    layers: list[dict] = []
    try:
        layers.extend(map(asdict, progress(steps, "factoring weights", total=len(targets))))
    except KeyboardInterrupt:
        done = f"{len(layers)} of {len(targets)} weights are in the store"
        typer.echo(f"stopped: {done}; run it again to go on", err=True)
        raise
    seconds = time.perf_counter() - start
    record = {"model": model, "store": str(store.root), "layers": layers, "seconds": seconds}
    if as_json:
        emit_json({**record, "provenance": provenance()})
        return
    df = pd.DataFrame(layers).assign(shape=[f"{m}×{n}" for m, n in (layer["shape"] for layer in layers)])
    groups = df.groupby("kind", sort=False)
    table = pd.DataFrame(
        {
            "layers": groups.size(),
            "shape": groups["shape"].first(),
            "stored before": groups["reused"].sum(),
            "method": groups["method"].agg(lambda methods: ", ".join(sorted(set(methods)))),
            "seconds": groups["seconds"].sum(),
            "residual ≤": groups["residual"].max().map("{:.1e}".format),
            "MB": groups["size"].sum() / 1e6,
        }
    )
    print_frame(f"{model}: factors in {store.root}", table.reset_index(names="Modules"))
    typer.echo(f"{len(df)} weights, {df['size'].sum() / 1e6:.2f} MB, {seconds:.1f} s")


def parse_targets(given: str | None) -> str | list[str] | None:
    """Return names as a list; anything else is for PEFT: a regular expression or "all-linear"."""
    if given is None or given.lower() == "all-linear" or not re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)*", given):
        return given
    return [name.strip() for name in given.split(",")]


def check_device(device: str) -> None:
    """Check that this machine has a device (ConfigError)."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"--device {device}: not available here ({reason}); leave it out for the CPU"
        ) from None
