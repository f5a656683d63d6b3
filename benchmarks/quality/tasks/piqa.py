"""The data of piqa.yaml."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from datasets import Dataset

FILES = ("piqa-valid.jsonl", "piqa-valid-labels.lst")


def load(**_: Any) -> dict[str, Dataset]:
    """PIQA's validation set: goal, sol1, sol2, and as label the index of the right solution.

    Raises FileNotFoundError where $PIQA_DIR does not hold it.
    """
    folder = Path(os.environ.get("PIQA_DIR", "")).expanduser()
    paths = [folder / name for name in FILES]
    if "PIQA_DIR" not in os.environ or not all(path.is_file() for path in paths):
        raise FileNotFoundError(f"PIQA_DIR must name a folder with {' and '.join(FILES)}")
    documents, labels = (path.read_text(encoding="utf-8").splitlines() for path in paths)
    rows = zip(documents, labels, strict=True)
    return {
        "validation": Dataset.from_list(
            [{**json.loads(document), "label": int(label)} for document, label in rows]
        )
    }
