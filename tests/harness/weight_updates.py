"""Ways in which an engine's weights are loaded again, each as its users do it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file
from torch import Tensor

if TYPE_CHECKING:
    from vllm import LLM

Weights = list[tuple[str, Tensor]]


def _weights(folder: Path) -> Weights:
    """In another order than the file's."""
    weights = list(load_file(folder / "model.safetensors").items())
    random.Random(0).shuffle(weights)
    return weights


def _session(llm: LLM, buckets: Iterable[Weights]) -> None:
    """What vLLM's weight-transfer engines do between the trainer's start and finish. The memory of
    a bucket that wide layers alone are in is used again as soon as it has been taken: vLLM's own
    layers keep references to it."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )

    from vllm_depthpar.model.wide_block import WideDecoderLayer

    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    wide = all(isinstance(layer, WideDecoderLayer) for layer in model.model.layers)
    with set_current_vllm_config(llm.llm_engine.vllm_config):
        initialize_layerwise_reload(model)
        for bucket in buckets:
            model.load_weights(bucket)
            for name, tensor in bucket:
                if wide and ".layers." in name:
                    tensor.fill_(float("nan"))
        finalize_layerwise_reload(model, llm.llm_engine.model_config)


def same(llm: LLM, folder: Path) -> None:
    """The checkpoint that the engine was made from; `folder` is that."""
    llm.collective_rpc("reload_weights")


def other(llm: LLM, folder: Path) -> None:
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})


def iterator(llm: LLM, folder: Path) -> None:
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": _weights(folder)})


def one_by_one(llm: LLM, folder: Path) -> None:
    _session(llm, [[weight] for weight in _weights(folder)])


def buckets(llm: LLM, folder: Path) -> None:
    weights = _weights(folder)
    _session(llm, [weights[at : at + 7] for at in range(0, len(weights), 7)])


def halves(llm: LLM, folder: Path) -> None:
    """Odd layers in one update and even ones in another: of pairs, never both at once."""
    for odd in (True, False):
        _session(llm, [[(n, t) for n, t in _weights(folder) if _layer(n) % 2 == odd]])


def after_a_broken_one(llm: LLM, folder: Path) -> None:
    """An update of some tensors, that ends; then one of all."""
    _session(llm, [_weights(folder)[:20]])
    one_by_one(llm, folder)


def _layer(name: str) -> int:
    _, _, rest = name.partition(".layers.")
    return int(rest.partition(".")[0]) if rest else 0


WAYS: dict[str, Callable[[LLM, Path], None]] = {
    way.__name__: way
    for way in (same, other, iterator, one_by_one, buckets, halves, after_a_broken_one)
}
