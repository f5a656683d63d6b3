"""The search, on divergences that are known because the test makes them up.

What a model really loses is in test_quality_commands.py; here every plan can be tried.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from vllm_depthpar.errors import UserError
from vllm_depthpar.plan import Plan
from vllm_depthpar.plan.model_shape import ModelShape
from vllm_depthpar.predict.devices import device_named
from vllm_depthpar.predict.links import link_named
from vllm_depthpar.predict.machines import Deployment, Workload
from vllm_depthpar.search.search import Search
from vllm_depthpar.search.surrogate import Surrogate
from vllm_depthpar.search.target import Machine, check_depth, check_speedup
from vllm_depthpar.search.tiling import Tile, Tiling, best_of_each_length, candidates, to_plan

LAYERS = 12
SHAPE = ModelShape(
    layers=32, hidden=4096, heads=32, kv_heads=32, head_dim=128, intermediate=11008, vocab=32000,
    tied=False, qkv_bias=False, output_bias=False, mlp_bias=False, qk_norm=False, dtype_bytes=2,
)  # fmt: skip


class Landscape:
    """A divergence for every plan: each wide block or skipped layer costs something, and changes
    next to each other cost more than they do apart."""

    def __init__(self, seed: int, together: float) -> None:
        random = np.random.default_rng(seed)
        self._of_layer = random.uniform(0.02, 1, LAYERS)
        self._together = together
        self.asked = 0

    def __call__(self, plans: Sequence[Plan], rough: bool) -> list[float]:
        self.asked += len(plans)
        return [self.of(plan) for plan in plans]

    def of(self, plan: Plan) -> float:
        changed = [block for block in plan.blocks if len(block) > 1]
        changed += [(layer,) for layer in plan.skipped]
        costs = {min(block): sum(self._of_layer[list(block)]) for block in changed}
        near = sum(
            costs[one] * costs[other]
            for one, other in itertools.combinations(costs, 2)
            if abs(one - other) <= 3
        )
        return float(sum(costs.values()) + self._together * near)


def search_of(landscape: Landscape, methods: Sequence[str]) -> Search:
    lengths = {tile: int(not tile.skip) for tile in candidates(LAYERS, methods)}
    alone = [frozenset(candidates(LAYERS, [method])) for method in methods]
    return Search(LAYERS, lengths, landscape, alone)


def best_pairs(landscape: Landscape, count: int) -> float:
    """The best plan of `count` pairs, by trying all."""
    return min(
        landscape.of(to_plan(tuple(Tile(start, 2) for start in starts), LAYERS))
        for starts in itertools.combinations(range(LAYERS - 1), count)
        if all(right - left >= 2 for left, right in itertools.pairwise(starts))
    )


@pytest.mark.parametrize("seed", range(5))
def test_where_costs_add_up_the_first_guess_is_right(seed: int) -> None:
    landscape = Landscape(seed, together=0)
    search = search_of(landscape, ["pair"])
    search.measure_tiles()
    search.round(target=9, proposals=1)
    found = {one.length: one.divergence for one in search.front()}
    for count in (1, 2, 3):
        assert found[LAYERS - count] == pytest.approx(best_pairs(landscape, count))


def regret(seed: int, together: float) -> float:
    """How far a search ends from the best plan of four pairs, beside where its first guess is."""
    landscape = Landscape(seed, together)
    search = search_of(landscape, ["pair"])
    search.measure_tiles()
    lengths = dict.fromkeys(candidates(LAYERS, ["pair"]), 1)
    first_guess = best_of_each_length(LAYERS, search.alone, lengths)[8][1]
    before = landscape.of(to_plan(first_guess, LAYERS))
    for _ in range(8):
        search.round(target=8, proposals=6)
    after = min(one.divergence for one in search.front() if one.length <= 8)
    best = best_pairs(landscape, 4)
    return (after - best) / (before - best) if before > best else after - best


def test_rounds_correct_what_does_not_add_up() -> None:
    # Of 70 ways to choose four pairs at most 48 are measured.
    assert max(regret(seed, together=1) for seed in range(10)) == pytest.approx(0, abs=1e-9)
    assert np.mean([regret(seed, together=2) for seed in range(10)]) < 0.15


def test_all_methods_are_nowhere_worse_than_one() -> None:
    """In one landscape of a hundred they may be, as draws differ: of 0 to 1000 in 207 and 671."""
    worse = [seed for seed in range(150, 250) if _one_is_better(seed)]
    assert len(worse) <= 1, worse


def _one_is_better(seed: int) -> bool:
    """Whether a method alone finds a plan, of any length, that all together do not come up to."""
    landscape = Landscape(seed, together=1)
    fronts = {}
    for methods in (["pair"], ["skip"], ["group"], ["pair", "skip", "group"]):
        search = search_of(landscape, methods)
        search.measure_tiles()
        for _ in range(2):
            search.round(target=9, proposals=2)
        fronts[tuple(methods)] = search.front()
    *single, every = fronts.values()
    return any(
        min(other.divergence for other in every if other.length <= one.length)
        > one.divergence * (1 + 1e-9)
        for front in single
        for one in front
    )


def test_the_same_seed_is_the_same_search() -> None:
    known = []
    for _ in range(2):
        search = search_of(Landscape(3, together=2), ["pair", "skip"])
        search.measure_tiles()
        for _ in range(3):
            search.round(target=8, proposals=3)
        known.append(search.known)
    assert known[0] == known[1]


def test_nothing_is_measured_twice() -> None:
    landscape = Landscape(0, together=1)
    search = search_of(landscape, ["pair"])
    search.measure_tiles()
    while search.round(target=10, proposals=3):
        pass
    # Every plan with one or two pairs, then nothing new is proposed.
    assert landscape.asked == len(search.alone) - LAYERS + len(search.known)
    front = search.front()
    assert [one.length for one in front] == [10, 11, 12]
    assert front[0].divergence == pytest.approx(best_pairs(landscape, 2))


def test_surrogate_begins_with_what_was_measured_alone() -> None:
    alone = {Tile(0): 0.0, Tile(0, 2): 0.5, Tile(2, 2): 0.1}
    assert Surrogate(alone, [], []).mean() == pytest.approx(alone)


def test_surrogate_believes_near_plans_more() -> None:
    alone = {Tile(0): 0.0, Tile(0, 2): 0.5, Tile(2, 2): 0.5}
    both: Tiling = (Tile(0, 2), Tile(2, 2))
    near = Surrogate(alone, [(both, 1.4)], [0]).mean()
    far = Surrogate(alone, [(both, 1.4)], [12]).mean()
    assert near[Tile(0, 2)] + near[Tile(2, 2)] == pytest.approx(1.4, abs=0.05)
    assert 1 < far[Tile(0, 2)] + far[Tile(2, 2)] < 1.3
    assert near[Tile(0)] == 0


def test_surrogate_draws_around_its_mean() -> None:
    alone = {Tile(0): 0.0, Tile(0, 2): 0.5, Tile(2, 2): 0.1}
    surrogate = Surrogate(alone, [((Tile(0, 2),), 0.6)], [0])
    random = np.random.default_rng(0)
    draws = [surrogate.sample(random) for _ in range(2000)]
    mean = surrogate.mean()
    # What was measured varies little, what was not by half of itself.
    for tile, spread in ((Tile(0, 2), 0.03), (Tile(2, 2), 0.05)):
        values = [draw[tile] for draw in draws]
        assert np.mean(values) == pytest.approx(mean[tile], abs=0.01)
        assert np.std(values) == pytest.approx(spread, rel=0.15)


def test_depths_that_cannot_be_reached() -> None:
    lengths = {tile: int(not tile.skip) for tile in candidates(30, ["pair"])}
    assert check_depth(15, 30, lengths, ["pair"]) == 15
    with pytest.raises(UserError, match=r"depth 10 .* allowed: 15 to 29, nearest: 15"):
        check_depth(10, 30, lengths, ["pair"])
    with pytest.raises(UserError, match=r"depth 30 .* nearest: 29"):
        check_depth(30, 30, lengths, ["pair"])
    nothing = dict.fromkeys(candidates(30, ["ladder"]), 1)
    with pytest.raises(UserError, match="ladder can't make these 30 layers any shorter"):
        check_depth(20, 30, nothing, ["ladder"])


def machine(tp: int) -> Machine:
    deployment = Deployment(device_named("a100-80g"), link_named("p2p-off"), tp)
    return Machine(deployment, Workload(batch=1, context=1024))


@pytest.mark.parametrize("methods", [["pair"], ["pair", "group", "skip", "ladder"]])
def test_lengths_are_the_predicted_times(methods: list[str]) -> None:
    """What tiles add up to orders plans as the cost model does, to the rounding of a unit each."""
    where = machine(tp=2)
    tiles = candidates(SHAPE.layers, methods)
    lengths = where.lengths(SHAPE, tiles)
    search = Search(SHAPE.layers, lengths, lambda plans, _: [0.0] * len(plans))
    for speedup in (1.05, 1.1):
        target = check_speedup(speedup, SHAPE, where, lengths, methods)
        of_length = best_of_each_length(SHAPE.layers, dict.fromkeys(tiles, 0.0), lengths)
        tilings = [tiling for at, (_, tiling) in of_length.items() if at <= target]
        nearest = max(tilings, key=search.length)
        assert where.speedup(SHAPE, to_plan(nearest, SHAPE.layers)) == pytest.approx(
            speedup, rel=0.03
        )


def test_speedups_that_cannot_be_reached() -> None:
    where = machine(tp=2)
    tiles = candidates(SHAPE.layers, ["pair"])
    lengths = where.lengths(SHAPE, tiles)
    most = where.speedup(SHAPE, to_plan(tuple(Tile(at, 2) for at in range(0, 32, 2)), 32))
    with pytest.raises(UserError, match=rf"speed-up 3 .* nearest: {most:.2f}"):
        check_speedup(3, SHAPE, where, lengths, ["pair"])
    with pytest.raises(UserError, match=r"speed-up 0.9 .* more than 1"):
        check_speedup(0.9, SHAPE, where, lengths, ["pair"])
