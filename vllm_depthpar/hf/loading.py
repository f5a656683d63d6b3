"""Checkpoints loaded on transformers: restructured, as they are, or without weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from vllm_depthpar.checkpoint import ladder_config
from vllm_depthpar.checkpoint.config import read_config, read_tensors
from vllm_depthpar.checkpoint.experts import stacked
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
from vllm_depthpar.hf.decoder import body
from vllm_depthpar.hf.restructuring import check_layers, restructure
from vllm_depthpar.plan import Plan, resolve
from vllm_depthpar.plan.families import Family, family_of
from vllm_depthpar.plan.multimodal import CLASSES, language_config
from vllm_depthpar.plan.plan import Half, halves_of
from vllm_depthpar.plan.precedence import KEY


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
            its tensors are not what its config.json says; before weights load.
        OSError: there is no checkpoint at `path`.
    """
    config = config_of(path)
    text = language_config(config.to_dict())
    if spec is None and text.get(KEY) is None:
        raise UserError(f"{path} carries no plan; allowed: a spec, or a checkpoint that does")
    if not isinstance(spec, Plan):
        spec = resolve(text[KEY] if spec is None else spec, text["num_hidden_layers"])
    check_layers(spec, text["num_hidden_layers"])
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
        model = _without_weights(config, device)
    return restructure(model.eval(), plan)


def config_of(path: str | PathLike[str]) -> PreTrainedConfig:
    """Read the config.json of a checkpoint folder; errors as `load`."""
    ladder_config.register()
    if (Path(path) / "config.json").exists():
        read_config(str(path))  # before transformers does, whose errors are not for users
    with _by_transformers(path):
        config = AutoConfig.from_pretrained(path)
    family = _family(config)
    if family.caps_scores or family.alibi:  # which transformers' faster attentions leave out
        config._attn_implementation = "eager"
    return config


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
        text = language_config(config.to_dict())
        run = halves_of(range(text["num_hidden_layers"])).difference(absent)
        check_folder(Path(path), text, run)
    quantized = getattr(config, "quantization_config", None) is not None
    with _by_transformers(path):
        if quantized:
            model, not_there = _dequantized(Path(path), config, dtype)
        else:
            renamed = {"key_mapping": dict(names)} if (names := _family(config).names) else {}
            options = {"use_safetensors": True, **renamed, **kwargs}
            with _without_warnings() if absent else nullcontext():
                model, report = _model_type(config).from_pretrained(
                    path, config=config, dtype=dtype, output_loading_info=True, **options
                )
            not_there = report["missing_keys"]
    places = filter(None, map(split_name, not_there))
    missing = {(layer, _family(config).half_of(rest)) for _, layer, rest in places}
    if lost := sorted(missing.difference(absent)):
        raise UserError(
            f"weights of layer {lost[0][0]} are not in {path}; allowed: plans of its other layers"
        )
    return cast(PreTrainedModel, model)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Keep transformers from advice to train what is absent; what may not be is refused here."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _dequantized(
    path: Path, config: PreTrainedConfig, dtype: torch.dtype
) -> tuple[PreTrainedModel, list[str]]:
    """Load a quantized checkpoint as what it stands for; and list what it does not hold."""
    dequantize = dequantizer(path)
    del config.quantization_config
    model = _without_weights(config, torch.device("cpu"))
    names = list(stored(path))
    tensors = dequantize(dict(read_tensors(str(path), names)))
    if (experts := _family(config).experts) is not None:
        tensors = stacked(tensors, experts)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    report = model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    return model.eval(), sorted(set(report.missing_keys) - tied)


def _without_weights(config: PreTrainedConfig, device: torch.device) -> PreTrainedModel:
    """Make a model with weights on the device "meta", and what no checkpoint has on `device`."""
    with torch.device("meta"):
        model = _model_type(config)(config)
    inner = body(model)
    with device:
        inner.rotary_emb = type(inner.rotary_emb)(inner.config)
        if hasattr(inner.embed_tokens, "embed_scale"):
            inner.embed_tokens.embed_scale = torch.tensor(inner.embed_tokens.scalar_embed_scale)
    return model


def _model_type(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Find transformers' class for a checkpoint of one of our families."""
    if config.model_type == "bloom":
        # Here, since other models need none of what it imports.
        from vllm_depthpar.hf.bloom import BloomForCausalLM

        return BloomForCausalLM
    name = CLASSES.get(config.model_type) or _family(config).architectures[0]
    found: type[PreTrainedModel] = getattr(transformers, name)
    return found


def _family(config: PreTrainedConfig) -> Family:
    return family_of(language_config(config.to_dict()))


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
