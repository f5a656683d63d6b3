"""Layer Parallelism's and Ladder Residual's published code, on the model and link of `cluster.py`.

Each peer's own baseline and its restructured models are alive at once in the same ranks and take
turns within every round. A rank has a core of its own and, with TP = 2, a host of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout: this is a script

from benchmarks import common
from benchmarks.network.cluster import LOADS, MODEL
from benchmarks.network.two_hosts import Link, NotPossible, TwoHosts, exit_on_sigterm
from vllm_depthpar.bench.rounds import spread, summary
from vllm_depthpar.cli.types import at_least
from vllm_depthpar.util import files, markdown

RANK = Path(__file__).with_name("peer_rank.py")
PROMPT_TOKENS, TOKENS = LOADS["decode, batch 1"][1:3]
PORT = 29400
SECONDS = 600


def main() -> None:
    """Measure, print a table, write the JSON."""
    args = _parser().parse_args()
    exit_on_sigterm()
    try:
        found = measure(args)
    except NotPossible as why:
        print(f"error: {why}", file=sys.stderr)
        sys.exit(2)
    baseline = found[args.baseline or next(iter(found))]
    rows, variants = [], {}
    for label, seconds in found.items():
        times = [one * 1e3 for one in seconds]
        ratios = [of / one for of, one in zip(baseline, seconds, strict=True)]
        rows.append([label, spread(times, ".1f"), spread(ratios)])
        variants[label] = {
            "ms_per_token": summary(times),
            "ratio_to_baseline": summary(ratios),
            "rounds_ms": times,
        }
    print(markdown.table([f"{args.peer}, TP = {args.tp}", "ms a token", "speed"], rows))
    if args.out:
        run = {
            **common.facts(),
            "peer": args.peer,
            "commit": _commit(args.checkout),
            "packages": sorted(one.name for one in args.packages.glob("*.dist-info"))
            if args.packages
            else [],
            "tp": args.tp,
            "mode": "compiled" if args.compile else "eager",
            "link": str(Link()),
            "dtype": "float32",
            "model": MODEL,
            "prompt_tokens": PROMPT_TOKENS,
            "tokens": TOKENS,
            "variants": variants,
        }
        runs = json.loads(args.out.read_text()) if args.out.exists() else []
        files.write_json(args.out, [*runs, run])


def measure(args: argparse.Namespace) -> dict[str, list[float]]:
    """{variant: seconds per token of every round}.

    Raises:
        RuntimeError: a rank failed; the message has the last lines of its output.
    """
    command = [sys.executable, str(RANK), args.peer, str(args.checkout.resolve())]
    command += ["--rounds", str(args.rounds), "--prompt-tokens", str(PROMPT_TOKENS)]
    command += ["--tokens", str(TOKENS)] + (["--compile"] if args.compile else [])
    packages = [str(args.packages.resolve())] if args.packages else []
    with ExitStack() as stack:
        hosts = stack.enter_context(TwoHosts(Link()))
        ranks = []
        for rank, core in enumerate(sorted(os.sched_getaffinity(0))[: args.tp]):
            env = {
                **os.environ,
                "PYTHONPATH": os.pathsep.join([*packages, os.environ.get("PYTHONPATH", "")]),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(args.tp),
                "LOCAL_WORLD_SIZE": str(args.tp),
                "MASTER_ADDR": hosts.addresses[0],
                "MASTER_PORT": str(PORT),
                "GLOO_SOCKET_IFNAME": hosts.interface(rank),
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
            }
            log = stack.enter_context(tempfile.TemporaryFile("w+"))
            pinned = ["taskset", "-c", str(core), *command]
            process = subprocess.Popen(
                hosts.command(rank, pinned), env=env, stdout=log, stderr=subprocess.STDOUT
            )
            stack.callback(process.kill)
            ranks.append((process, log))
        for process, log in ranks:
            if process.wait(SECONDS):
                log.seek(0)
                raise RuntimeError("a rank failed:\n" + "\n".join(log.read().splitlines()[-20:]))
        log = ranks[0][1]
        log.seek(0)
        found: dict[str, list[float]] = json.loads(log.read().splitlines()[-1])
        return found


def _commit(checkout: Path) -> str:
    """What is checked out; "-dirty" if it was changed."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--abbrev=40", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _parser() -> argparse.ArgumentParser:
    positive = at_least(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=("ladder", "layer-parallelism"))
    parser.add_argument("checkout", type=Path, help="of its repository")
    parser.add_argument("--packages", type=Path, metavar="DIR", help="found before those installed")
    parser.add_argument("--tp", type=int, choices=(1, 2), default=2, help="(2)")
    parser.add_argument("--compile", action="store_true", help="the ladder's decoding step (eager)")
    parser.add_argument("--baseline", metavar="LABEL", help="for the ratios (the first)")
    parser.add_argument("--rounds", type=positive, default=7, help="(7)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="add this run to a JSON file")
    return parser


if __name__ == "__main__":
    common.run_main(main)
