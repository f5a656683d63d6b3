"""vLLM's next release, as `make test-next` gets it: what it says without a network."""

import os
import subprocess
import sys
from pathlib import Path

import next_vllm
import pytest

# pip asks nobody.
OFFLINE = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}


def run() -> subprocess.CompletedProcess[str]:
    command = [sys.executable, next_vllm.__file__]
    return subprocess.run(
        command, env={**os.environ, **OFFLINE}, capture_output=True, text=True, timeout=60
    )


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DEPTHPAR_CACHE", str(tmp_path))
    return tmp_path


def test_neither_cached_nor_to_be_had(cache: Path) -> None:
    done = run()
    assert done.returncode == 1
    assert done.stdout == ""
    said, line = done.stderr.splitlines()
    assert said.startswith("Downloading ")
    assert line.startswith(f"make test-next: vLLM's next release is not in {cache}, and pip could ")
    assert "vllm==" in line
    assert list(cache.iterdir()) == []


def test_cached_it_needs_no_network() -> None:
    """It has the kernels of the build that is installed now, not those of another time."""
    package = next_vllm.folder() / "vllm"
    package.mkdir(parents=True)
    (package / "_C.abi3.so").symlink_to("/nowhere/_C.abi3.so")
    done = run()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{next_vllm.folder()}\n"
    kernels = list(package.glob("*.so"))
    assert package / "_C.abi3.so" in kernels
    assert all(kernel.exists() for kernel in kernels)
