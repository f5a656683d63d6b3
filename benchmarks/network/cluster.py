"""Plans beside plain vLLM where all-reduces cost what they cost in the field: between two hosts.

The hosts are network namespaces (`two_hosts.py`) with one tensor-parallel rank each, on a core of
its own. Every variant is a real `vllm serve --nnodes 2`, loaded over HTTP from the first host;
all are alive at once, and all but the one that is measured are stopped (SIGSTOP). They take turns
within every round, and a round's ratios are taken within it.

"no communication" is plain vLLM without its collectives: what is left when all communication is
free. Of the time between the two a plan's share is (T_plain - T_plan) / (T_plain - T_none), T being
the time of a token.

With the link "shm" both ranks are on one host, and vLLM reduces over its memory if its kernels for
the processor can (those for AVX-512 can, those for AVX2 alone can not).

Needs Linux, root and iproute2; says so and exits with 2 where it has not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout: this is a script

from benchmarks import common
from benchmarks.network.two_hosts import Link, NotPossible, TwoHosts, exit_on_sigterm
from benchmarks.serving import completions_client
from vllm_depthpar.bench.rounds import awake, in_turn, pause, summary, written
from vllm_depthpar.checkpoint import bundled
from vllm_depthpar.launch.variants import PLAIN
from vllm_depthpar.plan import Plan, model_shape, resolve
from vllm_depthpar.util import files, markdown
from vllm_depthpar.util.progress import step_bar

HERE = Path(__file__).parent
NONE = "no communication"
SHARED_MEMORY = "shared memory"
START_SECONDS = 900
STOP_SECONDS = 20
LAST_LINES = 30
# What is sent at a time: (batch, tokens of a prompt, tokens to generate, what is counted).
LOADS = {
    "decode, batch 1": (1, 16, 64, "decode"),
    "decode, batch 8": (8, 16, 24, "decode"),
    "prefill, 4 x 128": (4, 128, 1, "prefill"),
}
# The model: sizes as in the design's prototype; the vocabulary is Llama 2's.
MODEL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 24,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "intermediate_size": 2816,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
PLANS = [
    "identity",
    '{"pair": [0, 24]}',
    '{"ladder": "all"}',
    '{"pair": [0, 24], "ladder": "all"}',
]


@dataclass
class Variant:
    """One deployment of two ranks: a process for each host that has any."""

    label: str
    plan: Plan
    spec: object  # None: vLLM's own model
    port: int
    processes: list[subprocess.Popen[bytes]]

    def signal(self, number: signal.Signals) -> None:
        """Signal both ranks, and the server."""
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    def stop(self) -> None:
        """End both ranks."""
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            for process in self.processes:
                process.wait(STOP_SECONDS)
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.wait()


class Client:
    """`completions_client.py` inside a host."""

    def __init__(self, hosts: TwoHosts, host: int) -> None:
        self._process = subprocess.Popen(
            hosts.command(host, [sys.executable, "-I", completions_client.__file__]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def tell(self, do: str, **arguments: object) -> None:
        """Give it a job."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()

    def ask(self, do: str, **arguments: object) -> Any:
        """Give it a job and wait for the result; RuntimeError if it failed."""
        self.tell(do, **arguments)
        assert self._process.stdout
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": "the client ended"}
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]

    def stop(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


def main() -> None:
    """Measure on every link, print tables, write JSON and PNG."""
    args = _parser().parse_args()
    exit_on_sigterm()
    try:
        for link in args.links:
            report = measure(args, link)
            print(table(report))
            if args.out:
                name = f"{args.out.stem}-{slug(link)}"
                files.write_json(args.out.with_name(f"{name}.json"), report)
                plot(report, args.out.with_name(f"{name}.png"))
    except NotPossible as why:
        print(f"error: {why}", file=sys.stderr)
        sys.exit(2)


def slug(link: Link | None) -> str:
    """A link's name in a file name: "shm", "plain", "1gbit-0.2ms"."""
    if link is None or link == Link():
        return "plain" if link else "shm"
    short = str(link).replace(" Gbit/s", "gbit").replace(" Mbit/s", "mbit").replace(", ", "-")
    return short.replace(" ", "")


def measure(args: argparse.Namespace, link: Link | None) -> dict[str, Any]:
    """All variants on one link (None: on one host): the report."""
    start, link_name = time.monotonic(), SHARED_MEMORY if link is None else str(link)
    loads = {name: LOADS[name] for name in args.loads}
    config = {**MODEL, "torch_dtype": args.dtype}
    with ExitStack() as stack, step_bar() as progress:
        hosts = stack.enter_context(TwoHosts(link or Link()))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cluster-")))
        model = write_model(folder / "model", config)
        clients = [Client(hosts, host) for host in (0, 1)]
        for client in clients:
            stack.callback(client.stop)
        address = hosts.addresses[1]
        clients[1].tell("echo", host=address, port=7)
        round_trip = clients[0].ask("round_trip", host=address, port=7)

        described = variants(model, args.plans, config["num_hidden_layers"])
        total = len(described) * (1 + (1 + args.rounds) * len(loads))
        task = progress.add_task("", total=total)
        running: list[Variant] = []
        for number, (label, resolved, spec) in enumerate(described):
            progress.update(task, description=f"{link_name}: starting {label}")
            one = launch(args, hosts, link is None, folder, model, label, resolved, spec, number)
            stack.callback(one.stop)
            wait_until_up(one, clients[0], hosts, folder)
            pause(one)
            running.append(one)
            progress.advance(task)

        speeds: dict[str, dict[str, list[float]]] = {
            one.label: {load: [] for load in loads} for one in running
        }
        for number in range(-1, args.rounds):
            for load, (batch, prompt_tokens, tokens, counted) in loads.items():
                for one in in_turn(running, number):
                    progress.update(task, description=f"{link_name}: {one.label}, {load}")
                    with awake(one):
                        result = clients[0].ask(
                            "measure",
                            host=hosts.addresses[0],
                            port=one.port,
                            model=str(model),
                            batch=batch,
                            prompt_tokens=prompt_tokens,
                            tokens=tokens,
                            vocab=config["vocab_size"],
                            seed=number,
                        )
                    if number >= 0:
                        speeds[one.label][load].append(result[counted])
                    progress.advance(task)
    return {
        **common.facts(),
        "threads": 1,
        "link": {
            "name": link_name,
            "mbit": link and link.mbit,
            "latency_ms": link and link.latency_ms,
            "round_trip_ms": link and round(round_trip * 1e3, 3),
        },
        "mode": "compiled" if args.compiled else "eager",
        "model": config,
        "loads": {name: list(load) for name, load in loads.items()},
        "seconds": round(time.monotonic() - start),
        "variants": [
            {
                "label": one.label,
                "plan": one.plan.name,
                "blocks": one.plan.depth,
                "all_reduces": 0 if one.label == NONE else model_shape.all_reduces(one.plan),
                "hidden": 0 if one.label == NONE else model_shape.hidden_all_reduces(one.plan),
                "loads": {load: figures(load, one.label, speeds) for load in loads},
            }
            for one in running
        ],
    }


def figures(load: str, label: str, speeds: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Speeds, ratios to plain, and the share of communication time removed, round by round."""
    mine, plain, none = (speeds[name][load] for name in (label, PLAIN, NONE))
    removed = [(1 / b - 1 / a) / (1 / b - 1 / c) for a, b, c in zip(mine, plain, none, strict=True)]
    return {
        "tokens_per_second": summary(mine),
        "ratio_to_plain": summary([a / b for a, b in zip(mine, plain, strict=True)]),
        "communication_removed": summary(removed),
        "rounds": mine,
    }


def variants(model: Path, labels: list[str], layers: int) -> list[tuple[str, Plan, object]]:
    """(label, plan, spec) of plain vLLM, of it without communication, and of the plans."""
    plain, *others = common.beside_plain(str(model), labels)
    without = replace(plain, label=NONE)
    return [
        (one.label, resolve(one.spec or "identity", layers), one.spec)
        for one in (plain, without, *others)
    ]


def write_model(folder: Path, config: dict[str, Any]) -> Path:
    """A model without weights (vLLM makes them up), and with SmolLM2's tokenizer."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for file in bundled.prepare().glob("*token*.json"):
        shutil.copy(file, folder)
    return folder


def launch(
    args: argparse.Namespace,
    hosts: TwoHosts,
    together: bool,
    folder: Path,
    model: Path,
    label: str,
    resolved: Plan,
    spec: object,
    number: int,
) -> Variant:
    """Start one rank in each host, or both in the first."""
    port, master_port = 8000 + number, 29500 + number
    options = ["--load-format", "dummy", "--dtype", args.dtype, "--tensor-parallel-size", "2"]
    options += ["--distributed-executor-backend", "mp"]
    if not together:
        options += ["--nnodes", "2", "--master-addr", hosts.addresses[0]]
        options += ["--master-port", str(master_port)]
    options += ["--max-model-len", "1024", "--max-num-seqs", "8", "--no-enable-prefix-caching"]
    options += ["--max-num-batched-tokens", "2048", "--host", hosts.addresses[0]]
    options += ["--kv-cache-memory-bytes", str(160 << 20)]  # all variants live at once
    options += ["--port", str(port)] + ([] if args.compiled else ["--enforce-eager"])
    plugins = "depthpar" if spec is not None else ""
    if spec is not None:
        options += ["--model-impl", "depthpar", "--hf-overrides", json.dumps({"depthpar": spec})]
    path = os.environ.get("PYTHONPATH", "")
    if label == NONE:
        plugins = "without_communication"
        path = f"{_plugin_folder(folder)}:{HERE}:{path}"
    # It would win over --kv-cache-memory-bytes.
    inherited = {key: os.environ[key] for key in os.environ if key != "VLLM_CPU_KVCACHE_SPACE"}
    processes = []
    cores = [str(core) for core in sorted(os.sched_getaffinity(0))[:2]]
    for host in (0,) if together else (0, 1):
        env = {
            **inherited,
            "PYTHONPATH": path,
            "VLLM_PLUGINS": plugins,
            "VLLM_HOST_IP": hosts.addresses[host],
            "GLOO_SOCKET_IFNAME": hosts.interface(host),
            "VLLM_CPU_OMP_THREADS_BIND": "|".join(cores) if together else cores[host],
            "OMP_NUM_THREADS": "1",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",  # or each rank keeps a pool of processes
            "VLLM_USE_AOT_COMPILE": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        role = [] if together else ["--node-rank", str(host), *(["--headless"] if host else [])]
        command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model)]
        with _log(folder, port, host).open("wb") as log:
            processes.append(
                subprocess.Popen(
                    hosts.command(host, [*command, *options, *role]),
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )
    return Variant(label, resolved, spec, port, processes)


def _plugin_folder(folder: Path) -> Path:
    """A folder that makes `without_communication` a plugin to vLLM when it is on PYTHONPATH."""
    info = folder / "plugin" / "without_communication-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: without_communication\nVersion: 0\n"
    )
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nwithout_communication = without_communication:register\n"
    )
    return info.parent


def _log(folder: Path, port: int, host: int) -> Path:
    return folder / f"{port}-{host}.log"


def wait_until_up(one: Variant, client: Client, hosts: TwoHosts, folder: Path) -> None:
    """Return when the server answers; RuntimeError with its last lines if it ends before."""
    deadline = time.monotonic() + START_SECONDS
    while not client.ask("healthy", host=hosts.addresses[0], port=one.port):
        ended = any(process.poll() is not None for process in one.processes)
        if ended or time.monotonic() > deadline:
            logs = [_log(folder, one.port, host) for host in range(len(one.processes))]
            text = [log.read_text(errors="replace").splitlines() for log in logs]
            lines = [line for log in text for line in log[-LAST_LINES:]]
            raise RuntimeError("\n".join([f"{one.label} does not start:", *lines]))
        time.sleep(0.5)


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    link = report["link"]
    header = ["", "all-reduces (hidden)"]
    header += [
        f"{load}: {what}" for load in report["loads"] for what in ("tok/s", "to plain", "removed")
    ]
    rows = []
    for one in report["variants"]:
        row = [f"`{one['label']}`", f"{one['all_reduces']} ({one['hidden']})"]
        for load in report["loads"]:
            numbers = one["loads"][load]
            row.append(written(numbers["tokens_per_second"], ".1f"))
            row.append("" if one["label"] == PLAIN else written(numbers["ratio_to_plain"]))
            of_plan = one["label"] not in (PLAIN, NONE)
            row.append(f"{numbers['communication_removed']['median']:.0%}" if of_plan else "")
        rows.append(row)
    trip = f" (round trip {link['round_trip_ms']} ms)" if link["round_trip_ms"] else ""
    title = f"{link['name']}{trip}, {report['mode']}"
    return f"\n{title}\n\n{markdown.table(header, rows)}"


def plot(report: dict[str, Any], path: Path) -> None:
    """Bars of speed relative to plain, with the spread over the rounds, if matplotlib is there."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed (pip install 'vllm-depthpar[bench]')")
        return
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots()
    others = [one for one in report["variants"] if one["label"] != PLAIN]
    width = 0.8 / len(others)
    for number, one in enumerate(others):
        ratios = [one["loads"][load]["ratio_to_plain"] for load in report["loads"]]
        medians = [ratio["median"] for ratio in ratios]
        errors = [
            [ratio["median"] - ratio["min"] for ratio in ratios],
            [ratio["max"] - ratio["median"] for ratio in ratios],
        ]
        places = [
            at + (number - (len(others) - 1) / 2) * width for at in range(len(report["loads"]))
        ]
        hatch = "//" if one["label"] == NONE else None
        axes.bar(places, medians, width, yerr=errors, capsize=2, label=one["label"], hatch=hatch)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(report["loads"])), list(report["loads"]))
    axes.set_ylabel("speed, plain vLLM = 1")
    axes.set_title(f"TP = 2 over {report['link']['name']}, {report['mode']}")
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png", dpi=120)
    partial.replace(path)


def _link(text: str) -> Link | None:
    if text == "shm":
        return None
    try:
        return Link.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _parser() -> argparse.ArgumentParser:
    parser = common.arguments("Plans beside plain vLLM, TP = 2 between two hosts.")
    parser.set_defaults(plans=PLANS, rounds=3)
    parser.add_argument(
        "--links",
        nargs="+",
        type=_link,
        default=[Link()],
        metavar="LINK",
        help="shm, plain, 1gbit, 0.2ms, 1gbit,0.2ms, ... (plain)",
    )
    parser.add_argument(
        "--loads", nargs="+", choices=LOADS, default=list(LOADS), metavar="LOAD", help="(all)"
    )
    parser.add_argument("--compiled", action="store_true", help="with torch.compile (eager)")
    return parser


if __name__ == "__main__":
    common.run_main(main)
