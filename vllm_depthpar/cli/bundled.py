"""`depthpar bundled`: the checkpoints that the package can make without a download."""

from __future__ import annotations

from typing import Any

from vllm_depthpar.checkpoint.bundled import NAMES, prepare


def add(commands: Any) -> None:
    """Register the subcommand."""
    bundled = commands.add_parser("bundled", help="prepare a small real model, print its folder")
    first = next(iter(NAMES))
    bundled.add_argument(
        "model", nargs="?", choices=NAMES, default=first, help=f"{', '.join(NAMES)} ({first})"
    )
    bundled.set_defaults(run=lambda args: str(prepare(name=NAMES[args.model])))
