"""Results made by hand, put into a store as if jobs had found them."""

from hiplora.recipes.load_study import load_study
from hiplora.study.builder import Study
from hiplora.study.engine.store import Store
from hiplora.study.pico_data import write_pico_data
from hiplora.study.results import Results


def made_study(folder, *changes, recipe="pico"):
    """The study of a recipe over its own data, and an empty store."""
    data = folder / "data"
    data.mkdir(exist_ok=True)
    write_pico_data(data)
    return Study(load_study(recipe, changes), data), Store(folder / "store")


def finish(store, job, found, **timing):
    """Say that a job found something."""
    store.finish(job, found, {"seconds": 1.0, **timing}, artifact=False)


def scored(tasks, drift=None):
    """What `evaluate` and `merge` find: task → items (both forms alike) or (scores, likelihoods); text → KL."""
    found = {}
    for task, items in tasks.items():
        scores, likelihoods = items if isinstance(items, tuple) else (items, items)
        found[task] = {
            "metric": "acc",
            "form": "likelihood",
            "score": scores,
            "likelihood": likelihoods,
            "others": {},
        }
    drifts = (
        None if drift is None else {text: {"kl": kl, "perplexity_ratio": 1.0} for text, kl in drift.items()}
    )
    return {"tasks": found, "drift": drifts}


def trained(parameters=100, before=2.0, after=1.0, curve=()):
    """What `train` finds."""
    return {
        "steps": 6,
        "tokens": 1000,
        "trainable_parameters": parameters,
        "held_out_before": before,
        "held_out_after": after,
        "curve": [list(point) for point in curve],
        "warnings": [],
    }


def results(store):
    """The results of a store, read anew."""
    return Results(Store(store.path))


def table(section, name):
    """A section's table as row → column → cell."""
    found = next(one for one in section.tables if one.name == name)
    return {row: dict(zip(found.columns[1:], cells, strict=True)) for row, cells in found.rows}


def measured(section, metric, method, **fields):
    """The one measurement that fits."""
    found = [
        one
        for one in section.measurements
        if one.metric == metric
        and one.method == method
        and all(getattr(one, k) == v for k, v in fields.items())
    ]
    assert len(found) == 1, found
    return found[0]
