"""Files that are never half written, and the folder for what can be made again."""

from __future__ import annotations

import json
import os
from pathlib import Path


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


def cache_folder() -> Path:
    """Where what can be made again is kept: ``$DEPTHPAR_CACHE``, else
    ``$XDG_CACHE_HOME/depthpar``, else ``~/.cache/depthpar``."""
    if cache := os.environ.get("DEPTHPAR_CACHE"):
        return Path(cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "depthpar"
