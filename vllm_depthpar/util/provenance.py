"""Where a result comes from."""

from __future__ import annotations

import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from vllm_depthpar import __version__


def origin(program: str) -> dict[str, Any]:
    """When, with what and on what: JSON-ready. Paths in the command are reduced to their names."""
    arguments = [Path(part).name if part.startswith("/") else part for part in sys.argv[1:]]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([*program.split(), *arguments]),
        "versions": {
            "vllm_depthpar": __version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("vllm", "torch", "transformers")},
        },
        "cpu": cpu_model(),
    }


def cpu_model() -> str:
    """Read the processor's name as Linux reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
