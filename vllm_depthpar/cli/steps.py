"""Work in steps, each a command line that a user could type.

What a step makes is kept, so that a run that was ended goes on with the first step that was not.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_depthpar.errors import UserError
from vllm_depthpar.util import files


@dataclass(frozen=True)
class Step:
    """One command of the package.

    Attributes:
        does: for people.
        arguments: of `depthpar`.
        makes: what is there once it is done; None if the command itself knows how far it was.
        prints: whether `makes` is a file for what the command prints.
    """

    does: str
    arguments: Sequence[str]
    makes: Path | None
    prints: bool = False

    @property
    def command(self) -> str:
        """As one types it."""
        return shlex.join(["depthpar", *self.arguments])


def run_steps(steps: Sequence[Step]) -> None:
    """Run what was not done yet, one after the other; progress, and what commands print, go to
    stderr. Where one fails, which has said why by itself, this program ends, too."""
    for number, step in enumerate(steps, 1):
        print(f"[{number}/{len(steps)}] {step.does}: {step.command}", file=sys.stderr, flush=True)
        if step.makes is None or not step.makes.exists():
            _run(step)


def keep_settings(kept: Path, settings: Mapping[str, Any], option: str) -> None:
    """Refuse to go on with what other settings have begun.

    Args:
        kept: folder of what the steps make, in which the settings are kept.
        settings: JSON-ready.
        option: that names the folder, for messages.

    Raises:
        UserError: they are others.
    """
    path = kept / "settings.json"
    if not path.exists():
        files.write_json(path, settings)
    elif files.read_json(path, "settings of a run in steps") != settings:
        raise UserError(
            f"{kept} was begun with other settings; allowed: the same, or another {option}"
        )


def _run(step: Step) -> None:
    command = [sys.executable, "-m", "vllm_depthpar.cli", *step.arguments]
    if not step.prints:
        done = subprocess.run(command, stdout=sys.stderr)
    else:
        done = subprocess.run(command, stdout=subprocess.PIPE)
    if done.returncode:
        sys.exit(done.returncode)
    if step.prints and step.makes is not None:
        files.write_bytes(step.makes, done.stdout)
