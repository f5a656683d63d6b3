"""Memory before anything is started: what variants will take, what there is, what is refused."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from vllm_depthpar.bench import memory
from vllm_depthpar.bench.memory import GIB
from vllm_depthpar.errors import UserError
from vllm_depthpar.launch import kv_cache
from vllm_depthpar.plan import resolve
from vllm_depthpar.plan.model_shape import ModelShape

SHAPE = ModelShape.from_config(
    {
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 1000,
        "torch_dtype": "bfloat16",
    }
)
# Keys and values of two heads of 16 in each of four layers, in two bytes.
OF_TOKEN = 2 * 2 * 16 * 4 * 2


def test_sequences_take_whole_blocks_and_vllm_keeps_one() -> None:
    alone, pairs = (resolve(spec, 4) for spec in ("identity", {"pair": [0, 4]}))
    for plan in (alone, pairs):
        assert kv_cache.needed_bytes(SHAPE, plan, [128, 129, 1]) == (1 + 1 + 2 + 1) * 128 * OF_TOKEN
        assert kv_cache.needed_bytes(SHAPE, plan, [33], block=16) == (1 + 3) * 16 * OF_TOKEN
    assert kv_cache.needed_bytes(SHAPE, alone, [128], tp=2) == 2 * 128 * OF_TOKEN // 2
    in_fp32 = SHAPE.in_dtype("float32")
    assert kv_cache.needed_bytes(in_fp32, alone, [128]) == 2 * 128 * OF_TOKEN * 2
    assert SHAPE.in_dtype("auto") == SHAPE
    # Blocks of a narrow layer are as many bytes as those of a wide one.
    mixed = kv_cache.needed_bytes(SHAPE, resolve({"pair": [0, 2]}, 4), [256])
    assert mixed == 1.5 * (1 + 1) * 256 * OF_TOKEN


def test_what_the_environment_says_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(kv_cache.SPACE)
    assert kv_cache.environment(GIB + 1) == {kv_cache.SPACE: "2"}
    assert kv_cache.reserved_bytes(GIB + 1) == 2 * GIB
    monkeypatch.setenv(kv_cache.SPACE, "5")
    assert kv_cache.environment(GIB + 1) == {}
    assert kv_cache.reserved_bytes(GIB + 1) == 5 * GIB


def test_what_is_available_is_less_than_there_is() -> None:
    have = memory.available()
    assert have is not None
    assert 0 < have < psutil.virtual_memory().total


def test_a_variant_is_its_ranks_and_its_processes() -> None:
    plan, small = resolve("identity", 4), SHAPE.in_dtype("float32")

    def estimate(tp: int, kv_bytes: int, processes: int, quantized: bool = False) -> int:
        return memory.estimate(small, plan, tp, kv_bytes, processes, quantized)

    process = estimate(1, 0, 2) - estimate(1, 0, 1)
    assert 480 << 20 < process < 640 << 20
    assert estimate(2, 10, 3) - estimate(2, 0, 3) == 2 * 10
    assert estimate(1, 0, 1) - process == small.weight_bytes(plan)
    assert estimate(1, 0, 1, quantized=True) == process


def test_what_does_not_fit_is_refused_in_one_line() -> None:
    have = memory.available()
    assert have is not None
    memory.check({"a": have // 4, "b": have // 4}, alive=1)
    half = dict.fromkeys("abc", have // 2)
    with pytest.raises(UserError) as caught:
        memory.check(half, alive=3, allowed="fewer --every")
    message = str(caught.value)
    assert message.startswith(
        f"too little memory: about {1.5 * have / GIB:.1f} GiB for 3 variants "
    )
    assert message.endswith(" available; allowed: fewer --every")
    assert "\n" not in message
    with pytest.raises(UserError, match=r"largest variant alone .*; allowed: less KV cache"):
        memory.check({"a": 2 * have, "b": 1}, alive=1)


def test_as_many_are_alive_as_fit() -> None:
    have = memory.available()
    assert have is not None
    third = dict.fromkeys("abcde", (have - 2 * GIB) // 3)
    assert memory.fitting(third) == 3
    assert memory.fitting({"a": 1, "b": 1}) == 2
    with pytest.raises(UserError, match="for the largest variant alone"):
        memory.fitting({"a": 1, "b": have})


def test_a_container_s_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 2, from files as the kernel writes them."""
    (tmp_path / "memory.max").write_text(f"{3 * GIB}\n")
    (tmp_path / "memory.current").write_text(f"{2 * GIB}\n")
    (tmp_path / "memory.stat").write_text("anon 7\ninactive_file 1024\nactive_file 9\n")
    monkeypatch.setattr(memory, "CONTROL_GROUPS", tmp_path)
    have = memory.available()
    assert have is not None
    assert have <= GIB + 1024
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available() != GIB + 1024
