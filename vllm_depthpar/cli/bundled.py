"""`depthpar bundled`: the checkpoint that the package can make without a download."""

from __future__ import annotations

from typing import Any

from vllm_depthpar.checkpoint.bundled import prepare


def add(commands: Any) -> None:
    """Register the subcommand."""
    bundled = commands.add_parser("bundled", help="prepare SmolLM2-135M-Instruct, print its folder")
    bundled.set_defaults(run=lambda _: str(prepare()))
