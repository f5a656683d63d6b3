"""Files: whole or not at all, inside their folder, and what is wrong with one said in one line."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vllm_depthpar.errors import UserError, shortened

WRITABLE = "a place that can be written to, with space"
# What a system says that has no room or no right for something, or a broken disk.
_OF_THE_SYSTEM = frozenset(
    getattr(errno, name)
    for name in (
        *("EACCES", "EDQUOT", "EIO", "EMFILE", "ENAMETOOLONG", "ENFILE", "ENOSPC", "ENOTDIR"),
        *("EPERM", "EROFS", "ESTALE", "EFBIG", "EISDIR"),
    )
)


def inside(folder: Path, name: object, origin: str) -> Path:
    """Return the path of a file that data names: one of `folder` itself, whatever the name says.

    Every name that comes from a file, and not from the user, goes through here before anything is
    read or written by it.

    Args:
        origin: where the name stands, for the message.

    Raises:
        UserError: it is none, or one that leads out of the folder, or further in.
    """
    # What can't be printed is no name of a file: ends of lines, NUL, half of a character.
    alone = isinstance(name, str) and name not in ("", ".", "..") and "/" not in name
    if not isinstance(name, str) or not alone or not name.isprintable():
        raise UserError(
            f"{origin} names {shortened(name)}; allowed: files of its folder, by name alone"
        )
    return folder / name


@contextmanager
def reading(path: Path | str, allowed: str) -> Iterator[None]:
    """Say in one line why a file can't be read or is not what it should be.

    Args:
        allowed: what it should be.

    Raises:
        UserError: in place of what the system, JSON or safetensors raises.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, (OSError, ValueError, RecursionError, *_of_safetensors())):
            raise
        raise UserError(f"{path} can't be read ({reason(error)}); allowed: {allowed}") from None


@contextmanager
def writing(path: Path | str, allowed: str = WRITABLE) -> Iterator[None]:
    """Say in one line why something can't be written, as on a full or a read-only disk.

    Args:
        allowed: where it could be.

    Raises:
        UserError: in place of what the system, safetensors or tokenizers raises.
    """
    try:
        yield
    except Exception as error:
        ours = isinstance(error, (OSError, *_of_safetensors()))
        if not ours and "(os error " not in str(error):
            raise
        raise UserError(f"{path} can't be written ({reason(error)}); allowed: {allowed}") from None


def _of_safetensors() -> tuple[type[Exception], ...]:
    """Name what safetensors raises, if anybody here has imported it: this module is imported where
    it may not be installed."""
    library = sys.modules.get("safetensors")
    return () if library is None else (library.SafetensorError,)


def reason(error: BaseException) -> str:
    """Say in a few words what is wrong with a file."""
    match error:
        case OSError(strerror=str(text)):
            return text
        case json.JSONDecodeError():
            return f"line {error.lineno} column {error.colno}: {error.msg}"
        case UnicodeError():
            return "not UTF-8 text"
        case RecursionError():
            return "nested too deeply"
    text = str(error) or type(error).__name__
    return "a number is too long" if "integer string conversion" in text else text.splitlines()[0]


def of_the_system(error: OSError) -> str | None:
    """Say in one line that the system refused something; None for another error."""
    if error.errno not in _OF_THE_SYSTEM:
        return None
    where = f"{error.filename}: " if error.filename else ""
    return (
        f"{where}{reason(error)}; allowed: what can be read and written here, on a disk with space"
    )


def read_bytes(path: Path, allowed: str) -> bytes:
    """Read a file.

    Args:
        allowed: what it should be, for the message.

    Raises:
        UserError: it can't be read.
    """
    with reading(path, allowed):
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise UserError(f"{path} is not a file; allowed: {allowed}")
        return path.read_bytes()


def read_json(path: Path, allowed: str) -> Any:
    """Read JSON.

    Raises:
        UserError: it can't be read, or is none.
    """
    content = read_bytes(path, allowed)
    with reading(path, allowed):
        return json.loads(content.decode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file under a temporary name in its folder, which is made, then rename it.

    What is no file, as /dev/stdout, is written to.

    Raises:
        UserError: it can't be written.
    """
    with writing(path):
        if path.exists() and not path.is_file():
            path.write_bytes(content)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        partial.unlink(missing_ok=True)  # of a process of this number that was killed
        try:
            with partial.open("xb") as file:  # through no link
                file.write(content)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def write_json(path: Path, content: object) -> None:
    """`write_bytes` of JSON."""
    write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())


def check_place(path: Path, allowed: str = WRITABLE) -> None:
    """Refuse a path at which nothing can be made: below a file, or on a disk that is read-only.

    Whether there is space only writing can tell.

    Args:
        allowed: what would be right, for the message.

    Raises:
        UserError: it is one.
    """
    with writing(path, allowed):
        if path.exists() and not path.is_file() and not path.is_dir():
            return  # `write_bytes` makes nothing there
        place = path.parent
        while not place.exists():
            if place.is_symlink():
                raise UserError(f"{place} is a link to nothing; allowed: {allowed}")
            place = place.parent
        if not place.is_dir():
            raise UserError(f"{place} is not a folder; allowed: {allowed}")
        if not os.access(place, os.W_OK | os.X_OK):
            raise UserError(f"{place} can't be written to; allowed: {allowed}")
        # Longer than a name can be, for the temporary one that it has first.
        path.with_name(f".{path.name}.{os.getpid()}.partial").exists()


@contextmanager
def only_one(path: Path, busy: str) -> Iterator[None]:
    """Hold a lock file, which is gone in the end; the system lets it go however this process ends.

    On a file system without locks nothing is held.

    Raises:
        UserError: another process holds it: `busy`; or it can't be made.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                raise UserError(busy) from None
            except OSError:
                break
            # The one before may have ended, and taken the file away, since it was opened.
            with suppress(FileNotFoundError):
                if os.path.samestat(path.stat(), os.fstat(lock)):
                    break
            os.close(lock)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(lock)


def expanded(path: str | Path) -> Path:
    """Replace `~` by a home folder, if there is such a user."""
    return Path(os.path.expanduser(path))


def cache_folder() -> Path:
    """Where what can be made again is kept: ``$DEPTHPAR_CACHE``, else
    ``$XDG_CACHE_HOME/depthpar``, else ``~/.cache/depthpar``.

    Raises:
        UserError: this user has no home.
    """
    given = os.environ.get("DEPTHPAR_CACHE")
    path = expanded(given or os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if path.parts[:1] == ("~",):
        raise UserError("there is no home folder to keep files in; allowed: DEPTHPAR_CACHE=FOLDER")
    return path if given else path / "depthpar"
