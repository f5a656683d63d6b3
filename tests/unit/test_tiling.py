"""Plans as tilings: the dynamic program against trying everything."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_depthpar.plan import resolve
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
