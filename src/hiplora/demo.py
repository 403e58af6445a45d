"""`hiplora demo`: two sets of facts edited into a model, trained apart with each method, then added together."""

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hiplora import __version__
from hiplora.compare import ONE_RUN, Base, Results, check_model, method_settings, slug
from hiplora.editing.edits import EditSet, load_edit_sets
from hiplora.errors import DataError
from hiplora.files import staged_dir, write_atomic
from hiplora.provenance import folder_identity, json_sha256, provenance

if TYPE_CHECKING:
    import pandas as pd

CALIBRATION_TOKENS = 2560  # sampled from the model; fewer than by default, so that the demonstration is short


@dataclass(frozen=True)
class DemoSettings:
    """What the demonstration edits, and how; the defaults are the built-in job.

    All methods get the same steps and learning rate, those at which each set's edits work.
    """

    model: str = "smollm2-135m"
    edits: str | None = None
    steps: int = 12
    lr: float = 1e-3
    batch_size: int = 16
    rank: int = 16
    principal_rank: int = 32
    drift_tokens: int = 1024
    seed: int = 42


def demo(out: str | os.PathLike, settings: DemoSettings | None = None, *, overwrite: bool = False) -> Results:
    """Run the demonstration and write `results.json`, `report.html` and the adapters, merged ones as plain LoRA.

    An unfinished one in `out` goes on where it stopped.

    Raises:
        ConfigError, DataError: model, edits or output folder cannot be used.
        HipLoraError: training failed, or a merged adapter is not the sum of its parts.
    """
    from hiplora.data.texts import drift_texts
    from hiplora.run_folder import RunFolder

    settings = settings or DemoSettings()
    sets, texts = load_edit_sets(settings.edits), drift_texts()
    if len(sets) != 2:
        raise DataError(f"edits {settings.edits or 'built-in'}: {len(sets)} sets; the demonstration needs 2")
    targets = check_model(settings.model, settings.principal_rank)
    methods = method_settings(settings.rank, settings.principal_rank, targets, lora_dropout=0.0)
    plan = {
        "kind": "demo",
        "hiplora": __version__,
        "settings": {name: value for name, value in asdict(settings).items() if name != "edits"},
        "edits_sha256": json_sha256([asdict(part) for part in sets]),
        "drift_texts_sha256": json_sha256(texts),
        "model_sha256": folder_identity(settings.model),
    }
    folder = RunFolder(Path(out), "plan.json", "results.json")
    folder.check(plan, overwrite=overwrite)
    with folder.claimed(plan, overwrite=overwrite):
        adapters = folder.path / "adapters"
        base = functools.cache(lambda: Base(settings.model, texts, settings.drift_tokens))
        bare = folder.stage("base", lambda: _success(base().model, base().tokenizer, sets))
        records = {}
        for name, method in methods.items():
            parts = [adapters / f"{slug(name)}-{slug(part.name)}" for part in sets]
            merged = adapters / f"{slug(name)}-merged"
            alone = [
                folder.stage(
                    f"{slug(name)}-{slug(part.name)}",
                    functools.partial(_edit, base, settings, method, part, adapter),
                )
                for part, adapter in zip(sets, parts, strict=True)
            ]
            after = folder.stage(f"{slug(name)}-merged", functools.partial(_merge, base, sets, parts, merged))
            records[name] = {"settings": method, "alone": alone, "merged": after}
        results = {
            "schema": 2,
            "kind": "demo",
            "title": f"{sum(len(part) for part in sets)} facts edited in two sets, trained apart and added together",
            "model": settings.model,
            "settings": asdict(settings),
            "base": bare["success"],
            "methods": records,
            "notes": [
                "An edit works if the new answer is more probable than the old one; reworded: asked in other words.",
                ONE_RUN,
            ],
            "provenance": provenance(plan_sha256=json_sha256(plan)),
        }
        _write_report(results, folder.path / "report.html")
        write_atomic(folder.path / "results.json", json.dumps(results, indent=1) + "\n")
    return results


def summary(results: Results) -> "pd.DataFrame":
    """Return the results as a table, a row a method and the base model first."""
    import pandas as pd

    base = results["base"]
    rows: list[Results] = [
        {
            "method": "base",
            "edits that work alone": _share(base, "works"),
            "reworded": _share(base, "reworded"),
        }
    ]
    for name, record in results["methods"].items():
        alone, merged = record["alone"], record["merged"]
        before = {key: flags for part in alone for key, flags in part["success"].items()}
        rows.append(
            {
                "method": name,
                "edits that work alone": _share(before, "works"),
                "reworded": _share(before, "reworded"),
                "work merged": _share(merged["success"], "works"),
                "of those that worked alone": f"{survival(before, merged['success']):.0%}",
                "KL of one": _mean_kl(alone),
                **{f"KL merged, {text}": found["kl"] for text, found in merged["drift"].items()},
                "trainable parameters": f"{alone[0]['trainable_parameters']:,}",
                "seconds": round(sum(part["seconds"] for part in alone), 1),
            }
        )
    return pd.DataFrame(rows)


def survival(before: Mapping[str, Results], after: Mapping[str, Results]) -> float:
    """Return the share of the edits that worked alone and still work after the merge; NaN if none did."""
    kept = [
        later
        for name, success in before.items()
        for earlier, later in zip(success["works"], after[name]["works"], strict=True)
        if earlier
    ]
    return sum(kept) / len(kept) if kept else float("nan")


def _success(model: Any, tokenizer: Any, sets: Sequence[EditSet]) -> Results:
    """Return which edits of which set a model makes: as trained on, and reworded."""
    from hiplora.editing.measure import answer_log_probs

    def works(prompts: Sequence[str], part: EditSet) -> list[bool]:
        asked = zip(prompts, part.edits, strict=True)
        sums = answer_log_probs(
            model, tokenizer, [(prompt, answer) for prompt, edit in asked for answer in (edit.new, edit.old)]
        )
        return [new > old for new, old in zip(sums[::2], sums[1::2], strict=True)]

    return {
        "success": {
            part.name: {
                "works": works([edit.prompt for edit in part.edits], part),
                "reworded": works([edit.paraphrase for edit in part.edits], part),
            }
            for part in sets
        }
    }


def _edit(
    base: Callable[[], Base], settings: DemoSettings, method: Mapping[str, Any], part: EditSet, adapter: Path
) -> Results:
    """Train one set with one method, save the adapter and measure it."""
    from hiplora.editing import EditTraining, train_edits
    from hiplora.training.adapt import put_on, save_trained
    from hiplora.training.methods import METHODS

    model, tokenizer = base().model, base().tokenizer
    calibration = {"calibration_tokens": CALIBRATION_TOKENS} if method["name"] == "hiplora" else {}
    chosen = METHODS[method["name"]].model_validate({**method, **calibration})
    adapted = put_on(chosen, model, tokenizer, seed=settings.seed)
    training = EditTraining(settings.steps, settings.lr, settings.batch_size, seed=settings.seed)
    result = train_edits(adapted, tokenizer, part.edits, training)
    parameters = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    with staged_dir(adapter, overwrite=True) as staged:
        save_trained(chosen, adapted, staged)
    base().model = adapted.unload()
    return {
        "trainable_parameters": parameters,
        "seconds": result["seconds"],
        "curve": result["loss"],
        **base().measure(adapter, lambda adapted: _success(adapted, tokenizer, [part])),
    }


def _merge(base: Callable[[], Base], sets: Sequence[EditSet], parts: Sequence[Path], merged: Path) -> Results:
    """Add a method's adapters, save the sum as a plain LoRA, check that it is exact, and measure it."""
    from hiplora.merging import merge, save_merged

    report = save_merged(merge(parts, "addition"), merged, overwrite=True)
    measured = base().measure(merged, lambda adapted: _success(adapted, base().tokenizer, sets))
    return {"rank": max(report.ranks.values()), "export_error": report.worst[1], **measured}


def _share(success: Mapping[str, Results], which: str) -> str:
    flags = [flag for part in success.values() for flag in part[which]]
    return f"{sum(flags)} of {len(flags)}"


def _mean_kl(records: Sequence[Results]) -> float:
    found = [text["kl"] for record in records for text in record["drift"].values()]
    return sum(found) / len(found)


def _write_report(results: Results, path: Path) -> None:
    import pandas as pd

    from hiplora.reporting import Section, plots, save_page

    drift = pd.DataFrame(
        [
            {"method": name, "stage": stage, "kl": _mean_kl(parts)}
            for name, record in results["methods"].items()
            for stage, parts in (("alone", record["alone"]), ("merged", [record["merged"]]))
        ]
    )
    text = (
        "Two sets of facts are edited into the model, each trained apart with each method; then the two adapters of a "
        "method are added together and saved as a plain LoRA adapter. Drift is on text that has nothing to do with the "
        "edits: KL divergence from the base model, in nats per token.\n\n" + "\n\n".join(results["notes"])
    )
    bars = plots.bars(drift, "kl", "stage", "method", xlabel="KL", logx=True)
    figures = {"Drift from the base model, nats per token": bars}
    section = Section("Edits and drift, alone and merged", text, {"Methods": summary(results)}, figures)
    about = {"model": results["model"], "settings": results["settings"], **results["provenance"]}
    save_page(path, results["title"], [section], f"Base model {results['model']}", about)
