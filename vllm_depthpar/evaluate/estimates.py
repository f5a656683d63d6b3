"""Figures of samples, with how far off they may be: JSON-ready."""

from __future__ import annotations

import math
from collections.abc import Sequence

# Standard errors of a 95 % interval.
_Z = 1.96


def mean_per_token(sums: Sequence[float], tokens: Sequence[int]) -> dict[str, float]:
    """Estimate a mean per token, answers taken as independent.

    Args:
        sums: over the tokens of each answer.
        tokens: of each answer; one or more altogether.

    Returns:
        "value", and "stderr", that of a ratio of sums; 0 for a single answer.
    """
    count, total = len(sums), sum(tokens)
    value = sum(sums) / total
    if count < 2:
        return {"value": value, "stderr": 0.0}
    off = sum((part - value * size) ** 2 for part, size in zip(sums, tokens, strict=True))
    return {"value": value, "stderr": math.sqrt(off * count / (count - 1)) / total}


def share(right: int, count: int) -> dict[str, float]:
    """Estimate a probability from `right` of `count`, which is one or more.

    Returns:
        "value", and "low" and "high" of Wilson's interval for 95 %, which is none of zero width
        where all or none are right.
    """
    value = right / count
    spread = _Z**2 / count
    middle = (value + spread / 2) / (1 + spread)
    half = _Z * math.sqrt(value * (1 - value) / count + spread / (4 * count)) / (1 + spread)
    return {"value": value, "low": max(0.0, middle - half), "high": min(1.0, middle + half)}
