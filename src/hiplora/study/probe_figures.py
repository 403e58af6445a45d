"""The scatter plots of a probe: what an intervention cost against the singular value of its direction."""

from collections.abc import Mapping, Sequence
from typing import Any

from hiplora.probing import ProbeRecord
from hiplora.reporting._old_plots.spectrum import types_of
from hiplora.reporting.numbers import MISSING, hundredths
from hiplora.reporting.study.figures import draw
from hiplora.reporting.study.spec import Grid, Plot, Series

_TITLES = {
    "kl": "What one direction is worth: KL divergence from the base model",
    "log_perplexity": "What one direction is worth: change of the perplexity",
}
_LABELS = {"kl": "KL divergence (nats per token)", "log_perplexity": "Δ log perplexity (nats)"}


def figure(records: Sequence[ProbeRecord], correlations: Sequence[Mapping[str, Any]], metric: str) -> bytes:
    """Return an SVG file: a panel for each intervention on equal axes, a mark for each type of module.

    KL divergences, which are at least 0, stand on a logarithmic axis.
    """
    parts = [
        Plot(
            name=f"{metric}-{kind}",
            title=f"{kind}: r = {_coefficient(correlations, kind, metric)}",
            x_label="singular value σ",
            y_label=_LABELS[metric],
            series=[
                _series(name, [row for row in records if (row.kind, row.type) == (kind, name)], metric)
                for name in types_of(records)
            ],
            kind="points",
            x_log=True,
            y_log=metric == "kl",
        )
        for kind in dict.fromkeys(row.kind for row in records)
    ]
    return draw(Grid(metric, _TITLES[metric], parts))


def _series(name: str, rows: Sequence[ProbeRecord], metric: str) -> Series:
    shown = [(row.sigma, drop) for row in rows if (drop := row.drop[metric]) is not None]
    return Series(name, [sigma for sigma, _ in shown], [drop for _, drop in shown])


def _coefficient(correlations: Sequence[Mapping[str, Any]], kind: str, metric: str) -> str:
    """Pearson's r over all modules with its interval."""
    found = next(
        row["pearson"]
        for row in correlations
        if (row["kind"], row["metric"], row["type"]) == (kind, metric, "all")
    )
    if found["estimate"] is None:
        return MISSING
    interval = "" if found["low"] is None else f" [{hundredths(found['low'])}, {hundredths(found['high'])}]"
    return hundredths(found["estimate"]) + interval
