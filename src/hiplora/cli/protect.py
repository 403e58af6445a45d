"""`hiplora protect`: a trained adapter, projected off the directions of the inputs that its layers really get."""

from pathlib import Path
from typing import Any, Literal

from typer import Option

from hiplora.cli.common import (
    ADAPTER,
    BASE,
    CALIBRATION_TEXT,
    DEVICE,
    DRIFT_TEXT,
    OUT,
    OVERWRITE,
    Group,
    Shown,
    next_step,
    scaling,
)

MASK_HELP = (
    "inputs: directions of the layers' inputs; joint: pairs of input and output directions, which costs less of the "
    "adapter for the same drift (to second order), and four times its rank."
)


def command(
    adapter: Path = ADAPTER,
    out: Path = OUT,
    strength: float = Option(
        1.0, min=0.0, max=1.0, help="How much of these directions to remove: 0 nothing, 1 everything."
    ),
    principal_rank: str = Option(
        "32", help="Directions per layer: a number, a fraction of its width in (0, 1), or energy:0.95."
    ),
    mask: Literal["inputs", "joint"] = Option("inputs", help=MASK_HELP),
    projection: Literal["hard", "soft"] = Option(
        "hard", help="hard: the first k fully; soft: each direction by its strength."
    ),
    base: str | None = BASE,
    text: str | None = CALIBRATION_TEXT,
    tokens: int = Option(10_000, min=2, help="Tokens to sample, or to read of the text."),
    seed: int = Option(0, min=0, help="Seed of the sampling."),
    scaling: Any = Group(scaling),
    device: str = DEVICE,
    drift_text: Path | None = DRIFT_TEXT,
    overwrite: bool = OVERWRITE,
) -> Shown:
    """Remove from a trained adapter the directions that change the base model most, without training.

    Measures the inputs of the adapter's layers, on text that the base model writes itself or on yours, and projects
    the adapter off their strongest directions. Writes a plain LoRA adapter, and reports the drift from the base
    model before and after; with --data, also the loss of base model, adapter and result on the adapter's task.

    Example:

        hiplora protect runs/medicine --out runs/medicine-protected --data medicine.jsonl
    """
    options = dict(locals())
    from hiplora.protect import protect_adapter
    from hiplora.spectral import parse_rank

    options |= options.pop("scaling") | {"principal_rank": parse_rank(principal_rank)}
    record = protect_adapter(options.pop("adapter"), options.pop("out"), **options)
    yield record
    calibration, loss, drift = record["calibration"], record["loss"], record["drift"]
    source = "text sampled from the model" if calibration["source"] == "self" else calibration["source"]
    rows: list[tuple[str, ...]] = [("‖ΔW‖² of the update", "", "100 %", f"{record['norm_share']:.1%}")]
    for name, before in drift["before"].items():
        rows.append((f"drift on {name} (KL, nats)", "0", f"{before['kl']:.3g}", f"{drift['after'][name]['kl']:.3g}"))
    if loss:
        cells = [f"{loss[state]:.4f}" for state in ("base", "before", "after")]
        rows.append((f"loss on {loss['file']} ({loss['rows']} rows)", *cells))
    title = (
        f"{record['adapter']} (mask {mask}, {projection}, strength {strength:g}, scale {record['scale']:g}; measured "
        f"on {calibration['tokens']:,} tokens, {source})"
    )
    yield title, ("", "base model", "before", "after"), rows
    yield from (f"note: {note}" for note in record["notes"])
    yield f"written to {out}: plain LoRA of rank {record['export']['rank']}"
    both = ("--adapter", f"before={adapter}", "--adapter", f"after={out}")
    yield next_step("hiplora", "generate", record["base"], *both, "--prompt", "Why is the sky blue?")
