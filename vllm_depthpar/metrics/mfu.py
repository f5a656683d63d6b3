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

from vllm_depthpar.plan.attached import layouts_of, plan_of, shape_of, source_of
from vllm_depthpar.plan.spec import WHOLE


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
        shape = shape_of(vllm_config)
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
        shape = shape_of(vllm_config)
        if shape.experts:
            layers = [layer for (layer,) in _held_together(vllm_config, "mlp")]
            counts = {
                "num_hidden_layers": len(layers),
                "num_moe_layers": sum(map(shape.is_sparse, layers)),
            }
            return cls(parts=[one.model_copy(update=counts)])
        parts = [
            one.model_copy(
                update={
                    "num_hidden_layers": count,
                    "intermediate_size": width * shape.intermediate,
                }
            )
            for width, count in _mlps(vllm_config).items()
        ]
        return cls(parts=parts)


def _attentions(vllm_config: VllmConfig) -> Counter[tuple[int, int | None]]:
    """Count vLLM's attentions by how many layers' they are, and by their window."""
    windows = shape_of(vllm_config).windows
    if vllm_config.model_config.disable_sliding_window:
        windows = (None,) * len(windows)
    return Counter(
        (len(layers), windows[layers[0]]) for layers in _held_together(vllm_config, "attention")
    )


def _mlps(vllm_config: VllmConfig) -> Counter[int]:
    """Count vLLM's MLPs by how many layers' they are."""
    return Counter(len(layers) for layers in _held_together(vllm_config, "mlp"))


def _held_together(vllm_config: VllmConfig, half: str) -> Iterator[tuple[int, ...]]:
    plan = plan_of(vllm_config.model_config)
    for position, layout in enumerate(layouts_of(vllm_config)):
        layers: tuple[int, ...] = getattr(plan, half)(position)
        if layout == WHOLE:
            yield from ((layer,) for layer in layers)
        elif layers:
            yield layers
