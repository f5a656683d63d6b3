"""How a block is held: dealt, folded or whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from vllm_depthpar.errors import UserError
from vllm_depthpar.plan import resolve
from vllm_depthpar.plan.model_shape import UNFOLDED, ModelShape
from vllm_depthpar.plan.spec import DEALT, FOLDED, SINGLE, WHOLE

LAYERS = 6
CONFIG: dict[str, Any] = {
    "model_type": "mistral",
    "num_hidden_layers": LAYERS,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 512,
}
SHAPE = ModelShape.from_config(CONFIG)
QUANTIZED = ModelShape.from_config({**CONFIG, "quantization_config": {"quant_method": "awq"}})
KINDS = ["full_attention", "full_attention", *["full_attention", "sliding_attention"] * 2]
WINDOWS = ModelShape.from_config({**CONFIG, "sliding_window": 8, "layer_types": KINDS})
GEMMA = ModelShape.from_config({**CONFIG, "model_type": "gemma2", "head_dim": 16})
MOE = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
MIXTRAL = ModelShape.from_config({**CONFIG, **MOE})
ADAPTED = replace(SHAPE, layouts=(WHOLE,))
PAIRS: dict[str, Any] = {"blocks": [[0, 1], [2, 3], [4], [5]]}


@pytest.mark.parametrize(
    ("shape", "tp", "expected"),
    [
        (SHAPE, 1, [FOLDED, FOLDED]),
        (SHAPE, 2, [DEALT, DEALT]),
        (QUANTIZED, 1, [WHOLE, WHOLE]),
        (QUANTIZED, 2, [DEALT, DEALT]),
        (WINDOWS, 1, [FOLDED, WHOLE]),
        (WINDOWS, 2, [DEALT, WHOLE]),
        (ADAPTED, 2, [WHOLE, WHOLE]),
        (GEMMA, 1, [WHOLE, WHOLE]),
        (GEMMA, 2, [WHOLE, WHOLE]),
        (MIXTRAL, 2, [WHOLE, WHOLE]),
    ],
)
def test_the_fastest_that_can_be(shape: ModelShape, tp: int, expected: list[str]) -> None:
    plan = resolve(PAIRS, LAYERS)
    assert [shape.layout(plan, at, tp) for at in range(4)] == [*expected, SINGLE, SINGLE]
    asked = replace(plan, layout=WHOLE)
    assert [shape.layout(asked, at, tp) for at in range(2)] == [WHOLE, WHOLE]


def test_what_ranks_cannot_share_is_whole() -> None:
    """Three times one KV head on two ranks; each layer's alone they copy."""
    shape = replace(SHAPE, kv_heads=1)
    plan = resolve({"pair": [0, 6], "group": 3}, LAYERS)
    assert [shape.layout(plan, 0, tp) for tp in (1, 2, 3)] == [FOLDED, WHOLE, DEALT]
    assert shape.fitting_tps(plan, 4) == [1, 2, 3, 4]
    # A pair is cut where one layer can't be, unless it is whole.
    odd, pairs = replace(SHAPE, heads=3, kv_heads=3), resolve({"pair": [0, 6]}, LAYERS)
    assert odd.fitting_tps(pairs, 3) == [1, 2, 3]
    assert odd.fitting_tps(replace(pairs, layout=WHOLE), 3) == [1, 3]


def test_kv_cache_of_whole_blocks_is_the_plain_models() -> None:
    identity, pairs = resolve("identity", LAYERS), resolve({"pair": [0, 6]}, LAYERS)
    shape = replace(SHAPE, kv_heads=1)
    plain = shape.kv_bytes_per_token(identity, 2)
    assert shape.kv_bytes_per_token(replace(pairs, layout=WHOLE), 2) == plain
    assert shape.kv_bytes_per_token(pairs, 2) == plain / 2  # no head is copied


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (QUANTIZED, ["[0, 1]", "quantized or served with adapters"]),
        (replace(SHAPE, layouts=UNFOLDED), ["[0, 1]", "quantized or served with adapters"]),
        (WINDOWS, ["[2, 3]", "windows of attention differ"]),
        (GEMMA, ["[0, 1]", "which have norms after their modules"]),
        (MIXTRAL, ["[0, 1]", "whose routers choose among their own experts"]),
    ],
)
def test_what_cannot_be_folded_is_said(shape: ModelShape, words: list[str]) -> None:
    plan = replace(resolve(PAIRS, LAYERS), layout=FOLDED)
    with pytest.raises(UserError) as error:
        shape.check_plan(plan)
    assert all(word in str(error.value) for word in [*words, "key 'layout'", "allowed: 'whole'"])
    SHAPE.check_plan(plan)
    shape.check_plan(replace(plan, layout=None))


def test_what_norms_after_modules_forbid() -> None:
    with pytest.raises(UserError, match="'desync': this model's modules have norms after them"):
        GEMMA.check_plan(resolve({"desync": {"every": 2}}, LAYERS))
    for spec in (PAIRS, {"ladder": "all"}, {"drop_sync": "all"}, {"parallel_residual": "all"}):
        GEMMA.check_plan(resolve(spec, LAYERS))
    # Their names say which half a norm is of, and in Llama's layers one of them says another.
    assert GEMMA.family.half_of("post_attention_layernorm.weight") == "attention"
    assert SHAPE.family.half_of("post_attention_layernorm.weight") == "mlp"


def test_a_layout_is_part_of_a_plan() -> None:
    plan = resolve({**PAIRS, "layout": "whole"}, LAYERS)
    assert plan.to_spec()["layout"] == "whole"
    assert resolve(plan.to_spec(), LAYERS) == plan
    assert plan.digest != resolve(PAIRS, LAYERS).digest
    with pytest.raises(UserError, match="key 'layout': 'dealt' is wrong; allowed: how layers"):
        resolve({**PAIRS, "layout": "dealt"}, LAYERS)
