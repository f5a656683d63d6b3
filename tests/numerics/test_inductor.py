"""What is written into a given buffer is read after it is written, in compiled code."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from vllm_depthpar.model.inductor import needs_mending

# Layers whose products write into empty buffers, as vLLM's do on CPUs, and which read each other's
# terms a module late, as a ladder's do: the largest error of the compiled function.
PROGRAM = """
import torch
from torch.library import Library

from vllm_depthpar.model.inductor import keep_mutations_in_order

library = Library("depthpar_test", "FRAGMENT")
library.define("product_into(Tensor(a!) out, Tensor x, Tensor weight) -> ()")
library.impl("product_into", lambda out, x, weight: [out.copy_(x @ weight), None][1], "CPU")
library._register_fake("product_into", lambda out, x, weight: None)


def product(x, weight):
    out = torch.empty(x.shape[0], weight.shape[1])
    torch.ops.depthpar_test.product_into(out, x, weight)
    return out


def norm(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


def model(x, layers):
    attention, mlp = torch.zeros(()), torch.zeros(())
    for first, second in layers:
        x = x + attention
        new = product(norm(x), first)
        x = x + mlp
        attention, mlp = new, product(torch.nn.functional.silu(norm(x)), second)
    return norm(x + (attention + mlp))


torch.manual_seed(0)
layers = [(torch.randn(128, 128) / 11, torch.randn(128, 128) / 11) for _ in range(5)]
x = torch.randn(16, 128)
for how in ("bare", "mended"):
    if how == "mended":
        torch._dynamo.reset()
        keep_mutations_in_order()
        keep_mutations_in_order()
    with torch.no_grad():
        print(float((torch.compile(model)(x, layers) - model(x, layers)).abs().max()))
"""


@pytest.fixture(scope="module")
def largest_errors() -> tuple[float, float]:
    """Of the compiled function, as PyTorch has it and mended."""
    env = {**os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    bare, mended = map(float, done.stdout.split())
    return bare, mended


def test_reads_come_after_writes(largest_errors: tuple[float, float]) -> None:
    assert largest_errors[1] < 1e-5


def test_mending_is_needed_where_it_is_done(largest_errors: tuple[float, float]) -> None:
    """Fails with a PyTorch that is mended and is not known to be, or the other way round."""
    assert (largest_errors[0] > 0.1) == needs_mending()
