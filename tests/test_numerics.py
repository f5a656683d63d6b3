"""vLLM's numbers against the reference on transformers (`vllm_depthpar.hf`)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import LLAMA3_ROPE, prompts, quantize_int8, write_llama
from offline import Case, Result, run
from texts import TEXTS
from transformers import AutoTokenizer

from vllm_depthpar import hf

# Of SmolLM2's 30 layers. TP 3 runs blocks of 2 folded, and blocks of 3 dealt out to the ranks.
PLANS: dict[str, Any] = {
    "identity": "identity",
    "pairs of the paper": {"pair": [14, 28]},
    "half in pairs": {"pair": [12, 28]},
    "all in pairs": {"pair": [0, 30]},
    "groups of three": {"pair": [15, 30], "group": 3},
    "all in threes": {"pair": [0, 30], "group": 3},
    "skip": {"skip": {"speedup": 1.25}},
    "skip and pairs": {"skip": {"speedup": 1.1}, "pair": [14, 28]},
    "mixed, out of order": {
        "blocks": [[0], [1], [2], [4, 3], [5], [7], [6], [8, 10], [9, 11, 12]]
        + [[layer] for layer in range(13, 27)]
        + [[29, 28]]
    },
}
LOGPROB = 1e-3
GREEDY = 64


def spec_of(plan: Any) -> Any:
    return "identity" if plan == "plain" else plan


def check(result: Result, case: Case, model: torch.nn.Module) -> None:
    """Prompt log-probabilities within the bound, and each generated token the reference's best.

    The second is the same as equal greedy continuations, by induction over the tokens.
    """
    for prompt, logprobs, tokens in zip(
        case.prompts, result.prompt_logprobs, result.tokens, strict=True
    ):
        text = torch.tensor([prompt + tokens])
        with torch.no_grad():
            reference = model(text).logits[0].log_softmax(-1)
        expected = reference[:-1].gather(1, text[0, 1:, None])[:, 0][: len(prompt) - 1]
        torch.testing.assert_close(logprobs, expected, atol=LOGPROB, rtol=0)
        assert reference[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens
        assert len(tokens) == case.max_tokens


@pytest.fixture(scope="session")
def token_ids(smollm2: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    return [tokenizer(text).input_ids for text in TEXTS]


@pytest.fixture(scope="session")
def reference(smollm2: Path) -> Callable[[Any], torch.nn.Module]:
    return lambda plan: hf.load(smollm2, spec_of(plan))


class TestOneRank:
    @pytest.fixture(scope="class")
    def results(self, smollm2: Path, token_ids: list[list[int]]) -> dict[str, tuple[Case, Result]]:
        cases = {
            name: Case(smollm2, plan, token_ids, max_tokens=GREEDY)
            for name, plan in {**PLANS, "plain": "plain"}.items()
        }
        return dict(
            zip(cases, zip(cases.values(), run(list(cases.values())), strict=True), strict=True)
        )

    @pytest.mark.parametrize("name", [*PLANS, "plain"])
    def test_equals_reference(
        self,
        name: str,
        results: dict[str, tuple[Case, Result]],
        reference: Callable[[Any], torch.nn.Module],
    ) -> None:
        case, result = results[name]
        check(result, case, reference(case.plan))

    def test_identity_is_plain(self, results: dict[str, tuple[Case, Result]]) -> None:
        plain, identity = results["plain"][1], results["identity"][1]
        assert identity.tokens == plain.tokens
        for ours, theirs in zip(identity.prompt_logprobs, plain.prompt_logprobs, strict=True):
            assert torch.equal(ours, theirs)


class TestThreeRanks:
    """More ranks than cores: vLLM's ranks spin while they wait, so fewer and shorter prompts."""

    @pytest.fixture(scope="class")
    def results(self, smollm2: Path, token_ids: list[list[int]]) -> dict[str, tuple[Case, Result]]:
        cases = {
            name: Case(smollm2, plan, token_ids[:6], max_tokens=8) for name, plan in PLANS.items()
        }
        answers = run(list(cases.values()), ranks=3)
        return dict(zip(cases, zip(cases.values(), answers, strict=True), strict=True))

    @pytest.mark.parametrize("name", PLANS)
    def test_equals_reference(
        self,
        name: str,
        results: dict[str, tuple[Case, Result]],
        reference: Callable[[Any], torch.nn.Module],
    ) -> None:
        case, result = results[name]
        check(result, case, reference(case.plan))


# Shapes of the family, each with plans that exercise it. Six layers.
RANDOM: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "GQA, untied": ({}, [{"pair": [1, 5]}, {"pair": [0, 6], "group": 3}, {"pair": [0, 6]}]),
    "MHA, tied": ({"kv_heads": 4, "tie": True}, [{"pair": [2, 6]}, {"blocks": [[0], [2, 1], [5]]}]),
    "one KV head": ({"kv_heads": 1}, [{"pair": [0, 6]}, {"pair": [1, 5]}]),
    "biases": (
        {"attention_bias": True, "mlp_bias": True},
        [{"pair": [1, 5]}, {"pair": [0, 3], "group": 3}],
    ),
    "llama3 rope": ({"rope_scaling": LLAMA3_ROPE}, [{"pair": [1, 5]}]),
    # 3 heads: TP 2 cuts no layer of it, but does cut a pair.
    "odd heads, in pairs": ({"hidden": 96, "heads": 3, "kv_heads": 3}, [{"pair": [0, 6]}]),
}


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
def random_results(
    request: pytest.FixtureRequest, random_cases: dict[str, Case]
) -> dict[str, Result]:
    return dict(zip(random_cases, run(list(random_cases.values()), request.param), strict=True))


@pytest.mark.parametrize("name", RANDOM_NAMES)
def test_random_model_equals_reference(
    name: str, random_cases: dict[str, Case], random_results: dict[str, Result]
) -> None:
    case = random_cases[name]
    check(random_results[name], case, hf.load(case.model, case.plan))


def test_compiled_plans_of_one_shape(tmp_path: Path) -> None:
    """torch.compile, and vLLM's compile cache: plans whose graphs differ in order only.

    The second run finds the caches filled by the first.
    """
    folder = write_llama(tmp_path)
    cases = [
        Case(folder, {"blocks": blocks}, prompts(4, 40).tolist(), max_tokens=16)
        for blocks in ([[0, 1], [2], [3, 4]], [[2], [0, 1], [3, 4]])
    ]
    for results in (run(cases, compiled=True), run(cases[::-1], compiled=True)[::-1]):
        for case, result in zip(cases, results, strict=True):
            check(result, case, hf.load(folder, case.plan))


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


def test_prequantized_checkpoint_on_two_ranks(tmp_path: Path) -> None:
    """int8 pairs, each layer with its own norms on its own rank: as far off as plain int8 is."""
    source = write_llama(
        tmp_path / "fp32", hidden=128, heads=4, kv_heads=2, head_dim=32, intermediate=256
    )
    int8, dequantized = quantize_int8(source, tmp_path)
    plans = ("plain", {"pair": [0, 6]}, {"pair": [1, 5]})
    cases = [Case(int8, plan, prompts(4, 40).tolist(), dtype="bfloat16") for plan in plans]
    errors = []
    for case, result in zip(cases, run(cases, ranks=2), strict=True):
        model = hf.load(dequantized, spec_of(case.plan))
        with torch.no_grad():
            text = torch.tensor(case.prompts)
            reference = model(text).logits[:, :-1].log_softmax(-1).gather(2, text[:, 1:, None])
        errors.append((torch.stack(result.prompt_logprobs) - reference[..., 0]).abs().mean().item())
    plain, *ours = errors
    assert 0 < plain < 0.2
    assert max(ours) < 1.5 * plain, errors


class TestBfloat16:
    """Rounding to bf16 may cost a restructured model at most half as much again as a plain one.

    For plans that leave the model usable. One that does not amplifies any rounding: skipping six
    layers, with nothing folded, was measured at six times plain.
    """

    PLANS = ("plain", {"pair": [22, 28]}, {"pair": [14, 28]}, {"pair": [12, 28]})

    @pytest.fixture(scope="class")
    def divergences(self, smollm2: Path, token_ids: list[list[int]]) -> list[float]:
        """Mean KL(reference fp32 || vLLM bf16) over all prompt tokens, in nats, per plan."""
        cases = [
            Case(smollm2, plan, token_ids, dtype="bfloat16", logits=True) for plan in self.PLANS
        ]
        found = []
        for case, result in zip(cases, run(cases), strict=True):
            model = hf.load(smollm2, spec_of(case.plan))
            # vLLM computes the logits of prompt tokens when it gives their log-probabilities:
            # prompt by prompt, all but the last token's. Between them come the sampler's.
            computed = iter(result.logits)
            total = tokens = 0.0
            for prompt in case.prompts:
                logits = next(rows for rows in computed if len(rows) == len(prompt) - 1)
                with torch.no_grad():
                    p = model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
                total += float((p.exp() * (p - logits.float().log_softmax(-1))).sum())
                tokens += len(prompt) - 1
            found.append(total / tokens)
        return found

    def test_rounding(self, divergences: list[float]) -> None:
        plain, *ours = divergences
        assert 0 < plain < 0.05
        assert max(ours) <= 1.5 * plain, divergences
