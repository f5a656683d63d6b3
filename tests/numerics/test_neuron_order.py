"""Neurons dealt out anew: the same model, and less lost where a sync point is dropped."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from models import prompts, write_llama
from safetensors.torch import load_file, save_file

from vllm_depthpar import hf
from vllm_depthpar.plan import resolve
from vllm_depthpar.recover.distillation import Distillation
from vllm_depthpar.recover.neuron_order import deal, orders, reordered

LAYERS = 4


def total(costs: torch.Tensor, dealt: torch.Tensor) -> float:
    return sum(float(costs[rank, mine].sum()) for rank, mine in enumerate(dealt))


def cheapest(costs: torch.Tensor, left: frozenset[int], rank: int = 0) -> float:
    """The least that any deal of the neurons that are left costs, found by trying all."""
    if rank == len(costs):
        return 0
    each = len(left) // (len(costs) - rank)
    return min(
        float(costs[rank, list(mine)].sum()) + cheapest(costs, left - set(mine), rank + 1)
        for mine in itertools.combinations(sorted(left), each)
    )


@pytest.mark.parametrize(("ranks", "above"), [(2, 1.00001), (3, 1.03)])
def test_how_cheap_a_deal_is(ranks: int, above: float) -> None:
    """Of two ranks as cheap as can be, of more nearly."""
    found = []
    for seed in range(20):
        costs = torch.rand(ranks, 9 if ranks == 3 else 8, generator=torch.manual_seed(seed))
        dealt = deal(costs)
        every = frozenset(range(costs.shape[1]))
        assert frozenset(dealt.flatten().tolist()) == every
        found.append(total(costs, dealt) / cheapest(costs, every))
    assert sum(found) / len(found) < above, found


def write_model(folder: Path, ranks: int, bias: bool) -> Path:
    """Write a model of which every other neuron reads what one rank's heads write, and no other."""
    write_llama(folder, layers=LAYERS, kv_heads=4, mlp_bias=bias)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        of = torch.arange(64) // (64 // ranks)
        if name.endswith("o_proj.weight"):
            heads = torch.arange(128) // (128 // ranks)
            tensor *= of[:, None] == heads
        elif name.endswith(("gate_proj.weight", "up_proj.weight")):
            tensor *= (torch.arange(96) % ranks)[:, None] == of
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_less_is_lost(ranks: int, bias: bool, tmp_path: Path) -> None:
    source = write_model(tmp_path / "in", ranks, bias)
    found = orders(hf.load_unmodified(source), prompts(16, 64), ranks)
    tensors = reordered(load_file(source / "model.safetensors"), found)
    out = tmp_path / "out"
    out.mkdir()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_bytes((source / "config.json").read_bytes())

    unseen = prompts(8, 64, seed=1)
    with torch.no_grad():
        before, after = (hf.load_unmodified(one)(unseen).logits for one in (source, out))
        torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-4)
        plan = resolve({"drop_sync": "all", "tp": ranks}, LAYERS)
        lost = [
            float(Distillation(hf.load_unmodified(one), plan).eval()(unseen)["kl"])
            for one in (source, out)
        ]
    assert lost[1] < 0.9 * lost[0]
    assert all(one.after < one.before for one in found)
    # Of what is in order already nothing is moved.
    again = orders(hf.load_unmodified(out), prompts(16, 64), ranks)
    assert all(torch.equal(one.neurons, torch.arange(96)) for one in again)
