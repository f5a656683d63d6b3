"""torch.compile, vLLM's default: the numbers of the reference, and the graphs of plain vLLM.

A matrix of plans, placements and dtypes. `make test` runs the combinations of `ALWAYS`, `make test
ARGS='tests/numerics/test_compiled.py --every-combination'` all of them, which takes half an hour.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from assertions import check, spec_of
from engine_runs import Case, Result, run
from models import prompts, write_llama
from texts import TEXTS
from transformers import AutoTokenizer

from vllm_depthpar import hf

LAYERS = 6
PLANS: dict[str, Any] = {
    "identity": "identity",
    "pairs": {"pair": [1, 5]},
    "groups": {"pair": [2, 5], "group": 3},
    "skip": {"skip": {"speedup": 1.3}},
    "ladder of 3": {"ladder": 3},
    "ladder of 4": {"ladder": 4},
    "ladder": {"ladder": "all"},
    "ladder, scattered, skipping": {"blocks": [[0], [1], [2], [4], [5]], "ladder": [0, 1, 4]},
    "ladder over pairs": {"pair": [2, 6], "ladder": "all"},
    "parallel residual": {"pair": [2, 6], "parallel_residual": "all"},
    "dropped sync points": {"pair": [2, 6], "drop_sync": "all"},
    "desync": {"pair": [2, 6], "desync": {"every": 4}},
    # Alone, side by side in twos and threes, in another order; a ladder over some.
    "all mixed": {"blocks": [[0], [2, 1], [3, 4, 5]], "ladder": [1, 2, 3, 4, 5]},
    "whole": {"blocks": [[0], [2, 1], [3, 4, 5]], "ladder": [1, 2, 3, 4, 5], "layout": "whole"},
    "whole, every mode": {
        "blocks": [[1, 0], [2], [3, 4], [5]],
        "ladder": [2],
        "drop_sync": [0, 1],
        "parallel_residual": [3, 4],
        "desync": {"attention": [5], "mlp": []},
        "layout": "whole",
    },
    "halves": {
        "blocks": [[0], {"attention": [1], "mlp": [1, 2]}, {"attention": [], "mlp": [3]}, [4, 5]],
        "ladder": [4, 5],
    },
    "every mode": {
        "blocks": [[1, 0], [2], [3, 4], [5]],
        "ladder": [2],
        "drop_sync": [0, 1],
        "parallel_residual": [3, 4],
        "desync": {"attention": [5], "mlp": []},
    },
}
# Of a Gemma 3, whose terms are reduced side by side, each with a norm to come.
GEMMA: dict[str, Any] = {
    "Gemma": "plain",
    "Gemma, pairs and a ladder": {"blocks": [[0], [2, 1], [3, 4, 5]], "ladder": [1, 2, 3, 4, 5]},
    "Gemma, every mode": {
        "blocks": [[1, 0], [2], [3, 4], [5]],
        "ladder": [2],
        "drop_sync": [0, 1],
        "parallel_residual": [3, 4],
    },
}
# Of a Qwen3 MoE: routers beside each other, which no compiler may merge.
MOE: dict[str, Any] = {"MoE": "plain", "MoE, every mode": GEMMA["Gemma, every mode"]}
OTHERS = GEMMA | MOE
PLANS |= {name: plan for name, plan in OTHERS.items() if plan != "plain"}
# Whose plans begin so; all others are a Llama's.
FAMILIES = {"Gemma": "gemma3_text", "MoE": "qwen3_moe"}
DTYPES = ("float32", "bfloat16")
# Ranks, and whether each is a host.
PLACEMENTS = {"one rank": (1, False), "one host": (2, False), "two hosts": (2, True)}
Combination = tuple[str, str, str]
# Every kind of block, every placement and both dtypes; two ranks compile on the cores of one.
ALWAYS: dict[str, dict[str, tuple[str, ...]]] = {
    "one rank": {
        "float32": (
            *("ladder of 4", "ladder, scattered, skipping", "ladder over pairs", "halves"),
            "Gemma, every mode",
        ),
        "bfloat16": ("plain", "all mixed", "every mode", "whole"),
    },
    "one host": {"float32": ("ladder", "every mode")},
    "two hosts": {
        "float32": (
            *("all mixed", "dropped sync points", "whole, every mode"),
            *("Gemma, pairs and a ladder", "Gemma, every mode", "MoE, every mode"),
        )
    },
}
CHOSEN = [
    (placement, dtype, plan)
    for placement, of_placement in ALWAYS.items()
    for dtype, plans in of_placement.items()
    for plan in plans
    if plan != "plain"
]
# Of these, on vLLM's next release.
NEXT = [("one rank", "float32", "ladder over pairs"), ("two hosts", "float32", "all mixed")]
EVERY = list(itertools.product(PLACEMENTS, DTYPES, PLANS))
# Rounding in bf16 moves log-probabilities of a plain model, too: of its movements, how many.
MEAN_BF16, MOST_BF16 = 1.5, 3.0


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "combination" in metafunc.fixturenames:
        chosen = EVERY if metafunc.config.getoption("--every-combination") else CHOSEN
        cases = [
            pytest.param(one, marks=[pytest.mark.next] if one in NEXT else [], id=", ".join(one))
            for one in chosen
        ]
        metafunc.parametrize("combination", cases)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each family; a Llama under "plain"."""
    return {
        family: write_llama(
            tmp_path_factory.mktemp(model_type),
            layers=LAYERS,
            hidden=128,
            intermediate=192,
            model_type=model_type,
        )
        for family, model_type in {"plain": "llama", **FAMILIES}.items()
    }


def control_of(plan: str) -> str:
    """What plain vLLM makes of the same model."""
    return next((family for family in FAMILIES if plan.startswith(family)), "plain")


Answers = dict[Combination, tuple[Case, Result]]


@pytest.fixture(scope="module")
def answers(
    models: dict[str, Path],
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Answers]:
    """Of the combinations that this run of pytest tests, and of plain vLLM where it is the measure.

    Kernels of one shape are compiled once for all of them.
    """
    every = request.config.getoption("--every-combination")
    tested: set[Any] = {
        item.callspec.params["combination"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and "combination" in item.fixturenames
    }
    tested |= {
        (where, dtype, control_of(plan)) for where, dtype, plan in tested if dtype == "bfloat16"
    }
    found: Answers = {}
    all_plans = [*(PLANS | OTHERS), "plain"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        for placement, (ranks, hosts) in PLACEMENTS.items():
            cases = {
                (placement, dtype, plan): Case(
                    models[control_of(plan)],
                    (PLANS | OTHERS).get(plan, plan),
                    prompts(4, 40).tolist(),
                    dtype,
                    max_tokens=16,
                )
                for dtype in DTYPES
                for plan in (all_plans if every else ALWAYS[placement].get(dtype, ()))
                if (placement, dtype, plan) in tested
            }
            if cases:
                results = run(list(cases.values()), ranks, compiled=True, hosts=hosts, timeout=2400)
                found |= dict(zip(cases, zip(cases.values(), results, strict=True), strict=True))
        yield found


def test_compiled_equals_reference(combination: Combination, answers: Answers) -> None:
    case, result = answers[combination]
    ranks, _ = PLACEMENTS[combination[0]]
    assert result.compilation["early reads"] == 0
    if case.dtype == "float32":
        check(result, case, hf.load(case.model, case.plan, ranks=ranks))
        return
    placement, dtype, name = combination
    plain, plain_result = answers[placement, dtype, control_of(name)]
    for (mean, most), (mean_plain, most_plain) in zip(
        distances(case, result, ranks), distances(plain, plain_result, ranks), strict=True
    ):
        assert mean <= MEAN_BF16 * mean_plain
        assert most <= MOST_BF16 * most_plain


def distances(case: Case, result: Result, ranks: int) -> list[tuple[float, float]]:
    """How far log-probabilities are from the reference in fp32, mean and maximum: of the prompts'
    tokens, and the reference's best from the ones that were generated, of the generated ones.

    The second has a floor: generated tokens are mostly the reference's best, at a distance of 0.
    """
    prompt = len(case.prompts[0])
    text = torch.tensor([p + t for p, t in zip(case.prompts, result.tokens, strict=True)])
    with torch.no_grad():
        logs = hf.load(case.model, spec_of(case.plan), ranks=ranks)(text).logits.log_softmax(-1)
    chosen = logs[:, :-1].gather(2, text[:, 1:, None])[..., 0]
    prefill = (torch.stack(result.prompt_logprobs) - chosen[:, : prompt - 1]).abs()
    decode = (logs[:, :-1].amax(-1) - chosen)[:, prompt - 1 :]
    assert prefill.isfinite().all()
    return [
        (float(prefill.mean()), float(prefill.max())),
        (max(float(decode.mean()), 0.01), max(float(decode.max()), 0.05)),
    ]


SMOLLM2: dict[str, Any] = {
    "auto": "auto",
    "ladder of 8": {"ladder": 8},
    "ladder over pairs, groups": {"blocks": [*[[k] for k in range(24)], [24, 25], [26, 27, 28]]}
    | {"ladder": [22, 23, 24, 25, 26, 27, 28]},
}


def test_smollm2_on_three_ranks(smollm2: Path, request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--every-combination"):
        pytest.skip("three ranks that compile thirty layers: with --every-combination")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    texts = [tokenizer(text).input_ids[:32] for text in TEXTS[:4]]
    cases = [Case(smollm2, plan, texts, max_tokens=4) for plan in SMOLLM2.values()]
    for case, result in zip(cases, run(cases, 3, compiled=True, timeout=2400), strict=True):
        assert result.compilation["early reads"] == 0
        plan = {"pair": [22, 28]} if case.plan == "auto" else case.plan
        check(result, case, hf.load(smollm2, plan))


@pytest.mark.next
def test_compiled_plans_of_one_shape(tmp_path: Path) -> None:
    """torch.compile, and vLLM's compile cache: plans whose graphs differ in order only.

    Compiled, a model of two blocks is one graph without a break, with plain vLLM's number of
    kernels for two layers.
    """
    three, two = (
        write_llama(tmp_path / str(layers), layers=layers, model_type="qwen3") for layers in (3, 2)
    )
    cases = [
        Case(folder, plan, prompts(4, 40).tolist(), max_tokens=16)
        for folder, plan in (
            (three, {"blocks": [[0, 1], [2]]}),
            (three, {"blocks": [[2], [0, 1]]}),
            (two, "plain"),
        )
    ]
    results = run(cases, compiled=True)
    for case, result in zip(cases, results, strict=True):
        check(result, case, hf.load(case.model, spec_of(case.plan)))
    # The first engine of a process also compiles what is not the model.
    _, ours, plain = (result.compilation for result in results)
    assert ours == plain
    assert (ours["graphs"], ours["breaks"]) == (1, 0)
    assert ours["kernels"] > 0
