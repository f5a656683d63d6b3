"""`depthpar predict`, and what it knows of machines."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fork_server import forked_engines

from vllm_depthpar.cli.main import main
from vllm_depthpar.errors import UserError
from vllm_depthpar.plan import resolve
from vllm_depthpar.plan.auto import auto_spec
from vllm_depthpar.plan.model_shape import ModelShape
from vllm_depthpar.plan.published_shapes import CONFIGS, config_named
from vllm_depthpar.predict import devices
from vllm_depthpar.predict.calibrate import ROWS, measure_products
from vllm_depthpar.predict.cost_model import speedup, step_time
from vllm_depthpar.predict.devices import DEVICES, device_named
from vllm_depthpar.predict.links import LINKS, link_named
from vllm_depthpar.predict.machines import Deployment, Device, Workload
from vllm_depthpar.predict.timers import CpuTimer, CudaTimer, Timer

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
    "torch_dtype": "bfloat16",
}
PAIRS = '{"pair": [18, 28]}'
LADDER = '{"ladder": "all"}'
GPUS = ["--tp", "2", "--device", "a100-80g", "--link", "p2p-off"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llama")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return str(folder)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; and no plan in the environment."""
    monkeypatch.delenv("DEPTHPAR_CACHE", raising=False)
    monkeypatch.delenv("DEPTHPAR_PLAN", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "depthpar"


def predicted(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["predict", *arguments, "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_prints_speedups(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    plans = ["--plan", PAIRS, "--plan", LADDER]
    found = predicted(capsys, model, *plans, *GPUS, "--batch", "4", "--prompt", "512")
    shape, plan = ModelShape.from_config(CONFIG), resolve(json.loads(PAIRS), 32)
    deployment = Deployment(DEVICES["a100-80g"], LINKS["p2p-off"], 2)
    pairs, ladder = found["plans"]
    assert pairs["decode"]["speedup"] == speedup(shape, plan, deployment, Workload(4, 1024))
    assert pairs["prefill"]["speedup"] == speedup(shape, plan, deployment, Workload(tokens=512))
    assert 1.02 < pairs["decode"]["speedup"] < 1.2
    assert 1.02 < ladder["decode"]["speedup"] < 1.2
    assert ladder["decode"]["communication"] < found["plain"]["decode"]["communication"] / 2
    assert pairs["plan"] == plan.to_spec()
    assert pairs["decode"]["ladder_speedup"] is None
    # Over the same blocks without the ladder, which here are plain vLLM's.
    assert ladder["decode"]["ladder_speedup"] == pytest.approx(ladder["decode"]["speedup"])
    assert pairs["slower_than_plain"] == []

    assert main(["predict", model, *plans, *GPUS, "--batch", "4", "--prompt", "512"]) == 0
    out = capsys.readouterr().out
    assert "decoding, batch 4, context 1024" in out
    assert "prefill, one prompt of 512 tokens" in out
    assert f"{pairs['decode']['speedup']:.2f}x" in out
    assert "NVIDIA A100 80GB" in out
    assert "warning" not in out


def test_warns_of_a_plan_that_is_slower(
    model: str, capsys: pytest.CaptureFixture[str], cache: Path
) -> None:
    # Whose own all-reduces are the slower ones: nothing else makes a plan lose.
    devices.save(
        replace(DEVICES["h100"], name="this", reduce_seconds=1e-3, plain_reduce_seconds=-0.9e-3)
    )
    arguments = ["predict", model, "--plan", "identity", "--tp", "2", "--link", "nvlink4"]
    assert main(arguments) == 0
    assert "warning: identity is predicted to be slower than plain in decoding" in (
        capsys.readouterr().out
    )
    assert predicted(capsys, *arguments[1:])["plans"][0]["slower_than_plain"] == ["decoding"]


def test_warns_of_a_plan_that_gains_nothing(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    # One rank has no all-reduce to hide.
    arguments = ["predict", model, "--plan", LADDER, "--plan", "identity", "--device", "h100"]
    assert main(arguments) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert warnings == [f"warning: {LADDER} is predicted to gain nothing over plain in decoding"]


@pytest.mark.parametrize("link", ["pcie4-p2p", "latency=1ms,bandwidth=10gbit"])
@pytest.mark.parametrize("spec", [LADDER, '{"pair": [0, 32], "ladder": "all"}'])
def test_warns_of_a_ladder_that_gains_little(
    model: str, capsys: pytest.CaptureFixture[str], spec: str, link: str
) -> None:
    """However much else the plan gains: only slow all-reduces are worth a ladder."""
    arguments = [model, "--plan", spec, "--device", "l4", "--tp", "2", "--link", link]
    shape, plan = ModelShape.from_config(CONFIG), resolve(json.loads(spec), 32)
    deployment, workload = Deployment(DEVICES["l4"], link_named(link), 2), Workload(1, 1024)
    without = replace(plan, ladder=frozenset())
    gain = (
        step_time(shape, without, deployment, workload).seconds
        / step_time(shape, plan, deployment, workload).seconds
    )
    found = predicted(capsys, *arguments)["plans"][0]["decode"]
    assert found["ladder_speedup"] == gain
    assert main(["predict", *arguments]) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    little = (
        f"warning: the ladder of {spec} is predicted to gain {gain - 1:.1%} in decoding: "
        "it pays where all-reduces are slow"
    )
    assert warnings == ([little] if link == "pcie4-p2p" else [])
    assert (gain < 1.03) == (link == "pcie4-p2p")


def test_without_a_plan_the_one_that_would_be_served(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (
        predicted(capsys, model, *GPUS)["plans"][0]["plan"]
        == resolve(json.loads(PAIRS), 32).to_spec()
    )
    monkeypatch.setenv("DEPTHPAR_PLAN", LADDER)
    assert "32 ladder" in predicted(capsys, model, *GPUS)["plans"][0]["name"]


def test_a_plan_that_plain_cannot_match(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    wide = ["--plan", '{"pair": [0, 32]}', "--tp", "64", "--link", "nvlink4", "--device", "h100"]
    assert main(["predict", model, *wide]) == 0
    assert "plain vLLM can't be cut into 64 ranks" in capsys.readouterr().out
    found = predicted(capsys, model, *wide)
    assert found["plain"] is None
    assert found["plans"][0]["decode"]["speedup"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plan", '{"pairs": [0, 2]}', *GPUS], "plan key 'pairs' is unknown"),
        (["--tp", "2", "--device", "h100"], "--tp 2 needs a --link; allowed: nvlink5, nvlink4, "),
        ([*GPUS, "--link", "nvlink"], "link 'nvlink' is unknown; allowed: nvlink5, nvlink4"),
        ([*GPUS, "--link", "pcie"], "link 'pcie' is unknown; allowed: pcie5, pcie4, pcie3, "),
        ([*GPUS, "--link", "latency=1ms"], "needs a latency and a bandwidth"),
        ([*GPUS, "--link", "latency=1,bandwidth=1gbit"], "'latency=1' is wrong; allowed: "),
        ([*GPUS, "--link", "latency=1ms,bandwidth=0gbit"], "above 0"),
        ([*GPUS, "--link", "speed=1ms"], "'speed=1ms' is wrong"),
        ([*GPUS, "--device", "h1000"], "device 'h1000' is unknown; allowed: h100, "),
        ([*GPUS, "--device", "RTX4090"], "device 'RTX4090' is unknown; allowed: rtx-4090, "),
        ([*GPUS, "--calibrate"], "--calibrate measures this machine; allowed: --device this"),
        ([*GPUS, "--tp", "3"], "3 tensor-parallel ranks; allowed: 1, 2, 4, 8, 16, 32"),
        (["--tp", "3", "--link", "shm", "--calibrate"], "3 tensor-parallel ranks; allowed: 1"),
        ([], "this machine has not been measured yet; allowed: add --calibrate, or --device"),
    ],
)
def test_bad_input_is_one_line(
    model: str, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["predict", model, *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("depthpar: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


@pytest.mark.parametrize("option", ["--batch", "--tp", "--prompt"])
def test_numbers_below_one_are_refused(
    model: str, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    with pytest.raises(SystemExit):
        main(["predict", model, option, "0"])
    assert "0 is too small; allowed: 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-2-7b", 6738415616),
        ("llama-2-13b", 13015864320),
        ("llama-2-70b", 68976648192),
        ("llama-3-8b", 8030261248),
        ("llama-3-70b", 70553706496),
        ("llama-3.1-8b", 8030261248),
        ("llama-3.1-70b", 70553706496),
        ("llama-3.1-405b", 405853388800),
        ("llama-3.2-1b", 1235814400),
        ("llama-3.2-3b", 3212749824),
        ("llama-3.3-70b", 70553706496),
        ("smollm2-135m", 134515008),
        ("smollm2-360m", 361821120),
        ("smollm2-1.7b", 1711376384),
        ("mistral-7b-v0.1", 7241732096),
        ("mistral-7b-v0.3", 7248023552),
        ("qwen3-0.6b", 596049920),
        ("qwen3-1.7b", 1720574976),
        ("qwen3-4b", 4022468096),
        ("qwen3-8b", 8190735360),
        ("qwen3-14b", 14768307200),
        ("qwen3-32b", 32762123264),
        ("gemma-2-2b", 2614341888),
        ("gemma-2-9b", 9241705984),
        ("gemma-2-27b", 27227128320),
        ("gemma-3-270m", 268098176),
        ("gemma-3-1b", 999885952),
    ],
)
def test_shapes_have_the_parameters_that_were_published(name: str, parameters: int) -> None:
    """To the last one, as the models' pages count them."""
    shape = ModelShape.from_config(config_named(name))
    assert shape.weight_bytes(resolve("identity", shape.layers)) == 2 * parameters


def test_a_shape_needs_no_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    found = predicted(capsys, "--shape", "llama-3.1-8b", "--plan", LADDER, *GPUS)
    shape = ModelShape.from_config(config_named("llama-3.1-8b"))
    deployment = Deployment(DEVICES["a100-80g"], LINKS["p2p-off"], 2)
    assert found["plans"][0]["decode"]["speedup"] == speedup(
        shape, resolve({"ladder": "all"}, 32), deployment, Workload(1, 1024)
    )
    # And without a plan the one that would be served.
    served = predicted(capsys, "--shape", "llama-3.1-8b", *GPUS)["plans"][0]["plan"]
    assert served == resolve(auto_spec(shape)[0], 32).to_spec()


def test_every_shape_is_predicted() -> None:
    """On two ranks, or on three or five where the heads ask for it."""
    for name, config in CONFIGS.items():
        shape = ModelShape.from_config(config)
        plan = resolve(auto_spec(shape)[0], shape.layers)
        tp = next(tp for tp in (2, 3, 5) if shape.fits(1, tp))
        deployment = Deployment(DEVICES["rtx-3090"], LINKS["pcie4"], tp)
        assert speedup(shape, plan, deployment) >= 1, name


def test_a_wrong_shape_names_the_nearest_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--shape", "Llama-3.1-7B", *GPUS]) == 1
    error = capsys.readouterr().err
    assert "shape 'Llama-3.1-7B' is unknown; allowed: llama-3.1-70b, llama-3.1-8b, " in error
    assert all(name in error for name in CONFIGS)
    assert error.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["/some/model", "--shape", "llama-3.1-8b"]])
def test_a_model_or_a_shape(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        main(["predict", *arguments, *GPUS])
    error = capsys.readouterr().err
    assert "MODEL --shape is required" in error or "not allowed with argument" in error


def test_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "/nowhere", *GPUS]) == 1
    assert "no checkpoint at '/nowhere'" in capsys.readouterr().err


def test_own_links() -> None:
    slow, fast = map(
        link_named, ("latency=0.2ms,bandwidth=1gbit", "bandwidth=25 GB/s, latency=5us")
    )
    assert [slow.latency_seconds, fast.latency_seconds] == pytest.approx([2e-4, 5e-6])
    assert [slow.bandwidth, fast.bandwidth] == [1.25e8, 25e9]


def test_presets_are_the_data_sheets_shares() -> None:
    """Bytes and FLOP/s by hand: 93 % and 48 % of the data sheet's."""
    for name, gigabytes, teraflops in (
        ("h100", 3350, 989),
        ("l4", 300, 121),
        ("l40s", 864, 362),
        ("a10", 600, 125),
        ("rtx-3090", 936, 71),
        ("rtx-4090", 1008, 165.2),
        ("rtx-5090", 1792, 209.5),
        ("rtx-pro-6000", 1792, 503.8),
        ("b200", 7670, 2250),
        ("mi300x", 5300, 1307.4),
        ("dgx-spark", 273, 125),
    ):
        device = device_named(name)
        assert device.memory_bandwidth == pytest.approx(0.93e9 * gigabytes)
        assert device.flops_at(1) == device.flops_at(512) == pytest.approx(0.48e12 * teraflops)


@pytest.mark.parametrize(
    ("name", "ranks", "size", "microseconds"),
    [
        # 4 us, 0.33 more for each of six; 7 messages of 16 KiB at 0.89 x 450 GB/s: one step.
        ("nvlink4", 8, 16384, 4 + 6 * 0.33 + 7 * 16384 / 400.5e3),
        ("nvlink4-nccl", 8, 16384, 12.1 + 6 * 1.9 + 7 * 16384 / 400.5e3),
        # As measured, to what the sources' own tables differ by.
        ("nvlink4", 2, 32768, pytest.approx(4.5, rel=0.15)),
        ("nvlink4", 4, 32768, pytest.approx(4.8, rel=0.15)),
        ("nvlink4", 8, 32768, pytest.approx(7.8, rel=0.2)),
        ("infinity-fabric", 8, 24576, pytest.approx(6.3, rel=0.05)),
        ("pcie5-p2p", 4, 8192, pytest.approx(13.9, rel=0.1)),
        ("pcie5-p2p", 8, 8192, pytest.approx(24.2, rel=0.1)),
        ("pcie3-p2p", 4, 4096, pytest.approx(19.4, rel=0.1)),
        ("pcie3-p2p", 4, 131072, pytest.approx(51.8, rel=0.1)),
        ("pcie3-p2p", 4, 393216, pytest.approx(83.5, rel=0.1)),
        ("200g-ethernet", 2, 16384, pytest.approx(31.7, rel=0.1)),
    ],
)
def test_links_take_what_their_sources_say(
    name: str, ranks: int, size: int, microseconds: float
) -> None:
    assert 1e6 * link_named(name).all_reduce_seconds(size, ranks) == pytest.approx(microseconds)


def test_presets_say_where_they_are_from() -> None:
    for name, device in DEVICES.items():
        assert device_named(name) is device
        assert device.name == name
        assert device.source
    for name, link in LINKS.items():
        assert link_named(name) is link
        assert link.name == name
        assert link.source


def test_a_measured_machine_is_kept(cache: Path) -> None:
    device = Device("this", 1e10, ((8, 1e9), (64, 2e9)), 1e-3, source="here")
    assert devices.save(device) == cache / "machine.json"
    assert device_named("this") == device
    assert [path.name for path in cache.iterdir()] == ["machine.json"]


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"name": "this", "flops": 3}', '{"flops": []}']
)
def test_a_broken_file_is_refused(cache: Path, content: str) -> None:
    cache.mkdir()
    (cache / "machine.json").write_text(content)
    with pytest.raises(
        UserError, match=r"machine\.json can't be read .*; allowed: what --calibrate"
    ):
        device_named("this")


class EventStandIn:
    """Stands in for a CUDA event on a CPU: its clock is the process's, and nothing is queued."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: EventStandIn) -> float:
        return 1e3 * (end.at - self.at)


class CudaTimerOnCpu(CudaTimer):
    """The CUDA timer, but for where its tensors are, how many and how large."""

    device, lot, ahead = "cpu", 4, 8

    def weight_bytes(self, rows: int) -> int:
        return super().weight_bytes(rows) >> 7


@pytest.mark.parametrize("timer", [CpuTimer(), CudaTimerOnCpu()])
def test_measures_products(timer: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", EventStandIn)
    shape = ModelShape.from_config({**CONFIG, "hidden_size": 256, "intermediate_size": 512})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for each other wherever cores are shared
    try:
        bandwidth, flops = measure_products(shape, 2, timer, torch.float32)
    finally:
        torch.set_num_threads(threads)
    assert 1e8 < bandwidth < 1e13
    assert [rows for rows, _ in flops] == list(ROWS)
    assert all(1e8 < rate < 1e14 for _, rate in flops)
    # Many rows share the reading of a weight: one row is never the cheapest per row. In float32:
    # some processors have no instructions for bfloat16, and are as slow with many rows.
    assert flops[-1][1] > 2 * bandwidth / shape.dtype_bytes


def test_a_gpu_is_timed_by_its_events_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock by hand: what is in front of the first event, and what the process itself takes,
    does not count."""
    now, calls = [7.0], []

    class Event(EventStandIn):
        def record(self) -> None:
            calls.append("record")
            self.at = now[0]

        def synchronize(self) -> None:
            calls.append("synchronize")

    def run() -> None:
        calls.append("run")
        now[0] += 0.25

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert CudaTimerOnCpu().seconds(run) == pytest.approx(0.25)
    assert calls == ["record", "run", "record", "synchronize"]


def test_weights_take_turns() -> None:
    """On a GPU 1 GiB of each shape and whole lots of 32, with any number of rows."""
    mib = 1 << 20
    assert [CudaTimer().copies(size * mib, rows) for size in (1, 48) for rows in (1, 512)] == [
        *(1024, 1024),
        *(32, 32),
    ]
    assert [CpuTimer().copies(mib, rows) for rows in (1, 8)] == [64, 1]


def test_calibrates(
    model: str,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Measures, keeps, predicts; and the next command, as a user runs it, needs no flag."""
    small = tmp_path / "small"
    small.mkdir()
    config = {**CONFIG, "num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 512}
    (small / "config.json").write_text(json.dumps(config))
    arguments = ["predict", str(small), "--plan", '{"pair": [0, 4]}', "--json"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    with forked_engines():
        assert main([*arguments, "--calibrate"]) == 0
    first = capsys.readouterr()
    assert "Saved in" in first.err
    kept = device_named("this")
    assert 1e-5 < kept.layer_seconds < 0.1
    assert 0 < kept.step_seconds < 0.5
    assert kept.reduce_seconds < kept.plain_reduce_seconds
    assert "bfloat16" in asdict(kept)["source"]
    command = [sys.executable, "-m", "vllm_depthpar.cli", *arguments]
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.stdout == first.out
    # Two blocks for four, on one rank: all of it is the fixed cost of layers.
    assert json.loads(first.out)["plans"][0]["decode"]["speedup"] > 1
