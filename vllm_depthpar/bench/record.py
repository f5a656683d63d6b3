"""What a long measurement has found: a file that is whole after every round, and that the same
command goes on with."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_depthpar.errors import UserError
from vllm_depthpar.util import files


def go_on(
    record: Mapping[str, Any], out: Path | None, program: str, kept: Sequence[str]
) -> dict[str, Any]:
    """Return a new record, or with what is in the file `out` if there is one.

    Args:
        record: JSON-ready; its `settings` are everything that measurements depend on.
        program: whose file it is, for messages.
        kept: the keys of what was measured.

    Raises:
        UserError: the file is none of that program's, or one of other settings.
    """
    fresh: dict[str, Any] = json.loads(json.dumps(record))  # as it comes from a file
    if out is None or not out.exists():
        return fresh
    known = files.read_json(out, allowed=f"a file of {program}, or another --out")
    needed = {"settings": {}, **{key: fresh[key] for key in kept}}
    if not _has(known, needed):
        raise UserError(f"{out} is not a file of {program}; allowed: another --out")
    settings, measured = known["settings"], {key: known[key] for key in kept}
    for key, value in fresh["settings"].items():
        if settings.get(key) != value:
            raise UserError(
                f"{out} has rounds of other settings ({key}: {json.dumps(settings.get(key))}, not "
                f"{json.dumps(value)}); allowed: the same command, or another --out"
            )
    return {**fresh, **measured}


def _has(found: object, wanted: object) -> bool:
    """Whether what a file holds is of the form of a new record: its keys, lists and numbers."""
    if isinstance(wanted, dict):
        return isinstance(found, dict) and all(
            key in found and _has(found[key], value) for key, value in wanted.items()
        )
    return isinstance(found, int | float if isinstance(wanted, int | float) else type(wanted))


def timed(record: dict[str, Any], save: Callable[[], None]) -> Callable[[], None]:
    """Return a `save` that first adds to the record's `seconds` what has passed since the last."""
    since = time.monotonic()

    def add_and_save() -> None:
        nonlocal since
        now = time.monotonic()
        record["seconds"] += now - since
        since = now
        save()

    return add_and_save
