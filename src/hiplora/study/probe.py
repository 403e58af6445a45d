"""Probe a model direction by direction, by how far an intervention moves it on text; keep, correlate, draw that."""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from hiplora.data.texts import drift_texts, text_source
from hiplora.errors import ConfigError
from hiplora.evaluation import BaseReference, measure_drift
from hiplora.evaluation.mounting import holding
from hiplora.files import check_output_dir, staged_dir, write_atomic
from hiplora.models import load, resolve
from hiplora.probing import (
    Finding,
    Intervention,
    ProbeRecord,
    choose_directions,
    directions_of,
    find_modules,
    findings,
    probe,
)
from hiplora.probing.correlation import RESAMPLING
from hiplora.probing.modules import linear_weight
from hiplora.provenance import folder_identity, json_sha256, provenance
from hiplora.study.folder import check_claim, claimed
from hiplora.study.measure import base_reference
from hiplora.study.probe_figures import figure
from hiplora.tuner import input_bases

RECORD, RECORDS = "probe.json", "records.jsonl"
METRICS = ("kl", "log_perplexity")  # nats per token; lower is better, 0 is the base model's
BASES = ("weight", "activation")
CALIBRATION_TOKENS = 10_000  # sampled from the model for the activation basis
_LAYERS = 3  # layers where none are named

OnRecord = Callable[[ProbeRecord], None]


@dataclass(frozen=True)
class ProbeSettings:
    """What is probed, and how.

    `modules` as `find_modules` takes them; `layers` None is the first, a middle and the last one, () is all.
    `directions` of each module are chosen by `choice` (`choose_directions`) among the first `principal_rank`
    (`directions_of`) in the basis of the weight or of the layer's inputs. `kinds` are names of interventions; noise is
    drawn `draws` times. Drift is measured on the first `tokens` tokens of each text: the file `text`, else the built-in
    prose and code. `resample` as for `findings`.
    """

    model: str
    modules: str | list[str] | None = None
    layers: Sequence[int] | None = None
    directions: int = 8
    choice: str = "log"
    basis: str = "weight"
    principal_rank: int | None = None
    kinds: Sequence[str] = ("zero", "flip", "noise_0.1")
    draws: int = 1
    text: str | None = None
    tokens: int = 512
    resample: str = "directions"
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Refuse values that make no sense, before a model is loaded."""
        choose_directions([1.0] * max(self.directions, 1), self.directions, self.choice, self.seed)
        self.interventions()
        for name, value, known in (("basis", self.basis, BASES), ("resample", self.resample, RESAMPLING)):
            if value not in known:
                raise ConfigError(f"{name} is {value!r}; expected one of {', '.join(known)}")
        if self.draws < 1 or self.tokens < 2:
            raise ConfigError(
                f"draws is {self.draws}, tokens {self.tokens}; expected at least 1 and at least 2"
            )

    def interventions(self) -> list[Intervention]:
        """Return the interventions that `kinds` names."""
        if not self.kinds:
            raise ConfigError("kinds is empty; expected some of zero, flip, noise_S as noise_0.1")
        return [Intervention.parse(name) for name in self.kinds]

    def count(self, modules: int) -> int:
        """Return how many interventions are done on so many modules."""
        each = sum(self.draws if one.kind == "noise" else 1 for one in self.interventions())
        return modules * self.directions * each


def run_probe(
    settings: ProbeSettings,
    out: str | os.PathLike,
    *,
    overwrite: bool = False,
    on_start: Callable[[int, int], None] | None = None,
    on_record: OnRecord | None = None,
) -> dict[str, Any]:
    """Probe a model and return the record, which `out` gets as probe.json, with a scatter plot of each metric.

    Until it is finished, what is measured is kept beside `out`, in the folder OUT.unfinished: the same settings again
    go on from there. `on_start` is told how many interventions there are and how many of them are done already;
    `on_record` gets each new one.

    Raises:
        ConfigError: `out` exists, OUT.unfinished is of something else, or a setting does not fit the model.
        DataError: the text cannot be used.
        FactorError: a weight cannot be decomposed.
    """
    final = check_output_dir(out, overwrite)
    texts = drift_texts(settings.text)
    identity = folder_identity(resolve(settings.model))
    plan = {"settings": asdict(settings), "model": identity, "texts": json_sha256(texts)}
    work = final.with_name(f"{final.name}.unfinished")
    with claimed(work, plan, _anew(work, plan, overwrite)) as folder:
        journal = Journal(folder.path / RECORDS)
        model, tokenizer = load(settings.model)
        model.to(settings.device)
        modules = chosen_modules(model, settings)
        reference = base_reference(model, tokenizer, texts, settings.tokens)
        if on_start is not None:
            on_start(settings.count(len(modules)), len(journal.records))
        records = probe_model(model, modules, reference, settings, journal, on_record)
        record = _record(settings, texts, reference, modules, records)
        with staged_dir(final, overwrite) as staged:
            for metric in METRICS:
                name = f"{metric}.svg"
                write_atomic(staged / name, figure(records, record["correlations"], metric))
                record["figures"].append(name)
            write_atomic(staged / RECORD, json.dumps(record, indent=1, allow_nan=False) + "\n")
    shutil.rmtree(work, ignore_errors=True)
    return record


def drift_measure(
    model: nn.Module, modules: Sequence[str], reference: BaseReference
) -> Callable[[nn.Module], Mapping[str, float]]:
    """Return what measures an intervened model: KL from the base and the log of the perplexity's ratio.

    Both are means over the tokens of all texts, in nats per token; the base model has 0. At every call the weights of
    `modules` are put back for a while, and the base must then be itself bit for bit.
    """
    weights = {name: linear_weight(model, name)[1] for name in modules}

    def measure(intervened: nn.Module) -> Mapping[str, float]:
        def off() -> contextlib.AbstractContextManager:
            return holding(intervened, weights)

        found = measure_drift(intervened, reference, off, may_be_nothing=True).values()
        tokens = sum(drift.tokens for drift in found)
        return {
            "kl": sum(drift.kl * drift.tokens for drift in found) / tokens,
            "log_perplexity": sum(math.log(drift.perplexity_ratio) * drift.tokens for drift in found)
            / tokens,
        }

    return measure


class Journal:
    """The records of an unfinished probe, a line each, on the disk as soon as they are measured."""

    def __init__(self, path: Path):
        """Read what an interrupted probe left in a file; there may be none."""
        self._path = path
        self.records: list[ProbeRecord] = []
        whole = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            try:
                self.records.append(ProbeRecord(**json.loads(line)))
            except (ValueError, TypeError):
                continue  # cut off when the process was killed: it is measured again
            whole.append(line + "\n")
        write_atomic(path, "".join(whole))

    def add(self, record: ProbeRecord) -> None:
        """Write a record down."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record.as_dict()) + "\n")


def probe_model(
    model: Any,
    modules: Sequence[str],
    reference: BaseReference,
    settings: ProbeSettings,
    journal: Journal,
    on_record: OnRecord | None = None,
    scores: Callable[[nn.Module], Mapping[str, float]] | None = None,
) -> list[ProbeRecord]:
    """Probe a bare model, going on from what is in the journal, and leave it was, bit for bit.

    Besides the drift from `reference` each intervention costs something of `scores`, in per cent, higher is better.

    Raises:
        ConfigError, DataError: as `hiplora.probing.probe`.
        FactorError: a weight cannot be decomposed.
    """
    bases = None
    if settings.basis == "activation":
        bases = input_bases(model, modules, tokens=CALIBRATION_TOKENS, seed=settings.seed)

    def keep(record: ProbeRecord) -> None:
        journal.add(record)
        if on_record is not None:
            on_record(record)

    drift = drift_measure(model, modules, reference)

    def measure(intervened: nn.Module) -> Mapping[str, float]:
        return {**drift(intervened), **(scores(intervened) if scores else {})}

    how = settings.directions, settings.choice
    return probe(
        model,
        directions_of(model, modules, *how, seed=settings.seed, rank=settings.principal_rank, bases=bases),
        settings.interventions(),
        measure,
        base={**dict.fromkeys(METRICS, 0.0), **(scores(model) if scores else {})},
        lower_is_better=METRICS,
        draws=settings.draws,
        seed=settings.seed,
        done=journal.records,
        on_record=keep,
    )


def _record(
    settings: ProbeSettings,
    texts: Mapping[str, str],
    reference: BaseReference,
    modules: Sequence[str],
    records: Sequence[ProbeRecord],
) -> dict[str, Any]:
    found: list[Finding] = findings(records, settings.resample, seed=settings.seed)
    tokens = {name: sum(len(ids) - 1 for ids in windows) for name, windows in reference.windows.items()}
    return {
        "schema": 1,
        "kind": "probe",
        "model": settings.model,
        "settings": asdict(settings),
        "modules": list(modules),
        "text": {"source": text_source(settings.text), "tokens": tokens},
        "unit": dict.fromkeys(METRICS, "nats per token"),
        "correlations": [finding.as_dict() for finding in found],
        "records": [record.as_dict() for record in records],
        "figures": [],
        "provenance": provenance(
            seed=settings.seed, model=folder_identity(resolve(settings.model)), texts=json_sha256(dict(texts))
        ),
    }


def _anew(work: Path, plan: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether an unfinished probe of something else is to be thrown away; without `overwrite` that is an error."""
    try:
        check_claim(work, plan, False)
    except ConfigError:
        if not overwrite:
            raise
        return True
    return False


def chosen_modules(model: Any, settings: ProbeSettings) -> list[str]:
    """Return the names of the modules that are probed.

    Raises:
        ConfigError: as `find_modules`, or no layers are named and the model does not say how many it has.
    """
    return find_modules(model, settings.modules, _layers(settings, model))


def _layers(settings: ProbeSettings, model: Any) -> list[int] | None:
    if settings.layers is not None:
        return list(settings.layers) or None
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if count is None:
        raise ConfigError(
            f"model {settings.model}: its configuration has no number of layers; name the layers"
        )
    return sorted({(count - 1) * place // (_LAYERS - 1) for place in range(_LAYERS)})
