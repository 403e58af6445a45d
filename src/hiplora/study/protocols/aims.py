"""The aims of the function-aware basis, checked on what the other protocols found.

An aim is a bound on a value, most often on the reference's over a plain LoRA's; of several LoRAs the one counts that
leaves the least distance, of several texts the worst. It is met where the 95 % interval lies on its side of the bound,
missed where it lies on the other, and else it cannot be told. A difference has the wider of two intervals, over items
and over seeds.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from hiplora.recipes.protocols import Aims
from hiplora.reporting.study.spec import Cell, Measurement, Section, Table
from hiplora.study.builder import Study
from hiplora.study.engine.jobs import Job
from hiplora.study.protocols.aims_values import (
    Value,
    apart,
    inverse,
    negative,
    share_of_losses,
    share_of_merges,
)
from hiplora.study.protocols.frontier_points import OVER, RIVAL, kind_of, tasks_of
from hiplora.study.protocols.frontiers import NOT_REACHED
from hiplora.study.protocols.show import counted, verdict_file
from hiplora.study.results import FORMS, Results

NAME, TITLE = "aims", "The aims"
MET, MISSED, UNCLEAR, OPEN = "met", "missed", "cannot tell", "not measured"
ADDED = {"rule": "addition"}
BATCH = {"mode": "batch"}


@dataclass(frozen=True)
class Aim:
    """An aim, and the measurements that it is judged by, by names of `Measurement`.

    `of`: `ratio`, the reference over a LoRA; `difference`, the reference minus a LoRA; `reference` or `plain`, its
    own value; `rivals`, of every method but the reference's own. `goal` says on which side of `bound` the value is
    to lie; `equal`: not clearly below it. `against` is a field of `Aims`; `parts` tells the rows of one aim apart:
    `domain`, `form`, or a name of the setting; with `own_task` it has those domains alone whose own task is scored.
    """

    name: str
    says: str
    target: str
    section: str
    metric: str
    of: Literal["ratio", "difference", "reference", "plain", "rivals"]
    bound: float
    goal: Literal["below", "above", "equal"] = "below"
    against: Literal["plain", "attention"] = "plain"
    unit: str = "of LoRA's"
    parts: Sequence[str] = ()
    own_task: bool = False
    setting: Mapping[str, Any] = field(default_factory=dict)


def _drift(name: str, says: str, target: str, view: str, bound: float, **more: Any) -> Aim:
    """An aim on the drift of single tasks, at the most that both learned."""
    setting = {"operating": True}
    metric = f"drift ratio at equal {view}"
    return Aim(
        name, says, target, "frontier", metric, "ratio", bound, parts=("domain",), setting=setting, **more
    )


def _as_much(
    name: str, says: str, section: str, metric: str, part: str, setting: Mapping[str, Any] | None = None
) -> Aim:
    """An aim on a score that LoRA's is not to be above: without it, less drift may only mean that less was learned."""
    return Aim(
        name, says, "not below LoRA's, within the interval", section, f"{metric} difference", "difference", 0, "equal",
        unit="pp", parts=(part,), setting=setting or {},
    )  # fmt: skip


AIMS: tuple[Aim, ...] = (
    _drift("drift", "Single-task drift at equal loss", "≤ 1/10 of the best plain LoRA's", "loss", 1 / 10),
    _drift("drift-score", "Single-task drift at equal likelihood", "≤ 1/10 of the best plain LoRA's", "likelihood",
           1 / 10, own_task=True),
    _drift("drift-attention", "Single-task drift at equal loss, against attention", "≤ 1/30 of LoRA's on the attention",
           "loss", 1 / 30, against="attention"),
    Aim("merged-drift", "Drift of the adapters of all domains, added", "≤ 1/10 of LoRA's", "merging", "drift ratio",
        "ratio", 1 / 10, setting=ADDED),
    Aim("merged-drift-drawn", "Drift of the adapters drawn for MergeFail, added", "≤ 1/10 of LoRA's", "merge-fail",
        "drift ratio", "ratio", 1 / 10, setting=ADDED),
    _as_much("merged-learned", "Merged adapters learned as much alone", "merging", "score alone", "form", ADDED),
    Aim("merge-fail", "MergeFail at τ = 0.9", "< 5 %", "merge-fail", "merge fail", "reference", 5, unit="%",
        parts=("form",), setting={**ADDED, "tau": 0.9, "size": "all"}),
    Aim("merge-fail-lora", "MergeFail of LoRA at τ = 0.9", "> 50 %", "merge-fail", "merge fail", "plain", 50, "above",
        unit="%", parts=("form",), setting={**ADDED, "tau": 0.9, "size": "all"}),
    Aim("forgetting", "Forgetting in continual tuning", "≤ 1/4 of LoRA's", "continual", "forgetting ratio", "ratio",
        1 / 4, parts=("form",)),
    _as_much("continual-learned", "Continual tuning learns as much", "continual", "learned accuracy", "form"),
    _as_much("edit-success", "Edits succeed as often", "editing", "edit success", "set", BATCH),
    _as_much("edit-paraphrase", "Edits succeed as often asked in other words", "editing", "paraphrase success", "set",
             BATCH),
    Aim("edit-locality", "Unrelated answers changed by edits", "≤ 1/5 of LoRA's", "editing", "locality damage ratio",
        "ratio", 1 / 5, parts=("set",), setting=BATCH),
    Aim("edit-locality-accuracy", "Accuracy on unrelated questions lost by edits", "≤ 1/5 of LoRA's", "editing",
        "lost accuracy ratio", "ratio", 1 / 5, parts=("set",), setting=BATCH),
    Aim("edit-locality-likelihood", "Log-probability of unrelated answers lost by edits", "≤ 1/5 of LoRA's", "editing",
        "lost log-probability ratio", "ratio", 1 / 5, parts=("set",), setting=BATCH),
    Aim("rivals", "No rival lies below at every common loss", "< all common losses", "frontier",
        "share of losses below", "rivals", 1, unit="of the losses", parts=("domain",)),
)  # fmt: skip


@dataclass(frozen=True)
class Judged:
    """One row: an aim in one of its parts, the value that counts, the verdict.

    `waits`: jobs of its section are still missing, and what they find may change it.
    """

    aim: Aim
    part: str
    found: Value | None
    waits: bool = False

    @property
    def verdict(self) -> str:
        """One of met, missed, cannot tell, not measured."""
        if self.found is None:
            return OPEN
        low, high, bound = self.found.low, self.found.high, self.aim.bound
        if low is None and high is None:
            return UNCLEAR
        if self.aim.goal == "equal":
            return MISSED if high is not None and high < bound else MET
        # A ratio may equal its bound, a share may not.
        strict = self.aim.of not in ("ratio", "difference")
        below = high is not None and (high < bound or (high == bound and not strict))
        above = low is not None and (low > bound or (low == bound and strict and self.aim.goal == "below"))
        if not below and not above:
            return UNCLEAR
        return MET if below == (self.aim.goal == "below") else MISSED

    @property
    def told(self) -> str:
        """The verdict, `so far` where jobs are missing."""
        return f"{self.verdict} so far" if self.waits else self.verdict

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        found = self.found
        return {
            "verdict": self.told,
            "estimate": None if found is None or not math.isfinite(found.value) else found.value,
            "low": None if found is None else found.low,
            "high": None if found is None else found.high,
            "against": None if found is None else found.against,
            "unit": self.aim.unit,
        }


def jobs(study: Study, settings: Aims) -> list[Job]:
    """Return none: the aims are judged by what the other protocols ask for."""
    return []


def section_after(study: Study, settings: Aims, results: Results, sections: Sequence[Section]) -> Section:
    """Return a row for every aim and part, with the target, the measured value and the verdict."""
    judged = check(study, settings, sections)
    told = counted(one.told for one in judged)
    missed = [
        f"{one.aim.says} ({one.part})" if one.part else one.aim.says
        for one in judged
        if one.verdict == MISSED
    ]
    text = [f"Of the aims of {study.row(settings.reference).title}, counted in each of their parts: {told}."]
    text += [f"Missed: {'; '.join(missed)}."] if missed else []
    return Section(NAME, TITLE, text, [_table(judged)])


def check(study: Study, settings: Aims, sections: Sequence[Section]) -> list[Judged]:
    """Return every aim in each of its parts, without a value where none was measured."""
    measurements = [one for section in sections for one in section.measurements]
    waiting = {section.name for section in sections if section.missing}
    calibrating = {OVER, *_calibrating(study, settings)}
    found = []
    for aim in AIMS:
        if aim.against == "attention" and settings.attention is None:
            continue
        fitting = [
            one
            for one in measurements
            if (one.protocol, one.metric) == (aim.section, aim.metric)
            and all(one.setting.get(name) == value for name, value in aim.setting.items())
            and not (aim.of == "ratio" and one.setting.get("text") in calibrating)
        ]
        parts: dict[str, list[Value]] = {}
        for one in fitting:
            for value in _values(study, settings, aim, one):
                parts.setdefault(_part(study, aim, one), []).append(value)
        waits = aim.section in waiting
        found += [Judged(aim, part, _counting(aim, values), waits) for part, values in parts.items()]
        expected = _expected(study, settings, aim)
        if expected is None:
            expected = [] if parts else [""]
        found += [Judged(aim, part, None) for part in expected if part not in parts]
    return found


def _expected(study: Study, settings: Aims, aim: Aim) -> Sequence[str] | None:
    """The parts that an aim has when the study is whole; None where only what is found can tell."""
    if "form" in aim.parts:
        return FORMS
    frontier, editing = study.recipe.protocols.frontier, study.recipe.protocols.editing
    if "set" in aim.parts and editing is not None:
        return list(editing.sets)
    if "domain" in aim.parts and frontier is not None:
        loras = settings.plain if aim.against == "plain" else [settings.attention]
        tasks = tasks_of(study, frontier)

        def counts(method: str) -> bool:
            return kind_of(study, frontier, method) == RIVAL if aim.of == "rivals" else method in loras

        return [
            study.recipe.domains[domain].title
            for domain, methods in frontier.domains.items()
            if settings.reference in methods
            and any(map(counts, methods))
            and (not aim.own_task or study.recipe.domains[domain].task in tasks)
        ]
    return None


def _part(study: Study, aim: Aim, one: Measurement) -> str:
    names = []
    for part in aim.parts:
        if part == "domain":
            names.append(
                study.recipe.domains[one.domain].title if one.domain in study.recipe.domains else one.domain
            )
        else:
            names.append(one.form if part == "form" else str(one.setting.get(part, "")))
    return ", ".join(filter(None, names))


def _values(study: Study, settings: Aims, aim: Aim, one: Measurement) -> Iterator[Value]:
    """Yield what a measurement says for an aim, seen from the reference, if it is one of those that count."""
    reference = study.row(settings.reference).title
    names = settings.plain if aim.against == "plain" else [str(settings.attention)]
    loras = [study.row(name).title for name in names]
    if aim.of == "rivals":
        if one.setting.get("than") == reference and one.setting.get("kind") == RIVAL:
            yield share_of_losses(one)
    elif aim.of in ("reference", "plain"):
        if one.method in ([reference] if aim.of == "reference" else loras):
            yield share_of_merges(one)
    else:
        other = one.setting.get("over" if aim.of == "ratio" else "minus")
        if one.method == reference and other in loras:
            yield (
                apart(one, str(other))
                if aim.of == "difference"
                else Value(one.value, one.low, one.high, str(other))
            )
        elif other == reference and one.method in loras:
            turned = inverse(one) if aim.of == "ratio" else negative(apart(one, reference), one.method)
            yield replace(turned, bounded=one.setting.get("state") == NOT_REACHED)


def _counting(aim: Aim, values: Sequence[Value]) -> Value:
    """The value that leaves the least distance to the aim: the LoRA with the smaller value, the worst text or rival.

    A LoRA that never learned as much counts only where none did.
    """
    reached = [one for one in values if not one.bounded] or list(values)
    wanted_low = aim.goal == "below"
    return (max if wanted_low else min)(reached, key=lambda one: one.value)


def _calibrating(study: Study, settings: Aims) -> set[str]:
    """The drift texts of the file that calibrated the reference."""
    drift = study.recipe.evaluation.drift
    calibration = getattr(study.row(settings.reference).method, "calibration_text", None)
    texts = drift.texts if drift is not None else {}
    return {text for text, source in texts.items() if source.partition(":")[0] == calibration}


def _table(judged: Sequence[Judged]) -> Table:
    rows = []
    for one in judged:
        found = one.found
        digits = 3 if one.aim.bound < 1 and one.aim.of == "ratio" else 2
        cells = [
            Cell(text=one.told),
            Cell(text=one.part or "–"),
            Cell() if found is None else Cell(found.value, found.low, found.high, digits=digits),
            Cell(text=one.aim.unit),
            Cell(text=one.aim.target),
            Cell(text="–" if found is None else found.against),
        ]
        rows.append((one.aim.says, cells))
    note = (
        "Met: the 95 % interval lies on the aim's side of the target; missed: on the other; an interval on both "
        "sides cannot tell; so far: jobs are missing that may change it. “Not below” is missed only where the whole "
        "interval is below: its width says how much less could have been learned unseen. Of several plain LoRAs the "
        "one with the smaller value counts, of several texts the worst; texts of the file that calibrated the basis "
        "do not. Ratios of drift have Student's t over the seeds, differences the wider of that and the interval over "
        "items, shares of merges and edits that agree what their number leaves possible. Of a rival, the share of the "
        "losses that both frontiers reach. An aim holds for the domains, methods and seeds that its section names; "
        "edits are at one learning rate a method, that nothing was tried for."
    )
    columns = ["Aim", "Verdict", "Where", "Measured", "Unit", "Target", "Against"]
    return Table(NAME, "Aim by aim", columns, rows, note)


def files(study: Study, settings: Aims, results: Results, sections: Sequence[Section]) -> dict[str, str]:
    """Return `aims.json`: aim → part → verdict, estimate, interval."""
    found: dict[str, dict[str, Any]] = {}
    for one in check(study, settings, sections):
        entry = found.setdefault(one.aim.name, {"says": one.aim.says, "target": one.aim.target})
        entry[one.part or "measured"] = one.to_json()
    return verdict_file(NAME, found)
