"""What a comparison compares: plans by name, and vLLM without any."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_depthpar.checkpoint.config import read_config
from vllm_depthpar.errors import UserError
from vllm_depthpar.plan import Plan, precedence, read_spec
from vllm_depthpar.plan.ladder_checkpoint import ladder_of
from vllm_depthpar.plan.model_shape import ModelShape

PLAIN = "plain"
# The plan in a checkpoint's own config.json.
CARRIED = "carried"


@dataclass(frozen=True)
class Variant:
    """One row of a comparison.

    Attributes:
        label: as the user gave it.
        plan: the plan it means, in words.
        spec: what vLLM gets, JSON-ready; None for vLLM's own model.
        digest: identifies the plan; "plain" for vLLM's own model.
    """

    label: str
    plan: str = "vLLM's own model"
    spec: dict[str, Any] | None = None
    digest: str = PLAIN

    @property
    def flags(self) -> list[str]:
        """What ``vllm serve`` has to be told."""
        if self.spec is None:
            return []
        overrides = json.dumps({precedence.KEY: self.spec})
        return ["--model-impl", "depthpar", "--hf-overrides", overrides]

    @property
    def env(self) -> dict[str, str]:
        """Its environment: vLLM's own model runs without the plugin, not with an idle one."""
        return {"VLLM_PLUGINS": "" if self.spec is None else "depthpar"}


def usual(config: Mapping[str, Any]) -> list[str]:
    """List the labels to compare if none are given, for a checkpoint with this config.json."""
    if config.get(precedence.KEY) is not None:
        return [CARRIED]
    return ["auto"] if ladder_of(config) else [PLAIN, "auto"]


def variants(model: str, labels: Iterable[str], option: str = "--plan") -> list[Variant]:
    """List the plans that `labels` mean for the checkpoint `model`, each label once.

    Args:
        model: folder or hub name.
        labels: "plain", "carried", or what `vllm_depthpar.plan.read_spec` takes.
        option: where the labels were given, for messages.

    Raises:
        UserError: no such checkpoint, or it carries no plan, or is not for plain vLLM, or a label
            is no plan for it.
    """
    config = read_config(model)
    found = []
    for label in dict.fromkeys(labels):
        if label != PLAIN:
            if label == CARRIED and config.get(precedence.KEY) is None:
                raise UserError(f"{option} 'carried': {model} carries no plan; allowed: a plan")
            spec = None if label == CARRIED else read_spec(label)
            chosen, _ = precedence.choose(config, spec, override_name=option)
            found.append(Variant(label, chosen.name, chosen.to_spec(), chosen.digest))
        elif PLAIN not in usual(config):
            raise UserError(
                f"{option} 'plain': vLLM itself can't serve a ladder checkpoint, or one that "
                "carries a plan; allowed: a plan, 'auto' or 'identity'"
            )
        else:
            found.append(Variant(PLAIN))
    return found


def check_tp(one: Variant, meant: Plan, shape: ModelShape, tp: int) -> None:
    """Refuse a tensor-parallel size that a variant can't be cut into.

    Args:
        meant: the plan that `one` means.
        shape: of the checkpoint.

    Raises:
        UserError: it can't.
    """
    if tp not in (fitting := shape.fitting_tps(meant)):
        raise UserError(
            f"--tp {tp} can't cut {one.label} ({one.plan}); allowed: {', '.join(map(str, fitting))}"
        )
