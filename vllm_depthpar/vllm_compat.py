"""Every touch of vLLM that is not documented API, in one place.

Checked on vLLM 0.32.0 (run) and 0.33.0 (read against its source). Each entry says what it relies
on. A later vLLM: re-read the places named here, run the tests, then widen `SUPPORTED`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib
import os
import socket
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from math import gcd
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version
from pydantic import ValidationError
from transformers import PreTrainedConfig
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
from vllm.transformers_utils.repo_utils import is_mistral_model_repo
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

from vllm_depthpar import __version__
from vllm_depthpar.checkpoint import ladder_config
from vllm_depthpar.checkpoint.tensors import check_folder
from vllm_depthpar.errors import UserError
from vllm_depthpar.metrics import metric_files
from vllm_depthpar.model import last_words, outside_state
from vllm_depthpar.model.agreement import check_agreement
from vllm_depthpar.plan import NULL, Plan, ladder_checkpoint, precedence, resolve
from vllm_depthpar.plan.families import FAMILIES
from vllm_depthpar.plan.model_shape import ModelShape
from vllm_depthpar.plan.precedence import ARCHITECTURE, OLD_ARCHITECTURE

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.model_executor.layers.attention import Attention

SUPPORTED = SpecifierSet(">=0.32,<0.34")

MODEL_IMPL = "depthpar"
# What a config.json may name to be served with a plan.
ARCHITECTURES = (
    *dict.fromkeys(name for family in FAMILIES.values() for name in family.architectures),
    ARCHITECTURE,
    OLD_ARCHITECTURE,
)

MISTRAL_FORMAT = (
    "a checkpoint in Mistral's own format (params.json, consolidated.safetensors) is not "
    "supported; allowed: --config-format hf --load-format hf, where it holds those files too"
)

# Speculation that takes nothing from inside the target model.
_SPECULATION = ("ngram", "ngram_gpu", "suffix", "draft_model")

# Load formats that read no safetensors.
_NOT_SAFETENSORS = ("dummy", "pt", "npcache")

# The attribute of vLLM's ModelConfig that says where the plan came from.
_SOURCE = "depthpar_source"

# Under vLLM's own logger, so that its level, format and handlers apply.
logger = init_logger("vllm.depthpar")


def check_version(version: str) -> None:
    """Refuse a vLLM that this package was not checked on.

    Raises:
        UserError: `version` is outside `SUPPORTED`.
    """
    try:
        supported = SUPPORTED.contains(Version(Version(version).base_version))
    except InvalidVersion:  # a source tree without its version
        supported = False
    if not supported:
        raise UserError(
            f"vllm-depthpar {__version__} does not work with vllm {version}; allowed: vllm "
            f"{SUPPORTED}, or VLLM_PLUGINS without 'depthpar' to run vllm alone"
        )


def install() -> None:
    """Teach this process's vLLM the architecture and `--model-impl depthpar`. Idempotent."""
    if ARCHITECTURE in MODELS_CONFIG_MAP:
        return
    for name in (ARCHITECTURE, OLD_ARCHITECTURE):
        ModelRegistry.register_model(name, f"vllm_depthpar.model.causal_lm:{ARCHITECTURE}")
        MODELS_CONFIG_MAP[name] = DepthParConfig
    ladder_config.register()
    registry = type(ModelRegistry)
    for name in ("inspect_model_cls", "resolve_model_cls"):
        setattr(registry, name, _with_model_impl(getattr(registry, name)))
    sys.excepthook = _one_line(sys.excepthook)
    # Its classes take the places of vLLM's where they are defined.
    importlib.import_module("vllm_depthpar.metrics.mfu")


def _with_model_impl(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let `model_impl == "depthpar"`, or a checkpoint trained as a ladder, select our class.

    Relies on: the registry's two look-ups take (architectures, model_config), every look-up goes
    through them, and `ModelConfig.model_impl` accepts any string.
    """

    @wraps(method)
    def look_up(self: Any, architectures: str | list[str], model_config: ModelConfig) -> Any:
        ladder = model_config.hf_config.model_type == ladder_checkpoint.MODEL_TYPE
        if model_config.model_impl == MODEL_IMPL or ladder:
            architectures = [_select(architectures)]
        return method(self, architectures, model_config)

    return look_up


def _select(architectures: str | Sequence[str]) -> str:
    names = [architectures] if isinstance(architectures, str) else list(architectures)
    if not any(name in ARCHITECTURES for name in names):
        raise UserError(
            f"--model-impl {MODEL_IMPL} can't serve the architecture {', '.join(names)}; "
            f"allowed: {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURE


class DepthParConfig(VerifyAndUpdateConfig):
    """Resolves and checks the plan while vLLM's config is made: before any weight is read.

    Relies on: `MODELS_CONFIG_MAP` is consulted with the resolved architecture at the end of
    `ModelConfig.__post_init__`, and by `VllmConfig.__post_init__` before sizes are checked.
    """

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Replace the config's `depthpar` by the plan's normal form.

        `num_hidden_layers` becomes the number of blocks: to vLLM the model has that many layers.
        The whole config, plan included, is part of vLLM's compile-cache key; where the plan came
        from is not, and kept where vLLM does not look.

        Relies on: `ModelConfig.compute_hash` takes the dataclass's fields and no other attributes,
        which copies and pickles keep.
        """
        config = model_config.hf_config
        if getattr(config, "depthpar_base_layers", None) is not None:
            return
        # What vLLM makes of Mistral's params.json is of no class of transformers.
        if type(config) is PreTrainedConfig:
            raise UserError(MISTRAL_FORMAT)
        overrides = model_config.hf_overrides
        given = overrides if isinstance(overrides, dict) else {}
        if precedence.KEY in given and given[precedence.KEY] is None:
            raise UserError(f"--hf-overrides, key {precedence.KEY!r}: {NULL}")
        plan, source = precedence.choose(
            config.to_dict(),
            override=given.get(precedence.KEY),
            environ=os.environ.get(precedence.ENV),
        )
        config.depthpar = plan.to_spec()
        setattr(model_config, _SOURCE, source)
        config.depthpar_base_layers = config.num_hidden_layers
        config.num_hidden_layers = plan.depth
        model_config.model_arch_config = model_config.get_model_arch_config()

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Check the plan against everything else that was asked for, and log it."""
        model_config, config = vllm_config.model_config, vllm_config.model_config.hf_config
        plan = plan_from(config)
        shape = base_shape(config)
        tp = vllm_config.parallel_config.tensor_parallel_size
        _check_format(vllm_config)
        _check_shards(plan, shape, tp)
        _check_features(vllm_config, plan, tp)
        outside_state.check_load_format(vllm_config.load_config.load_format)
        # vLLM asks that the model's head counts be divisible by TP. Blocks differ in theirs,
        # and each was just checked: report what all of them have in common.
        common = gcd(*(len(block) for block in plan.blocks))
        model_config.model_arch_config = dataclasses.replace(
            model_config.model_arch_config,
            total_num_attention_heads=common * shape.heads,
            total_num_kv_heads=common * shape.kv_heads,
        )
        _separate_kv_caches(vllm_config, plan)
        _only_safetensors(vllm_config)
        if vllm_config.load_config.load_format not in _NOT_SAFETENSORS:
            check_folder(Path(model_config.model), base_config(config), plan.kept)
        metric_files.prepare()
        last_words.prepare()
        logger.info("plan %s: %s (from %s)", plan.digest, plan.name, source_of(model_config))


def _check_format(vllm_config: VllmConfig) -> None:
    """Refuse the tensor names of Mistral's own format.

    Relies on: the loader takes `consolidated*.safetensors` by itself where they are.
    """
    model, load_format = vllm_config.model_config, vllm_config.load_config.load_format
    if load_format == "mistral" or (
        load_format == "auto" and is_mistral_model_repo(model.model, model.revision)
    ):
        raise UserError(MISTRAL_FORMAT)


def _only_safetensors(vllm_config: VllmConfig) -> None:
    """Read no pickled weights unless a load format asks for them.

    Relies on: the loader's "auto" goes on to `*.bin` and `*.pt` where there are no others, its
    "safetensors" does not, and reads the same files otherwise.
    """
    folder, load = Path(vllm_config.model_config.model), vllm_config.load_config
    if load.load_format != "auto":
        return
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder} has no *.safetensors; allowed: safetensors checkpoints, or --load-format hf "
            "to unpickle *.bin"
        )
    load.load_format = "safetensors"


def _check_shards(plan: Plan, shape: ModelShape, tp: int) -> None:
    for block in plan.blocks:
        if not shape.fits(len(block), tp):
            fitting = ", ".join(str(size) for size in shape.fitting_tps(plan))
            raise UserError(
                f"--tensor-parallel-size {tp} can't cut a block of {len(block)} layers with "
                f"{shape.heads} heads and {shape.kv_heads} KV heads each; allowed: {fitting}"
            )


def _separate_kv_caches(vllm_config: VllmConfig, plan: Plan) -> None:
    """Name the plan to the KV connector, or refuse it.

    A draft's KV cache is in the same stores, under its target's plan; what it answers is checked.

    Relies on: vLLM makes the connector of `--kv-offloading-size` after this, and adds its own keys
    to the extra config that it finds; a worker's and a scheduler's connector read no other.
    """
    if vllm_config.model_config.runner_type == "draft":
        return
    cache, transfer = vllm_config.cache_config, vllm_config.kv_transfer_config
    connector = transfer.kv_connector if transfer is not None else None
    if cache.kv_offloading_size is not None:
        native = cache.kv_offloading_backend == "native"
        connector = "OffloadingConnector" if native else "LMCacheMPConnector"
    if connector is None:
        return
    tp = vllm_config.parallel_config.tensor_parallel_size
    kv_heads = vllm_config.model_config.model_arch_config.total_num_kv_heads
    extra = outside_state.keyed_by_plan(
        outside_state.connector_named(connector, transfer and transfer.kv_connector_module_path),
        transfer.kv_connector_extra_config if transfer is not None else {},
        plan,
        copies_kv_heads=tp > kv_heads and plan.has_parallel_blocks,
    )
    if transfer is not None:
        # Not in place: it may be the caller's own, for the next engine, too.
        vllm_config.kv_transfer_config = dataclasses.replace(
            transfer, kv_connector_extra_config=extra
        )


def _check_features(vllm_config: VllmConfig, plan: Plan, tp: int) -> None:
    if vllm_config.lora_config is not None:
        raise UserError(
            "--enable-lora: adapters address single layers, and a restructured model has others; "
            "allowed: merge the adapter into the checkpoint first"
        )
    stages = vllm_config.parallel_config.pipeline_parallel_size
    if stages > 1:
        # vLLM 0.32's CPU build fails at the first request with two stages, so that nothing here
        # could be checked with them.
        raise UserError(
            f"--pipeline-parallel-size {stages}: not checked with restructured models; allowed: 1, "
            f"and --tensor-parallel-size for more ranks"
        )
    sharers = vllm_config.parallel_config.decode_context_parallel_size
    if sharers > 1 and plan.has_parallel_blocks:
        # vLLM deals a sequence's tokens out to the ranks that hold the same KV heads, and counts
        # these by the model's number of them. A wide block has more.
        raise UserError(
            f"--decode-context-parallel-size {sharers}: the ranks of side-by-side layers hold "
            f"different KV heads; allowed: 1, or a plan without parallel blocks"
        )
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method not in _SPECULATION:
        raise UserError(
            f"--speculative-config method {speculative.method!r} reads layers of the unmodified "
            f"model; allowed: {', '.join(_SPECULATION)}"
        )
    quantization = vllm_config.model_config.quantization
    widths = sorted({len(block) for block in plan.blocks if len(block) > 1})
    if quantization is not None and any(tp % width for width in widths):
        raise UserError(
            f"quantization {quantization!r}: the norms of side-by-side layers can't be folded "
            f"into quantized weights; allowed: --tensor-parallel-size a multiple of "
            f"{' and '.join(map(str, widths))}, an unquantized checkpoint, or a plan without "
            f"parallel blocks"
        )


def compiles(vllm_config: VllmConfig) -> bool:
    """Whether vLLM gives the model to torch.compile."""
    return vllm_config.compilation_config.mode != CompilationMode.NONE


def plan_from(config: PreTrainedConfig) -> Plan:
    """The plan of a config that `DepthParConfig` has been through."""
    return resolve(config.depthpar, config.depthpar_base_layers)


def plan_of(vllm_config: VllmConfig) -> Plan:
    """The plan of the model that a vLLM config describes."""
    return plan_from(vllm_config.model_config.hf_config)


def source_of(model_config: ModelConfig) -> str | None:
    """Where the plan of a model came from, for people; None for a model without one."""
    return getattr(model_config, _SOURCE, None)


def check_ranks_agree(vllm_config: VllmConfig) -> None:
    """Compare the plan with that of every rank, all of which make the model now.

    A draft's with those that share its layers: the others may have no draft.

    Relies on: `cpu_group` of vLLM's groups is a process group of torch.distributed.

    Raises:
        UserError: see `agreement.check_agreement`.
    """
    draft = vllm_config.model_config.runner_type == "draft"
    group = get_tp_group() if draft else parallel_state.get_world_group()
    if group.world_size > 1:
        source = str(source_of(vllm_config.model_config))
        with last_words.kept():
            check_agreement(plan_of(vllm_config), source, group.cpu_group)


def base_shape(config: PreTrainedConfig) -> ModelShape:
    """The shape of the checkpoint, as it was before the plan."""
    return ModelShape.from_config(base_config(config))


def base_config(config: PreTrainedConfig) -> dict[str, Any]:
    """The checkpoint's config.json, as it was before the plan."""
    return {**config.to_dict(), "num_hidden_layers": config.depthpar_base_layers}


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
    """An engine's dtype, its mode, and what it quantizes, as `depthpar verify` says them.

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


def rows_of_this_step() -> tuple[int, int] | None:
    """Sequences in the batch of the forward pass that runs, and the most new tokens of one.

    None where vLLM runs the model for itself: to profile memory, to compile, to capture graphs.

    Relies on: a layer's attention metadata has `query_start_loc` and `max_query_len`, as those of
    vLLM's CPU backend.
    """
    context = get_forward_context() if is_forward_context_available() else None
    if context is None or not isinstance(context.attn_metadata, dict):
        return None
    for metadata in context.attn_metadata.values():
        return len(metadata.query_start_loc) - 1, int(metadata.max_query_len)
    return None


def group_named(name: str) -> GroupCoordinator:
    """The live group with a unique name, as vLLM's own collective ops look it up.

    Relies on: `parallel_state._groups` maps names to weak references.
    """
    group = parallel_state._groups[name]()
    if group is None:
        raise RuntimeError(f"group {name} is destroyed")
    return group


def communicator_all_reduce(group: GroupCoordinator, tensor: torch.Tensor) -> torch.Tensor:
    """What vLLM's all-reduce op runs on a GPU: custom all-reduce, NCCL, ..., by size; a new tensor.

    Relies on: `_all_reduce_out_place` uses the current stream.
    """
    return group._all_reduce_out_place(tensor)


def reduces_over_shared_memory(group: GroupCoordinator) -> bool:
    """Whether a CPU group's ranks share a host and all-reduce through its memory.

    Relies on: `CpuCommunicator.dist_module` is torch.distributed where they don't.
    """
    communicator = group.device_communicator
    return isinstance(getattr(communicator, "dist_module", None), _CPUSHMDistributed)


def has_shared_memory_all_reduce() -> bool:
    """Whether vLLM's CPU kernels for this processor have it: those for AVX2 alone have not.

    Relies on: `CpuCommunicator` looks for the operator `init_shm_manager`.
    """
    current_platform.import_kernels()
    return hasattr(torch.ops._C, "init_shm_manager")


def this_host() -> str:
    """The address of this host as other hosts of the model reach it.

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


ExceptHook = Callable[[type[BaseException], BaseException, TracebackType | None], Any]


def _one_line(previous: ExceptHook) -> ExceptHook:
    """End a program with one line where the user, not the program, is to mend something."""

    def hook(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        message = _explain(error)
        if message is None:
            previous(kind, error, traceback)
        else:
            print(f"depthpar: error: {message}", file=sys.stderr)

    return hook


def _explain(error: BaseException) -> str | None:
    """One line for an error that wrong input caused; None for any other.

    vLLM's own checks of the same command line (model, port, options) are reported likewise when
    the command asks for this plugin; plain vLLM keeps its own reports.
    """
    if isinstance(error, UserError):
        return str(error)
    if (words := last_words.found()) is not None:
        return words
    if f"--model-impl {MODEL_IMPL}" not in " ".join(sys.argv).replace("=", " "):
        return None
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return "the port is taken by another program; allowed: a free one with --port"
    if isinstance(error, HFValidationError | RepositoryNotFoundError | LocalEntryNotFoundError):
        return (
            "no such model; allowed: a checkpoint's folder, or a model of the hub that is cached "
            "or can be downloaded"
        )
    if isinstance(error, ValidationError):
        causes = [str(cause["msg"]).strip().splitlines()[0] for cause in error.errors()]
        return "; ".join(dict.fromkeys(causes))
    return None
