"""KV caches in stores outside the engine: none is found under another plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import Case, Result, run
from models import prompts, write_llama
from offload import play_a_gpu_that_forgets, play_gpu
from safetensors.torch import load_file, save_file
from vllm.config import KVTransferConfig

from vllm_depthpar import hf
from vllm_depthpar.errors import UserError
from vllm_depthpar.model.outside_state import keyed_by_plan
from vllm_depthpar.plan import resolve

LAYERS = 6
# The same number of blocks, of the same widths, under the same names.
PLANS: list[Any] = [{"ladder": "all"}, {"ladder": 3}, {"blocks": [[0], [1], [2], [4], [3], [5]]}]
PAIRS: Any = {"pair": [0, 4]}  # layers whose KV caches differ in size
SAVED: list[Any] = [*PLANS, {**PAIRS, "layout": "whole"}, PAIRS]

# A connector, what it is told, where the digest must be.
KEYED: dict[str, tuple[str, dict[str, Any], str]] = {
    "example": ("ExampleConnector", {}, "/tmp/NAME"),
    "example elsewhere": ("ExampleConnector", {"shared_storage_path": "/kv/a"}, "/kv/a/NAME"),
    "mooncake": ("MooncakeStoreConnector", {}, "NAME"),
    "mooncake, prefixed": ("MooncakeStoreConnector", {"cache_prefix": "team"}, "team-NAME"),
    "files": (
        "OffloadingConnector",
        {
            "spec_name": "TieringOffloadingSpec",
            "secondary_tiers": [{"type": "example"}, {"type": "fs", "root_dir": "/kv/"}],
        },
        "/kv/NAME",
    ),
    "objects": (
        "OffloadingConnector",
        {
            "spec_name": "TieringOffloadingSpec",
            "secondary_tiers": [{"type": "obj", "store_config": {}}],
        },
        "NAME",
    ),
    "several": (
        "MultiConnector",
        {
            "connectors": [
                {"kv_connector": "SimpleCPUOffloadConnector", "kv_role": "kv_both"},
                {
                    "kv_connector": "ExampleConnector",
                    "kv_role": "kv_both",
                    "kv_connector_extra_config": {"shared_storage_path": "/kv"},
                },
            ]
        },
        "/kv/NAME",
    ),
}


def texts_in(value: Any) -> set[str]:
    if isinstance(value, dict):
        value = [*value.values()]
    return set().union(*map(texts_in, value)) if isinstance(value, list) else {str(value)}


@pytest.mark.parametrize("name", KEYED)
def test_plan_is_in_the_key(name: str) -> None:
    connector, extra, place = KEYED[name]
    for spec in PLANS:
        plan = resolve(spec, LAYERS)
        told = keyed_by_plan(connector, extra, plan)
        assert place.replace("NAME", f"depthpar-{plan.digest}") in texts_in(told)
        assert keyed_by_plan(connector, told, plan) == told
    assert keyed_by_plan(connector, extra, resolve("identity", LAYERS)) == extra


@pytest.mark.parametrize(
    ("connector", "extra"),
    [
        ("OffloadingConnector", {"cpu_bytes_to_use": 1 << 20}),
        ("SimpleCPUOffloadConnector", {"kv_offload_backend": "disk", "disk_path": "/kv"}),
        ("DecodeBenchConnector", {}),
    ],
)
def test_what_ends_with_the_engine_needs_no_key(connector: str, extra: dict[str, Any]) -> None:
    assert keyed_by_plan(connector, extra, resolve(PAIRS, LAYERS)) == extra


@pytest.mark.parametrize(
    ("connector", "extra", "words"),
    [
        ("LMCacheConnectorV1", {}, "LMCacheConnectorV1 knows KV caches by model"),
        ("my.module.ExampleConnector", {}, "my.module.ExampleConnector knows"),
        (
            "MultiConnector",
            {
                "connectors": [
                    {"kv_connector": "ExampleConnector", "kv_connector_module_path": "my.module"}
                ]
            },
            "my.module.ExampleConnector knows",
        ),
        ("OffloadingConnector", {"spec_name": "Mine", "spec_module_path": "my"}, "spec 'Mine'"),
        (
            "OffloadingConnector",
            {"spec_name": "TieringOffloadingSpec", "secondary_tiers": [{"type": "kvcr"}]},
            "tier 'kvcr'",
        ),
    ],
)
def test_others_are_refused(connector: str, extra: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        keyed_by_plan(connector, extra, resolve(PAIRS, LAYERS))
    assert words in str(error.value)
    assert "; allowed: " in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    identity = resolve("identity", LAYERS)
    assert keyed_by_plan(connector, extra, identity) == extra


def test_copies_of_kv_heads() -> None:
    """Mooncake's store keeps one rank's for all where vLLM says that they are copies."""
    with pytest.raises(UserError, match="--tensor-parallel-size"):
        keyed_by_plan("MooncakeStoreConnector", {}, resolve(PAIRS, LAYERS), copies_kv_heads=True)
    for connector in ("OffloadingConnector", "ExampleConnector"):
        keyed_by_plan(connector, {}, resolve(PAIRS, LAYERS), copies_kv_heads=True)


def transfer(connector: str, **extra: Any) -> dict[str, Any]:
    """An engine's arguments: a connector, and blocks of which a prompt of 100 tokens has three."""
    config = KVTransferConfig(
        kv_connector=connector, kv_role="kv_both", kv_connector_extra_config=extra
    )
    return {"kv_transfer_config": config, "block_size": 32}


def distance(result: Result, case: Case) -> float:
    """How far the answers' log-probabilities are from the reference's for the same tokens."""
    model, most = hf.load(case.model, case.plan), 0.0
    for prompt, tokens, logprobs in zip(case.prompts, result.tokens, result.logprobs, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        most = max(most, float((logprobs - expected).abs().max()))
    return most


@pytest.mark.next
def test_plans_do_not_share_a_folder(tmp_path: Path) -> None:
    """Engine after engine on one folder, with vLLM's connector that keeps KV caches in files."""
    folder, store = write_llama(tmp_path / "model", layers=LAYERS), tmp_path / "store"
    engine = transfer("ExampleConnector", shared_storage_path=str(store))
    cases = [
        Case(folder, plan, prompts(3, 100).tolist(), max_tokens=8, cached=True, engine=engine)
        for plan in SAVED
    ]
    # Twice: the second engine of a plan reads what the first one left.
    for case, result in zip([*cases, *cases], run([*cases, *cases]), strict=True):
        assert distance(result, case) < 1e-3, case.plan
    digests = {resolve(case.plan, LAYERS).digest for case in cases}
    assert {path.name for path in store.iterdir()} == {f"depthpar-{digest}" for digest in digests}
    # They do read it.
    kept = store / f"depthpar-{resolve(PAIRS, LAYERS).digest}"
    for file in kept.rglob("*.safetensors"):
        save_file({"kv_cache": torch.zeros_like(load_file(file)["kv_cache"])}, file)
    (spoilt,) = run(cases[-1:])
    assert distance(spoilt, cases[-1]) > 0.1


def test_offloading_to_memory(tmp_path: Path) -> None:
    """A KV cache of eight blocks; each prompt has three, and comes again when others took them.

    With vLLM's scheduler, connector and memory; the CPU plays the GPU's part.
    """
    folder = write_llama(tmp_path / "model", layers=LAYERS)
    texts = prompts(4, 100).tolist()
    few = {"num_gpu_blocks_override": 8, "max_num_seqs": 1, "max_model_len": 128}
    cases = [
        Case(
            folder,
            plan,
            [*texts, *texts],
            max_tokens=8,
            cached=True,
            engine={**transfer("OffloadingConnector", cpu_bytes_to_use=1 << 24), **few},
            prepare=play_gpu,
        )
        for plan in SAVED
    ]
    forgetful = replace(cases[-1], prepare=play_a_gpu_that_forgets)
    *results, spoilt = run([*cases, forgetful])
    for case, result in zip(cases, results, strict=True):
        assert distance(result, case) < 1e-3, case.plan
    # It did come back from there.
    assert distance(spoilt, forgetful) > 0.1


def test_offloading_to_files(tmp_path: Path) -> None:
    """Engine after engine on one folder, as above, with the file-system tier behind the memory."""
    folder, store = write_llama(tmp_path / "model", layers=LAYERS), tmp_path / "store"
    engine = transfer(
        "OffloadingConnector",
        spec_name="TieringOffloadingSpec",
        cpu_bytes_to_use=1 << 24,
        secondary_tiers=[{"type": "fs", "root_dir": str(store)}],
    )
    cases = [
        Case(
            folder,
            plan,
            prompts(3, 100).tolist(),
            max_tokens=8,
            cached=True,
            engine=engine,
            prepare=play_gpu,
        )
        for plan in SAVED
    ]
    for case, result in zip([*cases, *cases], run([*cases, *cases]), strict=True):
        assert distance(result, case) < 1e-3, case.plan
    names = {f"depthpar-{resolve(case.plan, LAYERS).digest}" for case in cases}
    assert {path.name for path in store.iterdir()} == names
    blocks = [*(store / f"depthpar-{resolve(PAIRS, LAYERS).digest}").rglob("*.bin")]
    assert len(blocks) == 9
    for file in blocks:
        file.write_bytes(bytes(file.stat().st_size))
    (spoilt,) = run(cases[-1:])
    assert distance(spoilt, cases[-1]) > 0.1
