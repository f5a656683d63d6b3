"""Weights that are loaded again: the model is the new checkpoint's, or wholly the old one's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from assertions import check
from engine_runs import Case, run
from models import prompts, write_llama

from vllm_depthpar import hf

# All ways for wide blocks; of the others, whose layers are vLLM's own, those that differ.
PLANS: dict[str, Any] = {
    "pairs": {"pair": [0, 4]},
    "mixed": {"blocks": [[0], [2, 1, 3]], "ladder": "all"},
    "whole": {"pair": [0, 4], "layout": "whole"},
    "identity": "identity",
}
WAYS = {
    "pairs": ["same", "other", "iterator", "one_by_one", "buckets", "after_a_broken_one"],
    "mixed": ["same", "other", "one_by_one"],
    "whole": ["other", "one_by_one"],
    "identity": ["other"],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two checkpoints of one shape."""
    folder, shape = tmp_path_factory.mktemp("models"), {"attention_bias": True, "mlp_bias": True}
    first, second = (
        write_llama(folder / str(seed), seed=seed, layers=4, **shape)  # type: ignore[arg-type]
        for seed in (0, 1)
    )
    return first, second


@pytest.mark.next
@pytest.mark.parametrize(("ranks", "hosts"), [(1, False), (2, False)], ids=["TP1", "TP2"])
def test_loaded_again(ranks: int, hosts: bool, folders: tuple[Path, Path]) -> None:
    first, second = folders
    cases, wanted = [], []
    for name, ways in WAYS.items():
        for way in ways if ranks == 1 else ways[:4]:
            cases.append(
                Case(
                    first, PLANS[name], prompts(2, 40).tolist(), max_tokens=4, update=(way, second)
                )
            )
            wanted.append(hf.load(first if way == "same" else second, PLANS[name]))
    for case, result, model in zip(cases, run(cases, ranks, hosts=hosts), wanted, strict=True):
        check(result, case, model)


def test_compiled_model_runs_on_the_new_weights(folders: tuple[Path, Path]) -> None:
    first, second = folders
    case = Case(first, PLANS["pairs"], prompts(2, 40).tolist(), update=("one_by_one", second))
    (result,) = run([case], compiled=True)
    check(result, case, hf.load(second, case.plan))


@pytest.mark.next
def test_half_of_a_block_is_not_taken(folders: tuple[Path, Path]) -> None:
    """All of its tensors came, but not in one update: the block is what it was."""
    first, second = folders
    case = Case(first, PLANS["pairs"], prompts(2, 40).tolist(), update=("halves", second))
    (result,) = run([case])
    model, new = hf.load(first, case.plan), hf.load(second, case.plan)
    # What is of no layer came with the even ones.
    model.model.embed_tokens, model.model.norm = new.model.embed_tokens, new.model.norm
    model.lm_head = new.lm_head
    check(result, case, model)
