"""`hiplora factorize`: compute and store the spectral factors of a model before anything is trained."""

import time
from typing import Any, Literal

from typer import Option

from hiplora.cli.common import ATTENTION_TARGETS, DEVICE, MODEL, Shown, targets, tell, train_step


def command(
    model: str = MODEL,
    target_modules: str | None = ATTENTION_TARGETS,
    rank: int = Option(32, min=1, help="Principal rank k: singular triplets per weight."),
    tolerance: float = Option(1e-4, help="Largest accepted residual, as a share of the largest singular value."),
    dtype: Literal["float32", "bfloat16", "float16"] | None = Option(
        None, help="Dtype that the model will be trained in, if not the checkpoint's."
    ),
    device: str = DEVICE,
) -> Shown:
    """Factor the weights of a model once, ahead of training with the weight basis (preset paper).

    Stored factors are verified and kept: after an interruption, run the same command again to continue.

    Example:

        hiplora factorize smollm2-135m --rank 32
    """
    import pandas as pd

    from hiplora.devices import pick_device
    from hiplora.models import load
    from hiplora.provenance import provenance
    from hiplora.spectral import FactorStore
    from hiplora.tuner import HipLoraConfig, weight_factors

    start, modules = time.perf_counter(), targets(target_modules)
    config = HipLoraConfig(preset="paper", target_modules=modules, principal_rank=rank, svd_tolerance=tolerance)
    device = pick_device(device)
    loaded = load(model, dtype or "auto")[0].to(device)
    store, made = FactorStore(), 0
    layers: list[dict[str, Any]] = []
    try:
        for target, factors in weight_factors(loaded, config, store):
            layer = {"name": target.name, "shape": target.shape, "k": factors.rank, "reused": store.made == made}
            certificate = {name: getattr(factors, name) for name in ("method", "residual", "orthogonality")}
            layers.append(layer | certificate)
            made = store.made
    except KeyboardInterrupt:
        tell(f"stopped: {len(layers)} weights are in the store; run it again to go on")
        raise
    seconds = time.perf_counter() - start
    record = {"schema": 1, "kind": "factorization", "model": model, "store": str(store.root)}
    yield {**record, "layers": layers, "seconds": seconds, "provenance": provenance()}
    df = pd.DataFrame(layers).assign(shape=[f"{m}×{n}" for m, n in (layer["shape"] for layer in layers)])
    groups = df.groupby(df["name"].str.rpartition(".")[2].rename("Modules"), sort=False)
    columns = {
        "layers": groups.size(),
        "shape": groups["shape"].first(),
        "stored before": groups["reused"].sum(),
        "method": groups["method"].agg(lambda methods: ", ".join(sorted(set(methods)))),
        "residual ≤": groups["residual"].max().map("{:.1e}".format),
    }
    yield f"{model}: factors in {store.root}", pd.DataFrame(columns).reset_index()
    yield f"{len(df)} weights, {seconds:.1f} s"
    yield train_step(model, preset="paper", target_modules=modules, principal_rank=rank, svd_tolerance=tolerance)
