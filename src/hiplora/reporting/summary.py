"""The summary of a result: the rows of its main table and the tiles at the top, for terminal and page alike."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from hiplora.reporting._old_plots.energy import share
from hiplora.reporting.averages import mean_kl, mean_perplexity_ratio, mean_success
from hiplora.reporting.numbers import (
    MISSING,
    change,
    count,
    duration,
    fixed,
    number,
    percent,
    significant,
    storage,
)
from hiplora.reporting.results import Drift, EditRun, Inspection, Method, Results

LOWER, HIGHER, NEITHER = "lower", "higher", ""
# Two values this near each other are printed without a winner.
_TIE = 0.01


@dataclass(frozen=True)
class Row:
    """One line of a table: a text per method, and the methods that did best (none where it is a tie)."""

    label: str
    texts: Mapping[str, str]
    better: str = NEITHER
    best: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Section:
    """Lines of the summary that belong together."""

    title: str
    rows: Sequence[Row]


@dataclass(frozen=True)
class Tile:
    """One number at a glance: per method its text and the length of its bar, from 0 to 1."""

    title: str
    unit: str
    better: str
    texts: Mapping[str, str]
    lengths: Mapping[str, float] = field(default_factory=dict)


def names(results: Results) -> list[str]:
    """Return the methods of a result in their order, from both its parts."""
    return list(dict.fromkeys([*(m.name for m in results.methods), *(run.name for run in results.edits)]))


def sections(results: Results) -> list[Section]:
    """Return the summary table; lines that no method has are left out."""
    methods = {method.name: method for method in results.methods}
    runs = {run.name: run for run in results.edits}
    found = [
        Section("Edits", _edit_rows(results, runs)),
        Section("Learned", _learned_rows(methods)),
        Section(
            f"Drift on other text{', before the merge' if runs else ''}",
            _drift_rows({name: method.drift for name, method in methods.items()}),
        ),
        Section(
            "Drift of the merged model on other text",
            _drift_rows({name: run.drift for name, run in runs.items()}),
        ),
        Section("Update", _update_rows(methods)),
        Section("Cost", _cost_rows(methods)),
        Section("Export as plain LoRA", _export_rows(runs)),
    ]
    return [section for section in found if section.rows]


def tiles(results: Results) -> list[Tile]:
    """Return the three or four numbers that answer the question, for the top of the page."""
    runs = {run.name: run for run in results.edits}
    methods = {method.name: method for method in results.methods}
    found = _edit_tiles(results, runs) if runs else _method_tiles(methods)
    return [tile for tile in found if tile is not None]


def _edit_tiles(results: Results, runs: Mapping[str, EditRun]) -> list[Tile | None]:
    alone = {name: mean_success(run.alone, results.edit_counts) for name, run in runs.items()}
    overall = {name: run.overall for name, run in runs.items()}
    survival = {name: run.survival for name, run in runs.items()}
    drifts = mean_kl({name: run.drift for name, run in runs.items()})
    return [
        _tile("Edits that work alone", "over the sets", HIGHER, alone, percent, 1.0),
        _tile("Edits that work after the merge", "of all edits", HIGHER, overall, percent, 1.0),
        _tile("Edits that survive the merge", "of those that worked alone", HIGHER, survival, percent, 1.0),
        _tile("Drift of the merge", "KL, nats per token, other text", LOWER, drifts, significant),
    ]


def _method_tiles(methods: Mapping[str, Method]) -> list[Tile | None]:
    drifts = {name: method.drift for name, method in methods.items()}
    excess = {n: None if ratio is None else ratio - 1 for n, ratio in mean_perplexity_ratio(drifts).items()}
    losses = {name: method.loss_after for name, method in methods.items()}
    seconds = {name: method.seconds for name, method in methods.items()}
    return [
        _tile("Held-out loss", "nats per response token", LOWER, losses, fixed),
        _tile("Drift", "KL, nats per token, other text", LOWER, mean_kl(drifts), significant),
        _tile("Perplexity on other text", "against the base model", LOWER, excess, _excess),
        _tile("Training time", "wall clock", LOWER, seconds, duration),
    ]


def inspection_rows(inspection: Inspection) -> list[tuple[str, str]]:
    """Return label and value of an inspection's summary; what `summary` holds beyond it is added as it is."""
    modules = inspection.modules
    leaks = [row.leak for row in modules if row.leak is not None]
    rows = [
        ("Adapter", inspection.adapter),
        ("Base model", inspection.base),
        ("Method", inspection.method),
        ("Protected directions per module (k)", count(inspection.principal_rank)),
        ("Modules", str(len(modules))),
        ("Energy written into the protected outputs", percent(share(modules, "left"))),
        ("Energy read from the protected inputs", percent(share(modules, "right"))),
        ("Energy from protected inputs to protected outputs", percent(share(modules, "both"))),
        ("Energy that touches either", percent(share(modules, "touched"))),
        ("Largest leak of the residual channel", significant(max(leaks)) if leaks else ""),
    ]
    return [(label, value) for label, value in rows if value not in ("", MISSING)]


def _learned_rows(methods: Mapping[str, Method]) -> list[Row]:
    return _present(
        _row("Held-out loss before", {n: m.loss_before for n, m in methods.items()}, fixed),
        _row("Held-out loss after", {n: m.loss_after for n, m in methods.items()}, fixed, LOWER),
    )


def _drift_rows(drifts: Mapping[str, Sequence[Drift]]) -> list[Row]:
    texts = list(dict.fromkeys(row.text for rows in drifts.values() for row in rows))
    rows = []
    for text in texts:
        found = {n: next((row for row in rows_ if row.text == text), None) for n, rows_ in drifts.items()}
        kls = {n: row.kl if row else None for n, row in found.items()}
        ratios = {n: row.perplexity_ratio if row else None for n, row in found.items()}
        rows.append(_row(f"{text}: KL, nats per token", kls, significant, LOWER))
        rows.append(_row(f"{text}: perplexity", ratios, change, LOWER))
    return _present(*rows)


def _update_rows(methods: Mapping[str, Method]) -> list[Row]:
    return _present(
        _row("Trainable parameters", {n: m.trainable_parameters for n, m in methods.items()}, count),
        _row(
            "Energy touching the protected directions",
            {n: share(m.modules, "touched") for n, m in methods.items()},
            percent,
        ),
        _row(
            "Energy inside on both sides", {n: share(m.modules, "both") for n, m in methods.items()}, percent
        ),
    )


def _cost_rows(methods: Mapping[str, Method]) -> list[Row]:
    speeds = {
        n: m.tokens / m.seconds if m.tokens is not None and m.seconds else None for n, m in methods.items()
    }
    return _present(
        _row("Training time", {n: m.seconds for n, m in methods.items()}, duration, LOWER),
        _row("Tokens per second", speeds, significant, HIGHER),
        _row("Peak memory", {n: m.peak_memory_bytes for n, m in methods.items()}, storage, LOWER),
    )


def _edit_rows(results: Results, runs: Mapping[str, EditRun]) -> list[Row]:
    sets = dict.fromkeys(
        [*results.edit_counts, *(s for run in runs.values() for s in [*run.alone, *run.merged])]
    )
    rows = []
    for name in sets:
        base = results.base_success.get(name)
        before = f" (base model: {percent(base)})" if base is not None else ""
        rows.append(
            _row(
                f"{name}: alone{before}", {n: run.alone.get(name) for n, run in runs.items()}, percent, HIGHER
            )
        )
        rows.append(
            _row(f"{name}: merged", {n: run.merged.get(name) for n, run in runs.items()}, percent, HIGHER)
        )
    rows.append(_row("All edits, merged", {n: run.overall for n, run in runs.items()}, percent, HIGHER))
    rows.append(_row("Survive the merge", {n: run.survival for n, run in runs.items()}, percent, HIGHER))
    return _present(*rows, *_stricter_rows(results, runs))


def _stricter_rows(results: Results, runs: Mapping[str, EditRun]) -> list[Row | None]:
    rows = []
    for key, label in (("exact", "Exact answer"), ("paraphrase", "Paraphrased prompt")):
        for index, when in enumerate(("alone", "merged")):
            found = {
                name: mean_success(run.stricter[key][index], results.edit_counts)
                if key in run.stricter
                else None
                for name, run in runs.items()
            }
            rows.append(_row(f"{label}, {when}", found, percent, HIGHER))
    exact = {name: run.survival_exact for name, run in runs.items()}
    return [*rows, _row("Exact answers that survive the merge", exact, percent, HIGHER)]


def _export_rows(runs: Mapping[str, EditRun]) -> list[Row]:
    def values(key: str) -> dict[str, float | None]:
        return {name: number(run.export.get(key)) for name, run in runs.items()}

    return _present(
        _row("Rank", values("rank"), count),
        _row("Largest difference of a module's update", values("max_module_difference"), significant),
        _row("Largest difference of a logit", values("max_logit_difference"), significant),
    )


def _row(
    label: str, values: Mapping[str, float | None], text: Callable[[float | None], str], better: str = NEITHER
) -> Row | None:
    if all(value is None for value in values.values()):
        return None
    return Row(label, {name: text(value) for name, value in values.items()}, better, _best(values, better))


def _best(values: Mapping[str, float | None], better: str) -> frozenset[str]:
    """The best of at least two measured values, unless all are within a per cent of each other."""
    present = {name: value for name, value in values.items() if value is not None}
    if better == NEITHER or len(present) < 2:
        return frozenset()
    top, bottom = max(present.values()), min(present.values())
    if top == bottom or (math.isfinite(top) and top - bottom <= _TIE * max(abs(top), abs(bottom))):
        return frozenset()
    target = bottom if better == LOWER else top
    return frozenset(name for name, value in present.items() if value == target)


def _present(*rows: Row | None) -> list[Row]:
    return [row for row in rows if row is not None]


def _excess(value: float | None) -> str:
    return change(None if value is None else value + 1)


def _tile(
    title: str,
    unit: str,
    better: str,
    values: Mapping[str, float | None],
    text: Callable[[float | None], str],
    full: float | None = None,
) -> Tile | None:
    present = [value for value in values.values() if value is not None and math.isfinite(value)]
    if not present:
        return None
    scale = full or max([0.0, *present]) or 1.0
    lengths = {name: _length(value, scale) for name, value in values.items()}
    return Tile(title, unit, better, {name: text(value) for name, value in values.items()}, lengths)


def _length(value: float | None, scale: float) -> float:
    return 0.0 if value is None else min(1.0, max(0.0, value / scale))


def method_columns(found: Iterable[Section]) -> list[str]:
    """Return the methods that appear in a summary, in order."""
    return list(dict.fromkeys(name for section in found for row in section.rows for name in row.texts))
