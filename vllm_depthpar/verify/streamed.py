"""Plans on transformers with one block in memory at a time: the reference for models of any size.

Blocks and equations are those of `vllm_depthpar.hf`. Only the weights come later, straight from the
checkpoint's files, and go again once their block has run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vllm_depthpar import hf
from vllm_depthpar.checkpoint.config import read_config
from vllm_depthpar.checkpoint.experts import stacked
from vllm_depthpar.checkpoint.quantized import dequantizer
from vllm_depthpar.checkpoint.tensors import check_folder, check_shape, opened, stored
from vllm_depthpar.plan import Plan
from vllm_depthpar.plan.families import Experts, family_of
from vllm_depthpar.plan.multimodal import language_names

# Positions whose logits are in memory at once.
_POSITIONS = 256


@dataclass(frozen=True)
class Score:
    """What a model makes of a text, in nats; an entry for each token but the first.

    Attributes:
        chosen: log-probability of the token that stands there.
        best: that of the likeliest one.
    """

    chosen: list[float]
    best: list[float]


class StreamedModel:
    """A checkpoint to run by plans.

    Args:
        folder: of the checkpoint. Weights that compressed-tensors, GPTQ or AWQ quantized are
            dequantized.
        device: where blocks run.

    Raises:
        UserError: its weights are quantized in another way, or are no safetensors.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder, self._device = folder, device
        self._dequantize = dequantizer(folder)
        found = stored(folder)
        # By the names of the language model alone: where each is, and what it is called there.
        name_of = family_of(read_config(str(folder))).name_of
        self._files = {
            name_of(name): (folder / found[stands][0], stands)
            for stands, name in language_names(found).items()
        }
        # Checkpoints of a model without its head have no prefix.
        self._prefix = "" if "embed_tokens.weight" in self._files else "model."

    @torch.inference_mode()
    def score(
        self,
        plan: Plan,
        texts: Sequence[Sequence[int]],
        dtype: torch.dtype,
        on_progress: Callable[[float], None] = lambda _: None,
    ) -> list[Score]:
        """Run a plan over texts.

        Args:
            texts: token ids; each text runs alone.
            dtype: of weights and activations; softmax is in fp32.
            on_progress: called with the share of the work done since the last call; they sum to 1.

        Raises:
            UserError: the checkpoint is of no family that can be restructured, lacks a tensor that
                the plan needs, or has one of another shape.
        """
        check_folder(self._folder, read_config(str(self._folder)), plan.runs)
        model = hf.outline(self._folder, plan, self._device)
        body, head = hf.body(model), model.lm_head
        experts = family_of(body.config.to_dict()).experts
        share = 1 / (len(body.layers) + 1)
        self._fill(body.embed_tokens, "embed_tokens.", dtype)
        streams: list[Any] = [
            hf.embed(model, torch.tensor([text], device=self._device)) for text in texts
        ]
        contexts = [hf.context(model, stream) for stream in streams]
        tied = model.config.tie_word_embeddings
        if not tied:
            body.embed_tokens.to("meta")
        for block in body.layers:
            for index, layer in block.members.items():
                self._fill(layer, f"layers.{index}.", dtype, experts)
            streams = [
                block(stream, **context) for stream, context in zip(streams, contexts, strict=True)
            ]
            block.to("meta")
            on_progress(share)
        self._fill(body.norm, "norm.", dtype)
        if tied:
            head.weight = body.embed_tokens.weight
        else:
            self._fill(head, "lm_head.", dtype)
        scores = [
            self._score(model, hf.last_hidden(model, stream[0]), text)
            for stream, text in zip(streams, texts, strict=True)
        ]
        on_progress(share)
        return scores

    def _score(self, model: PreTrainedModel, hidden: Tensor, text: Sequence[int]) -> Score:
        """Score a text, from what the head reads, (tokens, hidden)."""
        targets = torch.tensor(text[1:], dtype=torch.int64, device=self._device)
        chosen: list[float] = []
        best: list[float] = []
        parts = hidden[:-1].split(_POSITIONS), targets.split(_POSITIONS)
        for positions, wanted in zip(*parts, strict=True):
            logprobs = hf.logits(model, positions).log_softmax(-1)
            chosen += logprobs.gather(1, wanted[:, None])[:, 0].tolist()
            best += logprobs.amax(-1).tolist()
        return Score(chosen, best)

    def _fill(
        self, module: nn.Module, name: str, dtype: torch.dtype, experts: Experts | None = None
    ) -> None:
        """Give a module its weights; `name` is the module's in transformers' decoder, and a dot."""
        prefix = name if name == "lm_head." else self._prefix + name
        found = self._dequantize(self._read(prefix))
        if experts is not None:
            found = stacked(found, experts)
        state = {}
        for leaf, outline in module.state_dict().items():
            stands = prefix + leaf
            check_shape(stands, getattr(found.get(stands), "shape", None), outline.shape)
            state[leaf] = found[stands].to(self._device, dtype)
        module.load_state_dict(state, assign=True)

    def _read(self, prefix: str) -> dict[str, Tensor]:
        """Read all tensors whose names begin so."""
        chosen = {name: at for name, at in self._files.items() if name.startswith(prefix)}
        found = {}
        for file in {file for file, _ in chosen.values()}:
            with opened(file) as tensors:
                for name, (where, stands) in chosen.items():
                    if where == file:
                        found[name] = tensors.get_tensor(stands)
        return found
