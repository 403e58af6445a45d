"""From the stages of a demonstration to its results dictionary."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hiplora.editing.edits import EditSet
from hiplora.provenance import json_sha256, provenance
from hiplora.study.folder import StudyFolder
from hiplora.study.methods import LORA, METHODS, mismatch

if TYPE_CHECKING:
    from hiplora.study.demo import DemoSettings

Record = dict[str, Any]


def collect(
    folder: StudyFolder,
    settings: "DemoSettings",
    sets: Sequence[EditSet],
    plan: Mapping[str, Any],
    isolated: bool,
) -> Record:
    """Assemble results.json from the stages' records."""
    base = _read(folder, "base")
    stages = {method: _Stages(folder, method, sets) for method in METHODS}
    methods = {method: _method(stages[method], base, isolated) for method in METHODS}
    count = sum(len(part) for part in sets)
    origin = provenance(plan_sha256=json_sha256(dict(plan)), seconds=folder.seconds())
    return {
        "schema": 1,
        "kind": "demo",
        "title": f"{count} facts edited in {len(sets)} sets, trained apart and added together",
        "model": settings.model,
        "created": origin["time"],
        "data": {
            "source": "built-in edits" if settings.edits is None else "edits of a file",
            "train_examples": count,
            "heldout_examples": count,
            "sha256": plan["edits_sha256"],
        },
        "settings": {method: _settings(settings, method) for method in METHODS},
        "provenance": origin,
        "methods": methods,
        "edits": {
            "sets": [{"name": part.name, "count": len(part)} for part in sets],
            "base_success": {part.name: share(base["success"][part.name]["preferred"]) for part in sets},
            "methods": {method: _edits(stages[method]) for method in METHODS},
        },
        "notes": [
            mismatch({method: record["trainable_parameters"] for method, record in methods.items()}),
            *_NOTES,
        ],
    }


_NOTES = (
    "An edit succeeds if log p(new answer) > log p(old answer), summed over the answer's tokens.",
    "Held-out loss is of the new answers to paraphrased prompts, which were not trained on.",
    "HiP-LoRA (activation) protects the directions that its layers are fed, measured on text sampled from the model; "
    "its training time does not count that.",
    "Learning curve and drift of a method are means over its two adapters; the allocation is of their sum.",
    "One run of each method with one seed: small differences may be chance.",
)


class _Stages:
    """A method's stage records, by set."""

    def __init__(self, folder: StudyFolder, method: str, sets: Sequence[EditSet]) -> None:
        from hiplora.study.demo import stage_name

        self.sets = sets
        self.train = {part.name: _read(folder, stage_name(method, "train", part)) for part in sets}
        self.alone = {part.name: _read(folder, stage_name(method, "measure", part)) for part in sets}
        self.merged = _read(folder, stage_name(method, "merge"))
        self.export = _read(folder, stage_name(method, "export")) if method != LORA else {}


def _method(stages: _Stages, base: Record, isolated: bool) -> Record:
    runs, alone = list(stages.train.values()), list(stages.alone.values())
    tokens = sum(record["heldout_tokens"] for record in alone)
    record = {
        "trainable_parameters": runs[0]["trainable_parameters"],
        "seconds": sum(run["seconds"] for run in runs),
        "tokens": sum(run["tokens"] for run in runs),
        "heldout_loss_before": base["heldout_loss_before"],
        "heldout_loss_after": sum(r["heldout_loss"] * r["heldout_tokens"] for r in alone) / tokens,
        "curve": [
            {"step": step, "loss": sum(losses) / len(losses)}
            for step, losses in enumerate(zip(*(run["curve"] for run in runs), strict=True), start=1)
        ],
        "drift": mean_drift([record["drift"] for record in alone]),
        "allocation": stages.merged["allocation"],
    }
    if isolated:
        record["peak_memory_bytes"] = max(run["peak_memory_bytes"] for run in runs)
    return record


def _edits(stages: _Stages) -> Record:
    alone = {part.name: stages.alone[part.name]["success"] for part in stages.sets}
    after = stages.merged["success"]
    exports = [stages.merged["export"], *stages.export.values()]
    logits = [
        export["max_logit_difference"] for export in exports if export["max_logit_difference"] is not None
    ]
    return {
        "single": [
            {"set": name, **_shares(success), "drift": stages.alone[name]["drift"]}
            for name, success in alone.items()
        ],
        "merged": {
            "success": {name: share(success["preferred"]) for name, success in after.items()},
            "exact": {name: share(success["exact"]) for name, success in after.items()},
            "paraphrase": {name: share(success["paraphrase_preferred"]) for name, success in after.items()},
            "overall": share([ok for success in after.values() for ok in success["preferred"]]),
            "survival": survival(alone, after, "preferred"),
            "survival_exact": survival(alone, after, "exact"),
            "drift": stages.merged["drift"],
        },
        "export": {
            "max_module_difference": max(export["max_module_difference"] for export in exports),
            "max_logit_difference": max(logits, default=None),
            "rank": stages.merged["export"]["rank"],
            "path": stages.merged["export"]["path"],
        },
    }


def _shares(success: Mapping[str, Sequence[bool]]) -> Record:
    return {
        "success": share(success["preferred"]),
        "exact": share(success["exact"]),
        "paraphrase": share(success["paraphrase_preferred"]),
        "paraphrase_exact": share(success["paraphrase_exact"]),
    }


def survival(
    alone: Mapping[str, Mapping[str, Sequence[bool]]],
    after: Mapping[str, Mapping[str, Sequence[bool]]],
    criterion: str,
) -> float | None:
    """Return the share of the edits that succeeded alone and still succeed after the merge; None if none did."""
    kept = [
        later
        for name in alone
        for before, later in zip(alone[name][criterion], after[name][criterion], strict=True)
        if before
    ]
    return share(kept) if kept else None


def share(successes: Sequence[bool]) -> float:
    """Return the share of successes, 0 to 1."""
    return sum(successes) / len(successes)


def mean_drift(drifts: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Record]:
    """Average drift over adapters, text by text: KL arithmetically, perplexity ratios geometrically."""
    return {
        text: {
            "kl": sum(drift[text]["kl"] for drift in drifts) / len(drifts),
            "perplexity_ratio": math.prod(drift[text]["perplexity_ratio"] for drift in drifts)
            ** (1 / len(drifts)),
            "tokens": drifts[0][text]["tokens"],
        }
        for text in drifts[0]
    }


def _settings(settings: "DemoSettings", method: str) -> Record:
    return {
        **settings.ranks.settings(method),
        "steps": settings.steps,
        "lr": settings.lr,
        "batch_size": settings.batch_size,
        "seed": settings.seed,
        "drift_tokens": settings.drift_tokens,
    }


def _read(folder: StudyFolder, stage: str) -> Record:
    record = folder.read(stage)
    if record is None:
        raise FileNotFoundError(f"{folder.path}: stage {stage} is not finished")
    return record
