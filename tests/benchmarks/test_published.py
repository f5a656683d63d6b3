"""`benchmarks/quality/published.py`: which plans, by which commands, and the table of speeds. The
commands themselves are `depthpar`'s, with tests of their own."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
from models import write_llama

from benchmarks.common import run_main
from benchmarks.quality import published
from benchmarks.quality.published import corresponding, points, speed_table, speeds
from vllm_depthpar.cli.main import main, parser
from vllm_depthpar.plan import resolve
from vllm_depthpar.plan.model_shape import ModelShape
from vllm_depthpar.plan.presets import PRESETS, Preset
from vllm_depthpar.plan.published_shapes import CONFIGS, config_named

BENCH = Path(__file__).parents[2] / "benchmarks/serving/results/bench-smollm2-eager.json"


def labels(shape: str) -> list[str]:
    config = config_named(shape)
    return [one.label for one in points(ModelShape.from_config(config), config["model_type"])]


def test_which_plans() -> None:
    assert labels("llama-2-7b") == labels("llama-3.2-3b") == ["auto", "published"]
    # Retrained weights belong to it: no name serves it by accident.
    assert labels("llama-3.1-8b") == ["auto", '{"ladder": 16}']
    assert labels("smollm2-135m") == ["auto", '{"pair": [12, 26]}', '{"pair": [17, 27]}']
    # Of Llama 2 7B's depth, but another model.
    assert labels("mistral-7b-v0.1")[1] == '{"pair": [14, 28]}'


def test_a_published_span_corresponds_to_itself() -> None:
    for one in PRESETS:
        assert corresponding(one, one.layers) == one.published.spec.get("pair")


@pytest.mark.parametrize("preset", PRESETS[:2], ids=lambda one: one.model)
def test_what_corresponds_has_the_same_share_and_end(preset: Preset) -> None:
    pairs = [
        block for block in resolve(preset.published.spec, preset.layers).blocks if len(block) == 2
    ]
    share, behind = 2 * len(pairs) / preset.layers, preset.layers - 1 - pairs[-1][1]
    for config in CONFIGS.values():
        layers = config["num_hidden_layers"]
        found = corresponding(preset, layers)
        assert found is not None
        assert layers - found[1] == behind
        assert (found[1] - found[0]) % 2 == 0
        assert abs((found[1] - found[0]) - layers * share) <= 1
    assert corresponding(preset, 1) is None
    assert corresponding(preset, 4) is None, "nothing is left before what stays behind"


@pytest.mark.parametrize("tp", [1, 2])
def test_the_commands_are_ones_that_can_be_typed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tp: int
) -> None:
    model = write_llama(tmp_path / "model", layers=8)
    command = ["published.py", str(model), "--out", str(tmp_path / "out.json"), "--dry-run"]
    command += ["--tasks", "piqa.yaml", "--limit", "3", "--text", "a.txt", "--tp", str(tp)]
    command += ["--server-args=--enforce-eager", "--bench-args=--rounds 1 --batches 2"]
    with patch.object(sys, "argv", command):
        run_main(published.main)
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in lines] == [
        ["depthpar", command] for command in ("eval", "eval", "bench", "predict")
    ]
    text, tasks, bench, predict = (parser().parse_args(line[1:]) for line in lines)
    # Pairs of the 8 layers that have as many behind them as in Llama 2 7B and in Llama 3.2 3B.
    plans = ["auto", '{"pair": [0, 4]}', '{"pair": [3, 5]}']
    assert text.plan == tasks.plan == bench.plans == ["plain", *plans]
    assert predict.plan == plans
    assert (text.text, tasks.tasks, tasks.limit) == (["a.txt"], ["piqa.yaml"], 3)
    served = "--enforce-eager" + " --tensor-parallel-size 2" * (tp == 2)
    assert (tasks.server_args, bench.tp) == (served, tp)
    assert (bench.rounds, bench.batches, bench.one_at_a_time) == (1, (2,), True)
    assert (predict.device, predict.link, predict.tp) == ("a100-80g", "nvlink3", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_another_family_s_model_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"model_type": "gpt2", "n_layer": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = ["published.py", str(tmp_path), "--out", str(tmp_path / "out.json")]
    with patch.object(sys, "argv", command), pytest.raises(SystemExit) as ended:
        run_main(published.main)
    assert "; allowed: " in str(ended.value)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_speeds_stand_beside_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a real measurement and a real prediction, of the same plans."""
    bench = json.loads(BENCH.read_text())
    _, half, every = (one["label"] for one in bench["variants"])
    chosen = [published.Point(half, "half of them", 1.29), published.Point(every, "all of them")]
    command = ["predict", "--shape", "smollm2-135m", "--device", "h100", "--json"]
    assert main([*command, "--plan", half, "--plan", every]) == 0
    predicted = json.loads(capsys.readouterr().out)
    rows = speeds(chosen, 30, bench, predicted)
    assert [(row["label"], row["depth"]) for row in rows] == [(half, 22), (every, 15)]
    for row, plan in zip(rows, predicted["plans"], strict=True):
        assert row["ratio_of_depths"] == pytest.approx(30 / row["depth"])
        assert row["predicted"] == plan["decode"]["speedup"]
        assert list(row["measured"]) == list(bench["summary"]["loads"])
        for load, speed in row["measured"].items():
            measured = bench["summary"]["loads"][load][row["label"]]["decode_tokens_per_second"]
            assert speed == measured["speedup"]
    table = speed_table(rows, "1 x h100")
    assert f"| {half}: half of them | 22 | 1.29 | 1.36 | {rows[0]['predicted']:.2f} |" in table
    assert f"| {every}: all of them | 15 |  | 2.00 | {rows[1]['predicted']:.2f} |" in table
