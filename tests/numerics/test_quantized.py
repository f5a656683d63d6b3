"""Quantized checkpoints, side by side: as far from the dequantized reference as plain vLLM is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from assertions import spec_of
from engine_runs import Case, Result, run
from models import prompts, quantize_int8, write_llama

from vllm_depthpar import hf

pytestmark = pytest.mark.next

# One rank holds them whole; two hold pairs dealt, and the rest whole.
PLANS: list[Any] = [
    {"pair": [0, 6]},
    {"pair": [1, 5]},
    {"pair": [0, 6], "group": 3, "ladder": [3, 4, 5]},
    {"blocks": [[0], {"attention": [1, 2], "mlp": [2]}, [3, 4], [5]], "parallel_residual": [3, 4]},
    {"pair": [1, 5], "layout": "whole", "drop_sync": "all"},
]


def error(case: Case, result: Result, dequantized: Path, ranks: int) -> float:
    """The mean distance of the prompts' log-probabilities from the reference's."""
    model = hf.load(dequantized, spec_of(case.plan), ranks=ranks)
    text = torch.tensor(case.prompts)
    with torch.no_grad():
        logs = model(text).logits[:, :-1].log_softmax(-1).gather(2, text[:, 1:, None])
    return (torch.stack(result.prompt_logprobs) - logs[..., 0]).abs().mean().item()


@pytest.mark.parametrize("ranks", [1, 2], ids=["TP1", "TP2"])
@pytest.mark.parametrize("ignored", [(), (2, 5)], ids=["all layers", "some layers"])
def test_int8(ranks: int, ignored: tuple[int, ...], tmp_path: Path) -> None:
    """Whichever layers the checkpoint quantizes, those are, wherever they run."""
    source = write_llama(
        tmp_path / "fp32", hidden=128, heads=4, kv_heads=2, head_dim=32, intermediate=256
    )
    int8, dequantized = quantize_int8(source, tmp_path, ignored)
    cases = [
        Case(int8, plan, prompts(4, 40).tolist(), dtype="bfloat16")
        for plan in ("plain", *(PLANS[:2] if ignored else PLANS))
    ]
    errors = [
        error(case, result, dequantized, ranks)
        for case, result in zip(cases, run(cases, ranks), strict=True)
    ]
    plain, *ours = errors
    assert 0 < plain < 0.2
    assert max(ours) < 1.5 * plain, errors
