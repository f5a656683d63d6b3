"""Plans as tilings of the stack of layers, and the cheapest tiling of each length.

A *tile* is one way to run (or not to run) a few consecutive layers. A plan is a tiling that
covers layers 0 to N - 1. If what tiles cost and how long they take both add up, the best plan of
every total length is one dynamic program over the layers, exact.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_depthpar.plan import Plan
from vllm_depthpar.plan.spec import HALVES, MODES, STANDARD


@dataclass(frozen=True, order=True)
class Tile:
    """Layers `start` to `start + width - 1`, side by side; alone if there is one, or skipped.

    Attributes:
        start: the first layer.
        width: how many layers, 1 or more.
        skip: none of them runs.
        mode: of the block (see `vllm_depthpar.plan.Plan.mode`).
        without: the half that the layer, alone, runs without; of `spec.HALVES`, or none.
    """

    start: int
    width: int = 1
    skip: bool = False
    mode: str = STANDARD
    without: str = ""

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers covered."""
        return tuple(range(self.start, self.start + self.width))

    @property
    def changes(self) -> bool:
        """Whether this is anything else than one layer that runs as it always did."""
        return self.width > 1 or self.skip or self.mode != STANDARD or bool(self.without)


Tiling = tuple[Tile, ...]


def to_plan(tiling: Tiling, layers: int) -> Plan:
    """Make the plan that a tiling is; layers that no tile covers run as they are."""
    covered = {layer for tile in tiling for layer in tile.layers}
    row = sorted([*tiling, *(Tile(layer) for layer in range(layers) if layer not in covered)])
    run = [tile for tile in row if not tile.skip]
    dropped: dict[str, Any] = {
        key: frozenset(tile.start for tile in run if tile.without == half)
        for half, key in HALVES.items()
    }
    of_mode: dict[str, Any] = {
        mode: frozenset(position for position, tile in enumerate(run) if tile.mode == mode)
        for mode in MODES
    }
    return Plan(layers, tuple(tile.layers for tile in run), **of_mode, **dropped)


def candidates(layers: int, methods: Collection[str], group: int = 4) -> list[Tile]:
    """List every tile that the methods allow.

    Args:
        layers: number of layers N.
        methods: any of "pair" (two side by side), "group" (three to `group`), "skip", of the modes
            of blocks, which combine with the widths that are allowed beside them, and of the keys
            that drop a half, of layers that run alone.
        group: the widest group.
    """
    widths = [1]
    if "pair" in methods:
        widths.append(2)
    if "group" in methods:
        widths.extend(range(3, group + 1))
    tiles = [
        Tile(start, width, mode=mode)
        for width in widths
        for mode in (STANDARD, *(mode for mode in MODES if mode in methods))
        for start in range(layers - width + 1)
    ]
    if "skip" in methods:
        # First and last always run, as in Unified Layer Skipping (arXiv 2404.06954).
        tiles += [Tile(start, skip=True) for start in range(1, layers - 1)]
    for half, key in HALVES.items():
        if key in methods:
            tiles += [Tile(start, without=half) for start in range(layers)]
    return sorted(tiles)


def best_of_each_length(
    layers: int, cost: Mapping[Tile, float], length: Mapping[Tile, int]
) -> dict[int, tuple[float, Tiling]]:
    """Find the cheapest tiling of each total length.

    Args:
        layers: number of layers to cover.
        cost: what each allowed tile costs; costs add up. May be negative.
        length: how long each takes, in whole units; lengths add up.

    Returns:
        For each total length that some tiling has: its cost, and its tiles that change something.
    """
    import numpy as np  # here: every command imports this module, few need it

    longest = layers * max(length.values()) + 1
    best = np.full((layers + 1, longest), np.inf)
    best[0, 0] = 0
    ending: list[list[tuple[int, Tile]]] = [[] for _ in range(layers + 1)]
    order = sorted(cost)
    for index, tile in enumerate(order):
        ending[tile.start + tile.width].append((index, tile))
    last = np.full((layers + 1, longest), -1)
    for end in range(1, layers + 1):
        for index, tile in ending[end]:
            reached = np.full(longest, np.inf)
            reached[length[tile] :] = best[tile.start, : longest - length[tile]] + cost[tile]
            better = reached < best[end]
            best[end, better] = reached[better]
            last[end, better] = index
    found = {}
    for total in np.flatnonzero(np.isfinite(best[layers])).tolist():
        row, end, rest = [], layers, total
        while end:
            tile = order[last[end, rest]]
            row.append(tile)
            end, rest = tile.start, rest - length[tile]
        found[total] = (
            float(best[layers, total]),
            tuple(tile for tile in reversed(row) if tile.changes),
        )
    return found
