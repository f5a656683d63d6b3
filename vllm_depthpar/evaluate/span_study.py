"""Which spans of layers can be changed, and how: the effective-depth study of the Layer Parallelism
paper (arXiv 2502.02790, section 3), with the modes of blocks beside it.

A transformation takes a span of consecutive layers and gives the blocks that run in its place.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from vllm_depthpar.evaluate.rows import Block, Row

Span = tuple[int, int]


def shuffle(span: Span) -> Row:
    """The layers in a random order, the same one for a span each time."""
    layers = list(range(*span))
    # A span of two or more has another order than its own.
    random_order = random.Random(f"{span}")
    while layers == sorted(layers):
        random_order.shuffle(layers)
    return tuple(Block((layer,)) for layer in layers)


def prune(_: Span) -> Row:
    """Nothing in their place."""
    return ()


def merge(span: Span) -> Row:
    """One layer whose weights are the mean of theirs."""
    return (Block(tuple(range(*span)), merged=True),)


def parallel(span: Span) -> Row:
    """All of them side by side."""
    return (Block(tuple(range(*span))),)


def pairs(span: Span) -> Row:
    """Two by two side by side; of an odd span the last one alone."""
    start, end = span
    return tuple(Block(tuple(range(at, min(at + 2, end)))) for at in range(start, end, 2))


def ladder(span: Span) -> Row:
    """Each as a ladder block."""
    return tuple(Block((layer,), mode="ladder") for layer in range(*span))


def parallel_residual(span: Span) -> Row:
    """Attention and MLP of each side by side."""
    return tuple(Block((layer,), mode="parallel_residual") for layer in range(*span))


def drop_sync(span: Span) -> Row:
    """Each without its attention's all-reduce."""
    return tuple(Block((layer,), mode="drop_sync") for layer in range(*span))


TRANSFORMATIONS: dict[str, Callable[[Span], Row]] = {
    one.__name__: one
    for one in (shuffle, prune, merge, parallel, pairs, ladder, parallel_residual, drop_sync)
}


def spans(layers: int, grid: int = 1) -> Iterator[Span]:
    """Every span (start, end), end exclusive, of two layers or more whose ends are on the grid."""
    points = sorted({*range(0, layers, grid), layers})
    for index, start in enumerate(points):
        for end in points[index + 1 :]:
            if end - start >= 2:
                yield start, end


def row_with(layers: int, span: Span, transformation: Callable[[Span], Row]) -> Row:
    """The whole model with a span transformed."""
    start, end = span
    before = tuple(Block((layer,)) for layer in range(start))
    after = tuple(Block((layer,)) for layer in range(end, layers))
    return (*before, *transformation(span), *after)
