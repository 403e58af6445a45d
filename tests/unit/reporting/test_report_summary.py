import io
import math

import pytest
from rich.console import Console

from hiplora.reporting.averages import common_texts, mean_kl, mean_success
from hiplora.reporting.results import read_inspection, read_results
from hiplora.reporting.summary import inspection_rows, sections, tiles
from hiplora.reporting.terminal import print_summary
from tests.unit.reporting import report_samples as samples


def rows(raw):
    return {row.label: row for section in sections(read_results(raw)) for row in section.rows}


def test_the_best_value_follows_the_direction_of_the_line():
    found = rows(samples.demo_results())
    assert found["built-in prose: KL, nats per token"].best == {"HiP-LoRA"}
    assert found["Survive the merge"].best == {"HiP-LoRA"}
    assert found["Training time"].best == {"LoRA"}
    assert found["Held-out loss after"].best == {"LoRA"}
    assert found["Trainable parameters"].best == frozenset()


def test_values_within_a_per_cent_have_no_winner():
    raw = samples.compare_results()
    raw["methods"]["HiP-LoRA"]["heldout_loss_after"] = 1.413
    assert rows(raw)["Held-out loss after"].best == frozenset()


def test_a_finite_value_beats_an_infinite_one():
    raw = samples.compare_results()
    raw["methods"]["LoRA"]["heldout_loss_after"] = math.inf
    row = rows(raw)["Held-out loss after"]
    assert row.texts["LoRA"] == "∞"
    assert row.best == {"HiP-LoRA"}


def test_a_line_that_nobody_measured_is_left_out_and_a_gap_is_shown():
    raw = samples.compare_results()
    for method in raw["methods"].values():
        method["peak_memory_bytes"] = None
    raw["methods"]["LoRA"]["seconds"] = math.nan
    found = rows(raw)
    assert "Peak memory" not in found
    assert found["Training time"].texts["LoRA"] == "—"
    assert found["Training time"].best == frozenset()
    assert found["Tokens per second"].texts == {"LoRA": "—", "HiP-LoRA": "612"}


def test_tiles_answer_the_question_of_their_kind():
    demo = [tile.title for tile in tiles(read_results(samples.demo_results()))]
    compare = {tile.title: tile for tile in tiles(read_results(samples.compare_results()))}
    assert demo == [
        "Edits that work alone",
        "Edits that work after the merge",
        "Edits that survive the merge",
        "Drift of the merge",
    ]
    assert list(compare) == ["Held-out loss", "Drift", "Perplexity on other text", "Training time"]
    assert compare["Drift"].lengths["LoRA"] == 1.0
    assert compare["Drift"].lengths["HiP-LoRA"] == pytest.approx(0.0124 / 0.081)


def test_lengths_of_a_tile_stay_between_nothing_and_full():
    raw = samples.compare_results()
    raw["methods"]["LoRA"]["drift"]["built-in prose"] = {"kl": math.inf, "perplexity_ratio": 0.9}
    for tile in tiles(read_results(raw)):
        assert all(0 <= length <= 1 for length in tile.lengths.values())


def test_means_of_drift_are_taken_over_the_texts_that_all_methods_have():
    raw = samples.compare_results()
    raw["methods"]["LoRA"]["drift"]["extra"] = {"kl": 100.0}
    raw["methods"]["PiSSA"] = {}
    drifts = {method.name: method.drift for method in read_results(raw).methods}
    assert common_texts(drifts, lambda row: row.kl) == list(samples.TEXTS)
    assert mean_kl(drifts) == {
        "LoRA": pytest.approx(0.1215),
        "HiP-LoRA": pytest.approx(0.0186),
        "PiSSA": None,
    }


def test_success_is_weighted_by_the_size_of_the_sets():
    assert mean_success({"a": 1.0, "b": 0.0}, {"a": 30.0, "b": 10.0}) == 0.75
    assert mean_success({"a": 1.0, "b": None}, {"a": 30.0, "b": 10.0}) is None
    assert mean_success({}, {}) is None


def test_stricter_counts_of_edits_are_shown_where_they_were_taken():
    raw = samples.demo_results()
    assert "Exact answer, merged" not in rows(raw)
    run = raw["edits"]["methods"]["HiP-LoRA"]
    run["merged"] |= {"exact": {"capitals": 0.5, "inventions": 0.25}, "survival_exact": 0.4}
    for single, share in zip(run["single"], (1.0, 0.5), strict=True):
        single["paraphrase"] = share
    found = rows(raw)
    assert found["Exact answer, merged"].texts == {"LoRA": "—", "HiP-LoRA": "38\u00a0%"}
    assert found["Paraphrased prompt, alone"].texts["HiP-LoRA"] == "75\u00a0%"
    assert found["Exact answers that survive the merge"].texts["HiP-LoRA"] == "40\u00a0%"


def test_the_terminal_shows_numbers_verdict_and_notes_without_reading_markup():
    raw = samples.demo_results(title="[red]title", notes=["a [bold]note"])
    stream = io.StringIO()
    print_summary(raw, Console(file=stream, width=120, force_terminal=False))
    text = stream.getvalue().replace("\u00a0", " ")
    assert "[red]title" in text
    assert "a [bold]note" in text
    assert "Survive the merge ↑" in text
    assert "Added together, HiP-LoRA's adapters kept 84 % of their edits, LoRA's 29 %." in text
    assert all(len(line) <= 120 for line in text.splitlines())


def test_an_empty_result_prints_its_verdict_alone(capsys):
    print_summary({"schema": 1, "kind": "compare"})
    assert capsys.readouterr().out.strip() == "Nothing was measured."


def test_the_facts_of_an_inspection_leave_out_what_is_unknown():
    raw = samples.inspection(principal_rank=None)
    raw["modules"][3]["leak"] = 3e-7
    facts = dict(inspection_rows(read_inspection(raw)))
    assert facts["Modules"] == "120"
    assert "Protected directions per module (k)" not in facts
    assert facts["Largest leak of the residual channel"] == "3.00\u00a0×\u00a010⁻⁷"
