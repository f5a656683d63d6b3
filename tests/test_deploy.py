"""The files in deploy/: they parse, agree with the code that they come from, and name what exists."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from vllm_depthpar import meter
from vllm_depthpar.metric_files import PREFIX, Metric

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
PROMETHEUS = DEPLOY / "prometheus"

SUFFIXES = {
    "gauge": [""],
    "counter": ["_total"],
    "histogram": ["_bucket", "_sum", "_count"],
}


def source(package: str, pattern: str) -> str:
    """The text of an installed package's files, without importing it."""
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return "\n".join(file.read_text() for file in Path(spec.origin).parent.glob(pattern))


def series(kind: str, name: str) -> Iterator[str]:
    """The names of a metric's series as Prometheus stores them."""
    return (name.removesuffix("_total") + suffix for suffix in SUFFIXES[kind])


def our_series() -> set[str]:
    text = Path(meter.__file__).read_text()
    made = re.findall(r"(gauge|counter|histogram)\(\s*([A-Z_]+)\b", text)
    assert {constant for _, constant in made} == {
        constant for constant, value in vars(meter).items() if isinstance(value, Metric)
    }
    names = ((kind, PREFIX + getattr(meter, constant).name) for kind, constant in made)
    return {one for kind, name in names for one in series(kind, name)}


def vllm_series() -> set[str]:
    text = source("vllm", "v1/metrics/*.py")
    made = re.findall(r'_(gauge|counter|histogram)_cls\(\s*name="(vllm:\w+)"', text)
    return {one for kind, name in made for one in series(kind, name)}


@pytest.fixture(scope="module")
def known_series() -> set[str]:
    http = re.findall(
        r'"(http_\w+_total)"', source("prometheus_fastapi_instrumentator", "metrics.py")
    )
    return our_series() | vllm_series() | set(http)


def named_in(text: str) -> set[str]:
    """The series that expressions name, whatever stands around them."""
    return set(re.findall(r"\b(?:vllm:|http_)\w+", text))


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def rules() -> list[dict[str, Any]]:
    return [rule for group in load(PROMETHEUS / "alerts.yml")["groups"] for rule in group["rules"]]


def test_alerts_name_metrics_that_exist(known_series: set[str]) -> None:
    for rule in rules():
        assert named_in(rule["expr"]) <= known_series, rule["alert"]


def test_alerts_are_tested() -> None:
    """Every alert fires in one test of alerts_test.yml at least."""
    tests = load(PROMETHEUS / "alerts_test.yml")["tests"]
    fired = {one["alertname"] for t in tests for one in t["alert_rule_test"] if one["exp_alerts"]}
    assert fired == {rule["alert"] for rule in rules()}


@pytest.mark.parametrize(
    "command", ["check config prometheus.yml", "test rules alerts_test.yml"], ids=lambda c: c[:4]
)
def test_promtool(command: str) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian's package prometheus has it)")
    done = subprocess.run(
        [promtool, *command.split()], cwd=PROMETHEUS, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
