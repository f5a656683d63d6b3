"""Every touch of vLLM that is not documented API, in one place.

Checked on CPUs with vLLM 0.32.0, and with 0.33.0's Python on 0.32.0's kernels (`make test-next`).
Each entry says what it relies on. A later vLLM: re-read the places named here, run the tests, then
widen `plugin.SUPPORTED`.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import distributed, nn
from vllm import envs
from vllm.config import (
    CompilationMode,
    CUDAGraphMode,
    ModelConfig,
    VllmConfig,
    get_current_vllm_config,
)
from vllm.distributed import get_tp_group, parallel_state
from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed
from vllm.distributed.parallel_state import GroupCoordinator
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.logger import init_logger
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.platforms import current_platform
from vllm.ray import ray_env
from vllm.transformers_utils.repo_utils import is_mistral_model_repo
from vllm.triton_utils import HAS_TRITON
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.model_executor.layers.attention import Attention

# Under vLLM's own logger, so that its level, format and handlers apply.
logger = init_logger("vllm.depthpar")


def is_registered(architecture: str) -> bool:
    """Whether `register` was called for an architecture in this process."""
    return architecture in MODELS_CONFIG_MAP


def register(architecture: str, model: str, config: type[VerifyAndUpdateConfig]) -> None:
    """Teach this process's vLLM an architecture.

    Relies on: `MODELS_CONFIG_MAP` is consulted with the resolved architecture at the end of
    `ModelConfig.__post_init__`, and by `VllmConfig.__post_init__` before sizes are checked.

    Args:
        model: its class, as "module:class", which is imported when it is needed.
        config: what looks at the config while that is made.
    """
    ModelRegistry.register_model(architecture, model)
    MODELS_CONFIG_MAP[architecture] = config


def settle_as_vllm_does(architecture: str, vllm_config: VllmConfig) -> None:
    """Change in a config what vLLM itself does for its class of a family, if it does: of gpt-oss
    the parser of its answers, and the sizes of CUDA graphs.

    Relies on: see `register`.
    """
    if (own := MODELS_CONFIG_MAP.get(architecture)) is not None:
        own.verify_and_update_config(vllm_config)


Select = Callable[[Sequence[str], ModelConfig], Sequence[str]]


def let_select_architectures(select: Select) -> None:
    """Let a function say which architectures vLLM looks for, given those of config.json.

    Relies on: the registry's two look-ups take (architectures, model_config), and every look-up
    goes through them.
    """
    registry = type(ModelRegistry)
    for name in ("inspect_model_cls", "resolve_model_cls"):
        setattr(registry, name, _selecting(getattr(registry, name), select))


def _selecting(method: Callable[..., Any], select: Select) -> Callable[..., Any]:
    @wraps(method)
    def look_up(self: Any, architectures: str | list[str], model_config: ModelConfig) -> Any:
        names = [architectures] if isinstance(architectures, str) else architectures
        return method(self, list(select(names, model_config)), model_config)

    return look_up


@contextlib.contextmanager
def language_model_of_qwen3_vl(model: type[nn.Module]) -> Iterator[None]:
    """Have Qwen3-VL take another class for its language model, where it is made meanwhile.

    Relies on: its `__init__` looks the class up in its module, as `Qwen3LLMForCausalLM`, instead of
    asking the registry as other models that see do, and calls its `model`, like
    `Qwen3LLMModel.forward`, with `deepstack_input_embeds`.
    """
    # It imports what only models that see need.
    from vllm.model_executor.models import qwen3_vl

    theirs = qwen3_vl.Qwen3LLMForCausalLM
    qwen3_vl.Qwen3LLMForCausalLM = model
    try:
        yield
    finally:
        qwen3_vl.Qwen3LLMForCausalLM = theirs


def let_ray_copy(prefix: str) -> None:
    """Have vLLM give the environment variables of a prefix to the processes that Ray starts for it.

    The workers of vLLM's newer executor on Ray get the whole environment; those of the older one
    (VLLM_USE_RAY_V2_EXECUTOR_BACKEND=0), and engines in data parallelism, what is named.

    Relies on: `ray_env.DEFAULT_ENV_VAR_PREFIXES` is a set that is read when they are started.
    """
    ray_env.DEFAULT_ENV_VAR_PREFIXES.add(prefix)


def is_mistral_format(model_config: ModelConfig) -> bool:
    """Whether a checkpoint has the tensor names of Mistral's own format.

    Relies on: the loader takes `consolidated*.safetensors` by itself where they are.
    """
    return bool(is_mistral_model_repo(model_config.model, model_config.revision))


def ranks_of(model_config: ModelConfig) -> distributed.ProcessGroup | None:
    """Find the ranks that make a model now, as a group of their CPUs; None for one rank alone.

    A draft is made by those that share its layers: the others may have none.

    Relies on: `cpu_group` of vLLM's groups is a process group of torch.distributed.
    """
    draft = model_config.runner_type == "draft"
    group = get_tp_group() if draft else parallel_state.get_world_group()
    return group.cpu_group if group.world_size > 1 else None


def compiles(vllm_config: VllmConfig) -> bool:
    """Whether vLLM gives the model to torch.compile."""
    return vllm_config.compilation_config.mode != CompilationMode.NONE


def forget_attention(vllm_config: VllmConfig, name: str) -> None:
    """Let vLLM make no KV cache for an attention that was built and is not kept.

    Relies on: attentions are in `static_forward_context` by their names once they are built.
    """
    del vllm_config.compilation_config.static_forward_context[name]


def forget_experts(vllm_config: VllmConfig, name: str) -> None:
    """Let vLLM know of no experts that were built and are not kept, if those are experts.

    Relies on: they are in `static_forward_context` and `static_all_moe_layers` by their names once
    they are built.
    """
    compilation = vllm_config.compilation_config
    if compilation.static_forward_context.pop(name, None) is not None:
        compilation.static_all_moe_layers.remove(name)


def leave_sums(module: Any, last: str) -> None:
    """Let an attention or an MLP return what this rank computes of it, not the sum over the ranks.

    Relies on: `RowParallelLinear.reduce_results`; where there are experts, `MoERunner` asks its
    `moe_config.skip_final_all_reduce` at every call, as vLLM's own models do that reduce later.

    Args:
        last: the name of its last projection, unless it is many experts.
    """
    if hasattr(module, "experts"):
        module.experts.moe_config.skip_final_all_reduce = True
    else:
        getattr(module, last).reduce_results = False


def runs_experts_beside_adapters() -> bool:
    """Whether vLLM has a kernel for experts here where adapters are served, whatever these are of.

    Relies on: `select_unquantized_moe_backend` takes Triton's wherever they are, before it looks
    at the platform, and CPUs' build has no Triton.
    """
    return not current_platform.is_cpu() or HAS_TRITON


# What gpt-oss's checkpoints call tensors of all experts, to vLLM's parameter and its shard's id.
_STACKED = {
    "gate_up_proj": ("w13_weight", "gpt_oss_w13"),
    "gate_up_proj_bias": ("w13_bias", "gpt_oss_w13"),
    "down_proj": ("w2_weight", "gpt_oss_w2"),
    "down_proj_bias": ("w2_bias", "gpt_oss_w2"),
}


def load_stacked_experts(experts: Any, name: str, tensor: torch.Tensor) -> str:
    """Load a tensor of all of gpt-oss's experts, as its checkpoints have it.

    Relies on: a `MoERunner` has its `routed_experts`, and `GptOssRoutedExperts.weight_loader` takes
    one expert's tensor by ids of its own, and gives each rank its part; of `down_proj`'s bias the
    first has all, and the others none.

    Args:
        name: in the checkpoint's `experts`.

    Returns:
        The parameter's name in `experts`.
    """
    parameter, shard = _STACKED[name]
    weights = getattr(experts.routed_experts, parameter)
    for expert, of_one in enumerate(tensor):
        weights.weight_loader(weights, of_one, parameter, shard, expert)
    return f"routed_experts.{parameter}"


def unit_of_stacked_experts() -> int:
    """Find of what number a rank's share of gpt-oss's intermediate size must be a multiple here; 1
    where vLLM's kernels ask for nothing, as on GPUs.

    On CPUs it is 32 mostly; to it vLLM pads other families' experts, but not these, whose gate and
    up are interleaved. No kernel takes other shares, and vLLM's error names no size.

    Relies on: an engine takes the first of `backend_to_kernel_cls` whose device this is and whose
    `output_alignment` divides the share, or any with zentorch's `zentorch_fused_moe`.
    """
    if not current_platform.is_cpu():
        return 1
    # Imported by a worker that serves experts anyway.
    from vllm.model_executor.kernels.linear.zentorch_utils import has_zentorch_op
    from vllm.model_executor.layers.fused_moe.oracle import unquantized

    if has_zentorch_op(["zentorch_fused_moe"]):
        return 1
    kernels: Any = unquantized.backend_to_kernel_cls(unquantized.UnquantizedMoeBackend.CPU)
    return min(one.output_alignment for one in kernels if one._supports_current_device())


def on_weights_loaded(attention: Attention, call: Callable[[], None]) -> None:
    """Have a function called whenever weights have been loaded: all of a checkpoint's, or those of
    one update, be they all or not.

    Relies on: `process_weights_after_loading` and `finalize_layerwise_reload` call the first's
    namesake of every attention, after all other layers'.
    """
    process = attention.process_weights_after_loading

    @wraps(process)
    def process_weights_after_loading(act_dtype: torch.dtype) -> None:
        process(act_dtype)
        call()

    attention.process_weights_after_loading = process_weights_after_loading


def let_draft_blocks_differ() -> None:
    """Give a draft model's blocks of each width attention metadata of their own. Idempotent.

    vLLM builds one for all draft layers of a backend, from the first one's spec. On a CPU it sizes
    a scratchpad by that layer's heads, and a wider layer writes behind its end.

    Relies on: `initialize_attn_backend` runs after the draft model is made and in its process, and
    leaves `draft_attn_groups`, each with the metadata that its layers are given at every step; all
    draft layers are in one KV cache group, whose spec holds that of each layer where they differ;
    the draft model's proposer inherits the method.
    """
    # A worker has them already; other processes, which import this module too, do without.
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec, UniformTypeKVCacheSpecs
    from vllm.v1.spec_decode.draft_model import DraftModelProposer
    from vllm.v1.worker.utils import AttentionGroup

    if "initialize_attn_backend" in vars(DraftModelProposer):
        return
    inherited = DraftModelProposer.initialize_attn_backend

    @wraps(inherited)
    def initialize_attn_backend(
        self: DraftModelProposer,
        kv_cache_config: KVCacheConfig,
        kernel_block_sizes: list[int] | None = None,
    ) -> None:
        inherited(self, kv_cache_config, kernel_block_sizes)
        index = self.kv_cache_gid
        specs = kv_cache_config.kv_cache_groups[index].kv_cache_spec
        if not isinstance(specs, UniformTypeKVCacheSpecs):  # all are alike
            return
        size = kernel_block_sizes[index] if kernel_block_sizes is not None else None
        alike: dict[tuple[type, KVCacheSpec], list[str]] = defaultdict(list)
        for group in self.draft_attn_groups:
            for name in group.layer_names:
                alike[group.backend, specs.kv_cache_specs[name]].append(name)
        self.draft_attn_groups = [
            AttentionGroup(backend, names, spec, index) for (backend, spec), names in alike.items()
        ]
        for group in self.draft_attn_groups:
            group.create_metadata_builders(self.vllm_config, self.device, kernel_block_size=size)

    DraftModelProposer.initialize_attn_backend = initialize_attn_backend


def shut_down(engine: LLM) -> None:
    """End an engine and its workers now: when the interpreter exits it is too late, since Python
    ends vLLM's workers first, and their shared memory stays.

    Relies on: every client of vLLM's core has `shutdown`.
    """
    engine.llm_engine.engine_core.shutdown()


def how_it_runs(engine: LLM) -> dict[str, str]:
    """Read an engine's dtype, its mode, and what it quantizes, as `depthpar verify` says them.

    Relies on: `LLMEngine.vllm_config` is as the workers have it; eager engines have no
    `CompilationMode`, and on a CPU there are no CUDA graphs, whatever its mode of them says.
    """
    config = engine.llm_engine.vllm_config
    mode = "compiled" if compiles(config) else "eager"
    graphs = config.compilation_config.cudagraph_mode
    if not current_platform.is_cpu() and graphs not in (None, CUDAGraphMode.NONE):
        mode += f", CUDA graphs {graphs.name.lower()}"
    kinds = [config.model_config.quantization]
    if kv_cache_bytes(config) < config.model_config.dtype.itemsize:
        kinds.append(f"KV cache {config.cache_config.cache_dtype}")
    return {
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "mode": mode,
        "quantized": ", ".join(filter(None, kinds)),
    }


def kv_cache_bytes(vllm_config: VllmConfig) -> int:
    """Bytes of one element of the KV cache.

    Relies on: `CacheConfig.cache_dtype` is "auto", the model's, or a key of vLLM's table.
    """
    name = vllm_config.cache_config.cache_dtype
    dtype = STR_DTYPE_TO_TORCH_DTYPE.get(name, vllm_config.model_config.dtype)
    return int(dtype.itemsize)


class Watcher(Protocol):
    """What is told of a model's forward passes."""

    def begin(self, tokens: Collection[int]) -> None:
        """Note that a pass begins.

        Args:
            tokens: new ones of each sequence in the batch.
        """

    def end(self) -> None:
        """Note that all of it was given to the device."""


# The attribute of a model that names its watcher; of the one a runner calls, who is told of calls.
_WATCHER = "depthpar_watcher"
_TOLD_OF_CALLS = "depthpar_told_of_calls"
# That of the model whose step runs in this process, and the step's tokens.
_step: tuple[Watcher, Collection[int]] | None = None
# What vLLM calls the requests by which it warms up: "_warmup_0_", "_v2_mixed_warmup_decode", ...
_WARM_UP = re.compile(r"_\w*warmup")


def watch_passes(model: nn.Module, watcher: Watcher, v2: bool) -> None:
    """Tell a watcher of a model's forward passes that serve requests, however they are run; not of
    those by which vLLM profiles memory, compiles, warms up and captures graphs.

    Nor of those that VLLM_USE_BREAKABLE_CUDAGRAPH=1 replays piece by piece without the model.

    Relies on: a runner calls its `model` for one forward pass in an `execute_model`, which gets
    what the scheduler made; vLLM's own passes come another way, or with `dummy_run=True`, or with
    requests named as `_WARM_UP`. What replays a CUDA graph of a whole pass, and calls no model, is
    `_model_forward` in vLLM's first runner, `ModelCudaGraphManager.run_fullgraph` in its second.

    Args:
        model: a runner's, or one inside it: a model that sees calls parts of its language model.
        v2: whether it is the second that runs (`VllmConfig.use_v2_model_runner`).
    """
    setattr(model, _WATCHER, watcher)
    # A worker has them already; other processes, which import this module too, do without.
    if v2:
        from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner

        _wrap(ModelCudaGraphManager, "run_fullgraph", _telling_of_replays)
    else:
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        _wrap(GPUModelRunner, "_model_forward", _telling_of_replays)
    _wrap(GPUModelRunner, "execute_model", _telling_of_steps)


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace a method by what a wrapper makes of it, once."""
    method = getattr(owner, name)
    if not hasattr(method, _WATCHER):
        telling = wrapper(method)
        setattr(telling, _WATCHER, None)
        setattr(owner, name, telling)


def _watcher_of(model: Any) -> Watcher | None:
    """Find the watcher of a runner's model, and tell it of the model's calls from the first time
    on; None if nothing in it is watched."""
    if not hasattr(model, _TOLD_OF_CALLS):
        watched = (module for module in model.modules() if hasattr(module, _WATCHER))
        watcher = getattr(next(watched, None), _WATCHER, None)
        setattr(model, _TOLD_OF_CALLS, watcher)
        if watcher is not None:
            model.register_forward_pre_hook(_begin)
            model.register_forward_hook(_end)
    found: Watcher | None = getattr(model, _TOLD_OF_CALLS)
    return found


def _telling_of_steps(execute_model: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(execute_model)
    def execute(self: Any, scheduler_output: Any, *args: Any, **options: Any) -> Any:
        global _step
        watcher = _watcher_of(self.model)
        tokens = scheduler_output.num_scheduled_tokens
        own = options.get("dummy_run") or _WARM_UP.match(next(iter(tokens), ""))
        if watcher is None or own:
            return execute_model(self, scheduler_output, *args, **options)
        _step = watcher, tokens.values()
        try:
            return execute_model(self, scheduler_output, *args, **options)
        finally:
            _step = None

    return execute


def _telling_of_replays(run: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(run)
    def replay(self: Any, *args: Any, **options: Any) -> Any:
        # The first runner's is called for every pass, in a context that says of which kind it is.
        if is_forward_context_available() and (
            get_forward_context().cudagraph_runtime_mode != CUDAGraphMode.FULL
        ):
            return run(self, *args, **options)
        _begin()
        output = run(self, *args, **options)
        _end()
        return output

    return replay


def _begin(*_: Any) -> None:
    # Where torch.compile is given the whole model, hooks included, this is a constant to it.
    if not torch.compiler.is_compiling() and _step is not None:
        watcher, tokens = _step
        watcher.begin(tokens)


def _end(*_: Any) -> None:
    if not torch.compiler.is_compiling() and _step is not None:
        _step[0].end()


# The attribute of a model that is told of adapters.
_TOLD = "depthpar_told_of_adapters"


def tell_of_adapters(model: nn.Module, tell: Callable[[Collection[str]], None]) -> None:
    """Have a function called with the names of an adapter's modules whenever one is added.

    And mend what makes a batch with adapters and without wrong on a CPU: see
    `_leaving_others_alone`.

    Args:
        model: the one that has adapters, or one inside it, as a language model that sees is: that
            is told of its own modules, by the names that they have in it.

    Relies on: `LoRAModelManager._add_adapter` gets each, with its weights by module in `loras`,
    under the names that the manager's `model` has for them.
    """
    # Imported by a worker that serves adapters anyway, and by nobody else.
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    setattr(model, _TOLD, tell)
    _wrap(LoRAModelManager, "_add_adapter", _telling_of_adapters)
    _wrap(lora_ops, "bgmv_shrink", _leaving_others_alone)
    punica_cpu.bgmv_shrink = lora_ops.bgmv_shrink


def _telling_of_adapters(add: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(add)
    def add_adapter(self: Any, lora: Any) -> Any:
        names = list(lora.loras)  # adding merges some
        added = add(self, lora)
        for place, model in self.model.named_modules():
            if (tell := getattr(model, _TOLD, None)) is not None:
                inside = f"{place}." if place else ""
                tell([name.removeprefix(inside) for name in names if name.startswith(inside)])
        return added

    return add_adapter


def _leaving_others_alone(shrink: Callable[..., Any]) -> Callable[..., Any]:
    """Let the first of an adapter's two products be zero for tokens without an adapter.

    Their index is -1, by which vLLM's PyTorch kernels take the weights in the last slot
    (vllm-project/vllm#48421, open in 0.33).

    Relies on: the second product is of this one's output, and all prefill goes through it.
    """

    @wraps(shrink)
    def shrink_those_with_one(
        inputs: torch.Tensor,
        weights: torch.Tensor,
        output: torch.Tensor,
        slots: torch.Tensor,
        scaling: float = 1.0,
    ) -> None:
        shrink(inputs, weights, output, slots, scaling)
        output.masked_fill_((slots < 0)[:, None], 0)

    return shrink_those_with_one


def group_named(name: str) -> GroupCoordinator:
    """Find the live group with a unique name, as vLLM's own collective ops look it up.

    Relies on: `parallel_state._groups` maps names to weak references.
    """
    group = parallel_state._groups[name]()
    if group is None:
        raise RuntimeError(f"group {name} is destroyed")
    return group


def communicator_all_reduce(group: GroupCoordinator, tensor: torch.Tensor) -> torch.Tensor:
    """All-reduce as vLLM's op does on a GPU, by what suits the size; into a new tensor.

    Relies on: `_all_reduce_out_place` uses the current stream.
    """
    return group._all_reduce_out_place(tensor)


def reduces_over_shared_memory(group: GroupCoordinator) -> bool:
    """Whether a CPU group's ranks share a host and all-reduce through its memory.

    Relies on: `CpuCommunicator.dist_module` is torch.distributed where they don't.
    """
    communicator = group.device_communicator
    return isinstance(getattr(communicator, "dist_module", None), _CPUSHMDistributed)


def reduces_on_one_stream(group: GroupCoordinator) -> bool:
    """Whether a GPU group may all-reduce with what refuses a second stream.

    That is FlashInfer's all-reduce over PCIe, of VLLM_ALLREDUCE_USE_FLASHINFER_PCIE_IPC=1: the
    counters of its one workspace take its calls for totally ordered, and it raises if they are not
    all on the stream of the first.

    VLLM_USE_NCCL_SYMM_MEM=1 is no such case. The calls of one communicator have to be ordered,
    which events do across two streams; its buffers come from PyTorch's allocator, which reuses a
    block on the stream only that it was made on; and all ranks register new memory in the order of
    their calls, which is the program's.

    Relies on: `CudaCommunicator.fi_pcie_ipc_ar_comm` is None where it was not asked for, and is
    `disabled` where it cannot be.
    """
    over_pcie = getattr(group.device_communicator, "fi_pcie_ipc_ar_comm", None)
    return over_pcie is not None and not over_pcie.disabled


def has_shared_memory_all_reduce() -> bool:
    """Whether vLLM's CPU kernels for this processor have it: those for AVX2 alone have not.

    Relies on: `CpuCommunicator` looks for the operator `init_shm_manager`.
    """
    current_platform.import_kernels()
    return hasattr(torch.ops._C, "init_shm_manager")


def this_host() -> str:
    """Find the address of this host as other hosts of the model reach it.

    VLLM_HOST_IP, or that of the interface from which the host of rank 0 is reached.
    """
    if envs.VLLM_HOST_IP:
        return str(envs.VLLM_HOST_IP)
    config = get_current_vllm_config().parallel_config
    first = config.master_addr if config.nnodes > 1 else os.environ.get("MASTER_ADDR", "127.0.0.1")
    family, _, _, _, address = socket.getaddrinfo(first, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # sends nothing
        return str(probe.getsockname()[0])


def execution_timeout() -> float:
    """Seconds that vLLM gives its workers for one step of the model."""
    return float(envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS)


def capturing_a_piece() -> bool:
    """Whether a CUDA graph is being captured that is one piece of a forward pass."""
    return (
        torch.cuda.is_current_stream_capturing()
        and is_forward_context_available()
        and get_forward_context().cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE
    )


def member_of_this_rank(members: int) -> int:
    """Which member of a block this rank serves, where `members` divides TP."""
    group = get_tp_group()
    return int(group.rank_in_group // (group.world_size // members))


@contextlib.contextmanager
def narrowed_tensor_parallel(members: int) -> Iterator[None]:
    """Let layers be built and loaded as if TP were TP / members, inside this rank's group.

    Relies on: layers, parameters and quantization methods read TP size and rank from
    `parallel_state._TP` through `get_tp_group`, at construction and while weights load; forward
    takes the group afresh.
    """
    group = get_tp_group()
    parallel_state._TP = _Narrowed(group, members)
    try:
        yield
    finally:
        parallel_state._TP = group


class _Narrowed:
    """A tensor-parallel group seen from one member's share of its ranks."""

    def __init__(self, group: Any, members: int) -> None:
        self._group = group
        self.world_size = group.world_size // members
        self.rank_in_group = group.rank_in_group % self.world_size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)
