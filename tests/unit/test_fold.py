"""Folding and sharding against plain tensor arithmetic."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_depthpar.model.fold import fold_gain_, shard_of


@given(members=st.integers(1, 5), size=st.integers(1, 12), data=st.data())
def test_shards_tile_the_wide_dimension(members: int, size: int, data: st.DataObject) -> None:
    """Put together again, the ranks' shards are the members one after the other."""
    wide = members * size
    dividing = [ranks for ranks in range(1, 11) if wide % ranks == 0]
    ranks = data.draw(st.sampled_from(dividing), "ranks")
    tensors = torch.arange(wide).view(members, size)
    per_rank = wide // ranks
    shards = torch.full((ranks, per_rank), -1)
    for member in range(members):
        for rank in range(ranks):
            where = shard_of(member, size, rank, per_rank)
            if where is not None:
                source, target = where
                assert (shards[rank, target] == -1).all()  # nothing is written twice
                shards[rank, target] = tensors[member, source]
    assert torch.equal(shards.flatten(), torch.arange(wide))


def test_folded_projection_equals_norm_then_projection() -> None:
    torch.manual_seed(0)
    x, gain, weight = torch.randn(7, 33), torch.rand(33) + 0.5, torch.randn(2500, 33)
    normalized = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    expected = (normalized * gain) @ weight.T
    fold_gain_(weight, gain)
    torch.testing.assert_close(normalized @ weight.T, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gain_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_folding_rounds_once(dtype: torch.dtype, gain_dtype: torch.dtype) -> None:
    """Half-precision weights get the number nearest to the product in fp32."""
    torch.manual_seed(0)
    weight = torch.randn(9000, 48).to(dtype)
    gain = (torch.rand(48) + 0.5).to(gain_dtype)
    product = weight.float() * gain.float()
    fold_gain_(weight, gain)
    assert torch.equal(weight, product.to(dtype))
