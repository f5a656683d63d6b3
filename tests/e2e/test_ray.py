"""`vllm serve --distributed-executor-backend ray`: plan, metrics and answers are those of `mp`.

Ray's workers are started by its own daemon, whose environment is not the server's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import ray_cluster
from forked_serve import forked_servers
from models import write_llama, write_tokenizer
from prometheus import scrape

from vllm_depthpar.launch.server import Server, serve
from vllm_depthpar.metrics import metric_files
from vllm_depthpar.plan import precedence, resolve

pytestmark = pytest.mark.skipif(
    not ray_cluster.INSTALLED, reason="ray is not installed (`make test-deploy` installs it)"
)

LAYERS = 6
SPEC = {"pair": [0, 4]}
PLAN = resolve(SPEC, LAYERS)
OVERRIDES = ["--hf-overrides", json.dumps({"depthpar": SPEC})]
ARGUMENTS = ["--model-impl", "depthpar", "--tensor-parallel-size", "2", "--enforce-eager"]
ARGUMENTS += ["--dtype", "float32", "--max-model-len", "256", "--served-model-name", "m"]
ENV = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_PLUGINS": f"depthpar,depthpar_metrics,{ray_cluster.PLUGIN}",
    metric_files.ENV: "1",
}


class Seen(NamedTuple):
    """What a server says of its plan, and answers."""

    source: str
    digest: str
    metrics: dict[str, Any]
    answer: Any


def ask(server: Server) -> Seen:
    body = {"model": "m", "prompt": "one and the same", "max_tokens": 12, "temperature": 0}
    body |= {"logprobs": 1, "ignore_eos": True}
    reply = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120).raise_for_status()
    (choice,) = reply.json()["choices"]
    plan = httpx.get(f"{server.url}/v1/depthpar/plan", timeout=30).raise_for_status().json()
    samples = [sample for sample in scrape(server) if "depthpar" in sample.name]
    (info,) = [sample.labels for sample in samples if sample.name.endswith("plan_info")]
    assert (info["digest"], info["source"]) == (plan["digest"], plan["source"])
    counted = ("_count", "_all_reduces_total", "_per_forward", "_depth", "_saved", "_layers")
    metrics = {
        f"{sample.name} {sorted(sample.labels.items())}": sample.value
        for sample in samples
        if sample.name.endswith(counted)
    }
    return Seen(plan["source"], plan["digest"], metrics, (choice["text"], choice["logprobs"]))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(write_llama(tmp_path_factory.mktemp("model"), layers=LAYERS))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """PYTHONPATH of servers and workers."""
    platform = ray_cluster.write_platform(tmp_path_factory.mktemp("platform"))
    return f"{platform}:{os.environ.get('PYTHONPATH', '')}"


@pytest.fixture(scope="module")
def on_ray(path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of servers on Ray; nothing of ours is in that of the cluster."""
    log = tmp_path_factory.mktemp("ray") / "log"
    ours = {key: os.environ[key] for key in os.environ if not key.startswith("DEPTHPAR_")}
    with ray_cluster.cluster(2, {**ours, "PYTHONPATH": path}, log) as address:
        yield {**ENV, "PYTHONPATH": path, "RAY_ADDRESS": address}


@pytest.fixture(scope="module")
def expected(model: Path) -> Seen:
    """With vLLM's own workers."""
    arguments = [*ARGUMENTS, *OVERRIDES, "--distributed-executor-backend", "mp"]
    env = {**ENV, "VLLM_PLUGINS": "depthpar,depthpar_metrics"}
    with forked_servers(), serve(model, *arguments, env=env) as server:
        return ask(server)


@pytest.mark.parametrize("way", ["--hf-overrides", precedence.ENV])
def test_as_with_mp(way: str, on_ray: dict[str, str], model: Path, expected: Seen) -> None:
    env, arguments = dict(on_ray), [*ARGUMENTS, "--distributed-executor-backend", "ray"]
    if way == precedence.ENV:
        env[way] = json.dumps(SPEC)
    else:
        arguments += OVERRIDES
    with ray_cluster.servers(), serve(model, *arguments, env=env) as server:
        seen = ask(server)
        assert "RayWorkerProc" in server.log_text()
    assert (seen.source, seen.digest) == (way, PLAN.digest)
    assert seen.metrics == expected.metrics
    assert any("all_reduces_total" in name for name in seen.metrics)
    assert seen.answer == expected.answer
