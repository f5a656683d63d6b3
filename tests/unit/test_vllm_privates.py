"""What this package relies on in vLLM beyond documented API: a canary for the next version.

Each case names one thing, so that a new vLLM says what it took away. That what is left still does
the same, tests with engines say.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
import vllm.config
from packaging.version import Version
from vllm import LLM, EngineArgs, SamplingParams
from vllm.benchmarks import serve
from vllm.config.model_arch import ModelArchitectureConfig
from vllm.distributed import parallel_state
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm.distributed.device_communicators.cuda_communicator import CudaCommunicator
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.parallel_state import GroupCoordinator
from vllm.forward_context import ForwardContext
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.ops.torch_ops import lora_ops
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.oracle import unquantized
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.model_loader import LoadFormats, reload
from vllm.model_executor.model_loader.utils import process_weights_after_loading
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.bloom import BloomAttention, BloomMLP
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.model_executor.models.gemma2 import Gemma2DecoderLayer
from vllm.model_executor.models.gemma3 import Gemma3DecoderLayer
from vllm.model_executor.models.llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
)
from vllm.model_executor.models.utils import AutoWeightsLoader
from vllm.plugins.endpoint_plugins.interface import EndpointPlugin
from vllm.transformers_utils.repo_utils import is_mistral_model_repo
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, UniformTypeKVCacheSpecs
from vllm.v1.metrics.perf import _COMPONENT_METRICS_REGISTRY, ComponentMetrics
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.spec_decode.draft_model import DraftModelProposer
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer
from vllm.v1.worker import gpu_model_runner
from vllm.v1.worker.gpu import model_runner, warmup
from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager
from vllm.v1.worker.utils import AttentionGroup

from vllm_depthpar import vllm_compat
from vllm_depthpar.metrics import mfu
from vllm_depthpar.model import outside_state
from vllm_depthpar.model.causal_lm import DepthParForCausalLM, DepthParModel
from vllm_depthpar.model.config import DepthParConfig
from vllm_depthpar.model.decoder_layers import DealtDecoderLayer, DecoderLayer
from vllm_depthpar.plugin import SUPPORTED, register
from vllm_depthpar.serving.endpoints import DepthParEndpoints

pytestmark = pytest.mark.next

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "vllm_depthpar"
CONFIGS: dict[str, type] = {
    "vllm_config": vllm.config.VllmConfig,
    "model_config": vllm.config.ModelConfig,
    "model_arch_config": ModelArchitectureConfig,
    "parallel_config": vllm.config.ParallelConfig,
    "cache_config": vllm.config.CacheConfig,
    "load_config": vllm.config.LoadConfig,
    "compilation_config": vllm.config.CompilationConfig,
    "device_config": vllm.config.DeviceConfig,
    "kv_transfer_config": vllm.config.KVTransferConfig,
    "speculative_config": vllm.config.SpeculativeConfig,
}


def named() -> Iterator[str]:
    """What our files take from vLLM by name, as "module:name", or "module:name.attribute"."""
    for folder in ("vllm_depthpar", "benchmarks", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(path.read_text())
            places: dict[str, str] = {}
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and re.match(r"vllm\b", node.module or ""):
                    places |= {alias.name: f"{node.module}:{alias.name}" for alias in node.names}
            yield from places.values()
            for node in ast.walk(tree):
                if isinstance(node, ast.Attribute) and (of := places.get(last_name(node.value))):
                    yield f"{of}.{node.attr}"


def config_fields() -> Iterator[tuple[str, str]]:
    """What our functions read of vLLM's config: the config's name in `CONFIGS`, and the field."""
    for path in PACKAGE.rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            known = {name: name for name in CONFIGS}
            for node in ast.walk(function):
                if isinstance(node, ast.Assign):
                    known |= aliases(node.targets[0], node.value)
            for node in ast.walk(function):
                if isinstance(node, ast.Attribute) and (of := known.get(last_name(node.value))):
                    yield of, node.attr


def last_name(node: ast.expr) -> str:
    """Of a dotted name; nothing for another expression."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def aliases(target: ast.expr, value: ast.expr) -> dict[str, str]:
    """What an assignment calls configs: {name there: name in `CONFIGS`}."""
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        pairs = zip(target.elts, value.elts, strict=True)
        return {name: of for pair in pairs for name, of in aliases(*pair).items()}
    if isinstance(target, ast.Name) and last_name(value) in CONFIGS:
        return {target.id: last_name(value)}
    return {}


@pytest.mark.parametrize("name", sorted(set(named())))
def test_name_exists(name: str) -> None:
    module, _, path = name.partition(":")
    try:
        exec(f"from {module} import {path.partition('.')[0]}; {path}")
    except ImportError as error:
        if "torchvision" not in str(error):
            raise
        pytest.skip(f"needs a torchvision for this PyTorch, from PyTorch's index: {error}")


@pytest.mark.parametrize(("config", "field"), sorted(set(config_fields())))
def test_config_has(config: str, field: str) -> None:
    assert holds(CONFIGS[config], field)


def holds(kind: type, name: str) -> bool:
    """Whether instances have an attribute, as far as that can be said of a class."""
    declared = rf"^    {name}: |\bself\.{name}\b"
    return hasattr(kind, name) or bool(re.search(declared, inspect.getsource(kind), re.MULTILINE))


def id_of(one: object) -> str:
    """How a case names one of its parts."""
    return str(getattr(one, "__qualname__", one))


# Ours, and vLLM's in whose place it stands: vLLM calls it as it would call that.
OVERRIDDEN: list[tuple[type, type, str]] = [
    (DecoderLayer, LlamaDecoderLayer, "get_quant_config"),
    (DealtDecoderLayer, LlamaDecoderLayer, "get_quant_config"),
    (DepthParModel, LlamaModel, "load_weights"),
    (DepthParForCausalLM, LlamaForCausalLM, "_init_model"),
    (DepthParConfig, VerifyAndUpdateConfig, "verify_and_update_model_config"),
    (DepthParConfig, VerifyAndUpdateConfig, "verify_and_update_config"),
    (DepthParEndpoints, EndpointPlugin, "attach_router"),
    (DepthParEndpoints, EndpointPlugin, "init_state"),
    *(
        (ours, ComponentMetrics, name)
        for ours in (mfu.BlockAttention, mfu.BlockFfn)
        for name in (
            "component_type",
            "get_parser",
            "from_vllm_config",
            "get_num_flops_breakdown",
            "get_read_bytes_breakdown",
            "get_write_bytes_breakdown",
        )
    ),
]


@pytest.mark.parametrize(("ours", "theirs", "name"), OVERRIDDEN, ids=id_of)
def test_takes_what_vllm_gives(ours: type, theirs: type, name: str) -> None:
    taken, given = (inspect.signature(getattr(kind, name)).parameters for kind in (ours, theirs))
    assert list(taken) == list(given)


# What we wrap, and what it takes.
WRAPPED: list[tuple[Callable[..., Any], str]] = [
    (type(ModelRegistry).inspect_model_cls, "self, architectures, model_config"),
    (type(ModelRegistry).resolve_model_cls, "self, architectures, model_config"),
    (Attention.process_weights_after_loading, "self, act_dtype"),
    (DraftModelProposer.initialize_attn_backend, "self, kv_cache_config, kernel_block_sizes"),
    (LoRAModelManager._add_adapter, "self, lora"),
    (
        lora_ops.bgmv_shrink,
        "inputs, lora_b_weights, output_tensor, lora_indices_tensor, scaling",
    ),
]


@pytest.mark.parametrize(("method", "takes"), WRAPPED, ids=id_of)
def test_wrapped_takes(method: Callable[..., Any], takes: str) -> None:
    assert ", ".join(inspect.signature(inspect.unwrap(method)).parameters) == takes


# How we call it: first what is given by position, then "name=" for what is given by name.
CALLED: list[tuple[Callable[..., Any], str]] = [
    (LlamaDecoderLayer, "vllm_config, prefix, config, attn_layer_type="),
    (Gemma2DecoderLayer, "config, cache_config, quant_config, prefix"),
    (Gemma3DecoderLayer, "config, cache_config, quant_config, prefix"),
    (BloomAttention, "config, cache_config, quant_config, prefix"),
    (BloomMLP, "config, quant_config, prefix"),
    (GemmaRMSNorm, "hidden_size, eps="),
    (LogitsProcessor, "vocab_size, soft_cap="),
    (LlamaAttention, "config=, bias=, bias_o_proj="),
    (RMSNorm, "hidden_size, eps, has_weight="),
    (RMSNorm.forward_native, "self, x, residual"),
    (AutoWeightsLoader, "module"),
    (AutoWeightsLoader.load_weights, "self, weights"),
    (default_weight_loader, "param, loaded_weight"),
    (direct_register_custom_op, "op_name, op_func, fake_impl=, target_lib="),
    (ModelRegistry.register_model, "model_arch, model_cls"),
    (is_mistral_model_repo, "model_name_or_path, revision"),
    (GroupCoordinator.all_reduce, "self, input_"),
    (GroupCoordinator._all_reduce_out_place, "self, input_"),
    (AttentionGroup, "backend, layer_names, kv_cache_spec, kv_cache_group_id"),
    (AttentionGroup.create_metadata_builders, "self, vllm_config, device, kernel_block_size="),
    (gpu_model_runner.GPUModelRunner.execute_model, "self, scheduler_output"),
    (model_runner.GPUModelRunner.execute_model, "self, scheduler_output, dummy_run="),
    (EngineArgs.add_cli_args, "parser"),
    (EngineArgs.from_cli_args, "args"),
    (LLM.from_engine_args, "engine_args"),
    (LLM.generate, "self, prompts, sampling_params, use_tqdm="),
    (LLMEngine.add_request, "self, request_id, prompt, params"),
    (LLMEngine.collective_rpc, "self, method"),
    (LLMEngine.step, "self"),
    (LLMEngine.has_unfinished_requests, "self"),
    (EngineCoreClient.shutdown, "self"),
    (serve.add_cli_args, "parser"),
    (serve.main, "args"),
    (
        EngineArgs,
        "model, dtype=, seed=, model_impl=, load_format=, skip_tokenizer_init=, enforce_eager=, "
        "distributed_executor_backend=, max_model_len=, max_num_seqs=, kv_cache_memory_bytes=, "
        "disable_log_stats=",
    ),
    (
        SamplingParams,
        "temperature=, top_p=, seed=, max_tokens=, ignore_eos=, detokenize=, prompt_logprobs=, "
        "logprobs=",
    ),
]


@pytest.mark.parametrize(("called", "given"), CALLED, ids=id_of)
def test_takes_what_we_give(called: Callable[..., Any], given: str) -> None:
    parameters = inspect.signature(called).parameters
    words = given.split(", ")
    positional = [word for word in words if not word.endswith("=")]
    assert list(parameters)[: len(positional)] == positional
    assert {word.removesuffix("=") for word in words} <= parameters.keys()


# What instances have.
HELD: dict[type, str] = {
    GroupCoordinator: "unique_name world_size rank_in_group device cpu_group device_group "
    "device_communicator",
    CpuCommunicator: "dist_module",
    LlamaAttention: "qkv_proj o_proj attn num_heads num_kv_heads head_dim q_size kv_size",
    LlamaDecoderLayer: "self_attn mlp input_layernorm post_attention_layernorm hidden_size",
    **dict.fromkeys(
        (Gemma2DecoderLayer, Gemma3DecoderLayer),
        "self_attn mlp input_layernorm post_attention_layernorm pre_feedforward_layernorm "
        "post_feedforward_layernorm",
    ),
    BloomAttention: "query_key_value dense total_num_heads attn",
    BloomMLP: "dense_h_to_4h dense_4h_to_h gelu_impl",
    LlamaModel: "layers norm embed_input_ids",
    LoRAModelManager: "model",
    LoRAModel: "loras",
    LlamaForCausalLM: "model",
    RMSNorm: "weight hidden_size variance_epsilon",
    CudaCommunicator: "fi_pcie_ipc_ar_comm",
    ForwardContext: "cudagraph_runtime_mode",
    SchedulerOutput: "num_scheduled_tokens",
    gpu_model_runner.GPUModelRunner: "model _model_forward",
    model_runner.GPUModelRunner: "model",
    ModelCudaGraphManager: "run_fullgraph",
    LLMEngine: "vllm_config engine_core",
    LLM: "llm_engine",
    SpecDecodeBaseProposer: "draft_attn_groups kv_cache_gid vllm_config device",
    AttentionGroup: "backend layer_names",
    KVCacheConfig: "kv_cache_groups",
    KVCacheGroupSpec: "kv_cache_spec",
    UniformTypeKVCacheSpecs: "kv_cache_specs",
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind, names in HELD.items() for name in names.split()],
    ids=id_of,
)
def test_instances_have(kind: type, name: str) -> None:
    assert any(re.search(rf"\b{name}\b", path.read_text()) for path in PACKAGE.rglob("*.py"))
    assert holds(kind, name)


# Where a store's names come from: renamed, it would no longer hold each plan's caches apart.
KEYS: dict[str, list[str]] = {
    "vllm.distributed.kv_transfer.kv_connector.v1.mooncake.store.worker": ["cache_prefix"],
    "vllm.distributed.kv_transfer.kv_connector.v1.example_connector": ["shared_storage_path"],
    "vllm.distributed.kv_transfer.kv_connector.v1.multi_connector": [
        "connectors",
        "kv_connector_extra_config",
    ],
    "vllm.v1.kv_offload.factory": ["spec_name"],
    "vllm.v1.kv_offload.tiering.spec": ["secondary_tiers"],
}
TIERS = {
    "vllm.v1.kv_offload.tiering.fs.manager": "root_dir",
    "vllm.v1.kv_offload.tiering.obj.manager": "prefix",
}


@pytest.mark.parametrize("module", [*KEYS, *TIERS])
def test_store_reads(module: str) -> None:
    """Not imported: what some of them need is not installed."""
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    text = Path(spec.origin).read_text()
    for key in KEYS.get(module, []):
        assert f'"{key}"' in text
    if module in TIERS:  # vLLM makes one with its part of the config as keywords
        assert re.search(rf"^        {TIERS[module]}: str\b", text, re.MULTILINE)


def test_stores_and_load_formats_are_known() -> None:
    assert set(outside_state.CONNECTORS) <= set(KVConnectorFactory._registry)
    assert set(outside_state.LOAD_FORMATS) <= set(get_args(LoadFormats))


def test_tensor_parallel_group_is_read_afresh() -> None:
    for function in (
        parallel_state.get_tensor_model_parallel_world_size,
        parallel_state.get_tensor_model_parallel_rank,
    ):
        assert "get_tp_group()" in inspect.getsource(function)
    assert "return _TP" in inspect.getsource(parallel_state.get_tp_group)
    assert "weakref.ref(group)" in inspect.getsource(parallel_state._register_group)
    assert "init_shm_manager" in inspect.getsource(CpuCommunicator)


def test_model_makes_its_layers_and_itself() -> None:
    assert "layer_type(vllm_config=vllm_config, prefix=prefix)" in inspect.getsource(LlamaModel)
    assert "self._init_model(" in inspect.getsource(LlamaForCausalLM.__init__)
    ((name, tensor),) = LlamaModel.hf_to_vllm_mapper.apply(
        [("layers.0.3.self_attn.v_proj.weight", torch.zeros(1))]
    )
    assert (name, tensor.shard_id) == ("layers.0.3.self_attn.qkv_proj.weight", "v")


def test_experts_beside_adapters_are_triton_s_on_every_platform() -> None:
    chosen = inspect.getsource(unquantized.select_unquantized_moe_backend)
    before, _, after = chosen.partition("if moe_config.is_lora_enabled:")
    assert "_get_priority_backends" not in before
    assert "return UnquantizedMoeBackend.TRITON" in after.partition("AVAILABLE_BACKENDS")[0]


def test_attentions_come_last_when_weights_are_loaded() -> None:
    loaded = inspect.getsource(process_weights_after_loading)
    others = loaded.index("quant_method.process_weights_after_loading(module)")
    assert others < loaded.index("module.process_weights_after_loading(model_config.dtype)")
    layerwise = importlib.import_module(f"{reload.__name__}.layerwise")
    assert "process_weights_after_loading(" in inspect.getsource(
        layerwise._finalize_attention_layer
    )


def test_warm_up_is_told_by_its_requests() -> None:
    made = r'req_id(?:s|_prefix: str) = \[?f?"([^"]+)"'
    names = re.findall(made, inspect.getsource(warmup))
    assert len(names) == 2
    assert all(vllm_compat._WARM_UP.match(name) for name in names)


def test_draft_model_inherits_its_attention() -> None:
    assert "initialize_attn_backend" not in vars(DraftModelProposer)


def test_experts_of_gpt_oss_are_cut_in_units_and_not_padded() -> None:
    kernels: Any = unquantized.backend_to_kernel_cls(unquantized.UnquantizedMoeBackend.CPU)
    kernels = [kernel for kernel in kernels if kernel._supports_current_device()]
    unit = vllm_compat.unit_of_stacked_experts()

    def takes(activation: MoEActivation, share: int) -> bool:
        sizes = {"hidden_dim": 4 * unit, "intermediate_size_per_partition": share}
        asked = SimpleNamespace(activation=activation, **sizes)
        return any(kernel._supports_grouped_gemm(asked)[0] for kernel in kernels)

    assert unit > 1
    assert takes(MoEActivation.SWIGLUOAI, 3 * unit)
    assert not takes(MoEActivation.SWIGLUOAI, 3 * unit // 2)
    assert takes(MoEActivation.SILU, 3 * unit // 2)


def test_registered_in_place() -> None:
    register()
    assert _COMPONENT_METRICS_REGISTRY["attn"] is mfu.BlockAttention
    assert _COMPONENT_METRICS_REGISTRY["ffn"] is mfu.BlockFfn
    # It takes out of the registry what has this attribute, which our collector has not.
    assert 'hasattr(collector, "_name")' in inspect.getsource(unregister_vllm_metrics)


def test_one_vllm() -> None:
    """Package, distribution and command are of one version, in tests of the next one too."""
    version = Version(vllm.__version__).base_version
    distribution = metadata.distribution("vllm")
    assert Version(distribution.version).base_version == version
    assert Path(str(distribution.locate_file("vllm"))) == Path(vllm.__file__).parent
    command = Path(sys.executable).with_name("vllm")
    shown = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert Version(shown.stdout.split()[-1]).base_version == version


def test_next_release_is_supported() -> None:
    text = (ROOT / "requirements/next.txt").read_text()
    (version,) = re.findall(r"^vllm==(\S+)", text, re.MULTILINE)
    assert SUPPORTED.contains(version)
