"""One look a name, the same in every figure of a report, however many names there are."""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from hiplora.reporting.palette import LOOKS, NEUTRAL, Look, is_known, looks, plain
from hiplora.reporting.study.spec import Figure, Grid, Plot, Section, Series

_BASES = ("base", "basemodel", "pretrained")
# Beyond the palette a hue is used again, with another marker and another dash.
_MORE_MARKERS = ("d", "<", ">", "D", "v", "s")
_MORE_DASHES = ((1, 1), (7, 1.5, 1, 1.5), (4, 4))
_PAPER_DASHES = (1, 1.6)
PAPER_MARK = "(paper)"


def report_styles(sections: Sequence[Section]) -> dict[str, Look]:
    """Return the look of every series name in the figures of some sections; methods choose before other names."""
    together = [_names([figure]) for section in sections for figure in section.figures]
    methods = {measurement.method for section in sections for measurement in section.measurements}
    names = dict.fromkeys(name for names in together for name in names)
    return styles_of(sorted(names, key=lambda name: name not in methods), together)


def figure_styles(figure: Figure) -> dict[str, Look]:
    """Return the look of every series name of one figure alone."""
    return styles_of(_names([figure]))


def styles_of(names: Iterable[str], together: Sequence[Sequence[str]] = ()) -> dict[str, Look]:
    """Return a look for each name: the base model grey, known methods in their own colours, then the others.

    Beyond the palette's size hues are used again, with other marks; best those of names that are `together` (names of
    one figure) with the new one nowhere.
    """
    own = list(dict.fromkeys(_bare(name) for name in names))
    bases = [name for name in own if plain(name) in _BASES]
    others = sorted((name for name in own if name not in bases), key=lambda name: not is_known(name))
    found = looks(others[: len(LOOKS)])
    for index, name in enumerate(others[len(LOOKS) :]):
        beside = Counter(
            found[other].colour for figure in together if name in figure for other in figure if other in found
        )
        used = Counter(look.colour for look in found.values())
        hue = min(LOOKS, key=lambda look: (beside[look.colour], used[look.colour]))
        found[name] = replace(
            hue,
            marker=_MORE_MARKERS[index % len(_MORE_MARKERS)],
            dashes=_MORE_DASHES[index % len(_MORE_DASHES)],
        )
    return found | dict.fromkeys(bases, NEUTRAL)


def shown_name(series: Series) -> str:
    """Return a series' name as the legend has it: the paper's always say so."""
    return f"{_bare(series.name)} {PAPER_MARK}" if series.paper else series.name


def look_of(series: Series, styles: Mapping[str, Look]) -> Look:
    """Return how a series is drawn: the paper's in their method's hue, hollow and dotted."""
    look = styles.get(_bare(series.name)) or styles_of([series.name])[_bare(series.name)]
    return replace(look, dashes=_PAPER_DASHES, hollow=True) if series.paper else look


def legend_of(figure: Figure, styles: Mapping[str, Look]) -> dict[str, Look]:
    """Return the legend of a figure, the paper's series last."""
    ordered = sorted(_series([figure]), key=lambda series: series.paper)
    return {shown_name(series): look_of(series, styles) for series in ordered}


def _series(figures: Iterable[Figure]) -> Iterator[Series]:
    parts = itertools.chain.from_iterable(
        figure.parts if isinstance(figure, Grid) else [figure] for figure in figures
    )
    return itertools.chain.from_iterable(part.series for part in parts if isinstance(part, Plot))


def _names(figures: Iterable[Figure]) -> list[str]:
    return list(dict.fromkeys(_bare(series.name) for series in _series(figures)))


def _bare(name: str) -> str:
    return name.removesuffix(PAPER_MARK).rstrip()
