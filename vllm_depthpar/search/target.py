"""What a search is for: a length that tiles add up to, and the length that is asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from vllm_depthpar.errors import UserError
from vllm_depthpar.plan import Plan
from vllm_depthpar.plan.model_shape import ModelShape
from vllm_depthpar.predict import cost_model
from vllm_depthpar.predict.machines import Deployment, Workload
from vllm_depthpar.search.tiling import Tile, best_of_each_length, to_plan

# Units that a layer's time is divided into.
_UNITS = 16
_ALONE = Tile(0)
_ONCE = ("drop_sync", "parallel_residual")


@dataclass(frozen=True)
class Machine:
    """Where plans will run and on what, for predicted speed-ups in decoding."""

    deployment: Deployment
    workload: Workload

    def speedup(self, shape: ModelShape, plan: Plan) -> float:
        """Predict a plan's speed-up over plain vLLM."""
        return cost_model.speedup(shape, plan, self.deployment, self.workload)

    def lengths(self, shape: ModelShape, tiles: Iterable[Tile]) -> dict[Tile, int]:
        """Predict each tile's time, in sixteenths of a layer's."""
        layer = self._block_seconds(shape, _ALONE)
        units = {
            kind: round(_UNITS * self._block_seconds(shape, kind) / layer)
            for kind in {replace(tile, start=0) for tile in tiles if not tile.skip}
        }
        return {tile: 0 if tile.skip else units[replace(tile, start=0)] for tile in tiles}

    def length_of(self, shape: ModelShape, speedup: float) -> int:
        """Compute the total length that a speed-up over plain vLLM allows."""
        layer = self._block_seconds(shape, _ALONE)
        whole = self._seconds(shape, to_plan((), shape.layers))
        rest = whole - shape.layers * layer
        plain = cost_model.plain_time(shape, self.deployment, self.workload).seconds
        return math.floor(_UNITS * (plain / speedup - rest) / layer)

    def _block_seconds(self, shape: ModelShape, kind: Tile) -> float:
        """Predict the seconds that one more block of a kind takes, in a row of its kind."""

        def seconds(count: int) -> float:
            row = tuple(replace(kind, start=kind.width * at) for at in range(count))
            layers = kind.width * count
            return self._seconds(replace(shape, layers=layers, windows=()), to_plan(row, layers))

        return (seconds(8) - seconds(4)) / 4

    def _seconds(self, shape: ModelShape, plan: Plan) -> float:
        return cost_model.step_time(shape, plan, self.deployment, self.workload).seconds


def depths(tiles: Iterable[Tile]) -> dict[Tile, int]:
    """Compute each tile's length where lengths count blocks."""
    return {tile: int(not tile.skip) for tile in tiles}


def reductions(tiles: Iterable[Tile]) -> dict[Tile, int]:
    """Compute each tile's length where lengths count all-reduces of a forward pass at TP > 1.

    The embedding's is no tile's, and that a row of ladder blocks ends with one fewer is left out.
    """
    return {
        tile: 0 if tile.skip else 1 if tile.mode in _ONCE or tile.without else 2 for tile in tiles
    }


def reachable(layers: int, lengths: dict[Tile, int]) -> list[int]:
    """List the total lengths that some plan has, ascending."""
    return sorted(best_of_each_length(layers, dict.fromkeys(lengths, 0.0), lengths))


def check_depth(depth: int, layers: int, lengths: dict[Tile, int], methods: Sequence[str]) -> int:
    """Check that a depth can be reached; returns it.

    Raises:
        UserError: it can't; names the nearest.
    """
    depths = [length for length in reachable(layers, lengths) if 1 <= length < layers]
    if depth in depths:
        return depth
    how = ", ".join(methods)
    if not depths:
        raise UserError(f"depth {depth}: {how} can't make these {layers} layers any shorter")
    nearest = min(depths, key=lambda length: abs(length - depth))
    raise UserError(
        f"depth {depth} can't be reached with {how}; allowed: {depths[0]} to {depths[-1]}, "
        f"nearest: {nearest}"
    )


def check_all_reduces(
    most: int, layers: int, lengths: dict[Tile, int], methods: Sequence[str]
) -> int:
    """Compute the length of plans with at most so many all-reduces a forward pass.

    Raises:
        UserError: no plan has so few, or plain vLLM does.
    """
    fewest, plain = 1 + reachable(layers, lengths)[0], 1 + 2 * layers
    if not fewest <= most < plain:
        raise UserError(
            f"--all-reduces {most} can't be reached with {', '.join(methods)}; allowed: {fewest} "
            f"to {plain - 1}"
        )
    return most - 1


def check_speedup(
    speedup: float,
    shape: ModelShape,
    machine: Machine,
    lengths: dict[Tile, int],
    methods: Sequence[str],
) -> int:
    """Compute the length that a speed-up needs.

    Raises:
        UserError: no plan is that fast; names the most that is predicted.
    """
    free = dict.fromkeys(lengths, 0.0)
    of_length = best_of_each_length(shape.layers, free, lengths)
    _, tiling = of_length[min(of_length)]
    most = machine.speedup(shape, to_plan(tiling, shape.layers))
    if not 1 < speedup <= most:
        raise UserError(
            f"speed-up {speedup:g} can't be reached with {', '.join(methods)} there; "
            f"allowed: more than 1, nearest: {most:.2f}"
        )
    # One unit less: lengths are rounded.
    return max(min(of_length), machine.length_of(shape, speedup) - 1)
