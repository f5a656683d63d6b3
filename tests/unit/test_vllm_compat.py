"""What `vllm_compat` relies on in vLLM: a canary for the next version."""

from __future__ import annotations

import inspect
import json
import pickle
from pathlib import Path
from typing import get_args

import pytest
import vllm.model_executor.models.llama as llama
from fork_server import call
from models import write_llama
from vllm.config import ModelConfig
from vllm.distributed import parallel_state
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import LoadFormats
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.v1.metrics.perf import _COMPONENT_METRICS_REGISTRY
from vllm.v1.spec_decode.draft_model import DraftModelProposer
from vllm.version import __version__ as vllm_version

from vllm_depthpar.errors import UserError
from vllm_depthpar.metrics import mfu
from vllm_depthpar.model import outside_state
from vllm_depthpar.model.config import DepthParConfig
from vllm_depthpar.plan.attached import source_of
from vllm_depthpar.plan.precedence import ARCHITECTURE, OLD_ARCHITECTURE
from vllm_depthpar.plugin import check_version, register


@pytest.mark.parametrize("version", ["0.32.0", "0.32.3+cpu", "0.33.0", "0.33.1.dev4", vllm_version])
def test_version_is_taken(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "1.0", "dev"])
def test_version_is_refused(version: str) -> None:
    with pytest.raises(UserError, match=r"does not work with vllm .*; allowed: vllm "):
        check_version(version)


def test_registering_twice_wraps_once() -> None:
    register()
    look_up = type(ModelRegistry).resolve_model_cls
    register()
    assert type(ModelRegistry).resolve_model_cls is look_up
    for name in (ARCHITECTURE, OLD_ARCHITECTURE):
        assert name in ModelRegistry.get_supported_archs()
        assert MODELS_CONFIG_MAP[name] is DepthParConfig


PAIRS = {"pair": [0, 4]}
# The first three are one plan, given in three ways; the others are two more.
WAYS: list[tuple[dict[str, object], dict[str, str]]] = [
    ({"hf_overrides": {"depthpar": PAIRS}}, {}),
    ({}, {"DEPTHPAR_PLAN": json.dumps(PAIRS)}),
    ({}, {"DEPTHPAR_PLAN": '{"blocks": [[0, 1], [2, 3], [4], [5]]}'}),
    ({"hf_overrides": {"depthpar": {"pair": [2, 6]}}}, {}),
    ({"hf_overrides": {"depthpar": "identity"}}, {}),
]


def hashes(model: Path, given: dict[str, object]) -> tuple[str, str, str | None]:
    """Of the whole config and of the model's, and the plan's source after a pickle's round trip."""
    config = EngineArgs(model=str(model), model_impl="depthpar", **given).create_engine_config()
    there = pickle.loads(pickle.dumps(config))
    return (
        config.compute_hash(),
        config.model_config.compute_hash(),
        source_of(there.model_config),
    )


def test_a_plan_is_hashed_and_not_its_way(tmp_path: Path) -> None:
    model = write_llama(tmp_path)
    whole, of_model, sources = zip(
        *(call(hashes, model, given, **env) for given, env in WAYS), strict=True
    )
    for found in (whole, of_model):
        assert found[0] == found[1] == found[2]
        assert len(set(found)) == 3
    assert sources == ("--hf-overrides", *["DEPTHPAR_PLAN"] * 2, *["--hf-overrides"] * 2)


def test_what_is_relied_on() -> None:
    for name in ("inspect_model_cls", "resolve_model_cls"):
        method = inspect.unwrap(getattr(type(ModelRegistry), name))
        assert list(inspect.signature(method).parameters) == [
            "self",
            "architectures",
            "model_config",
        ]
    assert "model_impl" in ModelConfig.__dataclass_fields__
    for function in (
        parallel_state.get_tensor_model_parallel_world_size,
        parallel_state.get_tensor_model_parallel_rank,
    ):
        assert "get_tp_group()" in inspect.getsource(function)
    assert "return _TP" in inspect.getsource(parallel_state.get_tp_group)
    parameters = inspect.signature(llama.LlamaDecoderLayer.__init__).parameters
    assert {"config", "attn_layer_type"} <= parameters.keys()
    assert "initialize_attn_backend" not in vars(DraftModelProposer)
    assert "layer_type(vllm_config=vllm_config, prefix=prefix)" in inspect.getsource(llama)
    assert _COMPONENT_METRICS_REGISTRY["attn"] is mfu.BlockAttention
    assert _COMPONENT_METRICS_REGISTRY["ffn"] is mfu.BlockFfn
    assert set(outside_state.CONNECTORS) <= set(KVConnectorFactory._registry)
    assert set(outside_state.LOAD_FORMATS) <= set(get_args(LoadFormats))
