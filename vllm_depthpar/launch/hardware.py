"""What a measurement runs on, and how vLLM's processes share it."""

from __future__ import annotations

import os
import subprocess
from typing import Any

from vllm_depthpar.launch.server import DEFAULT_ENV

CORES = len(os.sched_getaffinity(0))


def gpus() -> list[str]:
    """Name the GPUs that vLLM would use here; none for its CPU build."""
    import torch

    return [torch.cuda.get_device_name(at) for at in range(torch.cuda.device_count())]


def inventory() -> dict[str, Any]:
    """List, JSON-ready, cores and threads, and the GPUs with driver and CUDA version if there are
    any."""
    found: dict[str, Any] = {
        "cores": CORES,
        "threads": int(os.environ.get("OMP_NUM_THREADS", CORES)),
    }
    if names := gpus():
        import torch

        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(query, capture_output=True, text=True).stdout.split()[:1]
        except OSError:
            driver = []
        found |= {"gpus": names, "driver": "".join(driver), "cuda": torch.version.cuda}
    return found


def environment(tp: int, on_gpu: bool) -> dict[str, str]:
    """Choose what vLLM's processes get, for all variants alike; what the environment has already
    wins.

    On a CPU the ranks share the cores evenly; one rank's threads are not bound to cores.
    """
    chosen = dict(DEFAULT_ENV)
    if not on_gpu:
        each = CORES // tp
        chosen["OMP_NUM_THREADS"] = str(max(1, each))
        # vLLM 0.32 writes these artifacts on a CPU but cannot load them again.
        chosen["VLLM_USE_AOT_COMPILE"] = "0"
        if tp > 1:
            cores = [str(core) for core in sorted(os.sched_getaffinity(0))]
            shares = [",".join(cores[at * each : (at + 1) * each]) for at in range(tp)]
            chosen["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(shares) if each else "nobind"
    return {name: value for name, value in chosen.items() if name not in os.environ}
