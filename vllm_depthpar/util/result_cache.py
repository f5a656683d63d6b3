"""What was measured, kept as it comes, so that a run that ended early goes on where it was."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from vllm_depthpar.util import files


class Journal:
    """A dictionary from text to JSON values in a file that only grows, one line an entry.

    A line that was cut off when its writer was killed is left out. Several runs may write the same
    journal; each sees what was there when it started.

    Args:
        settings: everything that what is written depends on, JSON-ready: other settings are another
            journal.
        folder: where journals are.
    """

    def __init__(self, settings: object, folder: Path | None = None) -> None:
        digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
        self.path = (folder or files.cache_folder() / "measured") / f"{digest}.jsonl"
        self._entries: dict[str, Any] = {}
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                key, value = json.loads(line)
            except ValueError:
                continue
            self._entries[key] = value

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def __getitem__(self, key: str) -> Any:
        return self._entries[key]

    def add(self, entries: dict[str, Any]) -> None:
        """Write entries down, then know them."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # The empty line before ends one that was cut off.
        lines = [json.dumps([key, value]) for key, value in entries.items()]
        with self.path.open("a") as file:
            file.write("\n" + "\n".join(lines) + "\n")
        self._entries |= entries
