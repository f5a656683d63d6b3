"""Forward passes and their all-reduces are timed, on a CPU and on a simulated GPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import simulated_cuda
import torch
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.samples import Sample

from vllm_depthpar.metrics.all_reduce_timer import AllReduceTimer, time_with
from vllm_depthpar.metrics.clocks import Clock, CudaClock, HostClock, clock_for
from vllm_depthpar.metrics.forward_timer import PENDING, Meter, bucket_of
from vllm_depthpar.metrics.metric_files import MetricFiles
from vllm_depthpar.model import reductions
from vllm_depthpar.model.reductions import Reductions

ALL_REDUCE = 5.0


def meter(folder: Path, clock: Clock, every: int = 1, ranks: int = 1) -> Meter:
    files = MetricFiles(folder, "worker", {"model_name": "m", "engine": "0"})
    return Meter(files, clock, every, ranks, decode_tokens=1)


def published(folder: Path) -> list[Sample]:
    merged = MultiProcessCollector(None, path=str(folder)).collect()
    return [sample for metric in merged for sample in metric.samples]


def value(folder: Path, name: str, **labels: str) -> float:
    """The one sample of a name with these labels; 0 if there is none."""
    found = [
        sample.value
        for sample in published(folder)
        if sample.name == f"vllm:depthpar_{name}" and labels.items() <= sample.labels.items()
    ]
    assert len(found) < 2
    return sum(found)


def test_every_third_forward_pass_is_timed(tmp_path: Path) -> None:
    """On one rank: no all-reduces."""
    third = meter(tmp_path, HostClock(), every=3)
    for _ in range(7):
        third.begin([1, 1, 1, 1])
        third.end()
    assert value(tmp_path, "forward_seconds_count", phase="decode", batch_size="3-4") == 3
    found = {sample.name.removeprefix("vllm:depthpar_") for sample in published(tmp_path)}
    assert {name.partition("_")[0] for name in found} == {"forward", "forwards"}


def test_a_pass_with_prompt_tokens_is_prefill(tmp_path: Path) -> None:
    each = meter(tmp_path, HostClock())
    each.begin([1, 17, 1])
    each.end()
    assert value(tmp_path, "forward_seconds_count", phase="prefill", batch_size="3-4") == 1


class Readings:
    """A clock with given readings."""

    def __init__(self, *readings: float) -> None:
        self._left = iter(readings)

    def mark(self) -> float:
        return next(self._left)

    def is_over(self, mark: float) -> bool:
        return True

    def seconds(self, begun: float, ended: float) -> float:
        return ended - begun


def test_what_two_all_reduces_in_flight_hide() -> None:
    """What is computed while one of them is on its way counts once."""
    # The first starts from 10 to 11, the second from 15 to 16; the first is waited for from 18 to
    # 20, the second from 21 to 22.
    timer = AllReduceTimer(Readings(10, 11, 15, 16, 18, 20, 21, 22))
    term = torch.ones(1)
    waits = [timer.apart(lambda: lambda: term) for _ in range(2)]
    assert all(wait() is term for wait in waits)
    assert timer.count == 2
    assert timer.seconds() == (5, 7)


def test_bounds_of_batch_sizes() -> None:
    sizes = [bucket_of(n) for n in (1, 2, 3, 4, 5, 8, 9, 16, 256)]
    assert sizes == ["1", "2", "3-4", "3-4", "5-8", "5-8", "9-16", "9-16", "129-256"]


def test_devices_have_clocks() -> None:
    assert isinstance(clock_for("cpu"), HostClock)
    assert isinstance(clock_for("cuda"), CudaClock)
    assert clock_for("xpu") is None


# What follows runs on stand-ins for CUDA's streams and events (`simulated_cuda`), not on a GPU.


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> simulated_cuda.Device:
    return simulated_cuda.install(monkeypatch)


def test_gpu_passes_are_read_when_they_are_over(
    device: simulated_cuda.Device, tmp_path: Path
) -> None:
    """Three passes are enqueued before the first is over; each keeps its own batch."""
    ahead = meter(tmp_path, CudaClock())
    for seconds, tokens in ((2.0, [1, 1, 1]), (3.0, [9]), (4.0, [1])):
        ahead.begin(tokens)
        device.works(seconds)
        ahead.end()
    assert value(tmp_path, "forward_seconds_count") == 0
    device.now = 2.0
    ahead.begin([1] * 8)
    assert value(tmp_path, "forward_seconds_sum", phase="decode", batch_size="3-4") == 2
    assert value(tmp_path, "forward_seconds_count") == 1
    ahead.end()
    device.catches_up()
    ahead.begin([1])
    assert value(tmp_path, "forward_seconds_sum", phase="prefill", batch_size="1") == 3
    assert value(tmp_path, "forward_seconds_sum", phase="decode", batch_size="1") == 4
    assert value(tmp_path, "forward_seconds_count", phase="decode", batch_size="5-8") == 1


def test_a_gpu_that_hangs_holds_few_events(device: simulated_cuda.Device, tmp_path: Path) -> None:
    hanging = meter(tmp_path, CudaClock(), every=2)
    for _ in range(2 * (PENDING + 5)):
        hanging.begin([1])
        device.works(1.0)
        hanging.end()
    assert value(tmp_path, "forward_seconds_count") == 0
    assert value(tmp_path, "forwards_dropped_total") == 5
    device.catches_up()
    hanging.begin([1])
    assert value(tmp_path, "forward_seconds_count") == PENDING


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


@pytest.fixture
def two_gpus(device: simulated_cuda.Device, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A group of two ranks, whose all-reduces take the stream that they are in `ALL_REDUCE` s."""

    def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
        device.works(ALL_REDUCE)
        return 2 * tensor

    group = SimpleNamespace(
        unique_name="tp:0",
        world_size=2,
        device=torch.device("cuda"),
        device_communicator=SimpleNamespace(fi_pcie_ipc_ar_comm=None),
        all_reduce=all_reduce,
    )
    monkeypatch.setattr(reductions, "get_tp_group", lambda: group)
    monkeypatch.setattr(reductions, "group_named", lambda _: group)
    monkeypatch.setattr(reductions, "communicator_all_reduce", lambda _, tensor: all_reduce(tensor))
    monkeypatch.setattr(reductions, "side_streams", {})
    return group


def beside(device: simulated_cuda.Device, computing: float) -> tuple[float, float]:
    """Exposed and hidden seconds of an all-reduce beside so many seconds of work."""
    timer, both = AllReduceTimer(CudaClock()), Reductions()
    time_with(timer)
    flight = both.start(torch.ones(3).as_subclass(OnGpu))
    device.works(computing)
    total = both.wait(flight)
    time_with(None)
    assert torch.equal(total, torch.full((3,), 2.0))
    assert timer.count == 1
    device.catches_up()
    return timer.seconds()


@pytest.mark.parametrize(
    ("computing", "exposed", "hidden"), [(3.0, 2.0, 3.0), (8.0, 0.0, 5.0), (0.0, 5.0, 0.0)]
)
def test_gpu_all_reduces_hide_behind_work(
    device: simulated_cuda.Device,
    two_gpus: SimpleNamespace,
    computing: float,
    exposed: float,
    hidden: float,
) -> None:
    assert beside(device, computing) == (exposed, hidden)
    assert device.compute.ends == max(computing, ALL_REDUCE)


def test_gpu_all_reduces_of_a_piece_are_exposed(
    device: simulated_cuda.Device, two_gpus: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reductions, "capturing_a_piece", lambda: True)
    assert beside(device, 8.0) == (ALL_REDUCE, 0.0)
    assert device.compute.ends == 8 + ALL_REDUCE


def test_gpu_all_reduces_of_vllms_are_exposed(
    device: simulated_cuda.Device, two_gpus: SimpleNamespace
) -> None:
    timer = AllReduceTimer(CudaClock())
    time_with(timer)
    Reductions().all_reduce(torch.ones(3).as_subclass(OnGpu))
    time_with(None)
    device.catches_up()
    assert (timer.count, *timer.seconds()) == (1, ALL_REDUCE, 0.0)


def test_one_stream_is_enough_for_flashinfer_over_pcie(
    device: simulated_cuda.Device, two_gpus: SimpleNamespace
) -> None:
    """Its workspace refuses a second stream: a ladder's all-reduces stay on the first."""
    over_pcie = SimpleNamespace(disabled=False)
    two_gpus.device_communicator.fi_pcie_ipc_ar_comm = over_pcie
    found = Reductions()
    assert not found.overlap
    assert "VLLM_ALLREDUCE_USE_FLASHINFER_PCIE_IPC=1" in str(found.hindrance)
    assert beside(device, 8.0) == (ALL_REDUCE, 0.0)
    assert device.compute.ends == 8 + ALL_REDUCE
    over_pcie.disabled = True
    assert Reductions().overlap


def test_gpu_pass_with_a_ladder(
    device: simulated_cuda.Device, two_gpus: SimpleNamespace, tmp_path: Path
) -> None:
    both, timed = Reductions(), meter(tmp_path, CudaClock(), ranks=2)
    for _ in range(2):  # the second is published by itself, too
        timed.begin([1, 1])
        both.all_reduce(torch.ones(3).as_subclass(OnGpu))
        flight = both.start(torch.ones(3).as_subclass(OnGpu))
        device.works(3.0)
        both.wait(flight)
        timed.end()
        device.catches_up()
    timed.begin([1])
    decode = {"phase": "decode"}
    assert value(tmp_path, "all_reduces_total", **decode) == 4
    assert value(tmp_path, "all_reduce_seconds_total", **decode, kind="exposed") == 14
    assert value(tmp_path, "all_reduce_seconds_total", **decode, kind="hidden") == 6
    assert value(tmp_path, "all_reduce_forward_seconds_total", **decode) == 20


def test_a_replayed_graph_has_no_times_of_all_reduces(
    device: simulated_cuda.Device, two_gpus: SimpleNamespace, tmp_path: Path
) -> None:
    graph = meter(tmp_path, CudaClock(), ranks=2)
    graph.begin([1])
    device.works(9.0)  # Python runs for none of its all-reduces
    graph.end()
    device.catches_up()
    graph.begin([1])
    assert value(tmp_path, "forward_seconds_sum", phase="decode") == 9
    assert not [sample for sample in published(tmp_path) if "all_reduce" in sample.name]
