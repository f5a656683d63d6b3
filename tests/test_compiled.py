"""torch.compile: the same numbers as the reference, and the graphs of plain vLLM."""

from __future__ import annotations

from pathlib import Path

from models import prompts, write_llama
from offline import Case, run
from reference import check, spec_of

from vllm_depthpar import hf


def test_compiled_ladder_on_two_hosts(tmp_path: Path) -> None:
    folder = write_llama(tmp_path, layers=4)
    case = Case(folder, {"pair": [1, 3], "ladder": 3}, prompts(4, 40).tolist(), max_tokens=16)
    (result,) = run([case], ranks=2, hosts=True, compiled=True)
    check(result, case, hf.load(folder, case.plan))


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
