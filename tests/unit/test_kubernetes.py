"""deploy/kubernetes: what kustomize makes of it fits together, and vLLM takes its commands."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import jsonschema
import pods
import pytest
import yaml
from pods import KUBERNETES
from serve_flags import parsed
from vllm import envs

from vllm_depthpar.plan import read_spec, resolve
from vllm_depthpar.plan.model_shape import ModelShape

PROMETHEUS = KUBERNETES.parent / "prometheus"
FOLDERS = ("one-host", "two-hosts")
# Sizes that decide what a plan can be cut into, from the models' config.json.
MODELS = {
    "meta-llama/Llama-2-7b-hf": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    },
    "meta-llama/Llama-3.1-70B-Instruct": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
LARGEST = "meta-llama/Llama-3.1-70B-Instruct"
# For the start budget: bytes a second fetched (1 Gbit/s) and read, seconds to compile and capture.
FETCHED, READ, COMPILED = 125e6, 250e6, 600
# Of a LeaderWorkerSet, with what the manifest uses of it: v1 of github.com/kubernetes-sigs/lws,
# api/leaderworkerset/v1/leaderworkerset_types.go. Pods are checked as pods.
LEADER_WORKER_SET = {
    "type": "object",
    "properties": {
        "apiVersion": {"const": "leaderworkerset.x-k8s.io/v1"},
        "kind": {"const": "LeaderWorkerSet"},
        "metadata": {"type": "object"},
        "spec": {
            "type": "object",
            "properties": {
                "replicas": {"type": "integer"},
                "rolloutStrategy": {
                    "type": "object",
                    "properties": {
                        "type": {"const": "RollingUpdate"},
                        "rollingUpdateConfiguration": {
                            "type": "object",
                            "properties": {
                                "maxSurge": {"type": ["integer", "string"]},
                                "maxUnavailable": {"type": ["integer", "string"]},
                            },
                            "additionalProperties": False,
                        },
                    },
                    "additionalProperties": False,
                },
                "leaderWorkerTemplate": {
                    "type": "object",
                    "properties": {
                        "size": {"const": 2},
                        "restartPolicy": {
                            "enum": ["RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"]
                        },
                        "volumeClaimTemplates": {"type": "array"},
                        "leaderTemplate": {"type": "object"},
                        "workerTemplate": {"type": "object"},
                    },
                    "required": ["leaderTemplate", "workerTemplate"],
                    "additionalProperties": False,
                },
            },
            "required": ["leaderWorkerTemplate"],
            "additionalProperties": False,
        },
    },
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
}

Manifests = dict[str, dict[str, Any]]


@pytest.fixture(scope="module", params=FOLDERS)
def manifests(request: pytest.FixtureRequest) -> Manifests:
    """What kustomize makes of a folder, by kind."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    command = [kubectl, "kustomize", str(KUBERNETES / request.param)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = list(yaml.safe_load_all(done.stdout))
    by_kind = {manifest["kind"]: manifest for manifest in found}
    assert len(by_kind) == len(found)
    return by_kind


def templates(manifests: Manifests) -> list[dict[str, Any]]:
    """The pods' templates, the one that serves first."""
    if "Deployment" in manifests:
        return [manifests["Deployment"]["spec"]["template"]]
    group = manifests["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]
    return [group["leaderTemplate"], group["workerTemplate"]]


def claims(manifests: Manifests) -> set[str]:
    """The volumes that a LeaderWorkerSet adds to its pods."""
    if "Deployment" in manifests:
        return set()
    group = manifests["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]
    return {claim["metadata"]["name"] for claim in group["volumeClaimTemplates"]}


def test_rule_holds_the_alerts() -> None:
    rule = yaml.safe_load((KUBERNETES / "common/prometheusrule.yaml").read_text())
    assert rule["spec"] == yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())


def test_names_fit_together(manifests: Manifests) -> None:
    pod, *others = templates(manifests)
    (container,) = pod["spec"]["containers"]
    (port,) = container["ports"]
    (served,) = manifests["Service"]["spec"]["ports"]
    (scraped,) = manifests["ServiceMonitor"]["spec"]["endpoints"]
    assert served["targetPort"] == port["name"]
    assert scraped["port"] == served["name"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": port["name"]}

    # LeaderWorkerSet labels its pods with their number.
    given = {"leaderworkerset.sigs.k8s.io/worker-index": "0"} if others else {}
    selector = manifests["Service"]["spec"]["selector"]
    assert selector.items() <= (pod["metadata"]["labels"] | given).items()
    assert given.items() <= selector.items()
    wanted = manifests["ServiceMonitor"]["spec"]["selector"]["matchLabels"].items()
    assert wanted <= manifests["Service"]["metadata"]["labels"].items()
    # The operator's label `job` is the Service's name, which alerts and dashboard look for.
    jobs = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]
    assert manifests["Service"]["metadata"]["name"] in [job["job_name"] for job in jobs]

    (file,) = manifests["ConfigMap"]["data"]
    for each in (pod, *others):
        (container,) = each["spec"]["containers"]
        assert container["image"] == "vllm-depthpar:0.1.0"
        volumes = {volume["name"]: volume for volume in each["spec"]["volumes"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert sorted(mounts.values()) == sorted({*volumes, *claims(manifests)})
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert volumes["plan"]["configMap"]["name"] == manifests["ConfigMap"]["metadata"]["name"]
        path = next(at for at, name in mounts.items() if name == "plan")
        assert {"name": "DEPTHPAR_PLAN", "value": f"{path}/{file}"} in container["env"]


def test_pods_reach_gpu_nodes(manifests: Manifests) -> None:
    """Nodes with the GPU operator's taint, its runtime, and as many GPUs as there are ranks."""
    pods_ = templates(manifests)
    gpus = 0
    for pod in pods_:
        assert pod["spec"]["runtimeClassName"] == "nvidia"
        taint = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
        assert pod["spec"]["tolerations"] == [taint]
        (container,) = pod["spec"]["containers"]
        asked, limit = (container["resources"][what] for what in ("requests", "limits"))
        assert asked["nvidia.com/gpu"] == limit["nvidia.com/gpu"]
        gpus += int(asked["nvidia.com/gpu"])
    (container,) = pods_[0]["spec"]["containers"]
    assert f"--tensor-parallel-size={gpus}" in container["args"]


def test_only_the_group_reaches_its_nodes(manifests: Manifests) -> None:
    """What they tell each other is unpickled. The first one's port 8000 is everyone's."""
    if "LeaderWorkerSet" not in manifests:
        assert "NetworkPolicy" not in manifests
        return
    spec = manifests["NetworkPolicy"]["spec"]
    chosen = spec["podSelector"]
    for pod in templates(manifests):
        assert chosen["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert spec["policyTypes"] == ["Ingress"]
    assert spec["ingress"] == [{"from": [{"podSelector": chosen}]}, {"ports": [{"port": "http"}]}]
    # Its own headless Service has its name, and is not ours.
    name = manifests["LeaderWorkerSet"]["metadata"]["name"]
    assert name != manifests["Service"]["metadata"]["name"]
    assert pods.GROUP["LWS_LEADER_ADDRESS"] == f"{name}-0.{name}.default"


def test_schemas(manifests: Manifests) -> None:
    """Kubernetes' own, of the first version that they are for; none is there of the operator's."""
    kubernetes_validate = pytest.importorskip(
        "kubernetes_validate",
        reason="kubernetes-validate is not installed (`make test-deploy` installs it)",
    )
    known = [
        manifests[kind] for kind in manifests if kind not in {"ServiceMonitor", "PrometheusRule"}
    ]
    for manifest in known:
        if manifest["kind"] != "LeaderWorkerSet":
            kubernetes_validate.validate(manifest, "1.30", strict=True)
            continue
        jsonschema.validate(manifest, LEADER_WORKER_SET)
        for number, template in enumerate(templates(manifests)):
            pod = {"apiVersion": "v1", "kind": "Pod", "spec": template["spec"]}
            pod["metadata"] = {"name": f"pod-{number}", **template["metadata"]}
            kubernetes_validate.validate(pod, "1.30", strict=True)
        for claim in manifest["spec"]["leaderWorkerTemplate"]["volumeClaimTemplates"]:
            claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", **claim}
            kubernetes_validate.validate(claim, "1.30", strict=True)


@pytest.fixture(scope="module")
def commands() -> dict[str, pods.Command]:
    return {name: pods.command_of(name) for name in pods.pod_specs()}


def test_vllm_takes_the_commands(commands: dict[str, pods.Command]) -> None:
    found = parsed({name: command.args for name, command in commands.items()})
    for name, flags in found.items():
        assert flags["model_impl"] == "depthpar"
        folder = KUBERNETES / name.partition("/")[0]
        shape = ModelShape.from_config(MODELS[flags["model"]])
        plan = resolve(read_spec(str(folder / "plan.json")), shape.layers)
        assert plan.depth < shape.layers
        assert flags["tensor_parallel_size"] in shape.fitting_tps(plan)
    leader, worker = found["two-hosts/0"], found["two-hosts/1"]
    assert (leader["nnodes"], leader["node_rank"], worker["node_rank"]) == (2, 0, 1)
    assert leader["master_addr"] == pods.GROUP["LWS_LEADER_ADDRESS"]
    assert worker == {**leader, "node_rank": 1, "headless": True}


def test_vllm_knows_the_variables(commands: dict[str, pods.Command]) -> None:
    """Of its own it warns about those that it does not know, and has no effect of them."""
    for command in commands.values():
        ours = {name for name in command.env if name.startswith("VLLM_")}
        assert ours <= set(envs.environment_variables)
    leader, worker = commands["two-hosts/0"].env, commands["two-hosts/1"].env
    assert worker == {**leader, "LWS_WORKER_INDEX": "1"}


def test_start_budget() -> None:
    """It is enough for the largest model that the manifests serve, and half as much again."""
    shape = ModelShape.from_config(MODELS[LARGEST])
    stored = shape.weight_bytes(resolve("identity", shape.layers))
    assert stored == pytest.approx(141.1e9, rel=1e-3)
    needed = stored / FETCHED + stored / READ + COMPILED
    for name, spec in pods.pod_specs().items():
        (container,) = spec["containers"]
        if name == "two-hosts/1":
            assert "startupProbe" not in container
            continue
        probe = container["startupProbe"]
        budget = probe["periodSeconds"] * probe["failureThreshold"]
        assert 1.5 * needed <= budget <= 2 * needed
    args = pods.command_of("two-hosts/0").args
    for flag in ("--distributed-timeout-seconds", "--cpu-distributed-timeout-seconds"):
        assert f"{flag}={budget}" in args
