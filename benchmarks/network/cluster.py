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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout: this is a script

from benchmarks import common
from benchmarks.network import without_communication
from benchmarks.network.two_hosts import Link, NotPossible, TwoHosts, exit_on_sigterm
from benchmarks.serving import completions_client
from vllm_depthpar.bench import memory
from vllm_depthpar.bench.rounds import summary, written
from vllm_depthpar.checkpoint import bundled
from vllm_depthpar.launch import kv_cache
from vllm_depthpar.launch.process_group import last_lines
from vllm_depthpar.launch.server import START_SECONDS
from vllm_depthpar.launch.variants import PLAIN, Variant
from vllm_depthpar.plan import Plan, model_shape, resolve
from vllm_depthpar.plan.model_shape import ModelShape
from vllm_depthpar.util import markdown

NONE = "no communication"
SHARED_MEMORY = "shared memory"
STOP_SECONDS = 20
RANKS = 2


@dataclass(frozen=True)
class Load:
    """What is sent at a time: `batch` prompts of random tokens, each for so many tokens.

    Attributes:
        counted: tokens per second of "decode" or "prefill".
    """

    key: str
    batch: int
    prompt_tokens: int
    tokens: int
    counted: str


LOADS = {
    load.key: load
    for load in (
        Load("decode, batch 1", 1, 16, 64, "decode"),
        Load("decode, batch 8", 8, 16, 24, "decode"),
        Load("decode, batch 32", 32, 16, 12, "decode"),
        Load("prefill, 4 x 128", 4, 128, 1, "prefill"),
    )
}
LONGEST = max(load.prompt_tokens + load.tokens for load in LOADS.values())
WIDEST = max(load.batch for load in LOADS.values())
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
# SmolLM2-135M's, with heads that two ranks can share: 6 and 2 KV heads of 96 for its 9 and 3 of 64.
SMOLLM2: dict[str, Any] = {
    **MODEL,
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 96,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
MODELS = {"24x1024": MODEL, "smollm2": SMOLLM2}
PLANS = [
    "identity",
    '{"pair": [0, 24]}',
    '{"ladder": "all"}',
    '{"pair": [0, 24], "ladder": "all"}',
]


@dataclass(frozen=True)
class Deployment:
    """Two ranks at work: a process for each host that has any, with its log."""

    port: int
    logs: dict[Path, subprocess.Popen[bytes]] = field(default_factory=dict)

    def signal(self, number: signal.Signals) -> None:
        """Signal both ranks, and the server."""
        for process in self.logs.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    def stop(self) -> None:
        """End both ranks."""
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            for process in self.logs.values():
                process.wait(STOP_SECONDS)
        self.signal(signal.SIGKILL)
        for process in self.logs.values():
            process.wait()

    def ended(self) -> bool:
        """Whether a host's process has."""
        return any(process.poll() is not None for process in self.logs.values())

    def end_of_log(self) -> str:
        """What each host's process has written last, and how it ended if it has."""
        lines = []
        for host, (log, process) in enumerate(self.logs.items()):
            code = process.poll()
            lines.append(f"host {host}" + ("" if code is None else f", exit code {code}") + ":")
            lines.append(last_lines(log.read_text(errors="replace")))
        return "\n".join(lines)

    def memory_bytes(self) -> int:
        """Anonymous memory of all its processes."""
        return sum(memory.of_group(process.pid) for process in self.logs.values())


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
            out = args.out and args.out.with_name(f"{args.out.stem}-{slug(link)}.json")
            report = measure(args, link, out)
            print(table(report))
            if out:
                plot(report, out.with_suffix(".png"))
    except NotPossible as why:
        print(f"error: {why}", file=sys.stderr)
        sys.exit(2)


def slug(link: Link | None) -> str:
    """A link's name in a file name: "shm", "plain", "1gbit-0.2ms"."""
    if link is None or link == Link():
        return "plain" if link else "shm"
    short = str(link).replace(" Gbit/s", "gbit").replace(" Mbit/s", "mbit").replace(", ", "-")
    return short.replace(" ", "")


def measure(args: argparse.Namespace, link: Link | None, out: Path | None) -> dict[str, Any]:
    """All variants on one link (None: on one host): the report. `out` has it after each round."""
    link_name = SHARED_MEMORY if link is None else str(link)
    loads = [LOADS[name] for name in args.loads]
    config = {**MODELS[args.model], "torch_dtype": args.dtype}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cluster-")))
        model = write_model(folder / "model", config)
        chosen = beside_the_bound(model, args.plans)
        plans = {one.label: one.digest for one in chosen}
        record = common.open_record(args, out=out, plans=plans, links=link_name, model=config)
        save = common.saver(record, out)
        hosts = stack.enter_context(TwoHosts(link or Link()))
        if len(record["rounds"]) < args.rounds:
            needed = {one.label: _memory_bytes(one, config, link is None) for one in chosen}
            memory.check(needed, 1 if args.one_at_a_time else len(chosen))
        stage = Deployments(args, hosts, link is None, folder, config, stack)
        common.take_turns(
            stage, chosen, loads, record, args.rounds, save, link_name, args.one_at_a_time
        )
        trip = None if link is None else round(stage.round_trip() * 1e3, 3)
    resolved = {one.label: _plan(one, config) for one in chosen}
    record |= {
        "threads": 1,
        "link": {
            "name": link_name,
            "mbit": link and link.mbit,
            "latency_ms": link and link.latency_ms,
            "round_trip_ms": trip,
        },
        "mode": "compiled" if args.compiled else "eager",
        "model": config,
        "loads": {load.key: list(asdict(load).values())[1:] for load in loads},
        "variants": [
            {
                "label": label,
                "plan": of.name,
                "blocks": of.depth,
                "all_reduces": 0 if label == NONE else model_shape.all_reduces(of),
                "hidden": 0 if label == NONE else model_shape.hidden_all_reduces(of),
                "loads": {load.key: figures(record, label, load) for load in loads},
            }
            for label, of in resolved.items()
        ],
    }
    save()
    return record


def figures(record: dict[str, Any], label: str, load: Load) -> dict[str, Any]:
    """Speeds, ratios to plain, and the share of communication time removed, round by round."""
    mine, plain, none = (
        common.figures_of(record, name, load.key, load.counted) for name in (label, PLAIN, NONE)
    )
    removed = [(1 / b - 1 / a) / (1 / b - 1 / c) for a, b, c in zip(mine, plain, none, strict=True)]
    return {
        "tokens_per_second": summary(mine),
        "ratio_to_plain": summary([a / b for a, b in zip(mine, plain, strict=True)]),
        "communication_removed": summary(removed),
    }


def beside_the_bound(model: Path, labels: list[str]) -> list[Variant]:
    """Plain vLLM, the same without communication, and the plans."""
    plain, *others = common.beside_plain(str(model), labels)
    return [plain, replace(plain, label=NONE), *others]


def _plan(one: Variant, config: dict[str, Any]) -> Plan:
    return resolve(one.spec or "identity", config["num_hidden_layers"])


def _kv_bytes(one: Variant, config: dict[str, Any]) -> int:
    """Of each rank."""
    lengths = [LONGEST] * WIDEST
    return kv_cache.needed_bytes(ModelShape.from_config(config), _plan(one, config), lengths, RANKS)


def _memory_bytes(one: Variant, config: dict[str, Any], together: bool) -> int:
    """Of all processes, estimated."""
    # A server, its engine and its rank; on another host a server without a head, and its rank.
    processes = RANKS + (2 if together else 3)
    shape, held = ModelShape.from_config(config), _kv_bytes(one, config)
    return memory.estimate(shape, _plan(one, config), RANKS, held, processes)


def write_model(folder: Path, config: dict[str, Any]) -> Path:
    """A model without weights (vLLM makes them up), and with SmolLM2's tokenizer."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for file in bundled.prepare().glob("*token*.json"):
        shutil.copy(file, folder)
    return folder


class Deployments:
    """Real `vllm serve` deployments, one rank a host, or both on one.

    Args:
        together: both ranks in the first host.
        folder: for logs; the model is in it.
        config: the model's.
        stack: ends the clients.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        hosts: TwoHosts,
        together: bool,
        folder: Path,
        config: dict[str, Any],
        stack: ExitStack,
    ) -> None:
        self._args, self._hosts, self._together = args, hosts, together
        self._folder, self._model, self._config = folder, folder / "model", config
        self._clients = [Client(hosts, host) for host in (0, 1)]
        for client in self._clients:
            stack.callback(client.stop)
        self._started = 0

    def round_trip(self) -> float:
        """Seconds that a message takes to the second host and back."""
        address = self._hosts.addresses[1]
        self._clients[1].tell("echo", host=address, port=7)
        seconds: float = self._clients[0].ask("round_trip", host=address, port=7)
        return seconds

    def start(self, variant: Variant, stack: ExitStack) -> tuple[Deployment, dict[str, Any]]:
        """See `turns.Stage`; the start took `seconds`, and then all processes had `bytes`."""
        begun = time.monotonic()
        deployment = self._launch(variant, stack)
        self._wait_until_up(deployment)
        took = {"seconds": time.monotonic() - begun, "bytes": deployment.memory_bytes()}
        return deployment, took

    def measure(self, running: Deployment, load: Load, seed: int) -> dict[str, float]:
        """Tokens per second; see `completions_client.measure`."""
        found: dict[str, float] = self._clients[0].ask(
            "measure",
            host=self._hosts.addresses[0],
            port=running.port,
            model=str(self._model),
            batch=load.batch,
            prompt_tokens=load.prompt_tokens,
            tokens=load.tokens,
            vocab=self._config["vocab_size"],
            seed=seed,
        )
        return found

    def _launch(self, variant: Variant, stack: ExitStack) -> Deployment:
        args, addresses = self._args, self._hosts.addresses
        deployment = Deployment(8000 + self._started)
        stack.callback(deployment.stop)
        options = ["--load-format", "dummy", "--dtype", args.dtype]
        options += ["--tensor-parallel-size", f"{RANKS}", "--distributed-executor-backend", "mp"]
        if not self._together:
            options += ["--nnodes", "2", "--master-addr", addresses[0]]
            options += ["--master-port", f"{29500 + self._started}"]
        options += ["--max-model-len", f"{LONGEST}", "--max-num-seqs", f"{WIDEST}"]
        options += ["--no-enable-prefix-caching", "--max-num-batched-tokens", "2048"]
        options += ["--kv-cache-memory-bytes", f"{_kv_bytes(variant, self._config)}"]
        options += ["--host", addresses[0], "--port", f"{deployment.port}", *variant.flags]
        options += [] if args.compiled else ["--enforce-eager"]
        env, path = variant.env, os.environ.get("PYTHONPATH", "")
        if variant.label == NONE:
            env = {"VLLM_PLUGINS": without_communication.__name__.rpartition(".")[2]}
            path = f"{_plugin_folder(self._folder)}:{path}"
        # It would win over --kv-cache-memory-bytes.
        inherited = {key: os.environ[key] for key in os.environ if key != kv_cache.SPACE}
        cores = [str(core) for core in sorted(os.sched_getaffinity(0))[:RANKS]]
        command = [str(Path(sys.executable).with_name("vllm")), "serve", str(self._model)]
        for host in (0,) if self._together else (0, 1):
            of_host = {
                **inherited,
                **env,
                "PYTHONPATH": path,
                "VLLM_HOST_IP": addresses[host],
                "GLOO_SOCKET_IFNAME": self._hosts.interface(host),
                "VLLM_CPU_OMP_THREADS_BIND": "|".join(cores) if self._together else cores[host],
                "OMP_NUM_THREADS": "1",
                "TORCHINDUCTOR_COMPILE_THREADS": "1",  # or each rank keeps a pool of processes
                "VLLM_USE_AOT_COMPILE": "0",
                "VLLM_NO_USAGE_STATS": "1",
                "HF_HUB_OFFLINE": "1",
            }
            role = [] if self._together else ["--node-rank", f"{host}"]
            role += ["--headless"] if host else []
            log = self._folder / f"{self._started}-{host}.log"
            with log.open("wb") as output:
                deployment.logs[log] = subprocess.Popen(
                    self._hosts.command(host, [*command, *options, *role]),
                    env=of_host,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
        self._started += 1
        return deployment

    def _wait_until_up(self, deployment: Deployment) -> None:
        """Return when the server answers; RuntimeError with its last lines if it ends before."""
        deadline = time.monotonic() + START_SECONDS
        address = {"host": self._hosts.addresses[0], "port": deployment.port}
        while not self._clients[0].ask("healthy", **address):
            if deployment.ended() or time.monotonic() > deadline:
                raise RuntimeError(f"it does not start:\n{deployment.end_of_log()}")
            time.sleep(0.5)


def _plugin_folder(folder: Path) -> Path:
    """A folder that makes `without_communication` a plugin to vLLM when it is on PYTHONPATH."""
    source = Path(without_communication.__file__)
    info = folder / "plugin" / f"{source.stem}-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, info.parent)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {source.stem}\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        f"[vllm.general_plugins]\n{source.stem} = {source.stem}:register\n"
    )
    return info.parent


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
    parser.add_argument(
        "--model", choices=MODELS, default="24x1024", help="whose sizes it has (24x1024)"
    )
    parser.add_argument("--compiled", action="store_true", help="with torch.compile (eager)")
    common.add_one_at_a_time(parser)
    return parser


if __name__ == "__main__":
    common.run_main(main)
