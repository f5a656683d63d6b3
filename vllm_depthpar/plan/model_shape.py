"""Sizes of a checkpoint, and what a plan makes of them on each tensor-parallel rank."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from math import ceil, prod
from typing import Any

from vllm_depthpar.errors import UserError, shortened
from vllm_depthpar.plan.config_keys import check_keys
from vllm_depthpar.plan.families import (
    FAMILIES,
    Experts,
    Family,
    family_of,
    sparse_layers,
    windows,
    with_llamas_keys,
)
from vllm_depthpar.plan.plan import Plan
from vllm_depthpar.plan.spec import DEALT, FOLDED, HALVES, SINGLE, WHOLE
from vllm_depthpar.plan.weight_bits import weight_bits

# Of one number, by the name that config.json and vLLM have for its type.
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

# What `multimodal.language_config` adds to a config.json: see `ModelShape.deepstack`.
DEEPSTACK = "deepstack"

# How layers side by side can be held, the fastest first.
LAYOUTS = (DEALT, FOLDED, WHOLE)
UNFOLDED = (DEALT, WHOLE)


@dataclass(frozen=True)
class ExpertSizes:
    """The sizes of MLPs of experts.

    Attributes:
        names: what they are called.
        count: experts in an MLP.
        chosen: experts that a token goes through.
        intermediate: of one.
        shared: intermediate size of the one that every token goes through beside them; 0: none.
        layers: whose MLPs these are.
    """

    names: Experts
    count: int
    chosen: int
    intermediate: int
    shared: int
    layers: frozenset[int]


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a config.json that decide bytes, shards and reductions.

    Attributes:
        windows: how many tokens the attention of each layer sees; None: all before it. () if all
            see as many.
        layouts: of `LAYOUTS` those that layers of it can be held in: a gain can't be folded into
            quantized weights, adapters act on whole layers alone, a norm after a module needs that
            module's sum alone, a router chooses among its own layer's experts, and some families
            nobody has taught this package to fold.
        weight_bits: of one weight of a layer's projections, where they are quantized; None: as all
            other numbers. See `weight_bits.weight_bits`.
        family: what of its layers is not Llama's.
        experts: of MLPs that are many; None if no layer has such.
        deepstack: of the first layers, after each of which a tower adds what it sees.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    dtype_bytes: int
    windows: tuple[int | None, ...] = ()
    layouts: tuple[str, ...] = LAYOUTS
    weight_bits: float | None = None
    family: Family = field(default_factory=lambda: FAMILIES["llama"])
    experts: ExpertSizes | None = None
    deepstack: int = 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """Read the sizes from a parsed config.json.

        Raises:
            UserError: a needed key is missing, or see `families.family_of` and `check_keys`.
        """
        family = family_of({"model_type": "llama", **config})
        config = with_llamas_keys(config)
        check_keys(config, family.activation)
        config = {**family.defaults, **config}
        layouts = LAYOUTS if config.get("quantization_config") is None else UNFOLDED
        attention_bias = bool(config.get("attention_bias", False))
        try:
            experts = _experts(family, config)
            heads, hidden = config["num_attention_heads"], config["hidden_size"]
            return cls(
                layers=config["num_hidden_layers"],
                hidden=hidden,
                heads=heads,
                kv_heads=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or hidden // heads,
                intermediate=config["intermediate_size"] if family.gated else 4 * hidden,
                vocab=config["vocab_size"],
                tied=bool(config.get("tie_word_embeddings", False)),
                qkv_bias=attention_bias or family.qkv_bias,
                output_bias=attention_bias and family.output_bias and not family.qkv_bias,
                mlp_bias=bool(config.get("mlp_bias", False)),
                qk_norm=family.qk_norm,
                dtype_bytes=DTYPE_BYTES.get(
                    str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch."), 2
                ),
                windows=tuple(windows(config)),
                weight_bits=weight_bits(config),
                layouts=(WHOLE,) if family.is_whole or experts else layouts,
                family=family,
                experts=experts,
                deepstack=config.get(DEEPSTACK, 0),
            )
        except KeyError as error:
            raise UserError(
                f"config.json lacks the key {error}; allowed: a checkpoint's config.json"
            ) from None

    def in_dtype(self, dtype: str) -> ModelShape:
        """Take the same sizes where numbers are of `dtype`; "auto": the checkpoint's.

        Quantized ones stay what they are.
        """
        return replace(self, dtype_bytes=DTYPE_BYTES.get(dtype, self.dtype_bytes))

    def fits(self, width: int, tp: int, mlp: int | None = None) -> bool:
        """Whether a block of `width` layers can be cut into `tp` shards.

        Query heads are dealt out evenly; KV heads too, or each is held by several ranks.

        Args:
            mlp: how many MLPs it has (`width`).
        """
        heads, kv_heads = width * self.heads, width * self.kv_heads
        return (
            heads % tp == 0
            and (kv_heads % tp == 0 or tp % kv_heads == 0)
            and (width if mlp is None else mlp) * self.intermediate % tp == 0
        )

    def fits_plan(self, plan: Plan, tp: int) -> bool:
        """Whether every block of a plan can be cut into `tp` shards."""
        return all(self.fits_block(plan, at, tp) for at in range(plan.depth))

    def fits_block(self, plan: Plan, position: int, tp: int) -> bool:
        """Whether one block of a plan can be cut into `tp` shards."""
        return self._fits_in(self.layout(plan, position, tp), plan, position, tp)

    def layout(self, plan: Plan, position: int, tp: int) -> str:
        """Say how a block is held on `tp` ranks: `SINGLE`, or one of `LAYOUTS`.

        The first of those that it can be held in, and that `tp` ranks can hold it in. A plan may
        ask for one.
        """
        if len(plan.blocks[position]) == 1:
            return SINGLE
        ways = self._ways(plan, position, tp)
        return next((way for way in ways if self._fits_in(way, plan, position, tp)), ways[-1])

    def check_plan(self, plan: Plan) -> None:
        """Refuse a plan that such a model can't run: what asks to fold what can't be folded, to
        keep apart what goes through a norm first, or leaves no place for what a tower adds.

        Raises:
            UserError: it is one.
        """
        if plan.desync and self.family.norms_after:
            raise UserError(
                "plan key 'desync': this model's modules have norms after them, which take all "
                "ranks' sum; allowed: 'drop_sync', 'parallel_residual' or 'ladder', or other models"
            )
        if plan.desync and self.family.fused_qkv:
            raise UserError(
                "plan key 'desync': this model's q, k and v are one projection, which has no "
                "reference for ranks with streams of their own; allowed: 'drop_sync', "
                "'parallel_residual' or 'ladder', or other models"
            )
        self._check_deepstack(plan)
        if plan.layout != FOLDED:
            return
        for position, block in enumerate(plan.blocks):
            if len(block) > 1 and FOLDED not in self._ways(plan, position, 1):
                why = "of a model that is quantized or served with adapters"
                if self.family.norms_after:
                    why = "which have norms after their modules"
                elif self.experts:
                    why = "whose routers choose among their own experts"
                elif self.family.is_whole:
                    why = "of a family that is served layer by layer"
                elif FOLDED in self.layouts:
                    why = "whose windows of attention differ"
                raise UserError(
                    f"plan key 'layout': the layers {shortened(list(block))}, {why}, can't be "
                    f"folded into one; allowed: 'whole', or no such key"
                )

    def _check_deepstack(self, plan: Plan) -> None:
        """Refuse a plan that `leaves_places` says leaves none."""
        count = self.deepstack
        passing = [at for at in range(count + 1) if plan.is_ladder(at) or plan.is_apart(at)]
        if not self.leaves_places(plan.blocks, passing):
            raise UserError(
                f"the plan changes where the layers 0 to {count - 1} end, after each of which this "
                f"model's tower adds what it sees; allowed: plans with each of these in a block of "
                f"its own, in this order, without 'ladder' or 'desync' up to layer {count}"
            )

    def leaves_places(
        self, blocks: Sequence[tuple[int, ...]], passing: Collection[int] = ()
    ) -> bool:
        """Say whether after each of the first layers there is one stream that a tower can add to:
        halves that run side by side, or on their way, read another.

        Args:
            blocks: the layers of each.
            passing: positions of those before which terms may be on their way, a ladder's, or
                ranks' streams apart.
        """
        count = self.deepstack
        alone = tuple(blocks[:count]) == tuple((layer,) for layer in range(count))
        return alone and not set(range(1, count + 1)).intersection(passing)

    def _windows_are_alike(self, plan: Plan, position: int) -> bool:
        return not self.windows or (
            len({self.windows[layer] for layer in plan.attention(position)}) <= 1
        )

    def _ways(self, plan: Plan, position: int, tp: int) -> list[str]:
        alike = self._windows_are_alike(plan, position)
        can = {
            DEALT: alike and plan.is_whole(position) and tp % len(plan.blocks[position]) == 0,
            FOLDED: alike,
            WHOLE: True,
        }
        asked = LAYOUTS if plan.layout is None else (plan.layout,)
        return [way for way in self.layouts if can[way] and way in asked] or [WHOLE]

    def _fits_in(self, layout: str, plan: Plan, position: int, tp: int) -> bool:
        attention, mlp = len(plan.attention(position)), len(plan.mlp(position))
        if layout in (SINGLE, WHOLE):
            attention, mlp = min(attention, 1), min(mlp, 1)
        sizes = self.mlp_sizes(plan.mlp(position)) if self.experts else {mlp * self.intermediate}
        return (not attention or self.fits(attention, tp, mlp=0)) and (
            not any(size % tp for size in sizes)
        )

    @property
    def always_whole(self) -> bool:
        """Whether layers side by side are held whole, whatever a plan says."""
        return self.layouts == (WHOLE,)

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer's MLP is many experts."""
        return self.experts is not None and layer in self.experts.layers

    def mlp_sizes(self, layers: Iterable[int]) -> set[int]:
        """Collect the intermediate sizes of layers' MLPs, and of experts in them."""
        sizes = set()
        for layer in layers:
            if (experts := self.experts) and self.is_sparse(layer):
                sizes |= {experts.intermediate, experts.shared}
            else:
                sizes.add(self.intermediate)
        return sizes - {0}

    def terms_reduced(self, plan: Plan, position: int, halves: Iterable[str]) -> int:
        """Count the terms, (tokens, hidden) each, in an all-reduce of halves of a block.

        One, their sum; but where a norm comes after each module, that of every module.
        """
        if not self.family.norms_after:
            return 1
        return sum(len(getattr(plan, half)(position)) for half in halves)

    def fitting_tps(self, plan: Plan, limit: int = 64) -> list[int]:
        """Tensor-parallel sizes up to `limit` that every block of the plan can be cut into."""
        return [tp for tp in range(1, limit + 1) if self.fits_plan(plan, tp)]

    def layer_tensors(
        self, layer: int, without: Collection[str] = ()
    ) -> dict[str, tuple[int, ...]]:
        """List the shapes of one decoder layer's tensors, by their names in it.

        Args:
            without: halves that it does not have, of `spec.HALVES`.
        """
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        projections = {"self_attn.o_proj": (self.hidden, q, self.output_bias)}
        if self.family.fused_qkv:
            projections["self_attn.qkv_proj"] = (q + 2 * kv, self.hidden, self.qkv_bias)
        else:
            for name, size in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
                projections[f"self_attn.{name}"] = (size, self.hidden, self.qkv_bias)
        tensors: dict[str, tuple[int, ...]] = {}
        if self.family.sinks:
            tensors["self_attn.sinks"] = (self.heads,)
        experts = self.experts if self.is_sparse(layer) else None
        if experts and experts.names.stacked:
            one, into = f"{experts.names.module}.experts", 2 * experts.intermediate
            projections[f"{experts.names.module}.router"] = (experts.count, self.hidden, True)
            tensors[f"{one}.gate_up_proj"] = (experts.count, self.hidden, into)
            tensors[f"{one}.gate_up_proj_bias"] = (experts.count, into)
            tensors[f"{one}.down_proj"] = (experts.count, experts.intermediate, self.hidden)
            tensors[f"{one}.down_proj_bias"] = (experts.count, self.hidden)
        elif experts:
            mlp, names = experts.names.module, experts.names.projections
            projections[f"{mlp}.gate"] = (experts.count, self.hidden, False)
            for expert in range(experts.count):
                one = f"{mlp}.experts.{expert}"
                projections |= self._gated_mlp(one, names, experts.intermediate, bias=False)
            if experts.shared:
                one = f"{mlp}.shared_expert"
                projections |= self._gated_mlp(one, names, experts.shared, bias=False)
                projections[f"{one}_gate"] = (1, self.hidden, False)
        elif self.family.fused_mlp:
            both = 2 * self.intermediate
            projections["mlp.gate_up_proj"] = (both, self.hidden, self.mlp_bias)
            projections["mlp.down_proj"] = (self.hidden, self.intermediate, self.mlp_bias)
        else:
            names = ("gate_proj", "up_proj", "down_proj")
            projections |= self._gated_mlp("mlp", names, self.intermediate, self.mlp_bias)
        if not self.family.gated:
            del projections["mlp.gate_proj"]
        for llamas, (out, into, bias) in projections.items():
            module, _, projection = llamas.rpartition(".")
            name = f"{module}.{self.family.projection(projection)}"
            tensors[f"{name}.weight"] = (out, into)
            if bias:
                tensors[f"{name}.bias"] = (out,)
        for norm in chain.from_iterable(self.family.norms.values()):
            tensors |= self._norm_tensors(norm)
        if self.qk_norm:
            for norm in ("q_norm", "k_norm"):
                tensors[f"self_attn.{norm}.weight"] = (self.head_dim,)
        half_of = self.family.half_of
        return {name: tensor for name, tensor in tensors.items() if half_of(name) not in without}

    def _gated_mlp(
        self, module: str, names: tuple[str, str, str], size: int, bias: bool
    ) -> dict[str, tuple[int, int, bool]]:
        gate, up, down = (f"{module}.{name}" for name in names)
        into, out = (size, self.hidden, bias), (self.hidden, size, bias)
        return {gate: into, up: into, down: out}

    def _norm_tensors(self, norm: str) -> dict[str, tuple[int, ...]]:
        parts = ("weight", "bias") if self.family.layer_norms else ("weight",)
        return {f"{norm}.{part}": (self.hidden,) for part in parts}

    def other_tensors(self) -> dict[str, tuple[int, ...]]:
        """List the shapes of tensors of no layer, by their names in the decoder; and the head's."""
        matrix = (self.vocab, self.hidden)
        tensors = {"embed_tokens.weight": matrix, **self._norm_tensors("norm")}
        if self.family.norms_embedding:
            tensors |= self._norm_tensors("embed_tokens.norm")
        return tensors if self.tied else {**tensors, "lm_head.weight": matrix}

    def layer_parameters(self, layer: int = 0) -> int:
        """Count the parameters of one decoder layer, its norms included."""
        return sum(prod(shape) for shape in self.layer_tensors(layer).values())

    @property
    def projection_bytes(self) -> float:
        """Bytes of one weight of a layer's projections."""
        return self.dtype_bytes if self.weight_bits is None else self.weight_bits / 8

    def weight_bytes(self, plan: Plan, tp: int = 1) -> int:
        """Bytes of weights on one rank (norms and biases counted as if they were cut, too)."""
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        layers = sum(
            prod(tensor) * (self.projection_bytes if len(tensor) == 2 else self.dtype_bytes)
            for layer in plan.kept
            for tensor in self.layer_tensors(layer, missing_halves(plan, layer)).values()
        )
        cut = embeddings * self.dtype_bytes + ceil(layers)
        norms = sum(prod(shape) for shape in self.other_tensors().values() if len(shape) == 1)
        return cut // tp + norms * self.dtype_bytes

    def kv_bytes_per_token(self, plan: Plan, tp: int = 1) -> int:
        """Bytes of KV cache one token takes on one rank."""
        widths = [
            width
            for at in range(plan.depth)
            if (count := len(plan.attention(at)))
            for width in ([1] * count if self.layout(plan, at, tp) == WHOLE else [count])
        ]
        heads = sum(max(1, width * self.kv_heads // tp) for width in widths)
        return 2 * heads * self.head_dim * self.dtype_bytes


def _experts(family: Family, config: Mapping[str, Any]) -> ExpertSizes | None:
    """Read the sizes of experts; `config` has the family's defaults.

    Raises:
        UserError: a token is to go through more of them than there are.
    """
    layers, names = sparse_layers(config), family.experts
    if names is None or not layers:
        return None
    key = next((key for key in names.counts if key in config), names.counts[0])
    count, chosen = config[key], config["num_experts_per_tok"]
    if chosen > count:
        raise UserError(
            f"config.json's key 'num_experts_per_tok' is {chosen}; allowed: 1 to {count}, its {key}"
        )
    shared = config[names.shared] if names.shared else 0
    return ExpertSizes(names, count, chosen, config[names.size], shared, layers)


def missing_halves(plan: Plan, layer: int) -> list[str]:
    """List the halves that a layer of a plan runs without."""
    return [half for half, key in HALVES.items() if layer in getattr(plan, key)]


def all_reduces(plan: Plan) -> int:
    """Count the all-reduces of one forward pass at TP > 1: the blocks', and the embedding's."""
    return 1 + sum(plan.reductions(at) for at in range(plan.depth))


def hidden_all_reduces(plan: Plan) -> int:
    """Those of `all_reduces` that run while the next module computes (arXiv 2501.06589).

    The MLP's of any block that a ladder block follows, unless it reduces once or has none; the
    attention's of such a ladder block.
    """
    followed = [at for at in range(plan.depth) if plan.is_ladder(at + 1)]
    mlps = sum(not plan.reduces_once(at) and bool(plan.mlp(at)) for at in followed)
    return mlps + sum(plan.is_ladder(at) for at in followed)
