"""deploy/kubernetes/two-hosts serves: its pods' commands in two network namespaces, on CPUs.

Flags and environment are the manifest's. The addresses are the namespaces', the leader's name is in
their /etc/hosts, and the model, its plan and the number of ranks are smaller.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pods
import pytest

from benchmarks.network.two_hosts import Link, NotPossible, TwoHosts
from vllm_depthpar.launch.process_group import ProcessGroup
from vllm_depthpar.plan import resolve

SPEC = {"pair": [0, 30]}  # its blocks can be cut in two, SmolLM2's layers not
CHANGES = {"--tensor-parallel-size": "2", "--max-model-len": "2048"}
CPU = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    # Compiled, each host would take a minute more.
    "TORCHDYNAMO_DISABLE": "1",
}
# A namespace's mounts are its own.
WITH_HOSTS = ["sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"']
ASK = """
import json, sys, urllib.request
url, body = sys.argv[1:]
request = urllib.request.Request(url, body.encode() or None, {"Content-Type": "application/json"})
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
print(opener.open(request, timeout=60).read().decode())
"""
PATIENCE_SECONDS = 300


def ask(hosts: TwoHosts, path: str, body: object = None) -> str:
    """What the first host's server answers to itself; empty if it does not."""
    url, sent = f"http://127.0.0.1:8000{path}", json.dumps(body) if body else ""
    command = hosts.command(0, [sys.executable, "-I", "-c", ASK, url, sent])
    return subprocess.run(command, capture_output=True, text=True).stdout


def adapted(args: list[str], model: Path) -> list[str]:
    """A pod's arguments for a small model on two CPUs."""
    pairs = [arg.partition("=") for arg in args[1:]]
    assert set(CHANGES) <= {flag for flag, _, _ in pairs}
    return [str(model), *(f"{flag}{sign}{CHANGES.get(flag, it)}" for flag, sign, it in pairs)]


def test_two_hosts(smollm2: Path, tmp_path: Path) -> None:
    plan, names = tmp_path / "plan.json", tmp_path / "hosts"
    plan.write_text(json.dumps(SPEC))
    logs = [tmp_path / f"{host}.log" for host in (0, 1)]
    with ExitStack() as stack:
        try:
            hosts = stack.enter_context(TwoHosts(Link()))
        except NotPossible as reason:
            pytest.skip(str(reason))
        leader = pods.GROUP["LWS_LEADER_ADDRESS"]
        names.write_text(f"127.0.0.1 localhost\n{hosts.addresses[0]} {leader}\n")
        processes = []
        for host, log in enumerate(logs):
            args, env = pods.command_of(f"two-hosts/{host}", hosts.addresses[host])
            env |= {"DEPTHPAR_PLAN": str(plan), **CPU}
            env |= {key: hosts.interface(host) for key in env if key.endswith("_SOCKET_IFNAME")}
            serve = [str(Path(sys.executable).with_name("vllm")), "serve", *adapted(args, smollm2)]
            with log.open("wb") as output:
                process = subprocess.Popen(
                    hosts.command(host, [*WITH_HOSTS, str(names), *serve]),
                    env={**os.environ, **env},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            group = ProcessGroup(process.pid)
            stack.callback(group.release)
            stack.callback(process.wait)
            stack.callback(group.signal, signal.SIGKILL)
            processes.append(process)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not ask(hosts, "/health"):
            ended = any(process.poll() is not None for process in processes)
            said = "\n".join(log.read_text()[-3000:] for log in logs)
            assert not ended, said
            assert time.monotonic() < deadline, said
            time.sleep(0.5)
        message = {"role": "user", "content": "Say hello."}
        body = {"model": str(smollm2), "messages": [message], "max_tokens": 8, "temperature": 0}
        answer: dict[str, Any] = json.loads(ask(hosts, "/v1/chat/completions", body))
        assert answer["usage"]["completion_tokens"] > 0
        digest = resolve(SPEC, 30).digest
        assert f'vllm:depthpar_plan_info{{digest="{digest}"' in ask(hosts, "/metrics")
        assert all(f"plan {digest}: " in log.read_text() for log in logs)
