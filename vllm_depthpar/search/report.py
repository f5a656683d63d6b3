"""What a search found, beside what is published: a plan file, a report for people, the numbers."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_depthpar.errors import UserError
from vllm_depthpar.evaluate.evaluator import Quality
from vllm_depthpar.evaluate.suite import Bench, figures, loss, settings
from vllm_depthpar.plan import Plan, drawing, resolve
from vllm_depthpar.plan.model_shape import ModelShape
from vllm_depthpar.search.search import Found, Search
from vllm_depthpar.search.target import Machine
from vllm_depthpar.search.tiling import Tile, Tiling, plan_of
from vllm_depthpar.util import files
from vllm_depthpar.util.markdown import table
from vllm_depthpar.util.provenance import origin

# Of each length, how many contiguous spans to measure.
_SPANS = 2


def baselines(
    search: Search, layers: int, methods: Sequence[str], target: int | None
) -> list[Tiling]:
    """The published ways to each length down to the target's: spans of pairs, balanced skipping.

    Of the spans of each length, those whose pairs cost least alone (arXiv 2502.02790 sweeps them
    all; Unified Layer Skipping is arXiv 2404.06954). They are known to the search, too.
    """
    found: list[Tiling] = []
    least = target if target is not None else (layers * 3 // 4) * search.layer
    for count in range(1, layers // 2):
        if "pair" in methods:
            spans = [
                tuple(Tile(start + 2 * at, 2) for at in range(count))
                for start in range(layers - 2 * count + 1)
            ]
            spans = [span for span in spans if search.length(span) >= least]
            spans.sort(key=lambda span: sum(search.alone[tile] for tile in span))
            found += spans[:_SPANS]
        if "skip" in methods:
            plan = resolve({"skip": {"speedup": layers / (layers - count)}}, layers)
            row = tuple(Tile(layer, skip=True) for layer in plan.skipped)
            if search.length(row) >= least:
                found.append(row)
    return found


def kind(tiling: Tiling) -> str:
    """What a plan is made of: "span", "balanced skipping" or "found"."""
    starts = [tile.start for tile in tiling]
    if all(tile.width == 2 and not tile.ladder for tile in tiling) and starts == list(
        range(starts[0], starts[0] + 2 * len(starts), 2)
    ):
        return "span of pairs"
    return "skipping" if all(tile.skip for tile in tiling) else "found"


@dataclass
class SearchReport:
    """Everything a report says.

    Attributes:
        unmodified: the model's own quality on each text.
        machine: where plans will run, if that is known.
        limit: by how much the loss may grow, nats per token, if that is the goal.
        rounds, seconds: what the search has taken.
    """

    args: argparse.Namespace
    shape: ModelShape
    search: Search
    bench: Bench
    unmodified: dict[str, Quality]
    machine: Machine | None
    limit: float
    rounds: int = 0
    seconds: float = 0.0

    def within_loss(self) -> Found:
        """The shortest plan known to keep the loss within the limit."""
        front = self.search.front()
        return next(one for one in front if self._increase(one) <= self.limit)

    def _increase(self, one: Found) -> float:
        return loss(self._quality(self._plan(one.tiling))) - loss(self.unmodified)

    def _best(self, target: int | None) -> Found:
        """The plan that was asked for.

        Raises:
            UserError: none that was measured reaches the goal.
        """
        front = self.search.front()
        if target is None:
            best = self.within_loss()
            if not best.tiling:
                least = min((one for one in front if one.tiling), key=self._increase)
                raise UserError(
                    f"--max-ppl-increase {self.args.max_ppl_increase:g} can't be reached; "
                    f"nearest: {100 * math.expm1(self._increase(least)):.2f}, with "
                    f"{self._plan(least.tiling).name}"
                )
            return best
        known = self.search.measured()
        wanted = self.args.speedup
        reached = [
            one
            for one in known
            if (
                one.length <= target
                if wanted is None
                # Lengths are rounded; the prediction is not.
                else (self._speedup(self._plan(one.tiling)) or 0) >= wanted
            )
        ]
        if not reached:
            most = max(self._speedup(self._plan(one.tiling)) or 0 for one in known)
            raise UserError(f"speed-up {wanted:g} was not reached; nearest: {most:.2f}")
        return min(reached, key=lambda one: one.divergence)

    def write(self, target: int | None) -> str:
        """Write the plan, the report and the numbers; returns a summary for the terminal.

        Args:
            target: the length that was asked for; None if the loss was.

        Raises:
            UserError: the goal was not reached.
        """
        out: Path = self.args.out
        best = self._best(target)
        front = self.search.front()
        plan = self._plan(best.tiling)
        rows = self._rows(front)
        figure = out.with_name(f"{out.stem}-front.png")
        drawn = self._draw(figure)
        numbers = {
            **origin("depthpar"),
            "model": Path(self.args.model).name,
            **settings(self.bench.domains, self.bench.evaluator),
            "goal": {
                name: getattr(self.args, name)
                for name in ("depth", "speedup", "max_ppl_increase")
                if getattr(self.args, name) is not None
            },
            "methods": self.args.methods,
            "seed": self.args.seed,
            "rounds": self.rounds,
            "plans_measured": len(self.search.known),
            "seconds": round(self.seconds, 1),
            "unmodified": figures(self.unmodified),
            "plan": self._entry(best),
            "front": [self._entry(one) for one in front],
            "measured": [self._entry(one, with_quality=False) for one in self.search.measured()],
            "alone": [
                {"plan": self._plan((tile,)).name, "layers": list(tile.layers), "kl": value}
                | {"skip": tile.skip, "ladder": tile.ladder}
                for tile, value in self.search.alone.items()
                if tile.changes
            ],
        }
        files.write_json(out, plan.to_spec())
        files.write_json(out.with_name(f"{out.stem}-report.json"), numbers)
        report = out.with_name(f"{out.stem}-report.md")
        files.write_bytes(report, self._markdown(plan, rows, figure if drawn else None).encode())
        return "\n".join(
            [
                table(self._header(), rows),
                "",
                drawing.draw(plan, self.shape, self.args.tp, f"search, {self.rounds} rounds"),
                "",
                f"plan: {out}   report: {report}" + ("" if drawn else "   (no matplotlib: no PNG)"),
            ]
        )

    def _plan(self, tiling: Tiling) -> Plan:
        return plan_of(tiling, self.shape.layers)

    def _speedup(self, plan: Plan) -> float | None:
        return self.machine.speedup(self.shape, plan) if self.machine else None

    def _entry(self, one: Found, with_quality: bool = True) -> dict[str, Any]:
        plan = self._plan(one.tiling)
        return {
            "plan": plan.to_spec(),
            "digest": plan.digest,
            "name": plan.name,
            "kind": kind(one.tiling) if one.tiling else "unmodified",
            "depth": plan.depth,
            "kl": one.divergence,
            "predicted_speedup": self._speedup(plan),
        } | ({"quality": figures(self._quality(plan))} if with_quality else {})

    def _quality(self, plan: Plan) -> dict[str, Quality]:
        """From the journal: every plan that is known was measured."""
        return self.bench.measure([plan])[0]

    def _header(self) -> list[str]:
        names = [domain.name for domain in self.bench.domains]
        speed = ["predicted speed-up"] if self.machine else []
        return ["depth", *speed, "KL", *(f"perplexity: {name}" for name in names), "plan"]

    def _rows(self, front: Sequence[Found]) -> list[list[str]]:
        found = []
        plans = [self._plan(one.tiling) for one in front]
        for one, plan, of_domain in zip(front, plans, self.bench.measure(plans), strict=True):
            speed = self._speedup(plan)
            short = json.dumps(changed(plan))
            found.append(
                [
                    str(plan.depth),
                    *([f"{speed:.2f}x"] if speed else []),
                    f"{one.divergence:.3f}",
                    *(f"{quality.perplexity:.2f}" for quality in of_domain.values()),
                    short,
                ]
            )
        return found

    def _markdown(self, plan: Plan, rows: list[list[str]], figure: Path | None) -> str:
        own = [one.name for one in self.bench.domains if one.name.startswith("own-")]
        texts = [
            f"- {one.name}: {one.predictions} tokens counted, in {len(one)} windows of "
            f"{one.tokens.shape[1]}" + (" (written by the model itself)" if one.name in own else "")
            for one in self.bench.domains
        ]
        lines = [
            f"# A plan for {Path(self.args.model).name}",
            "",
            f"`{json.dumps(plan.to_spec())}`",
            "",
            "```",
            drawing.draw(plan, self.shape, self.args.tp),
            "```",
            "",
            "## Quality against depth",
            "",
            "The best plan measured of each length. KL: mean divergence of the next-token",
            "distribution from the unmodified model's, in nats per token, each text with equal",
            "weight. Layers that run alone are left out; the whole plans are in the JSON.",
            "",
            table(self._header(), rows),
            "",
            *([f"![front]({figure.name})", ""] if figure else []),
            "## How",
            "",
            *texts,
            f"- methods: {self.args.methods}; {len(self.search.known)} plans measured beside "
            f"{sum(tile.changes for tile in self.search.alone)} single changes; "
            f"{self.rounds} rounds; seed {self.args.seed}; {self.seconds / 60:.1f} minutes",
            "- the texts were used to choose: measure the plan on others (`depthpar eval`)",
            "",
        ]
        if self.machine:
            place = f"{self.args.tp} x {self.machine.device.name}"
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
        known = [
            (kind(tiling), self._plan(tiling), value) for tiling, value in self.search.known.items()
        ]
        front = [(self._plan(one.tiling), one.divergence) for one in self.search.front()]
        plots.front(path, known, front, self._speedup if self.machine else None)
        return True


def changed(plan: Plan) -> dict[str, Any]:
    """A plan in few words: blocks of more than one layer, skipped layers, ladder layers."""
    found: dict[str, Any] = {}
    if wide := [list(block) for block in plan.blocks if len(block) > 1]:
        found["blocks"] = wide
    if plan.skipped:
        found["skip"] = list(plan.skipped)
    if plan.ladder:
        found["ladder"] = plan.to_spec()["ladder"]
    return found
