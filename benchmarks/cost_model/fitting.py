"""Least squares for constants that are positive: what the checks of the cost model fit with."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy

STEPS = 60
_SMALL = 1e-4
# An improvement that is not worth another step, relative.
_ENOUGH = 1e-9


def fit(
    residuals: Callable[[dict[str, float]], list[float]], start: Mapping[str, float]
) -> dict[str, float]:
    """The constants whose residuals have the least sum of squares (Levenberg-Marquardt).

    Args:
        residuals: for constants by name; as logarithms of ratios they make relative errors count.
        start: first guesses, all positive; they stay so, since what is searched is logarithms.
    """
    names = list(start)

    def at(point: numpy.ndarray) -> numpy.ndarray:
        return numpy.array(residuals(dict(zip(names, numpy.exp(point).tolist(), strict=True))))

    point = numpy.log([start[name] for name in names])
    now, damping = at(point), 1e-2
    for _ in range(STEPS):
        slopes = numpy.array(
            [(at(point + step) - now) / _SMALL for step in _SMALL * numpy.eye(len(names))]
        ).T
        square = slopes.T @ slopes
        # A constant without influence has no slope; the second term keeps it where it is.
        square += damping * (numpy.diag(numpy.diag(square)) + 1e-9 * numpy.eye(len(names)))
        move = numpy.clip(numpy.linalg.solve(square, -slopes.T @ now), -1, 1)
        after = at(point + move)
        if after @ after < now @ now:
            if now @ now - after @ after < _ENOUGH * (now @ now):
                point = point + move
                break
            point, now, damping = point + move, after, damping / 3
        else:
            damping *= 4
    return dict(zip(names, numpy.exp(point).tolist(), strict=True))
