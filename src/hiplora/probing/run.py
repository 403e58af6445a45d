"""`hiplora probe`: how far interventions on single directions move a model on text, with correlations and a report."""

import functools
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
from pydantic import Field, PositiveInt, field_validator
from pydantic.dataclasses import dataclass
from torch import nn
from tqdm import tqdm

from hiplora.adapters import module_place
from hiplora.data.texts import drift_texts, text_source
from hiplora.devices import pick_device
from hiplora.evaluation import BaseReference, measure_drift
from hiplora.evaluation.mounting import holding
from hiplora.files import write_atomic
from hiplora.models import load, resolve
from hiplora.probing.correlation import COEFFICIENTS, findings
from hiplora.probing.interventions import Direction, directions_of, find_modules, intervention_factor, probe
from hiplora.provenance import folder_identity, json_sha256, provenance
from hiplora.run_folder import RunFolder
from hiplora.tuner import input_bases

METRICS = {"kl": "KL from the base", "log_perplexity": "change of the log perplexity"}  # nats per token
CALIBRATION_TOKENS = 10_000  # sampled from the model for the activation basis


@dataclass(frozen=True)
class ProbeSettings:
    """Settings of a probe: see `find_modules`, `choose_directions`, `directions_of` and `intervention_factor`.

    `layers` None is the first, a middle and the last one, () is all. `text` is a file; else built-in prose and code.
    """

    model: str
    modules: str | list[str] | None = None
    layers: tuple[int, ...] | None = None
    directions: PositiveInt = 8
    choice: Literal["log", "even"] = "log"
    basis: Literal["weight", "activation"] = "weight"
    principal_rank: PositiveInt | None = None
    kinds: Annotated[tuple[str, ...], Field(min_length=1)] = ("zero", "flip", "noise_0.1")
    draws: PositiveInt = 1
    text: str | None = None
    tokens: Annotated[int, Field(ge=2)] = 512
    seed: Annotated[int, Field(ge=0)] = 0
    device: str = "auto"

    @field_validator("kinds")
    @classmethod
    def _known(cls, kinds: tuple[str, ...]) -> tuple[str, ...]:
        for kind in kinds:
            intervention_factor(kind)
        return tuple(dict.fromkeys(kinds))


def run_probe(settings: ProbeSettings, out: str | Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Probe a model and return the record, written to `out` as probe.json, with a report of scatter plots.

    An interrupted run goes on after the last finished direction. ConfigError, DataError or FactorError if `out`, a
    setting, the text or a weight cannot be used.
    """
    texts = drift_texts(settings.text)
    sources = {"model": folder_identity(resolve(settings.model)), "texts": json_sha256(texts)}
    run, inputs = RunFolder(Path(out), "settings.json", "probe.json"), {**asdict(settings), **sources}
    run.check(inputs, overwrite=overwrite, inputs={"the model": settings.model, "the text": settings.text})
    model, tokenizer = load(settings.model)  # in fp32: single directions are worth less than bf16 resolves
    model = model.to(pick_device(settings.device))
    reference = BaseReference.build(model, tokenizer, texts, max_tokens=settings.tokens)
    with run.claimed(inputs, overwrite=overwrite):
        rows = probe_model(model, reference, settings, run)
        correlations = findings(rows, settings.seed)
        record = {
            "schema": 3,
            "kind": "probe",
            "settings": asdict(settings),
            "modules": list(dict.fromkeys(row["module"] for row in rows)),
            "text": text_source(settings.text),
            "correlations": correlations,
            "verdict": verdict(rows, correlations),
            "records": rows,
            "provenance": provenance(seed=settings.seed, **sources),
        }
        _write_report(run.path / "report.html", record)
        write_atomic(run.path / "probe.json", json.dumps(record, indent=1, allow_nan=False) + "\n")
        shutil.rmtree(run.path / "stages")
    return record


def probe_model(
    model: Any, reference: BaseReference, settings: ProbeSettings, folder: RunFolder | None = None
) -> list[dict[str, Any]]:
    """Probe a bare model, and leave it as it was, bit for bit, which every measurement checks; rows as of `probe`.

    A drop is the KL from the base and the log of the perplexity's ratio, means over the tokens of all texts. `folder`
    keeps the finished directions; with it, a bar is shown. ConfigError if a setting does not fit the model.
    """
    modules = find_modules(model, settings.modules, settings.layers or None)
    layers = sorted({module_place(name)["layer"] for name in modules} - {None})  # of a hybrid, not all
    if settings.layers is None and layers:
        three = {layers[0], layers[(len(layers) - 1) // 2], layers[-1]}
        modules = find_modules(model, settings.modules, three)
    weights = {f"{name}.weight": model.get_submodule(name).weight for name in modules}

    def measure(changed: nn.Module) -> Mapping[str, float]:
        drifts = measure_drift(changed, reference, lambda: holding(changed, weights), may_be_nothing=True).values()
        tokens = sum(drift.tokens for drift in drifts)
        kl = sum(drift.kl * drift.tokens for drift in drifts)
        log_ratio = sum(math.log(drift.perplexity_ratio) * drift.tokens for drift in drifts)
        return {"kl": kl / tokens, "log_perplexity": log_ratio / tokens}

    def rows_of(direction: Direction) -> dict[str, Any]:
        return {"rows": probe(model, [direction], settings.kinds, measure, draws=settings.draws, seed=settings.seed)}

    bases, count = None, settings.directions
    if settings.basis == "activation":
        bases = input_bases(model, modules, tokens=CALIBRATION_TOKENS, seed=settings.seed)
    directions = directions_of(model, modules, count, settings.choice, rank=settings.principal_rank, bases=bases)
    bar = tqdm(
        directions, "probing directions", len(modules) * count, leave=False, disable=None if folder else True
    )  # fmt: skip
    keep = folder.stage if folder else lambda _, work: work()
    rows = []
    for direction in bar:
        stage = keep(f"{direction.module}-{direction.index}", functools.partial(rows_of, direction))
        rows += stage["rows"]
    return rows


def verdict(rows: Sequence[Mapping[str, Any]], correlations: Sequence[Mapping[str, Any]]) -> str:
    """Return what a probe found: whether the model moves further the larger σ is, and which direction moved it most."""
    from hiplora.reporting import interval

    kinds: dict[str, list[str]] = {
        "the larger a direction's σ, the further {} moved the model": [],
        "the smaller a direction's σ, the further {} moved the model": [],
        "these directions do not show whether σ predicts the effect of {}": [],
    }
    larger, smaller, unknown = kinds.values()
    for row in correlations:
        if row["metric"] == "kl" and row["type"] == "all":
            rho = row["spearman"]
            value = "" if rho["estimate"] is None else f" (ρ {interval(rho['estimate'], rho['low'], rho['high'], 2)})"
            side = larger if (rho["low"] or 0) > 0 else smaller if (rho["high"] or 0) < 0 else unknown
            side.append(row["kind"] + value)
    trend = "; ".join(text.format(" and ".join(names)) for text, names in kinds.items() if names)
    most = max(rows, key=lambda row: math.inf if row["drop"]["kl"] is None else row["drop"]["kl"])
    furthest = f"{most['kind']} of direction {most['index']} of {most['module']}"
    kl = most["drop"]["kl"]
    by = "after which its predictions are not finite" if kl is None else f"by {kl:.2g} nats per token"
    return f"{trend[0].upper()}{trend[1:]}. Furthest: {furthest}, {by}."


def correlation_table(correlations: Sequence[Mapping[str, Any]], metric: str) -> pd.DataFrame:
    """Return one metric's correlations with σ, and why some are missing: a row an intervention and type of module."""
    from hiplora.reporting import interval

    rows = []
    for correlation in correlations:
        if correlation["metric"] != metric:
            continue
        row = {"intervention": f"{correlation['kind']}, {correlation['type']}", "directions": correlation["points"]}
        for name in COEFFICIENTS:
            coefficient, p_value = correlation[name], correlation[name]["p_value"]
            row[name.capitalize()] = interval(coefficient["estimate"], coefficient["low"], coefficient["high"], 2)
            row[f"{name.capitalize()} p"] = "–" if p_value is None else f"{p_value:.2g}"
        rows.append(row | {"note": correlation["pearson"]["reason"]})
    return pd.DataFrame(rows)


def _write_report(path: Path, record: Mapping[str, Any]) -> None:
    from hiplora.reporting import plots
    from hiplora.reporting.html import Section, save_page

    rows = pd.DataFrame([{**row, **row["drop"]} for row in record["records"]])
    sections = [Section("What was found", record["verdict"])]
    for metric, title in METRICS.items():
        log = metric == "kl"
        points = rows[rows[metric] > 0] if log else rows.dropna(subset=metric)
        axes: dict[str, Any] = {"xlabel": "singular value σ", "ylabel": f"{title} (nats per token)", "logx": True}
        figures = {}
        if len(points):  # some direction moved the model
            figure = plots.facets(points, "kind", plots.scatter, x="sigma", y=metric, group="type", logy=log, **axes)
            figures["A dot is a direction."] = figure
        tables = {"Correlation with σ, 95 % intervals": correlation_table(record["correlations"], metric)}
        sections.append(Section(title, tables=tables, figures=figures))
    title = f"What single directions of {record['settings']['model']} are worth"
    save_page(path, title, sections, provenance=record["provenance"])
