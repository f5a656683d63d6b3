"""Names that a user may give."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher


def nearest_first(text: str, names: Iterable[str]) -> list[str]:
    """Sort names by how much they are like a wrong one; equally near ones keep their order."""
    return sorted(names, key=lambda name: -SequenceMatcher(None, text.lower(), name).ratio())
