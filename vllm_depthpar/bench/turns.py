"""Variants that take turns under loads, round after round, and what they found kept after each.

They are alive at once and run one at a time, or are started anew for each of their turns. What
fails is named, with the end of its log.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from typing import Any, Protocol, TypeVar

from vllm_depthpar.bench.rounds import Pausable, awake, in_turn, pause
from vllm_depthpar.errors import UserError
from vllm_depthpar.launch.engine import EngineError
from vllm_depthpar.util import progress

# {variant's label: {load's key: {figure: value}}}
Round = dict[str, dict[str, dict[str, float]]]


class Labelled(Protocol):
    """One row of a comparison."""

    @property
    def label(self) -> str:
        """As the user gave it."""


class Keyed(Protocol):
    """One thing to measure."""

    @property
    def key(self) -> str:
        """Names it in a record."""


class Running(Pausable, Protocol):
    """The processes of a variant."""

    def end_of_log(self) -> str:
        """Show what they have written last."""

    def stop(self) -> None:
        """End them."""


V = TypeVar("V", bound=Labelled)
VariantT = TypeVar("VariantT", bound=Labelled, contravariant=True)
LoadT = TypeVar("LoadT", bound=Keyed, contravariant=True)
L = TypeVar("L", bound=Keyed)
R = TypeVar("R", bound=Running)


class Stage(Protocol[VariantT, LoadT, R]):
    """One way to run variants."""

    def start(self, variant: VariantT, stack: ExitStack, /) -> tuple[R, dict[str, Any]]:
        """Start one until it is ready; `stack` stops it. Also what the start took: `started`."""

    def measure(self, running: R, load: LoadT, seed: int, /) -> dict[str, float]:
        """Put a load on one: its figures.

        Raises:
            RuntimeError: it did not bear it.
        """


@contextmanager
def named(what: str, running: Running | None = None) -> Iterator[None]:
    """Say what failed.

    Raises:
        UserError: it raised a RuntimeError; the message names it, and ends with the log of what was
            `running`.
    """
    try:
        yield
    except RuntimeError as error:
        message = f"{what}: {error}"
        if running is not None and not isinstance(error, EngineError):  # which has its log
            message += f"\n{running.end_of_log()}"
        raise UserError(message) from error


class Steps:
    """A bar of steps; `Steps.doing` is one.

    Args:
        where: said before what is done.
        advance: called with what is done, and by how many steps the bar grows.
    """

    def __init__(self, where: str, advance: Callable[[str, int], None]) -> None:
        self._where, self._advance = where, advance

    @contextmanager
    def doing(self, what: str, running: Running | None = None) -> Iterator[None]:
        """Show what is being done; raises as `named`."""
        what = f"{self._where}: {what}" if self._where else what
        self._advance(what, 0)
        with named(what, running):
            yield
        self._advance(what, 1)


@contextmanager
def steps(total: int, where: str = "") -> Iterator[Steps]:
    """Draw a bar for so many steps; none without a terminal. Args: see `Steps`."""
    with progress.step_bar() as bar:
        task = bar.add_task("", total=total)
        yield Steps(where, lambda what, by: bar.update(task, description=what, advance=by))


def count(variants: int, loads: int, rounds: int, one_at_a_time: bool = False) -> int:
    """Count the steps of `take`, where so many rounds are missing."""
    if rounds <= 0:
        return 0
    return variants * (rounds * (1 + 2 * loads) if one_at_a_time else 1 + (1 + rounds) * loads)


def take(
    stage: Stage[V, L, R],
    variants: Sequence[V],
    loads: Sequence[L],
    known: dict[str, Any],
    rounds: int,
    save: Callable[[], None],
    steps: Steps,
    *,
    alone: bool,
    one_at_a_time: bool = False,
) -> None:
    """Measure what is missing to so many rounds.

    Args:
        known: JSON-ready, `starts` and `rounds` (see `Round`); grows.
        save: called after every round.
        alone: let only the one that is measured run.
        one_at_a_time: start each variant for each of its turns.

    Raises:
        UserError: a variant did not start, or failed.
    """
    numbers = range(len(known["rounds"]), rounds)
    if not numbers:
        return
    if one_at_a_time:
        played = _one_at_a_time(stage, variants, loads, numbers, known["starts"], steps)
    else:
        played = _at_once(stage, variants, loads, numbers, known["starts"], steps, alone)
    with closing(played):
        for found in played:
            known["rounds"].append(found)
            save()


def _at_once(
    stage: Stage[V, L, R],
    variants: Sequence[V],
    loads: Sequence[L],
    numbers: range,
    starts: list[dict[str, Any]],
    steps: Steps,
    alone: bool,
) -> Generator[Round, None, None]:
    """Go through the rounds of these numbers, and one before them that does not count."""
    with ExitStack() as stack:
        running: list[tuple[str, R]] = []
        for one in variants:
            with steps.doing(f"starting {one.label}"):
                process, took = stage.start(one, stack)
            starts.append({"label": one.label, **took})
            running.append((one.label, process))
            if alone:
                pause(process)
        for number in (numbers.start - 1, *numbers):
            found: Round = {one.label: {} for one in variants}
            for load in loads:
                for label, process in in_turn(running, number):
                    running_alone = awake(process) if alone else nullcontext()
                    with steps.doing(f"{label}: {load.key}", process), running_alone:
                        found[label][load.key] = stage.measure(process, load, number + 1)
            if number in numbers:
                yield found


def _one_at_a_time(
    stage: Stage[V, L, R],
    variants: Sequence[V],
    loads: Sequence[L],
    numbers: range,
    starts: list[dict[str, Any]],
    steps: Steps,
) -> Generator[Round, None, None]:
    """Go through the rounds of these numbers; what is started runs the loads once uncounted."""
    for number in numbers:
        found: Round = {one.label: {} for one in variants}
        for one in in_turn(variants, number):
            with ExitStack() as stack:
                with steps.doing(f"starting {one.label}"):
                    process, took = stage.start(one, stack)
                starts.append({"label": one.label, **took})
                for seed in (0, number + 1):
                    for load in loads:
                        with steps.doing(f"{one.label}: {load.key}", process):
                            found[one.label][load.key] = stage.measure(process, load, seed)
        yield found
