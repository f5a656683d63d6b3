"""What was measured, kept as it comes, so that a run that ended early goes on where it was."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from vllm_depthpar.util import files

_ALLOWED = "a file that can be read and written, with space; DEPTHPAR_CACHE=FOLDER names a place"


class Journal:
    """A dictionary from text to JSON values in a file that only grows, one line an entry.

    A line that was cut off when its writer was killed is left out. Several runs may write the same
    journal; each sees what was there when it started.

    Raises:
        UserError: it can't be read.

    Args:
        settings: everything that what is written depends on, JSON-ready: other settings are another
            journal.
        folder: where journals are.
    """

    def __init__(self, settings: object, folder: Path | None = None) -> None:
        digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
        self.path = (folder or files.cache_folder() / "measured") / f"{digest}.jsonl"
        self._entries: dict[str, Any] = {}
        kept = files.read_bytes(self.path, _ALLOWED) if self.path.exists() else b""
        for line in kept.splitlines():
            try:
                key, value = json.loads(line)
            except (ValueError, TypeError, RecursionError):  # no JSON, or no pair
                continue
            if isinstance(key, str):
                self._entries[key] = value

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def __getitem__(self, key: str) -> Any:
        return self._entries[key]

    def check(self) -> None:
        """Refuse, before what is long begins, a place that can't be written to.

        Raises:
            UserError: it is one.
        """
        files.check_place(self.path, _ALLOWED)

    def add(self, entries: dict[str, Any]) -> None:
        """Write entries down, then know them.

        Raises:
            UserError: they can't be written.
        """
        # The empty line before ends one that was cut off. All in one piece: others append, too.
        lines = [json.dumps([key, value]) for key, value in entries.items()]
        content = ("\n" + "\n".join(lines) + "\n").encode()
        with files.writing(self.path, _ALLOWED):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as file:
                while content:  # of a full disk only the write after a short one is an error
                    content = content[file.write(content) :]
        self._entries |= entries
