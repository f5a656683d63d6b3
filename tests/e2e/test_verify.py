"""`depthpar verify`: right models pass, and a block that computes something else is found."""

from __future__ import annotations

import json
import math
import shutil
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from fork_server import forked_engines
from models import prompts, quantize_int8, write_llama, write_tokenizer
from safetensors.torch import load_file, save_file

from vllm_depthpar import hf
from vllm_depthpar.cli.main import main
from vllm_depthpar.errors import UserError
from vllm_depthpar.plan import resolve
from vllm_depthpar.verify.rounding import (
    FLOOR,
    MEAN_FACTOR,
    QUANTIZED_LIMIT,
    WORST_FACTOR,
    Answer,
    Difference,
    allowed,
    allowed_of_control,
    compare,
    difference,
    explained,
    fault,
    judge,
)
from vllm_depthpar.verify.run import ask
from vllm_depthpar.verify.streamed import Score, StreamedModel

CPU = torch.device("cpu")
LADDER = '{"pair": [1, 3], "ladder": [1, 2, 3]}'


def checkpoint(folder: Path, **shape: Any) -> Path:
    """Small, with a tokenizer of bytes and room for the longest passage."""
    return write_tokenizer(write_llama(folder, layers=4, max_position_embeddings=600, **shape))


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `depthpar verify`, eager in fp32, on forked engines."""
    with pytest.MonkeyPatch.context() as patch, forked_engines():
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        code = main(["verify", "--dtype", "float32", "--eager", *map(str, arguments)])
    captured = capsys.readouterr()
    assert psutil.Process().children() == [] or all(
        "forkserver" in " ".join(child.cmdline()) or "resource_tracker" in " ".join(child.cmdline())
        for child in psutil.Process().children()
    )
    return code, captured.out, captured.err


def test_right_models_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = checkpoint(tmp_path / "model"), tmp_path / "verify.json"
    plans = ["--plan", LADDER, "--plan", '{"skip": {"speedup": 1.3}}']
    code, shown, error = run(capsys, model, *plans, "--out", out)
    assert (code, error) == (0, "")
    assert shown.splitlines()[-1] == f'verify: {LADDER}, {{"skip": {{"speedup": 1.3}}}} ok'
    record = json.loads(out.read_text())
    assert [row["label"] for row in record["rows"]] == ["plain", plans[1], plans[3]]
    assert [row["blocks"] for row in record["rows"]] == [4, 3, 3]
    assert record["generated_tokens"] == 64 * record["passages"]
    for row in record["rows"]:
        assert (row["dtype"], row["mode"], row["quantized"]) == ("float32", "eager", "")
        for phase in ("prompt", "generated"):
            assert 0 < row[phase]["difference"]["mean"] < 1e-4
            assert row[phase]["in_bf16"]["mean"] > 100 * row[phase]["difference"]["mean"]


def broken_ask(connection: Connection, model: str, flags: list[str], *more: Any) -> None:
    """As `verify.run.ask`, but in ladder blocks a twentieth of the MLP's term is lost."""
    from vllm_depthpar.model.blocks import Block

    make = Block.__init__

    def break_too(self: Any, *given: Any) -> None:
        make(self, *given)
        if self.ladder:
            for half in self.mlps:
                half.module.register_forward_hook(lambda _module, _inputs, term: 0.95 * term)

    Block.__init__ = break_too  # type: ignore[assignment, method-assign]
    ask(connection, model, flags, *more)


def test_broken_block_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = checkpoint(tmp_path)
    monkeypatch.setattr("vllm_depthpar.verify.run.ask", broken_ask)
    code, shown, error = run(capsys, model, "--plan", '{"ladder": [2]}', "--plan", "identity")
    assert code == 1
    assert error.startswith(
        'depthpar: error: verify: {"ladder": [2]} (float32, eager, --tp 1) is not the model that '
        "its plan means: prompt tokens: log-probabilities are off by "
    )
    assert error.count("\n") == 1
    verdicts = [line.split(" | ")[-1].strip(" |") for line in shown.splitlines()[2:8:2]]
    assert verdicts == ["ok", "WRONG", "ok"]


def test_two_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each layer of a pair on its own rank; and a plan for more ranks than the plain model has."""
    model = checkpoint(tmp_path, heads=1, kv_heads=1)
    plan = '{"pair": [0, 4], "ladder": "all"}'
    code, shown, error = run(capsys, model, "--plan", plan, "--tp", 2)
    assert (code, error) == (0, "")
    assert "| plain | 4 | float32 | eager | 1 | prompt |" in shown
    assert f"| {plan} | 2 | float32 | eager | 2 | prompt |" in shown


def test_quantized_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The reference has the dequantized weights; that vLLM quantizes activations is allowed for."""
    source = checkpoint(tmp_path / "source", hidden=128, intermediate=256)
    int8, _ = quantize_int8(source, tmp_path)
    # Where a processor has AMX, vLLM's int8 kernels take no fp32.
    options = ["--dtype", "bfloat16", "--plan", '{"blocks": [[0], [2], [3]]}']
    code, shown, error = run(capsys, write_tokenizer(int8), *options)
    assert (code, error) == (0, "")
    assert "quantized: compressed-tensors" in shown


def test_ladder_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """vLLM itself can't serve it: the control is its layers one after the other."""
    code, shown, error = run(capsys, checkpoint(tmp_path, ladder_layers=2))
    assert (code, error) == (0, "")
    assert "| every layer alone | 4 |" in shown
    assert shown.splitlines()[-1] == "verify: auto ok"


def test_checkpoint_that_carries_its_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Skipped layers are not in it: the control is what is there, in prefill by parts here."""
    model, out = checkpoint(tmp_path / "model"), tmp_path / "out"
    plan = '{"blocks": [[0], [2, 3]]}'
    assert main(["export", str(model), "--plan", plan, "--out", str(out)]) == 0
    capsys.readouterr()
    code, shown, error = run(capsys, out, "--engine-args=--max-num-batched-tokens 256")
    assert (code, error) == (0, "")
    assert "| every layer alone | 3 |" in shown
    assert "| carried | 2 |" in shown


def test_compiled_as_it_is_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan is taken from where the server would take it; no tokenizer, random tokens."""
    model = write_llama(tmp_path, layers=2)
    monkeypatch.setenv("DEPTHPAR_PLAN", '{"pair": [0, 2]}')
    with forked_engines(compiled=True):
        assert main(["verify", str(model), "--dtype", "float32"]) == 0
    shown = capsys.readouterr().out
    assert '| {"pair": [0, 2]} | 1 | float32 | compiled | 1 | prompt |' in shown


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--plan", "plain"], "--plan 'plain' is every plan's control; allowed: other plans"),
        (["--plan", '{"pair": [0, 3]}'], "'pair': [0, 3] holds 3 layers; allowed: a multiple"),
        (["--tp", "3"], "--tp 3 can't cut auto"),
        (["--engine-args=--load-format=dummy"], "'--load-format=dummy' can't be given here"),
        (["--engine-args=--logprobs-mode raw_logits"], "'--logprobs-mode' can't be given here"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    code, shown, error = run(capsys, checkpoint(tmp_path), *more)
    assert (code, shown, error.count("\n")) == (1, "", 1)
    assert message in error


def test_what_vllm_refuses_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--plan", "identity", "--engine-args=--max-model-len 100"]
    code, shown, error = run(capsys, checkpoint(tmp_path), *flags)
    assert (code, shown, error.count("\n")) == (1, "", 1)
    assert error.startswith("depthpar: error: vLLM could not serve plain: ")


def test_no_reference_of_other_quantizations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = checkpoint(tmp_path, quantization_config={"quant_method": "bitsandbytes", "bits": 4})
    code, _, error = run(capsys, model)
    assert code == 1
    assert (
        "is quantized by 'bitsandbytes', of which there is no reference; allowed: compressed"
        in error
    )


# The reference, a block at a time.


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"tie": True},
        {"model_type": "qwen3"},
        {"model_type": "mistral", "sliding_window": 8},
        {"model_type": "gemma2", "tie": True},
        {"model_type": "gemma3_text"},
        {"model_type": "glm4"},
        {"model_type": "granite", "tie": True},
        {"model_type": "mixtral"},
        {"model_type": "qwen2_moe"},
        {"model_type": "gpt_oss"},
        {"model_type": "bloom"},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_streamed_is_the_whole_model(
    tmp_path: Path, shape: dict[str, Any], dtype: torch.dtype
) -> None:
    folder = write_llama(tmp_path, **shape)
    texts = [*prompts(2, 40).tolist(), [7]]
    # transformers caps logits in bfloat16; a score is in fp32 from the head on.
    capped = shape.get("model_type") == "gemma2" and dtype == torch.bfloat16
    plans = ("identity", LADDER, {"skip": {"speedup": 1.5}}, {"pair": [0, 6], "ladder": 2})
    for spec in plans:
        spec = json.loads(spec) if spec == LADDER else spec
        plan = resolve(spec, 6)
        shares: list[float] = []
        found = StreamedModel(folder, CPU).score(plan, texts, dtype, shares.append)
        assert sum(shares) == pytest.approx(1)
        model = hf.load(folder, plan, dtype=dtype)
        for text, score in zip(texts, found, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([text])).logits[0, :-1].float()
            logprobs = logits.log_softmax(-1)
            chosen = logprobs.gather(1, torch.tensor(text[1:], dtype=torch.int64)[:, None])
            for ours, expected in (score.chosen, chosen[:, 0]), (score.best, logprobs.amax(-1)):
                assert ours == pytest.approx(expected.tolist(), abs=0.05 if capped else 0, rel=0)


def test_streamed_from_shards_and_without_prefix(tmp_path: Path) -> None:
    whole = write_llama(tmp_path / "whole", tie=True)
    texts, plan = prompts(1, 20).tolist(), resolve({"pair": [0, 6]}, 6)
    expected = StreamedModel(whole, CPU).score(plan, texts, torch.float32)
    tensors = load_file(whole / "model.safetensors")
    sharded, bare = tmp_path / "sharded", tmp_path / "bare"
    for folder in (sharded, bare):
        folder.mkdir()
        shutil.copy(whole / "config.json", folder)
    halves: dict[str, dict[str, torch.Tensor]] = {"a.safetensors": {}, "b.safetensors": {}}
    for at, (name, tensor) in enumerate(sorted(tensors.items())):
        halves["ab"[at % 2] + ".safetensors"][name] = tensor
    for file, half in halves.items():
        save_file(half, sharded / file)
    weight_map = {name: file for file, half in halves.items() for name in half}
    index = {"weight_map": weight_map}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    short = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(short, bare / "model.safetensors")
    for folder in (sharded, bare):
        assert StreamedModel(folder, CPU).score(plan, texts, torch.float32) == expected


def test_streamed_dequantizes(tmp_path: Path) -> None:
    int8, dequantized = quantize_int8(write_llama(tmp_path / "source"), tmp_path)
    texts, plan = prompts(1, 20).tolist(), resolve("identity", 6)
    one, other = (
        StreamedModel(folder, CPU).score(plan, texts, torch.float32)
        for folder in (int8, dequantized)
    )
    assert one == other


def test_streamed_says_what_a_checkpoint_lacks(tmp_path: Path) -> None:
    folder = write_llama(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.3.mlp.up_proj.weight"
    up = tensors.pop(name)
    save_file(tensors, folder / "model.safetensors")
    model, texts = StreamedModel(folder, CPU), prompts(1, 5).tolist()
    with pytest.raises(UserError, match=r"layer 3 of the checkpoint lacks 'mlp\.up_proj\.weight'"):
        model.score(resolve("identity", 6), texts, torch.float32)
    model.score(resolve({"blocks": [[0], [1], [2], [4], [5]]}, 6), texts, torch.float32)
    save_file({**tensors, name: up[:80].clone()}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"has the shape \[80, 64\]; allowed: \[96, 64\]"):
        StreamedModel(folder, CPU).score(resolve("identity", 6), texts, torch.float32)


# Rounding or a fault.


def test_difference() -> None:
    assert difference([-1, -2.5], [-1.5, -2]) == Difference(0.5, 0.5)
    assert difference([-1, -2], [-1.5, -2], best=[-0.5, -2]) == Difference(0.25, 0.5, gap=1.0)
    for at in (0, 1):
        ours = [-1.0, -1.0]
        ours[at] = math.nan
        found = difference(ours, [-1, -1])
        assert math.isnan(found.mean)
        assert math.isnan(found.worst)


def test_rounding_explains_what_a_plan_amplifies() -> None:
    control, in_bf16 = Difference(5e-6, 3e-5), Difference(0.03, 0.3)
    # No better than the control.
    assert explained(control, in_bf16, Difference(0.01, 0.1)) == control
    found = explained(control, in_bf16, Difference(0.12, 9))
    assert found.mean == pytest.approx(2e-5)
    assert found.worst == pytest.approx(1.5e-3)
    most = allowed(found)
    assert most.mean == pytest.approx(MEAN_FACTOR * 2e-5)
    assert most.worst == pytest.approx(WORST_FACTOR * 1.5e-3)
    assert most.gap == most.worst
    least = allowed(Difference(0, 0))
    assert (least.mean, least.worst) == (MEAN_FACTOR * FLOOR[0], WORST_FACTOR * FLOOR[1])


def test_fault_names_what_is_off() -> None:
    most = Difference(1e-3, 1e-2, 2e-2)
    assert fault(most, most) is None
    assert fault(Difference(0.81, 9), most) == (
        "log-probabilities are off by 0.81 nats on average; allowed: 0.001"
    )
    assert (
        fault(Difference(1e-4, 0.5), most) == "a log-probability is off by 0.5 nats; allowed: 0.01"
    )
    assert fault(Difference(1e-4, 1e-3, 0.1), most) == (
        "a token is 0.1 nats behind the reference's best; allowed: 0.02"
    )
    for values in ((math.nan, 0, 0), (0, math.nan, 0), (0, 0, math.nan), (math.inf, 0, 0)):
        assert fault(Difference(*values), most)


def test_compare_tells_prompt_from_generated() -> None:
    answer = Answer(prompt=[1, 2, 3], generated=[4, 5], logprobs=[-1, -1, -2, -2])
    exact = Score(chosen=[-1, -1.5, -2, -3], best=[-0.5, -0.5, -2, -2.5])
    in_bf16 = Score(chosen=[-1, -1, -2.25, -3], best=[])
    found = compare([answer], [exact], [in_bf16])
    assert found == {
        "prompt": (Difference(0.25, 0.5), Difference(0.25, 0.5)),
        "generated": (Difference(0.5, 1.0, gap=0.5), Difference(0.125, 0.25)),
    }


def both(served: Difference, in_bf16: Difference) -> dict[str, tuple[Difference, Difference]]:
    return dict.fromkeys(("prompt", "generated"), (served, in_bf16))


IN_BF16 = Difference(0.03, 0.3)


@pytest.mark.parametrize(
    ("control", "dtype", "quantized", "right"),
    [
        (Difference(5e-6, 3e-5), "float32", "", True),
        (Difference(1e-3, 1e-2), "float32", "", False),
        (Difference(0.03, 0.2), "bfloat16", "", True),
        (Difference(0.5, 3), "bfloat16", "", False),
        (Difference(0.02, 0.2), "float32", "int8", True),
        (Difference(2 * QUANTIZED_LIMIT, 3), "float32", "int8", False),
        (Difference(math.nan, math.nan), "bfloat16", "fp8", False),
    ],
)
def test_control_is_judged_too(
    control: Difference, dtype: str, quantized: str, right: bool
) -> None:
    assert (control.mean <= allowed_of_control(IN_BF16, dtype, quantized).mean) == right
    (row,) = judge([both(control, IN_BF16)], dtype, quantized)
    assert (row["fault"] is None) == right


@pytest.mark.parametrize(
    ("mean", "worst", "right"),
    [(1.9e-5, 8e-4, True), (1e-4, 8e-4, False), (1.9e-5, 0.1, False), (0.8, 9, False)],
)
def test_plan_is_judged_by_what_rounding_explains(mean: float, worst: float, right: bool) -> None:
    """SmolLM2's figures in fp32 for a plan that skips: 3.6 times the control is right."""
    control, in_bf16 = Difference(5e-6, 3e-5), Difference(0.12, 9.3)
    _, row = judge([both(control, IN_BF16), both(Difference(mean, worst), in_bf16)], "float32", "")
    assert (row["fault"] is None) == right
    if not right:
        assert row["fault"].startswith("prompt tokens: ")
