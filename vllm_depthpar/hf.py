"""The same plans on transformers: the reference that serving is compared with, and trainable.

Written from the equations, with every layer's own norms, attention and MLP; nothing here is folded
or concatenated. With x the residual stream, and A_i and F_i the attention and the MLP of layer i,
each with its own RMSNorm inside, a block of layers i runs

    x <- x + sum_i A_i(x)
    x <- x + sum_i F_i(x)

where the terms of missing halves are left out.

A block of one layer is a standard layer; a block of two is Layer Parallelism's pair
(arXiv 2502.02790, section 4). A layer in no block is absent, with its cache (Unified Layer
Skipping, arXiv 2404.06954).

A ladder block (Ladder Residual, arXiv 2501.06589, section 3) reads the stream elsewhere: with y the
stream of the block before it after that block's attention (before the first block: the embedding),

    y, x <- x + sum_i A_i(y), x + sum_i A_i(y) + sum_i F_i(x)

As in the authors' modeling_llama_ladder.py, a standard block before it hands on its y, and one
after it reads the complete x. A block with one all-reduce has no y: after it y is x.

A block of parallel residual (GPT-J, PaLM) runs

    x <- x + sum_i A_i(x) + sum_i F_i(x)

and a drop-sync block (Sync-Point Drop, arXiv 2502.20727) on R tensor-parallel ranks, with A_ir and
F_ir what rank r computes of A_i and F_i,

    a_r = sum_i A_ir(x)
    x <- x + sum_r (a_r + sum_i F_ir(x + a_r))

so that what it means depends on R. A block's heads, and the inner dimension of its MLPs, are those
of its layers one after the other, and a rank has a contiguous R-th of them, as in vLLM; in the
layout "whole" a rank has a contiguous R-th of those of each layer.

Desync residual (the Ladder authors' gpt_desync): where a sum T of a block, its attentions or its
MLPs, is not reduced, each rank goes on with its own stream, and the next that is makes them one,

    x_r <- x_r + T_r(x_r)           x <- sum_r (x_r / R + T_r(x_r))
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer

from vllm_depthpar.checkpoint import ladder_config
from vllm_depthpar.checkpoint.config import read_config, read_tensors
from vllm_depthpar.checkpoint.quantized import dequantizer
from vllm_depthpar.checkpoint.tensors import (
    WEIGHTS,
    check_files,
    check_folder,
    has_safetensors,
    split_name,
    stored,
)
from vllm_depthpar.errors import UserError
from vllm_depthpar.plan import Plan, resolve
from vllm_depthpar.plan.families import family_of, windows
from vllm_depthpar.plan.model_shape import half_of
from vllm_depthpar.plan.plan import Half, halves_of
from vllm_depthpar.plan.precedence import KEY
from vllm_depthpar.plan.spec import WHOLE


class Apart(tuple[Tensor, ...]):
    """The residual streams of the ranks, (batch, tokens, hidden) each, where they differ."""

    __slots__ = ()


Stream: TypeAlias = Tensor | tuple[Tensor, Tensor] | Apart


class ParallelBlock(GradientCheckpointingLayer):
    """Layers that run side by side. `attend` and `feed` are the two sums of the equations.

    Attributes:
        members: transformers' own decoder layers, by their index in the checkpoint.
        mode: of the plan's block, see `vllm_depthpar.plan.Plan.mode`.
        before_ladder: whether the next block is a ladder block.
        ranks: R of the equations.
        unreduced: halves whose sum is not reduced, see `vllm_depthpar.plan.Plan.unreduced`.
        whole: whether each layer is cut into R parts by itself, see `Plan.layout`.
        attending, feeding: indices of the members that have an attention, and an MLP.
    """

    def __init__(
        self,
        members: Mapping[int, nn.Module],
        mode: str,
        before_ladder: bool,
        ranks: int = 1,
        drop_attention: Collection[int] = (),
        drop_mlp: Collection[int] = (),
        unreduced: Collection[str] = (),
        whole: bool = False,
    ) -> None:
        # Not a decoder layer's own constructor (see `restructure`), which would make its weights.
        nn.Module.__init__(self)
        self.members = nn.ModuleDict({str(index): layer for index, layer in members.items()})
        self.mode = mode
        self.before_ladder = before_ladder
        self.ranks = ranks
        self.unreduced = frozenset(unreduced) if ranks > 1 else frozenset()
        self.whole = whole
        self.attending = [index for index in members if index not in drop_attention]
        self.feeding = [index for index in members if index not in drop_mlp]

    def forward(self, hidden_states: Stream, *_: Any, **context: Any) -> Stream:
        """Run the block.

        Args:
            hidden_states: the residual stream, (batch, tokens, hidden); for a ladder block that is
                not the first, the pair (x, y) of the equations; or the streams of all ranks.
            context: what transformers hands every attention (rotary embedding, mask, cache).

        Returns:
            The residual stream after the block, same shape; the pair if a ladder block is next; the
            streams of all ranks if the block's last sum is not reduced.
        """
        if self.unreduced or isinstance(hidden_states, Apart):
            after = self._desync(hidden_states, **context)
            # No plan lets a ladder block read what was before this block's MLP.
            return after if isinstance(after, Apart) or not self.before_ladder else (after, after)
        x, y = hidden_states if isinstance(hidden_states, tuple) else (hidden_states, hidden_states)
        if self.mode == "drop_sync" and self.ranks > 1:
            x = y = x + self._without_sync(x, **context)
        elif self.mode == "parallel_residual":
            x = y = x + self.attend(x, **context) + self.feed(x)
        else:
            ladder = self.mode == "ladder"
            y = x + self.attend(y if ladder else x, **context) if self.attending else x
            x = y + self.feed(x if ladder else y) if self.feeding else y
            if self.mode == "drop_sync":
                y = x
        return (x, y) if self.before_ladder else x

    def attend(self, stream: Tensor, **context: Any) -> Tensor:
        """Sum A_i(stream) over the block's layers; shapes as in `forward`."""
        return _total(
            layer.self_attn(layer.input_layernorm(stream), **context)[0]
            for layer in map(self._member, self.attending)
        )

    def feed(self, stream: Tensor) -> Tensor:
        """Sum F_i(stream) over the block's layers; shapes as in `forward`."""
        return _total(
            layer.mlp(layer.post_attention_layernorm(stream)) for layer in self.feeding_layers
        )

    def read_by_mlp(self, stream: Tensor, **context: Any) -> tuple[Tensor, Apart]:
        """Compute what the MLPs of a standard block read, and what each rank's read of it where the
        attentions' all-reduce is dropped; shapes as in `forward`."""
        attention, terms = self._attentions(stream, **context)
        return stream + attention, Apart(stream + term for term in terms)

    def rows_of_ranks(self, index: int) -> list[slice]:
        """List the neurons of a layer's MLP that ranks have, of one rank after the other."""
        size = self._member(index).mlp.up_proj.out_features
        shares = self._shares(len(self.feeding), self.feeding.index(index), size)
        return [mine for _, mine in shares]

    def _member(self, index: int) -> Any:
        return self.members[str(index)]

    def _without_sync(self, x: Tensor, **context: Any) -> Tensor:
        """Sum a_r and f_r over the ranks."""
        attention, terms = self._attentions(x, **context)
        mlp, _ = self._mlps(Apart(x + term for term in terms))
        return attention + mlp

    def _desync(self, before: Stream, **context: Any) -> Tensor | Apart:
        """Run both halves, each reduced or not."""
        # A block that no ladder block follows may stand after one that hands on a pair.
        stream = before if isinstance(before, Tensor | Apart) else before[0]
        if self.attending:
            stream = self._added("attention", stream, *self._attentions(stream, **context))
        if self.feeding:
            stream = self._added("mlp", stream, *self._mlps(stream))
        return stream

    def _added(
        self, half: str, stream: Tensor | Apart, total: Tensor, terms: list[Tensor]
    ) -> Tensor | Apart:
        """Add the sum of a half to the stream, reduced or not."""
        if half in self.unreduced:
            return Apart(map(torch.add, self._of_ranks(stream), terms))
        if isinstance(stream, Apart):
            return _total(x / self.ranks for x in stream) + total
        return stream + total

    def _of_ranks(self, stream: Tensor | Apart) -> Sequence[Tensor]:
        return stream if isinstance(stream, Apart) else [stream] * self.ranks

    def _attentions(self, stream: Tensor | Apart, **context: Any) -> tuple[Tensor, list[Tensor]]:
        """Compute sum_r T_r(x_r), and the terms T_r(x_r), of attentions on each rank's stream."""
        total = torch.zeros_like(self._of_ranks(stream)[0])
        terms = [total] * self.ranks
        for member, layer in enumerate(map(self._member, self.attending)):
            attention, output = layer.self_attn, layer.self_attn.o_proj
            with _inputs_of(output) as seen:
                if isinstance(stream, Apart):
                    normalized = [layer.input_layernorm(x) for x in stream]
                    with self._cut(attention, member, normalized):
                        own = attention(normalized[0], **context)[0]
                else:
                    own = attention(layer.input_layernorm(stream), **context)[0]
            total = total + own
            for rank, mine in self._shares(len(self.attending), member, seen[0].shape[-1]):
                terms[rank] = terms[rank] + _columns(output, seen[0], mine)
            if getattr(output, "bias", None) is not None:
                first = self._rank_of_bias(len(self.attending), member)
                terms[first] = terms[first] + output.bias
        return total, terms

    def _mlps(self, stream: Tensor | Apart) -> tuple[Tensor, list[Tensor]]:
        """Compute the same of MLPs; the terms only where they are not reduced."""
        streams = self._of_ranks(stream)
        total = torch.zeros_like(streams[0])
        terms = [total] * self.ranks
        for member, layer in enumerate(self.feeding_layers):
            gate, up, down = layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj
            shares = list(self._shares(len(self.feeding), member, up.out_features))
            parts = []
            for rank, mine in shares:
                x = layer.post_attention_layernorm(streams[rank])
                parts.append(layer.mlp.act_fn(_rows(gate, x, mine)) * _rows(up, x, mine))
            # Its columns are cut as these rows are: the sum over ranks is one product.
            inner = torch.cat(parts, -1)
            total = total + down(inner)
            if "mlp" not in self.unreduced:
                continue
            for rank, mine in shares:
                terms[rank] = terms[rank] + _columns(down, inner, mine)
            if getattr(down, "bias", None) is not None:
                first = self._rank_of_bias(len(self.feeding), member)
                terms[first] = terms[first] + down.bias
        return total, terms

    @contextmanager
    def _cut(self, attention: Any, member: int, streams: list[Tensor]) -> Iterator[None]:
        """Let an attention's projections take each rank's heads from that rank's stream."""
        members, _ = self._cut_together(len(self.attending), member)
        kv_heads = members * attention.k_proj.out_features // attention.head_dim
        if kv_heads % self.ranks:
            raise UserError(
                f"{self.ranks} ranks share {kv_heads} KV heads, and under 'desync' each has its "
                f"own; allowed: to serve it, or numbers of ranks that divide them"
            )

        def by_rank(linear: Any, *_: object) -> Tensor:
            shares = self._shares(len(self.attending), member, linear.out_features)
            return torch.cat([_rows(linear, streams[rank], mine) for rank, mine in shares], -1)

        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        hooks = [linear.register_forward_hook(by_rank) for linear in projections]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _rank_of_bias(self, members: int, member: int) -> int:
        """Find the rank that adds a layer's output bias: vLLM's layers do it on their first."""
        members, member = self._cut_together(members, member)
        return member * self.ranks // members if self.ranks % members == 0 else 0

    def _shares(self, members: int, member: int, size: int) -> Iterator[tuple[int, slice]]:
        """List the ranks that have a part of a layer's dimension of a size, and which part."""
        members, member = self._cut_together(members, member)
        per_rank, rest = divmod(members * size, self.ranks)
        if rest:
            raise UserError(
                f"{self.ranks} ranks can't cut {members} times {size} evenly; allowed: "
                f"tensor-parallel sizes that fit the plan"
            )
        for rank in range(self.ranks):
            low = max(member * size, rank * per_rank) - member * size
            high = min((member + 1) * size, (rank + 1) * per_rank) - member * size
            if low < high:
                yield rank, slice(low, high)

    def _cut_together(self, members: int, member: int) -> tuple[int, int]:
        """Say of how many layers' dimensions one is made that is cut, and which of them this is."""
        return (1, 0) if self.whole else (members, member)

    @property
    def feeding_layers(self) -> list[Any]:
        """Those of the original decoder layers that have an MLP."""
        return [self._member(index) for index in self.feeding]

    @property
    def layers(self) -> list[GradientCheckpointingLayer]:
        """The original decoder layers."""
        return list(self.members.values())


def neurons(layer: Any, stream: Tensor) -> Tensor:
    """Compute what a layer's down projection reads, (..., intermediate), of what its MLP does."""
    x = layer.post_attention_layernorm(stream)
    inner: Tensor = layer.mlp.act_fn(layer.mlp.gate_proj(x)) * layer.mlp.up_proj(x)
    return inner


@contextmanager
def _inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Record what a module is given meanwhile; it computes all the same."""
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        hook.remove()


def _columns(linear: nn.Module, inputs: Tensor, mine: slice) -> Tensor:
    """Compute a rank's part of a projection that is cut along its inputs; without the bias."""
    if isinstance(linear, nn.Linear):
        return nn.functional.linear(inputs[..., mine], linear.weight[:, mine])
    # An adapter around one: it is linear, so what it makes of the others' zeros is its bias.
    zeros = torch.zeros_like(inputs)
    alone = torch.cat([zeros[..., : mine.start], inputs[..., mine], zeros[..., mine.stop :]], -1)
    return cast(Tensor, linear(alone) - linear(zeros[:1]))


def _rows(linear: nn.Module, inputs: Tensor, mine: slice) -> Tensor:
    """Compute a rank's part of a projection that is cut along its outputs."""
    if isinstance(linear, nn.Linear):
        bias = None if linear.bias is None else linear.bias[mine]
        return nn.functional.linear(inputs, linear.weight[mine], bias)
    return cast(Tensor, linear.forward(inputs)[..., mine])  # without hooks: one may call this


def load(
    path: str | PathLike[str],
    spec: object = None,
    dtype: torch.dtype = torch.float32,
    ranks: int | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a checkpoint and restructure it.

    Args:
        path: folder of the checkpoint. Weights that compressed-tensors, GPTQ or AWQ quantized are
            dequantized.
        spec: a `Plan`, or a spec that `vllm_depthpar.plan.resolve` takes; None for the plan that
            the checkpoint's config.json carries.
        dtype: what the weights are converted to.
        ranks: the tensor-parallel size whose model it is to be (default: the plan's `tp`, else 1);
            it matters to `drop_sync` and `desync` alone.
        kwargs: more arguments of `from_pretrained`. Pickled weights are read only where they say
            ``use_safetensors=False``.

    Returns:
        The model, in evaluation mode.

    Raises:
        UserError: the plan is wrong, or the checkpoint of no family that can be restructured, or
            its layers differ in their windows of attention, or its tensors are not what its
            config.json says; before weights load.
        OSError: there is no checkpoint at `path`.
    """
    config = config_of(path)
    if spec is None and getattr(config, KEY, None) is None:
        raise UserError(f"{path} carries no plan; allowed: a spec, or a checkpoint that does")
    if not isinstance(spec, Plan):
        spec = resolve(getattr(config, KEY) if spec is None else spec, config.num_hidden_layers)
    _check_layers(spec, config.num_hidden_layers)
    return restructure(_weights(path, config, dtype, absent=spec.absent, **kwargs), spec, ranks)


def load_unmodified(
    path: str | PathLike[str],
    dtype: torch.dtype = torch.float32,
    absent: Collection[Half] = (),
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a checkpoint as transformers does; arguments and errors as `load`.

    Args:
        absent: halves of layers that the checkpoint may lack; what they then hold means nothing.
    """
    return _weights(path, config_of(path), dtype, absent, **kwargs)


def outline(path: str | PathLike[str], plan: Plan, device: torch.device) -> PreTrainedModel:
    """Make a checkpoint's model, restructured, without its weights: they are on the device "meta".

    Args:
        path: folder of the checkpoint.
        plan: a plan for its number of layers; for so many ranks as its `tp` says.
        device: what its rotary embedding, which has no weights, is made for.

    Raises:
        UserError, OSError: see `load`.
    """
    config = config_of(path)
    with _by_transformers(path):
        with torch.device("meta"):
            model = _model_type(config)(config)
        with device:
            model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return restructure(model.eval(), plan)


def _model_type(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Find transformers' class for a checkpoint of one of our families."""
    found: type[PreTrainedModel] = getattr(
        transformers, family_of(config.to_dict()).architectures[0]
    )
    return found


def config_of(path: str | PathLike[str]) -> PreTrainedConfig:
    """Read the config.json of a checkpoint folder; errors as `load`."""
    ladder_config.register()
    if (Path(path) / "config.json").exists():
        read_config(str(path))  # before transformers does, whose errors are not for users
    with _by_transformers(path):
        config = AutoConfig.from_pretrained(path)
    family_of(config.to_dict())
    _check_windows(config)
    return config


@contextmanager
def _by_transformers(path: str | PathLike[str]) -> Iterator[None]:
    """Say in one line what transformers can't make of a checkpoint: its errors are of any kind."""
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"transformers can't load {path} ({why}); allowed: checkpoints that it can"
        ) from error


def _check_windows(config: PreTrainedConfig) -> None:
    """Refuse layers of different windows of attention.

    transformers gives each block the mask of the layer that was in its place.
    """
    if len(set(windows(config.to_dict()))) > 1:
        raise UserError(
            "the layers differ in their windows of attention; allowed: to serve the model, or "
            "models whose layers have the same"
        )


def _weights(
    path: str | PathLike[str],
    config: PreTrainedConfig,
    dtype: torch.dtype,
    absent: Collection[Half] = (),
    **kwargs: Any,
) -> PreTrainedModel:
    """Load all layers. Those `absent` need not be in the checkpoint: exported ones lack them."""
    check_files(Path(path))
    if kwargs.get("use_safetensors", True):
        if Path(path).is_dir() and not has_safetensors(Path(path)):
            raise UserError(
                f"{path} has no {WEIGHTS}; allowed: safetensors checkpoints, or "
                f"use_safetensors=False for pickled ones"
            )
        run = halves_of(range(config.num_hidden_layers)).difference(absent)
        check_folder(Path(path), config.to_dict(), run)
    quantized = getattr(config, "quantization_config", None) is not None
    with _by_transformers(path):
        if quantized:
            model, not_there = _dequantized(Path(path), config, dtype)
        else:
            options = {"use_safetensors": True, **kwargs}
            model, report = _model_type(config).from_pretrained(
                path, config=config, dtype=dtype, output_loading_info=True, **options
            )
            not_there = report["missing_keys"]
    places = filter(None, map(split_name, not_there))
    missing = {(layer, half_of(rest)) for _, layer, rest in places}
    if lost := sorted(missing.difference(absent)):
        raise UserError(
            f"weights of layer {lost[0][0]} are not in {path}; allowed: plans of its other layers"
        )
    return cast(PreTrainedModel, model)


def _dequantized(
    path: Path, config: PreTrainedConfig, dtype: torch.dtype
) -> tuple[PreTrainedModel, list[str]]:
    """Load a quantized checkpoint as what it stands for; and list what it does not hold."""
    dequantize = dequantizer(path)
    del config.quantization_config
    with torch.device("meta"):
        model = _model_type(config)(config)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    names = list(stored(path))
    tensors = dequantize(dict(read_tensors(str(path), names)))
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    report = model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    return model.eval(), sorted(set(report.missing_keys) - tied)


def restructure(model: PreTrainedModel, plan: Plan, ranks: int | None = None) -> PreTrainedModel:
    """Apply a plan to a model, in place.

    The kept layers stay the modules they were, without the halves that the plan drops. Those with
    an attention are renumbered in the order they run, so that caches have one slot for each.

    Args:
        model: a model as loaded, not restructured before.
        plan: a plan for its number of layers.
        ranks: see `load`.

    Returns:
        The same model.

    Raises:
        UserError: the plan is for another number of layers, or the model was restructured before,
            or its layers differ in their windows of attention.
    """
    layers = model.model.layers
    if any(isinstance(layer, ParallelBlock) for layer in layers):
        raise UserError("the model is already restructured; allowed: a model as loaded")
    _check_layers(plan, len(layers))
    _check_windows(model.config)
    attentions = [index for at in range(plan.depth) for index in plan.attention(at)]
    for slot, index in enumerate(attentions):
        layers[index].self_attn.layer_idx = slot
    for index in plan.drop_attention:
        del layers[index].self_attn, layers[index].input_layernorm
    for index in plan.drop_mlp:
        del layers[index].mlp, layers[index].post_attention_layernorm
    # Decoder layers to transformers: gradient checkpointing, the recording of hidden states and
    # device maps treat them as such.
    block_type = type("ParallelBlock", (ParallelBlock, type(layers[0])), {})
    model.model.layers = nn.ModuleList(
        block_type(
            {index: layers[index] for index in block},
            plan.mode(position),
            before_ladder=plan.is_ladder(position + 1),
            ranks=ranks or plan.tp or 1,
            drop_attention=plan.drop_attention,
            drop_mlp=plan.drop_mlp,
            unreduced=plan.unreduced(position),
            whole=plan.layout == WHOLE,
        )
        for position, block in enumerate(plan.blocks)
    )
    # transformers runs so many blocks, and gives caches so many slots, which are empty at first.
    count = max(plan.depth, len(attentions))
    model.config.num_hidden_layers = count
    if getattr(model.config, "layer_types", None):  # all alike
        model.config.layer_types = model.config.layer_types[:count]
    return model


def context(model: PreTrainedModel, stream: Tensor) -> dict[str, Any]:
    """Make what every layer's forward takes beside the stream, for whole texts without padding.

    Args:
        model: restructured or not.
        stream: what the layers are to run on, (batch, tokens, hidden).
    """
    positions = torch.arange(stream.shape[1], device=stream.device)[None]
    windowed = any(windows(model.config.to_dict()))
    mask = create_sliding_window_causal_mask if windowed else create_causal_mask
    return {
        "position_embeddings": model.model.rotary_emb(stream, position_ids=positions),
        "attention_mask": mask(model.config, stream, attention_mask=None, past_key_values=None),
    }


def checkpoint_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors of a restructured model to what they are called in the checkpoint."""
    return {
        re.sub(r"^model\.layers\.\d+\.members\.", "model.layers.", name): tensor
        for name, tensor in tensors.items()
    }


def _check_layers(plan: Plan, layers: int) -> None:
    if plan.layers != layers:
        raise UserError(f"the plan is for {plan.layers} layers; allowed: {layers}, as in the model")


def _total(terms: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, terms)
