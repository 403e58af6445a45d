"""`hiplora factorize`: compute and keep the spectral factors of a model before anything is trained."""

import re
import time
from enum import Enum
from typing import TYPE_CHECKING, Any

import typer

from hiplora.cli.common import JSON_OPTION, emit_json, print_table, progress

if TYPE_CHECKING:
    from hiplora.tuner.factorize import Factored


class Dtype(str, Enum):
    """Number format in which a model is loaded for training."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def command(
    model: str = typer.Argument(..., help="Model folder, hub name, or smollm2-135m."),
    target_modules: str | None = typer.Option(
        None,
        "--target-modules",
        help="Module names with commas between, a regular expression, or all-linear; else the attention "
        "projections.",
    ),
    rank: int = typer.Option(32, "--rank", min=1, help="Principal rank k: singular triplets per weight."),
    tolerance: float = typer.Option(
        1e-4, "--tolerance", help="Largest accepted residual, as a share of the largest singular value."
    ),
    dtype: Dtype | None = typer.Option(
        None, "--dtype", help="Dtype that the model will be trained in, if not the checkpoint's."
    ),
    device: str = typer.Option("cpu", "--device", help="Where to compute: cpu, cuda, …"),
    as_json: bool = JSON_OPTION,
) -> None:
    """Factor the weights of a model once, ahead of training, into the store that training reads.

    Reads one weight at a time, so it needs little memory whatever the model. What is in the store already is
    verified and kept: after an interruption, run it again and it goes on where it stopped.

    Example:

        hiplora factorize smollm2-135m --rank 32
    """
    import torch

    from hiplora.models import quiet_transformers
    from hiplora.spectral import FactorStore
    from hiplora.tuner.config import HipLoraConfig
    from hiplora.tuner.factorize import Checkpoint, factorize

    start = time.perf_counter()
    config = HipLoraConfig(
        preset="paper",
        target_modules=parse_targets(target_modules),
        principal_rank=rank,
        svd_tolerance=tolerance,
    )
    check_device(device)
    store = FactorStore(must_write=True)
    with quiet_transformers(always=False):
        checkpoint = Checkpoint(model)
        targets = checkpoint.targets(config)
    steps = factorize(
        checkpoint,
        targets,
        store,
        tol=tolerance,
        dtype=getattr(torch, dtype.value) if dtype else None,
        device=device,
    )
    layers: list[Factored] = []
    try:
        layers.extend(progress(steps, "factoring weights", total=len(targets)))
    except KeyboardInterrupt:
        done = f"{len(layers)} of {len(targets)} weights are in the store"
        typer.echo(f"stopped: {done}; run it again to go on", err=True)
        raise
    record = _record(model, str(store.root), layers, time.perf_counter() - start)
    emit_json(record) if as_json else _print(record)


def parse_targets(given: str | None) -> str | list[str] | None:
    """Names become a list; anything else is for PEFT: a regular expression or its word for all layers."""
    if given is None or given.lower() == "all-linear" or not re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)*", given):
        return given
    return [name.strip() for name in given.split(",")]


def check_device(device: str) -> None:
    """Refuse a device that this machine has not."""
    import torch

    from hiplora.errors import ConfigError

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"--device {device}: not available here ({reason}); leave it out for the CPU"
        ) from None


def _record(model: str, store: str, layers: list["Factored"], seconds: float) -> dict[str, Any]:
    import dataclasses

    from hiplora.provenance import provenance

    kinds = list(dict.fromkeys(layer.kind for layer in layers))
    return {
        "model": model,
        "store": store,
        "layers": [dataclasses.asdict(layer) for layer in layers],
        "kinds": [_summary(kind, [layer for layer in layers if layer.kind == kind]) for kind in kinds],
        "total": _summary("all", layers),
        "seconds": seconds,
        "provenance": provenance(),
    }


def _summary(kind: str, layers: list["Factored"]) -> dict[str, Any]:
    return {
        "kind": kind,
        "layers": len(layers),
        "shapes": sorted({layer.shape for layer in layers}),
        "methods": sorted({layer.method for layer in layers}),
        "reused": sum(layer.reused for layer in layers),
        "seconds": sum(layer.seconds for layer in layers),
        "worst_residual": max(layer.residual for layer in layers),
        "worst_orthogonality": max(layer.orthogonality for layer in layers),
        "size": sum(layer.size for layer in layers),
    }


def _print(record: dict[str, Any]) -> None:
    columns = ("Modules", "shape", "layers", "stored", "method", "seconds", "residual ≤", "size")
    rows = [
        (
            row["kind"],
            ", ".join(f"{m}×{n}" for m, n in row["shapes"]) if row["kind"] != "all" else "",
            row["layers"],
            row["reused"],
            ", ".join(row["methods"]),
            f"{row['seconds']:.2f}",
            f"{row['worst_residual']:.1e}",
            f"{row['size'] / 1e6:.2f} MB",
        )
        for row in (*record["kinds"], record["total"])
    ]
    print_table(f"{record['model']}: factors in {record['store']}", columns, rows)
