"""The merge report (schema 1), read into typed records in which whatever was not measured is None.

`hiplora.merging.report.merge_report` writes it. Whoever evaluates the merge adds `evaluation`, in per cent:

    {"tasks": {task: {"metric": "exact match", "before": 41.2, "after": 38.0,
                      "difference": {"estimate": -3.2, "low": -5.1, "high": -1.3}}},
     "merge_fail": {"0.9": {"estimate": 0.25, "low": 0.1, "high": 0.4}},
     "mean_drop": {"estimate": 3.2, "low": 1.3, "high": 5.1},
     "notes": ["…"]}

`before` is the score of the task's own adapter, `after` that of the merge, `difference` is after − before in points;
`merge_fail` has, for each τ, the fraction of merges in which a task falls below τ times its score before; `mean_drop`
is the mean absolute drop in points. Each part may be absent.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hiplora.reporting.numbers import finite, mean, number, shorten
from hiplora.reporting.reading import as_mapping, as_numbers, as_rows, as_text, check

Matrix = tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class Adapter:
    """One of the adapters that were merged."""

    name: str
    weight: float | None
    method: str
    modules: float | None


@dataclass(frozen=True)
class Side:
    """How much two subspaces share: mean squared cosine, largest cosine, and the mean that chance gives."""

    mean: float | None
    largest_cosine: float | None
    chance: float | None


@dataclass(frozen=True)
class Pair:
    """Two adapters in one module: what they write (left) and read (right), their cosine, how much they conflict."""

    adapters: tuple[int, ...]
    left: Side
    right: Side
    cosine: float | None
    score: float | None


@dataclass(frozen=True)
class Module:
    """One module's conflicts; `worst` is the pair that conflicts most."""

    module: str
    layer: int | None
    type: str
    adapters: tuple[int, ...]
    norm_ratio: float | None
    unrelated: float | None
    sign_conflict: float | None
    pairs: tuple[Pair, ...]
    score: float | None

    @property
    def worst(self) -> Pair | None:
        """The pair that conflicts most, or None."""
        scored = [pair for pair in self.pairs if pair.score is not None]
        return max(scored, key=lambda pair: pair.score or 0.0, default=None)

    @property
    def left(self) -> float | None:
        """Mean overlap of the pairs on the output side."""
        return mean(pair.left.mean for pair in self.pairs)

    @property
    def right(self) -> float | None:
        """Mean overlap of the pairs on the input side."""
        return mean(pair.right.mean for pair in self.pairs)

    @property
    def cosine(self) -> float | None:
        """Mean cosine of the pairs."""
        return mean(pair.cosine for pair in self.pairs)

    @property
    def largest_cosine(self) -> float | None:
        """Largest cosine of an angle between two adapters' subspaces, on either side."""
        found = finite(side.largest_cosine for pair in self.pairs for side in (pair.left, pair.right))
        return max(found, default=None)


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval."""

    estimate: float | None
    low: float | None
    high: float | None

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval is known and zero lies outside."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


@dataclass(frozen=True)
class Task:
    """One task's score with its own adapter and after the merge."""

    name: str
    metric: str
    before: float | None
    after: float | None
    difference: Interval


@dataclass(frozen=True)
class Evaluation:
    """What the merge broke."""

    tasks: tuple[Task, ...]
    merge_fail: Mapping[str, Interval]
    mean_drop: Interval
    notes: tuple[str, ...]

    def __bool__(self) -> bool:
        """Whether anything was measured."""
        return bool(self.tasks or self.merge_fail or self.mean_drop.estimate is not None or self.notes)


@dataclass(frozen=True)
class MergeReport:
    """Everything about one merge: how the adapters go together and, where it was measured, what came of it."""

    base: str
    method: str
    adapters: tuple[Adapter, ...]
    modules: tuple[Module, ...]
    most_conflicting: tuple[Module, ...]
    pairs: Mapping[str, Matrix]
    totals: Mapping[str, float | None]
    evaluation: Evaluation
    settings: Mapping[str, Any]
    merge: Mapping[str, Any]
    provenance: Mapping[str, Any]

    def pair_name(self, adapters: tuple[int, ...], limit: int = 60) -> str:
        """Return two adapters' names, joined; each shortened to at most `limit` characters."""
        names = (self.adapters[place].name for place in adapters if 0 <= place < len(self.adapters))
        return " × ".join(shorten(name, limit) for name in names)


def read_merge_report(raw: Mapping[str, Any]) -> MergeReport:
    """Read a merge report.

    Raises:
        DataError: not a dictionary, another kind, or a schema that this version cannot read.
    """
    check(raw, ("merge-report",), "merge report")
    modules = tuple(_module(as_mapping(row)) for row in as_rows(raw.get("modules")))
    by_name = {module.module: module for module in modules if module.module}
    merge = as_mapping(raw.get("merge"))
    return MergeReport(
        base=as_text(raw.get("base")),
        method=as_text(merge.get("method")),
        adapters=tuple(_adapter(as_mapping(row)) for row in as_rows(raw.get("adapters"))),
        modules=modules,
        most_conflicting=tuple(
            by_name[name] for row in as_rows(raw.get("most_conflicting")) if (name := as_text(row)) in by_name
        ),
        pairs={name: _matrix(as_mapping(raw.get("pairs")).get(name)) for name in ("left", "right", "cosine")},
        totals=as_numbers(raw.get("totals")),
        evaluation=_evaluation(as_mapping(raw.get("evaluation"))),
        settings=as_mapping(raw.get("settings")),
        merge=merge,
        provenance=as_mapping(raw.get("provenance")),
    )


def _adapter(row: Mapping[str, Any]) -> Adapter:
    return Adapter(
        as_text(row.get("name")),
        number(row.get("weight")),
        as_text(row.get("method")),
        number(row.get("modules")),
    )


def _module(row: Mapping[str, Any]) -> Module:
    name, layer = as_text(row.get("module")), number(row.get("layer"))
    return Module(
        module=name,
        layer=None if layer is None else int(layer),
        type=as_text(row.get("type")) or name.rpartition(".")[2],
        adapters=_places(row.get("adapters")),
        norm_ratio=number(row.get("norm_ratio")),
        unrelated=number(row.get("unrelated")),
        sign_conflict=number(row.get("sign_conflict")),
        pairs=tuple(_pair(as_mapping(pair)) for pair in as_rows(row.get("pairs"))),
        score=number(row.get("score")),
    )


def _pair(row: Mapping[str, Any]) -> Pair:
    return Pair(
        adapters=_places(row.get("adapters")),
        left=_side(as_numbers(row.get("left"))),
        right=_side(as_numbers(row.get("right"))),
        cosine=number(row.get("cosine")),
        score=number(row.get("score")),
    )


def _side(row: Mapping[str, float | None]) -> Side:
    return Side(row.get("mean"), row.get("largest_cosine"), row.get("chance"))


def _places(raw: Any) -> tuple[int, ...]:
    return tuple(int(place) for place in finite(map(number, as_rows(raw))))


def _matrix(raw: Any) -> Matrix:
    return tuple(tuple(number(value) for value in as_rows(row)) for row in as_rows(raw))


def _evaluation(raw: Mapping[str, Any]) -> Evaluation:
    return Evaluation(
        tasks=tuple(
            _task(as_text(name), as_mapping(row)) for name, row in as_mapping(raw.get("tasks")).items()
        ),
        merge_fail={as_text(tau): _interval(row) for tau, row in as_mapping(raw.get("merge_fail")).items()},
        mean_drop=_interval(raw.get("mean_drop")),
        notes=tuple(as_text(note) for note in as_rows(raw.get("notes"))),
    )


def _task(name: str, row: Mapping[str, Any]) -> Task:
    return Task(
        name,
        as_text(row.get("metric")),
        number(row.get("before")),
        number(row.get("after")),
        _interval(row.get("difference")),
    )


def _interval(raw: Any) -> Interval:
    row = as_numbers(raw)
    return Interval(row.get("estimate"), row.get("low"), row.get("high"))
