"""`hiplora probe`: remove, flip or perturb single directions of a model's weights, and see what each is worth."""

from pathlib import Path
from typing import Any, Literal

from typer import Option

from hiplora.cli.common import (
    ATTENTION_TARGETS,
    DEVICE,
    MODEL,
    OUT,
    OVERWRITE,
    Group,
    Shown,
    checked,
    names,
    next_step,
    targets,
)
from hiplora.errors import ConfigError

KINDS_HELP = "Interventions, separated by commas: zero, flip, noise_S with the standard deviation S as a share of σ."


def probe_settings(
    model: str = MODEL,
    modules: str | None = ATTENTION_TARGETS,
    layers: str | None = Option(
        None, help="Numbers of layers, such as 0,4-7; or all. Default: the first, a middle and the last one."
    ),
    directions: int = Option(8, min=1, help="Directions of each module."),
    choice: Literal["log", "even"] = Option(
        "log", help="Which directions: log, dense among the strong ones, or even, at equal distances."
    ),
    basis: Literal["weight", "activation"] = Option(
        "weight", help="Directions of the weight alone, or of the layers' inputs (on text sampled from the model)."
    ),
    principal_rank: int | None = Option(
        None, min=1, help="Choose among the leading N directions. Default: all, or 32 for the activation basis."
    ),
    kinds: str = Option("zero,flip,noise_0.1", help=KINDS_HELP),
    draws: int = Option(1, min=1, help="Draws of the noise for each direction."),
    text: Path | None = Option(
        None, "--text", "--drift-text", help="Text to measure on. Default: prose and code of Python's own."
    ),
    tokens: int = Option(512, min=2, help="Tokens of each text."),
    seed: int = Option(0, min=0, help="Seed of the noise and the bootstrap."),
    device: str = DEVICE,
) -> Any:
    """What is probed, and how."""
    options = locals() | {"modules": targets(modules), "layers": parse_layers(layers), "kinds": tuple(names(kinds))}
    from hiplora.probing.run import ProbeSettings

    return checked(ProbeSettings, **options | {"text": text and str(text)})


def command(settings: Any = Group(probe_settings), out: Path = OUT, overwrite: bool = OVERWRITE) -> Shown:
    """Change one direction of one weight at a time, and measure how far that moves the model.

    For each chosen singular direction: zero removes it from the weight, flip flips its sign, noise perturbs its gain.
    Each time the KL divergence from the base model and the change of perplexity are measured on text, and the weight
    is put back. The folder gets probe.json, with every measurement and the correlations of the losses with the
    singular values, and a report with scatter plots.

    Example:

        hiplora probe smollm2-135m --layers 0,15 --modules q_proj,v_proj --directions 6 --out runs/probe
    """
    from hiplora.models import quiet_transformers
    from hiplora.probing.run import METRICS, correlation_table, run_probe

    with quiet_transformers(always=False):
        record = run_probe(settings, out, overwrite=overwrite)
    yield {"out": str(out), **{key: value for key, value in record.items() if key != "records"}}
    for metric, title in METRICS.items():
        table = correlation_table([row for row in record["correlations"] if row["type"] == "all"], metric)
        yield f"{title} (nats per token) against σ, {len(record['modules'])} modules", table
    yield record["verdict"]
    yield f"Written to {out}: probe.json, report.html (each type of module by itself)"
    measure = "factorize" if settings.basis == "weight" else "calibrate"
    yield next_step("hiplora", measure, settings.model, why="what training will protect")


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """Turn `0,4-7` into numbers; `all` is (), which stands for every layer."""
    if text is None or text.lower() == "all":
        return None if text is None else ()
    layers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        try:
            span = range(int(first), int(last or first) + 1)
        except ValueError:
            raise ConfigError(f"--layers {text}: expected numbers and spans, as 0,4-7, or all") from None
        if not span:
            raise ConfigError(f"--layers {text}: {part.strip()} goes backwards; expected as 4-7")
        layers.update(span)
    return tuple(sorted(layers))
