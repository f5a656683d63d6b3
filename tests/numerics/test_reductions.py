"""All-reduces that are started and waited for apart, between real ranks over Gloo."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import reduction_ranks
import torch

from vllm_depthpar.launch.server import free_port

RANK_TIMEOUT = 120


Done = subprocess.CompletedProcess[str]


def run_ranks(scenarios: list[str], ranks: int) -> list[Done]:
    """Run scenarios in one process per rank, each a host to vLLM."""
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    env |= {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks), "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, reduction_ranks.__file__, *scenarios],
            env={**env, "RANK": str(rank), "VLLM_DIST_IDENT": f"host{rank}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    done = []
    try:
        for process in processes:
            output, _ = process.communicate(timeout=RANK_TIMEOUT)
            done.append(subprocess.CompletedProcess([], process.returncode, output))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return done


@pytest.fixture(scope="module")
def two_ranks() -> list[Done]:
    """All scenarios for two ranks in the same two processes; in the last of them rank 1 ends."""
    return run_ranks(["sums", "overlap", "timed", "memory", "compiled_overlap", "death"], 2)


@pytest.mark.parametrize("scenario", ["sums", "overlap", "timed", "memory", "compiled_overlap"])
def test_two_hosts(scenario: str, two_ranks: list[Done]) -> None:
    for done in two_ranks:
        assert f"passed: {scenario}\n" in done.stdout, done.stdout[-3000:]


def test_a_rank_that_dies_is_an_error_on_the_others(two_ranks: list[Done]) -> None:
    survivor, dead = two_ranks
    assert "passed: death\n" in survivor.stdout, survivor.stdout[-3000:]
    assert survivor.returncode == 0
    assert dead.returncode == 7


def test_sums_on_three_hosts() -> None:
    for done in run_ranks(["sums"], 3):
        assert "passed: sums\n" in done.stdout, done.stdout[-3000:]


def test_one_rank_adds_nothing_to_the_graph() -> None:
    (done,) = run_ranks(["alone"], 1)
    assert "passed: alone\n" in done.stdout, done.stdout[-3000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_side_stream_in_a_cuda_graph() -> None:
    (done,) = run_ranks(["cuda_graph"], 1)
    assert "passed: cuda_graph\n" in done.stdout, done.stdout[-3000:]
