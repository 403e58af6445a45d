"""Results of edits made by hand, for the tests of the section on editing."""

from hiplora.study.protocols import editing
from tests.unit.study.protocols.made import finish, made_study

CHANGES = (
    "rates=null",
    "protocols={editing: {methods: [lora, hiplora], modes: [batch], alphaedit: {layers: [0]}, "
    "sets: {facts: {title: Facts}}, questions: 2, lr: {hiplora: 0.5}}}",
)
CATEGORIES = ("Relation/Fact", "Entity/Attribute", "Entity/Attribute", "Temporal/Numeric")


def records(index, success, paraphrase=None, exact=None, neighbours=None):
    """A stage's records of some edits: 0 and 1 for each."""
    exact = exact or [0] * len(index)
    return {
        "index": list(index),
        "category": [CATEGORIES[place] for place in index],
        "success": success,
        "preferred": success,
        "exact": exact,
        "paraphrase_success": paraphrase or [0] * len(index),
        "neighbours_kept": neighbours,
    }


def questions(correct=(1, 0), unchanged=(1, 0), log_prob=(-2.0, -3.0), edited=(-5.0, -5.0)):
    """What the model says to two unrelated questions, of which the base answers both right."""
    return {
        "correct_before": [1, 1],
        "correct": list(correct),
        "unchanged": list(unchanged),
        "log_prob_before": [-1.0, -1.0],
        "log_prob": list(log_prob),
        "edited_log_prob_before": [-6.0, -6.0],
        "edited_log_prob": list(edited),
    }


def edits(*stages, mode="batch", asked=None, kl=None):
    """What `edit` finds."""
    drift = None if kl is None else {"prose": {"kl": kl, "perplexity_ratio": 1.0}}
    return {"mode": mode, "stages": [{"records": one} for one in stages], "questions": asked, "drift": drift}


def run(found, settings, method, seed, name="facts", mode="batch"):
    """The one job of a method, seed, set and mode."""
    title = "AlphaEdit" if method == "alphaedit" else found.row(method).title
    wanted = f"edit {name} by {title}, {mode}, seed {seed}"
    (job,) = [job for job in editing.jobs(found, settings) if job.name == wanted]
    return job


def filled(tmp_path, made, *changes):
    """A study in whose store the runs are done: method → seed → what was found."""
    found, store = made_study(tmp_path, *(changes or CHANGES))
    settings = found.recipe.protocols.editing
    for method, seeds in made.items():
        for seed, result in seeds.items():
            finish(store, run(found, settings, method, seed, mode=result["mode"]), result)
    return found, settings, store
