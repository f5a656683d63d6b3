"""The command `depthpar`."""

from __future__ import annotations

import argparse
import os
import signal
import sys

from vllm_depthpar import __version__
from vllm_depthpar.cli import (
    bench,
    bundled,
    eval,
    export,
    order,
    plan,
    predict,
    recover,
    report,
    search,
    study,
    tune,
    verify,
)
from vllm_depthpar.errors import UserError
from vllm_depthpar.util import files

COMMANDS = (
    *(plan, tune, verify, predict, bench, search, eval, study, order, recover, report, export),
    bundled,
)


def parser() -> argparse.ArgumentParser:
    """Make the parser of the whole command."""
    whole = argparse.ArgumentParser(
        prog="depthpar", description="Restructure the depth of models for vLLM."
    )
    whole.add_argument("--version", action="version", version=__version__)
    commands = whole.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return whole


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code (1, with one line on stderr, for wrong input)."""
    # So that servers and engines are stopped, whose processes would stay.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        args = parser().parse_args(argv)
        print(args.run(args))
    except UserError as error:
        return _fail(str(error))
    except BrokenPipeError:
        # `depthpar ... | head`: not an error, and Python must not report it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        # Of what libraries read and write: temporary files, caches of their own.
        if (message := files.of_the_system(error)) is None:
            raise
        return _fail(message)
    return 0


def _fail(message: str) -> int:
    print(f"depthpar: error: {message}", file=sys.stderr)
    return 1
