"""LoRA adapters made for the unmodified model, on restructured ones: each where its layer runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from assertions import check
from engine_runs import Case, Result, run
from models import prompts, write_adapter, write_llama

from vllm_depthpar import hf

PLANS: dict[str, Any] = {
    "identity": "identity",
    "pairs": {"pair": [0, 6]},
    "every mode": {
        "blocks": [[1, 0], [2], [3, 4]],
        "ladder": [2],
        "drop_sync": [0, 1],
        "parallel_residual": [3, 4],
        "layout": "whole",
    },
    "halves": {"drop_attention": [1], "drop_mlp": [3], "skip": {"speedup": 1.2}},
}
# Adapters of all projections and of some, and none, in one batch.
ADAPTERS = {8: "all-linear", 64: "all-linear", 16: ".*(q_proj|down_proj)"}


def some(case: Case, result: Result, chosen: list[int]) -> tuple[Case, Result]:
    """Of a run, some prompts."""
    return replace(case, prompts=[case.prompts[at] for at in chosen]), replace(
        result,
        prompt_logprobs=[result.prompt_logprobs[at] for at in chosen],
        tokens=[result.tokens[at] for at in chosen],
    )


@pytest.mark.parametrize(
    ("ranks", "compiled", "plans"),
    [(1, False, [*PLANS]), (2, False, [*PLANS]), (1, True, ["every mode"])],
    ids=["TP1", "TP2", "compiled"],
)
def test_each_adapter_is_that_of_the_merged_model(
    ranks: int, compiled: bool, plans: list[str], tmp_path: Path
) -> None:
    model = write_llama(tmp_path / "model", attention_bias=True, mlp_bias=True)
    merged: dict[Path | None, Path] = {None: model}
    for rank, projections in ADAPTERS.items():
        written = write_adapter(model, tmp_path, rank=rank, seed=rank, projections=projections)
        merged[written[0]] = written[1]
    # Two prompts of each, mixed.
    adapters = [*merged, *merged]
    cases = [
        Case(
            model,
            PLANS[plan],
            prompts(len(adapters), 40).tolist(),
            max_tokens=8,
            adapters=adapters,
            engine={
                "enable_lora": True,
                "max_loras": 3,
                "max_lora_rank": 64,
                # Not the head: vLLM's CPU kernels can't give prompts' log-probabilities with it.
                "lora_target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
            },
        )
        for plan in plans
    ]
    for case, result in zip(cases, run(cases, ranks, compiled=compiled), strict=True):
        for adapter, checkpoint in merged.items():
            chosen = [at for at, of in enumerate(adapters) if of == adapter]
            reference = hf.load(checkpoint, case.plan, ranks=ranks)
            one, answer = some(case, result, chosen)
            check(answer, one, reference)
            if adapter is not None:
                with pytest.raises(AssertionError), torch.no_grad():
                    check(answer, one, hf.load(model, case.plan, ranks=ranks))
