"""Tidy records, tables made of measurements, and the paper's values beside them."""

import pandas as pd

from hiplora.study.records import paper, paper_value, scored, table, tidy
from tests.unit.study.protocols.by_hand import finish, study_of, trained
from tests.unit.study.protocols.by_hand import scored as scores_by_hand


def test_every_number_of_a_job_is_a_row_with_the_jobs_labels(tmp_path):
    study, store = study_of(tmp_path, "single_task: {methods: [lora]}")
    adapter = study.adapter(study.row("lora"), "sums", 42)
    finish(store, adapter, trained())
    score = study.score(adapter)
    finish(store, score, scores_by_hand({"gsm8k": [10, 20]}, {"prose": 0.1}))
    labels = {adapter: {"method": "LoRA"}, score: {"method": "LoRA", "seed": 42}}
    rows = tidy([(job, store.record(job), label) for job, label in labels.items()])
    items = scored(rows)
    assert items[["form", "task", "item", "value", "seed"]].to_numpy().tolist() == [
        [form, "gsm8k", item, value, 42]
        for form in ("accuracy", "likelihood")
        for item, value in ((0, 10.0), (1, 20.0))
    ]
    assert rows[rows.metric == "kl"].value.tolist() == [0.1]
    assert rows[rows.metric == "loss"].dropna().set_index("item")["value"].to_dict() == {1: 2.0, 2: 1.0}
    assert set(rows.run) == {adapter.key, score.key}


def test_a_table_shows_intervals_and_the_papers_value_as_such_in_the_order_of_the_rows():
    rows = pd.DataFrame(
        [("LoRA", "Retain", 1.25, 0.5, 2.0), ("A", "Retain", 3.0, None, None)],
        columns=["method", "column", "estimate", "low", "high"],
    )
    shown = table(rows, paper="single-task")
    assert shown["Retain"].to_dict() == {"LoRA": "1.2 [0.5, 2.0] (paper: 12.3)", "A": "3.0"}


def test_the_papers_names_match_whatever_their_case_and_punctuation():
    assert paper_value("single-task", "hip-lora (Paper)", "RETAIN") == 4.9
    assert paper_value("single-task", "HiP-LoRA (paper)", "MMLU") is None
    assert paper_value("single-task", "HiP-LoRA", "Retain") is None  # the default is not the paper's
    assert {claim["claimed"] for claim in paper()["claims"].values()} == {"above", "below"}
