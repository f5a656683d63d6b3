"""LoRA adapters made for the unmodified model, on restructured ones: each where its layer runs."""

from __future__ import annotations

from collections.abc import Mapping
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


# Families of which vLLM's own layers are served, or whose files have some projections as one; what
# vLLM's CPU kernels can't give prompts' log-probabilities with is left out where it has it: the
# head.
LAYERS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
FAMILIES: dict[str, tuple[dict[str, Any], list[str] | None]] = {
    "Gemma 3": ({"model_type": "gemma3_text", "tie": True}, None),
    "Phi 3": ({"model_type": "phi3"}, LAYERS),
    "GLM 4": ({"model_type": "glm4", "attention_bias": True}, None),
    "Granite": ({"model_type": "granite", "tie": True}, LAYERS),
}
# A pair, and a layer that does not run.
FAMILY: Any = {"blocks": [[0], [1, 2], [4], [5]]}


def some(case: Case, result: Result, chosen: list[int]) -> tuple[Case, Result]:
    """Of a run, some prompts."""
    return replace(case, prompts=[case.prompts[at] for at in chosen]), replace(
        result,
        prompt_logprobs=[result.prompt_logprobs[at] for at in chosen],
        tokens=[result.tokens[at] for at in chosen],
    )


def check_each(case: Case, result: Result, merged: Mapping[Path | None, Path], ranks: int) -> None:
    """Each prompt's answers are those of the checkpoint with its adapter merged, and not of that
    without.

    Args:
        merged: by adapter, the former; by None, the latter.
    """
    for adapter, checkpoint in merged.items():
        chosen = [at for at, of in enumerate(case.adapters or ()) if of == adapter]
        one, answer = some(case, result, chosen)
        check(answer, one, hf.load(checkpoint, case.plan, ranks=ranks))
        if adapter is not None:
            with pytest.raises(AssertionError), torch.no_grad():
                check(answer, one, hf.load(merged[None], case.plan, ranks=ranks))


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
                "lora_target_modules": LAYERS,
            },
        )
        for plan in plans
    ]
    for case, result in zip(cases, run(cases, ranks, compiled=compiled), strict=True):
        check_each(case, result, merged, ranks)


def test_adapters_of_other_families(tmp_path: Path) -> None:
    """Of all projections, those that are one in the checkpoint included."""
    cases, merged = [], []
    for name, (shape, targets) in FAMILIES.items():
        model = write_llama(tmp_path / name / "model", **shape)
        adapter, checkpoint = write_adapter(model, tmp_path / name)
        merged.append({None: model, adapter: checkpoint})
        engine = {"enable_lora": True, "lora_target_modules": targets}
        texts = prompts(4, 40).tolist()
        adapters = [None, adapter] * 2
        cases.append(Case(model, FAMILY, texts, max_tokens=8, adapters=adapters, engine=engine))
    for case, result, checkpoints in zip(cases, run(cases), merged, strict=True):
        check_each(case, result, checkpoints, ranks=1)
