"""Text files to windows of tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from models import write_llama, write_tokenizer
from transformers import AutoTokenizer

from vllm_depthpar.errors import UserError
from vllm_depthpar.evaluate import own_text, texts
from vllm_depthpar.evaluate.texts import cut
from vllm_depthpar.launch import engine

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(write_tokenizer(tmp_path_factory.mktemp("t")))


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(write_tokenizer(tmp_path_factory.mktemp("t"), bos=True))


def shown(windows: texts.Windows, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(row) for row in windows.tokens]


def test_no_overlap(plain: Any) -> None:
    windows = cut("letters", LETTERS, plain, window=8)
    assert shown(windows, plain) == ["abcdefgh", "ijklmnop", "qrstuvwx"]
    # The first token of each is predicted from nothing.
    assert (windows.counted, windows.predictions) == (7, 21)
    assert windows.described() == {
        "text": "letters",
        "window": 8,
        "windows": 3,
        "counted_per_window": 7,
        "tokens_counted": 21,
    }


def test_stride(plain: Any) -> None:
    windows = cut("letters", LETTERS[:14], plain, window=8, stride=3)
    assert shown(windows, plain) == ["abcdefgh", "defghijk", "ghijklmn"]
    assert windows.counted == 3


def test_bos_as_the_tokenizer_has_it(with_bos: Any) -> None:
    windows = cut("letters", LETTERS, with_bos, window=8)
    assert shown(windows, with_bos) == ["<s>abcdefg", "<s>hijklmn", "<s>opqrstu"]
    # Of these every letter is predicted from something.
    assert windows.counted == 7


def test_limit_spreads_over_the_text(plain: Any) -> None:
    windows = cut("letters", LETTERS * 4, plain, window=8, limit=21)
    assert windows.predictions == 21
    assert shown(windows, plain)[0] == "abcdefgh"
    assert shown(windows, plain)[2] == (LETTERS * 4)[64:72]
    assert len(cut("letters", LETTERS, plain, window=8, limit=10**6)) == 3
    assert len(cut("letters", LETTERS, plain, window=8, limit=1)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 27}, "text 'letters' has 26 tokens; allowed: at least one window of 27"),
        ({"window": 8, "stride": 9}, "stride 9 does not fit windows of 8; allowed: 1 to 8"),
    ],
)
def test_wrong_windows(plain: Any, options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError) as error:
        cut("letters", LETTERS, plain, **options)
    assert str(error.value) == message


def test_wrong_files(tmp_path: Path) -> None:
    binary, empty = tmp_path / "binary.txt", tmp_path / "empty.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    empty.write_text(" \n")
    for path, reason in (
        (tmp_path / "missing.txt", "No such file or directory"),
        (binary, "not UTF-8 text"),
        (empty, "is empty"),
        (tmp_path, "Is a directory"),
    ):
        with pytest.raises(UserError, match=reason):
            texts.read(path)


def test_names_differ() -> None:
    assert texts.names(["a/news.txt", "b/news.txt", "c.txt"]) == ["news-1", "news-2", "c"]


def test_text_is_of_the_dtype_that_wrote_it(
    tmp_path: Path, own_cache: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another is asked for anew: what a model writes depends on it."""
    folder = write_tokenizer(write_llama(tmp_path))
    asked = []

    def call(*args: object, **_: object) -> None:
        asked.append(args)
        raise engine.EngineError("no engine here", "no engine here")

    monkeypatch.setattr(own_text.engine, "call", call)
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(UserError, match=r"could not write text with .*: no engine here"):
            own_text.write(str(folder), 100, dtype=dtype)
    settings = [json.dumps(args[-2]) for args in asked]
    assert len(set(settings)) == 2
