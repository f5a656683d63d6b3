"""benchmarks/gpu_check.py, as far as it goes without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fork_server import forked_engines

from benchmarks import gpu_check
from benchmarks.gpu_check import OK, SKIPPED, TOKENS, WRONG, judged, plans
from vllm_depthpar.launch import hardware
from vllm_depthpar.plan import read_spec, resolve

COMMAND = [sys.executable, gpu_check.__file__]


def test_on_a_cpu_it_runs_and_says_what_it_skips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found.json"
    options = ["--device", "cpu", "--parts", "capture", "metrics", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [gpu_check.__file__, *options])
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    with forked_engines():
        gpu_check.main()
    shown = capsys.readouterr().out
    report = json.loads(out.read_text())
    results = [(row["check"], row["result"]) for row in report["rows"]]
    assert results == [
        ("verify", SKIPPED),
        ("capture", SKIPPED),
        ("speed", SKIPPED),
        ("metrics, 2 ranks, eager", OK),
    ]
    assert {"date", "versions", "command", "cpu", "seconds"} <= report.keys()
    assert report["command"].startswith("python benchmarks/gpu_check.py --device cpu --parts")
    for row in report["rows"]:
        assert row["found"] in shown
    assert "CUDA graphs need a GPU" in shown
    assert str(out) in shown


@pytest.mark.skipif(bool(hardware.gpus()), reason="there is a GPU")
def test_without_a_gpu_there_is_one_line(tmp_path: Path) -> None:
    options = ["--device", "cuda", "--out", str(tmp_path)]
    done = subprocess.run([*COMMAND, *options], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == ("error: --device cuda: there is no GPU here; allowed: --device cpu\n")


@pytest.mark.parametrize("layers", [sizes["layers"] for sizes in gpu_check.SIZES.values()])
def test_one_plan_of_each_kind(layers: int) -> None:
    found = {kind: resolve(read_spec(spec), layers) for kind, spec in plans(layers).items()}
    assert {max(map(len, plan.blocks)) for plan in found.values()} == {1, 2, 3}
    assert found["skip"].skipped
    assert len(found["ladder over pairs"].blocks) < layers
    assert len({plan.digest for plan in found.values()}) == len(found)


RIGHT = {
    "forward_seconds_count decode": 100.0,
    "forward_seconds_sum decode": 2.0,
    "all_reduces_total decode": 1000.0,
    "all_reduce_seconds_total decode exposed": 0.5,
    "all_reduce_seconds_total decode hidden": 1.0,
}


@pytest.mark.parametrize(
    ("change", "timed", "result", "words"),
    [
        ({}, True, OK, "100 decoding passes of 20.00 ms, 1000 all-reduces, 500 us of each exposed"),
        ({}, False, WRONG, "which cannot be"),
        ({"all_reduces_total decode": 0.0}, True, WRONG, "which should be"),
        ({"all_reduces_total decode": 0.0}, False, OK, "no all-reduces timed"),
        ({"all_reduce_seconds_total decode hidden": 1.6}, True, WRONG, "longer than the passes"),
        ({"forward_seconds_count decode": TOKENS - 2.0}, True, WRONG, "fewer than tokens"),
    ],
)
def test_metrics_are_judged(change: dict[str, float], timed: bool, result: str, words: str) -> None:
    row = judged("metrics", {**RIGHT, **change}, timed)
    assert row.result == result
    assert words in row.found
