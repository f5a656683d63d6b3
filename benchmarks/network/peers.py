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
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout: this is a script

from benchmarks import common
from benchmarks.network.cluster import LOADS, MODEL
from benchmarks.network.two_hosts import Link, NotPossible, TwoHosts, exit_on_sigterm
from vllm_depthpar.bench.rounds import spread, summary
from vllm_depthpar.bench.turns import Round, named
from vllm_depthpar.cli.types import at_least
from vllm_depthpar.errors import UserError
from vllm_depthpar.launch.process_group import last_lines
from vllm_depthpar.util import markdown

RANK = Path(__file__).with_name("peer_rank.py")
LOAD = LOADS["decode, batch 1"]
PORT = 29400
# Until the first round is there, and from each to the next.
SECONDS = 600


def main() -> None:
    """Measure, print a table, write the JSON."""
    args = _parser().parse_args()
    exit_on_sigterm()
    packages = args.packages.glob("*.dist-info") if args.packages else ()
    theirs = {
        "commit": _commit(args.checkout),
        "packages": sorted(one.name for one in packages),
    }
    empty: dict[str, Any] = {"rounds": []}
    record = common.open_record(args, empty=empty, load=asdict(LOAD), shape=MODEL, theirs=theirs)
    save = common.saver(record, args.out)
    try:
        measure(args, record["rounds"], save)
    except NotPossible as why:
        print(f"error: {why}", file=sys.stderr)
        sys.exit(2)
    labels = list(record["rounds"][0])
    found = {
        label: common.figures_of(record, label, LOAD.key, "seconds_per_token") for label in labels
    }
    if (against := args.baseline or labels[0]) not in found:
        raise UserError(f"--baseline {against!r} is none; allowed: {', '.join(labels)}")
    baseline = found[against]
    rows, variants = [], {}
    for label, seconds in found.items():
        times = [one * 1e3 for one in seconds]
        ratios = [of / one for of, one in zip(baseline, seconds, strict=True)]
        rows.append([label, spread(times, ".1f"), spread(ratios)])
        variants[label] = {"ms_per_token": summary(times), "ratio_to_baseline": summary(ratios)}
    print(markdown.table([f"{args.peer}, TP = {args.tp}", "ms a token", "speed"], rows))
    record |= {
        "peer": args.peer,
        **theirs,
        "tp": args.tp,
        "mode": "compiled" if args.compile else "eager",
        "link": str(Link()),
        "dtype": "float32",
        "model": MODEL,
        "prompt_tokens": LOAD.prompt_tokens,
        "tokens": LOAD.tokens,
        "variants": variants,
    }
    save()


def measure(args: argparse.Namespace, rounds: list[Round], save: Callable[[], None]) -> None:
    """Add what is missing to so many rounds, and save after each.

    Raises:
        UserError: a rank failed; the message has the last lines of its output.
    """
    if len(rounds) >= args.rounds:
        return
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="peers-")))
        hosts = stack.enter_context(TwoHosts(Link()))
        command = [sys.executable, str(RANK), args.peer, str(args.checkout.resolve())]
        command += ["--first", str(len(rounds)), "--rounds", str(args.rounds)]
        command += ["--prompt-tokens", str(LOAD.prompt_tokens), "--tokens", str(LOAD.tokens)]
        command += ["--found", str(folder / "rounds"), *(["--compile"] if args.compile else [])]
        packages = [str(args.packages.resolve())] if args.packages else []
        ranks = {}
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
            log = folder / f"{rank}.log"
            pinned = ["taskset", "-c", str(core), *command]
            with log.open("wb") as output:
                process = subprocess.Popen(
                    hosts.command(rank, pinned), env=env, stdout=output, stderr=output
                )
            stack.callback(process.kill)
            ranks[log] = process
        with named(args.peer):
            for line in _lines(folder / "rounds", args.rounds - len(rounds), ranks):
                seconds = json.loads(line)
                rounds.append(
                    {one: {LOAD.key: {"seconds_per_token": seconds[one]}} for one in seconds}
                )
                save()


def _lines(path: Path, count: int, ranks: dict[Path, subprocess.Popen[bytes]]) -> Iterator[str]:
    """So many lines of a file that grows; RuntimeError if a rank fails, or none comes for long."""
    seen, since = 0, time.monotonic()
    while seen < count:
        found = path.read_text().splitlines(keepends=True)[seen:] if path.exists() else []
        for line in found:
            if line.endswith("\n"):
                seen, since = seen + 1, time.monotonic()
                yield line
        for rank, (log, process) in enumerate(ranks.items()):
            late = time.monotonic() > since + SECONDS
            if process.poll() or late:
                why = "no round came" if late else f"exit code {process.returncode}"
                last = last_lines(log.read_text(errors="replace"))
                raise RuntimeError(f"rank {rank}: {why}; the end of its log:\n{last}")
        time.sleep(0.2)


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
    common.add_out(parser)
    return parser


if __name__ == "__main__":
    common.run_main(main)
