"""Argument types and help texts that subcommands share."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence

from vllm_depthpar.errors import UserError

MODEL_HELP = "folder or hub name of a checkpoint"
# "auto": bfloat16 where the hardware multiplies it, else float32.
DTYPES = ("auto", "float32", "bfloat16", "float16")
PLAN_HELP = "JSON, a plan file, 'auto' or 'identity'"

# What `--engine-args` may not say: a plan or another option does.
RESERVED_FLAGS = (
    *("--model", "--model-impl", "--hf-overrides", "--tensor-parallel-size", "-tp", "--dtype"),
    *("--load-format", "--enforce-eager", "--tokenizer", "--seed"),
)


def engine_flags(text: str, reserved: Sequence[str] = RESERVED_FLAGS) -> tuple[str, ...]:
    """The flags in the value of `--engine-args`.

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
    """A type for argparse: an integer that is `lowest` or more."""

    def integer(text: str) -> int:
        if int(text) < lowest:
            raise argparse.ArgumentTypeError(f"{text} is too small; allowed: {lowest} or more")
        return int(text)

    return integer
