"""Commands on disks that are full or read-only: one line, before the work if it can be known."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from disks import disk
from fork_server import forked_engines
from models import write_llama, write_tokenizer

from vllm_depthpar.checkpoint import bundled
from vllm_depthpar.cli.main import main
from vllm_depthpar.errors import UserError
from vllm_depthpar.evaluate import lm_eval_tasks

pytestmark = pytest.mark.usefixtures("own_cache")

PAIRS = '{"pair": [2, 6]}'
# What each command needs beside MODEL and --out.
COMMANDS = {
    "eval": ["--text", "TEXT", "--window", "64", "--tokens", "126"],
    "study": ["--text", "TEXT", "--window", "64", "--tokens", "126", "--transformations", "prune"],
    "search": [
        *("--text", "TEXT", "--own-text", "0", "--window", "64", "--tokens", "126"),
        *("--depth", "5", "--methods", "pair", "--rounds", "0"),
    ],
    "export": ["--plan", PAIRS],
    "recover": ["--plan", PAIRS, "--text", "TEXT", "--window", "64"],
    "verify": [],
    "bench": [],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(write_llama(tmp_path_factory.mktemp("llama"), layers=6), bos=True)


def words(command: str, model: Path, text: Path, out: Path) -> list[str]:
    more = [str(text) if word == "TEXT" else word for word in COMMANDS[command]]
    return [command, str(model), *more, "--out", str(out)]


def one_line(capsys: pytest.CaptureFixture[str], code: int) -> str:
    """The error that a command ended in."""
    assert code == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("depthpar: error: ")
    assert "; allowed: " in line
    return line


def name(command: str) -> str:
    return "out" if command in ("export", "recover") else "out.json"


@pytest.mark.parametrize("command", COMMANDS)
def test_out_is_checked_before_work_begins(
    command: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the model is so much as looked at: there is none."""
    nothing, file = tmp_path / "nowhere", tmp_path / "file"
    file.write_text("")
    with disk(tmp_path / "disk", 1 << 20, read_only=True) as read_only:
        for out, reason in (
            (file / name(command), f"{file} is not a folder"),
            (read_only / name(command), "can't be written to"),
            (read_only / "new" / name(command), "can't be written to"),
        ):
            line = one_line(capsys, main(words(command, nothing, text, out)))
            assert reason in line
    if command not in ("export", "recover"):
        (tmp_path / "out.json").mkdir()
        line = one_line(capsys, main(words(command, nothing, text, tmp_path / "out.json")))
        assert "is a folder; allowed: a file" in line
    else:
        line = one_line(capsys, main(words(command, nothing, text, file)))
        assert "is there already; allowed: a folder that is new or empty" in line


@pytest.mark.parametrize("command", ["export", "recover"])
def test_out_on_which_a_disk_is_mounted(
    command: str, model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a container's volume is: it can't be exchanged for what was made beside it."""
    with disk(tmp_path / "disk", 1 << 24) as volume:
        line = one_line(capsys, main(words(command, tmp_path / "nowhere", text, volume)))
        assert line.endswith("is where a disk is mounted; allowed: a folder on it")
        assert main(words("export", model, text, volume / "out")) == 0


@pytest.mark.parametrize("command", ["eval", "study", "search", "export"])
def test_full_out(
    command: str, model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found when it is written; nothing half written is left."""
    with disk(tmp_path / "disk", 4096) as full:
        (full / "other").write_bytes(bytes(4096))
        line = one_line(capsys, main(words(command, model, text, full / name(command))))
        assert "can't be written (" in line
        assert "No space left on device" in line
        assert [path.name for path in full.iterdir()] == ["other"]


@pytest.mark.parametrize("kilobytes", [1, 64, 200, 1200, 2600])
def test_recover_on_a_disk_that_fills_up(
    kilobytes: int, model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At whatever of its files: the same command goes on when there is space."""
    more = ["--refit", "1024", "--tokens", "2048", "--evaluations", "2"]
    with disk(tmp_path / "disk", 1 << 26) as space:
        command = [*words("recover", model, text, space / "out"), *more]
        left = os.statvfs(space)
        (space / "other").write_bytes(bytes(left.f_bavail * left.f_frsize - (kilobytes << 10)))
        line = one_line(capsys, main(command))
        assert "can't be written (" in line
        (space / "other").unlink()
        assert main(command) == 0
        assert [path.name for path in space.iterdir()] == ["out"]


@pytest.mark.parametrize("command", ["eval", "study", "search"])
@pytest.mark.parametrize("read_only", [False, True], ids=["full", "read-only"])
def test_cache(
    command: str,
    read_only: bool,
    model: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with disk(tmp_path / "disk", 4096, read_only) as cache:
        monkeypatch.setenv("DEPTHPAR_CACHE", str(cache / "depthpar"))
        if not read_only:
            (cache / "other").write_bytes(bytes(4096))
        line = one_line(capsys, main(words(command, model, text, tmp_path / "out.json")))
        assert ".jsonl can't be written (" in line
        assert "DEPTHPAR_CACHE=FOLDER" in line
    assert not (tmp_path / "out.json").exists()


def test_text_that_cannot_be_kept(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found before an engine starts."""
    own = ["search", model, "--depth", 5, "--methods", "pair", "--tokens", 256, "--window", 64]
    with disk(tmp_path / "disk", 4096, read_only=True) as cache:
        monkeypatch.setenv("DEPTHPAR_CACHE", str(cache))
        code = main([*map(str, own), "--out", str(tmp_path / "out.json")])
        line = one_line(capsys, code)
    assert f"{cache} can't be written to; allowed: " in line
    assert "DEPTHPAR_CACHE=FOLDER" in line


def test_text_on_a_full_disk(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's process ends with it; its line is what is shown."""
    own = ["search", model, "--depth", 5, "--methods", "pair", "--tokens", 256, "--window", 64]
    with disk(tmp_path / "disk", 4096) as cache, forked_engines():
        (cache / "other").write_bytes(bytes(4096))
        monkeypatch.setenv("DEPTHPAR_CACHE", str(cache))
        code = main([*map(str, own), "--out", str(tmp_path / "out.json")])
        line = one_line(capsys, code)
    assert f"vLLM could not write text with '{model}': {cache}" in line
    assert ".jsonl can't be written (No space left on device); allowed: " in line


@pytest.mark.parametrize("size", [4096, 1 << 20, 6 << 20])
def test_bundled_model_on_a_small_disk(
    size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with disk(tmp_path / "disk", size) as cache:
        monkeypatch.setenv("DEPTHPAR_CACHE", str(cache / "depthpar"))
        line = one_line(capsys, main(["bundled"]))
    assert f"{bundled.NAME} can't be written (" in line


@pytest.mark.parametrize("content", [b"junk" * 1000, b"SQLite format 3\0" + bytes(5000)])
def test_answers_that_cannot_be_read(content: bytes, tmp_path: Path) -> None:
    answers = tmp_path / "answers.sqlite"
    answers.write_bytes(content)
    line = r"answers can't be kept in .* \(.*\); allowed: a file"
    with pytest.raises(UserError, match=line), lm_eval_tasks.keeping(answers):
        pass


@pytest.mark.parametrize("read_only", [False, True], ids=["full", "read-only"])
def test_answers_that_cannot_be_written(read_only: bool, tmp_path: Path) -> None:
    from sqlitedict import SqliteDict

    with disk(tmp_path / "disk", 1 << 16, read_only) as place:
        answers = place / "new" / "answers.sqlite"

        def keep() -> None:
            with lm_eval_tasks.keeping(answers):
                known = SqliteDict(str(answers), autocommit=True)
                for number in range(1000):
                    known[number] = "answer" * 100
                known.commit()

        with pytest.raises(UserError, match=r"answers\.sqlite .*; allowed: .*, with space"):
            keep()


def test_a_plan_on_a_full_disk_is_not_half_written(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was there before stays."""
    with disk(tmp_path / "disk", 1 << 20) as space:
        out = space / "out.json"
        assert main(words("search", model, text, out)) == 0
        plan, left = out.read_bytes(), os.statvfs(space)
        (space / "other").write_bytes(bytes(left.f_bavail * left.f_frsize))
        assert "No space left" in one_line(capsys, main(words("search", model, text, out)))
        assert out.read_bytes() == plan
        assert json.loads((space / "out-report.json").read_text())["plan"]["depth"] == 5
