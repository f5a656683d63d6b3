"""Find the plan that costs the least quality at every length.

1. Every tile (a pair, a group, a skipped layer, a ladder block: `tiling.Tile`) is measured alone.
   Alone each costs only the layers after it (see `evaluate.evaluator`), and at small counts costs
   add up.
2. Dynamic programming finds the best plans of every length if they did add up (`tiling`).
3. Those plans are measured, which corrects the costs (`surrogate`); with the corrected costs new
   plans are proposed, some of them by drawing costs from what is still uncertain. And so on.

A plan is judged by its mean KL divergence from the unmodified model, averaged over the texts with
equal weight, so that no kind of text is given up for another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_depthpar.plan import Plan
from vllm_depthpar.plan.spec import STANDARD
from vllm_depthpar.search.surrogate import Surrogate
from vllm_depthpar.search.tiling import Tile, Tiling, best_of_each_length, to_plan

# How many of the best known plans have their neighbours looked at.
_GOOD = 3

Measure = Callable[[Sequence[Plan], bool], list[float]]


@dataclass(frozen=True)
class Found:
    """A plan that was measured.

    Attributes:
        tiling: its tiles that change something.
        length: its length in the units that were asked for: blocks, or time.
        divergence: mean KL from the unmodified model, nats per token.
    """

    tiling: Tiling
    length: int
    divergence: float


class Search:
    """The state of a search: `measure_tiles`, then any number of rounds.

    Args:
        layers: number of layers of the model.
        length: what each allowed tile adds to a plan's length, in whole units: 1 for a block and 0
            for a skipped layer, or a time.
        measure: the divergence of plans; the second argument says whether a rough value will do.
        methods: sets of tiles to propose plans from, each by itself, beside all tiles together: the
            front of all methods has what each alone would propose.
        seed: of the draws.
    """

    def __init__(
        self,
        layers: int,
        length: Mapping[Tile, int],
        measure: Measure,
        methods: Iterable[frozenset[Tile]] = (),
        seed: int = 0,
    ) -> None:
        self._layers = layers
        self._length = length
        self._measure = measure
        everything = frozenset(length)
        self._methods = [tiles for tiles in methods if tiles != everything]
        self._methods.append(everything)
        self._random = np.random.default_rng(seed)
        # One layer, in units of length (a tensor-parallel size may allow no layer alone).
        self.layer = length.get(Tile(0)) or max(length.values())
        self.alone: dict[Tile, float] = {}
        self.known: dict[Tiling, float] = {}

    def measure_tiles(self) -> None:
        """Measure every tile alone, step 1.

        A wide block of another mode is taken to cost what both cost.
        """
        tiles = [tile for tile in self._length if tile.changes]
        known = {
            tile: [Tile(tile.start, tile.width), *(Tile(at, mode=tile.mode) for at in tile.layers)]
            for tile in tiles
            if tile.mode != STANDARD and tile.width > 1
        }
        known = {tile: parts for tile, parts in known.items() if self._length.keys() >= set(parts)}
        direct = [tile for tile in tiles if tile not in known]
        plans = [to_plan((tile,), self._layers) for tile in direct]
        self.alone = {tile: 0.0 for tile in self._length if not tile.changes}
        self.alone |= dict(zip(direct, self._measure(plans, True), strict=True))
        for tile, parts in known.items():
            self.alone[tile] = sum(self.alone[part] for part in parts)

    def round(self, target: int, proposals: int) -> int:
        """Propose plans and measure them, steps 2 and 3, once; returns how many were new."""
        return self.add(self.propose(target, proposals))

    def add(self, tilings: Iterable[Tiling]) -> int:
        """Measure plans that are not known yet; returns how many."""
        new = [tiling for tiling in dict.fromkeys(tilings) if tiling and tiling not in self.known]
        plans = [to_plan(tiling, self._layers) for tiling in new]
        self.known |= dict(zip(new, self._measure(plans, False), strict=True))
        return len(new)

    def propose(self, target: int, proposals: int) -> list[Tiling]:
        """Choose the plans to measure next.

        Args:
            target: the length that matters most.
            proposals: how many plans of that length, or up to one layer shorter; as many again of
                the method that leads there. Of each longer length, layer by layer, one of each.
        """
        chosen: dict[Tiling, None] = {}
        measured = list(self.known.items())
        lengths = [self.length(tiling) for tiling in self.known]
        for ceiling in range(target, self._layers * self.layer, self.layer):
            near = [abs(length - ceiling) / self.layer for length in lengths]
            surrogate = Surrogate(self.alone, measured, near)
            costs = surrogate.mean()
            count = proposals if ceiling == target else 1
            for tiles in self._methods[:-1]:
                self._choose(chosen, self._best({tile: costs[tile] for tile in tiles}, ceiling))
            for tiles in [*self._leading(ceiling), self._methods[-1]]:
                self._propose(chosen, tiles, surrogate, ceiling, count)
        return list(chosen)

    def _propose(
        self,
        chosen: dict[Tiling, None],
        tiles: frozenset[Tile],
        surrogate: Surrogate,
        ceiling: int,
        count: int,
    ) -> None:
        """Choose so many plans of at most a length, made of some tiles."""
        costs = {tile: cost for tile, cost in surrogate.mean().items() if tile in tiles}
        wanted = len(chosen) + count
        self._choose(chosen, self._best(costs, ceiling))
        # Half from anywhere, by drawing costs; half beside the best plan that is known.
        half = (wanted + len(chosen)) // 2
        for _ in range(2 * count):
            if len(chosen) < half:
                drawn = surrogate.sample(self._random)
                self._choose(chosen, self._best({tile: drawn[tile] for tile in costs}, ceiling))
        for tiling in self._neighbours(costs, ceiling):
            if len(chosen) < wanted:
                self._choose(chosen, tiling)

    def _leading(self, ceiling: int) -> list[frozenset[Tile]]:
        """Find the method that the best known plan of a length keeps to, if it keeps to one.

        Among all tiles draws and neighbours of its kind are few: it would search less well than
        alone.
        """
        best = min(self._known_of(ceiling), key=self.known.__getitem__, default=())
        return [tiles for tiles in self._methods[:-1] if best and tiles.issuperset(best)][:1]

    def _choose(self, chosen: dict[Tiling, None], tiling: Tiling) -> None:
        if tiling and tiling not in self.known:
            chosen[tiling] = None

    def _neighbours(self, costs: Mapping[Tile, float], ceiling: int) -> list[Tiling]:
        """Exchange one tile of the best known plans of this length, the most promising first."""
        known = [tiling for tiling in self._known_of(ceiling) if costs.keys() >= set(tiling)]
        found = set()
        for good in sorted(known, key=self.known.__getitem__)[:_GOOD]:
            for out in good:
                rest = tuple(tile for tile in good if tile != out)
                taken = {layer for tile in rest for layer in tile.layers}
                for tile in costs:
                    if tile.changes and tile != out and taken.isdisjoint(tile.layers):
                        exchanged = tuple(sorted((*rest, tile)))
                        if self._fits(self.length(exchanged), ceiling):
                            found.add(exchanged)
        return sorted(found, key=lambda one: (sum(costs[tile] for tile in one), one))

    def _known_of(self, ceiling: int) -> list[Tiling]:
        """List the measured plans that `_fits` takes."""
        return [tiling for tiling in self.known if self._fits(self.length(tiling), ceiling)]

    def _fits(self, length: int, ceiling: int) -> bool:
        """Say whether a length is at most the ceiling, and not a layer shorter."""
        return ceiling - self.layer < length <= ceiling

    def _best(self, costs: Mapping[Tile, float], ceiling: int) -> Tiling:
        """Find the cheapest tiling of at most this length, not a layer shorter; () if none is."""
        of_length = best_of_each_length(self._layers, costs, self._length)
        found = [of_length[at] for at in of_length if self._fits(at, ceiling)]
        return min(found)[1] if found else ()

    def length(self, tiling: Tiling) -> int:
        """Compute a plan's length."""
        covered = sum(tile.width for tile in tiling)
        # A tensor-parallel size may not allow single layers; tilings then cover every layer.
        rest = (self._layers - covered) * self._length.get(Tile(0), 0)
        return rest + sum(self._length[tile] for tile in tiling)

    def measured(self) -> list[Found]:
        """List every plan that is known."""
        return [Found(tiling, self.length(tiling), value) for tiling, value in self.known.items()]

    def front(self) -> list[Found]:
        """List the measured plans that no other is both shorter (or as short) and better than."""
        found = [*self.measured(), Found((), self.length(()), 0.0)]
        front: list[Found] = []
        for one in sorted(found, key=lambda one: (one.length, one.divergence)):
            if not front or one.divergence < front[-1].divergence:
                front.append(one)
        return front
