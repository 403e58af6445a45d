"""`hiplora probe`: remove, flip or shake single directions of a model's weights, and see what each is worth."""

from enum import Enum
from pathlib import Path
from typing import Any

import typer

from hiplora.cli.common import JSON_OPTION, OVERWRITE_OPTION, counted, emit_json, print_table
from hiplora.errors import ConfigError

MODULES_HELP = (
    "Module names with commas between, a regular expression, or all-linear; else the attention projections."
)
LAYERS_HELP = "Numbers of layers, as 0,4-7; or all. Else the first, a middle and the last one."
CHOICE_HELP = (
    "Which directions: log, dense among the strong ones; even, at equal distances; energy, with equal shares of Σσ² "
    "between; random."
)
BASIS_HELP = "Directions of the weight alone, or of what the layers are fed (on text sampled from the model)."
RANK_HELP = "Choose among the first so many directions; if not given, all, or 32 of the activation basis."
NOISE_HELP = "Standard deviation of the noise, as a share of σ; may be repeated. 0.1, if not given."
TEXT_HELP = "Text to measure on; else prose and code of Python's own."
RESAMPLE_HELP = "What the intervals are over: directions, or modules and directions within them."


class Choice(str, Enum):
    """How directions are chosen."""

    log = "log"
    even = "even"
    energy = "energy"
    random = "random"


class Basis(str, Enum):
    """Whose directions are probed."""

    weight = "weight"
    activation = "activation"


class Resample(str, Enum):
    """What the bootstrap draws."""

    directions = "directions"
    modules = "modules"


def command(
    model: str = typer.Argument(..., help="Model folder, hub name, or smollm2-135m."),
    out: Path = typer.Option(..., "--out", help="Output folder; it must not exist yet."),
    modules: str | None = typer.Option(None, "--modules", help=MODULES_HELP),
    layers: str | None = typer.Option(None, "--layers", help=LAYERS_HELP),
    directions: int = typer.Option(8, "--directions", min=1, help="Directions of each module."),
    choice: Choice = typer.Option(Choice.log, "--choice", help=CHOICE_HELP),
    basis: Basis = typer.Option(Basis.weight, "--basis", help=BASIS_HELP),
    principal_rank: int | None = typer.Option(None, "--principal-rank", min=1, help=RANK_HELP),
    kinds: str = typer.Option("zero,flip,noise", "--kinds", help="Interventions, with commas between."),
    noise: list[float] | None = typer.Option(None, "--noise", help=NOISE_HELP),
    draws: int = typer.Option(1, "--draws", min=1, help="Draws of the noise for each direction."),
    text: Path | None = typer.Option(None, "--text", "--drift-text", help=TEXT_HELP),
    tokens: int = typer.Option(512, "--tokens", min=2, help="Tokens of each text."),
    resample: Resample = typer.Option(Resample.directions, "--resample", help=RESAMPLE_HELP),
    seed: int = typer.Option(
        0, "--seed", min=0, help="Seed of the noise, of random choices and of the bootstrap."
    ),
    device: str = typer.Option("cpu", "--device", help="Where to compute: cpu, cuda, …"),
    overwrite: bool = OVERWRITE_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """Change one direction of one weight at a time, and measure how far the model moves by it.

    For each chosen singular direction: zero takes it out of the weight, flip turns its sign, noise changes its gain at
    random. Each time the KL divergence from the base model and the change of perplexity are measured on text, and the
    weight is put back. The folder gets probe.json, with every measurement and the correlations of the losses with the
    singular values, and scatter plots. After an interruption, the same command goes on where it stopped.

    Example:

        hiplora probe smollm2-135m --layers 0,15 --modules q_proj,v_proj --directions 6 --out runs/probe
    """
    from hiplora.cli.factorize import check_device, parse_targets
    from hiplora.models import quiet_transformers
    from hiplora.study.probe import ProbeSettings, run_probe

    check_device(device)
    settings = ProbeSettings(
        model=model,
        modules=parse_targets(modules),
        layers=parse_layers(layers),
        directions=directions,
        choice=choice.value,
        basis=basis.value,
        principal_rank=principal_rank,
        kinds=intervention_names(kinds, noise),
        draws=draws,
        text=str(text) if text else None,
        tokens=tokens,
        resample=resample.value,
        seed=seed,
        device=device,
    )
    with quiet_transformers(always=False), counted() as start:
        tell: list[Any] = []

        def started(total: int, done: int) -> None:
            tell.append(start("probing directions", total))
            tell[0](done)

        record = run_probe(
            settings, out, overwrite=overwrite, on_start=started, on_record=lambda _: tell[0](1)
        )
    if as_json:
        emit_json({"out": str(out), **{key: value for key, value in record.items() if key != "records"}})
        return
    for metric, unit in record["unit"].items():
        _print(record, metric, unit)
    typer.echo(f"written to {out}: probe.json, {', '.join(record['figures'])}")


def parse_layers(given: str | None) -> tuple[int, ...] | None:
    """Turn `0,4-7` into numbers; `all` is none, which stands for every layer.

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


def intervention_names(kinds: str, noise: list[float] | None) -> tuple[str, ...]:
    """Return the names of the interventions, `noise` with each of its scales.

    Raises:
        ConfigError: scales are given, and no noise is asked for.
    """
    names = [name.strip() for name in kinds.split(",") if name.strip()]
    if noise and "noise" not in names:
        raise ConfigError(f"--noise {noise[0]:g}: --kinds {kinds} has no noise; add it, or leave --noise out")
    scales = [f"noise_{scale:g}" for scale in noise or (0.1,)]
    return tuple(name for given in names for name in (scales if given == "noise" else [given]))


def _print(record: dict[str, Any], metric: str, unit: str) -> None:
    from hiplora.reporting.numbers import significant

    rows, reasons = [], []
    for found in record["correlations"]:
        if found["metric"] != metric:
            continue
        cells = [cell for name in ("pearson", "spearman") for cell in _cells(found[name], significant)]
        rows.append((f"{found['kind']}, {found['type']}", found["points"], *cells))
        if reason := found["pearson"]["reason"]:
            reasons.append(f"{found['kind']}, {found['type']}: {reason}")
    title = f"{metric} ({unit}) against σ, {len(record['modules'])} modules"
    columns = ("Intervention", "directions", "Pearson", "95 %", "p", "Spearman", "95 %", "p")
    print_table(title, columns, rows)
    for reason in reasons:
        typer.echo(reason)


def _cells(found: dict[str, Any], number: Any) -> tuple[str, str, str]:
    from hiplora.reporting.numbers import MISSING, hundredths

    if found["estimate"] is None:
        return MISSING, MISSING, MISSING
    interval = (
        MISSING if found["low"] is None else f"{hundredths(found['low'])} … {hundredths(found['high'])}"
    )
    return hundredths(found["estimate"]), interval, number(found["p_value"], 2)
