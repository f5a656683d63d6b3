"""Where `vllm serve` takes its plan from: the first that is given wins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from forked_serve import Call, Outcome, run
from models import write_llama

from vllm_depthpar.plan import resolve

pytestmark = pytest.mark.next

LAYERS = 16
OVERRIDE, ENVIRON, CONFIG = {"pair": [0, 2]}, {"pair": [0, 4]}, {"pair": [0, 6]}
FLAG = ["--model-impl", "depthpar"]


def overrides(spec: Any) -> list[str]:
    return ["--hf-overrides", json.dumps({"depthpar": spec})]


# Which of the checkpoints, arguments, environment -> source, plan
WAYS: dict[str, tuple[str, list[str], str | None, str, Any]] = {
    "all three": ("flagged", [*FLAG, *overrides(OVERRIDE)], "TEXT", "--hf-overrides", OVERRIDE),
    "environment over config": ("flagged", FLAG, "TEXT", "DEPTHPAR_PLAN", ENVIRON),
    "environment, a file": ("plain", FLAG, "FILE", "DEPTHPAR_PLAN", ENVIRON),
    "config, with the flag": ("flagged", FLAG, None, "config.json", CONFIG),
    "config and architecture, no flag": ("named", [], None, "config.json", CONFIG),
    "none: auto": ("plain", FLAG, None, "default: auto, conservative rule", {"pair": [10, 14]}),
    "auto by name": (
        "flagged",
        [*FLAG, *overrides("auto")],
        None,
        "--hf-overrides: auto, conservative rule",
        {"pair": [10, 14]},
    ),
    "ladder checkpoint": (
        "ladder",
        [],
        None,
        "default: the checkpoint's ladder_layers",
        {"ladder": [2, 5]},
    ),
    "ladder checkpoint, other blocks": (
        "ladder",
        overrides({"pair": [8, 12]}),
        None,
        "--hf-overrides",
        {"pair": [8, 12], "ladder": [2, 5]},
    ),
    "identity by name": (
        "flagged",
        [*FLAG, *overrides("identity")],
        None,
        "--hf-overrides",
        "identity",
    ),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    folder = tmp_path_factory.mktemp("ways")
    for name in ("plain", "flagged", "named"):
        config_file = write_llama(folder / name, layers=LAYERS) / "config.json"
        config = json.loads(config_file.read_text())
        if name != "plain":
            config["depthpar"] = CONFIG
        if name == "named":
            config["architectures"] = ["DepthParLlamaForCausalLM"]
        config_file.write_text(json.dumps(config))
    write_llama(
        folder / "ladder",
        layers=LAYERS,
        ladder_layers=[2, 5],
        architecture="LlamaLadderForCausalLM",
    )
    (folder / "plan.json").write_text(json.dumps(ENVIRON))
    environ = {"TEXT": json.dumps(ENVIRON), "FILE": str(folder / "plan.json")}
    calls = [
        Call(
            [str(folder / model), "--skip-tokenizer-init", "--port", "0", *args],
            {"VLLM_LOGGING_LEVEL": "INFO"} | ({"DEPTHPAR_PLAN": environ[way]} if way else {}),
            until=" blocks",
        )
        for model, args, way, _, _ in WAYS.values()
    ]
    return dict(zip(WAYS, run(calls), strict=True))


@pytest.mark.parametrize("name", WAYS)
def test_first_given_wins(name: str, outcomes: dict[str, Outcome]) -> None:
    _, _, _, source, spec = WAYS[name]
    plan = resolve(spec, LAYERS)
    lines = [line for line in outcomes[name].output.splitlines() if "plan " in line]
    assert len(lines) == 1, outcomes[name].output[-2000:]
    assert f"plan {plan.digest}: {plan.name} (from {source}" in lines[0]


def test_no_plan_without_flag_or_architecture(tmp_path: Path) -> None:
    """A checkpoint with the key `depthpar` but Llama's own architecture is served as it is."""
    config_file = write_llama(tmp_path) / "config.json"
    config_file.write_text(json.dumps({**json.loads(config_file.read_text()), "depthpar": CONFIG}))
    call = Call(
        [str(tmp_path), "--skip-tokenizer-init", "--port", "0"],
        {"VLLM_LOGGING_LEVEL": "INFO"},
        until="Initializing a V1 LLM engine",
    )
    (outcome,) = run([call])
    assert "Resolved architecture: LlamaForCausalLM" in outcome.output
    assert " blocks" not in outcome.output
