"""Speculators that read the target's insides: what they propose is verified, so the text is right.

With seeded heads: how much a trained one gains on a restructured model can't be said here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from assertions import check
from engine_runs import Case, run
from models import prompts, write_eagle, write_llama, write_medusa

from vllm_depthpar import hf

# Fewer blocks than layers: the head's own layer must not be taken for one of the target's.
PLANS: list[Any] = [
    {"pair": [1, 5]},
    {"pair": [0, 8], "layout": "whole"},
    {"skip": {"speedup": 1.5}},
]
TOKENS = 24


@pytest.mark.parametrize("method", ["eagle", "eagle3"])
def test_eagle(method: str, tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model", layers=8)
    head = write_eagle(model, tmp_path / method, method)
    speculation = {"method": method, "model": str(head), "num_speculative_tokens": 2}
    plans = [*PLANS, {"ladder": 3}] if method == "eagle" else PLANS
    cases = [
        Case(
            model,
            plan,
            prompts(4, 40).tolist(),
            max_tokens=TOKENS,
            engine={"speculative_config": speculation},
        )
        for plan in plans
    ]
    for case, result in zip(cases, run(cases), strict=True):
        check(result, case, hf.load(model, case.plan))


def test_medusa(tmp_path: Path) -> None:
    """Right tokens; and of two texts, which the heads know, in as few steps as proposals allow."""
    model, texts, heads = write_llama(tmp_path / "model", layers=8), prompts(4, 40), 3
    references, cases = [], []
    for at, plan in enumerate([{"pair": [1, 5], "ladder": 3}, PLANS[1]]):
        reference = hf.load(model, plan)
        known = reference.generate(texts[:2], max_new_tokens=TOKENS, do_sample=False)
        folder = write_medusa(reference, tmp_path / f"{at}", known, texts.shape[1], heads)
        speculation = {"method": "medusa", "model": str(folder), "num_speculative_tokens": heads}
        engine = {"speculative_config": speculation}
        cases.append(
            Case(model, plan, texts.tolist(), max_tokens=TOKENS, logits=True, engine=engine)
        )
        references.append(reference)
    for case, result, reference in zip(cases, run(cases), references, strict=True):
        check(result, case, reference)
        # A step has a row for each token of each text: after so many two of them are through.
        rows = [len(logits) for logits in result.logits]
        assert rows.count(4 * (1 + heads)) == TOKENS / (1 + heads)
