"""A real `vllm serve` for each plan: its flags, its start, and what its answers depend on."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata

from vllm_depthpar import __version__
from vllm_depthpar.checkpoint.config import fingerprint
from vllm_depthpar.errors import UserError
from vllm_depthpar.launch.server import Server, serve
from vllm_depthpar.launch.variants import Variant

# Set by the plan, or by how the server is reached.
RESERVED_FLAGS = ("--api-key", "--hf-overrides", "--host", "--model-impl", "--port")
# Of one request, the time it queues in the server included. A slow machine is not a failure.
REQUEST_SECONDS = 3600


def check_server_args(arguments: Sequence[str]) -> tuple[str, ...]:
    """Check that flags for `vllm serve` may stand beside a plan's; returns them.

    Raises:
        UserError: one of them is `RESERVED_FLAGS`.
    """
    for argument in arguments:
        if (flag := argument.partition("=")[0]) in RESERVED_FLAGS:
            raise UserError(
                f"server flag {flag!r} can't be given here; allowed: all of vllm serve's but "
                f"{', '.join(RESERVED_FLAGS)}"
            )
    return tuple(arguments)


def start(
    stack: contextlib.ExitStack,
    model: str,
    variant: Variant,
    server_args: Sequence[str],
    seed: int,
    env: Mapping[str, str] | None = None,
) -> Server:
    """Start a variant's server, which ends with the stack.

    Args:
        model: folder or hub name.
        server_args: more flags for `vllm serve`.
        seed: of the server.
        env: more of its environment.

    Raises:
        UserError: it does not start; the end of its log is in the message.
    """
    flags = [*server_args, *variant.flags, "--seed", str(seed)]
    say("starting vllm serve ...")
    try:
        return stack.enter_context(serve(model, *flags, env={**variant.env, **(env or {})}))
    except RuntimeError as error:
        raise UserError(f"plan {variant.label}: {error}") from error


def no_answer(variant: Variant, server: Server, error: BaseException) -> UserError:
    """Say in one line that a server did not answer, and where to look."""
    return UserError(
        f"no answer from the server of plan {variant.label} ({type(error).__name__}: {error}); "
        f"the answers so far are kept; its log is {server.log}"
    )


def identity(model: str, variant: Variant, server_args: Sequence[str], *more: str) -> list[str]:
    """List what answers depend on beside the requests, JSON-ready: answers of the same can stand
    for each other.

    Args:
        more: distributions whose versions matter, too.
    """
    versions = [metadata.version(name) for name in (*more, "vllm", "transformers")]
    return [__version__, *versions, fingerprint(model), variant.digest, *server_args]


def say(line: str) -> None:
    """Tell the user what is being done, on stderr."""
    print(line, file=sys.stderr, flush=True)
