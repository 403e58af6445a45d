import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hiplora.adapters import AdapterUpdate
from hiplora.merging.conflict import RANK_TOLERANCE, conflicts, merge_report
from tests import reference
from tests.unit.merging.terms import lora_term


def update(source="adapter", **factors):
    """An update of the modules named."""
    return AdapterUpdate("base", "lora", {}, factors, source=source)


def random_pair(m, n, rank, seed):
    return lora_term(seed, m=m, n=n, rank=rank).factors


def view(record):
    """A record as an object, its lists as tuples, so that tests read like formulas."""
    if isinstance(record, dict):
        return SimpleNamespace(**{key: view(value) for key, value in record.items()})
    return tuple(map(view, record)) if isinstance(record, list) else record


def only(pairs, weights=None):
    """The one row of updates that share one module."""
    (row,) = conflicts([update(q=pair) for pair in pairs], weights or [1.0] * len(pairs))
    return view(row)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_an_update_of_zero_is_compared_with_nothing(weight):
    A, B = random_pair(6, 5, 2, 0)
    row = only([(A, B), (A, B * (1 - weight)), (A, 2 * B)], [1.0, weight, 1.0])
    assert [(pair.adapters, pair.cosine) for pair in row.pairs] == [((0, 2), pytest.approx(1))]
    row = only([(A, 0 * B), (A, 0 * B)])
    assert (row.norm_ratio, row.unrelated, row.sign_conflict, row.score) == (None, None, None, None)


@st.composite
def cases(draw):
    """Two to four updates of one shape whose subspaces share some directions, and their weights."""
    m, n, count = draw(st.integers(1, 12)), draw(st.integers(1, 12)), draw(st.integers(2, 4))
    shared = random_pair(m, n, draw(st.integers(1, 3)), draw(st.integers(0, 1000)))
    pairs = []
    for _ in range(count):
        own = random_pair(m, n, draw(st.integers(1, 4)), draw(st.integers(0, 1000)))
        scale = draw(st.sampled_from([0.0, 1.0, -2.0]))
        pairs.append((torch.cat([own[0], shared[0]]), torch.cat([own[1], scale * shared[1]], dim=1)))
    weights = draw(st.lists(st.floats(-3, 3).filter(lambda w: abs(w) > 0.05), min_size=count, max_size=count))
    return pairs, weights


def far_from_the_tolerance(matrix):
    sigma = torch.linalg.svdvals(matrix)
    shares = sigma / sigma[0]
    return bool(((shares < 1e-12) | (shares > 3 * RANK_TOLERANCE)).all())


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(cases())
def test_every_number_is_that_of_the_dense_updates(case):
    pairs, weights = case
    matrices = [w * B.double() @ A.double() for w, (A, B) in zip(weights, pairs, strict=True)]
    assume(all(far_from_the_tolerance(matrix) for matrix in matrices))
    row = only(pairs, weights)
    norms = [matrix.norm().item() for matrix in matrices]
    assert row.norms == pytest.approx(norms, rel=1e-6)
    assert row.sum_norm == pytest.approx(sum(matrices).norm().item(), rel=1e-6, abs=1e-6 * sum(norms))
    assert row.norm_ratio == pytest.approx(row.sum_norm / sum(norms))
    assert row.unrelated == pytest.approx(math.hypot(*norms) / sum(norms))
    assert row.sign_conflict == pytest.approx(reference.cancelled_share(matrices), abs=1e-5)
    for pair, (i, j) in zip(row.pairs, itertools.combinations(range(len(pairs)), 2), strict=True):
        one, other = matrices[i], matrices[j]
        assert pair.score == pytest.approx(math.sqrt(pair.left.mean * pair.right.mean) * (1 - pair.cosine) / 2)
        assert pair.cosine == pytest.approx((one * other).sum().item() / (norms[i] * norms[j]), abs=1e-6)
        for side, (a, b) in ((pair.left, (one, other)), (pair.right, (one.T, other.T))):
            mean, _ = reference.overlap(a, b, RANK_TOLERANCE)
            assert side.mean == pytest.approx(mean, abs=1e-4)


def along(direction, size=1.0):
    """The rank-one update that writes to one direction what it reads from it."""
    E = torch.eye(4)
    return E[[direction]], size * E[:, [direction]]


def test_the_report_compares_modules_among_the_adapters_that_have_them_and_takes_all_as_one_vector():
    """Norms 3, √2 and √(1 + 1/4) apart; together 2 in layer 2, 2 in v, 1/2 in o; of 6.5 in magnitude 2 cancel."""
    named = {
        "one": update("one", **{"layers.2.q": along(0, 3.0)}),
        "two": update("two", **{"layers.10.v": along(1), "layers.2.q": along(0, -1.0)}),
        "three": update("three", **{"layers.10.v": along(1, 2.0), "o": along(2)}),
    }
    report = json.loads(json.dumps(merge_report(named, [1.0, 1.0, 0.5], {"method": "addition"})))
    assert (report["schema"], report["kind"], report["base"]) == (1, "merge-report", "base")
    assert [(row["module"], row["layer"], row["adapters"], len(row["pairs"])) for row in report["modules"]] == [
        ("layers.2.q", 2, [0, 1], 1),
        ("layers.10.v", 10, [1, 2], 1),
        ("o", None, [2], 0),
    ]
    assert report["most_conflicting"] == ["layers.2.q"]
    assert report["cosine"] == [[None, -1.0, None], [-1.0, None, 1.0], [None, 1.0, None]]
    totals, apart = report["totals"], 3 + math.sqrt(2) + math.sqrt(1 + 0.25)
    assert totals["norm_ratio"] == pytest.approx(math.sqrt(4 + 4 + 0.25) / apart)
    assert totals["unrelated"] == pytest.approx(math.sqrt(9 + 2 + 1.25) / apart)
    assert totals["sign_conflict"] == pytest.approx(2 / 6.5)
    assert (totals["modules"], totals["shared"]) == (3, 2)
    assert (totals["left"], totals["right"], totals["cosine"]) == pytest.approx((1, 1, 0))
