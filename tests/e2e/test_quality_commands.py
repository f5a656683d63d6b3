"""`depthpar eval --text`, `study` and `search`, as a user runs them, on a small random model."""

from __future__ import annotations

import json
import shutil
from html import escape
from pathlib import Path
from typing import Any

import pytest
import torch
from fork_server import forked_engines
from models import write_llama, write_tokenizer
from transformers import AutoTokenizer

from vllm_depthpar import hf
from vllm_depthpar.cli.main import main
from vllm_depthpar.evaluate.span_study import TRANSFORMATIONS
from vllm_depthpar.plan import read_spec, resolve
from vllm_depthpar.plan.model_shape import all_reduces

pytestmark = pytest.mark.usefixtures("own_cache")

LAYERS = 8
PNG = b"\x89PNG\r\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_llama(tmp_path_factory.mktemp("llama"), layers=LAYERS)
    return write_tokenizer(folder, bos=True, chat=True)


def run(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def perplexity(
    model: Path, spec: Any, text: str, window: int, windows: int, dtype: torch.dtype
) -> float:
    """Of the first windows of a text, by one forward pass each."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    network, total = hf.load(model, spec, dtype), 0.0
    for at in range(windows):
        row = torch.tensor([[256, *ids[at * (window - 1) : (at + 1) * (window - 1)]]])
        with torch.no_grad():
            total += float(network(row, labels=row).loss)
    return float(torch.tensor(total / windows).exp())


def test_eval(
    model: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    auto_dtype: str,
) -> None:
    pairs = '{"pair": [2, 6]}'
    out = tmp_path / "new" / "out.json"
    arguments = ["eval", model, "--plan", "plain", "--plan", pairs, "--text", text, "--out", out]
    run(*arguments, "--window", 64)
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "| plan | blocks | perplexity: passages | KL: passages |"
    report = json.loads(out.read_text())["text"]
    assert report.keys() >= {"date", "versions", "model", "seed", "dtype", "command"}
    assert report["dtype"] == auto_dtype
    assert f"; {auto_dtype}" in table[-1]
    (settings,) = report["texts"]
    assert (settings["window"], settings["counted_per_window"]) == (64, 63)
    assert settings["tokens_counted"] == 63 * settings["windows"]
    plain, paired = report["plans"]
    for row, spec in ((plain, "identity"), (paired, json.loads(pairs))):
        expected = perplexity(
            model, spec, text.read_text(), 64, settings["windows"], getattr(torch, auto_dtype)
        )
        assert row["results"]["passages"]["perplexity"] == pytest.approx(expected, rel=1e-3)
    assert plain["results"]["passages"]["kl"] == pytest.approx(0, abs=1e-4)
    assert paired["results"]["passages"]["kl"] > 0.01
    assert paired["spec"] == resolve(json.loads(pairs), LAYERS).to_spec()
    assert paired["depth"] == 6

    # Nothing is measured again; the same numbers.
    run(*arguments, "--window", 64)
    assert json.loads(out.read_text())["text"]["plans"] == report["plans"]
    # Overlapping windows, counted at their ends.
    run(*arguments, "--window", 64, "--stride", 16, "--tokens", 320)
    (settings,) = json.loads(out.read_text())["text"]["texts"]
    assert (settings["counted_per_window"], settings["tokens_counted"]) == (16, 320)


def test_study(model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "study.json"
    run("study", model, "--text", text, "--out", out, "--window", 64, "--tokens", 126)
    assert out.with_suffix(".png").read_bytes().startswith(PNG)
    report = json.loads(out.read_text())
    # On one rank nothing is gained or lost by a dropped sync point.
    assert list(report["spans"]) == [name for name in TRANSFORMATIONS if name != "drop_sync"]
    for found in report["spans"].values():
        assert len(found) == LAYERS * (LAYERS - 1) / 2
        assert all(one["perplexity"] > 1 for one in found)
    evaluated = tmp_path / "eval.json"
    spec = '{"pair": [2, 6]}'
    common = ["--text", text, "--window", 64, "--tokens", 126, "--out", evaluated]
    run("eval", model, "--plan", "identity", "--plan", spec, *common)
    plain, paired = json.loads(evaluated.read_text())["text"]["plans"]
    assert report["unmodified"] == pytest.approx(plain["results"]["passages"]["perplexity"])
    (span,) = [one for one in report["spans"]["pairs"] if (one["start"], one["end"]) == (2, 6)]
    found = paired["results"]["passages"]
    assert (span["perplexity"], span["kl"]) == pytest.approx((found["perplexity"], found["kl"]))
    assert f"unmodified: {report['unmodified']:.2f}" in capsys.readouterr().out


def test_search_for_a_depth(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.json"
    calibration = ["--text", text, "--own-text", 0, "--window", 64, "--tokens", 504]
    run("search", model, "--depth", 6, *calibration, "--rounds", 3, "--out", out)
    found = resolve(read_spec(str(out)), LAYERS)
    assert found.depth == 6
    printed = capsys.readouterr().out
    assert found.name in printed
    assert (tmp_path / "plan-front.png").read_bytes().startswith(PNG)
    markdown = (tmp_path / "plan-report.md").read_text()
    assert json.dumps(found.to_spec()) in markdown
    assert "passages: 504 tokens counted, in 8 windows of 64" in markdown
    page = (tmp_path / "plan-report.html").read_text()
    assert escape(json.dumps(found.to_spec())) in page
    report = json.loads((tmp_path / "plan-report.json").read_text())
    assert report["plan"]["plan"] == found.to_spec()
    assert report["plan"]["kl"] == min(one["kl"] for one in report["measured"] if one["depth"] <= 6)
    kinds = {one["kind"] for one in report["measured"]}
    assert kinds == {"found", "span of pairs", "skipping"}
    depths = [one["depth"] for one in report["front"]]
    assert depths == sorted(depths)
    assert depths[-1] == LAYERS
    # What it says of its plan is what `eval` says.
    evaluated = tmp_path / "eval.json"
    common = ["--text", text, "--window", 64, "--tokens", 504, "--out", evaluated]
    run("eval", model, "--plan", out, *common)
    (row,) = json.loads(evaluated.read_text())["text"]["plans"]
    assert row["results"] == report["plan"]["quality"]

    # The same again, from the journal.
    again = tmp_path / "again.json"
    run("search", model, "--depth", 6, *calibration, "--rounds", 3, "--out", again)
    assert again.read_text() == out.read_text()


def test_a_search_without_time_ends_after_a_round(model: Path, text: Path, tmp_path: Path) -> None:
    """What was measured alone is used: nothing published leaves halves out."""
    out = tmp_path / "plan.json"
    calibration = ["--text", text, "--own-text", 0, "--window", 64, "--tokens", 504]
    goal = ["--all-reduces", 14, "--methods", "drop_attention", "--minutes", 0]
    run("search", model, *goal, *calibration, "--out", out)
    assert all_reduces(resolve(read_spec(str(out)), LAYERS)) == 14
    measured = json.loads((tmp_path / "plan-report.json").read_text())["measured"]
    assert sum(one["all_reduces"] == 14 for one in measured) <= 6


def test_search_for_a_loss(model: Path, text: Path, tmp_path: Path) -> None:
    calibration = ["--text", text, "--own-text", 0, "--window", 64, "--tokens", 504]
    out = tmp_path / "plan.json"
    goal = ["--max-ppl-increase", 1, "--methods", "pair", "--rounds", 6]
    run("search", model, *goal, *calibration, "--out", out)
    report = json.loads((tmp_path / "plan-report.json").read_text())
    limit = 1.01 * report["unmodified"]["passages"]["perplexity"]
    kept = [
        one["depth"] for one in report["front"] if one["quality"]["passages"]["perplexity"] <= limit
    ]
    assert report["plan"]["depth"] == min(kept)
    assert resolve(read_spec(str(out)), LAYERS).depth == min(kept)
    # Shorter ones were tried, unless there are none.
    assert min(one["depth"] for one in report["measured"]) < min(kept) or min(kept) == 4


def test_search_for_a_loss_that_cannot_be_kept(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every single change of this model raises its perplexity on the text it is calibrated on."""
    out = tmp_path / "plan.json"
    calibration = ["--text", text, "--own-text", 0, "--window", 64, "--tokens", 504]
    goal = ["--max-ppl-increase", 0.01, "--methods", "skip", "--rounds", 2]
    code = main([str(one) for one in ["search", model, *goal, *calibration, "--out", out]])
    error = capsys.readouterr().err.splitlines()[-1]
    assert code == 1
    assert error.startswith("depthpar: error: --max-ppl-increase 0.01 can't be reached; nearest: ")
    assert not out.exists()


def test_search_for_all_reduces(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Below the layer: what the plan means depends on the ranks, which it carries, and which its
    quality is of."""
    out = tmp_path / "plan.json"
    calibration = ["--text", text, "--own-text", 0, "--window", 64, "--tokens", 504]
    methods = "pair,drop_sync,parallel_residual,drop_attention,drop_mlp"
    goal = ["--all-reduces", 12, "--tp", 2, "--methods", methods, "--rounds", 2]
    run("search", model, *goal, *calibration, "--out", out)
    plan = resolve(read_spec(str(out)), LAYERS)
    assert all_reduces(plan) <= 12 < all_reduces(resolve("identity", LAYERS))
    assert plan.tp == (2 if plan.drop_sync else None)
    report = json.loads((tmp_path / "plan-report.json").read_text())
    assert report["goal"] == {"all_reduces": 12}
    assert report["plan"]["all_reduces"] == all_reduces(plan)
    assert "| depth | all-reduces | KL |" in (tmp_path / "plan-report.md").read_text()
    ways = {(one["mode"], one["without"]) for one in report["alone"]}
    assert ways == {
        *(("standard", half) for half in ("", "attention", "mlp")),
        *((mode, "") for mode in ("drop_sync", "parallel_residual")),
    }
    capsys.readouterr()
    evaluated = tmp_path / "eval.json"
    tokens = ["--text", text, "--window", 64, "--tokens", 504]
    run("eval", model, "--plan", out, *tokens, "--tp", 2, "--out", evaluated)
    (row,) = json.loads(evaluated.read_text())["text"]["plans"]
    (found,), (wanted,) = row["results"].values(), report["plan"]["quality"].values()
    assert found["perplexity"] == pytest.approx(wanted["perplexity"], rel=1e-5)


def test_search_for_a_speed_on_own_text(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "fast.json"
    machine = ["--device", "h100", "--link", "p2p-off", "--tp", 2]
    goal = ["--speedup", 1.2, *machine, "--methods", "pair,ladder", "--rounds", 2]
    with forked_engines():
        run("search", model, *goal, "--tokens", 1024, "--window", 64, "--out", out)
    assert "calibrating on 1024 tokens that the model writes" in capsys.readouterr().err
    report = json.loads((tmp_path / "fast-report.json").read_text())
    assert report["plan"]["predicted_speedup"] >= 1.2
    # A model with a chat template writes both kinds.
    assert [one["text"] for one in report["texts"]] == ["own-prose", "own-answers"]
    assert report["plan"]["quality"].keys() == {"own-prose", "own-answers"}
    assert all(quality["kl"] > 0 for quality in report["plan"]["quality"].values())
    markdown = (tmp_path / "fast-report.md").read_text()
    assert markdown.count("(written by the model itself)") == 2
    assert "2 x h100" in markdown


@pytest.mark.parametrize("content", [None, "", "{", '{"model": {"type": "x"}}', "[1]"])
@pytest.mark.parametrize("command", ["eval", "study", "search"])
def test_no_tokenizer(
    command: str,
    content: str | None,
    model: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    for path in folder.glob("*token*"):
        path.unlink()
    if content is not None:
        (folder / "tokenizer.json").write_text(content)
        (folder / "tokenizer_config.json").write_text(content)
    more = ["--depth", "5"] if command == "search" else []
    out = tmp_path / "out.json"
    assert main([command, str(folder), "--text", str(text), *more, "--out", str(out)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"depthpar: error: no tokenizer in '{folder}' (")
    assert "; allowed: " in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval"], "nothing to measure; allowed: --text FILE ..., --tasks NAME ..., --answers, "),
        (["eval", "--text", "{short}"], "text 'short' has 5 tokens; allowed: at least one window"),
        (["eval", "--text", "missing.txt"], "text 'missing.txt' can't be read (No such file"),
        (
            ["eval", "--text", "{text}", "--plan", '{"layers": 30, "pair": [2, 6]}'],
            "plan key 'layers': 30 is not this checkpoint's number of layers; allowed: 8",
        ),
        (
            ["search", "--depth", 2, "--methods", "pair", "--out", "x"],
            "depth 2 can't be reached with pair; allowed: 4 to 7, nearest: 4",
        ),
        (
            ["search", "--depth", 6, "--methods", "pairs", "--out", "x"],
            "method 'pairs' is unknown; allowed: pair, group, skip, ladder",
        ),
        (
            ["search", "--all-reduces", 17, "--methods", "pair", "--out", "x"],
            "--all-reduces 17 can't be reached with pair; allowed: 9 to 16",
        ),
        (
            ["search", "--all-reduces", 12, "--methods", "drop_sync", "--out", "x"],
            "method 'drop_sync' changes nothing on one rank; allowed: --tp 2 or more",
        ),
        (
            ["search", "--speedup", 9, "--device", "h100", "--out", "x"],
            "speed-up 9 can't be reached with pair, group, skip there; allowed: more than 1,",
        ),
        (
            ["search", "--speedup", 1.1, "--tp", 2, "--out", "x"],
            "--tp 2 needs a --link; allowed: nvlink5",
        ),
        (
            ["search", "--max-ppl-increase", 0, "--out", "x"],
            "--max-ppl-increase 0 is too small; allowed: more than 0",
        ),
        (
            ["search", "--depth", 6, "--text", "{short}", "--out", "x"],
            "text 'short' has 5 tokens; allowed: at least one window of 255",
        ),
        (
            ["search", "--depth", 6, "--own-text", 0, "--out", "x"],
            "nothing to calibrate on; allowed: --text FILE, or --own-text above 0",
        ),
        (["study", "--text", "{short}", "--out", "x"], "text 'short' has 5 tokens; allowed:"),
    ],
)
def test_wrong_input(
    model: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[object],
    message: str,
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("short")
    filled = [
        str(one).format(short=short, text=text)
        if "{short}" in str(one) or "{text}" in str(one)
        else str(one)
        for one in arguments
    ]
    assert main([filled[0], str(model), *filled[1:]]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"depthpar: error: {message}")
