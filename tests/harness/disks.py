"""Disks that are full, or read-only: real ones, in memory. Who may not mount skips, and says so."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def disk(folder: Path, size: int, read_only: bool = False) -> Iterator[Path]:
    """A disk of so many bytes, mounted at a new folder, for the body of a `with`.

    Rights of files are no way to test this: root has all of them.
    """
    folder.mkdir()
    options = f"size={size}" + ",ro" * read_only
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
        os.rmdir(folder)
