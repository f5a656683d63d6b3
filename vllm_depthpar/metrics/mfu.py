"""What a step of a restructured model computes and moves, for vLLM's `--enable-mfu-metrics`.

vLLM counts from the config: so many layers, all alike. Blocks are not: one of m layers has m times
the heads and the intermediate size, and reads its input once. Here a model is the sum of its kinds
of blocks, each counted by vLLM's own formulas. A model without a plan is counted by vLLM.

Relies on: `vllm.v1.metrics.perf` keeps the components by `component_type`, the one defined last in
place of the one before, and asks it to make what counts from the config; its own components are
pydantic models with the fields that are replaced here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.metrics.perf import (
    AttentionMetrics,
    ComponentMetrics,
    ExecutionContext,
    FfnMetrics,
    ParserChain,
)

from vllm_depthpar.plan.attached import base_config, base_shape, plan_of, source_of
from vllm_depthpar.plan.families import windows


class _Sum:
    """A component that is counted part by part."""

    parts: Sequence[ComponentMetrics]

    def get_num_flops_breakdown(
        self, ctx: ExecutionContext, per_gpu: bool = True
    ) -> dict[str, int]:
        return _total(part.get_num_flops_breakdown(ctx, per_gpu) for part in self.parts)

    def get_read_bytes_breakdown(
        self, ctx: ExecutionContext, per_gpu: bool = True
    ) -> dict[str, int]:
        return _total(part.get_read_bytes_breakdown(ctx, per_gpu) for part in self.parts)

    def get_write_bytes_breakdown(
        self, ctx: ExecutionContext, per_gpu: bool = True
    ) -> dict[str, int]:
        return _total(part.get_write_bytes_breakdown(ctx, per_gpu) for part in self.parts)


def _total(breakdowns: Iterator[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for breakdown in breakdowns:
        total.update(breakdown)
    return dict(total)


class BlockAttention(_Sum, ComponentMetrics):
    """The attentions of a plan's blocks, by their width and window."""

    parts: list[AttentionMetrics]

    @classmethod
    def component_type(cls) -> str:
        """Take vLLM's place."""
        return AttentionMetrics.component_type()

    @classmethod
    def get_parser(cls) -> ParserChain:
        """Return what reads a config: vLLM's."""
        return AttentionMetrics.get_parser()

    @classmethod
    def from_vllm_config(cls, vllm_config: VllmConfig) -> Any:
        """Count a model: this, or vLLM's component for one without a plan."""
        one = AttentionMetrics.from_vllm_config(vllm_config)
        if source_of(vllm_config.model_config) is None:
            return one
        shape = base_shape(vllm_config.model_config)
        parts = [
            one.model_copy(
                update={
                    "num_hidden_layers": count,
                    "num_attention_heads": width * shape.heads,
                    "num_key_value_heads": width * shape.kv_heads,
                    "sliding_window": window,
                    "num_swa_layers": count if window is not None else 0,
                }
            )
            for (width, window), count in _attentions(vllm_config).items()
        ]
        return cls(parts=parts)


class BlockFfn(_Sum, ComponentMetrics):
    """The MLPs of a plan's blocks, by their width."""

    parts: list[FfnMetrics]

    @classmethod
    def component_type(cls) -> str:
        """Take vLLM's place."""
        return FfnMetrics.component_type()

    @classmethod
    def get_parser(cls) -> ParserChain:
        """Return what reads a config: vLLM's."""
        return FfnMetrics.get_parser()

    @classmethod
    def from_vllm_config(cls, vllm_config: VllmConfig) -> Any:
        """Count a model: this, or vLLM's component for one without a plan."""
        one = FfnMetrics.from_vllm_config(vllm_config)
        if source_of(vllm_config.model_config) is None:
            return one
        size = base_shape(vllm_config.model_config).intermediate
        parts = [
            one.model_copy(update={"num_hidden_layers": count, "intermediate_size": width * size})
            for width, count in _mlps(vllm_config).items()
        ]
        return cls(parts=parts)


def _attentions(vllm_config: VllmConfig) -> Counter[tuple[int, int | None]]:
    """Count the blocks by how many attentions they have, and by their window."""
    model_config = vllm_config.model_config
    of = windows(base_config(model_config))
    if model_config.disable_sliding_window:
        of = [None] * len(of)
    plan = plan_of(model_config)
    found = (plan.attention(at) for at in range(plan.depth))
    return Counter((len(layers), of[layers[0]]) for layers in found if layers)


def _mlps(vllm_config: VllmConfig) -> Counter[int]:
    """Count the blocks by how many MLPs they have."""
    plan = plan_of(vllm_config.model_config)
    return Counter(len(plan.mlp(at)) for at in range(plan.depth) if plan.mlp(at))
