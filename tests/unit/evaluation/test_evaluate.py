"""Intervals and verdicts of scores and of merges, and updates that are measured without a folder."""

from dataclasses import asdict

import numpy as np
import pytest
import torch

from hiplora.adapters import AdapterUpdate
from hiplora.errors import ConfigError
from hiplora.evaluation import Encoded, heldout_loss
from hiplora.evaluation.engine import TaskScores
from hiplora.evaluation.evaluate import Partial, collect, judge
from hiplora.evaluation.updates import choose_scale, measure_updates, search_scale, smallest_scale
from tests.tiny import tiny_llama, tiny_tokenizer


def test_scores_without_chance_give_verdicts_without_doubt():
    """Task `a` falls from 100 to 60, `b` from 50 to 49: fails where τ > 0.6; drops of 40 and 1."""
    verdict = judge([({"a": [100.0] * 4, "b": [50.0] * 4}, {"a": [60.0] * 4, "b": [49.0] * 4})])
    assert verdict["mean_drop"] == pytest.approx({"estimate": 20.5, "low": 20.5, "high": 20.5})
    for tau, row in verdict["merge_fail"].items():
        assert row["estimate"] == row["low"] == row["high"] == row["share"] == (1.0 if float(tau) > 0.6 else 0.0)


def test_merge_fail_is_the_share_of_merges_with_any_task_below():
    before = {"a": [100.0], "b": [100.0]}
    verdict = judge([(before, {"a": [95.0], "b": [95.0]}), (before, {"a": [100.0], "b": [50.0]})])
    assert verdict["merge_fail"]["0.9"]["estimate"] == 0.5


def test_the_interval_knows_how_uncertain_the_items_leave_it_and_items_stay_paired():
    """Before 50 %, after 45 %: exactly at τ = 0.9 on these items, and below it in about half of the redrawn ones."""
    before = np.random.default_rng(0).permutation([100.0, 0.0] * 100)
    after = before.copy()
    after[np.flatnonzero(before)[:10]] = 0.0
    failing = judge([({"a": before}, {"a": after})])["merge_fail"]["0.9"]
    assert (failing["estimate"], failing["low"], failing["high"]) == (0.0, 0.0, 1.0)
    assert 0.3 < failing["share"] < 0.7
    assert judge([({"a": before}, {"a": before})])["mean_drop"] == {"estimate": 0.0, "low": 0.0, "high": 0.0}


def test_scores_so_far_are_those_of_the_same_plan_in_a_file_that_is_whole(tmp_path):
    out, scores = tmp_path / "out.json", {"t": TaskScores("acc", [1.0], "likelihood", [0.5], {})}
    Partial(out, {"seed": 0}).add("base", scores)
    again = Partial(out, {"seed": 0})
    assert again.runs == {"base": {"t": asdict(scores["t"])}}
    assert not Partial(out, {"seed": 1}).runs
    for text in ("[", "[]", "3", '{"plan": 1}', "\xff"):
        (tmp_path / ".out.json.partial").write_text(text, encoding="latin-1")
        assert not Partial(out, {"seed": 0}).runs
    again.remove()
    assert not list(tmp_path.iterdir())


def collected(base, other):
    """The difference of two runs of a task by their items' scores, and the first run's own mean."""
    names = {"metric": "acc", "form": "likelihood", "others": {}}
    runs = {n: {"t": {**names, "score": items, "likelihood": None}} for n, items in (("a", base), ("b", other))}
    results = collect({"t": {}}, runs)
    return results["differences"]["t"]["score"][0], results["runs"]["a"]["t"]["score"]


@pytest.mark.parametrize(("count", "unseen"), [(1, 0.975), (4, 0.602), (400, 0.0092)])
def test_items_that_all_agree_have_an_interval_that_narrows_with_their_number(count, unseen):
    difference, mean = collected([100.0] * count, [100.0] * count)
    assert (mean["estimate"], mean["high"]) == (100, 100)
    assert mean["low"] == pytest.approx(100 - 100 * unseen, abs=0.1)
    assert (difference["low"], difference["high"]) == pytest.approx((-100 * unseen, 100 * unseen), abs=0.1)


@pytest.mark.parametrize(
    ("base", "other", "verdict"),
    [
        ([0.0, 100.0] * 300, [0.0, 100.0] * 300, "kept"),
        ([0.0, 100.0] * 300, [0.0, 0.0] * 300, "lost"),
        ([0.0, 100.0] * 300, [100.0, 100.0] * 300, "kept"),
        ([0.0, 100.0] * 5, [0.0, 100.0] * 4 + [100.0, 0.0], "cannot tell"),
        ([0.0, 100.0] * 2, [0.0, 100.0] * 2, "cannot tell"),
    ],
)
def test_a_verdict_says_lost_only_where_it_is_sure_and_kept_only_within_a_point(base, other, verdict):
    assert collected(base, other)[0]["verdict"] == verdict


@pytest.mark.parametrize("tolerance", [0.0, 0.01, 0.3, 5.0])
@pytest.mark.parametrize("best", [0.6, 1.0, 2.0])
def test_the_smallest_scale_within_the_tolerance_is_found(best, tolerance):
    def loss(scale):
        return 1 + (scale - best) ** 2

    search = smallest_scale(loss, tolerance)
    grid = [step / 64 for step in range(1, 65)]
    assert search["scale"] == min(scale for scale in grid if loss(scale) <= loss(1) + tolerance)
    assert {row["scale"]: row["loss"] for row in search["losses"]}[1.0] == loss(1.0)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [((0.5, 0.1, "rows"), "give one of them"), ((None, 0.1, None), "needs --data"), ((None, None, "x"), "--data: is")],
)
def test_options_that_do_not_go_together_are_refused(arguments, why):
    with pytest.raises(ConfigError, match=why):
        choose_scale(AdapterUpdate("", "lora", {}, {}), *arguments)
    with pytest.raises(ConfigError, match="tolerance is -1"):
        smallest_scale(lambda scale: scale, -1)


def test_a_search_and_a_measurement_leave_the_model_as_it_was():
    model, generator = tiny_llama(), torch.Generator().manual_seed(0)
    pair = torch.randn(2, 64, generator=generator), torch.randn(96, 2, generator=generator)
    update = AdapterUpdate("tiny", "lora", {}, {"model.layers.0.mlp.up_proj": pair})
    examples = [Encoded((1, 2, 3, 4, 5), (-100, 2, 3, 4, 5))]
    before = heldout_loss(model, examples)
    search = search_scale(model, update, examples, 0.05)
    texts = {"a": "some text to read " * 20}
    drift, losses = measure_updates(model, tiny_tokenizer(), {"whole": update}, texts, examples)
    assert heldout_loss(model, examples) == losses["base"] == before
    assert losses["whole"] == pytest.approx(search["losses"][-1]["loss"])
    assert drift["whole"]["a"]["kl"] > 0
