"""Experts as transformers holds them: those of an MLP in two tensors, where files have three of
each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from vllm_depthpar.plan.families import Experts

if TYPE_CHECKING:
    from torch import Tensor


def stacked(tensors: Mapping[str, Tensor], experts: Experts) -> dict[str, Tensor]:
    """Rename and stack tensors of a checkpoint, whole MLPs of them, as transformers has them.

    Args:
        tensors: by their names; projections of experts, (out, in), become
            "...mlp.experts.gate_up_proj", (experts, 2 x intermediate, hidden), and
            "...mlp.experts.down_proj", (experts, hidden, intermediate).
        experts: the family's names.
    """
    import torch

    module, (gate, up, down) = re.escape(experts.module), experts.projections
    one = re.compile(rf"(.*\.){module}\.experts\.(\d+)\.({gate}|{up}|{down})\.weight")
    found: dict[str, Tensor] = {}
    mlps: dict[str, dict[int, dict[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        if (match := one.fullmatch(name)) is None:
            found[re.sub(rf"\.{module}\.", ".mlp.", name)] = tensor
        else:
            mlps.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = tensor
    for before, of_mlp in mlps.items():
        ordered = [of_mlp[expert] for expert in sorted(of_mlp)]
        into = [torch.cat([expert[gate], expert[up]]) for expert in ordered]
        found[f"{before}mlp.experts.gate_up_proj"] = torch.stack(into)
        found[f"{before}mlp.experts.down_proj"] = torch.stack([expert[down] for expert in ordered])
    return found
