"""Files at the edge: names from data, whole or not at all, one command at a time, one line."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_depthpar.cli.types import out_file, out_folder, path_or_name
from vllm_depthpar.errors import UserError
from vllm_depthpar.util import files
from vllm_depthpar.util.result_cache import Journal

HOLD = """
import sys, time
from pathlib import Path
from vllm_depthpar.util import files
with files.only_one(Path(sys.argv[1]), "busy"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("name", ["model.safetensors", "a b", "..x", "ü", "x" * 255, "-", "~"])
def test_names_of_a_folder(tmp_path: Path, name: str) -> None:
    assert files.inside(tmp_path, name, "the index") == tmp_path / name


@pytest.mark.parametrize(
    "name",
    [
        *("../x", "/etc/x", "a/../../x", "a/x", "./x", "", ".", "..", "a\0", "\0", "x/", "\ud800"),
        *(None, 3, True, ["x"], {"x": 1}),
    ],
)
def test_names_that_lead_elsewhere(tmp_path: Path, name: object) -> None:
    with pytest.raises(UserError, match=r"^the index names .*; allowed: ") as raised:
        files.inside(tmp_path, name, "the index")
    assert "\n" not in str(raised.value)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    files.write_bytes(path, b"one")
    files.write_bytes(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(UserError, match=r"can't be written \(.*\); allowed: a place that can be"):
        files.write_bytes(path / "below", b"")
    with pytest.raises(UserError, match="Is a directory"):
        files.write_bytes(tmp_path, b"")
    assert path.read_bytes() == b"two"


def test_what_is_no_file_is_written_to(tmp_path: Path) -> None:
    """As /dev/stdout: a file in its place would be the end of it."""
    pipe, full = tmp_path / "pipe", tmp_path / "full"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    files.write_bytes(pipe, b"content")
    assert os.read(reader, 100) == b"content"
    os.close(reader)
    assert pipe.is_fifo()
    full.symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"full can't be written \(No space left on device\); "):
        files.write_bytes(full, b"content")
    assert full.is_char_device()


def test_reading(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for content, reason in (
        (b'{"a": ', "line 1 column 7: Expecting value"),
        (b"\xff", "not UTF-8 text"),
        (b"[" * 100_000, "nested too deeply"),
        (b"1" * 5000, "a number is too long"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError) as raised:
            files.read_json(path, "JSON")
        assert str(raised.value) == f"{path} can't be read ({reason}); allowed: JSON"
    path.unlink()
    with pytest.raises(UserError, match=r"can't be read \(No such file or directory\); allowed: J"):
        files.read_json(path, "JSON")
    os.mkfifo(path)  # which would be waited for
    with pytest.raises(UserError, match=r"is not a file; allowed: JSON"):
        files.read_json(path, "JSON")


def test_one_holds_a_lock(tmp_path: Path) -> None:
    """Until it ends, however it does; and no file is left by one that ends well."""
    path = tmp_path / "new" / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=r"^busy$"), files.only_one(path, "busy"):
            pass
        holder.kill()
    assert path.exists()
    with files.only_one(path, "busy"):
        with pytest.raises(UserError, match=r"^busy$"), files.only_one(path, "busy"):
            pass
        assert path.exists()
    assert not path.exists()
    target = tmp_path / "elsewhere"
    path.symlink_to(target)
    with pytest.raises(UserError, match=r"can't be written"), files.only_one(path, "busy"):
        pass
    assert not target.exists()


def test_a_lock_is_held_by_one_of_many(tmp_path: Path) -> None:
    """Each enters alone, while others come and go: what it counts nobody else has changed."""
    path, count = tmp_path / "lock", tmp_path / "count"
    count.write_text("0")
    program = """
import sys, time
from pathlib import Path
from vllm_depthpar.errors import UserError
from vllm_depthpar.util import files
lock, count, entered = Path(sys.argv[1]), Path(sys.argv[2]), 0
while entered < 40:
    try:
        with files.only_one(lock, "busy"):
            number = int(count.read_text())
            time.sleep(0.0002)
            count.write_text(str(number + 1))
            entered += 1
    except UserError:
        pass
"""
    started = [
        subprocess.Popen([sys.executable, "-c", program, str(path), str(count)]) for _ in range(4)
    ]
    assert [one.wait(60) for one in started] == [0] * 4
    assert count.read_text() == "160"


def test_journal_of_a_writer_that_was_killed(tmp_path: Path) -> None:
    """Every line before the cut counts; what is no entry does not."""
    journal = Journal("settings", tmp_path)
    journal.add({"a": [1.5, [2]], "b": None})
    whole = journal.path.read_bytes()
    for cut in range(len(whole) + 1):
        journal.path.write_bytes(whole[:cut])
        known = Journal("settings", tmp_path)
        for key, value in (("a", [1.5, [2]]), ("b", None)):
            assert key not in known or known[key] == value
        known.add({"c": 3})
        again = Journal("settings", tmp_path)
        assert again["c"] == 3
        assert ("a" in again) == ("a" in known)
    junk = [b"3", b'["a"]', b"[[], 1]", b"[1, 2]", b"\xff\xfe", b"{}", b"[" * 100_000, b"null"]
    journal.path.write_bytes(b"\n".join([*junk, b'["d", 4]']))
    known = Journal("settings", tmp_path)
    assert known["d"] == 4
    assert "a" not in known


def test_journal_that_cannot_be_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    journal = Journal("settings", tmp_path / "file" / "below")
    with pytest.raises(UserError, match=r"can't be written .*; allowed: .*DEPTHPAR_CACHE=FOLDER"):
        journal.add({"a": 1})
    assert "a" not in journal
    path = Journal("settings", tmp_path).path
    path.symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"is not a file; allowed: .*DEPTHPAR_CACHE=FOLDER"):
        Journal("settings", tmp_path)


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DEPTHPAR_CACHE", "~/mine")
    assert files.cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("DEPTHPAR_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert files.cache_folder() == tmp_path / ".cache" / "depthpar"
    monkeypatch.setenv("DEPTHPAR_CACHE", "~nobody-of-this-name/x")
    assert files.cache_folder() == Path("~nobody-of-this-name/x")
    # As of a user of a container who has no home.
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setenv("DEPTHPAR_CACHE", "")
    with pytest.raises(UserError, match=r"no home folder .*; allowed: DEPTHPAR_CACHE=FOLDER"):
        files.cache_folder()


def test_what_the_system_refuses() -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/tmp/x")
    assert files.of_the_system(full) == (
        "/tmp/x: No space left on device; allowed: what can be read and written here, on a disk "
        "with space"
    )
    assert files.of_the_system(FileNotFoundError(errno.ENOENT, "no", "x")) is None
    assert files.of_the_system(ConnectionRefusedError(errno.ECONNREFUSED, "no")) is None


def test_places_to_write_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert path_or_name("~/model") == str(tmp_path / "model")
    assert path_or_name("org/~model") == "org/~model"
    file, folder = out_file("{stem}.png"), tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "taken.png").mkdir()
    assert file("~/new/x.json") == tmp_path / "new" / "x.json"
    assert file(str(tmp_path / "file")) == tmp_path / "file"
    os.mkfifo(tmp_path / "pipe")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)  # as in /dev for most users
        assert out_file()(str(tmp_path / "pipe")) == tmp_path / "pipe"
        with pytest.raises(UserError, match="can't be written to"):
            file(str(tmp_path / "x"))
    for text, words in (
        (folder, "is a folder; allowed: a file"),
        (".", "is a folder"),
        ("", "is a folder"),
        ("/", "is a folder"),
        (tmp_path / "file" / "x", "file is not a folder; allowed: a place that can be written to"),
        (tmp_path / "file" / "x" / "y", "file is not a folder"),
        (tmp_path / "gone" / "x", "gone is a link to nothing"),
        (tmp_path / ("x" * 255), "File name too long"),
        (tmp_path / "taken.json", "taken.png is a folder"),
        (tmp_path / "x.png", "is what is written beside it"),
    ):
        with pytest.raises(UserError, match=words):
            file(str(text))
    with pytest.raises(UserError, match=r"its name must end in \.json"):
        out_file(suffix=".json")(str(tmp_path / "x.md"))
    assert out_folder("~/new/x") == tmp_path / "new" / "x"
    assert out_folder(str(folder)) == folder
    for text, words in (
        (tmp_path / "file", "is there already; allowed: a folder that is new or empty"),
        (tmp_path, "is there already"),
        (tmp_path / "file" / "x", "file is not a folder"),
        (".", "names no folder to make"),
        ("..", "names no folder to make"),
        ("", "names no folder to make"),
    ):
        with pytest.raises(UserError, match=words):
            out_folder(str(text))
    # Nothing was made on the way.
    assert {path.name for path in tmp_path.iterdir()} == {
        *("folder", "file", "gone", "taken.png", "pipe")
    }
