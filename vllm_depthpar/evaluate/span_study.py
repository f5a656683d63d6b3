"""Which spans of layers can be changed, and how: the effective-depth study of the Layer Parallelism
paper (arXiv 2502.02790, section 3), with the modes of blocks beside it.

A transformation takes a span of consecutive layers and gives the blocks that run in its place.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator

from vllm_depthpar.evaluate.rows import Block, Row
from vllm_depthpar.plan.model_shape import ModelShape

Span = tuple[int, int]


def shuffle(span: Span) -> Row:
    """Put the layers into a random order, the same one for a span each time."""
    layers = list(range(*span))
    # A span of two or more has another order than its own.
    random_order = random.Random(f"{span}")
    while layers == sorted(layers):
        random_order.shuffle(layers)
    return tuple(Block((layer,)) for layer in layers)


def prune(_: Span) -> Row:
    """Leave the layers out."""
    return ()


def merge(span: Span) -> Row:
    """Merge the layers into one whose weights are the mean of theirs."""
    return (Block(tuple(range(*span)), merged=True),)


def parallel(span: Span) -> Row:
    """Run all layers side by side."""
    return (Block(tuple(range(*span))),)


def pairs(span: Span) -> Row:
    """Run the layers two by two side by side; of an odd span the last one alone."""
    start, end = span
    return tuple(Block(tuple(range(at, min(at + 2, end)))) for at in range(start, end, 2))


def ladder(span: Span) -> Row:
    """Run each layer as a ladder block."""
    return tuple(Block((layer,), mode="ladder") for layer in range(*span))


def parallel_residual(span: Span) -> Row:
    """Run attention and MLP of each layer side by side."""
    return tuple(Block((layer,), mode="parallel_residual") for layer in range(*span))


def drop_sync(span: Span) -> Row:
    """Run each layer without its attention's all-reduce."""
    return tuple(Block((layer,), mode="drop_sync") for layer in range(*span))


TRANSFORMATIONS: dict[str, Callable[[Span], Row]] = {
    one.__name__: one
    for one in (shuffle, prune, merge, parallel, pairs, ladder, parallel_residual, drop_sync)
}


def spans(layers: int, grid: int = 1) -> Iterator[Span]:
    """List the spans (start, end), end exclusive, of two layers or more with ends on the grid."""
    points = sorted({*range(0, layers, grid), layers})
    for index, start in enumerate(points):
        for end in points[index + 1 :]:
            if end - start >= 2:
                yield start, end


def row_with(layers: int, span: Span, transformation: Callable[[Span], Row]) -> Row:
    """Make the row of the whole model with a span transformed."""
    start, end = span
    before = tuple(Block((layer,)) for layer in range(start))
    after = tuple(Block((layer,)) for layer in range(end, layers))
    return (*before, *transformation(span), *after)


def rows_with(
    shape: ModelShape, grid: Iterable[Span], transformation: Callable[[Span], Row]
) -> dict[Span, Row]:
    """Make `row_with` each span that can be transformed so: see `ModelShape.leaves_places`."""
    rows = {span: row_with(shape.layers, span, transformation) for span in grid}
    return {span: row for span, row in rows.items() if _leaves_places(shape, row)}


def _leaves_places(shape: ModelShape, row: Row) -> bool:
    ladders = [position for position, block in enumerate(row) if block.mode == "ladder"]
    return shape.leaves_places([block.layers for block in row], ladders)
