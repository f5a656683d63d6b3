"""The plan: every form, every error, and properties that hold for all plans."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_depthpar.errors import UserError
from vllm_depthpar.plan import MAX_SPEC_BYTES, Plan, json_schema, read_spec, resolve
from vllm_depthpar.plan.model_shape import all_reduces, hidden_all_reduces
from vllm_depthpar.plan.spec import HALVES, MODES

FORMS: list[tuple[Any, int, list[list[int]]]] = [
    ("identity", 3, [[0], [1], [2]]),
    ({"pair": [2, 6]}, 8, [[0], [1], [2, 3], [4, 5], [6], [7]]),
    ({"pair": [0, 4]}, 4, [[0, 1], [2, 3]]),
    ({"pair": [1, 7], "group": 3}, 8, [[0], [1, 2, 3], [4, 5, 6], [7]]),
    ({"pair": [0, 4], "group": 4}, 4, [[0, 1, 2, 3]]),
    ({"pair": [0, 2], "layers": 3}, 3, [[0, 1], [2]]),
    ({"blocks": [[0], [1], [2, 3], [5], [4, 6]]}, 8, [[0], [1], [2, 3], [5], [4, 6]]),
    ({"blocks": [[3, 1]]}, 4, [[3, 1]]),
    ({"blocks": [[0]], "pair": None, "skip": None}, 1, [[0]]),
    ({"skip": {"speedup": 1}}, 4, [[0], [1], [2], [3]]),
    ({"skip": {"speedup": 2}}, 9, [[0], [3], [5], [8]]),
    ({"skip": {"speedup": 1.5, "schedule": "balanced"}}, 6, [[0], [2], [3], [5]]),
    ({"skip": {"speedup": 1.5, "schedule": "paper"}}, 9, [[0], [1], [2], [3], [4], [8]]),
    ({"skip": {"speedup": 2}}, 4, [[0], [3]]),
    # Pairs are made of the layers that skipping left: 0, 3, 5, 8 here.
    ({"skip": {"speedup": 2}, "pair": [1, 8]}, 9, [[0], [3, 5], [8]]),
    ({"skip": {"speedup": 2}, "pair": [0, 9], "group": 4}, 9, [[0, 3, 5, 8]]),
]


# (spec, layers, blocks, indices of the layers in ladder blocks); the other modes are said likewise
LADDERS: list[tuple[Any, int, list[list[int]], list[int]]] = [
    ({"ladder": "all"}, 3, [[0], [1], [2]], [0, 1, 2]),
    ({"ladder": 2}, 4, [[0], [1], [2], [3]], [2, 3]),
    ({"ladder": 4}, 4, [[0], [1], [2], [3]], [0, 1, 2, 3]),
    ({"ladder": [2, 0]}, 4, [[0], [1], [2], [3]], [0, 2]),
    ({"ladder": [2, 2]}, 4, [[0], [1], [2], [3]], [2]),
    ({"ladder": [], "pair": [0, 2]}, 3, [[0, 1], [2]], []),
    ({"ladder": "all", "pair": [1, 3]}, 4, [[0], [1, 2], [3]], [0, 1, 2, 3]),
    ({"ladder": 3, "pair": [1, 3]}, 4, [[0], [1, 2], [3]], [1, 2, 3]),
    ({"ladder": [2, 1], "pair": [1, 3]}, 4, [[0], [1, 2], [3]], [1, 2]),
    ({"ladder": "all", "skip": {"speedup": 2}}, 4, [[0], [3]], [0, 3]),
    # A number counts layers of the checkpoint, skipped ones too.
    ({"ladder": 2, "skip": {"speedup": 2}}, 9, [[0], [3], [5], [8]], [8]),
    ({"ladder": 6, "skip": {"speedup": 2}, "pair": [1, 8]}, 9, [[0], [3, 5], [8]], [3, 5, 8]),
    ({"ladder": [1, 3], "blocks": [[0], [3, 1]]}, 4, [[0], [3, 1]], [1, 3]),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("spec", "layers", "blocks", "named"), LADDERS)
def test_mode_form(
    mode: str, spec: Any, layers: int, blocks: list[list[int]], named: list[int]
) -> None:
    spec = {mode if key == "ladder" else key: value for key, value in spec.items()}
    plan = resolve(spec, layers)
    assert plan.blocks == tuple(tuple(block) for block in blocks)
    positions = {at for at, block in enumerate(blocks) if block[0] in named}
    assert [plan.mode(at) for at in range(len(blocks) + 1)] == [
        mode if at in positions else "standard" for at in range(len(blocks) + 1)
    ]
    assert plan.to_spec().get(mode, []) == named
    assert plan.is_identity == (not named and plan.depth == layers)
    assert all(plan.is_changed(at) for at in positions)


def test_modes_of_one_plan() -> None:
    spec = {"pair": [4, 8], "drop_sync": [4, 5, 8], "ladder": [0, 1], "parallel_residual": [9]}
    plan = resolve({**spec, "tp": 3}, 10)
    assert plan.name == (
        "10 layers as 8 blocks (2 of 2, 2 ladder, 2 drop sync, 1 parallel residual)"
    )
    assert [at for at in range(8) if plan.reduces_once(at)] == [4, 6, 7]
    # Two a block and the embedding's; but one fewer in blocks that reduce once, and where a row of
    # ladder blocks ends.
    assert all_reduces(plan) == 2 * 8 + 1 - 3 - 1
    # Block 0's two: its MLP's behind block 1's attention, its attention's behind its MLP.
    assert hidden_all_reduces(plan) == 2
    assert plan.to_spec()["tp"] == 3
    assert plan.digest != resolve(spec, 10).digest


# (spec, blocks, the attentions and the MLPs of each), of six layers
HALF_FORMS: list[tuple[Any, list[list[int]], list[list[int]], list[list[int]]]] = [
    (
        {"drop_attention": [1, 2]},
        [[0], [1], [2], [3], [4], [5]],
        [[0], [], [], [3], [4], [5]],
        [[0], [1], [2], [3], [4], [5]],
    ),
    (
        {"pair": [0, 4], "drop_mlp": [1, 5]},
        [[0, 1], [2, 3], [4], [5]],
        [[0, 1], [2, 3], [4], [5]],
        [[0], [2, 3], [4], []],
    ),
    (
        {"blocks": [[0], {"attention": [2], "mlp": [1, 2]}, {"attention": [], "mlp": [4, 3]}]},
        [[0], [2, 1], [4, 3]],
        [[0], [2], []],
        [[0], [2, 1], [4, 3]],
    ),
    (
        {"skip": {"speedup": 2}, "drop_attention": [5], "drop_mlp": [0]},
        [[0], [3], [5]],
        [[0], [3], []],
        [[], [3], [5]],
    ),
]


@pytest.mark.parametrize(("spec", "blocks", "attentions", "mlps"), HALF_FORMS)
def test_half_form(
    spec: Any, blocks: list[list[int]], attentions: list[list[int]], mlps: list[list[int]]
) -> None:
    plan = resolve(spec, 6)
    assert [list(block) for block in plan.blocks] == blocks
    assert [list(plan.attention(at)) for at in range(plan.depth)] == attentions
    assert [list(plan.mlp(at)) for at in range(plan.depth)] == mlps
    assert resolve(plan.to_spec(), 6) == plan
    assert all(isinstance(block, list) for block in plan.to_spec()["blocks"])
    assert all_reduces(plan) == 1 + sum(map(bool, attentions)) + sum(map(bool, mlps))
    assert not plan.is_identity
    changed = [not plan.is_whole(at) for at in range(plan.depth)]
    assert all(plan.is_changed(at) for at in range(plan.depth) if changed[at])
    assert changed == [one != other for one, other in zip(attentions, mlps, strict=True)]


# (spec, the attentions and the MLPs that are not reduced), of six layers
DESYNC_FORMS: list[tuple[Any, list[int], list[int]]] = [
    ({"desync": {"every": 4}}, [0, 1, 2, 3, 4, 5], [0, 2, 4]),
    ({"desync": {"every": 3}}, [0, 2, 3, 5], [0, 1, 3, 4]),
    ({"desync": {"every": 100}}, [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4]),
    ({"pair": [2, 6], "desync": {"every": 2}}, [0, 1, 2, 3, 4, 5], []),
    ({"drop_attention": [2], "desync": {"every": 2}}, [0, 1], [2, 3, 4]),
    # Streams are one where other blocks begin, and before a ladder nothing is left out.
    ({"parallel_residual": [3], "desync": {"every": 100}}, [0, 1, 2, 4, 5], [0, 1, 4]),
    ({"ladder": [3], "desync": {"every": 100}}, [0, 1, 4, 5], [0, 4]),
    ({"desync": {"attention": [5, 1], "mlp": [1]}}, [1, 5], [1]),
    ({"desync": {"attention": [], "mlp": []}}, [], []),
]


@pytest.mark.parametrize(("spec", "attention", "mlp"), DESYNC_FORMS)
def test_desync_form(spec: Any, attention: list[int], mlp: list[int]) -> None:
    plan = resolve(spec, 6)
    named = {"attention": attention, "mlp": mlp}
    assert plan.desync == {(layer, half) for half in named for layer in named[half]}
    assert plan.to_spec().get("desync", {"attention": [], "mlp": []}) == named
    assert resolve(plan.to_spec(), 6) == plan
    assert plan.depends_on_ranks == bool(attention or mlp)
    without = replace(plan, desync=frozenset())
    left_out = sum(len(plan.unreduced(at)) for at in range(plan.depth))
    assert all_reduces(without) - all_reduces(plan) == left_out
    assert not plan.is_apart(0)
    assert not plan.is_apart(plan.depth)
    for at in range(1, plan.depth):
        assert plan.is_apart(at) == (plan.halves(at - 1)[-1] in plan.unreduced(at - 1))
        if plan.is_apart(at):
            assert plan.mode(at) == "standard"
            assert plan.end(at - 1) is None
            assert plan.is_changed(at - 1)
            assert plan.is_changed(at)


def test_ladder_after_a_block_that_reduces_once() -> None:
    """It reads the complete stream: there is nothing of that block left to hide."""
    plan = resolve({"drop_sync": [1], "ladder": [0, 2, 3]}, 4)
    assert all_reduces(plan) == 2 * 4 + 1 - 1 - 2
    assert hidden_all_reduces(plan) == 2


@pytest.mark.parametrize(("spec", "layers", "blocks"), FORMS)
def test_form(spec: Any, layers: int, blocks: list[list[int]]) -> None:
    plan = resolve(spec, layers)
    assert plan == Plan(layers, tuple(tuple(block) for block in blocks))
    assert plan.to_spec() == {"layers": layers, "blocks": blocks}
    assert not plan.ladder


def test_properties_of_a_plan() -> None:
    plan = resolve({"blocks": [[0], [1], [2, 3], [5], [4, 6, 9]]}, 10)
    assert plan.depth == 5
    assert plan.kept == (0, 1, 2, 3, 4, 5, 6, 9)
    assert plan.skipped == (7, 8)
    assert plan.name == "10 layers as 5 blocks (1 of 2, 1 of 3, 2 skipped)"
    assert not plan.is_identity
    assert resolve("identity", 10).is_identity
    assert resolve("identity", 10).name == "10 layers as 10 blocks"
    assert not resolve({"blocks": [[1], [0]]}, 2).is_identity
    ladder = resolve({"pair": [2, 6], "ladder": 6}, 10)
    assert ladder.name == "10 layers as 8 blocks (2 of 2, 5 ladder)"
    assert [at for at in range(10) if ladder.is_ladder(at)] == [3, 4, 5, 6, 7]


def test_digest_is_stable() -> None:
    """Written down, because digests name things on disk that outlive a release."""
    assert resolve({"pair": [14, 28]}, 30).digest == "44580812f8f3"
    assert resolve("identity", 30).digest != resolve("identity", 31).digest


# What the authors' code keeps. Adaxry/Unified_Layer_Skipping at ad84c1e, codes/run_clm_llms.py,
# main(), from 'num_total_model_layer = config.n_layer' on; these are what its lines gave when run.
AUTHORS: dict[tuple[int, float], list[int]] = {
    (30, 2): [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 29],
    (30, 3): [0, 3, 6, 9, 12, 15, 18, 21, 24, 29],
    (30, 5): [0, 6, 12, 18, 24, 29],
    (30, 10): [0, 15, 29],
    (32, 2): [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 31],
    (32, 3): [0, 3, 6, 9, 12, 15, 18, 21, 24, 31],
    (32, 5): [0, 6, 12, 18, 24, 31],
    (32, 10): [0, 16, 31],
    # Below 2 the rule leaves one hole before the last layer.
    (30, 1.5): [*range(19), 29],
    (32, 1.25): [*range(24), 31],
}


@pytest.mark.parametrize(("layers", "speedup"), AUTHORS)
def test_paper_schedule_is_the_authors(layers: int, speedup: float) -> None:
    plan = resolve({"skip": {"speedup": speedup, "schedule": "paper"}}, layers)
    assert plan.blocks == tuple((layer,) for layer in AUTHORS[layers, speedup])


Case = tuple[Any, int]  # a spec, and the number of layers it is for


@st.composite
def skips(draw: st.DrawFn) -> Case:
    layers = draw(st.integers(2, 200))
    speedup = draw(st.floats(1, layers / 2) | st.integers(1, layers // 2))
    skip: dict[str, Any] = {"speedup": speedup}
    if schedule := draw(st.sampled_from([None, "balanced", "paper"])):
        skip["schedule"] = schedule
    return {"skip": skip}, layers


@st.composite
def pairs(draw: st.DrawFn, specs: st.SearchStrategy[Case]) -> Case:
    """Pairs, over whatever layers the spec below left."""
    spec, layers = draw(specs)
    kept = resolve(spec, layers).kept if spec else tuple(range(layers))
    group = draw(st.integers(2, max(2, min(6, len(kept)))))
    count = draw(st.integers(1, len(kept) // group)) * group
    first = draw(st.integers(0, len(kept) - count))
    spec = {**spec, "pair": [kept[first], kept[first + count - 1] + 1]}
    if group != 2 or draw(st.booleans()):
        spec["group"] = group
    return spec, layers


@st.composite
def blocks(draw: st.DrawFn) -> Case:
    layers = draw(st.integers(1, 40))
    order = draw(st.permutations(range(layers)))[: draw(st.integers(1, layers))]
    cuts = draw(st.sets(st.integers(1, len(order)))) | {len(order)}
    edges = [0, *sorted(cuts)]
    return {"blocks": [list(order[start:end]) for start, end in pairwise(edges)]}, layers


whole: st.SearchStrategy[Case] = st.integers(2, 200).map(lambda layers: ({}, layers))


@st.composite
def moded(draw: st.DrawFn, specs: st.SearchStrategy[Case]) -> Case:
    """Some of the blocks of the spec below in other modes; blocks stay whole."""
    spec, layers = draw(specs)
    spec = {key: value for key, value in spec.items() if key not in MODES}
    blocks = resolve(spec or "identity", layers).blocks
    chosen = draw(st.lists(st.sampled_from(blocks), unique=True))
    mode = draw(st.sampled_from(MODES))
    if draw(st.booleans()) or not (spec or chosen):
        return {**spec, mode: "all"}, layers
    spec = {**spec, mode: [layer for block in chosen for layer in block]}
    if rest := [block for block in blocks if block not in chosen]:
        other = draw(st.sampled_from([name for name in MODES if name != mode]))
        spec[other] = list(draw(st.sampled_from(rest)))
    return spec, layers


@st.composite
def desynced(draw: st.DrawFn, specs: st.SearchStrategy[Case]) -> Case:
    """One all-reduce in so many, of the blocks below that can."""
    spec, layers = draw(specs)
    return {**spec, "desync": {"every": draw(st.integers(2, 9))}}, layers


short_forms = skips() | pairs(whole) | pairs(skips())
short_forms |= moded(whole) | moded(short_forms)
specs = (
    short_forms
    | blocks()
    | moded(blocks())
    | desynced(moded(blocks()))
    | st.integers(1, 200).map(lambda layers: ("identity", layers))
)


@given(specs)
def test_every_kept_layer_runs_exactly_once(case: Case) -> None:
    plan = resolve(*case)
    ran = [layer for block in plan.blocks for layer in block]
    assert all(plan.blocks)
    assert len(set(ran)) == len(ran)
    assert set(ran) <= set(range(plan.layers))
    assert plan.kept == tuple(sorted(ran))
    assert sorted([*plan.kept, *plan.skipped]) == list(range(plan.layers))


@given(short_forms)
def test_short_forms_keep_the_order_of_layers(case: Case) -> None:
    ran = [layer for block in resolve(*case).blocks for layer in block]
    assert ran == sorted(ran)


@given(blocks())
def test_blocks_are_taken_as_written(case: Case) -> None:
    assert [list(block) for block in resolve(*case).blocks] == case[0]["blocks"]


@given(pairs(whole))
def test_pairs_group_the_span_and_nothing_else(case: Case) -> None:
    spec, layers = case
    start, end = spec["pair"]
    plan = resolve(spec, layers)
    assert plan.kept == tuple(range(layers))
    for block in plan.blocks:
        inside = start <= block[0] < end
        assert len(block) == (spec.get("group", 2) if inside else 1)
        assert all(start <= layer < end for layer in block) == inside


@given(moded(short_forms))
def test_modes_take_the_named_layers_and_nothing_else(case: Case) -> None:
    spec, layers = case
    empty: dict[str, Any] = {mode: [] for mode in MODES}
    plan, without = resolve(spec, layers), resolve({**spec, **empty}, layers)
    assert plan.blocks == without.blocks
    for mode in MODES:
        named = plan.kept if spec.get(mode) == "all" else spec.get(mode, [])
        positions = getattr(plan, mode)
        assert {layer for at in positions for layer in plan.blocks[at]} == set(named)


@given(skips())
def test_skip_keeps_floor_of_layers_over_speedup(case: Case) -> None:
    spec, layers = case
    kept = resolve(spec, layers).kept
    assert len(kept) == math.floor(layers / spec["skip"]["speedup"])
    assert (kept[0], kept[-1]) == (0, layers - 1)


@given(skips())
def test_balanced_gaps_differ_by_at_most_one(case: Case) -> None:
    spec, layers = case
    kept = resolve({"skip": {"speedup": spec["skip"]["speedup"]}}, layers).kept
    gaps = [after - before for before, after in pairwise(kept)]
    assert max(gaps) - min(gaps) <= 1


@given(specs)
def test_json_round_trip_is_exact(case: Case) -> None:
    plan = resolve(*case)
    back = resolve(json.loads(json.dumps(plan.to_spec())), plan.layers)
    assert back == plan
    assert back.digest == plan.digest


@given(specs, specs)
def test_digests_tell_plans_apart(one: Case, other: Case) -> None:
    plans = resolve(*one), resolve(*other)
    assert (plans[0].digest == plans[1].digest) == (plans[0] == plans[1])


@given(specs)
def test_schema_accepts_what_resolves(case: Case) -> None:
    jsonschema.validate(case[0], json_schema())
    jsonschema.validate(resolve(*case).to_spec(), json_schema())


# (spec, the words that its message must hold); the checkpoint has 30 layers.
ERRORS: list[tuple[Any, str]] = [
    ({"skip": {"speedup": "2"}}, "'skip.speedup': '2' is wrong"),
    ({"skip": {"speedup": True}}, "'skip.speedup': True is wrong"),
    ({1: 2}, "is not a mapping"),
    # The value as a whole
    (
        None,
        "None is not a mapping; allowed keys: 'blocks', 'desync', 'drop_attention', 'drop_mlp', ",
    ),
    ([[0], [1]], "[[0], [1]] is not a mapping"),
    (3, "3 is not a mapping"),
    ("atuo", "'atuo' is unknown; allowed: 'auto', 'identity', 'published' or a mapping"),
    ("two\nlines", r"'two\nlines' is unknown"),
    ("x" * 1000, "... is unknown"),
    ("auto", "'auto' needs the model"),
    ("published", "'published' needs the model; allowed here: a mapping, or 'identity'"),
    ({}, "empty; it needs one of the keys 'blocks', 'desync', 'drop_attention', "),
    ({"layers": 30}, "empty"),
    ({"blocks": None}, "empty"),
    # Keys
    ({"pairs": [0, 2]}, "'pairs' is unknown; did you mean 'pair'?"),
    (
        {"pairs": [0, 2]},
        "allowed: 'blocks', 'desync', 'drop_attention', 'drop_mlp', 'drop_sync', 'group', ",
    ),
    ({"pair": [0, 2], "grp": 2}, "'grp' is unknown; did you mean 'group'?"),
    ({"zzz": 1}, "'zzz' is unknown (allowed:"),
    ({"a\nb": 1}, r"'a\nb' is unknown"),
    ({"skip": {"speedup": 2, "shedule": "paper"}}, "'skip.shedule' is unknown; did you mean 'sch"),
    ({"skip": {"sped": 2}}, "'skip.sped' is unknown; did you mean 'speedup'?"),
    # blocks
    ({"blocks": []}, "'blocks': [] is wrong; allowed: a list of lists"),
    ({"blocks": [[]]}, "'blocks': a block is empty"),
    ({"blocks": [[0], []]}, "'blocks': a block is empty"),
    ({"blocks": 3}, "'blocks': 3 is wrong"),
    ({"blocks": [0, 1]}, "'blocks': 0 is wrong"),
    ({"blocks": [[30]]}, "'blocks': layer 30 is out of range; allowed: 0 to 29"),
    ({"blocks": [[-1]]}, "'blocks': -1 is wrong"),
    ({"blocks": [[True]]}, "'blocks': True is wrong"),
    ({"blocks": [[1.5]]}, "'blocks': 1.5 is wrong"),
    ({"blocks": [["1"]]}, "'blocks': '1' is wrong"),
    ({"blocks": [[0], [1, 0]]}, "'blocks': layer 0 is used twice; allowed: once"),
    ({"blocks": [[4, 4]]}, "'blocks': layer 4 is used twice"),
    ({"blocks": [[0]], "pair": [0, 2]}, "'blocks' names every layer"),
    ({"blocks": [[0]], "group": 2}, "'blocks' names every layer"),
    ({"blocks": [[0]], "skip": {"speedup": 2}}, "'blocks' names every layer"),
    # pair and group
    ({"pair": [14, 27]}, "'pair': [14, 27] holds 13 layers; allowed: a multiple of 2"),
    ({"pair": [14, 28], "group": 3}, "'pair': [14, 28] holds 14 layers; allowed: a multiple of 3"),
    ({"pair": [28, 32]}, "'pair': [28, 32] is not a span of layers; allowed:"),
    ({"pair": [28, 32]}, "0 <= start < end <= 30"),
    ({"pair": [8, 4]}, "'pair': [8, 4] is not a span"),
    ({"pair": [4, 4]}, "'pair': [4, 4] is not a span"),
    ({"pair": [-2, 4]}, "'pair': -2 is wrong; allowed: [start, end)"),
    ({"pair": [4]}, "'pair': [4] is wrong"),
    ({"pair": [4, 6, 8]}, "'pair': [4, 6, 8] is wrong"),
    ({"pair": "4-6"}, "'pair': '4-6' is wrong"),
    ({"pair": [0, 4], "group": 1}, "'group': 1 is wrong; allowed: how many layers"),
    ({"pair": [0, 4], "group": 2.5}, "'group': 2.5 is wrong"),
    ({"group": 2}, "empty"),
    ({"group": 2, "skip": {"speedup": 2}}, "'group': 2 needs the key 'pair'"),
    # skip
    ({"skip": 2}, "'skip': 2 is wrong; allowed: {\"speedup\": s}"),
    ({"skip": {}}, "'skip.speedup' is missing; allowed: a number from 1"),
    ({"skip": {"speedup": 0.5}}, "'skip.speedup': 0.5 is wrong; allowed: a number from 1"),
    ({"skip": {"speedup": -1}}, "'skip.speedup': -1 is wrong"),
    ({"skip": {"speedup": 15.5}}, "'skip.speedup': 15.5 keeps fewer than two layers"),
    ({"skip": {"speedup": 16}}, "allowed: 1 to 15"),
    ({"skip": {"speedup": float("nan")}}, "'skip.speedup': nan is wrong"),
    ({"skip": {"speedup": float("inf")}}, "'skip.speedup': inf is wrong"),
    ({"skip": {"speedup": "fast"}}, "'skip.speedup': 'fast' is wrong"),
    ({"skip": {"speedup": 2, "schedule": "even"}}, "'skip.schedule': 'even' is wrong; allowed:"),
    ({"skip": {"speedup": 2, "schedule": "even"}}, "'balanced' (spaced evenly) or 'paper'"),
    # A span is counted in the layers that skipping left.
    ({"skip": {"speedup": 2}, "pair": [14, 24]}, "'pair': [14, 24] holds 5 layers"),
    ({"skip": {"speedup": 10}, "pair": [2, 6]}, "'pair': [2, 6] holds 0 layers"),
    # ladder
    ({"ladder": 0}, "'ladder': 0 is wrong; allowed: which layers read the stream as a ladder"),
    ({"ladder": 31}, "'ladder': 31 is too many; allowed: 1 to 30"),
    ({"ladder": -1}, "'ladder': -1 is wrong"),
    ({"ladder": True}, "'ladder': True is wrong"),
    ({"ladder": 1.5}, "'ladder': 1.5 is wrong"),
    ({"ladder": "last"}, "'ladder': 'last' is wrong; allowed: which layers"),
    ({"ladder": [30]}, "'ladder': layer 30 is out of range; allowed: 0 to 29"),
    ({"ladder": [-1]}, "'ladder': [-1] is wrong"),
    ({"ladder": ["1"]}, "'ladder': ['1'] is wrong"),
    ({"ladder": [1], "skip": {"speedup": 2}}, "'ladder': layer 1 is skipped; allowed: layers that"),
    ({"ladder": 3, "pair": [26, 28]}, "'ladder': 3 takes some layers of the block [26, 27]; allow"),
    ({"ladder": [3], "pair": [2, 6]}, "'ladder': [3] takes some layers of the block [2, 3]"),
    # the other modes
    ({"drop_sync": [3], "pair": [2, 6]}, "'drop_sync': [3] takes some layers of the block [2, 3]"),
    ({"drop_sync": [3], "ladder": 28}, "'drop_sync': the block [3] is under 'ladder', too; allow"),
    ({"parallel_residual": 31}, "'parallel_residual': 31 is too many; allowed: 1 to 30"),
    ({"parallel_residual": "last"}, "'parallel_residual': 'last' is wrong; allowed: in which"),
    ({"dropsync": "all"}, "'dropsync' is unknown; did you mean 'drop_sync'?"),
    ({"drop_sync": 3, "tp": 0}, "'tp': 0 is wrong; allowed: the tensor-parallel size that"),
    ({"tp": 3}, "empty; it needs one of the keys"),
    # desync
    ({"desync": 4}, "'desync': 4 is wrong; allowed: {\"every\": n}, n from 2 on"),
    ({"desync": {"every": 1}}, "'desync': 1 is wrong; allowed: {\"every\": n}, n from 2 on"),
    ({"desync": {"evry": 4}}, "'desync': 4 is wrong; allowed: {\"every\": n}"),
    ({"desync": {"attention": [1]}}, "'desync': [1] is wrong; allowed: {\"every\": n}, n from"),
    (
        {"desync": {"attention": [30], "mlp": []}},
        "the attention of layer 30 does not run; allowed: what does",
    ),
    (
        {"drop_mlp": [3], "desync": {"attention": [], "mlp": [3]}},
        "'desync': the mlp of layer 3 does not run; allowed: what does",
    ),
    (
        {"pair": [2, 6], "desync": {"attention": [3], "mlp": []}},
        "attention [3] takes some layers of the block [2, 3]; allowed: all layers of a block",
    ),
    (
        {"desync": {"attention": [], "mlp": [29]}},
        "the last half that runs has no all-reduce; allowed: all before it",
    ),
    (
        {"drop_sync": [3], "desync": {"attention": [3], "mlp": []}},
        "'desync': the block [3] is under 'drop_sync' and needs one stream and its all-reduces",
    ),
    (
        {"parallel_residual": [3], "desync": {"attention": [], "mlp": [2]}},
        "'desync': the block [3] is under 'parallel_residual' and needs one stream",
    ),
    (
        {"ladder": [3], "desync": {"attention": [2], "mlp": []}},
        "'desync': the block [2] comes before one under 'ladder' and needs one stream",
    ),
    # halves
    ({"drop_attention": 3}, "'drop_attention': 3 is wrong; allowed: a list of layer indices"),
    ({"drop_mlp": [30]}, "'drop_mlp': layer 30 is out of range; allowed: 0 to 29"),
    ({"drop_mlp": [1], "skip": {"speedup": 2}}, "'drop_mlp': layer 1 is skipped; allowed: layers"),
    (
        {"drop_attention": [1], "drop_mlp": [1]},
        "layer 1 has no attention, either; allowed: to skip",
    ),
    ({"drop_attention": list(range(30))}, "no attention is left; allowed: to keep one"),
    (
        {"drop_mlp": [1], "ladder": "all"},
        "'ladder': the block [1] lacks a half of a layer; allowed",
    ),
    (
        {"blocks": [{"atention": [1], "mlp": [2]}]},
        "'blocks.atention' is unknown; did you mean 'att",
    ),
    ({"blocks": [{"attention": [1]}]}, "'blocks': {'attention': [1]} is wrong; allowed: a list of"),
    (
        {"blocks": [{"attention": [1, 1], "mlp": []}]},
        "attention [1, 1] names a layer twice; allowed",
    ),
    ({"blocks": [[0], {"attention": [0], "mlp": [1]}]}, "'blocks': layer 0 is used twice; allowed"),
    (
        {"blocks": [[0], {"attention": [], "mlp": []}]},
        "a block is empty; allowed: one layer or more",
    ),
    ({"lader": "all"}, "'lader' is unknown; did you mean 'ladder'?"),
    # layers
    ({"pair": [0, 2], "layers": 28}, "'layers': 28 is not this checkpoint's number of layers; al"),
    ({"pair": [0, 2], "layers": 28}, "allowed: 30"),
    ({"pair": [0, 2], "layers": 0}, "'layers': 0 is wrong"),
    ({"pair": [0, 2], "layers": "30"}, "'layers': '30' is wrong"),
]


@pytest.mark.parametrize(("spec", "words"), ERRORS, ids=lambda value: repr(value)[:60])
def test_error_is_one_line_that_says_what_is_wrong(spec: Any, words: str) -> None:
    with pytest.raises(UserError) as error:
        resolve(spec, 30)
    message = str(error.value)
    assert message.startswith("plan ")
    assert words in message
    assert len(message.splitlines()) == 1
    assert len(message) < 400


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
spec_like = st.dictionaries(
    st.sampled_from(
        ["blocks", "pair", "group", "skip", *MODES, "desync", *HALVES.values(), "tp", "layers", "x"]
    ),
    json_values
    | st.lists(st.integers(-2, 32), max_size=3)
    | st.lists(st.lists(st.integers(-2, 32), max_size=3), max_size=3)
    | st.dictionaries(st.sampled_from(["speedup", "schedule"]), json_values)
    | st.dictionaries(
        st.sampled_from(["every", "attention", "mlp"]),
        st.integers(0, 32) | st.lists(st.integers(0, 32), max_size=3),
    ),
)


@given(json_values | spec_like)
def test_any_json_gives_a_plan_or_one_line(spec: Any) -> None:
    try:
        plan = resolve(spec, 30)
    except UserError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert plan == resolve(plan.to_spec(), 30)


def test_load_reads_text_names_and_files(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(' {"pair": [2, 4]}\n')
    assert read_spec(' {"pair": [2, 4]} ') == read_spec(str(file)) == {"pair": [2, 4]}
    assert read_spec("auto") == read_spec('"auto"') == "auto"
    assert read_spec("identity\n") == "identity"


def test_load_reads_a_file_of_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "plan.json").write_text('"identity"')
    assert read_spec("~/plan.json") == "identity"


LOAD_ERRORS = [
    ('{"pair": [14, 28]', "malformed JSON (line 1 column 18: Expecting ',' delimiter)"),
    ("{pair: [14, 28]}", "malformed JSON (line 1 column 2: Expecting property name"),
    ('{"pair":\n[14, }', "malformed JSON (line 2 column 6:"),
    ("[" * 100_000, "malformed JSON (nested too deeply)"),
    ("no/such/plan.json", "'no/such/plan.json' can't be read (No such file or directory)"),
    ("idnetity", "'idnetity' can't be read (No such file or directory); allowed: JSON text"),
    (".", "can't be read (Is a directory)"),
    ("", "empty text; allowed: JSON text"),
    ("~nosuchuser/plan.json", "can't be read (not a path)"),
    ("plan\0.json", "can't be read (not a path)"),
    ('{"layers": ' + "1" * 5000 + "}", "malformed JSON (a number is too long)"),
    ('{"blocks": [' + " " * MAX_SPEC_BYTES + "[0]]}", f"allowed: {MAX_SPEC_BYTES} bytes"),
]


@pytest.mark.parametrize(("text", "words"), LOAD_ERRORS, ids=lambda value: value[:40])
def test_load_error_is_one_line(text: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        read_spec(text)
    assert words in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "malformed JSON"),
        (b'{"pair":', "malformed JSON (line 1"),
        (b"\xff\xfe\x00", "can't be read (not UTF-8 text)"),
        (b" " * (MAX_SPEC_BYTES + 1), "larger than a plan can be"),
        (b" null\n", "null is no plan; allowed: a mapping, 'auto', 'identity' or 'published'"),
    ],
    ids=["empty", "cut", "binary", "large", "null"],
)
def test_load_of_a_bad_file_names_the_file(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "my plan.json"
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_spec(str(file))
    assert words in str(error.value)
    assert "my plan.json" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "spec", [form[0] for form in (*FORMS, *LADDERS)] + ["auto", "published"], ids=repr
)
def test_schema_accepts(spec: Any) -> None:
    jsonschema.validate(spec, json_schema())


@pytest.mark.parametrize(
    "spec",
    [
        None,
        3,
        "atuo",
        [[0]],
        {"pairs": [0, 2]},
        {"blocks": []},
        {"blocks": [0]},
        {"blocks": [[-1]]},
        {"blocks": [["0"]]},
        {"pair": [0]},
        {"pair": [0, 2, 4]},
        {"pair": [-2, 2]},
        {"pair": [0, 4], "group": 1},
        {"skip": 2},
        {"skip": {}},
        {"skip": {"speedup": 0.5}},
        {"skip": {"speedup": "2"}},
        {"skip": {"speedup": 2, "schedule": "even"}},
        {"skip": {"speedup": 2, "keep": 3}},
        {"ladder": 0},
        {"ladder": "last"},
        {"ladder": [-1]},
        {"pair": [0, 2], "layers": 0},
    ],
    ids=repr,
)
def test_schema_rejects(spec: Any) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(spec, json_schema())


def test_schema_is_itself_valid() -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())
