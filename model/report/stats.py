"""Are two groups of runs different? Means, standard deviations and Welch's t test.

The groups are a few runs that differ by their seed alone, so their variances are estimated separately (Welch 1947):

    t = (mean_a - mean_b) / sqrt(va + vb)          va = sd_a^2 / n_a, likewise vb
    df = (va + vb)^2 / (va^2 / (n_a - 1) + vb^2 / (n_b - 1))

The tail of the t distribution is an incomplete beta function, which Python, NumPy and torch do not have; SciPy would be
a large dependency for this one number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

RECORD_NATS = 0.005  # a record must be better than the one before by so much, in nats per token
RECORD_P = 0.01


@dataclass(frozen=True)
class Summary:
    """count, mean and sample standard deviation (nan for a single value)."""

    count: int
    mean: float
    sd: float


@dataclass(frozen=True)
class Welch:
    """a - b: the difference of the means, t, degrees of freedom, and the two-sided p of there being none."""

    difference: float
    t: float
    df: float
    p: float


def summarize(values: Sequence[float]) -> Summary:
    """Raises ValueError for no values."""
    count = len(values)
    if not count:
        raise ValueError("values: got none, wanted at least one")
    mean = math.fsum(values) / count
    squares = math.fsum((value - mean) ** 2 for value in values)
    return Summary(count, mean, math.sqrt(squares / (count - 1)) if count > 1 else math.nan)


def welch(a: Sequence[float], b: Sequence[float], shift: float = 0.0, *, one_sided: bool = False) -> Welch | None:
    """Welch's test of mean(a) = mean(b) + `shift`; `one_sided`: of mean(a) >= mean(b) + `shift`.

    None where it says nothing: a group of one value, or two groups without any variance.
    """
    left, right = summarize(a), summarize(b)
    if left.count < 2 or right.count < 2:
        return None
    va, vb = left.sd**2 / left.count, right.sd**2 / right.count
    if va + vb == 0.0:
        return None
    t = (left.mean - right.mean - shift) / math.sqrt(va + vb)
    df = (va + vb) ** 2 / (va**2 / (left.count - 1) + vb**2 / (right.count - 1))
    p = t_tail(-t, df) if one_sided else 2.0 * t_tail(abs(t), df)
    return Welch(left.mean - right.mean, t, df, p)


def t_tail(t: float, df: float) -> float:
    """P(T > t) of Student's t distribution with `df` > 0 degrees of freedom (relative error about 1e-12)."""
    if not df > 0:
        raise ValueError(f"df: got {df}, wanted a number above 0")
    tail = 0.5 * _incomplete_beta(0.5 * df, 0.5, df / (df + t * t))
    return tail if t >= 0 else 1.0 - tail


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised I_x(a, b), by its continued fraction where that converges quickly (DLMF 8.17.22)."""
    if x <= 0.0 or x >= 1.0:
        return float(x >= 1.0)
    if x > (a + 1.0) / (a + b + 2.0):
        return 1.0 - _incomplete_beta(b, a, 1.0 - x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    # Lentz's method: c and d are ratios of successive numerators and denominators.
    tiny = 1e-300
    c, d = 1.0, 1.0 / (1.0 - (a + b) * x / (a + 1.0) or tiny)
    value = d
    for m in range(1, 1000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for coefficient in (even, odd):
            d = 1.0 / (1.0 + coefficient * d or tiny)
            c = 1.0 + coefficient / c or tiny
            value *= c * d
        if abs(c * d - 1.0) < 1e-15:
            break
    return math.exp(log_front) * value / a
