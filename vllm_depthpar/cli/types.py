"""Argument types and help texts that subcommands share."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from vllm_depthpar.checkpoint.export import check_out
from vllm_depthpar.errors import UserError
from vllm_depthpar.util import files

MODEL_HELP = "folder or hub name of a checkpoint"
# "auto": bfloat16 where the hardware multiplies it, else float32.
DTYPES = ("auto", "float32", "bfloat16", "float16")
PLAN_HELP = "JSON, a plan file, 'auto', 'identity' or 'published'"

# What `--engine-args` may not say: a plan or another option does.
RESERVED_FLAGS = (
    *("--model", "--model-impl", "--hf-overrides", "--tensor-parallel-size", "-tp", "--dtype"),
    *("--load-format", "--enforce-eager", "--tokenizer", "--seed"),
)


def engine_flags(text: str, reserved: Sequence[str] = RESERVED_FLAGS) -> tuple[str, ...]:
    """Read the flags in the value of `--engine-args`.

    Raises:
        UserError: vLLM does not know one, or it is not for there.
    """
    try:
        flags = tuple(shlex.split(text))
    except ValueError as error:
        raise UserError(f"--engine-args: {error}") from None
    for flag in flags:
        if flag.partition("=")[0].replace("_", "-") in reserved:
            raise UserError(
                f"--engine-args {flag!r} can't be given here; allowed: all of vLLM's engine but "
                f"{', '.join(reserved)}"
            )
    if flags:
        from vllm_depthpar.launch import engine

        try:
            engine.check_flags(flags)
        except engine.EngineError as error:
            raise UserError(f"--engine-args: {error.last.removeprefix('vllm: error: ')}") from None
    return flags


def at_least(lowest: int) -> Callable[[str], int]:
    """Make a type for argparse: an integer that is `lowest` or more."""

    def integer(text: str) -> int:
        if int(text) < lowest:
            raise argparse.ArgumentTypeError(f"{text} is too small; allowed: {lowest} or more")
        return int(text)

    return integer


def path_or_name(text: str) -> str:
    """Read, as a type for argparse, a path, whose `~` is a home folder, or another name."""
    return str(files.expanded(text)) if text.startswith("~") else text


def out_file(*beside: str, suffix: str = "") -> Callable[[str], Path]:
    """Make a type for argparse: a file to write, found wrong before any work begins.

    Args:
        beside: names of what is written beside it, "{stem}" being its own name without suffix.
        suffix: how its name must end.

    Returns:
        Text in, path out. Raises UserError where nothing can be written.
    """

    def path(text: str) -> Path:
        out = files.expanded(text)
        _check_file(out)
        if not out.name.endswith(suffix):
            raise UserError(f"--out {out}: its name must end in {suffix}")
        for name in beside:
            other = out.with_name(name.format(stem=out.stem))
            _check_file(other)
            if other == out:
                raise UserError(f"--out {out} is what is written beside it; allowed: another name")
        return out

    return path


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"--out {path} is a folder; allowed: a file")
    files.check_place(path)


def out_folder(text: str) -> Path:
    """Read, as a type for argparse, a folder to make, found wrong before any work begins.

    Raises:
        UserError: it can't be made, or holds something.
    """
    out = files.expanded(text)
    if out.name in ("", ".."):
        raise UserError(f"--out {text!r} names no folder to make; allowed: the name of a new one")
    check_out(out)
    return out
