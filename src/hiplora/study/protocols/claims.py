"""The paper's claims one by one: what was measured here, and whether it speaks for the claim or against it.

A claim is a sign: of a difference between two methods, of a correlation, of a change over λ; or, with a margin, that a
method is not worse by more than that. It is supported where the measurement lies on the claimed side, not supported
where it lies on the other, by a test at 5 % after Holm's correction over all rows; otherwise it cannot be told. Where
the quantity that a claim is about did not move, the claim is not exercised.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pandas as pd
from pydantic import Field
from scipy import stats

from hiplora.provenance import provenance
from hiplora.reporting import interval
from hiplora.study.protocols.settings import Findings, Protocol, Run, Study
from hiplora.study.records import FORMS, paper
from hiplora.study.statistics import SEEDS

LEVEL = 0.05
MOVED = 1.0  # per cent: the median |δ| / σ from which on claims about the gains are exercised


class Claims(Protocol):
    """What the paper claims, checked on what the other protocols found."""

    name: ClassVar[str] = "claims"
    title: ClassVar[str] = "The paper's claims"
    hiplora: str = Field(description="The paper's method.")
    lora: str = Field(description="LoRA.")
    proj_lora: str | None = Field(default=None, description="Proj-LoRA.")
    pissa: str | None = Field(default=None, description="PiSSA.")
    split_lora: str | None = Field(default=None, description="Split-LoRA.")
    adalora: str | None = Field(default=None, description="AdaLoRA.")

    def runs(self, study: Study) -> list[Run]:
        """Return none: the claims are judged by what the other protocols ask for."""
        return []

    def judge(self, study: Study, found: Sequence[Findings]) -> Findings:
        """Return a row for every claim and form, with the measured effect and the verdict; and claims.json."""
        rows = pd.DataFrame(self._checked(study, {one.name: one.measured for one in found}))
        effects = [interval(r.estimate, r.low, r.high, 4 if r.unit == "nats/token" else 2) for r in rows.itertuples()]
        shown = pd.DataFrame(
            {
                "Claim": rows.says,
                "Verdict": rows.verdict,
                "Form": rows.form.replace("", "–"),
                "Measured effect": effects,
                "Unit": rows.unit,
                "p (Holm)": ["–" if math.isnan(p) else f"{p:.3g}" for p in rows.p],
                "The paper's": rows.paper,
                "An effect as large": rows.as_large,
            }
        ).set_index("Claim")
        told: dict[str, dict[str, Any]] = {}
        kept = ["verdict", "estimate", "low", "high", "p", "unit", "paper_effect", "as_large"]
        for row in rows.astype(object).where(rows.notna(), None).to_dict("records"):
            entry = told.setdefault(row["name"], {"says": row["says"], "paper": row["paper"]})
            entry[row["form"] or "measured"] = {key: row[key] for key in kept}
        file = json.dumps({"claims": told, "provenance": provenance()}, indent=1, ensure_ascii=False) + "\n"
        text = (
            "Each row has one 95 % interval: over the seeds where there are five or more, else over the items "
            "(MergeFail: over draws and merges). A verdict is a test at 5 % by the interval's width, corrected for the "
            "number of rows by Holm's method; “at least as well” means not worse by more than a point. “Not "
            f"exercised”: the median gain moved by less than {MOVED:g} % of σ. An effect as large as the paper's is "
            "excluded on this model where the interval ends before it; a smaller one may exist."
        )
        return Findings(tables={self.name: ("Claim by claim", shown)}, files={"claims.json": file}, text=text)

    def _checked(self, study: Study, numbers: Mapping[str, pd.DataFrame]) -> list[dict[str, Any]]:
        """Every claim that the study's methods allow to check, in each of its forms, with its verdict."""
        roles = {name: getattr(self, name) for name in Claims.model_fields}
        gain = ("median relative gain", study.row(self.hiplora).title)
        moved = _first(numbers, "allocation", *gain, type="all") or _first(numbers, "ablations", *gain, type="all")
        rows = []
        for name, claim in paper()["claims"].items():
            named = {key: claim[key] for key in ("method", "minus", "over") if key in claim}
            if any(roles.get(role, "") is None for role in named.values()):
                continue
            titles = {key: study.row(roles[role]).title if role in roles else role for key, role in named.items()}
            labels = {**titles, **claim.get("setting", {})}
            still = claim.get("of_gains", False) and bool(moved) and moved["estimate"] < MOVED
            for form in FORMS.values() if claim.get("scored", True) else ("",):
                row = _first(numbers, claim["section"], claim["metric"], **labels, **({"form": form} if form else {}))
                rows.append({"name": name, "form": form, "still": still, **_compared(claim, row)})
        adjusted = holm([math.nan if row["still"] else row["p"] for row in rows])
        return [{**row, "p": p, **_verdict(row, p)} for row, p in zip(rows, adjusted, strict=True)]


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number by Holm's method; those that are nan stay so and do not count."""
    order = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    found, worst = [math.nan] * len(p_values), 0.0
    for rank, (p, place) in enumerate(order):
        worst = max(worst, min(1.0, (len(order) - rank) * p))
        found[place] = worst
    return found


def _first(
    numbers: Mapping[str, pd.DataFrame], section: str, metric: str, method: str, **labels: Any
) -> dict[str, Any]:
    """The first measurement that has all the labels; nothing, if there is none."""
    wanted, rows = {"metric": metric, "method": method, **labels}, numbers.get(section)
    if rows is None or not set(wanted) <= set(rows):
        return {}
    fits = (rows[list(wanted)] == pd.Series(wanted)).all(axis=1)
    return rows[fits].iloc[0].to_dict() if fits.any() else {}


def _compared(claim: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """A claim's measurement: on which side it lies, the p-value that its interval implies, the paper's effect."""
    above, size = claim["claimed"] == "above", claim.get("size")
    none = claim.get("none", 0.0) + claim.get("margin", 0.0) * (-1 if above else 1)
    known = [row.get(name) for name in ("estimate", "low", "high")]
    estimate, low, high = (math.nan if value is None else float(value) for value in known)
    reach = estimate - low if estimate > none else high - estimate  # to the interval's end that is nearer to none
    distance = abs(estimate - none)
    seeds = row.get("seeds") or 0
    if not reach:
        p = float(distance == 0)
    elif seeds >= SEEDS:  # the interval is Student's
        p = float(2 * stats.t.sf(distance / reach * stats.t.ppf(0.975, seeds - 1), seeds - 1))
    else:
        p = math.erfc(1.96 * distance / reach / math.sqrt(2))
    excluded = None if size is None or math.isnan(low) else high < size if above else low > size
    return {
        **{key: claim[key] for key in ("says", "paper")},
        "unit": claim.get("unit", "pp"),
        "estimate": estimate,
        "low": low,
        "high": high,
        "p": p,
        "as_claimed": (estimate > none) == above,
        "paper_effect": size,
        "as_large": {None: "–", True: "excluded", False: "possible"}[excluded],
    }


def _verdict(row: Mapping[str, Any], p: float) -> dict[str, str]:
    if row["still"]:
        return {"verdict": "not exercised", "as_large": "–"}
    if math.isnan(row["estimate"]):
        return {"verdict": "not measured"}
    if not p < LEVEL:
        return {"verdict": "cannot tell"}
    return {"verdict": "supported" if row["as_claimed"] else "not supported"}
