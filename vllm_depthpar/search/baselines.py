"""The published ways to shorten a model, which a search measures beside its own."""

from __future__ import annotations

from collections.abc import Collection

from vllm_depthpar.plan import resolve
from vllm_depthpar.plan.spec import STANDARD
from vllm_depthpar.search.search import Search
from vllm_depthpar.search.tiling import Tile, Tiling

# Of each length, how many contiguous spans to measure.
_SPANS = 2


def baselines(
    search: Search, layers: int, methods: Collection[str], target: int | None
) -> list[Tiling]:
    """List the published ways to each length down to the target's: spans of pairs, balanced
    skipping.

    Of the spans of each length, those whose pairs cost least alone (arXiv 2502.02790 sweeps them
    all; Unified Layer Skipping is arXiv 2404.06954). They are known to the search, too. Left out
    are those with tiles that it may not use.
    """

    def may_be(tiling: Tiling) -> bool:
        return search.alone.keys() >= set(tiling) and search.length(tiling) >= least

    found: list[Tiling] = []
    least = target if target is not None else (layers * 3 // 4) * search.layer
    for count in range(1, layers // 2):
        if "pair" in methods:
            spans = [
                tuple(Tile(start + 2 * at, 2) for at in range(count))
                for start in range(layers - 2 * count + 1)
            ]
            spans = [span for span in spans if may_be(span)]
            spans.sort(key=lambda span: sum(search.alone[tile] for tile in span))
            found += spans[:_SPANS]
        if "skip" in methods:
            plan = resolve({"skip": {"speedup": layers / (layers - count)}}, layers)
            tiling = tuple(Tile(layer, skip=True) for layer in plan.skipped)
            if may_be(tiling):
                found.append(tiling)
    return found


def kind(tiling: Tiling) -> str:
    """Say what a plan is made of: "unmodified", "span of pairs", "skipping" or "found"."""
    if not tiling:
        return "unmodified"
    starts = [tile.start for tile in tiling]
    if all(tile.width == 2 and tile.mode == STANDARD for tile in tiling) and starts == list(
        range(starts[0], starts[0] + 2 * len(starts), 2)
    ):
        return "span of pairs"
    return "skipping" if all(tile.skip for tile in tiling) else "found"
