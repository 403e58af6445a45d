import json

import pytest

from hiplora.errors import DataError
from hiplora.study.data import HELDOUT_LIMIT, hold_back, split_data
from tests.tiny import write_jsonl

ROWS = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(40)]


def names(rows):
    return {row["prompt"] for row in rows}


def test_the_split_depends_on_the_rows_and_not_on_their_order():
    kept, held = hold_back(ROWS, 0.25)
    kept_again, held_again = hold_back(ROWS[::-1], 0.25)
    assert len(held) == 10
    assert names(kept) | names(held) == names(ROWS)
    assert not names(kept) & names(held)
    assert names(held) == names(held_again)
    assert kept == kept_again[::-1]
    assert held != ROWS[:10]


def test_a_key_order_makes_no_other_row():
    turned = [{"completion": row["completion"], "prompt": row["prompt"]} for row in ROWS]
    assert names(hold_back(ROWS, 0.25)[1]) == names(hold_back(turned, 0.25)[1])


def test_equal_rows_are_never_on_both_sides():
    for fraction in (0.1, 0.25, 0.5, 0.9):
        kept, held = hold_back(ROWS[:6] * 5, fraction)
        assert not names(kept) & names(held)
        assert len(kept) + len(held) == 30


def test_at_most_256_rows_are_held_back():
    rows = [{"text": str(i)} for i in range(2000)]
    kept, held = hold_back(rows, 0.5)
    assert (len(kept), len(held)) == (2000 - HELDOUT_LIMIT, HELDOUT_LIMIT)


def test_both_parts_are_written_as_lines_that_read_back(tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", [{"text": "Grüße"}, *({"text": f"t{i}"} for i in range(9))])
    data = split_data(file, 0.2)
    data.write(tmp_path / "out")
    read = {
        name: [
            json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").read_text("utf-8").splitlines()
        ]
        for name in ("train", "heldout")
    }
    assert read == {"train": data.train, "heldout": data.heldout}
    assert (data.shape, data.source, len(data.sha256)) == ("text", "rows.jsonl", 64)


@pytest.mark.parametrize("rows", [ROWS[:1], ROWS[:1] * 5])
def test_data_that_cannot_be_split_is_an_error(tmp_path, rows):
    with pytest.raises(
        DataError, match=r"cannot be split.*--heldout-fraction 0\.1.*at least two rows that differ"
    ):
        split_data(write_jsonl(tmp_path / "rows.jsonl", rows), 0.1)


def test_a_row_without_its_fields_is_named(tmp_path):
    with pytest.raises(DataError, match="line 2"):
        split_data(write_jsonl(tmp_path / "rows.jsonl", [ROWS[0], {"prompt": "x"}]), 0.5)
