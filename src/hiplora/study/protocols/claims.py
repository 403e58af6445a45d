"""The paper's claims one by one: what was measured here, and whether it speaks for the claim or against it.

A claim is a sign: of a difference between two methods, of a correlation, of a change over λ. It is supported where the
95 % intervals, over items and over seeds, lie on the claimed side of none, not supported where they lie on the other,
and else it cannot be told: then half the wider interval is the smallest effect that could have been.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hiplora.recipes.protocols import Claims
from hiplora.reporting.numbers import signed
from hiplora.reporting.study.spec import Cell, Measurement, Section, Table
from hiplora.study.builder import Study
from hiplora.study.engine.jobs import Job
from hiplora.study.protocols.show import counted, verdict_file
from hiplora.study.results import FORMS, Results

NAME, TITLE = "claims", "The paper's claims"
SUPPORTED, AGAINST, UNCLEAR, OPEN = "supported", "not supported", "cannot tell", "not measured"


@dataclass(frozen=True)
class Claim:
    """A claim of the paper and the measurement that speaks for it, by names of `Measurement`.

    `method`, `minus` and `over` (of a ratio) are fields of `Claims`; `claimed` is the side of `none` that the paper
    says; `forms` are those of the scores, one empty form for what has none; `setting` must be in the measurement's.
    """

    name: str
    says: str
    paper: str
    section: str
    metric: str
    method: str
    claimed: str  # above | below
    minus: str | None = None
    over: str | None = None
    none: float = 0.0
    unit: str = "pp"
    forms: Sequence[str] = FORMS
    setting: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Checked:
    """A claim with what was measured for it in one form, and the verdict."""

    claim: Claim
    form: str
    found: Measurement | None

    @property
    def verdict(self) -> str:
        """One of supported, not supported, cannot tell, not measured."""
        if self.found is None:
            return OPEN
        low, high = self.found.widest
        if low is None or high is None:
            return UNCLEAR
        above, below = low > self.claim.none, high < self.claim.none
        if not above and not below:
            return UNCLEAR
        return SUPPORTED if above == (self.claim.claimed == "above") else AGAINST

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        found = self.found
        return {
            "verdict": self.verdict,
            "estimate": None if found is None else found.value,
            "low": None if found is None else found.low,
            "high": None if found is None else found.high,
            "widest": None if found is None else found.widest,
            "unit": self.claim.unit,
        }


def _against(name: str, says: str, paper: str, section: str, metric: str, claimed: str, **more: Any) -> Claim:
    """A claim on HiP-LoRA's difference to another method, LoRA if none is named."""
    more = {"minus": "lora", **more}
    return Claim(name, says, paper, section, f"{metric} difference", "hiplora", claimed, **more)


CLAIMS: tuple[Claim, ...] = (
    _against("retain", "HiP-LoRA loses less of the other abilities than LoRA", "Retain 12.3 → 4.9", "single-task",
             "retain", "below"),
    _against("downstream", "… and learns its own task at least as well", "maintained or improved", "single-task",
             "mean score", "above"),
    _against("downstream-proj", "HiP-LoRA learns more than Proj-LoRA", "Table 1", "single-task", "mean score", "above",
             minus="proj_lora"),
    _against("downstream-pissa", "HiP-LoRA learns at least as well as PiSSA", "Table 1", "single-task", "mean score",
             "above", minus="pissa"),
    _against("retain-proj", "Excluding the principal directions alone retains less than HiP-LoRA",
             "Proj-LoRA lies between", "single-task", "retain", "below", minus="proj_lora"),
    _against("retain-pissa", "HiP-LoRA retains more than PiSSA", "Table 1", "single-task", "retain", "below",
             minus="pissa"),
    _against("adalora", "HiP-LoRA retains more than AdaLoRA", "Table 12", "adalora", "retain", "below",
             minus="adalora"),
    _against("downstream-adalora", "… and learns at least as well", "Table 12", "adalora", "mean score", "above",
             minus="adalora"),
    _against("merge-drop", "Added adapters lose less", "20.24 → 5.42 pp", "merging", "mean drop", "below",
             setting={"rule": "addition"}),
    _against("merge-drop-ties", "… by TIES too", "13.8 → 4.7 pp", "merging", "mean drop", "below",
             setting={"rule": "ties"}),
    _against("merge-drop-split", "Added adapters lose less than Split-LoRA's", "Table 2", "merging", "mean drop",
             "below", minus="split_lora", setting={"rule": "addition"}),
    _against("merge-drop-proj", "… than Proj-LoRA's", "Table 2", "merging", "mean drop", "below", minus="proj_lora",
             setting={"rule": "addition"}),
    _against("merge-drop-pissa", "… than PiSSA's", "Table 2", "merging", "mean drop", "below", minus="pissa",
             setting={"rule": "addition"}),
    _against("merge-fail", "Fewer merges fail", "62 % → 6.8 %", "merge-fail", "merge fail", "below",
             setting={"rule": "addition"}),
    _against("merge-fail-ties", "… by TIES too", "38 % → 4.5 %", "merge-fail", "merge fail", "below",
             setting={"rule": "ties"}),
    _against("continual-accuracy", "Continual tuning ends with a higher average", "71.8 → 74.6", "continual",
             "average accuracy", "above"),
    _against("continual-forgetting", "… and forgets less", "13.6 → 6.9", "continual", "forgetting", "below"),
    _against("continual-pissa", "… and less than PiSSA", "Table 7", "continual", "forgetting", "below", minus="pissa"),
    _against("edit-success", "More edits succeed", "86.4 % → 89.2 %", "editing", "edit success", "above",
             forms=("",), setting={"mode": "batch"}),
    _against("edit-locality", "… and less of unrelated knowledge is lost", "3.8 → 2.1 pp", "editing",
             "locality", "below", forms=("",), setting={"mode": "batch"}),
    _against("edit-success-pissa", "More edits succeed than with PiSSA", "Table 8", "editing", "edit success", "above",
             minus="pissa", forms=("",), setting={"mode": "batch"}),
    _against("edit-locality-pissa", "… and less of unrelated knowledge is lost", "Table 8", "editing", "locality",
             "below", minus="pissa", forms=("",), setting={"mode": "batch"}),
    Claim("budget-merge", "Without the stability budget more merges fail", "6.8 % → 14.2 %", "ablations",
          "merge fail difference", "Without stability budget", "above", minus="hiplora"),
    Claim("budget", "Without the stability budget more is lost", "Retain 4.9 → 9.8", "ablations",
          "retain difference", "Without stability budget", "above", minus="hiplora"),
    Claim("projection", "Without the residual projection more merges fail", "6.8 % → 12.5 %", "ablations",
          "merge fail difference", "Without residual projection", "above", minus="hiplora"),
    Claim("budget-speed", "Without the stability budget training goes more slowly", "Figure 5", "ablations",
          "training loss difference", "Without stability budget", "above", minus="hiplora", forms=("",),
          unit="nats/token"),
    Claim("projection-speed", "Without the residual projection training goes more slowly", "Figure 5", "ablations",
          "training loss difference", "Without residual projection", "above", minus="hiplora", forms=("",),
          unit="nats/token"),
    Claim("lambda", "A higher price λ of the gains retains more", "Figure 3", "lambda-curve", "retain change",
          "hiplora", "below"),
    Claim("allocation", "Stronger directions get smaller gains", "Figure 4", "allocation", "gain correlation",
          "hiplora", "below", forms=("",), unit="Spearman"),
    Claim("zero", "Removing a stronger direction costs more", "Pearson 0.86", "rank-one", "pearson", "Zero", "above",
          forms=("",), unit="Pearson", setting={"metric": "log_perplexity", "basis": "weight"}),
    Claim("zero-flip", "… in a closer relation than turning it round", "Pearson 0.86 and 0.33", "rank-one",
          "pearson difference", "Zero", "above", forms=("",), unit="Pearson",
          setting={"metric": "log_perplexity", "basis": "weight", "minus": "Flip"}),
    Claim("zero-noise", "… and than a little noise along it", "Pearson 0.86 and 0.14", "rank-one",
          "pearson difference", "Zero", "above", forms=("",), unit="Pearson",
          setting={"metric": "log_perplexity", "basis": "weight", "minus": "Noise 0.1"}),
    Claim("overhead", "Training is slowed by no more than the paper's twentieth", "42,000 → 40,000 tokens/s", "cost",
          "throughput ratio", "hiplora", "above", over="lora", none=40 / 42, forms=("",), unit="of LoRA's"),
)  # fmt: skip


def jobs(study: Study, settings: Claims) -> list[Job]:
    """Return none: the claims are judged by what the other protocols ask for."""
    return []


def section_after(study: Study, settings: Claims, results: Results, sections: Sequence[Section]) -> Section:
    """Return a row for every claim and form, with the measured effect and the verdict."""
    checked = check(study, settings, sections)
    told = counted(one.verdict for one in checked)
    note = (
        "A claim is supported where both 95 % intervals lie on its side of none, not supported where both lie on the "
        "other: that over items, with the seeds as they are, and Student's t over the seeds. Merges drawn for "
        "MergeFail share adapters; theirs is the paper's interval, over draws and merges. Whether an effect of the "
        "paper's size could have been seen is what the width says."
    )
    text = [f"Of the paper's claims, each counted once in accuracy and once in likelihood: {told}."]
    return Section(NAME, TITLE, text, [_table(checked, note)])


def check(study: Study, settings: Claims, sections: Sequence[Section]) -> list[Checked]:
    """Return every claim that the study's methods allow to check, in each of its forms."""
    measurements = [one for section in sections for one in section.measurements]
    found = []
    for claim in CLAIMS:
        roles = [name for name in (claim.method, claim.minus, claim.over) if name in Claims.model_fields]
        if any(getattr(settings, role) is None for role in roles):
            continue
        titles = {role: study.row(getattr(settings, role)).title for role in roles}
        for form in claim.forms:
            fitting = [one for one in measurements if _fits(one, claim, form, titles)]
            found.append(Checked(claim, form, fitting[0] if fitting else None))
    return found


def _fits(one: Measurement, claim: Claim, form: str, titles: Mapping[str, str]) -> bool:
    wanted = dict(claim.setting)
    wanted |= {
        key: titles[role] for key, role in (("minus", claim.minus), ("over", claim.over)) if role is not None
    }
    return (
        (one.protocol, one.metric, one.form) == (claim.section, claim.metric, form)
        and one.method == titles.get(claim.method, claim.method)
        and all(one.setting.get(name) == value for name, value in wanted.items())
    )


def _table(checked: Sequence[Checked], note: str) -> Table:
    rows = []
    for one in checked:
        found = one.found
        digits = 4 if one.claim.unit == "nats/token" else 2
        effect = Cell() if found is None else Cell(found.value, found.low, found.high, digits=digits)
        cells = [
            Cell(text=one.verdict),
            Cell(text=one.form or "–"),
            effect,
            Cell(text=one.claim.unit),
            _other_seeds(found, digits),
            Cell(text=one.claim.paper),
        ]
        rows.append((one.claim.says, cells))
    columns = ["Claim", "Verdict", "Form", "Measured effect", "Unit", "Over seeds", "Of the paper"]
    return Table("claims", "Claim by claim", columns, rows, note)


def _other_seeds(found: Measurement | None, digits: int) -> Cell:
    """The interval over seeds; of merges that share adapters, the paper's; a dash where there is neither."""
    if found is None or not (found.over_seeds or found.widest != (found.low, found.high)):
        return Cell(text="–")
    low, high = found.over_seeds or found.widest
    return Cell(text=f"{signed(low, digits)} to {signed(high, digits)}")


def files(study: Study, settings: Claims, results: Results, sections: Sequence[Section]) -> dict[str, str]:
    """Return `claims.json`: claim → form → verdict, estimate, interval."""
    found: dict[str, dict[str, Any]] = {}
    for one in check(study, settings, sections):
        entry = found.setdefault(one.claim.name, {"says": one.claim.says, "paper": one.claim.paper})
        entry[one.form or "measured"] = one.to_json()
    return verdict_file(NAME, found)
