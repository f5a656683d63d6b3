"""Pictures of what a search found (matplotlib, the extra `bench`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from vllm_depthpar.plan import Plan
from vllm_depthpar.plan.model_shape import all_reduces
from vllm_depthpar.util.plots import save

_MARKS = {"span of pairs": ("s", "tab:orange"), "skipping": ("x", "tab:red")}


def front(
    path: Path,
    known: Sequence[tuple[str, Plan, float]],
    best: Sequence[tuple[Plan, float]],
    speedup: Callable[[Plan], float | None] | None = None,
    reductions: bool = False,
) -> None:
    """Plot divergence against depth, and against predicted speed-up if there is one: a PNG.

    Args:
        known: every measured plan: its kind, itself, its divergence in nats per token.
        best: the Pareto front.
        speedup: of a plan.
        reductions: against all-reduces in place of depth.
    """
    axes: list[tuple[str, Callable[[Plan], float]]] = [
        ("all-reduces a forward pass, TP > 1", all_reduces)
        if reductions
        else ("effective depth (blocks)", lambda plan: plan.depth)
    ]
    if speedup is not None:
        axes.append(("predicted speed-up over plain vLLM", lambda plan: speedup(plan) or 1.0))
    figure = Figure(figsize=(6.4 * len(axes), 4.2), layout="constrained")
    for place, (label, of_plan) in enumerate(axes, start=1):
        axis = figure.add_subplot(1, len(axes), place)
        for kind in sorted({kind for kind, _, _ in known}):
            points = [(of_plan(plan), value) for name, plan, value in known if name == kind]
            marker, colour = _MARKS.get(kind, (".", "tab:gray"))
            x, y = zip(*points, strict=True)
            axis.scatter(x, y, s=18, marker=marker, color=colour, label=kind)
        line = sorted((of_plan(plan), value) for plan, value in best)
        x, y = zip(*line, strict=True)
        axis.plot(x, y, color="tab:blue", label="front")
        if place == 1:
            axis.invert_xaxis()
        axis.set_xlabel(label)
        axis.set_ylabel("KL from the unmodified model (nats/token)")
        axis.grid(alpha=0.3)
        axis.legend()
    save(figure, path)
