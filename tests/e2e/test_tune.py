"""`depthpar tune` as a user runs it, on a small random model, for a machine that is elsewhere."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from models import write_llama, write_tokenizer

from vllm_depthpar.cli.main import main
from vllm_depthpar.plan import resolve

pytestmark = pytest.mark.usefixtures("own_cache")


SEARCHED = Path(__file__).parents[2] / "benchmarks/quality/results/search-smollm2-pairs-report.json"


def test_goes_on_after_the_search(
    tmp_path: Path, text: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What is there is not made again; the rest is: a checkpoint that carries its plan, a page."""
    model = write_tokenizer(write_llama(tmp_path / "model", layers=6), bos=True)
    out, kept = tmp_path / "tuned", tmp_path / "tuned.tune"
    kept.mkdir()
    (kept / "plan.json").write_text('{"pair": [2, 6]}')
    shutil.copy(SEARCHED, kept / "plan-report.json")
    command = ["tune", str(model), "--device", "h100", "--text", str(text), "--minutes", "0.5"]
    command += ["--out", str(out), "--speedup"]
    assert main([*command, "1.1"]) == 0
    printed = capfd.readouterr()
    assert f"serve it: vllm serve {out}" in printed.out
    steps = [line for line in printed.err.splitlines() if re.match(r"\[\d/3\] ", line)]
    assert len(steps) == 3
    assert all(": depthpar " in step for step in steps)
    config = json.loads((out / "config.json").read_text())
    assert resolve(config["depthpar"], 6) == resolve({"pair": [2, 6]}, 6)
    assert (kept / "plan.json").read_text() == '{"pair": [2, 6]}'
    page = (out / "report.html").read_text()
    assert "recovered" in page

    made = (out / "model.safetensors").stat().st_mtime_ns
    (out / "report.html").unlink()
    assert main([*command, "1.1"]) == 0
    assert (out / "report.html").exists()
    assert (out / "model.safetensors").stat().st_mtime_ns == made
    capfd.readouterr()
    assert main([*command, "1.05"]) == 1
    assert "was begun with other settings; allowed: the same, or another --out" in (
        capfd.readouterr().err
    )


def test_what_cannot_be_reached_ends_all(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, out = write_llama(tmp_path / "model", layers=6), tmp_path / "tuned"
    with pytest.raises(SystemExit) as ended:
        main(["tune", str(model), "--device", "h100", "--speedup", "40", "--out", str(out)])
    assert ended.value.code == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("[")]
    assert len(lines) == 1
    assert re.search(r"error: speed-up 40 can't be reached .*; allowed: .*nearest: \d", lines[0])
    assert not out.exists()
