"""What the plugin adds to a real `vllm serve`: metrics on /metrics, and two endpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import jsonschema
import pytest
import schemathesis
from forked_serve import forked_servers
from hypothesis import given, settings
from models import write_llama, write_tokenizer
from prometheus import scrape, scraping
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.samples import Sample
from schemathesis import Case
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import positive_data_acceptance

from vllm_depthpar.errors import UserError
from vllm_depthpar.launch.server import Server, serve
from vllm_depthpar.metrics import metric_files
from vllm_depthpar.metrics.forward_timer import layers_by_kind
from vllm_depthpar.metrics.metric_files import Metric, MetricFiles
from vllm_depthpar.plan import precedence, resolve
from vllm_depthpar.plan.drawing import draw
from vllm_depthpar.plan.model_shape import ModelShape, all_reduces, hidden_all_reduces
from vllm_depthpar.serving.stats import stats_of

DEPLOY = Path(__file__).parents[2] / "deploy"
KEY = "a-key"
NAME = "restructured"
LAYERS = 8
SPEC = {"blocks": [[0], [1, 2], [3], [4, 5], [7]], "ladder": [1, 2, 3]}
PLAN = resolve(SPEC, LAYERS)
EAGER = ("--enforce-eager", "--max-model-len", "256", "--dtype", "float32")
ENV = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_PLUGINS": "depthpar",
    metric_files.ENV: "1",
}


class Run(NamedTuple):
    """A server with a plan, the folder of its checkpoint, and the file of its plan."""

    server: Server
    folder: Path
    plan: Path

    def get(self, path: str) -> httpx.Response:
        headers = {"Authorization": f"Bearer {KEY}"}
        return httpx.get(f"{self.server.url}{path}", headers=headers, timeout=30)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Two ranks, every forward pass timed; only the `depthpar` plugins of both groups."""
    folder = write_tokenizer(write_llama(tmp_path_factory.mktemp("model"), layers=LAYERS))
    plan = tmp_path_factory.mktemp("plan") / "plan.json"
    plan.write_text(json.dumps(SPEC))
    arguments = ["--model-impl", "depthpar", "--tensor-parallel-size", "2"]
    arguments += ["--served-model-name", NAME, "--api-key", KEY]
    env = {**ENV, precedence.ENV: str(plan)}
    with forked_servers(), serve(folder, *EAGER, *arguments, env=env, timeout=900) as server:
        assert len(folders(server)) == 1
        yield Run(server, folder, plan)
    assert folders(server) == []


def folders(server: Server) -> list[Path]:
    """Those for metrics that this server made."""
    memory = metric_files.MEMORY if metric_files.MEMORY.is_dir() else Path(tempfile.gettempdir())
    return list(memory.glob(f"{metric_files.NAME}-{server.process.pid}-*"))


def complete(server: Server, prompt: str | list[str], count: int) -> list[dict[str, Any]]:
    body = {"model": NAME, "prompt": prompt, "max_tokens": count, "ignore_eos": True}
    body |= {"temperature": 0, "logprobs": 1}
    headers = {"Authorization": f"Bearer {KEY}"}
    url = f"{server.url}/v1/completions"
    reply = httpx.post(url, json=body, headers=headers, timeout=120)
    choices: list[dict[str, Any]] = reply.raise_for_status().json()["choices"]
    return choices


def samples(server: Server) -> list[Sample]:
    return [sample for sample in scrape(server) if "depthpar" in sample.name]


def value(found: list[Sample], name: str, **labels: str) -> float:
    """The one sample of a name with these labels."""
    (sample,) = [
        sample
        for sample in found
        if sample.name == f"vllm:depthpar_{name}" and labels.items() <= sample.labels.items()
    ]
    return sample.value


def test_gauges_are_the_plans(run: Run) -> None:
    found = samples(run.server)
    shape = ModelShape.from_config(json.loads((run.folder / "config.json").read_text()))
    plain = resolve("identity", LAYERS)
    assert all(s.labels["model_name"] == NAME and s.labels["engine"] == "0" for s in found)
    labels = {"digest": PLAN.digest, "tensor_parallel_size": "2", "layout": "dealt"}
    assert value(found, "plan_info", **labels) == 1
    assert value(found, "effective_depth") == 5
    kinds = {s.labels["kind"]: s.value for s in found if s.name == "vllm:depthpar_layers"}
    none = {"drop_sync": 0, "parallel_residual": 0, "desync": 0, "half": 0}
    assert kinds == {"single": 2, "parallel": 2, "ladder": 3, "skipped": 1, **none}
    assert value(found, "all_reduces_per_forward") == all_reduces(PLAN)
    assert value(found, "hidden_all_reduces_per_forward") == hidden_all_reduces(PLAN)
    saved = shape.weight_bytes(plain, 2) - shape.weight_bytes(PLAN, 2)
    assert value(found, "weight_bytes_saved") == saved > 0
    saved = shape.kv_bytes_per_token(plain, 2) - shape.kv_bytes_per_token(PLAN, 2)
    assert value(found, "kv_bytes_per_token_saved") == saved > 0


def test_counters_count_the_requests(run: Run) -> None:
    """One request: one forward pass of prefill and one for each token after the first."""

    def passes(found: list[Sample]) -> dict[tuple[str, str], float]:
        return {
            (s.labels["phase"], s.labels["batch_size"]): s.value
            for s in found
            if s.name == "vllm:depthpar_forward_seconds_count"
        }

    complete(run.server, "warm up", 2)
    before = samples(run.server)
    complete(run.server, "one request of several tokens", 9)
    after = samples(run.server)
    old, new = passes(before), passes(after)
    assert new["prefill", "1"] - old["prefill", "1"] == 1
    assert new["decode", "1"] - old["decode", "1"] == 8
    # vLLM's embedding makes one all-reduce of a forward pass, its layers the others.
    timed = {"phase": "decode"}
    more = value(after, "all_reduces_total", **timed) - value(before, "all_reduces_total", **timed)
    assert more == 8 * (all_reduces(PLAN) - 1)
    exposed, hidden, whole = (
        value(after, name, **timed, **labels) - value(before, name, **timed, **labels)
        for name, labels in (
            ("all_reduce_seconds_total", {"kind": "exposed"}),
            ("all_reduce_seconds_total", {"kind": "hidden"}),
            ("forward_seconds_sum", {"batch_size": "1"}),
        )
    )
    assert 0 < exposed <= exposed + hidden < whole
    assert value(after, "all_reduce_forward_seconds_total", **timed) == pytest.approx(
        value(after, "forward_seconds_sum", **timed, batch_size="1")
    )
    assert value(after, "forwards_dropped_total") == 0
    # Over shared memory, which some CPUs have, nothing runs behind anything.
    assert (hidden == 0) == ("gain no speed here" in run.server.log_text())
    complete(run.server, ["three prompts", "of one request", "start together"], 24)
    assert passes(samples(run.server))["decode", "3-4"] > 0


def test_plan_endpoint(run: Run) -> None:
    answer = run.get("/v1/depthpar/plan?device=h100&link=nvlink4").json()
    shape = ModelShape.from_config(json.loads((run.folder / "config.json").read_text()))
    assert answer["digest"] == PLAN.digest
    assert resolve(answer["plan"], LAYERS) == PLAN
    assert answer["picture"] == draw(PLAN, shape, 2, precedence.ENV)
    assert answer["predicted"]["speedup"] > 1
    assert run.get("/v1/depthpar/plan").json()["predicted"] is None
    wrong = run.get("/v1/depthpar/plan?device=h1000&link=nvlink4")
    assert wrong.status_code == 400
    assert "device 'h1000' is unknown; allowed: " in wrong.json()["error"]["message"]


def test_a_plan_file_that_changes_has_no_effect(run: Run) -> None:
    def seen() -> tuple[Any, Any]:
        return run.get("/v1/depthpar/plan").json(), complete(run.server, "the same words", 8)

    before = seen()
    run.plan.write_text('{"skip": {"speedup": 2}}')
    assert seen() == before
    run.plan.unlink()
    assert seen() == before


def test_stats_endpoint_says_what_the_metrics_say(run: Run) -> None:
    complete(run.server, "some tokens", 3)
    (engine,) = run.get("/v1/depthpar/stats").json()["engines"]
    found = samples(run.server)
    assert (engine["engine"], engine["model"], engine["timed_every"]) == ("0", NAME, 1)
    assert engine["layers"] == layers_by_kind(PLAN)
    assert engine["all_reduces_per_forward"] == all_reduces(PLAN)
    decode = engine["decode"]
    for entry in decode["forward_passes"]:
        labels = {"phase": "decode", "batch_size": entry["batch_size"]}
        assert entry["count"] == value(found, "forward_seconds_count", **labels)
        assert entry["seconds"] == pytest.approx(value(found, "forward_seconds_sum", **labels))
    for key, name in (("count", "all_reduces"), ("forward_seconds", "all_reduce_forward_seconds")):
        assert decode["all_reduces"][key] == value(found, f"{name}_total", phase="decode")


def test_key_is_asked_for(run: Run) -> None:
    for path in ("plan", "stats"):
        assert httpx.get(f"{run.server.url}/v1/depthpar/{path}").status_code == 401
    assert KEY not in run.server.log_text()


def test_openapi_describes_the_answers(run: Run) -> None:
    api = run.get("/openapi.json").json()
    for path in ("/v1/depthpar/plan", "/v1/depthpar/stats"):
        content = api["paths"][path]["get"]["responses"]["200"]["content"]["application/json"]
        name = content["schema"]["$ref"].rpartition("/")[2]
        schema = {
            "$ref": f"#/components/schemas/{name}",
            "components": {"schemas": api["components"]["schemas"]},
        }
        jsonschema.validate(run.get(path).json(), schema)


def test_routes_keep_to_their_schema(run: Run) -> None:
    """Whatever the query: no answer but those that the OpenAPI document describes."""
    api = schemathesis.openapi.from_dict(run.get("/openapi.json").json())
    found = api.include(path_regex="^/v1/depthpar/").get_all_operations()
    routes = [each.ok() for each in found if isinstance(each, Ok)]
    assert len(routes) == 2
    headers = {"Authorization": f"Bearer {KEY}"}
    for route in routes:

        @given(route.as_strategy())
        @settings(max_examples=40, deadline=None, derandomize=True)
        def answer(case: Case) -> None:
            case.call_and_validate(
                base_url=run.server.url,
                headers=headers,
                timeout=30,
                # A device or a link by any name is a string; only some of them are known.
                excluded_checks=[positive_data_acceptance],
            )

        answer()


def test_dashboard_and_alerts_find_data(run: Run, tmp_path: Path) -> None:
    """A Prometheus scrapes the server as both of the dashboard's deployments."""
    port, every = run.server.port, 2
    with scraping(tmp_path, {"vllm-depthpar": port, "vllm-plain": port}, every) as prometheus:
        # Rates are over four scrapes.
        enough = time.monotonic() + 6 * every
        while time.monotonic() < enough:
            complete(run.server, "some load", 8)
        end = time.time()

        def draw_dashboard(*arguments: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, str(DEPLOY / "grafana/picture.py"), prometheus]
            command += ["--minutes", "0.2", "--until", str(end), "--scrape-interval", str(every)]
            command += ["--out", str(tmp_path / "dashboard.png"), *arguments]
            return subprocess.run(command, capture_output=True, text=True)

        drawn = draw_dashboard()
        assert drawn.returncode == 0, drawn.stderr
        assert (tmp_path / "dashboard.png").read_bytes().startswith(b"\x89PNG")
        drawn = draw_dashboard("--set", "candidate=nothing")
        assert drawn.returncode == 1
        missing = [line.partition(":")[0] for line in drawn.stderr.splitlines()[1:]]
        assert missing == [
            "TTFT p50",
            "Inter-token latency p50",
            "Generated tokens per second",
        ]
        (group,) = httpx.get(f"{prometheus}/api/v1/rules").json()["data"]["groups"]
        assert {rule["health"] for rule in group["rules"]} == {"ok"}


def test_a_plain_model_has_none(run: Run) -> None:
    """The same checkpoint and plugins without `--model-impl`."""
    env = {**ENV, "VLLM_PLUGINS": "depthpar,depthpar_metrics"}
    arguments = [*EAGER, "--served-model-name", NAME]
    with forked_servers(), serve(run.folder, *arguments, env=env, timeout=900) as server:
        complete(server, "plain", 3)
        assert samples(server) == []
        missing = httpx.get(f"{server.url}/v1/depthpar/plan")
        assert missing.status_code == 404
        assert "has no plan" in missing.json()["error"]["message"]
        assert folders(server) == []


def test_files_are_prometheus_clients(tmp_path: Path) -> None:
    """Two engines' values, merged by prometheus_client, and as JSON."""
    for engine in ("0", "1"):
        files = MetricFiles(tmp_path, f"worker-{engine}", {"model_name": "m", "engine": engine})
        files.set_gauge(Metric("plan_info", "help"), 1, digest="d")
        for name in EXACT_GAUGES:
            files.set_gauge(Metric(name, "help"), 3)
        files.set_gauge(Metric("layers", "help"), 7, kind="single")
        seconds = files.histogram(
            Metric("forward_seconds", "help", "histogram"),
            (0.1, 1.0),
            phase="decode",
            batch_size="3-4",
        )
        for observed in (0.05, 0.1, 0.5, 4.0):
            seconds.observe(observed)
    merged = list(MultiProcessCollector(None, path=str(tmp_path)).collect())
    (histogram,) = [metric for metric in merged if metric.name.endswith("forward_seconds")]
    buckets = {s.labels["le"]: s.value for s in histogram.samples if s.labels.get("le")}
    assert buckets == {"0.1": 2, "1.0": 3, "+Inf": 4}
    first, second = stats_of(merged).engines
    assert (first.engine, second.engine) == ("0", "1")
    assert first.effective_depth == 3
    assert first.weight_bytes_saved is None
    (passes,) = second.decode.forward_passes
    assert (passes.batch_size, passes.count) == ("3-4", 4)
    assert passes.seconds == pytest.approx(4.65)
    assert first.decode.all_reduces is None


EXACT_GAUGES = (
    "effective_depth",
    "all_reduces_per_forward",
    "hidden_all_reduces_per_forward",
    "kv_bytes_per_token_saved",
    "timed_every",
)


def test_a_wrong_interval_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("-1", "often", ""):
        monkeypatch.setenv(metric_files.ENV, text)
        with pytest.raises(UserError, match=r"DEPTHPAR_METRICS=.*; allowed: 0 for no metrics"):
            metric_files.every()
    monkeypatch.setenv(metric_files.ENV, "0")
    metric_files.prepare()
    assert metric_files.FOLDER_ENV not in os.environ
    assert metric_files.folder() is None


def test_what_killed_servers_leave_is_removed() -> None:
    """And nothing of one that runs."""
    starts = (
        "import os, sys; from vllm_depthpar.metrics import metric_files; metric_files.prepare(); "
        "print(os.environ[metric_files.FOLDER_ENV], flush=True); sys.stdin.read()"
    )

    def start() -> tuple[subprocess.Popen[str], Path]:
        env = {key: os.environ[key] for key in os.environ if key != metric_files.FOLDER_ENV}
        process = subprocess.Popen(
            [sys.executable, "-c", starts],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout
        return process, Path(process.stdout.readline().strip())

    killed, left = start()
    runs, kept = start()
    assert left.is_dir()
    killed.kill()
    killed.communicate()
    assert left.is_dir()
    ends, removed = start()
    assert [left.exists(), kept.exists(), removed.exists()] == [False, True, True]
    for process in (runs, ends):
        process.communicate()
    assert not kept.exists()
    assert not removed.exists()
