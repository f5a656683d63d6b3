"""Files of results: never half written, saying where they come from; and tables for people."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from vllm_depthpar import __version__


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file under a temporary name in its folder, which is made, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: object) -> None:
    """`write_bytes` of JSON."""
    write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def cache_folder() -> Path:
    """Where what can be made again is kept: ``$DEPTHPAR_CACHE``, else
    ``$XDG_CACHE_HOME/depthpar``, else ``~/.cache/depthpar``."""
    if cache := os.environ.get("DEPTHPAR_CACHE"):
        return Path(cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "depthpar"


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
    """The processor's name as Linux reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
