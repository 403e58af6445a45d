"""Results that are equal but for rounding."""

import math


def same(one, other):
    """Whether two results are equal, numbers up to rounding: what a product's last digits are may depend on where in
    memory a process happens to have its factors.
    """
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        return math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-6)
    return one == other
