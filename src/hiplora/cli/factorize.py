"""`hiplora factorize`: compute and store the spectral factors of a model before anything is trained."""

import re
import time
from enum import Enum
from typing import Any

import typer

from hiplora.cli.common import DEVICE_OPTION, JSON_OPTION, emit_json, print_frame


class Dtype(str, Enum):
    """Number format in which a model is loaded for training."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


TARGETS_HELP = "Module names separated by commas, a regular expression, or all-linear; else the {} projections."


def command(
    model: str = typer.Argument(..., help="Model folder, hub name, or smollm2-135m."),
    target_modules: str | None = typer.Option(None, "--target-modules", help=TARGETS_HELP.format("attention")),
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

    Stored factors are verified and kept: after an interruption, run the same command again to continue.

    Example:

        hiplora factorize smollm2-135m --rank 32
    """
    import pandas as pd

    from hiplora.models import load, pick_device
    from hiplora.provenance import provenance
    from hiplora.spectral import FactorStore
    from hiplora.tuner import HipLoraConfig, weight_factors

    start = time.perf_counter()
    modules = parse_targets(target_modules)
    config = HipLoraConfig(preset="paper", target_modules=modules, principal_rank=rank, svd_tolerance=tolerance)
    device = pick_device(device)
    loaded = load(model, dtype.value if dtype else "auto")[0].to(device)
    store, made = FactorStore(), 0
    layers: list[dict[str, Any]] = []
    try:
        for target, factors in weight_factors(loaded, config, store):
            layers.append(
                {
                    "name": target.name,
                    "shape": target.shape,
                    "k": factors.rank,
                    "method": factors.method,
                    "residual": factors.residual,
                    "orthogonality": factors.orthogonality,
                    "reused": store.made == made,
                }
            )
            made = store.made
    except KeyboardInterrupt:
        typer.echo(f"stopped: {len(layers)} weights are in the store; run it again to go on", err=True)
        raise
    seconds = time.perf_counter() - start
    if as_json:
        record = {"model": model, "store": str(store.root), "layers": layers, "seconds": seconds}
        emit_json({**record, "provenance": provenance()})
        return
    df = pd.DataFrame(layers).assign(shape=[f"{m}×{n}" for m, n in (layer["shape"] for layer in layers)])
    groups = df.groupby(df["name"].str.rpartition(".")[2].rename("Modules"), sort=False)
    table = pd.DataFrame(
        {
            "layers": groups.size(),
            "shape": groups["shape"].first(),
            "stored before": groups["reused"].sum(),
            "method": groups["method"].agg(lambda methods: ", ".join(sorted(set(methods)))),
            "residual ≤": groups["residual"].max().map("{:.1e}".format),
        }
    )
    print_frame(f"{model}: factors in {store.root}", table.reset_index())
    typer.echo(f"{len(df)} weights, {seconds:.1f} s")


def parse_targets(given: str | None) -> str | list[str] | None:
    """Return names as a list; anything else is for PEFT: a regular expression or "all-linear"."""
    if given is None or given.lower() == "all-linear" or not re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)*", given):
        return given
    return [name.strip() for name in given.split(",")]
