"""`depthpar bench`, with real engines and a real `vllm serve` for each variant; and the demo."""

from __future__ import annotations

import _thread
import json
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import pytest
from fork_server import forked_engines
from forked_serve import forked_servers
from models import write_llama, write_tokenizer
from processes import are_stopped, wait_until_stopped

from vllm_depthpar.bench import report
from vllm_depthpar.bench.rounds import pause
from vllm_depthpar.bench.settings import PARTS, BenchSettings
from vllm_depthpar.bench.stages import figures_of
from vllm_depthpar.cli import demo
from vllm_depthpar.cli.main import main
from vllm_depthpar.launch.engine import flags_of
from vllm_depthpar.launch.server import Server, serve
from vllm_depthpar.launch.variants import variants
from vllm_depthpar.predict import devices
from vllm_depthpar.predict.machines import Device
from vllm_depthpar.util.provenance import origin

PAIRS = '{"pair": [1, 5]}'
SIZES = ["--eager", "--dtype", "float32", "--load-format", "dummy", "--output-len", "4"]
SIZES += ["--input-lens", "8"]
LOADS = ["latency, 8 tokens", "throughput, 8 tokens, batch 1", "throughput, 8 tokens, batch 3"]
LOADS += ["serving, 8 tokens, 50 requests/s", "serving, 8 tokens, all at once"]


def arguments(model: Path, *more: object) -> list[str]:
    return ["bench", *map(str, (model, *SIZES, *more))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shape and nothing else: no weights, no tokenizer."""
    folder = write_llama(tmp_path_factory.mktemp("model"))
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture(scope="module")
def sizes(model: Path) -> list[str]:
    more = ["--plans", f"plain,{PAIRS}", "--contexts", 8, "--batches", "1,3", "--rounds", 1]
    return arguments(model, *more, "--rates", "50,inf", "--requests", 6)


@pytest.fixture(scope="module")
def measured(sizes: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bench that was interrupted when its engines were done and its servers were starting, and
    then given again."""
    out = tmp_path_factory.mktemp("bench") / "results.json"
    with (
        patch.dict(os.environ, TORCHDYNAMO_DISABLE="1"),
        forked_engines(),
        forked_servers(),
        redirect_stdout(StringIO()) as stdout,
        redirect_stderr(StringIO()) as stderr,
    ):
        with interrupted_when_servers_start(out) as started:
            assert main([*sizes, "--out", str(out)]) == 130
        _, alive = psutil.wait_procs(started, timeout=10)
        assert started
        assert alive == []
        engines = json.loads(out.read_text())["stages"]["engines"]
        assert len(engines["rounds"]) == 1
        assert main([*sizes, "--out", str(out)]) == 0
    assert stderr.getvalue() == "", "quiet where there is no terminal"
    assert json.loads(out.read_text())["stages"]["engines"] == engines, "was not measured again"
    assert stdout.getvalue() == out.with_suffix(".md").read_text()
    return out


@contextmanager
def interrupted_when_servers_start(out: Path) -> Iterator[list[psutil.Process]]:
    """A Ctrl-C for this process once `out` has what the engines did; and what ran then."""
    started: list[psutil.Process] = []
    over = threading.Event()

    def running() -> list[psutil.Process]:
        """Without the server that forks them, which stays."""
        found: list[psutil.Process] = []
        for child in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):  # it ended meanwhile
                found += child.children(recursive=True)
        return found

    def watch() -> None:
        while not out.exists() or "engines" not in json.loads(out.read_text())["stages"]:
            if over.wait(0.1):
                return
        engines = running()
        while not started:
            if over.wait(0.1):
                return
            started.extend(one for one in running() if one not in engines)
        _thread.interrupt_main()

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest's workers ignore it
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield started
    finally:
        over.set()
        watcher.join()
        signal.signal(signal.SIGINT, handler)


def test_measures_every_part(measured: Path) -> None:
    record = json.loads(measured.read_text())
    assert [one["label"] for one in record["variants"]] == ["plain", PAIRS]
    assert set(record["versions"]) >= {"vllm", "torch", "vllm_depthpar"}
    assert record["hardware"]["cores"] > 0
    for stage in record["stages"].values():
        assert [start["label"] for start in stage["starts"]] == ["plain", PAIRS]
        for start in stage["starts"]:
            assert 0 < start["seconds"] < 900
            assert 200 << 20 < start["peak_bytes"] < 16 << 30
        (found,) = stage["rounds"]
        assert list(found) == ["plain", PAIRS]
    assert list(record["summary"]["loads"]) == LOADS
    for load, of_load in record["summary"]["loads"].items():
        (found,) = (
            stage["rounds"][0]
            for stage in record["stages"].values()
            if load in stage["rounds"][0]["plain"]
        )
        for label, figures in of_load.items():
            assert figures.keys() == found[label][load].keys() > set()
            for name, figure in figures.items():
                mine, plain = (found[one][load][name] for one in (label, "plain"))
                # Of a server that was kept waiting all four tokens may come at once.
                assert 0 < mine < math.inf or (name.endswith(("_tpot_ms", "_itl_ms")) and mine == 0)
                assert {figure[which] for which in ("median", "min", "max")} == {mine}
                if not mine or not plain:
                    assert figure["speedup"] is None
                    continue
                faster = mine / plain if name.endswith("_per_second") else plain / mine
                assert figure["speedup"]["median"] == pytest.approx(faster), (load, name)
    *_, slow, burst = (record["summary"]["loads"][load]["plain"] for load in LOADS)
    # Six requests at 50 a second on average come later than all at once.
    assert slow["requests_per_second"]["median"] < burst["requests_per_second"]["median"]
    for figures in (slow, burst):
        tokens = figures["tokens_per_second"]["median"] / figures["requests_per_second"]["median"]
        assert tokens == pytest.approx(4)
        assert figures["median_ttft_ms"]["median"] < figures["median_e2el_ms"]["median"]


def test_writes_a_report_and_a_picture(measured: Path) -> None:
    report = measured.with_suffix(".md").read_text()
    for part in PARTS:
        assert f"\n## {part.capitalize()}\n" in report
    assert f"| `{PAIRS}` | 6 layers as 4 blocks (2 of 2) | server |" in report
    assert "| 8 tokens, batch 3 | `plain` |" in report
    assert measured.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.suffix for path in measured.parent.iterdir()) == [".json", ".md", ".png"]


@pytest.mark.usefixtures("own_cache")
def test_given_again_it_only_reports(
    measured: Path,
    sizes: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Where all rounds are there; with a prediction where this machine was calibrated, and one line
    in place of a picture without matplotlib."""
    devices.save(Device("this", 1e10, ((8, 1e10), (64, 2e10)), 1e-3, source="here"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*sizes, "--out", str(measured), "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ("no picture without matplotlib: pip install 'vllm-depthpar[bench]'\n")
    record = json.loads(captured.out)
    # Two of six layers less, and nothing but the fixed cost of layers counts in a model so small.
    assert record["predicted"][LOADS[1]][PAIRS] == pytest.approx(1.5, rel=0.05)
    assert "| decode, predicted, speed-up |" in measured.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--output-len", 5], "has rounds of other settings (output_len: 4, not 5); allowed: "),
        (["--plans", "plain"], "other settings (plans: {"),
    ],
)
def test_other_settings_are_refused(
    measured: Path,
    sizes: list[str],
    capsys: pytest.CaptureFixture[str],
    more: list[object],
    message: str,
) -> None:
    before = measured.read_bytes()
    assert main([*sizes, "--out", str(measured), *map(str, more)]) == 1
    assert message in one_line(capsys)
    assert measured.read_bytes() == before


def test_two_ranks_one_variant_at_a_time(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    more = ["--tp", 2, "--plans", "identity", "--parts", "latency", "--rounds", 1]
    with forked_engines():
        assert main(arguments(model, *more, "--one-at-a-time", "--json")) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["summary"]["baseline"] == "identity"
    (found,) = record["stages"]["engines"]["rounds"]
    assert found["identity"]["latency, 8 tokens"]["tpot_ms"] > 0


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("depthpar: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--plans", "plain,nowhere.json"], "plan file 'nowhere.json' can't be read (No such file"),
        (["--plans", '{"pair": [0, 3]},plain'], "'pair': [0, 3] holds 3 layers; allowed: a mult"),
        (["--plans", "carried"], "carries no plan; allowed: a plan"),
        (["--tp", "3"], "--tp 3 can't cut plain (vLLM's own model); allowed: 1, 2, 4"),
        (["--contexts", "600"], "604 tokens, prompt and answer, are too many; allowed: 512"),
        (["--out", "results.md"], "--out results.md: its name must end in .json"),
        (["--engine-args=--dtype=half"], "--engine-args '--dtype=half' can't be given here"),
        (["--engine-args", "'"], "--engine-args: No closing quotation"),
        (["--engine-args=--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    ],
)
def test_bad_input_is_one_line(
    model: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert main(arguments(model, *more)) == 1
    assert message in one_line(capsys)


def test_a_ladder_checkpoint_is_not_for_plain(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_llama(tmp_path, ladder_layers=2, architecture="LlamaLadderForCausalLM")
    assert main(arguments(model, "--plans", "auto,plain")) == 1
    assert "--plans 'plain': vLLM itself can't serve a ladder checkpoint" in one_line(capsys)


def test_a_file_of_another_kind_is_left_alone(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "other.json"
    out.write_text('{"settings": {}}')
    assert main(arguments(model, "--out", out)) == 1
    assert "is not a file of depthpar bench; allowed: another --out" in one_line(capsys)
    assert out.read_text() == '{"settings": {}}'


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--batches", "1,0"], "argument --batches: 0 is too small; allowed: 1 or more"),
        (["--output-len", "1"], "argument --output-len: 1 is too small; allowed: 2 or more"),
        (["--rates", "0"], "argument --rates: 0 is too small; allowed: above 0, or inf"),
        (["--parts", "latency,speed"], "'speed' is unknown; allowed: latency, throughput, serving"),
    ],
)
def test_bad_values_are_refused(
    model: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        main(arguments(model, *more))
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_ratios_are_taken_within_a_round_and_above_1_is_faster(model: Path) -> None:
    settings = BenchSettings(parts=("latency", "throughput"), batches=(4,))
    first, second = settings.loads()
    chosen = variants(str(model), ["identity", "plain"])

    def rounds(label: str, scale: float) -> dict[str, dict[str, float]]:
        return {
            first.key: {"ttft_ms": 30 / scale, "tpot_ms": 10 / scale},
            second.key: {
                "decode_tokens_per_second": 100 * scale,
                "prefill_tokens_per_second": 900 * scale,
            },
        }

    scales: list[dict[str, float]] = [
        {"plain": 1, "identity": 2},
        {"plain": 10, "identity": 11},
        {"plain": 0.1, "identity": 0.3},
    ]
    record: dict[str, Any] = {
        "variants": [asdict(one) for one in chosen],
        "stages": {
            "engines": {
                "rounds": [
                    {label: rounds(label, scale) for label, scale in one.items()} for one in scales
                ]
            }
        },
    }
    found = report.summarize(record, [first, second])
    assert found["baseline"] == "plain"
    for load in (first, second):
        for figure in found["loads"][load.key]["identity"].values():
            assert figure["speedup"] == pytest.approx({"median": 2, "min": 1.1, "max": 3})
    assert found["loads"][first.key]["identity"]["ttft_ms"]["median"] == pytest.approx(15)


def test_a_time_of_0_has_no_speedup(tmp_path: Path) -> None:
    """Where all tokens of an answer came at once: no round that says so counts."""
    (load,) = BenchSettings(parts=("serving",), rates=(1,)).loads()
    chosen = variants(str(write_llama(tmp_path / "model")), ["identity", "plain"])
    some = {figure.key: 2.0 for figure in report.FIGURES["serving"]}
    rounds = [
        {"plain": {load.key: some | {"median_tpot_ms": plain}}, "identity": {load.key: mine}}
        for plain, mine in [(6.0, some | {"median_itl_ms": 0.0}), (0.0, some)]
    ]
    record: dict[str, Any] = {
        **origin("depthpar"),
        "variants": [asdict(one) for one in chosen],
        "stages": {"servers": {"rounds": rounds, "starts": []}},
        "settings": {"eager": True, "tp": 1, "dtype": "float32", "output_len": 4},
        "model": "model",
        "seconds": 1.0,
        "hardware": {"cores": 2, "threads": 2},
    }
    record["summary"] = report.summarize(record, [load])
    figures = record["summary"]["loads"][load.key]["identity"]
    assert figures["median_tpot_ms"]["speedup"] == {"median": 3, "min": 3, "max": 3}
    assert figures["median_itl_ms"]["speedup"] == {"median": 1, "min": 1, "max": 1}
    for one in rounds:
        one["identity"][load.key]["median_itl_ms"] = 0.0
    record["summary"] = report.summarize(record, [load])
    assert record["summary"]["loads"][load.key]["identity"]["median_itl_ms"]["speedup"] is None
    assert "| 3.00 (3.00 to 3.00) |" in report.markdown(record, [load])
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_loads_are_a_grid() -> None:
    settings = BenchSettings(batches=(1, 64), contexts=(128, 4096), rates=(0.5, math.inf))
    names = [(load.part, load.name) for load in settings.loads()]
    assert names == [
        ("latency", "128 tokens"),
        ("throughput", "128 tokens, batch 1"),
        ("throughput", "128 tokens, batch 64"),
        ("throughput", "4096 tokens, batch 1"),
        ("throughput", "4096 tokens, batch 64"),
        ("serving", "128 tokens, 0.5 requests/s"),
        ("serving", "128 tokens, all at once"),
    ]
    # 262144 prompt tokens take 32 steps or more, in which the first sequences decode already.
    assert settings.loads()[4].longest == 4096 + 64 + 2 * 32


def test_units() -> None:
    """Times of one sequence in ms, speeds of many in tokens per second, from the same batch."""
    found = {"prefill_seconds": 0.5, "decode_seconds": 2.0, "decode_tokens": 40, "gpu_bytes": 0}
    loads = BenchSettings(batches=(4,), contexts=(100,), input_lens=(100,)).loads()
    assert [figures_of(load, found) for load in loads[:2]] == [
        {"ttft_ms": 500, "tpot_ms": 50},
        {"decode_tokens_per_second": 20, "prefill_tokens_per_second": 800},
    ]
    assert figures_of(loads[0], {**found, "gpu_bytes": 7})["gpu_bytes"] == 7


def test_flags() -> None:
    options = {"dtype": "half", "enforce_eager": True, "no": False, "none": None, "a_b": {"c": 1}}
    assert flags_of(options) == ["--dtype", "half", "--enforce-eager", "--a-b", '{"c": 1}']


def test_the_demos_servers_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one answers the other is stopped, with all its processes; and both do answer."""
    folder = write_tokenizer(write_llama(tmp_path / "model", layers=4))
    flags = [*demo.ARGS[:2], "--max-model-len", "256", "--enforce-eager"]
    plan = ["--model-impl", "depthpar", "--hf-overrides", '{"depthpar": {"pair": [0, 4]}}']
    env = {"TORCHDYNAMO_DISABLE": "1"}
    measure, turns = demo._tokens_per_second, []
    with (
        forked_servers(),
        serve(folder, *flags, *plan, env=env) as depthpar,
        serve(folder, *flags, env=env) as plain,
    ):
        servers = {"depthpar": depthpar, "plain": plain}
        for server in servers.values():
            pause(server)
            wait_until_stopped(server.process.pid)

        def watched(server: Server) -> float:
            (name,) = (name for name in servers if servers[name] is server)
            (other,) = (servers[one].process.pid for one in servers if one != name)
            turns.append(name)
            wait_until_stopped(server.process.pid, False)
            wait_until_stopped(other)
            rate = measure(server)
            assert are_stopped(other) == {True}
            return rate

        monkeypatch.setattr(demo, "_tokens_per_second", watched)
        rounds = [demo._round(servers, number) for number in range(2)]
    assert turns == ["depthpar", "plain", "plain", "depthpar"]
    assert all(one.keys() == servers.keys() and min(one.values()) > 0 for one in rounds)
