"""A Ray cluster of this machine alone, on which vLLM's CPU build runs too.

vLLM asks Ray for the resource that a platform names (`ray_device_key`), and its CPU platform names
none: "current platform cpu does not support ray". The platform here differs in that name only. It
is a plugin to vLLM, so that the server and Ray's workers find it alike. Ray gives out as many
"GPU" as it is told that there are.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

from vllm_depthpar.launch.process_group import ProcessGroup
from vllm_depthpar.launch.server import HOST, free_port

INSTALLED = find_spec("ray") is not None
PLUGIN = "cpu_with_ray"
_MODULE = """\
from vllm.platforms.cpu import CpuPlatform


class CpuWithRay(CpuPlatform):
    ray_device_key = "GPU"


def name():
    return f"{__name__}.CpuWithRay"
"""
_START_SECONDS = 120
_STOP_SECONDS = 30


def write_platform(folder: Path) -> Path:
    """Write the platform, and what makes it a plugin to vLLM where the folder is on PYTHONPATH."""
    info = folder / f"{PLUGIN}-0.dist-info"
    info.mkdir(parents=True)
    (folder / f"{PLUGIN}.py").write_text(_MODULE)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PLUGIN}\nVersion: 0\n")
    points = f"[vllm.platform_plugins]\n{PLUGIN} = {PLUGIN}:name\n"
    (info / "entry_points.txt").write_text(points)
    return folder


@contextmanager
def servers() -> Iterator[None]:
    """Every `Server` is started with this program's Python meanwhile, by the module of its command.

    Not forked (`forked_serve`): which platform there is, is decided at import.
    """

    def start(args: Sequence[str], env: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
        with log.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *args],
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    with patch("vllm_depthpar.launch.server.start_vllm_serve", start):
        yield


@contextmanager
def cluster(devices: int, env: Mapping[str, str], log: Path) -> Iterator[str]:
    """Start it, with so many devices and with `env` as the environment of its workers.

    Gives the address that RAY_ADDRESS takes.
    """
    # Short: names of its sockets begin with it.
    with TemporaryDirectory(prefix="ray-") as folder:
        address = f"{HOST}:{free_port()}"
        start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
        start += ["--node-ip-address", HOST, "--port", address.rpartition(":")[2]]
        start += ["--num-gpus", str(devices), "--num-cpus", "1", "--temp-dir", folder]
        start += ["--object-store-memory", str(100 << 20), "--include-dashboard", "false"]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*start, "--disable-usage-stats"],
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        group = ProcessGroup(process.pid)
        try:
            deadline = time.monotonic() + _START_SECONDS
            while "Ray runtime started" not in log.read_text():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            yield address
        finally:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            finally:
                group.signal(signal.SIGKILL)
                process.wait()
                group.release()
