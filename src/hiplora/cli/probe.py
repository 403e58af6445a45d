"""`hiplora probe`: remove, flip or perturb single directions of a model's weights, and see what each is worth."""

from pathlib import Path
from typing import Literal

import typer

from hiplora.cli.common import DEVICE_OPTION, JSON_OPTION, OUT_OPTION, OVERWRITE_OPTION, emit_json, print_frame
from hiplora.errors import ConfigError, first_problem

MODULES_HELP = "Module names separated by commas, a regular expression, or all-linear. Default: attention projections."
LAYERS_HELP = "Numbers of layers, such as 0,4-7; or all. Default: the first, a middle and the last one."
CHOICE_HELP = "Which directions: log, dense among the strong ones, or even, at equal distances."
BASIS_HELP = "Directions of the weight alone, or of the layers' inputs (on text sampled from the model)."
RANK_HELP = "Choose among the leading N directions. Default: all, or 32 for the activation basis."
KINDS_HELP = "Interventions, separated by commas: zero, flip, noise_S with the standard deviation S as a share of σ."


def command(
    model: str = typer.Argument(..., help="Model folder, hub name, or smollm2-135m."),
    out: Path = OUT_OPTION,
    modules: str | None = typer.Option(None, "--modules", help=MODULES_HELP),
    layers: str | None = typer.Option(None, "--layers", help=LAYERS_HELP),
    directions: int = typer.Option(8, "--directions", min=1, help="Directions of each module."),
    choice: Literal["log", "even"] = typer.Option("log", "--choice", help=CHOICE_HELP),
    basis: Literal["weight", "activation"] = typer.Option("weight", "--basis", help=BASIS_HELP),
    principal_rank: int | None = typer.Option(None, "--principal-rank", min=1, help=RANK_HELP),
    kinds: str = typer.Option("zero,flip,noise_0.1", "--kinds", help=KINDS_HELP),
    draws: int = typer.Option(1, "--draws", min=1, help="Draws of the noise for each direction."),
    text: Path | None = typer.Option(
        None, "--text", "--drift-text", help="Text to measure on. Default: prose and code of Python's own."
    ),
    tokens: int = typer.Option(512, "--tokens", min=2, help="Tokens of each text."),
    seed: int = typer.Option(0, "--seed", min=0, help="Seed of the noise and the bootstrap."),
    device: str = DEVICE_OPTION,
    overwrite: bool = OVERWRITE_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """Change one direction of one weight at a time, and measure how far that moves the model.

    For each chosen singular direction: zero removes it from the weight, flip flips its sign, noise perturbs its gain.
    Each time the KL divergence from the base model and the change of perplexity are measured on text, and the weight
    is put back. The folder gets probe.json, with every measurement and the correlations of the losses with the
    singular values, and a report with scatter plots.

    Example:

        hiplora probe smollm2-135m --layers 0,15 --modules q_proj,v_proj --directions 6 --out runs/probe
    """
    from pydantic import ValidationError

    from hiplora.cli.factorize import parse_targets
    from hiplora.models import quiet_transformers
    from hiplora.probing.run import METRICS, ProbeSettings, correlation_table, run_probe

    try:
        settings = ProbeSettings(
            model=model,
            modules=parse_targets(modules),
            layers=parse_layers(layers),
            directions=directions,
            choice=choice,
            basis=basis,
            principal_rank=principal_rank,
            kinds=tuple(name.strip() for name in kinds.split(",") if name.strip()),
            draws=draws,
            text=str(text) if text else None,
            tokens=tokens,
            seed=seed,
            device=device,
        )
    except ValidationError as error:
        raise ConfigError(f"--{first_problem(error)}") from None
    with quiet_transformers(always=False):
        record = run_probe(settings, out, overwrite=overwrite)
    if as_json:
        emit_json({"out": str(out), **{key: value for key, value in record.items() if key != "records"}})
        return
    for metric, title in METRICS.items():
        table = correlation_table(record["correlations"], metric)
        print_frame(f"{title} (nats per token) against σ, {len(record['modules'])} modules", table)
    typer.echo(f"Written to {out}: probe.json, report.html")


def parse_layers(given: str | None) -> tuple[int, ...] | None:
    """Turn `0,4-7` into numbers; `all` is (), which stands for every layer.

    Raises:
        ConfigError: it cannot be read so.
    """
    if given is None or given.lower() == "all":
        return None if given is None else ()
    numbers: set[int] = set()
    for part in given.split(","):
        first, _, last = part.strip().partition("-")
        try:
            span = range(int(first), int(last or first) + 1)
        except ValueError:
            raise ConfigError(f"--layers {given}: expected numbers and spans, as 0,4-7, or all") from None
        if not span:
            raise ConfigError(f"--layers {given}: {part.strip()} goes backwards; expected as 4-7")
        numbers.update(span)
    return tuple(sorted(numbers))
