"""A command that was killed at any moment: the next one gives what an undisturbed one gives.

`pytest tests/e2e/test_killed.py --kills 30` for more tries, and for a third as many with text that
the model writes, which need an engine each.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import killed_commands
import pytest
from models import write_llama, write_tokenizer
from texts import TEXTS

# Of a report, what is of the day it was made.
OF_THE_DAY = {"date", "command", "seconds"}
COMMANDS = {
    "eval": [
        *("--text", "TEXT", "--window", "64"),
        *("--plan", "plain", "--plan", "auto", "--plan", '{"pair": [2, 6]}'),
        *("--plan", '{"ladder": 4}', "--plan", '{"skip": {"speedup": 1.6}}'),
    ],
    "search": [
        *("--depth", "6", "--text", "TEXT", "--own-text", "0", "--window", "64"),
        *("--tokens", "1024", "--methods", "pair,skip,ladder", "--rounds", "2"),
    ],
    "search on own text": ["--depth", "6", "--window", "64", "--tokens", "1024", "--rounds", "1"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_llama(tmp_path_factory.mktemp("llama"), layers=8)
    return write_tokenizer(folder, bos=True, chat=True)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(TEXTS))
    return path


def result(out: Path) -> dict[str, Any]:
    """What a command has written, but for what is of the day."""
    found: dict[str, Any] = {"out": json.loads(out.read_text())}
    if (report := out.with_name(f"{out.stem}-report.json")).exists():
        found["report"] = json.loads(report.read_text())
        picture = out.with_name(f"{out.stem}-front.png").read_bytes()
        found["markdown"] = len(out.with_name(f"{out.stem}-report.md").read_text()) > 0
        page = out.with_name(f"{out.stem}-report.html").read_text()
        found["page"] = page.endswith("</html>\n")
        found["picture"] = picture.startswith(b"\x89PNG")
    return {key: _timeless(value) for key, value in found.items()}


def _timeless(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _timeless(one) for key, one in value.items() if key not in OF_THE_DAY}


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_any_moment(
    name: str, model: Path, text: Path, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    kills = pytestconfig.getoption("--kills")
    if "own text" in name:
        kills //= 3
        if kills < 3:
            pytest.skip("an engine for every try: with --kills of 9 or more only")
    more = [str(text) if word == "TEXT" else word for word in COMMANDS[name]]
    words = [name.partition(" ")[0], str(model), *more, "--out"]

    def run(number: int) -> tuple[list[str], dict[str, str], Path]:
        folder = tmp_path / f"{number}"
        folder.mkdir()
        env = {"DEPTHPAR_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        return [*words, str(folder / "out" / "out.json")], env, folder / "log"

    killed_commands.finish(["plan", "schema"], {}, tmp_path / "log")  # imports are no moment of it
    command, env, log = run(0)
    seconds = killed_commands.finish(command, env, log)
    undisturbed = result(Path(command[-1]))
    moments, killed, latest = random.Random(name), 0, seconds
    for number in range(1, kills + 1):
        command, env, log = run(number)
        # One that goes on may be killed, too.
        while True:
            process = killed_commands.start(command, env, log)
            if killed_commands.kill_after(process, moments.uniform(0, latest)):
                killed += 1
            else:
                latest *= 0.8  # faster than when it was timed: other moments
            if moments.random() < 0.5:
                break
        killed_commands.finish(command, env, log)
        assert result(Path(command[-1])) == undisturbed
    assert killed >= kills / 2
    print(f"{name}: {kills} results alike, {killed} kills, {seconds:.1f} s undisturbed")
