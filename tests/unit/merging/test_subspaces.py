import math

import pytest
import torch

from hiplora.merging import subspaces
from hiplora.merging.subspaces import cancelled, compress, inner_product, norm_of_sum, overlap, spaces


def rank_one(column, row):
    """The update `column rowᵀ` as factors (A, B)."""
    return torch.tensor([row]), torch.tensor(column).unsqueeze(1)


def random_pair(m, n, rank, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, n, generator=generator), torch.randn(m, rank, generator=generator)


def on_both_sides(one, other):
    a, b = spaces(one), spaces(other)
    return overlap(a.outputs, b.outputs, one[1].shape[0]), overlap(a.inputs, b.inputs, one[0].shape[1])


def test_two_lines_at_sixty_and_thirty_degrees():
    """cos²60° = 1/4 between what they write, cos²30° = 3/4 between what they read, whatever their sizes."""
    half, root = 0.5, math.sqrt(3) / 2
    one = rank_one([1.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0])
    other = rank_one([3 * half, 3 * root, 0.0], [0.0, -root, half, 0.0])
    left, right = on_both_sides(one, other)
    assert left.mean == pytest.approx(1 / 4)
    assert left.largest_cosine == pytest.approx(1 / 2)
    assert right.mean == pytest.approx(3 / 4)
    assert right.largest_cosine == pytest.approx(root)
    assert (left.chance, right.chance) == (1 / 3, 1 / 4)


def test_planes_that_share_one_direction_overlap_by_half():
    e = torch.eye(4)
    left, right = on_both_sides((e[[0, 1]], e[:, [0, 1]]), (e[[1, 2]], e[:, [2, 3]]))
    assert (left.mean, left.largest_cosine) == (0, 0)
    assert (right.mean, right.largest_cosine) == pytest.approx((0.5, 1))


def test_a_line_in_a_plane_overlaps_it_wholly():
    e = torch.eye(3)
    left, _ = on_both_sides((e[[0, 1]], e[:, [0, 1]]), rank_one([1.0, 1.0, 0.0], [1.0, 0.0, 0.0]))
    assert left.mean == pytest.approx(1)
    assert left.chance == pytest.approx(2 / 3)


def test_an_update_of_zero_has_no_subspace():
    A, _ = random_pair(5, 6, 2)
    nothing = spaces((A, torch.zeros(5, 2)))
    assert (nothing.rank, nothing.norm) == (0, 0)
    assert overlap(nothing.outputs, spaces(random_pair(5, 6, 2)).outputs, 5) is None


def test_terms_that_cancel_up_to_rounding_are_an_update_of_zero():
    A, B = random_pair(40, 50, 8)
    assert spaces((torch.cat([A, A]), torch.cat([B, -B * (1 + 1e-9)], dim=1))).rank == 0


def test_directions_of_a_millionth_of_the_energy_do_not_count():
    e = torch.eye(4)
    scales = torch.tensor([1.0, 2e-3, 5e-4])
    assert spaces((e[:3], e[:, :3] * scales)).rank == 2


def test_a_rank_beyond_the_matrix_is_no_more_than_the_matrix_has():
    assert spaces(random_pair(3, 8, 6)).rank == 3
    small = compress([random_pair(3, 8, 6), random_pair(3, 8, 6, seed=1)])
    assert all(spaces(pair).rank == 3 for pair in small)


def test_compressed_updates_have_the_same_geometry():
    pairs = [random_pair(30, 20, rank, seed=rank) for rank in (2, 3, 4)]
    small = compress(pairs)
    dense = [B.double() @ A.double() for A, B in pairs]
    assert all(B.shape[0] == 9 == A.shape[1] for A, B in small)
    for i in range(3):
        for j in range(3):
            assert inner_product(small[i], small[j]) == pytest.approx((dense[i] * dense[j]).sum().item())
    assert norm_of_sum(small) == pytest.approx(sum(dense).norm().item())
    whole = on_both_sides(pairs[0], pairs[1])
    a, b = spaces(small[0]), spaces(small[1])
    assert overlap(a.outputs, b.outputs, 30).mean == pytest.approx(whole[0].mean, abs=1e-12)
    assert overlap(a.inputs, b.inputs, 20).mean == pytest.approx(whole[1].mean, abs=1e-12)


def test_what_cancels_by_hand():
    """[[3, 0], [1, 4]] and [[-1, 2], [1, -4]]: of 16 there is 3 − 1 + 2 + 2 + 0 = 6 left."""
    identity = torch.eye(2)
    one = identity, torch.tensor([[3.0, 0.0], [1.0, 4.0]])
    other = identity, torch.tensor([[-1.0, 2.0], [1.0, -4.0]])
    assert cancelled([one, other]) == (10, 16)


def test_rows_taken_a_few_at_a_time_give_the_same_sums(monkeypatch):
    pairs = [random_pair(23, 7, 3, seed) for seed in range(3)]
    whole = cancelled(pairs)
    for chunk in (1, 14, 100):
        monkeypatch.setattr(subspaces, "_CHUNK", chunk)
        assert cancelled(pairs) == pytest.approx(whole, rel=1e-6)


def test_what_is_held_of_the_dense_updates_does_not_grow_with_them(monkeypatch):
    """At most the budget of entries, or one row: watched through the products that are formed."""
    formed = []
    product = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: formed.append(product(a, b)) or formed[-1])
    monkeypatch.setattr(subspaces, "_CHUNK", 64)
    cancelled([random_pair(50, 16, 2, seed) for seed in range(4)])
    assert {part.numel() for part in formed} == {64, 32}
