"""Pictures of measurements (matplotlib, the extra `bench`)."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from vllm_depthpar.util.files import write_bytes

# No bar.
_UNKNOWN = dict.fromkeys(("median", "min", "max"), math.nan)


def heat_maps(
    path: Path, maps: Mapping[str, npt.NDArray[np.float64]], plain: float, title: str
) -> None:
    """One square for each transformation of a span of layers: a PNG.

    Args:
        maps: perplexity by first layer (row) and last layer (column), NaN where there is no span.
        plain: the unmodified model's perplexity, where the colours begin.
    """
    columns = 3
    rows = -(-len(maps) // columns)
    figure = Figure(figsize=(4.6 * columns, 4.2 * rows), layout="constrained")
    for place, (name, values) in enumerate(maps.items(), start=1):
        axis = figure.add_subplot(rows, columns, place)
        # Beyond a hundred times the perplexity the model is gone, and how far does not matter.
        shown = axis.imshow(
            np.log10(np.clip(values, plain, 100 * plain)),
            vmin=np.log10(plain),
            vmax=np.log10(100 * plain),
            cmap="viridis_r",
        )
        axis.set_title(name)
        axis.set_xlabel("last layer")
        axis.set_ylabel("first layer")
    bar = figure.colorbar(shown, ax=figure.axes, shrink=0.8)
    bar.set_label("log10 of perplexity")
    figure.suptitle(title)
    save(figure, path)


def bars(
    path: Path,
    panels: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float] | None]]],
    baseline: str,
    title: str,
) -> None:
    """Speed-ups as bars with their spread, a panel for each thing that was measured: a PNG.

    Args:
        panels: {panel: {group of bars: {variant: its "median", "min" and "max", or None}}}.
        baseline: the variant that is 1 everywhere, and has no bar.
    """
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.6 * rows), layout="constrained")
    for place, (name, groups) in enumerate(panels.items(), start=1):
        axis = figure.add_subplot(rows, columns, place)
        variants = [label for label in next(iter(groups.values())) if label != baseline]
        width = 0.8 / len(variants)
        for at, label in enumerate(variants):
            found = [group[label] or _UNKNOWN for group in groups.values()]
            medians = np.array([one["median"] for one in found])
            low, high = (np.array([one[end] for one in found]) for end in ("min", "max"))
            axis.bar(
                np.arange(len(found)) + (at - (len(variants) - 1) / 2) * width,
                medians,
                width,
                yerr=(medians - low, high - medians),
                capsize=2,
                label=label,
            )
        axis.axhline(1, color="gray", linewidth=1)
        axis.set_xticks(range(len(groups)), list(groups), rotation=20, ha="right")
        axis.set_ylabel(f"speed-up over {baseline}")
        axis.set_title(name)
        axis.grid(alpha=0.3, axis="y")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center")
    figure.suptitle(title)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a picture as a PNG."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    write_bytes(path, content.getvalue())
