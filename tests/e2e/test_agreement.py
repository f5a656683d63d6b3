"""Ranks and nodes that resolved different plans end, all of them, with the same line."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import two_nodes
from fork_server import fork
from forked_serve import forked_servers
from models import write_llama

from vllm_depthpar.errors import UserError
from vllm_depthpar.launch.server import Server, free_port
from vllm_depthpar.model.agreement import compare
from vllm_depthpar.plan import resolve

LAYERS = 6
ONE, OTHER = {"pair": [0, 4]}, {"pair": [0, 2]}


def digest(spec: Any) -> str:
    return resolve(spec, LAYERS).digest


def compare_as_rank(rank: int, port: int, specs: list[Any], answer: Path) -> None:
    store = dist.TCPStore("127.0.0.1", port, len(specs), rank == 0, timedelta(seconds=30))
    dist.init_process_group("gloo", rank=rank, world_size=len(specs), store=store)
    try:
        source = f"source {rank}"
        compare(resolve(specs[rank], LAYERS), source, dist.group.WORLD)
        answer.write_text("")
    except UserError as error:
        answer.write_text(str(error))


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        # Whatever the way, one plan is one plan.
        ([ONE, {"blocks": [[0, 1], [2, 3], [4], [5]]}], None),
        (
            [ONE, OTHER, ONE],
            [f"{digest(ONE)} on rank 0 (", f"{digest(OTHER)} on rank 1 (from source 1); "],
        ),
    ],
)
def test_ranks(specs: list[Any], words: list[str] | None, tmp_path: Path) -> None:
    port, answers = free_port(), [tmp_path / str(rank) for rank in range(len(specs))]
    processes = [
        fork(compare_as_rank, rank, port, specs, answer) for rank, answer in enumerate(answers)
    ]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    (line,) = {answer.read_text() for answer in answers}
    assert bool(line) is (words is not None)
    for part in words or ():
        assert part in line


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[tuple[Server, Path]]]:
    """Two nodes of one model, of one rank each; DEPTHPAR_PLAN differs."""
    model = write_llama(tmp_path / "model", layers=LAYERS)
    options = ["--model-impl", "depthpar", "--enforce-eager", "--skip-tokenizer-init"]
    options += two_nodes.options()
    with ExitStack() as stack, forked_servers():
        started = []
        for rank, (plan, role) in enumerate(zip((ONE, OTHER), two_nodes.ROLES, strict=True)):
            log = tmp_path / f"{rank}.log"
            env = {**two_nodes.ENV, "DEPTHPAR_PLAN": json.dumps(plan)}
            node = Server(model, *options, *role, env=env, log=log)
            stack.callback(node.stop)
            started.append((node, log))
        yield started


def test_nodes(nodes: list[tuple[Server, Path]]) -> None:
    deadline = time.monotonic() + 90
    while any(node.process.poll() is None for node, _ in nodes):
        assert time.monotonic() < deadline, [log.read_text()[-2000:] for _, log in nodes]
        time.sleep(0.1)
    lines = set()
    for node, log in nodes:
        text = log.read_text()
        assert node.process.poll() == 1, text[-2000:]
        assert "Loading safetensors" not in text
        lines.add(text.strip().splitlines()[-1])
    (line,) = lines
    assert line.startswith("depthpar: error: the ranks have different plans: ")
    assert f"{digest(ONE)} on rank 0 (from DEPTHPAR_PLAN)" in line
    assert f"{digest(OTHER)} on rank 1 (from DEPTHPAR_PLAN)" in line
