"""Argument types and help texts that subcommands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable

MODEL_HELP = "folder or hub name of a checkpoint"
# "auto": bfloat16 where the hardware multiplies it, else float32.
DTYPES = ("auto", "float32", "bfloat16", "float16")
PLAN_HELP = "JSON, a plan file, 'auto' or 'identity'"


def at_least(lowest: int) -> Callable[[str], int]:
    """A type for argparse: an integer that is `lowest` or more."""

    def integer(text: str) -> int:
        if int(text) < lowest:
            raise argparse.ArgumentTypeError(f"{text} is too small; allowed: {lowest} or more")
        return int(text)

    return integer
