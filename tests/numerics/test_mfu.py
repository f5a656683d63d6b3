"""What `--enable-mfu-metrics` counts of a restructured model, against plain vLLM's counts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fork_server import call
from models import write_llama

from vllm_depthpar.plan import resolve

LAYERS = 6
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"model_type": "mistral", "sliding_window": 8},
    "qwen3": {
        "model_type": "qwen3",
        "sliding_window": 8,
        "use_sliding_window": True,
        "max_window_layers": 4,
    },
    # One layer in three sees all tokens.
    "gemma3": {"model_type": "gemma3_text"},
    "mixtral": {"model_type": "mixtral"},
}
PLANS: list[Any] = ["plain", "identity", {"pair": [0, 6]}, {"pair": [2, 4]}, {"blocks": [[0], [4]]}]

Counts = dict[str, dict[str, int]]


def count(model: Path, plan: Any, tp: int) -> Counts:
    """Flops, bytes read and bytes written of one step, in parts; in a process of its own."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.metrics.perf import ExecutionContext, ModelMetrics

    chosen: dict[str, Any] = {}
    if plan != "plain":
        chosen = {"model_impl": "depthpar", "hf_overrides": {"depthpar": plan}}
    config = EngineArgs(
        model=str(model), tensor_parallel_size=tp, enable_mfu_metrics=True, **chosen
    ).create_engine_config()
    metrics, step = ModelMetrics(config), ExecutionContext()
    step.add(64, 64, is_prefill=True)
    step.add(1, 200, is_prefill=False)
    return {
        "flops": metrics.get_num_flops_breakdown(step),
        "read": metrics.get_read_bytes_breakdown(step),
        "written": metrics.get_write_bytes_breakdown(step),
    }


def counts_of(model: Path, plans: list[Any], tp: int) -> list[Counts]:
    return [count(model, plan, tp) for plan in plans]


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int, str], Counts]:
    found = {}
    for family, keys in FAMILIES.items():
        model = write_llama(tmp_path_factory.mktemp(family), layers=LAYERS, **keys)
        for tp in (1, 2):
            answers = call(counts_of, model, PLANS, tp)
            for plan, answer in zip(PLANS, answers, strict=True):
                found[family, tp, json.dumps(plan)] = answer
    return found


# What a block of any width does once: it reads the stream's norm, and adds one sum to the stream.
ONCE = {
    "attn.qkv_input",
    "attn.out_output",
    "ffn.dense_up_gate_input",
    "ffn.dense_down_output",
}
# Where some layers have windows, which.
WINDOWED: dict[str, Callable[[int], bool]] = {
    "qwen3": lambda layer: layer >= 4,
    "gemma3": lambda layer: layer % 3 < 2,
}
BY_WINDOW = {"attn.attn_qk", "attn.attn_av", "attn.attn_input"}


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("plan", PLANS[1:], ids=json.dumps)
def test_a_plan_counts_what_runs(
    plan: Any, family: str, tp: int, counted: dict[tuple[str, int, str], Counts]
) -> None:
    ours, (plain, all_full, all_windowed) = (
        counted[family, tp, json.dumps(plan)],
        (counted[kind, tp, '"plain"'] for kind in (family, "llama", "mistral")),
    )
    runs = resolve(plan, LAYERS)
    for kind, parts in plain.items():
        assert ours[kind].keys() == parts.keys()
        for part, whole in parts.items():
            times = runs.depth if part in ONCE else len(runs.kept)
            expected = whole if part.startswith("unembed.") else times * whole // LAYERS
            if family in ("gemma3", "mixtral") and part in ONCE:
                times = len(runs.kept)  # whole in any case
                expected = times * whole // LAYERS
            if family in WINDOWED and part in BY_WINDOW:
                windowed = sum(map(WINDOWED[family], runs.kept))
                full = len(runs.kept) - windowed
                expected = (
                    full * all_full[kind][part] + windowed * all_windowed[kind][part]
                ) // LAYERS
            assert ours[kind][part] == expected, part
