"""What a search found, beside what is published: a plan file, a report for people, the numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_depthpar.evaluate.evaluator import Quality
from vllm_depthpar.evaluate.suite import reported
from vllm_depthpar.plan import Plan, drawing
from vllm_depthpar.plan.model_shape import all_reduces
from vllm_depthpar.plan.spec import HALVES, MODES
from vllm_depthpar.report import gather, records
from vllm_depthpar.report.html import write
from vllm_depthpar.search.baselines import kind
from vllm_depthpar.search.run import Effort, Outcome
from vllm_depthpar.search.search import Found
from vllm_depthpar.util import files
from vllm_depthpar.util.markdown import table
from vllm_depthpar.util.provenance import origin


@dataclass(frozen=True)
class SearchReport:
    """Everything a report says.

    Attributes:
        model: folder or hub name.
        effort: that the search was allowed.
    """

    model: str
    outcome: Outcome
    effort: Effort

    def write(self, out: Path) -> str:
        """Write the plan, and beside it the report, as text and as a page, and the numbers; return
        a summary for the terminal.

        Raises:
            UserError: the goal was not reached.
        """
        outcome, space = self.outcome, self.outcome.space
        best = outcome.best()
        front = outcome.search.front()
        plan = space.plan(best.tiling)
        rows = [self._row(one) for one in front]
        picture = out.with_name(f"{out.stem}-front.png")
        drawn = self._draw(picture)
        files.write_json(out, plan.to_spec())
        numbers = out.with_name(f"{out.stem}-report.json")
        found = self._numbers(best, front)
        files.write_json(numbers, found)
        shown = numbers.with_suffix(".html")
        write(shown, gather.page([(numbers.name, records.read(found, numbers.name))]))
        report = out.with_name(f"{out.stem}-report.md")
        files.write_bytes(report, self._markdown(plan, rows, picture if drawn else None).encode())
        return "\n".join(
            [
                table(self._header(), rows),
                "",
                drawing.draw(plan, space.shape, space.tp, f"search, {outcome.rounds} rounds"),
                "",
                f"plan: {out}   report: {report}, {shown.name}"
                + ("" if drawn else "   (no matplotlib: no PNG)"),
            ]
        )

    def _numbers(self, best: Found, front: Sequence[Found]) -> dict[str, Any]:
        outcome, space = self.outcome, self.outcome.space
        search = outcome.search
        return {
            **origin("depthpar"),
            "model": Path(self.model).name,
            **outcome.suite.described(),
            "goal": space.goal.asked,
            "methods": ",".join(space.methods),
            "seed": self.effort.seed,
            "rounds": outcome.rounds,
            "plans_measured": len(search.known),
            "seconds": round(outcome.seconds, 1),
            "unmodified": reported(outcome.unmodified),
            "plan": self._entry(best) | self._quality(best),
            "front": [self._entry(one) | self._quality(one) for one in front],
            "measured": [self._entry(one) for one in search.measured()],
            "alone": [
                {"plan": space.plan((tile,)).name, "layers": list(tile.layers), "kl": value}
                | {"skip": tile.skip, "mode": tile.mode, "without": tile.without}
                for tile, value in search.alone.items()
                if tile.changes
            ],
        }

    def _entry(self, one: Found) -> dict[str, Any]:
        plan = self.outcome.space.plan(one.tiling)
        return {
            "plan": plan.to_spec(),
            "digest": plan.digest,
            "name": plan.name,
            "kind": kind(one.tiling),
            "depth": plan.depth,
            "all_reduces": all_reduces(plan),
            "kl": one.divergence,
            "predicted_speedup": self.outcome.space.speedup(plan),
        }

    def _quality(self, one: Found) -> dict[str, Any]:
        return {"quality": reported(self.outcome.quality(one.tiling))}

    def _header(self) -> list[str]:
        names = [text.name for text in self.outcome.suite.texts]
        speed = ["predicted speed-up"] if self.outcome.space.machine else []
        reductions = ["all-reduces"] if self.outcome.space.tp > 1 else []
        texts = [f"perplexity: {name}" for name in names]
        return ["depth", *reductions, *speed, "KL", *texts, "plan"]

    def _row(self, one: Found) -> list[str]:
        plan = self.outcome.space.plan(one.tiling)
        speed = self.outcome.space.speedup(plan)
        qualities: dict[str, Quality] = self.outcome.quality(one.tiling)
        return [
            str(plan.depth),
            *([str(all_reduces(plan))] if self.outcome.space.tp > 1 else []),
            *([f"{speed:.2f}x"] if speed else []),
            f"{one.divergence:.3f}",
            *(f"{quality.perplexity:.2f}" for quality in qualities.values()),
            json.dumps(changed(plan)),
        ]

    def _markdown(self, plan: Plan, rows: list[list[str]], picture: Path | None) -> str:
        outcome, space = self.outcome, self.outcome.space
        texts = [
            f"- {text.name}: {text.predictions} tokens counted, in {len(text)} windows of "
            f"{text.tokens.shape[1]}"
            + (" (written by the model itself)" if text.name.startswith("own-") else "")
            for text in outcome.suite.texts
        ]
        lines = [
            f"# A plan for {Path(self.model).name}",
            "",
            f"`{json.dumps(plan.to_spec())}`",
            "",
            "```",
            drawing.draw(plan, space.shape, space.tp),
            "```",
            "",
            "## Quality against length",
            "",
            "The best plan measured of each length. KL: mean divergence of the next-token",
            "distribution from the unmodified model's, in nats per token, each text with equal",
            "weight. Layers that run alone are left out; the whole plans are in the JSON.",
            "",
            table(self._header(), rows),
            "",
            *([f"![front]({picture.name})", ""] if picture else []),
            "## How",
            "",
            *texts,
            f"- methods: {','.join(space.methods)}; {len(outcome.search.known)} plans measured "
            f"beside {sum(tile.changes for tile in outcome.search.alone)} single changes; "
            f"{outcome.rounds} rounds; seed {self.effort.seed}; "
            f"{outcome.seconds / 60:.1f} minutes",
            "- the texts were used to choose: measure the plan on others (`depthpar eval`)",
            "",
        ]
        if space.machine:
            place = f"{space.tp} x {space.machine.deployment.device.name}"
            lines += [
                f"Speed-ups are predicted (`depthpar predict`) for {place}, not measured.",
                "",
            ]
        return "\n".join(lines)

    def _draw(self, path: Path) -> bool:
        try:
            from vllm_depthpar.search import plots
        except ImportError:
            return False
        space, search = self.outcome.space, self.outcome.search
        known = [
            (kind(tiling), space.plan(tiling), value) for tiling, value in search.known.items()
        ]
        front = [(space.plan(one.tiling), one.divergence) for one in search.front()]
        speedup = space.speedup if space.machine else None
        plots.front(path, known, front, speedup, reductions=space.goal.all_reduces is not None)
        return True


def changed(plan: Plan) -> dict[str, Any]:
    """Say a plan in few words: blocks of more than one layer, skipped layers, layers by mode."""
    found: dict[str, Any] = {}
    if wide := [list(block) for block in plan.blocks if len(block) > 1]:
        found["blocks"] = wide
    if plan.skipped:
        found["skip"] = list(plan.skipped)
    spec = plan.to_spec()
    return found | {mode: spec[mode] for mode in (*MODES, *HALVES.values()) if mode in spec}
