"""State outside the engine that knows nothing of plans: KV caches in stores, weights by name.

A KV connector finds a block of tokens under a name made of the model's path, sizes and layers.
Two plans of one checkpoint can agree in all of them, and would read each other's KV cache. Where a
connector's config has a place for a name of one's own, the plan's digest goes there; a connector
that has none is refused. What never outlives the engine needs no name.

A load format either hands the checkpoint's tensors to the model, which knows where its plan runs
them, or puts tensors that were saved by an engine into parameters of the same names. The second
kind would take one plan's weights for another's.

Relies on: what the connectors of vLLM 0.32 read from `kv_connector_extra_config`; see `_keyed`. A
later vLLM: read its `KVConnectorFactory`, `SecondaryTierFactory` and `model_loader` again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from vllm_depthpar.errors import UserError
from vllm_depthpar.plan import Plan

# By the loaders that call the model's `load_weights`. Not "mistral", whose names are others, and
# not "tensorizer" and "modelexpress", which may do either.
LOAD_FORMATS = (
    "auto",
    "safetensors",
    "hf",
    "pt",
    "npcache",
    "dummy",
    "fastsafetensors",
    "instanttensor",
    "runai_streamer",
)

CONNECTORS = (
    "OffloadingConnector",
    "SimpleCPUOffloadConnector",
    "MooncakeStoreConnector",
    "ExampleConnector",
    "DecodeBenchConnector",
    "MultiConnector",
)
_SPECS = ("CPUOffloadingSpec", "TieringOffloadingSpec")
_TIERS = ("fs", "obj", "example")

Config = dict[str, Any]


def check_load_format(load_format: str) -> None:
    """Refuse the load formats that place tensors by parameter name.

    Raises:
        UserError: `load_format` is none of `LOAD_FORMATS`.
    """
    if load_format not in LOAD_FORMATS:
        raise UserError(
            f"--load-format {load_format} places tensors by the names of an engine's parameters, "
            f"which say nothing of the plan; allowed: {', '.join(LOAD_FORMATS)}"
        )


def keyed_by_plan(
    connector: str, extra: Mapping[str, Any], plan: Plan, copies_kv_heads: bool = False
) -> Config:
    """Name the plan in a KV connector's config, so that it never finds another plan's KV cache.

    The identity's is left as it is: it is plain vLLM's, and nothing else can be in a store that
    refuses all other plans.

    Args:
        connector: its name in vLLM.
        extra: its `kv_connector_extra_config`.
        copies_kv_heads: whether there are more ranks than the KV heads that vLLM knows of.

    Returns:
        The same with the plan's digest in it; asked again with the result, the result.

    Raises:
        UserError: it has no place for the digest, or can't hold blocks of different widths.
    """
    if plan.is_identity:
        return dict(extra)
    if connector == "MooncakeStoreConnector" and copies_kv_heads:
        # It keeps one rank's KV heads for all that hold the same, by the model-wide number; the
        # ranks of a wide block hold different ones.
        raise UserError(
            "MooncakeStoreConnector takes the KV heads of several ranks for copies, which those of "
            "side-by-side layers are not; allowed: a smaller --tensor-parallel-size, or a plan "
            "without parallel blocks"
        )
    return _keyed(connector, extra, plan.digest)


def _keyed(connector: str, extra: Mapping[str, Any], digest: str) -> Config:
    config, name = dict(extra), f"depthpar-{digest}"
    match connector:
        case "OffloadingConnector":
            return _keyed_tiers(config, name)
        case "SimpleCPUOffloadConnector":
            # Memory, or a file that is made anew: what is in it is known to this engine only.
            pass
        case "DecodeBenchConnector":
            pass  # invents its KV cache
        case "MooncakeStoreConnector":
            # "PREFIX@MODEL@...": MODEL is the last part of the path.
            prefix = str(config.get("cache_prefix", ""))
            if not prefix.endswith(name):
                config["cache_prefix"] = f"{prefix}-{name}" if prefix else name
        case "ExampleConnector":
            path = config.get("shared_storage_path", "/tmp")
            config["shared_storage_path"] = _inside(path, name)
        case "MultiConnector":
            config["connectors"] = [
                _keyed_child(child, digest) for child in config.get("connectors") or ()
            ]
        case _:
            raise UserError(
                f"--kv-transfer-config: {connector} knows KV caches by model and sizes, not by "
                f"plan, and would mix up two plans'; allowed: {', '.join(CONNECTORS)}, or the "
                f"plan 'identity'"
            )
    return config


def _keyed_child(child: Mapping[str, Any], digest: str) -> Config:
    connector = connector_named(child.get("kv_connector"), child.get("kv_connector_module_path"))
    extra = child.get("kv_connector_extra_config") or {}
    return {**child, "kv_connector_extra_config": _keyed(connector, extra, digest)}


def connector_named(name: str | None, module: str | None) -> str:
    """Name a connector as errors do; one of a module of the user's is none of vLLM's."""
    return f"{module}.{name}" if module else str(name)


def _keyed_tiers(config: Config, name: str) -> Config:
    """Key the offloading connector's tiers.

    Its memory is this engine's; the tiers behind it may outlive the engine.
    """
    spec = config.get("spec_name", "CPUOffloadingSpec")
    if spec not in _SPECS:
        raise UserError(
            f"--kv-transfer-config: the offloading spec {spec!r} may keep KV caches that know no "
            f"plan; allowed: {', '.join(_SPECS)}"
        )
    tiers = []
    for tier in config.get("secondary_tiers") or ():
        kind = tier.get("type")
        if kind not in _TIERS:
            raise UserError(
                f"--kv-transfer-config: the offloading tier {kind!r} knows KV caches by model and "
                f"sizes, not by plan; allowed: {', '.join(_TIERS)}"
            )
        if kind == "obj" or "root_dir" in tier:
            key = "prefix" if kind == "obj" else "root_dir"
            tier = {**tier, key: _inside(tier.get(key, ""), name)}
        tiers.append(tier)
    return {**config, "secondary_tiers": tiers} if tiers else config


def _inside(folder: str, name: str) -> str:
    path = PurePosixPath(folder)
    return str(path if path.name == name else path / name)
