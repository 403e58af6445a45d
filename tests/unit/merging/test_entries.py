import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils

from hiplora.merging.entries import keep_largest_, magnitude_of_rank, row_blocks, weighted_sum_

finite = st.floats(-(2.0**100), 2.0**100, width=32)
matrices = st.integers(1, 6).flatmap(
    lambda n: st.lists(st.lists(finite, min_size=n, max_size=n), min_size=1, max_size=6)
)


@settings(max_examples=100, deadline=None)
@given(matrices, st.data())
def test_the_magnitude_of_a_rank_is_that_of_the_sorted_entries(rows, data):
    delta = torch.tensor(rows)
    count = data.draw(st.integers(1, delta.numel()))
    expected = delta.abs().flatten().sort(descending=True).values[count - 1]
    assert magnitude_of_rank(delta, count) == expected.item()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.floats(0.001, 1.0), st.integers(0, 100))
def test_what_is_kept_is_what_peft_keeps(m, n, density, seed):
    delta = torch.randn(m, n, generator=torch.Generator().manual_seed(seed))
    expected = delta if density == 1 else merge_utils.prune(delta, density, "magnitude")
    assert torch.equal(keep_largest_(delta.clone(), density), expected)


def test_entries_of_just_the_last_magnitude_all_stay():
    delta = torch.tensor([[3.0, -2.0, 2.0, 1.0]])
    assert keep_largest_(delta, 0.5).tolist() == [[3.0, -2.0, 2.0, 0.0]]


def test_nothing_is_kept_where_the_share_is_less_than_an_entry():
    assert keep_largest_(torch.ones(2, 2), 0.2).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_it_works_in_place_and_over_several_blocks():
    delta = torch.randn(1500, 1000)
    expected = merge_utils.prune(delta, 0.2, "magnitude")
    assert keep_largest_(delta, 0.2) is delta
    assert torch.equal(delta, expected)


@pytest.mark.parametrize("shape", [(1, 3_000_000), (5, 7), (3000, 1000)])
@pytest.mark.parametrize("copies", [1, 8])
def test_blocks_cover_all_rows_once(shape, copies):
    slices = list(row_blocks(torch.Size(shape), copies))
    rows = [row for part in slices for row in range(part.start, part.stop)]
    assert rows == list(range(shape[0]))
    assert all(
        (part.stop - part.start) * shape[1] * copies <= max(1 << 20, shape[1] * copies) for part in slices
    )


def test_a_sum_without_terms_is_an_error():
    with pytest.raises(ValueError, match="no terms"):
        weighted_sum_([])
