"""Which spans of layers can be changed, and how: the effective-depth study of the Layer Parallelism
paper (arXiv 2502.02790, section 3), with ladders beside it.

A transformation takes a span of consecutive layers and gives the steps that run in its place.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from vllm_depthpar.evaluate.steps import Step, Steps

Span = tuple[int, int]


def shuffle(span: Span) -> Steps:
    """The layers in a random order, the same one for a span each time."""
    layers = list(range(*span))
    # A span of two or more has another order than its own.
    random_order = random.Random(f"{span}")
    while layers == sorted(layers):
        random_order.shuffle(layers)
    return tuple(Step((layer,)) for layer in layers)


def prune(_: Span) -> Steps:
    """Nothing in their place."""
    return ()


def merge(span: Span) -> Steps:
    """One layer whose weights are the mean of theirs."""
    return (Step(tuple(range(*span)), merged=True),)


def parallel(span: Span) -> Steps:
    """All of them side by side."""
    return (Step(tuple(range(*span))),)


def pairs(span: Span) -> Steps:
    """Two by two side by side; of an odd span the last one alone."""
    start, end = span
    return tuple(Step(tuple(range(at, min(at + 2, end)))) for at in range(start, end, 2))


def ladder(span: Span) -> Steps:
    """Each as a ladder block."""
    return tuple(Step((layer,), ladder=True) for layer in range(*span))


TRANSFORMATIONS: dict[str, Callable[[Span], Steps]] = {
    one.__name__: one for one in (shuffle, prune, merge, parallel, pairs, ladder)
}


def spans(layers: int, grid: int = 1) -> Iterator[Span]:
    """Every span (start, end), end exclusive, of two layers or more whose ends are on the grid."""
    points = sorted({*range(0, layers, grid), layers})
    for index, start in enumerate(points):
        for end in points[index + 1 :]:
            if end - start >= 2:
                yield start, end


def steps_of(layers: int, span: Span, transformation: Callable[[Span], Steps]) -> Steps:
    """The whole model with a span transformed."""
    start, end = span
    before = tuple(Step((layer,)) for layer in range(start))
    after = tuple(Step((layer,)) for layer in range(end, layers))
    return (*before, *transformation(span), *after)
