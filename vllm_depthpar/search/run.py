"""A search from its goal to the best plan, in the rounds and the time that it is given."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from vllm_depthpar.errors import UserError
from vllm_depthpar.plan import Plan
from vllm_depthpar.plan.model_shape import ModelShape
from vllm_depthpar.plan.spec import HALVES, MODES
from vllm_depthpar.search.target import (
    Machine,
    check_all_reduces,
    check_depth,
    check_speedup,
    depths,
    reachable,
    reductions,
)
from vllm_depthpar.search.tiling import Tile, Tiling, candidates, to_plan

if TYPE_CHECKING:
    from vllm_depthpar.evaluate.evaluator import Quality
    from vllm_depthpar.evaluate.suite import Suite
    from vllm_depthpar.search.search import Found, Search

METHODS = ("pair", "group", "skip", *MODES, *HALVES.values())

# Of a text's windows, the share that a change alone is measured on is at least one in so many.
_THIN = 4


@dataclass(frozen=True)
class Goal:
    """What a plan is to reach: one of these.

    Attributes:
        depth: so many blocks.
        speedup: so many times plain vLLM's predicted decoding speed.
        all_reduces: at most so many a forward pass at TP > 1.
        max_ppl_increase: the shortest plan whose perplexity is at most so many percent higher.
    """

    depth: int | None = None
    speedup: float | None = None
    all_reduces: int | None = None
    max_ppl_increase: float | None = None

    @property
    def asked(self) -> dict[str, float]:
        """The one that was asked for, by its name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @property
    def loss_limit(self) -> float:
        """By how much the loss may grow, nats per token."""
        return math.log1p((self.max_ppl_increase or 0) / 100)


@dataclass(frozen=True)
class Space:
    """The plans that a search chooses from, and their lengths.

    Attributes:
        shape: of the model.
        goal: lengths are blocks where that is a depth, all-reduces where it is those, else
            predicted times if there is a machine.
        methods: any of `METHODS`.
        group: layers of the widest group.
        tp: tensor-parallel size, which every block must fit.
        machine: where plans will run, if that is known.
    """

    shape: ModelShape
    goal: Goal
    methods: Sequence[str]
    group: int = 4
    tp: int = 1
    machine: Machine | None = None

    @cached_property
    def lengths(self) -> dict[Tile, int]:
        """What each allowed tile adds to a plan's length."""
        tiles = [
            tile
            for tile in candidates(self.shape.layers, self.methods, self.group)
            if (tile.skip or self.shape.fits(tile.width, self.tp)) and self._leaves_places(tile)
        ]
        if self.goal.all_reduces is not None:
            return reductions(tiles)
        if self.machine is not None and self.goal.depth is None:
            return self.machine.lengths(self.shape, tiles)
        return depths(tiles)

    def _leaves_places(self, tile: Tile) -> bool:
        """Say whether plans of this model can have a tile, whatever others they have: see
        `ModelShape.leaves_places`."""
        # With this layer skipped the next tile would be the first that must be no ladder's.
        if tile.skip and tile.start == self.shape.deepstack and "ladder" in self.methods:
            return False
        plan = to_plan((tile,), self.shape.layers)
        return self.shape.leaves_places(plan.blocks, plan.ladder)

    @cached_property
    def target(self) -> int | None:
        """The length to reach, or None if that is for the search to find out.

        Raises:
            UserError: no plan reaches the goal.
        """
        goal = self.goal
        if goal.depth is not None:
            return check_depth(goal.depth, self.shape.layers, self.lengths, self.methods)
        if goal.all_reduces is not None:
            # The embedding's is no tile's.
            return check_all_reduces(
                goal.all_reduces, self.shape.layers, self.lengths, self.methods
            )
        if goal.speedup is not None and self.machine is not None:
            return check_speedup(goal.speedup, self.shape, self.machine, self.lengths, self.methods)
        if not (goal.max_ppl_increase or 0) > 0:
            raise UserError(
                f"--max-ppl-increase {goal.max_ppl_increase or 0:g} is too small; "
                f"allowed: more than 0"
            )
        return None

    def of_method(self, method: str) -> frozenset[Tile]:
        """List the tiles that one method alone may use."""
        return frozenset(candidates(self.shape.layers, [method], self.group)) & self.lengths.keys()

    def plan(self, tiling: Tiling) -> Plan:
        """Make the plan that a tiling is, for this tensor-parallel size where that matters."""
        plan = to_plan(tiling, self.shape.layers)
        return replace(plan, tp=self.tp) if plan.drop_sync and self.tp > 1 else plan

    def speedup(self, plan: Plan) -> float | None:
        """Predict a plan's speed-up over plain vLLM; None where no machine is known."""
        return self.machine.speedup(self.shape, plan) if self.machine else None


@dataclass(frozen=True)
class Effort:
    """How long to search.

    Attributes:
        rounds: at most.
        proposals: plans of the target's length that a round measures.
        minutes: no round but the first begins that would end later, as rounds have been so far.
        seed: of the draws.
    """

    rounds: int = 6
    proposals: int = 6
    minutes: float = 20
    seed: int = 0


@dataclass
class Outcome:
    """What a search has found so far.

    Attributes:
        unmodified: the model's own quality on each text.
        rounds, seconds: what it has taken.
    """

    space: Space
    suite: Suite
    search: Search
    unmodified: dict[str, Quality]
    rounds: int = 0
    seconds: float = 0.0

    def quality(self, tiling: Tiling) -> dict[str, Quality]:
        """Read the quality of a plan that was measured."""
        return self.suite.measure([self.space.plan(tiling)])[0]

    def increase(self, one: Found) -> float:
        """Compute by how much a plan raises the loss, nats per token."""
        from vllm_depthpar.evaluate.suite import loss

        return loss(self.quality(one.tiling)) - loss(self.unmodified)

    def within_loss(self) -> Found:
        """Find the shortest plan known to keep the loss within the goal's limit."""
        limit = self.space.goal.loss_limit
        return next(one for one in self.search.front() if self.increase(one) <= limit)

    def best(self) -> Found:
        """Find the plan that was asked for.

        Raises:
            UserError: none that was measured reaches the goal.
        """
        if self.space.target is None:
            return self._shortest()
        wanted, known = self.space.goal.speedup, self.search.measured()
        if wanted is None:
            reached = [one for one in known if one.length <= self.space.target]
        else:
            # Lengths are rounded; the prediction is not.
            reached = [one for one in known if self._speedup(one) >= wanted]
        if not reached:
            if wanted is None or not known:
                (goal,) = self.space.goal.asked.items()
                raise UserError(
                    f"no plan that was measured reaches {goal[0]} {goal[1]:g}; allowed: more "
                    f"--rounds, more --minutes"
                )
            most = max(self._speedup(one) for one in known)
            raise UserError(
                f"speed-up {wanted:g} was not reached; allowed: more --rounds, more --minutes, "
                f"nearest: {most:.3f}"
            )
        return min(reached, key=lambda one: one.divergence)

    def _shortest(self) -> Found:
        best, goal = self.within_loss(), self.space.goal
        if not best.tiling:
            least = min((one for one in self.search.front() if one.tiling), key=self.increase)
            raise UserError(
                f"--max-ppl-increase {goal.max_ppl_increase:g} can't be reached; nearest: "
                f"{100 * math.expm1(self.increase(least)):.2f}, with "
                f"{self.space.plan(least.tiling).name}"
            )
        return best

    def _speedup(self, one: Found) -> float:
        return self.space.speedup(self.space.plan(one.tiling)) or 0


def run(space: Space, suite: Suite, effort: Effort, started: float | None = None) -> Outcome:
    """Search for plans: every tile alone, what is published, then rounds.

    Args:
        started: of `time.monotonic`: when the minutes began to count.
    """
    from vllm_depthpar.evaluate.suite import divergence
    from vllm_depthpar.search.baselines import baselines
    from vllm_depthpar.search.search import Search

    started = time.monotonic() if started is None else started
    unmodified = suite.unmodified()
    thin = min(_THIN, *(len(text) for text in suite.texts))

    def measure(plans: Sequence[Plan], rough: bool) -> list[float]:
        what = "Each change alone" if rough else "Plans"
        return [divergence(found) for found in suite.measure(plans, what, thin if rough else 1)]

    layers, methods = space.shape.layers, [space.of_method(method) for method in space.methods]
    search = Search(layers, space.lengths, measure, methods, effort.seed)
    outcome = Outcome(space, suite, search, unmodified)
    search.measure_tiles()
    search.add(baselines(search, layers, space.methods, space.target))
    shortest, longest = reachable(layers, space.lengths)[0], 0.0
    while outcome.rounds < effort.rounds:
        begun = time.monotonic()
        # Without one the costs of changes alone were measured for nothing.
        if outcome.rounds and begun + longest - started > 60 * effort.minutes:
            break
        target = space.target
        if target is None:
            target = outcome.within_loss().length - search.layer
        if not search.round(max(shortest, target), effort.proposals):
            break
        outcome.rounds += 1
        longest = max(longest, time.monotonic() - begun)
    outcome.seconds = time.monotonic() - started
    return outcome
