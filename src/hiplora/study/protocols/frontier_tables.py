"""The tables of the frontiers, and what they say in words."""

from collections.abc import Iterator, Sequence

import numpy as np

from hiplora.recipes.protocols import Frontier as Settings
from hiplora.reporting.study.spec import Cell, Table
from hiplora.study.builder import Study
from hiplora.study.protocols.frontier_compare import Compared, Ratio, below_told
from hiplora.study.protocols.frontier_points import LIKELIHOOD, LOSS, OVER, Curve, Point, at_the_edge, unlike
from hiplora.study.protocols.frontiers import NOT_REACHED, PASSED, REACHED
from hiplora.study.protocols.show import NONE, cell, marked
from hiplora.study.statistics import Estimate, estimate

BEST_PLAIN = "Best plain LoRA"
NAME = "frontier"
_RATIO = (
    "How many times as far the method drifts as {reference} where it has learned as much: its lowest drift over rates "
    "and early stops, interpolated between neighbours on the grid (linear in the loss, logarithmic in the divergence); "
    "above 1 it drifts further. Geometric means over the seeds with 95 % intervals (Student's t over the seeds' paired "
    "log ratios). “≥”: it never learned that much, and drifts this far where it learned most. “≤”: all its points "
    "learned more. Over all texts: the geometric mean over {texts}."
)


def frontier_tables(study: Study, settings: Settings, found: Compared) -> list[Table]:
    """Return a domain's tables: methods at their best rates, and the comparison with the reference."""
    title = study.recipe.domains[found.domain].title
    tables = [_best_table(study, settings, found, title)]
    if found.reference is not None:
        tables += [_equal_table(study, settings, found, title), _rates_table(study, settings, found, title)]
        tables.append(_below_table(found, found.reference, title))
    return tables


def frontier_texts(study: Study, settings: Settings, found: Compared) -> Iterator[str]:
    """Yield what the tables say, and whose best rate is at the edge of the grid."""
    title, reference = study.recipe.domains[found.domain].title, found.reference
    edge = [curve.title for curve in found.curves if at_the_edge(curve, settings.rates)]
    if reference is not None:
        plain = _picked(found.plain, None, LOSS, OVER)
        named = [(f"the best plain LoRA ({one.curve.title})", one) for one in plain]
        attention = [one for one in found.ratios if one.curve.name == settings.attention]
        named += [
            (one.curve.title, one)
            for one in _picked(attention, None, LOSS, OVER)
            if not any(one.curve is other.curve for other in plain)
        ]
        told = [f"{name} drifts {_times(one)} as far (loss {one.x:.3f})" for name, one in named]
        if told:
            yield (
                f"On {title}, at the lowest held-out loss that each and {reference.title} both reached, "
                f"{', '.join(told)}, over all texts." + _smallest(_picked(found.ratios, None, LOSS, OVER))
            )
        above = [one.curve.title for one in found.below if below_told(one.share) == "everywhere"]
        if found.below:
            yield (
                f"On {title}, below {reference.title} at every common loss: {', '.join(above) or 'no method'}."
            )
    if edge:
        yield (
            f"On {title}, the best rate is at the edge of the grid for {', '.join(edge)}: a wider grid may find a "
            "better one."
        )


def _best_table(study: Study, settings: Settings, found: Compared, title: str) -> Table:
    texts = list(dict.fromkeys(text for c in found.curves for p in c.points for text in p.drifts))
    rows = []
    for curve in found.curves:
        best = curve.best
        edge = ", at the edge" if at_the_edge(curve, settings.rates) else ""
        drifts = [Cell(1000 * best.drift(text), digits=2) if text in best.drifts else NONE for text in texts]
        learned = None if best.likelihood is None else float(np.mean(best.likelihood))
        drop = None if best.drop is None else estimate(best.drop, best.drop_by_seed)
        cells = [
            Cell(text=f"{best.rate:g}{edge}"),
            Cell(best.loss, digits=3),
            Cell(learned),
            *drifts,
            cell(drop),
        ]
        rows.append((curve.title, cells))
    note = (
        "Of each method the rate with the lowest mean held-out loss (nats a learned token). Likelihood of the right "
        "answer on the domain's own task, in per cent. KL from the base in thousandths of a nat a token, geometric "
        f"means over the seeds; all texts: over {', '.join(unlike(study, settings))}. Drop elsewhere: mean fall of the "
        "likelihoods of the other tasks, in percentage points, with 95 % intervals over items."
    )
    columns = [
        "Method",
        "Rate",
        "Held-out loss",
        "Likelihood",
        *(_text_told(t) for t in texts),
        "Drop elsewhere",
    ]
    best_of = {1: "low", 2: "high", **dict.fromkeys(range(3, 4 + len(texts)), "low")}
    return Table(
        f"{NAME}-{found.domain}-best",
        f"{title}: each method at its best rate",
        columns,
        marked(rows, best_of),
        note,
    )


def _equal_table(study: Study, settings: Settings, found: Compared, title: str) -> Table:
    """At the most that both learned: by text, and over all texts at equal likelihood too."""
    assert found.reference is not None
    drifts = found.reference.best.drifts
    texts = [OVER, *(text for text in drifts if text != OVER)] if drifts else []
    asked = [*((LOSS, text) for text in texts), (LIKELIHOOD, OVER)]
    columns = [
        "Method",
        "Held-out loss",
        *(_text_told(text) for text in texts),
        "All texts, at equal likelihood",
    ]
    rows = []
    for name, ratios in _rows(found):
        at = _picked(ratios, None, LOSS, OVER)
        loss = Cell(at[0].x, digits=3) if at else NONE
        rows.append((name, [loss, *(_cell(_picked(ratios, None, view, text)) for view, text in asked)]))
    note = "At the lowest loss that the method and the reference both reached. " + _RATIO.format(
        reference=found.reference.title, texts=", ".join(unlike(study, settings))
    )
    told = f"{title}: drift at equal loss, against {found.reference.title}"
    return Table(f"{NAME}-{found.domain}-equal", told, columns, rows, note)


def _rates_table(study: Study, settings: Settings, found: Compared, title: str) -> Table:
    assert found.reference is not None
    points = found.reference.points
    columns = ["Method", *(f"{_point_told(point)} (loss {point.loss:.3f})" for point in points)]
    rows = [
        (name, [_cell(_picked(ratios, point, LOSS, OVER)) for point in points])
        for name, ratios in _rows(found)
    ]
    note = _RATIO.format(reference=found.reference.title, texts=", ".join(unlike(study, settings)))
    told = (
        f"{title}: drift over all texts at equal loss, against {found.reference.title} at each of its rates"
    )
    return Table(f"{NAME}-{found.domain}-rates", told, columns, rows, note)


def _below_table(found: Compared, reference: Curve, title: str) -> Table:
    rows = []
    for one in found.below:
        counts = ", ".join(
            f"{count} {verdict}"
            for verdict in ("everywhere", "somewhere", "nowhere", "no common losses")
            if (count := one.count(verdict))
        )
        share = Cell(None if one.share is None else 100 * one.share)
        lowest = Cell(min(point.loss for point in one.curve.points), digits=3)
        rows.append((one.curve.title, [Cell(text=below_told(one.share)), share, Cell(text=counts), lowest]))
    columns = ["Method", f"Below {reference.title}", "Share of common losses, %", "By seed", "Lowest loss"]
    lowest_loss = min(point.loss for point in reference.points)
    note = (
        f"Where a method's frontier lies below that of {reference.title} (drift over all texts, against the held-out "
        "loss), on the losses that both reached: by the means over the seeds, and how many seeds say so alone. Lowest "
        f"loss: the mean at the method's best point; {reference.title}: {lowest_loss:.3f}."
    )
    return Table(f"{NAME}-{found.domain}-below", f"{title}: who beats whom", columns, rows, note)


def _rows(found: Compared) -> Iterator[tuple[str, list[Ratio]]]:
    """The best plain LoRA, named as it is over all texts at the most that both learned; then every method."""
    if found.plain:
        named = _picked(found.plain, None, LOSS, OVER)
        yield (_name_of(named[0]) if named else BEST_PLAIN), found.plain
    for curve in found.curves:
        if curve is not found.reference:
            yield curve.title, [one for one in found.ratios if one.curve is curve]


def _name_of(plain: Ratio) -> str:
    return f"{BEST_PLAIN} ({plain.curve.title})"


def _picked(ratios: Sequence[Ratio], point: Point | None, view: str, text: str) -> list[Ratio]:
    return [one for one in ratios if one.point is point and (one.view, one.text) == (view, text)]


def _cell(found: Sequence[Ratio]) -> Cell:
    if not found:
        return NONE
    one = found[0]
    if one.state in (NOT_REACHED, PASSED):
        return Cell(text=f"{_bound(one)} ({'not reached' if one.state == NOT_REACHED else 'learned more'})")
    return cell(one.found, digits=2)


def _bound(one: Ratio) -> str:
    return f"{'≥' if one.state == NOT_REACHED else '≤'} {one.found.value:.3g}"


def _times(one: Ratio) -> str:
    if one.state in (NOT_REACHED, PASSED):
        return f"{_bound(one)} times"
    low, high = one.found.low, one.found.high
    interval = "" if low is None or high is None else f" ({low:.3g} to {high:.3g})"
    return f"{one.found.value:.3g} times{interval}"


def _smallest(ratios: Sequence[Ratio]) -> str:
    """The smallest ratio that can be told from 1: the median half width of the intervals, as a factor."""
    factors = [
        _factor(one.found) for one in ratios if one.state == REACHED and one.found.low and one.found.high
    ]
    if not factors:
        return ""
    return (
        f" A ratio can be told from 1 if it is a factor of more than about {float(np.median(factors)):.3g} "
        "(median half width of the 95 % intervals)."
    )


def _factor(found: Estimate) -> float:
    return float(np.sqrt((found.high or 1.0) / (found.low or 1.0)))


def _point_told(point: Point) -> str:
    return f"{point.rate:g}" + (f", {point.steps} steps" if point.steps is not None else "")


def _text_told(text: str) -> str:
    return text[0].upper() + text[1:] if text == OVER else text
