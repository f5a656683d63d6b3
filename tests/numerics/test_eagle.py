"""Speculators that read the target's insides: what they propose is verified, so the text is right.

With seeded heads: how much a trained one gains on a restructured model can't be said here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from assertions import check
from engine_runs import Case, run
from models import prompts, write_eagle, write_llama

from vllm_depthpar import hf

# Fewer blocks than layers: the head's own layer must not be taken for one of the target's.
PLANS: list[Any] = [
    {"pair": [1, 5]},
    {"pair": [0, 8], "layout": "whole"},
    {"skip": {"speedup": 1.5}},
]


@pytest.mark.parametrize("method", ["eagle", "eagle3"])
def test_right_tokens(method: str, tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model", layers=8)
    head = write_eagle(model, tmp_path / method, method)
    speculation = {"method": method, "model": str(head), "num_speculative_tokens": 2}
    plans = [*PLANS, {"ladder": 3}] if method == "eagle" else PLANS
    cases = [
        Case(
            model,
            plan,
            prompts(4, 40).tolist(),
            max_tokens=24,
            engine={"speculative_config": speculation},
        )
        for plan in plans
    ]
    for case, result in zip(cases, run(cases), strict=True):
        check(result, case, hf.load(model, case.plan))
