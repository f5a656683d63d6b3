"""Perplexity and KL of several texts, as people read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vllm_depthpar.util.markdown import table

Figures = Mapping[str, Mapping[str, float]]


def quality_table(header: Sequence[str], rows: Sequence[tuple[Sequence[str], Figures]]) -> str:
    """Make a Markdown table of perplexities and divergences.

    Args:
        header: of the first columns.
        rows: one or more: the first columns, and "perplexity" and "kl" of each text by its name,
            of the same texts in every row.
    """
    names = list(rows[0][1])
    columns = [f"{figure}: {name}" for name in names for figure in ("perplexity", "KL")]
    cells = [
        [*first, *(cell for name in names for cell in _cells(found[name]))] for first, found in rows
    ]
    return table([*header, *columns], cells)


def _cells(found: Mapping[str, float]) -> tuple[str, str]:
    return f"{found['perplexity']:.2f}", f"{found['kl']:.3f}"
