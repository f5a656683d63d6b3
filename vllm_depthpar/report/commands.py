"""What a command that wrote a file says beside the file."""

from __future__ import annotations

import shlex
from pathlib import Path

from vllm_depthpar.plan import Plan


def option(command: str, name: str) -> str | None:
    """Read an option's value; None where it was not given."""
    words = _words(command)
    for at, word in enumerate(words):
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
        if word == name and at + 1 < len(words):
            return words[at + 1]
    return None


def checkpoints(command: str) -> tuple[str, str]:
    """Read from a `depthpar recover` the names of its checkpoint and of the new one."""
    words = _words(command)
    after = words[words.index("recover") + 1 :] if "recover" in words else words
    model = next((Path(word).name for word in after if not word.startswith("-")), "MODEL")
    return model, Path(option(command, "--out") or "recovered").name


def deployment(command: str) -> str:
    """Say for where a search predicted speeds: "" for one sequence on the machine that it ran on.

    What it was not told it takes to be the same every time.
    """
    names = ("device", "tp", "link", "batch", "context")
    given = ((name, option(command, f"--{name}")) for name in names)
    return ", ".join(f"{name} {value}" for name, value in given if value is not None)


def ranks(command: str, plan: Plan) -> int:
    """Say for which tensor-parallel size a plan was measured."""
    given = option(command, "--tp") or ""
    return plan.tp or (int(given) if given.isdecimal() else 1)


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError:
        return command.split()
