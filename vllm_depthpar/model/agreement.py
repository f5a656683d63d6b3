"""Whether all ranks of a model have the same plan.

Every node resolves the plan for itself. One with another `DEPTHPAR_PLAN`, or another config.json,
would make other blocks, and the ranks would wait for each other's all-reduces for ever, or add what
does not belong together.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import distributed
from vllm.config import ModelConfig

from vllm_depthpar.errors import UserError
from vllm_depthpar.model import last_words
from vllm_depthpar.plan import Plan
from vllm_depthpar.plan.attached import plan_of, source_of
from vllm_depthpar.vllm_compat import ranks_of


def check_agreement(model_config: ModelConfig) -> None:
    """Compare the plan with that of every rank, all of which make the model now.

    Raises:
        UserError: they differ; on every rank, with the same line.
    """
    if (group := ranks_of(model_config)) is not None:
        with last_words.kept():
            compare(plan_of(model_config), str(source_of(model_config)), group)


def compare(plan: Plan, source: str, group: distributed.ProcessGroup) -> None:
    """Compare the plan's digest with those of all ranks of a group, each of which calls this.

    Args:
        plan: this rank's.
        source: where it came from.
        group: of the processes' CPUs.

    Raises:
        UserError: they differ; on every rank, with the same line.
    """
    answers: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(answers, (plan.digest, source), group=group)
    ranks = defaultdict(list)
    for rank, answer in enumerate(answers):
        ranks[answer].append(rank)
    if len({digest for digest, _ in ranks}) > 1:
        found = "; ".join(
            f"{digest} on rank {', '.join(map(str, where))} (from {origin})"
            for (digest, origin), where in ranks.items()
        )
        raise UserError(
            f"the ranks have different plans: {found}; allowed: the same on every node, from "
            f"--hf-overrides, DEPTHPAR_PLAN or config.json"
        )
