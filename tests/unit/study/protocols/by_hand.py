"""Results made by hand, put into a store as if jobs had found them."""

from hiplora.study.builder import Study
from hiplora.study.pico import PICO_DATA
from hiplora.study.protocols import sections
from hiplora.study.recipe import load_study
from hiplora.study.store import Place

TWO_DOMAINS = (
    "domains={sums: {title: Sums, train: {path: gsm8k_train.jsonl, held_out_fraction: 0.1}, tasks: {gsm8k: 2}}, "
    "facts: {title: Facts, train: {path: alpaca.jsonl, held_out_fraction: 0.1}, tasks: {mmlu: 2}}}",
    "rates=null",
)


def study_of(folder, protocols, *changes):
    """A study over pico's data with some protocols, and an empty store."""
    changes = (*(changes or TWO_DOMAINS), f"protocols={{{protocols}}}")
    study = Study(load_study("pico", changes), Place(folder / "store", "pico", PICO_DATA))
    return study, study.store


def finish(store, job, found, **timing):
    """Store what a job found."""
    store.finish(job, found, {"seconds": 1.0, **timing}, artifact=False)


def scored(tasks, drift=None):
    """What `evaluate` and `merge` find: task → items (the same in both forms), text → KL."""
    found = {task: {"score": items, "likelihood": items} for task, items in tasks.items()}
    drifts = drift and {text: {"kl": kl, "perplexity_ratio": 1 + kl} for text, kl in drift.items()}
    return {"tasks": found, "drift": drifts}


def trained(parameters=100, before=2.0, after=1.0, curve=((1, 2.0), (2, 1.0))):
    """What `train` finds."""
    return {
        "steps": 6,
        "tokens": 1000,
        "trainable_parameters": parameters,
        "held_out_before": before,
        "held_out_after": after,
        "curve": [list(point) for point in curve],
    }


def jobs(study, settings):
    """What a protocol asks for."""
    return list(dict.fromkeys(job for job, _ in settings.runs(study)))


def fill(study, settings, found):
    """Store what `found` says of each job and its labels, and a training for each adapter; return the findings."""
    for job, labels in settings.runs(study):
        finish(study.store, job, found(job, labels))
        if "adapter" in job.needs:
            finish(study.store, job.needs["adapter"], trained())
    return tables(study)


def tables(study):
    """What the one protocol makes of a study's results, read anew."""
    (found,) = sections(Study(study.recipe, study.place))
    return found


def row(found, metric, method, **labels):
    """The one measurement that fits."""
    numbers = found.measured
    fits = (numbers.metric == metric) & (numbers.method == method)
    for name, value in labels.items():
        fits &= numbers[name] == value
    assert fits.sum() == 1, numbers[fits]
    return numbers[fits].iloc[0]


def table(found, name):
    """One of the tables."""
    return found.tables[name][1]
