import json
import math
from pathlib import Path

import pytest
import torch

from hiplora.adapters import AdapterUpdate, read_update
from hiplora.errors import ConfigError
from hiplora.merging.conflict import conflicts
from hiplora.merging.report import adapter_names, merge_report, most_conflicting, totals
from hiplora.provenance import file_sha256

E = torch.eye(4)
MERGED = {"schema": 1, "kind": "merge", "method": "addition"}


def update(source="adapter", **factors):
    return AdapterUpdate("base", "lora", {}, factors, source=source)


def along(column, row, size=1.0):
    """The rank-one update that writes to direction `column` what it reads from direction `row`."""
    return E[[row]], size * E[:, [column]]


def three():
    """Two that oppose each other in q, a third that meets only the second, in v."""
    return [
        update("one", q=along(0, 0, 3.0)),
        update("two", q=along(0, 0, -1.0), v=along(1, 1)),
        update("three", v=along(1, 1, 2.0), o=along(2, 2)),
    ]


def test_the_report_is_json_with_a_row_for_each_module():
    report = json.loads(json.dumps(merge_report(three(), [1.0, 1.0, 0.5], MERGED)))
    assert (report["schema"], report["kind"], report["base"]) == (1, "merge-report", "base")
    assert [row["module"] for row in report["modules"]] == ["o", "q", "v"]
    assert [(row["name"], row["weight"], row["method"], row["modules"]) for row in report["adapters"]] == [
        ("one", 1.0, "lora", 1),
        ("two", 1.0, "lora", 2),
        ("three", 0.5, "lora", 2),
    ]
    assert report["merge"] == MERGED
    assert report["provenance"].keys() >= {"time", "commit", "libraries", "machine"}


def test_pairs_are_means_over_the_modules_that_both_change():
    pairs = merge_report(three(), [1.0, 1.0, 0.5], MERGED)["pairs"]
    assert pairs["modules"] == [[None, 1, 0], [1, None, 1], [0, 1, None]]
    assert pairs["cosine"] == [[None, -1.0, None], [-1.0, None, 1.0], [None, 1.0, None]]
    assert pairs["left"][0] == [None, 1.0, None]
    two_modules = [update(q=along(0, 0), v=along(0, 0)), update(q=along(0, 0), v=along(1, 0))]
    pairs = merge_report(two_modules, [1.0, 1.0], MERGED)["pairs"]
    assert (pairs["left"][0][1], pairs["right"][0][1]) == (0.5, 1.0)


def test_totals_take_all_modules_as_one_vector():
    """Norms 3, √2 and √2 apart; together 2 in q, 2 in v, 1/2 in o; of 6.5 in magnitude 2 cancel, in q."""
    found = totals(conflicts(three(), [1.0, 1.0, 0.5]))
    apart = 3 + math.sqrt(2) + math.sqrt(1 + 0.25)
    assert found["norm_ratio"] == pytest.approx(math.sqrt(4 + 4 + 0.25) / apart)
    assert found["unrelated"] == pytest.approx(math.sqrt(9 + 2 + 1.25) / apart)
    assert found["sign_conflict"] == pytest.approx(2 / 6.5)
    assert (found["modules"], found["shared"]) == (3, 2)
    assert (found["left"], found["right"], found["cosine"]) == pytest.approx((1, 1, 0))
    assert (found["left_chance"], found["right_chance"]) == (0.25, 0.25)
    expected = (4 * (1 - math.sqrt(10) / 4) + 2 * (1 - math.sqrt(2) / 2)) / 6.5
    assert found["unrelated_sign_conflict"] == pytest.approx(expected)


def test_the_ten_most_conflicting_modules_come_worst_first():
    one = update(**{f"layers.{n}.q": along(0, 0) for n in range(14)})
    angles = {n: math.pi * n / 14 for n in range(14)}
    turned = {
        f"layers.{n}.q": (E[[0]], math.cos(a) * E[:, [0]] + math.sin(a) * E[:, [1]])
        for n, a in angles.items()
    }
    rows = conflicts([one, update(**turned)], [1.0, 1.0])
    found = most_conflicting(rows)
    scores = [row.worst.score for row in found]
    assert len(found) == 10
    assert scores == sorted(scores, reverse=True)
    assert found[0].module == "layers.13.q"
    assert "layers.0.q" not in [row.module for row in found]
    assert merge_report([one, update(**turned)], [1.0, 1.0], MERGED)["most_conflicting"] == [
        r.module for r in found
    ]


def test_modules_that_do_not_meet_are_not_listed_as_conflicting():
    assert (
        merge_report([update(q=along(0, 0)), update(q=along(1, 1))], [1.0, 1.0], MERGED)["most_conflicting"]
        == []
    )


@pytest.mark.parametrize("updates", [[update(q=along(0, 0))], [update(q=along(0, 0)), update(v=along(0, 0))]])
def test_without_a_pair_the_report_has_rows_and_no_comparison(updates):
    report = merge_report(updates, [1.0] * len(updates), MERGED)
    assert len(report["modules"]) == len(updates)
    assert report["most_conflicting"] == []
    assert report["totals"]["left"] is None
    assert report["totals"]["shared"] == 0
    assert all(value is None for row in report["pairs"]["cosine"] for value in row)


def test_nothing_to_merge_is_refused():
    with pytest.raises(ConfigError, match="at least one"):
        merge_report([], [], MERGED)


def test_names_are_short_and_distinct(tmp_path, monkeypatch):
    for name in ("a/medicine", "a/law", "b/law"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    named = lambda *sources: adapter_names([update(source) for source in sources])  # noqa: E731
    assert named("a/medicine", "a/law") == ["medicine", "law"]
    assert named("a/law", "b/law") == ["a/law", "b/law"]
    assert named("a/law/", "a/law/", "a/medicine") == ["law (1)", "law (2)", "medicine"]
    assert named("adapter 'x'", "addition of 1 × a/law, 1 × b/law") == [
        "adapter 'x'",
        "addition of 1 × a/law, 1 × b/law",
    ]
    monkeypatch.chdir(tmp_path / "a" / "law")
    assert named(".", "../medicine") == ["law", "medicine"]


def test_adapters_on_disk_are_named_with_the_hash_of_their_weights(adapters):
    report = merge_report([read_update(adapters[name]) for name in ("one", "lora")], [1.0, 1.0], MERGED)
    assert [row["name"] for row in report["adapters"]] == ["one", "lora"]
    file = Path(report["adapters"][1]["source"]) / "adapter_model.safetensors"
    assert report["adapters"][1]["sha256"] == file_sha256(file)
    assert merge_report([update(q=along(0, 0))], [1.0], MERGED)["adapters"][0]["sha256"] is None
