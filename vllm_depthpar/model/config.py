"""Where a plan meets vLLM's config: chosen, put in, and checked against everything else there."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Collection
from math import gcd
from pathlib import Path

from transformers import PreTrainedConfig
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from vllm_depthpar.checkpoint.tensors import check_folder
from vllm_depthpar.errors import UserError
from vllm_depthpar.metrics import metric_files
from vllm_depthpar.model import last_words, outside_state
from vllm_depthpar.plan import NULL, Plan, precedence
from vllm_depthpar.plan.attached import (
    attach,
    config_of,
    has_plan,
    layouts_of,
    plan_of,
    shape_of,
    source_of,
)
from vllm_depthpar.plan.model_shape import ModelShape
from vllm_depthpar.plan.spec import AS_ONE, SINGLE, WHOLE
from vllm_depthpar.vllm_compat import (
    is_mistral_format,
    logger,
    runs_experts_beside_adapters,
    settle_as_vllm_does,
    unit_of_stacked_experts,
)

MISTRAL_FORMAT = (
    "a checkpoint in Mistral's own format (params.json, consolidated.safetensors) is not "
    "supported; allowed: --config-format hf --load-format hf, where it holds those files too"
)

# Speculation: by what takes no more from the target model than its tokens or, Medusa, its last
# hidden states, and by heads that read its insides.
_HEADS = ("eagle", "eagle3")
_SPECULATION = ("ngram", "ngram_gpu", "suffix", "draft_model", "medusa", *_HEADS)

# Load formats that read no safetensors.
_NOT_SAFETENSORS = ("dummy", "pt", "npcache")


class DepthParConfig(VerifyAndUpdateConfig):
    """Resolves and checks the plan while vLLM's config is made: before any weight is read.

    Relies on: `MODELS_CONFIG_MAP` is consulted with the resolved architecture at the end of
    `ModelConfig.__post_init__`, and by `VllmConfig.__post_init__` before sizes are checked.
    """

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Choose the plan, and put it into the config."""
        config = model_config.hf_config
        if has_plan(model_config):
            return
        # What vLLM makes of Mistral's params.json is of no class of transformers.
        if type(config) is PreTrainedConfig:
            raise UserError(MISTRAL_FORMAT)
        overrides = model_config.hf_overrides
        given = overrides if isinstance(overrides, dict) else {}
        if precedence.KEY in given and given[precedence.KEY] is None:
            raise UserError(f"--hf-overrides, key {precedence.KEY!r}: {NULL}")
        plan, source = precedence.choose(
            config_of(model_config),
            override=given.get(precedence.KEY),
            environ=os.environ.get(precedence.ENV),
        )
        attach(model_config, plan, source)
        model_config.model_arch_config = model_config.get_model_arch_config()

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Check the plan against everything else that was asked for, and log it."""
        model_config = vllm_config.model_config
        plan, shape = plan_of(model_config), shape_of(vllm_config)
        tp = vllm_config.parallel_config.tensor_parallel_size
        _check_format(vllm_config)
        shape.check_plan(plan)
        settle_as_vllm_does(shape.family.architectures[0], vllm_config)
        _check_shards(plan, shape, tp)
        _check_experts(plan, shape, tp)
        layouts = layouts_of(vllm_config)
        _check_features(vllm_config, plan, layouts)
        outside_state.check_load_format(vllm_config.load_config.load_format)
        # vLLM asks that the model's head counts be divisible by TP. Blocks differ in theirs,
        # and each was just checked: report what all of them have in common.
        widths = [len(plan.attention(at)) for at in range(plan.depth)]
        common = gcd(
            *(
                width if layout in AS_ONE else min(width, 1)
                for width, layout in zip(widths, layouts, strict=True)
            )
        )
        model_config.model_arch_config = dataclasses.replace(
            model_config.model_arch_config,
            total_num_attention_heads=common * shape.heads,
            total_num_kv_heads=common * shape.kv_heads,
        )
        _separate_kv_caches(vllm_config, plan, layouts)
        _only_safetensors(vllm_config)
        if vllm_config.load_config.load_format not in _NOT_SAFETENSORS:
            check_folder(Path(model_config.model), config_of(model_config), plan.runs)
        metric_files.prepare()
        last_words.prepare()
        held = Counter(layout for layout in layouts if layout != SINGLE)
        logger.info(
            "plan %s: %s (from %s)%s",
            plan.digest,
            plan.name,
            source_of(model_config),
            "".join(f", {count} {layout}" for layout, count in held.items()),
        )
        if plan.depends_on_ranks and plan.layout != WHOLE and WHOLE in layouts and tp > 1:
            logger.warning(
                "plan %s: its side-by-side layers are held whole here, so that ranks have other "
                "parts of them, which matters under drop_sync and desync; to search and to "
                'evaluate it as it is served, give it "layout": "whole"',
                plan.digest,
            )
        if plan.depends_on_ranks and plan.tp not in (None, tp):
            logger.warning(
                "plan %s was made for --tensor-parallel-size %d: on %d ranks its model is %s "
                "the unmodified one",
                plan.digest,
                plan.tp,
                tp,
                "closer to" if tp < (plan.tp or 1) else "further from",
            )


def _check_format(vllm_config: VllmConfig) -> None:
    """Refuse the tensor names of Mistral's own format."""
    load_format = vllm_config.load_config.load_format
    if load_format == "mistral" or (
        load_format == "auto" and is_mistral_format(vllm_config.model_config)
    ):
        raise UserError(MISTRAL_FORMAT)


def _only_safetensors(vllm_config: VllmConfig) -> None:
    """Read no pickled weights unless a load format asks for them.

    Relies on: the loader's "auto" goes on to `*.bin` and `*.pt` where there are no others, its
    "safetensors" does not, and reads the same files otherwise.
    """
    folder, load = Path(vllm_config.model_config.model), vllm_config.load_config
    if load.load_format != "auto":
        return
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder} has no *.safetensors; allowed: safetensors checkpoints, or --load-format hf "
            "to unpickle *.bin"
        )
    load.load_format = "safetensors"


def _check_shards(plan: Plan, shape: ModelShape, tp: int) -> None:
    for at, block in enumerate(plan.blocks):
        if not shape.fits_block(plan, at, tp):
            fitting = ", ".join(str(size) for size in shape.fitting_tps(plan))
            raise UserError(
                f"--tensor-parallel-size {tp} can't cut a block of {len(block)} layers with "
                f"{shape.heads} heads and {shape.kv_heads} KV heads each; allowed: {fitting}"
            )


def _check_experts(plan: Plan, shape: ModelShape, tp: int) -> None:
    """Refuse ranks whose share of each of gpt-oss's experts no kernel of vLLM's takes here."""
    if shape.experts is None or not shape.experts.names.stacked:
        return
    size, unit = shape.experts.intermediate, unit_of_stacked_experts()
    if size % (tp * unit) == 0:
        return
    fitting = [str(ranks) for ranks in shape.fitting_tps(plan) if size % (ranks * unit) == 0]
    raise UserError(
        f"--tensor-parallel-size {tp}: of experts of intermediate size {size} each rank would have "
        f"{size // tp}, and vLLM's kernel for them takes multiples of {unit} on a CPU; allowed: "
        f"{', '.join(fitting) or f'experts of multiples of {unit}'}"
    )


def _separate_kv_caches(vllm_config: VllmConfig, plan: Plan, layouts: Collection[str]) -> None:
    """Name the plan to the KV connector, or refuse it.

    A draft's KV cache is in the same stores, under its target's plan; what it answers is checked.

    Relies on: vLLM makes the connector of `--kv-offloading-size` after this, and adds its own keys
    to the extra config that it finds; a worker's and a scheduler's connector read no other.
    """
    if vllm_config.model_config.runner_type == "draft":
        return
    cache, transfer = vllm_config.cache_config, vllm_config.kv_transfer_config
    connector = transfer.kv_connector if transfer is not None else None
    if cache.kv_offloading_size is not None:
        native = cache.kv_offloading_backend == "native"
        connector = "OffloadingConnector" if native else "LMCacheMPConnector"
    if connector is None:
        return
    tp = vllm_config.parallel_config.tensor_parallel_size
    kv_heads = vllm_config.model_config.model_arch_config.total_num_kv_heads
    if WHOLE in layouts:  # which may be the flags' doing, and makes other caches of the same plan
        plan = dataclasses.replace(plan, layout=WHOLE)
    extra = outside_state.keyed_by_plan(
        outside_state.connector_named(connector, transfer and transfer.kv_connector_module_path),
        transfer.kv_connector_extra_config if transfer is not None else {},
        plan,
        copies_kv_heads=tp > kv_heads and any(layout in AS_ONE for layout in layouts),
    )
    if transfer is not None:
        # Not in place: it may be the caller's own, for the next engine, too.
        vllm_config.kv_transfer_config = dataclasses.replace(
            transfer, kv_connector_extra_config=extra
        )


def _check_features(vllm_config: VllmConfig, plan: Plan, layouts: Collection[str]) -> None:
    if vllm_config.parallel_config.enable_expert_parallel:
        # vLLM 0.32's CPU build ends with a fault of memory in it, plan or not (two ranks, Qwen3
        # MoE), so that nothing could be checked. Under `drop_sync` it would mean something else.
        raise UserError(
            "--enable-expert-parallel: not checked with restructured models; allowed: without it, "
            "every rank has a part of every expert"
        )
    if (
        vllm_config.lora_config is not None
        and shape_of(vllm_config).experts
        and not runs_experts_beside_adapters()
    ):
        raise UserError(
            "--enable-lora: vLLM has no kernel on CPUs for a mixture of experts served with "
            "adapters, not even with adapters of its attention alone; allowed: without it, the "
            "adapter merged into the checkpoint"
        )
    family, quantization = shape_of(vllm_config).family, vllm_config.model_config.quantization
    kind = vllm_config.model_config.hf_config.model_type
    if family.by_heads and (quantization is not None or vllm_config.lora_config is not None):
        raise UserError(
            f"{'--enable-lora' if quantization is None else '--quantization'}: files of a {kind} "
            f"have q, k and v in one tensor, head by head, which neither adapters nor quantized "
            f"weights were checked with; allowed: without it"
        )
    stages = vllm_config.parallel_config.pipeline_parallel_size
    if stages > 1:
        # vLLM 0.32's CPU build fails at the first request with two stages, plan or not: the second
        # asserts that its `intermediate_tensors` were made in a warm-up, which CPUs have none of.
        # So nothing here could be checked with them.
        raise UserError(
            f"--pipeline-parallel-size {stages}: not checked with restructured models; allowed: 1, "
            f"and --tensor-parallel-size for more ranks"
        )
    sharers = vllm_config.parallel_config.decode_context_parallel_size
    if sharers > 1 and any(layout in AS_ONE for layout in layouts):
        # vLLM deals a sequence's tokens out to the ranks that hold the same KV heads, and counts
        # these by the model's number of them. A wide block has more.
        raise UserError(
            f"--decode-context-parallel-size {sharers}: the ranks of side-by-side layers that are "
            f'held as one have different KV heads; allowed: 1, or the plan\'s "layout": "whole"'
        )
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method not in _SPECULATION:
        raise UserError(
            f"--speculative-config method {speculative.method!r} was not tried on restructured "
            f"models; allowed: {', '.join(_SPECULATION)}"
        )
    heads = speculative is not None and speculative.method in _HEADS
    if heads and (family.norms_after or family.layer_norms):
        raise UserError(
            f"--speculative-config method {speculative.method!r} reads the target's insides, and "
            f"vLLM has no such heads for {kind}; allowed: 'draft_model', 'ngram'"
        )
    if speculative is not None and speculative.method == "eagle3" and plan.ladder:
        # Where it reads, a ladder's terms are still on their way.
        raise UserError(
            "--speculative-config method 'eagle3' reads complete streams between layers; allowed: "
            "plans without a ladder, or 'eagle'"
        )
