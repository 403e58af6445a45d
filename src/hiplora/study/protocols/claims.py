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
from hiplora.study.protocols.aims_values import apart
from hiplora.study.protocols.show import counted, verdict_file
from hiplora.study.results import FORMS, Results

NAME, TITLE = "claims", "The paper's claims"
AS_LARGE = {None: "–", True: "excluded", False: "possible"}  # an effect of the paper's size
SUPPORTED, AGAINST, UNCLEAR, OPEN = "supported", "not supported", "cannot tell", "not measured"


@dataclass(frozen=True)
class Claim:
    """A claim of the paper and the measurement that speaks for it, by names of `Measurement`.

    `method`, `minus` and `over` (of a ratio) are fields of `Claims`; `claimed` is the side of `none` that the paper
    says; `forms` are those of the scores, one empty form for what has none; `setting` must be in the measurement's.
    `size` is the effect that the paper reports, where its numbers are known.
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
    size: float | None = None
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
        low, high = self.bounds
        if low is None or high is None:
            return UNCLEAR
        above, below = low > self.claim.none, high < self.claim.none
        if not above and not below:
            return UNCLEAR
        return SUPPORTED if above == (self.claim.claimed == "above") else AGAINST

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        """The widest interval of what was measured; of merges that all agree, what their number leaves possible."""
        if self.found is None:
            return None, None
        value = apart(self.found, "")
        return value.low, value.high

    @property
    def excludes(self) -> bool | None:
        """Whether even the widest interval holds no effect as large as the paper's; None where one is not known."""
        low, high = self.bounds
        if self.claim.size is None or low is None or high is None:
            return None
        return high < self.claim.size if self.claim.claimed == "above" else low > self.claim.size

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        found = self.found
        return {
            "verdict": self.verdict,
            "estimate": None if found is None else found.value,
            "low": None if found is None else found.low,
            "high": None if found is None else found.high,
            "widest": None if found is None else self.bounds,
            "unit": self.claim.unit,
            "paper_effect": self.claim.size,
            "as_large": AS_LARGE[self.excludes],
        }


def _against(name: str, says: str, paper: str, section: str, metric: str, claimed: str, **more: Any) -> Claim:
    """A claim on HiP-LoRA's difference to another method, LoRA if none is named."""
    more = {"minus": "lora", **more}
    return Claim(name, says, paper, section, f"{metric} difference", "hiplora", claimed, **more)


CLAIMS: tuple[Claim, ...] = (
    _against("retain", "HiP-LoRA loses less of the other abilities than LoRA", "Retain 12.3 → 4.9", "single-task",
             "retain", "below", size=4.9 - 12.3),
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
             setting={"rule": "addition"}, size=5.42 - 20.24),
    _against("merge-drop-ties", "… by TIES too", "13.8 → 4.7 pp", "merging", "mean drop", "below",
             setting={"rule": "ties"}, size=4.7 - 13.8),
    _against("merge-drop-split", "Added adapters lose less than Split-LoRA's", "Table 2", "merging", "mean drop",
             "below", minus="split_lora", setting={"rule": "addition"}),
    _against("merge-drop-proj", "… than Proj-LoRA's", "Table 2", "merging", "mean drop", "below", minus="proj_lora",
             setting={"rule": "addition"}),
    _against("merge-drop-pissa", "… than PiSSA's", "Table 2", "merging", "mean drop", "below", minus="pissa",
             setting={"rule": "addition"}),
    _against("merge-fail", "Fewer merges fail", "62 % → 6.8 %", "merge-fail", "merge fail", "below",
             setting={"rule": "addition"}, size=6.8 - 62),
    _against("merge-fail-ties", "… by TIES too", "38 % → 4.5 %", "merge-fail", "merge fail", "below",
             setting={"rule": "ties"}, size=4.5 - 38),
    _against("continual-accuracy", "Continual tuning ends with a higher average", "71.8 → 74.6", "continual",
             "average accuracy", "above", size=74.6 - 71.8),
    _against("continual-forgetting", "… and forgets less", "13.6 → 6.9", "continual", "forgetting", "below",
             size=6.9 - 13.6),
    _against("continual-pissa", "… and less than PiSSA", "Table 7", "continual", "forgetting", "below", minus="pissa",
             size=6.9 - 10.2),
    _against("edit-success", "More edits succeed", "86.4 % → 89.2 %", "editing", "edit success", "above",
             forms=("",), setting={"mode": "batch"}, size=89.2 - 86.4),
    _against("edit-locality", "… and less of unrelated knowledge is lost", "3.8 → 2.1 pp", "editing",
             "locality", "below", forms=("",), setting={"mode": "batch"}, size=2.1 - 3.8),
    _against("edit-success-pissa", "More edits succeed than with PiSSA", "Table 8", "editing", "edit success", "above",
             minus="pissa", forms=("",), setting={"mode": "batch"}, size=89.2 - 87.9),
    _against("edit-locality-pissa", "… and less of unrelated knowledge is lost", "Table 8", "editing", "locality",
             "below", minus="pissa", forms=("",), setting={"mode": "batch"}, size=2.1 - 3.1),
    Claim("budget-merge", "Without the stability budget more merges fail", "6.8 % → 14.2 %", "ablations",
          "merge fail difference", "Without stability budget", "above", minus="hiplora", size=14.2 - 6.8),
    Claim("budget", "Without the stability budget more is lost", "Retain 4.9 → 9.8", "ablations",
          "retain difference", "Without stability budget", "above", minus="hiplora", size=9.8 - 4.9),
    Claim("projection", "Without the residual projection more merges fail", "6.8 % → 12.5 %", "ablations",
          "merge fail difference", "Without residual projection", "above", minus="hiplora", size=12.5 - 6.8),
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
          forms=("",), unit="Pearson", setting={"metric": "log_perplexity", "basis": "weight"}, size=0.86),
    Claim("zero-flip", "… in a closer relation than turning it round", "Pearson 0.86 and 0.33", "rank-one",
          "pearson difference", "Zero", "above", forms=("",), unit="Pearson",
          setting={"metric": "log_perplexity", "basis": "weight", "minus": "Flip"}, size=0.86 - 0.33),
    Claim("zero-noise", "… and than a little noise along it", "Pearson 0.86 and 0.14", "rank-one",
          "pearson difference", "Zero", "above", forms=("",), unit="Pearson",
          setting={"metric": "log_perplexity", "basis": "weight", "minus": "Noise 0.1"}, size=0.86 - 0.14),
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
    excluded = sum(one.excludes is True for one in checked)
    note = (
        "A claim is supported where both 95 % intervals lie on its side of none, not supported where both lie on the "
        "other: that over items, with the seeds as they are, and Student's t over the seeds. Merges drawn for "
        "MergeFail share adapters; theirs is the paper's interval, over draws and merges. An effect as large as the "
        "paper's is excluded on this model where the wider interval ends before it; a smaller one may be."
    )
    text = [
        f"Of the paper's claims, each counted once in accuracy and once in likelihood: {told}. An effect as large as "
        f"the paper's is excluded by {excluded} of the {sum(one.excludes is not None for one in checked)} that can be "
        "compared with one."
    ]
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
            _other_seeds(one, digits),
            Cell(text=one.claim.paper),
            Cell(text=AS_LARGE[one.excludes]),
        ]
        rows.append((one.claim.says, cells))
    columns = [
        "Claim",
        "Verdict",
        "Form",
        "Measured effect",
        "Unit",
        "Over seeds",
        "Of the paper",
        "An effect as large",
    ]
    return Table("claims", "Claim by claim", columns, rows, note)


def _other_seeds(one: Checked, digits: int) -> Cell:
    """The interval over seeds; of merges that share adapters, the paper's, or what their number leaves possible; a dash
    where there is none.
    """
    found = one.found
    if found is None:
        return Cell(text="–")
    if found.over_seeds or one.bounds != (found.low, found.high):
        low, high = one.bounds if found.over_seeds in (None, (0, 0)) else found.over_seeds
        return Cell(text=f"{signed(low, digits)} to {signed(high, digits)}")
    one_seed = found.seeds < 2 and "minus" in found.setting and found.protocol != "rank-one"
    return Cell(text="one seed" if one_seed else "–")


def files(study: Study, settings: Claims, results: Results, sections: Sequence[Section]) -> dict[str, str]:
    """Return `claims.json`: claim → form → verdict, estimate, interval."""
    found: dict[str, dict[str, Any]] = {}
    for one in check(study, settings, sections):
        entry = found.setdefault(one.claim.name, {"says": one.claim.says, "paper": one.claim.paper})
        entry[one.form or "measured"] = one.to_json()
    return verdict_file(NAME, found)
