"""The paper's claims one by one: what was measured here, and whether it speaks for the claim or against it.

A claim is a sign, of a difference, a correlation, a change; or, with a margin, that a method is not worse by more than
that. It is supported, or not, by the side on which the measurement lies, if a test at 5 % tells it from the other after
Holm's correction over all rows. Where the quantity that a claim is about did not move, it is not exercised.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from pydantic import Field
from scipy import stats

from hiplora.metrics import student_margin
from hiplora.provenance import provenance
from hiplora.reporting import interval
from hiplora.study.protocols.settings import Findings, Protocol, Run, Study
from hiplora.study.records import FORMS, joined, paper

LEVEL = 0.05
MOVED = 1.0  # per cent: the median |δ| / σ from which on claims about the gains are exercised
COLUMNS = {"says": "Claim", "verdict": "Verdict", "form": "Form", "effect": "Measured effect", "unit": "Unit"}
COLUMNS |= {"p": "p (Holm)", "paper": "The paper's", "as_large": "An effect as large"}


class Claims(Protocol):
    """What the paper claims, checked on what the other protocols found."""

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
        parts = (findings.measured.assign(section=findings.name) for findings in found)
        numbers = joined(*parts, columns=["metric", "method"])
        rows = pd.DataFrame(list(self._checked(study, numbers)))
        rows["p"] = holm(rows.p.where(~rows.still))
        verdicts = {
            "not exercised": rows.still,
            "not measured": rows.estimate.isna(),
            "cannot tell": ~(rows.p < LEVEL),
            "supported": rows.as_claimed,
        }
        rows["verdict"] = np.select(list(verdicts.values()), list(verdicts), "not supported")
        rows["as_large"] = rows.as_large.where(~rows.still, "–")
        claims: dict[str, dict[str, Any]] = {}
        reported = ["verdict", "estimate", "low", "high", "p", "unit", "paper_effect", "as_large"]
        for row in rows.astype(object).where(rows.notna(), None).to_dict("records"):
            entry = claims.setdefault(row["name"], {"says": row["says"], "paper": row["paper"]})
            entry[row["form"] or "measured"] = {key: row[key] for key in reported}
        file = json.dumps({"claims": claims, "provenance": provenance()}, indent=1, ensure_ascii=False) + "\n"
        rows["effect"] = [
            interval(r.estimate, r.low, r.high, 4 if r.unit == "nats/token" else 2) for r in rows.itertuples()
        ]
        rows["p"] = rows.p.map("{:.3g}".format).where(rows.p.notna(), "–")
        shown = rows.replace({"form": {"": "–"}})[list(COLUMNS)].rename(columns=COLUMNS).set_index("Claim")
        text = (
            "Intervals are 95 %, over the seeds where there are five or more, else over the items (MergeFail: over "
            "draws and merges). A verdict is a test at 5 % by the interval's width, corrected for the number of rows "
            "by Holm's method; “at least as well”: not worse by more than a point; “not exercised”: the median gain "
            f"moved by less than {MOVED:g} % of σ. An effect as large as the paper's is excluded where the interval "
            "ends before it; a smaller one may exist."
        )
        return Findings(tables={"": ("Claim by claim", shown)}, files={"claims.json": file}, text=text)

    def _checked(self, study: Study, numbers: pd.DataFrame) -> Iterator[dict[str, Any]]:
        """Every claim that the study's methods allow to check, in each of its forms."""
        roles = {name: getattr(self, name) for name in Claims.model_fields}
        gain = {"metric": "median relative gain", "method": study.row(self.hiplora).title, "type": "all"}
        gains = _first(numbers, section="allocation", **gain) or _first(numbers, section="ablations", **gain)
        still = bool(gains) and gains["estimate"] < MOVED
        for name, claim in paper()["claims"].items():
            methods = {key: claim[key] for key in ("method", "minus", "over") if key in claim}
            if any(roles.get(role, "") is None for role in methods.values()):
                continue
            labels = {key: study.row(roles[role]).title if role in roles else role for key, role in methods.items()}
            labels |= {"section": claim["section"], "metric": claim["metric"], **claim.get("setting", {})}
            unmoved = still and claim.get("of_gains", False)
            for form in FORMS.values() if claim.get("scored", True) else ("",):
                row = _first(numbers, **labels, **({"form": form} if form else {}))
                yield {"name": name, "form": form, "still": unmoved, **_compared(claim, row)}


def holm(p_values: pd.Series) -> pd.Series:
    """Return p-values corrected for their number by Holm's method; NaN stays NaN and does not count."""
    ascending = p_values.sort_values(kind="stable").dropna()
    return (ascending * np.arange(len(ascending), 0, -1)).clip(upper=1.0).cummax().reindex(p_values.index)


def _first(numbers: pd.DataFrame, **labels: Any) -> dict[str, Any]:
    """The first measurement that has all the labels; empty if there is none."""
    rows = numbers.reindex(columns=list(labels))
    fits = (rows == pd.Series(labels)).all(axis=1)
    return numbers[fits].iloc[0].to_dict() if fits.any() else {}


def _compared(claim: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """A claim's measurement: on which side it lies, the p-value that its interval implies, the paper's effect."""
    above, size = claim["claimed"] == "above", claim.get("size")
    no_effect = claim.get("none", 0.0) + claim.get("margin", 0.0) * (-1 if above else 1)
    values = [row.get(name) for name in ("estimate", "low", "high", "sd", "seeds")]
    estimate, low, high, sd, seeds = (math.nan if value is None else float(value) for value in values)
    reach = estimate - low if estimate > no_effect else high - estimate  # to the interval's end nearer to no effect
    distance, test, width = abs(estimate - no_effect), stats.norm(), 1.96
    if math.isclose(reach, student_margin(sd, seeds), rel_tol=1e-6):  # the interval is Student's
        test = stats.t(seeds - 1)
        width = test.ppf(0.975)
    excluded = None if size is None or math.isnan(low) else high < size if above else low > size
    return {
        **{key: claim[key] for key in ("says", "paper")},
        "unit": claim.get("unit", "pp"),
        "estimate": estimate,
        "low": low,
        "high": high,
        "p": float(2 * test.sf(width * distance / reach)) if reach else float(distance == 0),
        "as_claimed": (estimate > no_effect) == above,
        "paper_effect": size,
        "as_large": {None: "–", True: "excluded", False: "possible"}[excluded],
    }
