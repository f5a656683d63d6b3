"""What `depthpar tune` is going to do, and what it refuses before it does anything."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from models import write_llama

from vllm_depthpar.cli.main import main, parser
from vllm_depthpar.cli.steps import Step
from vllm_depthpar.cli.tune import steps

OUT = Path("tuned")
KEPT = Path("tuned.tune")


def planned(*more: str, measured: bool = True, can_measure: bool = True) -> list[Step]:
    words = ["tune", "model", "--out", "tuned", *more]
    args: argparse.Namespace = parser().parse_args(words)
    return steps(args, KEPT, measured, can_measure)


def names(found: list[Step]) -> list[str]:
    return [step.arguments[0] for step in found]


def test_one_rank() -> None:
    found = planned("--speedup", "1.1", "--minutes", "20", measured=False)
    assert names(found) == [
        *("predict", "search", "recover", "verify", "bench", "eval", "eval", "eval", "report")
    ]
    search = found[1].command
    assert "--speedup 1.1 --tp 1 --device this --methods pair,group,skip,drop_attention" in search
    assert search.endswith("--minutes 6 --out tuned.tune/plan.json")
    assert "--minutes 8 --out tuned" in found[2].command
    assert "--own-text 16384" in found[2].command
    # Every command is one that its own parser takes, and the page has what the others wrote.
    for step in found:
        parser().parse_args(list(step.arguments))
    # Who judges what the tuned model writes is the model that it was made from.
    assert "eval tuned --plan carried --made-from model --generate" in found[7].command
    written = [str(step.makes) for step in found if step.arguments[0] == "eval"]
    assert set(written) < set(found[-1].arguments)
    assert found[-1].arguments[1:3] == ["tuned.tune/plan-report.json", "tuned/recovery.json"]


def test_between_ranks() -> None:
    """The neurons are ordered first, and everything after is of that checkpoint."""
    found = planned("--max-loss", "5", "--tp", "2", "--link", "nvlink4", "--text", "a.txt")
    assert names(found)[:2] == ["order", "search"]
    assert found[1].arguments[1] == "tuned.tune/ordered"
    assert "--max-ppl-increase 5 --tp 2 --text a.txt --device this --link nvlink4" in (
        found[1].command
    )
    assert "drop_sync" in found[1].command
    assert "--text a.txt --own-text 49152 --minutes 24" in found[2].command
    assert all("--tp" in step.arguments for step in found[:5])
    assert "--server-args=--tensor-parallel-size 2" in found[5].arguments
    assert "--server-args=--enforce-eager --tensor-parallel-size 2" in found[7].arguments
    assert "--made-from tuned.tune/ordered" in found[7].command


def test_a_machine_that_is_elsewhere() -> None:
    found = planned("--speedup", "1.1", "--device", "h100", measured=False, can_measure=False)
    assert names(found) == ["search", "recover", "report"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--speedup", "1.1", "--minutes", "0"], "--minutes 0 is too short; allowed: more than 0"),
        (["--speedup", "1.1", "--tp", "2"], "--tp 2 needs a --link; allowed: "),
        (["--speedup", "1.1", "--device", "h1000"], "device 'h1000' is unknown; allowed: h100"),
    ],
)
def test_what_is_refused(
    more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = write_llama(tmp_path / "model"), tmp_path / "tuned"
    assert main(["tune", str(model), "--out", str(out), *more]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"depthpar: error: {message}")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_another_folder_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = write_llama(tmp_path / "model"), tmp_path / "tuned"
    out.mkdir()
    (out / "mine").touch()
    assert main(["tune", str(model), "--out", str(out), "--speedup", "1.1"]) == 1
    assert f"{out}" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["mine"]
