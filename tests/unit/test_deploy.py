"""The files in deploy/: they parse, equal what their code generates, and name what exists."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from serve_flags import parsed

from vllm_depthpar.metrics import forward_timer
from vllm_depthpar.metrics.metric_files import PREFIX, Metric

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
DASHBOARD = DEPLOY / "grafana/dashboards/depthpar.json"
RULE = DEPLOY / "kubernetes/common/prometheusrule.yaml"

# What is committed, and the script that prints it.
GENERATED = {
    DASHBOARD: DEPLOY / "grafana/dashboard.py",
    RULE: RULE.with_suffix(".py"),
}

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
    metrics = [found for found in vars(forward_timer).values() if isinstance(found, Metric)]
    assert len(metrics) > 10
    return {one for metric in metrics for one in series(metric.kind, PREFIX + metric.name)}


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


def need_promtool() -> str:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian's package prometheus has it)")
    return promtool


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def installed(tool: str) -> str:
    """A command of the extra `dev`."""
    return str(Path(sys.executable).with_name(tool))


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
    run(need_promtool(), *command.split(), cwd=PROMETHEUS)


@pytest.mark.parametrize("committed", GENERATED, ids=lambda path: path.name)
def test_generated_files_are_up_to_date(committed: Path) -> None:
    script = GENERATED[committed]
    made = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert committed.read_text() == made.stdout, f"run python {script.name} > {committed.name}"


def panels() -> list[dict[str, Any]]:
    found = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in found}) == len(found)
    return [panel for panel in found if panel["type"] != "row"]


def test_dashboard_names_metrics_and_variables_that_exist(known_series: set[str]) -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    for variable in dashboard["templating"]["list"]:
        assert named_in(str(variable.get("query"))) <= known_series
    for panel in panels():
        for target in panel["targets"]:
            assert named_in(target["expr"]) <= known_series, panel["title"]
            used = set(re.findall(r"\$(\w+)", target["expr"]))
            assert used <= variables | {"__rate_interval"}, panel["title"]


def test_dashboard_queries_parse(tmp_path: Path) -> None:
    """As the expressions of recording rules, with Grafana's own variable filled in."""
    promtool = need_promtool()
    expressions = [target["expr"] for panel in panels() for target in panel["targets"]]
    recorded = [
        {"record": f"query:{at}", "expr": expression.replace("$__rate_interval", "1m")}
        for at, expression in enumerate(expressions)
    ]
    (tmp_path / "rules.yml").write_text(
        yaml.safe_dump({"groups": [{"name": "dashboard", "rules": recorded}]})
    )
    run(promtool, "check", "rules", "--lint=none", "rules.yml", cwd=tmp_path)


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells


def dependencies() -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {one.name: one for one in map(Requirement, project["dependencies"])}


def test_gpu_image_agrees_with_the_package() -> None:
    dockerfile = (DEPLOY / "docker/Dockerfile").read_text()
    (version,) = re.findall(r"^ARG VLLM=v(.+)$", dockerfile, re.MULTILINE)
    assert version in dependencies()["vllm"].specifier
    (extra,) = map(Requirement, re.findall(r"'(\w+>=.+)'", dockerfile))
    assert extra.specifier == dependencies()[extra.name].specifier


def test_dockerfiles() -> None:
    run(installed("hadolint"), "Dockerfile", "Dockerfile.cpu", cwd=DEPLOY / "docker")


def test_compose_schema() -> None:
    schema = ("--builtin-schema", "vendor.compose-spec")
    run(installed("check-jsonschema"), *schema, "compose.yaml", cwd=DEPLOY)


def test_compose() -> None:
    """What its JSON Schema cannot see: files that are there, names that are scraped."""
    compose = load(DEPLOY / "compose.yaml")
    services = compose["services"]
    for service in services.values():
        if "build" in service:
            context = DEPLOY / service["build"]["context"]
            assert (context / service["build"]["dockerfile"]).is_file()
        for volume in service.get("volumes", []):
            place = volume.split(":")[0]
            assert (
                (DEPLOY / place).is_dir() if place.startswith(".") else place in compose["volumes"]
            )
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    # Profiles that start servers; without one there are Prometheus and Grafana only.
    assert {name for name, service in services.items() if "profiles" not in service} == {
        "prometheus",
        "grafana",
    }
    aliases = {
        alias
        for service in services.values()
        for alias in service.get("networks", {}).get("default", {}).get("aliases", [])
    }
    jobs = load(PROMETHEUS / "prometheus.yml")["scrape_configs"]
    assert aliases == {job["job_name"] for job in jobs}
    assert services["gpu"]["environment"]["HF_TOKEN"] is None
    assert services["grafana"]["environment"]["GF_SECURITY_ADMIN_PASSWORD"].startswith("${")


def test_grafana_finds_what_is_mounted() -> None:
    mounted = dict(
        reversed(volume.removesuffix(":ro").split(":"))
        for volume in load(DEPLOY / "compose.yaml")["services"]["grafana"]["volumes"]
    )
    (provider,) = load(DEPLOY / "grafana/provisioning/dashboards/depthpar.yml")["providers"]
    assert (DEPLOY / mounted[provider["options"]["path"]]).resolve() == DASHBOARD.parent
    (source,) = load(DEPLOY / "grafana/provisioning/datasources/prometheus.yml")["datasources"]
    scrape = load(PROMETHEUS / "prometheus.yml")["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == scrape


# Settings that hide GPUs, or forbid what they need, as `systemd-analyze security` names them.
NOT_FOR_GPUS = {
    "DeviceAllow",
    "MemoryDenyWriteExecute",
    "PrivateDevices",
    "PrivateNetwork",
    "PrivateUsers",
    "ProcSubset",
    # Implies DeviceAllow, which systemd-analyze does not say.
    "ProtectClock",
}
UNIT = DEPLOY / "systemd/vllm-depthpar.service"


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit with a command that is there: `systemd-analyze` looks for it."""
    (command,) = re.findall(r"^ExecStart=(\S+)", UNIT.read_text(), re.MULTILINE)
    here = tmp_path / UNIT.name
    here.write_text(UNIT.read_text().replace(command, sys.executable))
    return here


def systemd_analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed (Debian's package systemd has it)")
    return subprocess.run([program, *arguments], capture_output=True, text=True)


def test_systemd_unit(unit: Path) -> None:
    done = systemd_analyze("verify", unit)
    # It also reports on the machine's other units, and on keys it does not know with status 0.
    assert done.returncode == 0, done.stderr
    assert unit.name not in done.stderr


def test_systemd_hardening(unit: Path) -> None:
    """All but what would hide GPUs."""
    # Of 100, the worst exposure; systemd 252 finds 23.
    done = systemd_analyze("security", "--offline=true", "--threshold=30", "--json=short", unit)
    assert done.returncode == 0, done.stdout + done.stderr
    settings = {each["json_field"]: each["set"] for each in json.loads(done.stdout)}
    assert {name for name in NOT_FOR_GPUS if settings[name]} == set()
    assert all(settings[name] for name in ("NoNewPrivileges", "ProtectSystem", "ProtectHome"))


def test_systemd_names_no_device() -> None:
    """Not even in systemd-analyze's absence, nor by a setting that it does not grade."""
    text = UNIT.read_text()
    keys = set(re.findall(r"^(\w+)=", text, re.MULTILINE))
    assert not keys & {*NOT_FOR_GPUS, "DevicePolicy", "RootImage", "RootDirectory", "NoExecPaths"}
    allowed = dict(re.findall(r"^(SystemCallFilter|RestrictAddressFamilies)=(.*)$", text, re.M))
    assert set(allowed["SystemCallFilter"].split()) == {"@system-service", "pidfd_getfd"}
    families = {"AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK"}
    assert set(allowed["RestrictAddressFamilies"].split()) == families
    assert "LimitMEMLOCK=infinity" in text


def test_commands_of_systemd_and_compose() -> None:
    """vLLM's own parser takes them."""
    (line,) = re.findall(r"^ExecStart=\S+/vllm serve (.*)$", UNIT.read_text(), re.MULTILINE)
    words = line.replace("${MODEL}", "org/model").replace("$ARGS", "--tensor-parallel-size 2")
    services = load(DEPLOY / "compose.yaml")["services"]
    commands = {"systemd": words.split()}
    for name in ("gpu", "gpu-plain"):
        commands[name] = [
            re.sub(r"\$\{\w+:-(.+)\}", r"\1", one) for one in services[name]["command"]
        ]
    found = parsed(commands)
    assert found["systemd"]["host"] == "127.0.0.1"
    assert found["systemd"]["tensor_parallel_size"] == 2
    assert [found[name].get("model_impl") for name in commands] == ["depthpar", "depthpar", None]
    assert found["gpu"]["model"] == found["gpu-plain"]["model"] == "meta-llama/Llama-2-7b-hf"
