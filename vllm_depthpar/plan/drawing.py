"""A plan as text that a person can read at a glance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from vllm_depthpar.plan.model_shape import ModelShape, all_reduces, hidden_all_reduces
from vllm_depthpar.plan.plan import Plan, resolve
from vllm_depthpar.plan.spec import HALVES, MODES, SINGLE, STANDARD

# A run of layers that stay alone, by their mode.
_MARKS = {STANDARD: "│", "ladder": "├", "drop_sync": "┆", "parallel_residual": "╞"}


def effects(plan: Plan, shape: ModelShape, tp: int = 1) -> dict[str, Any]:
    """Compute what a plan makes of a model, as JSON-ready numbers.

    Bytes are per rank at tensor-parallel size `tp`; all-reduces are per forward pass at TP > 1.
    """
    plain = resolve("identity", plan.layers)
    held = (shape.layout(plan, position, tp) for position in range(plan.depth))
    return {
        "plan": plan.to_spec(),
        "digest": plan.digest,
        "name": plan.name,
        "tp": tp,
        "tp_fits": shape.fits_plan(plan, tp),
        "tps_that_fit": shape.fitting_tps(plan),
        "skipped": list(plan.skipped),
        "depth": {"before": plan.layers, "after": plan.depth},
        **{key: plan.to_spec().get(key, []) for key in (*MODES, *HALVES.values())},
        "desync": plan.to_spec().get("desync", {half: [] for half in HALVES}),
        "all_reduces": {"before": all_reduces(plain), "after": all_reduces(plan)},
        "hidden_all_reduces": hidden_all_reduces(plan),
        "layouts": dict(Counter(held)),
        "weight_bytes_per_rank": {
            "before": shape.weight_bytes(plain, tp),
            "after": shape.weight_bytes(plan, tp),
        },
        "kv_bytes_per_token_per_rank": {
            "before": shape.kv_bytes_per_token(plain, tp),
            "after": shape.kv_bytes_per_token(plan, tp),
        },
    }


def draw(plan: Plan, shape: ModelShape, tp: int = 1, source: str = "") -> str:
    """Draw the blocks top to bottom, side by side where layers run side by side, and the facts."""
    known = effects(plan, shape, tp)
    lines = [f"plan {plan.digest}: {plan.name}" + (f" (from {source})" if source else ""), ""]
    lines += blocks(plan)
    lines.append("")
    rows = {
        "effective depth": _change(known["depth"], str),
        "all-reduces per forward pass, TP > 1": _change(known["all_reduces"], str)
        + (f", {known['hidden_all_reduces']} of them hidden" if plan.ladder else ""),
        f"weights per rank, TP = {tp}": _change(known["weight_bytes_per_rank"], _bytes),
        f"KV cache per token and rank, TP = {tp}": _change(
            known["kv_bytes_per_token_per_rank"], _bytes
        ),
        "tensor-parallel sizes that fit": ", ".join(map(str, known["tps_that_fit"])),
    }
    if held := [f"{n} {way}" for way, n in known["layouts"].items() if way != SINGLE]:
        rows[f"layers side by side held, TP = {tp}"] = ", ".join(held)
    width = max(map(len, rows))
    lines += [f"{label:<{width}}  {value}" for label, value in rows.items()]
    if not known["tp_fits"]:
        lines.append(f"TP = {tp} does not fit this plan.")
    return "\n".join(lines)


def _change(pair: dict[str, int], form: Callable[[int], str]) -> str:
    return f"{form(pair['before'])} -> {form(pair['after'])}"


def blocks(plan: Plan) -> list[str]:
    """Draw a line per block; runs of layers that stay alone, and of skipped ones, on one line."""
    lines: list[str] = []
    run: list[int] = []
    mode_of_run, unreduced_of_run = STANDARD, list[str]()
    last = -1

    def close() -> None:
        if run:
            notes = [f"{len(run)} layers"] * (len(run) > 1)
            notes += [words(mode_of_run)] * (mode_of_run != STANDARD)
            notes += unreduced_of_run
            mark = _MARKS[mode_of_run]
            lines.append(f"  {mark} {_span(run)}" + (f"   {', '.join(notes)}" if notes else ""))
            run.clear()

    for position, block in enumerate(plan.blocks):
        mode, unreduced = plan.mode(position), _unreduced(plan, position)
        gap = [layer for layer in range(last + 1, min(block)) if layer in set(plan.skipped)]
        if gap:
            close()
            lines.append(f"  ┊ {_span(gap)}   skipped")
        if len(block) > 1 or not plan.is_whole(position):
            close()
            mark = "╪" if len(block) > 1 else "╎"
            notes = [words(mode)] * (mode != STANDARD) + _without(plan, position) + unreduced
            side_by_side = " ║ ".join(str(layer) for layer in block)
            lines.append(f"  {mark} {side_by_side}" + (f"   {', '.join(notes)}" if notes else ""))
        else:
            kind = (mode, unreduced)
            if run and (block[0] != run[-1] + 1 or kind != (mode_of_run, unreduced_of_run)):
                close()
            mode_of_run, unreduced_of_run = kind
            run.append(block[0])
        last = max(last, *block)
    close()
    tail = [layer for layer in plan.skipped if layer > last]
    if tail:
        lines.append(f"  ┊ {_span(tail)}   skipped")
    return lines


def _unreduced(plan: Plan, position: int) -> list[str]:
    """Name the halves of a block whose sum is not reduced."""
    names = ["MLP" if half == "mlp" else half for half in plan.unreduced(position)]
    return [f"no all-reduce of {' and '.join(names)}"] if names else []


def _without(plan: Plan, position: int) -> list[str]:
    """Name the halves that a block lacks."""
    block, notes = plan.blocks[position], []
    for half, key in HALVES.items():
        if layers := [layer for layer in block if layer in getattr(plan, key)]:
            of = f" of {', '.join(map(str, layers))}" if len(layers) < len(block) else ""
            notes.append(f"no {'MLP' if half == 'mlp' else half}{of}")
    return notes


def words(mode: str) -> str:
    """Say the mode of a block as people do."""
    return mode.replace("_", " ")


def _span(layers: list[int]) -> str:
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]} .. {layers[-1]}"


def _bytes(count: int) -> str:
    if count < 1 << 20:
        return f"{count / 1024:.1f} KiB"
    if count < 1 << 30:
        return f"{count / (1 << 20):.1f} MiB"
    return f"{count / (1 << 30):.2f} GiB"
