"""`depthpar tune` as a user runs it, on a small random model, for a machine that is elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from models import write_llama, write_tokenizer

from vllm_depthpar.cli.main import main
from vllm_depthpar.plan import resolve

pytestmark = pytest.mark.usefixtures("own_cache")


def test_tune(tmp_path: Path, text: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A checkpoint that carries its plan, and a page; ended on the way, it goes on from there."""
    model = write_tokenizer(write_llama(tmp_path / "model", layers=6), bos=True)
    out, kept = tmp_path / "tuned", tmp_path / "tuned.tune"
    command = ["tune", str(model), "--device", "h100", "--text", str(text), "--minutes", "1"]
    command += ["--out", str(out), "--speedup"]
    assert main([*command, "1.2"]) == 0
    printed = capfd.readouterr()
    assert f"serve it: vllm serve {out}" in printed.out
    assert [line[:5] for line in printed.err.splitlines() if line.startswith("[")] == [
        *("[1/3]", "[2/3]", "[3/3]")
    ]
    config = json.loads((out / "config.json").read_text())
    assert resolve(config["depthpar"], 6).depth < 6
    assert "<svg" in (out / "report.html").read_text()
    assert json.loads((kept / "plan-report.json").read_text())["goal"]

    found = (kept / "plan.json").stat().st_mtime_ns
    shutil.rmtree(out)
    assert main([*command, "1.2"]) == 0
    assert (kept / "plan.json").stat().st_mtime_ns == found
    assert (out / "model.safetensors").exists()
    capfd.readouterr()
    assert main([*command, "1.3"]) == 1
    assert "was begun with other settings; allowed: the same, or another --out" in (
        capfd.readouterr().err
    )
    # What can't be reached is the search's to say, and ends all.
    with pytest.raises(SystemExit):
        main([*command[:-3], "--out", str(tmp_path / "other"), "--speedup", "40"])
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert "allowed: at most" in line or "the nearest" in line
