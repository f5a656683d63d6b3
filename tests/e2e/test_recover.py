"""`depthpar recover` as a user runs it, on a small random model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fork_server import forked_engines
from models import as_published, quantize_int8, write_llama, write_tokenizer
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoTokenizer

from vllm_depthpar import hf
from vllm_depthpar.checkpoint import export
from vllm_depthpar.cli.main import main
from vllm_depthpar.launch.server import free_port
from vllm_depthpar.plan import resolve

pytestmark = pytest.mark.usefixtures("own_cache")

LAYERS = 6
PAIRS = '{"pair": [2, 6]}'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_llama(tmp_path_factory.mktemp("llama"), layers=LAYERS)
    return write_tokenizer(folder, bos=True, chat=True)


def arguments(model: Path, text: Path, out: Path, *more: object) -> list[str]:
    command = ["recover", model, "--plan", PAIRS, "--text", text, "--out", out]
    small = ["--window", 64, "--refit", 2048, "--rate", 3e-4, "--evaluations", 4]
    return [str(argument) for argument in [*command, *small, *more]]


def differing(model: Path, out: Path) -> set[str]:
    """The names of the tensors whose bits or dtype are not the checkpoint's."""
    original, found = (load_file(one / "model.safetensors") for one in (model, out))
    assert found.keys() == original.keys()
    return {
        name
        for name, tensor in found.items()
        if tensor.dtype != original[name].dtype or not torch.equal(tensor, original[name])
    }


def assert_refitted(changed: set[str]) -> None:
    """What adds is, of what reads what helps, and nothing else. The attention with which the first
    pair begins reads what it read before."""
    names = [f"model.layers.{layer}." for layer in (2, 3, 4, 5)]
    downs = {f"{name}mlp.down_proj.weight" for name in names}
    readers = {f"{name}mlp.{part}_proj.weight" for name in names for part in ("gate", "up")}
    readers |= {f"{name}self_attn.{part}_proj.weight" for name in names[1:] for part in "qkv"}
    assert downs <= changed <= downs | readers


def test_recover(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], auto_dtype: str
) -> None:
    out = tmp_path / "new" / "out"
    assert main(arguments(model, text, out, "--tokens", 8192)) == 0
    shown = capsys.readouterr()
    record = json.loads((out / "recovery.json").read_text())
    unmodified, plan, refitted, end = (
        record["quality"][stage]["passages"] for stage in ("unmodified", "plan", "refit", "end")
    )
    assert unmodified["kl"] == pytest.approx(0, abs=1e-5)
    assert plan["kl"] > 1.1 * refitted["kl"] > 1.1 * end["kl"]
    assert record["dtype"] == auto_dtype
    assert record["training"] == {**record["training"], "steps": 32, "tokens": 8192}
    assert [one["tokens"] for one in record["curve"]] == [2048, 4096, 6144, 8192]
    assert record["curve"][-1]["passages"] == pytest.approx(end)
    assert f"{end['kl']:.3f}" in shown.out
    assert "8192 tokens   passages: perplexity" in shown.err
    card = (out / "README.md").read_text()
    assert f"| {plan['perplexity']:.2f} | {refitted['perplexity']:.2f} |" in card
    # Nothing but the changed layers, and no folder but the checkpoint.
    assert {name.split(".")[2] for name in differing(model, out)} == {"2", "3", "4", "5"}
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    # The folder is the student: same loss as was measured.
    student, teacher = hf.load(out), hf.load_unmodified(model)
    ids = torch.arange(64)[None] % 256
    with torch.no_grad():
        logs, wanted = (one(ids).logits.log_softmax(-1) for one in (student, teacher))
        before = hf.load(model, json.loads(PAIRS))(ids).logits.log_softmax(-1)
    assert (wanted.exp() * (wanted - logs)).sum() < (wanted.exp() * (wanted - before)).sum()


@pytest.mark.parametrize("train", ["norms", "all"])
def test_other_ways_to_train(
    model: Path, text: Path, tmp_path: Path, train: str, auto_dtype: str
) -> None:
    out = tmp_path / "out"
    rate = 1e-4 if train == "all" else 1e-3
    more = ["--train", train, "--tokens", 4096, "--refit", 0, "--rate", rate]
    assert main(arguments(model, text, out, *more)) == 0
    record = json.loads((out / "recovery.json").read_text())
    assert record["quality"]["refit"] == record["quality"]["plan"]
    assert record["quality"]["end"]["passages"]["kl"] < record["quality"]["plan"]["passages"]["kl"]
    changed, every = differing(model, out), set(load_file(model / "model.safetensors"))
    if train == "all":
        assert changed == every
    else:
        kind = "layernorm" if train == "norms" else "proj"
        layers = tuple(f"model.layers.{layer}." for layer in (2, 3, 4, 5))
        assert changed == {name for name in every if name.startswith(layers) and kind in name}


def test_a_blooms_files_keep_their_names(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], auto_dtype: str
) -> None:
    bloom = write_llama(tmp_path / "bloom", layers=LAYERS, model_type="bloom", tie=True)
    model = write_tokenizer(as_published(bloom, tmp_path / "published"), bos=True)
    out, more = tmp_path / "out", ["--train", "all", "--tokens", 2048]
    assert main(arguments(model, text, tmp_path / "adapter", "--train", "lora")) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "--train lora: no bloom is served with adapters; allowed: " in line
    assert main(arguments(model, text, out, *more)) == 0
    assert differing(model, out) == set(load_file(model / "model.safetensors"))
    assert "h.2.self_attention.dense.bias" in differing(model, out)
    record = json.loads((out / "recovery.json").read_text())
    assert record["quality"]["refit"] == record["quality"]["plan"]  # nothing has a closed form
    assert record["quality"]["end"]["passages"]["kl"] < record["quality"]["plan"]["passages"]["kl"]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_not_changed_is_the_checkpoints(
    text: Path, tmp_path: Path, stored: torch.dtype, auto_dtype: str
) -> None:
    """Bit for bit and in its dtype, whatever the work runs in; and what is trained begins as the
    checkpoint's: at a rate of 0 that is how it ends."""
    model = write_tokenizer(write_llama(tmp_path / "model", layers=LAYERS, dtype=stored), bos=True)
    assert main(arguments(model, text, tmp_path / "refitted", "--tokens", 0)) == 0
    changed = differing(model, tmp_path / "refitted")
    assert_refitted(changed)
    assert any(name.endswith("gate_proj.weight") for name in changed)
    more = ["--train", "all", "--refit", 0, "--tokens", 1024, "--rate", 0]
    assert main(arguments(model, text, tmp_path / "all", *more)) == 0
    assert not differing(model, tmp_path / "all")


def test_adapter_of_a_quantized_model(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str], auto_dtype: str
) -> None:
    """It learns from the dequantized model, and is served beside the quantized one, untouched."""
    model = write_tokenizer(write_llama(tmp_path / "source", layers=LAYERS), bos=True)
    int8, dequantized = quantize_int8(model, tmp_path)
    for folder in (int8, dequantized):
        write_tokenizer(folder, bos=True)
    before, out = (int8 / "model.safetensors").read_bytes(), tmp_path / "adapter"
    learning = ["--window", 64, "--tokens", 8192, "--rate", 3e-3, "--evaluations", 2]
    command = ["recover", int8, "--plan", PAIRS, "--text", text, "--out", out, "--train", "lora"]
    assert main([str(word) for word in [*command, *learning]]) == 0
    assert (int8 / "model.safetensors").read_bytes() == before
    assert "--enable-lora --max-lora-rank 16 --lora-modules" in capsys.readouterr().out
    record = json.loads((out / "recovery.json").read_text())
    found = record["quality"]["end"]["passages"]["kl"]
    assert found < 0.9 * record["quality"]["plan"]["passages"]["kl"]
    # As peft reads it: on the unmodified model, merged, and then restructured.
    adapted = PeftModel.from_pretrained(hf.load_unmodified(int8), out).merge_and_unload()
    student = hf.restructure(adapted, resolve(json.loads(PAIRS), LAYERS))
    plain = hf.load_unmodified(dequantized)
    assert torch.equal(
        hf.load_unmodified(int8).model.layers[0].mlp.up_proj.weight,
        plain.model.layers[0].mlp.up_proj.weight,
    )
    tokenizer = AutoTokenizer.from_pretrained(int8)
    ids = torch.tensor(tokenizer(text.read_text()).input_ids[-2048:]).view(-1, 64)
    with torch.no_grad():
        wanted = plain(ids).logits.log_softmax(-1)
        logs = student(ids).logits.log_softmax(-1)
        unlearned = hf.load(dequantized, json.loads(PAIRS))(ids).logits.log_softmax(-1)
    divergence = [float((wanted.exp() * (wanted - one)).sum()) for one in (logs, unlearned)]
    assert divergence[0] < 0.95 * divergence[1]

    more = ["--train", "lora", "--refit", "2048"]
    assert main([str(word) for word in [*command[:-1], "lora", *more]]) == 1


def test_quantized_model_becomes_an_unquantized_one(
    tmp_path: Path, text: Path, auto_dtype: str
) -> None:
    model = write_tokenizer(write_llama(tmp_path / "source", layers=LAYERS), bos=True)
    int8, dequantized = quantize_int8(model, tmp_path)
    write_tokenizer(int8, bos=True)
    assert main(arguments(int8, text, tmp_path / "out", "--tokens", 0)) == 0
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    changed = differing(dequantized, tmp_path / "out")
    assert_refitted(changed)


def test_distillation_that_does_harm_is_undone(
    model: Path, text: Path, tmp_path: Path, auto_dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is written is bit for bit what the refit gave, and says so."""
    assert main(arguments(model, text, tmp_path / "refit", "--tokens", 0)) == 0
    capsys.readouterr()
    more = ["--train", "all", "--tokens", 2048, "--rate", 1]
    assert main(arguments(model, text, tmp_path / "out", *more)) == 0
    assert "distillation made it worse and was undone; try less than 1" in capsys.readouterr().out
    assert not differing(tmp_path / "refit", tmp_path / "out")
    quality = json.loads((tmp_path / "out" / "recovery.json").read_text())["quality"]
    assert quality["end"] == quality["refit"]
    assert quality["distilled"]["passages"]["kl"] > quality["refit"]["passages"]["kl"]
    assert "which made it worse and was undone" in (tmp_path / "out" / "README.md").read_text()


def test_refit_alone_and_next_token(
    model: Path, text: Path, tmp_path: Path, auto_dtype: str
) -> None:
    assert main(arguments(model, text, tmp_path / "refit", "--tokens", 0)) == 0
    record = json.loads((tmp_path / "refit" / "recovery.json").read_text())
    assert record["quality"]["end"] == record["quality"]["refit"]
    assert record["training"]["steps"] == 0
    more = ["--objective", "next-token", "--tokens", 8192, "--refit", 0]
    assert main(arguments(model, text, tmp_path / "plain", *more)) == 0
    plain = json.loads((tmp_path / "plain" / "recovery.json").read_text())["quality"]
    assert plain["end"]["passages"]["perplexity"] < plain["plan"]["passages"]["perplexity"]


@pytest.mark.parametrize("rollouts", [0, 2])
def test_killed_and_started_again(model: Path, text: Path, tmp_path: Path, rollouts: int) -> None:
    """kill -9 in the middle of training: the same command goes on, to the same result."""
    common = ["--tokens", 64 * 256, "--evaluations", 16, "--rollouts", rollouts]
    assert main(arguments(model, text, tmp_path / "whole", *common)) == 0
    out, run = tmp_path / "out", tmp_path / ".out.run"
    command = [sys.executable, "-m", "vllm_depthpar.cli", *arguments(model, text, out, *common)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 300
        while not list(run.glob("checkpoint-*/trainer_state.json")):
            assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not out.exists()
    states = [json.loads(path.read_text()) for path in run.glob("checkpoint-*/trainer_state.json")]
    assert 0 < max(state["global_step"] for state in states) < 64
    # What a kill in the middle of saving leaves.
    (run / "checkpoint-63").mkdir()
    (run / "checkpoint-63" / "trainer_state.json").write_text('{"global_st')
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    records = [
        json.loads((folder / "recovery.json").read_text()) for folder in (tmp_path / "whole", out)
    ]
    whole, resumed = (record["curve"] for record in records)
    assert [one["tokens"] for one in resumed] == [one["tokens"] for one in whole]
    for one, other in zip(whole, resumed, strict=True):
        assert other["passages"] == pytest.approx(one["passages"], rel=1e-3)
    assert not run.exists()


@pytest.fixture(scope="module")
def ended(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was ended when all but its checkpoint was written."""
    out = tmp_path_factory.mktemp("ended") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "write", _interrupt)
        assert main(arguments(model, text, out, "--tokens", 1024)) == 130
    return out.with_name(".out.run")


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _list(path: Path) -> None:
    path.write_text("[1]")


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("run.json", _cut, "can't be read (line "),
        ("run.json", _list, "holds a run of other settings, plan or texts; allowed: "),
        ("refit.json", _list, "is damaged (AttributeError"),
        ("refit.safetensors", _cut, "can't be read (Error while deserializing header"),
        ("refit.safetensors", Path.unlink, "can't be read (No such file"),
        ("steps.json", _list, "is damaged (ValueError: no number of steps); allowed: "),
        # Of checkpoints the newest whole one counts; here there is none, and training starts anew.
        ("checkpoint-4/trainer_state.json", _cut, None),
        ("checkpoint-4/model.safetensors", _cut, None),
        ("checkpoint-4/model.safetensors", Path.unlink, None),
        ("checkpoint-4/optimizer.pt", _cut, None),
        ("checkpoint-of-mine", Path.mkdir, None),
    ],
)
def test_a_damaged_run(
    name: str,
    damage: Callable[[Path], None],
    message: str | None,
    model: Path,
    text: Path,
    ended: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = shutil.copytree(ended, tmp_path / ".out.run")
    damage(run / name)
    code = main(arguments(model, text, tmp_path / "out", "--tokens", 1024))
    line = capsys.readouterr().err.splitlines()[-1]
    if message is None:
        assert code == 0
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
    else:
        assert code == 1
        assert line.startswith("depthpar: error: ")
        assert message in line
        assert "emove" in line
        assert [path.name for path in tmp_path.iterdir()] == [".out.run"]


def test_another_run_in_the_folder(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / ".out.run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    assert main(arguments(model, text, tmp_path / "out")) == 1
    assert "holds a run of other settings, plan or texts; allowed" in capsys.readouterr().err


def test_text_that_the_model_writes(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both kinds, through vLLM; a second run writes nothing again."""
    out = tmp_path / "out"
    own = ["recover", model, "--plan", PAIRS, "--own-text", 6000, "--window", 64, "--out"]
    more = ["--refit", 1024, "--tokens", 256, "--evaluations", 1]
    with forked_engines():
        assert main([str(argument) for argument in [*own, out, *more]]) == 0
    record = json.loads((out / "recovery.json").read_text())
    assert record["texts"].keys() == {"own-prose", "own-chats"}
    assert 4000 < sum(record["texts"].values()) < 6500
    assert "own-prose" in (out / "README.md").read_text()
    capsys.readouterr()
    again = tmp_path / "again"
    assert main([str(argument) for argument in [*own, again, *more]]) == 0
    assert "Passages" not in capsys.readouterr().err
    assert json.loads((again / "recovery.json").read_text())["quality"] == record["quality"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--plan", "identity"], "the plan changes nothing, and nothing is lost; allowed: another"),
        (["--window", "256"], "windows of 256 tokens to learn from; allowed: 16 or more"),
        (["--rollouts", "5"], "--rollouts 5 are more than --micro-batch 4; allowed: 0 to 4"),
        (
            ["--rollouts", "1", "--objective", "next-token"],
            "--rollouts 1: from its own words alone a student learns nothing; allowed: --objective",
        ),
        (["--micro-batch", "3"], "--batch 4 is no multiple of --micro-batch 3 "),
        (["--minutes", "0"], "--minutes 0 is too short; allowed: more than 0"),
        (["--text", "/no/such/file"], "text '/no/such/file' can't be read"),
    ],
)
def test_wrong_input(
    model: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    assert main(arguments(model, text, tmp_path / "out", *more)) == 1
    lines: list[Any] = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("depthpar: error: ")
    assert message in lines[-1]
    assert not list(tmp_path.iterdir())


def test_two_processes_do_what_one_does(model: Path, text: Path, tmp_path: Path) -> None:
    """The same windows in every step, half of them on each process. In float32: of a batch of
    another size bfloat16 makes other sums."""
    common = ["--tokens", 4096, "--dtype", "float32"]
    assert main(arguments(model, text, tmp_path / "one", *common)) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]
    more = arguments(model, text, tmp_path / "two", *common, "--micro-batch", 2)
    env = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())}
    launch[3:3] = ["--master-port", env["MASTER_PORT"]]
    done = subprocess.run(
        [*launch, "vllm_depthpar.cli", *more], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (
        json.loads((tmp_path / name / "recovery.json").read_text())["curve"]
        for name in ("one", "two")
    )
    assert len(one) == len(two) == 4
    for left, right in zip(one, two, strict=True):
        assert right["tokens"] == left["tokens"]
        assert right["passages"] == pytest.approx(left["passages"], rel=1e-3)
