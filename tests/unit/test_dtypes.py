"""What "auto" is, on processors of every kind and where it is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vllm_depthpar.errors import UserError
from vllm_depthpar.evaluate import dtypes
from vllm_depthpar.evaluate.dtypes import usable_dtype

# Of what lscpu shows on them, a few.
FLAGS = {
    "fpu sse2 avx2": False,
    "fpu sse2 avx2 avx512f avx512_vnni": False,
    "fpu sse2 avx2 avx512f avx512_bf16 avx512_vnni": True,
    "fpu sse2 avx2 amx_bf16 amx_tile": True,
    "fpu not_amx_bf16": False,
}


def on_cpu(monkeypatch: pytest.MonkeyPatch, flags: str, folder: Path) -> None:
    """What follows runs as if on two cores of a processor that has these instructions."""
    path = folder / "cpuinfo"
    core = f"processor\t: 0\nmodel name\t: with avx512_bf16\nflags\t\t: {flags}\nbugs\t\t:\n"
    path.write_text(f"{core}\n{core}\n")
    monkeypatch.setattr(dtypes, "_CPU_INFO", path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv(dtypes.ENV)


@pytest.mark.parametrize(("flags", "multiplies"), FLAGS.items())
def test_of_a_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str, multiplies: bool
) -> None:
    on_cpu(monkeypatch, flags, tmp_path)
    assert usable_dtype("auto") == (torch.bfloat16 if multiplies else torch.float32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert usable_dtype("auto") == torch.bfloat16


def test_of_a_system_that_does_not_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    on_cpu(monkeypatch, "", tmp_path)
    monkeypatch.setattr(dtypes, "_CPU_INFO", tmp_path / "none")
    assert usable_dtype("auto") == torch.float32


@pytest.mark.parametrize("flags", FLAGS)
def test_what_is_said_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str) -> None:
    on_cpu(monkeypatch, flags, tmp_path)
    assert usable_dtype("float16") == torch.float16
    for name in ("float32", "bfloat16"):
        monkeypatch.setenv(dtypes.ENV, name)
        assert usable_dtype("auto") == getattr(torch, name)
        assert usable_dtype("float32") == torch.float32
        assert usable_dtype("bfloat16") == torch.bfloat16
    monkeypatch.setenv(dtypes.ENV, "half")
    with pytest.raises(UserError, match=r"^DEPTHPAR_DTYPE 'half' is unknown; allowed: bfloat16, f"):
        usable_dtype("auto")
