"""Quantized checkpoints, side by side: as far from the dequantized reference as plain vLLM is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from assertions import spec_of
from engine_runs import Case, Result, run
from models import prompts, quantize_int8, write_llama
from quantized_models import KINDS, write_quantized

from vllm_depthpar import hf

# One rank holds them whole; two hold pairs dealt, and the rest whole.
PLANS: list[Any] = [
    {"pair": [0, 6]},
    {"pair": [1, 5]},
    {"pair": [0, 6], "group": 3, "ladder": [3, 4, 5]},
    {"blocks": [[0], {"attention": [1, 2], "mlp": [2]}, [3, 4], [5]], "parallel_residual": [3, 4]},
    {"pair": [1, 5], "layout": "whole", "drop_sync": "all"},
]
# Layers that are left as they are: of two dealt out the first, by whose name the block goes.
IGNORED = {"all layers": (), "some layers": (0, 1, 3, 5)}
PLAN_BESIDE = {(): PLANS[3], (0, 1, 3, 5): PLANS[1]}
# Of which vLLM's own layers are served. Of a mixture of experts only the attention is quantized:
# vLLM's CPU kernel for such experts needs AMX.
FAMILIES: dict[str, dict[str, Any]] = {
    "Gemma 3": {"model_type": "gemma3_text", "tie": True},
    "GLM 4": {"model_type": "glm4", "attention_bias": True},
    "Granite": {"model_type": "granite", "tie": True},
    "Qwen3 MoE": {"model_type": "qwen3_moe"},
    # In bf16 vLLM's CPU kernel for RoPE counts in eights: half of what turns of a head is 24.
    "Phi 3": {"model_type": "phi3", "heads": 2, "kv_heads": 2, "head_dim": 64},
}
FAMILIES_ON = {1: ("Gemma 3", "GLM 4", "Granite", "Qwen3 MoE"), 2: ("Phi 3",)}  # so many ranks


def error(case: Case, result: Result, dequantized: Path, ranks: int) -> float:
    """The mean distance of the prompts' log-probabilities from the reference's."""
    model = hf.load(dequantized, spec_of(case.plan), ranks=ranks)
    text = torch.tensor(case.prompts)
    with torch.no_grad():
        logs = model(text).logits[:, :-1].log_softmax(-1).gather(2, text[:, 1:, None])
    return (torch.stack(result.prompt_logprobs) - logs[..., 0]).abs().mean().item()


def llama(folder: Path, **shape: Any) -> Path:
    sizes: dict[str, Any] = {"hidden": 128, "heads": 4, "kv_heads": 2, "head_dim": 32}
    return write_llama(folder, **{**sizes, "intermediate": 256, **shape})


@pytest.mark.next
@pytest.mark.parametrize("ranks", [1, 2], ids=["TP1", "TP2"])
@pytest.mark.parametrize("ignored", IGNORED.values(), ids=IGNORED)
def test_int8(ranks: int, ignored: tuple[int, ...], tmp_path: Path) -> None:
    """Whichever layers the checkpoint quantizes, those are, wherever they run."""
    int8, dequantized = quantize_int8(llama(tmp_path / "fp32"), tmp_path, ignored)
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


@pytest.mark.parametrize("ranks", FAMILIES_ON, ids=["TP1", "TP2"])
def test_int8_of_other_families(ranks: int, tmp_path: Path) -> None:
    """Nearer to the dequantized weights than to those before, with a pair and a layer that does not
    run."""
    plan, cases, weights = {"blocks": [[0], [1, 2], [4], [5]]}, [], []
    names = FAMILIES_ON[ranks]
    for name in names:
        source = llama(tmp_path / name / "fp32", **FAMILIES[name])
        int8, dequantized = quantize_int8(source, tmp_path / name, mlps="MoE" not in name)
        cases.append(Case(int8, plan, prompts(4, 40).tolist(), dtype="bfloat16"))
        weights.append((dequantized, source))
    for name, case, result, both in zip(names, cases, run(cases, ranks), weights, strict=True):
        ours, others = (error(case, result, folder, ranks) for folder in both)
        print(f"{name}: {ours:.4f} from the dequantized, {others:.4f} from the others")
        assert 0 < ours < min(0.25, 0.8 * others)


# A kind of `KINDS`, and the layers that it leaves as they are.
Checkpoint = tuple[str, tuple[int, ...]]
HAS_AVX512 = torch.cpu._is_avx512_supported()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Checkpoint, tuple[Path, Path]]:
    """Of each kind that this processor has kernels for, as it is and dequantized."""
    folder = tmp_path_factory.mktemp("quantized")
    source = llama(folder / "fp32")
    return {
        (kind, ignored): write_quantized(source, folder / name, kind, ignored)
        for kind, of_kind in KINDS.items()
        if HAS_AVX512 or not of_kind.needs_avx512
        for name, ignored in IGNORED.items()
    }


def cases_of(checkpoint: Checkpoint, folder: Path) -> list[Case]:
    """Plain vLLM on a checkpoint, and a plan."""
    kind, ignored = checkpoint
    return [
        Case(
            folder,
            plan,
            prompts(4, 40).tolist(),
            dtype="bfloat16",
            engine=KINDS[kind].engine(ignored),
            prepare=KINDS[kind].prepare,
        )
        for plan in ("plain", PLAN_BESIDE[ignored])
    ]


Answers = tuple[int, dict[Checkpoint, list[tuple[Case, Result]]]]


@pytest.fixture(scope="module", params=[1, 2], ids=["TP1", "TP2"])
def answers(
    request: pytest.FixtureRequest, folders: dict[Checkpoint, tuple[Path, Path]]
) -> Answers:
    """What plain vLLM and a plan make of each checkpoint, all in one go."""
    cases = {one: cases_of(one, folder) for one, (folder, _) in folders.items()}
    results = iter(run([case for both in cases.values() for case in both], request.param))
    return request.param, {
        one: [(case, next(results)) for case in both] for one, both in cases.items()
    }


@pytest.mark.parametrize("ignored", IGNORED.values(), ids=IGNORED)
@pytest.mark.parametrize("kind", KINDS)
def test_kinds(
    kind: str,
    ignored: tuple[int, ...],
    folders: dict[Checkpoint, tuple[Path, Path]],
    answers: Answers,
) -> None:
    if (kind, ignored) not in folders:
        pytest.skip(f"vLLM's kernels for {kind} need AVX-512")
    ranks, of_all = answers
    _, dequantized = folders[kind, ignored]
    plain, ours = (
        error(case, result, dequantized, ranks) for case, result in of_all[kind, ignored]
    )
    print(f"{kind}: plain {plain:.4f}, {ours / plain:.2f} times it with a plan")
    assert 0 < plain < 0.5
    # Not far below it, either: layers of too many bits would be.
    assert plain / 2 < ours < 1.5 * plain


@pytest.mark.parametrize("ignored", IGNORED.values(), ids=IGNORED)
def test_online_is_the_checkpoint(ignored: tuple[int, ...], answers: Answers) -> None:
    """The same numbers, and so the same layers are quantized: errors alone would hardly say so."""
    _, of_all = answers
    for (_, online), (_, stored) in zip(
        of_all["fp8-online", ignored], of_all["fp8-channel", ignored], strict=True
    ):
        both = torch.stack(online.prompt_logprobs), torch.stack(stored.prompt_logprobs)
        torch.testing.assert_close(*both, atol=1e-4, rtol=0)


@pytest.mark.skipif(not HAS_AVX512, reason="vLLM's kernels for int4 need AVX-512")
def test_compiled(
    folders: dict[Checkpoint, tuple[Path, Path]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The kernel writes into a buffer: torch.compile must keep the order of writes and reads."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    int4, dequantized = folders["w4a16-group", ()]
    eager, compiled = (
        Case(int4, plan, prompts(4, 40).tolist(), dtype="bfloat16") for plan in ("plain", PLANS[2])
    )
    (plain,), (ours,) = run([eager]), run([compiled], compiled=True)
    assert ours.compilation["early reads"] == 0 < ours.compilation["kernels"]
    most = 1.5 * error(eager, plain, dequantized, ranks=1)
    assert error(compiled, ours, dequantized, ranks=1) < most
