"""What the plugin is to vLLM: versions it takes, what it registers, what of a plan vLLM hashes."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from fork_server import call
from models import write_llama
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.ray.ray_env import get_env_vars_to_copy
from vllm.version import __version__ as vllm_version

from vllm_depthpar.errors import UserError
from vllm_depthpar.metrics import metric_files
from vllm_depthpar.model.config import DepthParConfig
from vllm_depthpar.plan.attached import source_of
from vllm_depthpar.plan.precedence import ARCHITECTURE, OLD_ARCHITECTURE
from vllm_depthpar.plugin import check_version, register

pytestmark = pytest.mark.next


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


def test_ray_gets_our_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(metric_files.FOLDER_ENV, "/somewhere")
    register()
    assert metric_files.FOLDER_ENV in get_env_vars_to_copy()


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


def parser_of(model: Path) -> str:
    """What is to take an answer apart."""
    config = EngineArgs(model=str(model), model_impl="depthpar").create_engine_config()
    return str(config.structured_outputs_config.reasoning_parser)


def test_vllms_settings_for_a_family_are_kept(tmp_path: Path) -> None:
    assert call(parser_of, write_llama(tmp_path, model_type="gpt_oss")) == "openai_gptoss"
