"""Plans as tilings: the dynamic program against trying everything."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_depthpar.errors import UserError
from vllm_depthpar.plan import Plan, resolve
from vllm_depthpar.plan.model_shape import ModelShape
from vllm_depthpar.plan.published_shapes import CONFIGS
from vllm_depthpar.search.baselines import baselines
from vllm_depthpar.search.run import Goal, Space
from vllm_depthpar.search.search import Search
from vllm_depthpar.search.tiling import Tile, Tiling, best_of_each_length, candidates, to_plan

METHODS = ("pair", "group", "skip", "ladder")


def every_tiling(layers: int, tiles: list[Tile], start: int = 0) -> Iterator[Tiling]:
    if start == layers:
        yield ()
    for tile in tiles:
        if tile.start == start:
            for rest in every_tiling(layers, tiles, start + tile.width):
                yield (tile, *rest)


@given(
    layers=st.integers(2, 6),
    methods=st.sets(st.sampled_from(METHODS)),
    group=st.integers(3, 4),
    data=st.data(),
)
def test_best_of_each_length_is_the_best(
    layers: int, methods: set[str], group: int, data: st.DataObject
) -> None:
    tiles = candidates(layers, methods, group)
    number = st.floats(-1, 5, allow_nan=False)
    cost = {tile: data.draw(number) if tile.changes else 0.0 for tile in tiles}
    length = {tile: 0 if tile.skip else data.draw(st.integers(1, 4)) for tile in tiles}
    found = best_of_each_length(layers, cost, length)
    expected: dict[int, float] = {}
    for tiling in every_tiling(layers, tiles):
        total = sum(length[tile] for tile in tiling)
        expected[total] = min(expected.get(total, float("inf")), sum(cost[tile] for tile in tiling))
    assert {total: best for total, (best, _) in found.items()} == pytest.approx(expected)
    for best, tiling in found.values():
        assert sum(cost[tile] for tile in tiling) == pytest.approx(best)
        assert all(tile.changes for tile in tiling)


@pytest.mark.parametrize(
    ("tiling", "spec"),
    [
        ((), "identity"),
        ((Tile(2, 2), Tile(4, 2)), {"pair": [2, 6]}),
        ((Tile(1, 3),), {"blocks": [[0], [1, 2, 3], [4], [5], [6], [7]]}),
        (
            (Tile(2, without="attention"), Tile(3, without="mlp")),
            {"drop_attention": [2], "drop_mlp": [3]},
        ),
        ((Tile(2, 2, mode="drop_sync"),), {"pair": [2, 4], "drop_sync": [2, 3]}),
        ((Tile(3, skip=True),), {"blocks": [[0], [1], [2], [4], [5], [6], [7]]}),
        ((Tile(6, mode="ladder"), Tile(7, mode="ladder")), {"ladder": 2}),
        (
            (Tile(1, skip=True), Tile(2, 2, mode="ladder"), Tile(7, mode="ladder")),
            {"blocks": [[0], [2, 3], [4], [5], [6], [7]], "ladder": [2, 3, 7]},
        ),
    ],
)
def test_plan_of(tiling: Tiling, spec: object) -> None:
    assert to_plan(tiling, 8) == resolve(spec, 8)


def test_candidates_are_what_the_methods_allow() -> None:
    assert [tile for tile in candidates(6, []) if tile.changes] == []
    assert [tile.start for tile in candidates(6, ["pair"]) if tile.changes] == [0, 1, 2, 3, 4]
    # First and last layer always run.
    assert [tile.start for tile in candidates(6, ["skip"]) if tile.skip] == [1, 2, 3, 4]
    assert {tile.width for tile in candidates(6, ["group"], 4)} == {1, 3, 4}
    assert [tile.start for tile in candidates(3, ["drop_mlp"]) if tile.without == "mlp"] == [
        0,
        1,
        2,
    ]
    both = [tile for tile in candidates(6, ["pair", "ladder"]) if tile.mode == "ladder"]
    assert {tile.width for tile in both} == {1, 2}


def tower(layers: int, deepstack: int) -> ModelShape:
    """A model whose tower adds to the stream after so many of the first layers."""
    shape = ModelShape.from_config(CONFIGS["qwen3-0.6b"])
    return dataclasses.replace(shape, layers=layers, deepstack=deepstack)


@pytest.mark.parametrize("ladder", [(), ("ladder",)], ids=["", "ladder"])
def test_what_can_be_put_together_leaves_places_for_what_a_tower_adds(
    ladder: tuple[str, ...],
) -> None:
    """All such plans, but under "ladder" those without the layer after the last of these."""
    plans, (free, bound) = [], (tower(5, deepstack) for deepstack in (0, 2))
    for shape in (free, bound):
        space = Space(shape, Goal(depth=4), ("pair", "skip", "drop_sync", "drop_mlp", *ladder))
        plans.append({to_plan(tiling, 5) for tiling in every_tiling(5, sorted(space.lengths))})

    def expected(plan: Plan) -> bool:
        try:
            bound.check_plan(plan)
        except UserError:
            return False
        return not ladder or 2 in plan.kept

    assert plans[1] == set(filter(expected, plans[0])) != set()


def test_published_ways_have_no_tile_that_the_search_may_not_use() -> None:
    counts = []
    for deepstack in (0, 3):
        space = Space(tower(16, deepstack), Goal(depth=9), ("pair", "skip"))
        search = Search(16, space.lengths, lambda plans, _: [0.1] * len(plans))
        search.measure_tiles()
        found = baselines(search, 16, space.methods, space.target)
        assert space.lengths.keys() >= {tile for tiling in found for tile in tiling}
        counts.append(len(found))
    assert counts[0] > counts[1] > 0
