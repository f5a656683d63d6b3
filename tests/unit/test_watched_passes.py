"""Who watches a model's forward passes is told of each that serves requests, however it is run.

Both of vLLM's runners take part with what this package changes in them, and what it relies on in
them is read in their source: there is no GPU to run them on. `tests/e2e/test_metrics.py` runs the
first on a CPU.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
from torch import nn
from vllm.compilation.cuda_graph import CUDAGraphEntry, CUDAGraphWrapper
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import BatchDescriptor, set_forward_context
from vllm.platforms import current_platform
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker import gpu_model_runner as first
from vllm.v1.worker.gpu import cudagraph_utils, warmup
from vllm.v1.worker.gpu import model_runner as second

from vllm_depthpar.vllm_compat import watch_passes

BATCH = {"a": 1, "b": 7}


class Graph:
    """A CUDA graph that was captured."""

    replays = 0

    def replay(self) -> None:
        self.replays += 1


class Recorder:
    """What a watcher was told."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def begin(self, tokens: Collection[int]) -> None:
        self.told.append(list(tokens))

    def end(self) -> None:
        self.told.append("end")


def scheduled(tokens: dict[str, int]) -> SchedulerOutput:
    output = SchedulerOutput.make_empty()
    output.num_scheduled_tokens = tokens
    return output


def let_restore(patched: pytest.MonkeyPatch, owner: type, name: str) -> None:
    """Take back what is made of a method when the test ends."""
    patched.setattr(owner, name, vars(owner)[name])


Step = Callable[..., list[object]]


@pytest.fixture
def step_of_first(monkeypatch: pytest.MonkeyPatch) -> Step:
    """Run a step of vLLM's first runner in a mode of CUDA graphs, and return what was told.

    In place of the runner's `execute_model` stands what it does for a forward pass; that pass is
    run by vLLM's `_model_forward` and wrapper of graphs.
    """

    def execute_model(self: Any, scheduler_output: SchedulerOutput, mode: CUDAGraphMode) -> None:
        with set_forward_context(
            None, config, num_tokens=8, cudagraph_runtime_mode=mode, batch_descriptor=descriptor
        ):
            self._model_forward(torch.ones(8), None)

    config, descriptor = VllmConfig(), BatchDescriptor(num_tokens=8)
    runner = object.__new__(first.GPUModelRunner)
    monkeypatch.setattr(first.GPUModelRunner, "execute_model", execute_model)
    let_restore(monkeypatch, first.GPUModelRunner, "_model_forward")
    # Memory for graphs, which the wrapper asks for when it is made.
    monkeypatch.setattr(type(current_platform), "_global_graph_pool", (0, 0))

    def step(
        mode: CUDAGraphMode, tokens: dict[str, int] = BATCH, kind: type[nn.Module] = Takes
    ) -> list[object]:
        watcher, model = Recorder(), kind()
        watch_passes(Takes(), Recorder(), v2=False)  # a process may make several models
        watch_passes(getattr(model, "language_model", model), watcher, v2=False)
        wrapper = CUDAGraphWrapper(model, config, CUDAGraphMode.FULL)
        entry = CUDAGraphEntry(descriptor, cudagraph=Graph(), output=torch.ones(8))
        wrapper.concrete_cudagraph_entries[descriptor] = entry
        runner.model = wrapper
        runner.execute_model(scheduled(tokens), mode)
        assert entry.cudagraph.replays == (mode == CUDAGraphMode.FULL)
        with set_forward_context(None, config, cudagraph_runtime_mode=CUDAGraphMode.NONE):
            wrapper(torch.ones(8))  # as vLLM's own passes
        return watcher.told

    return step


class Takes(nn.Module):
    """A model that takes what a runner gives."""

    def forward(self, input_ids: torch.Tensor, **_: object) -> torch.Tensor:
        return input_ids


class Sees(nn.Module):
    """A model that calls a part of the language model inside it, as vLLM's that see do."""

    def __init__(self) -> None:
        super().__init__()
        self.language_model: Any = nn.Module()
        self.language_model.model = Takes()

    def forward(self, input_ids: torch.Tensor, **_: object) -> torch.Tensor:
        output: torch.Tensor = self.language_model.model(input_ids)
        return output


@pytest.mark.parametrize("kind", [Takes, Sees])
@pytest.mark.parametrize(
    "mode", [CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL], ids=lambda m: m.name
)
def test_first_runner(step_of_first: Step, mode: CUDAGraphMode, kind: type[nn.Module]) -> None:
    assert step_of_first(mode, kind=kind) == [[1, 7], "end"]


@pytest.mark.parametrize(
    "name", ["_warmup_0_", "_v2_mixed_warmup_prefill", "_sparse_mla_v2_warmup"]
)
def test_warm_up_is_not_told(step_of_first: Step, name: str) -> None:
    assert step_of_first(CUDAGraphMode.NONE, {name: 2}) == []


@pytest.mark.parametrize("kind", [Takes, Sees])
def test_second_runner(monkeypatch: pytest.MonkeyPatch, kind: type[nn.Module]) -> None:
    """Whole graphs are replayed by vLLM's own manager, other passes are the model's."""

    def execute_model(
        self: Any, scheduler_output: SchedulerOutput, *, whole: bool, dummy_run: bool = False
    ) -> Any:
        if whole:
            return self.cudagraph_manager.run_fullgraph(descriptor)
        return self.model(torch.ones(8))

    manager_class, runner_class = cudagraph_utils.ModelCudaGraphManager, second.GPUModelRunner
    monkeypatch.setattr(runner_class, "execute_model", execute_model)
    let_restore(monkeypatch, manager_class, "run_fullgraph")
    descriptor = cudagraph_utils.BatchExecutionDescriptor(CUDAGraphMode.FULL, 8, 8)
    manager = object.__new__(manager_class)
    manager.graphs = {descriptor: Graph()}
    manager.is_last_pp_rank, manager.use_aux_hidden_state_outputs = True, False
    manager.hidden_states = torch.ones(8)
    watcher, runner = Recorder(), object.__new__(runner_class)
    runner.model, runner.cudagraph_manager = kind(), manager
    watch_passes(getattr(runner.model, "language_model", runner.model), watcher, v2=True)

    for whole in (True, False):
        output = runner.execute_model(scheduled(BATCH), whole=whole)
        assert torch.equal(output, torch.ones(8))
        assert watcher.told == [[1, 7], "end"]
        watcher.told.clear()
        runner.execute_model(scheduled(BATCH), whole=whole, dummy_run=True)
        assert watcher.told == []
    assert manager.graphs[descriptor].replays == 2


def test_another_model_is_let_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """One without a watcher in a process that has had one with."""
    ran = []

    def execute_model(self: Any, scheduler_output: SchedulerOutput) -> None:
        ran.append(scheduler_output)

    monkeypatch.setattr(first.GPUModelRunner, "execute_model", execute_model)
    let_restore(monkeypatch, first.GPUModelRunner, "_model_forward")
    watch_passes(Takes(), Recorder(), v2=False)
    runner = object.__new__(first.GPUModelRunner)
    runner.model = nn.Identity()
    runner.execute_model(scheduled(BATCH))
    assert len(ran) == 1


def source_of(function: Callable[..., Any]) -> str:
    return inspect.getsource(inspect.unwrap(function))


def test_what_is_relied_on_in_the_runners() -> None:
    before = source_of(first.GPUModelRunner.execute_model)
    assert before.count("self._model_forward(") == 1
    assert "self.model(" not in before
    assert "_model_forward(" not in source_of(first.GPUModelRunner._dummy_run)
    assert "execute_model(" not in source_of(first.GPUModelRunner._dummy_run)

    now = source_of(second.GPUModelRunner.execute_model)
    assert "self.cudagraph_manager.run_fullgraph(batch_desc)" in now
    assert "self.cudagraph_manager.run_pw_graph(" in now
    assert now.count("self.model(") == 1
    assert "dummy_run=True" in source_of(second.GPUModelRunner._dummy_run)
    assert "= ModelCudaGraphManager(" in inspect.getsource(second)
    assert "num_scheduled_tokens" in SchedulerOutput.__dataclass_fields__
    assert isinstance(inspect.getattr_static(VllmConfig, "use_v2_model_runner"), property)

    assert 'f"_warmup_{i}_"' in source_of(warmup._warmup_kernels)
    mixed = inspect.signature(warmup.run_mixed_prefill_decode_warmup).parameters
    assert mixed["req_id_prefix"].default == "_v2_mixed_warmup"


def test_flashinfer_over_pcie_is_where_it_is_looked_for() -> None:
    from vllm.distributed.device_communicators import (
        cuda_communicator,
        flashinfer_pcie_ipc_all_reduce,
    )

    source = inspect.getsource(cuda_communicator.CudaCommunicator.__init__)
    assert "self.fi_pcie_ipc_ar_comm: FlashInferPcieIpcAllReduce | None = None" in source
    assert "self.disabled = False" in inspect.getsource(
        flashinfer_pcie_ipc_all_reduce.FlashInferPcieIpcAllReduce
    )
