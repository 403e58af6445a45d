"""The record of a run: rows, means over the steps between them, and a resumed run's rows equal to the whole's."""

import json

import pytest

from hiplora.errors import HipLoraError
from hiplora.training.metrics import Record
from hiplora.training.result import read_metrics


def run(record, steps, losses=(1.0, 3.0)):
    for step in steps:
        for loss in losses:
            record.add_batch(step * loss, 10)
        if row := record.end_step(step, lr=0.1 * step):
            record.write(row)


def numbers(rows):
    return [{key: row[key] for key in ("step", "loss", "lr", "tokens")} for row in rows]


def test_a_row_has_the_mean_loss_and_all_tokens_so_far(tmp_path):
    record = Record(tmp_path, steps=4, log_every=2)
    run(record, [1, 2, 3, 4])
    assert numbers(read_metrics(tmp_path)) == [
        {"step": 2, "loss": 6.0, "lr": 0.2, "tokens": 40},
        {"step": 4, "loss": 14.0, "lr": 0.4, "tokens": 80},
    ]
    assert set(record.rows[0]) == {"step", "loss", "lr", "tokens", "tokens_per_second", "seconds"}
    assert 0 < record.rows[0]["seconds"] < record.rows[1]["seconds"]


def test_the_last_step_always_has_a_row(tmp_path):
    record = Record(tmp_path, steps=3, log_every=10)
    run(record, [1, 2, 3])
    assert [row["step"] for row in record.rows] == [3]


def test_a_resumed_record_goes_on_where_the_checkpoint_was_even_between_rows(tmp_path):
    whole = Record(tmp_path, steps=6, log_every=2)
    run(whole, range(1, 7))
    expected = numbers(whole.rows)
    (tmp_path / "metrics.jsonl").unlink()

    first = Record(tmp_path, steps=6, log_every=2)
    run(first, [1, 2, 3])
    first.save(tmp_path)
    run(first, [4, 5])  # after the checkpoint: lost
    second = Record(tmp_path, steps=6, log_every=2)
    second.restore(tmp_path)
    assert [row["step"] for row in read_metrics(tmp_path)] == [2]
    assert second.seconds == json.loads((tmp_path / "progress.json").read_text())["seconds"] > 0
    run(second, [4, 5, 6])
    assert numbers(second.rows) == numbers(read_metrics(tmp_path)) == expected


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_run_with_advice(tmp_path, loss):
    record = Record(tmp_path, steps=3, log_every=1)
    record.add_batch(loss, 10)
    with pytest.raises(HipLoraError, match=r"at step 2;.*Lower train\.lr"):
        record.end_step(2, 0.1)


def test_time_spent_elsewhere_is_not_training(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    record = Record(tmp_path, steps=2, log_every=1)
    now[0] = 5.0  # loading and measuring
    record.restart_clock()
    now[0] = 7.0
    record.add_batch(1.0, 10)
    row = record.end_step(1, 0.1)
    assert (row["seconds"], row["tokens_per_second"]) == (2.0, 5.0)


def test_whoever_watches_gets_each_row_with_the_number_of_steps(tmp_path):
    seen = []
    record = Record(tmp_path, steps=2, log_every=1, on_step=seen.append)
    run(record, [1, 2])
    assert [(row["step"], row["steps"]) for row in seen] == [(1, 2), (2, 2)]
    assert "steps" not in read_metrics(tmp_path)[0]
