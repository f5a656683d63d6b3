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

from vllm_depthpar.metrics import forward_timer
from vllm_depthpar.metrics.metric_files import PREFIX, Metric
from vllm_depthpar.plan import read_spec, resolve

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
KUBERNETES = DEPLOY / "kubernetes"
DASHBOARD = DEPLOY / "grafana/dashboards/depthpar.json"

# What is committed, and the script that prints it.
GENERATED = {
    DASHBOARD: DEPLOY / "grafana/dashboard.py",
    KUBERNETES / "prometheusrule.yaml": KUBERNETES / "prometheusrule.py",
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


def test_kubernetes_rule_holds_the_alerts() -> None:
    rule = load(KUBERNETES / "prometheusrule.yaml")
    assert rule["spec"] == load(PROMETHEUS / "alerts.yml")


def test_kubernetes_plan_fits_the_model() -> None:
    (container,) = load(KUBERNETES / "deployment.yaml")["spec"]["template"]["spec"]["containers"]
    assert container["args"][0] == "meta-llama/Llama-2-7b-hf"
    assert resolve(read_spec(str(KUBERNETES / "plan.json")), layers=32).depth < 32


@pytest.fixture(scope="module")
def manifests() -> dict[str, Any]:
    """What kustomize makes, by kind."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    made = yaml.safe_load_all(run(kubectl, "kustomize", ".", cwd=KUBERNETES))
    return {manifest["kind"]: manifest for manifest in made}


def test_kubernetes_names_fit_together(manifests: dict[str, Any]) -> None:
    pod = manifests["Deployment"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    (port,) = container["ports"]
    (served,) = manifests["Service"]["spec"]["ports"]
    (scraped,) = manifests["ServiceMonitor"]["spec"]["endpoints"]
    assert served["targetPort"] == port["name"]
    assert scraped["port"] == served["name"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": port["name"]}

    labels = pod["metadata"]["labels"].items()
    assert manifests["Service"]["spec"]["selector"].items() <= labels
    wanted = manifests["ServiceMonitor"]["spec"]["selector"]["matchLabels"].items()
    assert wanted <= manifests["Service"]["metadata"]["labels"].items()
    # The operator's label `job` is the Service's name, which alerts and dashboard look for.
    jobs = [job["job_name"] for job in load(PROMETHEUS / "prometheus.yml")["scrape_configs"]]
    assert manifests["Service"]["metadata"]["name"] in jobs

    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert sorted(mounts.values()) == sorted(volumes)
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    (file,) = manifests["ConfigMap"]["data"]
    assert volumes["plan"]["configMap"]["name"] == manifests["ConfigMap"]["metadata"]["name"]
    path = next(at for at, name in mounts.items() if name == "plan")
    assert {"name": "DEPTHPAR_PLAN", "value": f"{path}/{file}"} in container["env"]


def test_systemd_unit(tmp_path: Path) -> None:
    systemd = shutil.which("systemd-analyze")
    if systemd is None:
        pytest.skip("systemd-analyze is not installed")
    unit = DEPLOY / "systemd/vllm-depthpar.service"
    # `verify` wants the command to be there.
    (command,) = re.findall(r"^ExecStart=(\S+)", unit.read_text(), re.MULTILINE)
    here = tmp_path / unit.name
    here.write_text(unit.read_text().replace(command, sys.executable))
    done = subprocess.run([systemd, "verify", here], capture_output=True, text=True)
    # It also reports on the machine's other units, and on keys it does not know with status 0.
    assert done.returncode == 0, done.stderr
    assert unit.name not in done.stderr
