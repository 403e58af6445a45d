"""What a study shows, as plain data: measurements, tables of cells, figures. Nothing here draws or formats."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from hiplora.metrics import student_margin


@dataclass(frozen=True)
class Measurement:
    """One measured value with where it comes from: a row of the tidy tables.

    `low` and `high` bound its 95 % interval, most often over items with the seeds as they are; `sd` is the standard
    deviation over seeds. None where there is none.
    `setting` has what else tells it apart (`tau`, `size`, `lr`, `stage` …), `jobs` the keys of the jobs it is made of.
    """

    protocol: str
    method: str
    metric: str
    value: float
    unit: str = ""
    domain: str = ""
    form: str = ""
    low: float | None = None
    high: float | None = None
    sd: float | None = None
    seeds: int = 1
    items: int | None = None
    setting: Mapping[str, Any] = field(default_factory=dict)
    jobs: Sequence[str] = ()

    @property
    def over_seeds(self) -> tuple[float, float] | None:
        """The 95 % interval over seeds, Student's t: of what other seeds would give; None without a spread."""
        if self.sd is None or self.seeds < 2:
            return None
        margin = student_margin(self.sd, self.seeds)
        return self.value - margin, self.value + margin

    @property
    def widest(self) -> tuple[float | None, float | None]:
        """The bounds that hold over items, over seeds and, where there is one, in the paper's interval over both."""
        if self.low is None or self.high is None:
            return self.low, self.high
        wide: Any = self.setting.get("hierarchical_low"), self.setting.get("hierarchical_high")
        known = [
            (self.low, self.high),
            *(pair for pair in (self.over_seeds, wide) if pair and None not in pair),
        ]
        return min(low for low, _ in known), max(high for _, high in known)


@dataclass(frozen=True)
class Cell:
    """A table's cell: a measured value (None: not measured), its interval or spread, the paper's value, or text.

    `digits` after the point; `best` marks the best of its column. The paper's value is always shown as the paper's.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    sd: float | None = None
    paper: float | None = None
    text: str = ""
    digits: int = 1
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A table: a row a method (or whatever `columns[0]` says), each a name and as many cells as further columns."""

    name: str  # of its files: lower case, dashes
    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    note: str = ""


@dataclass(frozen=True)
class Series:
    """A line or a cloud of points of a figure; `low`/`high` bound y, `labels` name the points."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    x_low: Sequence[float] | None = None
    x_high: Sequence[float] | None = None
    labels: Sequence[str] = ()
    paper: bool = False  # values of the paper: drawn so that nobody takes them for measured ones


@dataclass(frozen=True)
class Plot:
    """Lines or points over two axes."""

    name: str
    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    kind: Literal["lines", "points"] = "lines"
    x_log: bool = False
    y_log: bool = False
    note: str = ""


@dataclass(frozen=True)
class Matrix:
    """A grid of numbers: stages by tasks. None is empty."""

    name: str
    title: str
    row_names: Sequence[str]
    column_names: Sequence[str]
    values: Sequence[Sequence[float | None]]
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class Grid:
    """Several plots or matrices of one kind, side by side in one figure (a method each)."""

    name: str
    title: str
    parts: Sequence[Plot | Matrix]
    note: str = ""


Figure = Plot | Matrix | Grid


@dataclass(frozen=True)
class Section:
    """What one protocol found: a headline in words, tables, figures, measurements."""

    name: str
    title: str
    text: Sequence[str] = ()  # paragraphs, plain text
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    measurements: Sequence[Measurement] = ()
    missing: Sequence[str] = ()  # names of jobs that this section still waits for
