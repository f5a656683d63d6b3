"""What a comparison compares: plans by name, and vLLM without any."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_depthpar import plan, sources
from vllm_depthpar.checkpoint import read_config
from vllm_depthpar.ladder_checkpoint import ladder_of
from vllm_depthpar.plan import PlanError

PLAIN = "plain"


@dataclass(frozen=True)
class Contender:
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


def served_by_vllm(config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is meant for vLLM's own Llama, by its parsed config.json."""
    return not ladder_of(config) and config.get(sources.KEY) is None


def contenders(model: str, labels: Iterable[str], option: str = "--plan") -> list[Contender]:
    """The plans that `labels` mean for the checkpoint `model`, each label once.

    Args:
        model: folder or hub name.
        labels: "plain", or what `vllm_depthpar.plan.load` takes.
        option: where the labels were given, for messages.

    Raises:
        PlanError: no such checkpoint, or a label is neither "plain" nor a plan for it.
    """
    config = read_config(model)
    found = []
    for label in dict.fromkeys(labels):
        if label != PLAIN:
            chosen, _ = sources.choose(config, plan.load(label), override_name=option)
            found.append(Contender(label, chosen.name, chosen.to_spec(), chosen.digest))
        elif not served_by_vllm(config):
            raise PlanError(
                f"{option} 'plain': vLLM itself can't serve a ladder or a checkpoint that carries a "
                "plan; allowed: a plan, 'auto' or 'identity'"
            )
        else:
            found.append(Contender(PLAIN))
    return found
