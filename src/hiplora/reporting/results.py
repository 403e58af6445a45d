"""The results dictionary (schema 1), read into typed records in which whatever was not measured is None.

`compare` and `demo` write the dictionary, `inspect` writes the related inspection; only this module knows the
keys. Sections may be missing and numbers may be None or NaN: reading never fails for that. It fails for a
dictionary that is not a result at all, or of a schema that this version does not know.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hiplora.reporting.numbers import number
from hiplora.reporting.reading import as_mapping, as_numbers, as_rows, as_text, check


@dataclass(frozen=True)
class Drift:
    """How far a model moved from its base on one text.

    `kl` is KL(base‖adapted) in nats per token; `perplexity_ratio` is adapted over base.
    """

    text: str
    kl: float | None
    perplexity_ratio: float | None
    tokens: float | None


@dataclass(frozen=True)
class ModuleUpdate:
    """One module's update ΔW against its base weight's spectrum.

    `left`, `right` and `both` are the fractions of ‖ΔW‖_F² whose outputs lie in span(U), whose inputs lie in
    span(V), and both; `gains` is diag(Uᵀ ΔW V), which is δ for HiP-LoRA, against `sigma`; `norm` is ‖ΔW‖_F.
    """

    module: str
    layer: int | None
    type: str
    norm: float | None
    left: float | None
    right: float | None
    both: float | None
    sigma: tuple[float | None, ...] = ()
    gains: tuple[float | None, ...] = ()
    leak: float | None = None


@dataclass(frozen=True)
class Method:
    """One trained method: its cost, what it learned, how far it drifted, where its update lies."""

    name: str
    trainable_parameters: float | None = None
    seconds: float | None = None
    tokens: float | None = None
    peak_memory_bytes: float | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    curve: tuple[tuple[float, float], ...] = ()
    drift: tuple[Drift, ...] = ()
    modules: tuple[ModuleUpdate, ...] = ()


@dataclass(frozen=True)
class EditRun:
    """One method's edits: each set trained alone, the sets' adapters added together, and the export.

    `stricter` has, under `exact` (the answer word for word) and `paraphrase` (other words in the prompt), the
    success of each set alone and merged.
    """

    name: str
    alone: Mapping[str, float | None] = field(default_factory=dict)
    alone_drift: Mapping[str, tuple[Drift, ...]] = field(default_factory=dict)
    merged: Mapping[str, float | None] = field(default_factory=dict)
    overall: float | None = None
    survival: float | None = None
    stricter: Mapping[str, tuple[Mapping[str, float | None], Mapping[str, float | None]]] = field(
        default_factory=dict
    )
    survival_exact: float | None = None
    drift: tuple[Drift, ...] = ()
    export: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Results:
    """Everything that `compare` or `demo` measured."""

    kind: str
    title: str
    model: str
    created: str
    data: Mapping[str, Any]
    settings: Mapping[str, Any]
    provenance: Mapping[str, Any]
    notes: tuple[str, ...]
    methods: tuple[Method, ...]
    edit_counts: Mapping[str, float | None]
    base_success: Mapping[str, float | None]
    edits: tuple[EditRun, ...]


@dataclass(frozen=True)
class Inspection:
    """Where one adapter's update lies on its base model's spectrum."""

    adapter: str
    base: str
    method: str
    principal_rank: float | None
    modules: tuple[ModuleUpdate, ...]
    summary: Mapping[str, Any]


def read_results(raw: Mapping[str, Any]) -> Results:
    """Read a results dictionary of `hiplora compare` or `hiplora demo`.

    Raises:
        DataError: not a dictionary, another kind, or a schema that this version cannot read.
    """
    kind = check(raw, ("compare", "demo"))
    edits = as_mapping(raw.get("edits"))
    return Results(
        kind=kind,
        title=as_text(raw.get("title")) or ("Demonstration" if kind == "demo" else "Comparison"),
        model=as_text(raw.get("model")),
        created=as_text(raw.get("created")),
        data=as_mapping(raw.get("data")),
        settings=as_mapping(raw.get("settings")),
        provenance=as_mapping(raw.get("provenance")),
        notes=tuple(as_text(note) for note in as_rows(raw.get("notes"))),
        methods=tuple(
            _method(as_text(name), as_mapping(m)) for name, m in as_mapping(raw.get("methods")).items()
        ),
        edit_counts={
            as_text(as_mapping(s).get("name")): number(as_mapping(s).get("count"))
            for s in as_rows(edits.get("sets"))
        },
        base_success=as_numbers(edits.get("base_success")),
        edits=tuple(
            _edit_run(as_text(name), as_mapping(m)) for name, m in as_mapping(edits.get("methods")).items()
        ),
    )


def read_inspection(raw: Mapping[str, Any]) -> Inspection:
    """Read an inspection dictionary of `hiplora inspect`.

    Raises:
        DataError: not a dictionary, another kind, or a schema that this version cannot read.
    """
    check(raw, ("inspection",))
    return Inspection(
        adapter=as_text(raw.get("adapter")),
        base=as_text(raw.get("base")),
        method=as_text(raw.get("method")) or "adapter",
        principal_rank=number(raw.get("principal_rank")),
        modules=_modules(raw.get("modules")),
        summary=as_mapping(raw.get("summary")),
    )


def _method(name: str, raw: Mapping[str, Any]) -> Method:
    points = (
        (number(as_mapping(p).get("step")), number(as_mapping(p).get("loss")))
        for p in as_rows(raw.get("curve"))
    )
    return Method(
        name=name,
        trainable_parameters=number(raw.get("trainable_parameters")),
        seconds=number(raw.get("seconds")),
        tokens=number(raw.get("tokens")),
        peak_memory_bytes=number(raw.get("peak_memory_bytes")),
        loss_before=number(raw.get("heldout_loss_before")),
        loss_after=number(raw.get("heldout_loss_after")),
        curve=tuple((step, loss) for step, loss in points if step is not None and loss is not None),
        drift=_drift(raw.get("drift")),
        modules=_modules(raw.get("allocation")),
    )


def _edit_run(name: str, raw: Mapping[str, Any]) -> EditRun:
    singles = [as_mapping(row) for row in as_rows(raw.get("single"))]
    merged = as_mapping(raw.get("merged"))
    return EditRun(
        name=name,
        alone=_by_set(singles, "success"),
        alone_drift={as_text(row.get("set")): _drift(row.get("drift")) for row in singles},
        merged=as_numbers(merged.get("success")),
        overall=number(merged.get("overall")),
        survival=number(merged.get("survival")),
        stricter={
            key: (_by_set(singles, key), as_numbers(merged.get(key))) for key in ("exact", "paraphrase")
        },
        survival_exact=number(merged.get("survival_exact")),
        drift=_drift(merged.get("drift")),
        export=as_mapping(raw.get("export")),
    )


def _by_set(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, float | None]:
    return {as_text(row.get("set")): number(row.get(key)) for row in rows}


def _drift(raw: Any) -> tuple[Drift, ...]:
    return tuple(
        Drift(
            text=as_text(text),
            kl=number(as_mapping(row).get("kl")),
            perplexity_ratio=number(as_mapping(row).get("perplexity_ratio")),
            tokens=number(as_mapping(row).get("tokens")),
        )
        for text, row in as_mapping(raw).items()
    )


def _modules(raw: Any) -> tuple[ModuleUpdate, ...]:
    return tuple(_module(as_mapping(row)) for row in as_rows(raw))


def _module(row: Mapping[str, Any]) -> ModuleUpdate:
    module, layer = as_text(row.get("module")), number(row.get("layer"))
    return ModuleUpdate(
        module=module,
        layer=None if layer is None else int(layer),
        type=as_text(row.get("type")) or module.rsplit(".", 1)[-1],
        norm=number(row.get("norm")),
        left=number(row.get("left")),
        right=number(row.get("right")),
        both=number(row.get("both")),
        sigma=tuple(number(value) for value in as_rows(row.get("sigma"))),
        gains=tuple(number(value) for value in as_rows(row.get("gains"))),
        leak=number(row.get("leak")),
    )
