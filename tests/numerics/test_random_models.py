"""Random models of many shapes in vLLM against the reference: families, hosts, drafts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from assertions import check
from engine_runs import Case, Result, run
from equations import plain_logits
from models import LLAMA3_ROPE, as_published, prompts, write_llama

from vllm_depthpar import hf
from vllm_depthpar.plan import Plan, resolve

pytestmark = pytest.mark.next

# Ways into and out of ladder blocks, as in test_hf.py.
LADDERS: list[Any] = [
    {"ladder": "all"},
    {"ladder": [0, 2, 3, 5]},
    {"pair": [0, 6], "ladder": "all"},
    {"pair": [1, 5], "ladder": [3, 4, 5]},
    {"skip": {"speedup": 1.5}, "ladder": [0, 2]},
]
# Blocks that reduce once, of one layer, dealt out and wide; beside ladders, and all of one mode.
ONCE: list[Any] = [
    {"blocks": [[0], [3, 1], [4], [2, 5]], "ladder": [0], "drop_sync": [1, 3, 2, 5]},
    {"blocks": [[0, 3, 1], [4], [2], [5]], "drop_sync": [0, 1, 3, 4], "ladder": [2, 5]},
    {"blocks": [[0, 3, 1], [4], [2, 5]], "parallel_residual": [0, 1, 3, 4], "ladder": [2, 5]},
    {"pair": [0, 4], "parallel_residual": "all"},
]
# Sums that are not reduced: of one layer, dealt out and wide, one after the other and alone.
DESYNC: list[Any] = [
    {"blocks": [[0], [3, 1, 2], [4, 5]], "desync": {"attention": [0, 3, 1, 2, 4, 5], "mlp": [0]}},
    {"pair": [0, 4], "drop_attention": [4], "desync": {"every": 4}},
]
# Missing halves: of layers alone and side by side, first and last, before and after ladders.
HALF: list[Any] = [
    {"drop_attention": [0, 3], "drop_mlp": [2, 5]},
    {"drop_attention": [1], "drop_mlp": [3], "ladder": [0, 2, 4, 5]},
    {"blocks": [{"attention": [], "mlp": [1, 0]}, {"attention": [2, 3], "mlp": [3]}, [4, 5]]},
]
# Every kind of block: TP 2 deals blocks of two out to the ranks, and cuts blocks of three where one
# rank gets heads of two layers.
FAMILY: list[Any] = [
    {"pair": [1, 5]},
    {"blocks": [[0, 3, 1], [4], [2, 5]], "ladder": [0, 1, 3, 4]},
    {"blocks": [[0, 3, 1], [4], [2, 5]], "drop_sync": [0, 1, 3, 4], "parallel_residual": [2, 5]},
]
# The same with every layer as it is, in all modes.
WHOLE: list[Any] = [
    {**plan, "layout": "whole"}
    for plan in ({"pair": [0, 6]}, *LADDERS[2:4], *ONCE[:3], *DESYNC, *HALF[2:])
]
FAMILIES: dict[str, dict[str, Any]] = {
    "Mistral": {"model_type": "mistral", "sliding_window": 8},
    "Qwen2": {"model_type": "qwen2", "hidden": 128, "tie": True},
    "Qwen3": {"model_type": "qwen3"},
}
# With norms after the modules: their side-by-side layers are whole in any case.
GEMMAS: dict[str, dict[str, Any]] = {
    "Gemma 2": {"model_type": "gemma2", "tie": True},
    "Gemma 3": {"model_type": "gemma3_text"},
}
# Whole in any case, too.
OTHERS: dict[str, dict[str, Any]] = {
    "Phi 3": {"model_type": "phi3"},
    "GLM 4": {"model_type": "glm4", "attention_bias": True},
    "Granite": {"model_type": "granite", "tie": True},
}
# LayerNorms and ALiBi; of their authors' family the schedule of Unified Layer Skipping, too.
BLOOM: dict[str, Any] = {"model_type": "bloom", "hidden": 128, "tie": True}
PAPER: list[Any] = [{"skip": {"speedup": 2, "schedule": "paper"}}]
# Routers beside each other, and experts whose sums the blocks reduce.
MOES: dict[str, dict[str, Any]] = {
    "Mixtral": {"model_type": "mixtral"},
    "Qwen2 MoE": {"model_type": "qwen2_moe", "hidden": 128, "tie": True},
    "Qwen3 MoE": {"model_type": "qwen3_moe"},
    "GPT-OSS": {"model_type": "gpt_oss", "intermediate": 64},
}
# Shapes of the families, each with plans that exercise it. Six layers.
RANDOM: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "GQA, untied": ({}, [{"pair": [1, 5]}, {"pair": [0, 6], "group": 3}, {"pair": [0, 6]}]),
    "MHA, tied": ({"kv_heads": 4, "tie": True}, [{"pair": [2, 6]}, {"blocks": [[0], [2, 1], [5]]}]),
    "one KV head": ({"kv_heads": 1}, [{"pair": [0, 6]}, {"pair": [1, 5]}]),
    "biases": (
        {"attention_bias": True, "mlp_bias": True},
        [{"pair": [1, 5]}, {"pair": [0, 3], "group": 3}],
    ),
    "llama3 rope": ({"rope_scaling": LLAMA3_ROPE}, [{"pair": [1, 5]}]),
    "ladders": ({"attention_bias": True, "mlp_bias": True}, LADDERS),
    "halves": ({"attention_bias": True, "mlp_bias": True}, HALF),
    "Qwen3, halves": ({"model_type": "qwen3"}, HALF[2:]),
    "reduced once": ({"attention_bias": True, "mlp_bias": True}, ONCE),
    "not reduced": ({"attention_bias": True, "mlp_bias": True}, DESYNC),
    **{name: (shape, FAMILY) for name, shape in FAMILIES.items()},
    "Gemma 2": (GEMMAS["Gemma 2"], [FAMILY[1], HALF[1]]),
    "Gemma 3": (GEMMAS["Gemma 3"], FAMILY),
    "Mixtral": (MOES["Mixtral"], [FAMILY[1], HALF[2]]),
    "Qwen2 MoE": (MOES["Qwen2 MoE"], [FAMILY[2], DESYNC[0]]),
    "Qwen3 MoE": (MOES["Qwen3 MoE"], [*FAMILY, HALF[1]]),
    "GPT-OSS": (MOES["GPT-OSS"], [*FAMILY, DESYNC[0], HALF[1]]),
    "whole": ({"attention_bias": True, "mlp_bias": True}, WHOLE),
    "whole, one KV head": ({"kv_heads": 1}, WHOLE[:1]),
    "Phi 3": (OTHERS["Phi 3"], [FAMILY[2], HALF[1]]),
    "GLM 4": (OTHERS["GLM 4"], [FAMILY[1], FAMILY[2]]),
    "Granite": (OTHERS["Granite"], [*FAMILY[1:], DESYNC[0], HALF[1]]),
    "BLOOM": (BLOOM, [*PAPER, *FAMILY, HALF[1]]),
    **{f"{name}, whole": (shape, WHOLE[3:4]) for name, shape in FAMILIES.items()},
    # TP 2 can't deal out three KV heads evenly: such a block is whole there, on one rank folded.
    "three KV heads": ({"kv_heads": 1}, [{"pair": [0, 6], "group": 3}]),
    # 3 heads: TP 2 cuts no layer of it, but does cut a pair.
    "odd heads, in pairs": ({"hidden": 96, "heads": 3, "kv_heads": 3}, [{"pair": [0, 6]}]),
}


def test_ladders_between_two_hosts(tmp_path: Path) -> None:
    """With messages that are started and waited for apart, and plans without any ladder."""
    folder = write_llama(tmp_path, attention_bias=True, mlp_bias=True)
    plans = [*LADDERS, *ONCE, *HALF[1:], *DESYNC[:1], {"pair": [1, 5]}, *WHOLE[1:5]]
    cases = [Case(folder, plan, prompts(4, 40).tolist(), max_tokens=16) for plan in plans]
    for case, result in zip(cases, run(cases, ranks=2, hosts=True), strict=True):
        check(result, case, hf.load(folder, case.plan, ranks=2))


def test_checkpoints_of_the_ladder_authors(tmp_path: Path) -> None:
    """Served as they are: no `--model-impl`, no remote code."""
    ladders: dict[str, int | list[int]] = {"LlamaForCausalLM": 3, "LlamaLadderForCausalLM": [1, 4]}
    cases = []
    for architecture, ladder in ladders.items():
        folder = tmp_path / architecture
        write_llama(folder, ladder_layers=ladder, architecture=architecture)
        cases.append(Case(folder, "plain", prompts(4, 40).tolist(), max_tokens=16))
    llama = write_llama(tmp_path / "llama")
    for case, result, ladder in zip(cases, run(cases), ladders.values(), strict=True):
        check(result, case, hf.load(llama, {"ladder": ladder}))
        check(result, case, hf.load(case.model, {"ladder": ladder}))


def test_three_hosts(tmp_path: Path) -> None:
    folder = write_llama(tmp_path, hidden=96, heads=3, kv_heads=3, layers=4, vocab=576)
    # A pair's heads are cut where one rank has some of both layers.
    plans: list[Any] = [
        {"pair": [1, 3], "ladder": 3},
        {"pair": [1, 3], "drop_sync": [0, 1, 2], "parallel_residual": [3]},
    ]
    cases = [Case(folder, plan, prompts(2, 40).tolist(), max_tokens=4) for plan in plans]
    for case, result in zip(cases, run(cases, ranks=3, hosts=True), strict=True):
        check(result, case, hf.load(folder, case.plan, ranks=3))


@pytest.fixture(scope="module")
def random_cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    cases = {}
    for name, (shape, plans) in RANDOM.items():
        folder = write_llama(tmp_path_factory.mktemp("llama"), **shape)
        for plan in plans:
            cases[f"{name} {json.dumps(plan)}"] = Case(
                folder, plan, prompts(4, 40).tolist(), max_tokens=16
            )
    return cases


RANDOM_NAMES = [
    f"{name} {json.dumps(plan)}" for name, (_, plans) in RANDOM.items() for plan in plans
]


@pytest.fixture(scope="module", params=[1, 2], ids=["TP1", "TP2"])
def ranks(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def random_results(ranks: int, random_cases: dict[str, Case]) -> dict[str, Result]:
    return dict(zip(random_cases, run(list(random_cases.values()), ranks), strict=True))


@pytest.mark.parametrize("name", RANDOM_NAMES)
def test_random_model_equals_reference(
    name: str, ranks: int, random_cases: dict[str, Case], random_results: dict[str, Result]
) -> None:
    case = random_cases[name]
    check(random_results[name], case, hf.load(case.model, case.plan, ranks=ranks))


def test_identity_of_other_families_is_plain(tmp_path: Path) -> None:
    """vLLM's own class of each family gives the same numbers, to the last bit."""
    cases = [
        Case(folder, plan, prompts(1, 40).tolist(), max_tokens=4)
        for name, shape in (FAMILIES | GEMMAS | OTHERS | MOES).items()
        for folder in [write_llama(tmp_path / name, layers=2, **shape)]
        for plan in ("plain", "identity")
    ]
    results = iter(run(cases))
    for plain, identity in zip(results, results, strict=True):
        assert identity.tokens == plain.tokens
        for ours, theirs in zip(identity.prompt_logprobs, plain.prompt_logprobs, strict=True):
            assert torch.equal(ours, theirs)


def test_windows_of_some_layers(tmp_path: Path) -> None:
    """Each block has the window of its layers, wherever it runs. Against the equations."""
    kinds = ["full_attention", "sliding_attention"] * 3
    some: dict[str, tuple[dict[str, Any], Any]] = {
        # Side by side with different windows, too.
        "Mistral": ({"layer_types": kinds}, [[3, 0], [1, 2, 4], [5]]),
        "Qwen2": ({"use_sliding_window": True, "max_window_layers": 3}, [[0, 2, 1], [3], [5, 4]]),
        "Qwen3": ({"use_sliding_window": True, "layer_types": kinds}, [[3, 1], [0, 2, 4], [5]]),
        "GPT-OSS": ({"layer_types": kinds}, [[3, 1], [0, 2, 4], [5]]),
    }
    cases = []
    for name, (keys, blocks) in some.items():
        shape = (FAMILIES | MOES)[name] | {"sliding_window": 8} | keys
        folder = write_llama(tmp_path / name, **shape)
        cases.append(Case(folder, {"blocks": blocks}, prompts(2, 40).tolist(), max_tokens=16))
    for case, result in zip(cases, run(cases), strict=True):
        plan = resolve(case.plan, len(kinds))

        def reference(
            texts: torch.Tensor, folder: Path = case.model, plan: Plan = plan
        ) -> SimpleNamespace:
            return SimpleNamespace(
                logits=torch.stack([plain_logits(folder, plan, text) for text in texts]).float()
            )

        check(result, case, reference)


def test_where_vllm_is_not_transformers(tmp_path: Path) -> None:
    """docs/plans.md says in what, and that these models are transformers' here, with any plan."""
    folder = write_llama(tmp_path / "bias", model_type="qwen3", attention_bias=True)
    cases = [
        Case(folder, plan, prompts(2, 40).tolist(), max_tokens=4)
        for plan in ("identity", {"pair": [1, 5]}, "plain")
    ]
    *ours, plain = zip(cases, run(cases), strict=True)
    for case, result in ours:
        check(result, case, hf.load(folder, case.plan))
    # vLLM adds no bias to what o_proj gives.
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        check(plain[1], plain[0], hf.load(folder, "identity"))
    # vLLM takes the exact GELU. Names are those of published files.
    bloom = as_published(write_llama(tmp_path / "bloom", **BLOOM), tmp_path / "published")
    cases = [Case(bloom, plan, prompts(2, 40).tolist()) for plan in ("identity", "plain")]
    here, theirs = run(cases)
    check(here, cases[0], hf.load(bloom, "identity"))
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        check(theirs, cases[1], hf.load(bloom, "identity"))
    some = write_llama(
        tmp_path / "windows",
        model_type="qwen3",
        sliding_window=8,
        use_sliding_window=True,
        max_window_layers=3,
    )
    with pytest.raises(RuntimeError, match="Sliding window for some but all layers"):
        run([Case(some, "plain", prompts(1, 8).tolist())])


def test_auto_of_one_layer(tmp_path: Path) -> None:
    folder = write_llama(tmp_path, layers=1)
    case = Case(folder, "auto", prompts(2, 40).tolist(), max_tokens=4)
    (result,) = run([case])
    check(result, case, hf.load(folder, "identity"))


def test_ngram_speculation(tmp_path: Path) -> None:
    """Speculated tokens are verified by the restructured model: its own greedy text comes out."""
    folder = write_llama(tmp_path, vocab=64)
    repeating = [row.tolist() * 4 for row in prompts(4, 10, vocab=64)]
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    case = Case(
        folder,
        {"pair": [1, 5]},
        repeating,
        max_tokens=24,
        engine={"speculative_config": speculation},
    )
    (result,) = run([case])
    check(result, case, hf.load(folder, case.plan))


def test_drafts_with_blocks_of_different_widths(tmp_path: Path) -> None:
    """Whatever the draft says, the answers are the unmodified model's."""
    model = write_llama(tmp_path / "model")
    draft = write_llama(
        tmp_path / "draft", architecture="DepthParForCausalLM", depthpar={"pair": [1, 3]}
    )
    speculation = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 2}
    case = Case(
        model,
        "plain",
        prompts(8, 60).tolist(),
        max_tokens=60,
        engine={"speculative_config": speculation, "max_num_seqs": 4},
    )
    (result,) = run([case])
    check(result, case, hf.load(model, "identity"))
