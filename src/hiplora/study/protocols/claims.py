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
from hiplora.study.records import FORMS, Findings, paper

if TYPE_CHECKING:
    from hiplora.study.builder import Study
    from hiplora.study.jobs import Job

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
    measured, widest = [], []
    for row in rows.itertuples():
        digits = 4 if row.unit == "nats/token" else 2
        measured.append(interval(row.estimate, row.low, row.high, digits))
        widest.append("–" if row.widest[0] is None else " to ".join(f"{end:+.{digits}f}" for end in row.widest))
    shown = pd.DataFrame(
        {
            "Claim": rows.says,
            "Verdict": rows.verdict,
            "Form": rows.form.replace("", "–"),
            "Measured effect": measured,
            "Unit": rows.unit,
            "Widest interval": widest,
            "The paper's": rows.paper,
            "An effect as large": rows.as_large,
        }
    ).set_index("Claim")
    told: dict[str, dict[str, Any]] = {}
    kept = ["verdict", "estimate", "low", "high", "widest", "unit", "paper_effect", "as_large"]
    for row in rows.astype(object).where(rows.notna(), None).to_dict("records"):
        entry = told.setdefault(row["name"], {"says": row["says"], "paper": row["paper"]})
        entry[row["form"] or "measured"] = {key: row[key] for key in kept}
    file = json.dumps({"claims": told, "provenance": provenance()}, indent=1, ensure_ascii=False) + "\n"
    tables = {"claims": ("Claim by claim", shown)}
    return Findings(settings.name, settings.title, tables=tables, files={"claims.json": file}, text=text)


def check(study: Study, settings: Claims, found: Sequence[Findings]) -> list[dict[str, Any]]:
    """Return every claim that the study's methods allow to check, in each of its forms, with its verdict."""
    numbers = {one.name: one.measured for one in found}
    roles = {name: getattr(settings, name) for name in Claims.model_fields}
    rows = []
    for name, claim in paper()["claims"].items():
        named = {key: claim[key] for key in ("method", "minus", "over") if key in claim}
        if any(roles.get(role, "") is None for role in named.values()):
            continue
        titles = {key: study.row(roles[role]).title if role in roles else role for key, role in named.items()}
        wanted = {"metric": claim["metric"], **titles, **claim.get("setting", {})}
        for form in FORMS.values() if claim.get("scored", True) else ("",):
            row = _first(numbers.get(claim["section"]), wanted | ({"form": form} if form else {}))
            rows.append({"name": name, "form": form, **_verdict(claim, row)})
    return rows


def _first(numbers: pd.DataFrame | None, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The first measurement that has all the labels; nothing, if there is none."""
    if numbers is None or not set(wanted) <= set(numbers):
        return {}
    fits = (numbers[list(wanted)] == pd.Series(wanted)).all(axis=1)
    return numbers[fits].iloc[0].to_dict() if fits.any() else {}


def _verdict(claim: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    none, size, above = claim.get("none", 0.0), claim.get("size"), claim["claimed"] == "above"
    low, high = widest(row) if row else (None, None)
    verdict, as_large = "cannot tell" if row else "not measured", "–"
    if low is not None and high is not None:
        if not low <= none <= high:
            verdict = "supported" if (low > none) == above else "not supported"
        if size is not None:
            as_large = "excluded" if (high < size if above else low > size) else "possible"
    return {
        **{key: claim[key] for key in ("says", "paper")},
        "verdict": verdict,
        "unit": claim.get("unit", "pp"),
        "paper_effect": size,
        "as_large": as_large,
        **{key: row.get(key) for key in ("estimate", "low", "high")},
        "widest": (low, high),
    }


def widest(row: Mapping[str, Any]) -> Bounds:
    """Return the bounds that hold over items, over seeds and, where it is given, in the paper's interval over both.

    Where all of some edits or merges agree, the bounds are what their number leaves possible: the exact (Clopper and
    Pearson) bound on a share of which none was seen.
    """
    from scipy import stats

    if not _known(row["low"], row["high"]):
        return None, None
    bounds = [row["low"], row["high"]]
    hierarchical = row.get("hierarchical_low"), row.get("hierarchical_high")
    if _known(*hierarchical):
        bounds += hierarchical
    if _known(row.get("sd")) and row.get("seeds", 1) > 1:
        margin = student_margin(row["sd"], int(row["seeds"]))
        bounds += [row["estimate"] - margin, row["estimate"] + margin]
    low, high = float(min(bounds)), float(max(bounds))
    count = next((int(row[name]) for name in ("items", "merges") if _known(row.get(name))), 0)
    if low == high == 0 and count:
        high = 100 * stats.binomtest(0, count).proportion_ci(0.95, "exact").high
        low = -high
    return low, high


def _known(*values: Any) -> bool:
    return all(value is not None and math.isfinite(value) for value in values)
