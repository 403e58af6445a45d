"""The paper's claims one by one: what was measured here, and whether it speaks for the claim or against it.

A claim is a sign: of a difference between two methods, of a correlation, of a change over λ. It is supported where the
95 % intervals, over items and over seeds, lie on the claimed side of none, not supported where they lie on the other,
and otherwise cannot be told: half the wider interval is the smallest effect that could have been.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd
from pydantic import Field

from hiplora.metrics import student_margin
from hiplora.provenance import provenance
from hiplora.reporting import interval
from hiplora.study.protocols.settings import Protocol
from hiplora.study.records import Findings, paper

if TYPE_CHECKING:
    from hiplora.study.builder import Study
    from hiplora.study.jobs import Job

SUPPORTED, AGAINST, UNCLEAR, OPEN = "supported", "not supported", "cannot tell", "not measured"
Bounds = tuple[float, float] | tuple[None, None]


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


def jobs(study: Study, settings: Claims) -> list[Job]:
    """Return none: the claims are judged by what the other protocols ask for."""
    return []


def judge(study: Study, settings: Claims, found: Sequence[Findings]) -> Findings:
    """Return a row for every claim and form, with the measured effect and the verdict; and the same as claims.json."""
    rows = pd.DataFrame(check(study, settings, found))
    text = (
        "A claim is supported where both 95 % intervals lie on its side of none, not supported where both lie on "
        "the other: that over items, with the seeds as they are, and Student's t over the seeds. Merges drawn for "
        "MergeFail share adapters; theirs is the paper's interval, over draws and merges. An effect as large as "
        "the paper's is excluded on this model where the wider interval ends before it; a smaller one may exist."
    )
    shown = pd.DataFrame(
        {
            "Claim": rows.says,
            "Verdict": rows.verdict,
            "Form": rows.form.replace("", "–"),
            "Measured effect": [
                _effect(row.estimate, (row.low, row.high), row.unit) for row in rows.itertuples()
            ],
            "Unit": rows.unit,
            "Widest interval": [_effect(None, row.widest, row.unit) for row in rows.itertuples()],
            "The paper's": rows.paper,
            "An effect as large": rows.as_large,
        }
    ).set_index("Claim")
    told: dict[str, dict[str, Any]] = {}
    kept = ("verdict", "estimate", "low", "high", "widest", "unit", "paper_effect", "as_large")
    for row in rows.to_dict("records"):
        entry = told.setdefault(row["name"], {"says": row["says"], "paper": row["paper"]})
        entry[row["form"] or "measured"] = {
            key: None if isinstance(row[key], float) and math.isnan(row[key]) else row[key] for key in kept
        }
    file = json.dumps({"claims": told, "provenance": provenance()}, indent=1, ensure_ascii=False) + "\n"
    tables = {"claims": ("Claim by claim", shown)}
    return Findings(settings.name, settings.title, tables=tables, files={"claims.json": file}, text=text)


def check(study: Study, settings: Claims, found: Sequence[Findings]) -> list[dict[str, Any]]:
    """Return every claim that the study's methods allow to check, in each of its forms, with its verdict."""
    numbers = {one.name: one.measured for one in found}
    rows = []
    for name, claim in paper()["claims"].items():
        roles = [claim.get(key) for key in ("method", "minus", "over")]
        roles = [role for role in roles if role in Claims.model_fields]
        if any(getattr(settings, role) is None for role in roles):
            continue
        titles = {role: study.row(getattr(settings, role)).title for role in roles}
        wanted = {"metric": claim["metric"], "method": titles.get(claim["method"], claim["method"])}
        wanted |= {key: titles.get(claim[key], claim[key]) for key in ("minus", "over") if key in claim}
        wanted |= claim.get("setting", {})
        for form in ("accuracy", "likelihood") if claim.get("scored", True) else ("",):
            row = _first(
                numbers.get(claim["section"], pd.DataFrame()), wanted | ({"form": form} if form else {})
            )
            rows.append({"name": name, "form": form, **_verdict(claim, row)})
    return rows


def _first(numbers: pd.DataFrame, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """The first measurement that has all the labels."""
    if not set(wanted) <= set(numbers):
        return None
    fits = pd.concat([numbers[name] == value for name, value in wanted.items()], axis=1).all(axis=1)
    return numbers[fits].iloc[0].to_dict() if fits.any() else None


def _verdict(claim: Mapping[str, Any], row: Mapping[str, Any] | None) -> dict[str, Any]:
    none, size, above = claim.get("none", 0.0), claim.get("size"), claim["claimed"] == "above"
    low, high = (None, None) if row is None else widest(row)
    if row is None:
        verdict = OPEN
    elif low is None or high is None or low <= none <= high:
        verdict = UNCLEAR
    else:
        verdict = SUPPORTED if (low > none) == above else AGAINST
    as_large = "–"
    if size is not None and low is not None and high is not None:
        as_large = "excluded" if (high < size if above else low > size) else "possible"
    return {
        **{key: claim[key] for key in ("says", "paper")},
        "verdict": verdict,
        "unit": claim.get("unit", "pp"),
        "paper_effect": size,
        "as_large": as_large,
        **{key: None if row is None else row[key] for key in ("estimate", "low", "high")},
        "widest": None if row is None else (low, high),
    }


def widest(row: Mapping[str, Any]) -> Bounds:
    """Return the bounds that hold over items, over seeds and, where it is given, in the paper's interval over both.

    Where all of some edits or merges agree, the bounds are what their number leaves possible: the exact (Clopper and
    Pearson) bound on a share of which none was seen.
    """
    from scipy import stats

    known = [(row["low"], row["high"]), (row.get("hierarchical_low"), row.get("hierarchical_high"))]
    if _known(row.get("sd")) and row.get("seeds", 1) > 1:
        margin = student_margin(row["sd"], int(row["seeds"]))
        known.append((row["estimate"] - margin, row["estimate"] + margin))
    if not (_known(row["low"]) and _known(row["high"])):
        return None, None
    known = [pair for pair in known if _known(pair[0]) and _known(pair[1])]
    low, high = float(min(pair[0] for pair in known)), float(max(pair[1] for pair in known))
    count = next((int(row[name]) for name in ("items", "merges") if _known(row.get(name))), 0)
    if low == high == 0 and count:
        high = 100 * stats.binomtest(0, count).proportion_ci(0.95, "exact").high
        low = -high
    return low, high


def _known(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _effect(estimate: float | None, bounds: Any, unit: str) -> str:
    digits = 4 if unit == "nats/token" else 2
    low, high = bounds or (None, None)
    if estimate is not None:
        return interval(estimate, low, high, digits)
    return f"{low:+.{digits}f} to {high:+.{digits}f}" if _known(low) and _known(high) else "–"
