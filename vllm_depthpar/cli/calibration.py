"""The text to calibrate on, of subcommands that do: arguments, and windows of tokens."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from vllm_depthpar.cli.types import DTYPES, at_least, path_or_name
from vllm_depthpar.errors import UserError

if TYPE_CHECKING:
    from vllm_depthpar.evaluate.texts import Windows


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `read` reads, and the dtype to compute in."""
    parser.add_argument(
        "--text",
        type=path_or_name,
        nargs="+",
        default=[],
        metavar="FILE",
        help="UTF-8 text to calibrate on",
    )
    parser.add_argument(
        "--own-text",
        type=at_least(0),
        metavar="N",
        help="beside it calibrate on N tokens that the model writes itself (as many as of --text)",
    )
    parser.add_argument("--tokens", type=at_least(1), default=4096, help="of all texts (4096)")
    parser.add_argument("--window", type=at_least(2), default=256, help="tokens (256)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="(auto)")


def read(args: argparse.Namespace) -> list[Windows]:
    """Read the texts to calibrate on: the user's, the model's own, or both in equal parts.

    Raises:
        UserError: there is none, or it can't be read or written.
    """
    from vllm_depthpar.evaluate.suite import read_texts

    own = args.own_text
    if own is None:
        own = args.tokens // 2 if args.text else args.tokens
    if not own and not args.text:
        raise UserError("nothing to calibrate on; allowed: --text FILE, or --own-text above 0")
    if not args.text:
        print(f"No --text: calibrating on {own} tokens that the model writes.", file=sys.stderr)
    each = max(1, (args.tokens - own) // len(args.text)) if args.text else None
    return read_texts(
        args.model, args.text, args.window, tokens=each, own_tokens=own, dtype=args.dtype
    )
