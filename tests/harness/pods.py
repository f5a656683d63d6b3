"""What the pods of deploy/kubernetes run, read from their manifests."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

KUBERNETES = Path(__file__).parents[2] / "deploy/kubernetes"
# What LeaderWorkerSet puts into every container's environment.
GROUP = {
    "LWS_GROUP_SIZE": "2",
    "LWS_LEADER_ADDRESS": "vllm-depthpar-hosts-0.vllm-depthpar-hosts.default",
}


class Command(NamedTuple):
    """The arguments of ``vllm serve`` in a container, and the environment that the pod gives it."""

    args: list[str]
    env: dict[str, str]


def pod_specs() -> dict[str, dict[str, Any]]:
    """The pods' specs by where they are: "one-host", "two-hosts/0", "two-hosts/1"."""
    deployment = _load("one-host/deployment.yaml")["spec"]["template"]
    group = _load("two-hosts/leaderworkerset.yaml")["spec"]["leaderWorkerTemplate"]
    templates = (deployment, group["leaderTemplate"], group["workerTemplate"])
    names = ("one-host", "two-hosts/0", "two-hosts/1")
    return {name: pod["spec"] for name, pod in zip(names, templates, strict=True)}


def command_of(name: str, address: str = "192.0.2.1") -> Command:
    """The command of one of `pod_specs`, as Kubernetes runs it in a pod of this address.

    Secrets, all of them optional, are not there.
    """
    (container,) = pod_specs()[name]["containers"]
    index = name.rpartition("/")[2]
    env = {**GROUP, "LWS_WORKER_INDEX": index} if index.isdigit() else {}
    for one in container["env"]:
        source = one.get("valueFrom", {})
        if "value" in one:
            env[one["name"]] = one["value"]
        elif "fieldRef" in source:
            env[one["name"]] = {"status.podIP": address}[source["fieldRef"]["fieldPath"]]
        else:
            assert source["secretKeyRef"]["optional"], one["name"]
    args = [re.sub(r"\$\((\w+)\)", lambda found: env[found[1]], arg) for arg in container["args"]]
    return Command(args, env)


def _load(path: str) -> Any:
    return yaml.safe_load((KUBERNETES / path).read_text())
