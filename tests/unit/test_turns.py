"""Turns of a comparison with real processes, but for vLLM: what is kept, and what an error says."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from vllm_depthpar.bench import turns
from vllm_depthpar.bench.record import go_on, timed
from vllm_depthpar.errors import UserError
from vllm_depthpar.launch.engine import Worker
from vllm_depthpar.util import files


@dataclass(frozen=True)
class Named:
    """A variant, and a load."""

    label: str

    @property
    def key(self) -> str:
        return self.label


@dataclass
class Adders:
    """A process for each variant, which answers with what it was asked plus its length."""

    asked: list[tuple[str, str, int]]
    fails_at: int | None = None

    def start(self, variant: Named, stack: ExitStack) -> tuple[Worker, dict[str, Any]]:
        worker = Worker(variant.label, answer, len(variant.label), self.fails_at)
        stack.callback(worker.stop)
        return worker, {"ready": worker.receive()}

    def measure(self, running: Worker, load: Named, seed: int) -> dict[str, float]:
        self.asked.append((running.label, load.label, seed))
        return {"sum": running.ask(seed)}


def answer(connection: Connection, more: int, fails_at: int | None) -> None:
    connection.send("ready")
    while True:
        try:
            asked = connection.recv()
        except EOFError:
            return
        print("asked for", asked, flush=True)
        connection.send(RuntimeError("too much") if asked == fails_at else asked + more)


A, BB = Named("a"), Named("bb")
ONE, TWO = Named("one"), Named("two")


def take(stage: Adders, known: dict[str, Any], rounds: int, **more: Any) -> list[str]:
    """Take turns; returns the record as it was saved each time."""
    saved: list[str] = []

    def save() -> None:
        saved.append(json.dumps(known))

    with turns.steps(0, "here") as steps:
        more = {"alone": True, **more}
        turns.take(stage, [A, BB], [ONE, TWO], known, rounds, save, steps, **more)
    return saved


def test_every_round_is_kept_and_a_later_run_goes_on() -> None:
    known: dict[str, Any] = {"starts": [], "rounds": []}
    first = Adders([])
    saved = take(first, known, 2)
    assert [len(json.loads(one)["rounds"]) for one in saved] == [1, 2]
    assert known["starts"] == [{"label": label, "ready": "ready"} for label in ("a", "bb")]
    assert known["rounds"][1] == {
        "a": {"one": {"sum": 3}, "two": {"sum": 3}},
        "bb": {"one": {"sum": 4}, "two": {"sum": 4}},
    }
    # A round that does not count, then A B and B A, load by load.
    warm = [(label, load, 0) for load in ("one", "two") for label in ("a", "bb")]
    counted = [(label, load, 1) for load in ("one", "two") for label in ("a", "bb")]
    turned = [(label, load, 2) for load in ("one", "two") for label in ("bb", "a")]
    assert first.asked == warm + counted + turned

    before, later = json.loads(saved[-1])["rounds"], Adders([])
    assert len(take(later, known, 3)) == 1
    assert known["rounds"][:2] == before
    third = [(label, load, 3) for load in ("one", "two") for label in ("a", "bb")]
    assert later.asked[-4:] == third
    assert take(Adders([]), known, 3) == [], "all are there"
    assert len(later.asked) + len(first.asked) == 3 * 4 + 2 * 4


def test_one_at_a_time_each_start_goes_through_all_loads_before_it_counts() -> None:
    known: dict[str, Any] = {"starts": [], "rounds": []}
    stage = Adders([])
    take(stage, known, 1, one_at_a_time=True)
    loads = [(load, seed) for seed in (0, 1) for load in ("one", "two")]
    assert stage.asked == [(label, *load) for label in ("a", "bb") for load in loads]
    assert known["rounds"] == [
        {"a": {"one": {"sum": 2}, "two": {"sum": 2}}, "bb": {"one": {"sum": 3}, "two": {"sum": 3}}}
    ]


def test_an_error_names_who_and_ends_with_the_log_and_rounds_stay() -> None:
    known: dict[str, Any] = {"starts": [], "rounds": []}
    with pytest.raises(UserError) as caught:
        take(Adders([], fails_at=2), known, 3)
    assert str(caught.value) == "here: bb: one: too much\nasked for 0\n" + "\n".join(
        ["asked for 0", "asked for 1", "asked for 1", "asked for 2"]
    )
    assert len(known["rounds"]) == 1


def test_an_error_at_the_start_names_who() -> None:
    class Ending(Adders):
        def start(self, variant: Named, stack: ExitStack) -> tuple[Worker, dict[str, Any]]:
            worker = Worker(variant.label, end)
            stack.callback(worker.stop)
            return worker, worker.receive()

    known: dict[str, Any] = {"starts": [], "rounds": []}
    with pytest.raises(UserError) as caught:
        take(Ending([]), known, 1)
    assert str(caught.value) == "here: starting a: the engine of a ended:\nno memory left"


def end(_: Connection) -> None:
    print("no memory left", flush=True)
    raise SystemExit(1)


@pytest.mark.parametrize(("one_at_a_time", "steps"), [(False, 2 * (1 + 4 * 2)), (True, 2 * 3 * 5)])
def test_steps_are_counted(one_at_a_time: bool, steps: int) -> None:
    assert turns.count(2, 2, 3, one_at_a_time) == steps
    assert turns.count(2, 2, 0, one_at_a_time) == 0


def test_a_record_goes_on_with_the_same_settings_only(tmp_path: Path) -> None:
    out, fresh = tmp_path / "out.json", {"settings": {"tp": 2}, "rounds": [], "seconds": 0.0}
    record = go_on(fresh, out, "a.py", ("rounds", "seconds"))
    assert record == fresh
    record["rounds"].append(1)
    timed(record, lambda: files.write_json(out, record))()
    assert record["seconds"] > 0
    assert go_on(fresh, out, "a.py", ("rounds", "seconds")) == record
    with pytest.raises(
        UserError, match=r"out.json has rounds of other settings \(tp: 2, not 3\); al"
    ):
        go_on({**fresh, "settings": {"tp": 3}}, out, "a.py", ("rounds",))
    other = r"out.json is not a file of a.py; allowed: another --out"
    broken = r"out.json can't be read \(.*\); allowed: a file of a.py, or another --out"
    for content, words in {
        '{"settings": {}}': other,
        '{"settings": {}, "rounds": 3}': other,
        "[]": other,
        "{": broken,
    }.items():
        out.write_text(content)
        with pytest.raises(UserError, match=words):
            go_on(fresh, out, "a.py", ("rounds",))
        assert out.read_text() == content
