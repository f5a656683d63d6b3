"""How a worker's error for the user reaches the process that the user started.

vLLM says there only that a worker ended, and points to its log. The worker leaves its one line in a
file that this process named, in an environment variable, before it started any other. A worker on
another host that another program started leaves it nowhere; its own log has it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import secrets
import tempfile
from collections.abc import Iterator
from multiprocessing.util import Finalize
from pathlib import Path

from vllm_depthpar.errors import UserError

ENV = "DEPTHPAR_LAST_WORDS"


def prepare() -> None:
    """Name the file, in the first process; those that it starts inherit the name. Idempotent."""
    if ENV in os.environ:
        mine = os.environ[ENV].split("-")[-2:-1] == [str(os.getpid())]
        if mine or multiprocessing.parent_process() is not None:
            return
    name = f"depthpar-error-{os.getpid()}-{secrets.token_hex(8)}"
    path = Path(tempfile.gettempdir(), name)
    os.environ[ENV] = str(path)
    Finalize(None, path.unlink, args=(True,), exitpriority=0)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Leave the line of a `UserError` that passes; of several workers the first one's."""
    try:
        yield
    except UserError as error:
        with contextlib.suppress(OSError, KeyError):
            # The folder is everyone's: no file that is there already, nor a link.
            file = os.open(os.environ[ENV], os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(file, "w") as words:
                words.write(str(error))
        raise


def found() -> str | None:
    """Read what a worker left, once."""
    with contextlib.suppress(OSError, KeyError):
        path = Path(os.environ[ENV])
        words = path.read_text()
        path.unlink()
        return words
    return None
