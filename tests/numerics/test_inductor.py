"""What is written into a given buffer is read after it is written, in compiled code."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vllm_depthpar.model.inductor import needs_mending

# Layers whose products write into empty buffers, as vLLM's do on CPUs, and which read each other's
# terms a module late, as a ladder's do: the largest error of the compiled function.
PROGRAM = """
import sys
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


if sys.argv[1] == "mended":
    keep_mutations_in_order()
    keep_mutations_in_order()
torch.manual_seed(0)
layers = [(torch.randn(128, 128) / 11, torch.randn(128, 128) / 11) for _ in range(5)]
x = torch.randn(16, 128)
with torch.no_grad():
    print(float((torch.compile(model)(x, layers) - model(x, layers)).abs().max()))
"""


def largest_error(how: str, monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return float(done.stdout)


def test_reads_come_after_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert largest_error("mended", monkeypatch) < 1e-5


def test_mending_is_needed_where_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails with a PyTorch that is mended and is not known to be, or the other way round."""
    assert (largest_error("bare", monkeypatch) > 0.1) == needs_mending()
