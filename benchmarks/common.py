"""What the benchmarks share: plans by name, engines in processes of their own, and reports."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from vllm_depthpar import contenders as of_model
from vllm_depthpar import files, sources
from vllm_depthpar.commands.types import at_least as at_least
from vllm_depthpar.contenders import PLAIN as PLAIN
from vllm_depthpar.contenders import Contender as Contender
from vllm_depthpar.files import table as markdown  # noqa: F401
from vllm_depthpar.files import write_json  # noqa: F401
from vllm_depthpar.plan import PlanError
from vllm_depthpar.server_process import DEFAULT_ENV

if TYPE_CHECKING:
    from vllm import LLM

T = TypeVar("T")

CORES = len(os.sched_getaffinity(0))
# For every engine alike. The environment wins.
_ENV = {
    **DEFAULT_ENV,
    "OMP_NUM_THREADS": str(CORES),
    "VLLM_LOGGING_LEVEL": "WARNING",
}
_LAST_LINES = 20
_STOP_SECONDS = 10


def contenders(model: str, labels: Iterable[str]) -> list[Contender]:
    """Plain vLLM, which is always one and the first, and the plans for the checkpoint `model`.

    Raises:
        PlanError: see `vllm_depthpar.contenders`.
    """
    return of_model.contenders(model, [PLAIN, *labels], "--plans")


class Worker:
    """A new process that runs `target(connection, spec, *args)`; its output goes to a file.

    Args:
        contender: what it runs; decides the environment.
        target: a function of a module, with its end of the pipe as the first argument.
    """

    def __init__(
        self, contender: Contender, target: Callable[..., None], *args: object, **options: object
    ) -> None:
        self.label = contender.label
        self._log = tempfile.NamedTemporaryFile(prefix="benchmark-", suffix=".log")  # noqa: SIM115
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        env = {
            **_ENV,
            **os.environ,
            # The engine in this very process: it sleeps between requests, which vLLM's worker
            # processes, polling shared memory, need not do.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            # Plain vLLM runs without the plugin, not with an idle one.
            "VLLM_PLUGINS": "" if contender.spec is None else "depthpar",
        }
        self.process = context.Process(
            target=_run,
            args=(env, self._log.name, target, theirs, contender.spec, *args),
            kwargs=options,
            daemon=True,
        )
        self.process.start()
        theirs.close()

    def receive(self) -> Any:
        """The next object that the process sends; RuntimeError if it ends instead."""
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            lines = Path(self._log.name).read_text(errors="replace").splitlines()
            raise RuntimeError(
                "\n".join([f"the engine of {self.label} ended:", *lines[-_LAST_LINES:]])
            ) from None

    def ask(self, request: object) -> Any:
        """Send a request and wait for the answer."""
        self.connection.send(request)
        return self.receive()

    def stop(self) -> None:
        """End the process: one that waits for a request ends by itself, any other is killed."""
        self.connection.close()
        self.process.join(_STOP_SECONDS)
        self.process.kill()
        self.process.join()
        self._log.close()


def _run(
    env: dict[str, str], log: str, target: Callable[..., None], *args: object, **options: object
) -> None:
    os.environ.update(env)
    with open(log, "wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    target(*args, **options)


def make_engine(model: str, spec: object, **options: object) -> LLM:
    """vLLM's engine on a checkpoint, with a plan or (None) as plain vLLM, in this process."""
    from vllm import LLM

    if spec is not None:
        options |= {"model_impl": "depthpar", "hf_overrides": {sources.KEY: spec}}
    engine: LLM = LLM(
        model,
        distributed_executor_backend="uni",
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
        seed=0,
        **options,
    )
    return engine


def progress() -> Progress:
    """A progress bar on stderr, with what is being done, counts and time."""
    return Progress(
        *Progress.get_default_columns()[:-1],
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )


def in_turn(contenders: Sequence[T], number: int) -> list[T]:
    """The order of a round: A B C, B C A, ..., so that what changes meets them all; the rounds
    before 0, which are not counted, as round 0."""
    first = max(number, 0) % len(contenders)
    return [*contenders[first:], *contenders[:first]]


def summary(values: list[float]) -> dict[str, float]:
    """Median and spread."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def spread(values: list[float], form: str = ".2f") -> str:
    """Median and spread for people: '1.21 (1.19 to 1.24)'."""
    return written(summary(values), form)


def written(numbers: dict[str, float], form: str = ".2f") -> str:
    """A summary for people."""
    return "{median:{form}} ({min:{form}} to {max:{form}})".format(form=form, **numbers)


def facts() -> dict[str, Any]:
    """When, with what and on what: JSON-ready."""
    return {
        **files.origin(f"python benchmarks/{Path(sys.argv[0]).name}"),
        "cores": CORES,
        "threads": int(os.environ.get("OMP_NUM_THREADS", CORES)),
    }


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with what all benchmarks take."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--plans", nargs="+", default=["auto"], metavar="PLAN", help="JSON, a plan file, auto, ..."
    )
    parser.add_argument("--rounds", type=at_least(1), default=5, help="(5)")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="(bfloat16)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the numbers as JSON")
    return parser


MODEL_HELP = "checkpoint (the bundled SmolLM2-135M-Instruct)"


def run_main(main: Callable[[], None]) -> None:
    """Run a benchmark; exit code 1, with one line for wrong input, if it cannot be run."""
    try:
        main()
    except (PlanError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
