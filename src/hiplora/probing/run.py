"""`hiplora probe`: how far an intervention on single directions moves a model on text, with correlations and report."""

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
from pydantic import Field, PositiveInt, field_validator
from pydantic.dataclasses import dataclass
from torch import nn

from hiplora.data.texts import drift_texts, text_source
from hiplora.errors import ConfigError, HipLoraError
from hiplora.evaluation import BaseReference, measure_drift
from hiplora.evaluation.mounting import holding
from hiplora.files import write_atomic
from hiplora.models import load, resolve
from hiplora.probing.correlation import findings
from hiplora.probing.interventions import (
    Row,
    directions_of,
    find_modules,
    intervention_factor,
    linear_weight,
    probe,
)
from hiplora.provenance import folder_identity, json_sha256, provenance
from hiplora.run_folder import RunFolder
from hiplora.tuner import input_bases

RECORD, REPORT, ROWS = "probe.json", "report.html", "records.jsonl"
UNITS = {"kl": "nats per token", "log_perplexity": "nats per token"}  # lower is better, 0 is the base's
TITLES = {"kl": "KL from the base", "log_perplexity": "change of the log perplexity"}
CALIBRATION_TOKENS = 10_000  # sampled from the model for the activation basis
Scores = Callable[[nn.Module], Mapping[str, float]]


@dataclass(frozen=True)
class ProbeSettings:
    """What is probed, and how.

    `modules` and `layers` as in `find_modules`; `layers` None is the first, a middle and the last one, () is all.
    `directions` of each module are chosen by `choice` (`choose_directions`) among the first `principal_rank`
    (`directions_of`) in the basis of the weight or of the layer's inputs. `kinds` are interventions
    (`intervention_factor`); noise is drawn `draws` times. Drift is measured on the first `tokens` tokens of each text:
    the file `text`, else the built-in prose and code.
    """

    model: str
    modules: str | list[str] | None = None
    layers: tuple[int, ...] | None = None
    directions: PositiveInt = 8
    choice: Literal["log", "even", "random"] = "log"
    basis: Literal["weight", "activation"] = "weight"
    principal_rank: PositiveInt | None = None
    kinds: Annotated[tuple[str, ...], Field(min_length=1)] = ("zero", "flip", "noise_0.1")
    draws: PositiveInt = 1
    text: str | None = None
    tokens: Annotated[int, Field(ge=2)] = 512
    seed: Annotated[int, Field(ge=0)] = 0
    device: str = "cpu"

    @field_validator("kinds")
    @classmethod
    def _known(cls, kinds: tuple[str, ...]) -> tuple[str, ...]:
        for kind in kinds:
            intervention_factor(kind)
        return kinds

    def count(self, modules: int) -> int:
        """Return the number of interventions on so many modules."""
        each = sum(self.draws if kind.startswith("noise") else 1 for kind in self.kinds)
        return modules * self.directions * each


def run_probe(
    settings: ProbeSettings,
    out: str | Path,
    *,
    overwrite: bool = False,
    on_start: Callable[[str, int], Callable[[int], None]] | None = None,
) -> dict[str, Any]:
    """Probe a model and return the record, which `out` gets as probe.json, with a report of scatter plots.

    What is measured is kept at once: after an interruption, the same settings continue. `on_start(what, total)`
    returns what is given each advance.

    Raises:
        ConfigError: `out` holds something else, or a setting does not fit the model.
        DataError: the text cannot be used.
        FactorError: a weight cannot be decomposed.
    """
    out, texts = Path(out), drift_texts(settings.text)
    sources = {"model": folder_identity(resolve(settings.model)), "texts": json_sha256(texts)}
    folder, plan = RunFolder(out, "plan.json", RECORD), {"settings": asdict(settings), **sources}
    folder.check(plan, overwrite=overwrite)
    model, tokenizer = load(settings.model)
    model.to(settings.device)
    modules = chosen_modules(model, settings)
    with folder.claimed(plan, overwrite=overwrite):
        reference = BaseReference.build(model, tokenizer, texts, max_tokens=settings.tokens)
        tick = on_start("probing directions", settings.count(len(modules))) if on_start else None
        try:
            rows = probe_model(model, modules, reference, settings, out / ROWS, tick)
        except HipLoraError:
            if not (out / ROWS).stat().st_size:
                shutil.rmtree(out)
            raise
        windows = reference.windows.items()
        record = {
            "schema": 2,
            "kind": "probe",
            "model": settings.model,
            "settings": asdict(settings),
            "modules": modules,
            "text": {
                "source": text_source(settings.text),
                "tokens": {name: sum(len(ids) - 1 for ids in some) for name, some in windows},
            },
            "unit": UNITS,
            "correlations": findings(rows, settings.seed),
            "records": rows,
            "provenance": provenance(seed=settings.seed, **sources),
        }
        _write_report(out / REPORT, record)
        write_atomic(out / RECORD, json.dumps(record, indent=1, allow_nan=False) + "\n")
        (out / ROWS).unlink()
    return record


def probe_model(
    model: Any,
    modules: Sequence[str],
    reference: BaseReference,
    settings: ProbeSettings,
    journal: Path,
    tick: Callable[[int], None] | None = None,
    scores: Scores | None = None,
) -> list[Row]:
    """Probe a bare model, continuing from the rows in `journal`, and leave it as it was, bit for bit.

    Besides the drift from `reference` each intervention costs something of `scores`, in per cent, higher is better.

    Raises:
        ConfigError, DataError: as `hiplora.probing.probe`.
        FactorError: a weight cannot be decomposed.
    """
    done: list[Row] = []
    for line in journal.read_text(encoding="utf-8").splitlines() if journal.is_file() else []:
        with contextlib.suppress(ValueError):  # cut off when the process was killed: it is measured again
            done.append(json.loads(line))
    write_atomic(journal, "".join(json.dumps(row) + "\n" for row in done))
    tick = tick or (lambda _: None)
    tick(len(done))

    def keep(row: Row) -> None:
        with journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        tick(1)

    bases, seed = None, settings.seed
    if settings.basis == "activation":
        bases = input_bases(model, modules, tokens=CALIBRATION_TOKENS, seed=seed)
    drift = drift_measure(model, modules, reference)
    how, rank = settings.choice, settings.principal_rank
    return probe(
        model,
        directions_of(model, modules, settings.directions, how, seed=seed, rank=rank, bases=bases),
        settings.kinds,
        lambda intervened: {**drift(intervened), **(scores(intervened) if scores else {})},
        base={**dict.fromkeys(UNITS, 0.0), **(scores(model) if scores else {})},
        lower_is_better=UNITS,
        draws=settings.draws,
        seed=seed,
        done=done,
        on_row=keep,
    )


def drift_measure(model: nn.Module, modules: Sequence[str], reference: BaseReference) -> Scores:
    """Return what measures an intervened model: KL from the base and the log of the perplexity's ratio.

    Both are means over the tokens of all texts, in nats per token. At every call the weights of `modules` are put back
    for a while, and the base must then be itself bit for bit.
    """
    weights = {name: linear_weight(model, name)[1] for name in modules}

    def measure(intervened: nn.Module) -> Mapping[str, float]:
        found = measure_drift(
            intervened, reference, lambda: holding(intervened, weights), may_be_nothing=True
        ).values()
        tokens = sum(drift.tokens for drift in found)
        return {
            "kl": sum(drift.kl * drift.tokens for drift in found) / tokens,
            "log_perplexity": sum(math.log(drift.perplexity_ratio) * drift.tokens for drift in found)
            / tokens,
        }

    return measure


def chosen_modules(model: Any, settings: ProbeSettings) -> list[str]:
    """Return the names of the modules that are probed.

    Raises:
        ConfigError: as `find_modules`, or no layers are named and the model does not say how many it has.
    """
    layers: Sequence[int] | None = settings.layers
    if layers is None:
        last = getattr(model.config.get_text_config(), "num_hidden_layers", 0) - 1
        if last < 0:
            raise ConfigError(
                f"model {settings.model}: its configuration has no number of layers; name the layers"
            )
        layers = sorted({0, last // 2, last})
    return find_modules(model, settings.modules, layers or None)


def correlation_table(
    correlations: Sequence[Mapping[str, Any]], metric: str
) -> tuple[pd.DataFrame, list[str]]:
    """Return one metric's correlations with σ, a row an intervention and type of module, and why some are missing."""
    from hiplora.reporting import interval

    rows, missing = [], []
    for found in correlations:
        if found["metric"] == metric:
            row = {"intervention": f"{found['kind']}, {found['type']}", "directions": found["points"]}
            for name in ("pearson", "spearman"):
                one, p_value = found[name], found[name]["p_value"]
                row[name.capitalize()] = interval(one["estimate"], one["low"], one["high"], 2)
                row[f"{name.capitalize()} p"] = "–" if p_value is None else f"{p_value:.2g}"
            rows.append(row)
            if reason := found["pearson"]["reason"]:
                missing.append(f"{row['intervention']}: {reason}")
    return pd.DataFrame(rows), missing


def _write_report(path: Path, record: Mapping[str, Any]) -> None:
    from hiplora.reporting import Section, plots, save_page

    rows = pd.DataFrame([{**row, **row["drop"]} for row in record["records"]])
    sections = []
    for metric, unit in UNITS.items():
        table, missing = correlation_table(record["correlations"], metric)
        figure = plots.facets(
            rows[rows[metric] > 0] if metric == "kl" else rows.dropna(subset=metric),
            "kind",
            plots.scatter,
            x="sigma",
            y=metric,
            group="type",
            logx=True,
            logy=metric == "kl",
            xlabel="singular value σ",
            ylabel=f"{TITLES[metric]} ({unit})",
        )
        tables, figures = {"Correlation with σ, 95 % intervals": table}, {"A dot is a direction.": figure}
        sections.append(Section(TITLES[metric], "\n\n".join(missing), tables, figures))
    title = f"What single directions of {record['model']} are worth"
    save_page(path, title, sections, provenance=record["provenance"])
