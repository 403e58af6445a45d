"""Student's t: the interval of a mean of few values."""


def student_margin(sd: float, count: int) -> float:
    """Return half the width of the 95 % interval of a mean, in the unit of `sd`.

    Args:
        sd: standard deviation of the values, with count − 1 in its denominator.
        count: number of independent values, at least 2.
    """
    from scipy import stats

    return float(stats.t.ppf(0.975, count - 1)) * sd / count**0.5
